"""When a node flushes, on a loop whose time the test lets pass."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ratelimit_sidecar.replication.periodic import URGENT_FLUSH_SECONDS, Periodic

FLUSH_SECONDS = 0.02


class Timed(asyncio.SelectorEventLoop):
    """Passes over the time in which nothing is due."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1_000.0
        select = self._selector.select  # type: ignore[attr-defined]

        def pass_time(timeout: float | None) -> Any:
            self.now += timeout or 0.0
            return select(0)

        self._selector.select = pass_time  # type: ignore[attr-defined]

    def time(self) -> float:
        return self.now


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner(loop_factory=Timed) as runner:
        yield runner


async def flushed_at(seconds: float, during: Callable[[Periodic], None] = lambda _: None) -> list[float]:
    """When there were flushes, from the first one on.

    Args:
        seconds: how long it runs.
        during: called before it runs.
    """
    loop = asyncio.get_running_loop()
    began, flushes = loop.time(), list[float]()

    async def flush() -> None:
        flushes.append(round(loop.time() - began, 6))

    periodic = Periodic(flush, FLUSH_SECONDS)
    during(periodic)
    running = asyncio.create_task(periodic.run())
    await asyncio.sleep(seconds)
    running.cancel()
    await asyncio.wait([running])
    await asyncio.sleep(1.0)
    return flushes


def at(seconds: float, periodic: Periodic) -> None:
    asyncio.get_running_loop().call_later(seconds, periodic.call_soon)


def test_it_flushes_at_once_and_then_evenly_until_it_is_cancelled(runner: asyncio.Runner) -> None:
    assert runner.run(flushed_at(2.5 * FLUSH_SECONDS)) == [0.0, FLUSH_SECONDS, 2 * FLUSH_SECONDS]


def test_what_is_urgent_is_flushed_at_once_when_the_last_flush_is_some_time_ago(runner: asyncio.Runner) -> None:
    flushes = runner.run(flushed_at(0.03, lambda periodic: at(0.008, periodic)))
    assert flushes == [0.0, 0.008, 0.008 + FLUSH_SECONDS]


def test_urgent_flushes_keep_a_distance_however_much_is_urgent(runner: asyncio.Runner) -> None:
    def something_is_urgent(periodic: Periodic) -> None:
        for microseconds in range(0, 5_000, 100):
            at(microseconds / 1e6, periodic)

    flushes = runner.run(flushed_at(0.01, something_is_urgent))
    assert flushes == pytest.approx([0.0, URGENT_FLUSH_SECONDS, 2 * URGENT_FLUSH_SECONDS, 3 * URGENT_FLUSH_SECONDS])


def test_nothing_is_flushed_for_what_gets_urgent_before_or_after(runner: asyncio.Runner) -> None:
    def something_is_urgent(periodic: Periodic) -> None:
        periodic.call_soon()
        at(0.05, periodic)

    assert runner.run(flushed_at(0.01, something_is_urgent)) == [0.0]


def test_a_flush_that_fails_ends_it(runner: asyncio.Runner) -> None:
    calls = 0

    async def flush() -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise ZeroDivisionError

    async def run() -> None:
        await Periodic(flush, FLUSH_SECONDS).run()

    with pytest.raises(ZeroDivisionError):
        runner.run(run())
    assert calls == 2
