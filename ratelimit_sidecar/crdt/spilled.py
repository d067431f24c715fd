"""Refill that came while a bucket was full: it pays for what was taken before it and is heard of only afterwards.

A late delta placed at s raises the deficit by what the refill spilled since s does not pay, and the earliest pays
first (docs/algorithm.md). Late deltas are placed at the middles of slots and nowhere else. So it is exact to know how
much was spilled from each middle to the next: a *cell*. The last `CELLS` are kept.

Amounts are scaled as deficits are. Only buckets that hear from peers have one.
"""

from __future__ import annotations

from typing import Final

from ratelimit_sidecar.crdt.limit import Limit
from ratelimit_sidecar.crdt.untracked_dict import untrack

CELLS: Final = 16
"""2 s or more of slots 131 ms wide, 0.26 s of the narrowest: what comes later than this has the slots folded again."""

_NONE: Final = [0] * CELLS


class SpilledRefill:
    """Remembers how much refill a full bucket has lost, and when.

    Args:
        limit: whose slots, and whose rate.
        from_us: nothing before it will be noted.
    """

    __slots__ = ("_cell", "_cells", "_limit")

    def __init__(self, limit: Limit, from_us: int) -> None:
        self._limit = limit
        self._cell = _cell_of(from_us, limit.exponent)
        """The one noted last; a cell is numbered by the slot in whose middle it ends."""
        self._cells = _NONE[:]
        """Spilled in each, up to `_cell`."""
        # There may be a million; see `untracked_dict`.
        untrack(self._cells)
        untrack(self)

    def note(self, amount: int, until_us: int) -> None:
        """Refill of `amount` was spilled, without a break, until `until_us`; of late, nothing was noted after it."""
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
        # It may lie in more cells than this one, and in more than are kept. Where it fills one, all share the number.
        room = (until_us - (cell << exponent) + (1 << exponent >> 1)) * limit.tokens
        index = -1
        while amount > room and index > -CELLS:
            cells[index] = room
            amount -= room
            room = limit.slot_refill
            index -= 1
        cells[index] += amount if amount < room else room

    def pay(self, charge: int, middle_us: int) -> int | None:
        """Pay `charge` with what was spilled since `middle_us`, the middle of a slot, and spend that.

        Returns:
            What is left to pay; None when it is not known any more.
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
