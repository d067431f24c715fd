"""The simulator of quotas: it is reproducible, and tells a fair division from another."""

from __future__ import annotations

from benchmarks.quotas.__main__ import table
from benchmarks.quotas.run import CENTRAL, DOORMAN, SIDECAR, WHOLE, Outcome, run
from benchmarks.quotas.scenarios import Scenario

MOVES = Scenario("moves", "two that change places", 2, ({0: 400, 1: 20}, {0: 20, 1: 400}))


def outcome(policy: str, seed: int = 1) -> Outcome:
    return run(MOVES, policy, seed)


def test_the_same_seed_gives_the_same_outcome_and_another_one_another() -> None:
    first = outcome(SIDECAR)
    assert first == outcome(SIDECAR)
    assert first != outcome(SIDECAR, 2)


def test_the_sidecar_is_fair_within_two_reports_and_never_over_the_limit() -> None:
    for seed in (1, 2):
        (settled_s,), (used,) = outcome(SIDECAR, seed).settled_s, outcome(SIDECAR, seed).used
        assert settled_s is not None
        assert settled_s <= 10
        assert used > 0.95
        assert not outcome(SIDECAR, seed).over


def test_the_whole_limit_for_each_is_over_it_and_one_bucket_is_exact_and_not_fair() -> None:
    assert outcome(WHOLE).over > 1_000
    central = outcome(CENTRAL)
    assert not central.over
    assert central.missed > 100


def test_a_table_has_a_row_for_each_policy() -> None:
    text = table(MOVES, [[outcome(policy)] for policy in (SIDECAR, DOORMAN)])
    assert text.count("\n| ") == 3
