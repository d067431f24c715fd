"""Wall-clock microseconds that never step back, for slots that replicas on other machines must recognise.

Anchored to the wall clock at start and carried by Linux's CLOCK_BOOTTIME, which goes on while the machine is suspended:
a loan of a strict limit ends in time then, too. `slew` closes the gap to the wall clock by at most
`MAX_SLEW_PER_SECOND_US` in a second, so a stepped or wandering system clock neither refills a bucket at once nor stops
its refill. When the wall clock is behind, this one stands still for a few milliseconds a second until it is not.
Only a wall clock far ahead, which was wrong when this process started, is followed in one step.
"""

from __future__ import annotations

import time
from typing import Final

MAX_SLEW_PER_SECOND_US: Final = 5_000
"""0.5 %: ten times what NTP itself slews, and still within what P3 promises of the rate."""

MAX_SLEW_US: Final = 2 * MAX_SLEW_PER_SECOND_US
"""In one go, however long ago the last one was: so long the clock may stand still."""

JUMP_US: Final = 10_000_000
"""A wall clock this far ahead was wrong at the start: waiting for the slew would take half an hour."""


_BOOTTIME: Final = time.CLOCK_BOOTTIME


class Clock:
    """Call `slew` about once a second."""

    def __init__(self) -> None:
        self._offset_us = time.time_ns() // 1_000 - _steady_us()
        self._slewed_at_us = _steady_us()
        self._floor_us = 0
        """What was told before the last slew back."""

    def now_us(self) -> int:
        """Microseconds since the epoch; never less than at the call before."""
        now_us = self._offset_us + _steady_us()
        return now_us if now_us > self._floor_us else self._floor_us

    def slew(self) -> int:
        """Move towards the wall clock by what has become allowed since the last call.

        Returns:
            The gap before the move, in microseconds: positive when the wall clock was ahead.
        """
        mono_us = _steady_us()
        gap_us = time.time_ns() // 1_000 - mono_us - self._offset_us
        elapsed_us = mono_us - self._slewed_at_us
        self._slewed_at_us = mono_us
        if gap_us >= JUMP_US:
            self._offset_us += gap_us
            return gap_us
        allowed_us = min(elapsed_us * MAX_SLEW_PER_SECOND_US // 1_000_000, MAX_SLEW_US)
        self._floor_us = self.now_us()
        self._offset_us += max(-allowed_us, min(gap_us, allowed_us))
        return gap_us


def _steady_us() -> int:
    return time.clock_gettime_ns(_BOOTTIME) // 1_000
