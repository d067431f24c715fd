"""The texts about one bucket that scripts are called with, and that they answer. No I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from ratelimit_sidecar.crdt.bucket import NO_BASE, Base, Bucket, Entry, Origin
from ratelimit_sidecar.crdt.journal import is_nearly_used_up
from ratelimit_sidecar.crdt.limit import MAX_AHEAD_US, MAX_EXPONENT, MIN_EXPONENT, AnyLimit, TokenBucketLimit, Window
from ratelimit_sidecar.crdt.slot import REFUND, slot_exponent, slot_start_us
from ratelimit_sidecar.crdt.token_bucket import SEAL_BATCH_SLOTS, Sealing
from ratelimit_sidecar.fabric.scripts import MAX_SLOTS, ROOM_SHARE, URGENT_ROOM_SHARE, class_of
from ratelimit_sidecar.persistence.redis_record import BadRecord, read_base
from ratelimit_sidecar.replication.deltas import MAX_SLOT_TOKENS, MAX_TIME_US

OTHERS: Final = Origin("fabric", 1)
"""The origin of the others' counts in a sidecar's store."""

_ELSEWHERE: Final = Origin("elsewhere", 1)

_NO_BASE: Final = "0 0 0 0"

_KEPT_WIDTHS: Final = {Window.FIXED: 3, Window.SLIDING: 65}
"""A window's slot counts for so many of its own widths."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a script answers about one bucket.

    Args:
        is_folded: some slots were older than the horizon, and are in the base.
        other_bases: those of other limits, when there is none of the bucket's. They may lack what counts under its
            limit, so they are for a bucket that is new here, after all entries.
    """

    base: Base | None
    entries: list[Entry]
    is_folded: bool = False
    other_bases: Sequence[Base] = ()


def life_of(origin: Origin) -> str:
    """The name in Redis of one life (incarnation) of a sidecar. A step back of its clock gives its buckets a new
    origin, but no new life."""
    return f"{origin.incarnation:x} {origin.node}"


def counts_of(bucket: Bucket, without: Origin, slots: Iterable[int] | None) -> dict[int, int]:
    """What all origins but one took, together, by slot.

    Args:
        slots: the slots that are asked for; None for all.
    """
    is_window = not isinstance(bucket.limit, TokenBucketLimit)
    wanted = None if slots is None else set(slots)
    sums: dict[int, int] = {}
    for origin, counts in bucket.taken.items():
        if origin == without:
            continue
        for slot in counts if wanted is None else wanted & counts.keys():
            known = sums.get(slot, 0)
            # What several give back of a window is not summed (crdt/window.py).
            sums[slot] = max(known, counts[slot]) if is_window and slot & REFUND else known + counts[slot]
    return sums


def room_for(bucket: Bucket, rule_key: Callable[[bytes], bytes]) -> str:
    """The class of the bucket's rule, and how many times the free places it may have; 0 for any number."""
    rule = rule_key(bucket.key)
    share = 0 if rule == bucket.key else URGENT_ROOM_SHARE if is_nearly_used_up(bucket) else ROOM_SHARE
    return f"{class_of(rule)} {share}"


def share_text(
    bucket: Bucket, room: str, own: Mapping[int, int], now_us: int, *, seen: int, base: str, is_quiet: bool = False
) -> bytes:
    """The text about a bucket in a sidecar's call of `SHARE`.

    Args:
        room: from `room_for`.
        own: this sidecar's counts that have changed, by slot.
        seen: the version up to which the others' are known here.
        base: from `base_text`.
        is_quiet: nothing changed since Redis knows when the bucket is full.
    """
    state = _state_text(bucket, base, now_us, is_quiet=is_quiet)
    return f"{room} {seen} {bucket.base.boundary_us} {state}{_counts_text(own)}".encode()


def gateway_text(bucket: Bucket, room: str, counts: Mapping[int, int], now_us: int, *, has_base: bool) -> bytes:
    """The text about a bucket in a gateway's call of `GATEWAY`: what other regions took.

    Args:
        has_base: False while the bucket's base may miss what Redis has.
    """
    base = base_text(bucket) if has_base else _NO_BASE
    return f"{room} {_state_text(bucket, base, now_us)}{_counts_text(counts)}".encode()


