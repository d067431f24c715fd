"""What one member can do to a limit with deltas that no honest replica would send, and what it cannot."""

from __future__ import annotations

import tracemalloc
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from joined import join

from ratelimit_sidecar.crdt.bucket import (
    ENTRY_BYTES,
    LEAST_ORIGINS,
    MAX_ORIGINS,
    MAX_RECEIVED,
    MAX_SLOTS,
    ORIGIN_BYTES,
    SET_BACK_US,
    Base,
    Bucket,
    Entry,
    Origin,
)
from ratelimit_sidecar.crdt.journal import Refused
from ratelimit_sidecar.crdt.limit import MAX_AHEAD_US, MAX_EXPONENT, AnyLimit, TokenBucketLimit, Window, WindowLimit
from ratelimit_sidecar.crdt.slot import slot_id
from ratelimit_sidecar.crdt.store import Store

SECOND_US = 1_000_000
DAY_US = 86_400 * SECOND_US
NOW_US = 1_790_000_000_000_000
HERE, THERE, HOSTILE = Origin("here", 1), Origin("there", 2), Origin("hostile", 3)
MOST = 2**48

LIMITS: tuple[AnyLimit, ...] = (
    TokenBucketLimit(10, SECOND_US, 10),
    TokenBucketLimit(5_000, SECOND_US, 5),
    TokenBucketLimit(1_000, DAY_US, 1_000),
    WindowLimit(10, SECOND_US, Window.FIXED),
    WindowLimit(1_000, DAY_US, Window.FIXED),
    WindowLimit(10, SECOND_US, Window.SLIDING),
    WindowLimit(1_000, DAY_US, Window.SLIDING),
)
all_limits = pytest.mark.parametrize("limit", LIMITS, ids=str)


def store_of(origin: Origin, limit: AnyLimit) -> Store:
    return Store(origin, lambda _: limit)


def bucket_of(store: Store, limit: AnyLimit, now_us: int = NOW_US, key: bytes = b"k") -> Bucket:
    return store.bucket(key, limit, now_us)


def locked_us(limit: AnyLimit) -> int:
    """How long the worst that one says may deny everybody: until its debt is repaid, or its window is over."""
    if isinstance(limit, TokenBucketLimit):
        return MAX_AHEAD_US + limit.debt_ceiling // limit.tokens + (2 << limit.exponent)
    return MAX_AHEAD_US + 2 * limit.period_us + (2 << limit.exponent)


@all_limits
def test_slots_of_any_width_anywhere_deny_for_no_longer_than_the_debt_ceiling_or_a_window(limit: AnyLimit) -> None:
    store = store_of(HERE, limit)
    entries = [
        Entry(HOSTILE, slot_id(NOW_US + ahead_us, exponent), MOST)
        for exponent in range(14, MAX_EXPONENT + 1)
        for ahead_us in (-(2**exponent), 0, SECOND_US, MAX_AHEAD_US, DAY_US, 2**40, 2**exponent, 2 ** (exponent + 6))
    ]
    join(store, b"k", Base(NOW_US - 6 * SECOND_US, 2**63 * limit.period_us), entries, NOW_US)
    later_us = NOW_US + locked_us(limit)
    assert bucket_of(store, limit).take(1, later_us)


@all_limits
def test_a_poisoned_bucket_is_dropped_within_days_whatever_it_was_told(limit: AnyLimit) -> None:
    store = store_of(HERE, limit)
    for exponent in range(14, MAX_EXPONENT + 1):
        join(store, b"k", None, [Entry(HOSTILE, slot_id(NOW_US + MAX_AHEAD_US, exponent), MOST)], NOW_US)
    later_us = NOW_US + max(3 * DAY_US, 2 * locked_us(limit), 129 << limit.exponent)
    for turn in range(3):
        store.sweep(later_us + turn, 1)
    assert len(store) == 0


@all_limits
def test_a_bucket_holds_few_slots_of_an_origin_the_newest_whatever_the_order(limit: AnyLimit) -> None:
    exponent = limit.exponent
    width_us = 1 << 14
    entries = [
        Entry(HOSTILE, slot_id(NOW_US - number * width_us, 14), 1)
        for number in range(2 * MAX_SLOTS if exponent > 14 else 60)
    ]
    one, other = store_of(HERE, limit), store_of(THERE, limit)
    join(one, b"k", None, entries, NOW_US)
    for entry in reversed(entries):
        join(other, b"k", None, [entry], NOW_US)
    buckets = [bucket_of(store, limit) for store in (one, other)]
    assert buckets[0].taken == buckets[1].taken
    assert buckets[0].fold(NOW_US) == buckets[1].fold(NOW_US)
    assert buckets[0].remaining == buckets[1].remaining
    assert all(len(slots) <= MAX_SLOTS for bucket in buckets for slots in bucket.taken.values())


