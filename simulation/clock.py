"""A node's clock: what `ratelimit_sidecar.clock.Clock` makes of a system clock that is wrong, on virtual time."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from ratelimit_sidecar.clock import ALONE_US, DISPUTED_US, FAR_US, MAX_SLEW_PER_SECOND_US, MAX_SLEW_US
from simulation.loop import Loop


def clocks_off(draw: Random, names: Sequence[str], most_us: int) -> dict[str, int]:
    """For each node how far its system clock is ahead, at most so far off."""
    return {name: draw.randint(-most_us, most_us) for name in names}


class NodeClock:
    """The monotonic clock is the true time, also while the machine is suspended, as CLOCK_BOOTTIME is.

    Args:
        system_ahead_us: the machine's system clock minus the true time; may be set anew at any moment, as a time
            server or an operator sets a clock.
    """

    def __init__(self, loop: Loop, system_ahead_us: int) -> None:
        self.system_ahead_us = system_ahead_us
        self.ahead_us = system_ahead_us
        """What the process takes the time for, minus the true time."""
        self.clock_steps_us = 0
        self._loop = loop
        self._slewed_at_us = loop.now_us
        self._floor_us = 0
        self._far_since_us: int | None = None

    def now_us(self) -> int:
        return max(self._loop.now_us + self.ahead_us, self._floor_us)

    def strict_us(self) -> int:
        """The clock of strict limits, which never steps."""
        return self.now_us() - self.clock_steps_us

    def discipline(self, peers_ahead_us: Sequence[int] = ()) -> int:
        """To be called about once a second.

        Returns:
            By how much the clock was set; 0 nearly always.
        """
        gap_us = self.system_ahead_us - self.ahead_us
        elapsed_us = self._loop.now_us - self._slewed_at_us
        self._slewed_at_us = self._loop.now_us
        if abs(gap_us) >= FAR_US:
            since_us = self._far_since_us = self._far_since_us or self._slewed_at_us
            votes = sum(1 if abs(ahead_us - gap_us) < abs(ahead_us) else -1 for ahead_us in peers_ahead_us)
            if self._loop.now_us - since_us < (0 if votes > 0 else DISPUTED_US if votes < 0 else ALONE_US):
                return 0
            self._far_since_us = None
            self._floor_us += gap_us
            self.ahead_us += gap_us
            self.clock_steps_us += gap_us
            return gap_us
        self._far_since_us = None
        allowed_us = min(elapsed_us * MAX_SLEW_PER_SECOND_US // 1_000_000, MAX_SLEW_US)
        self._floor_us = self.now_us()
        self.ahead_us += max(-allowed_us, min(gap_us, allowed_us))
        return 0
