"""What a bucket promises, as properties over random histories (P1, P2, P4, P6 of docs/reference/promises.md)."""

from __future__ import annotations

import gc
import random
import time
from collections import Counter
from itertools import zip_longest

import pytest
from crdt.model import deficit_by_formula, most_over_limit
from hypothesis import given
from hypothesis import strategies as st

from ratelimit_sidecar.crdt.bucket import Base, Entry, Origin
from ratelimit_sidecar.crdt.journal import Journal
from ratelimit_sidecar.crdt.limit import TokenBucketLimit
from ratelimit_sidecar.crdt.slot import placed_us, slot_end_us, slot_exponent, slot_id, slot_start_us
from ratelimit_sidecar.crdt.spilled import CELLS, SpilledRefill
from ratelimit_sidecar.crdt.token_bucket import SEAL_BATCH_SLOTS, TokenBucket

NOW_US = 1_790_000_000_000_000
HERE, THERE, ELSEWHERE = (Origin(node, 1) for node in ("here", "there", "elsewhere"))

limits = st.builds(
    TokenBucketLimit,
    tokens=st.integers(1, 50) | st.just(5_000),
    period_us=st.sampled_from([1_000_000, 7_000_001, 60_000_000]),
    capacity=st.integers(1, 60),
    max_debt=st.integers(1, 4),
)
gaps = st.integers(0, 2_000_000) | st.integers(0, 2_000) | st.sampled_from([12_000_000, 400_000_000])
takes = st.lists(st.tuples(gaps, st.integers(0, 8)), max_size=60)
remote_slots = st.lists(
    # Each: time passed, how late the news is, tokens.
    st.tuples(gaps, st.integers(0, 9_000_000), st.integers(1, 9), st.sampled_from([THERE, ELSEWHERE])),
    max_size=40,
)


def unforgiving(limit: TokenBucketLimit) -> TokenBucketLimit:
    """The same limit with debt enough for every history drawn here: the formula knows no forgiveness."""
    return TokenBucketLimit(limit.tokens, limit.period_us, limit.capacity, max_debt=1024)


def slot_refill(limit: TokenBucketLimit) -> int:
    return limit.tokens << limit.exponent


@given(limits, takes, st.lists(st.booleans(), max_size=60))
def test_a_lone_bucket_admits_exactly_what_a_textbook_bucket_admits(limit: TokenBucketLimit, history, seals) -> None:
    """P2, with sealing at any moment and a pause past the horizon in between."""
    bucket = TokenBucket(b"k", limit, HERE, NOW_US)
    now_us, level, admitted = NOW_US, limit.scaled_capacity, []
    for (gap_us, hits), seal in zip_longest(history, seals[: len(history)], fillvalue=False):
        now_us += gap_us
        if seal:
            bucket.seal(now_us)
        level = min(limit.scaled_capacity, level + gap_us * limit.tokens)
        fits = hits * limit.period_us <= level
        assert bucket.take(hits, now_us) is fits
        if fits:
            level -= hits * limit.period_us
            admitted.append((now_us, hits))
        assert bucket.deficit == limit.scaled_capacity - level
    assert most_over_limit(admitted, limit) <= 0


@given(limits, remote_slots)
def test_late_arrivals_in_constant_time_equal_the_formula_over_all_events(limit: TokenBucketLimit, arrivals) -> None:
    limit = unforgiving(limit)
    bucket = TokenBucket(b"k", limit, HERE, NOW_US)
    now_us, events, heard = NOW_US, [], Counter()
    for gap_us, age_us, tokens, origin in arrivals:
        now_us += gap_us
        # A slot that is over: its middle has passed, so the formula places it as the bucket does.
        slot = slot_id(now_us - age_us - (1 << limit.exponent), limit.exponent)
        heard[origin, slot] += tokens
        assert bucket.merge([Entry(origin, slot, heard[origin, slot])], now_us) == 1
        events.append((placed_us(slot, limit.exponent), tokens))
        assert bucket.deficit == deficit_by_formula(events, limit, now_us)


