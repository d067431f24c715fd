"""What goes wrong on a fabric: in Redis, with the clock, with other limits, and with many buckets."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

import pytest
from fabric.test_fabric import Running, Sidecar, connect_to, running, server, sidecars, until
from persistence.redis_server import RedisServer, free_port_numbers, needs_redis
from persistence.test_snapshot import LIMITS, NOW_US, SECOND_US, make_store
from redis.asyncio import Redis

from ratelimit_sidecar.crdt.bucket import Entry, Origin
from ratelimit_sidecar.crdt.limit import AnyLimit, TokenBucketLimit, Window, WindowLimit
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.demo.ports import HOST
from ratelimit_sidecar.fabric import sharing
from ratelimit_sidecar.fabric.exchange import RegionExchange
from ratelimit_sidecar.fabric.fabric import Fabric
from ratelimit_sidecar.fabric.record import OTHERS
from ratelimit_sidecar.fabric.redis_link import RedisLink
from ratelimit_sidecar.fabric.region import MAX_NEWS, Region
from ratelimit_sidecar.fabric.scripts import GATEWAY, FabricKeys
from ratelimit_sidecar.fabric.sharing import SharedRoom, Sharing
from ratelimit_sidecar.replication.peers import region_origin

pytestmark = needs_redis

__all__ = ["server"]

[KEYS] = FabricKeys("ratelimit").shards
HERE = Origin("here", 1)


def names_of(sidecar: Sidecar, value: str) -> tuple[bytes, bytes]:
    [bucket] = [bucket for bucket in sidecar.store if value.encode() in bucket.key]
    return KEYS.of_bucket(bucket.key)


async def damage(client: Redis, what: str, key: bytes, index: bytes) -> None:
    """Do to one bucket what somebody else's program, or a memory error, may do."""
    own = b"o1 a"
    [slot] = [name for name in await client.zrange(index, 0, -1) if name != b"@"]
    match what:
        case "a hash of another type":
            await client.delete(key)
            await client.set(key, "x")
        case "an index of another type":
            await client.delete(index)
            await client.set(index, "x")
        case "counts that are none":
            await client.hset(key, own, b"\xc1\xff")
        case "counts that are a number":
            await client.hset(key, own, b"\x07")
        case "counts that are words":
            await client.hset(key, own, b"\x81\xa1a\xa1b")
        case "counts of a megabyte":
            await client.hset(key, own, b"\x00" * 1_000_000)
        case "a sum that is none":
            await client.hset(key, b"s" + slot, "many")
        case "a sum with a hundred digits":
            await client.hset(key, b"s" + slot, "9" * 100 + " " + "9" * 100)
        case "a base that is none":
            await client.hset(key, "bases", "now")
        case "a base of infinity":
            await client.hset(key, "bases", "inf inf inf inf")
        case "a span that is none":
            await client.hset(key, "keep", "x y z")
        case "a slot that is none":
            await client.hset(key, "sx", "1 1")
            await client.zadd(index, {"x": 2**50})
        case "ten thousand slots":
            await client.hset(key, mapping={f"s{number * 128 + 20}": "5 5" for number in range(10_000)})
            await client.zadd(index, {str(number * 128 + 20): 2**50 for number in range(10_000)})


DAMAGES = (
    "a hash of another type",
    "an index of another type",
    "counts that are none",
    "counts that are a number",
    "counts that are words",
    "counts of a megabyte",
    "a sum that is none",
    "a sum with a hundred digits",
    "a base that is none",
    "a base of infinity",
    "a span that is none",
    "a slot that is none",
    "ten thousand slots",
)


@pytest.mark.parametrize("what", DAMAGES)
@pytest.mark.parametrize("name", ["tokens", "fixed"])
async def test_what_is_odd_in_redis_costs_no_other_bucket_anything(server: RedisServer, what: str, name: str) -> None:
    async with sidecars(server, "a", "b") as (a, b), server.client() as client:
        for value in ("odd", "even"):
            a.take(value, 10, name)
        await a.share()
        await damage(client, what, *names_of(a, "odd"))
        for value in ("odd", "even"):
            a.take(value, 1, name)
            b.take(value, 2, name)
        for each in (a, b, a, b, a):
            await each.share()
        [even] = [bucket for bucket in b.store if b"even" in bucket.key]
        assert sum(entry.tokens for entry in even.entries()) == 13
        await read_by_a_gateway(server, {even.key: 13})
        if "type" in what or "counts" in what:
            assert a.fabric.status.odd > 0


