"""The state of a region as its gateway holds it: the sums of its sidecars, as counts of one node, and what others took.
No I/O.

That node's name and incarnation are the same whoever the gateway is, and its counts only grow. So a gateway that
follows another tells the same once more, and nothing is counted twice.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from redis import exceptions

from ratelimit_sidecar.crdt.bucket import Bucket, Entry, Origin
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.fabric.record import counts_of, gateway_text, read_counts, room_for
from ratelimit_sidecar.fabric.scripts import FabricKeys
from ratelimit_sidecar.persistence.redis_calls import is_of_server
from ratelimit_sidecar.persistence.redis_record import BadRecord
from ratelimit_sidecar.persistence.time_slice import TimeSlice
from ratelimit_sidecar.replication.deltas import MAX_KEY_BYTES

TOLD_BUCKETS: Final = 64
"""The most buckets told by one call."""

MAX_NEWS: Final = 30_000
"""Buckets of a shard that wait to be told: a dict of more takes milliseconds when it grows. When there are more,
all buckets are told again later.
"""

MAX_NEWS_SLOTS: Final = 64
"""The most slots of one bucket that wait; of more, all are told."""


@dataclass(slots=True)
class News:
    """What other regions took, to be told to the fabric.

    Args:
        slots: by bucket; None for all.
    """

    slots: OrderedDict[bytes, set[int] | None] = field(default_factory=OrderedDict)

    def add(self, key: bytes, slots: set[int] | None) -> None:
        known = self.slots.setdefault(key, set())
        if known is not None:
            known |= slots or set()
            if slots is None or len(known) > MAX_NEWS_SLOTS:
                self.slots[key] = None


Told = dict[bytes, tuple[bytes, set[int] | None]]
"""What a call tells, by key: the text for the script, and the slots in it, as in `News`."""


class Shard:
    """What the gateway knows of one shard."""

    def __init__(self) -> None:
        self.since = 0
        """The version up to which all sums are known."""
        self.news = News()
        self._epoch = b""
        self._goal: int | None = None

    @property
    def is_known(self) -> bool:
        """True once all is known that was there when it was asked first, or again."""
        return self._goal is not None and self.since >= self._goal

    def read_again(self) -> None:
        """Read all sums again: the server may have lost some."""
        self.since, self._goal = 0, None

    def check(self, epoch: bytes, version: int) -> bool:
        """Check an answer's head; False when the server has lost its data: then the answer is not all that there is."""
        if self._goal is None:
            self._goal = version
        is_same = epoch == self._epoch and version > self.since
        is_first = not self._epoch
        self._epoch = epoch
        return is_same or is_first