@all_limits
def test_invented_origins_find_little_place_and_connected_peers_always_do(limit: AnyLimit) -> None:
    store = store_of(HERE, limit)
    slot = slot_of(limit)
    join(store, b"k", None, [Entry(Origin("ghost", number), slot, 1) for number in range(1, 5_000)], NOW_US)
    assert len(bucket_of(store, limit).taken) == MAX_ORIGINS
    store.journal.peers.add(THERE)
    assert join(store, b"k", None, [Entry(THERE, slot, 1)], NOW_US) == 1
    assert THERE in bucket_of(store, limit).taken


@all_limits
def test_a_bucket_full_of_invented_entries_has_room_for_peers_and_for_all_once_they_are_past(limit: AnyLimit) -> None:
    store = store_of(HERE, limit)
    store.journal.peers.add(THERE)
    slot = slot_of(limit)
    width_us = 1 << limit.exponent

    def invent(now_us: int) -> int:
        first = slot_of(limit, now_us)
        slots = [first] if limit.exponent > 30 else [first + number * width_us for number in range(-30, 1)]
        for number in range(1, MAX_ORIGINS + 1):
            join(store, b"k", None, [Entry(Origin("ghost", number), each, 1) for each in slots], now_us)
        return sum(len(entries) for entries in bucket_of(store, limit, now_us).taken.values())

    held = invent(NOW_US)
    assert held <= MAX_RECEIVED
    if held == MAX_RECEIVED:
        assert join(store, b"k", None, [Entry(Origin("ghost", 1), slot, 2)], NOW_US) == 1, "it is there already"
        assert join(store, b"k", None, [Entry(Origin("newcomer", 1), slot, 1)], NOW_US) == 0
    assert join(store, b"k", None, [Entry(THERE, slot, 1)], NOW_US) == 1
    later_us = NOW_US + 3 * locked_us(limit) + 3 * DAY_US
    bucket_of(store, limit).seal(later_us)
    assert invent(later_us) == held


