"""A snapshot of all buckets (but strict ones) as bytes: their state, as a peer would send it.

    file = magic { record }*         record = kind:1 length:4 crc32:4 payload

The first record is a Header, the last an End, and those between are Deltas of the replication protocol: what is nearly
used up first, and once more in its turn, in case there is no time for all. A node that starts brings each bucket to now
(`Store.restore`) and joins it, so reading a file twice does no harm. Takes of its last life keep their origin, since it
has a new one now.
Numbers are little-endian; the checksum is of kind, length and payload.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import BinaryIO, Final
from zlib import crc32

from google.protobuf.message import DecodeError

from ratelimit_sidecar.crdt.bucket import NO_BASE, Entry, Origin
from ratelimit_sidecar.crdt.store import LimitOfKey, Store
from ratelimit_sidecar.persistence.put_off import RECORD_BUCKETS, RECORD_ENTRIES, PutOff
from ratelimit_sidecar.persistence.v1.snapshot_pb2 import End, Header
from ratelimit_sidecar.replication.deltas import DeltasWriter, check_base, read_base, read_entries
from ratelimit_sidecar.replication.pace import Pace, Steps
from ratelimit_sidecar.replication.parts import in_lists, in_parts
from ratelimit_sidecar.replication.v1 import replication_pb2 as pb
from ratelimit_sidecar.replication.wire import ProtocolError, read_origin

MAGIC: Final = b"rlsidec\x01"
"""The last byte is the version of the format."""

HEADER: Final = 1
REPLICATED: Final = 2
"""Deltas of replicated buckets."""
LOCAL: Final = 3
"""Deltas of buckets that are not replicated."""
END: Final = 4

MAX_RECORD_BYTES: Final = 64 * 1_024 * 1_024
"""Far above the records that are written, which the longest keys of 256 buckets bound."""

_HEAD: Final = struct.Struct("<BII")


class BadSnapshot(Exception):
    """The bytes are no complete snapshot. The text says why, and completes "the snapshot ..."."""


@dataclass(slots=True)
class SnapshotSize:
    """The size of a snapshot so far."""

    buckets: int = 0
    bytes: int = 0


def snapshot(
    store: Store, now_us: Callable[[], int], size: SnapshotSize, put_off: Iterable[tuple[int, bytes]] = ()
) -> Iterator[bytes]:
    """Yield a snapshot in pieces, some of them empty. Requests may be decided between two pieces.

    The state of a bucket is that of its piece, so later takes may be missing.

    Args:
        size: updated with each piece. What is put off counts in bytes alone.
        put_off: further records, of what could not be joined yet.
    """
    yield _counted(MAGIC, size)
    header = Header(node=store.origin.node, incarnation=store.origin.incarnation, begun_at_us=now_us())
    yield _counted(_record(HEADER, header.SerializeToString()), size)
    writers = {kind: DeltasWriter(store.origin) for kind in (REPLICATED, LOCAL)}
    pace = Pace()
    first = ((bucket, False) for bucket in store.nearly_used_up(now_us))
    for bucket, counts in chain(first, ((bucket, True) for bucket in store.walk())):
        if bucket is None:
            if pace.ends_piece(0):
                yield b""
            continue
        kind = REPLICATED if bucket.is_replicated else LOCAL
        if not bucket.slots and bucket.base_to_send is None:
            continue
        size.buckets += counts
        for part in chain.from_iterable(
            in_parts(bucket, bucket.base_to_send, entries) for entries in in_lists(bucket, 0)
        ):
            if part.bucket is not None:
                writers[kind].add(part.bucket, part.base, part.entries)
            if len(writers[kind].deltas.buckets) >= RECORD_BUCKETS or writers[kind].entries >= RECORD_ENTRIES:
                yield _counted(_record(kind, writers[kind].payload()), size)
                writers[kind] = DeltasWriter(store.origin)
            if pace.ends_piece(len(part.entries)):
                yield b""
    for kind, writer in writers.items():
        if writer.keys:
            yield _counted(_record(kind, writer.payload()), size)
    for kind, payload in put_off:
        yield _counted(_record(kind, payload), size)
    yield _counted(_record(END, End(buckets=size.buckets).SerializeToString()), size)


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """A complete snapshot.

    Args:
        origin: the origin that wrote it.
        begun_at_us: when it was started, by the clock of that time.
        buckets: the number of buckets in it.
    """

    origin: Origin
    begun_at_us: int
    buckets: int


def check(file: BinaryIO, *, may_be_cut: bool = False) -> SnapshotInfo:
    """Read all of a snapshot and check that it is complete. The file is at its end then.

    Args:
        may_be_cut: it need not be complete after its header.

    Raises:
        BadSnapshot: it is incomplete, or of another format.
        OSError: it cannot be read.
    """
    magic = file.read(len(MAGIC))
    if magic[:-1] != MAGIC[:-1] or len(magic) < len(MAGIC):
        raise BadSnapshot("is of another kind: it begins with other bytes")
    if magic != MAGIC:
        raise BadSnapshot(f"is of format {magic[-1]}; this version reads {MAGIC[-1]}")
    origin: Origin | None = None
    begun_at_us = 0
    for kind, payload in _records(file):
        try:
            if origin is None:
                if kind != HEADER:
                    raise BadSnapshot("has no header")
                header = Header.FromString(payload)
                origin, begun_at_us = read_origin(header.node, header.incarnation), header.begun_at_us
                if may_be_cut:
                    return SnapshotInfo(origin, begun_at_us, 0)
            elif kind == END:
                if file.read(1):
                    raise BadSnapshot("goes on after its end")
                return SnapshotInfo(origin, begun_at_us, End.FromString(payload).buckets)
        except (DecodeError, ProtocolError) as error:
            raise BadSnapshot(f"has a malformed record: {error}") from error
    raise BadSnapshot("is cut short")


def records_again(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The records of a snapshot that was checked: kind and payload.

    Raises:
        BadSnapshot: it has changed meanwhile.
        OSError: it cannot be read.
    """
    file.seek(len(MAGIC))
    return _records(file)


