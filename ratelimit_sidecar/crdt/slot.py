"""A slot is a span of 2**exponent microseconds of wall time; its id is one integer.

The id is the slot's start with the exponent in the low bits, which are free because a start is a multiple of
2**14 or more. So ids sort by start (a slot whose id is less than a boundary began before it), name their own width, and
slots of different widths (before and after a limit changed) live in one map. They are not regrouped: whoever has heard
the parts of a slot would count its sum again.
"""

from __future__ import annotations

from typing import Final

_EXPONENT_MASK: Final = 63


def slot_id(time_us: int, exponent: int) -> int:
    """The id of the 2**`exponent` us wide slot that holds `time_us`."""
    return time_us >> exponent << exponent | exponent


def slot_exponent(slot: int) -> int:
    return slot & _EXPONENT_MASK


def slot_start_us(slot: int) -> int:
    return slot & ~_EXPONENT_MASK


def slot_end_us(slot: int) -> int:
    return (slot & ~_EXPONENT_MASK) + (1 << (slot & _EXPONENT_MASK))


def placed_us(slot: int, exponent: int) -> int:
    """Where a bucket whose own slots are 2**`exponent` us wide places consumption known only by its slot.

    In the middle; but of a wider slot, from before the limit changed, as if the slot ended after such a width: its
    middle may be hours ahead, and all of it would be held to have been taken just now, again and again until then.
    """
    width = slot & _EXPONENT_MASK
    return (slot & ~_EXPONENT_MASK) + (1 << (width if width < exponent else exponent) >> 1)
