"""The `Journal`: which buckets changed since the last flush, and all else that a store's replicated buckets share.

It is no log that lasts: it lives in memory, names each bucket once, and each flush empties it. What was taken in order
is in the change log (`replication.changes`).
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from ratelimit_sidecar.crdt.limit import URGENT_SHARE
from ratelimit_sidecar.crdt.places import RULE_SHARE

if TYPE_CHECKING:
    from ratelimit_sidecar.crdt.bucket import Bucket, Origin


DEFAULT_MAX_RECEIVED_BYTES: Final = 1 << 32
"""For what others took: from a million buckets, on eight nodes."""

MAX_URGENT_LIMITS: Final = 64
MAX_URGENT_OF_LIMIT: Final = 32
"""A limit has two queues of urgent buckets: one for those that are nearly used up, one for its others. These are the
most queues, and the most buckets in one. Further buckets are sent in their turn, as those that are not urgent."""


class Refused(StrEnum):
    """Why a part of a peer's data was refused. The usual causes are a wrong clock, and rules that differ."""

    AHEAD = "ahead"
    """A slot that begins later than MAX_AHEAD_US from now: the peer's clock is wrong, or it lies."""
    WIDE = "wide"
    """A slot wider than the limit's own, and than those of a limit of a month (of a day in a sliding window)."""
    ORIGINS = "origins"
    """An origin beyond the `MAX_ORIGINS` of a bucket, or, of one that is no connected peer, an entry beyond its
    `MAX_RECEIVED`."""
    FULL = "full"
    """An entry beyond those of `LEAST_ORIGINS` connected peers in a bucket, while those of all buckets, or of all of
    its rule, take as much memory as they may."""
    SLOTS = "slots"
    """A slot that is older than the `MAX_SLOTS` newest of its origin in the bucket."""
    OWN = "own"
    """An entry of this replica's own origin with more than it has taken."""
    DEBT = "debt"
    """A base with more than the debt ceiling. It is not dropped, but cut to that ceiling."""
    PAYMENT = "payment"
    """An ask or a wish of a node that is no member, or a payment of more than its payer can have."""


class UrgentBuckets:
    """A bounded queue of buckets of which much was taken lately, so that peers should learn of them before others.

    Whoever invents keys can make all buckets of one rule urgent. So each limit has a few places, and limits take turns.
    Buckets that are nearly used up have places of their own, since it takes the most requests to make a bucket so.
    """

    __slots__ = ("_by_limit", "_length")

    def __init__(self) -> None:
        self._by_limit: OrderedDict[tuple[int, int, bool], deque[Bucket]] = OrderedDict()
        """By capacity, period and whether it is nearly used up: those whose turn is next come first."""
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def add(self, bucket: Bucket) -> bool:
        """Add a bucket, if there is a place for it; returns whether there was."""
        limit = bucket.limit.capacity, bucket.limit.period_us, is_nearly_used_up(bucket)
        buckets = self._by_limit.get(limit)
        if buckets is None:
            if len(self._by_limit) >= MAX_URGENT_LIMITS:
                return False
            buckets = self._by_limit[limit] = deque()
        if len(buckets) >= MAX_URGENT_OF_LIMIT:
            return False
        buckets.append(bucket)
        self._length += 1
        return True

    def pop(self) -> Bucket:
        """The bucket that has waited longest, of the limit whose turn it is. There must be one."""
        limit, buckets = self._by_limit.popitem(last=False)
        bucket = buckets.popleft()
        self._length -= 1
        if buckets:
            self._by_limit[limit] = buckets
        return bucket


def is_nearly_used_up(bucket: Bucket) -> bool:
    """True when at most 1/`URGENT_SHARE` of the capacity is left."""
    return bucket.remaining * URGENT_SHARE <= bucket.limit.capacity


class Journal:
    """All that the replicated buckets of one store share. Each refers to it; a bucket without one is not replicated.

    - The buckets with entries that were not sent yet, and those to be sent early. Each flush empties it
      (`Store.drain_changes`).
    - What buckets must know of the node: its peers, its new origin after the clock was set back, whether it restores,
      how much memory is left.
    - What they report: parts of peers' data that were refused, and buckets left out of what is sent.
    """

    __slots__ = (
        "buckets",
        "horizon_shift",
        "is_restoring",
        "left_out",
        "left_out_error",
        "max_received_bytes",
        "on_urgent",
        "origin",
        "peers",
        "received_bytes",
        "refused",
        "urgent",
    )

    def __init__(self, max_received_bytes: int = DEFAULT_MAX_RECEIVED_BYTES) -> None:
        self.buckets: list[Bucket] = []
        """Each at most once."""
        self.max_received_bytes = max_received_bytes
        """The most memory that entries of other origins may take in all buckets. Three quarters may be taken by those
        that are no connected peers, as a member may have invented them; a fourth more where a bucket has few of them
        (`LEAST_ORIGINS`). Each rule may take `RULE_SHARE` times what is left of that."""
        self.received_bytes = 0
        """About what they take."""
        self.horizon_shift = 0
        """How many times the horizon of token buckets is halved, because all together have too many slots
        (`Store.sweep`)."""
        self.urgent = UrgentBuckets()
        """Buckets of which much was taken, until somebody pops them."""
        self.peers: set[Origin] = set()
        """The connected peers, and the fabric. Their entries are accepted even when a bucket already has
        `MAX_ORIGINS`."""
        self.is_restoring = False
        """True while this node reads what it wrote itself: of a bucket more than `MAX_ORIGINS`, if peers have restarted
        often."""
        self.refused: Counter[Refused] = Counter()
        """Counted since its reader last cleared it."""
        self.left_out = 0
        """How often since start a bucket was left out of what is sent, kept or compared, since it cannot be encoded."""
        self.left_out_error = ""
        """Why the first one was."""
        self.on_urgent: Callable[[], object] = _wait_for_the_next_flush
        """Called when a bucket is nearly used up, so that peers learn it at once. It must be O(1), without I/O."""
        self.origin: Origin | None = None
        """The origin that buckets must write under since the clock was set back (`Store.go_back`); None when it was
        never set back.
        """

    def has_room(self, quarters: int, of_rule: int) -> bool:
        """Whether there is room for another entry of another origin, in so many quarters of `max_received_bytes`.

        Args:
            of_rule: the memory of those of the bucket's rule.
        """
        return of_rule < RULE_SHARE * ((self.max_received_bytes >> 2) * quarters - self.received_bytes)

    @property
    def has_room_for_all(self) -> bool:
        """Whether entries of any origin and rule are taken, also of those that are no connected peers."""
        return self.has_room(3, self.received_bytes)

    @property
    def is_crowded(self) -> bool:
        """Whether they take half of that. Token buckets are sealed as early as may be then, so that clients who invent
        keys in all regions do not fill the rest."""
        return self.received_bytes >= self.max_received_bytes >> 1

    def leave_out(self, error: Exception) -> None:
        """Count a bucket that cannot be encoded. The others must not suffer."""
        self.left_out += 1
        self.left_out_error = self.left_out_error or str(error)

    def forget(self) -> None:
        """Forget which buckets have changed."""
        self.buckets.clear()
        self.urgent = UrgentBuckets()

    def mark_urgent(self, bucket: Bucket) -> None:
        """Note a bucket that has become nearly used up: peers should learn of it before others, and at once."""
        self.urgent.add(bucket)
        self.on_urgent()


def _wait_for_the_next_flush() -> None:
    pass