@pytest.mark.parametrize("lost", ["hash", "index", "both"])
async def test_a_bucket_that_redis_has_lost_is_told_whole(server: RedisServer, lost: str) -> None:
    async with sidecars(server, "a", "b") as (a, b), server.client() as client:
        a.take("x", 10, "sliding")
        b.take("x", 2, "sliding")
        for each in (a, b):
            await each.share()
        hash_name, index_name = names_of(a, "x")
        await client.delete(*{"hash": [hash_name], "index": [index_name], "both": [hash_name, index_name]}[lost])
        a.now_us = b.now_us = NOW_US + 5 * SECOND_US
        a.take("x", 1, "sliding")
        for each in (a, b, a, b):
            await each.share()
        late = Sidecar("late", server)
        late.now_us = a.now_us
        late.take("x", 1, "sliding")
        await late.share()
        assert late.left("sliding") == [86]
        await late.close()


async def read_by_a_gateway(server: RedisServer, expected: dict[bytes, int]) -> None:
    store = make_store(Origin("gateway", 1))
    region = Region(region_origin("east"), store, FabricKeys("ratelimit"))
    async with server.client() as client:
        for foreign in (b"\xff", b"", b"no name of ours", b"\x00" * 5_000):
            [key] = expected
            for name, other in zip(KEYS.of_bucket(key), KEYS.of_bucket(foreign), strict=True):
                await client.copy(name, other)
            await client.zadd(KEYS.changed, {foreign: 1})
        arguments = ["epoch", 1, KEYS.head, 1_000, 0, 256]
        answer = await client.eval(GATEWAY, 4, KEYS.clock, KEYS.changed, KEYS.held, KEYS.fence, *arguments)
    await region.answered(region.shards[0], answer, NOW_US)
    for key, tokens in expected.items():
        bucket = store.get(key)
        assert bucket is not None
        assert sum(entry.tokens for entry in bucket.entries()) == tokens


@pytest.mark.parametrize("name", ["month", "fixed", "sliding"])
async def test_a_clock_that_is_set_back_has_nothing_count_twice_and_nothing_forgotten(
    server: RedisServer, name: str
) -> None:
    async with sidecars(server, "a", "b") as (a, b):
        a.take("x", 10, name)
        b.take("x", 1, name)
        await a.share()
        a.take("x", 5, name)
        a.now_us -= 10 * SECOND_US
        b.now_us -= 10 * SECOND_US
        for each in (a, b):
            each.store.go_back(Origin(each.store.origin.node, 2))
        # What was not told yet is told under the same name as before.
        for each in (a, b, a, b):
            await each.share()
        a.take("x", 3, name)
        for each in (a, b, a, b):
            await each.share()
        whole = LIMITS[name].capacity if isinstance(LIMITS[name], TokenBucketLimit) else LIMITS[name].requests
        for each in (a, b):
            assert each.left(name) == pytest.approx([whole - 19], abs=whole / 64)
        if name != "month":
            # A token bucket writes, and tells, what its level would rise by.
            assert {sum(entry.tokens for entry in bucket.entries()) for each in (a, b) for bucket in each.store} == {19}


async def lives_of(server: RedisServer, *names: bytes) -> list[int]:
    async with server.client() as client:
        return [await client.pttl(name) for name in names]


async def test_a_bucket_that_is_used_in_turns_does_not_expire(server: RedisServer) -> None:
    limit = LIMITS["month"]
    assert isinstance(limit, TokenBucketLimit)
    async with sidecars(server, "a", "b") as (a, b):
        for number in range(20):
            # Debt grows, too, beyond what each of them knows at first.
            for each in (a, b):
                each.take("x", 100, "month")
                await each.share()
            [bucket] = list(a.store if number % 2 else b.store)
            needed_ms = (bucket.full_in_us + limit.horizon_us) // 1_000
            assert min(await lives_of(server, *names_of(a, "x"))) >= needed_ms


async def test_a_bucket_of_which_only_debt_is_told_expires_too(server: RedisServer) -> None:
    async with sidecars(server, "a") as [a], server.client() as client:
        a.take("x", 200, "tokens")
        a.now_us += 15 * SECOND_US
        [bucket] = list(a.store)
        bucket.seal(a.now_us)
        assert not list(bucket.entries())
        await a.share()
        assert await client.hexists(names_of(a, "x")[0], "bases")
        assert all(0 < life < 60_000 for life in await lives_of(server, *names_of(a, "x")))


