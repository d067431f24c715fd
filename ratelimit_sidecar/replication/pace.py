"""Cuts long work with buckets, writing batches and applying them, into pieces that are short on a slow machine, too.

That takes 4 to 20 us a bucket; how many pieces there are in a turn of the event loop, `turns` measures.
"""

from __future__ import annotations

from typing import Final

PIECE_WORK = 8
"""Of one piece: so many buckets with an entry each, or fewer with more."""

_ENTRIES_PER_WORK: Final = 8
"""So many entries more take as long as a bucket does."""


class Pace:
    def __init__(self) -> None:
        self._work = 0

    def ends_piece(self, entries: int) -> bool:
        """Note a bucket with so many entries, or one that was only looked at. True when the piece ends with it."""
        self._work += 1 + entries // _ENTRIES_PER_WORK
        if self._work < PIECE_WORK:
            return False
        self._work = 0
        return True
