"""Supervised tasks: a task that fails is logged, counted, and restarted after a wait.

The wait doubles from `FIRST_SECONDS` to `MAX_SECONDS` while a task keeps failing. Once the task has run for
`LASTING_SECONDS`, the wait starts from the beginning again. Other tasks go on meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence

import structlog

FIRST_SECONDS = 0.05
MAX_SECONDS = 5.0
LASTING_SECONDS = 30.0

REPORTED_SECONDS = 60.0
"""How long a failure is reported after the task was restarted."""

_log = structlog.stdlib.get_logger(__name__)


class Supervisor:
    """Runs tasks, restarts those that fail, and reports failures.

    Args:
        monotonic_s: returns the seconds of a clock that never goes back.
    """

    def __init__(self, monotonic_s: Callable[[], float] = time.monotonic) -> None:
        self._monotonic_s = monotonic_s
        self._restarts: Counter[str] = Counter()
        self._down: set[str] = set()
        """Tasks that wait to be restarted."""
        self._failed_s: dict[str, float] = {}
        """When each task last failed."""

    @property
    def restarts(self) -> Mapping[str, int]:
        """How often each task has failed since the start; 0 for a task that never did."""
        return self._restarts

    def failing(self) -> Sequence[str]:
        """Tasks that failed lately, as texts for people."""
        since_s = self._monotonic_s() - REPORTED_SECONDS
        return [
            f"{task} has failed {self._restarts[task]} times, and {'is down' if task in self._down else 'goes on'}"
            for task, failed_s in self._failed_s.items()
            if failed_s > since_s or task in self._down
        ]

    async def keep(self, task: str, run: Callable[[], Awaitable[None]]) -> None:
        """Run a task until it returns; when it raises, run it again.

        Args:
            task: its name, for people and metrics.
        """
        self._restarts[task] += 0
        wait_s = FIRST_SECONDS
        while True:
            began_s = self._monotonic_s()
            self._down.discard(task)
            try:
                return await run()
            except Exception:
                _log.exception("task_failed", task=task, restarted_in_seconds=wait_s)
            self._failed_s[task] = now_s = self._monotonic_s()
            if now_s - began_s >= LASTING_SECONDS:
                wait_s = FIRST_SECONDS
            self._restarts[task] += 1
            self._down.add(task)
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, MAX_SECONDS)
