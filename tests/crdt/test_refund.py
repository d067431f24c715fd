"""What an operator gives back: as much as was asked for, never more than fills the bucket, and everywhere the same.

`test_cluster_machine.py` gives back amid every mishap; here is what each algorithm makes of it.
"""

from __future__ import annotations

import random

import pytest
from crdt.model import deficit_by_formula
from hypothesis import given
from hypothesis import strategies as st

from ratelimit_sidecar.crdt.bucket import Bucket, Entry, Origin
from ratelimit_sidecar.crdt.journal import Journal
from ratelimit_sidecar.crdt.limit import AnyLimit, TokenBucketLimit, Window, WindowLimit
from ratelimit_sidecar.crdt.slot import REFUND, placed_us, slot_id
from ratelimit_sidecar.crdt.token_bucket import EARLY_REFUND_US, TokenBucket
from ratelimit_sidecar.crdt.window import FixedWindow, SlidingWindow

SECOND_US = 1_000_000
MINUTE_US = 60 * SECOND_US
DAY_US = 86_400 * SECOND_US
NOW_US = 1_790_000_000_000_000 // DAY_US * DAY_US
HERE, THERE, ELSEWHERE = (Origin(node, 1) for node in ("here", "there", "elsewhere"))

TOKENS = TokenBucketLimit(60, MINUTE_US, 60)
DAILY = TokenBucketLimit(100, DAY_US, 100)
FIXED = WindowLimit(60, MINUTE_US, Window.FIXED)
SLIDING = WindowLimit(60, MINUTE_US, Window.SLIDING)
ALL = pytest.mark.parametrize("limit", [TOKENS, DAILY, FIXED, SLIDING], ids=["tokens", "daily", "fixed", "sliding"])


def bucket_of(limit: AnyLimit, origin: Origin = HERE, journal: Journal | None = None) -> Bucket:
    if isinstance(limit, TokenBucketLimit):
        return TokenBucket(b"k", limit, origin, NOW_US, journal)
    if limit.window is Window.FIXED:
        return FixedWindow(b"k", limit, origin, NOW_US, journal)
    return SlidingWindow(b"k", limit, origin, NOW_US, journal)


def tell(sender: Bucket, receiver: Bucket, now_us: int) -> None:
    receiver.merge(list(sender.entries()), now_us)


@ALL
def test_refunded_are_as_many_tokens_as_were_asked_for(limit: AnyLimit) -> None:
    bucket = bucket_of(limit)
    bucket.take(50, NOW_US)
    before = bucket.remaining
    assert bucket.refund(20, NOW_US + 1) == 20
    assert bucket.remaining == before + 20


@ALL
def test_no_more_is_refund_than_fills_the_bucket(limit: AnyLimit) -> None:
    bucket = bucket_of(limit)
    bucket.take(5, NOW_US)
    assert bucket.refund(1_000_000, NOW_US) == 5
    assert bucket.remaining == limit.capacity
    assert bucket.refund(1_000_000, NOW_US) == 0
    bucket.take(limit.capacity, NOW_US + 1)
    assert bucket.remaining == 0


@ALL
def test_a_full_bucket_is_given_nothing_and_has_nothing_to_tell(limit: AnyLimit) -> None:
    journal = Journal()
    bucket = bucket_of(limit, journal=journal)
    assert bucket.refund(None, NOW_US) == 0
    assert not journal.buckets
    assert not list(bucket.entries())


@ALL
def test_after_all_was_refunded_a_peer_sees_a_full_bucket_and_counts_what_is_taken_later(limit: AnyLimit) -> None:
    journal = Journal()
    here, there = bucket_of(limit, journal=journal), bucket_of(limit, THERE)
    for second in range(5):
        here.take(10, NOW_US + second * SECOND_US)
        there.take(7, NOW_US + second * SECOND_US)
    now_us = NOW_US + 5 * SECOND_US
    tell(here, there, now_us)
    tell(there, here, now_us)
    here.drain_changed_slots()
    journal.buckets.clear()
    here.refund(None, now_us)
    assert journal.buckets == [here]
    there.merge(list(here.own_entries(here.drain_changed_slots())), now_us + 20_000)
    for bucket in (here, there):
        bucket.advance(now_us + 20_000)
        assert bucket.remaining == limit.capacity
    # In another slot of all limits but those of a day.
    later_us = now_us + 3 * SECOND_US
    assert there.take(limit.capacity - 1, later_us)
    tell(there, here, later_us)
    if limit is not DAILY:
        assert here.remaining <= 1


@ALL
def test_debt_stays_what_is_left_of_it(limit: AnyLimit) -> None:
    here, there = bucket_of(limit), bucket_of(limit, THERE)
    here.take(limit.capacity, NOW_US)
    there.take(limit.capacity, NOW_US)
    tell(there, here, NOW_US)
    assert here.debt == limit.capacity
    assert here.refund(10, NOW_US) == 10
    if limit is FIXED:
        # What it counts over the limit was denied; it owes nothing.
        assert (here.debt, here.remaining) == (0, 10)
    else:
        assert (here.debt, here.remaining) == (limit.capacity - 10, 0)
    here.refund(None, NOW_US)
    assert (here.debt, here.remaining) == (0, limit.capacity)


