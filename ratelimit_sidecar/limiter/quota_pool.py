"""What is known of Envoys with quotas: their buckets, and the pools of those that share one limit on one key.

Values and state only; what is done with them is in `quota.py`, `quota_division.py` and `quota_charges.py`. Times are
microseconds of one clock that does not step, rates billionths of a token per second.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from ratelimit_sidecar.crdt.limit import AnyLimit
from ratelimit_sidecar.limiter.assignment import SECOND_US, Assignment, Terms, terms_of
from ratelimit_sidecar.limiter.fair_shares import Group, Level
from ratelimit_sidecar.limiter.plan import Step

Pairs = tuple[tuple[str, str], ...]

REPORT_US: Final = 5 * SECOND_US
"""Between two reports of an Envoy, whatever its `reporting_interval`."""

MAX_RATE: Final = 2**63 - 1
"""Of a demand: nine billion requests a second."""


class Usage(NamedTuple):
    """What an Envoy reports of one bucket.

    Args:
        bucket_id: as it came, to be sent back.
        pairs: texts from `text_of`.
        elapsed_s: since the last report of it; 0 of a new one, as Envoy cuts it to whole seconds.
    """

    bucket_id: bytes
    pairs: Pairs
    allowed: int
    denied: int
    elapsed_s: int


class Action(NamedTuple):
    """What an Envoy is told. Without an assignment it is to forget the bucket."""

    bucket_id: bytes
    assignment: Assignment | None


class Hold:
    """One bucket of one Envoy."""

    __slots__ = (
        "active_us",
        "bucket_id",
        "counted",
        "demand",
        "expires_us",
        "generation",
        "key",
        "measured_us",
        "pool",
        "reported_us",
        "step",
        "stream",
        "told",
        "want",
    )

    def __init__(self, stream: QuotaStream, key: tuple[str, Pairs], usage: Usage, pool: Pool, step: Step) -> None:
        self.stream = stream
        self.key = key
        self.bucket_id = usage.bucket_id
        self.pool = pool
        self.step = step
        self.generation = 0
        """That of the rules which it was matched by."""
        self.demand = -1
        """Hits per second, also those denied; -1 while not measured."""
        self.counted = 0
        """Hits since `measured_us`."""
        self.measured_us = self.reported_us = self.active_us = 0
        self.told: Assignment | None = None
        self.expires_us = 0
        self.want = 0

    @property
    def rate(self) -> int:
        """What it holds."""
        return 0 if self.told is None else self.told.rate


class Lost(NamedTuple):
    """What an Envoy holds, or may hold, whose stream has ended."""

    rate: int
    expires_us: int
    lost_us: int


class Heard(NamedTuple):
    """A peer's demand."""

    groups: Sequence[Group]
    heard_us: int


class Pool:
    """All that share one limit on one key."""

    __slots__ = (
        "budget",
        "charge_until_us",
        "charged_us",
        "demand",
        "due",
        "heard",
        "held",
        "holds",
        "is_dirty",
        "key",
        "level",
        "limit",
        "lost",
        "pending",
        "step",
        "terms",
        "told_us",
        "waiting",
    )

    def __init__(self, key: bytes, limit: AnyLimit | None) -> None:
        self.key = key
        self.limit = limit
        self.terms: Terms | None = None if limit is None else terms_of(limit)
        self.step: Step | None = None
        """To take by from its bucket; None while only peers have told of it."""
        self.holds: dict[Hold, None] = {}
        self.due: dict[Hold, None] = {}
        """To be told when it is shared the next time."""
        self.lost: list[Lost] = []
        self.waiting: dict[Hold, None] = {}
        """Those that hold something, of which it is not known how much: see `Quotas._settle`."""
        self.heard: dict[str, Heard] = {}
        self.level = Level(0, 0)
        self.budget = 0
        """The rate of all holds, and of what is lost."""
        self.held = 0
        """Of it."""
        self.is_dirty = False
        self.pending = 0
        """Tokens to be charged until `charge_until_us`."""
        self.charged_us = self.charge_until_us = 0
        self.demand: tuple[Group, ...] = ()
        """As peers are told of it."""
        self.told_us = 0

    @property
    def is_needed(self) -> bool:
        return bool(self.holds or self.lost or self.heard or self.pending)


class QuotaStream:
    """One Envoy, or rather one of its filters.

    Args:
        wake: called when `Quotas.take` may have something.
    """

    __slots__ = ("due", "holds", "wake")

    def __init__(self, wake: Callable[[], None]) -> None:
        self.wake = wake
        self.holds: dict[tuple[str, Pairs], Hold] = {}
        self.due: dict[Hold, None] = {}
