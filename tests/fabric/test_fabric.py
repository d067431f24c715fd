"""Sidecars of a region share through a real Redis, and what they took is known in another region once."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from persistence.redis_server import SERVERS, WITHIN_S, RedisServer, free_port_numbers, needs_redis
from persistence.test_snapshot import LIMITS, NOW_US, RULES, SECOND_US, make_store, take
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from ratelimit_sidecar.config.sidecar_schema import FabricConfig
from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.limit import TokenBucketLimit
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.demo.ports import HOST
from ratelimit_sidecar.fabric import sharing
from ratelimit_sidecar.fabric.fabric import Fabric
from ratelimit_sidecar.fabric.scripts import GATEWAY, LEASE, FabricKeys
from ratelimit_sidecar.limiter.rules import Rules
from ratelimit_sidecar.persistence.redis_calls import Connect
from ratelimit_sidecar.persistence.redis_client import Connector
from ratelimit_sidecar.replication.mesh import Mesh
from ratelimit_sidecar.replication.payments import PaymentExchange

pytestmark = needs_redis


@pytest.fixture(params=SERVERS)
async def server(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[RedisServer]:
    async with RedisServer(tmp_path, program=request.param) as running:
        yield running


def connect_to(server: RedisServer) -> Connect:
    """Which tries nothing again by itself, as the sidecar's does not."""
    return Connector(FabricConfig.model_validate({"url": server.url}))


class Sidecar:
    """One without a front end, whose clock the test moves."""

    def __init__(self, name: str, server: RedisServer, incarnation: int = 1, most_shared: int = 1_000) -> None:
        self.now_us = NOW_US
        self.store = make_store(Origin(name, incarnation))
        self.fabric = Fabric(
            connect_to(server), FabricKeys("ratelimit"), self.store, lambda: self.now_us, most_shared=most_shared
        )

    def take(self, value: str, hits: int, name: str = "fixed") -> None:
        take(self.store, name, value, hits, self.now_us)
        self.fabric.note(self.store.drain_changes())

    def give_back(self, value: str, hits: int, name: str) -> None:
        match = RULES.match("api", [(name, value)])
        assert match is not None
        self.store.bucket(match.bucket_key, LIMITS[name], self.now_us).give_back(hits, self.now_us)
        self.fabric.note(self.store.drain_changes())

    async def share(self) -> None:
        await self.fabric.share()
        assert self.fabric.status.degraded_reason == ""

    def left(self, name: str = "fixed") -> list[int]:
        left = []
        for bucket in self.store:
            if bucket.limit == LIMITS[name]:
                bucket.advance(self.now_us)
                left.append(bucket.remaining)
        return sorted(left)

    async def close(self) -> None:
        await self.fabric.close()


@asynccontextmanager
async def sidecars(server: RedisServer, *names: str) -> AsyncIterator[list[Sidecar]]:
    made = [Sidecar(name, server) for name in names]
    try:
        yield made
    finally:
        for each in made:
            await each.close()


@pytest.mark.parametrize("name", ["tokens", "month", "fixed", "sliding"])
async def test_what_one_takes_the_others_know_after_a_tick_of_each(server: RedisServer, name: str) -> None:
    async with sidecars(server, "a", "b") as (a, b):
        a.take("x", 10, name)
        b.take("x", 5, name)
        await a.share()
        await b.share()
        await a.share()
        # What others took is placed in the middle of its slot.
        whole = LIMITS[name].capacity
        assert a.left(name) == b.left(name) == pytest.approx([whole - 15], abs=whole / 64)


async def test_what_was_held_at_one_is_given_back_at_another_that_has_never_used_it(server: RedisServer) -> None:
    async with sidecars(server, "a", "b") as (a, b):
        a.take("x", 10, "tokens")
        b.give_back("x", 10, "tokens")
        for each in (a, b, b, a):
            await each.share()
            each.fabric.note(each.store.drain_changes())
        assert a.left("tokens") == b.left("tokens") == [LIMITS["tokens"].capacity]


async def test_it_asks_about_buckets_in_use_here_only(server: RedisServer) -> None:
    async with sidecars(server, "a", "b") as (a, b):
        a.take("x", 10)
        a.take("y", 10)
        b.take("x", 5)
        await a.share()
        await b.share()
        assert b.left() == [85]
        a.now_us += sharing.SHARED_FORGOTTEN_US + SECOND_US
        await a.share()
        assert a.fabric.status.buckets == 0


async def test_a_take_that_found_no_room_is_told_once_there_is_some(server: RedisServer) -> None:
    async with sidecars(server, "b") as [b]:
        a = Sidecar("a", server, most_shared=100)
        for number in range(100):
            a.take(str(number), 50)
        a.take("z", 10)
        await a.share()
        assert a.fabric.status.unshared == 1
        a.now_us += sharing.SHARED_FORGOTTEN_US
        # The first ticks tell those that had room.
        for _ in range(6):
            await a.share()
        await a.close()
        b.take("z", 1)
        await b.share()
        assert b.left() == [89]


