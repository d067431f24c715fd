"""The mesh's long work on the event loop: jobs in small steps, so that requests never wait for long behind it, nor it
behind them.

A job is a generator that yields after each step. Steps of all jobs are done in turn until a *quantum* of time is used
up; then requests are served: in one turn of the loop they are read, in the next they are answered. Without that a
flush would wake the writers of all streams, and peers that flush at once all readers: tens of milliseconds in one turn.

The quantum grows with what requests take for a turn: to half of that up to 0.5 ms, to a third above; and where turns
are long, one is left to requests at a time. So replication keeps a third of a busy loop, and a quarter when turns stay
longer than 1.5 ms. It goes by the shortest of the latest turns: a long quantum after a long turn among short ones would
make the next turn long as well, for all the requests that come meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from ratelimit_sidecar.replication.pace import Steps

QUANTUM_NS = 200_000
"""At least. The step that uses it up is the last, so it takes up to as long as the longest step more."""

FAIR_QUANTUM_NS = 500_000
"""Up to so much it is half of others' turns, and above a third of them."""

MAX_QUANTUM_NS = 5_000_000
"""At most."""

GROWTH = 16
"""What others are reckoned to take for a turn grows by one part in so many at a time, and shrinks at once."""

LONG_TURN_NS = 500_000
"""Where others need so long for a turn, they are left one at a time."""


class _QueuedJob(NamedTuple):
    job: Steps
    is_urgent: bool
    done: asyncio.Future[None]


class Scheduler:
    """Does the jobs of one event loop; see above. `run` returns when its job is done.

    Args:
        monotonic_ns: the clock that steps are timed with.
    """

    def __init__(self, monotonic_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._monotonic_ns = monotonic_ns
        self._quantum_ns = QUANTUM_NS
        self._used_ns = 0
        """Of the quantum."""
        self._turn_ns = 0
        """What others take for a turn of the loop, or less when that has been so only lately."""
        self._turns_left = 2
        """Turns of the loop that are left to others when the quantum is used up."""
        self._left_ns = 0
        """When the quantum was used up."""
        self._queue: deque[_QueuedJob] = deque()

    async def run(self, job: Steps, *, is_urgent: bool = False) -> None:
        """Do a job: at once as much of it as the quantum allows, and the rest in turn with others.

        Args:
            is_urgent: every second step is one of this job, however many others wait.

        Raises:
            Exception: what the job raises.
        """
        while self._used_ns < self._quantum_ns:
            if self._step(job):
                return
        queued = _QueuedJob(job, is_urgent, asyncio.get_running_loop().create_future())
        self._put(queued)
        await queued.done

    def _put(self, queued: _QueuedJob) -> None:
        if queued.is_urgent:
            self._queue.insert(1, queued)
        else:
            self._queue.append(queued)

    def _step(self, job: Steps) -> bool:
        """True when it was the last of the job."""
        began_ns = self._monotonic_ns()
        try:
            for _ in job:
                return False
            return True
        finally:
            ended_ns = self._monotonic_ns()
            self._used_ns += ended_ns - began_ns
            if self._used_ns >= self._quantum_ns:
                self._left_ns = ended_ns
                loop = asyncio.get_running_loop()
                if self._turns_left == 1:
                    loop.call_soon(self._go_on)
                else:
                    loop.call_soon(loop.call_soon, self._go_on)

    def _go_on(self) -> None:
        self._used_ns = 0
        turn_ns = (self._monotonic_ns() - self._left_ns) // self._turns_left
        self._turn_ns = min(turn_ns, max(QUANTUM_NS, self._turn_ns + self._turn_ns // GROWTH))
        self._turns_left = 1 if self._turn_ns >= LONG_TURN_NS else 2
        others_ns = self._turn_ns * self._turns_left
        self._quantum_ns = max(QUANTUM_NS, min(others_ns // 2, FAIR_QUANTUM_NS), min(others_ns // 3, MAX_QUANTUM_NS))
        while self._queue and self._used_ns < self._quantum_ns:
            queued = self._queue.popleft()
            if queued.done.cancelled():
                continue
            try:
                has_ended = self._step(queued.job)
            except Exception as error:
                queued.done.set_exception(error)
                continue
            if has_ended:
                queued.done.set_result(None)
            else:
                self._put(queued)
        # It has caught up: what comes next, maybe much later, need not have a long quantum at once.
        if self._used_ns < self._quantum_ns:
            self._quantum_ns = max(min(self._quantum_ns, FAIR_QUANTUM_NS), self._used_ns + 1)
