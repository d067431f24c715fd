"""The console on a real socket."""

from __future__ import annotations

import asyncio
import socket

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from ratelimit_sidecar.console.server import MAX_BODY_BYTES, ConsoleServer
from ratelimit_sidecar.server.listeners import ListenError


class App(Starlette):
    """Answers at once, or on `/slow` when it is told to."""

    def __init__(self) -> None:
        self.slow_began = asyncio.Event()
        self.slow_may_end = asyncio.Event()
        super().__init__(routes=[Route("/", self.fast, methods=["GET", "POST"]), Route("/slow", self.slow)])

    async def fast(self, request: Request) -> Response:
        return PlainTextResponse(f"{len(await request.body())} bytes")

    async def slow(self, _request: Request) -> Response:
        self.slow_began.set()
        await self.slow_may_end.wait()
        return PlainTextResponse("at last")


async def get(server: ConsoleServer, path: str = "/") -> httpx.Response:
    async with httpx.AsyncClient(timeout=10) as client:
        return await client.get(f"http://{server.address}{path}")


async def until_refused(server: ConsoleServer) -> None:
    host, _, port = server.address.rpartition(":")
    while True:
        try:
            _, writer = await asyncio.open_connection(host, int(port))
        except ConnectionRefusedError:
            return
        writer.close()


async def test_it_answers_on_the_port_it_was_given_by_the_system() -> None:
    server = ConsoleServer(App(), "127.0.0.1:0")
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
    server = ConsoleServer(App(), address)
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
            await ConsoleServer(App(), address).start()


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
        await ConsoleServer(App(), address).start()


async def test_a_stop_lets_requests_in_flight_end_and_refuses_new_ones() -> None:
    app = App()
    server = ConsoleServer(app, "127.0.0.1:0")
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
    server = ConsoleServer(App(), "127.0.0.1:0")
    await server.start()
    serving = asyncio.create_task(server.serve())
    await server.ready.wait()
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    successor = ConsoleServer(App(), server.address)
    await successor.start()
    await successor.stop()


async def test_a_server_stopped_before_it_served_does_not_serve() -> None:
    server = ConsoleServer(App(), "127.0.0.1:0")
    await server.start()
    await server.stop()
    await server.serve()
    assert not server.ready.is_set()


async def test_a_large_body_is_refused() -> None:
    server = ConsoleServer(App(), "127.0.0.1:0")
    await server.start()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(server.serve())
        await server.ready.wait()
        async with httpx.AsyncClient() as client:
            response = await client.post(f"http://{server.address}/", content=b"x" * (MAX_BODY_BYTES + 1))
        assert response.status_code == 413
        await server.stop()


async def test_garbage_on_the_wire_costs_one_connection() -> None:
    server = ConsoleServer(App(), "127.0.0.1:0")
    await server.start()
    host, _, port = server.address.rpartition(":")
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(server.serve())
        await server.ready.wait()
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"\x00\xff not http at all\r\n\r\n")
        await writer.drain()
        await asyncio.wait_for(reader.read(), 10)
        writer.close()
        assert (await get(server)).status_code == 200
        await server.stop()