def base_text(bucket: Bucket) -> str:
    """What was sealed: the boundary, when that is full again, and the limit's period and tokens; all 0 of a window."""
    limit = bucket.limit
    if not isinstance(limit, TokenBucketLimit):
        return _NO_BASE
    boundary_us, deficit = bucket.base
    return f"{boundary_us} {boundary_us - (-deficit // limit.tokens)} {limit.period_us} {limit.tokens}"


def read_counts(text: bytes, limit: AnyLimit, origin: Origin, now_us: int, sealed_us: int = 0) -> Answer:
    """Read `bases;slot count slot count;slot count` as counts of `origin`, and after the second `;` of others.

    Slots older than the horizon are folded into the base, as nobody may have done: of others no more is read.

    Args:
        sealed_us: the boundary of the bucket that joins this. If it was sealed early, older slots are folded, too.

    Raises:
        BadRecord: it is malformed.
    """
    base_text, _, counts = text.partition(b";")
    counts, _, others = counts.partition(b";")
    entries = _entries(origin, counts)
    if not isinstance(limit, TokenBucketLimit):
        return Answer(None, entries)
    try:
        base, other_bases = _bases(base_text, limit)
    except ValueError as error:
        raise BadRecord(str(error)[:100]) from error
    of_all = entries + _entries(_ELSEWHERE, others)
    boundary_us = max(limit.boundary_us(now_us), sealed_us)
    is_folded = any(entry.slot < boundary_us for entry in of_all)
    if is_folded:
        sealing = Sealing(limit, base or NO_BASE, now_us, sealed_us)
        of_all = sealing.add(of_all)
        base = sealing.base
        entries = [entry for entry in of_all if entry.origin == origin]
    return Answer(base, entries, is_folded, other_bases)


def _bases(text: bytes, limit: TokenBucketLimit) -> tuple[Base | None, list[Base]]:
    """That of the limit; when there is none, those of others."""
    others = []
    words = text.split()
    for at in range(0, len(words), 4):
        group = words[at : at + 4]
        base = read_base(b" ".join(group), limit)
        if (int(group[2]), int(group[3])) == (limit.period_us, limit.tokens):
            return base, []
        others.append(base)
    return None, others


def _entries(origin: Origin, counts: bytes) -> list[Entry]:
    try:
        numbers = [int(word) for word in counts.split()]
        if len(numbers) > 2 * MAX_SLOTS:
            raise BadRecord("too many slots")
        entries = [
            Entry(origin, slot, min(count, MAX_SLOT_TOKENS))
            for slot, count in zip(numbers[::2], numbers[1::2], strict=True)
        ]
    except ValueError as error:
        raise BadRecord(str(error)[:100]) from error
    for _, slot, count in entries:
        if not (MIN_EXPONENT <= slot_exponent(slot) <= MAX_EXPONENT and 0 <= slot_start_us(slot) <= MAX_TIME_US):
            raise BadRecord("a slot out of its range")
        if count < 1:
            raise BadRecord("a count below 1")
    return entries


def _state_text(bucket: Bucket, base: str, now_us: int, *, is_quiet: bool = False) -> str:
    """How long the bucket is to be kept, in milliseconds; in how many seconds it is full, -1 when that is known; for
    how long its slots count, in microseconds; the time; and its base."""
    bucket.advance(now_us)
    limit = bucket.limit
    if isinstance(limit, TokenBucketLimit):
        # A replica whose base is behind still asks for what it has not folded.
        span_us = limit.horizon_us + (2 * SEAL_BATCH_SLOTS << limit.exponent)
    else:
        span_us = _KEPT_WIDTHS[limit.window] << limit.exponent
    full_in_us = bucket.full_in_us
    kept_ms = (full_in_us + span_us + MAX_AHEAD_US) // 1_000
    full_in_s = -1 if is_quiet else -(-full_in_us // 1_000_000)
    return f"{kept_ms} {full_in_s} {span_us} {now_us} {base}"


def _counts_text(counts: Mapping[int, int]) -> str:
    slots = sorted(counts)[-MAX_SLOTS:]
    return "".join(f" {slot} {min(counts[slot], MAX_SLOT_TOKENS)}" for slot in slots)
