"""The connections of proxies: one for each request under way, of which none is closed before its answer."""

from __future__ import annotations

import asyncio
import gc
from contextlib import AsyncExitStack
from dataclasses import replace
from itertools import count

import pytest
from console.running_console import GET, App, Client, connect, running, until
from freed import frees_itself

from ratelimit_sidecar.console.bounds import DEFAULT_BOUNDS
from ratelimit_sidecar.console.proxies import HEADER_BYTES, KEPT_HEAD_BYTES, ProxyConnection, ProxyPlaces
from ratelimit_sidecar.server.turns import StepQueue, Turns

GET_SLOW = GET.replace(b"/ ", b"/slow ", 1)
OTHER = "127.0.0.9"
POST = b"POST / HTTP/1.1\r\nhost: console\r\ncontent-length: 200000\r\n\r\n"


async def answered(client: Client) -> Client:
    client.send(GET)
    assert await client.status() == 200
    return client


async def under_way(client: Client, app: App, number: int) -> Client:
    client.send(GET_SLOW)
    await until(lambda: app.at_work == number)
    return client


def connections() -> list[ProxyConnection]:
    return [found for found in gc.get_objects() if isinstance(found, ProxyConnection)]


def slow_turns() -> Turns:
    """With a clock by which each step takes a second, so that a turn has one."""
    return Turns(count(0, 1_000_000_000).__next__)


def hold(turns: Turns, queue: StepQueue, is_over: asyncio.Event) -> None:
    """Let the connections of this address wait for their turns until it is over."""

    def step() -> None:
        if not is_over.is_set():
            queue.steps.appendleft(step)

    turns.join(queue, step)


async def test_the_longest_idle_connections_make_room_for_a_new_one() -> None:
    app = App()
    async with running(app, ProxyPlaces(12, Turns())) as server, AsyncExitStack() as stack:
        longest = await answered(await stack.enter_async_context(connect(server, OTHER)))
        later, last = [await answered(await stack.enter_async_context(connect(server))) for _ in range(2)]
        at_work = [
            await under_way(await stack.enter_async_context(connect(server)), app, number) for number in range(1, 5)
        ]
        await under_way(await stack.enter_async_context(connect(server)), app, 5)
        assert await longest.closed() == b""
        await under_way(await stack.enter_async_context(connect(server)), app, 6)
        assert await later.closed() == b""
        await answered(last)
        app.slow_may_end.set()
        assert [await each.status() for each in at_work] == [200] * 4


async def test_an_address_that_has_too_many_for_what_others_left_has_two_idle_ones_closed() -> None:
    app, places = App(), ProxyPlaces(11, Turns())
    async with running(app, places) as server, AsyncExitStack() as stack:
        idle = [await answered(await stack.enter_async_context(connect(server, f"127.0.0.{n}"))) for n in (2, 3, 4)]
        for number in range(1, 5):
            await under_way(await stack.enter_async_context(connect(server)), app, number)
        async with connect(server, OTHER), connect(server, OTHER):
            await until(lambda: len(connections()) == 9)
            await under_way(await stack.enter_async_context(connect(server)), app, 5)
            assert [await client.closed() for client in idle[:2]] == [b"", b""]
        assert places.refused == 0
        app.slow_may_end.set()


async def test_an_address_with_half_of_what_it_may_have_is_told_to_close_what_it_has_used() -> None:
    """Closed by the server, an idle connection may take a request along that is under way."""
    async with running(proxies=ProxyPlaces(9, Turns())) as server, AsyncExitStack() as stack:
        kept = [await answered(await stack.enter_async_context(connect(server))) for _ in range(3)]
        async with connect(server):
            await until(lambda: len(connections()) == 4)
            kept[0].send(GET)
            assert b"connection: close" in (await kept[0].closed()).lower()
            for client in kept[1:]:
                await answered(await answered(client))


