"""Strict replicas as a state machine: Hypothesis looks for the shortest history that breaks the limit."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import pytest
from crdt.strict_cluster import BROKEN, StrictCluster, pairs_of
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from ratelimit_sidecar.crdt.limit import TokenBucketLimit
from ratelimit_sidecar.crdt.shares import Membership
from ratelimit_sidecar.crdt.waiting import Outcome

SECOND_US = 1_000_000
NODES = "abc"

nodes = st.sampled_from(NODES)
pairs = st.sampled_from(pairs_of(NODES))
directions = st.sampled_from([pair for each in pairs_of(NODES) for pair in (each, each[::-1])])
weights = st.fixed_dictionaries({node: st.integers(1, 5) for node in NODES})


class StrictMachine(RuleBasedStateMachine):
    """P5: the oracle is one bucket fed every admission of every replica at its true time."""

    broken: ClassVar[dict[str, Any]] = {}

    @initialize(
        limit=st.sampled_from(
            [
                TokenBucketLimit(100, SECOND_US, 100),
                TokenBucketLimit(5, SECOND_US, 20),
                TokenBucketLimit(40, SECOND_US, 4),
                TokenBucketLimit(3, SECOND_US, 3),
                TokenBucketLimit(2, 60 * SECOND_US, 2),
            ]
        ),
        seed=st.integers(0, 2**32),
        delay_us=st.sampled_from([500, 80_000, 700_000, 2_500_000]),
        drift_ppm=st.sampled_from([0, 5_000]),
        weights=weights,
    )
    def start_cluster(
        self, limit: TokenBucketLimit, seed: int, delay_us: int, drift_ppm: int, weights: dict[str, int]
    ) -> None:
        self.cluster = StrictCluster(
            limit,
            tuple(NODES),
            seed,
            delay_us,
            max_skew_us=500_000,
            drift_ppm=drift_ppm,
            weights=weights,
            is_fixed_delay=False,
            **self.broken,
        )
        self.memberships = [self.cluster.membership]

    @rule(node=nodes, hits=st.integers(0, 30))
    def take(self, node: str, hits: int) -> None:
        self.cluster.take(node, hits)

    @rule(node=nodes, hits=st.sampled_from([1, 50, 2**48]))
    def charge_whatever_is_left(self, node: str, hits: int) -> None:
        self.cluster.charge(node, hits)

    @rule(node=nodes)
    def take_all(self, node: str) -> None:
        self.cluster.take_all(node)

    @rule()
    def take_all_everywhere(self) -> None:
        for node in NODES:
            self.cluster.take_all(node)

    @rule(node=nodes, per_second=st.sampled_from([20, 300]))
    def ask_for_a_while(self, node: str, per_second: int) -> None:
        self.cluster.demand(node, per_second, SECOND_US // 2)

    @rule(way=directions, part=st.sampled_from([0.1, 0.5, 1.0]))
    def ask_whatever_the_policy(self, way: str, part: float) -> None:
        self.cluster.ask(way[0], way[1], part)

    @rule(node=nodes, hits=st.integers(1, 3), requests=st.sampled_from([1, 10, 100]))
    def let_requests_wait(self, node: str, hits: int, requests: int) -> None:
        for _ in range(requests):
            self.cluster.wait(node, hits)

    @rule(way=directions, tokens=st.sampled_from([1, 5, 100]))
    def wish_whatever_the_policy(self, way: str, tokens: int) -> None:
        self.cluster.wish(way[0], way[1], tokens)

    @rule(node=nodes, outcome=st.sampled_from([Outcome.EXPIRED, Outcome.CANCELLED]))
    def end_a_wait(self, node: str, outcome: Outcome) -> None:
        self.cluster.end_wait(node, outcome)

    @rule(way=directions, fault=st.sampled_from(["none", "restart", "close"]))
    def use_a_ticket_while_something_happens_to_the_payer(self, way: str, fault: str) -> None:
        cluster = self.cluster
        faults = {"none": None, "restart": cluster.restart, "close": partial(cluster.close, peer=way[0])}
        cluster.use_ticket(way[0], way[1], faults[fault])

    @rule(way=directions, at=st.sampled_from([0, 1]), weights=weights, back=st.integers(0, 4))
    def use_a_ticket_while_the_membership_changes(self, way: str, at: int, weights: dict[str, int], back: int) -> None:
        """The node that has wished for it, or the one that pays, starts anew once it is under way."""
        self.cluster.use_ticket(way[0], way[1], lambda _payer: self.roll_out(way[at], weights, back))

    @rule(duration_us=st.sampled_from([0, 1_000, 20_000, 150_000, SECOND_US, 3 * SECOND_US]))
    def pass_time(self, duration_us: int) -> None:
        self.cluster.run(duration_us)

    @rule(pair=pairs)
    def connect_once_more(self, pair: str) -> None:
        self.cluster.connect(pair[0], pair[1])

    @rule(way=directions)
    def close_a_stream(self, way: str) -> None:
        self.cluster.close(way[0], way[1])

    @rule(way=directions)
    def ask_and_close_while_the_answer_may_be_under_way(self, way: str) -> None:
        self.cluster.ask(way[0], way[1], 1.0)
        self.cluster.run(self.cluster.delay_us)
        self.cluster.close(way[0], way[1])

    @rule(pair=pairs)
    def cut(self, pair: str) -> None:
        self.cluster.cut.add(frozenset(pair))

    @rule()
    def heal(self) -> None:
        self.cluster.cut.clear()

    @rule(node=nodes)
    def crash(self, node: str) -> None:
        if node in self.cluster.replicas:
            self.cluster.crash(node)

    @rule(node=nodes)
    def stop(self, node: str) -> None:
        if node in self.cluster.replicas:
            self.cluster.stop(node)

    @rule(node=nodes)
    def restart(self, node: str) -> None:
        if node not in self.cluster.replicas:
            self.cluster.start(node)

    @rule(node=nodes, part=st.sampled_from([1, 2, 3]), faster=st.booleans())
    def change_the_limit(self, node: str, part: int, faster: bool) -> None:
        """Replicas change their rules at different moments; the oracle allows the greatest."""
        whole = self.cluster.limit
        tokens = whole.tokens if faster else max(1, whole.tokens // 2)
        self.cluster.set_limit(node, TokenBucketLimit(tokens, whole.period_us, whole.capacity // part))

    @rule(node=nodes, weights=weights, back=st.integers(0, 4))
    def roll_out_a_membership(self, node: str, weights: dict[str, int], back: int) -> None:
        self.roll_out(node, weights, back)

    def roll_out(self, node: str, weights: dict[str, int], back: int) -> None:
        """A change may begin while others have not reached all, and a node may go back by some."""
        if not back:
            newest = self.memberships[-1]
            self.memberships.append(Membership(newest.epoch + 1, weights, newest.weights))
        self.cluster.set_membership(self.memberships[-max(1, min(back, len(self.memberships)))], node)

    @invariant()
    def nothing_is_admitted_beyond_the_limit(self) -> None:
        if hasattr(self, "cluster"):
            self.cluster.check()


TestStrictMachine = StrictMachine.TestCase
TestStrictMachine.settings = settings(max_examples=6 * settings().max_examples, stateful_step_count=20)


@pytest.mark.long
@pytest.mark.interpreted
@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_without_any_one_rule_a_history_is_found_in_which_more_is_admitted(broken: dict[str, Any]) -> None:
    machine = type("BrokenMachine", (StrictMachine,), {"broken": broken})
    with pytest.raises(AssertionError):
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=10_000, stateful_step_count=40, phases=[Phase.generate], database=None, derandomize=True
            ),
        )
