"""What a peer has yet to hear: its bounds, its order, and the lag it measures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest
from freed import frees_itself
from hypothesis import example, given, settings
from hypothesis import strategies as st
from joined import join
from replication.builders import (
    NOW_US,
    PER_TEAM,
    PER_USER,
    SECOND_US,
    apply_all,
    apply_deltas,
    bucket_of,
    key_of,
    node,
    rules_with,
    store_of,
    take,
)

from ratelimit_sidecar.crdt.bucket import MAX_ORIGINS, Bucket, Entry, Origin
from ratelimit_sidecar.crdt.journal import MAX_URGENT_OF_LIMIT
from ratelimit_sidecar.crdt.limit import MIN_EXPONENT, AnyLimit, Window, WindowLimit
from ratelimit_sidecar.crdt.slot import slot_id
from ratelimit_sidecar.crdt.store import MAX_FIRST_OF_LIMIT, Store
from ratelimit_sidecar.replication.changes import (
    ENCODED_BYTES,
    ENCODED_SEGMENTS,
    FLUSH_STEP_BUCKETS,
    FORGOTTEN_SEGMENTS,
    RECENT_CHANGES_US,
    RETENTION_US,
    ChangeLog,
    Cursor,
)
from ratelimit_sidecar.replication.deltas import MAX_KEY_BYTES, MAX_SLOT_TOKENS, DeltasReader
from ratelimit_sidecar.replication.key_ids import MAX_KEY_IDS, MAX_KEY_WITH_ID_BYTES
from ratelimit_sidecar.replication.lag import Batch
from ratelimit_sidecar.replication.outbox import (
    LOOKED_BUCKETS,
    MAX_BATCH_BUCKETS,
    MAX_BATCH_BYTES,
    MAX_BATCH_ENTRIES,
    MAX_UNACKNOWLEDGED,
    MAX_UNACKNOWLEDGED_BUCKETS,
    MAX_UNACKNOWLEDGED_BYTES,
    WHOLE_BATCH_BUCKETS,
    Outbox,
)
from ratelimit_sidecar.replication.pace import PIECE_WORK
from ratelimit_sidecar.replication.parts import MAX_PART_ENTRIES, whole
from ratelimit_sidecar.replication.side_log import MAX_RELAYED_BUCKETS, SideLog
from ratelimit_sidecar.replication.snapshots import Snapshots
from ratelimit_sidecar.replication.v1 import replication_pb2 as pb
from ratelimit_sidecar.replication.wire import MAX_NAME_BYTES, read_frame, write_deltas
from simulation.steps import done

MANY = 4 * MAX_BATCH_BUCKETS
A, B, C = (node(name) for name in "abc")
MS = 1_000


def new_outbox(store: Store) -> Outbox:
    """With a log of its own, last flushed at NOW_US."""
    return Outbox(store, ChangeLog(store, NOW_US))


def note(outbox: Outbox, now_us: int = NOW_US, *, has_peers: bool = True) -> None:
    """Flush what the store's journal holds. It counts as created at the flush before."""
    first = outbox.log.end
    done(outbox.log.flush_steps(now_us, has_peers=has_peers))
    segment = outbox.log.get(first)
    if segment is not None:
        outbox.note_missed_by_peer(segment.created_us)


def open_stream(outbox: Outbox, peer: Origin = B.origin, *, compares: bool = True) -> None:
    """A stream is there, and its peer wants to be told everything."""
    outbox.open(peer, compares=compares)
    outbox.serve_request(NOW_US, recent=False)


def opened(store: Store) -> Outbox:
    """An outbox whose peer has heard the full state already."""
    store.drain_changes()
    outbox = new_outbox(store)
    open_stream(outbox)
    for _ in drained(outbox):
        pass
    return outbox


def next_batch(outbox: Outbox, now_us: int = NOW_US) -> Batch | None:
    while outbox.write(now_us):
        pass
    return outbox.take_batch()


def drained(outbox: Outbox, now_us: int = NOW_US) -> Iterator[Batch]:
    """Every batch there is, each acknowledged at once."""
    while (batch := next_batch(outbox, now_us)) is not None:
        yield batch
        assert outbox.acknowledged(now_us) is batch


def fill(store: Store, buckets: int, now_us: int = NOW_US) -> None:
    for index in range(buckets):
        take(store, f"user {index}", 1, now_us)


def with_changes(buckets: int, *, has_peers: bool = False) -> tuple[Store, Outbox]:
    """So many buckets, and an outbox whose peer has yet to hear of a take from each.

    Args:
        has_peers: as they are encoded for all; otherwise the peer has to catch up.
    """
    store = store_of(A)
    outbox = opened(store)
    fill(store, buckets)
    note(outbox, has_peers=has_peers)
    return store, outbox


def large_bucket(store: Store) -> Bucket:
    """25 origins with takes in every slot of the horizon."""
    bucket = take(store, "ann", 1, NOW_US, key="team")
    slots = [slot_id(NOW_US - (index << MIN_EXPONENT), MIN_EXPONENT) for index in range(600)]
    for origin in range(25):
        bucket.merge([Entry(Origin(f"node {origin}", 1), slot, 1) for slot in slots], NOW_US)
    return bucket


def deltas_of(batch: Batch) -> pb.Deltas:
    return pb.Deltas.FromString(batch.payload)


def told(batches: Iterator[Batch] | list[Batch]) -> Store:
    """A peer's store after these batches."""
    store = store_of(B)
    for batch in batches:
        apply_deltas(store, deltas_of(batch), A.origin, NOW_US)
    return store


def keys_told(batches: Iterable[Batch]) -> set[bytes]:
    return {key for batch in batches for key in batch.bucket_keys}


def test_many_takes_on_one_bucket_are_one_entry_with_the_newest_count() -> None:
    store = store_of(A)
    outbox = opened(store)
    for _ in range(500):
        take(store, "ann", 1, NOW_US)
        note(outbox, has_peers=False)
    assert outbox.pending_buckets == 1
    [batch] = drained(outbox)
    assert batch.entries == 1
    assert list(told([batch]).get(key_of("ann")).entries()) == [  # type: ignore[union-attr]
        Entry(A.origin, slot_id(NOW_US, PER_USER.exponent), 500)
    ]


def test_who_is_behind_is_told_the_oldest_changes_first_and_each_bucket_once() -> None:
    store = store_of(A)
    outbox = opened(store)
    for index, name in enumerate(["ann", "bob", "ann", "cid"]):
        take(store, name, 1, NOW_US)
        note(outbox, NOW_US + index, has_peers=False)
    [batch] = drained(outbox)
    assert batch.bucket_keys == (key_of("ann"), key_of("bob"), key_of("cid"))
    assert tokens_of(told([batch])) == 4
    assert batch.created_us == NOW_US


@pytest.mark.parametrize(
    ("changed", "most"), [(False, WHOLE_BATCH_BUCKETS), (True, MAX_BATCH_BUCKETS)], ids=["full state", "changes"]
)
def test_a_batch_is_bounded_in_buckets(changed: bool, most: int) -> None:
    store = store_of(A)
    outbox = opened(store) if changed else new_outbox(store)
    fill(store, 2 * most + 1)
    if changed:
        note(outbox)
    else:
        open_stream(outbox)
    batches = list(drained(outbox))
    assert [len(batch.bucket_keys) for batch in batches] == [most, most, 1]
    assert len(told(batches)) == 2 * most + 1


