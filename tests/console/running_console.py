"""A console server on a real socket, an application for it, and clients that send what they like."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from ratelimit_sidecar.console.bounds import DEFAULT_BOUNDS, HttpBounds
from ratelimit_sidecar.console.proxies import ProxyPlaces
from ratelimit_sidecar.console.server import HttpServer

GET = b"GET / HTTP/1.1\r\nhost: console\r\n\r\n"
LARGE_BYTES = 32 * 1024 * 1024
"""More than the kernel takes for a client that does not read."""


class App(Starlette):
    """Answers at once; on `/slow` when it is told to, and then only if it is let.

    Attributes:
        at_work: requests to `/slow` that are not answered yet.
        endless: answers to `/metrics?endless` that still go on.
    """

    def __init__(self) -> None:
        self.slow_began = asyncio.Event()
        self.slow_may_end = asyncio.Event()
        self.at_work = 0
        self.endless = 0
        super().__init__(
            routes=[
                Route("/", self.fast, methods=["GET", "POST"]),
                Route("/slow", self.slow),
                Route("/large", self.large),
                Route("/broken", self.broken),
                *(Route(path, self.fast) for path in ("/healthz", "/readyz", "/healthcheck")),
                Route("/metrics", self.metrics),
            ]
        )

    async def fast(self, request: Request) -> Response:
        return PlainTextResponse(f"{len(await request.body())} bytes")

    async def slow(self, _request: Request) -> Response:
        self.at_work += 1
        self.slow_began.set()
        try:
            await self.slow_may_end.wait()
        finally:
            self.at_work -= 1
        return PlainTextResponse("at last")

    async def metrics(self, request: Request) -> Response:
        return StreamingResponse(self._endless()) if "endless" in request.query_params else await self.fast(request)

    async def _endless(self) -> AsyncIterator[bytes]:
        self.endless += 1
        try:
            while True:
                yield b"x" * 1_000
                await asyncio.sleep(0.01)
        finally:
            self.endless -= 1

    async def large(self, _request: Request) -> Response:
        return Response(bytes(LARGE_BYTES))

    async def broken(self, _request: Request) -> Response:
        raise RuntimeError("broken")


@asynccontextmanager
async def running(
    app: App | None = None, proxies: ProxyPlaces | None = None, bounds: HttpBounds = DEFAULT_BOUNDS
) -> AsyncIterator[HttpServer]:
    server = HttpServer(app or App(), "127.0.0.1:0", proxies=proxies, bounds=bounds)
    await server.start()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(server.serve())
        await server.ready.wait()
        try:
            yield server
        finally:
            await server.stop()


async def get(server: HttpServer, path: str = "/") -> httpx.Response:
    # Certificates take a tenth of a second to load, and are not needed.
    async with httpx.AsyncClient(timeout=60, trust_env=False, verify=False) as client:
        return await client.get(f"http://{server.address}{path}")


class Client:
    """One connection, and what is read from it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def send(self, data: bytes) -> None:
        self._writer.write(data)

    async def trickle(self, drop: bytes) -> None:
        """Send it again and again until the connection is lost."""
        while not self._writer.transport.is_closing():
            self._writer.write(drop)
            await asyncio.sleep(0.01)

    async def some(self) -> None:
        """Wait for the begin of an answer."""
        async with asyncio.timeout(60):
            assert await self._reader.read(1)

    async def status(self) -> int:
        """Of one answer, read to its end."""
        async with asyncio.timeout(60):
            head = await self._reader.readuntil(b"\r\n\r\n")
            headers = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
            await self._reader.readexactly(int(headers[b"content-length"]))
        return int(head.split()[1])

    async def closed(self) -> bytes:
        """Wait until the server has closed it; gives what it had sent before."""
        rest = bytearray()
        async with asyncio.timeout(60):
            with suppress(ConnectionError):
                while data := await self._reader.read(65_536):
                    rest += data
        return bytes(rest)

    def close(self) -> None:
        self._writer.transport.abort()

    def reset(self) -> None:
        """Close it by RST, which the server sees as an error."""
        linger = struct.pack("ii", 1, 0)
        self._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close()


@asynccontextmanager
async def connect(server: HttpServer, of: str = "127.0.0.1") -> AsyncIterator[Client]:
    """A client that is connected to the console for as long as the context lasts.

    Args:
        of: the client's address.
    """
    host, _, port = server.address.rpartition(":")
    client = Client(*await asyncio.open_connection(host, int(port), local_addr=(of, 0)))
    try:
        yield client
    finally:
        client.close()


async def until(holds: Callable[[], bool]) -> None:
    """What other tasks bring about."""
    async with asyncio.timeout(60):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.005)
