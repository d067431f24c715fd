"""Wall-clock microseconds, for slots that replicas on other machines must recognise.

Anchored to the wall clock at start and carried by Linux's CLOCK_BOOTTIME, which goes on while the machine is suspended:
so a suspension is no gap, and a strict limit refills for it, too. `slew` closes small gaps to the wall
clock by at most `MAX_SLEW_PER_SECOND_US` in a second, so a wandering system clock neither refills a bucket nor stops
its refill. When the wall clock is behind, this one stands still for a few milliseconds a second until it is not.

A gap of `FAR_US` or more is a system clock that was set, or is wrong: it is closed in one step, forward or back, once
it is believed. Peers are witnesses, each for the time that its own clock is nearer to. With more witnesses for the
system clock than against it is believed at once, else after `ALONE_US`, and with more against it after `DISPUTED_US`.
Until then this clock goes on as it was. A step back is told to whoever holds buckets (`crdt.store.Store.go_back`).
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Final

MAX_SLEW_PER_SECOND_US: Final = 5_000
"""0.5 %: ten times what NTP itself slews, and small beside the overshoot bound (P3 in docs/algorithm.md)."""

MAX_SLEW_US: Final = 2 * MAX_SLEW_PER_SECOND_US
"""In one go, however long ago the last one was: so long the clock may stand still."""

FAR_US: Final = 10_000_000
"""To slew so far would take half an hour, and the shortest horizon is no longer: buckets are no longer shared."""

ALONE_US: Final = 60_000_000
"""A step forward refills up to one capacity of every limit: so often that can happen to a node without witnesses."""

DISPUTED_US: Final = 600_000_000
"""The peers' clocks may all have been wrong from the start, and be set right at the same time."""


_BOOTTIME: Final = time.CLOCK_BOOTTIME


class Clock:
    """Call `slew` about once a second."""

    def __init__(self) -> None:
        self._offset_us = time.time_ns() // 1_000 - _steady_us()
        self._slewed_at_us = _steady_us()
        self._floor_us = 0
        """What was told before the last slew back."""
        self._far_since_us: int | None = None
        self.gap_us = 0
        """The system clock minus this one at the last call of `slew`, after it."""
        self.stepped_us = 0
        """The sum of all steps: `now_us` less this never steps."""
        self.steps_forward = self.steps_back = 0

    def now_us(self) -> int:
        """Microseconds since the epoch; never less than at the call before, but for a step back by `slew`."""
        now_us = self._offset_us + _steady_us()
        return now_us if now_us > self._floor_us else self._floor_us

    def slew(self, peers_ahead_us: Iterable[int] = ()) -> int:
        """Move towards the wall clock by what has become allowed since the last call.

        Args:
            peers_ahead_us: the clocks of connected peers minus this one.

        Returns:
            By how much the clock was set, in microseconds; 0 when it went on as it was, or was only slewed.
        """
        mono_us = _steady_us()
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
    """How long a system clock that is so far ahead must stay there before it is believed."""
    witnesses = [abs(ahead_us - gap_us) < abs(ahead_us) for ahead_us in peers_ahead_us]
    agreeing = sum(witnesses)
    disagreeing = len(witnesses) - agreeing
    if agreeing > disagreeing:
        return 0
    return DISPUTED_US if disagreeing > agreeing else ALONE_US


def _steady_us() -> int:
    return time.clock_gettime_ns(_BOOTTIME) // 1_000
