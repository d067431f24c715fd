"""The store keeps active buckets only, and forgets nothing that anybody could miss."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from joined import join

from ratelimit_sidecar.crdt.bucket import NO_BASE, SLOTS_A_LOOK, Base, Entry, Origin
from ratelimit_sidecar.crdt.limit import HORIZON_SLOTS, AnyLimit, TokenBucketLimit, Window, WindowLimit
from ratelimit_sidecar.crdt.slot import slot_id
from ratelimit_sidecar.crdt.store import FIRST_SHIFT, MAX_SHIFT, SAMPLE, Store, StoreFull

NOW_US = 1_790_000_000_000_000
HERE, THERE = Origin("here", 1), Origin("there", 1)
LIMIT = TokenBucketLimit(tokens=10, period_us=1_000_000, capacity=10)


def make_store() -> Store:
    return Store(HERE, lambda key: LIMIT if key.startswith(b"known") else None)


@given(st.lists(st.tuples(st.integers(0, 20_000_000), st.integers(1, 4), st.integers(0, 3)), max_size=80))
def test_sweeping_never_changes_a_decision(history) -> None:
    swept, kept = make_store(), make_store()
    now_us = NOW_US
    for gap_us, hits, most in history:
        now_us += gap_us
        swept.drain_changes()
        swept.sweep(now_us, most)
        decisions = {store.bucket(b"known", LIMIT, now_us).take(hits, now_us) for store in (swept, kept)}
        assert len(decisions) == 1


def test_a_bucket_is_dropped_once_it_is_full_and_its_slots_are_behind_the_horizon() -> None:
    store = make_store()
    store.bucket(b"known", LIMIT, NOW_US).take(1, NOW_US)
    store.drain_changes()
    assert store.sweep(NOW_US + 1_000_000, max_buckets=10) == 1
    assert (len(store), store.removals) == (1, 0)
    assert store.sweep(NOW_US + 2 * LIMIT.horizon_us, max_buckets=10) == 1
    assert (len(store), store.removals) == (0, 1)


def test_a_bucket_that_was_dropped_holds_nothing_for_plans_that_know_it() -> None:
    store = make_store()
    bucket = store.bucket(b"known", LIMIT, NOW_US)
    bucket.take(1, NOW_US)
    bucket.merge([Entry(THERE, slot_id(NOW_US, LIMIT.exponent), 1)], NOW_US)
    store.drain_changes()
    store.sweep(NOW_US + 2 * LIMIT.horizon_us, max_buckets=10)
    assert (len(store), list(bucket.entries())) == (0, [])


HOURLY = TokenBucketLimit(tokens=1_000, period_us=3_600_000_000, capacity=1_000)
SLOT_US = 1 << HOURLY.exponent


def test_what_was_written_down_finds_the_room_that_it_had_in_whatever_order_it_comes() -> None:
    """One rule fills 8/9 of the room, another the rest, and both have used up what they have."""

    def store() -> Store:
        return Store(HERE, lambda _key: HOURLY, max_buckets=900, rule_key=lambda key: key[:1])

    before, after = store(), store()
    for rule in (b"a", b"b"):
        for number in range(900):
            with suppress(StoreFull):
                assert before.bucket(b"%b%d" % (rule, number), HOURLY, NOW_US).take(1_000, NOW_US)
    for bucket in sorted(before, key=lambda bucket: bucket.key[:0:-1]):
        for _ in after.restore(bucket.key, HOURLY, NO_BASE, list(bucket.entries()), NOW_US):
            pass
    assert {bucket.key for bucket in after} == {bucket.key for bucket in before}


def hourly_store(keys: int) -> Store:
    return Store(HERE, lambda _key: HOURLY, max_buckets=keys + keys // 8)


def sweep_all(store: Store, now_us: int) -> None:
    left = len(store)
    while left > 0:
        left -= store.sweep(now_us, left)


def use(store: Store, keys: int, slots: int, now_us: int = NOW_US, *, replicated: bool = True) -> int:
    """Take from each bucket in each of so many slots, with a pass of sweeping after each; returns the time."""
    for _ in range(slots):
        for number in range(keys):
            assert store.bucket(b"%d" % number, HOURLY, now_us, replicated=replicated).take(1, now_us)
        store.drain_changes()
        now_us += SLOT_US
        sweep_all(store, now_us)
    return now_us


@pytest.mark.parametrize("replicated", [True, False])
def test_keys_that_are_used_in_each_of_their_slots_hold_no_more_of_them_than_there_may_be(replicated: bool) -> None:
    store = hourly_store(100)
    use(store, 100, 80, replicated=replicated)
    held = sum(sum(1 for _ in bucket.entries()) for bucket in store)
    assert len(store) == 100
    assert held <= store.most_slots
    assert store.journal.horizon_shift


def test_when_fewer_keys_are_used_the_horizon_is_whole_again() -> None:
    store = hourly_store(100)
    now_us = use(store, 100, 80)
    use(store, 1, 80, now_us)
    assert (store.journal.horizon_shift, len(store)) == (0, 1)
    assert max(sum(1 for _ in bucket.entries()) for bucket in store) >= HORIZON_SLOTS


def test_many_slots_are_noticed_long_before_a_pass_is_over_and_a_bucket_that_is_written_to_is_sealed_at_once() -> None:
    keys = 2_000
    store = hourly_store(keys)
    now_us = NOW_US
    for _ in range(10):
        for number in range(keys):
            store.bucket(b"%d" % number, HOURLY, now_us).take(1, now_us)
        now_us += SLOT_US
    store.drain_changes()
    store.sweep(now_us, keys // SAMPLE - 1)
    assert store.journal.horizon_shift == 0
    for _ in range(10):
        store.sweep(now_us, 10)
    assert store.journal.horizon_shift == FIRST_SHIFT, "it is halved once a pass"
    for number in range(keys):
        bucket = store.bucket(b"%d" % number, HOURLY, now_us)
        bucket.take(1, now_us)
        # 8 that count, and batches of 2 that do not.
        assert bucket.slots <= 10
    for number in range(keys):
        entries = [Entry(THERE, slot_id(now_us - age * SLOT_US, HOURLY.exponent), 1) for age in range(60)]
        store.join(b"%d" % number, HOURLY, None, entries, now_us)
    assert max(bucket.slots for bucket in store) <= 20


@pytest.mark.parametrize("is_in_use", [False, True])
def test_state_that_is_read_of_a_bucket_counts_though_the_horizon_is_shortened(is_in_use: bool) -> None:
    slots = [slot_id(NOW_US - age * SLOT_US, HOURLY.exponent) for age in range(1, 40)]
    left = []
    for shift in (0, MAX_SHIFT):
        store = hourly_store(100)
        store.journal.horizon_shift = shift
        bucket = store.bucket(b"k", HOURLY, NOW_US - SLOT_US)
        for ago_us in (SLOT_US, 0) if is_in_use else ():
            bucket.take(1, NOW_US - ago_us)
        # More than are read at once.
        entries = [Entry(Origin("n", number), slot, 3) for number in range(1, 11) for slot in slots]
        for _ in store.restore(b"k", HOURLY, NO_BASE, entries, NOW_US):
            pass
        left.append(bucket.remaining)
    assert left[0] < HOURLY.capacity * 3 // 4
    assert left[1] == pytest.approx(left[0], abs=1)


def test_a_store_that_starts_forgets_nothing_early() -> None:
    keys = 2_000
    store = Store(HERE, lambda _key: HOURLY, max_buckets=keys, max_received_bytes=1 << 20)
    store.is_starting = True
    slots = [slot_id(NOW_US - age * SLOT_US, HOURLY.exponent) for age in range(20)]
    for number in range(keys):
        for _ in store.restore(b"%d" % number, HOURLY, NO_BASE, [Entry(THERE, slot, 1) for slot in slots], NOW_US):
            pass
    sweep_all(store, NOW_US)
    sweep_all(store, NOW_US)
    assert store.slots > store.most_slots
    assert store.journal.is_crowded
    assert store.journal.horizon_shift == 0
    store.is_starting = False
    store.sweep(NOW_US, 1)
    assert store.journal.horizon_shift == MAX_SHIFT


def test_few_keys_keep_their_horizon() -> None:
    store = hourly_store(100)
    use(store, 10, 80)
    assert not store.journal.horizon_shift


@given(
    st.lists(st.tuples(st.integers(0, 4 * SLOT_US), st.integers(1, 400)), min_size=1, max_size=60),
    st.integers(0, MAX_SHIFT),
)
def test_sealing_early_changes_no_decision_and_no_fold(takes: list[tuple[int, int]], shift: int) -> None:
    early, late = (hourly_store(1).bucket(b"k", HOURLY, NOW_US) for _ in range(2))
    now_us = NOW_US
    for gap_us, hits in takes:
        now_us += gap_us
        early.shorten(now_us, shift)
        assert early.take(hits, now_us) == late.take(hits, now_us)
        assert early.fold(now_us) == late.fold(now_us)


def test_a_peer_that_is_told_of_a_bucket_that_was_sealed_early_seals_as_much_and_then_differs_in_nothing() -> None:
    one, other = (Store(origin, lambda _key: HOURLY) for origin in (HERE, THERE))
    for store in (one, other):
        use(store, 1, 40)
    now_us = NOW_US + 40 * SLOT_US
    stores = (one, other)

    def tell(source: Store, target: Store) -> None:
        [bucket] = source
        target.join(bucket.key, HOURLY, bucket.base_to_send, list(bucket.entries()), now_us)

    def settled() -> list[object]:
        found = [(bucket, bucket.settled(now_us, now_us + 10_000_000)) for store in stores for bucket in store]
        return [
            each and (each.deficit, sorted(entry for entry in bucket.entries() if entry.slot in each.slots))
            for bucket, each in found
        ]

    tell(one, other)
    tell(other, one)
    assert settled()[0] == settled()[1]
    [bucket] = one
    # Nothing of it is within an eighth of the horizon.
    now_us += 10 * SLOT_US
    bucket.shorten(now_us, 3)
    assert not list(bucket.entries())
    # It has something to say to a peer that still has the entries: its base.
    assert settled()[0] is not None
    assert settled()[0] != settled()[1]
    tell(one, other)
    assert settled()[0] == settled()[1]
    now_us += 30 * SLOT_US
    for store in stores:
        # Nobody has dropped it, and would be told of it anew by the other.
        store.sweep(now_us, 1)
        assert len(store) == 1
    assert settled()[0] == settled()[1]
    now_us += 40 * SLOT_US
    for store in stores:
        store.sweep(now_us, 1)
        assert len(store) == 0


SLIDING_HOUR = WindowLimit(100, 3_600_000_000, Window.SLIDING)


@pytest.mark.parametrize("limit", [HOURLY, SLIDING_HOUR])
def test_a_step_of_the_sweep_looks_at_few_buckets_if_they_hold_slots_of_many_replicas(limit: AnyLimit) -> None:
    keys, most = 100, 50
    store = Store(HERE, lambda _key: limit)
    for number in range(keys):
        slots = [slot_id(NOW_US - age * (1 << limit.exponent), limit.exponent) for age in range(60)]
        entries = [Entry(Origin("n", 1 + of), slot, 1) for of in range(20) for slot in slots]
        store.join(b"%d" % number, limit, None, entries, NOW_US)
    store.journal.horizon_shift = MAX_SHIFT
    of_each = max(bucket.slots for bucket in store)
    looked = steps = 0
    while looked < keys:
        before = sum(bucket.slots for bucket in store)
        of_step = store.sweep(NOW_US, most)
        assert 1 <= of_step <= 1 + most * SLOTS_A_LOOK // of_each
        sealed = before - sum(bucket.slots for bucket in store)
        assert sealed <= most * SLOTS_A_LOOK + of_each
        looked += of_step
        steps += 1
    assert steps > 1


def test_a_sliding_window_may_count_as_several_buckets() -> None:
    store = Store(HERE, lambda _key: LIMIT, max_buckets=90, sliding_places=5)

    def fill(limit: AnyLimit, name: bytes) -> int:
        for number in range(100):
            try:
                store.bucket(b"%s%d" % (name, number), limit, NOW_US)
            except StoreFull:
                return number
        return 100

    assert fill(SLIDING_HOUR, b"s") == 80 // 5
    store.sweep(NOW_US, 100)
    assert fill(LIMIT, b"t") == 80
    store.sweep(NOW_US, 100)
    assert fill(SLIDING_HOUR, b"s") == 80 // 5


def test_a_bucket_with_news_for_peers_stays() -> None:
    store = make_store()
    store.bucket(b"known", LIMIT, NOW_US).take(1, NOW_US)
    store.sweep(NOW_US + 2 * LIMIT.horizon_us, max_buckets=10)
    assert len(store) == 1
    store.drain_changes()
    store.sweep(NOW_US + 2 * LIMIT.horizon_us, max_buckets=10)
    assert len(store) == 0


def test_a_sweep_resumes_where_the_last_one_stopped() -> None:
    store = make_store()
    for index in range(10):
        store.bucket(b"known%d" % index, LIMIT, NOW_US)
    assert [store.sweep(NOW_US, max_buckets=4) for _ in range(3)] == [4, 4, 2]
    assert len(store) == 0


def test_changes_are_reported_once_however_often_a_bucket_was_taken_from() -> None:
    store = make_store()
    bucket = store.bucket(b"known", LIMIT, NOW_US)
    for _ in range(5):
        bucket.take(1, NOW_US)
    slot = slot_id(NOW_US, LIMIT.exponent)
    assert store.drain_changes() == [(bucket, [slot])]
    assert store.drain_changes() == []
    bucket.take(1, NOW_US)
    assert store.drain_changes() == [(bucket, [slot])]
    assert list(bucket.own_entries([slot])) == [Entry(HERE, slot, 6)]


def test_changes_can_be_drained_some_at_a_time_the_oldest_first() -> None:
    store = make_store()
    keys = [b"known%d" % number for number in range(5)]
    for key in keys:
        store.bucket(key, LIMIT, NOW_US).take(1, NOW_US)
    assert [bucket.key for bucket, _ in store.drain_changes(2)] == keys[:2]
    store.bucket(keys[0], LIMIT, NOW_US).take(1, NOW_US)
    assert [bucket.key for bucket, _ in store.drain_changes(9)] == [*keys[2:], keys[0]]


def test_local_buckets_are_never_reported() -> None:
    store = make_store()
    store.bucket(b"local", LIMIT, NOW_US, replicated=False).take(1, NOW_US)
    assert store.drain_changes() == []


def test_a_peer_may_name_a_key_before_anybody_here_asked_for_it() -> None:
    store = make_store()
    assert join(store, b"known", None, [Entry(THERE, slot_id(NOW_US, LIMIT.exponent), 7)], NOW_US)
    assert store.bucket(b"known", LIMIT, NOW_US).remaining == 3


def test_a_peers_base_is_joined() -> None:
    store = make_store()
    boundary_us = LIMIT.boundary_us(NOW_US)
    owed = 10 * LIMIT.period_us + (NOW_US - boundary_us) * LIMIT.tokens
    join(store, b"known", Base(boundary_us, min(owed, LIMIT.debt_ceiling)), [], NOW_US)
    bucket = store.get(b"known")
    assert bucket is not None
    assert bucket.base.deficit == min(owed, LIMIT.debt_ceiling)


def test_a_new_limit_is_enforced_on_the_live_bucket() -> None:
    store = make_store()
    store.bucket(b"known", LIMIT, NOW_US).take(6, NOW_US)
    assert store.bucket(b"known", TokenBucketLimit(10, 1_000_000, 20), NOW_US).remaining == 14


def test_a_bucket_that_is_dropped_leaves_its_room_to_others() -> None:
    store = Store(HERE, lambda _key: LIMIT, max_buckets=2)
    for number in range(20):
        store.bucket(b"%d" % number, LIMIT, NOW_US)
        store.sweep(NOW_US, max_buckets=10)
        assert len(store) == 0
