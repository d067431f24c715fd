"""When a node flushes: every 20 ms, and sooner when a bucket gets nearly used up.

Timer upon timer rather than a task that sleeps: an idle sidecar wakes up for little else, and this halves what a flush
with nothing to tell takes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

FLUSH_SECONDS = 0.02

URGENT_FLUSH_SECONDS = 0.002
"""Between two flushes when buckets get nearly used up (`crdt/journal.py`)."""


class Flushing:
    """Args:
    flush: synchronous; what it raises ends `run`.
    """

    def __init__(self, flush: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._flush = flush
        self._failed: asyncio.Future[None] = self._loop.create_future()
        self._flushed_at = self._loop.time()
        self._next: asyncio.TimerHandle | None = None
        self._is_urgent = False

    async def run(self) -> None:
        """Flush at once, and from then on until cancelled."""
        self._flush_now()
        try:
            await self._failed
        finally:
            self._is_urgent = True
            if self._next is not None:
                self._next.cancel()

    def hurry(self) -> None:
        """Something is urgent; O(1), for the request path."""
        if not self._is_urgent and self._next is not None:
            self._is_urgent = True
            self._next.cancel()
            self._next = self._loop.call_at(self._flushed_at + URGENT_FLUSH_SECONDS, self._flush_now)

    def _flush_now(self) -> None:
        self._is_urgent = False
        self._flushed_at = self._loop.time()
        try:
            self._flush()
        except Exception as error:
            self._failed.set_exception(error)
            return
        self._next = self._loop.call_later(FLUSH_SECONDS, self._flush_now)
