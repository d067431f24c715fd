"""What is in a snapshot is what was in the store, and nothing that is damaged is taken for one."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from joined import join

from ratelimit_sidecar.crdt.bucket import NO_BASE, Entry, Origin
from ratelimit_sidecar.crdt.limit import TokenBucketLimit, Window, WindowLimit
from ratelimit_sidecar.crdt.slot import slot_id
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.limiter.key import rule_key
from ratelimit_sidecar.limiter.rules import Consistency, Rule, RuleNode, Rules
from ratelimit_sidecar.persistence.put_off import RECORD_BUCKETS, RECORD_ENTRIES, PutOff
from ratelimit_sidecar.persistence.snapshot_format import (
    END,
    MAGIC,
    REPLICATED,
    BadSnapshot,
    RestoreTarget,
    SnapshotInfo,
    SnapshotSize,
    check,
    records_again,
    restore,
    snapshot,
)
from ratelimit_sidecar.replication.deltas import MAX_KEY_BYTES, DeltasReader, DeltasWriter
from ratelimit_sidecar.replication.parts import MAX_PART_ENTRIES
from ratelimit_sidecar.replication.v1.replication_pb2 import Deltas

NOW_US = 1_790_000_000_000_000
SECOND_US = 1_000_000
BEFORE, AFTER, ELSEWHERE = Origin("here", 1), Origin("here", 2), Origin("there", 9)
LIMITS = {
    "tokens": TokenBucketLimit(10, SECOND_US, 40),
    "month": TokenBucketLimit(1_000, 30 * 86_400 * SECOND_US, 1_000),
    "fixed": WindowLimit(100, 3_600 * SECOND_US, Window.FIXED),
    "sliding": WindowLimit(100, 60 * SECOND_US, Window.SLIDING),
    "alone": TokenBucketLimit(10, SECOND_US, 40),
}
RULES = Rules(
    {
        "api": RuleNode(
            key_only={
                name: RuleNode(
                    Rule(
                        f"api.{name}",
                        limit,
                        consistency=Consistency.LOCAL if name == "alone" else Consistency.EVENTUAL,
                    )
                )
                for name, limit in LIMITS.items()
            }
        )
    }
)


def make_store(origin: Origin, rules: Rules = RULES) -> Store:
    return Store(origin, rules.replicated_limit_of_key, rule_key=rule_key)


def take(store: Store, name: str, value: str, hits: int, now_us: int) -> None:
    """Of 10 so many are given back, when they are less than none."""
    match = RULES.match("api", [(name, value)])
    assert match is not None
    bucket = store.bucket(match.bucket_key, LIMITS[name], now_us, replicated=name != "alone")
    bucket.take(hits if hits > 0 else 10, now_us, always=True)
    if hits < 0:
        bucket.refund(-hits, now_us)


def written(store: Store) -> bytes:
    return b"".join(snapshot(store, lambda: NOW_US, SnapshotSize()))


def read(raw: bytes, store: Store, now_us: int) -> SnapshotInfo:
    file = io.BytesIO(raw)
    checked = check(file)
    to = RestoreTarget(store, checked.origin, RULES.local_limit_of_key)
    for kind, payload in records_again(file):
        for _ in restore(kind, payload, to, now_us):
            pass
    return checked


DAY_US = 86_400 * SECOND_US
UNITS_US = [SECOND_US, 60 * SECOND_US, 3_600 * SECOND_US, DAY_US, 7 * DAY_US, 30 * DAY_US, 365 * DAY_US]
of_units = st.sampled_from(UNITS_US)
capacities = st.integers(1, 1_000)
changed_limits = st.lists(
    st.builds(TokenBucketLimit, capacities, of_units, capacities), min_size=2, max_size=2
) | st.lists(st.builds(WindowLimit, capacities, of_units, st.just(Window.SLIDING)), min_size=2, max_size=2)


@given(changed_limits, st.integers(0, 100 * DAY_US), st.sampled_from([0, SECOND_US // 10, 10 * SECOND_US]))
@example([TokenBucketLimit(100, 30 * DAY_US, 100), TokenBucketLimit(100, 30 * DAY_US, 40)], 0, 0)
@example([TokenBucketLimit(100, 365 * DAY_US, 100), TokenBucketLimit(100, 30 * DAY_US, 100)], 0, 0)
@example([WindowLimit(50, 30 * DAY_US, Window.SLIDING), WindowLimit(50, 7 * DAY_US, Window.SLIDING)], 0, 0)
def test_what_was_taken_under_a_former_limit_is_restored(
    limits: list[TokenBucketLimit | WindowLimit], later_us: int, pause_us: int
) -> None:
    """Its slots may be wider than any that this limit has."""
    former, limit = limits
    taken_us = NOW_US + later_us
    now_us = taken_us + pause_us
    before, after = (Store(origin, lambda _key: limit, rule_key=rule_key) for origin in (BEFORE, AFTER))
    match = RULES.match("api", [("month", "a")])
    assert match is not None
    assert before.bucket(match.bucket_key, former, taken_us).take(former.capacity, taken_us)
    changed = before.bucket(match.bucket_key, limit, now_us)
    read(written(before), after, now_us)
    assert after.bucket(match.bucket_key, limit, now_us).fold(now_us) == changed.fold(now_us)


@pytest.mark.parametrize("replicated", [True, False])
def test_wide_slots_are_restored_whether_a_bucket_is_shared_or_not(replicated: bool) -> None:
    month, week = (WindowLimit(50, days * DAY_US, Window.SLIDING) for days in (30, 7))
    store = Store(AFTER, lambda _key: week)
    entries = [Entry(BEFORE, slot_id(NOW_US, month.exponent), 50)]
    for _ in store.restore(b"k", week, NO_BASE, entries, NOW_US, replicated=replicated):
        pass
    assert [bucket.fold(NOW_US) for bucket in store] == [50]


takes = st.lists(
    st.tuples(
        st.sampled_from(sorted(LIMITS)),
        st.sampled_from("ab"),
        st.integers(-9, -1) | st.integers(1, 30),
        st.integers(0, 90 * SECOND_US),
    ),
    max_size=60,
)


@given(takes, st.integers(0, 20 * SECOND_US) | st.integers(0, 300 * SECOND_US), st.integers(0, 50))
def test_a_store_restored_holds_what_the_one_before_held(
    history: list[tuple[str, str, int, int]], pause_us: int, heard: int
) -> None:
    before, now_us = make_store(BEFORE), NOW_US
    for name, value, hits, gap_us in history:
        now_us += gap_us
        take(before, name, value, hits, now_us)
    if history and heard:
        match = RULES.match("api", [("tokens", "a")])
        assert match is not None
        slot = slot_id(now_us, LIMITS["tokens"].exponent)
        join(before, match.bucket_key, None, [Entry(ELSEWHERE, slot, heard)], now_us)
    after = make_store(AFTER)
    checked = read(written(before), after, now_us + pause_us)
    assert checked == SnapshotInfo(BEFORE, NOW_US, len(before))
    then_us = now_us + pause_us
    for bucket in before:
        restored = after.get(bucket.key)
        bucket.seal(then_us)
        if restored is None:
            # All of it is behind the horizon: it is what an absent bucket holds.
            assert bucket.fold(then_us) == 0
        else:
            assert restored.fold(then_us) == bucket.fold(then_us)
            assert restored.is_replicated == bucket.is_replicated
    assert after.drain_changes() == [], "what an earlier life took is not told again as this one's"


@pytest.mark.parametrize(("owed", "pause_s"), [(0, 10), (0, 50), (180, 0), (180, 65), (180, 70), (180, 150)])
def test_however_long_nothing_ran_debt_is_repaid_and_refill_comes_once(owed: int, pause_s: int) -> None:
    """All of its slots are then older than the horizon, and in nobody's base."""
    minute = TokenBucketLimit(60, 60 * SECOND_US, 60)
    before, after = (Store(origin, lambda _key: minute) for origin in (BEFORE, AFTER))
    bucket = before.bucket(b"k", minute, NOW_US - 300 * SECOND_US)
    bucket.take(60, NOW_US - 300 * SECOND_US)
    for ago_s in range(300, 0, -1):
        bucket.take(1, NOW_US - ago_s * SECOND_US)
    bucket.take(owed, NOW_US, always=True)
    then_us = NOW_US + pause_s * SECOND_US
    read(written(before), after, then_us)
    assert after.bucket(b"k", minute, then_us).fold(then_us) == bucket.fold(then_us) > 0


