"""What the gateway holds of its region: the sums of its sidecars, as of one node, and what other regions took. No I/O.

That node's name and incarnation are the same whoever the gateway is, and its counts only grow: so a gateway that
follows another tells the same once more, and nothing is counted twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Final

from ratelimit_sidecar.crdt.bucket import Bucket, Entry, Origin
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.fabric.record import elsewhere, read
from ratelimit_sidecar.persistence.redis_record import BadRecord
from ratelimit_sidecar.replication.deltas import MAX_KEY_BYTES

BATCH_BUCKETS: Final = 64
"""Told by one call."""

MAX_ANSWERED: Final = 256
"""Buckets of one answer; more than one call of a sidecar may raise (`sharing.BATCH_BUCKETS`)."""


def region_origin(region: str) -> Origin:
    """Of everything that the sidecars of a region took, for other regions."""
    return Origin(f"{region} (fabric)", 1)


class Region:
    """Args:
    store: of the region, which nobody else takes from.
    """

    def __init__(self, origin: Origin, store: Store) -> None:
        self.origin = origin
        self.store = store
        self.since = 0
        """The version up to which all sums are known."""
        self._epoch = b""
        self._news: dict[bytes, None] = {}
        """Buckets that other regions took from, and the fabric does not know."""

    def note_news(self, bucket: Bucket, entries: Sequence[Entry]) -> None:
        """A peer has told something new."""
        if len(bucket.key) <= MAX_KEY_BYTES and any(entry.origin != self.origin for entry in entries):
            self._news[bucket.key] = None

    def batch(self, now_us: int) -> tuple[list[Bucket], list[bytes]]:
        """Buckets to be told of, and what; `failed` when it was not."""
        buckets, told = [], []
        for key in list(islice(self._news, BATCH_BUCKETS)):
            del self._news[key]
            bucket = self.store.get(key)
            if bucket is not None:
                buckets.append(bucket)
                told.append(elsewhere(bucket, self.origin, now_us))
        return buckets, told

    def failed(self, buckets: Sequence[Bucket]) -> None:
        self._news.update(dict.fromkeys(bucket.key for bucket in buckets))

    def answered(self, answer: Sequence[bytes | int], now_us: int) -> tuple[list[tuple[Bucket, list[Entry]]], bool]:
        """Join what this region's sidecars took.

        Returns:
            What is to be told to other regions, and whether there is more to be asked for at once.

        Raises:
            BadRecord: the answer is none.
        """
        epoch, until, version, *found = answer
        if not isinstance(epoch, bytes) or not isinstance(until, int) or not isinstance(version, int):
            raise BadRecord("an answer of another script")
        if epoch != self._epoch or version <= self.since:
            # The server has lost data: what other regions took as well.
            if self._epoch:
                self._news.update(dict.fromkeys(bucket.key for bucket in self.store))
                self.since = until = 0
            self._epoch = epoch
        changes = []
        for key, text in zip(found[::2], found[1::2], strict=True):
            assert isinstance(key, bytes)
            assert isinstance(text, bytes)
            limit = self.store.limit_of_key(key)
            if limit is None:
                continue
            told = read(text, limit, self.origin)
            self.store.join(key, limit, told.base, told.entries, now_us)
            bucket = self.store.get(key)
            if bucket is not None and told.entries:
                changes.append((bucket, told.entries))
        self.since = until
        return changes, until < version
