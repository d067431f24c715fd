"""When peers are to be told at once."""

from __future__ import annotations

import pytest

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.limit import URGENT_SHARE, AnyLimit, Limit, Window, WindowLimit
from ratelimit_sidecar.crdt.store import Store

SECOND_US = 1_000_000
NOW_US = 1_790_000_000_000_000
CAPACITY = 8 * URGENT_SHARE

LIMITS = [
    Limit(CAPACITY, 60 * SECOND_US, CAPACITY),
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
