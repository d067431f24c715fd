"""Pages of a store whose buckets come and go."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from observed import NOW_US, TWO_A_MINUTE

from ratelimit_sidecar.console.buckets import SLICE_BUCKETS, BucketPager, describe_entries
from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.limiter.key import (
    DEFAULT_RULE,
    EXACT,
    KEY_ONLY,
    OVERRIDE,
    OVERRIDE_LIMIT,
    PATTERN,
    TOKEN_BUCKET,
    WILDCARD_VALUE,
    KeyEntry,
    encode_bucket_key,
)


def key(number: int) -> bytes:
    return encode_bucket_key(TOKEN_BUCKET, "edge", [KeyEntry(KEY_ONLY, "user", f"u{number}")])


def store_of(numbers) -> Store:
    store = Store(Origin("here", 1), lambda _: TWO_A_MINUTE)
    for number in numbers:
        store.bucket(key(number), TWO_A_MINUTE, NOW_US)
    return store


async def all_pages(pager: BucketPager, limit: int, between=lambda: None) -> list[bytes]:
    listed: list[bytes] = []
    after = b""
    while True:
        page = await pager.page(after, limit)
        listed += [bucket.key for bucket in page.buckets]
        if not page.more:
            return listed
        after = listed[-1]
        between()


@given(st.sets(st.integers(0, 300)), st.integers(1, 40), st.randoms(use_true_random=False))
def test_what_stays_is_listed_once_whatever_comes_and_goes(numbers: set[int], limit: int, rng: random.Random) -> None:
    store = store_of(sorted(numbers, key=lambda _: rng.random()))
    staying = {key(number) for number in numbers}
    now_us = NOW_US

    def others_come_and_go() -> None:
        nonlocal now_us
        for _ in range(rng.randrange(5)):
            store.bucket(key(rng.randrange(1_000, 9_999)), TWO_A_MINUTE, now_us)
        for stays in staying:
            store.bucket(stays, TWO_A_MINUTE, now_us).take(1, now_us)
        now_us += TWO_A_MINUTE.horizon_us // 3
        # Only those who took nothing are idle.
        store.drain_changes()
        store.sweep(now_us, rng.randrange(50))

    listed = asyncio.run(all_pages(BucketPager(store), limit, others_come_and_go))
    assert listed == sorted(set(listed))
    assert staying <= set(listed)


async def test_the_loop_runs_between_slices_while_buckets_come_and_go() -> None:
    store = store_of(range(5 * SLICE_BUCKETS))
    turns = 0

    async def others_come_and_go() -> None:
        nonlocal turns
        while True:
            turns += 1
            store.bucket(key(1_000_000 + turns), TWO_A_MINUTE, NOW_US)
            store.sweep(NOW_US, 10)
            await asyncio.sleep(0)

    busy = asyncio.create_task(others_come_and_go())
    page = await BucketPager(store).page(b"", 10)
    busy.cancel()
    assert turns >= 5
    assert [bucket.key for bucket in page.buckets] == sorted(map(key, range(5 * SLICE_BUCKETS)))[:10]


async def test_pages_asked_for_at_once_are_read_one_after_the_other() -> None:
    store = store_of(range(3 * SLICE_BUCKETS))
    passes = most_passes = 0
    read = store.walk

    class Counted:
        def walk(self):
            nonlocal passes, most_passes
            passes += 1
            most_passes = max(most_passes, passes)
            return read()

    pager = BucketPager(Counted())

    async def one_page() -> None:
        nonlocal passes
        await pager.page(b"", 10)
        passes -= 1

    await asyncio.gather(*(one_page() for _ in range(4)))
    assert most_passes == 1


async def test_an_empty_store_has_one_empty_page() -> None:
    page = await BucketPager(store_of([])).page(b"", 10)
    assert (page.buckets, page.more) == ([], False)


@pytest.mark.parametrize(
    ("kind", "is_from_the_rules"),
    [
        (EXACT, True),
        (PATTERN, True),
        (OVERRIDE_LIMIT, True),
        (KEY_ONLY, False),
        (WILDCARD_VALUE, False),
        (DEFAULT_RULE, False),
        (OVERRIDE, False),
    ],
)
def test_only_values_that_are_from_the_rules_are_shown(kind: int, is_from_the_rules: bool) -> None:
    bucket_key = encode_bucket_key(TOKEN_BUCKET, "edge", [KeyEntry(kind, "user", "secret")])
    (entry,) = describe_entries(bucket_key, shows_values=False)
    assert (entry["value"] == "secret") is is_from_the_rules
