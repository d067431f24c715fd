"""The state of Envoys with quotas: their buckets, and the pools of buckets that share one limit on one bucket key.

Values and state only; `quota.py`, `quota_division.py` and `quota_charges.py` work on them. Times are microseconds of
one clock that does not step, rates billionths of a token per second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from ratelimit_sidecar.crdt.limit import AnyLimit
from ratelimit_sidecar.limiter.assignment import Assignment, ShareBase, share_base_of
from ratelimit_sidecar.limiter.fair_shares import Group, ShareLevel
from ratelimit_sidecar.limiter.plan import PlannedTake

Pairs = tuple[tuple[str, str], ...]

CROWDED_BYTES: Final = 1 << 18
"""An Envoy with more than so many bytes of ids, some 2,500 buckets, is crowded: clients may have invented them. Its
main thread copies all of them for each that is new, for each of which an assignment expires, and for each message. So
it is told to drop those without requests soon, and new ones get no assignment before a second report has requests.
"""

MAX_RATE: Final = 2**63 - 1
"""The largest demand: nine billion requests a second."""


class Usage(NamedTuple):
    """An Envoy's report on one bucket.

    Args:
        bucket_id: as the Envoy sent it, to be sent back.
        pairs: texts from `text_of`.
        elapsed_s: seconds since the last report on it; 0 for a new one, since Envoy cuts it to whole seconds.
        is_utf8: False if the id cannot be sent back: an Envoy refuses a whole message with a text that is not UTF-8.
    """

    bucket_id: bytes
    pairs: Pairs
    allowed: int
    denied: int
    elapsed_s: int
    is_utf8: bool = True


class Action(NamedTuple):
    """A message to an Envoy about one bucket. Without an assignment it must drop the bucket."""

    bucket_id: bytes
    assignment: Assignment | None


class EnvoyBucket:
    """One bucket of one Envoy."""

    __slots__ = (
        "active_us",
        "assignment",
        "bucket_id",
        "counted",
        "demand",
        "expires_us",
        "generation",
        "key",
        "measured_us",
        "planned_take",
        "pool",
        "reported_us",
        "stream",
        "want",
    )

    def __init__(
        self, stream: QuotaStream, key: tuple[str, Pairs], usage: Usage, pool: Pool, take: PlannedTake
    ) -> None:
        self.stream = stream
        self.key = key
        self.bucket_id = usage.bucket_id
        self.pool = pool
        self.planned_take = take
        self.generation = 0
        """The generation of the rules that it was matched by."""
        self.demand = -1
        """Hits per second, denied ones included, in billionths; -1 while not measured."""
        self.counted = 0
        """Hits since `measured_us`."""
        self.measured_us = self.reported_us = self.active_us = 0
        self.assignment: Assignment | None = None
        """The last assignment sent."""
        self.expires_us = 0
        """When that expires."""
        self.want = 0
        """The rate it wants, rounded up; set by `Division.divide`."""

    @property
    def rate(self) -> int:
        """The rate of its assignment; 0 without one."""
        return 0 if self.assignment is None else self.assignment.rate


class OrphanedAssignment(NamedTuple):
    """An assignment whose stream has ended. It counts until it expires, since its Envoy may still enforce it."""

    rate: int
    expires_us: int
    orphaned_us: int


class PeerDemand(NamedTuple):
    """The demand of one peer's Envoys on one limit."""

    groups: Sequence[Group]
    received_us: int


class Pool:
    """All Envoy buckets that share one limit on one bucket key, and the demands of peers on it."""

    __slots__ = (
        "buckets",
        "budget",
        "charge_until_us",
        "charged_us",
        "demand",
        "demand_sent_us",
        "due",
        "held",
        "key",
        "level",
        "limit",
        "orphans",
        "peer_demands",
        "pending",
        "planned_take",
        "share_base",
        "waiting",
    )

    def __init__(self, key: bytes, limit: AnyLimit | None) -> None:
        self.key = key
        self.limit = limit
        self.share_base: ShareBase | None = None if limit is None else share_base_of(limit)
        self.planned_take: PlannedTake | None = None
        """How to charge the limit's bucket; None while only peers have reported a demand."""
        self.buckets: dict[EnvoyBucket, None] = {}
        self.due: dict[EnvoyBucket, None] = {}
        """Buckets that get an assignment when the pool is divided next."""
        self.orphans: list[OrphanedAssignment] = []
        self.waiting: dict[EnvoyBucket, None] = {}
        """Buckets that have an assignment of unknown rate: see `Quotas._assign_orphans`."""
        self.peer_demands: dict[str, PeerDemand] = {}
        self.level = ShareLevel(0, 0)
        self.budget = 0
        """The rate this node may assign in total."""
        self.held = 0
        """How much of `budget` is assigned now, orphaned assignments included."""
        self.pending = 0
        """Tokens to be charged until `charge_until_us`."""
        self.charged_us = self.charge_until_us = 0
        self.demand: tuple[Group, ...] = ()
        """The demand last sent to peers."""
        self.demand_sent_us = 0

    @property
    def size(self) -> int:
        """About how long it takes to divide it."""
        return len(self.buckets) + len(self.orphans)

    @property
    def is_needed(self) -> bool:
        return bool(self.buckets or self.orphans or self.peer_demands or self.pending)


class QuotaStream:
    """One stream of an Envoy; each of its quota filters has one.

    Args:
        wake: called when `Quotas.take` may return something.
    """

    __slots__ = ("abandoned", "abandoned_bytes", "buckets", "due", "id_bytes", "is_open", "sends_abandoned", "wake")

    def __init__(self, wake: Callable[[], None]) -> None:
        self.wake = wake
        self.is_open = True
        self.buckets: dict[tuple[str, Pairs], EnvoyBucket] = {}
        self.due: dict[EnvoyBucket, None] = {}
        self.id_bytes = 0
        """About the bytes of a report on all its buckets."""
        self.abandoned: list[bytes] = []
        """Ids of buckets that have no record here, which the Envoy is to drop."""
        self.abandoned_bytes = 0
        self.sends_abandoned = False
        """True when they are to be sent now; until they are, no more are added."""

    @property
    def is_crowded(self) -> bool:
        return self.id_bytes > CROWDED_BYTES
