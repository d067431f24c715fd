"""Sidecars of a region draw tokens of a strict limit from its account in a real Redis."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from fabric.test_fabric import connect_to, server
from persistence.redis_server import RedisServer, needs_redis
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.draw_policy import MOST_PACE_US
from ratelimit_sidecar.crdt.gateway_ledger import GatewayLedger, gateway_needs
from ratelimit_sidecar.crdt.granted import COUNTED_US, GRANT_US, GrantedBucket, GrantLedger
from ratelimit_sidecar.crdt.limit import TokenBucketLimit
from ratelimit_sidecar.crdt.payment_policy import SHORTAGE_US
from ratelimit_sidecar.crdt.shares import Membership, Shares
from ratelimit_sidecar.fabric.account_calls import members_text
from ratelimit_sidecar.fabric.accounts import BEAT, KEPT_US, MOST_STEP_US
from ratelimit_sidecar.fabric.drawing import Drawing
from ratelimit_sidecar.fabric.redis_link import RedisLink
from ratelimit_sidecar.fabric.scripts import FabricKeys

pytestmark = needs_redis

__all__ = ["server"]

KEYS = FabricKeys("ratelimit")
STRICT = KEYS.shards[0].of_accounts[0]
SECOND_US = 1_000_000
LIMIT = TokenBucketLimit(100, 1_000_000, 100)
"""Full a second after its beginning."""


class Region:
    """Its sidecars without front ends, whose clock the test puts forward, and what a gateway does."""

    def __init__(self, server: RedisServer, names: str, weights: dict[str, int] | None = None) -> None:
        self.ahead_us = 0
        self.members = members_text([weights or {"east": 1}])
        self._server = server
        self._link = RedisLink(connect_to(server))
        self.sidecars = {name: Sidecar(name, server, self) for name in names}

    @property
    def now_us(self) -> int:
        return time.monotonic_ns() // 1_000 + self.ahead_us

    async def beat(self, token: int = 1, epoch: int = 1) -> None:
        first = KEYS.shards[0]
        arguments = [secrets.token_hex(8), str(token), self.members, "0", "64", str(epoch)]
        await self._link.call(BEAT, [([*first.of_accounts, first.fence], arguments)])

    async def run(self, seconds: float) -> None:
        """The gateway's part of the time that goes by in truth."""
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while loop.time() < until:
            await self.beat()
            await asyncio.sleep(MOST_STEP_US / 4e6)

    async def begin(self) -> None:
        """Until the account is full, however much of the time was lost."""
        async with self._server.client() as client:
            clock_us = 0
            while clock_us < COUNTED_US + 1_100_000:
                await self.run(0.1)
                clock_us = int((await client.hget(STRICT, "@")).split()[2])
        for each in self.sidecars.values():
            each.take(1)
            await each.tick()

    async def close(self) -> None:
        await self._link.close()
        for each in self.sidecars.values():
            await each.drawing.close()


class Sidecar:
    def __init__(self, name: str, server: RedisServer, region: Region) -> None:
        self._region = region
        shares = Shares(Membership(1, {"east": 1}), "east", 0)
        # Keys are of a rule, or `RULE value`.
        self.ledger = GrantLedger(
            shares, Origin(name, 1), lambda _key: LIMIT, rule_key=lambda key: key.partition(b" ")[0]
        )
        self.drawing = Drawing(connect_to(server), KEYS, self.ledger, lambda: region.now_us, region="east")

    def take(self, hits: int, limit: TokenBucketLimit = LIMIT, key: bytes = b"k") -> bool:
        return self.ledger.bucket(key, limit, self._region.now_us).take(hits, self._region.now_us)

    async def tick(self) -> bool:
        return await self.drawing.tick()

    def held(self, key: bytes = b"k") -> int:
        bucket = self.ledger.bucket(key, LIMIT, self._region.now_us)
        assert isinstance(bucket, GrantedBucket)
        bucket.advance(self._region.now_us)
        return bucket.held

    async def draw(self, hits: int) -> None:
        """So many, for a request that was denied."""
        assert not self.take(hits)
        assert await self.tick()
        assert self.held() >= hits


@asynccontextmanager
async def region_on(server: RedisServer, names: str = "ab") -> AsyncIterator[Region]:
    region = Region(server, names)
    try:
        await region.begin()
        yield region
    finally:
        await region.close()


