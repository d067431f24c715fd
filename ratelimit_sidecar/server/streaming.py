"""A streaming call in progress. Its handler runs in a task, reads messages as they arrive, and waits while the client
does not read what was sent. It begins, goes on and ends in turns of the event loop (`turns.py`).

Flow control: the bytes of a message are acknowledged to the client when the handler asks for the next message. So the
window, which holds a whole message, stops a client that is faster than the handler. In the other direction a handler
waits while more than `MAX_UNSENT_BYTES` of its call are unsent.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import Final

from ratelimit_sidecar.server.events import StreamStarted
from ratelimit_sidecar.server.grpc_connection import Connection
from ratelimit_sidecar.server.messages import MessageReader
from ratelimit_sidecar.server.rpc import FailureLog, RpcError
from ratelimit_sidecar.server.turn_event import TurnEvent
from ratelimit_sidecar.server.turns import StepQueue, Turns

MAX_UNSENT_BYTES: Final = 65_536
"""The most unsent bytes of one call; above it the handler has to wait."""

STOP_NS: Final = 50_000
"""The estimated time of the end of a cancelled task, which comes in the next turns of the loop."""


class StreamingCall:
    """One call, from its headers to its status. Call `start`, then `feed` for data, and `cancel` if the client gives
    up.

    Args:
        flush: sends the connection's output.
        queue: where it waits for turns.
        blocked: the call adds itself while it waits for the client to read; then call `wake` when it may have read.
        fail: closes the connection, when not even a status can be sent.
    """

    def __init__(
        self,
        opened: StreamStarted,
        connection: Connection,
        failures: FailureLog,
        flush: Callable[[], None],
        *,
        turns: Turns,
        queue: StepQueue,
        blocked: set[StreamingCall],
        fail: Callable[[], None],
    ) -> None:
        self._opened = opened
        self._connection = connection
        self._failures = failures
        self._flush = flush
        self._turns = turns
        self._queue = queue
        self._blocked = blocked
        self._fail = fail
        self._reader = MessageReader(opened.request)
        self._take_next = self._reader.next_part if opened.method.takes_parts else self._reader.next_message
        self._last_bytes = 0
        """The bytes, with their prefix, that the handler is working on."""
        self._client_is_done = False
        self._received = TurnEvent(turns, queue)
        """Set when bytes arrived, or the client is done."""
        self._has_room = TurnEvent(turns, queue)
        """Set when the client may have read some of what was sent."""
        self._task: asyncio.Task[None] | None = None

    def start(self, tasks: asyncio.TaskGroup, ended: Callable[[], None]) -> None:
        """Run the handler in a task.

        Args:
            ended: called when the task is over.
        """
        self._task = tasks.create_task(self._run())
        self._task.add_done_callback(lambda _task: self._close(ended))

    def feed(self, data: bytes, ended: bool) -> None:
        """Take bytes of the request body."""
        self._reader.feed(data)
        self._client_is_done = self._client_is_done or ended
        self._received.set()

    def wake(self) -> None:
        """Go on if the handler waits for the client to read."""
        self._has_room.set()

    def end(self, error: RpcError) -> None:
        """End the call with a status, and stop its handler."""
        self._finish(error)
        self.cancel()

    def cancel(self) -> None:
        """Stop the handler in a later turn, because the client has given up."""
        task, self._task = self._task, None
        if task is not None:
            self._turns.join(self._queue, partial(self._stop, task))

    def _stop(self, task: asyncio.Task[None]) -> None:
        if task.cancel():
            self._turns.charge(STOP_NS)

    async def _run(self) -> None:
        error: RpcError | None = None
        messages = _Messages(self._next_message)
        try:
            await self._has_room.turn()
            async with aclosing(self._opened.method.handler(messages, self._opened.request)) as responses:
                async for response in responses:
                    self._connection.send(self._opened.stream_id, response)
                    # It may be awaited for long that there is another one.
                    del response
                    self._flush()
                    await self._until_taken()
        except RpcError as refused:
            # Its traceback refers to this frame and so to itself: a reference cycle.
            error = refused.with_traceback(None)
        except Exception as failure:
            error = self._failures.status_of(self._opened.path, failure, self._opened.request)
        try:
            self._finish(error)
        except Exception as failure:
            # An exception would end the other calls of the same task group.
            self._failures.status_of(self._opened.path, failure, self._opened.request)
            self._fail()

    def _finish(self, error: RpcError | None) -> None:
        """Send the status of the call; a second one is ignored."""
        self._connection.finish(self._opened.stream_id, error)
        self._flush()

    def _close(self, ended: Callable[[], None]) -> None:
        self._blocked.discard(self)
        # A cancelled task refers to its frames and so to this call: a reference cycle.
        self._task = None
        ended()

    async def _next_message(self) -> bytes:
        # The handler is done with the last message, so the client may send as much again.
        if self._last_bytes:
            self._connection.acknowledge(self._opened.stream_id, self._last_bytes)
            self._last_bytes = 0
            self._flush()
        # Others have their turn, even if messages are already here.
        self._received.set()
        while True:
            await self._received.wait()
            waiting = self._reader.waiting
            message = self._take_next(self._client_is_done)
            if message is not None:
                self._last_bytes = waiting - self._reader.waiting
                return message
            if self._client_is_done:
                raise StopAsyncIteration

    async def _until_taken(self) -> None:
        # Others have their turn, even if the client reads fast.
        await self._has_room.turn()
        while self._connection.unsent(self._opened.stream_id) > MAX_UNSENT_BYTES:
            self._blocked.add(self)
            await self._has_room.wait()


class _Messages(AsyncIterator[bytes]):
    """The messages of a client. This is no generator: a closed handler would leave it behind, and asyncio would close
    it in a task that nobody waits for.
    """

    def __init__(self, next_message: Callable[[], Awaitable[bytes]]) -> None:
        self._next_message = next_message

    async def __anext__(self) -> bytes:
        return await self._next_message()
