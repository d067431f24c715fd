"""Buckets that many replicas take from in each slot: their slots are kept summed up, and that changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from crdt.work import instructions
from hypothesis import given
from hypothesis import strategies as st

from ratelimit_sidecar.crdt.bucket import SUMMED_ENTRIES, Bucket, Entry, Origin
from ratelimit_sidecar.crdt.journal import Journal
from ratelimit_sidecar.crdt.limit import TokenBucketLimit, Window, WindowLimit
from ratelimit_sidecar.crdt.slot import REFUND, slot_id
from ratelimit_sidecar.crdt.token_bucket import TokenBucket
from ratelimit_sidecar.crdt.window import SlidingWindow

NOW_US = 1_790_000_000_000_000
HERE, AFRESH = Origin("here", 1), Origin("afresh", 1)
THERE = [Origin("there", 1 + number) for number in range(10)]


def token_bucket(capacity: int = 2_000, origin: Origin = HERE, journal: Journal | None = None) -> TokenBucket:
    return TokenBucket(b"k", TokenBucketLimit(2_000, 3_600_000_000, capacity), origin, NOW_US, journal)


def sliding_window(capacity: int = 2_000, origin: Origin = HERE, journal: Journal | None = None) -> SlidingWindow:
    return SlidingWindow(b"k", WindowLimit(capacity, 3_600_000_000, Window.SLIDING), origin, NOW_US, journal)


MakeBucket = Callable[..., TokenBucket | SlidingWindow]


def entry_of(bucket: Bucket, origin: Origin, age: int, tokens: int, now_us: int = NOW_US, kind: int = 0) -> Entry:
    exponent = bucket.limit.exponent
    return Entry(origin, slot_id(now_us - (age << exponent), exponent) | kind, tokens)


def fill(bucket: Bucket, others: Sequence[Origin] = THERE) -> None:
    """Have it hear of takes of all others in each of 45 slots."""
    assert len(others) * 45 > SUMMED_ENTRIES
    bucket.merge([entry_of(bucket, origin, age, 5) for origin in others for age in range(45)], NOW_US)


ages, amounts = st.integers(0, 60), st.integers(1, 400)
events = st.tuples(
    st.sampled_from(
        ["take", "hear", "hear of a refund", "correct", "correct a refund", "refund", "seal", "limit", "set back"]
    ),
    st.integers(0, 400_000_000) | st.just(0),
    ages,
    amounts,
    st.sampled_from(THERE),
)


@pytest.mark.parametrize("make", [token_bucket, sliding_window])
@given(st.lists(events, max_size=25))
def test_a_bucket_counts_what_one_counts_that_hears_all_of_it_afresh(make: MakeBucket, history) -> None:
    journal = Journal()
    bucket = make(journal=journal)
    fill(bucket)
    now_us = NOW_US
    for number, (event, gap_us, age, tokens, origin) in enumerate(history):
        now_us += gap_us
        match event:
            case "take":
                bucket.take(tokens, now_us, always=age > 30)
            case "hear":
                bucket.merge([entry_of(bucket, origin, age, tokens, now_us)], now_us)
            case "hear of a refund":
                bucket.merge([entry_of(bucket, origin, age, tokens, now_us, REFUND)], now_us)
            case "correct":
                bucket.correct_by_sender(origin, [entry_of(bucket, origin, age, 1, now_us)], now_us)
            case "correct a refund":
                bucket.correct_by_sender(origin, [entry_of(bucket, origin, age, 1, now_us, REFUND)], now_us)
            case "refund":
                bucket.refund(tokens, now_us)
            case "seal":
                bucket.shorten(now_us, 1)
                bucket.seal(now_us)
            case "limit":
                bucket.set_limit(make(1_800 + tokens).limit, now_us)
            case "set back":
                now_us -= 6_000_000
                journal.origin = Origin("here", 2 + number)
                bucket.advance(now_us)
        afresh = make(origin=AFRESH)
        afresh.set_limit(bucket.limit, now_us)
        if bucket.base_to_send is not None:
            afresh.merge_base(bucket.base_to_send, now_us)
        afresh.merge(bucket.entries(), now_us)
        assert bucket.fold(now_us) == afresh.fold(now_us)
        assert bucket.slots == sum(1 for _ in bucket.entries())


def test_of_refund_marks_the_highest_holds_also_when_one_is_corrected() -> None:
    window = sliding_window()
    fill(window)
    counted = window.count
    for origin, tokens in ((THERE[0], 9), (THERE[1], 4)):
        window.merge([entry_of(window, origin, 3, tokens, kind=REFUND)], NOW_US)
    assert window.count == counted - 9
    assert window.correct_by_sender(THERE[0], [entry_of(window, THERE[0], 3, 1, kind=REFUND)], NOW_US)
    assert window.count == counted - 4


@pytest.mark.interpreted
@pytest.mark.parametrize("make", [token_bucket, sliding_window])
@pytest.mark.parametrize("kind", [0, REFUND])
def test_who_hears_of_a_bucket_in_debt_or_one_given_back_to_does_not_look_at_all_that_each_replica_took(
    make: MakeBucket, kind: int
) -> None:
    def work(others: Sequence[Origin]) -> int:
        bucket = make(10)
        fill(bucket, others)
        bucket.merge([entry_of(bucket, THERE[0], 0, 9_999)], NOW_US)
        assert bucket.debt
        bucket.fold(NOW_US)

        def hear() -> None:
            for turn in range(50):
                bucket.merge([entry_of(bucket, THERE[turn % 10], 1, 10_000 + turn, kind=kind)], NOW_US)
                bucket.refund(1, NOW_US)
                bucket.is_idle(NOW_US + turn)

        return instructions(hear)

    more = [Origin("further", 1 + number) for number in range(10)]
    assert work(THERE + more) < 1.3 * work(THERE)
