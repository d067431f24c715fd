import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from ratelimit_sidecar.demo.traffic import MAX_IN_FLIGHT, RegionTraffic, Traffic, phases

REGIONS = ("us-east-1", "eu-west-2", "ap-southeast-1")


@asynccontextmanager
async def upstream(status: int | None, seen: list[str] | None = None) -> AsyncIterator[str]:
    """A server that gives every request that status; None: it never answers. Yields its URL."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                if seen is not None:
                    seen.append(head.split()[1].decode())
                if status is not None:
                    writer.write(f"HTTP/1.1 {status} Fine\r\ncontent-length: 0\r\n\r\n".encode())
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        await server.wait_closed()


def stop_after(count: int) -> tuple[asyncio.Event, list[float]]:
    """An event that is set with the departure of that many requests, and the list to give them to."""
    stop = asyncio.Event()

    class Departures(list[float]):
        def append(self, at: float) -> None:
            super().append(at)
            if len(self) == count:
                stop.set()

    return stop, Departures()


async def test_answers_are_counted_as_admitted_denied_and_failed() -> None:
    stop, departures = stop_after(30)
    async with upstream(200) as ok, upstream(429) as limited, upstream(503) as broken:
        traffic = Traffic(
            list(zip(REGIONS, (ok, limited, broken), strict=True)), "/rate?agent=a", 600, departures.append
        )
        await traffic.run(stop)

    us, eu, ap = traffic.regions
    assert (us.admitted, us.denied, us.errors) == (10, 0, 0)
    assert (eu.admitted, eu.denied, eu.errors) == (0, 10, 0)
    assert (ap.admitted, ap.denied, ap.errors) == (0, 0, 10)
    assert us.last_admitted_at > departures[-1] - 1
    assert eu.last_admitted_at == -math.inf


async def test_every_request_is_for_the_path_given() -> None:
    stop, departures = stop_after(6)
    seen: list[str] = []
    async with upstream(200, seen) as url:
        await Traffic([(name, url) for name in REGIONS], "/rate?agent=a", 600, departures.append).run(stop)

    assert seen == ["/rate?agent=a"] * 6


async def test_requests_leave_at_the_rate_given() -> None:
    stop, departures = stop_after(100)
    async with upstream(200) as url:
        await Traffic([(name, url) for name in REGIONS], "/", 200, departures.append).run(stop)

    # Never early. How late depends on the machine.
    assert all(at - departures[0] >= number / 200 - 0.01 for number, at in enumerate(departures))


async def test_a_hot_region_gets_its_share_of_the_load() -> None:
    stop, departures = stop_after(60)
    async with upstream(200) as url:
        traffic = Traffic([(name, url) for name in REGIONS], "/", 300, departures.append, phase_s=0.1)
        await traffic.run(stop)

    # A phase of 30 spread evenly, then one with 80 % in the first region.
    assert [len(region.sent_at) for region in traffic.regions] == [10 + 24, 10 + 3, 10 + 3]


async def test_a_region_that_does_not_answer_holds_up_no_other() -> None:
    stop, departures = stop_after(2 * (MAX_IN_FLIGHT + 10))
    seen: list[str] = []
    async with upstream(200) as fine, upstream(None, seen) as stalled:
        # The last one leaves before the first is given up, also on a busy machine.
        traffic = Traffic([("fine", fine), ("stalled", stalled)], "/", 200, departures.append)
        await traffic.run(stop)

    assert traffic.regions[0].admitted == MAX_IN_FLIGHT + 10
    assert traffic.regions[1].errors == MAX_IN_FLIGHT + 10
    assert len(seen) == MAX_IN_FLIGHT


async def test_a_refused_connection_is_an_error_without_a_latency() -> None:
    stop, departures = stop_after(2)
    async with upstream(200) as gone:
        pass
    traffic = Traffic([("one", gone), ("two", gone)], "/", 600, departures.append)
    await traffic.run(stop)

    assert [region.errors for region in traffic.regions] == [1, 1]
    assert math.isnan(traffic.regions[0].latency_ms(0.5))


def test_latencies_are_quantiles_by_the_nearest_rank() -> None:
    region = RegionTraffic("us-east-1", "http://127.0.0.1")
    region.latencies_s.extend(number / 1_000 for number in range(100, 0, -1))

    assert region.latency_ms(0.50) == pytest.approx(50)
    assert region.latency_ms(0.99) == pytest.approx(99)


def test_each_region_is_hot_once_and_shares_add_up() -> None:
    schedule = phases(REGIONS)

    assert len(schedule) == 4
    assert all(math.isclose(sum(phase.shares), 1) for phase in schedule)
    assert [phase.shares.index(max(phase.shares)) for phase in schedule[1:]] == [0, 1, 2]
