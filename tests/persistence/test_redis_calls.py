"""Calls of Redis, bounded in time."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from ratelimit_sidecar.persistence.redis_calls import bounded


async def test_a_cancellation_that_was_caught_before_does_not_end_a_call() -> None:
    """A group of tasks cancels the task that waits for it when one of the others fails, and leaves that counted."""
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    with suppress(asyncio.CancelledError):
        await asyncio.sleep(0)
    assert await bounded(asyncio.sleep(0, "answer")) == "answer"
