"""Buckets' state on the wire."""

from __future__ import annotations

import gc
from contextlib import suppress

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from replication.builders import (
    ELSEWHERE,
    NOW_US,
    PER_TEAM,
    PER_USER,
    RULES,
    apply_all,
    apply_deltas,
    key_of,
    node,
    store_of,
    take,
)

from ratelimit_sidecar.crdt.bucket import Base, Bucket, Entry, Origin
from ratelimit_sidecar.crdt.journal import Journal
from ratelimit_sidecar.crdt.limit import MAX_EXPONENT, MAX_PERIOD_US, MIN_EXPONENT, TokenBucketLimit
from ratelimit_sidecar.crdt.slot import REFUND, slot_id
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.crdt.token_bucket import TokenBucket
from ratelimit_sidecar.replication.deltas import (
    MAX_FRAME_BUCKETS,
    MAX_FRAME_ENTRIES,
    MAX_FRAME_ORIGINS,
    MAX_KEY_BYTES,
    MAX_SLOT_TOKENS,
    MAX_TIME_US,
    DeltasReader,
    DeltasWriter,
)
from ratelimit_sidecar.replication.key_ids import MAX_KEY_WITH_ID_BYTES, KeyIdsGiven
from ratelimit_sidecar.replication.v1 import replication_pb2 as pb
from ratelimit_sidecar.replication.wire import MAX_FRAME_BYTES, ProtocolError, Reason

A, B = node("a").origin, node("b").origin
KEY = key_of("ann")

origins = st.builds(Origin, st.sampled_from(["a", "c", "é"]), st.integers(1, 2**64 - 1)) | st.just(A)
slots = st.builds(
    lambda time_us, exponent, refund: slot_id(time_us, exponent) | refund,
    st.integers(0, MAX_TIME_US - 1),
    st.integers(MIN_EXPONENT, MAX_EXPONENT),
    st.sampled_from([0, REFUND]),
)
entries = st.lists(
    st.builds(Entry, origins, slots, st.integers(1, MAX_SLOT_TOKENS)),
    max_size=40,
    unique_by=lambda entry: (entry.origin, entry.slot),
)


class Recorder(Store):
    """Keeps what it is told, in place of joining it."""

    def __init__(self, limit: TokenBucketLimit | None = PER_USER) -> None:
        super().__init__(B, lambda key: limit)
        self.told: list[tuple[bytes, Base | None, list[Entry]]] = []

    def join(self, key, limit, base, entries, now_us, *, corrector=None):  # type: ignore[no-untyped-def]
        self.told.append((key, base, list(entries)))
        return len(self.told[-1][2])


def sent(bucket: Bucket, base: Base | None, entries: list[Entry]) -> pb.Deltas:
    writer = DeltasWriter(A)
    writer.add(bucket, base, entries)
    assert writer.entries == len(entries)
    return pb.Deltas.FromString(writer.payload())


def one_run(**fields: object) -> pb.Deltas:
    run = pb.SlotRun(**{"exponent": MIN_EXPONENT, "slots": [1], "tokens": [1], **fields})
    return pb.Deltas(buckets=[pb.BucketDelta(key=KEY, runs=[run])])


def assert_refused(deltas: pb.Deltas, reason: Reason, store: Store | None = None) -> None:
    with pytest.raises(ProtocolError) as caught:
        apply_deltas(store or store_of(node("b")), deltas, A, NOW_US)
    assert caught.value.reason is reason


@pytest.mark.interpreted
@given(entries)
def test_entries_arrive_as_they_were_sent(sent_entries: list[Entry]) -> None:
    store = Recorder()
    applied = apply_deltas(store, sent(TokenBucket(KEY, PER_USER, A, NOW_US), None, sent_entries), A, NOW_US)
    [(key, base, received)] = store.told
    assert (key, base) == (KEY, None)
    assert sorted(received) == sorted(sent_entries)
    assert applied.entries == len(sent_entries)


@pytest.mark.interpreted
@given(st.integers(0, 2**60), st.integers(0, MAX_TIME_US))
def test_a_base_arrives_as_it_was_sent_between_nodes_with_one_limit(deficit: int, boundary_us: int) -> None:
    store = Recorder()
    base = Base(boundary_us, deficit)
    apply_deltas(store, sent(TokenBucket(KEY, PER_USER, A, NOW_US), base, []), A, NOW_US)
    assert store.told == [(KEY, base, [])]


@pytest.mark.interpreted
def test_what_is_given_back_is_told_beside_what_is_taken_so_that_an_older_node_passes_over_it() -> None:
    bucket = TokenBucket(KEY, PER_USER, A, NOW_US)
    bucket.take(5, NOW_US)
    bucket.refund(3, NOW_US)
    [delta] = sent(bucket, None, list(bucket.entries())).buckets
    assert [list(run.tokens) for run in delta.runs] == [[5]]
    assert [list(run.tokens) for run in delta.refunds] == [[3]]


