"""Wall-clock microseconds, for slots that replicas on other machines use as well.

The clock starts with the wall clock and is carried on by Linux's CLOCK_BOOTTIME, which goes on while the machine is
suspended. So a suspension is no gap, and strict limits refill during it, too. `slew` closes small gaps to the wall
clock by at most `MAX_SLEW_PER_SECOND_US` a second, so a jittery system clock neither refills a bucket nor stops its
refill. If the wall clock is behind, this one stands still for a few milliseconds a second.

A gap of `FAR_US` or more means that the system clock was set, or is wrong. Such a gap is closed in one step, forward or
back, once the system clock is believed. Peers are witnesses: each for the clock, this one or the system's, that is
nearer to its own. If more peers are for the system clock than against it, it is believed at once; if more are against
it, after `DISPUTED_US`; otherwise after `ALONE_US`. Until then this clock goes on. After a step back the owner of
buckets must be told (`crdt.store.Store.go_back`).
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Final

MAX_SLEW_PER_SECOND_US: Final = 5_000
"""0.5 %: ten times what NTP itself slews, and small beside the overshoot bound (P3 in docs/reference/promises.md)."""

MAX_SLEW_US: Final = 2 * MAX_SLEW_PER_SECOND_US
"""The most that one call slews, however long ago the last one was: the clock may stand still for this long."""

FAR_US: Final = 10_000_000
"""The gap from which on a clock was set: slewing it would take half an hour, and at the shortest horizon limits are no
longer shared.
"""

ALONE_US: Final = 60_000_000
"""How long a set clock must last without witnesses. A step forward refills up to one capacity of every limit, so that
can happen at most this often.
"""

DISPUTED_US: Final = 600_000_000
"""How long a set clock must last against most peers: their clocks may all have been wrong from the start."""


_BOOTTIME: Final = time.CLOCK_BOOTTIME


class Clock:
    """The sidecar's clock. Call `slew` about once a second."""

    def __init__(self) -> None:
        self._offset_us = time.time_ns() // 1_000 - _boottime_us()
        self._slewed_at_us = _boottime_us()
        self._floor_us = 0
        """The largest time returned before the last slew back."""
        self._far_since_us: int | None = None
        self.gap_us = 0
        """The system clock minus this one at the last call of `slew`, after it."""
        self.stepped_us = 0
        """The sum of all steps: `now_us` minus this never steps."""
        self.steps_forward = self.steps_back = 0

    def now_us(self) -> int:
        """Microseconds since the epoch; never less than in the call before, except after a step back in
        `discipline`."""
        now_us = self._offset_us + _boottime_us()
        return now_us if now_us > self._floor_us else self._floor_us

    def discipline(self, peers_ahead_us: Iterable[int] = ()) -> int:
        """Follow the system's clock, as NTP disciplines a clock: slew towards it by as much as is allowed since the
        last call, or step.

        Args:
            peers_ahead_us: the clocks of connected peers minus this one.

        Returns:
            The step of the clock in microseconds; 0 if there was none, or it was only slewed.
        """
        mono_us = _boottime_us()
        gap_us = time.time_ns() // 1_000 - mono_us - self._offset_us
        elapsed_us = mono_us - self._slewed_at_us
        self._slewed_at_us = mono_us
        if abs(gap_us) >= FAR_US:
            if self._far_since_us is None:
                self._far_since_us = mono_us
            if mono_us - self._far_since_us < _doubted_us(gap_us, peers_ahead_us):
                self.gap_us = gap_us
                return 0
            self._far_since_us = None
            self._offset_us += gap_us
            self._floor_us += gap_us
            self.stepped_us += gap_us
            if gap_us > 0:
                self.steps_forward += 1
            else:
                self.steps_back += 1
            self.gap_us = 0
            return gap_us
        self._far_since_us = None
        allowed_us = min(elapsed_us * MAX_SLEW_PER_SECOND_US // 1_000_000, MAX_SLEW_US)
        self._floor_us = self.now_us()
        moved_us = max(-allowed_us, min(gap_us, allowed_us))
        self._offset_us += moved_us
        self.gap_us = gap_us - moved_us
        return 0


def _doubted_us(gap_us: int, peers_ahead_us: Iterable[int]) -> int:
    """How long a system clock that is ahead by `gap_us` must stay so before it is believed."""
    witnesses = [abs(ahead_us - gap_us) < abs(ahead_us) for ahead_us in peers_ahead_us]
    agreeing = sum(witnesses)
    disagreeing = len(witnesses) - agreeing
    if agreeing > disagreeing:
        return 0
    return DISPUTED_US if disagreeing > agreeing else ALONE_US


def _boottime_us() -> int:
    return time.clock_gettime_ns(_BOOTTIME) // 1_000
