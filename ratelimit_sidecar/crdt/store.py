"""All buckets of one replica, by canonical key.

Holds active buckets only: an idle one equals an absent one, so `sweep` drops it and nobody can tell. Changes collect
in a journal that holds a bucket at most once, so it is bounded by the buckets, however long nobody drains it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator

from ratelimit_sidecar.crdt.bucket import Base, Bucket, Entry, Origin
from ratelimit_sidecar.crdt.limit import AnyLimit, Limit, Window
from ratelimit_sidecar.crdt.token_bucket import TokenBucket
from ratelimit_sidecar.crdt.window import FixedWindow, SlidingWindow

LimitOfKey = Callable[[bytes], AnyLimit | None]
"""The limit of a key that a peer names; None when this replica has no replicated rule for it."""


class Store:
    """Args:
    origin: this replica.
    limit_of_key: asked when a peer mentions a key that has no bucket here yet.
    """

    def __init__(self, origin: Origin, limit_of_key: LimitOfKey) -> None:
        self.origin = origin
        self.limit_of_key = limit_of_key
        self._buckets: dict[bytes, Bucket] = {}
        self._journal: list[Bucket] = []
        self._sweep_order: deque[Bucket] = deque()
        self.evicted = 0
        """Idle buckets dropped since start."""

    def __len__(self) -> int:
        return len(self._buckets)

    def __iter__(self) -> Iterator[Bucket]:
        return iter(self._buckets.values())

    def get(self, key: bytes) -> Bucket | None:
        return self._buckets.get(key)

    def bucket(self, key: bytes, limit: AnyLimit, now_us: int, *, replicated: bool = True) -> Bucket:
        """The bucket of `key`, created full when absent, enforcing `limit` from now on; O(1) unless the limit changed.

        Args:
            replicated: False keeps what is taken from a new bucket to this replica.
        """
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = _make_bucket(key, limit, self.origin, now_us, self._journal if replicated else None)
            self._buckets[key] = bucket
            self._sweep_order.append(bucket)
        elif bucket.limit is not limit and bucket.limit != limit:
            bucket.set_limit(limit, now_us)
        return bucket

    def merge(self, key: bytes, base: Base | None, entries: Iterable[Entry], now_us: int) -> bool:
        """Join what a peer says of one bucket.

        Args:
            base: its deficit scaled by the period of this replica's limit.

        Returns:
            False when no replicated rule here knows the key: nothing was kept.
        """
        limit = self.limit_of_key(key)
        if limit is None:
            return False
        bucket = self.bucket(key, limit, now_us)
        if base is not None:
            bucket.merge_base(base, now_us)
        bucket.merge(entries, now_us)
        return True

    def drain_changes(self) -> list[tuple[Bucket, list[int]]]:
        """Buckets with the own slots written since the last call."""
        changed = [(bucket, bucket.drain_changed_slots()) for bucket in self._journal]
        # Emptied in place: every bucket holds this list.
        self._journal.clear()
        return changed

    def sweep(self, now_us: int, most: int) -> int:
        """Seal the next `most` buckets in turn and drop the idle ones; a call resumes where the last one stopped.

        Returns:
            The number of buckets dropped.
        """
        dropped = 0
        for _ in range(min(most, len(self._sweep_order))):
            bucket = self._sweep_order.popleft()
            if bucket.is_idle(now_us):
                del self._buckets[bucket.key]
                dropped += 1
            else:
                self._sweep_order.append(bucket)
        self.evicted += dropped
        return dropped


def _make_bucket(key: bytes, limit: AnyLimit, origin: Origin, now_us: int, journal: list[Bucket] | None) -> Bucket:
    if isinstance(limit, Limit):
        return TokenBucket(key, limit, origin, now_us, journal)
    if limit.window is Window.FIXED:
        return FixedWindow(key, limit, origin, now_us, journal)
    return SlidingWindow(key, limit, origin, now_us, journal)