async def put_forward(client: Redis, us: int) -> None:
    """Of the accounts, the clock."""
    history, lineage, clock, time_us = (await client.hget(STRICT, "@")).split()
    await client.hset(STRICT, "@", b"%b %b %d %b" % (history, lineage, int(clock) + us, time_us))


async def left(server: RedisServer) -> dict[str, int]:
    """What the account of the server has, and what it counts as granted."""
    async with server.client() as client:
        _, _, clock, _ = (await client.hget(STRICT, "@")).split()
        full, _, out, former, home, rate, _, _ = (await client.hget(STRICT, "bk")).split()
    return {"level": int(int(home) - (float(full) - int(clock)) * float(rate)), "out": int(out) + int(former)}


async def test_the_first_request_is_denied_and_one_after_a_tick_is_not(server: RedisServer) -> None:
    async with region_on(server) as region:
        a = region.sidecars["a"]
        assert not a.take(30)
        bucket = a.ledger.bucket(b"k", LIMIT, region.now_us)
        assert bucket.retry_after_us(30) == 300_000
        await a.tick()
        assert bucket.remaining == LIMIT.capacity
        assert a.take(30)
        assert bucket.remaining == LIMIT.capacity - 30
        assert bucket.full_in_us == 300_000


async def test_0_hits_pass_after_a_tick_and_in_a_region_without_a_home_never(server: RedisServer) -> None:
    """What they are charged afterwards is drawn from the account, if there is one."""
    async with region_on(server) as region, server.client() as client:
        a = region.sidecars["a"]
        assert not a.take(0, key=b"n")
        await a.tick()
        assert a.take(0, key=b"n")
        region.members = members_text([{"east": 0, "west": 1}])
        await region.beat(epoch=2)
        for _ in range(3):
            assert not a.take(0, key=b"o")
            region.ahead_us += GRANT_US
            await a.tick()
        assert not await client.hexists(STRICT, "bo")


async def test_all_together_draw_no_more_than_there_is(server: RedisServer) -> None:
    async with region_on(server) as region:
        a, b = region.sidecars.values()
        await a.draw(70)
        assert not b.take(70)
        await b.tick()
        # What was refilled meanwhile has no room beside what is held.
        assert a.held() + b.held() <= LIMIT.capacity


async def test_what_is_spent_makes_room_for_refill(server: RedisServer) -> None:
    async with region_on(server) as region:
        a, b = region.sidecars.values()
        await a.draw(100)
        assert a.take(100)
        assert await a.tick()
        await region.run(0.5)
        assert not b.take(30)
        await b.tick()
        assert 30 <= b.held() <= 100


async def test_what_is_not_used_goes_back(server: RedisServer) -> None:
    async with region_on(server) as region:
        a = region.sidecars["a"]
        await a.draw(60)
        region.ahead_us += SHORTAGE_US + SECOND_US
        await a.tick()
        assert a.held() < 20
        assert (await left(server))["out"] == a.held()
        assert a.drawing.status.returned > 40


async def test_one_that_stops_gives_back_all_it_holds(server: RedisServer) -> None:
    async with region_on(server) as region:
        a = region.sidecars["a"]
        await a.draw(60)
        await a.drawing.give_back()
        assert await left(server) == {"level": 100, "out": 0}


async def test_what_a_killed_one_held_is_refilled_once_its_grant_is_over(server: RedisServer) -> None:
    async with region_on(server) as region:
        a, b = region.sidecars.values()
        await a.draw(100)
        await region.run(0.5)
        assert not b.take(1)
        await b.tick()
        assert b.held() == 0
        await region.run(2 * COUNTED_US / 1e6 + 1.5)
        assert not b.take(50)
        await b.tick()
        assert b.held() >= 50


async def test_while_the_server_is_gone_it_spends_what_it_holds_and_then_denies(server: RedisServer) -> None:
    async with region_on(server) as region:
        a = region.sidecars["a"]
        await a.draw(10)
        await server.kill()
        assert not a.take(90)
        assert not await a.tick()
        assert a.drawing.status.degraded_reason == "it cannot be reached"
        assert a.take(9)
        region.ahead_us += GRANT_US
        assert not a.take(1)
        await server.start()
        await region.begin()
        await a.draw(5)
        assert a.drawing.status.degraded_reason == ""


