"""The buckets that this node took from lately, for a peer that is told everything else by another node.

In many small dicts: one of 100,000 buckets makes itself anew every few seconds, which takes 8 ms and more.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Final

RECENT_US: Final = 10_000_000
"""So long: what the node that tells everything may not have heard yet."""

KEPT_US: Final = 2 * RECENT_US
"""What was recent when a peer began to be told is still known when it comes to be told, RECENT_US later at most."""

SHARDS: Final = 256
"""A flush looks at one of them: all have their turn within some five seconds when it comes every 20 ms."""


class RecentBuckets:
    """The buckets that were taken from in the last seconds."""

    def __init__(self) -> None:
        self._shards: tuple[OrderedDict[bytes, int], ...] = tuple(OrderedDict() for _ in range(SHARDS))
        """When own entries of a bucket last changed, the newest last."""
        self._next = 0
        """The shard that is looked at next."""

    def note(self, key: bytes, now_us: int) -> None:
        """Own entries of this bucket have changed."""
        shard = self._shards[hash(key) % SHARDS]
        shard[key] = now_us
        shard.move_to_end(key)

    def forget(self, now_us: int) -> None:
        """Forget a part of those that changed longer ago than KEPT_US."""
        shard = self._shards[self._next]
        self._next = (self._next + 1) % SHARDS
        # Neither is one that is ahead kept: the clock was set back.
        while shard and abs(now_us - next(iter(shard.values()))) > KEPT_US:
            shard.popitem(last=False)

    def keys(self) -> Iterator[bytes]:
        """At least those that have changed within RECENT_US when the first is asked for, if the last one is RECENT_US
        after that or sooner. Others may change meanwhile."""
        for shard in self._shards:
            yield from list(shard)

    def __len__(self) -> int:
        return sum(map(len, self._shards))
