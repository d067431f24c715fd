"""The proxy that makes lines long: what it does to bytes, and that it does nothing else."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from ratelimit_sidecar.demo.links import CHUNK_BYTES, Link, Way

HOST = "127.0.0.1"

Server = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
DELAY_S = 0.05


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while chunk := await reader.read(CHUNK_BYTES):
        writer.write(chunk)
        await writer.drain()
    writer.close()


@asynccontextmanager
async def through(
    there: Way, back: Way, serve: Server = echo
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection over a link to a server, which sends back what it gets if it is no other."""
    server = await asyncio.start_server(serve, HOST, 0)
    address = server.sockets[0].getsockname()

    async def dial() -> socket.socket:
        dialled = socket.socket()
        dialled.setblocking(False)
        await asyncio.get_running_loop().sock_connect(dialled, address)
        return dialled

    listener = socket.create_server((HOST, 0))
    async with server, Link(listener, dial, there, back):
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        try:
            yield reader, writer
        finally:
            writer.close()


async def test_bytes_arrive_in_order_and_whole_however_they_were_delayed() -> None:
    sent = bytes(range(256)) * 8_192
    async with through(Way(jitter_s=0.01, seed=1), Way(jitter_s=0.01, seed=2)) as (reader, writer):
        writer.write(sent)
        assert await reader.readexactly(len(sent)) == sent


async def test_nothing_arrives_before_both_ways_have_taken_their_time() -> None:
    async with through(Way(DELAY_S), Way(2 * DELAY_S)) as (reader, writer):
        started_s = asyncio.get_running_loop().time()
        writer.write(b"ping")
        assert await reader.readexactly(4) == b"ping"
        assert round(asyncio.get_running_loop().time() - started_s, 3) >= round(3 * DELAY_S, 3)


async def test_a_stalled_way_delivers_nothing_until_it_resumes_and_then_all() -> None:
    there = Way()
    async with through(there, Way()) as (reader, writer):
        there.stall()
        writer.write(b"ping")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2 * DELAY_S):
                await reader.readexactly(4)
        there.resume()
        assert await reader.readexactly(4) == b"ping"


async def test_the_end_of_a_connection_comes_after_all_that_was_sent_before_it() -> None:
    heard: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.set_result(await reader.read())
        writer.close()

    async with through(Way(DELAY_S), Way(), listen) as (reader, writer):
        writer.write(b"last words")
        writer.write_eof()
        assert await heard == b"last words"
        assert await reader.read() == b""


async def test_a_connection_to_where_nobody_listens_ends() -> None:
    async def refused() -> socket.socket:
        raise ConnectionRefusedError

    listener = socket.create_server((HOST, 0))
    async with Link(listener, refused, Way(), Way()):
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        assert await reader.read() == b""
        writer.close()