@pytest.mark.parametrize("limit", [FIXED, SLIDING], ids=["fixed", "sliding"])
def test_two_replicas_that_give_back_the_same_window_do_so_once(limit: WindowLimit) -> None:
    here, there = bucket_of(limit), bucket_of(limit, THERE)
    here.take(50, NOW_US)
    tell(here, there, NOW_US)
    here.refund(None, NOW_US + 1)
    there.refund(None, NOW_US + 1)
    here.take(40, NOW_US + 2)
    tell(here, there, NOW_US + 3)
    tell(there, here, NOW_US + 3)
    assert here.remaining == there.remaining == limit.requests - 40


def test_what_was_refunded_of_a_sliding_window_does_not_come_back_a_second_time() -> None:
    bucket = bucket_of(SLIDING)
    bucket.take(60, NOW_US)
    bucket.refund(None, NOW_US + 30 * SECOND_US)
    assert bucket.take(60, NOW_US + 31 * SECOND_US)
    # The first takes leave the period here, and what was given back for them.
    assert not bucket.take(1, NOW_US + 70 * SECOND_US)
    assert bucket.take(60, NOW_US + 95 * SECOND_US)


def test_a_fixed_window_forgets_what_was_refunded_with_what_was_taken() -> None:
    bucket = bucket_of(FIXED)
    bucket.take(60, NOW_US)
    bucket.refund(None, NOW_US)
    assert not bucket.take(61, NOW_US + MINUTE_US)
    assert bucket.is_idle(NOW_US + 10 * MINUTE_US)


def test_refunded_before_it_is_heard_that_it_was_taken_it_pays_for_that() -> None:
    for limit in (TOKENS, FIXED, SLIDING):
        here, there = bucket_of(limit), bucket_of(limit, THERE)
        there.take(50, NOW_US)
        there.refund(None, NOW_US + 1)
        taken, given = sorted(there.entries(), key=lambda entry: entry.slot)
        assert given.slot & REFUND
        here.merge([given], NOW_US + 2)
        assert here.remaining == limit.capacity
        here.merge([taken], NOW_US + 3)
        assert here.remaining == limit.capacity


@pytest.mark.parametrize("known", [0, 20, 50])
@pytest.mark.parametrize("limit", [TOKENS, DAILY], ids=["tokens", "daily"])
def test_what_was_taken_elsewhere_is_given_back_once_it_is_heard_of(limit: TokenBucketLimit, known: int) -> None:
    here, there = bucket_of(limit, HERE, Journal()), bucket_of(limit, THERE, Journal())
    there.take(known, NOW_US)
    tell(there, here, NOW_US)
    there.take(50 - known, NOW_US)
    assert here.give_back(50, NOW_US) == known
    # That a request used 7.
    here.take(7, NOW_US)
    for _ in range(2):
        tell(there, here, NOW_US)
        tell(here, there, NOW_US)
    assert here.remaining == there.remaining == limit.capacity - 7


def test_several_that_come_at_once_are_given_back_each() -> None:
    here, there = bucket_of(DAILY, HERE, Journal()), bucket_of(DAILY, THERE, Journal())
    for _ in range(3):
        here.give_back(20, NOW_US)
    for hits in (30, 30, 1):
        there.take(hits, NOW_US)
        tell(there, here, NOW_US)
    assert here.remaining == DAILY.capacity - 1, "each once"


def test_however_much_is_given_back_no_more_than_the_capacity_is_taken_off_what_is_heard_of_later() -> None:
    here, there = bucket_of(DAILY, HERE, Journal()), bucket_of(DAILY, THERE, Journal())
    for _ in range(3):
        here.give_back(60, NOW_US)
    for _ in range(2):
        assert there.take(80, NOW_US)
        tell(there, here, NOW_US)
        tell(here, there, NOW_US)
    assert here.remaining == there.remaining == DAILY.capacity - 60


def test_what_is_heard_of_too_late_is_not_given_back() -> None:
    here, there = bucket_of(DAILY, HERE, Journal()), bucket_of(DAILY, THERE, Journal())
    here.give_back(20, NOW_US)
    there.take(20, NOW_US)
    tell(there, here, NOW_US + EARLY_REFUND_US)
    assert here.remaining == DAILY.capacity - 20


def test_a_bucket_that_may_have_to_give_back_is_kept_and_asked_about() -> None:
    journal = Journal()
    bucket = bucket_of(DAILY, HERE, journal)
    bucket.give_back(20, NOW_US)
    assert journal.buckets == [bucket]
    assert bucket.drain_changed_slots() == []
    assert not bucket.is_idle(NOW_US + EARLY_REFUND_US - 1)
    assert bucket.is_idle(NOW_US + EARLY_REFUND_US)


