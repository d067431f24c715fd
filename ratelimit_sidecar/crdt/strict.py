"""A bucket that all replicas together never overdraw: each holds a part of the tokens, and pays others what it can
spare.

Theory of operation (after bounded counters, Balegas et al. 2015, and the demarcation protocol, Barbara and
Garcia-Molina 1992). Replica i has a *home* H_i, the most tokens that it may hold, and a part r_i of the refill; the
sums are at most the limit's. It holds a level L. To get more it *asks* a peer on a stream, and reserves room R for the
answer: L + R <= H always. The peer *pays* out of its level, on the same stream, and at most the room. When the end of
the stream closes here, the room is free again, and a later payment on it does not count.

Why it is safe. A payment under way has its room at the one that asked, so levels and payments under way are together at
most sum(L + R) <= sum(H) <= capacity. A take lowers that by what it admits, a payment moves it, a crash or a lost
payment lowers it, and only refill raises it, by at most `rate * dt`. So what is admitted in (s, t] is at most
capacity + rate * (t - s). Delays, order, loss, restarts and wall clocks do not come into it.
docs/algorithm.md has more.

Safety depends on this file alone. `paying.py` decides when and how much is asked for and paid.

Units: a home is in parts of 2**32 of the limit, a payment in 2**-32 tokens, a level in *grains*: a token is
period_us * 2**32 grains. So everything is an integer. With a limit of up to a million tokens, homes are whole tokens.
Time is microseconds of a clock that never steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Final, NamedTuple

from ratelimit_sidecar.crdt.bucket import Bucket, Entry, Origin
from ratelimit_sidecar.crdt.limit import AnyLimit, Limit
from ratelimit_sidecar.crdt.shares import MAX_WHOLE_CAPACITY, whole_tokens

WINDOW_US: Final = 500_000
"""Demand is measured over the current window and the one before."""

MAX_AMOUNT: Final = 1 << 62
"""The largest payment, in 2**-32 tokens."""

NEVER_US: Final = -1 << 62

NO_HOME_US: Final = 2_500_000
"""The retry time in answers while this replica has no home. How long that lasts is not known here."""


class _Credit(NamedTuple):
    """The most that a peer can still have at `at_us`, after what it has paid to this replica."""

    grains: int
    at_us: int
    ceiling: int
    refill: int


class StrictBucket(Bucket):
    """This replica's part of a strict limit. It decides from its own level, and changes it by refill and payments.

    Args:
        home: the parts of the limit that are this replica's.
        from_us: the time since when it has them; the bucket was empty then.
        now_us: see above for the clock.
        active: the bucket appends itself when a request takes from it. Whoever removes it must reset `is_active`.
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
        """Used by the owner to see whether it has to set the home again."""
        self.level = 0
        """L, in grains at `at_us`. Below 0 after denied hits that were charged."""
        self.reserved: dict[int, int] = {}
        """R: by stream end, the amount asked for on it and not answered yet."""
        self._credits: dict[str, _Credit] = {}
        """By peer that has paid."""
        self.ceiling, self.refill = home_of(limit, home)
        """The home (H) in grains, and its refill in grains per microsecond."""
        self._asked_now = self._asked_before = 0
        self._window = now_us // WINDOW_US
        self.denied_us = NEVER_US
        """Time of the last denial."""
        self.advance(now_us)

    @property
    def limit(self) -> Limit:
        return self._limit

    def would_admit(self, hits: int, now_us: int) -> bool:
        """See `Bucket.would_admit`. If it would be denied, it counts as demand, as in `take`, so that peers
        are asked.
        """
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
        """Count the hits as demand, and mark the bucket as active so that peers are asked."""
        self._roll_window()
        self._asked_now += hits
        if not self.is_active:
            self.is_active = True
            self._active.append(self)

    @property
    def remaining(self) -> int:
        """Whole tokens that this replica can admit by itself at `at_us`."""
        return max(0, self.level // (self._limit.period_us << 32))

    @property
    def debt(self) -> int:
        return max(0, -(self.level // (self._limit.period_us << 32)))

    @property
    def full_in_us(self) -> int:
        """Microseconds until this replica's home is full, reserved room not considered."""
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
        """Reserve room for an ask. The caller sends it, and later calls `paid` or `closed`.

        Args:
            end: the stream end on which it is sent. No other ask of this bucket may be open on it.
            amount: more than 0, and no more than there is room for.
        """
        assert end not in self.reserved
        self.reserved[end] = amount
        assert amount > 0
        assert max(0, self.level) + self.room_reserved <= self.ceiling

    def pay(self, peer: str, amount: int) -> int:
        """Take up to `amount` out of the level, to send to a peer; returns how much."""
        period_us = self._limit.period_us
        amount = max(0, min(amount, self.level // period_us))
        self.level -= amount * period_us
        if peer in self._credits:
            credit = self._credits[peer]
            self._credits[peer] = credit._replace(grains=credit.grains + amount * period_us)
        return amount

    def paid(self, end: int, peer: str, amount: int, most: int) -> bool:
        """Add the payment that answers the ask open on `end`.

        Credit the peer at most with what it can have: its home, the refill since, and payments from here.

        Args:
            most: the largest that the peer's home can be, in parts.

        Returns:
            False if the peer claims more than that, or more than it was asked for.
        """
        ceiling, refill = home_of(self._limit, most)
        credit = min(ceiling, self.credit_of(peer, ceiling))
        asked = self.reserved.pop(end)
        grains = min(amount, asked) * self._limit.period_us
        # If the limit was lowered meanwhile, there may be less room than was reserved.
        room = self.ceiling - self.room_reserved - self.level
        added = max(0, min(grains, room, credit))
        self._credits[peer] = _Credit(credit - added, self.at_us, ceiling, refill)
        self.level += added
        return amount <= asked and grains <= credit

    def credit_of(self, peer: str, most: int) -> int:
        """The most grains that a peer can have at `at_us`; `most` if it has never paid."""
        credit = self._credits.get(peer)
        if credit is None:
            return most
        return min(credit.ceiling, credit.grains + (self.at_us - credit.at_us) * credit.refill)

    def put_back(self, amount: int) -> None:
        """It had so much when this replica was stopped, in 2**-32 tokens, below 0 what was owed."""
        top = max(self.level, self.ceiling - self.room_reserved)
        self.level = min(top, self.level + amount * self._limit.period_us)

    def closed(self, end: int) -> None:
        """Free the room reserved on that stream end: it is closed, so no answer can come."""
        self.reserved.pop(end, None)

    def merge(self, _entries: Iterable[Entry], _now_us: int) -> int:
        """Ignore entries: each replica counts only its own takes."""
        return 0

    def _recount(self) -> None:
        pass

    def set_limit(self, limit: AnyLimit, now_us: int) -> None:
        assert isinstance(limit, Limit)
        self.advance(now_us)
        # Rounded down, so that a change adds no tokens.
        self.level = self.level * limit.period_us // self._limit.period_us
        self._limit = limit
        self._credits.clear()
        self.set_home(self.home, now_us)

    def set_home(self, home: int, now_us: int) -> None:
        """Set another home from now on; the level is cut to it."""
        self.advance(now_us)
        self.home = home
        self.ceiling, self.refill = home_of(self._limit, home)
        self.level = min(self.level, max(0, self.ceiling - self.room_reserved))

    def seal(self, now_us: int) -> None:
        self.advance(now_us)

    def is_idle(self, now_us: int) -> bool:
        """True when it is full and no ask is open: a new bucket would not have more."""
        self.advance(now_us)
        return self.level == self.ceiling and not self.reserved

    def fold(self, now_us: int) -> int:
        """This replica's level. A strict bucket has no replicated state."""
        self.advance(now_us)
        return self.level

    @property
    def asked(self) -> int:
        """Tokens that requests asked for in the last one to two windows, admitted or not."""
        self._roll_window()
        return self._asked_before + self._asked_now

    @property
    def demand(self) -> int:
        """The rate at which requests asked for tokens lately, in 2**-32 tokens per second."""
        return (self.asked * 1_000_000 << 32) // (WINDOW_US + self.at_us % WINDOW_US)

    def _roll_window(self) -> None:
        window = self.at_us // WINDOW_US
        if window != self._window:
            self._asked_before = self._asked_now if window == self._window + 1 else 0
            self._asked_now = 0
            self._window = window


def home_of(limit: Limit, parts: int) -> tuple[int, int]:
    """The size of a home in grains, and its refill in grains per microsecond."""
    capacity = limit.capacity
    if capacity > MAX_WHOLE_CAPACITY:
        return limit.ceiling * parts, limit.tokens * parts
    tokens = whole_tokens(parts, capacity)
    # Rounded down, by less than 1/4,096 of one token's refill.
    return tokens * limit.period_us << 32, (limit.tokens * tokens << 32) // max(1, capacity)
