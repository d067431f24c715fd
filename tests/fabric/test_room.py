"""Redis holds so many buckets of a region, whoever invents keys, and the limits of others are shared all the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from zlib import crc32

import pytest
from fabric.test_fabric import connect_to, server
from persistence.redis_server import RedisServer, needs_redis
from redis.asyncio import Redis

from ratelimit_sidecar.crdt.bucket import Entry, Origin
from ratelimit_sidecar.crdt.limit import TokenBucketLimit
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.fabric.fabric import Fabric
from ratelimit_sidecar.fabric.gateway import MAX_ANSWERED
from ratelimit_sidecar.fabric.record import gateway_text, room_for
from ratelimit_sidecar.fabric.scripts import (
    FULL_FOR_S,
    GATEWAY,
    PLACE_BYTES,
    PLACES_A_BUCKET,
    ROOM_CLASSES,
    ROOM_SHARE,
    URGENT_ROOM_SHARE,
    FabricKeys,
)
from ratelimit_sidecar.fabric.sharing import SHARED_FORGOTTEN_US

pytestmark = needs_redis

__all__ = ["server"]

[KEYS] = FabricKeys("ratelimit").shards
NOW_US = 1_700_000_000_000_000
HOUR_US = 3_600_000_000
HUNDRED = TokenBucketLimit(100, HOUR_US, 100)
MAX_PLACES = 4_096


def rule_of(key: bytes) -> bytes:
    """Keys are `RULE value`."""
    return key.partition(b" ")[0]


class Sidecar:
    def __init__(self, name: str, server: RedisServer, most: int) -> None:
        self.now_us = NOW_US
        self.store = Store(Origin(name, 1), lambda _key: HUNDRED, max_buckets=10**6, rule_key=rule_of)
        self.fabric = Fabric(connect_to(server), FabricKeys("ratelimit"), self.store, lambda: self.now_us)
        # As if it was told so, without the sidecar itself being full.
        self.store.places.max_buckets = most

    def take(self, key: bytes, hits: int = 1) -> None:
        most, self.store.places.max_buckets = self.store.places.max_buckets, 10**6
        self.store.bucket(key, HUNDRED, self.now_us).take(hits, self.now_us, always=True)
        self.store.places.max_buckets = most
        self.fabric.note(self.store.drain_changes())

    async def share(self) -> None:
        await self.fabric.share(is_last=True)
        assert self.fabric.status.degraded_reason == ""

    async def flood(self, count: int, rule: bytes = b"flooded", hits: int = 1) -> None:
        for number in range(count):
            self.take(b"%s %d of %s" % (rule, number, self.store.origin.node.encode()), hits)
        await self.share()

    async def knows_of(self, key: bytes) -> int:
        """How many tokens of the bucket were taken, as it hears when it looks."""
        self.take(key, 0)
        self.fabric.shards[0].note(self.store.bucket(key, HUNDRED, self.now_us), [], self.now_us)
        await self.share()
        return sum(entry.tokens for entry in self.store.bucket(key, HUNDRED, self.now_us).entries())


@asynccontextmanager
async def two(server: RedisServer, most: int) -> AsyncIterator[tuple[Sidecar, Sidecar, Redis]]:
    a, b = (Sidecar(name, server, most) for name in "ab")
    async with server.client() as client:
        try:
            yield a, b, client
        finally:
            await a.fabric.close()
            await b.fabric.close()


async def held(client: Redis) -> dict[bytes, float]:
    return {name: score for name, score in await client.zrange(KEYS.held, 0, -1, withscores=True) if name != b"@"}


async def assert_places_are_right(client: Redis) -> int:
    """Returns the places that are taken."""
    taken = Counter[bytes]()
    for name, score in (await held(client)).items():
        taken[name.partition(b":")[0]] += round(score % 1 * MAX_PLACES)
    for of_class, places in taken.items():
        assert int(await client.hget(KEYS.clock, b"r" + of_class)) == places
    assert int(await client.hget(KEYS.clock, "places") or 0) == taken.total()
    return taken.total()


async def let_pass(client: Redis, seconds: int) -> None:
    """As if all buckets had been written so long ago."""
    for name, score in (await held(client)).items():
        await client.zadd(KEYS.held, {name: score - seconds})


async def test_a_flooded_rule_has_four_fifths_of_the_room_and_other_rules_find_some(server: RedisServer) -> None:
    async with two(server, most=200) as (a, b, client):
        await a.flood(1_000)
        flooded = await assert_places_are_right(client)
        assert 0.7 < flooded / (200 * PLACES_A_BUCKET) <= ROOM_SHARE / (ROOM_SHARE + 1) + 0.01
        assert a.fabric.status.no_room > 0
        a.take(b"other x", 10)
        await a.share()
        assert await b.knows_of(b"other x") == 10


async def test_two_flooded_rules_leave_room_to_a_third(server: RedisServer) -> None:
    async with two(server, most=200) as (a, b, _):
        await a.flood(1_000)
        await b.flood(1_000, b"as well")
        a.take(b"other x", 10)
        await a.share()
        assert await b.knows_of(b"other x") == 10


async def test_a_bucket_of_the_flooded_rule_that_gets_nearly_used_up_finds_room(server: RedisServer) -> None:
    async with two(server, most=200) as (a, b, _):
        await a.flood(1_000)
        a.take(b"flooded x", 10)
        await a.share()
        assert await b.knows_of(b"flooded x") == 0
        a.take(b"flooded x", 80)
        await a.share()
        assert await b.knows_of(b"flooded x") == 90


async def test_keys_that_are_used_up_leave_room_to_other_rules(server: RedisServer) -> None:
    async with two(server, most=200) as (a, b, client):
        await a.flood(1_000, hits=100)
        flooded = await assert_places_are_right(client)
        assert flooded / (200 * PLACES_A_BUCKET) <= URGENT_ROOM_SHARE / (URGENT_ROOM_SHARE + 1) + 0.01
        b.take(b"other x", 10)
        await b.share()
        assert await a.knows_of(b"other x") == 10


async def test_a_bucket_whose_key_no_caller_chose_always_finds_room(server: RedisServer) -> None:
    async with two(server, most=50) as (a, b, _):
        await a.flood(1_000)
        a.take(b"flooded", 10)
        await a.share()
        assert await b.knows_of(b"flooded") == 10


async def test_further_slots_of_a_flooded_rule_find_no_room_either(server: RedisServer) -> None:
    async with two(server, most=200) as (a, _, client):
        await a.flood(100)
        for _ in range(20):
            a.now_us += 1 << HUNDRED.exponent
            await a.flood(100)
        taken = await assert_places_are_right(client)
        assert taken <= 200 * PLACES_A_BUCKET * ROOM_SHARE / (ROOM_SHARE + 1) + 1
        assert a.fabric.status.no_room > 0


async def test_a_bucket_that_may_not_grow_is_kept_no_longer_for_being_asked_about(server: RedisServer) -> None:
    async with two(server, most=200) as (a, b, client):
        # It has few places, of two that took the same.
        for each in (a, b):
            each.take(b"flooded x", 10)
            await each.share()
        await a.flood(1_000)
        a.now_us += 1 << HUNDRED.exponent
        a.take(b"flooded x")
        refused = a.fabric.status.no_room
        await a.share()
        assert a.fabric.status.no_room > refused
        before = await held(client)
        for _ in range(10):
            await a.share()
        [[member, due]] = [(name, due) for name, due in (await held(client)).items() if name.endswith(b":flooded x")]
        assert due - before[member] <= 1


async def test_what_found_no_room_is_told_whole_once_there_is_some(server: RedisServer) -> None:
    async with two(server, most=200) as (a, b, client):
        await a.flood(500)
        a.take(b"flooded x", 10)
        await a.share()
        assert await b.knows_of(b"flooded x") == 0
        await let_pass(client, 3_600)
        # The others are not in use any more.
        a.now_us += SHARED_FORGOTTEN_US
        await a.share()
        a.take(b"flooded x", 3)
        await a.share()
        assert await b.knows_of(b"flooded x") == 13


async def test_what_is_full_again_makes_room_and_nothing_else_does(server: RedisServer) -> None:
    async with two(server, most=200) as (a, b, client):
        a.take(b"other x", 50)
        await a.flood(500)
        # A token comes back in 36 s, 50 in half an hour.
        await let_pass(client, 36 + FULL_FOR_S + 10)
        before = len(await held(client))
        await b.flood(60)
        await assert_places_are_right(client)
        names = await held(client)
        assert len(names) < before
        assert sum(b"of b" in name for name in names) == 60
        assert await b.knows_of(b"other x") == 50


async def test_while_there_is_room_what_is_full_again_is_kept_for_late_news(server: RedisServer) -> None:
    async with two(server, most=10_000) as (a, b, client):
        await a.flood(100)
        await let_pass(client, 7_200)
        await b.flood(100)
        assert len(await held(client)) == 200


async def test_a_bucket_that_two_took_from_is_kept_until_it_is_full_after_both(server: RedisServer) -> None:
    async with two(server, most=200) as (a, b, client):
        # Neither knows of the other's when it tells.
        for each in (a, b):
            each.take(b"other x", 40)
        for each in (a, b):
            await each.share()
        await a.flood(500)
        # 40 come back in 24 minutes.
        await let_pass(client, 30 * 60)
        late, latest = (Sidecar(name, server, most=200) for name in ("late", "latest"))
        await late.flood(60)
        assert await late.knows_of(b"other x") == 80
        await let_pass(client, 60 * 60)
        await latest.flood(500)
        assert b"%d:other x" % (crc32(b"other") % ROOM_CLASSES) not in await held(client)
        for each in (late, latest):
            await each.fabric.close()


async def test_once_all_know_what_was_taken_redis_knows_when_the_bucket_is_full(server: RedisServer) -> None:
    async with two(server, most=200) as (a, b, client):
        for _ in range(5):
            # Each time both take before either has heard of the other.
            for each in (a, b):
                each.take(b"other x", 8)
            for each in (a, b):
                await each.share()
        for each in (a, b, a, b):
            await each.share()
        [due] = (await held(client)).values()
        seconds, _ = await client.time()
        # A token comes back in 36 s.
        assert due - seconds == pytest.approx(80 * 36 + FULL_FOR_S, abs=3)


@pytest.mark.slow
async def test_a_server_with_a_kibibyte_for_each_of_max_buckets_is_never_full(tmp_path: Path) -> None:
    most = 4_000
    async with RedisServer(tmp_path) as server, two(server, most) as (a, b, client):
        await a.share()
        empty = await held_by_keys(client)
        used = (await client.info("memory"))["used_memory"]
        await client.config_set("maxmemory", used + most * PLACES_A_BUCKET * PLACE_BYTES + 500_000)
        await a.flood(10_000, hits=100)
        await b.flood(5_000, b"as well")
        for _ in range(10):
            b.now_us += 1 << HUNDRED.exponent
            await b.flood(1_000, b"as well")
        taken = await assert_places_are_right(client)
        assert taken > 0.9 * most * PLACES_A_BUCKET
        assert await held_by_keys(client) - empty <= taken * PLACE_BYTES


async def held_by_keys(client: Redis) -> int:
    """The memory of all keys and of the tables they are in. Besides these a server holds buffers of its clients, which
    it frees when it comes to it.
    """
    stats = await client.memory_stats()
    tables = stats.get("db.0", {})
    return int(stats["dataset.bytes"]) + sum(tables.values())


async def test_places_are_right_after_buckets_were_lost(server: RedisServer) -> None:
    async with two(server, most=200) as (a, b, client):
        await a.flood(100)
        lost = [name async for name in client.scan_iter(KEYS.head + b"[bi]:flooded 1*")]
        await client.delete(*lost)
        a.take(b"flooded 1 of a", 3)
        await a.share()
        assert await b.knows_of(b"flooded 1 of a") == 4
        await assert_places_are_right(client)
        for _ in range(100):
            await tell(client, [])
        left = await held(client)
        assert len(left) < 100
        await assert_places_are_right(client)
        await client.delete(KEYS.held)
        for each in (a, b, a):
            await each.share()
        await assert_places_are_right(client)


async def tell(client: Redis, values: list[bytes], most: int = 200) -> list[bytes]:
    """As a gateway that heard of these buckets from another region."""
    store = Store(Origin("gateway", 1), lambda _key: HUNDRED, rule_key=rule_of)
    names: list[bytes] = []
    told = []
    for key in values:
        bucket = store.bucket(key, HUNDRED, NOW_US)
        slot = (NOW_US >> HUNDRED.exponent << HUNDRED.exponent) | HUNDRED.exponent
        bucket.merge([Entry(Origin("far", 1), slot, 5)], NOW_US)
        names += KEYS.of_bucket(key)
        told.append(gateway_text(bucket, room_for(bucket, rule_of), {slot: 5}, NOW_US, has_base=True))
    arguments = ["epoch", 1, KEYS.head, most * PLACES_A_BUCKET, 0, MAX_ANSWERED, *told]
    keys = [KEYS.clock, KEYS.changed, KEYS.held, KEYS.fence, *names]
    heard: list[bytes] = (await client.eval(GATEWAY, len(keys), *keys, *arguments))[3]
    return heard


async def test_what_other_regions_took_has_places_as_well(server: RedisServer) -> None:
    async with two(server, most=200) as (a, _, client):
        heard: list[bytes] = []
        for first in range(0, 400, 50):
            heard += await tell(client, [b"flooded %d" % number for number in range(first, first + 50)])
        assert heard[:50] == [b""] * 50
        assert heard[-50:] == [b"-"] * 50
        taken = await assert_places_are_right(client)
        assert taken <= 200 * PLACES_A_BUCKET * ROOM_SHARE / (ROOM_SHARE + 1) + PLACES_A_BUCKET
        assert await tell(client, [b"other x", b"flooded 0"]) == [b"", b""]
        assert await a.knows_of(b"other x") == 5


async def test_a_gateway_that_has_not_read_what_was_taken_here_shortens_no_buckets_stay(server: RedisServer) -> None:
    async with two(server, most=200) as (a, _, client):
        a.take(b"other x", 80)
        await a.share()
        [due] = (await held(client)).values()
        await tell(client, [b"other x"])
        [later] = (await held(client)).values()
        assert int(later) >= int(due)


@pytest.mark.parametrize("share", [0, 1])
async def test_keys_that_other_sidecars_invent_leave_room_to_what_other_regions_took(
    server: RedisServer, share: int
) -> None:
    async with two(server, most=200) as (a, b, client):
        await a.flood(1_000)
        heard = await tell(client, [[b"other x", b"flooded x"][share]])
        assert heard == [[b""], [b"-"]][share]
        assert await b.knows_of(b"other x") == [5, 0][share]
