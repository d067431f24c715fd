"""What one peer is told besides the node's own changes: repairs, what is relayed to it, and snapshots.

A snapshot is all there is that was written since some instant: at a stream's start, and after a gap.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Final

from ratelimit_sidecar.crdt.bucket import Bucket, Entry, Origin
from ratelimit_sidecar.crdt.journal import UrgentBuckets
from ratelimit_sidecar.crdt.slot import slot_start_us
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.replication.changes import RECENT_US, ChangeLog, Forgotten
from ratelimit_sidecar.replication.deltas import MAX_TIME_US
from ratelimit_sidecar.replication.lag import earlier
from ratelimit_sidecar.replication.parts import NOTHING, Parts, in_parts, own_part, tellable, whole

MAX_RELAYED_BUCKETS: Final = 16_384
"""Waiting at once. A peer for which there are more gets a snapshot in place of them. Repairs are bounded by
`anti_entropy.MAX_EXCHANGED` a round, and each bucket waits once."""


class SideLog:
    """Repairs, what is relayed, and buckets that must not wait for their turn in the log, on one stream."""

    def __init__(self, store: Store) -> None:
        self._store = store
        # Emptied from the front, which a plain dict does in time proportional to what was removed before.
        self._relayed: OrderedDict[bytes, dict[tuple[Origin, int], None]] = OrderedDict()
        self._repairs: OrderedDict[bytes, None] = OrderedDict()
        self._hurried = UrgentBuckets()
        self._parts: Parts | None = None
        self._now_us = 0
        self._relayed_since_us = MAX_TIME_US
        """Not later than the oldest slot that was ever relayed."""

    @property
    def pending(self) -> int:
        """Buckets that wait; more than 0 while there is anything to tell."""
        return len(self._relayed) + len(self._repairs) + len(self._hurried) + (self._parts is not None)

    def relay(self, bucket: Bucket, entries: Sequence[Entry]) -> bool:
        """These entries of others are news that the peer hears of from nobody else.

        Returns:
            False when there is no room.
        """
        slots = self._relayed.get(bucket.key)
        self._relayed_since_us = min([self._relayed_since_us, *[slot_start_us(entry.slot) for entry in entries]])
        if slots is None:
            if len(self._relayed) >= MAX_RELAYED_BUCKETS:
                return False
            slots = {}
            self._relayed[bucket.key] = slots
        for entry in entries:
            slots[entry.origin, entry.slot] = None
        return True

    def drop_relayed(self) -> int:
        """Forget what waits to be relayed.

        Returns:
            Since when a snapshot has to go back to tell of it.
        """
        self._relayed.clear()
        since_us, self._relayed_since_us = self._relayed_since_us, MAX_TIME_US
        return since_us

    def repair(self, key: bytes) -> None:
        """The peer has to hear everything about one bucket."""
        self._repairs[key] = None

    def hurry(self, bucket: Bucket) -> None:
        """The peer has to hear soon what this node took from a bucket."""
        self._hurried.add(bucket)

    def parts(self, now_us: int) -> Parts:
        """All that waits."""
        self._now_us = now_us
        if self._parts is None:
            self._parts = self._take()
        return self._parts

    def close(self) -> None:
        """See `Cursor.close`."""
        self._parts = None

    def _take(self) -> Parts:
        while self._hurried or self._relayed or self._repairs:
            if self._hurried:
                yield from own_part(self._store, self._hurried.pop().key, self._now_us - RECENT_US)
            if self._relayed:
                key, slots = self._relayed.popitem(last=False)
                bucket = tellable(self._store, key)
                yield from in_parts(bucket, None, [] if bucket is None else list(bucket.heard_entries(slots)))
            if self._repairs:
                key, _ = self._repairs.popitem(last=False)
                # What the peer took, too, which it may have forgotten: see `Bucket._recall`.
                yield from whole(self._store, key, 0, self._now_us, None)
        self._parts = None


class Snapshots:
    """The snapshots sent on one stream, one after the other.

    Args:
        peer: knows its own entries best.
        awaits_request: the peer is to say first which one it wants.
    """

    def __init__(self, store: Store, log: ChangeLog, peer: Origin, *, awaits_request: bool) -> None:
        self._store = store
        self._log = log
        self._peer = peer
        self.awaits_request = awaits_request
        self._is_told_recent = False
        """True when it has asked for own changes of the last seconds."""
        self._parts: Parts | None = None
        self._now_us = 0
        self._left = 0
        """About how many buckets are yet to be looked at."""
        self._since_us: int | None = None
        """How far back the earliest snapshot goes that is not acknowledged."""
        self._next_since_us: int | None = None
        """How far back the next snapshot goes, which follows the one under way; None for no other."""
        self._has_ended = False

    @property
    def is_owed(self) -> bool:
        """True while there is one to be told."""
        return self._parts is not None

    @property
    def pending(self) -> int:
        """About how many buckets are yet to be looked at."""
        return self._left if self.is_owed else 0

    @property
    def missing_since_us(self) -> int | None:
        """If the stream is lost now: since when the peer misses what they were to tell; None when they were told."""
        return earlier(self._since_us, self._next_since_us)

    def request(self, now_us: int, *, recent: bool) -> None:
        """The peer says which one it wants.

        Args:
            recent: own changes of the last RECENT_US; everything otherwise.
        """
        if self.awaits_request:
            self.awaits_request = False
            self._is_told_recent = recent
            if recent:
                self._begin_recent(now_us - RECENT_US, now_us)
            else:
                self._next_since_us = None
                self.begin(0)
        elif not recent and self._is_told_recent:
            # The one that told it everything is gone.
            self._is_told_recent = False
            self.begin(0)

    def begin(self, since_us: int) -> None:
        """Tell all that was written since then: after the one under way, or the one that the peer is to ask for."""
        if self.awaits_request or self._parts is not None:
            # One under way has passed some buckets already, and may not go back so far.
            self._next_since_us = earlier(self._next_since_us, since_us)
            return
        self._since_us = earlier(self._since_us, since_us)
        self._left = len(self._store)
        self._parts = self._all(since_us)

    def parts(self, now_us: int) -> Parts:
        """What is yet to be told."""
        assert self._parts is not None
        self._now_us = now_us
        return self._parts

    def take_end(self) -> bool:
        """True once after the last part of one."""
        has_ended, self._has_ended = self._has_ended, False
        return has_ended

    def acknowledged(self) -> None:
        """The peer has heard all of one."""
        if self._parts is None and not self._has_ended:
            self._since_us = None

    def close(self) -> None:
        """See `Cursor.close`."""
        self._parts = None

    def _begin_recent(self, since_us: int, now_us: int) -> None:
        self._since_us = since_us
        first, end = self._log.recent_from(now_us), self._log.end
        self._left = min(self._log.changes_since(first), len(self._store))
        self._parts = self._recent(since_us, self._log.keys(first, end))

    def _all(self, since_us: int) -> Parts:
        for bucket in self._store.walk():
            self._left = max(1, self._left - 1)
            yield from whole(self._store, bucket.key, since_us, self._now_us, self._peer)
        self._end()

    def _recent(self, since_us: int, keys: Iterator[bytes | None]) -> Parts:
        try:
            for key in keys:
                self._left = max(1, self._left - 1)
                if key is None:
                    yield NOTHING
                else:
                    yield from own_part(self._store, key, since_us)
        except Forgotten:
            # More has changed meanwhile than the log holds.
            for bucket in self._store.walk():
                yield from own_part(self._store, bucket.key, since_us)
        self._end()

    def _end(self) -> None:
        self._parts = None
        self._has_ended = True
        if self._next_since_us is not None:
            since_us, self._next_since_us = self._next_since_us, None
            self.begin(since_us)
