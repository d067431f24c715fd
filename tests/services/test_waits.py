"""Waits end in time, and their answers come out a few at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator

import pytest
import structlog.testing
from freed import frees_itself
from limiter.requests import NOW_US, OK, OVER_LIMIT
from limiter.test_waiting import code_of
from services.waiting_service import PATH, REQUEST, WaitingService, until

from ratelimit_sidecar.crdt.waiting import Outcome, PendingDecision
from ratelimit_sidecar.server.deferred import answer_of
from ratelimit_sidecar.server.rpc import Headers
from ratelimit_sidecar.services.ratelimit import LEAST_LEFT_SECONDS, MAX_TIMEOUT_PART, max_wait_s
from ratelimit_sidecar.services.waits import STEP


def ask(service: WaitingService, *headers: tuple[bytes, bytes]) -> PendingDecision:
    waiting = service.service.handlers()[PATH](REQUEST, Headers(headers))  # type: ignore[operator]
    assert isinstance(waiting, PendingDecision)
    return waiting


async def test_a_request_whose_wait_is_over_is_answered() -> None:
    service = WaitingService(wait_ms=1)
    assert code_of(await answer_of(ask(service))) == OVER_LIMIT
    assert service.queues.counts[Outcome.EXPIRED] == 1


async def test_a_request_that_is_served_is_answered_at_once() -> None:
    service = WaitingService()
    waiting = ask(service)
    service.node.come(1)
    assert code_of(await answer_of(waiting)) == OK


async def test_the_timeout_of_a_client_ends_the_wait_before_it_is_over() -> None:
    service = WaitingService(wait_ms=1_000)
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    assert code_of(await answer_of(ask(service, (b"grpc-timeout", b"100m")))) == OVER_LIMIT
    # The loop counts milliseconds.
    assert 0.05 <= loop.time() - began_s < 1


@pytest.mark.parametrize(
    ("timeout", "seconds"),
    [
        (b"2S", 2),
        (b"250m", 0.25),
        (b"40m", 0.04),
        (b"20m", 0.02),
        (b"1M", 60),
        (b"1H", 3_600),
        (b"50u", 5e-5),
        (b"7n", 7e-9),
    ],
)
def test_a_request_waits_for_three_quarters_of_its_timeout_or_as_long_as_leaves_time_for_the_answer(
    timeout: bytes, seconds: float
) -> None:
    patience = max_wait_s(Headers([(b"a", b"b"), (b"grpc-timeout", timeout)]))
    assert patience == pytest.approx(max(0, min(MAX_TIMEOUT_PART * seconds, seconds - LEAST_LEFT_SECONDS)))


@pytest.mark.parametrize("timeout", [b"", b"m", b"-1S", b"1", b"1x", b"1.5S", b"9" * 5_000 + b"S"])
def test_a_timeout_that_is_none_bounds_nothing(timeout: bytes) -> None:
    assert max_wait_s(Headers([(b"grpc-timeout", timeout)])) == float("inf")


async def test_a_cancelled_wait_is_over_and_nobody_is_answered() -> None:
    service = WaitingService()
    answering = asyncio.create_task(answer_of(ask(service)))
    await service.until_waiting(1)
    await asyncio.sleep(0)
    answering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await answering
    await until(lambda: service.queues.counts[Outcome.CANCELLED] == 1)


async def test_in_one_turn_of_the_event_loop_a_bounded_number_is_dropped() -> None:
    """So whoever has much to cancel or to expire keeps others waiting no longer than that."""
    service = WaitingService()
    waits = [ask(service) for _ in range(2 * STEP + 1)]
    for waiting in waits:
        waiting.cancel()
    dropped = []
    while service.queues.waiting:
        await asyncio.sleep(0)
        dropped.append(service.queues.counts[Outcome.CANCELLED])
    assert dropped == [STEP, 2 * STEP, 2 * STEP + 1]


async def test_of_many_that_are_served_at_once_a_bounded_number_is_answered_in_a_turn() -> None:
    service = WaitingService()
    answered: list[int] = []
    waits = [ask(service) for _ in range(2 * STEP)]
    for number, waiting in enumerate(waits):
        waiting.on_end = lambda number=number: answered.append(number)
        service.queues.end(waiting, Outcome.SERVED, NOW_US)
    await asyncio.sleep(0)
    assert len(answered) == STEP
    await asyncio.sleep(0)
    assert len(answered) == 2 * STEP
    assert answered == sorted(answered)


async def test_an_answer_that_cannot_be_given_costs_the_others_nothing() -> None:
    service = WaitingService(wait_ms=1)
    broken, sound = ask(service), ask(service)

    def fail() -> None:
        raise RuntimeError("broken")

    broken.on_end = fail
    with structlog.testing.capture_logs() as logged:
        assert code_of(await answer_of(sound)) == OVER_LIMIT
    assert [line["event"] for line in logged] == ["rpc_failed"]
    assert service.queues.waiting == 0


async def test_a_call_that_fails_once_it_waits_waits_no_longer_than_others() -> None:
    service = WaitingService(wait_ms=1)

    class Broken:
        may_be_sampled = False

        def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        service.service.should_rate_limit(REQUEST, Broken())
    await until(lambda: not service.queues.waiting)
    assert service.queues.counts[Outcome.EXPIRED] == 1


async def test_one_that_cannot_be_held_is_decided_now() -> None:
    service = WaitingService()
    waiting = ask(service)
    waiting.end_now()
    assert code_of(waiting.result()) == OVER_LIMIT


async def answer(service: WaitingService) -> None:
    waiting = ask(service)
    service.node.come(1)
    await answer_of(waiting)


async def give_up(service: WaitingService) -> None:
    ask(service).cancel()


async def decide_now(service: WaitingService) -> None:
    ask(service).end_now()


@pytest.mark.parametrize("end", [answer, give_up, decide_now])
async def test_a_wait_that_is_over_is_forgotten(end: Callable[[WaitingService], Awaitable[None]]) -> None:
    service = WaitingService(wait_ms=3_600_000)
    with frees_itself(PendingDecision):
        await end(service)
        # What has ended is delivered in the next turn.
        for _ in range(3):
            await asyncio.sleep(0)


async def test_a_trace_has_the_whole_wait() -> None:
    tracer = Tracer()
    service = WaitingService(wait_ms=20, tracer=tracer)
    await answer_of(ask(service, (b"traceparent", b"sampled")))
    [(began_ns, ended_ns)] = tracer.recorded
    assert ended_ns - began_ns >= 15_000_000


class Tracer:
    """Samples all."""

    def __init__(self) -> None:
        self.recorded: list[tuple[int, int]] = []

    def sampled(self, _metadata: object) -> object:
        return self

    def record(self, _parent: object, began_ns: int, ended_ns: int, *_rest: object) -> None:
        self.recorded.append((began_ns, ended_ns))
