"""A system clock that jumps ahead by an hour and comes back: what it opens is bounded, and limits are shared again."""

from __future__ import annotations

import pytest

from ratelimit_sidecar.clock import ALONE_US
from ratelimit_sidecar.crdt.limit import AnyLimit, TokenBucketLimit, Window, WindowLimit
from simulation.cluster import stable_order
from simulation.loop import MS, SECOND_US
from simulation.run import run_until_equal
from simulation.watched import Watched
from simulation.workload import Request, RulesEditions, per_second, request, rules_of

HOUR_US = 3_600 * SECOND_US

SHARED_US = 5 * SECOND_US
"""Within so long after a clock has come back all nodes hold the same."""

LIMITS: dict[str, AnyLimit] = {
    "user": per_second(1, 20),
    "team": TokenBucketLimit(1_000, 24 * HOUR_US, 50),
    "fixed": WindowLimit(30, 60 * SECOND_US, Window.FIXED),
    "sliding": WindowLimit(30, 60 * SECOND_US, Window.SLIDING),
}


class Busy:
    """Three nodes, of which `a` is asked for more than there is of every limit."""

    def __init__(self, *, ahead_us: int = 0) -> None:
        rules = rules_of(LIMITS)
        editions = RulesEditions(rules, rules, {}, {})
        self.cluster = Watched(1, "abc", editions, system_ahead_us={"a": ahead_us, "b": 0, "c": 0})
        self.cluster.clocks_agree = False
        self.cluster.heal_all()
        self.requests = {rule: request(editions.second, 1, (rule, "x")) for rule in LIMITS}
        self.admitted = dict.fromkeys(LIMITS, 0)
        self.run(5 * SECOND_US)

    def run(self, for_us: int, at: str = "a") -> None:
        for _ in range(for_us // (100 * MS)):
            for rule, asked in self.requests.items():
                self.admitted[rule] += self.take(at, asked)
            self.cluster.run(100 * MS)

    def take(self, at: str, asked: Request) -> int:
        before = self.cluster.admitted[at]
        self.cluster.take(at, asked)
        return self.cluster.admitted[at] - before

    def left(self, at: str, rule: str) -> int:
        node = self.cluster.nodes[at]
        bucket = node.store.get(self.requests[rule].descriptors[0].bucket_key)
        if bucket is None:
            return LIMITS[rule].capacity
        bucket.advance(node.now_us)
        return bucket.remaining

    def check_shared(self) -> None:
        """Nobody takes anything for a while, then all hold the same; what is taken then is known to all."""
        run_until_equal(self.cluster, SHARED_US)
        for rule in LIMITS:
            assert self.left("b", rule) <= self.left("a", rule) + 1
        for taker in "ab":
            fresh = request(self.cluster.editions.second, 1, ("user", f"of {taker}"))
            self.cluster.take(taker, fresh)
            self.cluster.run(SECOND_US)
            taken = [(self.cluster.nodes[taker].origin, 1)]
            for node in self.cluster.live:
                bucket = node.store.get(fresh.descriptors[0].bucket_key)
                assert bucket is not None, f"{node.name} does not know what {taker} took"
                assert [(entry.origin, entry.tokens) for entry in bucket.entries()] == taken, node.name


def most(rule: str, for_us: int) -> int:
    """What a textbook limit admits in such a time, and the part of a slot that comes back early."""
    limit = LIMITS[rule]
    if isinstance(limit, TokenBucketLimit):
        return limit.capacity + limit.tokens * for_us // limit.period_us + 1
    return limit.requests * (1 + -(-for_us // limit.period_us))


def test_a_jump_that_peers_deny_is_not_followed_and_changes_nothing() -> None:
    with stable_order():
        busy = Busy()
        busy.cluster.set_clock("a", HOUR_US)
        busy.run(ALONE_US + 10 * SECOND_US)
        assert busy.cluster.nodes["a"].clock.clock_steps_us == 0
        assert not busy.cluster.differences()
        busy.cluster.set_clock("a", 0)
        busy.run(5 * SECOND_US)
        for rule in LIMITS:
            assert busy.admitted[rule] <= most(rule, ALONE_US + 20 * SECOND_US), rule
        busy.check_shared()


def test_a_jump_that_nobody_denies_refills_once_and_is_made_good_when_the_clock_comes_back() -> None:
    with stable_order():
        busy = Busy()
        busy.cluster.cut("a", "b", "c")
        busy.run(15 * SECOND_US)
        busy.cluster.set_clock("a", HOUR_US)
        busy.run(3 * ALONE_US)
        assert busy.cluster.nodes["a"].clock.clock_steps_us == HOUR_US
        busy.cluster.heal_all()
        busy.cluster.set_clock("a", 0)
        busy.run(5 * SECOND_US)
        assert busy.cluster.nodes["a"].clock.clock_steps_us == 0
        for rule, limit in LIMITS.items():
            assert busy.admitted[rule] <= most(rule, 3 * ALONE_US + 25 * SECOND_US) + limit.capacity, rule
        before = dict(busy.admitted)
        busy.run(10 * SECOND_US)
        # Coming back refills nothing.
        assert busy.admitted["user"] - before["user"] <= 11
        assert busy.admitted["team"] == before["team"]
        busy.check_shared()


def test_a_node_that_was_started_an_hour_ahead_shares_limits_as_soon_as_its_clock_is_right() -> None:
    with stable_order():
        busy = Busy(ahead_us=HOUR_US)
        busy.run(30 * SECOND_US)
        # Its day's limit is shared all the same: no horizon is shorter than an hour there.
        busy.cluster.set_clock("a", 0)
        left = {rule: busy.left("a", rule) for rule in LIMITS}
        busy.cluster.run(1_100 * MS)
        assert busy.cluster.nodes["a"].clock.clock_steps_us == -HOUR_US
        for rule in LIMITS:
            assert busy.left("a", rule) <= left[rule] + 2, rule
        busy.check_shared()
        assert busy.left("b", "user") < LIMITS["user"].capacity


@pytest.mark.parametrize("ahead_us", [-HOUR_US, HOUR_US])
def test_a_clock_that_is_right_again_is_followed_within_seconds(ahead_us: int) -> None:
    with stable_order():
        busy = Busy(ahead_us=ahead_us)
        busy.cluster.set_clock("a", 0)
        busy.cluster.run(1_100 * MS)
        assert busy.cluster.nodes["a"].clock.ahead_us == 0
        busy.cluster.run(5 * SECOND_US)
        assert busy.cluster.is_settled()
