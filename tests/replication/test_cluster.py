"""Whole clusters on virtual time: what holds whatever the network does (P1), and what it costs."""

from __future__ import annotations

from random import Random

import pytest
from replication.builders import PER_USER, RULES, SECOND_US, key_of, rules_with, take
from seeds import seeds

from ratelimit_sidecar.crdt.bucket import Bucket
from ratelimit_sidecar.crdt.limit import TokenBucketLimit
from ratelimit_sidecar.limiter.rules import Rules
from ratelimit_sidecar.replication.outbox import MAX_UNACKNOWLEDGED
from ratelimit_sidecar.replication.periodic import URGENT_FLUSH_SECONDS
from simulation.clock import clocks_off
from simulation.cluster import Cluster
from simulation.loop import MS
from simulation.network import between
from simulation.node import FLUSH_US, Node
from simulation.steps import done

USERS = [f"user {index}" for index in range(8)]


def state_of(bucket: Bucket) -> dict[object, dict[int, int]]:
    """What of it replicates, within the horizon."""
    return {origin: dict(sorted(slots.items())) for origin, slots in sorted(bucket.taken.items())}


def load(cluster: Cluster, for_us: int, *, every_us: int = 60 * MS, key: str = "user") -> None:
    """Have every node take small amounts from random buckets at random moments, and give back some now and then."""

    def take_some(each: Node, until_us: int) -> None:
        if cluster.now_us > until_us or not each.is_up:
            return
        bucket = each.bucket(cluster.random.choice(USERS), key)
        bucket.take(cluster.random.randint(1, 4), each.now_us)
        if cluster.random.random() < 0.05:
            bucket.refund(cluster.random.choice((None, 3)), each.now_us)
        cluster.loop.after(cluster.random.randint(1, 2 * every_us), lambda: take_some(each, until_us))

    for each in cluster:
        take_some(each, cluster.now_us + for_us)


def disturb(cluster: Cluster, for_us: int, faults: int) -> None:
    """Cut, heal and reset random links at random moments; at the end none is cut."""
    draw: Random = cluster.random
    names = list(cluster.nodes)
    for _ in range(faults):
        one, other = draw.sample(names, 2)
        begin_us = draw.randint(0, for_us)
        if draw.random() < 0.5:
            cluster.loop.after(begin_us, lambda one=one, other=other: cluster.network.reset(one, other))
        else:
            end_us = draw.randint(begin_us, for_us)
            cluster.loop.after(begin_us, lambda one=one, other=other: cluster.cut(one, other))
            cluster.loop.after(end_us, lambda one=one, other=other: cluster.heal(one, other))
    cluster.loop.after(for_us, cluster.heal_all)


def copies(cluster: Cluster) -> list[list[Bucket]]:
    """Every bucket, as each node holds it."""
    keys = {bucket.key for each in cluster for bucket in each.store}
    assert keys
    found = [[each.store.get(key) for each in cluster] for key in sorted(keys)]
    assert all(bucket is not None for buckets in found for bucket in buckets)
    return found  # type: ignore[return-value]


def assert_folds_are_equal(cluster: Cluster) -> None:
    for buckets in copies(cluster):
        assert len({bucket.fold(cluster.now_us + SECOND_US) for bucket in buckets}) == 1


def assert_converged(cluster: Cluster) -> None:
    """Every node holds the same state, and its fold is the same to the bit."""
    assert_folds_are_equal(cluster)
    for buckets in copies(cluster):
        first, *others = map(state_of, buckets)
        assert all(other == first for other in others)


@pytest.mark.parametrize("seed", seeds(10, thorough=50, nightly=500))
def test_nodes_converge_to_the_bit_after_cuts_and_resets(seed: int) -> None:
    cluster = Cluster(
        seed,
        "abc",
        RULES,
        ways=between("abc", 5 * MS, 75 * MS),
        system_ahead_us=clocks_off(Random(seed), "abc", 200 * MS * (seed % 2)),
    )
    load(cluster, 3 * SECOND_US)
    disturb(cluster, 3 * SECOND_US, faults=6)
    cluster.run(3 * SECOND_US + FLUSH_US)
    cluster.run_until_settled()
    assert_converged(cluster)


