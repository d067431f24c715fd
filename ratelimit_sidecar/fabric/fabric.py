"""A sidecar on the fabric: its ticks, and its turns as the gateway of its region.

A call that fails, or takes longer than it may, ends the tick. The next one comes after a back-off, and then everything
is told again: the server may have lost it. Nobody waits for any of it but the tasks here.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import structlog
from redis import exceptions
from redis.asyncio import Redis

from ratelimit_sidecar.crdt.bucket import Bucket, Origin
from ratelimit_sidecar.crdt.limit import AnyLimit
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.fabric.record import GATEWAY, GIVE_UP, LEASE, SHARE, FabricKeys, field_of, pairs
from ratelimit_sidecar.fabric.region import MAX_ANSWERED, Region, region_origin
from ratelimit_sidecar.fabric.sharing import Batch, Sharing
from ratelimit_sidecar.persistence.redis_calls import bounded, digest_of, reason_of
from ratelimit_sidecar.persistence.redis_record import BadRecord
from ratelimit_sidecar.replication.mesh import Mesh

TICK_SECONDS: Final = 0.05

LEASE_SECONDS: Final = 1.5
RENEW_SECONDS: Final = 0.4
"""Between two attempts to get the lease, or to keep it: so another gateway follows within 2 s, and its calls."""

SWEPT_BUCKETS: Final = 64
"""Of the region's store, in a tick: a million in a quarter of an hour."""

FIRST_WAIT_SECONDS: Final = 0.1
MAX_WAIT_SECONDS: Final = 5.0
"""Between two attempts: it doubles from the first to this, and a random part of up to half is taken off."""

_FAILURES: Final = (exceptions.RedisError, BadRecord, OSError, TimeoutError)

_log = structlog.stdlib.get_logger(__name__)


@dataclass(slots=True)
class FabricStatus:
    """What metrics and the console show.

    Args:
        ticks, call_seconds: that were answered, and what they took in all.
        failed: that were not.
        token: of the lease that this sidecar holds as the gateway; 0 when it does not.
        terms: how often it became the gateway.
        buckets: that are shared.
        last_us: when the latest tick was answered, microseconds since the epoch.
        degraded_reason: why nothing is shared; "" when it is.
    """

    ticks: int = 0
    failed: int = 0
    token: int = 0
    terms: int = 0
    call_seconds: float = 0.0
    buckets: int = 0
    last_us: int | None = None
    degraded_reason: str = ""