async def test_a_bucket_that_somebody_deleted_between_two_uses_is_not_left_without_an_end(
    server: RedisServer,
) -> None:
    async with sidecars(server, "a") as [a], server.client() as client:
        a.take("x", 200, "tokens")
        a.now_us += 15 * SECOND_US
        [bucket] = list(a.store)
        bucket.seal(a.now_us)
        a.take("x", 1, "tokens")
        for _ in range(2):
            await a.share()
        names = names_of(a, "x")
        await client.delete(*names)
        await a.share()
        assert await client.exists(*names) == 0
        # It was found to be gone, so all of it is told.
        await a.share()
        assert all(0 < life < 60_000 for life in await lives_of(server, *names))


async def test_no_key_of_a_bucket_is_without_an_end(server: RedisServer) -> None:
    async with sidecars(server, "a", "b") as (a, b), server.client() as client:
        for _ in range(5):
            for name in ("tokens", "month", "fixed", "sliding"):
                a.take("x", 7, name)
                b.take("y", 7, name)
            for each in (a, b):
                each.now_us += 9 * SECOND_US
                await each.share()
        names = [name async for name in client.scan_iter(match=KEYS.head + b"[bi]:*")]
        assert len(names) == 16
        assert all(life > 0 for life in await lives_of(server, *names))


async def test_a_server_that_comes_back_older_between_two_ticks_is_told_again(server: RedisServer) -> None:
    async with sidecars(server, "a", "b") as (a, b), server.client() as client:
        a.take("x", 10)
        await a.share()
        await client.save()
        a.take("x", 5)
        b.take("x", 1)
        for each in (a, b):
            await each.share()
        await server.kill()
        await server.start()
        # Another one brings the version to where it was before.
        c = Sidecar("c", server)
        for _ in range(10):
            c.take("y", 1)
            await c.share()
        await c.close()
        for each in (a, b, a, b, a, b):
            await each.fabric.share()
        assert a.left()[0] == b.left()[0] == 84
        late = Sidecar("late", server)
        late.take("x", 1)
        await late.share()
        assert late.left() == [83]
        await late.close()


async def tick_unused(*made: Sidecar) -> None:
    """Ticks of a second or two, in which nothing is in use."""
    for _ in range(2 * sharing.RESTING_TICKS):
        for each in made:
            await each.fabric.share()


async def test_the_last_tick_is_tried_again_while_the_server_fails_over(server: RedisServer) -> None:
    async with sidecars(server, "a", "b") as (a, b):
        await a.share()
        a.take("x", 10)
        await server.kill()
        saving = asyncio.create_task(a.fabric.save())
        await until(lambda: bool(a.fabric.status.degraded_reason))
        await server.start()
        await saving
        b.take("x", 5)
        await b.share()
        assert b.left() == [LIMITS["fixed"].capacity - 15]


@pytest.mark.parametrize("name", ["tokens", "month", "fixed", "sliding"])
@pytest.mark.parametrize("how", ["flushed", "flushed while others are in use", "restarted"])
async def test_a_server_that_lost_its_data_is_told_what_has_not_been_in_use_for_long(
    server: RedisServer, name: str, how: str
) -> None:
    async with sidecars(server, "a", "late") as (a, late), server.client() as client:
        a.take("spent", 160, name)
        await tick_unused(a)
        a.now_us = late.now_us = NOW_US + sharing.SHARED_FORGOTTEN_US + 2 * SECOND_US
        await tick_unused(a)
        # The token bucket that refills in 4 s has its debt in its base alone.
        for bucket in a.store:
            bucket.seal(a.now_us)
        assert a.fabric.status.buckets == 0
        if how == "restarted":
            await server.kill()
            await server.start()
        else:
            await client.flushall()
        if how == "flushed while others are in use":
            a.take("other", 1, name)
        await tick_unused(a)
        late.take("spent", 1, name)
        await late.share()
        [bucket] = [bucket for bucket in a.store if b"spent" in bucket.key]
        [known] = list(late.store)
        one = LIMITS[name].period_us if isinstance(LIMITS[name], TokenBucketLimit) else 1
        owed = bucket.fold(a.now_us)
        assert owed > 0
        assert known.fold(late.now_us) == pytest.approx(owed + one, abs=LIMITS[name].capacity * one / 64)


