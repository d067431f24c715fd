"""When peers are to be told at once, and what waits to be told when nobody asks for it."""

from __future__ import annotations

import pytest

from ratelimit_sidecar.crdt.bucket import MAX_UNSENT_SLOTS, Bucket, Origin
from ratelimit_sidecar.crdt.journal import MAX_URGENT_LIMITS, MAX_URGENT_OF_LIMIT
from ratelimit_sidecar.crdt.limit import (
    MIN_STEPS_CAPACITY,
    URGENT_SHARE,
    AnyLimit,
    TokenBucketLimit,
    Window,
    WindowLimit,
)
from ratelimit_sidecar.crdt.store import Store

SECOND_US = 1_000_000
NOW_US = 1_790_000_000_000_000
CAPACITY = 8 * URGENT_SHARE

LIMITS = [
    TokenBucketLimit(CAPACITY, 60 * SECOND_US, CAPACITY),
    WindowLimit(CAPACITY, 60 * SECOND_US, Window.FIXED),
    WindowLimit(CAPACITY, 60 * SECOND_US, Window.SLIDING),
]


class Told:
    def __init__(self, limit: AnyLimit, *, replicated: bool = True) -> None:
        self.times = 0
        store = Store(Origin("a", 1), lambda _key: limit)
        store.journal.on_urgent = self.count
        self.bucket = store.bucket(b"k", limit, NOW_US, replicated=replicated)

    def count(self) -> None:
        self.times += 1


@pytest.mark.parametrize("limit", LIMITS, ids=["token_bucket", "fixed", "sliding"])
def test_a_bucket_that_gets_nearly_used_up_is_urgent_once(limit: AnyLimit) -> None:
    told = Told(limit)
    nearly = CAPACITY - CAPACITY // URGENT_SHARE
    for taken in range(1, 2 * CAPACITY):
        told.bucket.take(1, NOW_US)
        assert told.times == (taken >= nearly)


