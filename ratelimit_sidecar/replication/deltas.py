"""Writes the state of buckets into Deltas frames, and reads it from them.

A slot id (crdt/slot.py) travels as its number, start / width, in runs of one origin and width, each number but a run's
first as the distance from the one before: in a run of consecutive slots a slot is one byte. A base's deficit is scaled
by the period of its sender's limit, and so travels with that period, to be rescaled to the receiver's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, Literal, NamedTuple

from ratelimit_sidecar.crdt.bucket import Base, Bucket, Entry, Origin
from ratelimit_sidecar.crdt.limit import MAX_EXPONENT, MAX_PERIOD_US, MIN_EXPONENT, AnyLimit
from ratelimit_sidecar.crdt.slot import REFUND, slot_exponent, slot_start_us
from ratelimit_sidecar.crdt.store import LimitOfKey, Store
from ratelimit_sidecar.replication.key_ids import (
    MAX_KEY_IDS,
    MAX_KEY_WITH_ID_BYTES,
    KeyIdsGiven,
    KeyIdsReceived,
    KeyMemory,
)
from ratelimit_sidecar.replication.pace import Pace, Steps
from ratelimit_sidecar.replication.v1 import replication_pb2 as pb
from ratelimit_sidecar.replication.wire import ProtocolError, Reason, read_origin

MAX_KEY_BYTES: Final = 1 << 14
"""A bucket with a longer key stays local. Callers' long values are hashed (limiter/key.py), so only rules of hundreds
of descriptors have one.
"""

MAX_TIME_US: Final = 1 << 62
"""The latest slot or boundary, in the year 148,000. So they fit into the integers of any implementation."""

MAX_SLOT_TOKENS: Final = 1 << 48
"""The most tokens that are told of one slot, as many as one descriptor can take (`limiter.MAX_HITS`). More are told as
this many.
"""

MAX_FRAME_BUCKETS: Final = 1_024
MAX_FRAME_ENTRIES: Final = 8_192
MAX_FRAME_ORIGINS: Final = 1_024
"""Taken from one frame. Far above what is sent, so that a peer with other bounds is understood."""

PIECE_ENTRIES: Final = 256
"""Joined into a bucket in one step."""

_ROUGH_BUCKET_BYTES: Final = 48
"""About the bytes of a bucket's delta without its key and entries: lengths, base, and the head of a run."""

_ROUGH_ENTRY_BYTES: Final = 6

_ROUGH_ORIGIN_BYTES: Final = 16
"""About the bytes of an origin without its node's name."""


class KeyTableUse(NamedTuple):
    """Which key ids a payload uses and gives (`key_ids`): what its reader must know, and then knows.

    Args:
        used: a bit for each id that the payload has in place of a key. The stream must have carried that key.
        given: a bit for each id that the payload gives to a key.
        keys: of the ids in `used`. A dict of numbers and bytes, which the cycle collector does not look at; of
            pairs there would be a hundred thousand in all segments, and to look at them all takes 20 ms.
    """

    used: int
    given: int
    keys: dict[int, bytes]

    @property
    def all(self) -> int:
        """A bit for each id whose key a reader of the payload knows."""
        return self.used | self.given

    def missing(self, known: int) -> bytes:
        """The part of a Deltas to be sent first: the keys of the ids that are used and not among `known`."""
        missing = self.used & ~known
        if not missing:
            return b""
        named = [pb.BucketDelta(key=key, number=key_id) for key_id, key in self.keys.items() if missing >> key_id & 1]
        return pb.Deltas(buckets=named).SerializeToString()


NO_KEYS_USED: Final = KeyTableUse(0, 0, {})


