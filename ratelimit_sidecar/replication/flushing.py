"""When a node flushes: at an even interval, and sooner when a bucket gets nearly used up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

URGENT_FLUSH_SECONDS = 0.002
"""The least time between two flushes, when buckets get nearly used up (`crdt/journal.py`)."""


class Flushing:
    """Calls `flush` at an interval. After `flush_soon` it does so at once, or `URGENT_FLUSH_SECONDS` after the last.

    Args:
        flush: what it raises ends `run`.
        every_seconds: the interval.
    """

    def __init__(self, flush: Callable[[], Awaitable[None]], every_seconds: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._flush = flush
        self._every_seconds = every_seconds
        self._due = asyncio.Event()
        self._flushed_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        """Until the next flush; None once something is urgent, or the flush is due."""

    async def run(self) -> None:
        """Flush at once, and from then on until cancelled."""
        try:
            while True:
                self._due.clear()
                self._flushed_at = self._loop.time()
                self._timer = self._loop.call_later(self._every_seconds, self._fall_due)
                await self._flush()
                await self._due.wait()
        finally:
            if self._timer is not None:
                self._timer.cancel()

    def flush_soon(self) -> None:
        """Flush as soon as may be, since something is urgent. O(1), for the request path."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._loop.call_at(self._flushed_at + URGENT_FLUSH_SECONDS, self._fall_due)

    def _fall_due(self) -> None:
        self._timer = None
        self._due.set()