def test_parts_of_a_bucket_are_joined_as_one() -> None:
    """Of entries that are written apart each part by itself would be no debt."""
    before, after = make_store(BEFORE), make_store(AFTER)
    take(before, "month", "a", 1, NOW_US)
    [bucket] = before
    width_us = 1 << bucket.limit.exponent
    slots = [slot_id(NOW_US - age * width_us, bucket.limit.exponent) for age in range(40)]
    before.journal.peers = {Origin(f"peer {number}", 1) for number in range(60)}
    for origin in before.journal.peers:
        bucket.merge([Entry(origin, slot, 4) for slot in slots], NOW_US)
    assert bucket.slots > 3 * RECORD_ENTRIES
    then_us = NOW_US + 70 * width_us
    read(written(before), after, then_us)
    [restored] = after
    assert restored.fold(then_us) == bucket.fold(then_us) > 0


def test_a_snapshot_of_many_buckets_has_many_records_and_gives_others_their_turn() -> None:
    store = make_store(BEFORE)
    for number in range(3 * RECORD_BUCKETS):
        take(store, "month", str(number), 1, NOW_US)
    counted = SnapshotSize()
    pieces = list(snapshot(store, lambda: NOW_US, counted))
    assert sum(map(len, pieces)) == counted.bytes
    assert counted.buckets == 3 * RECORD_BUCKETS
    assert len(pieces) > 90
    after = make_store(AFTER)
    read(b"".join(pieces), after, NOW_US)
    assert len(after) == 3 * RECORD_BUCKETS