def test_what_is_given_back_is_checked_like_what_is_taken() -> None:
    run = pb.SlotRun(exponent=MIN_EXPONENT, slots=[1], tokens=[MAX_SLOT_TOKENS + 1])
    assert_refused(pb.Deltas(buckets=[pb.BucketDelta(key=KEY, refunds=[run])]), Reason.BAD_SLOT)


@pytest.mark.interpreted
def test_the_largest_deficit_of_the_largest_limit_can_be_sent() -> None:
    limit = TokenBucketLimit(1, MAX_PERIOD_US, 2**40, max_debt=1024)
    store = Recorder(limit)
    base = Base(NOW_US, limit.debt_ceiling)
    apply_deltas(store, sent(TokenBucket(KEY, limit, A, NOW_US), base, []), A, NOW_US)
    assert store.told == [(KEY, base, [])]


@pytest.mark.interpreted
def test_a_limit_whose_horizon_reaches_back_before_the_epoch_can_be_told_of_once_it_has_changed() -> None:
    year_us = 365 * 86_400_000_000
    bucket = TokenBucket(KEY, TokenBucketLimit(1, year_us, 100), A, NOW_US)
    longer = TokenBucketLimit(1, year_us, 1_000)
    bucket.set_limit(longer, NOW_US)
    assert bucket.take(3, NOW_US)
    entries = list(bucket.entries())
    store = Recorder(longer)
    apply_deltas(store, sent(bucket, bucket.base_to_send, entries), A, NOW_US)
    assert store.told == [(KEY, bucket.base_to_send, entries)]


@pytest.mark.interpreted
@given(st.integers(1, 10**7), st.integers(1, 10**7), st.integers(0, 10**12))
def test_a_base_is_rescaled_to_the_receivers_limit_rounding_up(
    their_period: int, our_period: int, deficit: int
) -> None:
    # A prime number of tokens, so that no period is reduced.
    theirs, ours = (TokenBucketLimit(10_000_019, period_us, 100) for period_us in (their_period, our_period))
    store = Recorder(ours)
    apply_deltas(store, sent(TokenBucket(KEY, theirs, A, NOW_US), Base(NOW_US, deficit), []), A, NOW_US)
    [(_, base, _)] = store.told
    assert base is not None
    assert 0 <= base.deficit * their_period - deficit * our_period < their_period


def test_a_run_of_consecutive_slots_takes_a_byte_a_slot_beside_the_counts() -> None:
    first = NOW_US >> MIN_EXPONENT
    history = [Entry(A, (first + index) << MIN_EXPONENT | MIN_EXPONENT, 9) for index in range(600)]
    bucket = TokenBucket(KEY, PER_TEAM, A, NOW_US)
    added = sent(bucket, None, history).ByteSize() - sent(bucket, None, history[:101]).ByteSize()
    assert added <= 2 * 499 + 2


def test_a_typical_delta_is_less_than_twenty_bytes_beside_its_key() -> None:
    store = store_of(node("a"))
    bucket = take(store, "ann", 3, NOW_US)
    delta = sent(bucket, None, list(bucket.own_entries(bucket.drain_changed_slots())))
    assert delta.ByteSize() - len(KEY) < 20


@pytest.mark.interpreted
def test_a_count_larger_than_any_real_one_is_sent_as_the_largest() -> None:
    store = Recorder()
    huge = Entry(A, slot_id(NOW_US, MIN_EXPONENT), MAX_SLOT_TOKENS * 2)
    apply_deltas(store, sent(TokenBucket(KEY, PER_USER, A, NOW_US), None, [huge]), A, NOW_US)
    assert store.told[0][2] == [huge._replace(tokens=MAX_SLOT_TOKENS)]


def test_joining_a_peers_deltas_makes_the_bucket_known_here_too() -> None:
    ours, theirs = store_of(node("b")), store_of(node("a"))
    bucket = take(theirs, "ann", 400, NOW_US)
    apply_deltas(ours, sent(bucket, None, list(bucket.entries())), A, NOW_US)
    known = ours.get(KEY)
    assert known is not None
    assert known.remaining == 600


@pytest.mark.parametrize(
    "key", [key_of("ann", "nobody", ELSEWHERE), key_of("ann", "pod")], ids=["no rule", "a local rule"]
)
def test_a_bucket_that_no_replicated_rule_knows_is_left_out_and_counted(key: bytes) -> None:
    store = store_of(node("b"))
    base = pb.Base(boundary_us=NOW_US, tokens=1, period_us=1)
    deltas = pb.Deltas(buckets=[pb.BucketDelta(key=key, base=base), *one_run().buckets])
    assert apply_deltas(store, deltas, A, NOW_US).unknown_keys == 1
    assert [bucket.key for bucket in store] == [KEY]


