"""What replicas hold differently is found and moved, and nothing else is; on virtual time."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Generator, Iterable
from itertools import pairwise

import pytest
from freed import frees_itself
from joined import join
from replication.builders import (
    ELSEWHERE,
    NOW_US,
    PER_USER,
    RULES,
    SECOND_US,
    key_of,
    node,
    rules_with,
    store_of,
    take,
)

from ratelimit_sidecar.crdt.bucket import Bucket, Entry, Origin
from ratelimit_sidecar.crdt.limit import TokenBucketLimit, Window, WindowLimit
from ratelimit_sidecar.crdt.slot import REFUND, slot_id
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.limiter.key import hash64
from ratelimit_sidecar.replication.anti_entropy import MAX_EXCHANGED, MAX_PULL_KEYS, TELL_WORK, Exchange
from ratelimit_sidecar.replication.changes import ChangeLog
from ratelimit_sidecar.replication.deltas import MAX_TIME_US
from ratelimit_sidecar.replication.peer import Peer
from ratelimit_sidecar.replication.rounds import (
    ENTRY_WORK,
    EVERY_US,
    FREED_RANGES,
    KEPT_US,
    LOOK_WORK,
    ORIGIN_WORK,
    PARTITION_RANGES,
    PARTITIONS,
    RANGES,
    ROUND_PIECE_WORK,
    SETTLE_US,
    SUM_WORK,
    TICK_WORK,
    TICKS,
    Round,
    Summing,
    Work,
    range_of,
)
from ratelimit_sidecar.replication.stream import Stream
from ratelimit_sidecar.replication.v1 import replication_pb2 as pb
from ratelimit_sidecar.replication.wire import ProtocolError, Reason, read_frame
from simulation.cluster import Cluster
from simulation.node import Node
from simulation.steps import done

HEALS_US = EVERY_US + SETTLE_US + 2 * SECOND_US
"""From when a slot is over until all have found that some missed it: a pass, what settles before it, and the way."""

SLOT_US = 1 << PER_USER.exponent

ALGORITHMS = {
    "token_bucket": PER_USER,
    "fixed_window": WindowLimit(1_000, 60 * SECOND_US, Window.FIXED),
    "sliding_window": WindowLimit(1_000, 60 * SECOND_US, Window.SLIDING),
}


def lose_changes(each: Node) -> None:
    """Nobody will be told what it has taken since the last flush."""
    assert each.store.drain_changes()


def resyncs(cluster: Cluster) -> int:
    return sum(peer.counts.resyncs for each in cluster for peer in each.replicator.peers.values())


def entries_sent(cluster: Cluster) -> int:
    return sum(peer.counts.entries_sent for each in cluster for peer in each.replicator.peers.values())


def taken_at(each: Node, value: str, key: str = "user") -> int:
    bucket = each.store.get(key_of(value, key, each.limiter.rules))
    return 0 if bucket is None else sum(entry.tokens for entry in bucket.entries())


def assert_all_hold(cluster: Cluster, tokens: int, value: str = "ann") -> None:
    assert [taken_at(each, value) for each in cluster] == [tokens] * len(cluster.nodes)


@pytest.mark.parametrize("limit", ALGORITHMS.values(), ids=list(ALGORITHMS))
def test_a_lost_update_is_found_and_nothing_else_is_moved(limit: TokenBucketLimit | WindowLimit) -> None:
    cluster = Cluster(1, "abc", rules_with(user=limit))
    # What lies in a fixed window before is nothing to anybody.
    cluster.run(60 * SECOND_US - cluster.now_us % (60 * SECOND_US))
    for value in ("ann", "bob", "cem"):
        cluster["a"].bucket(value).take(3, cluster["a"].now_us)
    cluster.run(SECOND_US)
    sent = entries_sent(cluster)
    cluster["a"].bucket("bob").take(4, cluster["a"].now_us)
    lose_changes(cluster["a"])
    slot_us = 1 << limit.exponent
    cluster.run(slot_us - cluster.now_us % slot_us + HEALS_US)
    assert_all_hold(cluster, 7, "bob")
    # Both entries of "bob", from a to each of the others and, as they have it from a, back.
    assert entries_sent(cluster) - sent <= 8
    assert 2 <= resyncs(cluster) <= 6


def test_what_was_forgotten_by_all_but_one_comes_back_from_it() -> None:
    cluster = Cluster(2, "ab", RULES)
    cluster.run_until_settled()
    for name, elsewhere in (("a", "x"), ("b", "y")):
        stranger = Entry(Origin(elsewhere, 9), slot_id(cluster.now_us - 3 * SLOT_US, PER_USER.exponent), 5)
        join(cluster[name].store, key_of("ann"), None, [stranger], cluster.now_us)
    cluster.run(HEALS_US)
    assert_all_hold(cluster, 10)


def test_debt_of_long_ago_is_compared_by_what_it_amounts_to() -> None:
    limit = TokenBucketLimit(1, SECOND_US, 50)
    cluster = Cluster(3, "ab", rules_with(user=limit))
    cluster.run_until_settled()
    cluster["a"].bucket("ann").take(200, cluster["a"].now_us, always=True)
    lose_changes(cluster["a"])
    cluster.run(limit.horizon_us + 3 * SECOND_US + HEALS_US)
    levels = {each.bucket("ann").fold(cluster.now_us) for each in cluster}
    assert len(levels) == 1
    assert levels.pop() > 0


def test_a_rule_that_comes_later_learns_what_was_taken_before() -> None:
    cluster = Cluster(4, "ab", RULES)
    cluster.run_until_settled()
    b = cluster["b"]
    b.store.limit_of_key = ELSEWHERE.replicated_limit_of_key
    b.replicator.use_rules(ELSEWHERE.digest)
    cluster["a"].replicator.use_rules(b.limiter.rules.digest)
    take(cluster["a"].store, "ann", 5, cluster["a"].now_us)
    cluster.run(SLOT_US + HEALS_US)
    # As long as they have other rules nothing is compared.
    assert (taken_at(b, "ann"), resyncs(cluster)) == (0, 0)
    b.store.limit_of_key = b.limiter.rules.replicated_limit_of_key
    b.replicator.use_rules(b.limiter.rules.digest)
    cluster.run(HEALS_US)
    assert_all_hold(cluster, 5)


@pytest.mark.parametrize("is_in_snapshot", [False, True])
def test_what_peers_told_while_there_was_no_rule_is_asked_for_when_there_is_one(*, is_in_snapshot: bool) -> None:
    """Its slot is not over for hours: it is not compared, and nobody tells of it again by itself."""
    cluster = Cluster(4, "abc", rules_with(user=TokenBucketLimit(1_000, 30 * 86_400 * SECOND_US, 1_000)))
    a, b = cluster["a"], cluster["b"]
    b.store.limit_of_key = ELSEWHERE.replicated_limit_of_key
    b.replicator.use_rules(ELSEWHERE.digest)
    if not is_in_snapshot:
        cluster.run_until_settled()
    a.bucket("ann").take(5, a.now_us)
    cluster.run(20 * SECOND_US)
    assert taken_at(b, "ann") == 0
    b.store.limit_of_key = b.limiter.rules.replicated_limit_of_key
    b.replicator.use_rules(b.limiter.rules.digest)
    cluster.run(SECOND_US)
    assert_all_hold(cluster, 5)
    sent = entries_sent(cluster)
    b.replicator.use_rules(ELSEWHERE.digest)
    cluster.run(SECOND_US)
    assert entries_sent(cluster) == sent, "nothing was missed since"


def test_other_rules_that_lack_it_too_change_nothing_in_what_is_asked_for() -> None:
    cluster = Cluster(4, "abc", rules_with(user=TokenBucketLimit(1_000, 3_600 * SECOND_US, 1_000)))
    a, b = cluster["a"], cluster["b"]
    b.store.limit_of_key = ELSEWHERE.replicated_limit_of_key
    b.replicator.use_rules(ELSEWHERE.digest)
    cluster.run_until_settled()
    a.bucket("ann").take(5, a.now_us)
    # Until its slot is long over.
    cluster.run(150 * SECOND_US)
    b.replicator.use_rules(ELSEWHERE.digest + 1)
    cluster.run(10 * SECOND_US)
    b.store.limit_of_key = b.limiter.rules.replicated_limit_of_key
    b.replicator.use_rules(b.limiter.rules.digest)
    cluster.run(SECOND_US)
    assert_all_hold(cluster, 5)


@pytest.mark.parametrize(
    ("algorithm", "skew_us"),
    [
        ("token_bucket", 500_000),
        ("sliding_window", 0),
        pytest.param("token_bucket", 0, marks=pytest.mark.thorough),
        pytest.param("sliding_window", 500_000, marks=pytest.mark.thorough),
    ],
)
def test_replicas_under_load_are_not_found_to_differ(algorithm: str, skew_us: int) -> None:
    ahead_us = {"a": -skew_us, "b": 0, "c": skew_us}
    cluster = Cluster(5, "abc", rules_with(user=ALGORITHMS[algorithm]), system_ahead_us=ahead_us)
    cluster.run_until_settled()
    for _ in range(600):
        cluster.run(50_000)
        for each in cluster:
            for key in ("user", "team"):
                each.bucket(cluster.random.choice("xyz"), key).take(1, each.now_us)
    assert resyncs(cluster) == 0
    # Not because there was nothing to compare.
    assert all(peer.counts.bytes_sent > 30 * 1_000 for peer in cluster["a"].replicator.peers.values())


def test_a_pass_of_no_more_use_is_freed_a_few_ranges_at_a_time() -> None:
    store = store_of(node("a"))
    for index in range(500):
        take(store, f"user {index}", 1, NOW_US)
    summing, now_us = Summing(store, NOW_US), NOW_US
    first, now_us = next_round(summing, now_us)
    ranges = list(first.ranges())
    del first
    for _ in range(2):
        _, now_us = next_round(summing, now_us)

    def kept() -> int:
        # One reference is the list's, one that of the loop and one that of the call.
        return sum(sys.getrefcount(each) > 3 for each in ranges)

    left = [kept()]
    while left[-1]:
        summing.do_piece(now_us)
        left.append(kept())
    assert left[0] == len(ranges) > 100
    assert all(before - after <= FREED_RANGES for before, after in pairwise(left))
    assert len(left) < TICKS / 2


def next_round(summing: Summing, now_us: int) -> tuple[Round, int]:
    """The next round that is done, and when it is."""
    while True:
        done = summing.do_piece(now_us)
        if done is not None:
            return done, now_us
        if not summing.is_amid_tick:
            now_us += 20_000


def test_buckets_that_change_meanwhile_are_left_alone() -> None:
    # A fixed window counts up to its end, so it is never settled while it is in use.
    rules = rules_with(user=WindowLimit(1_000_000, 3_600 * SECOND_US, Window.FIXED))
    cluster = Cluster(6, "ab", rules)
    cluster.run_until_settled()
    for _ in range(1_000):
        cluster.run(10_000)
        for each in cluster:
            each.bucket("ann").take(1, each.now_us)
    assert resyncs(cluster) == 0


def peer_that(tell: Callable[[bytes], None], store: Store) -> Peer:
    """Is told of buckets by `tell`."""
    peer = Peer(store, ChangeLog(store, NOW_US), "b")
    peer.outbox.repair = tell  # type: ignore[method-assign]
    return peer


def hear(exchange: Exchange, peer: Peer, frame: pb.Digest | pb.Summary | pb.Pull) -> tuple[int, int]:
    """Hear and answer it.

    Returns:
        The number of buckets told or asked for because of it, and of the pieces that it took.
    """
    before = peer.counts.resyncs
    pieces = len(list(exchange.receive_steps(frame))) + 1
    return peer.counts.resyncs - before, pieces


def keys_of_range(number: int, count: int) -> list[bytes]:
    """So many keys of one range. A checksum is linear: two more bytes take any key there."""
    stems = [index.to_bytes(4, "big") for index in range(count)]
    return [stem + ends()[range_of(stem + bytes(2)) ^ number] for stem in stems]


@functools.cache
def ends() -> dict[int, bytes]:
    """The last two bytes of a key, by how they change its range."""
    found = (number.to_bytes(2, "big") for number in range(1 << 16))
    return {range_of(bytes(4) + end) ^ range_of(bytes(6)): end for end in found}


def store_with(keys: Iterable[bytes], at_us: int, limit: TokenBucketLimit = PER_USER) -> Store:
    """A take from each, settled at `at_us`."""
    store = store_of(node("a"))
    took_us = at_us - SETTLE_US - 2 * (1 << limit.exponent)
    for key in keys:
        assert store.bucket(key, limit, took_us).take(1, took_us)
    return store


def sums_of(store: Store, at_us: int) -> Round:
    done, _ = next_round(Summing(store, at_us - 1), at_us)
    return done


def test_sums_do_not_depend_on_how_far_a_replica_has_sealed_nor_on_what_is_under_way() -> None:
    at_us = NOW_US // EVERY_US * EVERY_US + 100 * EVERY_US
    limit = TokenBucketLimit(100, SECOND_US, 100)
    rules = rules_with(user=limit)
    stores = [store_of(node(name), rules) for name in "ab"]
    events = [(at_us - SETTLE_US - age_us, 7) for age_us in range(200_000, limit.horizon_us * 2, 70_000)]
    entries: dict[int, int] = {}
    for event_us, tokens in events:
        slot = slot_id(event_us, limit.exponent)
        entries[slot] = entries.get(slot, 0) + tokens
    for store in stores:
        for slot, tokens in sorted(entries.items()):
            heard = Entry(Origin("c", 1), slot, tokens)
            join(store, key_of("ann"), None, [heard], slot + 300_000)
    early, late = (store.get(key_of("ann")) for store in stores)
    assert early is not None
    assert late is not None
    # b knows more of what is not yet settled.
    under_way = Entry(Origin("c", 1), slot_id(at_us - SETTLE_US, limit.exponent), 50)
    join(stores[1], key_of("ann"), None, [under_way], at_us)
    late.seal(at_us + KEPT_US)
    assert early.base != late.base
    sums = [sums_of(store, at_us).sums for store in stores]
    assert sums[0] == sums[1]
    assert any(sums[0])


def test_an_idle_bucket_counts_like_an_absent_one() -> None:
    store = store_of(node("a"))
    bucket = take(store, "ann", 3, NOW_US)
    at_us = NOW_US // EVERY_US * EVERY_US + 2 * EVERY_US
    number = range_of(bucket.key)
    assert sums_of(store, at_us).sums[number] != 0
    assert not any(sums_of(store, at_us + PER_USER.horizon_us).sums)


def summing_of(buckets: int, at_us: int, tick_work: int = TICK_WORK) -> Summing:
    """Of a node with so many, all settled at `at_us`, the instant of the next pass."""
    store = store_with([key_of(f"user {index}") for index in range(buckets)], at_us)
    return Summing(store, at_us - 1, tick_work=tick_work)


def passes_of(summing: Summing, at_us: int, instants: int, every: int = 1) -> dict[int, tuple[frozenset[int], int]]:
    """The passes that were done from `at_us` on.

    Args:
        every: it is asleep at the instants between each such one.

    Returns:
        By the number of the instant, counted from `at_us`: its partitions, and the steps that it took.
    """
    done = {}
    for number in range(0, instants, every):
        began_us = at_us + number * EVERY_US
        for step, now_us in enumerate(range(began_us, began_us + EVERY_US, 20_000), 1):
            found = summing.do_piece(now_us)
            while summing.is_amid_tick:
                found = summing.do_piece(now_us)
            if found is not None:
                done[number] = found.partitions, step
    return done


FIRST_US = NOW_US // EVERY_US * EVERY_US + EVERY_US


def rest_of(finding: Generator[None, None, int]) -> int:
    """What it returns."""
    while True:
        try:
            next(finding)
        except StopIteration as found:
            state: int = found.value
            return state


def state_of(summing: Summing, bucket: Bucket, at_us: int) -> int:
    return rest_of(summing.state_steps(bucket, at_us, Work()))


def test_a_pass_takes_the_buckets_in_steps_and_what_is_too_much_for_one_in_several_passes() -> None:
    # Looking at all buckets comes on top of it, which is why it is enough for once.
    tick_work = 1_000 * (SUM_WORK + ORIGIN_WORK + ENTRY_WORK) // (TICKS + 1)
    (first, steps), *others = passes_of(summing_of(1_000, FIRST_US, tick_work), FIRST_US, PARTITIONS).values()
    assert (len(first), steps > TICKS / 2) == (PARTITIONS, True)
    assert all(len(partitions) < PARTITIONS for partitions, _ in others)
    assert {partition for partitions, _ in others for partition in partitions} == set(range(PARTITIONS))


@pytest.mark.parametrize(("partitions", "passes"), [(4, 255), (1, 128), (0.5, 64)])
def test_a_node_to_which_too_much_for_a_pass_came_at_once_compares_it_all_the_same(
    partitions: float, passes: int
) -> None:
    """For so many partitions there is room in a pass."""
    a_partition = 1_000 * (SUM_WORK + ORIGIN_WORK + ENTRY_WORK) // PARTITIONS
    tick_work = int(partitions * a_partition * 1.2 / TICKS)
    done = passes_of(summing_of(1_000, FIRST_US, tick_work), FIRST_US, 256)
    assert 0 not in done
    # The more a partition is beyond what a pass may cost, the fewer passes there are.
    assert len(done) == passes
    assert {partition for each, _ in done.values() for partition in each} == set(range(PARTITIONS))
    assert min(len(each) for each, _ in done.values()) >= int(partitions)


@pytest.mark.parametrize("looked", ["hardly at any bucket", "at all but nobody compares"])
def test_a_pass_that_was_given_up_for_another_reason_says_nothing_about_the_next(looked: str) -> None:
    summing = summing_of(6_000, FIRST_US)
    hardly = looked == "hardly at any bucket"
    for _ in range(1 if hardly else 50):
        summing.do_piece(FIRST_US)
    if not hardly:
        summing.pause()
    done = passes_of(summing, FIRST_US + EVERY_US, 2)
    assert [len(partitions) for partitions, _ in done.values()] == [PARTITIONS] * 2


def test_a_step_is_taken_in_pieces() -> None:
    at_us = FIRST_US
    summing = summing_of(1_000, at_us)
    assert not summing.is_amid_tick
    pieces = 1
    done = summing.do_piece(at_us)
    while summing.is_amid_tick:
        pieces += 1
        done = summing.do_piece(at_us)
    assert done is None
    a_bucket = LOOK_WORK + SUM_WORK + ORIGIN_WORK + ENTRY_WORK
    a_piece = -(-ROUND_PIECE_WORK // a_bucket) * a_bucket
    assert pieces == -(-(TICK_WORK + LOOK_WORK * 1_000 // TICKS) // a_piece) > 5
    # The machine sleeps in the middle of the next one.
    summing.do_piece(at_us + 20_000)
    assert summing.is_amid_tick
    assert summing.do_piece(at_us + EVERY_US) is None
    assert not summing.is_amid_tick


CROWD = [Origin(f"node {number}", 1) for number in range(250)]


def crowded() -> tuple[Summing, Bucket]:
    """A bucket that 250 nodes have taken from in each of 49 slots, of a node that is about to compare."""
    store = store_of(node("a"))
    store.journal.peers = {*CROWD}
    slots = [slot_id(FIRST_US - SETTLE_US - age * SLOT_US, PER_USER.exponent) for age in range(1, 50)]
    for origin in CROWD:
        join(store, key_of("ann"), None, [Entry(origin, slot, 3) for slot in slots], FIRST_US)
    bucket = store.get(key_of("ann"))
    assert bucket is not None
    assert len(bucket.origins()) == 250
    return Summing(store, FIRST_US - 1), bucket


def test_a_bucket_that_250_nodes_take_from_is_summed_up_in_pieces() -> None:
    summing, bucket = crowded()
    pieces, done_before, longest = 1, 0, 0
    done = summing.do_piece(FIRST_US)
    while done is None:
        pieces += 1
        longest = max(longest, summing.work.done - done_before)
        done_before = summing.work.done
        done = summing.do_piece(FIRST_US)
    # The work of one origin may come on top, and that of listing them.
    assert longest <= ROUND_PIECE_WORK + SUM_WORK + ORIGIN_WORK * len(CROWD)
    assert pieces == pytest.approx(ENTRY_WORK * bucket.slots / ROUND_PIECE_WORK, rel=0.3)
    assert done.sums[range_of(bucket.key)] == state_of(summing, bucket, FIRST_US)


def test_what_changes_while_it_is_summed_up_is_found_to_have_changed() -> None:
    summing, bucket = crowded()
    finding = summing.state_steps(bucket, FIRST_US, Work())
    next(finding)
    next(finding)
    first, *_, last = sorted(CROWD, key=summing.origin_hash)
    slot = max(bucket.tokens_of(first))
    # One that is in the sum already, and one that is not.
    assert bucket.merge([Entry(first, slot, 4), Entry(last, slot, 4)], FIRST_US) == 2
    assert rest_of(finding) != state_of(summing, bucket, FIRST_US)


def test_a_state_is_the_hash_that_nodes_of_earlier_versions_have() -> None:
    store = store_of(node("a"))
    slots = [slot_id(FIRST_US - SETTLE_US - age * SLOT_US, PER_USER.exponent) for age in (9, 5, 2)]
    entries = [Entry(Origin(name, 7), slot | mark, 3) for name in "cb" for slot in slots for mark in (REFUND, 0)]
    bucket = take(store, "ann", 2, FIRST_US - SETTLE_US - 3 * SLOT_US)
    join(store, bucket.key, None, entries, FIRST_US)
    assert state_of(Summing(store, FIRST_US - 1), bucket, FIRST_US) == 5458122548980219214


def test_a_bucket_that_cannot_be_encoded_is_left_out_of_what_is_compared() -> None:
    stores = [store_of(node("a")), store_of(node("a"))]
    for store in stores:
        for value in ("ann", "bob"):
            take(store, value, 3, FIRST_US - SETTLE_US - 2 * SLOT_US)
    take(stores[0], "bad", -1, FIRST_US - SETTLE_US - 2 * SLOT_US)
    sums = [sums_of(store, FIRST_US).sums for store in stores]
    assert sums[0] == sums[1]
    assert [store.journal.left_out for store in stores] == [1, 0]


def test_a_pass_that_cannot_end_in_time_is_given_up() -> None:
    store = store_of(node("a"))
    for index in range(1_000):
        take(store, f"user {index}", 1, NOW_US)
    at_us = FIRST_US
    summing = Summing(store, at_us - 1)
    assert summing.do_piece(at_us) is None
    # The machine slept; the next pass is the one after that.
    assert summing.do_piece(at_us + 2 * EVERY_US + 1) is None
    assert summing.find(at_us) is None
    assert summing.do_piece(at_us + 2 * EVERY_US + 2) is None
    while summing.find(at_us + 2 * EVERY_US) is None:
        summing.do_piece(at_us + 2 * EVERY_US + 3)


def exchange_of_nothing() -> tuple[Exchange, Peer, Round]:
    """Of a node without buckets, which has done a round."""

    def tell(_key: bytes) -> None:
        raise AssertionError("there is nothing to tell")

    store = store_of(node("a"))
    summing = Summing(store, FIRST_US - 1)
    own = summing.do_piece(FIRST_US)
    assert own is not None
    peer = peer_that(tell, store)
    return Exchange(summing, store, peer, leads=True), peer, own


ZEROES = [0] * PARTITION_RANGES


@pytest.mark.interpreted
@pytest.mark.parametrize(
    "frame",
    [
        pb.Digest(at_us=MAX_TIME_US + 1),
        pb.Digest(segments=[PARTITIONS], sums=ZEROES),
        pb.Digest(segments=[0, 0], sums=ZEROES * 2),
        pb.Digest(segments=[0], sums=ZEROES[1:]),
        pb.Summary(range=RANGES),
        pb.Summary(keys=[1], states=[]),
        pb.Pull(range=RANGES),
        pb.Pull(keys=range(MAX_PULL_KEYS + 1)),
    ],
    ids=lambda frame: f"{type(frame).__name__} {str(frame)[:20]}".replace("\n", " "),
)
def test_a_bad_comparison_is_refused(frame: pb.Digest | pb.Summary | pb.Pull) -> None:
    exchange, _, _ = exchange_of_nothing()
    with pytest.raises(ProtocolError) as caught:
        done(exchange.receive_steps(frame))
    assert caught.value.reason is Reason.BAD_DIGEST


@pytest.mark.interpreted
@pytest.mark.parametrize("frame", [pb.Summary(keys=[1], states=[2]), pb.Pull(keys=[1])], ids=["summary", "pull"])
def test_what_answers_no_pass_of_this_node_is_passed_over(frame: pb.Summary | pb.Pull) -> None:
    exchange, peer, _ = exchange_of_nothing()
    assert hear(exchange, peer, frame) == (0, 1)
    assert exchange.take_frame() is None


def test_what_a_stream_was_at_is_freed_when_it_ends() -> None:
    with frees_itself(Exchange):
        cluster = Cluster(9, "ab", RULES)
        cluster.run_until_settled()
        for each in cluster:
            for stream in list(each.replicator.streams()):
                assert isinstance(stream, Stream)
                stream.lost("gone", NOW_US)


@pytest.mark.interpreted
def test_a_summary_nobody_asked_for_is_passed_over_and_one_is_heard_once() -> None:
    exchange, peer, own = exchange_of_nothing()
    summary = pb.Summary(at_us=own.at_us, keys=[1], states=[2])
    assert hear(exchange, peer, summary) == (0, 1)
    exchange.note_round(own)
    assert (exchange.take_frame() or pb.Frame()).HasField("digest")
    assert hear(exchange, peer, summary) == (1, 1)
    assert hear(exchange, peer, summary) == (0, 1)


@pytest.mark.interpreted
@pytest.mark.parametrize(("buckets", "is_sent"), [(16_000, True), (16_384, False)])
def test_a_range_of_more_buckets_than_fit_into_a_frame_is_left_out(buckets: int, is_sent: bool) -> None:
    store = store_with(keys_of_range(RANGES - 1, buckets), FIRST_US)
    summing = Summing(store, FIRST_US - 1)
    own, _ = next_round(summing, FIRST_US)
    peer = peer_that(lambda key: None, store)
    exchange = Exchange(summing, store, peer, leads=False)
    # The peer has nothing in its last partition.
    assert hear(exchange, peer, pb.Digest(at_us=own.at_us, segments=[PARTITIONS - 1], sums=ZEROES)) == (0, 1)
    frame = exchange.take_frame()
    assert (frame is not None) == is_sent
    if frame is not None:
        assert len(frame.summary.keys) == buckets
        assert read_frame(frame.SerializeToString()) == frame
    pull = pb.Pull(at_us=own.at_us, range=RANGES - 1, keys=own.buckets(RANGES - 1).hashes[:7])
    assert hear(exchange, peer, pull)[0] == (7 if is_sent else 0)
    assert len(own.buckets(RANGES - 1).keys) <= 16_001


def differing(step: Callable[[Bucket], None]) -> tuple[Exchange, Peer, list[bytes], Round, Bucket]:
    """A node that has sent its sums, in which "ann" has a part; `step` is what happens to the bucket since."""
    store = store_of(node("a"))
    at_us = FIRST_US
    bucket = take(store, "ann", 3, at_us - SETTLE_US - 2 * SLOT_US)
    told: list[bytes] = []
    summing = Summing(store, at_us - 1)
    done = summing.do_piece(at_us)
    assert done is not None
    peer = peer_that(told.append, store)
    exchange = Exchange(summing, store, peer, leads=True)
    exchange.note_round(done)
    exchange.take_frame()
    step(bucket)
    return exchange, peer, told, done, bucket


@pytest.mark.interpreted
def test_a_bucket_that_the_other_lacks_is_told_and_one_that_differs_is_asked_for_as_well() -> None:
    for theirs, pulls in (({}, 0), ({hash64(key_of("ann")): 1}, 1)):
        exchange, peer, told, done, bucket = differing(lambda _bucket: None)
        summary = pb.Summary(at_us=done.at_us, range=range_of(bucket.key), keys=theirs.keys(), states=theirs.values())
        assert hear(exchange, peer, summary) == (1, 1)
        assert told == [bucket.key]
        frame = exchange.take_frame()
        assert (0 if frame is None else len(frame.pull.keys)) == pulls


@pytest.mark.interpreted
def test_a_bucket_that_has_changed_since_is_not_told() -> None:
    def change(bucket: Bucket) -> None:
        late = Entry(Origin("c", 1), slot_id(bucket.at_us - SLOT_US, PER_USER.exponent), 5)
        assert bucket.merge([late], bucket.at_us) == 1

    exchange, peer, told, done, bucket = differing(change)
    assert hear(exchange, peer, pb.Summary(at_us=done.at_us, range=range_of(bucket.key))) == (0, 1)
    assert not told


@pytest.mark.interpreted
@pytest.mark.parametrize("differ", [True, False])
def test_a_range_of_many_buckets_is_compared_in_pieces(differ: bool) -> None:
    store = store_with(keys_of_range(7, 1_000), FIRST_US)
    summing = Summing(store, FIRST_US - 1)
    own, _ = next_round(summing, FIRST_US)
    told: list[bytes] = []
    peer = peer_that(told.append, store)
    exchange = Exchange(summing, store, peer, leads=True)
    exchange.note_round(own)
    exchange.take_frame()
    buckets = own.buckets(7)
    states = [state ^ differ for state in buckets.states]
    found, pieces = hear(exchange, peer, pb.Summary(at_us=own.at_us, range=7, keys=buckets.hashes, states=states))
    assert found == (1_000 if differ else 0)
    work = 1_000 * (LOOK_WORK + (SUM_WORK + ORIGIN_WORK + ENTRY_WORK + TELL_WORK if differ else 0))
    assert pieces == pytest.approx(work / ROUND_PIECE_WORK + 1, rel=0.1)
    if differ:
        # The peer asks for the same ones.
        told.clear()
        frame = exchange.take_frame()
        assert frame is not None
        assert sorted(frame.pull.keys) == sorted(buckets.hashes)
        found, pieces = hear(exchange, peer, frame.pull)
        assert (found, told) == (1_000, buckets.keys)
        assert pieces == 1_000 * TELL_WORK / ROUND_PIECE_WORK + 1


def test_a_quiet_node_compares_soon_after_a_stall() -> None:
    cluster = Cluster(7, "ab", RULES)
    cluster.run_until_settled()
    cluster.cut("a", "b")
    take(cluster["a"].store, "ann", 1, cluster["a"].now_us)
    cluster.run(3 * SECOND_US)
    cluster.heal("a", "b")
    cluster.run_until_settled()
    take(cluster["b"].store, "bob", 2, cluster["b"].now_us)
    lose_changes(cluster["b"])
    cluster.run(SLOT_US + HEALS_US)
    assert taken_at(cluster["a"], "bob") == 2


def test_a_peer_without_room_is_not_told_of_keys_again_and_again() -> None:
    cluster = Cluster(8, "ab", RULES)
    cluster.run_until_settled()
    b = cluster["b"]
    take(b.store, "mine", 1, b.now_us)
    b.store.places.max_buckets = 1
    for index in range(50):
        take(cluster["a"].store, f"user {index}", 1, cluster["a"].now_us)
    cluster.run(SLOT_US + HEALS_US)
    assert (len(b.store), b.store.full_since_us is not None) == (1, True)
    assert resyncs(cluster) == 0
    # There is room again: now it is.
    b.store.places.max_buckets = 100
    b.store.full_since_us = None
    cluster.run(HEALS_US)
    assert len(b.store) == 51


@pytest.mark.parametrize("crowded", ["a", "b"])
def test_a_node_without_memory_for_what_others_took_compares_with_nobody_until_there_is_some(crowded: str) -> None:
    cluster = Cluster(8, "ab", RULES)
    cluster.run_until_settled()
    journal = cluster[crowded].store.journal
    most, journal.max_received_bytes = journal.max_received_bytes, 0
    other = cluster["b" if crowded == "a" else "a"]
    for index in range(50):
        take(other.store, f"user {index}", 100, other.now_us)
    cluster.run(SLOT_US + HEALS_US)
    assert (taken_at(cluster[crowded], "user 7"), resyncs(cluster)) == (0, 0)
    journal.max_received_bytes = most
    cluster.run(HEALS_US)
    assert resyncs(cluster) > 0
    assert cluster[crowded].bucket("user 7").fold(cluster.now_us) == other.bucket("user 7").fold(cluster.now_us)


@pytest.mark.parametrize("stride", [1, 2, 4, 8, 16, 32])
def test_each_partition_has_its_turn_however_seldom_a_node_has_a_pass(stride: int) -> None:
    start = NOW_US // EVERY_US // stride * stride
    # Enough for one partition in each pass, which the first few find out.
    each, before = 17, 4
    tick_work = each * (PARTITIONS * LOOK_WORK + SUM_WORK + ENTRY_WORK + 13) // TICKS
    keys = [key for partition in range(PARTITIONS) for key in keys_of_range(partition * PARTITION_RANGES, each)]
    # At a moment at which the order changes, too.
    for start_pass in (start, start // 4096 * 4096 - 20 * stride):
        first_us = (start_pass - before * stride) * EVERY_US
        summing = Summing(store_with(keys, first_us, SLOW), first_us - 1, tick_work=tick_work)
        done = passes_of(summing, first_us, (before + 2 * PARTITIONS) * stride, stride)
        passes = [partitions for number, (partitions, _) in done.items() if number >= before * stride]
        assert [len(partitions) for partitions in passes] == [1] * 2 * PARTITIONS
        assert frozenset().union(*passes) == set(range(PARTITIONS))


SLOW = TokenBucketLimit(1, 100 * SECOND_US, 200)
"""What is taken from it counts for hours."""


def whole_pass(names: int) -> tuple[Store, Summing, Round]:
    """A store of so many buckets and its pass."""
    store = store_with([key_of(f"user {index}") for index in range(names)], FIRST_US)
    summing = Summing(store, FIRST_US - 1)
    own, _ = next_round(summing, FIRST_US)
    return store, summing, own


@pytest.mark.interpreted
def test_a_peer_is_told_no_more_because_of_one_pass_than_a_bound_though_it_alternates_instants() -> None:
    store, summing, own = whole_pass(MAX_EXCHANGED + 1)
    told: list[bytes] = []
    peer = peer_that(told.append, store)
    exchange = Exchange(summing, store, peer, leads=False)
    for number in range(RANGES):
        hear(exchange, peer, pb.Pull(at_us=own.at_us, range=number, keys=own.buckets(number).hashes))
        hear(exchange, peer, pb.Pull(at_us=1, range=number))
    assert len(set(told)) == len(told) == MAX_EXCHANGED


@pytest.mark.interpreted
def test_a_digest_is_answered_once() -> None:
    store, summing, own = whole_pass(50)
    exchange = Exchange(summing, store, peer_that(lambda _key: None, store), leads=False)
    digest = pb.Digest(at_us=own.at_us, segments=range(PARTITIONS), sums=[1] * RANGES)
    for summaries in (RANGES, 0):
        done(exchange.receive_steps(digest))
        for _ in range(summaries):
            assert exchange.take_frame() is not None
        assert exchange.take_frame() is None
