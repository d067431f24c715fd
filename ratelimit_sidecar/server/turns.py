"""Does a few of very many things in each turn of the loop, so that others are answered meanwhile."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

AT_ONCE: Final = 8
"""Some 60 us each, for a task that sends a message; up to half a millisecond for the longest."""


class FewAtOnce:
    """Things to be done soon, `AT_ONCE` of them in each turn of the loop, in order."""

    def __init__(self) -> None:
        self._line: deque[Callable[[], object]] = deque()
        self._is_due = False

    def soon(self, act: Callable[[], object]) -> None:
        """Call it in one of the next turns.

        Args:
            act: raises nothing.
        """
        self._line.append(act)
        self._come()

    async def turn(self) -> None:
        """Wait for a turn."""
        mine = asyncio.Event()
        self.soon(mine.set)
        await mine.wait()

    def _come(self) -> None:
        if self._line and not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self._do_some)

    def _do_some(self) -> None:
        self._is_due = False
        for _ in range(min(AT_ONCE, len(self._line))):
            self._line.popleft()()
        self._come()
