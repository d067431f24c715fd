"""What is done at an even interval, and sooner when something is urgent: a flush when a bucket gets nearly used up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

URGENT_FLUSH_SECONDS = 0.002
"""The least time between two flushes, when buckets get nearly used up (`crdt/journal.py`)."""


class Periodic:
    """Calls `call` at an interval. After `call_soon` it does so at once, or `URGENT_FLUSH_SECONDS` after the last call.

    Args:
        call: what it raises ends `run`.
        every_seconds: the interval.
    """

    def __init__(self, call: Callable[[], Awaitable[None]], every_seconds: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._call = call
        self._every_seconds = every_seconds
        self._due = asyncio.Event()
        self._called_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        """Until the next call; None once something is urgent, or the call is due."""

    async def run(self) -> None:
        """Call at once, and from then on until cancelled."""
        try:
            while True:
                self._due.clear()
                self._called_at = self._loop.time()
                self._timer = self._loop.call_later(self._every_seconds, self._fall_due)
                await self._call()
                await self._due.wait()
        finally:
            if self._timer is not None:
                self._timer.cancel()

    def call_soon(self) -> None:
        """Call as soon as may be, since something is urgent. O(1), for the request path."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._loop.call_at(self._called_at + URGENT_FLUSH_SECONDS, self._fall_due)

    def _fall_due(self) -> None:
        self._timer = None
        self._due.set()