class DeltasWriter:
    """Builds the payload of one Deltas frame; its sequence number is the session's affair.

    Args:
        sender: whose entries need no mention of their origin.
        key_ids: for the keys; None to write them in full.
    """

    def __init__(self, sender: Origin, key_ids: KeyIdsGiven | None = None) -> None:
        self.deltas = pb.Deltas()
        self.entries = 0
        """Slot entries written."""
        self.rough_bytes = 0
        """About the frame's size: measuring it exactly, bucket by bucket, would cost more than it is worth."""
        self.keys: list[bytes] = []
        """The keys of the buckets in it."""
        self._origins = {sender: 0}
        self._key_ids = key_ids
        self._used: dict[int, bytes] = {}
        self._given: set[int] = set()

    def payload(self) -> bytes:
        """A Deltas without a sequence."""
        return self.deltas.SerializeToString()

    def key_use(self) -> KeyTableUse:
        """The key ids that the payload uses and gives."""
        return KeyTableUse(_bits(self._used), _bits(self._given), self._used)

    def add(self, bucket: Bucket, base: Base | None, entries: Sequence[Entry]) -> None:
        """Tell of `bucket` these entries and, unless None, this base scaled by the bucket's period.

        If one does not fit into the protocol, all are left out.
        """
        delta = self.deltas.buckets.add()
        is_new = True
        if self._key_ids is not None and len(bucket.key) <= MAX_KEY_WITH_ID_BYTES:
            key_id, is_new = self._key_ids.id_of(bucket.key)
            delta.number = key_id
            if is_new:
                self._given.add(key_id)
            elif key_id not in self._given:
                self._used[key_id] = bucket.key
        if is_new:
            delta.key = bucket.key
            self.rough_bytes += len(bucket.key)
        # One with many entries is told of in parts.
        if not self.keys or self.keys[-1] != bucket.key:
            self.keys.append(bucket.key)
        self.entries += len(entries)
        self.rough_bytes += _ROUGH_BUCKET_BYTES + _ROUGH_ENTRY_BYTES * len(entries)
        try:
            self._add_state(delta, bucket, base, entries)
        except ValueError as error:
            # What is left says which id the key has.
            for part in ("base", "runs", "refunds"):
                delta.ClearField(part)
            if bucket.journal is not None:
                bucket.journal.leave_out(error)

    def add_read(self, key: bytes, base: pb.Base | None, entries: Sequence[Entry]) -> None:
        """Tell again what was read of a bucket, with its key in full."""
        delta = self.deltas.buckets.add(key=key, base=base)
        self.keys.append(key)
        self.entries += len(entries)
        self._add_entries(delta, entries)

    def _add_state(self, delta: pb.BucketDelta, bucket: Bucket, base: Base | None, entries: Sequence[Entry]) -> None:
        if base is not None:
            period_us = bucket.limit.period_us
            tokens, remainder = divmod(base.deficit, period_us)
            delta.base.boundary_us = base.boundary_us
            delta.base.tokens = tokens
            delta.base.remainder = remainder
            delta.base.period_us = period_us
        self._add_entries(delta, entries)

    def _add_entries(self, delta: pb.BucketDelta, entries: Sequence[Entry]) -> None:
        if len(entries) == 1:
            # Nearly all there is to say under load, two times faster.
            [(origin, slot, tokens)] = entries
            exponent = slot_exponent(slot)
            number, tokens = slot_start_us(slot) >> exponent, min(tokens, MAX_SLOT_TOKENS)
            of_delta = delta.refunds if slot & REFUND else delta.runs
            of_delta.add(origin=self._origin_number(origin), exponent=exponent, slots=(number,), tokens=(tokens,))
            return
        runs: dict[tuple[Origin, int, bool], list[tuple[int, int]]] = {}
        for origin, slot, tokens in entries:
            exponent = slot_exponent(slot)
            number = slot_start_us(slot) >> exponent
            of_run = (origin, exponent, slot & REFUND != 0)
            runs.setdefault(of_run, []).append((number, min(tokens, MAX_SLOT_TOKENS)))
        for (origin, exponent, is_refund), counts in runs.items():
            counts.sort()
            slots = []
            before = 0
            for number, _ in counts:
                slots.append(number - before)
                before = number
            of_delta = delta.refunds if is_refund else delta.runs
            of_delta.add(
                origin=self._origin_number(origin),
                exponent=exponent,
                slots=slots,
                tokens=[tokens for _, tokens in counts],
            )

    def _origin_number(self, origin: Origin) -> int:
        number = self._origins.get(origin)
        if number is None:
            self.deltas.origins.add(node=origin.node, incarnation=origin.incarnation)
            number = self._origins[origin] = len(self._origins)
            self.rough_bytes += _ROUGH_ORIGIN_BYTES + len(origin.node.encode())
        return number


