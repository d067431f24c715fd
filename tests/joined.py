"""What a peer tells of one bucket, joined into a store under the rules there."""

from __future__ import annotations

from collections.abc import Sequence

from ratelimit_sidecar.crdt.bucket import Base, Entry
from ratelimit_sidecar.crdt.store import Store


def join(store: Store, key: bytes, base: Base | None, entries: Sequence[Entry], now_us: int) -> int:
    """Join it, as `DeltasReader` does for a key that a replicated rule has; returns the number of entries that were
    new."""
    limit = store.limit_of_key(key)
    assert limit is not None
    return store.join(key, limit, base, entries, now_us)
