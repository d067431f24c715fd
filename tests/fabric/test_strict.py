"""Sidecars of a region draw tokens of a strict limit from its account in a real Redis."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from fabric.test_fabric import connect_to
from persistence.redis_server import RedisServer, needs_redis

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.granted import COUNTED_US, GrantLedger
from ratelimit_sidecar.crdt.limit import Limit
from ratelimit_sidecar.crdt.shares import Membership, Shares
from ratelimit_sidecar.fabric.accounts import BEAT, MOST_STEP_US
from ratelimit_sidecar.fabric.drawing import Drawing
from ratelimit_sidecar.fabric.draws import members_text
from ratelimit_sidecar.fabric.link import Link
from ratelimit_sidecar.fabric.scripts import FabricKeys

pytestmark = needs_redis

KEYS = FabricKeys("ratelimit")
LIMIT = Limit(100, 1_000_000, 100)
"""Full a second after its beginning."""


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[RedisServer]:
    async with RedisServer(tmp_path) as running:
        yield running


class Region:
    """Its sidecars without front ends, whose clock the test moves, and what a gateway does."""

    def __init__(self, server: RedisServer, names: str, weights: dict[str, int] | None = None) -> None:
        self.now_us = 10**15
        self.members = members_text([weights or {"east": 1}])
        self._link = Link(connect_to(server))
        self.sidecars = {name: Sidecar(name, server, self) for name in names}

    async def beat(self, token: int = 1) -> None:
        first = KEYS.shards[0]
        await self._link.call(BEAT, [([*first.of_accounts, first.fence], ["b", str(token), self.members, "0", "64"])])

    async def run(self, seconds: float) -> None:
        """The gateway's part of the time that goes by in truth."""
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        while loop.time() < until:
            await self.beat()
            await asyncio.sleep(MOST_STEP_US / 4e6)

    async def begin(self) -> None:
        """Until the account is full."""
        await self.run(COUNTED_US / 1e6 + 1.2)
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
        self.ledger = GrantLedger(shares, Origin(name, 1), lambda _key: LIMIT)
        self.drawing = Drawing(connect_to(server), KEYS, self.ledger, lambda: region.now_us, region="east")

    def take(self, hits: int, limit: Limit = LIMIT, key: bytes = b"k") -> bool:
        return self.ledger.bucket(key, limit, self._region.now_us).take(hits, self._region.now_us)

    async def tick(self) -> bool:
        return await self.drawing.tick()
