"""What one peer is to be told besides the node's own changes: repairs, and what is relayed to it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from ratelimit_sidecar.crdt.bucket import Bucket, Entry, Origin
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.replication.key_queue import KeyQueue
from ratelimit_sidecar.replication.parts import Parts, in_parts, tellable, whole

MAX_RELAYED_BUCKETS: Final = 16_384
"""Waiting at once. A peer for which there are more gets a snapshot in place of them. Repairs are bounded by
`anti_entropy.MAX_EXCHANGED` a round, and each bucket waits once."""


class SideLog:
    """Of one stream."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._relayed = KeyQueue[dict[tuple[Origin, int], None]]()
        self._repairs = KeyQueue[bool]()
        """The values are of no use."""
        self._parts: Parts | None = None
        self._now_us = 0

    @property
    def pending(self) -> int:
        """Buckets that wait; more than 0 while there is anything to tell."""
        return len(self._relayed) + len(self._repairs) + (self._parts is not None)

    def relay(self, bucket: Bucket, entries: Iterable[Entry]) -> bool:
        """These entries of others are news that the peer hears of from nobody else.

        Returns:
            False when there is no room.
        """
        slots = self._relayed.get(bucket.key)
        if slots is None:
            if len(self._relayed) >= MAX_RELAYED_BUCKETS:
                return False
            slots = {}
            self._relayed.add(bucket.key, slots)
        for entry in entries:
            slots[entry.origin, entry.slot] = None
        return True

    def repair(self, key: bytes) -> None:
        """The peer has to hear everything about one bucket."""
        if self._repairs.get(key) is None:
            self._repairs.add(key, True)

    def parts(self, now_us: int) -> Parts:
        """All that waits."""
        self._now_us = now_us
        if self._parts is None:
            self._parts = self._take()
        return self._parts

    def _take(self) -> Parts:
        while self._relayed or self._repairs:
            if self._relayed:
                key, slots = self._relayed.pop()
                bucket = tellable(self._store, key)
                yield from in_parts(bucket, None, [] if bucket is None else list(bucket.heard_entries(slots)))
            if self._repairs:
                key, _ = self._repairs.pop()
                # What the peer took, too, which it may have forgotten: see `Bucket._recall`.
                yield from whole(self._store, key, 0, self._now_us, None)
        self._parts = None
