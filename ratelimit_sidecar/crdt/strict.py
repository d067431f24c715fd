"""A bucket that all replicas together never overdraw: each holds a purse of it, and pays others what it does not need.

Theory of operation (after bounded counters, Balegas et al. 2015, and the demarcation protocol, Barbara and
Garcia-Molina 1992). Replica i has a *home* H_i, the most tokens that it may hold, and a part r_i of the refill; the
sums are at most the limit's. It holds a level L. To get more it *asks* a peer on a stream, and reserves room R for the
answer: L + R <= H always. The peer *pays* out of its level, on the same stream, and at most the room. When the end of
the stream closes here, the room is free again, and what comes later does not count.

Why it is safe. A payment under way has its room at the one that asked, so levels and payments under way are together at
most sum(L + R) <= sum(H) <= capacity. A take lowers that by what it admits, a payment moves it, a crash or a lost
payment lowers it, and only refill raises it, by at most `rate * dt`. So what is admitted in (s, t] is at most
capacity + rate * (t - s). Delays, order, loss, restarts and wall clocks do not come into it.
docs/algorithm.md has more.

This is the rule, and all that safety depends on. When and how much is asked for and paid is up to `paying.py`.

Units: a home is in parts of 2**32 of the limit, an amount that is paid in 2**-32 tokens, a level in grains, of which a
token has period_us * 2**32: so all of it is integers. Of a limit of up to a million tokens homes stand for whole
tokens. Time is microseconds of a clock that never steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Final, NamedTuple

from ratelimit_sidecar.crdt.bucket import Bucket, Entry, Origin
from ratelimit_sidecar.crdt.limit import AnyLimit, Limit
from ratelimit_sidecar.crdt.shares import MAX_WHOLE_CAPACITY, whole_tokens

WINDOW_US: Final = 500_000
"""Demand is what was asked for in the current window and the one before."""

MAX_AMOUNT: Final = 1 << 62
"""Of one payment, in 2**-32 tokens."""

NEVER_US: Final = -1 << 62

NO_HOME_US: Final = 2_500_000
"""Without a home nothing is ever admitted, and how long that lasts nobody here knows: some time."""


class _Credit(NamedTuple):
    """What a peer that has paid can have left of its own at `at_us`, for all that is known here."""

    grains: int
    at_us: int
    ceiling: int
    refill: int


class StrictBucket(Bucket):
    """One replica's purse of a strict limit.

    Args:
        home: parts that are this replica's own.
        from_us: since when they are; the bucket was empty then.
        now_us: see above for the clock.
        active: takes the bucket when something is wanted of it; whoever takes it out again resets `is_active`.
    """

    __slots__ = (
        "_active",
        "_asked_before",
        "_asked_now",
        "_credits",
        "_limit",
        "_window",
        "ceiling",
        "denied_us",
        "home",
        "home_version",
        "is_active",
        "level",
        "refill",
        "reserved",
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
        self.level = 0
        """L, in grains at `at_us`; below 0 what was charged although it was denied."""
        self.reserved: dict[int, int] = {}
        """R: by the end of a stream, the amount asked for on it and not answered yet."""
        self._credits: dict[str, _Credit] = {}
        """By peer that has paid."""
        self.ceiling, self.refill = home_of(limit, home)
        """H, in grains, and the grains that it refills in a microsecond."""
        self._asked_now = self._asked_before = 0
        self._window = now_us // WINDOW_US
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
        self._roll_window()
        self._asked_now += hits
        if not self.is_active:
            self.is_active = True
            self._active.append(self)

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

    def ask(self, end: int, amount: int) -> None:
        """Ask for up to so much on that end of a stream, on which no other ask of this bucket is open.

        Args:
            amount: more than 0, and no more than there is room for.
        """
        assert end not in self.reserved
        self.reserved[end] = amount
        assert amount > 0
        assert max(0, self.level) + self.room_reserved <= self.ceiling

    def pay(self, peer: str, amount: int) -> int:
        """Give up to so much away, for good; returns how much."""
        period_us = self._limit.period_us
        amount = max(0, min(amount, self.level // period_us))
        self.level -= amount * period_us
        if peer in self._credits:
            credit = self._credits[peer]
            self._credits[peer] = credit._replace(grains=credit.grains + amount * period_us)
        return amount

    def paid(self, end: int, peer: str, amount: int, most: int) -> bool:
        """The ask that is open on that end was answered. A peer that lies is believed no more, from payment to payment,
        than its home holds, what that refills, and what it was paid from here.

        Args:
            most: parts that the peer's home can be.

        Returns:
            False when it has paid more than that, or than it was asked for.
        """
        ceiling, refill = home_of(self._limit, most)
        credit = min(ceiling, self.credit_of(peer, ceiling))
        asked = self.reserved.pop(end)
        grains = min(amount, asked) * self._limit.period_us
        # A limit lowered meanwhile may leave less room than was asked for.
        room = self.ceiling - self.room_reserved - self.level
        added = max(0, min(grains, room, credit))
        self._credits[peer] = _Credit(credit - added, self.at_us, ceiling, refill)
        self.level += added
        return amount <= asked and grains <= credit

    def credit_of(self, peer: str, most: int) -> int:
        """The grains that a peer is believed to have of its own at `at_us`; `most` when it has never paid."""
        credit = self._credits.get(peer)
        if credit is None:
            return most
        return min(credit.ceiling, credit.grains + (self.at_us - credit.at_us) * credit.refill)

    def put_back(self, amount: int) -> None:
        """It had so much when this replica was stopped, in 2**-32 tokens, below 0 what was owed."""
        top = max(self.level, self.ceiling - self.room_reserved)
        self.level = min(top, self.level + amount * self._limit.period_us)

    def closed(self, end: int) -> None:
        """That end of a stream is closed: no answer counts any more."""
        self.reserved.pop(end, None)

    def merge(self, _entries: Iterable[Entry], _now_us: int) -> int:
        """Nothing: what others take from their homes is theirs to count."""
        return 0

    def _recount(self) -> None:
        pass

    def set_limit(self, limit: AnyLimit, now_us: int) -> None:
        assert isinstance(limit, Limit)
        self.advance(now_us)
        # Rounded down: no token is won by a change.
        self.level = self.level * limit.period_us // self._limit.period_us
        self._limit = limit
        self._credits.clear()
        self.set_home(self.home, now_us)

    def set_home(self, home: int, now_us: int) -> None:
        """Another home, from now on."""
        self.advance(now_us)
        self.home = home
        self.ceiling, self.refill = home_of(self._limit, home)
        self.level = min(self.level, max(0, self.ceiling - self.room_reserved))

    def seal(self, now_us: int) -> None:
        self.advance(now_us)

    def is_idle(self, now_us: int) -> bool:
        """True when it is full and asks for nothing: made anew, it would not have more."""
        self.advance(now_us)
        return self.level == self.ceiling and not self.reserved

    def fold(self, now_us: int) -> int:
        """The level of this replica."""
        self.advance(now_us)
        return self.level

    @property
    def asked(self) -> int:
        """Tokens asked for in the last one to two windows, admitted or not."""
        self._roll_window()
        return self._asked_before + self._asked_now

    @property
    def demand(self) -> int:
        """What was asked for of late, in 2**-32 tokens a second."""
        return (self.asked * 1_000_000 << 32) // (WINDOW_US + self.at_us % WINDOW_US)

    def _roll_window(self) -> None:
        window = self.at_us // WINDOW_US
        if window != self._window:
            self._asked_before = self._asked_now if window == self._window + 1 else 0
            self._asked_now = 0
            self._window = window


def home_of(limit: Limit, parts: int) -> tuple[int, int]:
    """The grains that a home holds, and that it refills in a microsecond."""
    capacity = limit.capacity
    if capacity > MAX_WHOLE_CAPACITY:
        return limit.ceiling * parts, limit.tokens * parts
    tokens = whole_tokens(parts, capacity)
    # Rounded down, by less than one part in 4,096 of what a token refills.
    return tokens * limit.period_us << 32, (limit.tokens * tokens << 32) // max(1, capacity)
