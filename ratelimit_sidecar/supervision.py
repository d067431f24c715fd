"""Tasks that must not just stop: one that fails is logged, counted, and begun again after a wait.

The wait doubles from `FIRST_SECONDS` to `MAX_SECONDS` while a task keeps failing, and starts afresh once it has lasted
for `LASTING_SECONDS`. The other tasks go on meanwhile.
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

TOLD_SECONDS = 60.0
"""For how long a failure is told of after the task was begun again."""

_log = structlog.stdlib.get_logger(__name__)


class Supervisor:
    """Runs tasks and begins those that fail again; tells which are down.

    Args:
        monotonic_s: what the time since a failure is measured with.
    """

    def __init__(self, monotonic_s: Callable[[], float] = time.monotonic) -> None:
        self._monotonic_s = monotonic_s
        self._restarts: Counter[str] = Counter()
        self._down: set[str] = set()
        """Tasks that wait to be begun again."""
        self._failed_s: dict[str, float] = {}
        """When each task failed last."""

    @property
    def restarts(self) -> Mapping[str, int]:
        """How often each task has failed since the start; a task that never did has 0."""
        return self._restarts

    def failing(self) -> Sequence[str]:
        """Tasks that failed lately, in words."""
        since_s = self._monotonic_s() - TOLD_SECONDS
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
                _log.exception("task_failed", task=task, begun_again_in_seconds=wait_s)
            self._failed_s[task] = now_s = self._monotonic_s()
            if now_s - began_s >= LASTING_SECONDS:
                wait_s = FIRST_SECONDS
            self._restarts[task] += 1
            self._down.add(task)
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, MAX_SECONDS)