@given(limits, takes, remote_slots)
def test_own_takes_amid_late_arrivals_are_within_one_slots_refill_of_the_formula(
    limit: TokenBucketLimit, history, arrivals
) -> None:
    limit = unforgiving(limit)
    bucket = TokenBucket(b"k", limit, HERE, NOW_US)
    now_us, events, heard = NOW_US, [], Counter()
    for (gap_us, hits), (_, age_us, tokens, origin) in zip(history, arrivals, strict=False):
        now_us += gap_us % 200_000
        if bucket.take(hits, now_us):
            events.append((now_us, hits))
        slot = slot_id(now_us - age_us, limit.exponent)
        heard[origin, slot] += tokens
        bucket.merge([Entry(origin, slot, heard[origin, slot])], now_us)
        events.append((placed_us(slot, limit.exponent), tokens))
        assert abs(bucket.deficit - deficit_by_formula(events, limit, now_us)) <= slot_refill(limit)


@given(limits, takes, remote_slots)
def test_own_takes_amid_arrivals_no_later_than_spilled_refill_is_known_equal_the_formula_exactly(
    limit: TokenBucketLimit, history, arrivals
) -> None:
    """Nothing is folded again, so own takes keep their exact time."""
    limit = unforgiving(limit)
    slot_us = 1 << limit.exponent
    bucket = TokenBucket(b"k", limit, HERE, NOW_US)
    first = slot_id(NOW_US - 3 * slot_us, limit.exponent)
    bucket.merge([Entry(THERE, first, 1)], NOW_US)
    now_us, events, heard = NOW_US, [(placed_us(first, limit.exponent), 1)], Counter({(THERE, first): 1})
    for (gap_us, hits), (_, age_us, tokens, origin) in zip(history, arrivals, strict=False):
        now_us += gap_us % 300_000
        if bucket.take(hits, now_us):
            events.append((now_us, hits))
        slot = slot_id(now_us - slot_us - age_us % ((CELLS - 2) * slot_us), limit.exponent)
        heard[origin, slot] += tokens
        bucket.merge([Entry(origin, slot, heard[origin, slot])], now_us)
        events.append((placed_us(slot, limit.exponent), tokens))
        assert bucket.deficit == deficit_by_formula(events, limit, now_us)


@given(limits, takes, remote_slots, st.randoms(use_true_random=False))
def test_replicas_that_heard_the_same_fold_to_the_same_bit(
    limit: TokenBucketLimit, own, remote, rng: random.Random
) -> None:
    here = TokenBucket(b"k", limit, HERE, NOW_US)
    there = TokenBucket(b"k", limit, THERE, NOW_US)
    now_us = NOW_US
    for gap_us, hits in own:
        now_us += gap_us % 200_000
        rng.choice([here, there]).take(hits, now_us)
    for _, age_us, tokens, _ in remote:
        slot = slot_id(now_us - age_us, limit.exponent)
        rng.choice([here, there]).merge([Entry(ELSEWHERE, slot, tokens)], now_us)
    exchange = [(there, entry) for entry in here.entries()] + [(here, entry) for entry in there.entries()]
    exchange *= 2
    rng.shuffle(exchange)
    for receiver, entry in exchange:
        receiver.merge([entry], now_us)
    assert {(e.origin, e.slot): e.tokens for e in here.entries()} == {
        (e.origin, e.slot): e.tokens for e in there.entries()
    }
    later_us = now_us + rng.randrange(3_000_000)
    assert here.fold(later_us) == there.fold(later_us)
    for bucket in (here, there):
        bucket.seal(now_us)
        assert abs(bucket.deficit - bucket.fold(now_us)) <= slot_refill(limit)


@given(limits, takes, takes)
def test_after_a_partition_the_level_is_that_of_one_bucket_fed_all_events(
    limit: TokenBucketLimit, ours, theirs
) -> None:
    """P4, for partitions inside the horizon and debt inside `max_debt`."""
    limit = unforgiving(limit)
    here = TokenBucket(b"k", limit, HERE, NOW_US)
    there = TokenBucket(b"k", limit, THERE, NOW_US)
    events = []
    for bucket, history in ((here, ours), (there, theirs)):
        now_us = NOW_US
        for gap_us, hits in history:
            now_us += gap_us % 150_000
            if bucket.take(hits, now_us):
                events.append((now_us, hits))
    healed_us = NOW_US + 9_100_000
    here_says, there_says = list(here.entries()), list(there.entries())
    here.merge(there_says, healed_us)
    there.merge(here_says, healed_us)
    ideal = deficit_by_formula(events, limit, healed_us)
    for bucket in (here, there):
        assert abs(bucket.deficit - ideal) <= slot_refill(limit)


