"""Wakes tasks that wait for a change of the mesh: a frame was received, or a stream or a dial has ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Progress:
    """Call `notify` after each change; `until` waits for a condition."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()

    def notify(self) -> None:
        """Let everybody who waits look again."""
        self._changed.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds: it is asked after each change."""
        while not condition():
            self._changed.clear()
            await self._changed.wait()
