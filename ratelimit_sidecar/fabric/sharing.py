"""Which buckets a sidecar shares at a tick, what it tells of them and what it hears. No I/O.

A bucket is *busy* until 2 s after it was asked for last, and asked about at each tick. Then it *rests*: it is asked
about once a second, and after a minute no more. What is told is kept until it is answered: what failed is told again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from ratelimit_sidecar.crdt.bucket import Bucket, Entry
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.fabric.record import OTHERS, ask, read
from ratelimit_sidecar.persistence.redis_record import BadRecord
from ratelimit_sidecar.replication.deltas import MAX_KEY_BYTES

BATCH_BUCKETS: Final = 64
"""Of one call: a millisecond of the server's, and of the loop's."""

BUSY_US: Final = 2_000_000
FORGET_US: Final = 60_000_000

RESTING_TICKS: Final = 20
"""One that rests is asked about at one tick in so many."""

MAX_SHARED: Final = 100_000
"""Buckets, some 300 bytes each. Of more the ones that rest the longest are forgotten, and then further ones not shared
until there is room."""

MAX_WAITING_SLOTS: Final = 64
"""Of one bucket; of more all own ones are told."""

_ALL: Final[list[int]] = []
"""In place of slots: all own entries."""


@dataclass(slots=True)
class _Shared:
    """
    Args:
        used_us: when it was last asked for here.
        looked_us: when it was last looked at for that: what moves its clock later is a request.
        seen: the version up to which the others' counts are known.
        waiting: own slots to be told.
    """

    used_us: int
    looked_us: int
    seen: int = 0
    waiting: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Batch:
    """Of one call."""

    buckets: list[Bucket]
    asks: list[bytes]
    told: list[list[int]]


class Sharing:
    """One sidecar's part."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._busy: dict[bytes, _Shared] = {}
        self._resting: dict[bytes, _Shared] = {}
        self._again: Iterator[Bucket] | None = None
        """Buckets whose own counts are still to be told again."""
        self._epoch = b""
        self._version = 0
        self.unshared = 0
        """Changes of buckets for which there was no room."""

    def __len__(self) -> int:
        return len(self._busy) + len(self._resting)

    def note(self, changes: Sequence[tuple[Bucket, list[int]]]) -> None:
        """Keep in mind that own slots of these buckets changed."""
        for bucket, slots in changes:
            self._note(bucket, slots)

    def _note(self, bucket: Bucket, slots: list[int]) -> None:
        key = bucket.key
        shared = self._busy.get(key)
        if shared is None:
            shared = self._resting.pop(key, None)
            if shared is None:
                if len(key) > MAX_KEY_BYTES or not self._makes_room():
                    self.unshared += 1
                    return
                shared = _Shared(bucket.at_us, bucket.at_us)
            self._busy[key] = shared
        shared.used_us = bucket.at_us
        waiting = shared.waiting
        if slots is _ALL or len(waiting) + len(slots) > MAX_WAITING_SLOTS:
            shared.waiting = _ALL
        elif waiting is not _ALL:
            waiting += [slot for slot in slots if slot not in waiting]

    def _makes_room(self) -> bool:
        if len(self) >= MAX_SHARED:
            oldest = next(iter(self._resting), None)
            if oldest is None:
                return False
            del self._resting[oldest]
        return True

    def tell_again(self) -> None:
        """The server may have lost what it was told, or may not have got it."""
        self._again = self._store.walk()
        for shared in (*self._busy.values(), *self._resting.values()):
            shared.seen = 0
        self._version = 0

    def batches(self, now_us: int) -> Iterator[Batch]:
        """What is to be asked at this tick. Each has to be `answered`, or to have `failed`, in the end."""
        self._note_again()
        keys = [*self._busy]
        keys += [key for key, _ in zip(self._resting, range(-(-len(self._resting) // RESTING_TICKS)), strict=False)]
        for start in range(0, len(keys), BATCH_BUCKETS):
            batch = Batch([], [], [])
            for key in keys[start : start + BATCH_BUCKETS]:
                self._add(batch, key, now_us)
            if batch.buckets:
                yield batch

    def _note_again(self) -> None:
        looked = 0
        while self._again is not None and looked < BATCH_BUCKETS:
            bucket = next(self._again, None)
            if bucket is None:
                self._again = None
            elif bucket.journal is not None:
                looked += 1
                if next(self._own(bucket), None) is not None:
                    self._note(bucket, _ALL)

    def _own(self, bucket: Bucket) -> Iterator[Entry]:
        return (entry for entry in bucket.entries() if entry.origin == bucket.origin)

    def _add(self, batch: Batch, key: bytes, now_us: int) -> None:
        shared = self._busy.pop(key, None) or self._resting.pop(key, None)
        bucket = self._store.get(key)
        if shared is None or bucket is None:
            # It is full, and was dropped.
            return
        self._look(shared, bucket)
        unused_us = now_us - shared.used_us
        if unused_us > FORGET_US and not shared.waiting and shared.waiting is not _ALL:
            return
        # Last in its turn.
        (self._busy if unused_us <= BUSY_US else self._resting)[key] = shared
        told, shared.waiting = shared.waiting, []
        entries = list(self._own(bucket)) if told is _ALL else list(bucket.own_entries(told))
        batch.buckets.append(bucket)
        batch.asks.append(ask(bucket, entries, shared.seen, now_us))
        batch.told.append(told)
        shared.looked_us = bucket.at_us

    def _look(self, shared: _Shared, bucket: Bucket) -> None:
        if bucket.at_us > shared.looked_us:
            shared.used_us = bucket.at_us

    def answered(self, batch: Batch, answer: Sequence[bytes | int], now_us: int) -> None:
        """Join what the others took.

        Raises:
            BadRecord: the answer is none.
        """
        epoch, version, *texts = answer
        if not isinstance(epoch, bytes) or not isinstance(version, int) or len(texts) != len(batch.buckets):
            raise BadRecord("an answer of another script")
        if epoch != self._epoch or version <= self._version:
            if self._epoch:
                self.tell_again()
            self._epoch = epoch
        self._version = version
        for bucket, text in zip(batch.buckets, texts, strict=True):
            assert isinstance(text, bytes)
            shared = self._busy.get(bucket.key) or self._resting.get(bucket.key)
            if text != b";":
                told = read(text, bucket.limit, OTHERS)
                if shared is not None:
                    self._look(shared, bucket)
                self._store.join(bucket.key, bucket.limit, told.base, told.entries, now_us)
            if shared is not None:
                shared.seen = version
                shared.looked_us = bucket.at_us

    def failed(self, batch: Batch) -> None:
        """No answer has come: all of it is told again."""
        for bucket, told in zip(batch.buckets, batch.told, strict=True):
            if told or told is _ALL:
                self._note(bucket, told)
