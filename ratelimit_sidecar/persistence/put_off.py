"""Buckets of a snapshot that cannot be joined yet: no rule here has them, or they are ahead of this clock.

Rules may come in parts (an xDS server that has just started, a volume that is filled late), and a machine may boot with
a clock that is behind. So what a start cannot join is written into the next snapshots, and tried again when rules or
the clock have changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from ratelimit_sidecar.crdt.bucket import Entry, Origin
from ratelimit_sidecar.crdt.limit import MAX_AHEAD_US
from ratelimit_sidecar.crdt.slot import slot_end_us
from ratelimit_sidecar.crdt.token_bucket import MIN_BASE_AGE_US
from ratelimit_sidecar.replication.deltas import DeltasWriter
from ratelimit_sidecar.replication.parts import MAX_PART_ENTRIES
from ratelimit_sidecar.replication.v1 import replication_pb2 as pb

MAX_BYTES: Final = 64 * 1_024 * 1_024
"""The most that is put off: some million buckets."""

MAX_AGE_US: Final = 31 * 86_400_000_000
"""A bucket is not put off for longer after its last slot: rules that are gone must not fill the file for ever."""

RECORD_BUCKETS: Final = 256
RECORD_ENTRIES: Final = 768
"""A record ends with the part of a bucket that reaches one of these. So a version that reads a record as a frame of a
peer can read it: each entry may be of another origin, of which a frame names 1,024 at most."""

_NOBODY: Final = Origin("", 0)


class AheadOfClock:
    """Buckets that are ahead of this clock, so that not all of them can be joined yet."""

    def __init__(self) -> None:
        self.buckets = 0
        self.due_us: int | None = None
        """When the clock has come so far, one of them can be joined."""

    def note(self, due_us: int) -> None:
        """Note a bucket with this `due_us_of`."""
        self.buckets += 1
        self.due_us = due_us if self.due_us is None else min(due_us, self.due_us)

    def is_due(self, now_us: int) -> bool:
        """True when one of them can be joined."""
        return self.due_us is not None and self.due_us <= now_us


def due_us_of(boundary_us: int, entries: Sequence[Entry]) -> int:
    """When the clock has come so far, a base with this boundary and these entries can be joined."""
    return max(boundary_us + MIN_BASE_AGE_US, max([entry.slot for entry in entries], default=0) - MAX_AHEAD_US)


class PutOff:
    """What is put off of one snapshot, as records of the next. Call `end` after the last `add`."""

    def __init__(self, most_bytes: int = MAX_BYTES) -> None:
        self.records: list[tuple[int, bytes]] = []
        """Kind and payload."""
        self.without_rule = 0
        self.ahead = AheadOfClock()
        """Buckets that were put off, by why."""
        self.left_out = 0
        """Buckets for which there was no room."""
        self._bytes_left = most_bytes
        self._writers: dict[int, DeltasWriter] = {}

    def add(
        self, kind: int, key: bytes, base: pb.Base | None, entries: Sequence[Entry], now_us: int, *, has_rule: bool
    ) -> None:
        """Put off a bucket that cannot be joined now; others are left alone.

        Args:
            kind: of the record that it was in.
        """
        boundary_us = 0 if base is None else base.boundary_us
        due_us = due_us_of(boundary_us, entries)
        if has_rule and due_us <= now_us:
            return
        if max([boundary_us, *[slot_end_us(entry.slot) for entry in entries]]) < now_us - MAX_AGE_US:
            return
        if self._bytes_left <= 0:
            self.left_out += 1
            return
        if due_us > now_us:
            self.ahead.note(due_us)
        else:
            self.without_rule += 1
        for start in range(0, max(1, len(entries)), MAX_PART_ENTRIES):
            # No entry is of its sender: the next snapshot may have another one.
            writer = self._writers.setdefault(kind, DeltasWriter(_NOBODY))
            writer.add_read(key, base, entries[start : start + MAX_PART_ENTRIES])
            if len(writer.deltas.buckets) >= RECORD_BUCKETS or writer.entries >= RECORD_ENTRIES:
                self._end_record(kind)

    def end(self) -> None:
        """End the records that were begun."""
        for kind in list(self._writers):
            self._end_record(kind)

    def _end_record(self, kind: int) -> None:
        payload = self._writers.pop(kind).payload()
        self._bytes_left -= len(payload)
        self.records.append((kind, payload))