@all_limits
@pytest.mark.parametrize("is_connected", [False, True])
def test_what_all_buckets_together_hold_of_others_is_bounded_and_peers_have_their_place_even_then(
    limit: AnyLimit, is_connected: bool
) -> None:
    """Also if it is told by a connected peer, who says that it has restarted again and again."""
    most = 1 << 20
    store = Store(HERE, lambda _key: limit, max_received_bytes=most)
    slot = slot_of(limit)
    buckets = 30
    for number in range(buckets):
        for incarnation in range(1, 1_000):
            origin = Origin("ghost", incarnation)
            if is_connected:
                store.journal.peers.add(origin)
            join(store, b"%d" % number, None, [Entry(origin, slot, 1)], NOW_US)
            store.journal.peers.discard(origin)
    held = sum(len(bucket.taken) for bucket in store)
    fitting = most // (ORIGIN_BYTES + ENTRY_BYTES) + 1
    assert held <= (fitting + buckets * LEAST_ORIGINS if is_connected else fitting * 3 // 4 + 1)
    assert store.journal.refused[Refused.FULL]
    assert join(store, b"0", None, [Entry(Origin("ghost", 1), slot, 2)], NOW_US) == 1, "it is there already"
    store.journal.peers.add(THERE)
    assert join(store, b"0", None, [Entry(THERE, slot, 1)], NOW_US) == (0 if is_connected else 1)
    assert join(store, b"of few", None, [Entry(THERE, slot, 1)], NOW_US) == 1
    if limit.exponent == 31:
        slots = [slot_id(NOW_US - age * (1 << limit.exponent), limit.exponent) for age in range(20)]
        news = join(store, b"of few", None, [Entry(THERE, each, 1) for each in slots], NOW_US)
        assert news == 19
    later_us = NOW_US + 3 * locked_us(limit) + 3 * DAY_US
    for turn in range(2 * buckets):
        store.sweep(later_us + turn, buckets)
    assert store.journal.received_bytes == 0
    assert join(store, b"0", None, [Entry(THERE, slot_of(limit, later_us), 1)], later_us) == 1


@all_limits
@pytest.mark.parametrize("is_connected", [False, True])
def test_however_much_others_take_of_one_rule_there_is_room_for_what_they_take_of_another(
    limit: AnyLimit, is_connected: bool
) -> None:
    most = 1 << 18
    store = Store(HERE, lambda _key: limit, max_received_bytes=most, rule_key=lambda key: key[:1])
    if is_connected:
        store.journal.peers.add(THERE)
    entries = [Entry(THERE, slot_of(limit), 1)]
    keys = [b"a%d" % number for number in range(2 * most // (ORIGIN_BYTES + ENTRY_BYTES))]
    news = sum(join(store, key, None, entries, NOW_US) for key in keys)
    share = most * (5 if is_connected else 3) // 4 * 8 // 9
    assert news == share // (ORIGIN_BYTES + ENTRY_BYTES) + 1
    assert store.journal.refused[Refused.FULL] == len(keys) - news
    assert not store.journal.has_room_for_all
    assert all(join(store, b"b%d" % number, None, entries, NOW_US) for number in range(50))


def test_members_with_many_slots_in_each_bucket_are_bounded_too() -> None:
    """Several, as of one certificate for a region."""
    most = 1 << 18
    limit = TokenBucketLimit(1_000, DAY_US, 1_000)
    store = Store(HERE, lambda _key: limit, max_received_bytes=most)
    slots = [slot_id(NOW_US - number * (1 << 17), 17) for number in range(16)]
    members = [Origin(f"m{number}", 1) for number in range(LEAST_ORIGINS)]
    store.journal.peers.update(members)
    for number in range(200):
        entries = [Entry(member, slot, 1) for member in members for slot in slots]
        join(store, b"%d" % number, None, entries, NOW_US)
    assert most <= store.journal.received_bytes <= most * 5 // 4 + ORIGIN_BYTES + ENTRY_BYTES


def test_many_slots_of_one_member_have_no_sums_beside_them() -> None:
    """They would take as much memory again, which is not counted. Those of two have sums."""
    limit = TokenBucketLimit(1_000, DAY_US, 1_000)
    store = store_of(HERE, limit)
    slots = [slot_id(NOW_US - number * (1 << 14), 14) for number in range(MAX_SLOTS)]

    def bytes_held(key: bytes, *origins: Origin) -> int:
        parts = [[Entry(origin, slot, 1) for slot in slots] for origin in origins]
        tracemalloc.start()
        try:
            for entries in parts:
                join(store, key, None, entries, NOW_US)
            bucket_of(store, limit, key=key).fold(NOW_US)
            return tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()

    bytes_held(b"first", THERE)
    # A dict takes 29 bytes for each of its items.
    assert bytes_held(b"of two", THERE, HOSTILE) - 2 * bytes_held(b"of one", THERE) > 20 * MAX_SLOTS


@all_limits
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["join", "take", "refund", "back", "sweep", "seal"]),
            st.integers(0, 3),
            st.integers(0, 4),
            st.integers(0, 80),
        ),
        max_size=60,
    )
)
def test_the_memory_of_what_others_took_is_counted_through_all_that_may_happen(
    limit: AnyLimit, steps: list[tuple[str, int, int, int]]
) -> None:
    store = Store(HERE, lambda _: limit, rule_key=lambda key: b"%d" % (int(key) // 2))
    now_us, lives = NOW_US, 1
    for what, number, of, ahead in steps:
        now_us += ahead * (1 << limit.exponent) >> 2
        key = b"%d" % number
        if what == "join":
            slots = [slot_id(now_us - age * (1 << limit.exponent), limit.exponent) for age in range(of * 200)]
            join(store, key, None, [Entry(Origin("n", 1 + of), slot, 1 + ahead) for slot in slots], now_us)
        elif what == "take":
            bucket_of(store, limit, now_us, key).take(1 + of, now_us)
        elif what == "refund":
            bucket_of(store, limit, now_us, key).refund(1 + of, now_us)
        elif what == "seal":
            bucket_of(store, limit, now_us, key).seal(now_us)
        elif what == "back":
            now_us -= 2 * SET_BACK_US
            lives += 1
            store.go_back(Origin(HERE.node, HERE.incarnation + lives))
        else:
            store.drain_changes()
            store.sweep(now_us, 4)
        held = [slots for bucket in store for origin, slots in bucket.taken.items() if origin != bucket.origin]
        entries = sum(map(len, held))
        assert store.journal.received_bytes == ORIGIN_BYTES * len(held) + ENTRY_BYTES * entries
        rooms = {id(bucket.room): bucket.room.received_bytes for bucket in store if bucket.room is not None}
        assert len(rooms) == len({int(bucket.key) // 2 for bucket in store})
        assert sum(rooms.values()) == store.journal.received_bytes


def slot_of(limit: AnyLimit, now_us: int = NOW_US) -> int:
    """The slot in which everybody writes now."""
    if isinstance(limit, WindowLimit) and limit.window is Window.FIXED:
        return slot_id(now_us - now_us % limit.period_us, limit.exponent)
    return slot_id(now_us, limit.exponent)


@all_limits
def test_what_is_said_of_an_origin_is_put_right_by_its_own_word(limit: AnyLimit) -> None:
    """Replicas that differ by what a third has invented are alike again once the origin has told of the bucket."""
    here, there = store_of(HERE, limit), store_of(THERE, limit)
    bucket_of(there, limit).take(3, NOW_US)
    [slot] = bucket_of(there, limit).taken[THERE]
    forged = [Entry(THERE, slot, 1_000_000)]
    join(here, b"k", None, forged, NOW_US)
    join(there, b"k", None, forged, NOW_US)
    assert bucket_of(there, limit).taken[THERE] == {slot: 3}, "own origins cannot be written by others"
    later_us = NOW_US + (1 << limit.exponent) + 3 * SECOND_US
    if isinstance(limit, WindowLimit) and limit.window is Window.FIXED:
        later_us = NOW_US
    told = list(bucket_of(there, limit).entries())
    here.join(b"k", limit, None, told, later_us, corrector=THERE)
    one, other = (bucket_of(store, limit, later_us) for store in (here, there))
    one.advance(later_us)
    other.advance(later_us)
    assert one.taken == other.taken
    assert one.fold(later_us) == other.fold(later_us)


def test_bases_of_any_size_make_replicas_alike_in_whatever_order_they_are_heard() -> None:
    limit = TokenBucketLimit(1, SECOND_US, 10)
    bases = [Base(limit.boundary_us(NOW_US - back * SECOND_US), 2**63 * SECOND_US // (back + 1)) for back in range(4)]
    found = set()
    for order in permutations(bases):
        store = store_of(HERE, limit)
        for base in order:
            join(store, b"k", base, [], NOW_US)
        bucket = bucket_of(store, limit)
        bucket.seal(NOW_US)
        found.add((bucket.base, bucket.deficit))
    assert len(found) == 1


entries_of_many = st.lists(
    st.builds(
        lambda node, back, tokens: Entry(Origin(node, 1), slot_id(NOW_US - back * 100_000, 17), tokens),
        st.sampled_from("abc"),
        st.integers(0, 90),
        st.integers(1, 40) | st.just(MOST),
    ),
    max_size=30,
)


@given(entries=entries_of_many, order=st.randoms(use_true_random=False), max_debt=st.integers(1, 3))
def test_debt_is_cut_at_once_and_alike_whatever_the_order(entries: list[Entry], order, max_debt: int) -> None:
    limit = TokenBucketLimit(4, SECOND_US, 4, max_debt=max_debt)
    shuffled = list(entries)
    order.shuffle(shuffled)
    one, other = store_of(HERE, limit), store_of(THERE, limit)
    join(one, b"k", None, entries, NOW_US)
    for entry in shuffled:
        join(other, b"k", None, [entry], NOW_US)
    buckets = [bucket_of(store, limit) for store in (one, other)]
    assert buckets[0].fold(NOW_US) == buckets[1].fold(NOW_US) == buckets[0].deficit == buckets[1].deficit
    assert buckets[0].deficit <= limit.debt_ceiling
    later_us = NOW_US + 3 * SECOND_US
    buckets[0].seal(later_us)
    assert buckets[0].fold(later_us) == buckets[1].fold(later_us)


def test_a_take_that_is_charged_though_denied_owes_no_more_than_the_debt_ceiling() -> None:
    limit = TokenBucketLimit(1, SECOND_US, 10)
    bucket = bucket_of(store_of(HERE, limit), limit)
    bucket.take(2**40, NOW_US, always=True)
    assert bucket.deficit == limit.debt_ceiling
