"""All buckets of one replica, except strict ones (`ledger.py`), by bucket key.

Holds active buckets only: an idle one equals an absent one, so `sweep` drops it and no decision changes. Changes
collect in a journal that holds a bucket at most once. So the journal never has more entries than there are buckets,
even when nobody drains it.

Anybody can invent keys, so the number of buckets is bounded (`places`). No live bucket is dropped to make room, because
that would give its tokens back. Instead a new key gets no bucket: the caller takes from an overflow bucket that several
keys share, and what peers send about the key is ignored. `sweep` makes room again.

The slots of all buckets together are bounded, too. When there are too many, token buckets are sealed earlier than at
their horizon: then less of what a peer reports late counts in full (docs/algorithm.md). And when those of other origins
take too much memory, further ones are refused (`Journal.has_room`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from ratelimit_sidecar.crdt.bucket import Base, Bucket, Entry, Origin
from ratelimit_sidecar.crdt.journal import DEFAULT_MAX_RECEIVED_BYTES, Journal, is_nearly_used_up
from ratelimit_sidecar.crdt.limit import AnyLimit, TokenBucketLimit, Window, WindowLimit
from ratelimit_sidecar.crdt.places import BucketPlaces
from ratelimit_sidecar.crdt.token_bucket import Sealing, TokenBucket
from ratelimit_sidecar.crdt.untracked_dict import SHARDS, UntrackedDict
from ratelimit_sidecar.crdt.window import FixedWindow, SlidingWindow

DEFAULT_MAX_BUCKETS: Final = 1_000_000
"""About 0.44 GB of buckets with one slot each, the plans of their requests included (`benchmarks.keys`), and 1.6 GB
with as many slots as there may be, if no other node takes from them.
"""

SLOTS_A_BUCKET: Final = 4
"""There may be so many slots of token buckets for each of `max_buckets`. Otherwise a client who goes round through a
million keys, once in each slot, has each hold its whole horizon of 64 slots and more: 8 kB in place of 1.6
(docs/sizing.md).
"""

FIRST_SHIFT: Final = 3
MAX_SHIFT: Final = 6
"""How many times the horizon is halved at first, and at most: of 64 slots 8 are left, and then at least one."""

SAMPLE: Final = 16
LEAST_SAMPLE: Final = 100
"""So many buckets, and this part of all, say whether there are far too many slots."""

MAX_FIRST_OF_LIMIT: Final = 4_096
"""The most buckets of one limit that are written or told before all others, since they are nearly used up."""

RESTORED_ENTRIES: Final = 256
"""The most entries of one bucket joined in a piece."""

LimitOfKey = Callable[[bytes], AnyLimit | None]
"""The limit of a key that a peer or a record names; None when no rule here has such a bucket in the store in
question."""


class StoreFull(Exception):
    """There is no room for the bucket of a new key."""


class Store:
    """All active buckets of this replica, by bucket key.

    `bucket()` returns one and creates it if there is room; `join()` merges a peer's state. Call `sweep` regularly to
    drop idle buckets, and `drain_changes` to learn which buckets have changes to send.

    Args:
        origin: this replica.
        limit_of_key: called for keys that peers send.
        max_buckets: the most buckets at once; at least 1.
        max_received_bytes: see `Journal`.
        sliding_places: as how many of `max_buckets` a sliding window counts.
        rule_key: see `BucketPlaces`.
    """

    def __init__(
        self,
        origin: Origin,
        limit_of_key: LimitOfKey,
        *,
        max_buckets: int = DEFAULT_MAX_BUCKETS,
        max_received_bytes: int = DEFAULT_MAX_RECEIVED_BYTES,
        sliding_places: int = 1,
        rule_key: Callable[[bytes], bytes] = lambda _key: b"",
    ) -> None:
        self.origin = origin
        self.limit_of_key = limit_of_key
        self.places = BucketPlaces(max_buckets, rule_key)
        self.sliding_places = sliding_places
        self._buckets = UntrackedDict[Bucket]()
        self.journal = Journal(max_received_bytes)
        self._to_sweep: list[Bucket] = []
        self._next_shard = 0
        self.most_slots = SLOTS_A_BUCKET * max_buckets
        self.slots = 0
        """The slots of all token buckets, as of the last pass of `sweep` over all."""
        self.is_starting = False
        """True while state is read, and peers tell theirs. Until then nothing is forgotten early: what comes in of that
        time would count as forgotten."""
        self._slots_seen = self._looked = 0
        """In this pass: slots, and buckets."""
        self._has_shortened = False
        self.removals = 0
        """Idle buckets dropped since start. Plans keep their buckets while it is unchanged
        (`PlannedTake.store_version`), so whatever takes a bucket out of the store counts here."""
        self.refused_keys = 0
        """How often since start a peer's delta was ignored because its key got no bucket."""
        self.full_since_us: int | None = None
        """When a key first got no bucket; None once there is ample room again."""

    def __len__(self) -> int:
        return len(self._buckets)

    def __iter__(self) -> Iterator[Bucket]:
        return self.walk()

    def walk(self) -> Iterator[Bucket]:
        """Every bucket. The caller may pause between two; buckets added or dropped meanwhile may be left out or not."""
        for shard in self._buckets.shards:
            yield from list(shard.values())

    def nearly_used_up(self, now_us: Callable[[], int]) -> Iterator[Bucket | None]:
        """Walk to the buckets to be written first where there may be no time for all: those of which hardly anything
        is left, up to `MAX_FIRST_OF_LIMIT` of each limit. In place of each other bucket it yields None.
        """
        found = Counter[tuple[int, int]]()
        for bucket in self.walk():
            bucket.advance(now_us())
            limit = bucket.limit.capacity, bucket.limit.period_us
            if is_nearly_used_up(bucket) and found[limit] < MAX_FIRST_OF_LIMIT:
                found[limit] += 1
                yield bucket
            else:
                yield None

    def get(self, key: bytes) -> Bucket | None:
        return self._buckets.get(key)

    def bucket(self, key: bytes, limit: AnyLimit, now_us: int, *, replicated: bool = True) -> Bucket:
        """The bucket of `key`, created full when absent, enforcing `limit` from now on; O(1) unless the limit changed.

        Args:
            replicated: False for a bucket whose takes are not sent to peers. Only used when the bucket is created.

        Raises:
            StoreFull: there is none, and no room for one.
        """
        bucket = self._buckets.get(key)
        if bucket is None:
            if not self.places.take(key, self._places_of(limit), is_restored=self.journal.is_restoring):
                if self.full_since_us is None:
                    self.full_since_us = now_us
                raise StoreFull
            bucket = _make_bucket(key, limit, self.origin, now_us, self.journal if replicated else None)
            if replicated:
                bucket.room = self.places.room_of(key)
            self._buckets.add(key, bucket)
        elif bucket.limit is not limit and bucket.limit != limit:
            bucket.set_limit(limit, now_us)
        return bucket

    def join(
        self,
        key: bytes,
        limit: AnyLimit,
        base: Base | None,
        entries: Sequence[Entry],
        now_us: int,
        *,
        replicated: bool = True,
        corrector: Origin | None = None,
    ) -> int:
        """Merge a peer's state of one bucket. Nothing is kept when there is no room for a new bucket.

        Args:
            limit: the limit that `limit_of_key` returns for the key.
            base: its deficit is scaled by the period of that limit.
            replicated: as for `bucket`.
            corrector: the origin that sent it, if it may lower its own counts: see `Bucket.correct_by_sender`.

        Returns:
            The number of entries that were new.
        """
        try:
            bucket = self.bucket(key, limit, now_us, replicated=replicated)
        except StoreFull:
            self.refused_keys += 1
            return 0
        if base is not None:
            bucket.merge_base(base, now_us)
        if corrector is not None:
            bucket.correct_by_sender(corrector, entries, now_us)
        return bucket.merge(entries, now_us)

    def take_refused(self) -> int:
        """How many entries were refused since this was asked last, or since `Journal.refused` was cleared."""
        refused = self.journal.refused.total()
        self.journal.refused.clear()
        return refused

    def restore(
        self,
        key: bytes,
        limit: AnyLimit,
        base: Base,
        entries: Sequence[Entry],
        now_us: int,
        *,
        replicated: bool = True,
    ) -> Iterator[None]:
        """Join what was written down of a whole bucket, however long ago, in pieces; yields between two of them.

        Args:
            limit, replicated: as for `join`.
            base: as for `join`; `NO_BASE` when there was none.
        """
        sealing: Sealing | None = None
        if isinstance(limit, TokenBucketLimit):
            live = self._buckets.get(key)
            sealing = Sealing(limit, base, now_us, 0 if live is None else live.base.boundary_us)
        journal = self.journal
        left: Sequence[Entry] = entries
        while True:
            piece, left = left[:RESTORED_ENTRIES], left[RESTORED_ENTRIES:]
            joined = None
            if sealing is not None:
                piece = sealing.add(piece)
                joined = None if left else sealing.base
            journal.is_restoring = True
            try:
                self.join(key, limit, joined, piece, now_us, replicated=replicated)
            finally:
                journal.is_restoring = False
                # These counts are for data of peers.
                journal.refused.clear()
            if not left:
                return
            yield

    def clear(self) -> Iterator[None]:
        """Forget all buckets, in steps of some thousands; then the store must not be used any more.

        A store whose owners refer to each other would otherwise stay, since the cycle collector does not look for it
        (`app.GC_THRESHOLDS`); and to free a million buckets at once takes a tenth of a second.
        """
        self._to_sweep.clear()
        self.journal.forget()
        yield from self._buckets.clear()

    def drain_changes(self, max_buckets: int | None = None) -> list[tuple[Bucket, list[int]]]:
        """Buckets with the own slots written since they were last drained, in the order of the first of these writes.

        Args:
            max_buckets: buckets; None for all.
        """
        changed = [(bucket, bucket.drain_changed_slots()) for bucket in self.journal.buckets[:max_buckets]]
        # Emptied in place: every bucket holds it.
        del self.journal.buckets[:max_buckets]
        return changed

    def go_back(self, origin: Origin) -> None:
        """The clock was set back: from now on this replica writes under a new origin. Each bucket does so when it is
        used next. No level rises by it, and nothing that was taken is forgotten.

        Args:
            origin: the same node with a new incarnation.
        """
        self.origin = self.journal.origin = origin

    def sweep(self, now_us: int, max_buckets: int) -> int:
        """Look at the next `max_buckets` in turn, or fewer if they hold many slots, and drop the idle ones; a call
        resumes where the last one stopped. While all together have too many slots, it seals early.

        Returns:
            How many it has looked at; at least one, if there is one and `max_buckets` is not 0.
        """
        looked = 0
        left = max_buckets
        count = min(max_buckets, len(self._buckets))
        while left > 0 and looked < count:
            while not self._to_sweep:
                self._to_sweep.extend(self._buckets.shards[self._next_shard].values())
                self._next_shard = (self._next_shard + 1) % SHARDS
                if not self._next_shard:
                    self._end_pass()
            bucket = self._to_sweep.pop()
            looked += 1
            self._looked += 1
            left -= bucket.looks
            if self.journal.horizon_shift:
                bucket.shorten(now_us, self.journal.horizon_shift)
            if bucket.is_idle(now_us):
                del self._buckets[bucket.key]
                self.places.give_back(bucket.key, self._places_of(bucket.limit))
                self.removals += 1
                bucket.forget_slots()
            elif isinstance(bucket, TokenBucket):
                self._slots_seen += bucket.slots
        if self._looked >= max(len(self._buckets) // SAMPLE, LEAST_SAMPLE):
            # Twice as many, since a few hot keys may be among them.
            self._shorten_if_crowded(2 * self.most_slots)
        if self.journal.is_crowded and not self.is_starting:
            self.journal.horizon_shift = MAX_SHIFT
        if self.places.is_ample:
            self.full_since_us = None
        return looked

    def _places_of(self, limit: AnyLimit) -> int:
        is_sliding = isinstance(limit, WindowLimit) and limit.window is Window.SLIDING
        return self.sliding_places if is_sliding else 1

    def _end_pass(self) -> None:
        self._shorten_if_crowded(self.most_slots)
        self.slots = self._slots_seen
        journal = self.journal
        if journal.horizon_shift and self.slots < self.most_slots // 3 and not journal.is_crowded:
            journal.horizon_shift -= 1
        self._slots_seen = self._looked = 0
        self._has_shortened = False

    def _shorten_if_crowded(self, most_slots: int) -> None:
        """Halve the horizon, once in a pass, if by the buckets that were looked at all have more than `most_slots`:
        these are as good as drawn by lot."""
        has_too_many = self._slots_seen * len(self._buckets) > most_slots * self._looked
        if has_too_many and not self._has_shortened and not self.is_starting:
            self.journal.horizon_shift = min(max(self.journal.horizon_shift + 1, FIRST_SHIFT), MAX_SHIFT)
            self._has_shortened = True


def _make_bucket(key: bytes, limit: AnyLimit, origin: Origin, now_us: int, journal: Journal | None) -> Bucket:
    if isinstance(limit, TokenBucketLimit):
        return TokenBucket(key, limit, origin, now_us, journal)
    if limit.window is Window.FIXED:
        return FixedWindow(key, limit, origin, now_us, journal)
    return SlidingWindow(key, limit, origin, now_us, journal)