def test_nodes_that_seal_at_different_moments_agree_on_what_they_sealed() -> None:
    # Overloaded, so that what is sealed leaves a deficit behind.
    limit = TokenBucketLimit(30, SECOND_US, 400)
    cluster = Cluster(2, "abc", rules_with(team=limit))
    load(cluster, limit.horizon_us + 8 * SECOND_US, every_us=10 * MS, key="team")
    cluster.run(limit.horizon_us + 8 * SECOND_US)
    cluster.run_until_settled()
    for index, each in enumerate(cluster):
        for bucket in each.store:
            bucket.seal(each.now_us - index * SECOND_US)
    assert any(bucket.base.deficit for bucket in cluster["a"].store)
    assert len({bucket.base.boundary_us for each in cluster for bucket in each.store}) > 1
    assert_folds_are_equal(cluster)


def test_what_is_given_back_in_one_region_is_there_in_all_within_a_flush_and_the_way() -> None:
    cluster = Cluster(3, "abc", RULES, ways=between("abc", 40 * MS))
    cluster.run_until_settled()
    for name in "abc":
        take(cluster[name].store, "ann", 300, cluster.now_us)
    cluster.run(SECOND_US)
    buckets = {name: cluster[name].bucket("ann") for name in "abc"}
    assert all(not bucket.would_admit(bucket.limit.capacity, cluster.now_us) for bucket in buckets.values())
    assert buckets["a"].refund(None, cluster.now_us) > 0
    cluster.run(FLUSH_US + 41 * MS)
    for bucket in buckets.values():
        assert bucket.would_admit(bucket.limit.capacity, cluster.now_us)
    cluster.run_until_settled()
    assert_converged(cluster)


def test_what_was_given_back_while_a_region_was_cut_off_is_told_when_it_is_back() -> None:
    cluster = Cluster(3, "abc", RULES)
    cluster.run_until_settled()
    take(cluster["b"].store, "ann", 300, cluster.now_us)
    cluster.run(SECOND_US)
    cluster.cut("a", "b")
    cluster.cut("a", "c")
    cluster.run(SECOND_US)
    cluster["a"].bucket("ann").refund(None, cluster.now_us)
    cluster.run(SECOND_US)
    assert cluster["b"].bucket("ann").fold(cluster.now_us) > 0
    cluster.heal_all()
    cluster.run_until_settled()
    assert_folds_are_equal(cluster)


def test_lag_is_the_way_there_and_back_and_at_most_a_flush() -> None:
    cluster = Cluster(5, "ab", RULES, ways=between("ab", 40 * MS))
    cluster.run_until_settled()
    take(cluster["a"].store, "ann", 1, cluster.now_us)
    cluster.run(SECOND_US)
    assert 80 * MS < cluster["a"].replicator.peers["b"].outbox.lag_us(cluster.now_us) <= 80 * MS + 2 * FLUSH_US


def test_lag_grows_while_a_peer_is_cut_off_and_returns_when_it_is_back() -> None:
    cluster = Cluster(6, "ab", RULES, ways=between("ab", 40 * MS))
    cluster.run_until_settled()
    outbox = cluster["a"].replicator.peers["b"].outbox
    cluster.cut("a", "b")
    take(cluster["a"].store, "ann", 1, cluster.now_us)
    for seconds in (1, 8, 30):
        cluster.run(seconds * SECOND_US)
    assert 39 * SECOND_US <= outbox.lag_us(cluster.now_us) <= 39 * SECOND_US + 2 * FLUSH_US
    cluster.heal("a", "b")
    cluster.run_until_settled()
    assert outbox.lag_us(cluster.now_us) < 200 * MS


def test_clock_offsets_are_measured_on_every_link() -> None:
    cluster = Cluster(
        7,
        "abc",
        RULES,
        ways=between("abc", 20 * MS, 10 * MS),
        system_ahead_us=clocks_off(Random(7), "abc", 400 * MS),
    )
    cluster.run(3 * SECOND_US)
    for one in cluster:
        for other in cluster:
            if one is not other:
                measured_us = one.replicator.peers[other.name].reported.clock_offset_us
                assert measured_us is not None
                # Wrong by at most half of what the ways there and back differ by.
                assert abs(measured_us - (other.clock.ahead_us - one.clock.ahead_us)) <= 5 * MS


