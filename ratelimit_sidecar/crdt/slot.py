"""A slot is a span of 2**exponent microseconds of wall time; its id is one integer.

The id is the slot's start with the exponent in the low bits, which are free because a start is a multiple of
2**14 or more. So ids sort by start (a slot whose id is less than a boundary began before it), name their own width, and
slots of different widths (before and after a limit changed) live in one map. Slots are never merged into wider ones: a
replica that already has the narrow ones would count the same tokens twice.

Refunds of a slot have an id of their own: the slot's id with the bit `REFUND` set.
"""

from __future__ import annotations

from typing import Final

REFUND: Final = 64
"""The bit that is set in the id of a refund. The id sorts right after that of the slot itself."""

_EXPONENT_MASK: Final = 63
_START_MASK: Final = ~(_EXPONENT_MASK | REFUND)


def slot_id(time_us: int, exponent: int) -> int:
    """The id of the 2**`exponent` us wide slot that holds `time_us`."""
    return time_us >> exponent << exponent | exponent


def slot_exponent(slot: int) -> int:
    return slot & _EXPONENT_MASK


def slot_kind(slot: int) -> int:
    """The exponent, plus `REFUND` if the id is that of a refund."""
    return slot & (_EXPONENT_MASK | REFUND)


def slot_start_us(slot: int) -> int:
    return slot & _START_MASK


def slot_end_us(slot: int) -> int:
    return (slot & _START_MASK) + (1 << (slot & _EXPONENT_MASK))


def placed_us(slot: int, exponent: int) -> int:
    """The instant at which tokens known only by their slot count, in a bucket whose own slots are 2**`exponent` us
    wide.

    It is the middle of the slot. A wider slot, from before the limit changed, counts as if it had the bucket's width:
    its real middle may be hours ahead, and until then its tokens would count as taken just now, at each fold.
    """
    width = slot & _EXPONENT_MASK
    return (slot & _START_MASK) + (1 << (width if width < exponent else exponent) >> 1)
