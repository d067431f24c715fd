"""Gives out turns of the event loop, so that a client waits for about a millisecond, however many connections and
streams others have.

Theory of operation. What could be much for one turn of the loop is cut into steps, none much longer than a millisecond,
and each step waits in a *queue*: that of the connections of one address, of its streams, or of a service. In each turn
of the loop steps are done for one quantum of time: all of the first queue, then of the next. A queue that is left with
steps when the quantum is over goes behind the others. What is done without waiting is noted: a queue for which much was
done so in one turn has to wait, too. Those who would do more for it at once are then told, and stop.

Steps differ a hundredfold, so their time is measured. Tasks therefore go on within a step (`signals.py`); those that
wait for asyncio's own futures all go on in the next turn of the loop.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Final

QUANTUM_NS: Final = 1_000_000
"""What steps take in one turn of the loop, and what one queue takes of it without waiting. The step that exceeds it is
finished.
"""


class Queue:
    """Steps that are done in order."""

    def __init__(self) -> None:
        self.steps: deque[Callable[[], object]] = deque()
        self.is_waiting = False
        """True while it waits for a turn, and in the turn after that: nothing more of it is to be done at once. So who
        comes then stands in line, behind who has come before, and nobody is passed over again and again.
        """
        self.used_ns = 0
        """What was done at once since a quantum was full."""
        self.is_counted = False
        """True for the rest of the turn in which one got full: with another one the queue has to wait."""
        self.told: set[Callable[[], object]] = set()
        """Called when it begins to wait. They may join it."""


class Turns:
    """The queues that wait for turns. Call `join` for a step that may be much, `note` for what was done at once.

    Args:
        monotonic_ns: the clock that steps are timed with.
    """

    def __init__(self, monotonic_ns: Callable[[], int] = time.perf_counter_ns) -> None:
        self._monotonic_ns = monotonic_ns
        self._waiting: deque[Queue] = deque()
        self._done: list[Queue] = []
        """Those that have had all their steps in this turn."""
        self._counted: list[Queue] = []
        self._ends_ns = 0
        self._is_due = False

    def join(self, queue: Queue, step: Callable[[], object]) -> None:
        """Do a step in a later turn of the loop."""
        queue.steps.append(step)
        if not queue.is_waiting:
            self._wait(queue)

    def note(self, queue: Queue, used_ns: int) -> None:
        """Something that took so long was done at once."""
        queue.used_ns += used_ns
        if queue.used_ns < QUANTUM_NS or queue.is_waiting:
            return
        queue.used_ns = 0
        if queue.is_counted:
            self._wait(queue)
        else:
            # It may have taken many turns. To see each end of a turn would cost a callback for every read.
            queue.is_counted = True
            self._counted.append(queue)
            self._come()

    def charge(self, used_ns: int) -> None:
        """Count time for what a step has left to the loop."""
        self._ends_ns -= used_ns

    def _wait(self, queue: Queue) -> None:
        queue.is_waiting = True
        self._waiting.append(queue)
        self._come()
        for tell in queue.told:
            tell()

    def _come(self) -> None:
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self._take)

    def _take(self) -> None:
        self._is_due = False
        for queue in self._counted:
            queue.is_counted = False
        self._counted.clear()
        for queue in self._done:
            if queue.steps:
                self._waiting.append(queue)
            else:
                queue.is_waiting = False
        self._done.clear()
        self._ends_ns = self._monotonic_ns() + QUANTUM_NS
        try:
            self._do_steps()
        finally:
            if self._waiting or self._done:
                self._come()

    def _do_steps(self) -> None:
        waiting = self._waiting
        while waiting:
            queue = waiting[0]
            if queue.steps:
                queue.steps.popleft()()
            is_over = self._monotonic_ns() >= self._ends_ns
            if not queue.steps:
                self._done.append(waiting.popleft())
            elif is_over:
                waiting.rotate(-1)
            if is_over:
                return
