"""The console on a real socket."""

from __future__ import annotations

import asyncio
import gc
import signal
import socket
import time
from collections.abc import AsyncIterator
from email.utils import parsedate_to_datetime

import httpx
import pytest
from console.running_console import GET, LARGE_BYTES, App, connect, get, running, until

from ratelimit_sidecar.console.bounds import DEFAULT_BOUNDS, HttpBounds
from ratelimit_sidecar.console.connection import ConsoleConnection
from ratelimit_sidecar.console.requests import MAX_BODY_BYTES
from ratelimit_sidecar.console.server import HttpServer
from ratelimit_sidecar.server.listeners import ListenError


async def until_refused(server: HttpServer) -> None:
    host, _, port = server.address.rpartition(":")
    while True:
        try:
            _, writer = await asyncio.open_connection(host, int(port))
        except ConnectionRefusedError:
            return
        writer.close()


async def test_it_answers_on_the_port_it_was_given_by_the_system() -> None:
    server = HttpServer(App(), "127.0.0.1:0")
    await server.start()
    assert not server.address.endswith(":0")
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(server.serve())
        await server.ready.wait()
        assert (await get(server)).text == "0 bytes"
        await server.stop()


def loopback_has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize(
    "address",
    [
        "localhost:0",
        pytest.param("[::1]:0", marks=pytest.mark.skipif(not loopback_has_ipv6(), reason="no IPv6 here")),
    ],
)
async def test_names_and_ipv6_are_addresses_too(address: str) -> None:
    server = HttpServer(App(), address)
    await server.start()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(server.serve())
        await server.ready.wait()
        assert (await get(server)).status_code == 200
        await server.stop()


async def test_a_taken_address_is_named_in_the_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(ListenError, match=f"cannot listen on {address}: Address already in use"):
            await HttpServer(App(), address).start()


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("8080", "expected host:port"),
        (":8080", "expected host:port"),
        ("127.0.0.1:http", "expected host:port"),
        ("127.0.0.1:65536", "expected host:port"),
        ("203.0.113.1:0", "Cannot assign requested address"),
        ("no-such-host.invalid:0", ""),
    ],
)
async def test_an_address_that_cannot_be_listened_on_is_named_in_the_error(address: str, reason: str) -> None:
    with pytest.raises(ListenError, match=f"cannot listen on {address}: {reason}"):
        await HttpServer(App(), address).start()


async def test_a_stop_lets_requests_in_flight_end_and_refuses_new_ones() -> None:
    app = App()
    server = HttpServer(app, "127.0.0.1:0")
    await server.start()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(server.serve())
        await server.ready.wait()
        in_flight = tasks.create_task(get(server, "/slow"))
        await app.slow_began.wait()
        stopping = tasks.create_task(server.stop())
        await asyncio.sleep(0)
        assert not server.ready.is_set()
        await asyncio.wait_for(until_refused(server), 1)
        app.slow_may_end.set()
        assert (await in_flight).text == "at last"
        await stopping


async def test_a_cancelled_server_gives_its_port_back() -> None:
    server = HttpServer(App(), "127.0.0.1:0")
    await server.start()
    serving = asyncio.create_task(server.serve())
    await server.ready.wait()
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    successor = HttpServer(App(), server.address)
    await successor.start()
    await successor.stop()


async def test_a_server_stopped_before_it_served_does_not_serve() -> None:
    server = HttpServer(App(), "127.0.0.1:0")
    await server.start()
    await server.stop()
    await server.serve()
    assert not server.ready.is_set()


async def test_a_stop_does_not_wait_for_connections_without_a_request() -> None:
    async with running() as server, connect(server) as idle, connect(server) as silent, connect(server) as begun:
        idle.send(GET)
        assert await idle.status() == 200
        begun.send(GET[:-5])
        # The same loop answers this after it has read those.
        await get(server)
        loop = asyncio.get_running_loop()
        began = loop.time()
        await server.stop()
        assert loop.time() - began < 1
        for client in (idle, silent, begun):
            assert await client.closed() == b""


