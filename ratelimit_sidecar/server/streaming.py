"""A streaming call in progress: its handler runs in a task, reads messages as they come, and waits while its client
does not take what it has sent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Final

from ratelimit_sidecar.server.framing import PREFIX_BYTES
from ratelimit_sidecar.server.http2 import Connection, Opened
from ratelimit_sidecar.server.messages import MessageReader
from ratelimit_sidecar.server.rpc import Code, FailureLog, RpcError

MAX_UNSENT_BYTES: Final = 65_536
"""Of one call; above it the handler has to wait."""


class StreamingCall:
    """Args:
    flush: sends what the connection has to send.
    """

    def __init__(self, opened: Opened, connection: Connection, failures: FailureLog, flush: Callable[[], None]) -> None:
        self._opened = opened
        self._connection = connection
        self._failures = failures
        self._flush = flush
        self._reader = MessageReader()
        self._client_is_done = False
        self._changed = asyncio.Event()
        """Bytes have come, the client is done, or it may have taken some of what was sent."""

    async def run(self) -> None:
        """Call the handler until it ends. To be cancelled when the client has given up."""
        error: RpcError | None = None
        try:
            async with aclosing(self._opened.method.handler(self._messages(), self._opened.request)) as responses:
                async for response in responses:
                    self._connection.send(self._opened.stream_id, response)
                    self._flush()
                    await self._until_taken()
        except RpcError as refused:
            error = refused
        except Exception as failure:
            error = self._failures.status_of(self._opened.path, failure)
        self.finish(error)

    def finish(self, error: RpcError | None) -> None:
        """End the call with a status; later ones are ignored."""
        self._connection.finish(self._opened.stream_id, error)
        self._flush()

    def feed(self, data: bytes, ended: bool) -> None:
        """Take a part of the body."""
        self._reader.feed(data)
        self._client_is_done = self._client_is_done or ended
        self._changed.set()

    def wake(self) -> None:
        """The client may have taken some of what was sent."""
        self._changed.set()

    async def _messages(self) -> AsyncIterator[bytes]:
        while True:
            message = self._reader.next_message()
            if message is not None:
                yield message
                # The handler wants more: the client may send as much again.
                self._connection.acknowledge(self._opened.stream_id, PREFIX_BYTES + len(message))
                self._flush()
            elif self._client_is_done:
                if not self._reader.is_empty:
                    raise RpcError(Code.INTERNAL, "the last message is cut short")
                return
            else:
                self._changed.clear()
                await self._changed.wait()

    async def _until_taken(self) -> None:
        while self._connection.unsent(self._opened.stream_id) > MAX_UNSENT_BYTES:
            self._changed.clear()
            await self._changed.wait()
