"""A clock that was set back: no level rises by it, nothing told is taken back, and replicas share again at once."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from joined import join

from ratelimit_sidecar.crdt.bucket import SET_BACK_US, Bucket, Origin
from ratelimit_sidecar.crdt.limit import AnyLimit, TokenBucketLimit, Window, WindowLimit
from ratelimit_sidecar.crdt.slot import REFUND
from ratelimit_sidecar.crdt.store import Store

SECOND_US = 1_000_000
HOUR_US = 3_600 * SECOND_US
NOW_US = 1_790_000_000_000_000

LIMITS: list[AnyLimit] = [
    TokenBucketLimit(1, SECOND_US, 20),
    TokenBucketLimit(1_000, 24 * HOUR_US, 50),
    TokenBucketLimit(1_000, SECOND_US, 1_000),
    WindowLimit(20, 60 * SECOND_US, Window.FIXED),
    WindowLimit(20, 24 * HOUR_US, Window.FIXED),
    WindowLimit(20, 60 * SECOND_US, Window.SLIDING),
    WindowLimit(20, 24 * HOUR_US, Window.SLIDING),
]

each_limit = pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: repr(limit)[:60])


@dataclass
class Replica:
    """One bucket, and how far its clock is ahead."""

    name: str
    limit: AnyLimit
    ahead_us: int = 0
    lives: int = 1
    store: Store = field(init=False)

    def __post_init__(self) -> None:
        self.store = Store(Origin(self.name, self.lives), lambda _key: self.limit)

    def bucket(self, true_us: int) -> Bucket:
        bucket = self.store.bucket(b"k", self.limit, true_us + self.ahead_us)
        bucket.advance(true_us + self.ahead_us)
        return bucket

    def take(self, hits: int, true_us: int) -> bool:
        return self.bucket(true_us).take(hits, true_us + self.ahead_us)

    def set_clock(self, ahead_us: int) -> None:
        if ahead_us < self.ahead_us:
            self.lives += 1
            self.store.go_back(Origin(self.name, self.lives))
        self.ahead_us = ahead_us

    def hear(self, other: Replica, true_us: int) -> None:
        told = other.bucket(true_us)
        join(self.store, b"k", told.base_to_send, list(told.entries()), true_us + self.ahead_us)


@each_limit
@pytest.mark.parametrize("ahead_us", [SET_BACK_US, 12 * SECOND_US, HOUR_US, 100 * 24 * HOUR_US])
@pytest.mark.parametrize("taken_by", ["one", "other"])
def test_no_level_rises_when_the_clock_is_set_back(limit: AnyLimit, ahead_us: int, taken_by: str) -> None:
    one = Replica("one", limit, ahead_us)
    taker = one if taken_by == "one" else Replica(taken_by, limit, ahead_us)
    for second in range(3):
        while taker.take(1, NOW_US + second * SECOND_US):
            pass
    now_us = NOW_US + 2 * SECOND_US
    if taker is not one:
        one.hear(taker, now_us)
    left = one.bucket(now_us).remaining
    one.set_clock(0)
    assert one.bucket(now_us).remaining <= left
    assert not one.take(left + 1, now_us)


def test_a_window_that_was_used_up_and_forgotten_is_not_empty_when_the_clock_is_back_in_it() -> None:
    limit = WindowLimit(10, 60 * SECOND_US, Window.FIXED)
    one = Replica("one", limit)
    begin_us = NOW_US - NOW_US % limit.period_us
    assert one.take(10, begin_us + 52 * SECOND_US)
    one.set_clock(13 * SECOND_US)
    assert one.take(10, begin_us + 52 * SECOND_US)
    one.set_clock(0)
    assert not one.take(1, begin_us + 53 * SECOND_US)
    assert not one.take(1, begin_us + 61 * SECOND_US)


def test_what_comes_into_a_sliding_window_again_does_not_make_up_for_what_was_taken_after_it() -> None:
    limit = WindowLimit(30, 60 * SECOND_US, Window.SLIDING)
    one = Replica("one", limit, 20 * SECOND_US)
    assert one.take(30, NOW_US)
    assert one.take(30, NOW_US + 63 * SECOND_US)
    one.set_clock(0)
    for second in range(64, 123):
        assert not one.take(1, NOW_US + second * SECOND_US)
    assert one.take(30, NOW_US + 127 * SECOND_US)


@each_limit
def test_time_goes_on_at_once(limit: AnyLimit) -> None:
    """It stood still until the wrong time had come, an hour later."""
    one = Replica("one", limit, HOUR_US)
    while one.take(1, NOW_US):
        pass
    one.set_clock(0)
    one.bucket(NOW_US)
    assert one.bucket(NOW_US).full_in_us <= 2 * limit.period_us * max(1, limit.capacity) + HOUR_US
    if limit.period_us <= 60 * SECOND_US:
        assert one.take(1, NOW_US + 2 * 61 * SECOND_US)


@each_limit
def test_what_is_taken_afterwards_is_shared_in_both_directions(limit: AnyLimit) -> None:
    one, other = Replica("one", limit, HOUR_US), Replica("other", limit)
    one.take(3, NOW_US)
    other.hear(one, NOW_US)
    now_us = NOW_US + SECOND_US
    one.set_clock(0)
    one.hear(other, now_us)
    other.hear(one, now_us)
    now_us += SECOND_US // 100
    assert one.take(5, now_us)
    assert other.take(4, now_us)
    other.hear(one, now_us)
    one.hear(other, now_us)
    later_us = now_us + SECOND_US // 1_000
    assert one.bucket(later_us).fold(later_us) == other.bucket(later_us).fold(later_us)
    for each in (one, other):
        taken = each.bucket(later_us).taken
        assert sum(taken[Origin("one", 2)].values()) >= 5
        assert sum(taken[Origin("other", 1)].values()) == 4


@each_limit
def test_what_was_told_before_a_jump_that_is_taken_back_is_not_lost(limit: AnyLimit) -> None:
    """The replica has forgotten it in the meantime, and its peer has not."""
    one, other = Replica("one", limit), Replica("other", limit)
    assert one.take(10, NOW_US)
    other.hear(one, NOW_US)
    one.set_clock(100 * 24 * HOUR_US)
    one.bucket(NOW_US).seal(NOW_US + one.ahead_us)
    one.store.sweep(NOW_US + one.ahead_us, 10)
    now_us = NOW_US + SECOND_US // 100
    one.set_clock(0)
    one.take(3, now_us)
    for _ in range(2):
        other.hear(one, now_us)
        one.hear(other, now_us)
    told = {origin: sum(slots.values()) for origin, slots in other.bucket(now_us).taken.items()}
    assert told == {Origin("one", 1): 10, Origin("one", 2): 3}
    assert one.bucket(now_us).taken == other.bucket(now_us).taken


@each_limit
def test_what_is_taken_after_a_refund_is_counted(limit: AnyLimit) -> None:
    """The refund was the first that the bucket wrote after its clock was set back."""
    one = Replica("one", limit, 12 * SECOND_US)
    assert one.take(10, NOW_US)
    now_us = NOW_US + 12 * SECOND_US
    one.set_clock(0)
    one.bucket(now_us).refund(None, now_us)
    assert one.take(3, now_us)
    counts = one.bucket(now_us).taken[Origin("one", 2)]
    assert [tokens for slot, tokens in counts.items() if not slot & REFUND] == [3]
    assert min(counts) > 0


steps = st.lists(
    st.tuples(
        st.integers(0, 20 * SECOND_US),
        st.integers(0, 5),
        st.sampled_from([None, None, None, 0, -HOUR_US, HOUR_US, 12 * SECOND_US, -12 * SECOND_US]),
        st.booleans(),
        st.booleans(),
    ),
    max_size=40,
)


@given(st.sampled_from(LIMITS), steps)
def test_however_clocks_are_set_no_count_falls_and_all_is_equal_in_the_end(limit: AnyLimit, history) -> None:
    one, other = Replica("one", limit), Replica("other", limit)
    true_us = NOW_US
    told: dict[tuple[Origin, int], int] = {}
    for gap_us, hits, ahead_us, heard, refunds in history:
        true_us += gap_us
        if ahead_us is not None:
            one.set_clock(ahead_us)
        if refunds:
            one.bucket(true_us).refund(2, true_us + one.ahead_us)
        one.take(hits, true_us)
        other.take(1, true_us)
        for origin, slots in one.bucket(true_us).taken.items():
            if origin == one.store.origin:
                for slot, tokens in slots.items():
                    assert tokens >= told.get((origin, slot), 0)
                    told[origin, slot] = tokens
        if heard:
            one.hear(other, true_us)
            other.hear(one, true_us)
    one.set_clock(0)
    for _ in range(2):
        one.hear(other, true_us)
        other.hear(one, true_us)
    # Past what either still believes to be ahead.
    true_us += 64 * max(limit.period_us, 2 * HOUR_US)
    assert one.bucket(true_us).fold(true_us) == other.bucket(true_us).fold(true_us)