@given(limits, remote_slots, st.integers(1, 60), st.lists(gaps, min_size=1, max_size=20))
def test_sealing_in_any_steps_folds_to_the_same_bit(limit: TokenBucketLimit, arrivals, burst: int, seal_gaps) -> None:
    often = TokenBucket(b"k", limit, HERE, NOW_US)
    never = TokenBucket(b"k", limit, HERE, NOW_US)
    now_us = NOW_US
    for _, age_us, tokens, origin in arrivals:
        entry = Entry(origin, slot_id(NOW_US - age_us, limit.exponent), tokens * burst)
        often.merge([entry], now_us)
        never.merge([entry], now_us)
    for gap_us in seal_gaps:
        now_us += gap_us * limit.horizon_us // 20_000_000
        often.seal(now_us)
        assert often.fold(now_us) == never.fold(now_us)
        assert often.base.deficit <= limit.debt_ceiling


@given(limits, remote_slots, st.integers(1, 60))
def test_the_live_level_follows_forgiveness_too(limit: TokenBucketLimit, arrivals, burst: int) -> None:
    bucket = TokenBucket(b"k", limit, HERE, NOW_US)
    now_us, heard = NOW_US, Counter()
    for gap_us, age_us, tokens, origin in arrivals:
        now_us += gap_us
        slot = slot_id(now_us - age_us - (1 << limit.exponent), limit.exponent)
        heard[origin, slot] += tokens * burst
        bucket.seal(now_us)
        bucket.merge([Entry(origin, slot, heard[origin, slot])], now_us)
        assert bucket.deficit == bucket.fold(now_us)


@given(limits, takes)
def test_an_idle_bucket_equals_an_absent_one(limit: TokenBucketLimit, history) -> None:
    bucket = TokenBucket(b"k", limit, HERE, NOW_US)
    now_us = NOW_US
    for gap_us, hits in history:
        now_us += gap_us
        bucket.take(hits, now_us)
    bucket.drain_changed_slots()
    later_us = now_us + 3 * limit.horizon_us
    assert bucket.is_idle(later_us)
    assert bucket.fold(later_us) == TokenBucket(b"k", limit, HERE, later_us).fold(later_us) == 0


@given(limits, st.integers(0, 10**12), st.integers(0, 10**12), st.integers(0, 20_000_000), st.integers(0, 20_000_000))
def test_joining_bases_is_commutative_and_idempotent(
    limit: TokenBucketLimit, a: int, b: int, a_age: int, b_age: int
) -> None:
    bases = [Base(limit.boundary_us(NOW_US - age), min(d, limit.debt_ceiling)) for d, age in ((a, a_age), (b, b_age))]
    folds = set()
    for order in (bases, bases[::-1], bases * 2):
        bucket = TokenBucket(b"k", limit, HERE, NOW_US - 30_000_000)
        for base in order:
            bucket.merge_base(base, NOW_US)
        folds.add((bucket.base, bucket.fold(NOW_US)))
    assert len(folds) == 1


def test_debt_of_concurrent_takes_is_repaid_before_anything_is_admitted() -> None:
    limit = TokenBucketLimit(tokens=1, period_us=1_000_000, capacity=10)
    bucket = TokenBucket(b"k", limit, HERE, NOW_US)
    assert bucket.take(10, NOW_US)
    bucket.merge([Entry(THERE, slot_id(NOW_US, limit.exponent), 10)], NOW_US)
    assert bucket.deficit == 20 * limit.period_us
    assert not bucket.take(1, NOW_US + 10_000_000)
    assert bucket.take(1, NOW_US + 11_000_000)


def test_a_change_of_limit_keeps_what_was_taken() -> None:
    bucket = TokenBucket(b"k", TokenBucketLimit(1, 1_000_000, 10), HERE, NOW_US)
    assert bucket.take(8, NOW_US)
    bucket.set_limit(TokenBucketLimit(1, 2_000_000, 20), NOW_US)
    assert bucket.remaining == 12
    assert bucket.take(12, NOW_US)
    assert not bucket.take(1, NOW_US)
    assert sum(entry.tokens for entry in bucket.entries()) == 20


DAY = TokenBucketLimit(1_000, 86_400_000_000, 1_000)
FAST = TokenBucketLimit(10, 1_000_000, 10)


