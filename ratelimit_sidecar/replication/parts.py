"""Parts: the states of buckets, cut into what fits into a batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from ratelimit_sidecar.crdt.bucket import Base, Bucket, Entry, Origin
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.replication.deltas import MAX_KEY_BYTES

MAX_PART_ENTRIES: Final = 256
"""The most entries of one bucket in a part: a bucket with 1,024 takes 2 ms to join."""


class Part(NamedTuple):
    """Some of one bucket; without a bucket, a look at one that has nothing to tell."""

    bucket: Bucket | None
    base: Base | None
    entries: list[Entry]


NOTHING: Final = Part(None, None, [])

Parts = Iterator[Part]


def tellable(store: Store, key: bytes) -> Bucket | None:
    """The bucket with this key; None when it was dropped meanwhile, stays local, or has a key that no peer takes."""
    bucket = store.get(key) if len(key) <= MAX_KEY_BYTES else None
    return bucket if bucket is not None and bucket.is_replicated else None


def in_parts(bucket: Bucket | None, base: Base | None, entries: list[Entry]) -> Parts:
    """Cut a bucket's state into parts: at least one, perhaps with nothing in it."""
    if bucket is None or (base is None and not entries):
        yield NOTHING
        return
    for start in range(0, max(1, len(entries)), MAX_PART_ENTRIES):
        yield Part(bucket, None if start else base, entries[start : start + MAX_PART_ENTRIES])


def own_part(store: Store, key: bytes, since_us: int) -> Parts:
    """What this node took from one bucket since `since_us`."""
    bucket = tellable(store, key)
    yield from in_parts(bucket, None, [] if bucket is None else bucket.entries_since(store.origin, since_us))


def whole(store: Store, key: bytes, since_us: int, now_us: int, all_but: Origin | None) -> Parts:
    """All of one bucket that may have been written since `since_us`, but for what one origin took.

    The bucket may change between two parts.
    """
    bucket = tellable(store, key)
    if bucket is None or not (bucket.base.boundary_us > since_us or bucket.is_written_since(since_us)):
        yield NOTHING
        return
    bucket.seal(now_us)
    for entries in in_lists(bucket, since_us, all_but):
        # With what was sealed after `since_us`, meanwhile too.
        base = bucket.base_to_send
        yield from in_parts(bucket, None if base is not None and base.boundary_us <= since_us else base, entries)


def in_lists(bucket: Bucket, since_us: int, all_but: Origin | None = None) -> Iterator[list[Entry]]:
    """The entries that may have been written since `since_us`, but for those of one origin, in lists of some hundred.
    The last may be empty. The bucket may change, and be sealed, between two lists: tell its base with each.
    """
    entries: list[Entry] = []
    for origin in bucket.origins():
        if origin != all_but:
            entries += bucket.entries_since(origin, since_us)
        if len(entries) >= MAX_PART_ENTRIES:
            yield entries
            entries = []
    yield entries
