"""Calls of Redis, bounded in time."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from ratelimit_sidecar.persistence.redis_calls import bounded


async def test_a_cancellation_that_was_caught_before_does_not_end_a_call() -> None:
    """A group of tasks cancels the task that waits for it when one of the others fails, and leaves that counted."""
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    with suppress(asyncio.CancelledError):
        await asyncio.sleep(0)
    assert await bounded(asyncio.sleep(0, "answer")) == "answer"


@pytest.mark.parametrize("fails", [False, True], ids=["answers", "fails"])
async def test_a_cancellation_that_the_library_swallows_ends_the_task_all_the_same(fails: bool) -> None:
    waits = asyncio.Event()

    async def swallow() -> str:
        try:
            waits.set()
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            if fails:
                raise ConnectionError("it cannot be reached") from None
        return "answer"

    async def call_twice() -> None:
        for _ in range(2):
            with suppress(ConnectionError):
                await bounded(swallow())

    task = asyncio.create_task(call_twice())
    await waits.wait()
    task.cancel()
    _, pending = await asyncio.wait([task], timeout=5)
    assert not pending
    assert task.cancelled()