def test_a_bucket_that_was_refunded_is_forgotten_like_any_other() -> None:
    bucket = bucket_of(TOKENS)
    bucket.take(50, NOW_US)
    bucket.refund(None, NOW_US)
    assert not bucket.is_idle(NOW_US + SECOND_US)
    later_us = NOW_US + 2 * TOKENS.horizon_us
    bucket.seal(later_us)
    assert not list(bucket.entries())
    assert bucket.is_idle(later_us)


histories = st.lists(
    st.tuples(
        st.integers(0, 3 * SECOND_US),
        st.integers(0, 6 * SECOND_US),
        st.integers(1, 30),
        st.booleans(),
        st.sampled_from([THERE, ELSEWHERE]),
    ),
    max_size=40,
)


@given(histories)
def test_whatever_comes_late_the_level_is_that_of_the_formula_over_all_events(history) -> None:
    limit = TokenBucketLimit(10, SECOND_US, 60, max_debt=1024)
    bucket = TokenBucket(b"k", limit, HERE, NOW_US)
    now_us = NOW_US
    counts: dict[tuple[Origin, int], int] = {}
    events = []
    for gap_us, age_us, tokens, is_refund, origin in history:
        now_us += gap_us
        slot = slot_id(now_us - age_us - (1 << limit.exponent), limit.exponent) | is_refund * REFUND
        counts[origin, slot] = counts.get((origin, slot), 0) + tokens
        bucket.merge([Entry(origin, slot, counts[origin, slot])], now_us)
        events.append((placed_us(slot, limit.exponent), -tokens if is_refund else tokens))
        assert bucket.deficit == deficit_by_formula(events, limit, now_us)
        assert bucket.fold(now_us) == bucket.deficit


@ALL
@given(history=histories, rng=st.randoms(use_true_random=False))
def test_replicas_that_heard_the_same_in_any_order_agree(limit: AnyLimit, history, rng: random.Random) -> None:
    now_us = NOW_US
    counts: dict[tuple[Origin, int], int] = {}
    said = []
    for gap_us, age_us, tokens, is_refund, origin in history:
        now_us += gap_us // 10
        slot_us = now_us - now_us % limit.period_us if limit is FIXED else now_us - age_us
        slot = slot_id(slot_us, limit.exponent) | is_refund * REFUND
        counts[origin, slot] = counts.get((origin, slot), 0) + tokens
        said.append(Entry(origin, slot, counts[origin, slot]))
    folds, levels = set(), set()
    for _ in range(3):
        rng.shuffle(said)
        bucket = bucket_of(limit)
        for entry in said + said[:3]:
            bucket.merge([entry], now_us)
        folds.add(bucket.fold(now_us))
        levels.add((bucket.remaining, bucket.debt))
        assert bucket.remaining <= limit.capacity
    assert len(folds) == len(levels) == 1


@ALL
def test_a_peer_that_comes_back_is_told_of_what_was_given_back_meanwhile(limit: AnyLimit) -> None:
    """Also where that is written to slots that were over before the peer was lost."""
    bucket = bucket_of(limit)
    bucket.take(50, NOW_US)
    lost_us = NOW_US + 30 * SECOND_US
    bucket.refund(None, lost_us + SECOND_US)
    assert any(entry.slot & REFUND for entry in bucket.entries_since(bucket.origin, lost_us))


def test_a_slot_placed_later_than_that_of_now_is_paid_for_too() -> None:
    """A peer's clock is ahead, or the slots were of another width before the limit changed."""
    bucket = bucket_of(TOKENS)
    ahead = slot_id(NOW_US + 4 * SECOND_US, TOKENS.exponent)
    bucket.merge([Entry(THERE, ahead, 30)], NOW_US)
    bucket.refund(None, NOW_US)
    for later_us in (0, SECOND_US, 5 * SECOND_US):
        assert bucket.fold(NOW_US + later_us) == 0


@pytest.mark.parametrize("limit", [FIXED, SLIDING], ids=["fixed", "sliding"])
def test_a_window_in_which_more_was_given_back_than_is_heard_to_be_taken_counts_own_takes_like_the_fold(
    limit: WindowLimit,
) -> None:
    here, there = bucket_of(limit), bucket_of(limit, THERE)
    there.take(50, NOW_US)
    there.refund(None, NOW_US + 1)
    taken, given = sorted(there.entries(), key=lambda entry: entry.slot)
    here.merge([given], NOW_US + 2)
    for hits in (0, 10, 45):
        assert here.would_admit(hits, NOW_US + 3)
        assert here.take(hits, NOW_US + 3)
        assert limit.requests - here.remaining == here.fold(NOW_US + 3)
    here.merge([taken], NOW_US + 4)
    assert here.remaining == limit.requests - 55


def test_what_is_taken_in_a_slot_that_was_refunded_leaves_a_sliding_window_in_time() -> None:
    bucket = bucket_of(SLIDING)
    bucket.take(1, NOW_US)
    bucket.refund(None, NOW_US)
    bucket.take(1, NOW_US)
    assert bucket.remaining == SLIDING.requests - 1
    bucket.advance(NOW_US + 2 * MINUTE_US)
    assert bucket.remaining == SLIDING.requests
