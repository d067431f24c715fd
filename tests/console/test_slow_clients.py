"""What clients can hold of the console by being slow."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, suppress

import pytest
from console.running_console import GET, LARGE_BYTES, App, connect, get, running, until

from ratelimit_sidecar.console.bounds import DEFAULT_BOUNDS, HttpBounds
from ratelimit_sidecar.console.connection import MAX_HEAD_BYTES
from ratelimit_sidecar.console.server import HttpServer

HALF_A_HEAD = GET[:-5]
HALF_A_BODY = b"POST / HTTP/1.1\r\nhost: console\r\ncontent-length: 10\r\n\r\nhalf"
GET_LARGE = GET.replace(b"/ ", b"/large ", 1)


@pytest.mark.parametrize("sent", [b"", HALF_A_HEAD, HALF_A_BODY, GET + HALF_A_HEAD, GET + HALF_A_BODY])
async def test_a_request_that_does_not_come_whole_costs_its_connection(
    sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(bounds=HttpBounds(request=0.1)) as server, connect(server) as client:
        if sent.startswith(GET):
            client.send(GET)
            assert await client.status() == 200
        client.send(sent.removeprefix(GET))
        assert await client.closed() == b""
    assert not caplog.records


@pytest.mark.parametrize(("sent", "drop"), [(GET[:-2], b"a: b\r\n"), (HALF_A_BODY.replace(b"10", b"60000"), b"x")])
async def test_a_request_that_trickles_in_gets_no_more_time(sent: bytes, drop: bytes) -> None:
    async with running(bounds=HttpBounds(request=0.1)) as server, connect(server) as client:
        client.send(sent)
        trickling = asyncio.create_task(client.trickle(drop))
        assert await client.closed() == b""
        await trickling


async def test_the_rest_of_a_refused_body_is_read_for_a_while_only() -> None:
    async with running(bounds=HttpBounds(request=0.2)) as server, connect(server) as client:
        client.send(b"POST / HTTP/1.1\r\nhost: console\r\ncontent-length: 100000000\r\n\r\n")
        assert await client.status() == 413
        trickling = asyncio.create_task(client.trickle(b"x"))
        assert await client.closed() == b""
        await trickling


async def test_neither_an_idle_connection_nor_one_at_work_is_closed_like_that() -> None:
    app = App()
    bounds = HttpBounds(request=0.1)
    async with running(app, bounds=bounds) as server, connect(server) as idle, connect(server) as at_work:
        idle.send(GET)
        assert await idle.status() == 200
        at_work.send(GET.replace(b"/ ", b"/slow ", 1))
        await app.slow_began.wait()
        async with connect(server) as silent:
            assert await silent.closed() == b""
        idle.send(GET)
        assert await idle.status() == 200
        app.slow_may_end.set()
        assert await at_work.status() == 200


@pytest.mark.parametrize("requests", [1, 10])
async def test_an_answer_that_is_not_taken_costs_its_connection(
    requests: int, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(bounds=HttpBounds(answer=0.1, request=0.3)) as server, connect(server) as client:
        client.send(GET_LARGE * requests)
        await client.some()
        async with connect(server) as silent:
            assert await silent.closed() == b""
        assert len(await client.closed()) < LARGE_BYTES
    assert not caplog.records


@pytest.mark.parametrize("sent", [b"", HALF_A_HEAD, HALF_A_BODY])
async def test_slow_requests_keep_no_probe_out(sent: bytes) -> None:
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(running())
        for _ in range(DEFAULT_BOUNDS.connections + 12):
            client = await stack.enter_async_context(connect(server))
            client.send(sent)
        assert (await get(server)).status_code == 200


async def test_the_connection_that_waits_for_its_client_the_longest_makes_room() -> None:
    app = App()
    async with (
        running(app, bounds=HttpBounds(connections=3, new=0.0)) as server,
        # First: the server has accepted it when the others are answered.
        connect(server) as silent,
        connect(server) as at_work,
        connect(server) as idle,
    ):
        at_work.send(GET.replace(b"/ ", b"/slow ", 1))
        await app.slow_began.wait()
        idle.send(GET)
        assert await idle.status() == 200
        assert (await get(server)).status_code == 200
        assert await silent.closed() == b""
        idle.send(GET)
        assert await idle.status() == 200
        app.slow_may_end.set()
        assert await at_work.status() == 200


async def test_answers_that_are_not_taken_keep_no_probe_out() -> None:
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(running(bounds=HttpBounds(requests=2)))
        for _ in range(4):
            client = await stack.enter_async_context(connect(server))
            client.send(GET_LARGE * 3)
            await client.some()
        assert (await get(server)).status_code == 200


async def test_those_of_the_address_that_has_most_make_room() -> None:
    async with (
        running(bounds=HttpBounds(connections=3)) as server,
        connect(server, "127.0.0.9") as alone,
        connect(server),
        connect(server),
        connect(server),
    ):
        alone.send(GET)
        assert await alone.status() == 200


async def test_whoever_does_not_wait_for_an_answer_gets_no_second_one() -> None:
    async with running() as server, connect(server) as client:
        client.send(GET * 3)
        answers = await client.closed()
        assert answers.count(b"HTTP/1.1 200 OK") == 1


async def test_a_head_that_comes_in_one_read_is_no_longer_than_one_that_trickles_in() -> None:
    async with running() as server, connect(server) as client:
        client.send(GET[:-2] + b"a:\r\n" * (2 * MAX_HEAD_BYTES // 4) + b"\r\n")
        assert (await client.closed()).startswith(b"HTTP/1.1 400 ")


async def test_a_request_with_too_many_headers_is_refused() -> None:
    async with running() as server, connect(server) as client:
        for _ in range(2):
            client.send(GET[:-2] + b"a:\r\n" * 500 + b"\r\n")
            assert await client.status() == 200
        client.send(GET[:-2] + b"a:\r\n" * 600)
        assert (await client.closed()).startswith(b"HTTP/1.1 400 ")


async def test_many_lines_of_a_body_are_not_headers() -> None:
    body = b"\n" * 2_000
    async with running() as server, connect(server) as client:
        for _ in range(2):
            client.send(b"POST / HTTP/1.1\r\nhost: console\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
            assert await client.status() == 200


async def test_probes_have_a_place_when_all_others_are_taken() -> None:
    app = App()
    async with running(app, bounds=HttpBounds(requests=1)) as server, connect(server) as at_work:
        at_work.send(GET.replace(b"/ ", b"/slow ", 1))
        await app.slow_began.wait()
        assert (await get(server)).status_code == 503
        for path in ("/healthz", "/readyz", "/healthcheck", "/metrics"):
            assert (await get(server, path)).status_code == 200
        app.slow_may_end.set()


async def test_of_scrapes_that_are_not_taken_an_address_has_some() -> None:
    app = App()
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(running(app))
        clients = [await stack.enter_async_context(connect(server)) for _ in range(DEFAULT_BOUNDS.scrapes_of_address)]
        for client in clients:
            client.send(GET.replace(b"/ ", b"/metrics?endless ", 1))
            await client.some()
        assert (await get(server, "/metrics")).status_code == 503
        other = await stack.enter_async_context(connect(server, "127.0.0.9"))
        other.send(GET.replace(b"/ ", b"/metrics ", 1))
        assert await other.status() == 200
        clients.pop().close()
        await until(lambda: app.endless == DEFAULT_BOUNDS.scrapes_of_address - 1)
        assert (await get(server, "/metrics")).status_code == 200


async def test_a_scrape_whose_answer_takes_too_long_is_ended() -> None:
    async with running(bounds=HttpBounds(scrape=0.05)) as server, connect(server) as client:
        client.send(GET.replace(b"/ ", b"/metrics?endless ", 1))
        await client.closed()


@pytest.mark.parametrize("requests", [1, 50])
async def test_busy_clients_that_come_back_at_once_keep_no_probe_out(requests: int) -> None:
    # The probe has to wait for all the clients' turns here, before it can ask.
    async def ask_on(server: HttpServer) -> None:
        while True:
            with suppress(OSError, asyncio.IncompleteReadError):
                async with connect(server) as client:
                    while True:
                        client.send(GET * requests)
                        await client.status()

    async with running(bounds=HttpBounds(new=60)) as server, asyncio.TaskGroup() as tasks:
        busy = [tasks.create_task(ask_on(server)) for _ in range(DEFAULT_BOUNDS.connections + 12)]
        for _ in range(10):
            assert (await get(server, "/healthz")).status_code == 200
        for task in busy:
            task.cancel()