async def test_while_the_server_is_gone_a_sidecar_that_uses_nothing_says_so(server: RedisServer) -> None:
    async with sidecars(server, "a") as [a]:
        await tick_unused(a)
        await server.kill()
        reasons = []
        for _ in range(3 * sharing.RESTING_TICKS):
            await a.fabric.share()
            reasons.append(a.fabric.status.degraded_reason)
        assert reasons.index("it cannot be reached") <= sharing.RESTING_TICKS
        assert "" not in reasons[reasons.index("it cannot be reached") :]
        await server.start()
        await a.share()


@contextmanager
def longest_turn() -> Iterator[list[float]]:
    """The longest processor time for which the loop had no turn for others; seconds."""
    longest = [0.0]

    async def look() -> None:
        last = time.process_time()
        while True:
            await asyncio.sleep(0)
            now = time.process_time()
            longest[0] = max(longest[0], now - last)
            last = now

    task = asyncio.get_running_loop().create_task(look())
    # The collector looks at all objects of the tests before, now and then.
    gc.collect()
    gc.disable()
    try:
        yield longest
    finally:
        gc.enable()
        task.cancel()


def store_of(limit: AnyLimit, origin: Origin = HERE) -> Store:
    return Store(origin, lambda _key: limit)


def fill(store: Store, limit: AnyLimit, count: int) -> None:
    for number in range(count):
        store.bucket(b"key %d" % number, limit, NOW_US).take(1, NOW_US)


@pytest.mark.slow
async def test_many_busy_buckets_keep_the_loop_from_nobody(server: RedisServer) -> None:
    limit = LIMITS["fixed"]
    store = store_of(limit)
    fabric = Fabric(connect_to(server), FabricKeys("ratelimit"), store, lambda: NOW_US)
    fill(store, limit, 10_000)
    fabric.note(store.drain_changes())
    with longest_turn() as longest:
        await fabric.share()
        await fabric.share()
    await fabric.close()
    assert fabric.status.degraded_reason == ""
    assert len(fabric.shards[0]) == 10_000
    # It was 90 ms when all that there was to ask was put together at once.
    assert longest[0] < 0.05


@pytest.mark.slow
async def test_many_new_buckets_make_room_without_a_search(server: RedisServer) -> None:
    limit = LIMITS["fixed"]
    store = store_of(limit)
    fill(store, limit, 40_000)
    buckets = list(store)
    room = SharedRoom(20_000)
    shared = Sharing(store, store.origin, room)
    for bucket in buckets[:20_000]:
        shared.note(bucket, [1], NOW_US)
    later_us = NOW_US + 2 * sharing.BUSY_US
    room.begin_tick()
    while (key := shared.next_key()) is not None:
        shared.ask(key, later_us)
    began = time.process_time()
    for bucket in buckets[20_000:]:
        shared.note(bucket, [1], later_us)
    # It was 4 s when the front of a dict was searched.
    assert time.process_time() - began < 1
    assert len(shared) == 20_000


async def test_what_nobody_takes_from_is_asked_about_no_more_though_it_is_looked_at(server: RedisServer) -> None:
    async with sidecars(server, "a") as [a]:
        a.take("x", 10)
        [bucket] = list(a.store)
        for _ in range(90):
            a.now_us += SECOND_US
            # As the sweep, and the search for the fullest buckets.
            bucket.is_idle(a.now_us)
            for _ in range(sharing.RESTING_TICKS):
                await a.share()
        assert a.fabric.status.buckets == 0


async def test_a_gateway_that_cannot_listen_says_so_and_leaves_it_to_others(
    server: RedisServer, tmp_path: Path
) -> None:
    taken, free = free_port_numbers(2)
    listener = await asyncio.start_server(lambda *_: None, HOST, taken)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(listener.wait_closed)
        stack.callback(listener.close)
        broken = Running("broken", server, "east", sync=f"{HOST}:{taken}", peers=[])
        await stack.enter_async_context(running(broken))
        await until(lambda: broken.fabric.status.gateway_failed > 0)
        assert "taken" in broken.fabric.status.gateway_reason
        whole = Running("whole", server, "east", sync=f"{HOST}:{free}", peers=[])
        await stack.enter_async_context(running(whole))
        await until(lambda: whole.fabric.status.token > 0)
        # It does not try again at once.
        assert broken.fabric.status.gateway_failed < 5


