"""Lets tasks go on in turns (`turns.py`), within a step, so that what they do is timed. It is not compiled, since mypyc
cannot derive from asyncio's futures.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import Context
from typing import Any

from ratelimit_sidecar.server.turns import Queue, Turns


class Signal:
    """Lets one task wait, as asyncio.Event does, and go on in a turn of its queue."""

    def __init__(self, turns: Turns, queue: Queue) -> None:
        self._turns = turns
        self._queue = queue
        self._waiter: _Waiter | None = None
        self._is_set = False

    def set(self) -> None:
        """Let the task go on; if it does not wait now, once it does."""
        if not self._is_set:
            self._is_set = True
            if self._waiter is not None:
                self._turns.join(self._queue, self._waiter.go_on)

    async def wait(self) -> None:
        """Wait until it is set, and for a turn. It is not set any more then."""
        # In no variable: with a task that is cancelled here it would be a reference cycle.
        self._waiter = _Waiter()
        if self._is_set:
            self._turns.join(self._queue, self._waiter.go_on)
        try:
            await self._waiter
        finally:
            self._waiter = None
            self._is_set = False

    async def turn(self) -> None:
        """Wait for a turn alone."""
        self.set()
        await self.wait()


class _Waiter(asyncio.Future[None]):
    """A future whose task goes on within `go_on`."""

    def add_done_callback(self, fn: Callable[[Any], object], /, *, context: Context | None = None) -> None:
        """Note how the task goes on; a task always gives its context."""
        self._resume, self._context = fn, context
        # When the task is cancelled it goes on by itself.
        super().add_done_callback(fn, context=context)

    def go_on(self) -> None:
        """Nothing if the task was cancelled."""
        if not self.done() and self._context is not None:
            self.remove_done_callback(self._resume)
            self.set_result(None)
            self._context.run(self._resume, self)