@pytest.mark.parametrize(
    "key",
    [b"", b"\x05", KEY[:-1], KEY + b"\x00", KEY + b"\x09\x00\x00", KEY[:-3] + b"\xff" * 3, bytes(MAX_KEY_BYTES + 1)],
    ids=["empty", "cut short", "a byte short", "a byte long", "unknown kind", "not UTF-8", "too long"],
)
def test_what_is_no_buckets_name_is_refused(key: bytes) -> None:
    assert_refused(pb.Deltas(buckets=[pb.BucketDelta(key=key)]), Reason.BAD_KEY)


@pytest.mark.parametrize(
    "fields",
    [
        {"exponent": MIN_EXPONENT - 1},
        {"exponent": MAX_EXPONENT + 1},
        {"slots": [5, 0], "tokens": [1, 1]},
        {"slots": [], "tokens": []},
        {"slots": [1, 2]},
        {"tokens": [1, 2]},
        {"tokens": [0]},
        {"tokens": [MAX_SLOT_TOKENS + 1]},
        {"slots": [(MAX_TIME_US >> MIN_EXPONENT) + 1]},
        {"slots": [1, 2**64 - 1], "tokens": [1, 1]},
    ],
    ids=[
        "too narrow",
        "too wide",
        "no slot at all",
        "a slot twice",
        "a slot without a count",
        "a count without a slot",
        "no tokens",
        "too many tokens",
        "after the end of time",
        "far after it",
    ],
)
def test_a_slot_out_of_bounds_is_refused(fields: dict[str, object]) -> None:
    assert_refused(one_run(**fields), Reason.BAD_SLOT)


def test_a_slot_of_an_origin_that_is_not_listed_is_refused() -> None:
    assert_refused(one_run(origin=1), Reason.MALFORMED)


@pytest.mark.parametrize("origin", [pb.Origin(node="", incarnation=1), pb.Origin(node="c")], ids=["no node", "no life"])
def test_an_origin_must_name_a_node_and_its_life(origin: pb.Origin) -> None:
    assert_refused(pb.Deltas(origins=[origin]), Reason.MALFORMED)


@pytest.mark.parametrize(
    "base",
    [
        pb.Base(boundary_us=1, tokens=1),
        pb.Base(boundary_us=1, remainder=5, period_us=5),
        pb.Base(boundary_us=1, period_us=MAX_PERIOD_US + 1),
        pb.Base(boundary_us=MAX_TIME_US + 1, period_us=1),
    ],
    ids=["no period", "a remainder of a period", "too long a period", "after the end of time"],
)
def test_a_base_out_of_bounds_is_refused(base: pb.Base) -> None:
    assert_refused(pb.Deltas(buckets=[pb.BucketDelta(key=KEY, base=base)]), Reason.BAD_BASE)


@given(st.binary(max_size=200))
def test_whatever_parses_is_applied_or_refused(raw: bytes) -> None:
    with suppress(DecodeError, ProtocolError):
        apply_deltas(store_of(node("b")), pb.Deltas.FromString(raw), A, NOW_US)


def test_the_largest_key_fits_into_a_frame() -> None:
    assert MAX_KEY_BYTES < MAX_FRAME_BYTES // 2


@pytest.mark.parametrize(
    "limit",
    [
        TokenBucketLimit(1_000, 1_000_000, 1_000),
        TokenBucketLimit(10, 1_000_000, 100),
        TokenBucketLimit(20, 60_000_000, 20),
    ],
)
def test_a_bucket_under_steady_load_from_three_regions_encodes_to_less_than_a_kilobyte(limit: TokenBucketLimit) -> None:
    regions = [Origin(node, 2**63 + 1) for node in ("us-east-1-a", "eu-west-2-a", "ap-southeast-1-a")]
    buckets = [TokenBucket(KEY, limit, region, NOW_US, Journal()) for region in regions]
    now_us = NOW_US
    while now_us < NOW_US + 2 * limit.horizon_us:
        now_us += limit.period_us // limit.tokens + 1
        for bucket in buckets:
            bucket.take(1, now_us)
    told, *others = buckets
    for other in others:
        told.merge(list(other.entries()), now_us)
    told.seal(now_us)
    writer = DeltasWriter(regions[0])
    writer.add(told, told.base_to_send, list(told.entries()))
    assert len(writer.payload()) < 1_000


