"""What one peer is sent besides the change log and snapshots: repairs, what is relayed to it, and buckets that cannot
wait for their turn in the log.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from ratelimit_sidecar.crdt.bucket import Bucket, Entry, Origin
from ratelimit_sidecar.crdt.journal import UrgentBuckets
from ratelimit_sidecar.crdt.slot import slot_start_us
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.replication.changes import RECENT_CHANGES_US
from ratelimit_sidecar.replication.deltas import MAX_TIME_US
from ratelimit_sidecar.replication.parts import Parts, in_parts, own_part, tellable, whole

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
        self._urgent = UrgentBuckets()
        self._parts: Parts | None = None
        self._now_us = 0
        self._relayed_since_us = MAX_TIME_US
        """Not later than the oldest slot that was ever relayed."""

    @property
    def pending(self) -> int:
        """Buckets that wait; more than 0 while there is anything to tell."""
        return len(self._relayed) + len(self._repairs) + len(self._urgent) + (self._parts is not None)

    def relay(self, bucket: Bucket, entries: Sequence[Entry]) -> bool:
        """Relay these entries: they are news that no other node sends to the peer.

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
            How far back a snapshot has to go to have all of it.
        """
        self._relayed.clear()
        since_us, self._relayed_since_us = self._relayed_since_us, MAX_TIME_US
        return since_us

    def repair(self, key: bytes) -> None:
        """Send the peer everything about one bucket."""
        self._repairs[key] = None

    def send_urgent(self, bucket: Bucket) -> None:
        """Send the peer soon what this node took from a bucket."""
        self._urgent.add(bucket)

    def parts(self, now_us: int) -> Parts:
        """All that waits, taken out as it is iterated."""
        self._now_us = now_us
        if self._parts is None:
            self._parts = self._take()
        return self._parts

    def close(self) -> None:
        """Call it when the stream is gone, so that the two can be freed (see `Cursor.close`)."""
        self._parts = None

    def _take(self) -> Parts:
        while self._urgent or self._relayed or self._repairs:
            if self._urgent:
                yield from own_part(self._store, self._urgent.pop().key, self._now_us - RECENT_CHANGES_US)
            if self._relayed:
                key, slots = self._relayed.popitem(last=False)
                bucket = tellable(self._store, key)
                yield from in_parts(bucket, None, [] if bucket is None else list(bucket.received_entries(slots)))
            if self._repairs:
                key, _ = self._repairs.popitem(last=False)
                # With what the peer itself took, which it may have forgotten (`Bucket._restore_own`).
                yield from whole(self._store, key, 0, self._now_us, None)
        self._parts = None
