"""Whole sidecars through whatever a seed brings: every promise holds all along, and all agree in the end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from seeds import seeds

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.strict import StrictBucket
from ratelimit_sidecar.crdt.token_bucket import TokenBucket
from ratelimit_sidecar.replication.outbox import Outbox
from ratelimit_sidecar.replication.replicator import Replicator
from ratelimit_sidecar.replication.snapshots import Snapshots
from simulation.oracles import BrokenPromise
from simulation.run import Outcome, failure_of, replay, run_seed

BATCH = 20


def assert_promises_are_kept(seeds: range, nodes: int = 3, seconds: float = 10) -> list[Outcome]:
    outcomes, failures = [], []
    for seed in seeds:
        try:
            outcomes.append(run_seed(seed, nodes, seconds))
        except Exception as error:
            failures.append(f"seed {seed}: {failure_of(error)}\n  {replay(seed, nodes, seconds)}")
    assert not failures, "\n".join(failures)
    return outcomes


def run_all(seeds: range) -> None:
    for seed in seeds:
        run_seed(seed)


@pytest.mark.thorough
@pytest.mark.parametrize("first", seeds(40, thorough=320, nightly=10_000)[BATCH::BATCH])
def test_three_nodes_keep_every_promise(first: int) -> None:
    assert_promises_are_kept(range(first, first + BATCH))


@pytest.mark.parametrize("nodes", [2, 4, 5])
def test_so_do_more_and_fewer_nodes(nodes: int) -> None:
    assert_promises_are_kept(seeds(3, thorough=6, nightly=1_000), nodes)


def test_so_do_nodes_that_run_for_long() -> None:
    """Past the horizon, so that what goes wrong meets sealed buckets."""
    assert_promises_are_kept(seeds(2, thorough=4, nightly=1_000), seconds=40)


def test_those_runs_are_about_something() -> None:
    """Lest the promises be kept by doing nothing."""
    outcomes = assert_promises_are_kept(range(BATCH))
    assert sum(outcome.decisions for outcome in outcomes) > BATCH * 100
    assert 0.3 < sum(outcome.admitted for outcome in outcomes) / sum(outcome.decisions for outcome in outcomes) < 0.95
    assert sum(outcome.payments for outcome in outcomes) > 20
    assert sum(outcome.served for outcome in outcomes) > 20
    assert sum(outcome.drains for outcome in outcomes) > 1
    assert sum(outcome.frames for outcome in outcomes) > BATCH * 200
    assert sum(outcome.overshoots for outcome in outcomes) > 5


@pytest.mark.interpreted
def test_one_seed_is_one_run_to_the_byte_in_every_process() -> None:
    """Of the sources: the simulator cannot replace the constants of what is compiled (`simulation.sizes`)."""
    program = "from simulation.run import run_seed\nfor seed in range(2): print(run_seed(seed))"
    transcripts = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": salt},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for salt in ("1", "2")
    }
    assert len(transcripts) == 1
    assert transcripts.pop().count("digest=") == 2


def test_a_failing_seed_is_replayed_by_the_command_shown_with_it() -> None:
    command = replay(3, nodes=4, seconds=2)
    assert command.startswith("python -m ")
    shown = subprocess.run(
        [sys.executable, *command.split()[1:]],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert str(run_seed(3, nodes=4, seconds=2)) in shown
    assert "a -> b  hello {" in shown
    assert "everything is healed" in shown


# What is looked for is found: each of these breaks the product in one way.


def never_hears(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deltas are acknowledged and forgotten."""
    monkeypatch.setattr(TokenBucket, "merge", lambda _self, _entries, _now_us: 0)


def forgets_what_was_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new stream begins without the state before it."""
    opened = Outbox.open

    def open_without_state(self: Outbox, peer: Origin, *, compares: bool) -> None:
        opened(self, peer, compares=compares)
        assert self._sources is not None
        self._sources.snapshots = Snapshots(self._store, self.log, peer, awaits_request=False)

    monkeypatch.setattr(Outbox, "open", open_without_state)


def shows_no_lag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Outbox, "lag_us", lambda _self, _now_us: 0)


def pays_what_it_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    def pay(bucket: StrictBucket, _peer: str, amount: int) -> int:
        return max(0, min(amount, bucket.level // bucket.limit.period_us))

    monkeypatch.setattr(StrictBucket, "pay", pay)


def admits_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    take = TokenBucket.take

    def take_anyway(self: TokenBucket, hits: int, now_us: int, *, always: bool = False) -> bool:
        take(self, hits, now_us, always=True)
        return True

    monkeypatch.setattr(TokenBucket, "take", take_anyway)


def leaves_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Replicator, "is_all_acknowledged", lambda _self: True)


def keeps_every_change(monkeypatch: pytest.MonkeyPatch) -> None:
    flush = Replicator.flush_steps

    def flush_and_keep(self: Replicator, now_us: int) -> Iterator[None]:
        self.kept = [*getattr(self, "kept", ()), *([now_us] * 400)]  # type: ignore[attr-defined]
        return flush(self, now_us)

    monkeypatch.setattr(Replicator, "flush_steps", flush_and_keep)


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("fault", "what"),
    [
        (never_hears, "convergence|lag|clean stop"),
        (forgets_what_was_cut_off, "convergence|lag"),
        (shows_no_lag, "lag"),
        (admits_everything, "eventual|local"),
        # These two take as long as all others together.
        pytest.param(pays_what_it_keeps, "strict", marks=pytest.mark.slow),
        pytest.param(leaves_without_a_word, "clean stop", marks=pytest.mark.slow),
        (keeps_every_change, "memory"),
    ],
)
def test_a_broken_product_is_found_within_a_few_seeds(
    fault: object, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)  # type: ignore[operator]
    with pytest.raises(BrokenPromise, match=f"^({what}):"):
        run_all(range(40))
