"""Ends the waits of requests in time, and delivers their answers: the event loop's side of `crdt.wait_queues`.

In one turn of the event loop at most `STEP` waits end by time or cancellation, and as many answers go out.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

from ratelimit_sidecar.crdt.wait_queues import WaitQueues
from ratelimit_sidecar.crdt.waiting import Outcome, PendingDecision
from ratelimit_sidecar.server.rpc import FailureLog

STEP: Final = 64


class Waits:
    """The waits of one process. Pass each new one to `hold`; when it has ended, `PendingDecision.on_end` is called.

    Args:
        strict_us: the clock of strict limits.
    """

    def __init__(self, queues: WaitQueues, strict_us: Callable[[], int]) -> None:
        self._queues = queues
        self._strict_us = strict_us
        self._timers: dict[PendingDecision, asyncio.TimerHandle] = {}
        self._due: deque[tuple[PendingDecision, Outcome]] = deque()
        self._is_scheduled = False
        self._failures = FailureLog()
        queues.on_ended = self._schedule

    def hold(self, waiting: PendingDecision, most_seconds: float) -> None:
        """Take charge of a new wait: end it after its rule's `wait`, or after `most_seconds` if that is less.

        Args:
            most_seconds: how long the client waits at most.
        """
        seconds = min(waiting.wait_us / 1e6, most_seconds)
        self._timers[waiting] = asyncio.get_running_loop().call_later(seconds, self._fall_due, waiting, Outcome.EXPIRED)
        waiting.owner = self

    def cancel(self, waiting: PendingDecision) -> None:
        """See `PendingDecision.cancel`."""
        if waiting.queue is not None:
            self._fall_due(waiting, Outcome.CANCELLED)

    def end_now(self, waiting: PendingDecision) -> None:
        """See `PendingDecision.end_now`."""
        self._queues.end(waiting, Outcome.CALLED_OFF, self._strict_us())

    def _fall_due(self, waiting: PendingDecision, outcome: Outcome) -> None:
        self._due.append((waiting, outcome))
        self._schedule()

    def _schedule(self) -> None:
        if not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._step)

    def _step(self) -> None:
        self._is_scheduled = False
        for _ in range(min(STEP, len(self._due))):
            self._queues.end(*self._due.popleft(), self._strict_us())
        ended = self._queues.ended
        for _ in range(min(STEP, len(ended))):
            waiting = ended.popleft()
            self._timers.pop(waiting).cancel()
            self._deliver(waiting)
        if self._due or ended:
            self._schedule()

    def _deliver(self, waiting: PendingDecision) -> None:
        on_end, waiting.on_end = waiting.on_end, None
        try:
            if on_end is not None:
                on_end()
        except Exception as failure:
            # The others are answered all the same.
            self._failures.log_first("an answer that comes later", failure, ())