@given(st.lists(st.tuples(gaps, st.integers(0, 400)), max_size=20), takes, st.lists(st.booleans(), max_size=60))
def test_a_limit_that_is_changed_and_changed_back_has_refilled_as_if_it_had_stayed(before, meanwhile, seals) -> None:
    bucket = TokenBucket(b"k", DAY, HERE, NOW_US)
    now_us = NOW_US
    for gap_us, hits in before:
        now_us += gap_us
        bucket.take(hits, now_us, always=True)
    changed_us, deficit = now_us, bucket.deficit
    bucket.set_limit(FAST, now_us)
    for (gap_us, hits), seal in zip_longest(meanwhile, seals[: len(meanwhile)], fillvalue=False):
        now_us += gap_us
        bucket.take(hits, now_us)
        if seal:
            bucket.seal(now_us)
    left = max(0, deficit - (now_us - changed_us) * DAY.tokens)
    assert not (left and bucket.is_idle(now_us)), "dropped, it would be full"
    bucket.set_limit(DAY, now_us)
    # What was taken under the other limit within its horizon counts as well. Debt is cut where its slot counts.
    least = min(left, DAY.debt_ceiling - (1 << DAY.exponent) * DAY.tokens)
    assert least <= bucket.deficit == bucket.fold(now_us)
    assert bucket.deficit <= max(left, sum(hits for _, hits in [*before, *meanwhile]) * DAY.period_us)


def test_a_raised_limit_has_its_tokens_at_once() -> None:
    bucket = TokenBucket(b"k", TokenBucketLimit(10, 86_400_000_000, 10), HERE, NOW_US)
    assert bucket.take(10, NOW_US)
    for limit, least in ((DAY, 990), (FAST, 0), (TokenBucketLimit(20, 1_000_000, 20), 10)):
        bucket.set_limit(limit, NOW_US)
        assert bucket.remaining >= least


def test_replicas_that_change_a_limit_back_at_other_times_owe_the_same() -> None:
    here, there = (TokenBucket(b"k", DAY, origin, NOW_US) for origin in (HERE, THERE))
    assert here.take(1_000, NOW_US)
    there.merge(list(here.entries()), NOW_US)
    changes = sorted([(NOW_US, here), (NOW_US + 1_300_000, there)], key=lambda change: change[0])
    for limit, after_us in ((FAST, 0), (DAY, 25_000_000)):
        for changed_us, bucket in changes:
            now_us = changed_us + after_us
            bucket.seal(now_us + 3_000_000)
            bucket.set_limit(limit, now_us + 3_000_000)
    now_us = NOW_US + 60_000_000
    for receiver, sender in ((here, there), (there, here)):
        assert sender.base_to_send is not None
        receiver.merge_base(sender.base_to_send, now_us)
        receiver.merge(list(sender.entries()), now_us)
    assert here.base == there.base
    assert here.fold(now_us) == there.fold(now_us) > 999 * DAY.period_us


def test_a_clock_that_is_set_back_leaves_what_a_former_limit_refills_as_it_was() -> None:
    bucket = TokenBucket(b"k", TokenBucketLimit(1, 60_000_000, 1), HERE, NOW_US)
    assert bucket.take(1, NOW_US)
    bucket.set_limit(FAST, NOW_US)
    bucket.seal(NOW_US + 20_000_000)
    back_us = NOW_US - 10**12
    bucket.advance(back_us)
    assert not bucket.is_idle(back_us + 39_000_000)
    assert bucket.is_idle(back_us + 41_000_000)


def test_a_change_of_limit_keeps_what_the_base_owes_in_tokens() -> None:
    limit = TokenBucketLimit(1, 100_000_000, 10)
    bucket = TokenBucket(b"k", limit, HERE, NOW_US)
    bucket.merge_base(Base(limit.boundary_us(NOW_US), 40 * limit.period_us), NOW_US)
    owed_tokens = bucket.base.deficit // limit.period_us
    wider = TokenBucketLimit(3, 7_000_000, 20)
    bucket.set_limit(wider, NOW_US)
    assert bucket.base.deficit == owed_tokens * wider.period_us


def test_a_change_of_limit_opens_a_slot_of_the_new_width_and_back_again_no_count_falls() -> None:
    narrow, wide = TokenBucketLimit(1, 1_000_000, 100), TokenBucketLimit(1, 1_000_000, 1_000)
    bucket = TokenBucket(b"k", narrow, HERE, NOW_US)
    for limit in (narrow, wide, narrow):
        bucket.set_limit(limit, NOW_US)
        assert bucket.take(2, NOW_US)
    assert {slot_exponent(entry.slot): entry.tokens for entry in bucket.entries()} == {
        narrow.exponent: 4,
        wide.exponent: 2,
    }