async def test_after_the_server_lost_its_data_nothing_is_drawn_until_no_former_grant_is_left(
    server: RedisServer,
) -> None:
    async with region_on(server) as region:
        a, b = region.sidecars.values()
        await a.draw(100)
        async with server.client() as client:
            await client.flushall()
        began = asyncio.get_running_loop().time()
        while b.held() == 0:
            await region.beat()
            b.take(1)
            await b.tick()
            await asyncio.sleep(MOST_STEP_US / 4e6)
        assert round(asyncio.get_running_loop().time() - began, 3) >= COUNTED_US / 1e6
        assert b.drawing.status.lineages == 1


async def test_a_server_that_starts_again_with_its_data_may_have_lost_some(server: RedisServer) -> None:
    async with region_on(server) as region:
        a = region.sidecars["a"]
        await a.draw(20)
        async with server.client() as client:
            await client.save()
        await server.kill()
        await server.start()
        async with server.client() as client:
            assert await client.hexists(STRICT, "bk")
        assert not a.take(50)
        await a.tick()
        await region.beat()
        await a.tick()
        assert a.drawing.status.lineages == 1
        assert a.drawing.status.drawn == a.held() == 20


async def test_a_server_whose_memory_went_back_is_found_out_by_who_called_since(server: RedisServer) -> None:
    async with region_on(server) as region, server.client() as client:
        a = region.sidecars["a"]
        former = await client.dump(STRICT)
        await a.draw(100)
        await client.restore(STRICT, 0, former, replace=True)
        assert a.take(100)
        await a.tick()
        assert a.drawing.status.lineages == 1
        assert not await client.hexists(STRICT, "bk")


async def test_the_clock_of_the_server_counts_in_small_steps_only(server: RedisServer) -> None:
    async with region_on(server) as region, server.client() as client:
        a, b = region.sidecars.values()
        await a.draw(100)
        assert a.take(100)
        await a.tick()
        for ahead_us in (3_600 * SECOND_US, -3_600 * SECOND_US):
            # As if the clock had been set now.
            history, lineage, clock, time_us = (await client.hget(STRICT, "@")).split()
            await client.hset(STRICT, "@", b"%b %b %b %d" % (history, lineage, clock, int(time_us) - ahead_us))
            assert not b.take(50)
            await b.tick()
            assert b.held() < 50


async def test_a_gateway_with_an_older_token_says_nothing(server: RedisServer) -> None:
    async with region_on(server) as region:
        a = region.sidecars["a"]
        await region.beat(token=5)
        region.members = members_text([{"east": 1, "west": 1}])
        with pytest.raises(ResponseError, match="FENCED"):
            await region.beat(token=4)
        await a.draw(90)


async def test_a_gateway_with_an_older_configuration_does_not_give_the_region_its_former_home(
    server: RedisServer,
) -> None:
    """Others count on the new one, once it was shown."""
    async with region_on(server) as region:
        a = region.sidecars["a"]
        former, region.members = region.members, members_text([{"east": 1, "west": 1}])
        await region.beat(token=5, epoch=2)
        region.members = former
        await region.beat(token=6, epoch=1)
        assert not a.take(90)
        await a.tick()
        await a.tick()
        assert 40 <= a.held() <= 50


async def test_there_is_no_room_for_payments_while_there_may_be_grants_that_a_lost_account_knew(
    server: RedisServer,
) -> None:
    async with region_on(server) as region, server.client() as client:
        await region.sidecars["b"].draw(100)
        await client.flushall()
        ledger = GatewayLedger(Shares(Membership(1, {"east": 1}), "east", 0), Origin("east", 1), lambda _key: LIMIT)
        drawing = Drawing(connect_to(server), KEYS, ledger, lambda: region.now_us, region="east", needs=gateway_needs)
        bucket = ledger.bucket(b"k", LIMIT, region.now_us)
        assert isinstance(bucket, GrantedBucket)
        began = asyncio.get_running_loop().time()
        while not bucket.granted:
            await region.beat()
            ledger.note_short(b"k", region.now_us, 50_000)
            await drawing.tick()
            await asyncio.sleep(MOST_STEP_US / 4e6)
        assert round(asyncio.get_running_loop().time() - began, 3) >= COUNTED_US / 1e6
        assert bucket.granted <= LIMIT.capacity
        await drawing.close()


async def test_a_damaged_account_is_empty_and_the_others_are_as_they_were(server: RedisServer) -> None:
    async with region_on(server) as region, server.client() as client:
        a, b = region.sidecars.values()
        await a.draw(10)
        assert not b.take(10, key=b"l")
        for damaged in (b"", b"1 2 3", b"inf 0 0 0 100 nan 0 1", b"1.0 0 0 0 100 1.0.0 0 1"):
            await client.hset(STRICT, "bk", damaged)
            await region.beat()
            assert not b.take(10)
            assert await b.tick()
            assert b.held() == 0
            assert b.held(b"l") >= 10
        while b.held() < 10:
            await region.run(0.1)
            b.take(10)
            await b.tick()


