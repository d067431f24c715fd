"""No client can take all that there is."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

from freed import frees_itself
from server.front_ends import ECHO, running
from server.raw_http2 import connected

from ratelimit_sidecar.server.budget import AddressBudget, Budget, ConnectionLimiter, Places
from ratelimit_sidecar.server.framing import frame


def fill(budget: AddressBudget, connections: int) -> None:
    """Hold as much as so many greedy connections of an address may."""
    for _ in range(connections):
        held = 0
        while budget.allows(held + 1_000, 1_000):
            budget.count(1_000)
            held += 1_000


def test_one_address_holds_a_third_of_the_memory_however_many_connections_it_has() -> None:
    whole = Budget(3_000_000)
    fill(AddressBudget(whole, "10.0.0.1"), 500)
    assert whole.held <= 1_000_000
    assert AddressBudget(whole, "10.0.0.2").allows(200_000, 200_000)


def test_what_is_given_back_is_free_for_all() -> None:
    whole = Budget(3_000_000)
    greedy = AddressBudget(whole, "10.0.0.1")
    fill(greedy, 500)
    greedy.count(-greedy.held)
    assert whole.held == 0


def test_one_address_has_half_of_the_connections_at_most() -> None:
    limiter = ConnectionLimiter(100, 1)
    taken = [limiter.enter("10.0.0.1") for _ in range(100)]
    assert sum(budget is not None for budget in taken) == 51
    assert limiter.enter("10.0.0.2") is not None


def test_a_new_address_may_have_the_last_connection_and_none_beyond() -> None:
    limiter = ConnectionLimiter(2, 1)
    first, second = limiter.enter("10.0.0.1"), limiter.enter("10.0.0.2")
    assert limiter.enter("10.0.0.3") is None
    assert first is not None
    assert second is not None
    limiter.leave(first)
    assert limiter.enter("10.0.0.3") is not None


def test_addresses_that_are_gone_are_forgotten() -> None:
    limiter = ConnectionLimiter(2, 1)

    def come_and_go() -> None:
        budget = limiter.enter("10.0.0.1")
        assert budget is not None
        limiter.leave(budget)

    with frees_itself(AddressBudget):
        come_and_go()


def test_one_connection_has_a_ninth_of_the_places_and_one_address_a_third() -> None:
    places = Places(900)
    assert sum(places.enter(1, "10.0.0.1") for _ in range(900)) == 101
    assert sum(places.enter(connection, "10.0.0.1") for connection in range(2, 900)) == 301 - 101
    assert places.enter(1_000, "10.0.0.2")


def test_a_new_client_may_have_the_last_place_and_none_beyond() -> None:
    places = Places(2)
    assert places.enter(1, "10.0.0.1")
    assert places.enter(2, "10.0.0.2")
    assert not places.enter(3, "10.0.0.3")
    assert places.refused == 1
    places.leave(1, "10.0.0.1")
    assert places.enter(3, "10.0.0.3")


def test_connections_that_have_no_place_any_more_are_forgotten() -> None:
    class Connection:
        pass

    places = Places(2)

    def come_and_go() -> None:
        connection = Connection()
        assert places.enter(connection, "10.0.0.1")
        places.leave(connection, "10.0.0.1")

    with frees_itself(Connection):
        come_and_go()


async def test_a_client_that_takes_all_the_connections_it_gets_leaves_some_to_others(tmp_path: Path) -> None:
    async with running("h2", ECHO, ["127.0.0.1:0", f"unix:{tmp_path}/rls.sock"], connections=20) as front_end:
        port = int(front_end.addresses[0].rpartition(":")[2])
        greedy = [await asyncio.open_connection("127.0.0.1", port) for _ in range(40)]
        async with asyncio.timeout(30):
            while front_end.accepted_connections < 40:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert front_end.closed_connections["limit"] == 40 - 11
        async with connected(front_end.addresses[1]) as modest:
            assert (await modest.call("/test.Echo/Echo", frame(b"hello"))).body == frame(b"hello")
        for _, writer in greedy:
            writer.close()


async def test_calls_that_one_client_never_finishes_leave_room_for_those_of_others(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        addresses = ["127.0.0.1:0", f"unix:{tmp_path}/rls.sock"]
        front_end = await stack.enter_async_context(running("h2", ECHO, addresses, held_bytes=400_000))
        for _ in range(40):
            greedy = await stack.enter_async_context(connected(front_end.addresses[0]))
            for _ in range(30):
                greedy.open("/test.Echo/Echo")
            await greedy.ping()
        assert front_end.refused_calls["shed"] > 0

        modest = await stack.enter_async_context(connected(front_end.addresses[1]))
        stream = modest.open("/test.Echo/Echo")
        modest.send(stream, frame(b"hello")[:3], end=False)
        await modest.ping()
        modest.send(stream, frame(b"hello")[3:])
        assert (await modest.answer(stream)).body == frame(b"hello")