def test_of_each_limit_what_is_nearly_used_up_is_written_first_and_counted_once() -> None:
    store = make_store(BEFORE)
    for number in range(3 * RECORD_BUCKETS):
        take(store, "month", str(number), 1, NOW_US)
        take(store, "tokens", str(number), 35, NOW_US)
    for bucket in [bucket for bucket in store if bucket.limit == LIMITS["month"]][-3:]:
        bucket.take(bucket.limit.capacity, NOW_US, always=True)
    counted = SnapshotSize()
    _magic, _header, first, *_ = filter(None, snapshot(store, lambda: NOW_US, counted))
    keys = [delta.key for delta in Deltas.FromString(first[9:]).buckets]
    used_up = [bucket.key for bucket in store if bucket.remaining * 8 <= bucket.limit.capacity]
    assert len(used_up) > 3 * RECORD_BUCKETS
    assert keys == used_up[:RECORD_BUCKETS]
    assert counted.buckets == len(store)


def test_a_bucket_that_many_replicas_took_from_gives_others_their_turn_too() -> None:
    store = make_store(BEFORE)
    take(store, "month", "a", 1, NOW_US)
    [bucket] = store
    width_us = 1 << bucket.limit.exponent
    slots = [slot_id(NOW_US - age * width_us, bucket.limit.exponent) for age in range(40)]
    store.journal.peers = {Origin(f"peer {number}", 1) for number in range(250)}
    for origin in store.journal.peers:
        bucket.merge([Entry(origin, slot, 1) for slot in slots], NOW_US)
    pieces = list(snapshot(store, lambda: NOW_US, SnapshotSize()))
    assert len(pieces) > 250 * 40 / MAX_PART_ENTRIES / 2
    after = make_store(AFTER)
    read(b"".join(pieces), after, NOW_US)
    [restored] = after
    assert restored.taken == bucket.taken


def used_by(nodes: int, lives: int, buckets: int) -> Store:
    """A store of buckets from which each life of each node took one token in this hour."""
    store = make_store(BEFORE)
    slot = slot_id(NOW_US - NOW_US % LIMITS["fixed"].period_us, LIMITS["fixed"].exponent)
    for number in range(buckets):
        take(store, "fixed", str(number), 1, NOW_US)
    for bucket in store:
        for life in range(1, lives + 1):
            origins = [Origin(f"node {number}", life) for number in range(nodes)]
            store.journal.peers = set(origins)
            bucket.merge([Entry(origin, slot, 1) for origin in origins], NOW_US)
    store.journal.peers = set()
    return store


@settings(deadline=None, max_examples=5)
@given(st.sampled_from([1, 40, 256]), st.integers(1, 30), st.sampled_from([1, 2, 300]))
@example(40, 26, 1)
def test_however_many_lives_of_nodes_have_used_a_bucket_all_of_it_is_read_again(
    nodes: int, lives: int, buckets: int
) -> None:
    lives, buckets = (lives, min(buckets, 2)) if nodes > 1 else (1, buckets)
    before, after = used_by(nodes, lives, buckets), make_store(AFTER)
    raw = written(before)
    read(raw, after, NOW_US)
    assert len(after) == buckets
    for bucket in before:
        restored = after.get(bucket.key)
        assert restored is not None
        assert restored.taken == bucket.taken
    # Another version may read a record as what a peer sends at once.
    for kind, payload in records_again(io.BytesIO(raw)):
        if kind == REPLICATED:
            list(DeltasReader(BEFORE).apply_steps(Deltas.FromString(payload), make_store(AFTER), NOW_US))


