"""Virtual time: what happens, in the order of its instant."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from itertools import count

MS = 1_000
SECOND_US = 1_000_000
START_US = 1_790_000_000_000_000
"""The true time at which every simulation begins, microseconds since the epoch."""


class Loop:
    """An event loop on virtual time: actions with an instant, run in that order. Call `run` to let time pass.

    Args:
        order: gives numbers, in whose order is done what is due at one instant; by default in that of being asked for.
    """

    def __init__(self, order: Callable[[], int] | None = None) -> None:
        self.now_us = START_US
        """True time. Nodes only see their clocks."""
        self._actions: list[tuple[int, int, Callable[..., None], tuple[object, ...]]] = []
        self._order = order or count().__next__
        self._soon: deque[Callable[[], None]] = deque()

    def at(self, time_us: int, action: Callable[..., None], *args: object) -> None:
        """Run an action at an instant.

        Args:
            time_us: not before now.
        """
        heapq.heappush(self._actions, (time_us, self._order(), action, args))

    def after(self, delay_us: int, action: Callable[..., None], *args: object) -> None:
        self.at(self.now_us + delay_us, action, *args)

    def every(self, period_us: int, action: Callable[[], None], first_us: int = 0) -> None:
        """Run an action at an even interval, for ever.

        Args:
            first_us: how long until the first time.
        """

        def run() -> None:
            action()
            self.after(period_us, run)

        self.after(first_us, run)

    def soon(self, action: Callable[[], None]) -> None:
        """At this instant, when the action that runs now is done: as an event loop runs a task that was woken."""
        self._soon.append(action)

    def run(self, for_us: int) -> None:
        end_us = self.now_us + for_us
        actions, soon = self._actions, self._soon
        while soon:
            soon.popleft()()
        while actions and actions[0][0] <= end_us:
            self.now_us, _, action, args = heapq.heappop(actions)
            action(*args)
            while soon:
                soon.popleft()()
        self.now_us = end_us
