"""All buckets of one replica, by canonical key.

Holds active buckets only: an idle one equals an absent one, so `sweep` drops it and nobody can tell. Changes collect
in a journal that holds a bucket at most once, so it is bounded by the buckets, however long nobody drains it.

Anybody can invent keys, so there is `room` for some buckets only. Without it no live bucket is forgotten, which would
give its tokens back: a new key gets no bucket (its caller then takes from one that several keys share), and what peers
tell of it is not kept, as if it had not been delivered. `sweep` makes room again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

from ratelimit_sidecar.crdt.bucket import Base, Bucket, Entry, Origin
from ratelimit_sidecar.crdt.journal import Journal
from ratelimit_sidecar.crdt.limit import AnyLimit, Limit, Window
from ratelimit_sidecar.crdt.room import Room
from ratelimit_sidecar.crdt.token_bucket import TokenBucket
from ratelimit_sidecar.crdt.untracked_dict import SHARDS, UntrackedDict
from ratelimit_sidecar.crdt.window import FixedWindow, SlidingWindow

DEFAULT_MAX_BUCKETS: Final = 1_000_000
"""About 0.6 GB of buckets with two slots each."""

LimitOfKey = Callable[[bytes], AnyLimit | None]
"""The limit of a key that a peer names; None when this replica has no replicated rule for it."""


class StoreFull(Exception):
    """There is no room for a bucket of a new key."""


class Store:
    """The buckets of one replica, made when they are first asked for. Call `sweep` now and then, which drops idle ones.

    Args:
        origin: this replica.
        limit_of_key: asked when a peer mentions a key.
        max_buckets: at once; at least 1.
        rule_key: see `Room`.
    """

    def __init__(
        self,
        origin: Origin,
        limit_of_key: LimitOfKey,
        *,
        max_buckets: int = DEFAULT_MAX_BUCKETS,
        rule_key: Callable[[bytes], bytes] = lambda _key: b"",
    ) -> None:
        self.origin = origin
        self.limit_of_key = limit_of_key
        self.room = Room(max_buckets, rule_key)
        self._buckets = UntrackedDict[Bucket]()
        self.journal = Journal()
        self._to_sweep: list[Bucket] = []
        self._next_shard = 0
        self.evicted = 0
        """Idle buckets dropped since start."""
        self.refused_keys = 0
        """Times since start that a peer told of a key that got no bucket."""
        self.full_since_us: int | None = None
        """When a key first got no bucket; None when there is ample room again."""

    def __len__(self) -> int:
        return len(self._buckets)

    def __iter__(self) -> Iterator[Bucket]:
        return self._buckets.values()

    def walk(self) -> Iterator[Bucket]:
        """Every bucket, however slowly: one that comes or goes meanwhile may be among them or not."""
        for shard in self._buckets.shards:
            yield from list(shard.values())

    def get(self, key: bytes) -> Bucket | None:
        return self._buckets.get(key)

    def bucket(self, key: bytes, limit: AnyLimit, now_us: int, *, replicated: bool = True) -> Bucket:
        """The bucket of `key`, created full when absent, enforcing `limit` from now on; O(1) unless the limit changed.

        Args:
            replicated: False keeps what is taken from a new bucket to this replica.

        Raises:
            StoreFull: there is none, and no room for one.
        """
        bucket = self._buckets.get(key)
        if bucket is None:
            if not self.room.take(key):
                if self.full_since_us is None:
                    self.full_since_us = now_us
                raise StoreFull
            bucket = _make_bucket(key, limit, self.origin, now_us, self.journal if replicated else None)
            self._buckets.add(key, bucket)
        elif bucket.limit is not limit and bucket.limit != limit:
            bucket.set_limit(limit, now_us)
        return bucket

    def merge(self, key: bytes, base: Base | None, entries: Sequence[Entry], now_us: int) -> int | None:
        """See `join`.

        Returns:
            None when no replicated rule here knows the key: then nothing was kept.
        """
        limit = self.limit_of_key(key)
        return None if limit is None else self.join(key, limit, base, entries, now_us)

    def join(
        self,
        key: bytes,
        limit: AnyLimit,
        base: Base | None,
        entries: Sequence[Entry],
        now_us: int,
        *,
        replicated: bool = True,
        sender: Origin | None = None,
    ) -> int:
        """Join what a peer says of one bucket; without room for a new one nothing is kept.

        Args:
            limit: what `limit_of_key` says of the key.
            base: its deficit scaled by the period of that limit.
            replicated: as for `bucket`.
            sender: whose word it is; None when that is not known.

        Returns:
            The number of entries that told something new.
        """
        try:
            bucket = self.bucket(key, limit, now_us, replicated=replicated)
        except StoreFull:
            self.refused_keys += 1
            return 0
        if base is not None:
            bucket.merge_base(base, now_us)
        if sender is not None:
            bucket.correct(sender, entries, now_us)
        return bucket.merge(entries, now_us)

    def drain_changes(self, most: int | None = None) -> list[tuple[Bucket, list[int]]]:
        """Buckets with the own slots written since they were last drained, in the order of the first of these writes.

        Args:
            most: buckets; None for all.
        """
        changed = [(bucket, bucket.drain_changed_slots()) for bucket in self.journal.buckets[:most]]
        # Emptied in place: every bucket holds it.
        del self.journal.buckets[:most]
        return changed

    def go_back(self, origin: Origin) -> None:
        """The clock was set back: from now on this replica writes as another life of it. Each bucket notices by itself,
        when it is used next. No level rises by it, and nothing that was taken is forgotten.

        Args:
            origin: the same node, and an incarnation that was never used before.
        """
        self.origin = self.journal.origin = origin

    def sweep(self, now_us: int, most: int) -> int:
        """Look at the next `most` buckets in turn and drop the idle ones; a call resumes where the last one stopped.

        Returns:
            The number of buckets dropped.
        """
        dropped = 0
        for _ in range(min(most, len(self._buckets))):
            while not self._to_sweep:
                self._to_sweep.extend(self._buckets.shards[self._next_shard].values())
                self._next_shard = (self._next_shard + 1) % SHARDS
            bucket = self._to_sweep.pop()
            if bucket.is_idle(now_us):
                del self._buckets[bucket.key]
                self.room.give_back(bucket.key)
                dropped += 1
        self.evicted += dropped
        if self.room.is_ample:
            self.full_since_us = None
        return dropped


def _make_bucket(key: bytes, limit: AnyLimit, origin: Origin, now_us: int, journal: Journal | None) -> Bucket:
    if isinstance(limit, Limit):
        return TokenBucket(key, limit, origin, now_us, journal)
    if limit.window is Window.FIXED:
        return FixedWindow(key, limit, origin, now_us, journal)
    return SlidingWindow(key, limit, origin, now_us, journal)
