"""The gateway of a region: one of its sidecars, elected by a lease in Redis, that speaks for it on the mesh.

It holds a store of the region (`region`), reads into it what the region's sidecars took, and sends that to the gateways
of other regions by a mesh of its own. What it receives from them it writes to Redis. Counts only grow, so a late
gateway does no harm; still, its calls are refused once another one with a higher token has called.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Callable
from contextlib import suppress
from itertools import chain
from typing import Final

import structlog
from redis import exceptions

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.granted import GrantLedger
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.fabric.exchange import MAX_ANSWERED, RegionExchange
from ratelimit_sidecar.fabric.redis_link import FAILURES, RedisLink
from ratelimit_sidecar.fabric.region import Region
from ratelimit_sidecar.fabric.regional_member import RegionalMember
from ratelimit_sidecar.fabric.scripts import GIVE_UP, LEASE, FabricKeys
from ratelimit_sidecar.fabric.status import FabricStatus
from ratelimit_sidecar.persistence.redis_calls import BackOff, Connect
from ratelimit_sidecar.persistence.redis_record import BadRecord
from ratelimit_sidecar.replication.mesh import Mesh
from ratelimit_sidecar.replication.payments import PaymentExchange
from ratelimit_sidecar.replication.peers import region_origin

TICK_SECONDS: Final = 0.05

LEASE_SECONDS: Final = 1.5
RENEW_SECONDS: Final = 0.4
"""Between two attempts to get the lease, or to keep it. So another gateway has it within 2 s, and begins its mesh once
it has read the region."""

SWEPT_BUCKETS: Final = 2 * MAX_ANSWERED
"""Buckets of the region's store that are swept in a tick, for each shard: twice as many as it may have brought."""

ROOM_OF_SIDECARS: Final = 4
"""The region's store may hold this many times the buckets of one sidecar: callers who invent keys spread them over all
of its sidecars."""

FIRST_WAIT_SECONDS: Final = 1.0
MAX_WAIT_SECONDS: Final = 60.0
"""Before a gateway that could not listen tries again; see `BackOff`."""

_log = structlog.stdlib.get_logger(__name__)


MeshOf = Callable[[Store, PaymentExchange | None], Mesh]
"""Makes the mesh to other regions: of the region's store and, with strict limits, its payments."""


class _Term:
    """One term as the gateway, which lasts as long as the lease with this token."""

    def __init__(self, token: int, region: Region, mesh: Mesh, member: RegionalMember | None) -> None:
        self.token = token
        self.region = region
        self.mesh = mesh
        self.is_meshed = False
        self.member = member
        self.tasks: list[asyncio.Task[None]] = []
        if member is not None:
            self.tasks.append(asyncio.create_task(member.drawing.run()))

    @property
    def can_mesh(self) -> bool:
        """True once all of the region is known, and the mesh may begin."""
        is_known = all(shard.is_known for shard in self.region.shards)
        return is_known and (self.member is None or self.member.is_settled)


