"""An event whose task resumes in a turn of its queue, within a step (`turns.py`), so that the work it does is timed.

This module is not compiled: mypyc cannot derive from asyncio's futures.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import Context
from typing import Any

from ratelimit_sidecar.server.turns import StepQueue, Turns


class TurnEvent:
    """As asyncio.Event, but for one task, which resumes in a turn of its queue (see `turns`)."""

    def __init__(self, turns: Turns, queue: StepQueue) -> None:
        self._turns = turns
        self._queue = queue
        self._waiter: _Waiter | None = None
        self._is_set = False

    def set(self) -> None:
        """Let the task resume; if it does not wait now, it resumes as soon as it does."""
        if not self._is_set:
            self._is_set = True
            if self._waiter is not None:
                self._turns.join(self._queue, self._waiter.go_on)

    async def wait(self) -> None:
        """Wait until it is set, and then for a turn. Afterwards it is not set any more."""
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
        """Wait for a turn only."""
        self.set()
        await self.wait()


class _Waiter(asyncio.Future[None]):
    """A future whose task goes on within `go_on`."""

    def add_done_callback(self, fn: Callable[[Any], object], /, *, context: Context | None = None) -> None:
        """Note the callback that resumes the task; a task always gives its context."""
        self._resume, self._context = fn, context
        # When the task is cancelled it goes on by itself.
        super().add_done_callback(fn, context=context)

    def go_on(self) -> None:
        """Resume the task; nothing happens if it was cancelled."""
        if not self.done() and self._context is not None:
            self.remove_done_callback(self._resume)
            self.set_result(None)
            self._context.run(self._resume, self)
