"""Which buckets a sidecar shares, shard by shard, what it tells of them and what it joins of the answers. No I/O.

A bucket is *busy* until 1 s after something was taken here, and asked about at each tick. Then it *rests*: it is asked
about once a second, and after 10 s no more. What is told is kept until it is answered: what failed is told again.

A tick asks about a limited number, of more in turn. First come some of each limit that were not busy before, or are
nearly used up; the latter get room before others, too. So whoever invents keys keeps no other limit from being shared.
Room and turns are of all shards together, since callers can choose keys of one shard.

All work is cut into batches, so that no tick has the loop to itself for long.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

from ratelimit_sidecar.crdt.bucket import Bucket, Origin
from ratelimit_sidecar.crdt.journal import UrgentBuckets, is_nearly_used_up
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.cycle_collector import young_objects
from ratelimit_sidecar.fabric.record import OTHERS, base_text, counts_of, read_counts, room_for, share_text
from ratelimit_sidecar.persistence.redis_record import BadRecord
from ratelimit_sidecar.persistence.write_queue import Slots, join_slots
from ratelimit_sidecar.replication.deltas import MAX_KEY_BYTES

BATCH_BUCKETS: Final = 64
"""The most buckets of one call: a millisecond of the server's."""

BATCH_BYTES: Final = 16_384
"""About the most bytes of one call: after a loss all slots are told again, of some buckets hundreds, each 10 us of the
server's."""

BUSY_US: Final = 1_000_000
SHARED_FORGOTTEN_US: Final = 10_000_000

RESTING_TICKS: Final = 20
"""A bucket that rests is asked about at one tick in so many; so is a shard without any, whether it has lost its data.
"""

MAX_SHARED: Final = 30_000
"""Buckets, some 400 bytes each: a dict of more takes milliseconds when it grows. For a further one the bucket
that rests the longest is forgotten. When none rests, a bucket that is queued as nearly used up, or of which more is
taken than of a busy one, takes the place of that one; others are not shared."""

TICKS_OF_ALL: Final = 30
"""Ticks that it takes to ask about all of `MAX_SHARED` busy buckets. So a tick of 1,000 takes about its 50 ms of Redis,
and a bucket that gets nearly used up does not wait for a longer tick."""

RESTING_PART: Final = 4
"""Resting ones are at most one in so many of the buckets that a tick asks about."""

AMPLE_SHARE: Final = 0.85
"""What found no room is told once fewer than this part of the places have a busy bucket."""

LOOKED_AT: Final = 8
"""So many busy buckets are looked at, in the shard with the most, those not asked about for longest. The one of which
least is taken makes room."""

_OBJECTS: Final = 2
"""How many objects of a shared bucket the cycle collector sees."""


@dataclass(slots=True)
class _Shared:
    """A bucket that is shared now, and how much of it Redis and this sidecar know.

    Args:
        bucket: that was asked about last; a newer bucket of the same key has nothing yet of what others took.
        used_us: when something was taken last.
        era: the `Sharing._era` in which it was told last; in another one all of it is told.
        seen: the version up to which the others' counts are known.
        id: of the bucket in Redis; another one means that it was lost there.
        waiting: own slots to be told.
        is_urgent: it is in the queue of those that are nearly used up.
        is_refused: Redis had no room for all of it, which is told again.
        has_news: the latest answer had some; Redis is not told yet when the bucket is full with them.
        base: what was sealed when the others' counts were last answered. Seals move on meanwhile, past slots of others
            that are not known yet; so that one is told.
    """

    bucket: Bucket
    used_us: int
    era: int = -1
    seen: int = 0
    id: bytes = b""
    waiting: Slots = field(default_factory=list)
    is_urgent: bool = False
    is_refused: bool = False
    has_news: bool = True
    base: str = ""


@dataclass(frozen=True, slots=True)
class Ask:
    """What a call asks about one bucket. `told` are the slots in `text`."""

    bucket: Bucket
    shared: _Shared
    told: Slots
    text: bytes


