"""Wakes tasks that wait for a change of the mesh: a frame was received, or a stream or a dial has ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Progress:
    """Call `made` after each change; `until` waits for a condition."""

    def __init__(self) -> None:
        self._made = asyncio.Event()

    def made(self) -> None:
        """Let everybody who waits look again."""
        self._made.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds: it is asked whenever progress was made."""
        while not condition():
            self._made.clear()
            await self._made.wait()
