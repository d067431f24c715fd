"""A bucket that all replicas together never overdraw: each has a purse of it, and pays others what it does not need.

Replica i has a *home* H_i, the most that it may hold, and a part of the refill; the sums are at most the limit's. It
holds a level L. To get more it *asks* a peer on a stream, and reserves room R for the answer: L + R <= H always. The
peer *pays* out of its level, on the same stream, and at most that. When the end of the stream closes here, the room is
free again, and what comes later does not count. So levels and payments under way together are at most
sum(L + R) <= sum(H) <= capacity, and only refill raises them. docs/algorithm.md has the proof.

This is the rule, and all that safety depends on. When and how much is asked for and paid is up to `paying.py`.

Units: amounts, homes among them, are in 2**-32 tokens, a level in grains, of which a token has period_us * 2**32: so
all of it is integers. Time is microseconds of a clock that never steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Final

from ratelimit_sidecar.crdt.bucket import Bucket, Entry, Origin
from ratelimit_sidecar.crdt.limit import AnyLimit, Limit

NEVER_US: Final = -1 << 62

DEMAND_US: Final = 1_000_000
"""What was asked for is forgotten within such a time."""

FADE_US: Final = 10_000
"""Steps in which it is forgotten: one for each request would take longer than all else that it needs."""

NO_HOME_US: Final = 2_500_000
"""Without a home nothing is ever admitted, and how long that lasts nobody here knows: some time."""


class StrictBucket(Bucket):
    """One replica's purse of a strict limit.

    Args:
        home: this replica's own.
        from_us: since when it is; the bucket was empty then.
        active: takes the bucket when something is wanted of it; whoever takes it out again resets `is_active`.
    """

    __slots__ = (
        "_active",
        "_drawn",
        "_limit",
        "_wanted",
        "_wanted_us",
        "ceiling",
        "denied_us",
        "home",
        "home_version",
        "is_active",
        "level",
        "refill",
        "reserved",
        "withheld",
    )

    def __init__(
        self,
        key: bytes,
        limit: Limit,
        origin: Origin,
        now_us: int,
        *,
        home: int,
        from_us: int,
        active: deque[StrictBucket] | None = None,
    ) -> None:
        super().__init__(key, origin, min(from_us, now_us))
        self._limit = limit
        self._active = deque() if active is None else active
        self.is_active = False
        self.home = home
        self.home_version = 0
        """For its owner, to see when the home has to be set again."""
        self.withheld = 0
        """Of the home: others run a token bucket of that."""
        self.level = 0
        """L, in grains at `at_us`; below 0 what was charged although it was denied."""
        self.reserved: dict[int, int] = {}
        """R: by the end of a stream, the amount asked for on it and not answered yet."""
        self._drawn: dict[str, tuple[int, int]] = {}
        """By peer that has paid, the grains that were then missing in its home for all that is known here, and when."""
        self.ceiling, self.refill = in_grains(limit, home)
        """H, in grains, and the grains that it refills in a microsecond."""
        self._wanted, self._wanted_us = 0, now_us
        self.denied_us = NEVER_US
        """When there was too little for a request last."""
        self.advance(now_us)

    @property
    def limit(self) -> Limit:
        return self._limit

    def would_admit(self, hits: int, now_us: int) -> bool:
        """See `Bucket.would_admit`; what would be denied is asked of peers, as `take` does."""
        self.advance(now_us)
        if (hits * self._limit.period_us) << 32 <= self.level:
            return True
        self._want(hits)
        self.denied_us = self.at_us
        return False

    def take(self, hits: int, now_us: int, *, always: bool = False) -> bool:
        self.advance(now_us)
        self._want(hits)
        charge = (hits * self._limit.period_us) << 32
        admitted = charge <= self.level
        if admitted or always:
            self.level -= charge
        if not admitted:
            self.denied_us = self.at_us
        return admitted

    def _want(self, hits: int) -> None:
        """Note the demand, by which peers are asked."""
        if self.at_us - self._wanted_us >= FADE_US:
            self._fade()
        self._wanted += hits << 20
        if not self.is_active:
            self.is_active = True
            self._active.append(self)

    def _fade(self) -> None:
        elapsed_us = self.at_us - self._wanted_us
        self._wanted = self._wanted * (DEMAND_US - elapsed_us) // DEMAND_US if elapsed_us < DEMAND_US else 0
        self._wanted_us = self.at_us

    @property
    def demand(self) -> int:
        """The amount that was asked for in the last second or so, admitted or not."""
        self._fade()
        return self._wanted << 12

    @property
    def remaining(self) -> int:
        """Whole tokens this replica can admit by itself at `at_us`."""
        return max(0, self.level // (self._limit.period_us << 32))

    @property
    def debt(self) -> int:
        return max(0, -(self.level // (self._limit.period_us << 32)))

    @property
    def full_in_us(self) -> int:
        """Microseconds until this replica's home is full, but for what it has asked for."""
        return self._refilled_in_us(self.ceiling)

    def retry_after_us(self, hits: int) -> int:
        return self._refilled_in_us(min(self.ceiling, (hits * self._limit.period_us) << 32))

    def _refilled_in_us(self, level: int) -> int:
        return max(0, -(-(level - self.level) // self.refill)) if self.refill else NO_HOME_US

    def advance(self, now_us: int) -> None:
        elapsed_us = now_us - self.at_us
        if elapsed_us > 0:
            top = self.ceiling - self.room_reserved if self.reserved else self.ceiling
            if self.level < top:
                self.level = min(top, self.level + elapsed_us * self.refill)
            self.at_us = now_us

    @property
    def room_reserved(self) -> int:
        """R, in grains."""
        return sum(self.reserved.values()) * self._limit.period_us

    @property
    def room(self) -> int:
        """The grains that may be asked for."""
        return self.ceiling - max(0, self.level) - self.room_reserved

    def ask(self, end: int, amount: int) -> None:
        """Ask for up to so much, more than 0, on that end of a stream, on which no other ask of this bucket is open."""
        assert end not in self.reserved
        assert 0 < amount * self._limit.period_us <= self.room
        self.reserved[end] = amount

    def pay(self, peer: str, amount: int) -> int:
        """Give up to so much away, for good; returns how much."""
        period_us = self._limit.period_us
        amount = max(0, min(amount, self.level // period_us))
        self.level -= amount * period_us
        drawn, at_us = self._drawn.get(peer, (0, 0))
        self._drawn[peer] = max(0, drawn - amount * period_us), at_us
        return amount

    def paid(self, end: int, peer: str, amount: int, most: int) -> bool:
        """The ask that is open on that end was answered. A peer that lies is believed no more, from payment to payment,
        than its home holds, what that refills, and what it was paid from here.

        Args:
            most: that the peer's home can be.

        Returns:
            False when it has paid more than that, or than it was asked for.
        """
        credit, asked = self.credit_of(peer, most), self.reserved.pop(end)
        grains = min(amount, asked) * self._limit.period_us
        # A limit lowered meanwhile may leave less room than was asked for.
        added = max(0, min(grains, self.room, credit))
        self._drawn[peer] = in_grains(self._limit, most)[0] - credit + added, self.at_us
        self.level += added
        return amount <= asked and grains <= credit

    def credit_of(self, peer: str, most: int) -> int:
        """The grains that a peer with such a home is believed to have of its own at `at_us`."""
        ceiling, refill = in_grains(self._limit, most)
        drawn, at_us = self._drawn.get(peer, (0, 0))
        return ceiling - max(0, drawn - (self.at_us - at_us) * refill)

    def put_back(self, amount: int) -> None:
        """Add what it had when this replica was stopped, in 2**-32 tokens; below 0 it is what was owed."""
        top = max(self.level, self.room + max(0, self.level))
        self.level = min(top, self.level + amount * self._limit.period_us)

    def closed(self, end: int, now_us: int) -> None:
        """That end of a stream is closed: no answer counts any more."""
        self.advance(now_us)
        self.reserved.pop(end, None)

    def set_limit(self, limit: AnyLimit, now_us: int) -> None:
        """The home has to be set anew."""
        assert isinstance(limit, Limit)
        self.advance(now_us)
        # Rounded down: no token is won by a change.
        self.level = self.level * limit.period_us // self._limit.period_us
        self._limit = limit
        self._drawn.clear()

    def set_home(self, home: int, now_us: int) -> None:
        """Another home from now on, with what is withheld of it."""
        self.advance(now_us)
        self.home = max(0, home - self.withheld)
        self.ceiling, self.refill = in_grains(self._limit, self.home)
        self.level = min(self.level, max(0, self.ceiling - self.room_reserved))

    def is_idle(self, now_us: int) -> bool:
        """True when it is full and asks for nothing: made anew, it would not have more."""
        self.advance(now_us)
        return self.level == self.ceiling and not self.reserved and not self.withheld

    def fold(self, now_us: int) -> int:
        """The level of this replica."""
        self.advance(now_us)
        return self.level

    def seal(self, now_us: int) -> None:
        self.advance(now_us)

    def merge(self, _entries: Iterable[Entry], _now_us: int) -> int:
        """Nothing: what others take from their homes is theirs to count."""
        return 0

    def _recount(self) -> None:
        pass


def in_grains(limit: Limit, home: int) -> tuple[int, int]:
    """The grains that a home holds, and that it refills in a microsecond."""
    return home * limit.period_us, limit.tokens * home // max(1, limit.capacity)