@dataclass(slots=True)
class RestoreTarget:
    """Where a snapshot is restored to, record by record, in order, the `END` last.

    Args:
        origin: the origin that wrote it.
        local_limit_of_key: the limits of buckets that are not replicated.
        put_off: gets what cannot be joined yet.
        reading: by kind, the bucket that was read last and is not joined yet. It may be written in parts.
    """

    store: Store
    origin: Origin
    local_limit_of_key: LimitOfKey
    put_off: PutOff = field(default_factory=PutOff)
    reading: dict[int, _Read] = field(default_factory=dict)


@dataclass(slots=True)
class _Read:
    """What was read of one bucket so far.

    Args:
        base: of the last part that has one.
        part: the entries of the first part.
        merged: those of all parts, when there are several.
    """

    key: bytes
    base: pb.Base | None
    part: list[Entry]
    merged: dict[tuple[Origin, int], Entry] | None = None

    def add(self, base: pb.Base | None, entries: list[Entry]) -> None:
        """Add another part. A slot may be in two parts, as the bucket was used between them."""
        if base is not None:
            self.base = base
        if self.merged is None:
            self.merged = {(entry.origin, entry.slot): entry for entry in self.part}
        for entry in entries:
            self.merged[entry.origin, entry.slot] = entry

    @property
    def entries(self) -> list[Entry]:
        return self.part if self.merged is None else list(self.merged.values())


def restore(kind: int, payload: bytes, to: RestoreTarget, now_us: int) -> Iterator[int]:
    """Join what a record has into the store, in pieces. A bucket is joined once all of it was read.

    Yields:
        The number of entries read in the piece.

    Raises:
        BadSnapshot: it breaks the protocol. What came before that point is joined. Other records are as good as before.
    """
    if kind == END:
        for read_kind in list(to.reading):
            for _ in _join_steps(read_kind, to, now_us):
                yield 0
        to.put_off.end()
    if kind not in (REPLICATED, LOCAL):
        return
    pace = Pace()
    count = 0
    try:
        deltas = pb.Deltas.FromString(payload)
        origins = [to.origin, *[read_origin(origin.node, origin.incarnation) for origin in deltas.origins]]
        for delta in deltas.buckets:
            key, base = delta.key, delta.base if delta.HasField("base") else None
            entries = read_entries(delta, origins, sys.maxsize)
            if base is not None:
                check_base(base)
            read = to.reading.get(kind)
            if read is not None and read.key == key:
                read.add(base, entries)
            else:
                for _ in _join_steps(kind, to, now_us):
                    yield 0
                to.reading[kind] = _Read(key, base, entries)
            count += len(entries)
            if pace.ends_piece(len(entries)):
                yield count
                count = 0
    except (DecodeError, ProtocolError, ValueError) as error:
        raise BadSnapshot(f"has a malformed record: {error}") from error
    yield count


def _join_steps(kind: int, to: RestoreTarget, now_us: int) -> Steps:
    """Join the bucket that was read last, in steps.

    Raises:
        ValueError: its key is none.
    """
    read = to.reading.pop(kind, None)
    if read is None:
        return
    key, entries = read.key, read.entries
    limit = to.store.limit_of_key(key) if kind == REPLICATED else to.local_limit_of_key(key)
    to.put_off.add(kind, key, read.base, entries, now_us, has_rule=limit is not None)
    if limit is not None:
        base = NO_BASE if read.base is None else read_base(read.base, limit)
        yield from to.store.restore(key, limit, base, entries, now_us, replicated=kind == REPLICATED)


def _records(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    while head := file.read(_HEAD.size):
        if len(head) < _HEAD.size:
            raise BadSnapshot("is cut short")
        kind, length, checksum = _HEAD.unpack(head)
        if length > MAX_RECORD_BYTES:
            raise BadSnapshot("is damaged: a record's length is beyond its bound")
        payload = file.read(length)
        if len(payload) < length:
            raise BadSnapshot("is cut short")
        if _checksum(kind, payload) != checksum:
            raise BadSnapshot("is damaged: a checksum is wrong")
        yield kind, payload


def _record(kind: int, payload: bytes) -> bytes:
    return _HEAD.pack(kind, len(payload), _checksum(kind, payload)) + payload


def _checksum(kind: int, payload: bytes) -> int:
    return crc32(payload, crc32(bytes((kind,)) + len(payload).to_bytes(4, "little")))


def _counted(piece: bytes, size: SnapshotSize) -> bytes:
    size.bytes += len(piece)
    return piece
