"""The stall monitor: what it is told it shows, for one to two minutes."""

from __future__ import annotations

import asyncio
import time

import pytest

from ratelimit_sidecar.telemetry.stalls import LONG_NS, WINDOW_NS, StallMonitor


class Time:
    def __init__(self) -> None:
        self.now_ns = 5

    def __call__(self) -> int:
        return self.now_ns


def test_the_longest_is_shown_whatever_follows() -> None:
    monitor = StallMonitor(Time())
    for late_ns in (1_000_000, 7_000_000, 2_000_000):
        monitor.note(late_ns)
    assert monitor.longest_seconds == pytest.approx(0.007)


def test_only_those_above_the_bound_are_counted() -> None:
    monitor = StallMonitor(Time())
    for late_ns in (LONG_NS - 1, LONG_NS, LONG_NS + 1, 10 * LONG_NS):
        monitor.note(late_ns)
    assert monitor.long_stalls == 2


def test_a_stall_is_shown_for_at_least_one_minute_and_at_most_two() -> None:
    now = Time()
    monitor = StallMonitor(now)
    now.now_ns += WINDOW_NS - 1
    monitor.note(LONG_NS)
    now.now_ns += WINDOW_NS
    assert monitor.longest_seconds == LONG_NS / 1e9
    now.now_ns += 1
    assert monitor.longest_seconds == 0


def test_one_from_before_a_long_silence_is_forgotten() -> None:
    now = Time()
    monitor = StallMonitor(now)
    monitor.note(LONG_NS)
    now.now_ns += 5 * WINDOW_NS
    assert monitor.longest_seconds == 0


async def test_a_callback_that_keeps_the_loop_is_measured() -> None:
    monitor = StallMonitor()
    running = asyncio.create_task(monitor.run())
    await asyncio.sleep(0)
    time.sleep(0.05)  # noqa: ASYNC251
    while monitor.longest_seconds < 0.04:  # noqa: ASYNC110 (the monitor wakes by itself)
        await asyncio.sleep(0.001)
    assert monitor.long_stalls >= 1
    running.cancel()
