"""Long network lines between machines: TCP proxies that deliver data later, with jitter, or not for a while.

A `Way` is one direction of a line, for all its connections. A `Link` accepts connections, and has a direction
there and one back. Order is kept, as in TCP. The data on the way is bounded. So when a direction stalls, the sender's
socket fills up and blocks, as on a real line.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from random import Random
from types import TracebackType
from typing import Self

CHUNK_BYTES = 1 << 16
MAX_CHUNKS = 256
"""At most 16 MiB are on the way."""

DIAL_S = 5.0
"""Longer than any sidecar waits for its connection."""

_END = b""
"""The end of a connection that the other end has closed."""


class Way:
    """One direction of a line: data is delivered later, or not for a while.

    Args:
        delay_s: from reading to delivering.
        jitter_s: a random time up to this is added for each chunk.
    """

    def __init__(self, delay_s: float = 0.0, jitter_s: float = 0.0, seed: int = 0) -> None:
        self._delay_s = delay_s
        self._jitter_s = jitter_s
        self._random = Random(seed)
        self._flows = asyncio.Event()
        self._flows.set()

    def stall(self) -> None:
        """Deliver nothing until `resume`; connections stay as they are."""
        self._flows.clear()

    def resume(self) -> None:
        self._flows.set()

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Returns when the sender has hung up and all it sent is delivered.

        Raises:
            ExceptionGroup: of an OSError: either end broke.
        """
        on_the_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(MAX_CHUNKS)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._read(reader, on_the_way))
            tasks.create_task(self._deliver(on_the_way, writer))

    async def _read(self, reader: asyncio.StreamReader, on_the_way: asyncio.Queue[tuple[float, bytes]]) -> None:
        chunk = None
        while chunk != _END:
            chunk = await reader.read(CHUNK_BYTES)
            delay_s = self._delay_s + self._random.uniform(0, self._jitter_s)
            await on_the_way.put((_now_s() + delay_s, chunk))

    async def _deliver(self, on_the_way: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
        while True:
            due_s, chunk = await on_the_way.get()
            await asyncio.sleep(due_s - _now_s())
            await self._flows.wait()
            if chunk == _END:
                return
            writer.write(chunk)
            await writer.drain()


class Link:
    """Accepts connections, dials one for each, and carries data between the two.

    Args:
        listener: a bound socket.
        dial: returns a connected socket.
        there: the direction from the accepted to the dialled connection.
        back: the other direction.
    """

    def __init__(
        self, listener: socket.socket, dial: Callable[[], Awaitable[socket.socket]], there: Way, back: Way
    ) -> None:
        self._listener = listener
        self._dial = dial
        self._there = there
        self._back = back
        self._server: asyncio.Server | None = None
        self._carrying: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, sock=self._listener)
        return self

    async def __aexit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._carrying:
            task.cancel()
        await asyncio.gather(*self._carrying, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._carrying.add(task)
        try:
            # Whatever breaks, both ends learn it by the connection's end.
            with suppress(OSError, asyncio.CancelledError):
                await self._connect(reader, writer)
        finally:
            self._carrying.discard(task)
            writer.close()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with asyncio.timeout(DIAL_S):
            dialled = await self._dial()
        far_reader, far_writer = await asyncio.open_connection(sock=dialled)
        ways = [
            asyncio.create_task(self._there.carry(reader, far_writer)),
            asyncio.create_task(self._back.carry(far_reader, writer)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            far_writer.close()


def _now_s() -> float:
    return asyncio.get_running_loop().time()
