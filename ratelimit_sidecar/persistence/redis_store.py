"""Buckets in Redis or Valkey: what changed is written every second, what is there is read at the start, and again when
other rules may have what had none, or when the clock has come to what was ahead of it.

Theory of operation. A flush tells not only the peers which own slots changed (`note`); they are kept by bucket, each
once, until `run` writes them, in batches. One script joins them in the server (`redis_record`), so several sidecars may
write the same bucket, and one write more does no harm. A sidecar writes what it has taken itself: all of them do so.

A call that fails, or takes longer than a second, ends the round. Until the next one, after a back-off, nothing is sent;
changes are kept in a bounded `WriteQueue`. The server may have lost some of what it had, so everything is then written
again, slowly, with what is known of others. The same is done when a value of `Keys.formats` is another one, after
FLUSHALL and in a new server, and when the queue had no place for a change.

All of it is done on the event loop, in short pieces with pauses between them.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from math import inf
from typing import Any, Final, TypeVar

import structlog
from redis import exceptions
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.client import Pipeline
from redis.asyncio.cluster import ClusterPipeline

from ratelimit_sidecar.crdt.bucket import Bucket, Entry
from ratelimit_sidecar.crdt.limit import AnyLimit
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.persistence.put_off import AheadOfClock
from ratelimit_sidecar.persistence.redis_calls import (
    BackOff,
    Connect,
    Unusable,
    bounded,
    digest_of,
    is_of_server,
    reason_of,
)
from ratelimit_sidecar.persistence.redis_record import (
    FORMAT,
    JOIN,
    READ,
    BadRecord,
    Keys,
    entry_lines,
    is_worth_keeping,
    join_text,
    restore_steps,
)
from ratelimit_sidecar.persistence.time_slice import LOOP_SHARE, TimeSlice
from ratelimit_sidecar.persistence.write_queue import MAX_WAITING, Slots, WriteQueue
from ratelimit_sidecar.replication.deltas import MAX_KEY_BYTES
from ratelimit_sidecar.replication.parts import in_lists
from ratelimit_sidecar.telemetry.traces import NoTracer, RequestTracer

START_WAIT_SECONDS: Final = 1.0
"""The longest wait before the next attempt while a start waits for what is there."""

LOAD_SECONDS: Final = 10.0
"""The time for reading at the start before the sidecar is ready; the rest of a large store is read after that."""

LAST_WRITE_SECONDS: Final = 3.0
LAST_WAIT_SECONDS: Final = 0.25
"""The time for the last write, at a stop, and from one attempt to the next: the server may be failing over."""

FIRST_WAIT_SECONDS: Final = 0.5
MAX_WAIT_SECONDS: Final = 30.0
"""The first and the longest wait between two attempts; see `BackOff`."""

AHEAD_FIRST_WAIT_SECONDS: Final = 60.0
AHEAD_MAX_WAIT_SECONDS: Final = 3_600.0
"""Between two readings of what was ahead of the clock. Others whose clocks are ahead write such all the time."""

BATCH_BUCKETS: Final = 16
"""Buckets written or read by one call: the script takes less than a millisecond for them, and so does the loop."""

BUCKET_SECONDS: Final = 0.000_06
"""What writing one takes of the loop's time, about; the library's part cannot be measured from outside."""

SCAN_KEYS: Final = 128

AGAIN_A_SECOND: Final = 1_000
"""Buckets written again in a second, after a failure."""

_FAILURES: Final = (exceptions.RedisError, Unusable, OSError, TimeoutError)
"""What ends a round."""

_log = structlog.stdlib.get_logger(__name__)

_Client = Redis | RedisCluster

T = TypeVar("T")


@dataclass(slots=True)
class RedisStatus:
    """What metrics and the console show.

    Args:
        written: buckets written since the start.
        failed: attempts that ended with a failure.
        refused: buckets that the server would not join, for a reason of their own, or that cannot be encoded.
        restored: buckets that were read, at the start and after reloads.
        calls, call_seconds: calls that were answered, and the seconds they took in all.
        queue: what is to be written.
        last_us: when all that was waiting was written last, microseconds since the epoch.
        degraded_reason: why nothing is written; "" when it is.
    """

    written: int = 0
    failed: int = 0
    refused: int = 0
    restored: int = 0
    calls: int = 0
    call_seconds: float = 0.0
    last_us: int | None = None
    degraded_reason: str = ""
    queue: Sized = ()

    @property
    def waiting(self) -> int:
        """How many buckets are to be written."""
        return len(self.queue)


class RedisState:
    """Keeps the buckets of a store in Redis. Call `load`, then `run`, `save` at the end, and `close`.

    Args:
        connect: makes a client; called again after each failure, as a password may have changed.
        every_seconds: between the beginnings of two rounds of writing.
        tracer: None when nothing is traced.
        most_waiting: buckets that wait to be written, at most.
        back_off: between attempts that fail.
    """

    def __init__(
        self,
        connect: Connect,
        keys: Keys,
        store: Store,
        now_us: Callable[[], int],
        every_seconds: float,
        *,
        tracer: RequestTracer | NoTracer | None = None,
        most_waiting: int = MAX_WAITING,
        back_off: BackOff | None = None,
    ) -> None:
        self._waiting = WriteQueue(store.places.rule_key, most_waiting)
        self._has_missed = False
        """Some change found no place in the queue."""
        self.status = RedisStatus(queue=self._waiting)
        self._connect = connect
        self._keys = keys
        self._store = store
        self._origin = store.origin
        self._now_us = now_us
        self._every_seconds = every_seconds
        self._tracer = tracer or NoTracer()
        self._client: _Client | None = None
        self._epochs: dict[str, bytes] = {}
        """The values of `Keys.formats` when they were last looked at."""
        self._again: Iterator[Bucket] | None = None
        """Buckets that are still to be written again."""
        self._is_loaded = False
        self._reading: AsyncIterator[bytes] | None = None
        """The names that are still to be looked at, while what is there is being read."""
        self._has_left_out = False
        """Some of what is there has no rule here."""
        self._have_rules_changed = False
        """Other rules came into force since what is there began to be read."""
        self._ahead = AheadOfClock()
        """What is there and ahead of the clock."""
        self._ahead_back_off = BackOff(AHEAD_FIRST_WAIT_SECONDS, AHEAD_MAX_WAIT_SECONDS)
        self._ahead_from = 0.0
        """What was ahead of the clock is not read again before, by `time.monotonic`."""
        self._unreadable = 0
        self._loading: asyncio.Task[None] | None = None
        self._writing = asyncio.Lock()
        self._back_off = BackOff(FIRST_WAIT_SECONDS, MAX_WAIT_SECONDS) if back_off is None else back_off

    def note(self, changes: Sequence[tuple[Bucket, Slots]]) -> None:
        """Keep in mind that own slots of these buckets changed, to be written by `run`. Does no I/O."""
        if self._store.origin is not self._origin:
            # The clock was set back: slots of the former life are no longer found by their number alone.
            self._origin = self._store.origin
            self._again = self._store.walk()
        every_us = round(self._every_seconds * 1e6)
        for bucket, slots in changes:
            if is_worth_keeping(bucket.limit, every_us) and len(bucket.key) <= MAX_KEY_BYTES:
                self._queue_slots(bucket, slots)

    def _queue_slots(self, bucket: Bucket, slots: Slots) -> None:
        if not self._waiting.add(bucket, slots):
            self._has_missed = True

    def use_rules(self) -> None:
        """Other rules are in force: what had none may have one now, and is read again by `run`."""
        self._have_rules_changed = True

    async def load(self, timeout_seconds: float = LOAD_SECONDS) -> None:
        """Read what is there; returns when it is read, or when the time is over."""
        self._loading = asyncio.create_task(self._attempt_for(timeout_seconds))
        await asyncio.wait([self._loading], timeout=timeout_seconds)

    async def run(self) -> None:
        """Read, unless that is done, and write every now and then, for ever."""
        if self._loading is not None:
            await asyncio.wait([self._loading])
        while True:
            # A failure has the next attempt wait for longer.
            seconds = self._every_seconds if not self.status.degraded_reason else self._back_off.next()
            await asyncio.sleep(seconds)
            await self._attempt()

    async def save(self) -> None:
        """Write what is waiting. Call it at the stop, after `run`."""
        if self._loading is not None and not self._loading.done():
            self._loading.cancel()
            await asyncio.wait([self._loading])
        with suppress(TimeoutError):
            async with asyncio.timeout(LAST_WRITE_SECONDS):
                await self._attempt(is_last=True)
                while self.status.degraded_reason:
                    await asyncio.sleep(LAST_WAIT_SECONDS)
                    await self._attempt(is_last=True)

    async def close(self) -> None:
        if self._loading is not None:
            self._loading.cancel()
        await self._disconnect()

    async def _attempt_for(self, seconds: float) -> None:
        """Begin attempts for so long, until all is read. A server that starts along with this node is there soon."""
        until = time.monotonic() + seconds
        await self._attempt()
        while not self._is_loaded and time.monotonic() < until:
            await asyncio.sleep(min(self._back_off.next(), START_WAIT_SECONDS))
            await self._attempt()

    async def _attempt(self, *, is_last: bool = False) -> None:
        """One round: all that is waiting, and some of what is written again. What goes wrong is logged when it is
        something else than the last time."""
        async with self._writing:
            try:
                client = await self._ready_client()
                if not self._is_loaded and not is_last:
                    await self._load(client, inf)
                begun_us = self._now_us()
                await self._write_waiting(client, is_last=is_last)
                self.status.last_us = begun_us
                self._recovered()
                if not is_last:
                    await self._write_again(client, max(BATCH_BUCKETS, round(AGAIN_A_SECOND * self._every_seconds)))
                    if self._reading is not None or self._can_join_more():
                        await self._load(client, self._every_seconds)
            except _FAILURES as error:
                self._failed(error)
                await self._disconnect()
            except asyncio.CancelledError:
                # An answer may be half read.
                await self._disconnect()
                raise

    def _can_join_more(self) -> bool:
        """True if something of what was read could not be joined then, and may be now."""
        if self._has_left_out and self._have_rules_changed:
            return True
        return self._ahead.is_due(self._now_us()) and time.monotonic() >= self._ahead_from

    def _failed(self, error: Exception) -> None:
        self.status.failed += 1
        degraded_reason = reason_of(error)
        if degraded_reason != self.status.degraded_reason:
            self.status.degraded_reason = degraded_reason
            _log.error("state_not_kept", reason=degraded_reason, error=str(error) or repr(error))

    def _recovered(self) -> None:
        self._back_off.reset()
        if self.status.degraded_reason:
            self.status.degraded_reason = ""
            _log.info("state_kept_again")

    async def _ready_client(self) -> _Client:
        """A client whose server has keys of this format."""
        client = self._client
        if client is None:
            try:
                self._client = client = self._connect(on_connect=self._note_connection)
            except OSError as error:
                raise Unusable(f"the file of its password cannot be read: {error.strerror}") from error
        values = await self._formats(client, self._keys.formats)
        missing = [name for name, value in values.items() if value is None]
        if missing:
            for name in missing:
                await self._call(client.set(name, f"{FORMAT} {secrets.token_hex(8)}", nx=True))
            # Or what another sidecar has set.
            values |= await self._formats(client, missing)
        is_lost = False
        for name, value in values.items():
            version = (value or b"").partition(b" ")[0]
            if version != str(FORMAT).encode():
                found = version[:32].decode(errors="replace")
                raise Unusable(f"its keys are of format {found!r}; this version reads and writes {FORMAT}")
            if value is not None and self._epochs.setdefault(name, value) != value:
                self._epochs[name] = value
                is_lost = True
        if is_lost:
            self._again = self._store.walk()
            _log.warning("state_lost", reason="the server has lost its data: all of it is written again")
        return client

    async def _formats(self, client: _Client, names: Sequence[str]) -> dict[str, bytes | None]:
        pipeline = _pipeline(client)
        for name in names:
            pipeline.get(name)
        return dict(zip(names, await self._call(pipeline.execute()), strict=True))

    def _note_connection(self) -> None:
        # It may be an older copy of the server, or one that lost its last writes.
        if self._is_loaded:
            self._again = self._store.walk()

    async def _disconnect(self) -> None:
        client, self._client = self._client, None
        if self._reading is not None:
            # To be begun again.
            self._reading, self._has_left_out, self._have_rules_changed = None, True, True
        if client is not None:
            with suppress(exceptions.RedisError, OSError, TimeoutError):
                await bounded(client.aclose())

    async def _call(self, answer: Awaitable[T]) -> T:
        began = time.perf_counter()
        result = await bounded(answer)
        self.status.calls += 1
        self.status.call_seconds += time.perf_counter() - began
        return result

    async def _write_waiting(self, client: _Client, *, is_last: bool) -> None:
        # What changes meanwhile is for the next round.
        left = len(self._waiting)
        while left > 0 and (batch := self._waiting.take(BATCH_BUCKETS)):
            left -= len(batch)
            try:
                await self._write(client, batch, is_last=is_last)
            except BaseException:
                for key, slots in batch.items():
                    if (bucket := self._store.get(key)) is not None:
                        self._queue_slots(bucket, slots)
                raise
            if not is_last:
                # A queue that is always full must not keep the others from being written again.
                await self._write_again(client, BATCH_BUCKETS)

    async def _write_again(self, client: _Client, max_buckets: int) -> None:
        """Write so many of the buckets that are to be written again."""
        if self._again is None and self._has_missed:
            self._has_missed, self._again = False, self._store.walk()
        every_us = round(self._every_seconds * 1e6)
        time_slice = TimeSlice()
        batch: dict[bytes, Slots] = {}
        again = self._again
        while again is not None and max_buckets > 0:
            bucket = next(again, None)
            if bucket is None:
                if self._again is again:
                    self._again = None
                break
            if bucket.is_replicated and is_worth_keeping(bucket.limit, every_us) and len(bucket.key) <= MAX_KEY_BYTES:
                batch[bucket.key] = None
                max_buckets -= 1
            if len(batch) >= BATCH_BUCKETS:
                await self._write(client, batch)
                batch = {}
            await time_slice.rest_when_due()
        if batch:
            await self._write(client, batch)

    async def _write(self, client: _Client, batch: dict[bytes, Slots], *, is_last: bool = False) -> None:
        """Have the server join these buckets, and leave time to others."""
        time_slice = TimeSlice()
        keys, told = [], []
        for key, slots in batch.items():
            bucket = self._store.get(key)
            # A bucket that was dropped is full.
            if bucket is not None:
                lines: list[str] = []
                for entries in entry_lists(bucket, slots):
                    lines += entry_lines(entries)
                    if not is_last:
                        await time_slice.rest_when_due()
                try:
                    if lines:
                        told.append(join_text(bucket, lines, self._now_us()))
                        keys.append(key)
                except ValueError as error:
                    self._refuse(str(error))
        if not keys:
            return
        names = list(map(self._keys.of_bucket, keys))
        with self._traced(keys):
            for key, answer in zip(keys, await self._call(self._evaluate(client, JOIN, names, told)), strict=True):
                if answer in (0, 1):
                    self.status.written += 1
                    slots = batch[key]
                    if answer and slots is not None:
                        # It is new there, or was lost: then more of it may be missing.
                        bucket = self._store.get(key)
                        if bucket is not None and any(islice(bucket.entries(), len(slots), None)):
                            self._queue_slots(bucket, None)
                    continue
                self._check(answer)
        if not is_last:
            await asyncio.sleep(len(keys) * BUCKET_SECONDS / LOOP_SHARE)

    @contextmanager
    def _traced(self, keys: Sequence[bytes]) -> Iterator[None]:
        """A span, when one of the buckets has to do with a sampled request."""
        span = self._tracer.write_span(keys)
        error = ""
        try:
            yield
        except _FAILURES as failure:
            error = reason_of(failure)
            raise
        finally:
            if span is not None:
                span.end(error)

    def _check(self, answer: object) -> None:
        """Count a bucket that could not be joined, and log the first.

        Raises:
            exceptions.RedisError: the others cannot be joined either.
        """
        if isinstance(answer, exceptions.RedisError) and not isinstance(answer, exceptions.ResponseError):
            raise answer
        text = answer.decode(errors="replace") if isinstance(answer, bytes) else str(answer)
        if is_of_server(text):
            raise exceptions.ResponseError(text)
        self._refuse(text)

    def _refuse(self, error: str) -> None:
        self.status.refused += 1
        if self.status.refused == 1:
            _log.error("bucket_not_kept", error=error)

    async def _evaluate(
        self, client: _Client, script: str, names: Sequence[bytes], told: Sequence[bytes] = ()
    ) -> Sequence[Any]:
        """The script's answer for each bucket, or an exception in place of it."""
        try:
            return await self._evaluate_loaded(client, script, names, told)
        except exceptions.NoScriptError:
            # SCRIPT FLUSH, or a node that is new in the Cluster.
            await client.script_load(script)
            return await self._evaluate_loaded(client, script, names, told)

    async def _evaluate_loaded(
        self, client: _Client, script: str, names: Sequence[bytes], told: Sequence[bytes]
    ) -> Sequence[Any]:
        digest = digest_of(script)
        if isinstance(client, Redis):
            # One call is a third of the work that a pipeline of them is.
            answers: Sequence[Any] = await client.evalsha(digest, len(names), *names, *told)
            return answers
        pipeline = _pipeline(client)
        for index, name in enumerate(names):
            pipeline.execute_command("EVALSHA", digest, 1, name, *told[index : index + 1])
        each = await pipeline.execute(raise_on_error=False)
        for answer in each:
            if isinstance(answer, exceptions.NoScriptError):
                raise answer
        return [answer[0] if isinstance(answer, list) else answer for answer in each]

    async def _load(self, client: _Client, seconds: float) -> None:
        """Read what is there, or go on with that, for so long: what changes meanwhile waits to be written."""
        if self._reading is None:
            self._reading = client.scan_iter(match=self._keys.pattern, count=SCAN_KEYS)
            if self._ahead.is_due(self._now_us()):
                self._ahead_from = time.monotonic() + self._ahead_back_off.next()
            self._has_left_out = self._have_rules_changed = False
            self._ahead = AheadOfClock()
            self._unreadable = 0
        until = time.perf_counter() + seconds
        time_slice = TimeSlice()
        batch: dict[bytes, AnyLimit] = {}
        name: bytes | None = b""
        while name is not None and time.perf_counter() < until:
            name = await bounded(anext(self._reading, None))
            limit = None if name is None else self._limit(name)
            if name is not None and limit is not None:
                batch[name] = limit
            if len(batch) >= BATCH_BUCKETS:
                await self._read(client, batch)
                batch = {}
            await time_slice.rest_when_due()
        await self._read(client, batch)
        if name is None:
            self._reading = None
            self._is_loaded = True
            _log.info("restored", buckets=self.status.restored)
            if self._unreadable:
                _log.warning("buckets_unreadable", buckets=self._unreadable)
            if self._ahead.buckets:
                _log.warning("buckets_put_off", ahead_of_clock=self._ahead.buckets)

    def _limit(self, name: bytes) -> AnyLimit | None:
        """The limit that a rule here gives the bucket of this name; None when no rule does, or it is no bucket."""
        key = self._keys.bucket(name)
        if key is None:
            return None
        try:
            limit = self._store.limit_of_key(key)
        except ValueError:
            limit = None
        self._has_left_out |= limit is None
        return limit

    async def _read(self, client: _Client, batch: Mapping[bytes, AnyLimit]) -> None:
        """Join the buckets of these names."""
        if not batch:
            return
        answers = await self._call(self._evaluate(client, READ, list(batch)))
        time_slice = TimeSlice()
        for (name, limit), answer in zip(batch.items(), answers, strict=True):
            if isinstance(answer, Exception):
                raise answer
            key = self._keys.bucket(name)
            assert key is not None
            # One that has expired since is empty.
            if answer:
                try:
                    for _ in restore_steps(key, limit, answer, self._store, self._now_us(), ahead=self._ahead):
                        await time_slice.rest_when_due()
                    self.status.restored += 1
                except BadRecord:
                    self._unreadable += 1
            await time_slice.rest_when_due()


def _pipeline(client: _Client) -> Pipeline | ClusterPipeline:
    return client.pipeline(transaction=False) if isinstance(client, Redis) else client.pipeline()


def entry_lists(bucket: Bucket, slots: Slots) -> Iterator[list[Entry]]:
    """The entries to write, in lists of some hundred: those of 250 nodes would take the loop 25 ms."""
    if slots is not None:
        entries = list(bucket.own_entries(slots))
        if len(entries) == len(slots):
            yield entries
            return
    # Some slots were sealed since, or are of another life.
    yield from in_lists(bucket, 0)