class Gateway:
    """The gateway of a region, while this sidecar has the lease. Call `run`.

    Args:
        store: of this sidecar. It says which limit a key has.
        region: whose gateway it may be.
        mesh_of: makes the mesh to other regions, on the store of the region.
        ledger: of this sidecar's strict limits; None without them. Its shares say what member the region is.
    """

    def __init__(
        self,
        connect: Connect,
        keys: FabricKeys,
        store: Store,
        now_us: Callable[[], int],
        status: FabricStatus,
        *,
        strict_us: Callable[[], int] | None = None,
        region: str,
        mesh_of: MeshOf,
        ledger: GrantLedger | None = None,
    ) -> None:
        self._link = RedisLink(connect)
        self._exchange = RegionExchange(self._link, keys, store, now_us)
        self._keys = keys
        self._store = store
        self._now_us = now_us
        self._strict_us = now_us if strict_us is None else strict_us
        self._status = status
        self._region = region_origin(region)
        self._mesh_of = mesh_of
        self._ledger = ledger
        self._connect = connect
        self._gives_up = False
        self._back_off = BackOff(FIRST_WAIT_SECONDS, MAX_WAIT_SECONDS, least_part=0.75)
        # One life of this process, as far as leases go.
        self._id = f"{store.origin.node} {secrets.token_hex(8)}"

    def give_up(self) -> None:
        """End the term as the gateway, if it is one: another begins, here or elsewhere."""
        self._gives_up = True

    def use_rules(self) -> None:
        """Other rules are in force (see `RegionExchange.use_rules`)."""
        self._exchange.use_rules()

    async def run(self) -> None:
        """Seek the lease, and be the gateway while this sidecar has it, for ever."""
        try:
            while True:
                seconds = RENEW_SECONDS * random.uniform(0.9, 1.1)
                try:
                    began = asyncio.get_running_loop().time()
                    token = await self._lease()
                    if token:
                        await self._serve(token, began + LEASE_SECONDS)
                except _CannotListen as error:
                    self._cannot_listen(str(error))
                    seconds = self._back_off.next()
                except FAILURES:
                    # The ticks tell of it.
                    await self._link.close()
                await asyncio.sleep(seconds)
        finally:
            await self._link.close()

    def _cannot_listen(self, reason: str) -> None:
        if not self._status.gateway_reason:
            _log.error("gateway_cannot_listen", reason=reason)
        self._status.gateway_reason = reason
        self._status.gateway_failed += 1

    async def _lease(self) -> int:
        first = self._keys.shards[0]
        arguments = [self._id, str(round(LEASE_SECONDS * 1_000))]
        [token] = await self._link.call(LEASE, [([first.lease, first.fence], arguments)])
        try:
            return int(token)
        except (TypeError, ValueError) as error:
            raise BadRecord("no token") from error

    async def _serve(self, token: int, ends: float) -> None:
        """Speak for the region until the lease is lost."""
        term = self._begin(token)
        clock = asyncio.get_running_loop().time
        renew_at = clock() + RENEW_SECONDS
        try:
            while clock() < ends and not self._gives_up:
                is_more = False
                try:
                    async with asyncio.timeout_at(ends):
                        if clock() >= renew_at:
                            began = clock()
                            if await self._lease() != token:
                                return
                            ends, renew_at = began + LEASE_SECONDS, began + RENEW_SECONDS
                        is_more = await self._tick(term)
                except exceptions.ResponseError as error:
                    if "FENCED" in str(error):
                        return
                    await self._exchange.failed(term.region)
                except FAILURES:
                    await self._exchange.failed(term.region)
                if not term.is_meshed and term.can_mesh:
                    await self._start(term)
                self._tend(term.region)
                await asyncio.sleep(0 if is_more else TICK_SECONDS)
                for task in term.tasks:
                    if task.done():
                        task.result()
                        return
        finally:
            await self._end(term)

    def _tend(self, region: Region) -> None:
        self._status.no_room_at_gateway += region.no_room
        region.no_room = 0
        store = region.store
        store.sweep(self._now_us(), SWEPT_BUCKETS * len(self._keys.shards))
        if store.refused_keys or region.unshared:
            if not self._status.gateway_unshared:
                _log.warning("gateway_full", buckets=len(store), fix="more memory or max_buckets, or fewer keys")
            self._status.gateway_unshared += store.refused_keys + region.unshared
            store.refused_keys = region.unshared = 0

    def _begin(self, token: int) -> _Term:
        member = None
        origin = Origin(self._store.origin.node, secrets.randbelow(2**64 - 1) + 1)
        if self._ledger is not None:
            member = RegionalMember(self._ledger, self._connect, self._keys, self._strict_us)
            origin = member.origin
        places = self._store.places
        most = ROOM_OF_SIDECARS * places.max_buckets
        store = Store(
            origin,
            self._store.limit_of_key,
            max_buckets=most,
            max_received_bytes=self._store.journal.max_received_bytes,
            sliding_places=self._store.sliding_places,
            rule_key=places.rule_key,
        )
        region = Region(self._region, store, self._keys)
        mesh = self._mesh_of(store, None if member is None else member.payments)
        mesh.subscribe_news(region.note_news)
        self._status.token = token
        self._status.terms += 1
        self._gives_up = False
        _log.info("gateway_began", token=token)
        return _Term(token, region, mesh, member)

    async def _end(self, term: _Term) -> None:
        self._status.token = 0
        self._status.odd_at_gateway += term.region.odd
        _log.info("gateway_ended", token=term.token)
        if not term.is_meshed:
            await term.mesh.close()
        for task in term.tasks:
            task.cancel()
        if term.tasks:
            await asyncio.wait(term.tasks)
        term.mesh.forget()
        for _ in chain(term.region.store.clear(), () if term.member is None else term.member.clear()):
            await asyncio.sleep(0)
        with suppress(*FAILURES):
            await self._link.call(GIVE_UP, [([self._keys.shards[0].lease], [f"{self._id} {term.token}"])])

    async def _start(self, term: _Term) -> None:
        """Begin the mesh. The gateway knows all of its region by now, so other regions get no less than before."""
        try:
            await term.mesh.start()
        except OSError as error:
            raise _CannotListen(str(error)) from error
        await term.mesh.wait_joined(0)
        term.is_meshed = True
        term.tasks.append(asyncio.create_task(term.mesh.run()))
        self._status.gateway_reason = ""
        self._back_off.reset()

    async def _tick(self, term: _Term) -> bool:
        """Returns whether there is more to be done at once."""
        # Streams of peers keep the limits that they have read until it is another.
        term.region.store.limit_of_key = self._store.limit_of_key
        if term.member is not None:
            await term.member.beat(self._link, term.token)
        return await self._exchange.run(term.region, term.mesh.tell if term.is_meshed else None, term.token)


class _CannotListen(Exception):
    """The address for other regions cannot be listened on; the text says why."""
