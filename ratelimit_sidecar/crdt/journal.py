"""State that all buckets of one store share: which buckets have entries that were not sent yet, who the peers are, and
how often a part of a peer's data was refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from ratelimit_sidecar.crdt.bucket import Bucket, Origin


MAX_URGENT: Final = 1_024
"""The most urgent buckets at once. Further ones are sent with all others."""


class Refused(StrEnum):
    """Why a part of a peer's data was refused. Usual causes are a wrong clock or other rules."""

    AHEAD = "ahead"
    """A slot that begins later than MAX_AHEAD_US from now: the peer's clock is wrong, or it lies."""
    WIDE = "wide"
    """A slot wider than the limit's own, and than those of a limit of a day."""
    ORIGINS = "origins"
    """An origin beyond the `MAX_ORIGINS` of a bucket, or, of one that is no connected peer, an entry beyond its
    `MAX_HEARD`."""
    SLOTS = "slots"
    """A slot that is older than the `MAX_SLOTS` newest of its origin in the bucket."""
    OWN = "own"
    """An entry of this replica's own origin with more than it has taken."""
    DEBT = "debt"
    """A base with more than the debt ceiling, to which it was cut."""
    PAYMENT = "payment"
    """An ask or a payment of a node that is no member, or a payment of more than the peer can have."""


class Journal:
    """Collects the buckets with entries that were not sent yet; the replicator empties `buckets` at each flush."""

    __slots__ = ("buckets", "on_urgent", "origin", "peers", "refused", "urgent")

    def __init__(self) -> None:
        self.buckets: list[Bucket] = []
        """Each at most once."""
        self.urgent: list[Bucket] = []
        """Buckets that have become nearly used up, at most `MAX_URGENT`. Whoever invents keys must not hold them up."""
        self.peers: set[Origin] = set()
        """The connected peers. Their entries are accepted even when a bucket already has `MAX_ORIGINS`."""
        self.refused: Counter[Refused] = Counter()
        """Counted since its reader last cleared it."""
        self.on_urgent: Callable[[], object] = _wait_for_the_next_flush
        """Called when there is an urgent bucket, so that peers learn it at once. It must be O(1), without I/O."""
        self.origin: Origin | None = None
        """The origin that buckets must write under since the clock was set back (`Store.go_back`); None when it was
        never set back.
        """

    def hurry(self, bucket: Bucket) -> None:
        """Note a bucket that has become nearly used up: peers should learn of it before others."""
        if len(self.urgent) < MAX_URGENT:
            self.urgent.append(bucket)
        self.on_urgent()


def _wait_for_the_next_flush() -> None:
    pass