async def test_a_connection_is_not_closed_before_its_answer() -> None:
    """However long the others of its address have been there, and of however many."""
    app, places = App(), ProxyPlaces(6, Turns())
    async with running(app, places) as server, AsyncExitStack() as stack:
        at_work = [
            await under_way(await stack.enter_async_context(connect(server)), app, number) for number in range(1, 5)
        ]
        async with connect(server) as one_more:
            assert await one_more.closed() == b""
            assert places.refused == 1
        async with connect(server, OTHER) as other:
            await answered(other)
        app.slow_may_end.set()
        assert [await each.status() for each in at_work] == [200] * 4


async def test_an_address_without_connections_takes_the_place_of_an_idle_one() -> None:
    app = App()
    async with running(app, ProxyPlaces(6, Turns())) as server, AsyncExitStack() as stack:
        longest, *later = [
            await answered(await stack.enter_async_context(connect(server, f"127.0.0.{number}")))
            for number in range(2, 6)
        ]
        at_work = [
            await under_way(await stack.enter_async_context(connect(server, f"127.0.1.{number}")), app, number)
            for number in range(1, 3)
        ]
        await answered(await stack.enter_async_context(connect(server)))
        assert await longest.closed() == b""
        for client in later:
            await answered(client)
        app.slow_may_end.set()
        assert [await each.status() for each in at_work] == [200] * 2


async def test_a_connection_that_was_not_used_is_kept_as_an_idle_one_is() -> None:
    bounds = replace(DEFAULT_BOUNDS, request=0.05)
    async with running(proxies=ProxyPlaces(4, Turns()), bounds=bounds) as server, connect(server) as client:
        await until(lambda: len(connections()) == 1)
        (connection,) = connections()
        await asyncio.sleep(2 * bounds.request)
        await answered(client)
        await asyncio.sleep(2 * bounds.request)
        await answered(client)
        assert connections() == [connection]


async def test_a_connection_that_was_never_used_is_closed_after_the_time_of_idle_ones() -> None:
    bounds = replace(DEFAULT_BOUNDS, idle=1)
    async with running(proxies=ProxyPlaces(2, Turns()), bounds=bounds) as server, connect(server) as client:
        assert await client.closed() == b""


async def test_what_waits_for_a_turn_is_not_late() -> None:
    turns = slow_turns()
    bounds = replace(DEFAULT_BOUNDS, request=0.05)
    async with running(proxies=ProxyPlaces(4, turns), bounds=bounds) as server, connect(server) as client:
        client.send(GET[:10])
        await until(lambda: len(connections()) == 1 and not connections()[0].is_idle)
        is_over = asyncio.Event()
        hold(turns, connections()[0].budget.call_queue, is_over)
        client.send(GET[10:])
        await asyncio.sleep(3 * bounds.request)
        is_over.set()
        assert await client.status() == 200
        client.send(GET[:10])
        assert await client.closed() == b""


async def test_a_place_is_free_again_when_its_connection_is_closed() -> None:
    async with running(proxies=ProxyPlaces(1, Turns())) as server:
        for _ in range(3):
            async with connect(server) as client:
                await answered(client)


async def test_more_requests_than_are_at_work_at_once_are_all_answered() -> None:
    async with running(proxies=ProxyPlaces(1_024, Turns())) as server, AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connect(server)) for _ in range(5 * DEFAULT_BOUNDS.requests)]
        for client in clients:
            client.send(GET)
        assert {await client.status() for client in clients} == {200}


async def test_while_its_address_waits_for_a_turn_requests_are_kept_and_no_connection_counts_as_idle() -> None:
    turns = slow_turns()
    proxies = ProxyPlaces(9, turns)
    async with running(proxies=proxies) as server, AsyncExitStack() as stack:
        clients = [await answered(await stack.enter_async_context(connect(server))) for _ in range(3)]
        queue = connections()[0].budget.call_queue
        is_over = asyncio.Event()
        hold(turns, queue, is_over)
        clients += [await stack.enter_async_context(connect(server)) for _ in range(2)]
        for client in clients:
            client.send(GET[:10])
        async with connect(server) as one_more:
            assert await one_more.closed() == b""
        is_over.set()
        for client in clients:
            client.send(GET[10:])
            assert await client.status() == 200


