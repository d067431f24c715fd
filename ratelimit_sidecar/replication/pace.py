"""Long work in steps that are short on a slow machine, too.

Writing batches and applying them takes 4 to 20 us a bucket. How many steps there are in a turn of the event loop is up
to the `scheduler`. `server.turns` compares this with other ways to cut long work.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

Steps = Iterator[None]
"""A job that yields after each step, of 0.1 ms or so.

Functions that return one have names that end in `_steps`: nothing happens before it is iterated. That is up to the
`scheduler`, or to a `yield from` of another job.
"""

PIECE_WORK = 8
"""The work of one piece: so many buckets with an entry each, or fewer with more entries."""

_ENTRIES_PER_WORK: Final = 8
"""So many entries take as long as one bucket."""


class Pace:
    """Cuts work on buckets into pieces that take about as long."""

    def __init__(self) -> None:
        self._work = 0

    def ends_piece(self, entries: int) -> bool:
        """Note a bucket with so many entries, or one that was only looked at. True when the piece ends with it."""
        self._work += 1 + entries // _ENTRIES_PER_WORK
        if self._work < PIECE_WORK:
            return False
        self._work = 0
        return True
