"""Every way to reach Redis: TCP, TLS, a Sentinel's master that fails over, and a Cluster that loses a node's data."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import NamedTuple

import pytest
import trustme
from persistence.redis_server import WITHIN_S, RedisServer, free_port_numbers, needs_redis
from persistence.test_redis_store import hit, kept, left_after_restart, state_in, until
from persistence.test_snapshot import BEFORE, NOW_US, make_store, take
from redis.asyncio import Redis
from redis.crc import key_slot

from ratelimit_sidecar.config.sidecar_schema import FabricConfig
from ratelimit_sidecar.demo.ports import HOST
from ratelimit_sidecar.persistence.redis_client import Connector

pytestmark = needs_redis

SLOTS = 16_384

COMMANDS = "+get +set +scan +time +evalsha +script|load +hgetall +hmget +hget +hset +hdel +pttl +pexpire"
IN_A_CLUSTER = "+cluster|slots +cluster|shards +command"
"""What docs/reference/redis.md says that a user needs."""


async def create_user(client: Redis, *commands: str) -> None:
    rights = [word for each in commands for word in each.split()]
    await client.execute_command("ACL", "SETUSER", "ada", "on", ">secret", "~ratelimit:*", *rights)


async def keeps(server: RedisServer, **config: object) -> None:
    store = make_store(BEFORE)
    state = state_in(server, store, **config)
    async with kept(state):
        hit(state, store)
        await until(lambda: state.status.written == 1)
    assert await left_after_restart(server, **config) == [97]


async def test_over_tcp_with_user_and_database_in_the_url_and_the_password_in_a_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [port] = free_port_numbers(1)
    async with RedisServer(tmp_path, port=port) as server, server.client() as client:
        await create_user(client, COMMANDS, "+select")
        monkeypatch.setenv("PASSWORD_OF_REDIS", "secret")
        await keeps(server, url=f"redis://ada@{HOST}:{port}/3", password_variable="PASSWORD_OF_REDIS")
        await keeps(server, url=f"redis://ada:secret@{HOST}:{port}/4")
        await client.select(3)
        assert await client.dbsize() == 2


async def test_over_tls_with_certificates_of_both(tmp_path: Path) -> None:
    authority, stranger = trustme.CA(), trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    stranger.cert_pem.write_to_path(str(tmp_path / "stranger.pem"))
    certificate = authority.issue_cert(HOST)
    certificate.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    certificate.cert_chain_pems[0].write_to_path(str(tmp_path / "certificate.pem"))
    [port] = free_port_numbers(1)
    files = {name: str(tmp_path / f"{name}.pem") for name in ("ca", "certificate", "key")}
    options = ["--tls-port", str(port), "--tls-auth-clients", "yes"]
    for option, name in (("ca-cert", "ca"), ("cert", "certificate"), ("key", "key")):
        options += [f"--tls-{option}-file", files[name]]
    async with RedisServer(tmp_path / "redis", *options) as server:
        url = f"rediss://{HOST}:{port}"
        await keeps(server, url=url, tls=files)
        distrustful = state_in(server, make_store(BEFORE), url=url, tls={**files, "ca": str(tmp_path / "stranger.pem")})
        await distrustful.load(0)
        await until(lambda: distrustful.status.failed == 1)
        await distrustful.close()
        assert distrustful.status.degraded_reason == "it cannot be reached"


class Watched(NamedTuple):
    """A master and its replica, watched by three Sentinels under the name `limits`."""

    master: RedisServer
    replica: RedisServer
    sentinel_ports: list[int]

    @property
    def url(self) -> str:
        return "redis://" + ",".join(f"{HOST}:{port}" for port in self.sentinel_ports)

    async def is_known(self) -> bool:
        """True when each Sentinel knows the replica and the other two."""
        known = []
        for port in self.sentinel_ports:
            async with Redis(host=HOST, port=port) as sentinel:
                replicas = await sentinel.execute_command("SENTINEL", "REPLICAS", "limits")
                others = await sentinel.execute_command("SENTINEL", "SENTINELS", "limits")
                known.append((len(replicas), len(others)))
        return known == [(1, 2)] * 3


@pytest.fixture
async def watched(tmp_path: Path) -> AsyncIterator[Watched]:
    master_port, replica_port, *sentinel_ports = free_port_numbers(5)
    async with AsyncExitStack() as stack:
        master = await stack.enter_async_context(RedisServer(tmp_path / "master", port=master_port))
        replicaof = ("--replicaof", HOST, str(master_port))
        replica = await stack.enter_async_context(RedisServer(tmp_path / "replica", *replicaof, port=replica_port))
        for port in sentinel_ports:
            sentinel = (
                f"sentinel monitor limits {HOST} {master_port} 2\n"
                "sentinel down-after-milliseconds limits 1000\nsentinel failover-timeout limits 5000\n"
            )
            await stack.enter_async_context(RedisServer(tmp_path / str(port), port=port, sentinel=sentinel))
        yield Watched(master, replica, sentinel_ports)


@pytest.mark.long
async def test_when_the_sentinels_name_another_master_that_one_is_told_everything(watched: Watched) -> None:
    master, replica, _ = watched
    store = make_store(BEFORE)
    state = state_in(replica, store, url=watched.url, sentinel="limits")
    async with kept(state):
        hit(state, store, "before")
        await until(lambda: state.status.written == 1)
        await until(watched.is_known)
        await master.kill()
        hit(state, store, "after")

        async def is_all_there() -> bool:
            return len(await replica.names()) == 2

        await until(is_all_there)
    assert await left_after_restart(replica, url=watched.url, sentinel="limits") == [97, 97]


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[list[RedisServer]]:
    """Three masters, each with a third of the slots."""
    numbers = free_port_numbers(6)
    buses = numbers[3:]
    async with AsyncExitStack() as stack:
        nodes = []
        for number, bus in zip(numbers, buses, strict=False):
            options = ("--cluster-enabled", "yes", "--cluster-port", str(bus))
            server = RedisServer(tmp_path / str(number), *options, port=number)
            nodes.append(await stack.enter_async_context(server))
        for index, node in enumerate(nodes):
            async with node.client() as client:
                first, end = index * SLOTS // 3, (index + 1) * SLOTS // 3
                await client.execute_command("CLUSTER", "ADDSLOTSRANGE", first, end - 1)
                await client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", index + 1)
        for node in nodes[1:]:
            async with node.client() as client:
                await client.execute_command("CLUSTER", "MEET", HOST, nodes[0].port, buses[0])

        async def is_up() -> bool:
            for node in nodes:
                async with node.client() as client:
                    if b"cluster_state:ok" not in await client.execute_command("CLUSTER", "INFO"):
                        return False
            return True

        await until(is_up)
        yield nodes


def url_of(nodes: list[RedisServer]) -> str:
    return "redis://" + ",".join(f"{HOST}:{node.port}" for node in nodes)


@pytest.mark.slow
async def test_a_cluster_is_found_again_although_the_node_in_the_url_is_gone(cluster: list[RedisServer]) -> None:
    connect = Connector(FabricConfig.model_validate({"url": url_of(cluster[2:]), "cluster": True}))
    await (await connect().initialize()).aclose()
    # What is known is not lost by a client that reached nobody.
    connect()
    await cluster[2].kill()
    for _ in range(2):
        client = await connect().initialize()
        assert await client.get("ada") is None
        await client.aclose()


async def names_in(nodes: list[RedisServer]) -> list[bytes]:
    return [name for node in nodes for name in await node.names()]


@pytest.mark.long
async def test_in_a_cluster_buckets_are_spread_and_told_again_to_a_node_that_lost_them(
    cluster: list[RedisServer],
) -> None:
    for node in cluster:
        async with node.client() as client:
            await create_user(client, COMMANDS, IN_A_CLUSTER)
    url = url_of(cluster).replace("//", "//ada:secret@")
    store = make_store(BEFORE)
    state = state_in(cluster[0], store, url=url, cluster=True)
    async with kept(state):
        for number in range(100):
            take(store, "fixed", str(number), 3, NOW_US)
        state.note(store.drain_changes())
        await until(lambda: state.status.written == 100)
        assert all([20 < len(await node.names()) < 50 for node in cluster])

        async with cluster[1].client() as client:
            await client.flushall()

        async def is_all_there() -> bool:
            return len(await names_in(cluster)) == 100

        await until(is_all_there)
    assert await left_after_restart(cluster[0], url=url, cluster=True) == [97] * 100


@pytest.mark.long
async def test_while_a_cluster_moves_slots_to_another_node_nothing_is_lost(cluster: list[RedisServer]) -> None:
    source, target = cluster[0], cluster[1]
    store = make_store(BEFORE)
    state = state_in(cluster[0], store, url=url_of(cluster), cluster=True)
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(node.client()) for node in cluster]
        ids = [await client.execute_command("CLUSTER", "MYID") for client in clients]
        async with kept(state):
            for number in range(60):
                hit(state, store, str(number), 1)
            await until(lambda: state.status.written == 60)
            moved = sorted({key_slot(name) for name in await source.names()})
            assert moved
            for slot in moved:
                await clients[1].execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[0])
                await clients[0].execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[1])
                for number in range(60):
                    hit(state, store, str(number), 1)
                keys = await clients[0].execute_command("CLUSTER", "GETKEYSINSLOT", slot, 1_000)
                for key in keys:
                    await clients[0].execute_command("MIGRATE", HOST, target.port, key, 0, 5_000)
                for client in (clients[1], clients[0], clients[2]):
                    await client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", ids[1])
            await until(lambda: not state.status.waiting and state.status.degraded_reason == "")
            async with asyncio.timeout(WITHIN_S):
                await state.save()
        left = await left_after_restart(cluster[0], url=url_of(cluster), cluster=True)
        assert left == [100 - 1 - len(moved)] * 60


def test_the_docs_say_what_a_user_needs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "redis.md").read_text()
    section, _, _ = page.partition("\n## A fabric\n")
    assert f"`{COMMANDS}`" in section
    assert f"`{IN_A_CLUSTER}`" in section
