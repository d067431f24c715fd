"""A slot is a span of 2**exponent microseconds of wall time; its id is one integer.

The id is the slot's start with the exponent in the low bits, which are free because a start is a multiple of
2**14 or more. So ids sort by start, name their own width, and slots of different widths (before and after a limit
changed) live in one map without being regrouped.
"""

from __future__ import annotations

_EXPONENT_MASK = 63


def slot_id(time_us: int, exponent: int) -> int:
    """The id of the 2**`exponent` us wide slot that holds `time_us`."""
    return time_us >> exponent << exponent | exponent


def slot_exponent(slot: int) -> int:
    return slot & _EXPONENT_MASK


def slot_start_us(slot: int) -> int:
    return slot & ~_EXPONENT_MASK


def slot_end_us(slot: int) -> int:
    return (slot & ~_EXPONENT_MASK) + (1 << (slot & _EXPONENT_MASK))


def slot_middle_us(slot: int) -> int:
    """Where consumption known only by its slot is placed."""
    return (slot & ~_EXPONENT_MASK) + (1 << (slot & _EXPONENT_MASK) >> 1)