def test_a_peers_base_counts_at_once_but_never_beyond_max_debt() -> None:
    limit = TokenBucketLimit(1, 1_000_000, 10, max_debt=3)
    bucket = TokenBucket(b"k", limit, HERE, NOW_US)
    boundary_us = limit.boundary_us(NOW_US)
    assert bucket.merge_base(Base(boundary_us, 10**15), NOW_US)
    assert bucket.base == Base(boundary_us, limit.debt_ceiling)
    assert bucket.deficit == limit.debt_ceiling - (NOW_US - boundary_us) * limit.tokens
    assert not bucket.merge_base(Base(boundary_us, 10**15), NOW_US)


def test_a_bucket_that_still_owes_from_its_base_is_not_idle() -> None:
    limit = TokenBucketLimit(1, 1_000_000, 10)
    bucket = TokenBucket(b"k", limit, HERE, NOW_US)
    bucket.merge_base(Base(limit.boundary_us(NOW_US), limit.debt_ceiling), NOW_US)
    assert not bucket.is_idle(NOW_US)
    assert bucket.is_idle(NOW_US + bucket.full_in_us)


def test_the_time_until_full_is_rounded_up_so_that_the_bucket_is_full_by_then() -> None:
    bucket = TokenBucket(b"k", TokenBucketLimit(3, 1_000_000, 10), HERE, NOW_US)
    assert bucket.take(1, NOW_US)
    bucket.advance(NOW_US + bucket.full_in_us)
    assert bucket.deficit == 0


def test_only_slots_written_since_the_last_drain_are_reported() -> None:
    journal = Journal()
    bucket = TokenBucket(b"k", TokenBucketLimit(1000, 1_000_000, 1000), HERE, NOW_US, journal)
    bucket.take(1, NOW_US)
    bucket.take(1, NOW_US)
    bucket.take(1, NOW_US + 1_000_000)
    assert journal.buckets == [bucket]
    assert len(bucket.drain_changed_slots()) == 2
    assert bucket.drain_changed_slots() == []
    bucket.take(0, NOW_US + 1_000_000)
    assert journal.buckets == [bucket]
    bucket.take(1, NOW_US + 1_000_000)
    assert journal.buckets == [bucket, bucket]
    assert [slot_exponent(slot) for slot in bucket.drain_changed_slots()] == [bucket.limit.exponent]


def test_a_count_that_was_heard_before_changes_nothing() -> None:
    limit = TokenBucketLimit(1, 1_000_000, 10)
    bucket = TokenBucket(b"k", limit, HERE, NOW_US)
    slot = slot_id(NOW_US, limit.exponent)
    assert bucket.merge([Entry(THERE, slot, 5)], NOW_US) == 1
    assert bucket.merge([Entry(THERE, slot, 5), Entry(THERE, slot, 3)], NOW_US) == 0
    assert bucket.remaining == 5


def test_a_peer_cannot_write_to_slots_that_this_replica_holds() -> None:
    limit = TokenBucketLimit(1, 1_000_000, 10)
    bucket = TokenBucket(b"k", limit, HERE, NOW_US)
    slot = slot_id(NOW_US, limit.exponent)
    assert bucket.take(2, slot_end_us(slot) - 1)
    assert bucket.merge([Entry(HERE, slot, 9)], slot_end_us(slot)) == 0
    assert bucket.take(2, slot_end_us(slot))
    assert bucket.merge([Entry(HERE, slot, 9)], slot_end_us(slot)) == 0
    assert bucket.debt == 0
    assert sum(entry.tokens for entry in bucket.entries()) == 4


def test_a_peer_cannot_write_to_a_slot_of_this_replica_that_is_not_over() -> None:
    limit = TokenBucketLimit(1, 1_000_000, 10)
    bucket = TokenBucket(b"k", limit, HERE, NOW_US)
    assert bucket.merge([Entry(HERE, slot_id(NOW_US, limit.exponent), 9)], NOW_US) == 0
    assert bucket.remaining == 10


def test_entries_behind_the_horizon_or_as_far_ahead_of_it_are_ignored() -> None:
    limit = TokenBucketLimit(1, 1_000_000, 10)
    bucket = TokenBucket(b"k", limit, HERE, NOW_US)
    for age_us in (2 * limit.horizon_us, -2 * limit.horizon_us):
        assert bucket.merge([Entry(THERE, slot_id(NOW_US - age_us, limit.exponent), 9)], NOW_US) == 0
    assert bucket.remaining == 10