async def test_a_stop_waits_no_longer_than_the_drain_time_for_the_rest_of_a_request(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with running(bounds=HttpBounds(drain=0.2)) as server, connect(server) as client:
        client.send(b"POST / HTTP/1.1\r\nhost: console\r\ncontent-length: 10\r\n\r\nhalf")
        await get(server)
        await asyncio.wait_for(server.stop(), 2)
        assert await client.closed() == b""
    assert not caplog.records


async def test_a_stop_lets_the_rest_of_a_request_come() -> None:
    async with running() as server, connect(server) as client, asyncio.TaskGroup() as tasks:
        client.send(b"POST / HTTP/1.1\r\nhost: console\r\ncontent-length: 8\r\n\r\nhalf")
        await get(server)
        tasks.create_task(server.stop())
        await until_refused(server)
        client.send(b"half")
        assert await client.status() == 200
        assert await client.closed() == b""


async def test_a_stop_lets_a_large_answer_be_taken() -> None:
    async with running() as server, connect(server) as client, asyncio.TaskGroup() as tasks:
        client.send(b"GET /large HTTP/1.1\r\nhost: console\r\n\r\n")
        await client.some()
        tasks.create_task(server.stop())
        await until_refused(server)
        assert len(await client.closed()) > LARGE_BYTES


async def test_a_handler_that_outlives_the_drain_is_cancelled(caplog: pytest.LogCaptureFixture) -> None:
    app = App()
    async with running(app, bounds=HttpBounds(drain=0.1, cancel=0.1)) as server, connect(server) as client:
        client.send(b"GET /slow HTTP/1.1\r\nhost: console\r\n\r\n")
        await app.slow_began.wait()
        await asyncio.wait_for(server.stop(), 2)
        assert app.at_work == 0
    assert "Cancel 1 running task(s)" in caplog.text


async def test_a_cancelled_server_drains() -> None:
    app = App()
    server = HttpServer(app, "127.0.0.1:0")
    await server.start()
    serving = asyncio.create_task(server.serve())
    await server.ready.wait()
    in_flight = asyncio.create_task(get(server, "/slow"))
    await app.slow_began.wait()
    serving.cancel()
    await asyncio.wait_for(until_refused(server), 1)
    assert not serving.done()
    app.slow_may_end.set()
    assert (await in_flight).text == "at last"
    with pytest.raises(asyncio.CancelledError):
        await serving


async def test_a_server_that_dies_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: object, **_options: object) -> None:
        raise OSError("out of memory")

    server = HttpServer(App(), "127.0.0.1:0")
    await server.start()
    monkeypatch.setattr("uvicorn.Server.on_tick", fail)
    with pytest.RaisesGroup(pytest.RaisesExc(OSError, match="out of memory")):
        await server.serve()
    await asyncio.wait_for(server.stop(), 1)


async def test_signals_are_left_to_the_process() -> None:
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    async with running():
        assert [signal.getsignal(number) for number in numbers] == before


async def test_it_says_the_date_and_not_what_it_is_made_of() -> None:
    async with running() as server:
        headers = (await get(server)).headers
    assert abs(parsedate_to_datetime(headers["date"]).timestamp() - time.time()) < 10
    assert "server" not in headers


async def test_a_connection_is_kept_for_the_next_request() -> None:
    async with running() as server, connect(server) as client:
        for _ in range(3):
            client.send(GET)
            assert await client.status() == 200


async def test_a_body_of_the_allowed_size_is_read() -> None:
    async with running() as server, httpx.AsyncClient(trust_env=False) as client:
        response = await client.post(f"http://{server.address}/", content=b"x" * MAX_BODY_BYTES)
    assert response.text == f"{MAX_BODY_BYTES} bytes"


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_larger_body_is_refused(chunked: bool) -> None:
    body = b"x" * (MAX_BODY_BYTES + 1)

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 10_000):
            yield body[start : start + 10_000]

    async with running() as server, httpx.AsyncClient(trust_env=False) as client:
        response = await client.post(f"http://{server.address}/", content=chunks() if chunked else body)
        assert response.status_code == 413
        assert "error" in response.json()
        assert (await client.get(f"http://{server.address}/")).status_code == 200


async def test_a_head_that_is_too_large_is_refused() -> None:
    async with running() as server, connect(server) as client:
        client.send(b"GET / HTTP/1.1\r\nhost: console\r\nx: " + b"x" * 20_000)
        assert (await client.closed()).startswith(b"HTTP/1.1 400 ")


async def test_requests_beyond_those_at_work_wait_until_one_is_answered() -> None:
    app = App()
    async with running(app) as server, asyncio.TaskGroup() as tasks:
        slow = [tasks.create_task(get(server, "/slow")) for _ in range(2 * DEFAULT_BOUNDS.requests)]
        await until(lambda: app.at_work == DEFAULT_BOUNDS.requests)
        app.slow_may_end.set()
        assert {(await answer).status_code for answer in slow} == {200}