class Fabric:
    """Call `run`, and `note` whenever own slots changed.

    Args:
        connect: makes a client; called again after each failure.
        store: of this sidecar. Its mesh, if it has one, tells nobody of it.
        region: whose gateway it may be.
        mesh_of: makes the mesh to other regions, on the store of the region; None where it is never a gateway.
    """

    def __init__(
        self,
        connect: Callable[[], Redis],
        keys: FabricKeys,
        store: Store,
        now_us: Callable[[], int],
        *,
        region: str = "",
        mesh_of: Callable[[Store], Mesh] | None = None,
    ) -> None:
        self.status = FabricStatus()
        self.sharing = Sharing(store)
        self._connect = connect
        self._keys = keys
        self._store = store
        self._now_us = now_us
        self._region = region_origin(region)
        self._mesh_of = mesh_of
        self._client: Redis | None = None
        self._wait_seconds = FIRST_WAIT_SECONDS
        self._gives_up = False
        # One life of this process, as far as leases go.
        self._id = f"{store.origin.node} {secrets.token_hex(8)}"
        self._drawn = secrets.token_hex(8)
        """The epoch, if the server has none."""

    def note(self, changes: Sequence[tuple[Bucket, list[int]]]) -> None:
        """Keep in mind that own slots of these buckets changed. Does no I/O."""
        self.sharing.note(changes)

    def give_up(self) -> None:
        """End the turn as the gateway, if it is one: another begins, here or elsewhere."""
        self._gives_up = True

    async def run(self) -> None:
        """Share, for ever."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._share_forever())
                if self._mesh_of is not None:
                    tasks.create_task(self._seek_lease(self._mesh_of))
        finally:
            await self.close()

    async def share(self) -> None:
        """One tick. What goes wrong is logged when it is something else than the last time."""
        began, began_us = time.perf_counter(), self._now_us()
        try:
            await self._share(self._ready_client())
        except _FAILURES as error:
            self._failed(error)
            await self.close()
        except asyncio.CancelledError:
            # Amid an answer.
            await self.close()
            raise
        else:
            self.status.ticks += 1
            self.status.call_seconds += time.perf_counter() - began
            self.status.last_us = began_us
            self._wait_seconds = FIRST_WAIT_SECONDS
            if self.status.degraded_reason:
                self.status.degraded_reason = ""
                _log.info("shared_again")

    async def _share_forever(self) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            began = clock()
            await self.share()
            left = TICK_SECONDS - (clock() - began)
            await asyncio.sleep(self._back_off() if self.status.degraded_reason else max(left, 0))

    def _back_off(self) -> float:
        seconds = self._wait_seconds
        self._wait_seconds = min(2 * seconds, MAX_WAIT_SECONDS)
        return seconds * random.uniform(0.5, 1)

    def _failed(self, error: Exception) -> None:
        self.status.failed += 1
        self.sharing.tell_again()
        degraded_reason = reason_of(error)
        if degraded_reason != self.status.degraded_reason:
            self.status.degraded_reason = degraded_reason
            _log.error("not_shared", reason=degraded_reason, error=str(error) or repr(error))

    async def _share(self, client: Redis) -> None:
        batches = list(self.sharing.batches(self._now_us()))
        self.status.buckets = len(self.sharing)
        waiting = list(batches)
        try:
            answers = await self._evaluate(client, SHARE, [self._call_of(batch) for batch in batches])
            for batch, answer in zip(batches, answers, strict=True):
                self.sharing.answered(batch, answer, self._now_us())
                waiting.remove(batch)
                await asyncio.sleep(0)
        finally:
            for batch in waiting:
                self.sharing.failed(batch)

    def _call_of(self, batch: Batch) -> tuple[list[bytes], list[bytes | str]]:
        keys = [self._keys.clock, self._keys.changed, *pairs(self._keys, batch.buckets)]
        return keys, [self._drawn, field_of(self._store.origin), *batch.asks]

    async def _evaluate(
        self, client: Redis, script: str, calls: Sequence[tuple[Sequence[bytes], Sequence[bytes | str]]]
    ) -> list[Any]:
        if not calls:
            return []
        try:
            return await bounded(self._evaluate_loaded(client, script, calls))
        except exceptions.NoScriptError:
            await bounded(client.script_load(script))
            return await bounded(self._evaluate_loaded(client, script, calls))

    async def _evaluate_loaded(
        self, client: Redis, script: str, calls: Sequence[tuple[Sequence[bytes], Sequence[bytes | str]]]
    ) -> list[Any]:
        digest = digest_of(script)
        if len(calls) == 1:
            [(keys, arguments)] = calls
            return [await client.evalsha(digest, len(keys), *keys, *arguments)]
        pipeline = client.pipeline(transaction=False)
        for keys, arguments in calls:
            pipeline.execute_command("EVALSHA", digest, len(keys), *keys, *arguments)
        return await pipeline.execute()

    def _ready_client(self) -> Redis:
        if self._client is None:
            self._client = self._connect()
        return self._client

    async def close(self) -> None:
        """Close the connections; the next call opens others."""
        client, self._client = self._client, None
        if client is not None:
            with suppress(exceptions.RedisError, OSError, TimeoutError):
                await bounded(client.aclose())

    async def _seek_lease(self, mesh_of: Callable[[Store], Mesh]) -> None:
        while True:
            with suppress(*_FAILURES):
                began = asyncio.get_running_loop().time()
                token = await self._lease()
                if token:
                    await self._be_gateway(mesh_of, token, began + LEASE_SECONDS)
            await asyncio.sleep(RENEW_SECONDS * random.uniform(0.9, 1.1))

    async def _lease(self) -> int:
        keys = [self._keys.lease, self._keys.token]
        [token] = await self._evaluate(
            self._ready_client(), LEASE, [(keys, [self._id, str(round(LEASE_SECONDS * 1_000))])]
        )
        return int(token)

    async def _be_gateway(self, mesh_of: Callable[[Store], Mesh], token: int, ends: float) -> None:
        """Speak for the region until the lease is lost, which began a moment ago."""
        clock = asyncio.get_running_loop().time
        store = Store(
            Origin(self._store.origin.node, secrets.randbelow(2**64 - 1) + 1),
            self._limit_of_key,
            max_buckets=self._store.room.most,
        )
        region = Region(self._region, store)
        mesh = mesh_of(store)
        mesh.read_news(region.note_news)
        self.status.token = token
        self.status.terms += 1
        self._gives_up = False
        _log.info("gateway_began", token=token)
        running: asyncio.Task[None] | None = None
        renew_at = clock() + RENEW_SECONDS
        try:
            while clock() < ends and not self._gives_up:
                try:
                    async with asyncio.timeout_at(ends):
                        if clock() >= renew_at:
                            began = clock()
                            if await self._lease() != token:
                                return
                            ends, renew_at = began + LEASE_SECONDS, began + RENEW_SECONDS
                        is_more = await self._exchange(region, mesh, token)
                except exceptions.ResponseError as error:
                    if "FENCED" in str(error):
                        return
                    is_more = False
                except _FAILURES:
                    is_more = False
                else:
                    if running is None and not is_more:
                        # It knows all of its region now.
                        await mesh.start()
                        await mesh.joined(0)
                        running = asyncio.create_task(mesh.run())
                store.sweep(self._now_us(), SWEPT_BUCKETS)
                await asyncio.sleep(0 if is_more else TICK_SECONDS)
                if running is not None and running.done():
                    running.result()
                    break
        finally:
            self.status.token = 0
            _log.info("gateway_ended", token=token)
            if running is None:
                await mesh.close()
            else:
                running.cancel()
                await asyncio.wait([running])
            with suppress(*_FAILURES):
                await self._evaluate(self._ready_client(), GIVE_UP, [([self._keys.lease], [f"{self._id} {token}"])])

    def _limit_of_key(self, key: bytes) -> AnyLimit | None:
        # Other rules may have replaced it meanwhile.
        return self._store.limit_of_key(key)

    async def _exchange(self, region: Region, mesh: Mesh, token: int) -> bool:
        """One tick of the gateway; returns whether there is more to be read at once."""
        buckets, told = region.batch(self._now_us())
        keys = [self._keys.clock, self._keys.changed, self._keys.lease, *pairs(self._keys, buckets)]
        arguments: list[bytes | str] = [
            *(self._drawn, f"{self._id} {token}", str(region.since), self._keys.head, str(MAX_ANSWERED)),
            *told,
        ]
        try:
            [answer] = await self._evaluate(self._ready_client(), GATEWAY, [(keys, arguments)])
        except BaseException:
            region.failed(buckets)
            raise
        changes, is_more = region.answered(answer, self._now_us())
        for bucket, entries in changes:
            mesh.tell(bucket, entries)
        return is_more or bool(buckets)
