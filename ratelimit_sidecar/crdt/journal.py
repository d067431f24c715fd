"""What all buckets of one store share: which of them have own entries that no peer has been told of yet, who the peers
are, and what of their words was refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ratelimit_sidecar.crdt.bucket import Bucket, Origin


class Refused(StrEnum):
    """Why a part of what a peer said was not believed; no honest peer with a right clock and these rules says it."""

    AHEAD = "ahead"
    """A slot that begins later than MAX_AHEAD_US from now: the peer's clock is wrong, or it lies."""
    WIDE = "wide"
    """A slot wider than the limit's own, and than those of a day: of a limit that is no longer."""
    ORIGINS = "origins"
    """An origin beyond the `MAX_ORIGINS` of a bucket."""
    SLOTS = "slots"
    """A slot that is older than the `MAX_SLOTS` newest of its origin in the bucket."""
    OWN = "own"
    """More than this replica has taken, said of itself."""
    DEBT = "debt"
    """A base with more than the debt ceiling, to which it was cut."""
    PAYMENT = "payment"
    """An ask or a payment of a node that is no member, or a payment of more than the peer can have."""


class Journal:
    """Collects the buckets with changes that no peer was told of; the replicator empties `buckets` at each flush."""

    __slots__ = ("buckets", "on_urgent", "origin", "peers", "refused")

    def __init__(self) -> None:
        self.buckets: list[Bucket] = []
        """Each at most once."""
        self.peers: set[Origin] = set()
        """Those that are connected: what they take is heard, however many origins others have told of."""
        self.refused: Counter[Refused] = Counter()
        """Since it was last emptied."""
        self.on_urgent: Callable[[], object] = _wait_for_the_next_flush
        """Called when a bucket gets nearly used up: others, who do not know, go on admitting. O(1), and does no I/O."""
        self.origin: Origin | None = None
        """What this replica writes by since its clock was set back (`Store.go_back`); None when it never was."""


def _wait_for_the_next_flush() -> None:
    pass