async def test_what_is_told_twice_counts_once(server: RedisServer) -> None:
    async with sidecars(server, "a", "b") as (a, b):
        a.take("x", 10)
        b.take("x", 1)
        for _ in range(5):
            await a.share()
            for shard in a.fabric.shards:
                shard.tell_again()
        await b.share()
        assert b.left() == [89]


async def test_a_server_that_lost_its_data_is_told_again(server: RedisServer) -> None:
    async with sidecars(server, "a", "b") as (a, b), server.client() as client:
        a.take("x", 10)
        b.take("x", 1)
        for each in (a, b):
            await each.share()
        await client.flushall()
        for each in (a, b, a, b, a):
            await each.share()
        assert a.left() == b.left() == [89]
        a.take("x", 1)
        for each in (a, b):
            await each.share()
        assert a.left() == b.left() == [88]


async def test_while_the_server_is_gone_nothing_is_forgotten(server: RedisServer) -> None:
    async with sidecars(server, "a", "b") as (a, b):
        b.take("x", 1)
        await b.share()
        await server.kill()
        a.take("x", 10)
        await a.fabric.share()
        assert a.fabric.status.degraded_reason == "it cannot be reached"
        await server.start()
        for each in (a, b):
            await each.fabric.share()
        for each in (a, b, a):
            await each.share()
        assert a.left() == b.left() == [89]


async def test_what_a_former_life_took_is_known_to_the_next(server: RedisServer) -> None:
    async with sidecars(server, "a") as [a]:
        a.take("x", 10)
        await a.share()
    again = Sidecar("a", server, incarnation=2)
    again.take("x", 1)
    await again.share()
    await again.close()
    assert again.left() == [89]


steps = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 40), st.integers(0, 15), st.sampled_from(["share", "take", "give"])),
    max_size=30,
)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tokens", "month", "fixed", "sliding"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25, deadline=None)
@given(steps)
async def test_all_come_to_the_level_of_one_that_heard_everything(
    server: RedisServer, name: str, history: list[tuple[int, int, int, str]]
) -> None:
    async with server.client() as client:
        await client.flushall()
    together = make_store(Origin("all", 9))
    async with sidecars(server, "a", "b", "c") as made:
        key = b""
        for number, hits, gap, what in history:
            each = made[number]
            for other in made:
                other.now_us += gap * SECOND_US // 20
            if what == "share":
                await each.share()
            elif what == "take":
                each.take("x", hits, name)
            else:
                for bucket in each.store:
                    bucket.refund(hits, each.now_us)
                each.fabric.note(each.store.drain_changes())
            for bucket in each.store:
                key = bucket.key
                own = [entry for entry in bucket.entries() if entry.origin == each.store.origin]
                together.join(key, bucket.limit, None, own, each.now_us)
        for each in (*made, *made):
            each.take("x", 1, name)
            await each.share()
            [bucket] = list(each.store)
            own = [entry for entry in bucket.entries() if entry.origin == each.store.origin]
            together.join(bucket.key, bucket.limit, None, own, each.now_us)
        await asyncio.gather(*[each.share() for each in made])
        now_us = made[0].now_us
        levels = []
        for store in (together, *[each.store for each in made]):
            [bucket] = list(store)
            bucket.advance(now_us)
            levels.append(bucket.fold(now_us))
        limit = LIMITS[name]
        # Token buckets: a base is whole microseconds, and what was given back may be placed after what it was for.
        slack = 4 * limit.tokens * len(made) if isinstance(limit, TokenBucketLimit) else 0
        if isinstance(limit, TokenBucketLimit) and any(what == "give" for *_, what in history):
            return
        assert max(levels) - min(levels) <= slack, levels


async def lease(client: Redis, who: str, milliseconds: int = 60_000) -> int:
    [keys] = FabricKeys("ratelimit").shards
    return int(await client.eval(LEASE, 2, keys.lease, keys.fence, who, milliseconds))


async def test_one_has_the_lease_and_a_former_gateway_is_refused(server: RedisServer) -> None:
    [keys] = FabricKeys("ratelimit").shards
    async with server.client() as client:
        first, other, again = [await lease(client, who) for who in ("a", "b", "a")]
        assert (other, again) == (0, first)
        await client.delete(keys.lease)
        second = await lease(client, "b")
        assert second > first
        arguments = ["epoch", first, keys.head, 1_000, 0, 10]
        with pytest.raises(ResponseError, match="FENCED"):
            await client.eval(GATEWAY, 4, keys.clock, keys.changed, keys.held, keys.fence, *arguments)
        arguments[1] = second
        answer = await client.eval(GATEWAY, 4, keys.clock, keys.changed, keys.held, keys.fence, *arguments)
        assert answer == [b"epoch", b"1", 1, []]


