"""Strict replicas as a state machine: Hypothesis looks for the shortest history that breaks the limit."""

from __future__ import annotations

from crdt.strict_cluster import StrictCluster
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from ratelimit_sidecar.crdt.limit import Limit
from ratelimit_sidecar.crdt.shares import LOAN_GUARD_US, LOAN_US, PARTS

SECOND_US = 1_000_000
NODES = "abc"

nodes = st.sampled_from(NODES)
pairs = st.sampled_from(["ab", "bc", "ac"])


class StrictMachine(RuleBasedStateMachine):
    """P5: the oracle is one bucket fed every admission of every replica at its true time."""

    @initialize(
        limit=st.sampled_from(
            [
                Limit(100, SECOND_US, 100),
                Limit(5, SECOND_US, 20),
                Limit(40, SECOND_US, 4),
                Limit(3, SECOND_US, 3),
                Limit(2, SECOND_US, 2),
            ]
        ),
        seed=st.integers(0, 2**32),
        delay_us=st.sampled_from([500, 80_000, 700_000]),
        loss=st.sampled_from([0.0, 0.2]),
        weights=st.fixed_dictionaries({node: st.integers(1, 5) for node in NODES}),
    )
    def start_cluster(self, limit: Limit, seed: int, delay_us: int, loss: float, weights: dict[str, int]) -> None:
        self.cluster = StrictCluster(limit, tuple(NODES), seed, delay_us, loss, max_skew_us=500_000, weights=weights)
        self.cluster.run(LOAN_US + LOAN_GUARD_US)

    @rule(node=nodes, hits=st.integers(0, 30))
    def take(self, node: str, hits: int) -> None:
        self.cluster.take(node, hits)

    @rule(node=nodes, per_second=st.sampled_from([20, 300]))
    def ask_for_a_while(self, node: str, per_second: int) -> None:
        self.cluster.demand(node, per_second, SECOND_US // 2)

    @rule(duration_us=st.integers(0, SECOND_US) | st.just(3 * SECOND_US))
    def pass_time(self, duration_us: int) -> None:
        self.cluster.run(duration_us)

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
    def restart(self, node: str) -> None:
        if node not in self.cluster.replicas:
            self.cluster.start(node)

    @rule(node=nodes, part=st.sampled_from([2, 3]))
    def lower_the_capacity(self, node: str, part: int) -> None:
        """Replicas change their rules at different moments; the oracle allows the higher one."""
        replica = self.cluster.replicas.get(node)
        if replica is not None:
            whole = self.cluster.limit
            lower = Limit(whole.tokens, whole.period_us, whole.capacity // part)
            replica.bucket.set_limit(lower, self.cluster.clock_us(node, replica.skew_us))

    @invariant()
    def nothing_is_admitted_beyond_the_limit(self) -> None:
        if hasattr(self, "cluster"):
            assert self.cluster.worst <= 0

    @invariant()
    def shares_and_levels_never_add_up_to_more_than_the_limit(self) -> None:
        if hasattr(self, "cluster"):
            assert self.cluster.most_share <= PARTS
            assert self.cluster.most_level <= self.cluster.limit.ceiling * PARTS


TestStrictMachine = StrictMachine.TestCase
TestStrictMachine.settings = settings(max_examples=max(500, settings().max_examples), stateful_step_count=20)
