"""Strict limits over whole clusters on virtual time: together the nodes never exceed them (P5), whatever happens.

Every admission, level and share is looked at while a cluster runs (`simulation.watched`).
"""

from __future__ import annotations

from functools import partial
from random import Random

import pytest
from replication.builders import SECOND_US, SIT_OUT_US
from seeds import seeds

from ratelimit_sidecar.crdt.limit import TokenBucketLimit
from ratelimit_sidecar.crdt.shares import Membership
from ratelimit_sidecar.crdt.waiting import Outcome
from simulation.clock import clocks_off
from simulation.loop import MS
from simulation.network import between
from simulation.node import Node
from simulation.watched import Watched
from simulation.workload import WAIT_US, request, unchanging

SEEDS = seeds(10, thorough=60, nightly=2_000)

PER_SECOND_100 = TokenBucketLimit(100, SECOND_US, 100)


class Strict(Watched):
    """A watched cluster with one strict bucket.

    Args:
        limit: of one bucket, for which all nodes are asked.
    """

    def __init__(self, seed: int, names: str, limit: TokenBucketLimit, **options: object) -> None:
        self.limit = limit
        editions = unchanging(plan=limit)
        self.gold = request(editions.first, 1, ("plan", "gold"))
        super().__init__(seed, names, editions, **options)
        self.loop.every(10 * MS, self.look_at_shares)

    def burst(self, name: str, requests: int) -> None:
        """So many at once."""
        for _ in range(requests):
            self.take(name, self.gold)

    def ask(self, name: str, per_second: int, for_us: int) -> None:
        self.demand(name, self.gold, per_second, for_us)

    def admitted_within(self, name: str, for_us: int) -> int:
        before = self.admitted[name]
        self.run(for_us)
        return self.admitted[name] - before

    def restart(self, name: str, after_us: int) -> None:
        """Crash a node, if it runs, and start it again."""
        if self[name].is_up:
            self.crash(name)
            self.loop.after(after_us, self.start, name)


def settled(seed: int, names: str) -> Strict:
    """A cluster whose nodes have their home shares, full, and are connected."""
    cluster = Strict(seed, names, PER_SECOND_100, ways=between(names, 40 * MS))
    cluster.run(SIT_OUT_US + 2 * SECOND_US)
    return cluster


def run_faults(seed: int) -> Strict:
    """A random schedule of demand, cuts, resets, crashes and restarts, on nodes with skewed clocks.

    A failing seed is replayed by `run_faults(seed)`.
    """
    draw = Random(seed)
    limit = draw.choice([PER_SECOND_100, TokenBucketLimit(10, SECOND_US, 50), TokenBucketLimit(30, 60 * SECOND_US, 30)])
    names = "abcd"[: draw.randint(2, 4)]
    ways = between(names, *draw.choice([(MS, MS), (5 * MS, 75 * MS), (300 * MS, 400 * MS)]))
    cluster = Strict(seed, names, limit, ways=ways, system_ahead_us=clocks_off(draw, names, 500 * MS))
    cluster.run(draw.randint(SECOND_US, 2 * SIT_OUT_US))
    for _ in range(6):
        busy = draw.sample(names, draw.randint(1, 2))
        for name in names:
            if draw.random() < 0.4:
                cluster.loop.after(draw.randrange(2 * SECOND_US), cluster.burst, name, draw.choice([3, 30, 300]))
            if name in busy or draw.random() < 0.2:
                cluster.ask(name, draw.choice([5, 40, 150, 150]), draw.randint(1, 3) * SECOND_US)
        for _ in range(draw.randint(0, 3)):
            one, other = draw.sample(names, 2)
            action = draw.choice(
                [
                    *[partial(cluster.cut, one, other)] * 2,
                    partial(cluster.heal, one, other),
                    partial(cluster.network.reset, one, other),
                    partial(hang_up, cluster[one]),
                    partial(cluster.restart, one, draw.randrange(3 * SECOND_US)),
                ]
            )
            cluster.loop.after(draw.randrange(2 * SECOND_US), action)
        cluster.run(draw.randint(SECOND_US, 3 * SECOND_US))
    cluster.heal_all()
    cluster.run(SECOND_US)
    return cluster