def test_a_record_that_names_more_origins_than_a_peer_may_is_read() -> None:
    store = used_by(40, 26, 1)
    [bucket] = store
    writer = DeltasWriter(BEFORE)
    writer.add(bucket, None, list(bucket.entries()))
    after = make_store(AFTER)
    to = RestoreTarget(after, BEFORE, RULES.local_limit_of_key)
    for kind, payload in ((REPLICATED, writer.payload()), (END, b"")):
        list(restore(kind, payload, to, NOW_US))
    assert [restored.taken for restored in after] == [bucket.taken]


def test_once_it_is_read_a_peer_can_name_no_more_origins_than_before() -> None:
    after = make_store(AFTER)
    read(written(used_by(40, 26, 1)), after, NOW_US)
    [bucket] = after
    [slot] = {entry.slot for entry in bucket.entries()}
    assert bucket.merge([Entry(Origin("invented", 1), slot, 1)], NOW_US) == 0


def test_a_key_that_is_too_long_for_peers_is_read_again() -> None:
    before, after = (Store(origin, lambda _key: LIMITS["fixed"]) for origin in (BEFORE, AFTER))
    for key in (b"x" * (MAX_KEY_BYTES + 1), b"a"):
        before.bucket(key, LIMITS["fixed"], NOW_US).take(1, NOW_US)
    read(written(before), after, NOW_US)
    assert {bucket.key for bucket in after} == {bucket.key for bucket in before}


@pytest.fixture(scope="module")
def small() -> bytes:
    store = make_store(BEFORE)
    for name in LIMITS:
        take(store, name, "a", 3, NOW_US)
    return written(store)


def test_a_snapshot_that_is_cut_anywhere_is_refused(small: bytes) -> None:
    for length in range(len(small)):
        with pytest.raises(BadSnapshot, match=r"cut short|begins with other bytes"):
            check(io.BytesIO(small[:length]))


def test_a_snapshot_with_any_byte_changed_is_refused(small: bytes) -> None:
    for at in range(len(small)):
        damaged = bytearray(small)
        damaged[at] ^= 0x55
        with pytest.raises(BadSnapshot):
            check(io.BytesIO(bytes(damaged)))


def test_what_goes_on_after_the_end_is_refused(small: bytes) -> None:
    with pytest.raises(BadSnapshot, match="goes on after its end"):
        check(io.BytesIO(small + b"\0"))


def test_a_newer_format_is_refused_by_its_number(small: bytes) -> None:
    newer = MAGIC[:-1] + b"\x02" + small[len(MAGIC) :]
    with pytest.raises(BadSnapshot, match=r"is of format 2; this version reads 1"):
        check(io.BytesIO(newer))


@given(st.binary(max_size=200))
def test_any_bytes_are_none(raw: bytes) -> None:
    with pytest.raises(BadSnapshot):
        check(io.BytesIO(MAGIC + raw))


def test_of_what_has_no_rule_any_more_nothing_is_kept(small: bytes) -> None:
    after = make_store(AFTER, Rules({}))
    file = io.BytesIO(small)
    to = RestoreTarget(after, check(file).origin, Rules({}).local_limit_of_key)
    for kind, payload in records_again(file):
        assert sum(_all(restore(kind, payload, to, NOW_US))) >= 0
    assert len(after) == 0


def test_what_is_put_off_is_bounded() -> None:
    for most_bytes, kept in ((1_000, len(LIMITS)), (0, 0)):
        put_off = PutOff(most_bytes)
        for name in LIMITS:
            put_off.add(
                REPLICATED, name.encode(), None, [Entry(BEFORE, slot_id(NOW_US, 20), 1)], NOW_US, has_rule=False
            )
        put_off.end()
        assert put_off.without_rule == kept
        assert put_off.left_out == len(LIMITS) - kept


def test_a_slot_that_began_long_ago_and_may_still_count_is_put_off() -> None:
    put_off = PutOff()
    month = slot_id(NOW_US - 40 * 86_400 * SECOND_US, 42)
    put_off.add(REPLICATED, b"key", None, [Entry(BEFORE, month, 1)], NOW_US, has_rule=False)
    assert put_off.without_rule == 1


def _all(pieces: Iterator[int]) -> list[int]:
    return list(pieces)