@pytest.mark.slow
async def test_a_region_whose_server_lost_its_data_is_told_in_pieces() -> None:
    limit = LIMITS["fixed"]
    store = store_of(limit, Origin("gateway", 1))
    region = Region(region_origin("east"), store, FabricKeys("ratelimit"))
    [slot] = {entry.slot for bucket in _one(limit) for entry in bucket.entries()}
    for number in range(50_000):
        store.join(b"key %d" % number, limit, None, [Entry(Origin("west", 1), slot, 1)], NOW_US)
    [shard] = region.shards
    await region.answered(shard, [b"before", b"1", 1, []], NOW_US)
    told = 0
    with longest_turn() as longest:
        for version in (1, 2):
            await region.answered(shard, [b"after", b"%d" % version, version, []], NOW_US)
        while True:
            region.note_again()
            batch = await region.told(shard, NOW_US)
            if not batch:
                break
            told += len(batch)
            await asyncio.sleep(0)
    assert told == 50_000
    # It was 75 ms.
    assert longest[0] < 0.05


def _one(limit: AnyLimit) -> Store:
    store = store_of(limit)
    fill(store, limit, 1)
    return store


class Plain(Sidecar):
    """With one limit for every key."""

    def __init__(self, name: str, server: RedisServer, limit: AnyLimit) -> None:
        super().__init__(name, server)
        self.limit = limit
        self.store = store_of(limit, Origin(name, 1))
        self.fabric = Fabric(connect_to(server), FabricKeys("ratelimit"), self.store, lambda: self.now_us)

    def hit(self, hits: int) -> None:
        self.store.bucket(b"x", self.limit, self.now_us).take(hits, self.now_us, always=True)
        self.fabric.note(self.store.drain_changes())


@pytest.mark.parametrize(("filled", "joined"), [(1, 100), (2, 0)])
async def test_while_memory_for_what_others_took_is_short_it_is_still_joined_and_counted_when_it_is_not(
    server: RedisServer, filled: int, joined: int
) -> None:
    a, b = (Plain(name, server, WindowLimit(100, 60 * SECOND_US, Window.SLIDING)) for name in "ab")
    journal = a.store.journal
    journal.received_bytes = filled * journal.max_received_bytes
    b.hit(100)
    await b.share()
    a.hit(1)
    await a.share()
    [bucket] = list(a.store)
    assert bucket.fold(a.now_us) == joined + 1
    assert (a.fabric.status.unshared > 0) == (not joined)
    for each in (a, b):
        await each.close()


@pytest.mark.parametrize(
    ("short", "long"),
    [
        (WindowLimit(1_000, SECOND_US, Window.SLIDING), WindowLimit(10_000, 3_600 * SECOND_US, Window.SLIDING)),
        (TokenBucketLimit(1_000, SECOND_US, 1_000), TokenBucketLimit(10_000, 3_600 * SECOND_US, 10_000)),
    ],
)
async def test_while_two_limits_run_side_by_side_no_sum_is_lost(
    server: RedisServer, short: AnyLimit, long: AnyLimit
) -> None:
    a, b = Plain("a", server, short), Plain("b", server, long)
    for _ in range(400):
        for each in (a, b):
            each.now_us += SECOND_US // 2
            each.hit(1)
            await each.share()
    await b.share()
    # One that starts now, with the longer limit, knows as much as the other one with it.
    late = Plain("late", server, long)
    late.now_us = a.now_us
    late.hit(1)
    await late.share()
    [known], [bucket] = list(b.store), list(late.store)
    if isinstance(long, TokenBucketLimit):
        assert known.fold(b.now_us) + long.period_us == pytest.approx(bucket.fold(late.now_us), rel=0.02)
        assert known.fold(b.now_us) > 150 * long.period_us
    else:
        assert known.fold(b.now_us) + 1 == bucket.fold(late.now_us) > 400
    for each in (a, b, late):
        await each.close()


