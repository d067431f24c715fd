"""A streaming call in progress: its handler runs in a task, reads messages as they come, and waits while its client
does not take what it has sent.

Flow control: bytes are acknowledged to the client when the handler asks for the message after them, so that a client
which is faster than the handler is stopped by its window; of a message that is larger than that they are acknowledged
when they are there, and the budget bounds them. The other way a handler is stopped while more than
`MAX_UNSENT_BYTES` of its call wait for the client.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Final

from ratelimit_sidecar.server.framing import PREFIX_BYTES
from ratelimit_sidecar.server.http2 import Connection, Opened
from ratelimit_sidecar.server.limits import MAX_STREAMED_BYTES
from ratelimit_sidecar.server.messages import MessageReader
from ratelimit_sidecar.server.rpc import FailureLog, RpcError

MAX_UNSENT_BYTES: Final = 65_536
"""Of one call; above it the handler has to wait."""


class StreamingCall:
    """One call from its headers to its status.

    Args:
        flush: sends what the connection has to send.
        blocked: to join while the client has to take something first; `wake` is called when it may have.
        fail: closes the connection, when not even a status can be sent.
    """

    def __init__(
        self,
        opened: Opened,
        connection: Connection,
        failures: FailureLog,
        flush: Callable[[], None],
        blocked: set[StreamingCall],
        *,
        fail: Callable[[], None],
    ) -> None:
        self._opened = opened
        self._connection = connection
        self._failures = failures
        self._flush = flush
        self._blocked = blocked
        self._fail = fail
        self._reader = MessageReader(opened.request, opened.method.max_message_bytes)
        self._last_bytes = 0
        """Of the message that the handler is busy with."""
        self._let_in = 0
        """Of that or the next one, acknowledged before it was whole."""
        self._client_is_done = False
        self._heard = asyncio.Event()
        """Bytes have come, or the client is done."""
        self._has_room = asyncio.Event()
        """The client may have taken some of what was sent."""
        self._task: asyncio.Task[None] | None = None

    def start(self, tasks: asyncio.TaskGroup, ended: Callable[[], None]) -> None:
        """Run the handler.

        Args:
            ended: called when nothing of it runs any more.
        """
        self._task = tasks.create_task(self._run())
        self._task.add_done_callback(lambda _task: self._close(ended))

    def feed(self, data: bytes, ended: bool) -> None:
        """Take a part of the body."""
        self._reader.feed(data)
        self._client_is_done = self._client_is_done or ended
        self._heard.set()

    def wake(self) -> None:
        """The client may have taken some of what was sent."""
        self._has_room.set()

    def end(self, error: RpcError) -> None:
        """End the call with a status, and its handler."""
        self._finish(error)
        self.cancel()

    def cancel(self) -> None:
        """End the handler, because the client has given up."""
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        error: RpcError | None = None
        messages = _Messages(self._next_message)
        try:
            async with aclosing(self._opened.method.handler(messages, self._opened.request)) as responses:
                async for response in responses:
                    self._connection.send(self._opened.stream_id, response)
                    self._flush()
                    await self._until_taken()
        except RpcError as refused:
            # With its traceback it would refer to itself, by this frame.
            error = refused.with_traceback(None)
        except Exception as failure:
            error = self._failures.status_of(self._opened.path, failure, self._opened.request)
        try:
            self._finish(error)
        except Exception as failure:
            # It must not end the other calls, which are in the same group of tasks.
            self._failures.status_of(self._opened.path, failure, self._opened.request)
            self._fail()

    def _finish(self, error: RpcError | None) -> None:
        """Give the call its status; later ones are ignored."""
        self._connection.finish(self._opened.stream_id, error)
        self._flush()

    def _close(self, ended: Callable[[], None]) -> None:
        self._blocked.discard(self)
        # A cancelled task has the frames that it was in, and so this call: only a garbage collection would free them.
        self._task = None
        ended()

    async def _next_message(self) -> bytes:
        # The handler wants more: the client may send as much again.
        if self._last_bytes:
            self._connection.acknowledge(self._opened.stream_id, self._last_bytes, self._let_in)
            self._last_bytes = self._let_in = 0
            self._flush()
        # Others have their turn, however many messages a read has brought.
        await asyncio.sleep(0)
        while True:
            message = self._reader.next_message(self._client_is_done)
            if message is not None:
                self._last_bytes = PREFIX_BYTES + len(message)
                return message
            if self._client_is_done:
                raise StopAsyncIteration
            if self._reader.waiting >= MAX_STREAMED_BYTES:
                # What is not whole by now comes only if the client may send more than its window.
                self._connection.let_in(self._opened.stream_id, self._reader.waiting - self._let_in)
                self._let_in = self._reader.waiting
                self._flush()
            self._heard.clear()
            await self._heard.wait()

    async def _until_taken(self) -> None:
        # Others have their turn, however fast the client reads.
        await asyncio.sleep(0)
        while self._connection.unsent(self._opened.stream_id) > MAX_UNSENT_BYTES:
            self._has_room.clear()
            self._blocked.add(self)
            await self._has_room.wait()


class _Messages(AsyncIterator[bytes]):
    """What a client sends. No generator: a handler that is closed would leave it behind, to be closed by a task that
    nobody waits for."""

    def __init__(self, next_message: Callable[[], Awaitable[bytes]]) -> None:
        self._next_message = next_message

    async def __anext__(self) -> bytes:
        return await self._next_message()