def hang_up(node: Node) -> None:
    """Close its oldest connection, on which all that is on its way still arrives."""
    for end in node.ends[:1]:
        end.hang_up()


@pytest.mark.parametrize("seed", SEEDS[4:])
def test_whatever_happens_nothing_is_admitted_beyond_the_limit(seed: int) -> None:
    run_faults(seed)


def test_those_schedules_are_about_payments() -> None:
    """Lest the promise be kept by never paying."""
    clusters = [run_faults(seed) for seed in SEEDS[:4]]
    assert sum(cluster.payments for cluster in clusters) > 25
    assert sum(cluster.served for cluster in clusters) > 25
    assert sum(cluster.admitted.total() for cluster in clusters) > 500


def test_a_node_cut_off_serves_its_home_and_is_paid_again_when_it_is_back() -> None:
    cluster = settled(2, "abc")
    cluster.ask("a", 1_000, 30 * SECOND_US)
    cluster.cut("a", "b", "c")
    cluster.run(7 * SECOND_US)
    assert cluster.admitted_within("a", 6 * SECOND_US) == pytest.approx(200, abs=6)
    cluster.heal("a", "b", "c")
    cluster.run(5 * SECOND_US)
    assert cluster.admitted_within("a", 6 * SECOND_US) >= 0.95 * 600


def test_a_restarted_node_has_what_refills_as_soon_as_it_is_connected() -> None:
    cluster = settled(3, "abc")
    cluster.crash("b")
    cluster.run(10 * SECOND_US)
    cluster.start("b")
    cluster.run(2 * SECOND_US)
    assert cluster["b"].ledger.shares.home_fraction(cluster["b"].now_us) > 0
    cluster.ask("b", 1_000, 5 * SECOND_US)
    assert cluster.admitted_within("b", 5 * SECOND_US) >= 0.95 * 500


def test_a_burst_into_one_node_gets_the_tokens_of_the_others() -> None:
    cluster = settled(5, "abc")
    cluster.burst("a", 100)
    cluster.run(WAIT_US)
    cancelled = cluster["a"].ledger.queues.counts[Outcome.CANCELLED]
    # The home of one node is a token larger than that of the others.
    assert cluster.admitted["a"] >= 99 - cancelled


def test_the_stream_that_takes_over_carries_the_payments_on() -> None:
    cluster = settled(4, "ab")
    cluster.ask("a", 1_000, 10 * SECOND_US)
    cluster.run(2 * SECOND_US)
    in_use, other = cluster["a"].replicator.peers["b"].streams
    next(end for end in cluster["a"].ends if end.stream is in_use).hang_up()
    assert cluster["a"].replicator.peers["b"].streams == [other]
    assert cluster.admitted_within("a", 5 * SECOND_US) >= 0.95 * 500


def test_a_new_membership_is_rolled_out_node_by_node_without_a_moment_above_the_limit() -> None:
    cluster = settled(6, "abc")
    old, new = cluster.membership.weights, {"a": 4, "b": 1, "c": 1}
    cluster.membership = Membership(2, new, old)
    for name in "abc":
        cluster.ask(name, 300, 20 * SECOND_US)
        cluster.restart(name, 0)
        cluster.run(3 * SECOND_US)
        assert (
            cluster[name].ledger.shares.home_fraction(cluster[name].now_us) >= (new if name != "a" else old)[name] / 6
        )
    for each in cluster:
        status = each.payments.status()
        assert (status.epoch, status.settled, status.conflicts) == (2, True, ())
        assert status.home_share == pytest.approx(new[each.name] / 6)
