"""What one peer has yet to hear: a set of buckets and slots, never a queue of messages.

Ten thousand takes on a bucket between two batches are one entry with the newest count, so an outbox is bounded by the
live buckets whatever the peer does. While a stream to the peer is there it holds

- own slots written since they were last sent (`changed`),
- others' slots that the peer would not hear of but through this node (`relayed`),
- buckets in which a comparison has found the peer to be wrong (`told`: all origins' entries and the base),
- at the stream's start, every bucket that may tell the peer something (`walk`).

Of a peer out of reach nothing is kept but since when it misses something: a bucket's slots say themselves when they
were written, so the walk of the next stream finds what is newer than that. A peer that never was told everything, or
has forgotten it in a restart, is told all there is.

Lag, by this node's clock alone: from the creation of the oldest delta unacknowledged to its acknowledgement.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from ratelimit_sidecar.crdt.bucket import Base, Bucket, Entry, Origin
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.replication.deltas import MAX_KEY_BYTES, DeltasWriter
from ratelimit_sidecar.replication.key_numbers import KeyNumbersGiven
from ratelimit_sidecar.replication.key_queue import KeyQueue
from ratelimit_sidecar.replication.pace import Pace
from ratelimit_sidecar.replication.recent import RECENT_US, RecentBuckets
from ratelimit_sidecar.replication.v1 import replication_pb2 as pb

MAX_BATCH_BUCKETS: Final = 256
MAX_BATCH_ENTRIES: Final = 1_024
MAX_BATCH_BYTES: Final = 1 << 16
"""Rough. Together these keep a batch to some milliseconds of work, which is done in pieces."""

MAX_DELTA_ENTRIES: Final = 256
"""Of one bucket at once: a bucket with 1,024 takes 2 ms to join."""

WALK_BUCKETS: Final = 512
"""Looked at for one batch of a walk: that takes a millisecond when none of them has anything to tell."""

WALK_BATCH_BUCKETS: Final = 128
"""Told of in whole in one batch: such batches follow each other, and the peer has decisions to make in between."""

FREED_BUCKETS: Final = 256
"""In one go, of what was to be told to a peer that is gone: an eighth of it at once has taken up to 18 ms."""

RESUME_MARGIN_US: Final = 2_000_000
"""A walk goes so far back behind the moment since when the peer misses something: others' slots are on their clocks,
and were heard of a while after they were written."""

LAG_SHOWN_US: Final = 60_000_000
"""So that a scraper with a usual interval sees the lag of a link that is seldom used."""

MAX_UNACKNOWLEDGED: Final = 32
"""Batches on their way: one every 20 ms fills them in 640 ms, longer than any two places on Earth are apart there and
back, so a flush never waits for an acknowledgement. 2 MiB a peer at worst."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One Deltas frame.

    Args:
        bucket_keys: of the buckets in it.
        entries: slot entries in it.
        created_us: of the oldest change in it; None when it tells of no change, only of state.
        begun_us: when the first of it was written.
        sent_us: when it was taken from the outbox.
        ends_full_state: with it the peer has heard everything known when the walk began.
    """

    frame: pb.Frame
    bucket_keys: tuple[bytes, ...]
    entries: int
    created_us: int | None
    begun_us: int
    sent_us: int
    ends_full_state: bool


@dataclass(slots=True)
class _Change:
    created_us: int
    slots: dict[int, None]


class _Draft:
    """A batch that is being written.

    Args:
        begun_us: when that began.
    """

    def __init__(self, writer: DeltasWriter, begun_us: int) -> None:
        self.writer = writer
        self.begun_us = begun_us
        self.created_us: int | None = None
        self.ends_full_state = False
        self.is_whole = False
        self.pace = Pace()


class Outbox:
    """What one peer has yet to hear."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._undelivered_since_us: int | None = None
        """The creation of the first own change that the peer cannot have heard; None when there is none."""
        self._is_open = False
        self._peer: Origin | None = None
        self._numbers: KeyNumbersGiven | None = None
        self._changed = KeyQueue[_Change]()
        self._relayed = KeyQueue[dict[tuple[Origin, int], None]]()
        self._told = KeyQueue[bool]()
        """The values are of no use."""
        self._undeliverable: list[KeyQueue[Any]] = []
        """What waited in them for a peer that is gone; none of them is empty."""
        self._walk: Iterator[Bucket] = iter(())
        self._walk_next: Bucket | None = None
        """The bucket that is looked at next; None when there is no walk, or it has ended."""
        self._walk_left = 0
        """About how many follow."""
        self._walk_since_us = 0
        self._walk_own_only = False
        self._walked_since_us = 0
        """The earliest of the walks not acknowledged."""
        self._walk_owed = False
        self._awaits_wish = False
        """True until the peer has said whether it wants to be told everything."""
        self._is_told_recent = False
        """True when it did not."""
        self._next_walk_since_us: int | None = None
        """Of a walk to follow the one under way."""
        self._rest: tuple[bytes, list[Entry]] | None = None
        """Of a bucket of which a part has been written."""
        self._is_told_all = False
        """True when the peer, as the process `_peer`, has once acknowledged everything there was."""
        self._missing_since_us = 0
        """While there is no stream: since when the peer may miss something that this node knows."""
        self._draft: _Draft | None = None
        # Not in the draft, which it refers to: nothing but a garbage collection would free the two.
        self._pieces: Iterator[None] = iter(())
        """Of the draft: those yet to be written."""
        self._in_flight: deque[Batch] = deque()
        self._acknowledged_us = 0
        self._last_lag_us = 0

    @property
    def pending_buckets(self) -> int:
        """Buckets of which the peer has something yet to be sent; 0 while it is out of reach."""
        walked = self._walk_left if self._walk_next is not None else 0
        drafted = 0 if self._draft is None else len(self._draft.writer.keys)
        return self._queued + walked + drafted

    @property
    def _queued(self) -> int:
        return len(self._changed) + len(self._relayed) + len(self._told) + (self._rest is not None)

    @property
    def _has_rest(self) -> bool:
        # Looked at in place, it would count as not changed since, and mypyc would fail when it has.
        return self._rest is not None

    @property
    def is_settled(self) -> bool:
        """True when everything noted so far has been acknowledged."""
        is_idle = self._draft is None and not self._in_flight
        return is_idle and not (self.pending_buckets or self._awaits_wish or self._walk_owed)

    @property
    def is_walking(self) -> bool:
        """True until the peer has acknowledged what the stream's start has to tell it."""
        is_waiting = self._awaits_wish or self._walk_owed
        is_drafted = self._draft is not None and self._draft.ends_full_state
        return is_waiting or is_drafted or any(batch.ends_full_state for batch in self._in_flight)

    def lag_us(self, now_us: int) -> int:
        """The age of the oldest change not acknowledged; with none, the lag of the batch acknowledged last.

        That is shown for `LAG_SHOWN_US`; on a quiet link there is nothing to lag behind.
        """
        oldest_us = self._oldest_unacknowledged_us()
        if oldest_us is not None:
            return now_us - oldest_us
        return self._last_lag_us if now_us - self._acknowledged_us < LAG_SHOWN_US else 0

    def is_behind(self, since_us: int) -> bool:
        """True when a change from before `since_us` is unacknowledged."""
        oldest_us = self._oldest_unacknowledged_us()
        return oldest_us is not None and oldest_us < since_us

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
            self._changed.add(bucket.key, _Change(created_us, dict.fromkeys(slots)))
        else:
            change.slots.update(dict.fromkeys(slots))

    def note_relayed(self, bucket: Bucket, entries: Iterable[Entry]) -> None:
        """These entries of others are news that the peer hears of from nobody else."""
        if self._is_open:
            slots = self._relayed.get(bucket.key)
            if slots is None:
                slots = {}
                self._relayed.add(bucket.key, slots)
            for entry in entries:
                slots[entry.origin, entry.slot] = None

    def tell(self, key: bytes) -> None:
        """The peer has to hear everything about one bucket."""
        if self._is_open and self._told.get(key) is None:
            self._told.add(key, True)

    def missed_since(self, since_us: int | None) -> None:
        """The peer is one that should have been reached: what it has not been told yet it has missed since then."""
        if not self._is_told_all:
            self._undelivered_since_us = _earlier(self._undelivered_since_us, since_us)

    def open(self, peer: Origin, *, compares: bool) -> None:
        """A stream to `peer` is there, which is told everything from now on.

        Args:
            compares: it speaks a protocol in which a walk may leave out what the peer was told on an earlier stream or
                by others (see `wish`), and keys have numbers.
        """
        assert not self._is_open
        self._is_open = True
        resumes = compares and self._is_told_all and self._peer == peer
        self._is_told_all = resumes
        self._peer = peer
        self._numbers = KeyNumbersGiven() if compares else None
        self._is_told_recent = False
        if resumes:
            self._start_walk(self._missing_since_us - RESUME_MARGIN_US)
        elif compares:
            self._awaits_wish = True
        else:
            self._start_walk(0)

    def wish(self, now_us: int, recent: RecentBuckets | None) -> None:
        """The peer, which this node has never told everything, wants to be told something.

        Args:
            recent: the buckets of which it wants to be told own takes of the last RECENT_US; None when it wants to be
                told everything.
        """
        if self._awaits_wish:
            self._awaits_wish = False
            self._is_told_recent = recent is not None
            if recent is None:
                self._start_walk(0)
            else:
                self._start_walk(now_us - RECENT_US, recent)
        elif recent is None and self._is_told_recent:
            # The one that told it is gone.
            self._is_told_recent = False
            self.walk_again(0)

    def close(self, now_us: int) -> None:
        """The stream is gone, and whatever was on its way may be lost."""
        self._undelivered_since_us = self._oldest_unacknowledged_us()
        undelivered_us = self._undelivered_since_us
        self._missing_since_us = now_us if undelivered_us is None else undelivered_us
        if self.is_walking and not self._awaits_wish:
            # It may miss what this walk should have told.
            self._missing_since_us = min(self._missing_since_us, self._walked_since_us + RESUME_MARGIN_US)
        if self._next_walk_since_us is not None:
            self._missing_since_us = min(self._missing_since_us, self._next_walk_since_us + RESUME_MARGIN_US)
        # What was passed on or told in these, of whatever age, is lost as well.
        if self._in_flight:
            self._missing_since_us = min(self._missing_since_us, self._in_flight[0].begun_us)
        if self._draft is not None:
            self._missing_since_us = min(self._missing_since_us, self._draft.begun_us)
        self._next_walk_since_us = None
        self._awaits_wish = False
        self._is_open = False
        self._undeliverable += [queue for queue in (self._changed, self._relayed, self._told) if queue]
        self._changed = KeyQueue[_Change]()
        self._relayed = KeyQueue[dict[tuple[Origin, int], None]]()
        self._told = KeyQueue[bool]()
        self._draft = None
        self._pieces = iter(())
        self._walk = iter(())
        self._walk_next = None
        self._walk_owed = False
        self._rest = None
        self._in_flight.clear()

    def forget_times(self) -> None:
        """The clock was set, and there is no stream: the peer is told everything anew."""
        assert not self._is_open
        self._is_told_all = False
        self._undelivered_since_us = None
        self._missing_since_us = self._acknowledged_us = 0

    def tidy(self) -> None:
        """Free a part of what a peer that is gone has not heard."""
        for _ in range(FREED_BUCKETS):
            if not self._undeliverable:
                return
            queue = self._undeliverable[-1]
            queue.pop()
            if not queue:
                self._undeliverable.pop()

    def walk_again(self, since_us: int) -> None:
        """The peer may have missed something since then: what it does not hear of from others any more."""
        if not self._is_open or self._awaits_wish:
            return
        if self._walk_owed:
            # It has passed some buckets already, and may not go back so far.
            self._next_walk_since_us = _earlier(self._next_walk_since_us, since_us)
        else:
            self._start_walk(since_us)

    def _start_walk(self, since_us: int, recent: RecentBuckets | None = None) -> None:
        self._walk_own_only = recent is not None
        self._walk = self._store.walk() if recent is None else filter(None, map(self._store.get, recent.keys()))
        self._walk_next = next(self._walk, None)
        self._walk_left = len(self._store if recent is None else recent)
        # One before may be unacknowledged: should the stream be lost, the next one begins as far back as that.
        self._walked_since_us = min(since_us, self._walked_since_us) if self.is_walking else since_us
        self._walk_since_us = since_us
        self._walk_owed = True

    def write(self, now_us: int) -> bool:
        """Write a piece of the next batch, which `take_written` returns once it is whole.

        Returns:
            False when there was nothing to write: it is whole already, there is nothing to tell, or enough is on its
            way.
        """
        if self._draft is None:
            has_news = self._walk_owed or self._queued > 0
            if not self._is_open or not has_news or len(self._in_flight) >= MAX_UNACKNOWLEDGED:
                return False
            self._draft = _Draft(DeltasWriter(self._store.origin, self._numbers), now_us)
            self._pieces = self._write(self._draft, now_us)
        elif self._draft.is_whole:
            return False
        for _ in self._pieces:
            return True
        self._draft.is_whole = True
        return True

    def take_batch(self, now_us: int) -> Batch | None:
        """The next batch; None when there is nothing to tell, or enough is on its way. Who has other things to do in
        between does it in pieces: `write`, then `take_written`.

        A batch of the full state may be empty: it has looked at a batch's worth of buckets and found them idle.
        """
        while self.write(now_us):
            pass
        return self.take_written(now_us)

    def take_written(self, now_us: int) -> Batch | None:
        """The batch that `write` has written; None when there is none, or it is not whole yet."""
        draft = self._draft
        if draft is None or not draft.is_whole:
            return None
        self._draft = None
        writer = draft.writer
        if not (writer.keys or draft.ends_full_state or self._walk_owed):
            return None
        batch = Batch(
            writer.frame,
            tuple(writer.keys),
            writer.entries,
            draft.created_us,
            draft.begun_us,
            now_us,
            draft.ends_full_state,
        )
        self._in_flight.append(batch)
        return batch

    def acknowledged(self, now_us: int) -> Batch:
        """The oldest batch on its way has been applied; returns it."""
        batch = self._in_flight.popleft()
        self._acknowledged_us = now_us
        self._last_lag_us = now_us - (batch.sent_us if batch.created_us is None else batch.created_us)
        if batch.ends_full_state:
            self._undelivered_since_us = None
            self._is_told_all = True
        return batch

    def _tellable(self, key: bytes) -> Bucket | None:
        """None when it was dropped meanwhile, or has a key that no peer takes."""
        return self._store.get(key) if len(key) <= MAX_KEY_BYTES else None

    def _write(self, draft: _Draft, now_us: int) -> Iterator[None]:
        """Write a batch; yields between its pieces."""
        writer = draft.writer
        # Half of each batch stays for what is told in whole, lest busy buckets keep it from ever ending.
        share = 2 if self._walk_owed or self._told or self._has_rest else 1
        yield from self._write_changes(draft, share)
        yield from self._write_rest(draft)
        yield from self._write_relayed(draft, share)
        most_keys = len(writer.keys) + WALK_BATCH_BUCKETS
        yield from self._write_told(draft, most_keys, now_us)
        if self._walk_owed:
            yield from self._write_walk(draft, most_keys, now_us)
            if self._walk_next is None and self._rest is None:
                self._walk_owed = False
                draft.ends_full_state = True
                writer.deltas.ends_full_state = True
                if self._next_walk_since_us is not None:
                    next_us, self._next_walk_since_us = self._next_walk_since_us, None
                    self._start_walk(next_us)

    def _write_changes(self, draft: _Draft, share: int) -> Iterator[None]:
        writer = draft.writer
        while self._changed and _has_room(writer, share):
            key, change = self._changed.pop()
            bucket = self._tellable(key)
            entries = [] if bucket is None else list(bucket.own_entries(change.slots))
            if bucket is not None and entries:
                writer.add(bucket, None, entries, is_told_often=True)
                draft.created_us = _earlier(draft.created_us, change.created_us)
            if draft.pace.ends_piece(len(entries)):
                yield

    def _write_relayed(self, draft: _Draft, share: int) -> Iterator[None]:
        writer = draft.writer
        while self._relayed and not self._has_rest and _has_room(writer, share):
            key, slots = self._relayed.pop()
            bucket = self._tellable(key)
            entries = [] if bucket is None else list(bucket.heard_entries(slots))
            if bucket is not None and entries:
                self._write_all_that_fit(writer, bucket, None, entries, is_told_often=True)
            if draft.pace.ends_piece(len(entries)):
                yield
            if self._has_rest:
                yield from self._write_rest(draft)

    def _write_rest(self, draft: _Draft) -> Iterator[None]:
        while self._rest is not None and _has_room(draft.writer):
            key, entries = self._rest
            self._rest = None
            bucket = self._store.get(key)
            if bucket is not None:
                self._write_all_that_fit(draft.writer, bucket, None, entries)
            yield

    def _write_told(self, draft: _Draft, most_keys: int, now_us: int) -> Iterator[None]:
        writer = draft.writer
        while self._told and not self._has_rest and _has_room(writer, most_keys=most_keys):
            key, _ = self._told.pop()
            before = writer.entries
            # Own takes too, which the peer may have forgotten: see `Bucket._recall`.
            self._write_whole(writer, key, 0, now_us, None)
            if draft.pace.ends_piece(writer.entries - before):
                yield
            if self._has_rest:
                yield from self._write_rest(draft)

    def _write_walk(self, draft: _Draft, most_keys: int, now_us: int) -> Iterator[None]:
        writer = draft.writer
        for _ in range(WALK_BUCKETS):
            bucket = self._walk_next
            if bucket is None or self._has_rest or not _has_room(writer, most_keys=most_keys):
                return
            self._walk_next = next(self._walk, None)
            self._walk_left = max(1, self._walk_left - 1)
            if bucket.journal is None:
                continue
            before = writer.entries
            if self._walk_own_only:
                self._write_own(writer, bucket)
            else:
                # The peer knows its own entries best.
                self._write_whole(writer, bucket.key, self._walk_since_us, now_us, self._peer)
            if draft.pace.ends_piece(writer.entries - before):
                yield
            if self._has_rest:
                yield from self._write_rest(draft)

    def _write_own(self, writer: DeltasWriter, bucket: Bucket) -> None:
        own = self._store.origin
        entries = [entry for entry in bucket.entries_since(self._walk_since_us) if entry.origin == own]
        if entries and self._tellable(bucket.key) is bucket:
            self._write_all_that_fit(writer, bucket, None, entries)

    def _write_whole(
        self, writer: DeltasWriter, key: bytes, since_us: int, now_us: int, all_but: Origin | None
    ) -> None:
        """Tell of one bucket all that may have been written since, but for what one origin took."""
        bucket = self._tellable(key)
        if bucket is None:
            return
        if bucket.base.boundary_us <= since_us and next(bucket.entries_since(since_us), None) is None:
            return
        # What was sealed after `since_us` is told in the base.
        bucket.seal(now_us)
        entries = [entry for entry in bucket.entries_since(since_us) if entry.origin != all_but]
        base = bucket.telling_base
        if base is not None and base.boundary_us <= since_us:
            base = None
        if entries or base is not None:
            self._write_all_that_fit(writer, bucket, base, entries)

    def _write_all_that_fit(
        self,
        writer: DeltasWriter,
        bucket: Bucket,
        base: Base | None,
        entries: list[Entry],
        *,
        is_told_often: bool = False,
    ) -> None:
        fitting = max(0, min(MAX_BATCH_ENTRIES - writer.entries, MAX_DELTA_ENTRIES))
        writer.add(bucket, base, entries[:fitting], is_told_often=is_told_often)
        if len(entries) > fitting:
            self._rest = (bucket.key, entries[fitting:])

    def _oldest_unacknowledged_us(self) -> int | None:
        oldest_us = self._undelivered_since_us
        for batch in self._in_flight:
            oldest_us = _earlier(oldest_us, batch.created_us)
        if self._draft is not None:
            oldest_us = _earlier(oldest_us, self._draft.created_us)
        if self._changed:
            oldest_us = _earlier(oldest_us, self._changed.oldest().created_us)
        return oldest_us


def _has_room(writer: DeltasWriter, share: int = 1, most_keys: int = MAX_BATCH_BUCKETS) -> bool:
    """True when the batch has not filled a `share`-th of any of its bounds."""
    return (
        len(writer.keys) * share < min(most_keys, MAX_BATCH_BUCKETS)
        and writer.entries * share < MAX_BATCH_ENTRIES
        and writer.rough_bytes * share < MAX_BATCH_BYTES
    )


def _earlier(one_us: int | None, other_us: int | None) -> int | None:
    if one_us is None or other_us is None:
        return one_us if other_us is None else other_us
    return min(one_us, other_us)
