"""Counting windows: what they promise of one replica, and of several that heard the same."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable

import pytest
from crdt.work import instructions
from hypothesis import example, given
from hypothesis import strategies as st

from ratelimit_sidecar.crdt.bucket import Bucket, Entry, Origin
from ratelimit_sidecar.crdt.journal import Journal
from ratelimit_sidecar.crdt.limit import Window, WindowLimit
from ratelimit_sidecar.crdt.slot import slot_end_us, slot_id
from ratelimit_sidecar.crdt.window import FixedWindow, SlidingWindow

SECOND_US = 1_000_000
MINUTE_US = 60 * SECOND_US
# The beginning of a minute.
NOW_US = 1_790_000_040_000_000
HERE, THERE, ELSEWHERE = (Origin(node, 1) for node in ("here", "there", "elsewhere"))

periods = st.sampled_from([SECOND_US, 7 * SECOND_US, MINUTE_US])
gaps = st.integers(0, 3_000_000) | st.sampled_from([0, 61 * SECOND_US])
takes = st.lists(st.tuples(gaps, st.integers(0, 6)), max_size=60)


def fixed(requests: int, period_us: int = MINUTE_US, origin: Origin = HERE, journal=None) -> FixedWindow:
    return FixedWindow(b"k", WindowLimit(requests, period_us, Window.FIXED), origin, NOW_US, journal)


def sliding(requests: int, period_us: int = MINUTE_US, origin: Origin = HERE, journal=None) -> SlidingWindow:
    return SlidingWindow(b"k", WindowLimit(requests, period_us, Window.SLIDING), origin, NOW_US, journal)


@given(periods, st.integers(0, 20), takes)
def test_a_lone_fixed_window_counts_as_envoyproxy_ratelimit_does(period_us: int, requests: int, history) -> None:
    window = fixed(requests, period_us)
    now_us, counts = NOW_US, Counter()
    for gap_us, hits in history:
        now_us += gap_us
        counts[now_us // period_us] += hits
        count = counts[now_us // period_us]
        assert window.take(hits, now_us) is (count <= requests)
        assert window.remaining == max(0, requests - count)
        assert window.debt == max(0, count - requests)
        assert (now_us + window.full_in_us) % period_us == 0
        assert 0 < window.full_in_us <= period_us


@given(periods, st.integers(0, 20), takes)
def test_no_period_of_a_lone_sliding_window_holds_more_than_the_limit(period_us: int, requests: int, history) -> None:
    window = sliding(requests, period_us)
    now_us, admitted = NOW_US, []
    for gap_us, hits in history:
        now_us += gap_us
        if window.take(hits, now_us):
            admitted.append((now_us, hits))
        assert sum(hits for at_us, hits in admitted if at_us > now_us - period_us) <= requests


@given(periods, st.integers(0, 20), takes)
def test_a_sliding_window_denies_only_what_a_period_longer_by_one_slot_would(
    period_us: int, requests: int, history
) -> None:
    window = sliding(requests, period_us)
    now_us, admitted = NOW_US, []
    longer_us = period_us + (1 << window.limit.exponent)
    for gap_us, hits in history:
        now_us += gap_us
        held = sum(taken for at_us, taken in admitted if at_us > now_us - longer_us)
        admit = window.take(hits, now_us)
        if admit:
            admitted.append((now_us, hits))
        else:
            assert held + hits > requests


@pytest.mark.parametrize("make", [fixed, sliding])
@given(st.lists(st.tuples(gaps, st.integers(0, 6), st.booleans()), max_size=40), st.randoms(use_true_random=False))
def test_windows_that_heard_the_same_fold_to_the_same_number(make, history, rng: random.Random) -> None:
    replicas: list[Bucket] = [make(10, origin=origin, journal=Journal()) for origin in (HERE, THERE, ELSEWHERE)]
    now_us = NOW_US
    for gap_us, hits, deliver in history:
        now_us += gap_us
        taker, receiver = rng.sample(replicas, 2)
        taker.take(hits, now_us)
        if deliver:
            receiver.merge(list(taker.entries()), now_us)
    exchange = [(to, entry) for to in replicas for source in replicas for entry in source.entries()] * 2
    rng.shuffle(exchange)
    for receiver, entry in exchange:
        receiver.merge([entry], now_us)
    folds = {replica.fold(now_us) for replica in replicas}
    assert len(folds) == 1
    for replica in replicas:
        replica.advance(now_us)
        assert replica.remaining == max(0, 10 - replica.fold(now_us))
        later_us = now_us + rng.randrange(2 * MINUTE_US)
        replica.advance(later_us)
        assert replica.remaining == max(0, 10 - replica.fold(later_us))


@pytest.mark.parametrize("make", [fixed, sliding])
def test_what_a_peer_took_counts_here(make) -> None:
    here, there = make(10), make(10, origin=THERE)
    assert there.take(7, NOW_US)
    assert here.merge(list(there.entries()), NOW_US) == 1
    assert here.merge(list(there.entries()), NOW_US) == 0
    assert here.remaining == 3
    assert not here.take(4, NOW_US)


def test_a_new_fixed_window_does_not_hold_the_peers_old_counts() -> None:
    here, there = fixed(10), fixed(10, origin=THERE)
    there.take(10, NOW_US)
    here.merge(list(there.entries()), NOW_US)
    assert not here.take(1, NOW_US)
    assert here.take(9, NOW_US + MINUTE_US)
    assert here.merge([Entry(THERE, (NOW_US // MINUTE_US) << 14 | 14, 99)], NOW_US + MINUTE_US) == 0


def test_what_a_peer_ahead_took_counts_when_its_window_begins_here() -> None:
    here, there = fixed(10), fixed(10, origin=THERE)
    begins_us = NOW_US - NOW_US % MINUTE_US + MINUTE_US
    there.take(8, begins_us)
    entries = list(there.entries())
    assert here.merge(entries, begins_us - 15_000_000) == 0
    here.merge(entries, begins_us - 5_000_000)
    assert here.remaining == 10
    here.advance(begins_us)
    assert here.remaining == 2


def test_a_peer_hours_ahead_is_not_believed() -> None:
    here, there = sliding(10), sliding(10, origin=THERE)
    there.take(8, NOW_US + 60 * MINUTE_US)
    assert here.merge(list(there.entries()), NOW_US) == 0
    assert here.remaining == 10


def test_a_sliding_window_is_full_again_when_its_last_slot_is_out_of_the_period() -> None:
    window = sliding(10)
    assert window.full_in_us == 0
    window.take(4, NOW_US)
    last_end_us = slot_end_us(slot_id(NOW_US, window.limit.exponent))
    assert window.full_in_us == last_end_us + MINUTE_US - NOW_US
    window.advance(NOW_US + window.full_in_us)
    assert (window.remaining, window.full_in_us) == (10, 0)


@pytest.mark.parametrize("make", [fixed, sliding])
def test_charged_always_a_denied_take_is_owed(make) -> None:
    window = make(10)
    assert not window.take(25, NOW_US, always=True)
    assert (window.remaining, window.debt) == (0, 15)


def test_a_denied_take_does_not_count_in_a_sliding_window() -> None:
    window = sliding(10)
    assert not window.take(25, NOW_US)
    assert window.take(10, NOW_US)


@pytest.mark.parametrize("make", [fixed, sliding])
def test_a_window_is_idle_once_nothing_in_it_counts_and_peers_were_told(make) -> None:
    journal = Journal()
    window = make(10, journal=journal)
    window.take(1, NOW_US)
    later_us = NOW_US + 3 * MINUTE_US
    assert not window.is_idle(later_us)
    window.drain_changed_slots()
    assert window.is_idle(later_us)
    assert journal.buckets == [window]


@pytest.mark.parametrize("make", [fixed, sliding])
def test_a_change_of_the_limit_keeps_the_count(make) -> None:
    window = make(10)
    window.take(8, NOW_US)
    window.set_limit(WindowLimit(20, MINUTE_US, window.limit.window), NOW_US)
    assert window.remaining == 12


def test_a_fixed_window_of_another_period_begins_a_new_count() -> None:
    window = fixed(10)
    window.take(8, NOW_US)
    window.set_limit(WindowLimit(20, SECOND_US, Window.FIXED), NOW_US)
    assert window.remaining == 20
    assert window.take(20, NOW_US)
    assert not window.take(1, NOW_US)


def test_a_sliding_window_of_another_period_keeps_what_lies_in_it() -> None:
    window = sliding(10)
    window.take(3, NOW_US)
    window.take(4, NOW_US + 30 * SECOND_US)
    window.set_limit(WindowLimit(10, 10 * SECOND_US, Window.SLIDING), NOW_US + 31 * SECOND_US)
    assert window.remaining == 6
    assert window.take(6, NOW_US + 31 * SECOND_US)


def test_a_busy_sliding_window_holds_few_slots() -> None:
    window = sliding(10**6)
    for step in range(500):
        now_us = NOW_US + (step << window.limit.exponent)
        window.take(1, now_us)
        window.merge([Entry(THERE, slot_id(now_us, window.limit.exponent), 1)], now_us)
        assert len(list(window.entries())) <= 2 * 130


@pytest.mark.parametrize("is_refunded", [False, True])
def test_when_a_denied_caller_may_come_back_costs_what_there_are_of_slots_however_many_replicas_take_in_each(
    is_refunded: bool,
) -> None:
    limit = WindowLimit(100, 3_600_000_000, Window.SLIDING)
    slots = [slot_id(NOW_US - age * (1 << limit.exponent), limit.exponent) for age in range(50)]

    bucket = SlidingWindow(b"k", limit, Origin("here", 1), NOW_US)
    bucket.merge([Entry(Origin("there", 1 + of), slot, 50) for of in range(64) for slot in slots[::2]], NOW_US)
    if is_refunded:
        bucket.refund(1, NOW_US)

    def seconds(call: Callable[[], object]) -> float:
        began = time.thread_time()
        assert call()
        return time.thread_time() - began

    def to_tell(slot: int) -> float:
        # Of a slot among others nothing is known.
        bucket.merge([Entry(ELSEWHERE, slot, 1)], NOW_US)
        return seconds(lambda: bucket.retry_after_us(1))

    def to_list_what_each_took() -> float:
        return seconds(lambda: list(bucket.entries()))

    assert min(to_tell(slot) for slot in slots[1::2]) < min(to_list_what_each_took() for _ in range(30))


asked = st.integers(1, 8)
events = st.tuples(st.just("take"), asked) | st.tuples(st.sampled_from(["hear", "late", "refund", "limit"]), asked)


@given(periods, st.lists(st.tuples(gaps, events, st.integers(1, 26)), max_size=40))
@example(7 * SECOND_US, [(0, ("take", 5), 8), (2 * SECOND_US, ("take", 1), 2), (0, ("limit", 2), 2)])
def test_when_hits_fit_is_what_a_replica_would_say_that_has_just_heard_all(period_us: int, history) -> None:
    window, there = sliding(26, period_us), sliding(100, period_us, origin=THERE)
    now_us = NOW_US
    width_us = 1 << window.limit.exponent
    # So many slots that they are not looked at each time.
    earlier = [slot_id(NOW_US - age * width_us, window.limit.exponent) for age in range(0, 40, 2)]
    window.merge([Entry(Origin("earlier", 1), slot, 1) for slot in earlier], now_us)
    for gap_us, (event, amount), hits in history:
        now_us += gap_us
        window.advance(now_us)
        match event:
            case "take":
                window.take(amount, now_us, always=hits > 13)
            case "hear":
                there.take(amount, now_us)
                window.merge(there.entries(), now_us)
            case "late":
                late_us = now_us - (2 * amount - 1) * width_us
                window.merge([Entry(ELSEWHERE, slot_id(late_us, window.limit.exponent), hits)], now_us)
            case "refund":
                window.refund(amount, now_us)
            case "limit":
                window.set_limit(WindowLimit(20 + amount, period_us, Window.SLIDING), now_us)
        fresh = sliding(window.limit.capacity, period_us, origin=ELSEWHERE)
        fresh.merge(window.entries(), now_us)
        assert window.retry_after_us(hits) == fresh.retry_after_us(hits)
        soon_us = hits * period_us // 26
        assert window.left_within(soon_us) == max(0, window.limit.requests - fresh.fold(now_us + soon_us))


def test_of_the_next_fixed_window_an_even_part_is_left_soon() -> None:
    window = fixed(60)
    window.take(70, NOW_US + 50 * SECOND_US)
    assert [window.left_within(within * SECOND_US) for within in (5, 10, 15)] == [0, 0, 5]


@pytest.mark.interpreted
@pytest.mark.parametrize("is_charged", [False, True])
def test_who_is_denied_again_and_again_does_not_have_all_slots_looked_at(is_charged: bool) -> None:
    def work(others: int) -> int:
        window = sliding(100)
        slots = [slot_id(NOW_US - age * 2 * SECOND_US, window.limit.exponent) for age in range(20)]
        window.merge([Entry(Origin("there", 1 + other), slot, 5) for slot in slots for other in range(others)], NOW_US)

        def deny() -> None:
            for denied in range(100):
                hits = 1 + denied % 2
                assert not window.take(hits, NOW_US + denied, always=is_charged)
                assert window.retry_after_us(hits) > 0
                window.merge([Entry(ELSEWHERE, slots[denied % 20], denied + 1)], NOW_US + denied)

        return instructions(deny)

    assert work(10) < 1.3 * work(1)


def test_a_fixed_window_admits_at_once_what_fits_exactly() -> None:
    window = fixed(10)
    window.take(4, NOW_US)
    assert window.retry_after_us(6) == 0
    assert window.retry_after_us(7) == window.full_in_us > 0


def test_what_is_heard_of_a_slot_that_has_left_the_period_does_not_count() -> None:
    here, there = sliding(10), sliding(10, origin=THERE)
    there.take(8, NOW_US)
    [entry] = there.entries()
    leaves_us = slot_end_us(entry.slot) + MINUTE_US
    here.advance(leaves_us)
    here.merge([entry], leaves_us)
    assert here.count == here.fold(leaves_us) == 0