class SharedRoom:
    """How many buckets a sidecar shares at once, of all shards, and how many of each a tick asks about.

    Args:
        max_buckets: buckets at once.
    """

    def __init__(self, max_buckets: int = MAX_SHARED) -> None:
        self.max_buckets: Final = max_buckets
        self.has_missed = False
        """Some bucket found no room, or made room for another, and was not told."""
        self._shards: list[Sharing] = []

    def add(self, shard: Sharing) -> None:
        self._shards.append(shard)

    @property
    def taken(self) -> int:
        """How many are shared; O(shards)."""
        return sum([len(shard) for shard in self._shards])

    @property
    def is_ample(self) -> bool:
        """True when further buckets find room without another one of use having to go."""
        return sum([shard.busy for shard in self._shards]) < self.max_buckets * AMPLE_SHARE

    def make_room_for(self, bucket: Bucket, *, is_urgent: bool) -> bool:
        """Have room for one more bucket; returns False when the others are of more use. O(shards)."""
        if self.taken < self.max_buckets:
            return True
        longest = max(self._shards, key=_resting_of)
        if longest.resting:
            longest.forget_resting()
            return True
        self.has_missed = True
        return max(self._shards, key=_busy_of).push_out(bucket, is_urgent=is_urgent)

    def begin_tick(self, *, is_last: bool = False) -> None:
        """Begin a tick.

        Args:
            is_last: the sidecar stops: ask about all that are busy.
        """
        busy = max(sum([shard.busy for shard in self._shards]), 1)
        tick_buckets = max(self.max_buckets // TICKS_OF_ALL, BATCH_BUCKETS)
        for shard in self._shards:
            part = tick_buckets * shard.busy // busy
            shard.begin_tick(self.max_buckets if is_last else max(part, BATCH_BUCKETS))


class Sharing:
    """The buckets that a sidecar shares in one shard: what it tells of them, and what it joins of the answers.

    Args:
        origin: of this life of the sidecar, under whose name Redis has the counts.
        room: of all shards.
    """

    def __init__(self, store: Store, origin: Origin, room: SharedRoom) -> None:
        self._store = store
        self._origin = origin
        self._room = room
        room.add(self)
        self._busy = OrderedDict[bytes, _Shared]()
        self._resting = OrderedDict[bytes, _Shared]()
        self._urgent = UrgentBuckets()
        self._left: tuple[int, int] = (0, 0)
        """Busy and resting ones that this tick still has to ask about."""
        # The first tick asks, so that it is known whether there is a server.
        self._unanswered_ticks = RESTING_TICKS
        self.has_to_ask = False
        """The shard is to be asked at this tick, even if it is about no bucket."""
        self._is_behind = False
        """More are busy than a tick asks about."""
        self._era = 0
        self._epoch = b""
        self._version = 0
        self.unshared = 0
        """Changes of buckets for which there was no room."""
        self.no_room = 0
        """Answers that there was no room in Redis."""

    def __len__(self) -> int:
        return len(self._busy) + len(self._resting)

    @property
    def busy(self) -> int:
        return len(self._busy)

    @property
    def resting(self) -> int:
        return len(self._resting)

    def note(self, bucket: Bucket, slots: Slots, now_us: int) -> None:
        """Keep in mind that own slots of this bucket changed."""
        key = bucket.key
        shared = self._busy.get(key)
        is_urgent = shared is not None and shared.is_urgent
        if not is_urgent and is_nearly_used_up(bucket):
            is_urgent = self._urgent.add(bucket)
        if shared is None:
            shared = self._resting.pop(key, None)
            if shared is None:
                if len(key) > MAX_KEY_BYTES or not self._room.make_room_for(bucket, is_urgent=is_urgent):
                    self.unshared += 1
                    return
                shared = _Shared(bucket, now_us)
                young_objects.note(_OBJECTS)
            self._busy[key] = shared
            if not is_urgent:
                # It is not known, or was a while ago, what others took of it.
                self._urgent.add(bucket)
        shared.used_us = now_us
        shared.is_urgent = is_urgent
        shared.waiting = join_slots(shared.waiting, slots)

    def forget_resting(self) -> None:
        """Forget the bucket that rests the longest. There must be one."""
        self._resting.popitem(last=False)

    def push_out(self, bucket: Bucket, *, is_urgent: bool) -> bool:
        """Forget a busy bucket of less use than this one; returns False when there is none. One must be busy."""
        looked_at = islice(self._busy.items(), LOOKED_AT)
        _, part, key = max((not shared.is_urgent, _part_left(shared.bucket), key) for key, shared in looked_at)
        if not is_urgent and part <= _part_left(bucket):
            return False
        del self._busy[key]
        self.unshared += 1
        return True

    def note_own(self, bucket: Bucket, now_us: int) -> None:
        """Have all own counts of this bucket told, and its base, if there are any."""
        # A bucket that is never replicated has no journal.
        if not bucket.is_replicated or (bucket.base_to_send is None and not self._own_counts(bucket, None)):
            return
        shared = self._busy.get(bucket.key) or self._resting.get(bucket.key)
        if shared is None:
            # That is no use of it: it is told, and then forgotten.
            self.note(bucket, None, now_us - SHARED_FORGOTTEN_US)
        else:
            shared.waiting = join_slots(shared.waiting, None)

    def tell_again(self) -> None:
        """The server may have lost what it was told: everything of the buckets in use is told and asked for again."""
        self._era += 1
        self._version = 0

    def begin_tick(self, max_buckets: int) -> None:
        """Begin to ask about so many busy buckets."""
        self._is_behind = len(self._busy) > max_buckets
        resting = -(-len(self._resting) // RESTING_TICKS)
        self._left = min(len(self._busy), max_buckets), min(resting, max_buckets // RESTING_PART)
        self._unanswered_ticks += 1
        self.has_to_ask = self._unanswered_ticks >= RESTING_TICKS

    def skip_tick(self) -> None:
        """The shard cannot be asked at this tick; all of it is told again."""
        self._left = 0, 0
        self.has_to_ask = False
        self.tell_again()

    def next_key(self) -> bytes | None:
        """The next bucket that this tick asks about; None when there is none. Pass it to `ask`."""
        busy, resting = self._left
        if busy > 0 and self._busy:
            self._left = busy - 1, resting
            urgent = self._next_urgent()
            return next(iter(self._busy)) if urgent is None else urgent
        if resting > 0 and self._resting:
            self._left = 0, resting - 1
            return next(iter(self._resting))
        return None

    def _next_urgent(self) -> bytes | None:
        while self._urgent:
            key = self._urgent.pop().key
            # It may have made room for another one.
            if key in self._busy:
                return key
        return None

    def ask(self, key: bytes, now_us: int) -> Ask | None:
        """What to ask about this bucket, if anything. It has to be `answered`, or to have `failed`, in the end."""
        shared = self._busy.get(key)
        was_busy = shared is not None
        if shared is None:
            shared = self._resting.pop(key)
        bucket = self._store.get(key)
        if bucket is None:
            # It was full, and dropped.
            self._busy.pop(key, None)
            return None
        # The clock may have been set back.
        shared.used_us = min(shared.used_us, now_us)
        unused_us = now_us - shared.used_us
        if unused_us >= SHARED_FORGOTTEN_US and shared.waiting == []:
            self._busy.pop(key, None)
            return None
        shared.is_urgent = False
        # While there is much to tell, who was told makes way. With its next change it is busy again.
        is_busy = unused_us <= BUSY_US and not self._is_behind
        # Last in its turn.
        if was_busy and is_busy:
            self._busy.move_to_end(key)
        else:
            self._busy.pop(key, None)
            (self._busy if is_busy else self._resting)[key] = shared
        if shared.era != self._era or shared.bucket is not bucket:
            shared.bucket, shared.era, shared.seen, shared.waiting = bucket, self._era, 0, None
            # All that is older than the horizon is then before the base, and so answered with what was taken here.
            bucket.seal(now_us)
            shared.base = base_text(bucket)
        if shared.is_refused:
            shared.is_refused, shared.waiting = False, None
        told, shared.waiting = shared.waiting, []
        room = room_for(bucket, self._store.places.rule_key)
        is_quiet = not shared.has_news and told == []
        own = self._own_counts(bucket, told)
        text = share_text(bucket, room, own, now_us, seen=shared.seen, base=shared.base, is_quiet=is_quiet)
        return Ask(bucket, shared, told, text)

    def _own_counts(self, bucket: Bucket, slots: Slots) -> Mapping[int, int]:
        if slots is not None and self._store.origin is self._origin:
            return {slot: tokens for _, slot, tokens in bucket.own_entries(slots)}
        if slots is None or slots:
            # With those of origins from before a step of the clock back.
            return counts_of(bucket, OTHERS, slots)
        return {}

    def check(self, epoch: object, version: object) -> bool:
        """Check the head of an answer; `answered` is to be called for each bucket in it.

        Returns:
            False when the server has lost its data: then buckets that are not in use are to be told again, too.

        Raises:
            BadRecord: it is malformed.
        """
        if not isinstance(epoch, bytes) or not isinstance(version, int):
            raise BadRecord("an answer of another script")
        self._unanswered_ticks, self.has_to_ask = 0, False
        is_lost = bool(self._epoch) and (epoch != self._epoch or version <= self._version)
        if is_lost:
            self.tell_again()
        self._epoch, self._version = epoch, version
        return not is_lost

    def answered(self, ask: Ask, text: bytes, now_us: int) -> None:
        """Join what the others took.

        Raises:
            BadRecord: the answer is malformed. The bucket is told again at its next turn.
        """
        shared, bucket = ask.shared, ask.bucket
        is_refused = text.startswith(b"-")
        identity, _, rest = text[is_refused:].partition(b";")
        is_partial = bool(shared.id) and identity != shared.id
        shared.id = identity
        try:
            if rest != b";":
                others = read_counts(rest, bucket.limit, OTHERS, now_us, bucket.base.boundary_us)
                self._store.join(bucket.key, bucket.limit, others.base, others.entries, now_us)
                for base in () if shared.seen else others.other_bases:
                    self._store.join(bucket.key, bucket.limit, base, (), now_us)
                self.unshared += self._store.take_refused()
                # They add to what was sealed here, and of two bases only the larger one counts.
                is_partial = is_partial or (shared.seen > 0 and others.is_folded)
        except BadRecord:
            self.refused(ask)
            raise
        self.no_room += is_refused
        shared.is_refused = is_refused
        shared.has_news = not rest.endswith(b";")
        if is_partial:
            shared.era = -1
        else:
            if not shared.seen and bucket.base_to_send is not None:
                # Redis has not joined its base, as it did not know the slots of others.
                shared.waiting = None
            shared.seen = self._version
            shared.base = base_text(bucket)

    def refused(self, ask: Ask) -> None:
        """Note that Redis could not share the bucket: while it is in use, all of it is told again at each turn."""
        ask.shared.era = -1

    def failed(self, asks: Sequence[Ask]) -> None:
        """Note that no answer has come: what these asks told is told again."""
        for each in asks:
            each.shared.waiting = join_slots(each.shared.waiting, each.told)


def _busy_of(shard: Sharing) -> int:
    return shard.busy


def _resting_of(shard: Sharing) -> int:
    return shard.resting


def _part_left(bucket: Bucket) -> float:
    return bucket.remaining / max(bucket.limit.capacity, 1)
