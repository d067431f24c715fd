"""The store keeps active buckets only, and forgets nothing that anybody could miss."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ratelimit_sidecar.crdt.bucket import Base, Entry, Origin
from ratelimit_sidecar.crdt.limit import Limit
from ratelimit_sidecar.crdt.slot import slot_id
from ratelimit_sidecar.crdt.store import Store

NOW_US = 1_790_000_000_000_000
HERE, THERE = Origin("here", 1), Origin("there", 1)
LIMIT = Limit(tokens=10, period_us=1_000_000, capacity=10)


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
    assert store.sweep(NOW_US + 1_000_000, most=10) == 0
    assert store.sweep(NOW_US + 2 * LIMIT.horizon_us, most=10) == 1
    assert len(store) == 0
    assert store.evicted == 1


def test_a_bucket_with_news_for_peers_stays() -> None:
    store = make_store()
    store.bucket(b"known", LIMIT, NOW_US).take(1, NOW_US)
    assert store.sweep(NOW_US + 2 * LIMIT.horizon_us, most=10) == 0
    store.drain_changes()
    assert store.sweep(NOW_US + 2 * LIMIT.horizon_us, most=10) == 1


def test_a_sweep_resumes_where_the_last_one_stopped() -> None:
    store = make_store()
    for index in range(10):
        store.bucket(b"known%d" % index, LIMIT, NOW_US)
    assert [store.sweep(NOW_US, most=4) for _ in range(3)] == [4, 4, 2]


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
    assert store.merge(b"known", None, [Entry(THERE, slot_id(NOW_US, LIMIT.exponent), 7)], NOW_US)
    assert store.bucket(b"known", LIMIT, NOW_US).remaining == 3


def test_a_peers_base_is_joined() -> None:
    store = make_store()
    boundary_us = LIMIT.boundary_us(NOW_US)
    owed = 10 * LIMIT.period_us + (NOW_US - boundary_us) * LIMIT.tokens
    assert store.merge(b"known", Base(boundary_us, min(owed, LIMIT.debt_ceiling)), [], NOW_US) is not None
    bucket = store.get(b"known")
    assert bucket is not None
    assert bucket.base.deficit == min(owed, LIMIT.debt_ceiling)


def test_a_key_without_a_rule_here_is_refused_and_kept_nowhere() -> None:
    store = make_store()
    assert store.merge(b"foreign", None, [Entry(THERE, slot_id(NOW_US, LIMIT.exponent), 7)], NOW_US) is None
    assert len(store) == 0


def test_a_new_limit_is_enforced_on_the_live_bucket() -> None:
    store = make_store()
    store.bucket(b"known", LIMIT, NOW_US).take(6, NOW_US)
    assert store.bucket(b"known", Limit(10, 1_000_000, 20), NOW_US).remaining == 14


def test_a_bucket_that_is_dropped_leaves_its_room_to_others() -> None:
    store = Store(HERE, lambda _key: LIMIT, max_buckets=2)
    for number in range(20):
        store.bucket(b"%d" % number, LIMIT, NOW_US)
        assert store.sweep(NOW_US, most=10) == 1
