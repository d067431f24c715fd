"""A clock for `Turns` by which only the work of a test takes time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import pairwise

from ratelimit_sidecar.server.turns import QUANTUM_NS, Turns


class WorkClock:
    def __init__(self) -> None:
        self.now_ns = 0
        self.turns = Turns(lambda: self.now_ns)

    def work(self, part: float = 1.0) -> None:
        """Take a part of a quantum."""
        self.now_ns += round(QUANTUM_NS * part)


class PerTurn:
    """How much a count grows in each turn of the loop, while the block lasts."""

    def __init__(self, count: Callable[[], int]) -> None:
        self._count = count
        self._seen: list[int] = []

    async def __aenter__(self) -> PerTurn:
        self._watching = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._watching.cancel()
        self._seen.append(self._count())

    async def _watch(self) -> None:
        while True:
            self._seen.append(self._count())
            await asyncio.sleep(0)

    @property
    def most(self) -> int:
        return max(after - before for before, after in pairwise(self._seen))