def test_an_entry_from_a_clock_slightly_ahead_counts_as_now() -> None:
    limit = TokenBucketLimit(1, 1_000_000, 10)
    bucket = TokenBucket(b"k", limit, HERE, NOW_US)
    bucket.merge([Entry(THERE, slot_id(NOW_US + 500_000, limit.exponent), 4)], NOW_US)
    assert bucket.remaining == 6
    bucket.advance(NOW_US + 1_000_000)
    assert bucket.remaining == 7


def test_a_base_from_a_clock_that_is_seconds_ahead_is_ignored() -> None:
    """Else a slot still being written would be sealed, and its count would start again below what peers were told."""
    limit = TokenBucketLimit(1, 1_000_000, 10)
    bucket = TokenBucket(b"k", limit, HERE, NOW_US)
    assert bucket.take(3, NOW_US)
    assert not bucket.merge_base(Base(NOW_US + limit.horizon_us, 5 * limit.period_us), NOW_US)
    assert bucket.take(1, NOW_US)
    assert [entry.tokens for entry in bucket.entries()] == [4]


def test_debt_older_than_the_horizon_is_forgiven_down_to_max_debt() -> None:
    limit = TokenBucketLimit(1, 1_000_000, 10, max_debt=2)
    bucket = TokenBucket(b"k", limit, HERE, NOW_US)
    slot = slot_id(NOW_US, limit.exponent)
    bucket.merge([Entry(THERE, slot, 1_000)], NOW_US)
    later_us = NOW_US + limit.horizon_us + (2 << limit.exponent)
    bucket.seal(later_us)
    owed = limit.debt_ceiling - (later_us - placed_us(slot, limit.exponent)) * limit.tokens
    assert bucket.deficit == bucket.fold(later_us) == owed


def test_a_local_bucket_notes_nothing_for_peers() -> None:
    bucket = TokenBucket(b"k", TokenBucketLimit(1, 1_000_000, 10), HERE, NOW_US, journal=None)
    assert bucket.take(1, NOW_US)
    assert bucket.drain_changed_slots() == []


def test_slots_are_sealed_in_time_order_whoever_wrote_them() -> None:
    limit = TokenBucketLimit(1, 1_000_000, 10)
    often, never = TokenBucket(b"k", limit, HERE, NOW_US), TokenBucket(b"k", limit, HERE, NOW_US)
    early, late = (slot_id(NOW_US - age_us, limit.exponent) for age_us in (9_000_000, 1_000_000))
    for bucket in (often, never):
        bucket.merge([Entry(THERE, late, 30), Entry(ELSEWHERE, early, 5)], NOW_US)
    later_us = NOW_US + limit.horizon_us
    often.seal(later_us)
    assert list(often.entries()) == []
    assert often.base.deficit == never.fold(later_us) + (later_us - often.base.boundary_us) * limit.tokens > 0


def test_a_lone_bucket_with_more_refill_in_a_slot_than_capacity_is_never_forgiven_what_it_did_not_owe() -> None:
    limit = TokenBucketLimit(5_000, 1_000_000, 5, max_debt=1)
    bucket = TokenBucket(b"k", limit, HERE, NOW_US)
    for burst_at_us in (NOW_US, NOW_US + limit.horizon_us):
        level = limit.scaled_capacity
        for now_us in range(burst_at_us, burst_at_us + 60_000, 1_000):
            bucket.seal(now_us)
            level = min(limit.scaled_capacity, level + 1_000 * limit.tokens)
            assert bucket.take(5, now_us)
            level -= 5 * limit.period_us
            assert bucket.deficit == limit.scaled_capacity - level


def test_a_busy_bucket_holds_no_more_slots_than_its_horizon_and_one_batch() -> None:
    limit = TokenBucketLimit(1_000, 1_000_000, 100)
    bucket = TokenBucket(b"k", limit, HERE, NOW_US)
    most = (limit.horizon_us >> limit.exponent) + SEAL_BATCH_SLOTS + 2
    for step in range(3 * most):
        now_us = NOW_US + (step << limit.exponent)
        assert bucket.take(1, now_us)
        bucket.merge([Entry(THERE, slot_id(now_us, limit.exponent), 1)], now_us)
        assert len(list(bucket.entries())) <= 2 * most