async def test_a_connection_whose_answer_ends_while_its_address_waits_for_a_turn_does_not_count_as_idle() -> None:
    app, turns = App(), slow_turns()
    async with running(app, ProxyPlaces(9, turns)) as server, AsyncExitStack() as stack:
        at_work = [
            await under_way(await stack.enter_async_context(connect(server)), app, number) for number in range(1, 4)
        ]
        is_over = asyncio.Event()
        hold(turns, connections()[0].budget.call_queue, is_over)
        app.slow_may_end.set()
        assert [await client.status() for client in at_work] == [200] * 3
        for _ in range(2):
            (await stack.enter_async_context(connect(server))).send(GET[:10])
        async with connect(server) as one_more:
            assert await one_more.closed() == b""
        is_over.set()
        for client in at_work:
            await answered(client)


async def test_who_lets_too_much_wait_for_its_turn_is_disconnected() -> None:
    turns = slow_turns()
    async with (
        running(proxies=ProxyPlaces(4, turns, unread_bytes=100_000)) as server,
        connect(server) as client,
        connect(server) as other,
    ):
        await answered(client)
        await answered(other)
        is_over = asyncio.Event()
        hold(turns, connections()[0].budget.call_queue, is_over)
        client.send(POST + bytes(200_000))
        is_over.set()
        await client.closed()
        await answered(other)


WITHOUT_BODY = POST[:-2] + b"".join(b"h%d: 1\r\n" % number for number in range(100)) + b"\r\n"


async def test_the_headers_of_a_request_whose_body_is_not_there_count_as_memory() -> None:
    places = ProxyPlaces(4, Turns())
    async with running(proxies=places) as server, connect(server) as client:
        client.send(WITHOUT_BODY)
        await until(lambda: sum(each.budget.held for each in connections()) == 102 * HEADER_BYTES)
        client.send(bytes(200_000))
        assert await client.status() == 200
        assert [each.budget.held for each in connections()] == [0]


async def test_who_has_too_many_headers_wait_for_a_body_is_disconnected() -> None:
    places = ProxyPlaces(4, Turns(), unread_bytes=8 * 100 * HEADER_BYTES)
    async with running(proxies=places) as server, connect(server) as client, connect(server) as other:
        client.send(WITHOUT_BODY)
        assert await client.closed() == b""
        await answered(other)
        assert {each.budget.held for each in connections()} == {0}


async def test_of_heads_that_are_too_long_little_is_kept_and_each_is_refused() -> None:
    """All that had come of each was more than an address may let wait: they were disconnected, and proxies let pass."""
    places = ProxyPlaces(64, slow_turns(), unread_bytes=64 * KEPT_HEAD_BYTES)
    async with running(proxies=places) as server, AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connect(server)) for _ in range(20)]
        for client in clients:
            client.send(GET[:-2] + b"x-long: " + b"x" * 100_000)
        for client in clients:
            assert (await client.closed()).startswith(b"HTTP/1.1 400 ")


async def test_bodies_that_wait_are_kept_whole() -> None:
    async with running(proxies=ProxyPlaces(64, slow_turns())) as server, AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connect(server)) for _ in range(5)]
        for client in clients:
            client.send(POST + bytes(200_000))
        assert [await client.status() for client in clients] == [200] * 5


async def test_a_body_is_read_and_dropped() -> None:
    async with running(proxies=ProxyPlaces(4, Turns())) as server, connect(server) as client:
        client.send(POST + bytes(200_000) + GET[:5])
        assert (await client.closed()).endswith(b"\r\n\r\n0 bytes")


@pytest.mark.parametrize("sent", [GET, GET[:-5], POST + bytes(200_000), POST + bytes(5)])
async def test_a_connection_leaves_nothing_for_the_garbage_collection(sent: bytes) -> None:
    async with running(proxies=ProxyPlaces(4, Turns())) as server:
        with frees_itself(ProxyConnection):
            async with connect(server) as client:
                client.send(sent)
                async with connect(server) as other:
                    await answered(other)
            await until(lambda: not connections())


async def test_nor_does_one_that_is_reset_while_it_is_idle() -> None:
    async with running(proxies=ProxyPlaces(4, Turns())) as server:
        with frees_itself(ProxyConnection):
            async with connect(server) as client:
                await answered(client)
                client.reset()
            await until(lambda: not connections())
