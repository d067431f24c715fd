"""Spilled refill = refill that arrived while the bucket was already full and was therefore lost.

Had a late delta been known in time, the bucket would not have been full, and that refill would have counted. So a delta
placed at s raises the deficit only by what is more than the refill spilled since s; the earliest refill pays first
(docs/algorithm.md). Late deltas are placed only at the middles of slots. So it is exact to know how much was spilled
from each middle to the next: a *cell*. The last `CELLS` are kept.

Amounts are scaled as deficits are. Only buckets that received entries of peers have one.
"""

from __future__ import annotations

from typing import Final

from ratelimit_sidecar.crdt.limit import TokenBucketLimit
from ratelimit_sidecar.crdt.untracked_dict import untrack

CELLS: Final = 16
"""2 s or more with slots of 131 ms, 0.26 s with the narrowest. A delta that is later than this causes a new fold."""

_NONE: Final = [0] * CELLS


class SpilledRefill:
    """Remembers how much refill a full bucket has lost, and when.

    Args:
        limit: the bucket's limit; it gives the width of slots and the rate.
        from_us: the first instant of which spilled refill is noted.
    """

    __slots__ = ("_cell", "_cells", "_limit")

    def __init__(self, limit: TokenBucketLimit, from_us: int) -> None:
        self._limit = limit
        self._cell = _cell_of(from_us, limit.exponent)
        """The newest cell with refill. A cell has the number of the slot in whose middle it ends."""
        self._cells = _NONE[:]
        """The refill spilled in each of the last `CELLS` cells; the last one is `_cell`."""
        # There may be a million; see `untracked_dict`.
        untrack(self._cells)
        untrack(self)

    def note(self, amount: int, until_us: int) -> None:
        """Note that `amount` was spilled in one stretch that ended at `until_us`. Call it in order of time."""
        cells, limit = self._cells, self._limit
        exponent = limit.exponent
        cell = _cell_of(until_us, exponent)
        new = cell - self._cell
        if not new:
            cells[-1] += amount
            return
        self._cell = cell
        del cells[:new]
        cells += _NONE[:new]
        # The stretch may reach back over several cells, and further than those that are kept.
        room = (until_us - (cell << exponent) + (1 << exponent >> 1)) * limit.tokens
        index = -1
        while amount > room and index > -CELLS:
            cells[index] = room
            amount -= room
            room = limit.slot_refill
            index -= 1
        cells[index] += amount if amount < room else room

    def pay(self, charge: int, middle_us: int) -> int | None:
        """Pay for `charge` with the refill spilled since `middle_us`, the middle of a slot. What pays is used up.

        Returns:
            The unpaid rest; None when `middle_us` is older than all cells.
        """
        cells = self._cells
        first = _cell_of(middle_us, self._limit.exponent) - self._cell + CELLS
        if first < 0:
            return None
        for index in range(first, CELLS):
            spilled = cells[index]
            if charge <= spilled:
                cells[index] = spilled - charge
                return 0
            cells[index] = 0
            charge -= spilled
        return charge


def _cell_of(time_us: int, exponent: int) -> int:
    """The cell that `time_us` is in: after the middle of one slot, up to and with the middle of the next."""
    return time_us + (1 << exponent >> 1) - 1 >> exponent