def test_a_batch_is_bounded_in_bytes_by_whole_buckets() -> None:
    store = store_of(A)
    outbox = opened(store)
    # Longer than any of ours: callers' long values are hashed.
    keys = [b"%d" % index + b"x" * 15_000 for index in range(7)]
    for key in keys:
        store.bucket(key, PER_USER, NOW_US).take(1, NOW_US)
    note(outbox)
    batches = list(drained(outbox))
    assert [len(batch.bucket_keys) for batch in batches] == [5, 2]
    assert all(len(batch.payload) < 2 * MAX_BATCH_BYTES for batch in batches)


@settings(max_examples=10, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([1, 100, MAX_KEY_BYTES]),
            st.sampled_from([0, 1, MAX_PART_ENTRIES + 1, MAX_ORIGINS]),
            st.sampled_from(["n", "n" * MAX_NAME_BYTES, "\N{PILE OF POO}" * (MAX_NAME_BYTES // 4)]),
        ),
        min_size=1,
        max_size=3,
    )
)
@example([(MAX_KEY_BYTES, MAX_ORIGINS, "n" * MAX_NAME_BYTES)])
def test_whatever_buckets_hold_a_peer_takes_each_frame(shapes: list[tuple[int, int, str]]) -> None:
    """In snapshots, repairs and what is relayed. Otherwise it would close each stream, for as long as they hold it."""
    month = WindowLimit(1_000_000, 30 * 86_400 * SECOND_US, Window.FIXED)
    store = Store(A.origin, lambda _key: month)
    slot = slot_id(NOW_US - NOW_US % month.period_us, month.exponent)
    outbox = new_outbox(store)
    open_stream(outbox)
    for number, (key_bytes, nodes, name) in enumerate(shapes):
        bucket = store.bucket(bytes([number]) * key_bytes, month, NOW_US)
        bucket.take(1, NOW_US)
        heard = [Entry(Origin(name, life), slot, MAX_SLOT_TOKENS) for life in range(1, nodes + 1)]
        bucket.merge(heard, NOW_US)
        outbox.relay(bucket, heard)
        outbox.repair(bucket.key)
    peer = Store(B.origin, lambda _key: month)
    reader = DeltasReader(A.origin)
    for number, batch in enumerate(drained(outbox), 1):
        head = pb.Deltas(sequence=number, trace=bytes(24), acknowledged=2**63, ack_delay_ms=2**31)
        apply_all(reader, peer, read_frame(write_deltas(head, batch.payload)).deltas, NOW_US)
    for bucket in store:
        copy = peer.get(bucket.key)
        assert copy is not None
        assert len(copy.taken) == min(len(bucket.taken), MAX_ORIGINS)


def test_a_peer_takes_a_frame_of_the_longest_keys_of_which_it_knows_no_id() -> None:
    store = Store(A.origin, lambda _key: PER_USER)
    with_ids = [b"%3d" % number + b"x" * (MAX_KEY_WITH_ID_BYTES - 3) for number in range(MAX_BATCH_BUCKETS - 4)]
    long = [b"%d" % number + b"x" * (MAX_KEY_BYTES - 1) for number in range(4)]
    outbox = new_outbox(store)
    for now_us in (NOW_US, NOW_US + MS):
        for key in with_ids if now_us == NOW_US else with_ids + long:
            store.bucket(key, PER_USER, now_us).take(1, now_us)
        # What the first flush tells gives the keys their ids, and comes before the stream.
        note(outbox, now_us)
        if now_us == NOW_US:
            # It has yet to say which snapshot it wants.
            outbox.open(B.origin, compares=True)
    reader, peer = DeltasReader(A.origin), store_of(B)
    peer.limit_of_key = store.limit_of_key
    for number, batch in enumerate(drained(outbox), 1):
        apply_all(reader, peer, read_frame(write_deltas(pb.Deltas(sequence=number), batch.payload)).deltas, NOW_US)
    assert {bucket.key for bucket in peer} == {*with_ids, *long}


def test_a_bucket_too_large_for_a_batch_is_told_in_parts() -> None:
    store = store_of(A)
    bucket = large_bucket(store)
    outbox = new_outbox(store)
    open_stream(outbox)
    batches = list(drained(outbox))
    assert all(batch.entries <= MAX_BATCH_ENTRIES for batch in batches)
    assert [batch.ends_snapshot for batch in batches] == [False] * (len(batches) - 1) + [True]
    copy = told(batches).get(bucket.key)
    assert copy is not None
    assert sorted(copy.entries()) == sorted(bucket.entries())


def test_a_large_bucket_is_told_of_origin_by_origin_and_as_it_is_in_the_end() -> None:
    store = store_of(A)
    bucket = large_bucket(store)
    parts = whole(store, bucket.key, 0, NOW_US, None)
    told_first = next(parts)
    # Some of it is sealed meanwhile, and there are news.
    later_us = NOW_US + 4 * SECOND_US
    bucket.seal(later_us)
    last = bucket.origins()[-1]
    bucket.merge([Entry(last, slot_id(later_us, MIN_EXPONENT), 9_000)], later_us)
    peers = store_of(B)
    for part in (told_first, *parts):
        assert len(part.entries) <= MAX_PART_ENTRIES
        join(peers, bucket.key, part.base, part.entries, later_us)
    copy = peers.get(bucket.key)
    assert copy is not None
    assert copy.base == bucket.base
    assert copy.taken == bucket.taken
    assert copy.fold(later_us) == bucket.fold(later_us)
    assert bucket.base.deficit > 0


def test_a_bucket_that_cannot_be_encoded_is_left_out_and_all_others_are_told() -> None:
    store = store_of(A)
    outbox = opened(store)
    for name, tokens in (("ann", 1), ("bad", -1), ("bob", 1)):
        take(store, name, tokens, NOW_US)
    note(outbox)
    held = told(drained(outbox))
    assert sorted(entry.tokens for bucket in held for entry in bucket.entries()) == [1, 1]
    assert store.journal.left_out == 1
    outbox = new_outbox(store)
    open_stream(outbox)
    batches = list(drained(outbox))
    assert batches[-1].ends_snapshot
    assert sorted(entry.tokens for bucket in told(batches) for entry in bucket.entries()) == [1, 1]
    assert store.journal.left_out == 2


def test_what_is_left_of_a_large_bucket_is_forgotten_with_the_stream() -> None:
    store = store_of(A)
    large_bucket(store)
    outbox = new_outbox(store)
    open_stream(outbox)
    next_batch(outbox, NOW_US)
    assert outbox.pending_buckets == 1
    outbox.close(NOW_US)
    assert outbox.pending_buckets == 0


def test_what_a_stream_was_to_be_told_is_freed_when_it_ends() -> None:
    store = store_of(A)
    fill(store, 3 * MAX_BATCH_BUCKETS)
    outbox = new_outbox(store)
    with frees_itself(Cursor, SideLog, Snapshots):
        # A snapshot, what it has to catch up with, and repairs: all of them begun.
        open_stream(outbox)
        fill(store, 3 * MAX_BATCH_BUCKETS, NOW_US + 1)
        note(outbox, has_peers=False)
        for bucket in store:
            outbox.repair(bucket.key)
        for _ in range(4):
            assert next_batch(outbox) is not None
        assert outbox.write(NOW_US)
        outbox.close(NOW_US)


def test_a_batch_is_written_in_pieces() -> None:
    _, outbox = with_changes(3 * PIECE_WORK + 1)
    assert [outbox.write(NOW_US + 5 * MS) for _ in range(5)] == [True, True, True, True, False]
    # It is as good as pending until it is taken.
    assert outbox.pending_buckets == 3 * PIECE_WORK + 1
    assert not outbox.is_all_acknowledged
    assert outbox.lag_us(NOW_US + 5 * MS) == 5 * MS
    [batch] = drained(outbox, NOW_US + 5 * MS)
    assert (batch.entries, batch.created_us) == (3 * PIECE_WORK + 1, NOW_US)
    assert outbox.is_all_acknowledged


def test_a_batch_is_not_taken_before_it_is_whole() -> None:
    _, outbox = with_changes(PIECE_WORK + 1)
    assert outbox.take_batch() is None
    assert outbox.write(NOW_US)
    assert outbox.take_batch() is None
    assert outbox.write(NOW_US)
    batch = outbox.take_batch()
    assert batch is not None
    assert batch.entries == PIECE_WORK + 1
    assert outbox.take_batch() is None


def test_a_bucket_with_many_entries_is_written_in_pieces() -> None:
    store, others = store_of(A), store_of(B)
    slot = slot_id(NOW_US, PER_USER.exponent)
    heard = [Entry(Origin(f"node {index}", 1), slot, 1) for index in range(MAX_PART_ENTRIES)]
    for name in ("ann", "bob"):
        take(store, name, 1, NOW_US).merge(heard, NOW_US)
    outbox = new_outbox(store)
    open_stream(outbox)
    # Each has one entry more than fits into a piece.
    assert [outbox.write(NOW_US) for _ in range(4)] == [True] * 3 + [False]
    assert outbox.pending_buckets == 2
    batch = outbox.take_batch()
    assert batch is not None
    assert sorted(batch.bucket_keys) == [key_of("ann"), key_of("bob")]
    told = deltas_of(batch)
    assert [sum(len(run.slots) for run in delta.runs) for delta in told.buckets] == [MAX_PART_ENTRIES, 1] * 2
    apply_deltas(others, told, A.origin, NOW_US)
    for name in ("ann", "bob"):
        bucket, other = store.get(key_of(name)), others.get(key_of(name))
        assert bucket is not None
        assert other is not None
        assert other.taken == bucket.taken


def test_the_rest_of_a_bucket_does_not_wait_until_nothing_else_changes() -> None:
    store, outbox = with_changes(0)
    slot = slot_id(NOW_US, PER_USER.exponent)
    nodes = [Origin(f"node {index}", 1) for index in range(MAX_BATCH_ENTRIES // 2 + 1)]
    before = slot_id(NOW_US - (2 << PER_USER.exponent), PER_USER.exponent)
    heard = [Entry(node, each, 1) for node in nodes for each in (slot, before)][: MAX_BATCH_ENTRIES + 1]
    bucket = take(store, "large", 1, NOW_US)
    bucket.merge(heard, NOW_US)
    store.drain_changes()
    outbox.repair(bucket.key)
    told = 0
    for _ in range(4):
        # As many as a batch takes, each time.
        for index in range(MAX_BATCH_BUCKETS):
            take(store, f"user {index}", 1, NOW_US)
        note(outbox)
        batch = next_batch(outbox, NOW_US)
        assert batch is not None
        of_bucket = [delta for delta in deltas_of(batch).buckets if delta.key == bucket.key]
        told += sum(len(run.slots) for delta in of_bucket for run in delta.runs)
    assert told == MAX_BATCH_ENTRIES + 2


def test_buckets_that_are_gone_count_as_work_too() -> None:
    store, outbox = with_changes(2 * PIECE_WORK)
    store.sweep(NOW_US + 10 * PER_USER.horizon_us, 2 * PIECE_WORK)
    assert store.removals == 2 * PIECE_WORK
    assert [outbox.write(NOW_US) for _ in range(4)] == [True, True, True, False]
    assert outbox.take_batch() is None
    assert outbox.is_all_acknowledged


def test_what_changes_while_a_batch_is_written_is_told_too() -> None:
    store, outbox = with_changes(PIECE_WORK + 1)
    assert outbox.write(NOW_US)
    take(store, "user 0", 1, NOW_US)
    note(outbox)
    assert tokens_of(told(drained(outbox))) == PIECE_WORK + 2


def test_what_was_written_when_the_stream_ended_is_told_on_the_next_one() -> None:
    _, outbox = with_changes(PIECE_WORK + 1)
    assert outbox.write(NOW_US)
    later_us = NOW_US + 60 * SECOND_US
    outbox.close(later_us)
    assert outbox.lag_us(later_us) == 60 * SECOND_US
    open_stream(outbox)
    assert keys_told(drained(outbox, later_us)) == {key_of(f"user {index}") for index in range(PIECE_WORK + 1)}


def with_news_to_pass_on() -> tuple[Outbox, Bucket]:
    """What a third node has taken from a bucket."""
    store = store_of(A)
    outbox = opened(store)
    entry = Entry(C.origin, slot_id(NOW_US, PER_USER.exponent), 1)
    join(store, key_of("ann"), None, [entry], NOW_US)
    bucket = store.get(key_of("ann"))
    assert bucket is not None
    outbox.relay(bucket, [entry])
    return outbox, bucket


def test_what_was_passed_on_in_a_batch_that_was_never_sent_is_told_on_the_next_stream() -> None:
    outbox, bucket = with_news_to_pass_on()
    assert outbox.write(NOW_US)
    outbox.close(NOW_US + 60 * SECOND_US)
    open_stream(outbox)
    assert keys_told(drained(outbox, NOW_US + 60 * SECOND_US)) == {bucket.key}


def test_what_was_passed_on_in_a_batch_that_was_lost_is_told_however_long_it_took_to_write() -> None:
    outbox, bucket = with_news_to_pass_on()
    assert outbox.write(NOW_US)
    assert next_batch(outbox, NOW_US + 60 * SECOND_US) is not None
    outbox.close(NOW_US + 60 * SECOND_US)
    open_stream(outbox)
    assert keys_told(drained(outbox, NOW_US + 60 * SECOND_US)) == {bucket.key}


def test_a_peer_is_not_settled_before_it_is_told_that_there_is_nothing_to_tell() -> None:
    outbox = new_outbox(store_of(A))
    open_stream(outbox)
    assert outbox.write(NOW_US)
    assert not outbox.is_all_acknowledged
    assert [batch.ends_snapshot for batch in drained(outbox)] == [True]
    assert outbox.is_all_acknowledged


def test_the_end_of_a_walk_that_was_written_and_not_taken_counts_as_owed() -> None:
    store = store_of(A)
    fill(store, 1)
    outbox = new_outbox(store)
    open_stream(outbox)
    assert outbox.write(NOW_US)
    assert outbox.has_unacknowledged_snapshot
    outbox.close(NOW_US + 60 * SECOND_US)
    open_stream(outbox)
    assert keys_told(drained(outbox, NOW_US + 60 * SECOND_US)) == {key_of("user 0")}


@pytest.mark.parametrize(
    ("buckets", "key_bytes", "batches"),
    [
        (1, 0, MAX_UNACKNOWLEDGED),
        (MAX_BATCH_BUCKETS, 0, MAX_UNACKNOWLEDGED_BUCKETS // MAX_BATCH_BUCKETS),
        (4, MAX_KEY_BYTES, MAX_UNACKNOWLEDGED_BYTES // MAX_BATCH_BYTES),
    ],
    ids=["batches", "buckets", "bytes"],
)
def test_no_more_than_so_much_is_on_its_way(buckets: int, key_bytes: int, batches: int) -> None:
    store = store_of(A)
    outbox = opened(store)
    for number in range(batches + 1):
        for index in range(buckets):
            store.bucket(b"%d" % index + b"x" * (key_bytes - 1), PER_USER, NOW_US).take(1, NOW_US)
        note(outbox)
        assert (next_batch(outbox) is not None) is (number < batches)
    outbox.acknowledged(NOW_US)
    assert next_batch(outbox) is not None
    # What is lost with the stream is not on its way any more.
    outbox.close(NOW_US)
    open_stream(outbox)
    assert next_batch(outbox) is not None


def test_a_peer_that_appears_is_told_everything_of_every_origin_with_the_bases() -> None:
    store = store_of(A)
    bucket = take(store, "ann", 900, NOW_US)
    bucket.merge([Entry(C.origin, slot_id(NOW_US, PER_USER.exponent), 1_500)], NOW_US)
    later_us = NOW_US + PER_USER.horizon_us + 10 * SECOND_US
    bucket.merge([Entry(C.origin, slot_id(later_us, PER_USER.exponent), 5)], later_us)
    outbox = new_outbox(store)
    open_stream(outbox)
    [batch] = drained(outbox, later_us)
    peers = store_of(B)
    apply_deltas(peers, deltas_of(batch), A.origin, later_us)
    copy = peers.get(key_of("ann"))
    assert copy is not None
    assert bucket.base.deficit > 0
    assert copy.base == bucket.base
    assert copy.fold(later_us) == bucket.fold(later_us)


def test_a_peer_is_not_told_what_it_took_itself() -> None:
    store = store_of(A)
    join(store, key_of("ann"), None, [Entry(B.origin, slot_id(NOW_US, PER_USER.exponent), 5)], NOW_US)
    outbox = new_outbox(store)
    open_stream(outbox)
    [batch] = drained(outbox)
    assert batch.entries == 0


def test_an_earlier_life_of_the_peer_is_told_of() -> None:
    store = store_of(A)
    join(store, key_of("ann"), None, [Entry(Origin("b", 99), slot_id(NOW_US, PER_USER.exponent), 5)], NOW_US)
    outbox = new_outbox(store)
    open_stream(outbox)
    [batch] = drained(outbox)
    assert batch.entries == 1


def test_the_full_state_of_a_node_that_knows_nothing_is_an_end_and_nothing_else() -> None:
    outbox = new_outbox(store_of(A))
    open_stream(outbox)
    [batch] = drained(outbox)
    assert batch.ends_snapshot
    assert deltas_of(batch).ends_full_state
    assert not batch.bucket_keys


def test_local_buckets_are_not_part_of_it() -> None:
    store = store_of(A)
    take(store, "ann", 1, NOW_US, key="pod")
    outbox = new_outbox(store)
    open_stream(outbox)
    note(outbox)
    assert [batch.bucket_keys for batch in drained(outbox)] == [()]


def test_idle_buckets_are_passed_over_a_few_in_a_step() -> None:
    store = store_of(A)
    fill(store, 3 * LOOKED_BUCKETS)
    store.drain_changes()
    outbox = new_outbox(store)
    open_stream(outbox)
    idle_us = NOW_US + 2 * PER_USER.horizon_us
    steps = 0
    while outbox.write(idle_us):
        steps += 1
    # Each is looked at twice.
    assert steps == pytest.approx(6 * LOOKED_BUCKETS / PIECE_WORK, abs=10)
    [batch] = drained(outbox, idle_us)
    assert (batch.bucket_keys, batch.ends_snapshot) == ((), True)


def test_a_snapshot_tells_first_what_is_nearly_used_up_but_not_more_of_it_than_a_bound() -> None:
    store = store_of(A)
    fill(store, MANY)
    spent = {take(store, f"spent {number}", PER_USER.capacity, NOW_US).key for number in range(MAX_FIRST_OF_LIMIT + 1)}
    full_again = take(store, "full again", PER_USER.capacity, NOW_US - 1_000 * SECOND_US).key
    outbox = new_outbox(store)
    open_stream(outbox)
    told = [key for batch in drained(outbox) for key in batch.bucket_keys]
    first, rest = told[:MAX_FIRST_OF_LIMIT], told[MAX_FIRST_OF_LIMIT:]
    assert (len(set(first)), set(first) < spent) == (MAX_FIRST_OF_LIMIT, True)
    assert sorted(rest) == sorted(bucket.key for bucket in store if bucket.key != full_again)


def test_busy_buckets_do_not_keep_the_full_state_from_ending() -> None:
    store = store_of(A)
    fill(store, 4 * MAX_BATCH_BUCKETS)
    outbox = new_outbox(store)
    open_stream(outbox)
    has_ended = False
    # Every second batch is one of it, and it looks at all twice.
    for _ in range(2 * 4 * MAX_BATCH_BUCKETS // WHOLE_BATCH_BUCKETS + 2 * 4 * MAX_BATCH_BUCKETS // LOOKED_BUCKETS + 3):
        fill(store, 4 * MAX_BATCH_BUCKETS)
        note(outbox)
        batch = next_batch(outbox, NOW_US)
        assert batch is not None
        outbox.acknowledged(NOW_US)
        has_ended = has_ended or batch.ends_snapshot
    assert has_ended


def test_slots_sealed_before_they_could_be_sent_are_dropped() -> None:
    store = store_of(A)
    outbox = opened(store)
    take(store, "ann", 5, NOW_US, key="team")
    note(outbox, has_peers=False)
    bucket = store.get(key_of("ann", "team"))
    assert bucket is not None
    bucket.seal(NOW_US + 2 * PER_TEAM.horizon_us)
    assert next_batch(outbox, NOW_US) is None
    assert outbox.is_all_acknowledged


def test_evicted_buckets_are_dropped() -> None:
    store = store_of(A)
    outbox = opened(store)
    take(store, "ann", 5, NOW_US)
    note(outbox, has_peers=False)
    store.sweep(NOW_US + 2 * PER_USER.horizon_us, 1)
    assert store.removals == 1
    assert next_batch(outbox, NOW_US) is None


def test_while_the_peer_is_out_of_reach_nothing_is_kept() -> None:
    store = store_of(A)
    outbox = opened(store)
    take(store, "ann", 1, NOW_US)
    note(outbox)
    outbox.close(NOW_US)
    fill(store, 1_000)
    note(outbox)
    assert outbox.pending_buckets == 0
    assert next_batch(outbox, NOW_US) is None


def test_a_peer_that_is_back_is_told_the_full_state_although_batches_were_lost() -> None:
    store = store_of(A)
    outbox = opened(store)
    take(store, "ann", 1, NOW_US)
    note(outbox)
    assert next_batch(outbox, NOW_US) is not None
    outbox.close(NOW_US)
    take(store, "bob", 1, NOW_US)
    open_stream(outbox)
    assert {bucket.key for bucket in told(drained(outbox))} == {key_of("ann"), key_of("bob")}


def test_lag_is_from_the_creation_of_the_oldest_change_in_a_batch_to_its_acknowledgement() -> None:
    store = store_of(A)
    outbox = opened(store)
    for name, created_us in [("ann", NOW_US), ("bob", NOW_US + 15 * MS)]:
        note(outbox, created_us)
        take(store, name, 1, created_us)
        note(outbox, created_us + 5 * MS)
        assert next_batch(outbox, NOW_US + 20 * MS) is not None
    assert outbox.lag_us(NOW_US + 30 * MS) == 30 * MS
    for _ in range(2):
        outbox.acknowledged(NOW_US + 100 * MS)
    assert outbox.lag_us(NOW_US + 500 * MS) == 85 * MS


def test_lag_is_the_age_of_the_oldest_change_while_one_is_waiting_or_on_its_way() -> None:
    store = store_of(A)
    outbox = opened(store)
    take(store, "ann", 1, NOW_US)
    note(outbox)
    assert outbox.lag_us(NOW_US + 7 * MS) == 7 * MS
    next_batch(outbox, NOW_US + 8 * MS)
    note(outbox, NOW_US + 8 * MS)
    take(store, "ann", 1, NOW_US)
    note(outbox, NOW_US + 9 * MS)
    assert outbox.lag_us(NOW_US + 9 * MS) == 9 * MS
    outbox.acknowledged(NOW_US + 10 * MS)
    assert outbox.lag_us(NOW_US + 11 * MS) == 3 * MS


def test_lag_grows_from_the_first_change_that_a_lost_peer_misses_until_it_has_heard_everything() -> None:
    store = store_of(A)
    outbox = opened(store)
    outbox.close(NOW_US)
    assert outbox.lag_us(NOW_US + SECOND_US) == 0
    take(store, "ann", 1, NOW_US)
    for second in range(5):
        take(store, "bob", 1, NOW_US)
        note(outbox, NOW_US + second * SECOND_US)
    assert outbox.lag_us(NOW_US + 60 * SECOND_US) == 60 * SECOND_US
    open_stream(outbox)
    next_batch(outbox, NOW_US + 60 * SECOND_US)
    assert outbox.lag_us(NOW_US + 60 * SECOND_US + 80 * MS) == 60 * SECOND_US + 80 * MS
    outbox.acknowledged(NOW_US + 60 * SECOND_US + 80 * MS)
    # From here on it tells how far behind the peer is now, not that it once was cut off.
    assert outbox.lag_us(NOW_US + 61 * SECOND_US) == 80 * MS


def test_a_peer_that_was_away_is_told_what_is_newer_than_that() -> None:
    store = store_of(A)
    take(store, "old", 1, NOW_US)
    lost_us = NOW_US + 60 * SECOND_US
    outbox = opened(store)
    outbox.close(lost_us)
    note(outbox, lost_us)
    take(store, "new", 2, lost_us + SECOND_US)
    note(outbox, lost_us + SECOND_US)
    other = Entry(C.origin, slot_id(lost_us + SECOND_US, PER_USER.exponent), 3)
    join(store, key_of("heard"), None, [other], lost_us + SECOND_US)
    open_stream(outbox)
    batches = list(drained(outbox, lost_us + 2 * SECOND_US))
    assert keys_told(batches) == {key_of("new"), key_of("heard")}
    assert batches[-1].ends_snapshot
    assert outbox.is_all_acknowledged


def test_a_peer_that_was_away_is_told_the_base_of_what_was_sealed_meanwhile() -> None:
    store = store_of(A)
    outbox = opened(store)
    outbox.close(NOW_US)
    bucket = take(store, "ann", 900, NOW_US)
    back_us = NOW_US + PER_USER.horizon_us + 10 * SECOND_US
    # All of it has been repaid but for what was taken in debt.
    bucket.take(2_000, NOW_US, always=True)
    note(outbox)
    open_stream(outbox)
    peers = store_of(B)
    for batch in drained(outbox, back_us):
        apply_deltas(peers, deltas_of(batch), A.origin, back_us)
    copy = peers.get(key_of("ann"))
    assert copy is not None
    assert copy.fold(back_us) == bucket.fold(back_us) > 0


def test_what_was_on_its_way_when_the_stream_was_lost_is_told_again() -> None:
    store = store_of(A)
    outbox = opened(store)
    take(store, "ann", 1, NOW_US + 60 * SECOND_US)
    note(outbox, NOW_US + 60 * SECOND_US)
    assert next_batch(outbox, NOW_US + 60 * SECOND_US) is not None
    # Noticed only long after.
    outbox.close(NOW_US + 90 * SECOND_US)
    open_stream(outbox)
    assert keys_told(drained(outbox, NOW_US + 90 * SECOND_US)) == {key_of("ann")}


def test_what_a_process_took_before_it_stood_still_is_told_although_its_stream_was_lost_meanwhile() -> None:
    store = store_of(A)
    outbox = opened(store)
    took_us, later_us = NOW_US + 60 * SECOND_US, NOW_US + 90 * SECOND_US
    note(outbox, took_us)
    take(store, "ann", 1, took_us)
    outbox.close(later_us)
    # Only now comes the flush, after the loss.
    note(outbox, later_us)
    open_stream(outbox)
    assert keys_told(drained(outbox, later_us)) == {key_of("ann")}


@pytest.mark.parametrize(
    ("peer", "compares"), [(Origin("b", 2), True), (B.origin, False)], ids=["restarted", "of an older protocol"]
)
def test_a_peer_that_may_have_forgotten_is_told_everything(peer: Origin, compares: bool) -> None:
    store = store_of(A)
    take(store, "old", 1, NOW_US)
    outbox = opened(store)
    outbox.close(NOW_US + 60 * SECOND_US)
    open_stream(outbox, peer, compares=compares)
    assert keys_told(drained(outbox, NOW_US + 61 * SECOND_US)) == {key_of("old")}


def test_a_peer_that_was_lost_before_it_had_been_told_everything_is_told_everything() -> None:
    store = store_of(A)
    fill(store, 2 * MAX_BATCH_BUCKETS)
    store.drain_changes()
    outbox = new_outbox(store)
    open_stream(outbox)
    next_batch(outbox, NOW_US)
    outbox.acknowledged(NOW_US)
    outbox.close(NOW_US + 60 * SECOND_US)
    open_stream(outbox)
    assert len(keys_told(drained(outbox, NOW_US + 60 * SECOND_US))) == 2 * MAX_BATCH_BUCKETS


def test_a_peer_that_is_lost_again_while_it_is_told_what_it_missed_is_told_from_the_first_time_on() -> None:
    store = store_of(A)
    outbox = opened(store)
    lost_us = NOW_US + 60 * SECOND_US
    outbox.close(lost_us)
    fill(store, 2 * MAX_BATCH_BUCKETS, lost_us + SECOND_US)
    note(outbox, lost_us)
    open_stream(outbox)
    next_batch(outbox, lost_us + 2 * SECOND_US)
    outbox.close(lost_us + 100 * SECOND_US)
    open_stream(outbox)
    assert len(keys_told(drained(outbox, lost_us + 101 * SECOND_US))) == 2 * MAX_BATCH_BUCKETS


def test_relayed_entries_go_out_with_their_newest_counts_and_a_bucket_to_be_told_in_whole() -> None:
    store = store_of(A)
    outbox = opened(store)
    slot = slot_id(NOW_US, PER_USER.exponent)
    join(store, key_of("ann"), None, [Entry(C.origin, slot, 5)], NOW_US)
    bucket = take(store, "ann", 1, NOW_US)
    store.drain_changes()
    outbox.relay(bucket, [Entry(C.origin, slot, 4)])
    [batch] = drained(outbox)
    peers = store_of(B)
    apply_deltas(peers, deltas_of(batch), A.origin, NOW_US)
    copy = peers.get(bucket.key)
    assert copy is not None
    assert copy.taken == {C.origin: {slot: 5}}
    outbox.repair(bucket.key)
    [batch] = drained(outbox)
    apply_deltas(peers, deltas_of(batch), A.origin, NOW_US)
    assert copy.taken == bucket.taken


def with_an_urgent_one(buckets: int) -> tuple[Store, Outbox, bytes]:
    """Of a peer with so many changed buckets yet to be sent, before one of which there is hardly anything left."""
    store = store_of(A)
    outbox = opened(store)
    fill(store, buckets)
    bucket = take(store, "ann", PER_USER.capacity, NOW_US)
    note(outbox, has_peers=True)
    outbox.send_urgent(bucket)
    return store, outbox, bucket.key


def test_a_bucket_that_is_nearly_used_up_does_not_wait_behind_thousands_of_others() -> None:
    _, outbox, key = with_an_urgent_one(MANY)
    batches = drained(outbox)
    first, second = next(batches), next(batches)
    copy = told([first, second]).get(key)
    assert copy is not None
    assert copy.remaining == 0
    assert len(keys_told([first, second, *batches])) == MANY + 1


def test_so_many_others_are_told_before_their_turn() -> None:
    store, outbox, _ = with_an_urgent_one(MANY)
    before = outbox.pending_buckets
    for index in range(2 * MAX_URGENT_OF_LIMIT):
        outbox.send_urgent(bucket_of(store, f"user {index}", NOW_US))
    assert outbox.pending_buckets == before + MAX_URGENT_OF_LIMIT
    assert len(keys_told(drained(outbox))) == MANY + 1


def test_a_peer_out_of_reach_is_neither_told_nor_passed_anything() -> None:
    store = store_of(A)
    bucket = take(store, "ann", 1, NOW_US)
    outbox = new_outbox(store)
    outbox.repair(bucket.key)
    outbox.relay(bucket, bucket.entries())
    outbox.snapshot(NOW_US)
    assert outbox.pending_buckets == 0


def test_a_key_that_is_told_of_again_is_an_id() -> None:
    store = store_of(A)
    outbox = opened(store)
    sizes = []
    for index in range(3):
        take(store, "a user with quite a long name, to see the difference", 1, NOW_US + index)
        note(outbox)
        [batch] = drained(outbox)
        sizes.append(len(batch.payload))
    assert sizes[1] == sizes[2] <= sizes[0] - 50


def test_a_stream_lost_before_the_full_state_was_through_leaves_the_lag_growing() -> None:
    store = store_of(A)
    outbox = new_outbox(store)
    outbox.count_as_undelivered(NOW_US - SECOND_US)
    fill(store, 2 * MAX_BATCH_BUCKETS)
    open_stream(outbox)
    next_batch(outbox, NOW_US)
    outbox.acknowledged(NOW_US)
    outbox.close(NOW_US)
    assert outbox.lag_us(NOW_US + SECOND_US) == 2 * SECOND_US


def test_changes_on_their_way_when_the_stream_was_lost_count_from_their_creation() -> None:
    store = store_of(A)
    outbox = opened(store)
    take(store, "ann", 1, NOW_US)
    note(outbox, NOW_US)
    next_batch(outbox, NOW_US + MS)
    outbox.close(NOW_US)
    assert outbox.lag_us(NOW_US + SECOND_US) == SECOND_US


def test_the_full_state_alone_is_no_change_and_so_no_lag() -> None:
    store = store_of(A)
    outbox = new_outbox(store)
    open_stream(outbox)
    next_batch(outbox, NOW_US)
    assert outbox.lag_us(NOW_US + SECOND_US) == 0


def test_the_lag_of_a_quiet_link_is_shown_for_a_while_and_then_there_is_none() -> None:
    store = store_of(A)
    outbox = new_outbox(store)
    open_stream(outbox)
    next_batch(outbox, NOW_US)
    outbox.acknowledged(NOW_US)
    fill(store, 1)
    note(outbox)
    assert next_batch(outbox, NOW_US)
    outbox.acknowledged(NOW_US + 3 * SECOND_US)
    assert outbox.lag_us(NOW_US + 4 * SECOND_US) == 3 * SECOND_US
    assert outbox.lag_us(NOW_US + 64 * SECOND_US) == 0


NARROW = [slot_id(NOW_US - (index << MIN_EXPONENT), MIN_EXPONENT) for index in range(100)]


def pass_on_many(outbox: Outbox, store: Store, buckets: int, slots: int = len(NARROW)) -> int:
    """Note so many slots of another node in each of so many buckets; returns how much was taken in them."""
    entries = [Entry(C.origin, slot, 1) for slot in NARROW[:slots]]
    for index in range(buckets):
        bucket = bucket_of(store, f"team {index}", NOW_US, "team")
        assert bucket.merge(entries, NOW_US) == slots
        outbox.relay(bucket, entries)
    return buckets * slots


def tokens_of(store: Store) -> int:
    return sum(entry.tokens for bucket in store for entry in bucket.entries())


def test_all_that_is_passed_on_arrives_however_much_it_is() -> None:
    store = store_of(A)
    outbox = opened(store)
    taken = pass_on_many(outbox, store, 40)
    assert tokens_of(told(drained(outbox))) == taken


def test_relayed_entries_for_which_there_is_no_room_are_in_a_snapshot_however_old_they_are() -> None:
    store = store_of(A)
    outbox = opened(store)
    old = Entry(C.origin, slot_id(NOW_US - 60 * SECOND_US, MIN_EXPONENT), 5)
    bucket = bucket_of(store, "old", NOW_US)
    bucket.merge([old], NOW_US)
    outbox.relay(bucket, [old])
    relayed = pass_on_many(outbox, store, MAX_RELAYED_BUCKETS, slots=1)
    assert outbox.has_unacknowledged_snapshot
    assert tokens_of(told(drained(outbox))) == relayed + 5


def test_a_bucket_told_in_parts_is_not_cut_short_by_what_is_passed_on() -> None:
    store = store_of(A)
    big = large_bucket(store)
    outbox = opened(store)
    outbox.repair(big.key)
    first = next_batch(outbox, NOW_US)
    assert first is not None
    pass_on_many(outbox, store, 11)
    assert tokens_of(told([first, *drained_later(outbox)])) == tokens_of(store)


def drained_later(outbox: Outbox) -> Iterator[Batch]:
    """Every batch there is; none is acknowledged before the last."""
    while (batch := next_batch(outbox, NOW_US)) is not None:
        yield batch


def test_a_walk_asked_for_while_one_is_under_way_follows_it() -> None:
    store = store_of(A)
    outbox = opened(store)
    back_us = NOW_US + 10 * SECOND_US
    outbox.close(back_us)
    bucket = bucket_of(store, "ann", NOW_US, "team")
    bucket.merge([Entry(C.origin, slot_id(back_us - 5 * SECOND_US, MIN_EXPONENT), 3)], back_us - 5 * SECOND_US)
    open_stream(outbox)
    outbox.snapshot(back_us - 10 * SECOND_US)
    assert tokens_of(told(drained(outbox, back_us))) == 3
    assert outbox.is_all_acknowledged


def test_what_was_passed_on_in_vain_is_in_the_walk_of_the_next_stream() -> None:
    store = store_of(A)
    outbox = opened(store)
    assert pass_on_many(outbox, store, 1) == 100
    assert next_batch(outbox, NOW_US) is not None
    # Silence is noticed only after a while.
    lost_us = NOW_US + 5 * SECOND_US
    outbox.close(lost_us)
    open_stream(outbox)
    assert tokens_of(told(drained(outbox, lost_us))) == 100


def test_a_walk_lost_with_its_stream_is_done_again_though_another_one_had_followed_it() -> None:
    store = store_of(A)
    outbox = opened(store)
    outbox.close(NOW_US)
    received_us, back_us = NOW_US + 5 * SECOND_US, NOW_US + 60 * SECOND_US
    bucket_of(store, "ann", NOW_US).merge([Entry(C.origin, slot_id(received_us, PER_USER.exponent), 3)], received_us)
    open_stream(outbox)
    assert next_batch(outbox, back_us) is not None
    outbox.snapshot(back_us - 10 * SECOND_US)
    assert next_batch(outbox, back_us) is not None
    outbox.close(back_us)
    open_stream(outbox)
    assert tokens_of(told(drained(outbox, back_us))) == 3


def test_a_fixed_window_is_told_to_a_peer_that_was_away_only_if_it_was_written_to_meanwhile() -> None:
    day = WindowLimit(1_000, 86_400 * SECOND_US, Window.FIXED)
    store = store_of(A, rules_with(user=day))
    for name, hits_at_us in (("old", NOW_US), ("new", NOW_US + 61 * SECOND_US)):
        bucket_of(store, name, hits_at_us, rules=rules_with(user=day)).take(1, hits_at_us)
    store.drain_changes()
    outbox = opened(store)
    outbox.close(NOW_US + 60 * SECOND_US)
    open_stream(outbox)
    assert keys_told(drained(outbox, NOW_US + 62 * SECOND_US)) == {key_of("new", rules=rules_with(user=day))}


FIXED_HOUR = WindowLimit(1_000, 3_600 * SECOND_US, Window.FIXED)


@pytest.mark.parametrize(
    "limit",
    [
        PER_USER,
        WindowLimit(1_000, 3_600 * SECOND_US, Window.SLIDING),
        WindowLimit(1_000, 3_600 * SECOND_US, Window.FIXED),
    ],
    ids=["bucket", "sliding", "fixed"],
)
@pytest.mark.parametrize("overtakes", ["urgent", "repair"])
def test_what_was_encoded_before_it_was_overtaken_takes_nothing_back(limit: AnyLimit, overtakes: str) -> None:
    store, heard = (Store(local.origin, lambda _key: limit) for local in (A, B))
    outbox, reader = opened(store), DeltasReader(A.origin, is_proven=True)
    # When all slots are over, but that of the fixed window.
    is_fixed = isinstance(limit, WindowLimit) and limit.window is Window.FIXED
    applied_us = NOW_US if is_fixed else NOW_US + (2 << limit.exponent)
    bucket = store.bucket(b"victim", limit, NOW_US)
    for number in range(3):
        bucket.take(1, NOW_US)
        for other in range(MAX_BATCH_BUCKETS - 1):
            store.bucket(b"%d %d" % (number, other), limit, NOW_US).take(1, NOW_US)
        note(outbox)
    bucket.take(3, NOW_US)
    if overtakes == "urgent":
        outbox.send_urgent(bucket)
    else:
        outbox.repair(bucket.key)

    def counts() -> list[int]:
        found = []
        for batch in drained(outbox):
            apply_all(reader, heard, deltas_of(batch), applied_us)
            found.append(sum(heard.bucket(b"victim", limit, applied_us).taken[A.origin].values()))
        return found

    found = counts()
    assert found == sorted(found)
    assert found[-2:] == [6, 6], "overtaken by one batch at least"
    # Once nothing is overtaken any more, what others say of it is put right again.
    [slot] = bucket.taken[A.origin]
    join(heard, b"victim", None, [Entry(A.origin, slot, 500)], applied_us)
    note(outbox)
    assert counts() == [6]


@pytest.mark.parametrize(
    "limit",
    [PER_USER, WindowLimit(1_000, 3_600 * SECOND_US, Window.SLIDING), FIXED_HOUR],
    ids=["bucket", "sliding", "fixed"],
)
@pytest.mark.parametrize("others", [1, MAX_BATCH_BUCKETS - 1], ids=["in one batch", "in a batch each"])
def test_what_waits_takes_nothing_back_that_a_third_node_told_meanwhile(limit: AnyLimit, others: int) -> None:
    store, heard = (Store(local.origin, lambda _key: limit) for local in (A, B))
    outbox, reader = opened(store), DeltasReader(A.origin, is_proven=True)
    applied_us = NOW_US + (0 if limit is FIXED_HOUR else 2 << limit.exponent)
    bucket = store.bucket(b"victim", limit, NOW_US)
    for number in range(3):
        bucket.take(1, NOW_US)
        for other in range(others):
            store.bucket(b"%d %d" % (number, other), limit, NOW_US).take(1, NOW_US)
        note(outbox, NOW_US + number)
    [slot] = bucket.taken[A.origin]
    # Told by a third node, which has heard all of it.
    heard.join(b"victim", limit, None, [Entry(A.origin, slot, 3)], applied_us)
    for batch in drained(outbox):
        for _ in reader.apply_steps(deltas_of(batch), heard, applied_us):
            assert sum(heard.bucket(b"victim", limit, applied_us).taken[A.origin].values()) == 3
    # Once nothing waits any more, what others say of it is put right.
    join(heard, b"victim", None, [Entry(A.origin, slot, 500)], applied_us)
    bucket.take(1, NOW_US)
    note(outbox, NOW_US + 3)
    for batch in drained(outbox):
        apply_all(reader, heard, deltas_of(batch), applied_us)
    assert sum(heard.bucket(b"victim", limit, applied_us).taken[A.origin].values()) == 4


def test_what_is_told_amid_a_flush_overtakes_what_that_has_encoded_so_far() -> None:
    store, heard = (Store(local.origin, lambda _key: PER_USER) for local in (A, B))
    outbox, reader = opened(store), DeltasReader(A.origin, is_proven=True)
    applied_us = NOW_US + (2 << PER_USER.exponent)
    bucket = store.bucket(b"victim", PER_USER, NOW_US)
    bucket.take(1, NOW_US)
    for other in range(FLUSH_STEP_BUCKETS):
        store.bucket(b"%d" % other, PER_USER, NOW_US).take(1, NOW_US)
    flush = outbox.log.flush_steps(NOW_US, has_peers=True)
    next(flush)
    bucket.take(3, NOW_US)
    outbox.send_urgent(bucket)
    found = []
    for steps in ((), flush):
        done(steps)
        for batch in drained(outbox):
            apply_all(reader, heard, deltas_of(batch), applied_us)
            found.append(sum(heard.bucket(b"victim", PER_USER, applied_us).taken[A.origin].values()))
    assert found == [4, 4]


def test_a_peer_that_is_told_everything_by_another_node_is_told_what_is_recent() -> None:
    store = store_of(A)
    outbox = new_outbox(store)
    take(store, "old", 1, NOW_US)
    note(outbox, has_peers=False)
    now_us = NOW_US + 60 * SECOND_US
    take(store, "recent", 1, now_us - RECENT_CHANGES_US // 2)
    note(outbox, now_us - RECENT_CHANGES_US // 2, has_peers=False)
    # Whoever has taken it tells of it.
    heard = Entry(C.origin, slot_id(now_us, PER_USER.exponent), 3)
    join(store, key_of("recent"), None, [heard], now_us)
    join(store, key_of("heard"), None, [heard], now_us)
    outbox.open(B.origin, compares=True)
    # Nothing until it has said so.
    assert next_batch(outbox, now_us) is None
    assert not outbox.is_all_acknowledged
    assert outbox.has_unacknowledged_snapshot
    outbox.serve_request(now_us, recent=True)
    [batch] = drained(outbox, now_us)
    assert (batch.bucket_keys, batch.entries) == ((key_of("recent"),), 1)
    assert outbox.is_all_acknowledged
    # The other node is gone before it has told everything.
    outbox.serve_request(now_us, recent=False)
    assert keys_told(drained(outbox, now_us)) == {key_of("old"), key_of("recent"), key_of("heard")}
    # To say it again changes nothing.
    outbox.serve_request(now_us, recent=False)
    assert outbox.is_all_acknowledged


def test_what_a_peer_wants_to_be_told_does_not_matter_when_it_was_told_everything_before() -> None:
    store = store_of(A)
    take(store, "old", 1, NOW_US)
    outbox = opened(store)
    outbox.close(NOW_US + 60 * SECOND_US)
    open_stream(outbox)
    assert keys_told(drained(outbox, NOW_US + 61 * SECOND_US)) == set()


def test_who_keeps_up_is_sent_the_same_bytes_and_a_new_id_only_with_its_key() -> None:
    store = store_of(A)
    first = opened(store)
    late = Outbox(store, first.log)
    payloads = []
    for index in range(3):
        if index == 1:
            open_stream(late)
            assert keys_told(drained(late)) == {key_of("ann")}
        take(store, "ann", 1, NOW_US)
        note(first)
        for outbox in (first, late) if index else (first,):
            batch = next_batch(outbox)
            assert batch is not None
            payloads.append(batch.payload)
            assert outbox.acknowledged(NOW_US) is batch
    # The one that came later has not heard of the id before.
    _, second, to_late, third, again = payloads
    assert to_late.endswith(second)
    assert to_late != second
    assert third == again
    reader, heard = DeltasReader(A.origin), store_of(B)
    for payload in (to_late, again):
        apply_all(reader, heard, pb.Deltas.FromString(payload), NOW_US)
    assert tokens_of(heard) == 3


def test_who_has_fallen_back_a_little_is_sent_as_much_as_fits_into_a_batch() -> None:
    store = store_of(A)
    outbox = opened(store)
    for index in range(5):
        fill(store, MAX_BATCH_BUCKETS // 2, NOW_US + index)
        note(outbox, NOW_US + index)
    batches = list(drained(outbox))
    assert [len(batch.bucket_keys) for batch in batches] == [
        MAX_BATCH_BUCKETS,
        MAX_BATCH_BUCKETS,
        MAX_BATCH_BUCKETS // 2,
    ]
    reader, heard = DeltasReader(A.origin), store_of(B)
    for batch in batches:
        apply_all(reader, heard, deltas_of(batch), NOW_US)
    assert tokens_of(heard) == tokens_of(store)


def test_who_falls_behind_what_is_encoded_catches_up_and_then_understands_the_ids() -> None:
    store = store_of(A)
    outbox = opened(store)
    heard, reader = store_of(B), DeltasReader(A.origin)
    for _ in range(MAX_UNACKNOWLEDGED):
        take(store, "ann", 1, NOW_US)
        note(outbox)
        batch = next_batch(outbox)
        assert batch is not None
        apply_all(reader, heard, deltas_of(batch), NOW_US)
    # The peer has heard of the id as ann's; bob gets it in a segment that it is not sent any more.
    fill(store, MAX_KEY_IDS - 1)
    note(outbox)
    for index in range(ENCODED_SEGMENTS):
        take(store, f"user {index}" if index % 2 else "bob", 1, NOW_US)
        note(outbox)
    take(store, "bob", 1, NOW_US)
    note(outbox)
    assert next_batch(outbox) is None
    for _ in range(MAX_UNACKNOWLEDGED):
        outbox.acknowledged(NOW_US)
    for batch in drained(outbox):
        apply_all(reader, heard, deltas_of(batch), NOW_US)
    assert {bucket.key: bucket.taken for bucket in heard} == {bucket.key: bucket.taken for bucket in store}
    assert outbox.is_all_acknowledged


@pytest.mark.parametrize("left", [20, 0])
def test_who_falls_behind_what_the_log_remembers_gets_a_snapshot(left: int) -> None:
    """The log still has so many of 128 segments."""
    store = store_of(A)
    outbox = opened(store)
    for index in range(128):
        take(store, f"user {index}", 1, NOW_US)
        note(outbox)
    later_us = NOW_US + RETENTION_US + 1
    for _ in range((128 - left) // FORGOTTEN_SEGMENTS):
        note(outbox, later_us)
    first, end = outbox.log.end - 128, outbox.log.end
    assert sum(outbox.log.get(number) is not None for number in range(first, end)) == left
    assert not outbox.is_all_acknowledged
    assert outbox.lag_us(later_us) >= RETENTION_US
    assert tokens_of(told(drained(outbox, later_us))) == 128
    assert outbox.is_all_acknowledged


def test_the_log_remembers_no_more_changes_than_a_bound() -> None:
    store = store_of(A)
    log = ChangeLog(store, NOW_US, max_changes=10)
    for _ in range(128):
        take(store, "ann", 1, NOW_US)
        done(log.flush_steps(NOW_US, has_peers=True))
    assert sum(log.get(number) is not None for number in range(log.end)) == 10


def test_looking_at_what_was_told_already_counts_as_work() -> None:
    store = store_of(A)
    outbox = new_outbox(store)
    for _ in range(10 * PIECE_WORK):
        take(store, "ann", 1, NOW_US)
        note(outbox)
    outbox.open(B.origin, compares=True)
    outbox.serve_request(NOW_US, recent=True)
    # The last of them finds that there is nothing more.
    assert [outbox.write(NOW_US) for _ in range(12)] == [True] * 11 + [False]


def test_a_peer_that_is_far_away_is_sent_what_is_encoded_for_all() -> None:
    store = store_of(A)
    log = ChangeLog(store, NOW_US)
    cursor = Cursor(store, log, takes_key_ids=True)
    # 400 ms there and back, with a flush every 2 ms.
    for _ in range(200):
        take(store, "ann", 1, NOW_US)
        done(log.flush_steps(NOW_US, has_peers=True))
    while cursor.has_changes:
        assert cursor.take_encoded() is not None


def test_what_is_kept_encoded_is_bounded_in_bytes() -> None:
    store = store_of(A)
    log = ChangeLog(store, NOW_US)
    for index in range(5 * ENCODED_BYTES // MAX_BATCH_BYTES):
        for letter in b"abcde":
            key = b"%d" % index + bytes([letter]) * 15_000
            store.bucket(key, PER_USER, NOW_US).take(1, NOW_US)
        done(log.flush_steps(NOW_US, has_peers=True))
    segments = [segment for number in range(log.end) if (segment := log.get(number)) is not None]
    encoded_bytes = sum(len(segment.payload or b"") for segment in segments)
    assert ENCODED_BYTES - 2 * MAX_BATCH_BYTES < encoded_bytes <= ENCODED_BYTES


def test_a_take_at_the_instant_of_the_flush_before_is_told_to_who_catches_up() -> None:
    rules = rules_with(user=WindowLimit(100, 60 * SECOND_US, Window.FIXED))
    store, heard = store_of(A, rules), store_of(B, rules)
    outbox = opened(store)
    for _ in range(2):
        assert bucket_of(store, "ann", NOW_US, rules=rules).take(1, NOW_US)
        note(outbox, has_peers=False)
    for batch in drained(outbox):
        apply_deltas(heard, deltas_of(batch), A.origin, NOW_US)
    assert tokens_of(heard) == 2


def test_repairs_are_told_although_there_is_no_room_for_what_is_relayed() -> None:
    store = store_of(A)
    old = take(store, "old", 5, NOW_US - 5 * SECOND_US)
    outbox = opened(store)
    outbox.repair(old.key)
    pass_on_many(outbox, store, MAX_RELAYED_BUCKETS + 1, slots=1)
    assert old.key in keys_told(drained(outbox))


def test_what_was_lost_before_the_peer_asks_for_what_is_recent_is_told_after_it() -> None:
    store = store_of(A)
    old = take(store, "old", 5, NOW_US - 2 * RECENT_CHANGES_US)
    outbox = new_outbox(store)
    note(outbox)
    outbox.open(B.origin, compares=True)
    outbox.snapshot(NOW_US - 3 * RECENT_CHANGES_US)
    outbox.serve_request(NOW_US, recent=True)
    assert old.key in keys_told(drained(outbox))
