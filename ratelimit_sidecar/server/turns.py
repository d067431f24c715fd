"""Gives out turns of the event loop, so that a client waits for about a millisecond, however many connections and
streams others have.

Theory of operation. Work that could be too much for one iteration of the loop is cut into steps, none much longer than
a millisecond, and each step joins a *queue*: that of the connections of one address, of its streams, or of a service.
In each iteration, steps run for one quantum of time: all of the first queue, then of the next. A queue that still has
steps when the quantum is over goes behind the others, until its next *turn*. Small work runs *inline*, without joining
a queue, and its time is noted; a queue that used too much time in this way has to wait, too, and its `on_waiting`
callbacks tell those who would run more inline.

The time of each step is measured, since steps differ a hundredfold. So tasks resume within a step (`turn_event.py`).
(Tasks that wait for asyncio's own futures would all resume in the next iteration.)

How long work is cut, and which to use:

    work                                          cut by                                   after
    what clients cause, fair between them         `Turns`: a queue for each of them        1 ms of an iteration
    a job of the mesh, a generator of steps       `replication.scheduler.Scheduler`        0.2 to 5 ms of an iteration
    where such a generator over buckets yields    `replication.pace.Pace`, by their count  8 buckets, some 0.1 ms
    the same, if buckets differ a thousandfold    `replication.rounds.Work`, by its units  0.1 ms, as estimated
    a coroutine over very many buckets            `persistence.time_slice.TimeSlice`       0.3 ms
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Final

QUANTUM_NS: Final = 1_000_000
"""The time of all steps in one iteration of the loop, and the time that one queue may use inline. A step that exceeds
it is finished.
"""


class StepQueue:
    """Steps of one client or service, which run in order. Pass it to `Turns`; callers change only
    `on_waiting`."""

    def __init__(self) -> None:
        self.steps: deque[Callable[[], object]] = deque()
        self.is_waiting = False
        """True while it waits for a turn, and in the iteration after that: then new work must join it instead of
        running inline. So work is done in the order in which it came.
        """
        self.used_ns = 0
        """The time used inline since it last reached a quantum."""
        self.has_used_a_quantum = False
        """True for the rest of the iteration in which it used a quantum inline; if it uses another one, it has to
        wait."""
        self.on_waiting: set[Callable[[], object]] = set()
        """Callbacks for when it begins to wait; they may join it."""


class Turns:
    """The queues that wait for turns. Call `join` for a step that may be long, `note` for work that was done inline.

    Args:
        monotonic_ns: the clock that steps are timed with.
    """

    def __init__(self, monotonic_ns: Callable[[], int] = time.perf_counter_ns) -> None:
        self._monotonic_ns = monotonic_ns
        self._waiting: deque[StepQueue] = deque()
        self._done: list[StepQueue] = []
        """The queues whose steps were all done in this iteration."""
        self._used_a_quantum: list[StepQueue] = []
        self._ends_ns = 0
        self._is_due = False

    def join(self, queue: StepQueue, step: Callable[[], object]) -> None:
        """Do a step in a later iteration of the loop."""
        queue.steps.append(step)
        if not queue.is_waiting:
            self._wait(queue)

    def note(self, queue: StepQueue, used_ns: int) -> None:
        """Note that work for the queue was done inline, and how long it took."""
        queue.used_ns += used_ns
        if queue.used_ns < QUANTUM_NS or queue.is_waiting:
            return
        queue.used_ns = 0
        if queue.has_used_a_quantum:
            self._wait(queue)
        else:
            # It may have taken many iterations. To see the end of each would cost a callback for every read.
            queue.has_used_a_quantum = True
            self._used_a_quantum.append(queue)
            self._schedule()

    def charge(self, used_ns: int) -> None:
        """Count time for work that a step has left to the loop, as part of that step."""
        self._ends_ns -= used_ns

    def _wait(self, queue: StepQueue) -> None:
        queue.is_waiting = True
        self._waiting.append(queue)
        self._schedule()
        for callback in queue.on_waiting:
            callback()

    def _schedule(self) -> None:
        if not self._is_due:
            self._is_due = True
            asyncio.get_running_loop().call_soon(self._run_iteration)

    def _run_iteration(self) -> None:
        self._is_due = False
        for queue in self._used_a_quantum:
            queue.has_used_a_quantum = False
        self._used_a_quantum.clear()
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
                self._schedule()

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
