"""What is yet to be sent to one peer, batch by batch.

While there is a stream to the peer, each batch comes from one of these, in turn:

- the change log (`changes`): the next segment as it is encoded for all, or what the peer has to catch up with;
- the side log (`side_log`): *repairs*, buckets that a comparison found to differ (all origins' entries and the base);
  what others took that no other node sends to the peer (*relayed*); and, while the peer has much else to be sent,
  buckets of which much was taken lately: whoever invents keys would hold those up;
- a *snapshot* (`snapshots`), at the stream's start and after a gap: all that was written since some instant.

Without a stream the outbox keeps only the instant since when the peer misses something. A bucket's slots say themselves
when they were written, so the next stream's snapshot finds what is newer, of all origins. A peer that never got
everything, or has forgotten it in a restart, gets all there is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from ratelimit_sidecar.crdt.bucket import Bucket, Entry, Origin
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.replication.changes import (
    MAX_BATCH_BUCKETS,
    MAX_BATCH_BYTES,
    MAX_BATCH_ENTRIES,
    ChangeLog,
    Cursor,
)
from ratelimit_sidecar.replication.deltas import DeltasWriter
from ratelimit_sidecar.replication.lag import Batch, InFlight, earlier
from ratelimit_sidecar.replication.pace import Pace, Steps
from ratelimit_sidecar.replication.parts import MAX_PART_ENTRIES, Parts
from ratelimit_sidecar.replication.side_log import SideLog
from ratelimit_sidecar.replication.snapshots import Snapshots
from ratelimit_sidecar.replication.v1 import replication_pb2 as pb

LOOKED_BUCKETS: Final = 512
"""The most buckets that are looked at for one batch: a millisecond when there is nothing to send of any."""

WHOLE_BATCH_BUCKETS: Final = 128
"""The most buckets in a batch of a snapshot or of the side log. Most are sent with all their entries, and
such batches follow each other: the peer has decisions to make in between."""

RESUME_MARGIN_US: Final = 2_000_000
"""A snapshot goes back so much further than to when the peer began to miss something: other nodes' slots are by their
own clocks, and were received a while after they were written."""

MAX_UNACKNOWLEDGED: Final = 256
"""The most batches on their way. Urgent flushes, 2 ms apart, fill them in 512 ms, longer than a round trip between any
two places on Earth, so a flush does not wait for an acknowledgement."""

MAX_UNACKNOWLEDGED_BUCKETS: Final = 32 * MAX_BATCH_BUCKETS
MAX_UNACKNOWLEDGED_BYTES: Final = 32 * MAX_BATCH_BYTES
"""When so much is on its way, no further batch is begun: changes then wait, and share a batch."""


_OVERTAKEN: Final = pb.Deltas(overtaken=True).SerializeToString()
"""Added to segments that were encoded before a batch that has been sent already, or before a later flush."""


@dataclass(slots=True)
class _Draft:
    """A batch that is being written.

    Args:
        created_us: of the oldest change in it.
    """

    writer: DeltasWriter
    begun_us: int
    created_us: int | None


@dataclass(slots=True)
class _Sources:
    """What the batches of one stream are taken from.

    Args:
        overtaken_until: the newest segment of the log when a batch was last written for this peer alone (to catch up,
            of the side log, or of a snapshot). That batch may have newer counts than encoded segments up to this one.
    """

    cursor: Cursor
    side: SideLog
    snapshots: Snapshots
    overtaken_until: int = 0

    def close(self) -> None:
        """Call it when the stream is gone."""
        self.cursor.close()
        self.side.close()
        self.snapshots.close()


class Outbox:
    """What is yet to be sent to one peer. Call `open` when there is a stream and `close` when it is gone; between them
    `write` until it returns False, send what `take_batch` returns, and call `acknowledged` for each batch applied."""

    def __init__(self, store: Store, log: ChangeLog) -> None:
        self._store = store
        self.log = log
        self._peer: Origin | None = None
        """Whose stream is open, or was last."""
        self._sources: _Sources | None = None
        """None while there is no stream."""
        self._turn = 0
        """Which source comes first in the next batch."""
        self._draft: _Draft | None = None
        # Not in the draft, which it refers to: nothing but a garbage collection would free the two.
        self._steps: Steps = iter(())
        self._written: Batch | None = None
        self._in_flight = InFlight()
        self._has_had_full_state = False
        """True when the peer, as the process `_peer`, has once acknowledged everything there was."""
        self._undelivered_since_us: int | None = None
        """The creation of the first own change that the peer cannot have received; None when there is none."""
        self._peer_misses_since_us = 0
        """While there is no stream: since when the peer may miss something that this node knows."""

    @property
    def pending_buckets(self) -> int:
        """About how many buckets the peer has yet to be sent something of; 0 while it is out of reach."""
        sources = self._sources
        if sources is None:
            return 0
        drafted = 0 if self._draft is None else len(self._draft.writer.keys)
        drafted += 0 if self._written is None else len(self._written.bucket_keys)
        # One that has changed often waits once.
        changed = min(sources.cursor.pending, len(self._store))
        return changed + sources.side.pending + sources.snapshots.pending + drafted

    @property
    def pending_changes(self) -> int:
        """About how many changes are yet to be sent; 0 while the peer is out of reach."""
        return 0 if self._sources is None else self._sources.cursor.pending

    @property
    def is_all_acknowledged(self) -> bool:
        """True when everything there was has been acknowledged."""
        sources = self._sources
        is_told = sources is None or not (
            sources.cursor.pending or sources.side.pending or self.has_unacknowledged_snapshot
        )
        return is_told and self._draft is None and self._written is None and not self._in_flight

    @property
    def has_unacknowledged_snapshot(self) -> bool:
        """True until the peer has acknowledged each snapshot that was begun on the stream, or is to be."""
        if self._sources is None:
            return False
        snapshots = self._sources.snapshots
        return snapshots.awaits_request or snapshots.peer_misses_since_us is not None

    def lag_us(self, now_us: int) -> int:
        """The sync lag: the age of the oldest change not acknowledged (see `InFlight.lag_us`)."""
        return self._in_flight.lag_us(self._oldest_unacknowledged_us(), now_us)

    def is_behind(self, since_us: int) -> bool:
        """True when a change from before `since_us` is unacknowledged."""
        oldest_us = self._oldest_unacknowledged_us()
        return oldest_us is not None and oldest_us < since_us

    def relay(self, bucket: Bucket, entries: Sequence[Entry]) -> None:
        """Relay these entries: they are news that no other node sends to the peer."""
        sources = self._sources
        if sources is not None and not sources.side.relay(bucket, entries):
            sources.snapshots.begin(sources.side.drop_relayed())

    def repair(self, key: bytes) -> None:
        """Send the peer everything about one bucket."""
        if self._sources is not None:
            self._sources.side.repair(key)

    def send_urgent(self, bucket: Bucket) -> None:
        """Send what this node just took from a bucket before all else that the peer has yet to be sent."""
        if self._sources is not None:
            self._sources.side.send_urgent(bucket)

    def snapshot(self, since_us: int) -> None:
        """Send a snapshot of what was written since then, some of which the peer may have missed."""
        if self._sources is not None:
            self._sources.snapshots.begin(since_us)

    def serve_request(self, now_us: int, *, recent: bool) -> None:
        """Begin to send the snapshot that the peer has asked for (see `Snapshots.serve_request`)."""
        if self._sources is not None:
            self._sources.snapshots.serve_request(now_us, recent=recent)

    def count_as_undelivered(self, since_us: int | None) -> None:
        """Count what the peer was not sent yet as undelivered since then: it is one that should have been reached."""
        if not self._has_had_full_state:
            self._undelivered_since_us = earlier(self._undelivered_since_us, since_us)

    def note_missed_by_peer(self, since_us: int) -> None:
        """Note that a peer without a stream has missed own changes since then."""
        if self._sources is not None:
            return
        # They may be older than the loss of the stream: a process that stood still had yet to flush them.
        self._peer_misses_since_us = min(self._peer_misses_since_us, since_us)
        if self._undelivered_since_us is None:
            self._undelivered_since_us = since_us

    def open(self, peer: Origin, *, compares: bool) -> None:
        """Begin to send to `peer`, to which there is a stream now.

        Args:
            compares: it speaks a protocol in which a snapshot may leave out what the peer was told on an earlier stream
                or by others (see `serve_request`), and keys have numbers.
        """
        assert self._sources is None
        self._has_had_full_state = compares and self._has_had_full_state and self._peer == peer
        self._peer = peer
        awaits_request = compares and not self._has_had_full_state
        self._sources = _Sources(
            Cursor(self._store, self.log, takes_key_ids=compares),
            SideLog(self._store),
            Snapshots(self._store, self.log, peer, awaits_request=awaits_request),
        )
        if not awaits_request:
            self.snapshot(self._peer_misses_since_us - RESUME_MARGIN_US if self._has_had_full_state else 0)

    def close(self, now_us: int) -> None:
        """Note that the stream is gone, and that whatever was on its way may be lost."""
        assert self._sources is not None
        self._undelivered_since_us = oldest_us = self._oldest_unacknowledged_us()
        missing_us = now_us if oldest_us is None else oldest_us
        untold_us = self._sources.snapshots.peer_misses_since_us
        if untold_us is not None:
            missing_us = min(missing_us, untold_us + RESUME_MARGIN_US)
        # What was relayed or repaired in these, of whatever age, is lost as well.
        begun_us = earlier(self._in_flight.begun_us, None if self._written is None else self._written.begun_us)
        begun_us = earlier(begun_us, None if self._draft is None else self._draft.begun_us)
        self._peer_misses_since_us = missing_us if begun_us is None else min(missing_us, begun_us)
        self._sources.close()
        self._sources = self._draft = self._written = None
        self._steps = iter(())
        self._in_flight.lost()

    def forget_times(self) -> None:
        """Begin anew, without a stream, after the clock was set: the peer will be sent everything."""
        assert self._sources is None
        self._has_had_full_state = False
        self._undelivered_since_us = None
        self._peer_misses_since_us = 0
        self._in_flight.forget_times()

    def write(self, now_us: int) -> bool:
        """Do a step towards the next batch, which `take_batch` returns once it is whole.

        Returns:
            False when there was nothing to do: it is whole already, there is nothing to tell, or enough is on its way.
        """
        sources = self._sources
        if sources is None or self._written is not None:
            return False
        if self._draft is None and not (self._has_room and self._begin(sources, now_us)):
            return False
        draft = self._draft
        if draft is None:
            # A segment, as it is encoded.
            return True
        for _ in self._steps:
            return True
        self._draft = None
        sources.overtaken_until = self.log.newest
        writer, ends_snapshot = draft.writer, sources.snapshots.take_end()
        if sources.cursor.lost_since_us is not None:
            sources.snapshots.begin(sources.cursor.lost_since_us)
            sources.cursor.lost_since_us = None
        if writer.keys or ends_snapshot:
            writer.deltas.ends_full_state = ends_snapshot
            self._written = Batch(
                writer.payload(),
                tuple(writer.keys),
                writer.entries,
                draft.created_us,
                draft.begun_us,
                now_us,
                ends_snapshot,
            )
        return True

    def take_batch(self) -> Batch | None:
        """The batch that `write` has written; None when there is none, or it is not whole yet."""
        batch, self._written = self._written, None
        if batch is not None:
            self._in_flight.sent(batch)
        return batch

    def acknowledged(self, now_us: int) -> Batch:
        """The oldest batch on its way has been applied; returns it."""
        batch = self._in_flight.acknowledged(now_us)
        if batch.ends_snapshot:
            self._undelivered_since_us = None
            self._has_had_full_state = True
            is_another_written = self._written is not None and self._written.ends_snapshot
            if self._sources is not None and not (self._in_flight.ends_snapshot or is_another_written):
                self._sources.snapshots.acknowledged()
        return batch

    @property
    def _has_room(self) -> bool:
        in_flight = self._in_flight
        return (
            len(in_flight) < MAX_UNACKNOWLEDGED
            and in_flight.buckets < MAX_UNACKNOWLEDGED_BUCKETS
            and in_flight.bytes < MAX_UNACKNOWLEDGED_BYTES
        )

    def _begin(self, sources: _Sources, now_us: int) -> bool:
        """Begin a batch of the source whose turn it is; False when none has anything to tell."""
        cursor, side, snapshots = sources.cursor, sources.side, sources.snapshots
        has_work = (cursor.has_changes, side.pending > 0, snapshots.is_owed)
        if not any(has_work):
            return False
        source = self._turn
        while not has_work[source]:
            source = (source + 1) % 3
        self._turn = (source + 1) % 3
        if source == 0:
            created_us = cursor.created_us
            encoded = cursor.take_encoded()
            if encoded is not None:
                payload, keys, entries, first = encoded
                if first <= sources.overtaken_until or self.log.is_overtaken(first):
                    payload += _OVERTAKEN
                self._written = Batch(payload, tuple(keys), entries, created_us, now_us, now_us, False)
                return True
            draft = _Draft(DeltasWriter(self._store.origin), now_us, created_us)
            self._steps = _fill_steps(draft.writer, cursor.parts(), MAX_BATCH_BUCKETS)
        else:
            draft = _Draft(DeltasWriter(self._store.origin), now_us, None)
            parts = side.parts(now_us) if source == 1 else snapshots.parts(now_us)
            self._steps = _fill_steps(draft.writer, parts, WHOLE_BATCH_BUCKETS)
        self._draft = draft
        return True

    def _oldest_unacknowledged_us(self) -> int | None:
        oldest_us = earlier(self._undelivered_since_us, self._in_flight.created_us)
        for writing in (self._written, self._draft):
            oldest_us = oldest_us if writing is None else earlier(oldest_us, writing.created_us)
        return oldest_us if self._sources is None else earlier(oldest_us, self._sources.cursor.created_us)


def _fill_steps(writer: DeltasWriter, parts: Parts, most_buckets: int) -> Steps:
    """Write what fits; yields between steps."""
    pace = Pace()
    for looked, part in enumerate(parts, 1):
        if part.bucket is not None:
            writer.add(part.bucket, part.base, part.entries)
        is_full = (
            looked >= LOOKED_BUCKETS
            or len(writer.keys) >= most_buckets
            or writer.entries > MAX_BATCH_ENTRIES - MAX_PART_ENTRIES
            or writer.rough_bytes >= MAX_BATCH_BYTES
        )
        if is_full:
            return
        if pace.ends_piece(len(part.entries)):
            yield
