"""The mesh's long work on the event loop: jobs in small steps, so that requests never wait for long behind it, nor it
behind them.

A job is a generator that yields after each step. Steps of all jobs are done in turn until a *quantum* of time is used
up; then requests are served: in one turn of the loop they are read and decided, in the next uvloop writes the answers
to their sockets. Without that a flush would wake the writers of all streams, and peers that flush at once all readers:
tens of milliseconds in one turn.

The quantum is a part of the time that requests take between two quanta: half of it up to 0.5 ms, a third beyond. Where
one turn takes 0.5 ms, requests get one, not two. So replication keeps a third of a busy loop, or a quarter when
requests take more than 1.5 ms. The shortest of the latest turns counts: a long quantum after one long turn among short
ones would make the next turn long as well, for all the requests that come meanwhile.

`server.turns` compares this with other ways to cut long work.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from ratelimit_sidecar.replication.pace import Steps

LEAST_QUANTUM_NS = 200_000
"""The least quantum. The step that uses it up is the last, so one step may come on top."""

FAIR_QUANTUM_NS = 500_000
"""Up to this the quantum is half of what requests take, beyond it a third."""

MAX_QUANTUM_NS = 5_000_000
"""The largest quantum."""

GROWTH = 16
"""The estimate of what others take in a turn grows by 1/16 at a time, and shrinks at once."""

LONG_TURN_NS = 500_000
"""Where others take so long for a turn, they get one between two quanta, not two."""


LARGE_FRAME_BYTES = 8_192
MAX_LARGE_FRAMES = 16
"""So many frames that are larger are handled at once: what is parsed may take 25 times as much memory, and as all jobs
take turns, it would be that of all streams together.
"""


class _QueuedJob(NamedTuple):
    job: Steps
    is_urgent: bool
    done: asyncio.Future[None]


class Scheduler:
    """Does the jobs of one event loop, a quantum at a time. `run` returns when its job is done.

    Args:
        monotonic_ns: the clock that steps are timed with.
    """

    def __init__(self, monotonic_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._monotonic_ns = monotonic_ns
        self._quantum_ns = LEAST_QUANTUM_NS
        self._used_ns = 0
        """How much of the current quantum is used."""
        self._turn_ns = 0
        """What others take for a turn of the loop, or less when that has been so only lately."""
        self._turns_of_others = 2
        """Turns of the loop that others get when the quantum is used up."""
        self._yielded_ns = 0
        """When the last quantum was used up and the loop left to others."""
        self._queue: deque[_QueuedJob] = deque()
        self._large_frames = asyncio.Semaphore(MAX_LARGE_FRAMES)

    async def handle(self, frame_bytes: int, job: Steps) -> None:
        """As `run`, for a frame of that size: only a few large ones are handled at once."""
        if frame_bytes <= LARGE_FRAME_BYTES:
            await self.run(job)
            return
        async with self._large_frames:
            await self.run(job)

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
                self._yielded_ns = ended_ns
                loop = asyncio.get_running_loop()
                if self._turns_of_others == 1:
                    loop.call_soon(self._go_on)
                else:
                    loop.call_soon(loop.call_soon, self._go_on)

    def _go_on(self) -> None:
        self._used_ns = 0
        turn_ns = (self._monotonic_ns() - self._yielded_ns) // self._turns_of_others
        self._turn_ns = min(turn_ns, max(LEAST_QUANTUM_NS, self._turn_ns + self._turn_ns // GROWTH))
        self._turns_of_others = 1 if self._turn_ns >= LONG_TURN_NS else 2
        others_ns = self._turn_ns * self._turns_of_others
        self._quantum_ns = max(
            LEAST_QUANTUM_NS, min(others_ns // 2, FAIR_QUANTUM_NS), min(others_ns // 3, MAX_QUANTUM_NS)
        )
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
