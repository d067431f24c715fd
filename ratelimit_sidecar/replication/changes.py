"""What this node took, in the order in which it changed: one log for all peers.

A flush moves the changed buckets from the store's journal into *segments*, numbered 1, 2, 3 ... A segment is the keys
of up to 256 buckets and, encoded once, the Deltas that tell of them. A peer is a *cursor*: the number of the segment
that it is sent next. Peers that keep up are all sent the same bytes, of the newest segments. Older ones are only an
index: what changed since a peer's cursor, each bucket once and with its newest counts (`keys`). What is older than
`RETENTION_US`, or more than `MAX_CHANGES`, is forgotten; who has not been sent it needs a snapshot.

Only own changes are in here. What others took they send themselves; to note that as well would cost every node, for
each peer that it receives from, as much as to apply it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

from ratelimit_sidecar.crdt.bucket import Bucket
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.replication.deltas import MAX_KEY_BYTES, NO_KEYS_USED, DeltasWriter, KeyTableUse
from ratelimit_sidecar.replication.key_ids import KeyIdsGiven
from ratelimit_sidecar.replication.pace import Steps
from ratelimit_sidecar.replication.parts import MAX_PART_ENTRIES, NOTHING, Parts, own_part

MAX_BATCH_BUCKETS: Final = 256
MAX_BATCH_ENTRIES: Final = 1_024
MAX_BATCH_BYTES: Final = 1 << 16
"""The bounds of a batch; that of bytes is rough. Together they keep it to some milliseconds of its receiver's work."""

ENCODED_SEGMENTS: Final = 1_024
ENCODED_BYTES: Final = 4 << 20
"""The newest segments are kept encoded: at most so many, with so many bytes together. A peer far away is sent only
`outbox.MAX_UNACKNOWLEDGED_BUCKETS` ahead of what it has acknowledged; when many change it is a hundred segments behind,
and has to find them encoded.
"""

CATCH_UP_MARGIN_US: Final = 1_000_000
"""A peer that catches up is also sent what was written up to a second before its cursor, because the clock may have
stood still. Counts that it has already do no harm.
"""

RECENT_CHANGES_US: Final = 10_000_000
"""A node that starts gets a snapshot of everything from one peer. Each other peer sends what it took itself within this
time, which the first may not have received yet.
"""

RETENTION_US: Final = 2 * RECENT_CHANGES_US
"""Twice as long, so that a snapshot of recent changes that takes up to RECENT_CHANGES_US still finds them. (A stream
whose peer acknowledges nothing for that long is closed.)
"""

MAX_CHANGES: Final = 1 << 19
"""Keys in all segments: 26,000 changed buckets a second for as long as they are kept, and some 50 MB."""

FLUSH_STEP_BUCKETS: Final = 16
"""Buckets in one step of a flush: at most 0.1 ms of work."""

FORGOTTEN_SEGMENTS: Final = 2
"""The most old segments forgotten for each new one, and once more at the end of a flush."""

MAX_SEEN: Final = 16_384
"""So many keys are remembered as sent while a peer catches up: a larger set takes milliseconds to grow."""


class Forgotten(Exception):
    """The log does not go back so far any more."""


class Segment:
    """Changes of up to 256 buckets.

    Args:
        changes_before: keys in all segments before it.
        created_us: not later than the first of its changes.
    """

    def __init__(self, number: int, changes_before: int, created_us: int) -> None:
        self.number = number
        self.flush = 0
        """The number of the flush that its changes are of."""
        self.changes_before = changes_before
        self.created_us = created_us
        self.closed_at_us = 0
        self.keys: list[bytes] = []
        self.entries = 0
        """Slot entries in it."""
        self.payload: bytes | None = None
        """Deltas without a sequence; None when it is not encoded, or no more."""
        self.key_use: KeyTableUse = NO_KEYS_USED
        """What a stream has to know to understand the payload."""


