"""The event loop's time for work on very many buckets: in short pieces, and a small part of it all.

`server.turns` compares this with other ways to cut long work.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final

PIECE_SECONDS: Final = 0.000_3
"""How long the loop works on buckets at a time: about 25 of a snapshot."""

LOOP_SHARE: Final = 0.05
"""The largest part of the loop's time for such work. A snapshot of a million buckets takes some minutes then."""


class TimeSlice:
    """Long work on the event loop calls `rest_when_due` after each small step, so that other tasks run after each
    `PIECE_SECONDS`.
    """

    def __init__(self) -> None:
        self._began = time.perf_counter()

    async def rest_when_due(self) -> None:
        if time.perf_counter() - self._began >= PIECE_SECONDS:
            await asyncio.sleep(0)
            self._began = time.perf_counter()
