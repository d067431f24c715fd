"""A sidecar on the fabric: its ticks, and its turns as the gateway of its region.

A tick calls a script with this sidecar's changes (`sharing`) and joins its answer: what others took. A call that fails,
or takes longer than it may, ends the tick. The next tick comes after a back-off, and then everything is told again,
since the server may have lost it; so it is after each new connection, as the server may be an older copy of itself, and
when the server says that it has lost its data, which it is asked once a second. No request waits for any of it.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

import structlog
from redis import exceptions

from ratelimit_sidecar.crdt.bucket import Bucket
from ratelimit_sidecar.crdt.granted import GrantLedger
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.fabric.drawing import Drawing
from ratelimit_sidecar.fabric.gateway import TICK_SECONDS, Gateway, MeshOf
from ratelimit_sidecar.fabric.record import OTHERS, life_of
from ratelimit_sidecar.fabric.redis_link import FAILURES, RedisLink, ScriptCall
from ratelimit_sidecar.fabric.scripts import SHARE, FabricKeys
from ratelimit_sidecar.fabric.sharing import BATCH_BUCKETS, BATCH_BYTES, MAX_SHARED, Ask, SharedRoom, Sharing
from ratelimit_sidecar.fabric.status import FabricStatus
from ratelimit_sidecar.persistence.redis_calls import BackOff, Connect, is_of_server, reason_of
from ratelimit_sidecar.persistence.redis_record import BadRecord
from ratelimit_sidecar.persistence.time_slice import TimeSlice

FIRST_WAIT_SECONDS: Final = 0.1
MAX_WAIT_SECONDS: Final = 5.0
"""The first and the longest wait between two attempts; see `BackOff`."""

LAST_TICK_SECONDS: Final = 3.0
LAST_WAIT_SECONDS: Final = 0.25
"""The time for the last tick, at a stop, and from one attempt to the next: Redis may be failing over."""

AGAIN_BUCKETS: Final = 64
"""Buckets not in use that are told again in a tick."""

ODD_LOG_SECONDS: Final = 60.0
"""Between two log lines about buckets that cannot be shared."""

_log = structlog.stdlib.get_logger(__name__)


class Fabric:
    """A sidecar's part in the fabric. Call `run`, `note` whenever own slots changed, and `save` at the stop.

    Args:
        store: of this sidecar. Its own mesh has no peers: its flushes call `note`.
        region: whose gateway it may be.
        mesh_of: makes the mesh to other regions, on the store of the region; None where it is never a gateway.
        ledger: of strict limits; None without them.
        strict_us: the clock of its buckets; None where `now_us` never steps.
        most_shared: buckets at once; see `SharedRoom`.
    """

    def __init__(
        self,
        connect: Connect,
        keys: FabricKeys,
        store: Store,
        now_us: Callable[[], int],
        *,
        region: str = "",
        mesh_of: MeshOf | None = None,
        ledger: GrantLedger | None = None,
        strict_us: Callable[[], int] | None = None,
        most_shared: int = MAX_SHARED,
    ) -> None:
        self.status = FabricStatus()
        self.has_answered = asyncio.Event()
        """Redis has answered since the start."""
        self._room = SharedRoom(most_shared)
        self.shards = [Sharing(store, store.origin, self._room) for _ in keys.shards]
        self._link = RedisLink(connect)
        self._connections = 0
        """Those of the latest tick; 0 before the first."""
        self._keys = keys
        self._store = store
        # What others took has room as of a connected peer.
        store.journal.peers.add(OTHERS)
        self._now_us = now_us
        self._life = life_of(store.origin)
        self._again: Iterator[Bucket] | None = None
        """Buckets whose own counts are still to be told again."""
        self._back_off = BackOff(FIRST_WAIT_SECONDS, MAX_WAIT_SECONDS)
        self._odd_logged_at: float | None = None
        self._gateway = None
        strict_us = now_us if strict_us is None else strict_us
        self.drawing = None if ledger is None else Drawing(connect, keys, ledger, strict_us, region=region)
        if mesh_of is not None:
            self._gateway = Gateway(
                *(connect, keys, store, now_us, self.status),
                strict_us=strict_us,
                region=region,
                mesh_of=mesh_of,
                ledger=ledger,
            )

    def note(self, changes: Sequence[tuple[Bucket, list[int]]]) -> None:
        """Keep in mind that own slots of these buckets changed. Does no I/O."""
        now_us = self._now_us()
        for bucket, slots in changes:
            self.shards[self._keys.shard_of(bucket.key)].note(bucket, slots, now_us)

    def give_up(self) -> None:
        """End the term as the gateway, if it is one: another begins, here or elsewhere."""
        if self._gateway is not None:
            self._gateway.give_up()

    def use_rules(self) -> None:
        """Other rules are in force."""
        if self._gateway is not None:
            self._gateway.use_rules()

    async def run(self) -> None:
        """Share, for ever."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._share_forever())
                if self._gateway is not None:
                    tasks.create_task(self._gateway.run())
                if self.drawing is not None:
                    tasks.create_task(self.drawing.run())
        finally:
            await self.close()

    async def save(self) -> None:
        """Tell Redis what is waiting, and give back the tokens of strict limits. Call it at the stop, after `run`."""
        if self.drawing is not None:
            await self.drawing.give_back()
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_TICK_SECONDS):
                while not await self.share(is_last=True):  # noqa: ASYNC110 (it does the work itself)
                    await asyncio.sleep(LAST_WAIT_SECONDS)
        await self.close()

    async def share(self, *, is_last: bool = False) -> bool:
        """One tick. What goes wrong is logged when it is something else than the last time.

        Args:
            is_last: tell all that is waiting, however much.

        Returns:
            False when nothing was answered.
        """
        began, began_us = time.perf_counter(), self._now_us()
        try:
            is_whole = await self._share(is_last=is_last)
        except FAILURES as error:
            self._failed(error)
            await self.close()
            return False
        except asyncio.CancelledError:
            # An answer may be half read.
            await self.close()
            raise
        else:
            self.status.ticks += 1
            self.status.call_seconds += time.perf_counter() - began
            self._back_off.reset()
            if is_whole:
                self.status.last_us = began_us
                if self.status.degraded_reason:
                    self.status.degraded_reason = ""
                    _log.info("shared_again")
            return True

    async def close(self) -> None:
        """Close the connections; the next call opens others."""
        await self._link.close()

    async def _share_forever(self) -> None:
        clock = asyncio.get_running_loop().time
        while True:
            began, began_working = clock(), time.thread_time()
            is_answered = await self.share()
            worked = time.thread_time() - began_working
            # With very many buckets a quarter of the loop's time at most.
            seconds = max(TICK_SECONDS - (clock() - began), 3 * worked)
            await asyncio.sleep(seconds if is_answered else self._back_off.next())

    def _failed(self, error: Exception) -> None:
        self._tell_again()
        self._note_failure(error)

    def _note_failure(self, error: Exception) -> None:
        self.status.failed += 1
        degraded_reason = reason_of(error)
        if degraded_reason != self.status.degraded_reason:
            self.status.degraded_reason = degraded_reason
            _log.error("not_shared", reason=degraded_reason, error=str(error) or repr(error))

    def _tell_again(self) -> None:
        self._again = self._store.walk()
        for sharing in self.shards:
            sharing.tell_again()

    async def _note_again(self, time_slice: TimeSlice) -> None:
        if not self._room.is_ample:
            return
        if self._again is None and self._room.has_missed:
            self._room.has_missed, self._again = False, self._store.walk()
        for _ in range(AGAIN_BUCKETS):
            bucket = None if self._again is None else next(self._again, None)
            if bucket is None:
                self._again = None
                return
            self.shards[self._keys.shard_of(bucket.key)].note_own(bucket, self._now_us())
            await time_slice.rest_when_due()

    async def _share(self, *, is_last: bool) -> bool:
        """Returns False when some shards of a Cluster could not be asked."""
        time_slice = TimeSlice()
        await self._note_again(time_slice)
        self._room.begin_tick(is_last=is_last)
        failure: Exception | None = None
        while batches := await self._batches(time_slice):
            try:
                answers = await self._link.call(SHARE, [self._call(number, asks) for number, asks in batches.items()])
                for number, answer in zip(list(batches), answers, strict=True):
                    if isinstance(answer, Exception):
                        self.shards[number].skip_tick()
                        failure = answer
                        continue
                    await self._receive(self.shards[number], batches[number], answer, time_slice)
                    del batches[number]
            finally:
                self._not_told(batches)
            self._check_connections()
        if failure is not None:
            self._note_failure(failure)
            self._again = self._again or self._store.walk()
        self.status.buckets = self._room.taken
        self.status.unshared = sum(sharing.unshared for sharing in self.shards)
        self.status.no_room = sum(sharing.no_room for sharing in self.shards)
        return failure is None

    def _check_connections(self) -> None:
        if 0 < self._connections < self._link.connections:
            self._tell_again()
        self._connections = self._link.connections

    async def _batches(self, time_slice: TimeSlice) -> dict[int, list[Ask]]:
        """What is asked of each shard by the next call."""
        batches: dict[int, list[Ask]] = {}
        try:
            for number, sharing in enumerate(self.shards):
                asks: list[Ask] = []
                size = 0
                while len(asks) < BATCH_BUCKETS and size < BATCH_BYTES and (key := sharing.next_key()) is not None:
                    asked = sharing.ask(key, self._now_us())
                    if asked is not None:
                        asks.append(asked)
                        size += len(asked.text)
                        batches[number] = asks
                    await time_slice.rest_when_due()
                if sharing.has_to_ask:
                    batches[number] = asks
        except asyncio.CancelledError:
            self._not_told(batches)
            raise
        return batches

    def _not_told(self, batches: Mapping[int, Sequence[Ask]]) -> None:
        for number, asks in batches.items():
            self.shards[number].failed(asks)

    def _call(self, number: int, asks: Sequence[Ask]) -> ScriptCall:
        keys = self._keys.shards[number]
        names = [name for each in asks for name in keys.of_bucket(each.bucket.key)]
        places = self._keys.places(self._store.places.max_buckets)
        return [keys.clock, keys.changed, keys.held, *names], [
            *(secrets.token_hex(8), self._life, keys.head, str(places)),
            *[each.text for each in asks],
        ]

    async def _receive(self, sharing: Sharing, asks: Sequence[Ask], answer: Any, time_slice: TimeSlice) -> None:
        is_list = isinstance(answer, list) and len(answer) == len(asks) + 2
        if not is_list or not all(isinstance(text, bytes) for text in answer[2:]):
            raise BadRecord("an answer of another script")
        self.has_answered.set()
        epoch, version, *texts = answer
        if not sharing.check(epoch, version):
            self._again = self._store.walk()
        for asked, text in zip(asks, texts, strict=True):
            if text.startswith(b"!"):
                error = text[1:].decode(errors="replace")
                if is_of_server(error):
                    raise exceptions.ResponseError(error)
                sharing.refused(asked)
                self._note_odd(error)
                continue
            try:
                sharing.answered(asked, text, self._now_us())
            except BadRecord as bad:
                self._note_odd(str(bad))
            await time_slice.rest_when_due()

    def _note_odd(self, error: str) -> None:
        self.status.odd += 1
        now = time.monotonic()
        if self._odd_logged_at is None or now - self._odd_logged_at >= ODD_LOG_SECONDS:
            self._odd_logged_at = now
            _log.error("bucket_not_shared", error=error, so_far=self.status.odd)