class ChangeLog:
    """This node's changes, as numbered segments. A flush adds some; each peer reads them through a `Cursor`.

    Args:
        now_us: the start of the process, or near it.
        max_changes: keys in all segments that are kept.
    """

    def __init__(self, store: Store, now_us: int, *, max_changes: int = MAX_CHANGES) -> None:
        self._store = store
        self._max_changes = max_changes
        self.on_changes: list[Callable[[Sequence[tuple[Bucket, list[int]]]], object]] = []
        """Each is called with the buckets of a flush, step by step, and their own slots that changed. It must do no
        I/O."""
        self._segments: deque[Segment] = deque()
        self._key_ids = KeyIdsGiven()
        self._open = Segment(1, 0, now_us)
        """The segment that takes changes; not in `_segments` yet."""
        self._writer: DeltasWriter | None = None
        """Encodes the open segment; None while there is no peer."""
        self._has_peers = False
        """Whether there was a stream to a peer when the last flush began."""
        self._flushed_us = self._created_us = now_us
        """When the last flush began, and the one before."""
        self._first_encoded = 1
        """No segment with a smaller number is encoded."""
        self._encoded_bytes = 0
        """The bytes of all encoded segments together."""
        self._flush = self._last_flush = 0
        """The numbers of the newest flush, and of the newest that found changes."""
        self._unflushed = 0
        """Buckets that were in the journal when the flush under way began, and are so still."""

    @property
    def end(self) -> int:
        """The number of the segment that changes go to now: the cursor of a peer that has been sent everything."""
        return self._open.number

    @property
    def newest(self) -> int:
        """The number of the newest segment that has any changes."""
        return self._open.number if self._open.keys else self._open.number - 1

    def get(self, number: int) -> Segment | None:
        """None for one that is forgotten, or not there yet."""
        if not self._segments:
            return None
        index = number - self._segments[0].number
        return self._segments[index] if 0 <= index < len(self._segments) else None

    def is_overtaken(self, number: int) -> bool:
        """Whether a flush after that of this segment has found changes: these may be newer counts of the same buckets,
        which other nodes may have heard and passed on.
        """
        segment = self.get(number)
        return segment is None or segment.flush < self._last_flush

    def changes_since(self, cursor: int) -> int:
        """How many changed buckets a peer has yet to be sent; one that changed in many segments may count for each."""
        unsealed = len(self._open.keys)
        if cursor >= self.end:
            return unsealed
        # How many changes the forgotten segments had is not known, only that there were some.
        segment = self.get(cursor) or (self._segments[0] if self._segments else None)
        sealed = 1 if segment is None else self._open.changes_before - segment.changes_before
        return sealed + unsealed

    def flush_steps(self, now_us: int, *, has_peers: bool) -> Steps:
        """Move what changed into segments, in steps. What changes meanwhile is for the next flush.

        Args:
            has_peers: there is a stream to a peer; otherwise nothing is encoded.
        """
        # Nobody has noted when each change was made, only that it was not before the last flush.
        if not self._unflushed:
            self._created_us = self._flushed_us
        self._flushed_us = now_us
        self._flush += 1
        if not self._open.keys:
            self._open.created_us = self._created_us
        self._has_peers = has_peers
        self._unflushed = len(self._store.journal.buckets)
        while self._unflushed > 0:
            changes = self._store.drain_changes(min(self._unflushed, FLUSH_STEP_BUCKETS))
            # Another flush, of a node that is stopping, may have come between two steps of this one.
            self._unflushed = self._unflushed - len(changes) if changes else 0
            for bucket, slots in changes:
                self._add(bucket, slots, now_us)
            for reader in self.on_changes:
                reader(changes)
            if self._unflushed:
                yield
        self._close(now_us)
        self._forget(now_us)

    def keys(self, first: int, end: int) -> Iterator[bytes | None]:
        """The keys that changed in the segments from `first` to before `end`; None in place of one of
        the last `MAX_SEEN` that came before.

        Raises:
            Forgotten: one of these segments is.
        """
        seen: set[bytes] = set()
        for number in range(first, end):
            segment = self.get(number)
            if segment is None:
                raise Forgotten
            for key in segment.keys:
                yield None if key in seen else key
                if len(seen) >= MAX_SEEN:
                    seen = set()
                seen.add(key)

    @property
    def created_us(self) -> int:
        """Not later than the first change in the segment that changes go to now."""
        return self._open.created_us

    def next_encoded(self, number: int) -> int:
        """The first segment from `number` on that is encoded, or the end."""
        number = max(number, self._first_encoded)
        while (segment := self.get(number)) is not None and segment.payload is None:
            number += 1
        return number

    def recent_from(self, now_us: int) -> int:
        """The first segment with changes of the last RECENT_CHANGES_US."""
        first = self._open.number
        for segment in reversed(self._segments):
            if segment.closed_at_us < now_us - RECENT_CHANGES_US:
                break
            first = segment.number
        return first

    def set_clock(self, now_us: int) -> None:
        """The clock was set, and nobody is connected: instants from before mean nothing any more."""
        self._segments.clear()
        self._key_ids = KeyIdsGiven()
        self._writer = None
        self._open = Segment(self._open.number + 1, self._open.changes_before + len(self._open.keys), now_us)
        self._flushed_us = self._created_us = now_us
        self._first_encoded, self._encoded_bytes = self._open.number, 0

    def _add(self, bucket: Bucket, slots: list[int], now_us: int) -> None:
        key = bucket.key
        if len(key) > MAX_KEY_BYTES or not slots:
            return
        segment = self._open
        if self._has_peers and not segment.keys:
            self._writer = DeltasWriter(self._store.origin, self._key_ids)
        writer = self._writer
        if writer is None:
            # Slots that were dropped meanwhile count too: to look each of them up is half of the work.
            segment.entries += len(slots)
        else:
            entries = list(bucket.own_entries(slots))
            if not entries:
                return
            segment.entries += len(entries)
            for start in range(0, len(entries), MAX_PART_ENTRIES):
                writer.add(bucket, None, entries[start : start + MAX_PART_ENTRIES])
        segment.keys.append(key)
        segment.flush = self._last_flush = self._flush
        is_full = len(segment.keys) >= MAX_BATCH_BUCKETS or segment.entries >= MAX_BATCH_ENTRIES
        if is_full or (writer is not None and writer.rough_bytes >= MAX_BATCH_BYTES):
            self._close(now_us)

    def _close(self, now_us: int) -> None:
        segment, writer = self._open, self._writer
        if not segment.keys:
            return
        self._writer = None
        if writer is not None:
            segment.payload = writer.payload()
            segment.key_use = writer.key_use()
            self._encoded_bytes += len(segment.payload)
        segment.closed_at_us = now_us
        self._segments.append(segment)
        changes = segment.changes_before + len(segment.keys)
        self._open = Segment(segment.number + 1, changes, self._created_us)
        self._forget(now_us)
        while self._encoded_bytes > ENCODED_BYTES or self._open.number - self._first_encoded > ENCODED_SEGMENTS:
            self._drop_encoding(self.get(self._first_encoded))
            self._first_encoded += 1

    def _drop_encoding(self, segment: Segment | None) -> None:
        if segment is not None and segment.payload is not None:
            self._encoded_bytes -= len(segment.payload)
            segment.payload, segment.key_use = None, NO_KEYS_USED

    def _forget(self, now_us: int) -> None:
        for _ in range(FORGOTTEN_SEGMENTS):
            oldest = self._segments[0] if self._segments else None
            # A segment from the future is forgotten, too: the clock was set back.
            if oldest is None or (
                abs(now_us - oldest.closed_at_us) <= RETENTION_US
                and self._open.changes_before - oldest.changes_before <= self._max_changes
            ):
                return
            self._drop_encoding(self._segments.popleft())