class Region:
    """The region's state at its gateway. Call `note_news` with what other regions sent; at each tick send what `told`
    returns, and pass the answer to `answered`, or call `failed`.

    Args:
        store: of the region, which nobody else takes from.
        max_news: buckets of a shard that wait to be told.
    """

    def __init__(self, origin: Origin, store: Store, keys: FabricKeys, *, max_news: int = MAX_NEWS) -> None:
        self.origin = origin
        self.store = store
        # What the region takes has room as of a connected peer.
        store.journal.peers.add(origin)
        self.shards = [Shard() for _ in keys.shards]
        self.odd = 0
        """Buckets of the fabric that could not be read or written."""
        self.no_room = 0
        """Answers that there was no room in Redis for news."""
        self.unshared = 0
        """Entries of this region that the store had no room for."""
        self._keys = keys
        self._max_news = max_news
        self._again: Iterator[Bucket] | None = None
        """Buckets that are still to be told again."""
        self._missed = False
        """Some news found no room: all buckets are told once there is."""

    def note_news(self, bucket: Bucket, entries: Sequence[Entry]) -> None:
        """Keep in mind what a peer sent that is new here, to be told to the fabric."""
        slots = {entry.slot for entry in entries if entry.origin != self.origin}
        if slots and len(bucket.key) <= MAX_KEY_BYTES:
            news = self._news_of(bucket.key)
            if len(news.slots) < self._max_news:
                news.add(bucket.key, slots)
            else:
                self._missed = True

    def _news_of(self, key: bytes) -> News:
        return self.shards[self._keys.shard_of(key)].news

    def tell_again(self) -> None:
        """Tell and read everything again: the server may have lost some of it."""
        self._again = self.store.walk()
        for shard in self.shards:
            shard.read_again()

    def note_again(self) -> None:
        """Queue some more of the buckets that are to be told again."""
        if any(len(shard.news.slots) > self._max_news // 2 or not shard.is_known for shard in self.shards):
            return
        if self._missed and self._again is None:
            self._missed, self._again = False, self.store.walk()
        for _ in range(TOLD_BUCKETS):
            bucket = None if self._again is None else next(self._again, None)
            if bucket is None:
                self._again = None
                break
            self._news_of(bucket.key).add(bucket.key, None)

    async def told(self, shard: Shard, now_us: int) -> Told:
        """What the next call tells. If the call fails, pass it to `failed`."""
        told: Told = {}
        time_slice = TimeSlice()
        while shard.news.slots and len(told) < TOLD_BUCKETS:
            key, slots = shard.news.slots.popitem(last=False)
            bucket = self.store.get(key)
            if bucket is not None:
                counts = counts_of(bucket, self.origin, slots)
                if counts or bucket.base_to_send is not None:
                    room = room_for(bucket, self.store.places.rule_key)
                    told[key] = gateway_text(bucket, room, counts, now_us, has_base=shard.is_known), slots
            await time_slice.rest_when_due()
        return told

    def failed(self, shard: Shard, told: Told) -> None:
        """Queue again what a call that failed was to tell."""
        for key, (_, slots) in told.items():
            shard.news.add(key, slots)

    async def answered(
        self, shard: Shard, answer: Sequence[Any], now_us: int
    ) -> tuple[list[tuple[Bucket, list[Entry]]], bool]:
        """Join what this region's sidecars took.

        Returns:
            What is to be told to other regions, and whether there is more to be asked for at once.

        Raises:
            BadRecord: the answer is malformed.
        """
        try:
            epoch, until, version, replies, *found = answer
            until = int(until)
            names = list(zip(found[::2], found[1::2], strict=True))
            are_texts = all(isinstance(each, bytes) for each in (epoch, *replies, *found))
        except (TypeError, ValueError) as error:
            raise BadRecord("an answer of another script") from error
        if not are_texts or not isinstance(version, int):
            raise BadRecord("an answer of another script")
        failures = [each.decode(errors="replace") for each in (*replies, *found[1::2]) if each.startswith(b"!")]
        for failure in failures:
            if is_of_server(failure):
                # Nothing was missed: it is asked again from the same version on.
                raise exceptions.ResponseError(failure)
        self.odd += len(failures)
        self.no_room += replies.count(b"-")
        if not shard.check(epoch, version):
            self.tell_again()
            until = 0
        changes = []
        time_slice = TimeSlice()
        for key, text in names:
            if text.startswith(b"!"):
                continue
            try:
                limit = self.store.limit_of_key(key)
                if limit is not None:
                    sums = read_counts(text, limit, self.origin, now_us)
                    is_new = self.store.get(key) is None
                    self.store.join(key, limit, sums.base, sums.entries, now_us)
                    for base in sums.other_bases if is_new else ():
                        self.store.join(key, limit, base, (), now_us)
                    self.unshared += self.store.take_refused()
                    bucket = self.store.get(key)
                    if bucket is not None and sums.entries:
                        changes.append((bucket, sums.entries))
            except (BadRecord, ValueError):
                # A foreign name, or a malformed value.
                self.odd += 1
            await time_slice.rest_when_due()
        shard.since = until
        return changes, until < version