def test_what_a_slow_peer_has_yet_to_hear_is_bounded_by_the_live_buckets() -> None:
    cluster = Cluster(8, "ab", RULES, ways=between("ab", 900 * MS))
    cluster.run_until_settled()
    sent_before = cluster["a"].replicator.peers["b"].counts.batches_sent
    load(cluster, 4 * SECOND_US, every_us=2 * MS)
    for _ in range(200):
        cluster.run(FLUSH_US)
        assert cluster["a"].replicator.peers["b"].outbox.pending_buckets <= len(USERS)
    # Four on their way at a time, each for a way there and back of 1.8 s.
    assert cluster["a"].replicator.peers["b"].counts.batches_sent - sent_before <= MAX_UNACKNOWLEDGED * 3
    cluster.run_until_settled()
    assert_converged(cluster)


def test_what_one_urgent_flush_after_the_other_tells_reaches_a_peer_far_away_within_the_bound() -> None:
    delay_us = 150 * MS
    cluster = Cluster(8, "ab", RULES, ways=between("ab", delay_us))
    cluster.run_until_settled()
    a, b = cluster["a"], cluster["b"]
    taken_us: dict[bytes, int] = {}
    for number in range(400):
        cluster.run(int(URGENT_FLUSH_SECONDS * SECOND_US))
        # Each is used up at once.
        taken_us[take(a.store, f"user {number}", PER_USER.capacity, a.now_us).key] = cluster.now_us
        done(a.replicator.flush_steps(a.now_us))
        unheard = [at_us for key, at_us in taken_us.items() if b.store.get(key) is None]
        assert cluster.now_us - min(unheard) <= FLUSH_US + delay_us


def test_both_ends_use_one_of_two_streams_and_the_other_takes_over_when_it_is_lost() -> None:
    cluster = Cluster(9, "ab", RULES)
    cluster.run(2 * SECOND_US)
    peer = cluster["a"].replicator.peers["b"]
    assert len(peer.streams) == 2
    first, second = peer.streams
    before = peer.counts.batches_sent
    take(cluster["a"].store, "ann", 1, cluster.now_us)
    cluster.run(SECOND_US)
    assert peer.counts.batches_sent == before + 1
    next(end for end in cluster["a"].ends if end.stream is first).hang_up()
    take(cluster["a"].store, "bob", 1, cluster.now_us)
    cluster.run(200 * MS)
    assert peer.streams[0] is second
    assert peer.connections == 1
    assert_converged(cluster)


def test_nodes_that_change_a_limit_and_change_it_back_at_other_moments_owe_the_same_to_the_bit() -> None:
    day, second = (
        rules_with(user=limit)
        for limit in (TokenBucketLimit(1_000, 86_400 * SECOND_US, 1_000), TokenBucketLimit(10, SECOND_US, 10))
    )
    cluster = Cluster(5, "abc", day, ways=between("abc", 20 * MS))
    cluster.run_until_settled()

    def change(each: Node, rules: Rules) -> None:
        each.limiter.use_rules(rules)
        each.replicator.use_rules(rules.digest)

    def take_some(each: Node, hits: int) -> Bucket:
        limit = each.store.limit_of_key(key_of("ann"))
        assert limit is not None
        bucket = each.store.bucket(key_of("ann"), limit, each.now_us)
        bucket.take(hits, each.now_us)
        return bucket

    take_some(cluster["a"], 1_000)
    for rules in (second, day):
        for number, each in enumerate(cluster):
            cluster.loop.after(number * SECOND_US, lambda each=each, rules=rules: change(each, rules))
        for each in cluster:
            cluster.run(3 * SECOND_US)
            take_some(each, 1)
        cluster.run(20 * SECOND_US)
    assert_folds_are_equal(cluster)
    assert all(take_some(each, 0).remaining < 10 for each in cluster)