@pytest.mark.parametrize("sealed_first", [HERE, THERE])
def test_the_base_of_a_peer_that_heard_the_same_and_sealed_earlier_or_later_changes_no_fold(
    sealed_first: Origin,
) -> None:
    limit = TokenBucketLimit(1, 1_000_000, 32)
    here, there = TokenBucket(b"k", limit, HERE, NOW_US), TokenBucket(b"k", limit, THERE, NOW_US)
    heard = [
        Entry(ELSEWHERE, slot_id(NOW_US - limit.horizon_us * tenths // 10, limit.exponent), 120) for tenths in (8, 3)
    ]
    for bucket in (here, there):
        bucket.merge(heard, NOW_US)
    later_us = NOW_US + limit.horizon_us // 3
    (here if sealed_first == HERE else there).seal(later_us)
    before = here.fold(later_us)
    here.merge_base(there.base, later_us)
    assert here.fold(later_us) == before == there.fold(later_us)


@given(limits, takes, takes, st.integers(-500_000, 500_000))
def test_a_peers_skewed_clock_costs_at_most_the_refill_of_its_skew(
    limit: TokenBucketLimit, ours, theirs, skew_us: int
) -> None:
    """Beside the one slot's refill that placing by slots costs anyway; here in tokens times `period_us`."""
    limit = unforgiving(limit)
    here = TokenBucket(b"k", limit, HERE, NOW_US)
    there = TokenBucket(b"k", limit, THERE, NOW_US + skew_us)
    events = []
    for bucket, history, ahead_us in ((here, ours, 0), (there, theirs, skew_us)):
        now_us = NOW_US
        for gap_us, hits in history:
            now_us += gap_us % 120_000
            if bucket.take(hits, now_us + ahead_us):
                events.append((now_us, hits))
    received_us = NOW_US + 7_200_000
    here.merge(list(there.entries()), received_us)
    ideal = deficit_by_formula(events, limit, received_us)
    assert abs(here.deficit - ideal) <= slot_refill(limit) + abs(skew_us) * limit.tokens


@pytest.mark.parametrize("is_sealed", [False, True])
def test_what_was_sealed_under_a_limit_with_narrower_slots_is_in_the_base_for_everybody(is_sealed: bool) -> None:
    """Found by the cluster machine: the slot began before the narrow limit's boundary, and its middle is after it."""
    wide, narrow = TokenBucketLimit(1, 60_000_000, 5), TokenBucketLimit(10, 1_000_000, 10)
    here, there = TokenBucket(b"k", wide, HERE, NOW_US), TokenBucket(b"k", wide, THERE, NOW_US)
    slot_us = 1 << wide.exponent
    taken_us = (NOW_US // slot_us + 2) * slot_us - 1
    assert here.take(1, taken_us)
    there.merge(list(here.entries()), taken_us)
    now_us = taken_us + 3_000_000
    here.set_limit(narrow, now_us)
    if is_sealed:
        here.seal(now_us)
    here.set_limit(wide, now_us)
    for receiver, sender in ((here, there), (there, here)) * 2:
        if sender.base_to_send:
            receiver.merge_base(sender.base_to_send, now_us)
        receiver.merge(list(sender.entries()), now_us)
    assert here.base == there.base
    assert here.taken == there.taken
    assert here.fold(now_us) == there.fold(now_us) > 0


@pytest.mark.parametrize("first_to_change", [HERE, THERE])
def test_a_replica_that_forgot_its_own_takes_under_a_limit_with_a_shorter_horizon_hears_of_them(
    first_to_change: Origin,
) -> None:
    """Found by the cluster machine: it dropped the bucket as idle, while peers still counted, or again."""
    narrow, wide = TokenBucketLimit(10, 1_000_000, 10), TokenBucketLimit(1, 60_000_000, 5)
    here, there = TokenBucket(b"k", narrow, HERE, NOW_US), TokenBucket(b"k", narrow, THERE, NOW_US)
    assert here.take(1, NOW_US)
    there.merge(list(here.entries()), NOW_US)
    here.drain_changed_slots()
    if first_to_change == THERE:
        there.set_limit(wide, NOW_US)
    now_us = NOW_US + narrow.horizon_us + (2 << narrow.exponent)
    assert here.is_idle(now_us)
    here = TokenBucket(b"k", wide, HERE, now_us)
    there.set_limit(wide, now_us)
    assert here.merge(list(there.entries()), now_us) == 1
    assert here.merge(list(there.entries()), now_us) == 0
    assert here.taken == there.taken
    assert here.fold(now_us) == there.fold(now_us) == here.deficit > 0


@pytest.mark.parametrize("age_us", range(0, 300_000, 20_000))
def test_a_late_slot_narrower_than_those_of_the_limit_is_paid_with_what_was_spilled_since_its_own_middle(
    age_us: int,
) -> None:
    narrow, wide = TokenBucketLimit(1_000, 1_000_000, 10), TokenBucketLimit(10, 1_000_000, 10)
    assert narrow.exponent < wide.exponent
    bucket = TokenBucket(b"k", wide, HERE, NOW_US)
    bucket.merge([Entry(THERE, slot_id(NOW_US - 1_000_000, wide.exponent), 1)], NOW_US)
    bucket.merge([Entry(ELSEWHERE, slot_id(NOW_US - age_us, narrow.exponent), 3)], NOW_US)
    assert bucket.deficit == bucket.fold(NOW_US)


def test_who_starts_hears_what_peers_took_before_a_months_limit_began_to_refill_sooner() -> None:
    month_us = 30 * 86_400_000_000
    former, limit = TokenBucketLimit(100, month_us, 100), TokenBucketLimit(100, month_us, 40)
    there = TokenBucket(b"k", former, THERE, NOW_US)
    assert there.take(100, NOW_US)
    there.set_limit(limit, NOW_US)
    here = TokenBucket(b"k", limit, HERE, NOW_US)
    here.merge(there.entries(), NOW_US)
    assert here.fold(NOW_US) == there.fold(NOW_US)
    assert not here.take(20, NOW_US)


def test_what_is_sealed_at_a_peers_boundary_amid_a_slot_is_cut_to_max_debt_too() -> None:
    wide, narrow = TokenBucketLimit(1, 60_000_000, 5), TokenBucketLimit(10, 1_000_000, 10)
    bucket = TokenBucket(b"k", wide, HERE, NOW_US)
    slot = slot_id(NOW_US - narrow.horizon_us, wide.exponent)
    bucket.merge([Entry(THERE, slot, 1_000)], NOW_US)
    assert bucket.merge_base(Base(slot_start_us(slot) + 1_000_000, 0), NOW_US)
    assert not list(bucket.entries())
    assert 0 < bucket.base.deficit <= wide.debt_ceiling


def test_what_late_deltas_need_is_held_only_while_there_are_slots_of_peers() -> None:
    def is_held() -> bool:
        return any(isinstance(held, SpilledRefill) for held in gc.get_referents(bucket))

    limit = TokenBucketLimit(10, 1_000_000, 10)
    bucket = TokenBucket(b"k", limit, HERE, NOW_US)
    assert bucket.take(1, NOW_US)
    bucket.set_limit(TokenBucketLimit(10, 1_000_000, 11), NOW_US)
    assert not is_held()
    bucket.merge([Entry(THERE, slot_id(NOW_US - 1_000_000, limit.exponent), 1)], NOW_US)
    assert is_held()
    bucket.seal(NOW_US + 2 * limit.horizon_us)
    assert not is_held()


def test_what_is_heard_in_debt_costs_what_there_are_of_slots_however_many_replicas_take_in_each() -> None:
    """Each flush of each of them tells of the bucket that one caller goes on asking for, and it may have to be cut."""
    limit = TokenBucketLimit(100, 1_000_000, 100)
    slots = [slot_id(NOW_US - age * (1 << limit.exponent), limit.exponent) for age in range(70)]

    def seconds_with(replicas: int) -> float:
        bucket = TokenBucket(b"k", limit, Origin("here", 1), NOW_US)
        bucket.merge([Entry(Origin("there", 1 + of), slot, 50) for of in range(replicas) for slot in slots], NOW_US)
        assert bucket.debt

        def seconds(tokens: int) -> float:
            began = time.thread_time()
            assert bucket.merge([Entry(Origin("there", 1), slots[0], tokens)], NOW_US) == 1
            return time.thread_time() - began

        return min(seconds(100 + turn) for turn in range(20))

    assert seconds_with(64) < 4 * seconds_with(1)


def test_a_bucket_is_not_idle_before_an_own_slot_that_was_sealed_is_over() -> None:
    """Made anew, it would count that slot from zero, below what peers have."""
    wide, narrow = TokenBucketLimit(100, 3_600_000_000, 100), TokenBucketLimit(10, 1_000_000, 10)
    bucket = TokenBucket(b"k", wide, HERE, NOW_US)
    bucket.take(1, NOW_US)
    ends_us = slot_end_us(slot_id(NOW_US, wide.exponent))
    bucket.set_limit(narrow, NOW_US)
    for now_us in range(NOW_US, ends_us, narrow.horizon_us):
        bucket.seal(now_us)
        assert not bucket.is_idle(now_us)
    assert bucket.base.boundary_us > NOW_US
    assert bucket.is_idle(ends_us + narrow.horizon_us)