def test_a_key_id_means_another_limit_once_there_are_other_rules() -> None:
    store = store_of(node("b"))
    key_ids, reader = KeyIdsGiven(), DeltasReader(A)
    bucket = TokenBucket(KEY, PER_USER, A, NOW_US)
    for tokens, rules, unknown in ((1, RULES, 0), (2, ELSEWHERE, 1), (3, RULES, 0)):
        store.limit_of_key = rules.replicated_limit_of_key
        writer = DeltasWriter(A, key_ids)
        writer.add(bucket, None, [Entry(A, slot_id(NOW_US, PER_USER.exponent), tokens)])
        assert bool(writer.deltas.buckets[0].key) is (tokens == 1)
        assert apply_all(reader, store, writer.deltas, NOW_US).unknown_keys == unknown
    held = store.get(KEY)
    assert held is not None
    assert [entry.tokens for entry in held.entries()] == [3]


@pytest.mark.parametrize(
    "deltas",
    [
        one_run(slots=[1] * (MAX_FRAME_ENTRIES + 1), tokens=[1] * (MAX_FRAME_ENTRIES + 1)),
        pb.Deltas(buckets=[pb.BucketDelta(key=KEY)] * (MAX_FRAME_BUCKETS + 1)),
        pb.Deltas(origins=[pb.Origin(node="x", incarnation=1)] * (MAX_FRAME_ORIGINS + 1)),
    ],
    ids=["slots", "buckets", "origins"],
)
def test_a_frame_that_would_take_long_to_apply_is_too_large(deltas: pb.Deltas) -> None:
    with pytest.raises(ProtocolError) as caught:
        apply_deltas(store_of(node("b")), deltas, A, NOW_US)
    assert caught.value.reason is Reason.TOO_LARGE


def held(store: Store, bucket: Bucket) -> list[Entry]:
    """What a store holds of it."""
    found = store.get(bucket.key)
    return [] if found is None else list(found.entries())


@pytest.mark.parametrize(
    ("base", "bad"),
    [
        (Base(NOW_US, PER_USER.period_us << 64), []),
        (Base(NOW_US, 1), [Entry(A, 1 << 90, 1)]),
        (Base(NOW_US, 1), [Entry(A, slot_id(NOW_US, MIN_EXPONENT), -1), Entry(A, slot_id(0, MIN_EXPONENT), 1)]),
        (None, [Entry(Origin("\ud800", 1), slot_id(NOW_US, MIN_EXPONENT), 1)]),
    ],
    ids=["a deficit", "a slot", "a count", "a name"],
)
def test_what_does_not_fit_into_the_protocol_is_left_out_and_what_follows_is_told(
    base: Base | None, bad: list[Entry]
) -> None:
    store, reader, journal, key_ids = store_of(node("b")), DeltasReader(A), Journal(), KeyIdsGiven()
    buckets = [TokenBucket(key_of(value), PER_USER, A, NOW_US, journal) for value in ("ann", "bob")]
    good = Entry(Origin("c", 1), slot_id(NOW_US, PER_USER.exponent), 3)
    writer = DeltasWriter(A, key_ids)
    writer.add(buckets[0], base, bad)
    writer.add(buckets[1], None, [good])
    apply_all(reader, store, pb.Deltas.FromString(writer.payload()), NOW_US)
    assert [held(store, bucket) for bucket in buckets] == [[], [good]]
    assert journal.left_out == 1
    assert journal.left_out_error
    # The id that was given with it holds.
    writer = DeltasWriter(A, key_ids)
    writer.add(buckets[0], None, [good])
    apply_all(reader, store, pb.Deltas.FromString(writer.payload()), NOW_US)
    assert [held(store, bucket) for bucket in buckets] == [[good], [good]]


def test_a_long_key_is_sent_in_full_each_time() -> None:
    writer = DeltasWriter(A, KeyIdsGiven())
    bucket = TokenBucket(b"x" * (MAX_KEY_WITH_ID_BYTES + 1), PER_USER, A, NOW_US)
    for _ in range(2):
        writer.add(bucket, None, [Entry(A, slot_id(NOW_US, PER_USER.exponent), 1)])
    assert [(delta.key, delta.number) for delta in writer.deltas.buckets] == [(bucket.key, 0)] * 2


def test_what_has_to_be_known_of_a_payload_is_nothing_to_the_cycle_collector() -> None:
    """Of a hundred thousand keys in all segments it would look at all at once."""
    store, key_ids = store_of(node("a")), KeyIdsGiven()
    buckets = [take(store, f"user{number}", 1, NOW_US) for number in range(100)]
    for _ in range(2):
        writer = DeltasWriter(A, key_ids)
        for bucket in buckets:
            writer.add(bucket, None, list(bucket.entries()))
    use = writer.key_use()
    assert list(use.keys.values()) == [bucket.key for bucket in buckets]
    assert not gc.is_tracked(use.keys)
