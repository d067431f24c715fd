"""Measures stalls of the event loop, as requests feel them: by a callback, the collector, or the system.

A timer goes off every few milliseconds, and its delay is measured. A stall may begin up to a period before the timer is
due. So the result is up to `PERIOD_SECONDS` less than the stall, never more.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

PERIOD_SECONDS = 0.004
"""250 times a second. Where waking a processor is expensive, as in many virtual machines, that is 1 % of one."""

_PERIOD_NS = int(PERIOD_SECONDS * 1e9)

LONG_NS = 5_000_000
"""A quarter of Envoy's default timeout."""

WINDOW_NS = 60_000_000_000


class StallMonitor:
    """Measures stalls of the event loop while `run` runs.

    Args:
        monotonic_ns: returns the nanoseconds of a clock that never goes back.
    """

    def __init__(self, monotonic_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self.long_stalls = 0
        """Stalls longer than `LONG_NS` since start."""
        self._monotonic_ns = monotonic_ns
        self._window_from_ns = monotonic_ns()
        self._longest_ns = 0
        self._longest_before_ns = 0
        """The longest stall in the window before this one."""

    @property
    def longest_seconds(self) -> float:
        """The longest stall in the last one to two minutes, so that scrapes up to a minute apart all see it."""
        self._turn_window()
        return max(self._longest_ns, self._longest_before_ns) / 1e9

    def note(self, late_ns: int) -> None:
        """Note the delay of the timer."""
        self._turn_window()
        self._longest_ns = max(self._longest_ns, late_ns)
        self.long_stalls += late_ns > LONG_NS

    async def run(self) -> None:
        """Measure for ever."""
        self._set_timer()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            self._timer.cancel()

    def _set_timer(self) -> None:
        # Timer upon timer: a task that sleeps would take half as much again.
        due_ns = self._monotonic_ns() + _PERIOD_NS
        self._timer = asyncio.get_running_loop().call_later(PERIOD_SECONDS, self._measure, due_ns)

    def _measure(self, due_ns: int) -> None:
        self.note(max(0, self._monotonic_ns() - due_ns))
        self._set_timer()

    def _turn_window(self) -> None:
        now_ns = self._monotonic_ns()
        passed = (now_ns - self._window_from_ns) // WINDOW_NS
        if passed:
            self._longest_before_ns = self._longest_ns if passed == 1 else 0
            self._longest_ns = 0
            self._window_from_ns += passed * WINDOW_NS
