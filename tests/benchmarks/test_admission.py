"""The simulator of admission: what it measures with is right, what it says is reproducible, and it can say no."""

from __future__ import annotations

from itertools import combinations
from random import Random

import pytest

from benchmarks.admission import run as simulator
from benchmarks.admission.demand import SECOND_US
from benchmarks.admission.measures import adapted_us
from benchmarks.admission.policies.max_merge import MaxMerge
from benchmarks.admission.report import table
from benchmarks.admission.run import EVENTUAL, POLICIES, STRICT, Outcome, run
from benchmarks.admission.scenarios import LIMIT, Scenario, overload, quick, shift
from ratelimit_sidecar.crdt.limit import TokenBucketLimit
from simulation.textbook import ideal, worst_burst

OVERLOAD, _, PARTITION = quick()


def tables_of(scenario: Scenario, seed: int) -> str:
    return table(scenario, [[run(scenario, policy, seed)] for policy in POLICIES])


@pytest.mark.slow
def test_the_same_seed_gives_the_same_table_to_the_byte() -> None:
    assert tables_of(OVERLOAD, 1) == tables_of(OVERLOAD, 1)
    assert run(OVERLOAD, EVENTUAL, 1) != run(OVERLOAD, EVENTUAL, 2)


def test_the_worst_burst_is_the_largest_excess_over_all_intervals() -> None:
    random = Random(1)
    limit = TokenBucketLimit(3, 1_000, 2)
    for _ in range(50):
        times_us = sorted(random.randrange(3_000) for _ in range(20))
        excess = max(
            (last - first + 1) * limit.period_us
            - limit.scaled_capacity
            - limit.tokens * (times_us[last] - times_us[first])
            for first, last in [*combinations(range(20), 2), *zip(range(20), range(20), strict=True)]
        )
        assert worst_burst(limit, times_us) == max(0, -(-excess // limit.period_us))


def test_what_one_bucket_admits_is_never_over_its_limit() -> None:
    random = Random(1)
    times_us = sorted(random.randrange(10 * SECOND_US) for _ in range(5_000))
    assert ideal(LIMIT, times_us) == 200 + 1_000 - 1  # the last token is half refilled
    assert worst_burst(LIMIT, times_us[: LIMIT.capacity]) == 0


def test_time_to_adapt_is_until_the_first_second_that_uses_the_limit() -> None:
    slow = [10_000 * number for number in range(0, 150, 2)]
    fast = [1_500_000 + 10_000 * number for number in range(200)]
    found_us = adapted_us(LIMIT, slow + fast, 0, 4 * SECOND_US)
    assert found_us is not None
    assert found_us == pytest.approx(1_400_000, abs=20_000)
    assert adapted_us(LIMIT, slow, 0, 4 * SECOND_US) is None


@pytest.mark.parametrize("scenario", quick(), ids=lambda scenario: scenario.name)
def test_what_eventual_admits_beyond_the_limit_is_within_what_was_undelivered(scenario: Scenario) -> None:
    outcome = run(scenario, EVENTUAL, 1)
    assert outcome.undelivered is not None
    assert outcome.bound is not None
    assert outcome.worst_burst <= outcome.undelivered <= outcome.bound


@pytest.mark.slow
def test_eventual_admits_the_limit_to_half_a_percent_in_a_minute_of_ten_times_the_demand() -> None:
    outcome = run(overload("overload", "", LIMIT), EVENTUAL, 1)
    assert abs(outcome.admitted - outcome.ceiling) <= outcome.ceiling * 5 // 1_000


@pytest.mark.slow
@pytest.mark.parametrize("policy", [EVENTUAL, STRICT])
def test_one_busy_region_of_three_uses_the_limit_within_two_seconds(policy: str) -> None:
    outcome = run(shift(), policy, 1)
    assert _adapted_within(outcome, 2 * SECOND_US)
    assert min(outcome.used_per_mille) >= 950


def test_strict_keeps_the_limit_in_a_partition_and_each_side_serves_its_share() -> None:
    outcome = run(PARTITION, STRICT, 1)
    assert outcome.worst_burst == 0
    assert min(outcome.cut_per_second) >= 31


def test_a_policy_that_does_not_keep_its_promise_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Liar(MaxMerge):
        never_exceeds = True

    monkeypatch.setitem(simulator.POLICIES, "liar", Liar)
    with pytest.raises(simulator.PromiseBroken):
        run(OVERLOAD, "liar", 1)


def _adapted_within(outcome: Outcome, limit_us: int) -> bool:
    return all(time_us is not None and time_us <= limit_us for time_us in outcome.adapted_us)