class Running:
    """A sidecar whose fabric runs, on the real clock, and that may be the gateway."""

    def __init__(self, name: str, server: RedisServer, region: str, *, sync: str | None, peers: list[str]) -> None:
        self.store = make_store(Origin(name, random.getrandbits(63) + 1))
        self.meshes: list[Mesh] = []
        self.regions: list[Store] = []
        """Of the region, for each time that it was the gateway."""

        def mesh_of(store: Store, payments: PaymentExchange | None) -> Mesh:
            mesh = Mesh(
                origin=store.origin, region=region, version="1", store=store, now_us=now_us, peers=peers, listen=sync
            )
            self.meshes.append(mesh)
            self.regions.append(store)
            return mesh

        self.fabric = Fabric(
            connect_to(server),
            FabricKeys("ratelimit"),
            self.store,
            now_us,
            region=region,
            mesh_of=None if sync is None else mesh_of,
        )

    def take(self, value: str, hits: int) -> None:
        take(self.store, "fixed", value, hits, now_us())
        self.fabric.note(self.store.drain_changes())

    def left(self) -> list[int]:
        return sorted(bucket.remaining for bucket in self.store)


def now_us() -> int:
    return time.time_ns() // 1_000


@asynccontextmanager
async def running(each: Running) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(each.fabric.run())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task])


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(WITHIN_S):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_other_rules_are_those_of_the_region_too(server: RedisServer) -> None:
    """Streams of peers keep limits until the store has another function for them (`replication.deltas`)."""
    [port] = free_port_numbers(1)
    gateway = Running("east-1", server, "east", sync=f"{HOST}:{port}", peers=[])
    async with running(gateway):
        await until(lambda: bool(gateway.regions))
        other = Rules({}).replicated_limit_of_key
        gateway.store.limit_of_key = other
        gateway.fabric.use_rules()
        await until(lambda: gateway.regions[-1].limit_of_key is other)


@pytest.mark.slow
async def test_regions_share_by_their_gateways_and_the_next_one_counts_nothing_twice(tmp_path: Path) -> None:
    east_sync, west_sync = (f"{HOST}:{port}" for port in free_port_numbers(2))
    async with AsyncExitStack() as stack:
        in_east = await stack.enter_async_context(RedisServer(tmp_path / "east"))
        in_west = await stack.enter_async_context(RedisServer(tmp_path / "west"))
        # The gateways of east are two others, so that both of its sidecars outlive them.
        east = [Running(name, in_east, "east", sync=None, peers=[]) for name in ("east-1", "east-2")]
        west = Running("west-1", in_west, "west", sync=west_sync, peers=[east_sync])
        for each in (*east, west):
            await stack.enter_async_context(running(each))
        taken = token = 0
        for number in range(3):
            gateway = Running(f"gateway-{number}", in_east, "east", sync=east_sync, peers=[west_sync])
            async with running(gateway):
                for each in (*east, west):
                    each.take("x", 3)
                    taken += 3
                expected = [100 - taken]
                await until(lambda expected=expected: all(each.left() == expected for each in (*east, west)))
                assert gateway.fabric.status.token > token
                token = gateway.fabric.status.token
            # Without a gateway a region shares all the same.
            for each in east:
                each.take("x", 1)
            taken += 2
        await until(lambda: all(each.left() <= [100 - taken + 6] for each in east))


@pytest.mark.slow
@pytest.mark.parametrize(("most", "is_full"), [(16, False), (5, True)])
async def test_a_gateway_has_room_for_the_buckets_of_several_sidecars_and_tells_when_it_has_not(
    tmp_path: Path, most: int, is_full: bool
) -> None:
    east_sync, west_sync = (f"{HOST}:{port}" for port in free_port_numbers(2))
    async with AsyncExitStack() as stack:
        in_east = await stack.enter_async_context(RedisServer(tmp_path / "east"))
        in_west = await stack.enter_async_context(RedisServer(tmp_path / "west"))
        east = [Running(name, in_east, "east", sync=None, peers=[]) for name in ("east-1", "east-2")]
        gateway = Running("gateway", in_east, "east", sync=east_sync, peers=[west_sync])
        gateway.store.places.max_buckets = most
        west = Running("west-1", in_west, "west", sync=west_sync, peers=[east_sync])
        for each in (*east, gateway, west):
            await stack.enter_async_context(running(each))
        for number in range(15):
            for each in east:
                each.take(f"{number} of {each.store.origin.node}", 3)
        if is_full:
            await until(lambda: gateway.fabric.status.gateway_unshared > 0)
            # Other rules find room.
            take(east[0].store, "sliding", "x", 3, now_us())
            east[0].fabric.note(east[0].store.drain_changes())
            of_far = LIMITS["sliding"]
            await until(lambda: any(bucket.limit == of_far for region in west.regions for bucket in region))
        else:
            await until(lambda: any(len(region) == 30 for region in west.regions))
            assert gateway.fabric.status.gateway_unshared == 0


@pytest.mark.slow
async def test_what_a_gateway_held_of_the_region_is_freed_when_its_turn_ends(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(RedisServer(tmp_path))
        [port] = free_port_numbers(1)
        gateway = Running("gateway", server, "east", sync=f"{HOST}:{port}", peers=[])
        await stack.enter_async_context(running(gateway))
        gateway.take("x", 3)
        await until(lambda: any(len(region) for region in gateway.regions))
        gateway.fabric.give_up()
        await until(lambda: len(gateway.regions) == 2)
        assert len(gateway.regions[0]) == 0