class EncodedSegments(NamedTuple):
    """Some segments, encoded once for all peers."""

    payload: bytes
    keys: list[bytes]
    entries: int
    first: int
    """The number of the oldest one."""


class Cursor:
    """How far one peer has come in the log.

    While it keeps up it is sent each segment as it is encoded for all. One that is behind the encoded segments catches
    up: it is sent each bucket that changed since its cursor, once and with its newest counts.

    Args:
        takes_key_ids: False for a peer whose protocol has no ids for keys: it is not sent encoded segments.
    """

    def __init__(self, store: Store, log: ChangeLog, *, takes_key_ids: bool) -> None:
        self._store = store
        self._log = log
        self._takes_key_ids = takes_key_ids
        self._known = 0
        """A bit for each key id (`key_ids`) whose key the stream has carried."""
        self._next = log.end
        """The segment that is sent next."""
        self._passed_us = log.created_us
        """Not later than the first change behind the cursor."""
        self._catching_up: Parts | None = None
        self.lost_since_us: int | None = None
        """Set when what changed since then is forgotten: the peer needs a snapshot."""

    @property
    def has_changes(self) -> bool:
        """True while there is a segment to be sent."""
        return self._next < self._log.end

    @property
    def pending(self) -> int:
        """About how many changed buckets are yet to be sent."""
        return self._log.changes_since(self._next)

    @property
    def created_us(self) -> int | None:
        """When the oldest change that is yet to be sent was made; None when there is none."""
        if not self.pending:
            return None
        segment = self._log.get(self._next)
        if segment is not None:
            return segment.created_us
        return self._passed_us if self.has_changes else self._log.created_us

    def take_encoded(self) -> EncodedSegments | None:
        """The next segments, which then are behind the cursor: as many as fit into a batch, so that a peer which has
        fallen back a little gets fewer, larger batches. None when it has to catch up."""
        if self._catching_up is not None or not self._takes_key_ids:
            return None
        keys: list[bytes] = []
        entries = 0
        payload = b""
        first = self._next
        while (segment := self._log.get(self._next)) is not None and segment.payload is not None:
            keys += segment.keys
            entries += segment.entries
            # Deltas of one sender, one after the other, are one Deltas.
            payload += segment.key_use.missing(self._known) + segment.payload
            self._known |= segment.key_use.all
            self._next += 1
            self._passed_us = segment.created_us
            following = self._log.get(self._next)
            if (
                following is None
                or len(keys) + len(following.keys) > MAX_BATCH_BUCKETS
                or entries + following.entries > MAX_BATCH_ENTRIES
                or len(payload) > MAX_BATCH_BYTES // 2
            ):
                break
        return EncodedSegments(payload, keys, entries, first) if keys else None

    def parts(self) -> Parts:
        """What the peer has to catch up with."""
        if self._catching_up is None:
            # The segments that it passes over give ids to keys, which it misses.
            self._known = 0
            self._catching_up = self._catch_up()
        return self._catching_up

    def close(self) -> None:
        """Call it when the stream is gone. It drops the generator, which refers to this cursor as the cursor refers to
        it: only a garbage collection would free the two."""
        self._catching_up = None

    def _catch_up(self) -> Parts:
        log = self._log
        end = log.next_encoded(self._next + 1) if self._takes_key_ids else log.end
        since_us = self.created_us or self._passed_us
        try:
            for key in log.keys(self._next, end):
                if key is None:
                    yield NOTHING
                else:
                    yield from own_part(self._store, key, since_us - CATCH_UP_MARGIN_US)
        except Forgotten:
            end = log.end
            self.lost_since_us = since_us
        last = log.get(end - 1)
        self._passed_us = since_us if last is None else last.created_us
        self._next = end
        self._catching_up = None