async def test_a_request_that_waits_too_long_for_others_is_refused() -> None:
    app = App()
    async with running(app, bounds=HttpBounds(place=0.05)) as server, asyncio.TaskGroup() as tasks:
        slow = [tasks.create_task(get(server, "/slow")) for _ in range(DEFAULT_BOUNDS.requests)]
        await until(lambda: app.at_work == DEFAULT_BOUNDS.requests)
        refused = await get(server)
        assert refused.status_code == 503
        assert "error" in refused.json()
        app.slow_may_end.set()
        assert {(await answer).status_code for answer in slow} == {200}
        assert (await get(server)).status_code == 200


async def test_a_request_that_fails_gives_its_place_back() -> None:
    async with running(bounds=HttpBounds(requests=1)) as server:
        for _ in range(2):
            assert (await get(server, "/broken")).status_code == 500


async def test_a_new_connection_is_closed_while_all_others_scrape() -> None:
    app = App()
    async with (
        running(app, bounds=HttpBounds(connections=2)) as server,
        connect(server) as one,
        connect(server) as other,
    ):
        for client in (one, other):
            client.send(GET.replace(b"/ ", b"/metrics?endless ", 1))
            await client.some()
        async with connect(server) as late:
            assert await late.closed() == b""
        assert app.endless == 2


async def test_a_request_that_is_no_probe_makes_room_when_no_client_is_slow() -> None:
    app = App()
    slow = GET.replace(b"/ ", b"/slow ", 1)
    async with running(app, bounds=HttpBounds(connections=2)) as server, connect(server) as one:
        one.send(slow)
        await until(lambda: app.at_work == 1)
        async with connect(server) as other:
            other.send(slow)
            await until(lambda: app.at_work == 2)
            assert (await get(server, "/healthz")).status_code == 200
            assert await one.closed() == b""
            app.slow_may_end.set()
            assert await other.status() == 200


@pytest.mark.parametrize(
    "sent",
    [
        b"\x00\xff not http at all\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: console\r\ncontent-length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: console\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: console\r\ntransfer-encoding: chunked\r\n\r\nno chunk\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    ],
)
async def test_garbage_on_the_wire_costs_one_connection_and_no_line_of_the_log(
    sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with running() as server, connect(server) as client:
        client.send(sent)
        assert (await client.closed()).startswith(b"HTTP/1.1 4")
        assert (await get(server)).status_code == 200
    assert not caplog.records


async def test_garbage_after_a_refused_body_costs_one_connection_and_no_line_of_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with running() as server, connect(server) as client:
        head = b"POST / HTTP/1.1\r\nhost: console\r\ntransfer-encoding: chunked\r\n\r\n"
        client.send(head + b"%x\r\n" % (MAX_BODY_BYTES + 1) + b"x" * (MAX_BODY_BYTES + 1) + b"\r\n")
        assert await client.status() == 413
        client.send(b"no chunk\r\n")
        assert await client.closed() == b""
        assert (await get(server)).status_code == 200
    assert not caplog.records


async def test_a_websocket_is_no_error_of_the_server(caplog: pytest.LogCaptureFixture) -> None:
    async with running() as server, connect(server) as client:
        client.send(GET[:-2] + b"connection: upgrade\r\nupgrade: websocket\r\n\r\n")
        assert await client.status() == 200
    assert not caplog.records


async def test_what_uvicorn_reports_as_an_error_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async with running() as server:
        assert (await get(server, "/broken")).status_code == 500
    [record] = caplog.records
    assert (record.name, record.levelname) == ("uvicorn.error", "ERROR")


@pytest.mark.parametrize(
    "sent",
    [
        GET,
        GET[:-5],
        GET.replace(b"/ ", b"/broken ", 1),
        b"\x00\xff not http at all\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: console\r\ncontent-length: 10\r\n\r\nhalf",
        b"POST / HTTP/1.1\r\nhost: console\r\ncontent-length: 100000\r\n\r\nlarge",
        b"POST / HTTP/1.1\r\nhost: console\r\ntransfer-encoding: chunked\r\n\r\nno chunk\r\n",
    ],
)
async def test_a_connection_leaves_nothing_for_the_garbage_collection(sent: bytes) -> None:
    """Which is practically never run (`app.GC_THRESHOLDS`)."""

    def connections() -> int:
        return sum(isinstance(found, ConsoleConnection) for found in gc.get_objects())

    async with running() as server:
        gc.collect()
        gc.disable()
        try:
            async with connect(server) as client:
                client.send(sent)
                # The same loop has read what was sent once it answers this.
                assert (await get(server)).status_code == 200
            await until(lambda: connections() == 0)
        finally:
            gc.enable()
