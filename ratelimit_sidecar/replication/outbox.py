"""What one peer has yet to hear: a set of buckets and slots, never a queue of messages.

Ten thousand takes on a bucket between two batches are one entry with the newest count, so an outbox is bounded by the
live buckets whatever the peer does. It holds own slots written since they were last sent (`changed`) and, once a stream
to the peer is there, the buckets of which the peer must hear everything (`full`: all origins' entries and the base). A
peer out of reach gets a full state when it is back, so until then nothing is kept but since when it misses something.

Lag, by this node's clock alone: from the creation of the oldest delta unacknowledged to its acknowledgement.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass

from ratelimit_sidecar.crdt.bucket import Base, Bucket, Entry, Origin
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.replication.deltas import MAX_KEY_BYTES, DeltasWriter
from ratelimit_sidecar.replication.v1 import replication_pb2 as pb

MAX_BATCH_BUCKETS = 256
MAX_BATCH_ENTRIES = 1_024
MAX_BATCH_BYTES = 1 << 16
"""Rough. Together these keep building a batch, and applying it, to a few milliseconds between two decisions."""

LAG_SHOWN_US = 60_000_000
"""So that a scraper with a usual interval sees the lag of a link that is seldom used."""

MAX_UNACKNOWLEDGED = 32
"""Batches on their way: one every 20 ms fills them in 640 ms, longer than any two places on Earth are apart there and
back, so a flush never waits for an acknowledgement. 2 MiB a peer at worst."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One Deltas frame.

    Args:
        bucket_keys: of the buckets in it.
        entries: slot entries in it.
        created_us: of the oldest change in it; None when it tells of no change, only of state.
        sent_us: when it was taken from the outbox.
        ends_full_state: with it the peer has heard everything known when the stream began.
    """

    frame: pb.Frame
    bucket_keys: tuple[bytes, ...]
    entries: int
    created_us: int | None
    sent_us: int
    ends_full_state: bool


@dataclass(slots=True)
class _Change:
    created_us: int
    slots: dict[int, None]


class Outbox:
    """Args:
    undelivered_since_us: the creation of the first own change that the peer cannot have heard; None when there is
        none.
    """

    def __init__(self, store: Store, undelivered_since_us: int | None) -> None:
        self._store = store
        self._undelivered_since_us = undelivered_since_us
        self._is_open = False
        self._peer: Origin | None = None
        # Both are emptied from the front, which a plain dict does in time proportional to what was removed before.
        self._changed: OrderedDict[bytes, _Change] = OrderedDict()
        self._full: deque[bytes] = deque()
        self._full_rest: tuple[bytes, list[Entry]] | None = None
        self._full_state_owed = False
        self._in_flight: deque[Batch] = deque()
        self._acknowledged_us = 0
        self._last_lag_us = 0

    @property
    def pending_buckets(self) -> int:
        """Buckets of which the peer has something yet to be sent; 0 while it is out of reach."""
        return len(self._changed) + len(self._full) + (self._full_rest is not None)

    @property
    def is_settled(self) -> bool:
        """True when everything noted so far has been acknowledged."""
        return not (self.pending_buckets or self._full_state_owed or self._in_flight)

    def lag_us(self, now_us: int) -> int:
        """The age of the oldest change not acknowledged; with none, the lag of the batch acknowledged last.

        That is shown for `LAG_SHOWN_US`; on a quiet link there is nothing to lag behind.
        """
        oldest_us = self._oldest_unacknowledged_us()
        if oldest_us is not None:
            return now_us - oldest_us
        return self._last_lag_us if now_us - self._acknowledged_us < LAG_SHOWN_US else 0

    def note(self, bucket: Bucket, slots: Iterable[int], created_us: int) -> None:
        """Own entries of `slots` have changed.

        Args:
            created_us: not later than the first of the changes.
        """
        if not self._is_open:
            if self._undelivered_since_us is None:
                self._undelivered_since_us = created_us
            return
        change = self._changed.get(bucket.key)
        if change is None:
            self._changed[bucket.key] = _Change(created_us, dict.fromkeys(slots))
        else:
            change.slots.update(dict.fromkeys(slots))

    def open(self, peer: Origin) -> None:
        """A stream to `peer` is there, which is told everything from now on."""
        assert not self._is_open
        self._is_open = True
        self._peer = peer
        self._full.extend(bucket.key for bucket in self._store if bucket.journal is not None)
        self._full_state_owed = True

    def close(self) -> None:
        """The stream is gone. Whatever was on its way may be lost: the next one starts from the full state."""
        self._undelivered_since_us = self._oldest_unacknowledged_us()
        self._is_open = False
        self._changed.clear()
        self._full.clear()
        self._full_rest = None
        self._full_state_owed = False
        self._in_flight.clear()

    def take_batch(self, now_us: int) -> Batch | None:
        """The next batch; None when there is nothing to tell, or enough is on its way.

        A batch of the full state may be empty: it has looked at a batch's worth of buckets and found them idle.
        """
        if not self._is_open or len(self._in_flight) >= MAX_UNACKNOWLEDGED:
            return None
        writer = DeltasWriter(self._store.origin)
        created_us = self._write_changes(writer)
        ends_full_state = False
        if self._full_state_owed:
            self._write_full_state(writer, now_us)
            ends_full_state = not self._full and self._full_rest is None
            if ends_full_state:
                self._full_state_owed = False
                writer.deltas.ends_full_state = True
        elif not writer.keys:
            return None
        batch = Batch(writer.frame, tuple(writer.keys), writer.entries, created_us, now_us, ends_full_state)
        self._in_flight.append(batch)
        return batch

    def acknowledged(self, now_us: int) -> Batch:
        """The oldest batch on its way has been applied; returns it."""
        batch = self._in_flight.popleft()
        self._acknowledged_us = now_us
        self._last_lag_us = now_us - (batch.sent_us if batch.created_us is None else batch.created_us)
        if batch.ends_full_state:
            self._undelivered_since_us = None
        return batch

    def _write_changes(self, writer: DeltasWriter) -> int | None:
        """Returns when the oldest of the changes written was made."""
        # Half of each batch stays for the full state, lest busy buckets keep it from ever ending.
        share = 2 if self._full_state_owed else 1
        created_us = None
        while self._changed and _has_room(writer, share):
            key, change = self._changed.popitem(last=False)
            bucket = self._store.get(key)
            if bucket is None or len(key) > MAX_KEY_BYTES:
                continue
            entries = list(bucket.own_entries(change.slots))
            if entries:
                writer.add(bucket, None, entries)
                created_us = _earlier(created_us, change.created_us)
        return created_us

    def _write_full_state(self, writer: DeltasWriter, now_us: int) -> None:
        if self._full_rest is not None and _has_room(writer):
            key, entries = self._full_rest
            self._full_rest = None
            bucket = self._store.get(key)
            if bucket is not None:
                self._write_all_that_fit(writer, bucket, None, entries)
        for _ in range(min(len(self._full), MAX_BATCH_BUCKETS)):
            if self._full_rest is not None or not _has_room(writer):
                break
            bucket = self._store.get(self._full.popleft())
            if bucket is None or len(bucket.key) > MAX_KEY_BYTES:
                continue
            bucket.seal(now_us)
            # The peer knows its own entries best.
            entries = [entry for entry in bucket.entries() if entry.origin != self._peer]
            # A base without deficit says nothing that its absence does not.
            base = bucket.base if bucket.base.deficit else None
            if not entries and base is None:
                continue
            self._write_all_that_fit(writer, bucket, base, entries)

    def _write_all_that_fit(
        self, writer: DeltasWriter, bucket: Bucket, base: Base | None, entries: list[Entry]
    ) -> None:
        fitting = MAX_BATCH_ENTRIES - writer.entries
        writer.add(bucket, base, entries[:fitting])
        if len(entries) > fitting:
            self._full_rest = (bucket.key, entries[fitting:])

    def _oldest_unacknowledged_us(self) -> int | None:
        oldest_us = self._undelivered_since_us
        for batch in self._in_flight:
            oldest_us = _earlier(oldest_us, batch.created_us)
        if self._changed:
            oldest_us = _earlier(oldest_us, next(iter(self._changed.values())).created_us)
        return oldest_us


def _has_room(writer: DeltasWriter, share: int = 1) -> bool:
    """True when the batch has not filled a `share`-th of any of its bounds."""
    return (
        len(writer.keys) * share < MAX_BATCH_BUCKETS
        and writer.entries * share < MAX_BATCH_ENTRIES
        and writer.rough_bytes * share < MAX_BATCH_BYTES
    )


def _earlier(one_us: int | None, other_us: int | None) -> int | None:
    if one_us is None or other_us is None:
        return one_us if other_us is None else other_us
    return min(one_us, other_us)
