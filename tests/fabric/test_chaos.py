"""Whatever happens to Redis, all come to know all that was taken, and nothing twice. Told by seeds."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
from fabric.test_fabric import Sidecar, connect_to
from persistence.redis_server import RedisServer, needs_redis
from persistence.test_snapshot import make_store

from ratelimit_sidecar.crdt.bucket import Bucket, Origin
from ratelimit_sidecar.fabric.exchange import RegionExchange
from ratelimit_sidecar.fabric.redis_link import FAILURES, RedisLink
from ratelimit_sidecar.fabric.region import Region
from ratelimit_sidecar.fabric.scripts import FabricKeys
from ratelimit_sidecar.replication.peers import region_origin

pytestmark = needs_redis

VALUES = "xyz"
STEPS = 60
KINDS = [
    *["take"] * 6,
    *["share"] * 6,
    "flush",
    "restart",
    "older",
    "cut",
    "delete",
    "junk",
    "gateway",
    "time",
    "forget",
]


class Chaos:
    """Three sidecars and a gateway on one server, and what a seed has happen."""

    def __init__(self, seed: int, server: RedisServer) -> None:
        self._random = random.Random(seed)
        self._server = server
        self._limit = self._random.choice(["fixed", "sliding", "month"])
        self._sidecars = [Sidecar(name, server) for name in "abc"]
        keys = FabricKeys("ratelimit")
        store = make_store(Origin("gateway", 1))
        self._region = Region(region_origin("east"), store, keys)
        self._link = RedisLink(connect_to(server))
        self._exchange = RegionExchange(self._link, keys, store, self._now_us)
        self._taken = Counter[str]()

    def _now_us(self) -> int:
        return self._sidecars[0].now_us

    async def run(self) -> None:
        for _ in range(STEPS):
            await self._step(self._random.choice(KINDS), self._random.choice(self._sidecars))
        for each in self._sidecars:
            for value in VALUES:
                self._take(each, value, 1)
        for _ in range(6):
            for each in self._sidecars:
                await each.fabric.share()
            await self._share_at_gateway()
        for store in (*(each.store for each in self._sidecars), self._region.store):
            assert {value_of(bucket): known(bucket) for bucket in store} == self._taken
        assert not any(each.fabric.status.degraded_reason for each in self._sidecars)

    async def close(self) -> None:
        await self._link.close()
        for each in self._sidecars:
            await each.close()

    def _take(self, sidecar: Sidecar, value: str, hits: int) -> None:
        sidecar.take(value, hits, self._limit)
        self._taken[value] += hits

    async def _share_at_gateway(self) -> None:
        try:
            await self._exchange.run(self._region, None, 1)
        except FAILURES:
            await self._exchange.failed(self._region)

    async def _step(self, kind: str, sidecar: Sidecar) -> None:
        async with self._server.client() as client:
            match kind:
                case "take":
                    self._take(sidecar, self._random.choice(VALUES), self._random.randint(1, 5))
                case "share":
                    await sidecar.fabric.share()
                case "gateway":
                    await self._share_at_gateway()
                case "time":
                    later_us = self._random.randint(0, 2_000_000)
                    for each in self._sidecars:
                        each.now_us += later_us
                case "flush":
                    await client.flushall()
                case "forget":
                    await client.script_flush()
                case "cut":
                    await client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
                case "delete" | "junk":
                    name = await client.randomkey()
                    if name is not None:
                        await client.delete(name)
                    if name is not None and kind == "junk" and (b":b:" in name or b":i:" in name):
                        await client.set(name, "junk")
                        await sidecar.fabric.share()
                        await client.delete(name)
                case "restart" | "older":
                    if kind == "older":
                        await client.save()
                        for each in self._sidecars:
                            await each.fabric.share()
                    await self._server.kill()
                    await self._server.start()


def value_of(bucket: Bucket) -> str:
    return bucket.key.decode()[-1]


def known(bucket: Bucket) -> int:
    return sum(entry.tokens for entry in bucket.entries())


async def survive(folder: Path, seed: int) -> None:
    async with RedisServer(folder / str(seed)) as server:
        chaos = Chaos(seed, server)
        try:
            await chaos.run()
        finally:
            await chaos.close()


async def test_all_come_to_know_all(tmp_path: Path) -> None:
    await survive(tmp_path, 1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 12))
async def test_all_come_to_know_all_of_many_seeds(tmp_path: Path, seed: int) -> None:
    await survive(tmp_path, seed)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(12, 60))
async def test_all_come_to_know_all_of_very_many_seeds(tmp_path: Path, seed: int) -> None:
    await survive(tmp_path, seed)