@pytest.mark.parametrize("requests", [MIN_STEPS_CAPACITY, 100, 1_000_003])
@pytest.mark.parametrize("window", [None, *Window], ids=["token_bucket", "fixed", "sliding"])
def test_peers_are_told_early_of_each_further_eighth_of_a_limit(requests: int, window: Window | None) -> None:
    """And of no bucket of which one request was taken."""
    period_us = 60 * SECOND_US
    limit = (
        TokenBucketLimit(requests, period_us, requests) if window is None else WindowLimit(requests, period_us, window)
    )
    store = Store(Origin("a", 1), lambda _key: limit)
    bucket = store.bucket(b"k", limit, NOW_US)
    urgent, taken, told, times = store.journal.urgent, 0, 0, 0
    share = max(requests // 100, 1)
    while bucket.take(share, NOW_US):
        taken += share
        if urgent:
            assert taken > 1
            assert urgent.pop() is bucket
            told, times = taken, times + 1
        assert taken - told <= requests // URGENT_SHARE
    assert times <= 2 * URGENT_SHARE + 1
    for _ in range(requests // share):
        bucket.take(share, NOW_US)
    assert not urgent, "what is denied is not told"


def test_of_a_small_limit_only_what_is_nearly_used_up_is_urgent() -> None:
    limit = TokenBucketLimit(MIN_STEPS_CAPACITY - 1, 60 * SECOND_US, MIN_STEPS_CAPACITY - 1)
    store = Store(Origin("a", 1), lambda _key: limit)
    bucket = store.bucket(b"k", limit, NOW_US)
    bucket.take(MIN_STEPS_CAPACITY - 5, NOW_US)
    assert not store.journal.urgent
    bucket.take(1, NOW_US)
    assert store.journal.urgent


def test_what_is_nearly_used_up_has_places_of_its_own() -> None:
    limit = TokenBucketLimit(100, 60 * SECOND_US, 100)
    store = Store(Origin("a", 1), lambda _key: limit)
    for number in range(10 * MAX_URGENT_OF_LIMIT):
        store.bucket(f"{number}".encode(), limit, NOW_US).take(50, NOW_US)
    spent = use_up(store, "spent", limit)
    urgent = store.journal.urgent
    assert len(urgent) == MAX_URGENT_OF_LIMIT + 1
    urgent.pop()
    assert urgent.pop() is spent


def use_up(store: Store, name: str, limit: AnyLimit) -> Bucket:
    bucket = store.bucket(name.encode(), limit, NOW_US)
    bucket.take(limit.capacity, NOW_US)
    return bucket


def test_of_one_limit_only_so_many_buckets_are_urgent_and_another_limit_has_its_turn() -> None:
    flooded, other = TokenBucketLimit(1, 60 * SECOND_US, 1), TokenBucketLimit(100, 60 * SECOND_US, 100)
    store = Store(Origin("a", 1), lambda _key: flooded)
    invented = [use_up(store, f"{number}", flooded) for number in range(10 * MAX_URGENT_OF_LIMIT)]
    honest = [use_up(store, f"honest {number}", other) for number in range(2)]
    urgent = store.journal.urgent
    assert len(urgent) == MAX_URGENT_OF_LIMIT + 2
    order = [urgent.pop() for _ in range(len(urgent))]
    assert order == [invented[0], honest[0], invented[1], honest[1], *invented[2:MAX_URGENT_OF_LIMIT]]
    assert len(urgent) == 0


def test_only_so_many_limits_have_urgent_buckets() -> None:
    limits = [WindowLimit(number, 60 * SECOND_US, Window.FIXED) for number in range(1, MAX_URGENT_LIMITS + 2)]
    store = Store(Origin("a", 1), lambda _key: limits[0])
    for number, limit in enumerate(limits):
        use_up(store, f"{number}", limit)
    assert len(store.journal.urgent) == MAX_URGENT_LIMITS


@pytest.mark.parametrize("limit", LIMITS, ids=["token_bucket", "fixed", "sliding"])
def test_it_is_urgent_again_after_it_has_filled_up(limit: AnyLimit) -> None:
    told = Told(limit)
    told.bucket.take(CAPACITY, NOW_US)
    told.bucket.take(CAPACITY, NOW_US + 121 * SECOND_US)
    assert told.times == 2


@pytest.mark.parametrize("limit", LIMITS, ids=["token_bucket", "fixed", "sliding"])
def test_a_bucket_that_nobody_is_told_of_is_never_urgent(limit: AnyLimit) -> None:
    told = Told(limit, replicated=False)
    told.bucket.take(CAPACITY, NOW_US)
    assert told.times == 0


@pytest.mark.parametrize(
    "limit",
    [
        TokenBucketLimit(1_000, SECOND_US, 10),
        WindowLimit(10, SECOND_US // 50, Window.FIXED),
        WindowLimit(10, SECOND_US // 50, Window.SLIDING),
    ],
    ids=["token_bucket", "fixed", "sliding"],
)
@pytest.mark.parametrize("takes", [MAX_UNSENT_SLOTS + 2, 5 * MAX_UNSENT_SLOTS])
def test_while_nobody_drains_it_a_busy_bucket_waits_with_the_slots_that_it_still_holds(
    limit: AnyLimit, takes: int
) -> None:
    told = Told(limit)
    bucket = told.bucket
    now_us = NOW_US
    for _ in range(takes):
        now_us += SECOND_US // 50
        assert bucket.take(1, now_us)
    changed = bucket.drain_changed_slots()
    assert len(changed) <= MAX_UNSENT_SLOTS
    held = {slot for slots in bucket.taken.values() for slot in slots}
    assert held <= set(changed)
    assert len(changed) == len(set(changed))


def test_a_slot_that_is_written_to_again_waits_once() -> None:
    told = Told(TokenBucketLimit(CAPACITY, 60 * SECOND_US, CAPACITY))
    wide = told.bucket.limit
    told.bucket.take(1, NOW_US)
    told.bucket.set_limit(TokenBucketLimit(CAPACITY, 6 * SECOND_US, CAPACITY), NOW_US)
    told.bucket.take(1, NOW_US)
    told.bucket.set_limit(wide, NOW_US)
    told.bucket.take(1, NOW_US)
    assert len(told.bucket.drain_changed_slots()) == 2