def _bits(key_ids: Iterable[int]) -> int:
    bits = bytearray(MAX_KEY_IDS // 8 + 1)
    for key_id in key_ids:
        bits[key_id >> 3] |= 1 << (key_id & 7)
    return int.from_bytes(bits, "little")


class Applied(NamedTuple):
    """What a step of applying a Deltas frame has done."""

    entries: int
    """Slot entries read."""
    unknown_keys: int
    """Buckets that no replicated rule of this replica knows: left out."""
    is_last: bool
    """True when all of the frame has been applied."""


OnNews = Callable[[Bucket, Sequence[Entry]], None]
"""Called with a bucket and entries of which at least one was new here."""


class _Joining:
    """Joins buckets of one frame into a store.

    Args:
        corrector: the sender, if its word outweighs what others have said of it.
    """

    def __init__(self, store: Store, now_us: int, corrector: Origin | None, on_news: OnNews | None) -> None:
        self._store = store
        self._now_us = now_us
        self._corrector = corrector
        self._on_news = on_news

    def join(self, key: bytes, limit: AnyLimit, base: Base | None, entries: Sequence[Entry]) -> None:
        news = self._store.join(key, limit, base, entries, self._now_us, corrector=self._corrector)
        if news and self._on_news is not None:
            bucket = self._store.get(key)
            assert bucket is not None
            self._on_news(bucket, entries)

    def join_steps(self, key: bytes, limit: AnyLimit | None, base: Base | None, entries: Sequence[Entry]) -> Steps:
        """Join a bucket of many entries, in steps; no more of it once other rules do not know its key."""
        for first in range(0, len(entries), PIECE_ENTRIES):
            if first:
                yield
                base, limit = None, self._store.limit_of_key(key)
            if limit is None:
                return
            self.join(key, limit, base, entries[first : first + PIECE_ENTRIES])


class DeltasReader:
    """Reads the Deltas of one stream. Call `close` when it is closed.

    Args:
        sender: the peer.
        is_proven: True when it is known to be the one that it says it is. Then its word outweighs what others have said
            of it; otherwise anybody could lower what it has taken.
        key_memory, address: see `KeyIdsReceived`.
    """

    def __init__(
        self,
        sender: Origin,
        *,
        is_proven: bool = False,
        key_memory: KeyMemory | None = None,
        address: str = "",
    ) -> None:
        self._sender = sender
        self._is_proven = is_proven
        self.is_newest = True
        """False once the sender sends Deltas on a newer stream: what still comes on this one may be older, and corrects
        nothing."""
        self._key_ids = KeyIdsReceived(KeyMemory() if key_memory is None else key_memory, address)
        self._limit_of_key: LimitOfKey | None = None
        self._limits: list[AnyLimit | Literal[False] | None] = []
        """By key id, under the rules of `_limit_of_key`: to find a key's rule takes as long as all else together. False
        for one that was not looked for yet."""

    def close(self) -> None:
        """Free what it remembers of keys."""
        self._key_ids.close()

    def apply_steps(
        self,
        deltas: pb.Deltas,
        store: Store,
        now_us: int,
        on_news: OnNews | None = None,
    ) -> Iterator[Applied]:
        """Join a frame into `store`, in steps.

        Raises:
            ProtocolError: too_large, bad_key, bad_base, bad_slot or malformed. The buckets before the bad one have been
                joined, which does no harm: they were good, and joining them again changes nothing.
        """
        _check_size(deltas)
        corrector = self._sender if self._is_proven and self.is_newest and not deltas.overtaken else None
        origins = [self._sender, *[read_origin(origin.node, origin.incarnation) for origin in deltas.origins]]
        joining = _Joining(store, now_us, corrector, on_news)
        pace = Pace()
        entries_left = MAX_FRAME_ENTRIES
        entries_read = unknown_keys = 0
        for delta in deltas.buckets:
            # Other rules may have come into force between two steps.
            key, limit = self._read_key(delta, store.limit_of_key)
            entries = read_entries(delta, origins, entries_left)
            entries_left -= len(entries)
            entries_read += len(entries)
            base = None
            if delta.HasField("base"):
                check_base(delta.base)
                base = None if limit is None else read_base(delta.base, limit)
            unknown_keys += limit is None
            if limit is not None and len(entries) <= PIECE_ENTRIES:
                joining.join(key, limit, base, entries)
            elif limit is not None:
                for _ in joining.join_steps(key, limit, base, entries):
                    yield Applied(entries_read, unknown_keys, False)
                    entries_read = unknown_keys = 0
            # When an entry is refused, the whole bucket may have been recounted: that is a long step.
            if pace.ends_piece(len(entries)) or store.journal.refused:
                yield Applied(entries_read, unknown_keys, False)
                entries_read = unknown_keys = 0
        yield Applied(entries_read, unknown_keys, True)

    def _read_key(self, delta: pb.BucketDelta, limit_of_key: LimitOfKey) -> tuple[bytes, AnyLimit | None]:
        """A bucket's key, and its limit here."""
        if self._limit_of_key is not limit_of_key:
            self._limit_of_key = limit_of_key
            self._limits.clear()
        key, key_id = delta.key, delta.number
        if not key and key_id:
            key = self._key_ids.key(key_id)
            if key_id < len(self._limits):
                known = self._limits[key_id]
                if known is not False:
                    return key, known
        else:
            check_key(key)
            if key_id:
                self._key_ids.receive(key_id, key)
        try:
            limit = limit_of_key(key)
        except ValueError as error:
            raise ProtocolError(Reason.BAD_KEY, str(error)) from error
        if key_id:
            if key_id >= len(self._limits):
                self._limits += [False] * (key_id + 1 - len(self._limits))
            self._limits[key_id] = limit
        return key, limit


def check_key(key: bytes) -> None:
    """Check the length of a bucket key.

    Raises:
        ProtocolError: bad_key.
    """
    if not 1 <= len(key) <= MAX_KEY_BYTES:
        raise ProtocolError(Reason.BAD_KEY, f"a bucket key must have 1 to {MAX_KEY_BYTES} bytes, not {len(key)}")


def _check_size(deltas: pb.Deltas) -> None:
    if len(deltas.buckets) > MAX_FRAME_BUCKETS or len(deltas.origins) > MAX_FRAME_ORIGINS:
        raise ProtocolError(
            Reason.TOO_LARGE,
            f"{len(deltas.buckets)} buckets and {len(deltas.origins)} origins in a frame; at most {MAX_FRAME_BUCKETS}"
            f" and {MAX_FRAME_ORIGINS} are taken",
        )


def read_entries(delta: pb.BucketDelta, origins: Sequence[Origin], most: int) -> list[Entry]:
    """The entries of a bucket.

    Args:
        origins: of the frame, its sender first.

    Raises:
        ProtocolError: too_large, bad_slot or malformed.
    """
    entries: list[Entry] = []
    for run in delta.runs:
        _read_run(run, 0, origins, entries, most)
    for run in delta.refunds:
        _read_run(run, REFUND, origins, entries, most)
    return entries


def check_base(base: pb.Base) -> None:
    """Check a base that was sent or written.

    Raises:
        ProtocolError: bad_base.
    """
    if not 1 <= base.period_us <= MAX_PERIOD_US or base.remainder >= base.period_us:
        raise ProtocolError(Reason.BAD_BASE, f"a remainder of {base.remainder} in a period of {base.period_us} us")
    if base.boundary_us > MAX_TIME_US:
        raise ProtocolError(Reason.BAD_BASE, "a boundary past MAX_TIME_US")


def read_base(base: pb.Base, limit: AnyLimit) -> Base:
    """A base that was checked, rescaled to the period of `limit`; rounded up, so that no debt is lost on the way."""
    period_us = limit.period_us
    return Base(base.boundary_us, base.tokens * period_us - (-base.remainder * period_us // base.period_us))


def _read_run(run: pb.SlotRun, mark: int, origins: Sequence[Origin], entries: list[Entry], most: int) -> None:
    """Append the run's entries, with which there may be `most` of them.

    Args:
        mark: set in the slots' ids.
    """
    origin_number, exponent, slots, tokens_of_slots = run.origin, run.exponent, run.slots, run.tokens
    if origin_number >= len(origins):
        raise ProtocolError(Reason.MALFORMED, f"origin {origin_number} of a list of {len(origins)}")
    if not MIN_EXPONENT <= exponent <= MAX_EXPONENT:
        raise ProtocolError(
            Reason.BAD_SLOT, f"slots of 2**{exponent} us; widths are 2**{MIN_EXPONENT} to 2**{MAX_EXPONENT}"
        )
    if not slots or len(slots) != len(tokens_of_slots):
        raise ProtocolError(Reason.BAD_SLOT, f"{len(slots)} slots with {len(tokens_of_slots)} counts")
    if len(entries) + len(slots) > most:
        raise ProtocolError(Reason.TOO_LARGE, f"more than {MAX_FRAME_ENTRIES} slots in a frame")
    origin = origins[origin_number]
    last_number = MAX_TIME_US >> exponent
    number = 0
    for index, (step, tokens) in enumerate(zip(slots, tokens_of_slots, strict=True)):
        number += step
        if number > last_number or (index and not step):
            raise ProtocolError(Reason.BAD_SLOT, "slots must rise, and lie within MAX_TIME_US")
        if not 1 <= tokens <= MAX_SLOT_TOKENS:
            raise ProtocolError(Reason.BAD_SLOT, f"{tokens} tokens in a slot; 1 to {MAX_SLOT_TOKENS} fit")
        entries.append(Entry(origin, number << exponent | mark | exponent, tokens))
