"""A slot is a span of 2**exponent microseconds of wall time; its id is one integer.

The id is the slot's start with the exponent in the low bits, which are free because a start is a multiple of
2**14 or more. So ids sort by start (a slot whose id is less than a boundary began before it), name their own width, and
slots of different widths (before and after a limit changed) live in one map. They are not regrouped: whoever has heard
the parts of a slot would count its sum again.

What is given back in a slot is counted beside what is taken in it, under an id that differs in `REFUND`.
"""

from __future__ import annotations

from typing import Final

REFUND: Final = 64
"""Set in the id of what was given back in a slot; the id sorts right after that of what was taken in it."""

_EXPONENT_MASK: Final = 63
_START_MASK: Final = ~(_EXPONENT_MASK | REFUND)


def slot_id(time_us: int, exponent: int) -> int:
    """The id of the 2**`exponent` us wide slot that holds `time_us`."""
    return time_us >> exponent << exponent | exponent


def slot_exponent(slot: int) -> int:
    return slot & _EXPONENT_MASK


def slot_kind(slot: int) -> int:
    """The exponent, and `REFUND` more for what was given back."""
    return slot & (_EXPONENT_MASK | REFUND)


def slot_start_us(slot: int) -> int:
    return slot & _START_MASK


def slot_end_us(slot: int) -> int:
    return (slot & _START_MASK) + (1 << (slot & _EXPONENT_MASK))


def placed_us(slot: int, exponent: int) -> int:
    """Where a bucket whose own slots are 2**`exponent` us wide places consumption known only by its slot.

    In the middle; but of a wider slot, from before the limit changed, as if the slot ended after such a width: its
    middle may be hours ahead, and all of it would be held to have been taken just now, again and again until then.
    """
    width = slot & _EXPONENT_MASK
    return (slot & _START_MASK) + (1 << (width if width < exponent else exponent) >> 1)
