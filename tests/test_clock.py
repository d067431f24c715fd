"""Wall microseconds that never step back, whatever the system clock does."""

from __future__ import annotations

import time

import pytest

from ratelimit_sidecar.clock import JUMP_US, MAX_SLEW_PER_SECOND_US, MAX_SLEW_US, Clock


class SystemClock:
    def __init__(self) -> None:
        self.wall_us = 1_790_000_000_000_000
        self.boottime_us = 5_000_000

    def boottime_ns(self, clock: int) -> int:
        assert clock == time.CLOCK_BOOTTIME
        return self.boottime_us * 1_000

    def pass_time(self, elapsed_us: int) -> None:
        self.wall_us += elapsed_us
        self.boottime_us += elapsed_us


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> SystemClock:
    system = SystemClock()
    monkeypatch.setattr(time, "time_ns", lambda: system.wall_us * 1_000)
    monkeypatch.setattr(time, "clock_gettime_ns", system.boottime_ns)
    return system


def test_it_tells_wall_time(system: SystemClock) -> None:
    clock = Clock()
    system.pass_time(1_234_567)
    assert clock.now_us() == system.wall_us


def test_time_stands_still_rather_than_going_back(system: SystemClock) -> None:
    clock = Clock()
    system.wall_us -= 100_000
    # However long nobody slewed.
    system.pass_time(3_600_000_000)
    before_us = clock.now_us()
    clock.slew()
    assert clock.now_us() == before_us
    system.pass_time(MAX_SLEW_US - 1)
    assert clock.now_us() == before_us
    system.pass_time(2)
    assert clock.now_us() == before_us + 1
    assert clock.now_us() == system.wall_us + 100_000 - MAX_SLEW_US


def test_a_step_back_of_the_system_clock_is_slewed(system: SystemClock) -> None:
    clock = Clock()
    system.wall_us -= 4_000_000
    last_us = clock.now_us()
    for _ in range(900):
        system.pass_time(1_000_000)
        clock.slew()
        passed_us = clock.now_us() - last_us
        last_us += passed_us
        assert 1_000_000 - MAX_SLEW_PER_SECOND_US <= passed_us <= 1_000_000
    system.pass_time(MAX_SLEW_PER_SECOND_US)
    assert clock.now_us() == system.wall_us


def test_a_step_forward_is_slewed_too(system: SystemClock) -> None:
    clock = Clock()
    system.wall_us += 9_000
    system.pass_time(1_000_000)
    assert clock.slew() == 9_000
    assert system.wall_us - clock.now_us() == 9_000 - MAX_SLEW_PER_SECOND_US
    system.pass_time(1_000_000)
    clock.slew()
    assert clock.now_us() == system.wall_us


def test_a_suspended_machine_loses_no_time(system: SystemClock) -> None:
    """CLOCK_BOOTTIME went on, so there is no gap to close, and strict buckets see no step."""
    clock = Clock()
    system.pass_time(3_600_000_000)
    assert clock.now_us() == system.wall_us
    assert clock.slew() == 0


def test_a_wall_clock_that_was_far_behind_at_the_start_is_followed_in_one_step(system: SystemClock) -> None:
    clock = Clock()
    system.wall_us += 3_600_000_000 + JUMP_US
    assert clock.slew() == 3_600_000_000 + JUMP_US
    assert clock.now_us() == system.wall_us
