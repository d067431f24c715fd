"""A fabric on every kind of server, and while it is in trouble: no take waits for it, and nothing is lost."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from fabric.test_fabric import now_us, server, until
from persistence.redis_server import RedisServer, free_port_numbers, needs_redis
from persistence.test_redis_servers import IN_A_CLUSTER, Watched, cluster, create_user, url_of, watched
from persistence.test_snapshot import LIMITS
from redis.asyncio import Redis

from ratelimit_sidecar.config.sidecar_schema import FabricConfig
from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.granted import GrantLedger
from ratelimit_sidecar.crdt.limit import TokenBucketLimit
from ratelimit_sidecar.crdt.shares import Membership, Shares
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.demo.ports import HOST
from ratelimit_sidecar.fabric.fabric import Fabric
from ratelimit_sidecar.fabric.scripts import FabricKeys
from ratelimit_sidecar.persistence.redis_client import Connector, shard_tags
from ratelimit_sidecar.replication.mesh import Mesh
from ratelimit_sidecar.replication.payments import PaymentExchange
from ratelimit_sidecar.replication.peers import region_origin

pytestmark = [needs_redis, pytest.mark.long]

__all__ = ["cluster", "server", "watched"]

COMMANDS = (
    "+evalsha +script|load +time +get +set +del +exists +pttl +pexpire +hget +hmget +hset +hdel +hstrlen +hincrby"
    " +hrandfield +zadd +zrem +zcard +zscore +zrangebyscore +zrevrangebyscore +zrandmember"
    " +info +unlink +hlen +hscan +zrevrange +zremrangebyscore"
)
"""What docs/reference/redis.md says that a user needs, also for strict limits."""

BUCKETS = 40

STRICT = TokenBucketLimit(1_000, 1_000_000, 1_000)


def strict_us() -> int:
    return time.monotonic_ns() // 1_000


class Live:
    """A sidecar whose fabric runs on the real clock.

    Args:
        is_gateway: whether it may be the gateway; its mesh has no peers.
    """

    def __init__(self, name: str, *, is_gateway: bool = False, **config: object) -> None:
        limit = LIMITS["fixed"]
        fabric = FabricConfig.model_validate(config)
        self.store = Store(Origin(name, 1), lambda _key: limit)
        self.regions: list[Store] = []
        shares = Shares(Membership(1, {"east": 1}), "east", strict_us())
        self.ledger = GrantLedger(shares, self.store.origin, lambda _key: STRICT)

        def mesh_of(store: Store, payments: PaymentExchange | None) -> Mesh:
            self.regions.append(store)
            origin = store.origin
            return Mesh(origin=origin, region="east", version="1", store=store, now_us=now_us, payments=payments)

        self.fabric = Fabric(
            Connector(fabric),
            FabricKeys(fabric.prefix, shard_tags()) if fabric.cluster else FabricKeys(fabric.prefix),
            self.store,
            now_us,
            region="east",
            mesh_of=mesh_of if is_gateway else None,
            ledger=self.ledger,
            strict_us=strict_us,
        )
        self.taken = 0

    def takes_of_each_strict(self) -> bool:
        """Take one of each strict bucket; returns whether all could."""
        at_us = strict_us()
        buckets = [self.ledger.bucket(b"key %d" % number, STRICT, at_us) for number in range(BUCKETS)]
        return sum(bucket.take(1, at_us) for bucket in buckets) == BUCKETS

    async def until_it_takes_of_each_strict(self) -> None:
        await until(self.takes_of_each_strict)

    def take_of_each(self) -> float:
        """Take one of each bucket; returns the processor time that it took, in seconds."""
        began = time.process_time()
        for number in range(BUCKETS):
            self.store.bucket(b"key %d" % number, LIMITS["fixed"], now_us()).take(1, now_us())
        self.fabric.note(self.store.drain_changes())
        self.taken += BUCKETS
        return time.process_time() - began

    def known(self) -> int:
        return known(self.store)


def known(store: Store) -> int:
    return sum(entry.tokens for bucket in store for entry in bucket.entries())


@asynccontextmanager
async def live(*each: Live) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(one.fabric.run()) for one in each]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert all(task.cancelled() for task in tasks)


async def know_all(*each: Live) -> None:
    """Wait until all know what all took, and the gateway as well."""
    taken = sum(one.taken for one in each)
    await until(lambda: all(one.known() == taken for one in each))
    gateways = [one for one in each if one.fabric.status.token]
    for one in gateways:
        region = one.regions[-1]
        await until(
            lambda region=region: (
                sum(
                    entry.tokens
                    for bucket in region
                    for entry in bucket.entries()
                    if entry.origin == region_origin("east")
                )
                == taken
            )
        )


@pytest.mark.parametrize(
    ("fault", "mended", "degraded_reason"),
    [
        (("CONFIG", "SET", "maxmemory", "1"), ("CONFIG", "SET", "maxmemory", "0"), "it is out of memory"),
        (("REPLICAOF", "127.0.0.1", "1"), ("REPLICAOF", "NO", "ONE"), "it is a read-only replica"),
        (("ACL", "SETUSER", "default", "-zadd"), ("ACL", "SETUSER", "default", "+zadd"), "does not permit"),
        (("ACL", "SETUSER", "default", "-evalsha"), ("ACL", "SETUSER", "default", "+evalsha"), "does not permit"),
        (("FLUSHALL",), (), ""),
        (("SCRIPT", "FLUSH"), (), ""),
    ],
)
async def test_after_a_fault_everybody_knows_everything(
    server: RedisServer, fault: tuple[str, ...], mended: tuple[str, ...], degraded_reason: str
) -> None:
    a, b = Live("a", url=server.url, is_gateway=True), Live("b", url=server.url)
    async with live(a, b), server.client() as client:
        a.take_of_each()
        b.take_of_each()
        await know_all(a, b)
        await client.execute_command(*fault)
        for each in (a, b):
            each.take_of_each()
        if degraded_reason:
            await until(lambda: degraded_reason in a.fabric.status.degraded_reason)
            await client.execute_command(*mended)
        for each in (a, b):
            each.take_of_each()
        await until(lambda: a.fabric.status.token > 0)
        await know_all(a, b)


async def test_a_server_that_hangs_is_waited_for_by_no_take(server: RedisServer) -> None:
    a, b = Live("a", url=server.url), Live("b", url=server.url)
    async with live(a, b):
        a.take_of_each()
        b.take_of_each()
        await know_all(a, b)
        with server.hanging():
            await until(lambda: "in time" in a.fabric.status.degraded_reason)
            a.take_of_each()
        await know_all(a, b)


async def test_a_user_needs_no_more_than_the_docs_say(tmp_path: Path) -> None:
    _, _, section = (Path(__file__).parents[2] / "docs/reference/redis.md").read_text().partition("\n## A fabric\n")
    assert set(COMMANDS.split()) | set(IN_A_CLUSTER.split()) | {"+select"} == set(re.findall(r"\+[a-z|]+", section))
    [port] = free_port_numbers(1)
    async with RedisServer(tmp_path, port=port) as server, server.client() as client:
        await create_user(client, COMMANDS)
        a = Live("a", url=f"redis://ada:secret@{HOST}:{port}", is_gateway=True)
        async with live(a):
            a.take_of_each()
            await until(lambda: a.fabric.status.token > 0)
            await know_all(a)
            await a.until_it_takes_of_each_strict()
            assert a.fabric.status.odd == a.fabric.status.failed == 0
            assert a.fabric.drawing is not None
            assert a.fabric.drawing.status.failed == 0
            # As those that clean up after many slots do.
            [keys] = FabricKeys("ratelimit").shards
            async with Redis(host=HOST, port=port, username="ada", password="secret") as ada:
                assert await ada.pttl(keys.of_bucket(b"key 1")[0]) > 0


async def test_in_a_cluster_a_node_that_lost_its_data_is_told_again(cluster: list[RedisServer]) -> None:
    for node in cluster:
        async with node.client() as client:
            await create_user(client, COMMANDS, IN_A_CLUSTER)
    url = url_of(cluster).replace("//", "//ada:secret@")
    a, b = Live("a", url=url, cluster=True, is_gateway=True), Live("b", url=url, cluster=True)
    async with live(a, b):
        for each in (a, b):
            each.take_of_each()
        await until(lambda: a.fabric.status.token > 0)
        await know_all(a, b)
        async with cluster[1].client() as client:
            assert await client.dbsize() > BUCKETS // 6
            await client.flushall()
        for each in (a, b):
            each.take_of_each()
        await know_all(a, b)


async def test_in_a_cluster_strict_limits_go_on_after_a_node_has_lost_its_data(cluster: list[RedisServer]) -> None:
    a, b = (Live(name, url=url_of(cluster), cluster=True, is_gateway=name == "a") for name in "ab")
    async with live(a, b), cluster[1].client() as client:
        for each in (a, b):
            await each.until_it_takes_of_each_strict()
        await client.flushall()
        drawing = b.fabric.drawing
        assert drawing is not None
        await until(lambda: not b.takes_of_each_strict() and drawing.status.lineages > 0)
        for each in (a, b):
            await each.until_it_takes_of_each_strict()


async def test_in_a_cluster_a_node_that_hangs_is_waited_for_by_no_take(cluster: list[RedisServer]) -> None:
    a, b = (Live(name, url=url_of(cluster), cluster=True) for name in "ab")
    async with live(a, b):
        for each in (a, b):
            each.take_of_each()
        await know_all(a, b)
        with cluster[2].hanging():
            await until(lambda: a.fabric.status.failed > 0)
            for each in (a, b):
                each.take_of_each()
        await know_all(a, b)


async def test_while_a_cluster_moves_a_slot_nothing_is_lost(cluster: list[RedisServer]) -> None:
    a, b = (Live(name, url=url_of(cluster), cluster=True, is_gateway=name == "a") for name in "ab")
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(node.client()) for node in cluster]
        ids = [await client.execute_command("CLUSTER", "MYID") for client in clients]
        await stack.enter_async_context(live(a, b))
        for each in (a, b):
            each.take_of_each()
        await until(lambda: a.fabric.status.token > 0)
        await know_all(a, b)
        slots = [int(await clients[0].execute_command("CLUSTER", "KEYSLOT", f"{{{tag}}}")) for tag in shard_tags()]
        for slot in slots:
            if not await clients[0].execute_command("CLUSTER", "COUNTKEYSINSLOT", slot):
                continue
            await clients[1].execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[0])
            await clients[0].execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[1])
            keys = await clients[0].execute_command("CLUSTER", "GETKEYSINSLOT", slot, 1_000)
            for number, key in enumerate(keys):
                await clients[0].execute_command("MIGRATE", HOST, cluster[1].port, key, 0, 5_000)
                if number % 5 == 0:
                    for each in (a, b):
                        each.take_of_each()
                    await asyncio.sleep(0.1)
            for client in (clients[1], clients[0], clients[2]):
                await client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", ids[1])
        await until(lambda: a.fabric.status.token > 0)
        await know_all(a, b)
        assert await clients[0].dbsize() == 0


async def test_when_the_sentinels_name_another_master_that_one_is_told_everything(watched: Watched) -> None:
    master, replica, _ = watched
    a, b = (Live(name, url=watched.url, sentinel="limits", is_gateway=name == "a") for name in "ab")
    async with live(a, b), replica.client() as client:
        for each in (a, b):
            each.take_of_each()
        await know_all(a, b)
        while not await watched.is_known():  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        # The replica lags when it takes over: it has lost what comes next.
        await client.execute_command("REPLICAOF", "NO", "ONE")
        await client.execute_command("REPLICAOF", HOST, master.port)
        for each in (a, b):
            each.take_of_each()
        await master.kill()
        for each in (a, b):
            each.take_of_each()
        await know_all(a, b)
        assert await client.dbsize() > BUCKETS


async def test_when_the_sentinels_name_another_master_its_accounts_are_empty_and_refill(watched: Watched) -> None:
    a, b = (Live(name, url=watched.url, sentinel="limits", is_gateway=name == "a") for name in "ab")
    async with live(a, b):
        for each in (a, b):
            await each.until_it_takes_of_each_strict()
        while not await watched.is_known():  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        await watched.master.kill()
        drawing = b.fabric.drawing
        assert drawing is not None
        await until(lambda: not b.takes_of_each_strict() and drawing.status.lineages > 0)
        for each in (a, b):
            await each.until_it_takes_of_each_strict()