async def test_a_bucket_that_was_dropped_and_made_anew_hears_all_of_the_others(server: RedisServer) -> None:
    async with sidecars(server, "a", "b") as (a, b):
        a.take("x", 10)
        b.take("x", 5)
        for each in (a, b, a):
            await each.share()
        [bucket] = list(a.store)
        # Its clock is ahead for a while.
        a.store.sweep(NOW_US + 365 * 24 * 3_600 * SECOND_US, 1)
        assert len(a.store) == 0
        a.take("x", 1)
        await a.share()
        [bucket] = list(a.store)
        assert sum(entry.tokens for entry in bucket.entries() if entry.origin == OTHERS) == 5


class AtGateway:
    """The region at its gateway, and the calls by which it learns of it; no other region is there."""

    def __init__(self, server: RedisServer, store: Store, max_news: int = MAX_NEWS) -> None:
        keys = FabricKeys("ratelimit")
        self.region = Region(region_origin("east"), store, keys, max_news=max_news)
        self.link = RedisLink(connect_to(server))
        self.exchange = RegionExchange(self.link, keys, store, lambda: NOW_US)

    async def tick(self) -> bool:
        return await self.exchange.run(self.region, None, 1)

    async def know_all(self) -> None:
        while await self.tick():
            pass


async def test_a_gateway_that_gets_its_rules_late_reads_what_there_is(server: RedisServer) -> None:
    limits: list[AnyLimit] = []
    store = Store(Origin("gateway", 1), lambda _key: limits[0] if limits else None)
    gateway = AtGateway(server, store)
    async with sidecars(server, "a") as [a]:
        a.take("x", 10)
        await a.share()
        await gateway.know_all()
        assert len(store) == 0
        limits.append(LIMITS["fixed"])
        gateway.exchange.use_rules()
        await gateway.know_all()
        assert [sum(entry.tokens for entry in bucket.entries()) for bucket in store] == [10]
    await gateway.link.close()


@pytest.mark.parametrize(("filled", "is_full"), [(1, False), (2, True)])
async def test_while_its_memory_is_short_a_gateway_still_reads_what_its_region_took_and_counts_what_it_cannot(
    server: RedisServer, filled: int, is_full: bool
) -> None:
    store = make_store(Origin("gateway", 1))
    gateway = AtGateway(server, store)
    store.journal.received_bytes = filled * store.journal.max_received_bytes
    async with sidecars(server, "a") as [a]:
        a.take("x", 10)
        await a.share()
        await gateway.know_all()
        assert [sum(entry.tokens for entry in bucket.entries()) for bucket in store] == [0 if is_full else 10]
        assert (gateway.region.unshared > 0) == is_full
    await gateway.link.close()


@pytest.mark.parametrize("score", [0.5, 1, 2**60, float("inf")])
async def test_strange_names_in_the_index_of_changes_hold_up_nobody(server: RedisServer, score: float) -> None:
    store = make_store(Origin("gateway", 1))
    gateway = AtGateway(server, store)
    async with sidecars(server, "a") as [a], server.client() as client:
        a.take("x", 1)
        await a.share()
        await client.zadd(KEYS.changed, {f"strange {number}": score for number in range(1_000)})
        names = [KEYS.of_bucket(b"strange %d" % number) for number in range(1_000)]
        for name in names:
            for own, other in zip(names_of(a, "x"), name, strict=True):
                await client.copy(own, other)
        for taken in range(2, 5):
            a.take("x", 1)
            await a.share()
            async with asyncio.timeout(60):
                await gateway.know_all()
            assert [sum(entry.tokens for entry in bucket.entries()) for bucket in store] == [taken]
    await gateway.link.close()


async def test_news_for_which_there_is_no_room_are_told_later(server: RedisServer) -> None:
    limit = LIMITS["fixed"]
    gateway = AtGateway(server, store_of(limit, Origin("gateway", 1)), max_news=100)
    region = gateway.region
    [slot] = {entry.slot for bucket in _one(limit) for entry in bucket.entries()}
    for number in range(1_000):
        entries = [Entry(Origin("west", 1), slot, 3)]
        region.store.join(b"key %d" % number, limit, None, entries, NOW_US)
        bucket = region.store.get(b"key %d" % number)
        assert bucket is not None
        region.note_news(bucket, entries)
    assert len(region.shards[0].news.slots) == 100
    for _ in range(40):
        await gateway.tick()
    async with server.client() as client:
        names = [name async for name in client.scan_iter(match=KEYS.head + b"b:*")]
    assert len(names) == 1_000
    await gateway.link.close()
