"""A debt is known to each sidecar of a region that is asked about the key, however long ago it was made."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from fabric.test_fabric import connect_to, server
from fabric.test_faults import Plain
from persistence.redis_server import RedisServer, needs_redis
from persistence.test_snapshot import NOW_US, SECOND_US

from ratelimit_sidecar.crdt.bucket import Entry, Origin
from ratelimit_sidecar.crdt.limit import TokenBucketLimit
from ratelimit_sidecar.crdt.slot import slot_id
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.crdt.token_bucket import TokenBucket
from ratelimit_sidecar.fabric.exchange import RegionExchange
from ratelimit_sidecar.fabric.redis_link import RedisLink
from ratelimit_sidecar.fabric.region import Region
from ratelimit_sidecar.fabric.scripts import FULL_FOR_S, FabricKeys
from ratelimit_sidecar.fabric.sharing import RESTING_TICKS
from ratelimit_sidecar.replication.peers import region_origin

pytestmark = needs_redis

__all__ = ["server"]

MINUTE = TokenBucketLimit(60, 60 * SECOND_US, 60)
[KEYS] = FabricKeys("ratelimit").shards
WEST = Origin("west (fabric)", 1)

A_SLOT = 60 / 32
"""Tokens: what others took is placed in the middle of its slot."""


class At(Plain):
    """A sidecar with a limit by the minute, at a second of the test."""

    def __init__(self, name: str, server: RedisServer, limit: TokenBucketLimit = MINUTE) -> None:
        super().__init__(name, server, limit)

    async def hit_at(self, second: int, hits: int) -> None:
        """Take, and have one tick."""
        self.now_us = NOW_US + second * SECOND_US
        self.hit(hits)
        await self.share()

    def owed(self) -> float:
        return owed(self.store, self.now_us)


def owed(store: Store, now_us: int) -> float:
    [bucket] = list(store)
    return bucket.fold(now_us) / bucket.limit.period_us


@asynccontextmanager
async def region_of(server: RedisServer, names: str) -> AsyncIterator[list[At]]:
    made = [At(name, server) for name in names]
    yield made
    for each in made:
        await each.close()


class AtGateway:
    """The gateway of the region, begun anew; what other regions send is in its store."""

    def __init__(self, server: RedisServer) -> None:
        keys = FabricKeys("ratelimit")
        self.now_us = NOW_US
        self.store = Store(Origin("gateway", 1), lambda _key: MINUTE)
        self.region = Region(region_origin("east"), self.store, keys)
        self.link = RedisLink(connect_to(server))
        self.exchange = RegionExchange(self.link, keys, self.store, lambda: self.now_us)

    def receive(self, hits: int) -> None:
        """The west took so many now."""
        entry = Entry(WEST, slot_id(self.now_us, MINUTE.exponent), hits)
        self.store.join(b"x", MINUTE, None, [entry], self.now_us)
        [bucket] = list(self.store)
        self.region.note_news(bucket, [entry])

    async def tick_at(self, second: int, hits: int = 0) -> None:
        self.now_us = NOW_US + second * SECOND_US
        if hits:
            self.receive(hits)
        # Once more than it takes to read all: then it tells again what the server may have lost.
        for _ in range(4):
            while await self.exchange.run(self.region, None, 1):
                pass


@pytest.mark.parametrize("second", [30, 75, 150, 230])
async def test_a_sidecar_knows_a_debt_after_its_first_tick_though_nobody_used_the_bucket_since(
    server: RedisServer, second: int
) -> None:
    """Of its slots those older than the horizon are in no base."""
    async with region_of(server, "ab") as (a, b):
        await a.hit_at(0, 240)
        await b.hit_at(second, 1)
        assert b.owed() == pytest.approx(240 - second + 1, abs=A_SLOT)


async def test_one_that_does_not_know_a_debt_yet_hides_it_from_nobody(server: RedisServer) -> None:
    async with region_of(server, "abcd") as (a, b, c, d):
        await a.hit_at(0, 100)
        # So that there is a base, which the slot after it is not in.
        for second in (70, 71):
            await a.hit_at(second, 100)
        for each in (b, c):
            await each.hit_at(150, 1)
        assert c.owed() == pytest.approx(300 - 150 + 2, abs=A_SLOT)
        await d.hit_at(240, 1)
        assert d.owed() == pytest.approx(300 - 240 + 3, abs=A_SLOT)


async def test_what_a_sidecar_took_itself_and_has_forgotten_is_part_of_the_debt(server: RedisServer) -> None:
    async with region_of(server, "ab") as (a, b):
        await a.hit_at(0, 60)
        await b.hit_at(30, 100)
        # To itself its bucket is full.
        a.store.sweep(NOW_US + 100 * SECOND_US, 1)
        assert len(a.store) == 0
        await a.hit_at(110, 1)
        assert a.owed() == pytest.approx(60 + 100 - 110 + 1, abs=A_SLOT)


async def test_a_debt_that_others_know_is_not_charged_twice(server: RedisServer) -> None:
    async with region_of(server, "ab") as (a, b):
        for second in range(0, 200, 10):
            for each in (a, b):
                await each.hit_at(second, 9)
        # It is asked about, and told, as if it was new.
        for each in (a, b, a, b):
            each.fabric.shards[0].tell_again()
            await each.hit_at(200, 0)
            each.hit(1)
            await each.share()
        assert a.owed() == pytest.approx(20 * 18 - 200 + 4, abs=A_SLOT)


async def test_a_debt_is_known_though_its_slot_is_dropped_by_the_one_that_reads_it(server: RedisServer) -> None:
    async with region_of(server, "abc") as (a, b, c), server.client() as client:
        await a.hit_at(0, 240)
        name, index = KEYS.of_bucket(b"x")
        kept, until, _ = (await client.hget(name, "keep")).split()
        # As when it has many: the next write looks for those that are too old.
        await client.hset(name, "keep", b"%s %s 1" % (kept, until))
        await b.hit_at(120, 1)
        assert await client.zcard(index) == 2, "the new slot, and the mark"
        await b.share()
        await c.hit_at(180, 1)
        for each, expected in ((b, 240 - 120 + 1), (c, 240 - 180 + 2)):
            assert each.owed() == pytest.approx(expected, abs=A_SLOT)


async def test_a_debt_makes_no_room_for_others_before_it_is_repaid(server: RedisServer) -> None:
    async with region_of(server, "ab") as (a, b), server.client() as client:
        await a.hit_at(0, 240)
        for hits in (1, 0):
            await b.hit_at(75, hits)
        [score] = [score for name, score in await client.zrange(KEYS.held, 0, -1, withscores=True) if name != b"@"]
        seconds, _ = await client.time()
        assert score - seconds == pytest.approx(240 - 75 + 1 + FULL_FOR_S, abs=10)


async def test_a_debt_that_is_told_late_is_known_though_others_have_told_theirs(server: RedisServer) -> None:
    """As after a partition: the larger one holds."""
    async with region_of(server, "abc") as (a, b, c):
        await a.hit_at(0, 100)
        await server.kill()
        b.hit(200)
        await server.start()
        a.now_us = b.now_us = NOW_US + 75 * SECOND_US
        for each in (a, b):
            for _ in range(2 * RESTING_TICKS):
                await each.fabric.share()
        await c.hit_at(75, 1)
        assert c.owed() == pytest.approx(200 - 75 + 1, abs=A_SLOT)


async def test_a_gateway_that_begins_knows_a_debt_of_all_regions(server: RedisServer) -> None:
    first, next_one = AtGateway(server), AtGateway(server)
    async with region_of(server, "ab") as (a, b):
        await a.hit_at(0, 140)
        await first.tick_at(1)
        await first.tick_at(1, 100)
        await next_one.tick_at(75)
        assert owed(next_one.store, next_one.now_us) == pytest.approx(240 - 75, abs=2 * A_SLOT)
        # And so does who hears of it by the base that a gateway has told.
        await next_one.tick_at(76, 1)
        await b.hit_at(76, 1)
        assert b.owed() == pytest.approx(240 - 76 + 2, abs=2 * A_SLOT)
    for each in (first, next_one):
        await each.link.close()


async def test_a_gateway_that_has_not_read_all_hides_a_debt_from_nobody(server: RedisServer) -> None:
    gateway = AtGateway(server)
    async with region_of(server, "ab") as (a, b):
        await a.hit_at(0, 100)
        for second in (70, 71):
            await a.hit_at(second, 100)
        await gateway.tick_at(150, 1)
        await b.hit_at(150, 1)
        assert b.owed() == pytest.approx(300 - 150 + 2, abs=A_SLOT)
        assert owed(gateway.store, gateway.now_us) == pytest.approx(300 - 150 + 1, abs=A_SLOT)
    await gateway.link.close()


async def test_a_server_that_lost_its_data_is_told_the_debt_of_other_regions(server: RedisServer) -> None:
    gateway = AtGateway(server)
    async with region_of(server, "b") as [b], server.client() as client:
        await gateway.tick_at(0, 240)
        gateway.store.sweep(NOW_US + 150 * SECOND_US, 1)
        [bucket] = list(gateway.store)
        assert not list(bucket.entries())
        await client.flushall()
        await gateway.tick_at(150)
        await b.hit_at(150, 1)
        assert b.owed() == pytest.approx(240 - 150 + 1, abs=A_SLOT)
    await gateway.link.close()


@pytest.mark.parametrize("shift", [0, 3, 6])
@pytest.mark.parametrize("second", [14, 30, 75])
async def test_a_sidecar_that_seals_early_hears_of_what_others_took_before(
    server: RedisServer, shift: int, second: int
) -> None:
    async with region_of(server, "ab") as (a, b):
        b.store.journal.horizon_shift = shift
        await a.hit_at(0, 240)
        await b.hit_at(second, 1)
        assert b.owed() == pytest.approx(240 - second + 1, abs=A_SLOT)


@pytest.mark.parametrize("shift", [0, 3])
async def test_a_sidecar_that_seals_early_hides_no_debt_from_a_third(server: RedisServer, shift: int) -> None:
    async with region_of(server, "abc") as (a, b, c):
        b.store.journal.horizon_shift = shift
        await a.hit_at(0, 240)
        for second in range(14, 40):
            await b.hit_at(second, 3)
        await c.hit_at(60, 1)
        # It was at its ceiling until the last of these.
        assert c.owed() == pytest.approx(240 - (60 - 39) + 1, abs=2 * A_SLOT)


@pytest.mark.parametrize("shift", [0, 3])
async def test_a_bucket_that_rested_and_was_sealed_early_hears_of_what_was_taken_meanwhile(
    server: RedisServer, shift: int
) -> None:
    async with region_of(server, "ab") as (a, b):
        b.store.journal.horizon_shift = shift
        await b.hit_at(0, 1)
        await a.hit_at(2, 200)
        b.store.sweep(NOW_US + 30 * SECOND_US, 9)
        await b.hit_at(41, 1)
        assert b.owed() == pytest.approx(201 - 41 + 1, abs=A_SLOT)


@pytest.mark.parametrize("shift", [0, 3])
async def test_what_others_took_before_a_bucket_that_rested_was_sealed_adds_to_what_it_took_itself(
    server: RedisServer, shift: int
) -> None:
    async with region_of(server, "ab") as (a, b):
        b.store.journal.horizon_shift = shift
        await b.hit_at(0, 100)
        await a.hit_at(2, 100)
        b.store.sweep(NOW_US + 30 * SECOND_US, 9)
        await b.hit_at(41, 1)
        await b.share()
        assert b.owed() == pytest.approx(200 - 41 + 1, abs=2 * A_SLOT)


CANARIES = [
    TokenBucketLimit(10, SECOND_US, 10),
    TokenBucketLimit(70, 60 * SECOND_US, 70),
    TokenBucketLimit(3_600, 3_600 * SECOND_US, 3_600),
    TokenBucketLimit(60, 3_600 * SECOND_US, 60),
]


@pytest.mark.parametrize("canary", CANARIES)
@pytest.mark.parametrize("steady_s", [0, 400])
async def test_while_one_has_another_limit_the_others_know_what_was_taken_under_theirs(
    server: RedisServer, canary: TokenBucketLimit, steady_s: int
) -> None:
    a, b, other = At("a", server), At("b", server), At("other", server, canary)
    known = TokenBucket(b"x", MINUTE, Origin("a", 1), NOW_US)
    for second in range(steady_s + 40):
        hits = 58 if second == 0 else second < steady_s
        of_other = second % 10 == 0
        if hits:
            # What refills is taken at once.
            await a.hit_at(second, hits)
        if of_other:
            await other.hit_at(second, of_other)
        known.take(hits, NOW_US + second * SECOND_US, always=True)
        other.now_us = NOW_US + second * SECOND_US
        await other.share()
    b.now_us = other.now_us
    b.hit(1)
    await b.share()
    # What the canary took is in slots as wide as its own limit's.
    by_a = known.fold(b.now_us) / MINUTE.period_us
    assert by_a + 1 - A_SLOT < b.owed() < by_a + 1 + (steady_s + 40) / 10 + A_SLOT
    for each in (a, b, other):
        await each.close()


async def test_a_debt_is_known_to_the_first_one_with_another_limit(server: RedisServer) -> None:
    a, b = At("a", server), At("b", server, TokenBucketLimit(70, 60 * SECOND_US, 70))
    await a.hit_at(0, 240)
    for second in range(10, 201, 10):
        await a.hit_at(second, 1)
    b.now_us = a.now_us
    b.hit(1)
    await b.share()
    # Of the base, 120 s ago, what it refills itself is gone.
    assert 240 + 20 - 80 - 120 * 70 / 60 - A_SLOT < b.owed() < a.owed()
    for each in (a, b):
        await each.close()
