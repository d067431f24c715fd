"""A bucket in a real Redis is joined there as the store joins it, and read again as it was."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from itertools import chain, pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from persistence.redis_server import RedisServer, needs_redis
from persistence.test_snapshot import AFTER, LIMITS, NOW_US, RULES, SECOND_US, make_store
from redis.asyncio import Redis

from ratelimit_sidecar.crdt.bucket import Bucket, Entry, Origin
from ratelimit_sidecar.crdt.limit import TokenBucketLimit, Window, WindowLimit
from ratelimit_sidecar.crdt.slot import slot_id, slot_start_us
from ratelimit_sidecar.crdt.store import RESTORED_ENTRIES, Store
from ratelimit_sidecar.crdt.token_bucket import TokenBucket
from ratelimit_sidecar.persistence.put_off import AheadOfClock
from ratelimit_sidecar.persistence.redis_record import JOIN, READ, BadRecord, entry_lines, join_text, restore_steps
from ratelimit_sidecar.persistence.redis_store import entry_lists
from ratelimit_sidecar.replication.wire import MAX_NAME_BYTES

pytestmark = needs_redis

WRITERS = [Origin("one", 1), Origin("two", 2), Origin("three", 3)]
NAME = b"ratelimit:1:{bucket}"
"""Of the one bucket that these tests know."""


@pytest.fixture
async def redis(tmp_path: Path) -> AsyncIterator[Redis]:
    async with RedisServer(tmp_path) as server, server.client() as client:
        yield client


def key_of(name: str) -> bytes:
    match = RULES.match("api", [(name, "a")])
    assert match is not None
    return match.bucket_key


async def join(redis: Redis, *told: bytes) -> list[object]:
    answers: list[object] = await redis.eval(JOIN, len(told), *[NAME] * len(told), *told)
    return answers


async def restored(redis: Redis, name: str, now_us: int) -> Bucket:
    store = make_store(AFTER)
    [lines] = await redis.eval(READ, 1, NAME)
    for _ in restore_steps(key_of(name), LIMITS[name], lines, store, now_us, ahead=AheadOfClock()):
        pass
    bucket = store.get(key_of(name))
    assert bucket is not None
    bucket.advance(now_us)
    return bucket


def bucket_of(store: Store, name: str, now_us: int) -> Bucket:
    return store.bucket(key_of(name), LIMITS[name], now_us)


takes = st.lists(
    st.tuples(
        *(st.integers(0, 2), st.integers(1, 200), st.one_of(st.integers(0, 30), st.integers(90, 150))),
        *(st.booleans(), st.sampled_from([False, False, False, True])),
    ),
    min_size=1,
    max_size=25,
)


@pytest.mark.parametrize("name", ["tokens", "month", "fixed", "sliding"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(takes, st.integers(0, 150))
async def test_what_several_write_is_joined_as_the_store_joins_it(
    redis: Redis, name: str, history: list[tuple[int, int, int, bool, bool]], pause: int
) -> None:
    """Of writers that do not hear each other, and take or give back. Token buckets get into debt beyond the horizon."""
    await redis.flushall()
    stores = [make_store(origin) for origin in WRITERS]
    together = make_store(Origin("all", 9))
    now_us = NOW_US
    for writer, hits, gap, writes, gives_back in history:
        now_us += gap * SECOND_US // 10
        bucket = bucket_of(stores[writer], name, now_us)
        if gives_back:
            bucket.refund(hits, now_us)
        else:
            bucket.take(hits, now_us, always=True)
        # An observer that hears all of it at once.
        own = list(bucket.own_entries(bucket.drain_changed_slots()))
        bucket.journal.buckets.clear() if bucket.journal else None
        together.join(bucket.key, bucket.limit, None, own, now_us)
        told = join_text(bucket, entry_lines(own if writes else bucket.entries()), now_us)
        assert (await join(redis, told, told))[1] == 0, "twice is once"
    now_us += pause * SECOND_US // 10
    expected = bucket_of(together, name, now_us)
    found = await restored(redis, name, now_us)
    if isinstance(expected.limit, TokenBucketLimit) and any(gives_back for *_, gives_back in history):
        # The base of one who has not heard of what another gave back is the larger one.
        assert found.fold(now_us) >= expected.fold(now_us) - rounding(name)
    else:
        assert found.fold(now_us) == pytest.approx(expected.fold(now_us), abs=rounding(name))


@pytest.mark.parametrize("name", ["tokens", "fixed", "sliding"])
async def test_what_was_given_back_is_kept(redis: Redis, name: str) -> None:
    bucket, now_us = bucket_of(make_store(WRITERS[0]), name, NOW_US), NOW_US
    assert bucket.take(35, now_us)
    assert bucket.refund(30, now_us) == 30
    for _ in range(20):
        # So that a token bucket is folded there.
        now_us += SECOND_US
        bucket.take(10, now_us, always=True)
        await join(redis, join_text(bucket, entry_lines(bucket.own_entries(bucket.drain_changed_slots())), now_us))
    found = await restored(redis, name, now_us)
    assert found.fold(now_us) == pytest.approx(bucket.fold(now_us), abs=rounding(name))


def rounding(name: str) -> int:
    """Bases are whole microseconds: each of so many writes may have added what is refilled in one."""
    limit = LIMITS[name]
    return 50 * limit.tokens if isinstance(limit, TokenBucketLimit) else 0


async def test_two_that_write_at_the_same_time_lose_nothing(redis: Redis) -> None:
    told = []
    for writer, origin in enumerate(WRITERS):
        bucket = bucket_of(make_store(origin), "fixed", NOW_US)
        for hits in range(10):
            bucket.take(writer + 1, NOW_US + hits)
            told.append(join_text(bucket, entry_lines(bucket.entries()), NOW_US))
    await asyncio.gather(*[join(redis, each) for each in reversed(told)])
    found = await restored(redis, "fixed", NOW_US)
    assert LIMITS["fixed"].capacity - found.remaining == 10 * (1 + 2 + 3)


async def test_however_many_lives_of_nodes_have_used_a_bucket_it_is_joined_and_read_again(redis: Redis) -> None:
    store = make_store(WRITERS[0])
    bucket = bucket_of(store, "fixed", NOW_US)
    bucket.take(1, NOW_US)
    [own] = bucket.entries()
    lives = [Entry(Origin("n" * MAX_NAME_BYTES, life), own.slot, 1) for life in range(1, 5_000)]
    store.journal.peers = {entry.origin for entry in lives}
    bucket.merge(lives, NOW_US)
    assert await join(redis, join_text(bucket, entry_lines(bucket.entries()), NOW_US)) == [1]
    assert (await restored(redis, "fixed", NOW_US)).taken == bucket.taken


@pytest.mark.parametrize("ahead_us", [6 * SECOND_US, 60 * SECOND_US])
async def test_a_slot_ahead_of_time_is_not_taken_for_a_clock_that_was_set_back(redis: Redis, ahead_us: int) -> None:
    slot = slot_id(NOW_US + ahead_us, LIMITS["tokens"].exponent)
    bucket = bucket_of(make_store(WRITERS[0]), "tokens", NOW_US)
    bucket.take(1, NOW_US)
    await join(redis, join_text(bucket, entry_lines([*bucket.entries(), Entry(WRITERS[1], slot, 5)]), NOW_US))
    assert (await restored(redis, "tokens", NOW_US)).taken.keys() <= {*WRITERS}


DAY_US = 86_400 * SECOND_US


@pytest.mark.parametrize("name", ["tokens", "fixed", "sliding"])
async def test_who_is_far_ahead_of_the_servers_clock_is_refused_and_others_are_kept(redis: Redis, name: str) -> None:
    seconds, _ = await redis.time()
    now_us = seconds * SECOND_US
    bucket = bucket_of(make_store(WRITERS[0]), name, now_us)
    assert bucket.take(30, now_us)
    await join(redis, join_text(bucket, entry_lines(bucket.entries()), now_us))
    ahead_us = now_us + 10 * DAY_US
    ahead = bucket_of(make_store(WRITERS[1]), name, ahead_us)
    ahead.take(1, ahead_us)
    assert await join(redis, join_text(ahead, entry_lines(ahead.entries()), ahead_us)) == [b"CLOCKAHEAD"]
    assert (await restored(redis, name, now_us)).fold(now_us) == pytest.approx(bucket.fold(now_us), abs=rounding(name))


@pytest.mark.parametrize("own", [False, True], ids=["written by one before", "of a bucket that went on as a clock did"])
async def test_a_base_that_is_far_ahead_of_the_servers_clock_is_none(redis: Redis, *, own: bool) -> None:
    seconds, _ = await redis.time()
    now_us = seconds * SECOND_US
    ahead_us = now_us + 10 * DAY_US
    bucket = bucket_of(make_store(WRITERS[0]), "tokens", now_us)
    assert bucket.take(30, now_us)
    told = join_text(bucket, entry_lines(bucket.entries()), now_us)
    if own:
        await join(redis, told)
        ahead = bucket_of(make_store(WRITERS[1]), "tokens", ahead_us)
        assert ahead.take(1, ahead_us)
        head, *lines = join_text(ahead, entry_lines(ahead.entries()), ahead_us).decode().splitlines()
        told = "\n".join([head.replace(str(ahead_us), str(now_us), 1), *lines, ""]).encode()
    else:
        await redis.hset(NAME, mapping={"at": ahead_us, "base": f"{ahead_us} {ahead_us} {SECOND_US} 10"})
    assert await join(redis, told) == [0]
    assert (await restored(redis, "tokens", now_us)).fold(now_us) == pytest.approx(
        bucket.fold(now_us), abs=rounding("tokens")
    )


async def test_a_user_who_may_not_ask_for_the_time_can_write(redis: Redis) -> None:
    bucket = bucket_of(make_store(WRITERS[0]), "tokens", NOW_US)
    bucket.take(30, NOW_US)
    await redis.execute_command("ACL", "SETUSER", "default", "-time")
    assert await join(redis, join_text(bucket, entry_lines(bucket.entries()), NOW_US)) == [1]


async def test_what_was_folded_is_not_told_again(redis: Redis) -> None:
    late, now_us = bucket_of(make_store(WRITERS[0]), "tokens", NOW_US), NOW_US + 13 * SECOND_US
    late.take(150, NOW_US, always=True)
    await join(redis, join_text(late, entry_lines(late.entries()), NOW_US))
    other = bucket_of(make_store(WRITERS[1]), "tokens", now_us)
    other.take(1, now_us)
    await join(redis, join_text(other, entry_lines(other.entries()), now_us))
    assert await redis.hget(NAME, "1 one") is None
    await join(redis, join_text(late, entry_lines(late.entries()), now_us))
    assert await redis.hget(NAME, "1 one") is None
    found = await restored(redis, "tokens", now_us)
    assert found.fold(now_us) == pytest.approx(late.fold(now_us) + late.limit.period_us, abs=rounding("tokens"))


async def test_a_base_counts_only_with_the_slots_before_it_folded(redis: Redis) -> None:
    """Its boundary is less than a batch further: the slots between are still there, and the base has them too."""
    bucket = bucket_of(make_store(WRITERS[0]), "tokens", NOW_US)
    bucket.take(70, NOW_US, always=True)
    for now_us in (NOW_US, NOW_US + 95 * SECOND_US // 10, NOW_US + 11 * SECOND_US):
        bucket.seal(now_us)
        bucket.take(1, now_us, always=True)
        await join(redis, join_text(bucket, entry_lines(bucket.entries()), now_us))
    assert bucket.base.deficit > 0
    found = await restored(redis, "tokens", now_us)
    assert found.fold(now_us) == pytest.approx(bucket.fold(now_us), abs=rounding("tokens"))


async def test_a_bucket_that_was_sealed_before_its_horizon_is_read_as_it_was(redis: Redis) -> None:
    bucket, now_us = bucket_of(make_store(WRITERS[0]), "month", NOW_US), NOW_US
    assert isinstance(bucket, TokenBucket)
    for _ in range(20):
        bucket.take(3, now_us, always=True)
        now_us += 1 << bucket.limit.exponent
    bucket.shorten(now_us, 3)
    assert bucket.slots < 20
    bucket.take(1, now_us, always=True)
    await join(redis, join_text(bucket, entry_lines(bucket.entries()), now_us))
    found = await restored(redis, "month", now_us)
    assert found.fold(now_us) == pytest.approx(bucket.fold(now_us), abs=rounding("month"))
    assert sorted(found.entries()) == sorted(bucket.entries())
    assert found.base.boundary_us == bucket.base.boundary_us


async def test_a_later_write_never_has_it_expire_sooner(redis: Redis) -> None:
    much, little = (bucket_of(make_store(origin), "tokens", NOW_US) for origin in WRITERS[:2])
    much.take(150, NOW_US, always=True)
    little.take(1, NOW_US)
    await join(redis, join_text(much, entry_lines(much.entries()), NOW_US))
    before_ms = await redis.pttl(NAME)
    await join(redis, join_text(little, entry_lines(little.entries()), NOW_US))
    assert await redis.pttl(NAME) > before_ms - 10_000


async def test_it_expires_once_nothing_of_it_counts(redis: Redis) -> None:
    for name, least_s, most_s in (
        ("tokens", 10, 60),
        ("fixed", 10, 3_620),
        ("sliding", 60, 80),
        ("month", 40_000, 9e6),
    ):
        await redis.flushall()
        bucket = bucket_of(make_store(WRITERS[0]), name, NOW_US)
        bucket.take(30, NOW_US)
        await join(redis, join_text(bucket, entry_lines(bucket.entries()), NOW_US))
        ttl_s = await redis.pttl(NAME) / 1_000
        assert least_s <= ttl_s <= most_s
        assert ttl_s * SECOND_US >= bucket.full_in_us


async def test_slots_that_are_over_are_not_kept(redis: Redis) -> None:
    for name in ("tokens", "fixed", "sliding"):
        await redis.flushall()
        bucket = bucket_of(make_store(WRITERS[0]), name, NOW_US)
        now_us, sizes = NOW_US, []
        for _ in range(300):
            now_us += 1 << bucket.limit.exponent
            bucket.take(1, now_us)
            own = list(bucket.own_entries(bucket.drain_changed_slots()))
            await join(redis, join_text(bucket, entry_lines(own), now_us))
            sizes.append(await redis.hstrlen(NAME, "1 one"))
        assert max(sizes[200:]) <= max(sizes[:200]) < 700


async def test_a_bucket_takes_less_than_a_kilobyte(redis: Redis) -> None:
    """A monthly limit that ten sidecars with long names use, and one by the second that three use all the time."""
    nodes = [Origin(f"ingress-gateway-7d9fc6b-{number:05}", 2**63 + number) for number in range(10)]
    for origin in nodes:
        bucket = bucket_of(make_store(origin), "fixed", NOW_US)
        bucket.take(1_000_000, NOW_US)
        await join(redis, join_text(bucket, entry_lines(bucket.entries()), NOW_US))
    used = await redis.memory_usage(NAME)
    assert used is not None
    assert used < 1_024
    await redis.flushall()
    for origin in nodes[:3]:
        store = make_store(origin)
        for step in range(600):
            bucket = bucket_of(store, "tokens", NOW_US + step * SECOND_US // 10)
            bucket.take(1, NOW_US + step * SECOND_US // 10)
        await join(redis, join_text(bucket, entry_lines(bucket.entries()), NOW_US + 60 * SECOND_US))
    used = await redis.memory_usage(NAME)
    assert used is not None
    assert used < 2_048


@pytest.mark.parametrize(
    "record",
    [
        {},
        {b"at": b"1"},
        {b"at": b"1", b"base": b"1 2 3"},
        {b"at": b"1", b"base": b"0 0 0 0", b"node": b"17 1 1"},
        {b"at": b"1", b"base": b"0 0 0 0", b"1 node": b"17 1"},
        {b"at": b"1", b"base": b"0 0 0 0", b"1 node": b"17 1 0"},
        {b"at": b"1", b"base": b"0 0 0 0", b"1 node": b"5 1 1"},
        {b"at": b"1", b"base": b"0 0 0 0", b"1 node": b"145 1 1"},
        {b"at": b"1", b"base": b"0 0 0 0", b"1 node": b"17 -1 1"},
        {b"at": b"1", b"base": b"0 0 0 0", b"0 node": b"17 1 1"},
        {b"at": b"-1", b"base": b"0 0 0 0"},
        {b"at": b"\xff", b"base": b"0 0 0 0"},
    ],
)
async def test_what_is_no_bucket_is_refused(record: dict[bytes, bytes]) -> None:
    store = make_store(AFTER)
    told = b"\n".join(chain(*record.items()))
    with pytest.raises(BadRecord):
        list(restore_steps(key_of("tokens"), LIMITS["tokens"], told, store, NOW_US, ahead=AheadOfClock()))
    assert len(store) == 0


@pytest.mark.parametrize("name", ["tokens", "month", "fixed", "sliding"])
@pytest.mark.parametrize(("later_us", "is_ahead"), [(SECOND_US, False), (-100_000 * SECOND_US, True)])
async def test_a_bucket_is_ahead_only_of_a_clock_that_is_behind_its_writers(
    redis: Redis, name: str, later_us: int, is_ahead: bool
) -> None:
    bucket = bucket_of(make_store(WRITERS[0]), name, NOW_US)
    bucket.take(30, NOW_US, always=True)
    await join(redis, join_text(bucket, entry_lines(bucket.entries()), NOW_US))
    [lines] = await redis.eval(READ, 1, NAME)
    ahead = AheadOfClock()
    for _ in restore_steps(key_of(name), LIMITS[name], lines, make_store(AFTER), NOW_US + later_us, ahead=ahead):
        pass
    assert ahead.buckets == is_ahead
    assert ahead.is_due(NOW_US) is is_ahead


async def test_a_base_under_another_limit_keeps_its_tokens(redis: Redis) -> None:
    slow, fast = TokenBucketLimit(1, SECOND_US, 100), TokenBucketLimit(50, SECOND_US, 100)
    store = make_store(WRITERS[0])
    bucket = store.bucket(key_of("tokens"), slow, NOW_US)
    for second in range(400):
        bucket.take(1, NOW_US + second * SECOND_US, always=True)
        bucket.take(1, NOW_US + second * SECOND_US, always=True)
    now_us = NOW_US + 400 * SECOND_US
    bucket.seal(now_us)
    assert bucket.base.deficit > 0
    await join(redis, join_text(bucket, entry_lines(bucket.entries()), now_us))
    record = await redis.hgetall(NAME)
    boundary_us, full_us = map(int, record[b"base"].split()[:2])
    assert full_us - boundary_us == bucket.base.deficit // slow.tokens
    bucket.set_limit(fast, now_us)
    await join(redis, join_text(bucket, entry_lines(bucket.entries()), now_us))
    record = await redis.hgetall(NAME)
    boundary_us, full_us, period_us, tokens = map(int, record[b"base"].split())
    assert (period_us, tokens) == (fast.period_us, fast.tokens)
    assert (full_us - boundary_us) * tokens // period_us == pytest.approx(bucket.base.deficit // fast.period_us, abs=2)
    assert slot_start_us(next(iter(bucket.entries())).slot) >= boundary_us


@pytest.mark.parametrize("later_us", [0, 5 * SECOND_US, 12 * SECOND_US])
async def test_what_is_sealed_while_a_bucket_of_many_nodes_is_told_in_steps_counts_once(
    redis: Redis, later_us: int
) -> None:
    # What is taken at once is debt for longer than slots are kept.
    limit = TokenBucketLimit(100, SECOND_US, 2_000)
    store = Store(WRITERS[0], lambda _key: limit)
    nodes = [Origin(f"node {number}", 1) for number in range(250)]
    store.journal.peers = {*nodes}
    bucket = store.bucket(b"bucket", limit, NOW_US)
    for back in range(5):
        slot = slot_id(NOW_US - (back << limit.exponent), limit.exponent)
        bucket.merge([Entry(node, slot, 3) for node in nodes], NOW_US)
    lines: list[str] = []
    sizes = []
    now_us = NOW_US + later_us
    for entries in entry_lists(bucket, None):
        sizes.append(len(entries))
        lines += entry_lines(entries)
        if len(sizes) == 2:
            bucket.seal(now_us)
    assert max(sizes) <= 300
    assert len(sizes) >= 3
    for _ in range(2):
        await join(redis, join_text(bucket, lines, now_us))
    read = Store(Origin("reader", 1), lambda _key: limit)
    [told] = await redis.eval(READ, 1, NAME)
    for _ in restore_steps(b"bucket", limit, told, read, now_us, ahead=AheadOfClock()):
        pass
    found = read.bucket(b"bucket", limit, now_us)
    assert found.fold(now_us) > 0
    assert found.fold(now_us) == pytest.approx(bucket.fold(now_us), abs=50 * limit.tokens)


async def test_a_bucket_of_many_nodes_is_read_in_small_steps(redis: Redis) -> None:
    limit = WindowLimit(1_000_000, 86_400_000_000, Window.SLIDING)
    nodes = [Origin(f"node {number}", 1) for number in range(50)]
    store = Store(WRITERS[0], lambda _key: limit)
    store.journal.peers = {*nodes}
    bucket = store.bucket(b"bucket", limit, NOW_US)
    for back in range(30):
        slot = slot_id(NOW_US - (back << limit.exponent), limit.exponent)
        bucket.merge([Entry(node, slot, 3) for node in nodes], NOW_US)
    await join(redis, join_text(bucket, entry_lines(bucket.entries()), NOW_US))
    [told] = await redis.eval(READ, 1, NAME)
    read = Store(Origin("reader", 1), lambda _key: limit)
    joined = [0]
    for _ in restore_steps(b"bucket", limit, told, read, NOW_US, ahead=AheadOfClock()):
        found = read.get(b"bucket")
        joined.append(0 if found is None else len(list(found.entries())))
    # After each node of what was read, and after each piece that was joined but the last.
    assert joined.count(0) > len(nodes)
    assert max(later - before for before, later in pairwise(joined)) <= RESTORED_ENTRIES
    assert len(list(read.bucket(b"bucket", limit, NOW_US).entries())) == 50 * 30
