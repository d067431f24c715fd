"""A bucket that all replicas together never overdraw: each runs a part of it, and lends what it does not need.

Theory of operation (after bounded counters, Balegas et al. 2015, and leases, Gray and Cheriton 1989). Replica i has a
share s_i of the limit, the sum of all is at most one, and it runs a token bucket of `s_i * capacity` and `s_i * rate`.
A borrower asks, a lender grants: the lender does without the amount from then on, for the loan's length and a guard;
the borrower uses it from receipt until its *own asking time* plus the length. Asking came before granting, so whatever
the clocks say the borrower ends first, and nothing has to be agreed at the end.

Why it is safe. A transfer raises neither the sum of shares nor the sum of levels: borrowed share begins with no tokens
but those sent along, which the lender has given up, and a share that shrinks cuts the level to fit. So everything
admitted in (s, t] is at most the levels at s and the refill since: capacity + rate * (t - s).

A lender or borrower that lies can give what it does not have; so of each no more is believed than its share can hold.

Units: a share is in parts of 2**32, the level is scaled by period_us * 2**32, so all of it is integers. Of a limit of
up to a million tokens shares stand for whole tokens (`shares.parts_of`): a level below one admits nothing. Time is
microseconds of a clock that never steps and runs within 1 % of everybody else's; wall clocks do not matter here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from ratelimit_sidecar.crdt.bucket import Bucket, Entry, Origin
from ratelimit_sidecar.crdt.limit import AnyLimit, Limit
from ratelimit_sidecar.crdt.shares import (
    LOAN_GUARD_US,
    LOAN_US,
    MAX_WHOLE_CAPACITY,
    PARTS,
    parts_of,
    whole_tokens,
    whole_tokens_up,
)

LEAST_DEMAND_WINDOW_US: Final = 500_000
"""Demand is what was asked for in the current window and the one before. A window is at least the time in which two
tokens refill: of a limit per hour a second says nothing.
"""

RESERVE_SHIFT: Final = 5
"""A thirty-second of the home share is never lent, so that a region that wakes up can serve at once. Rounded down to
whole tokens, it is nothing of a home of few.
"""

_NEVER_US: Final = 1 << 62


class Ask(NamedTuple):
    """A borrower asks a lender for `parts` in all, in place of what it holds from it."""

    number: int
    """Rises with each ask of this borrower for this bucket."""
    parts: int


class Grant(NamedTuple):
    """The answer to an ask: a loan of `parts`, in place of earlier ones, with `tokens` to begin with.

    Args:
        available: parts that the lender could lend to this borrower in all.
    """

    number: int
    parts: int
    tokens: int
    available: int


class Return(NamedTuple):
    """A borrower keeps only `parts` of its loan, and takes no grant up to `number` for more any longer."""

    number: int
    parts: int
    tokens: int


class _Lent(NamedTuple):
    number: int
    parts: int
    until_us: int


class _Borrowed(NamedTuple):
    number: int
    parts: int
    until_us: int


class _Account(NamedTuple):
    amount: int
    """Scaled tokens, as of `at_us`."""
    at_us: int


class StrictBucket(Bucket):
    """Args:
    home: parts that are this replica's own.
    from_us: when they begin to be; the bucket is empty then. In the future for a replica that has just started.
    now_us: see above for the clock.
    busy: a list the bucket appends itself to when it is asked for something and `is_noted` is not set.
    """

    __slots__ = (
        "_asked_before",
        "_asked_now",
        "_borrowed",
        "_busy",
        "_ceiling",
        "_given",
        "_lent",
        "_limit",
        "_next_change_us",
        "_out",
        "_refill",
        "_taken_numbers",
        "_window",
        "_window_us",
        "from_us",
        "home",
        "home_version",
        "is_noted",
        "level",
        "share",
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
        busy: list[StrictBucket] | None = None,
    ) -> None:
        super().__init__(key, origin, min(from_us, now_us))
        self._limit = limit
        self._busy = busy if busy is not None else []
        self.is_noted = False
        """True while it is in the list of busy ones; whoever empties the list resets it."""
        self.home = home
        self.home_version = 0
        """For its owner, to see when the home share has to be set again."""
        self.from_us = from_us
        self.level = 0
        """Scaled tokens at `at_us`; below 0 what was charged although it was denied."""
        self.share = 0
        """Parts this replica may use at `at_us`: its home, less what it has lent, and what it has borrowed."""
        self._lent: dict[str, list[_Lent]] = {}
        self._borrowed: dict[str, _Borrowed] = {}
        self._taken_numbers: dict[str, int] = {}
        """By lender, the greatest number of a grant used or renounced."""
        self._given: dict[str, _Account] = {}
        """By lender, the tokens that came with its grants, less what its share has refilled since."""
        self._out: dict[str, _Account] = {}
        """By borrower, the most tokens that it can have of this replica's."""
        self._refill = self._ceiling = 0
        self._next_change_us = from_us
        self._asked_now = self._asked_before = 0
        self._window_us = _demand_window_us(limit)
        self._window = now_us // self._window_us
        self._share_again()
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
        return False

    def take(self, hits: int, now_us: int, *, always: bool = False) -> bool:
        self.advance(now_us)
        self._want(hits)
        charge = (hits * self._limit.period_us) << 32
        admitted = charge <= self.level
        if admitted or always:
            self.level -= charge
        return admitted

    def _want(self, hits: int) -> None:
        """Note the demand, by which peers are asked for loans."""
        self._roll_window()
        self._asked_now += hits
        if not self.is_noted:
            self.is_noted = True
            self._busy.append(self)

    @property
    def remaining(self) -> int:
        """Whole tokens this replica can still admit by itself at `at_us`."""
        return max(0, self.level // (self._limit.period_us << 32))

    @property
    def debt(self) -> int:
        return max(0, -(self.level // (self._limit.period_us << 32)))

    @property
    def full_in_us(self) -> int:
        """Microseconds until this replica's part is full; while it has none, until that changes."""
        if not self._refill:
            return max(0, min(self._next_change_us, self.at_us + LOAN_US) - self.at_us)
        return max(0, -(-(self._ceiling - self.level) // self._refill))

    def fits_in_us(self, hits: int) -> int:
        charge = (hits * self._limit.period_us) << 32
        if charge > self._ceiling or not self._refill:
            return self.full_in_us
        return max(0, -(-(charge - self.level) // self._refill))

    def advance(self, now_us: int) -> None:
        while self._next_change_us <= now_us:
            self._refill_until(self._next_change_us)
            self._share_again()
        self._refill_until(now_us)

    def merge(self, _entries: Iterable[Entry], _now_us: int) -> int:
        """Nothing: what others take from their shares is theirs to count."""
        return 0

    def _recount(self) -> None:
        pass

    def set_limit(self, limit: AnyLimit, now_us: int) -> None:
        assert isinstance(limit, Limit)
        self.advance(now_us)
        # Rounded down: no token is won by a change.
        self.level = self.level * limit.period_us // self._limit.period_us
        self._limit = limit
        self._window_us = _demand_window_us(limit)
        self._window = self.at_us // self._window_us
        self._share_again()

    def set_home(self, home: int, now_us: int) -> None:
        """Another home share, from now on."""
        self.advance(now_us)
        self.home = home
        self._share_again()

    def seal(self, now_us: int) -> None:
        self.advance(now_us)

    def is_idle(self, now_us: int) -> bool:
        """True when it is full and has nothing lent or borrowed: made anew, it would not have more."""
        self.advance(now_us)
        return self.level == self._ceiling and not self._lent and not self._borrowed and self.at_us >= self.from_us

    def fold(self, now_us: int) -> int:
        """The scaled level of this replica's part."""
        self.advance(now_us)
        return self.level

    @property
    def asked(self) -> int:
        """Tokens asked for in the last one to two windows, admitted or not."""
        self._roll_window()
        return self._asked_before + self._asked_now

    @property
    def needed(self) -> int:
        """Parts whose refill would meet the demand of late, and a quarter more; at most all."""
        asked = self.asked
        elapsed_us = self._window_us + self.at_us % self._window_us
        return min(PARTS, asked * self._limit.period_us * PARTS * 5 // (self._limit.tokens * elapsed_us * 4))

    @property
    def is_short(self) -> bool:
        """True when the level would not last for the demand of late once more."""
        return self.level < (self.asked * self._limit.period_us) << 32

    @property
    def kept(self) -> int:
        """Parts of its home that this replica does not lend, but for a smaller demand."""
        needed = self.needed
        if not self.is_short:
            # While the level lasts, it is enough to go on holding four times what is asked for.
            needed = min(needed, self.asked * 4 * PARTS // max(1, self._limit.capacity))
        capacity = self._limit.capacity
        if capacity > MAX_WHOLE_CAPACITY:
            return max(self.home_now >> RESERVE_SHIFT, needed)
        reserve = whole_tokens(self.home_now, capacity) >> RESERVE_SHIFT
        return parts_of(max(reserve, whole_tokens_up(needed, capacity)), capacity)

    def whole(self, parts: int, most: int) -> int:
        """`parts` as whole tokens: rounded up where that is no more than `most`, else down."""
        capacity = self._limit.capacity
        if capacity > MAX_WHOLE_CAPACITY:
            return parts
        return parts_of(min(whole_tokens_up(parts, capacity), whole_tokens(max(parts, most), capacity)), capacity)

    def lent_to(self, borrower: str) -> int:
        """Parts that this replica does without for `borrower`, as of `at_us`."""
        return max((loan.parts for loan in self._lent.get(borrower, ())), default=0)

    @property
    def lent(self) -> int:
        return sum(map(self.lent_to, self._lent))

    @property
    def borrowers(self) -> Iterable[str]:
        return self._lent.keys()

    def borrowed_from(self, lender: str) -> int:
        """Parts that this replica uses of `lender`'s, as of `at_us`."""
        loan = self._borrowed.get(lender)
        return loan.parts if loan is not None else 0

    def loan_ends_in_us(self, lender: str) -> int:
        """Until the loan ends; 0 without one."""
        loan = self._borrowed.get(lender)
        return loan.until_us - self.at_us if loan is not None else 0

    @property
    def lenders(self) -> Iterable[str]:
        return self._borrowed.keys()

    def lend(self, borrower: str, ask: Ask, parts: int, available: int, now_us: int) -> Grant:
        """Lend `parts` to `borrower` in all, with the tokens that no longer fit here.

        Args:
            parts: at most the home share less what is lent to others.
        """
        self.advance(now_us)
        others = self.lent - self.lent_to(borrower)
        assert 0 <= parts <= max(0, self.home_now - others)
        before = self.level
        if parts:
            loan = _Lent(ask.number, parts, self.at_us + LOAN_US + LOAN_GUARD_US)
            self._lent.setdefault(borrower, []).append(loan)
            self._share_again()
        # The part of a token that is cut and not sent is lost; refill brings it back.
        tokens = max(0, before - self.level) // (self._limit.period_us << 32)
        if parts:
            self._note_out(borrower, tokens * self._limit.period_us << 32)
        return Grant(ask.number, parts, tokens, available)

    def borrow(self, lender: str, grant: Grant, asked_us: int, now_us: int, *, most: int = PARTS) -> bool:
        """Use a loan.

        Args:
            asked_us: when this replica sent the ask.
            most: parts that the lender can have. It is believed no more than that, nor more tokens than these hold and
                refill.

        Returns:
            False when it is too late, or there is a newer one: nothing is used then.
        """
        self.advance(now_us)
        until_us = asked_us + LOAN_US
        if grant.number <= self._taken_numbers.get(lender, -1) or until_us <= self.at_us:
            return False
        self._taken_numbers[lender] = grant.number
        parts = min(grant.parts, most)
        if parts:
            self._borrowed[lender] = _Borrowed(grant.number, parts, until_us)
        self._share_again()
        self._add_tokens(self._believed(lender, grant.tokens, most))
        return True

    def give_back(self, lender: str, parts: int, last_asked: int, now_us: int) -> Return:
        """Keep only `parts` of a loan, and renounce grants still on their way.

        Args:
            last_asked: number of the last ask to this lender.
        """
        self.advance(now_us)
        self._taken_numbers[lender] = last_asked
        loan = self._borrowed.pop(lender, None)
        kept = 0
        if loan is not None and parts:
            kept = min(parts, loan.parts)
            self._borrowed[lender] = loan._replace(parts=kept)
        before = self.level
        self._share_again()
        tokens = max(0, before - self.level) // (self._limit.period_us << 32)
        return Return(last_asked, kept, tokens)

    def take_back(self, borrower: str, returned: Return, now_us: int) -> None:
        """A borrower has given back a part of its loan, or all of it."""
        self.advance(now_us)
        loans = self._lent.get(borrower)
        if loans is None:
            return
        kept = [
            loan._replace(parts=min(loan.parts, returned.parts)) if loan.number <= returned.number else loan
            for loan in loans
        ]
        out = self._note_out(borrower, 0)
        tokens = min(returned.tokens, out // (self._limit.period_us << 32))
        self._note_out(borrower, -tokens * self._limit.period_us << 32)
        self._keep_loans(borrower, [loan for loan in kept if loan.parts])
        self._share_again()
        self._add_tokens(tokens)

    @property
    def home_now(self) -> int:
        """The home share as of `at_us`."""
        return self.home if self.at_us >= self.from_us else 0

    def _note_out(self, borrower: str, change: int) -> int:
        """Note that scaled tokens went to a borrower, or came back; returns what it can have: these, and what was
        refilled meanwhile, as far as its loan holds that much.
        """
        before, since_us = self._out.get(borrower, (0, self.at_us))
        parts = self.lent_to(borrower)
        refilled = (self.at_us - since_us) * self._limit.tokens * parts
        amount = min(before + refilled + change, self._most_level(parts))
        self._out[borrower] = _Account(amount, self.at_us)
        return amount

    def _most_level(self, parts: int) -> int:
        """Scaled tokens that a node with such a share can hold."""
        limit = self._limit
        if limit.capacity > MAX_WHOLE_CAPACITY:
            return limit.ceiling * parts
        return whole_tokens_up(parts, limit.capacity) * limit.period_us << 32

    def _believed(self, lender: str, tokens: int, most: int) -> int:
        """How many of the tokens of a grant its lender can have had."""
        before, since_us = self._given.get(lender, (0, self.at_us))
        used = max(0, before - (self.at_us - since_us) * self._limit.tokens * most)
        scale = self._limit.period_us << 32
        tokens = max(0, min(tokens, (self._most_level(most) - used) // scale))
        self._given[lender] = _Account(used + tokens * scale, self.at_us)
        return tokens

    def _add_tokens(self, tokens: int) -> None:
        self.level = min(self._ceiling, self.level + (tokens * self._limit.period_us << 32))

    def _refill_until(self, now_us: int) -> None:
        elapsed_us = now_us - self.at_us
        if elapsed_us > 0:
            self.level = min(self._ceiling, self.level + elapsed_us * self._refill)
            self.at_us = now_us

    def _share_again(self) -> None:
        """Drop loans that have ended by `at_us`, and cut the level to the share that is left."""
        at_us = self.at_us
        for borrower, loans in list(self._lent.items()):
            self._keep_loans(borrower, [loan for loan in loans if loan.until_us > at_us])
        for lender, loan in list(self._borrowed.items()):
            if loan.until_us <= at_us:
                del self._borrowed[lender]
        ends = [loan.until_us for loans in self._lent.values() for loan in loans]
        ends += [loan.until_us for loan in self._borrowed.values()]
        if at_us < self.from_us:
            ends.append(self.from_us)
        self._next_change_us = min(ends, default=_NEVER_US)
        own = max(0, self.home_now - self.lent)
        self.share = own + sum(loan.parts for loan in self._borrowed.values())
        limit, capacity = self._limit, self._limit.capacity
        if capacity > MAX_WHOLE_CAPACITY:
            self._refill = limit.tokens * self.share
            self._ceiling = limit.ceiling * self.share
        else:
            lent = sum(whole_tokens_up(self.lent_to(borrower), capacity) for borrower in self._lent)
            tokens = max(0, whole_tokens(self.home_now, capacity) - lent)
            tokens += sum(whole_tokens(loan.parts, capacity) for loan in self._borrowed.values())
            # Rounded down, by less than one part in 4,096 of what a token refills.
            self._refill = (limit.tokens * tokens << 32) // max(1, capacity)
            self._ceiling = tokens * limit.period_us << 32
        self.level = min(self.level, self._ceiling)

    def _keep_loans(self, borrower: str, loans: list[_Lent]) -> None:
        if loans:
            self._lent[borrower] = loans
        else:
            del self._lent[borrower]
            self._out.pop(borrower, None)

    def _roll_window(self) -> None:
        window = self.at_us // self._window_us
        if window != self._window:
            self._asked_before = self._asked_now if window == self._window + 1 else 0
            self._asked_now = 0
            self._window = window


def _demand_window_us(limit: Limit) -> int:
    return max(LEAST_DEMAND_WINDOW_US, 2 * limit.period_us // limit.tokens)