async def test_sidecars_go_by_the_members_that_the_gateway_names(server: RedisServer) -> None:
    async with region_on(server) as region:
        a = region.sidecars["a"]
        region.members = members_text([{"east": 1, "west": 1}])
        await region.beat()
        assert not a.take(90)
        # It learns of them, and then draws.
        await a.tick()
        await a.tick()
        assert 40 <= a.held() <= 50


async def test_keys_that_are_invented_under_one_rule_leave_accounts_to_other_rules(server: RedisServer) -> None:
    async with region_on(server) as region, server.client() as client:
        a, b = region.sidecars.values()
        b.ledger.places.max_buckets = 50
        for number in range(100):
            # It has been full, and there is room again, in Redis alone.
            a.ledger.places.max_buckets = 10**6
            a.take(1, key=b"flooded %d" % number)
            a.ledger.places.max_buckets = 50
            await a.tick()
        assert await accounts_of(client, b"flooded") == 44
        assert not b.take(10, key=b"other 1")
        await b.tick()
        assert b.held(b"other 1") >= 10


async def test_accounts_that_are_dropped_make_room_for_others_of_their_rule(server: RedisServer) -> None:
    async with region_on(server) as region, server.client() as client:
        a, b = region.sidecars.values()
        a.ledger.places.max_buckets = b.ledger.places.max_buckets = 50
        for number in range(30):
            a.take(1, key=b"flooded %d" % number)
        await a.tick()
        await a.drawing.give_back()
        assert await accounts_of(client, b"flooded") == 30
        await put_forward(client, KEPT_US + COUNTED_US)
        for _ in range(3):
            await region.beat()
        assert await accounts_of(client, b"flooded") == 0
        for number in range(40):
            b.take(1, key=b"flooded %d" % number)
        await b.tick()
        assert await accounts_of(client, b"flooded") == 40


async def accounts_of(client: Redis, rule: bytes) -> int:
    """Of that rule; what the server has counted is right."""
    found = {name: text for name, text in (await client.hgetall(STRICT)).items() if name.startswith(b"b")}
    counted = {name: int(text) for name, text in (await client.hgetall(STRICT)).items() if name.startswith(b"r")}
    assert int(await client.hget(STRICT, "taken") or 0) == sum(counted.values()) == len(found)
    for name, count in counted.items():
        assert count == sum(text.split()[-1] == name[1:] for text in found.values())
    return sum(name.startswith(b"b" + rule) for name in found)


async def test_an_account_that_is_full_and_unused_is_dropped_and_is_full_when_it_comes_again(
    server: RedisServer,
) -> None:
    async with region_on(server) as region, server.client() as client:
        a = region.sidecars["a"]
        await a.draw(60)
        await a.drawing.give_back()
        await region.beat()
        assert await client.hexists(STRICT, "bk")
        await put_forward(client, KEPT_US + COUNTED_US)
        await region.beat()
        assert not await client.hexists(STRICT, "bk")
        await a.draw(100)


async def test_an_account_whose_limit_was_another_is_kept_until_that_one_would_have_refilled_it(
    server: RedisServer,
) -> None:
    day_us = 86_400 * SECOND_US
    day = TokenBucketLimit(1_000, day_us, 1_000)
    async with region_on(server) as region, server.client() as client:
        a = region.sidecars["a"]

        async def draw_all(limit: TokenBucketLimit) -> int:
            """All that the account has, which is spent."""
            region.ahead_us += MOST_PACE_US
            assert not a.take(limit.capacity, limit, b"n")
            await a.tick()
            drawn = 0
            while a.take(1, limit, b"n"):
                drawn += 1
            return drawn

        await put_forward(client, day_us + 2 * COUNTED_US)
        assert await draw_all(day) == 1_000
        assert await draw_all(LIMIT) <= 2
        await a.drawing.give_back()
        await put_forward(client, KEPT_US + 2 * COUNTED_US)
        await region.beat()
        assert await draw_all(day) <= LIMIT.capacity + 2
        await a.drawing.give_back()
        await put_forward(client, day_us + 2 * COUNTED_US)
        await region.beat()
        assert not await client.hexists(STRICT, "bn")
