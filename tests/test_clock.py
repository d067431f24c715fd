"""Wall microseconds that go on evenly, and follow a system clock that was set once that is believed."""

from __future__ import annotations

import time

import pytest

from ratelimit_sidecar.clock import ALONE_US, DISPUTED_US, FAR_US, MAX_SLEW_PER_SECOND_US, MAX_SLEW_US, Clock

HOUR_US = 3_600_000_000


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
    clock.discipline()
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
        clock.discipline()
        passed_us = clock.now_us() - last_us
        last_us += passed_us
        assert 1_000_000 - MAX_SLEW_PER_SECOND_US <= passed_us <= 1_000_000
    system.pass_time(MAX_SLEW_PER_SECOND_US)
    assert clock.now_us() == system.wall_us


def test_a_step_forward_is_slewed_too(system: SystemClock) -> None:
    clock = Clock()
    system.wall_us += 9_000
    system.pass_time(1_000_000)
    assert clock.discipline() == 0
    assert clock.gap_us == 4_000
    assert system.wall_us - clock.now_us() == 9_000 - MAX_SLEW_PER_SECOND_US
    system.pass_time(1_000_000)
    clock.discipline()
    assert clock.now_us() == system.wall_us


def test_a_suspended_machine_loses_no_time(system: SystemClock) -> None:
    """CLOCK_BOOTTIME went on, so there is no gap to close, and strict buckets see no step."""
    clock = Clock()
    system.pass_time(3_600_000_000)
    assert clock.now_us() == system.wall_us
    assert clock.discipline() == 0
    assert clock.gap_us == 0


@pytest.mark.parametrize("far_us", [HOUR_US, -HOUR_US, FAR_US, -FAR_US])
def test_a_step_is_followed_at_once_when_most_peers_have_the_new_time(system: SystemClock, far_us: int) -> None:
    clock = Clock()
    before_us = clock.now_us()
    system.wall_us += far_us
    assert clock.discipline([far_us - 200_000, far_us, 0]) == far_us
    assert clock.now_us() == system.wall_us
    # What is told without the steps never steps.
    assert clock.now_us() - clock.stepped_us == before_us
    assert (clock.steps_forward, clock.steps_back) == ((1, 0) if far_us > 0 else (0, 1))


@pytest.mark.parametrize(
    ("peers", "doubted_us"),
    [([], ALONE_US), ([0, HOUR_US], ALONE_US), ([0], DISPUTED_US), ([0, 100_000, HOUR_US], DISPUTED_US)],
)
@pytest.mark.parametrize("far_us", [HOUR_US, -HOUR_US])
def test_a_step_without_most_peers_is_followed_when_it_lasts(
    system: SystemClock, peers: list[int], doubted_us: int, far_us: int
) -> None:
    clock = Clock()
    ahead = [far_us if peer == HOUR_US else peer for peer in peers]
    system.wall_us += far_us
    begin_us = system.boottime_us
    before_us = clock.now_us()
    while not clock.discipline(ahead):
        assert clock.gap_us == far_us
        assert clock.now_us() == before_us + system.boottime_us - begin_us
        system.pass_time(1_000_000)
    assert system.boottime_us - begin_us == doubted_us
    assert clock.now_us() == system.wall_us


def test_a_step_that_is_taken_back_in_time_was_none(system: SystemClock) -> None:
    clock = Clock()
    for _ in range(10):
        for ahead_us in (HOUR_US, -HOUR_US):
            system.wall_us += ahead_us
            for _ in range(50):
                assert clock.discipline() == 0
                system.pass_time(1_000_000)
    assert clock.now_us() == system.wall_us


def test_an_hour_ahead_and_back_costs_no_time(system: SystemClock) -> None:
    """It took 200 hours of slewing once."""
    clock = Clock()
    system.wall_us += HOUR_US
    clock.discipline([HOUR_US])
    system.pass_time(1_000_000)
    system.wall_us -= HOUR_US
    assert clock.discipline([-HOUR_US]) == -HOUR_US
    assert clock.now_us() == system.wall_us
    assert clock.stepped_us == 0
