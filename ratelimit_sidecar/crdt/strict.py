"""This replica's bucket of a strict limit, its *purse*: all replicas together never overdraw the limit, because each
spends only the tokens in its purse, and pays others what it can spare.

Theory of operation (after bounded counters, Balegas et al. 2015, and the demarcation protocol, Barbara and
Garcia-Molina 1992). Replica i has a *home* H_i, the most that it may hold, and a part of the refill; the sums are at
most the limit's. It holds a level L. To get more it *asks* a peer on a stream, and reserves room R for the answer:
L + R <= H always. The peer *pays* out of its level, on the same stream, and at most the room. When the end of the
stream closes here, the room is free again, and a later payment on it does not count. So levels and payments under way
together are at most sum(L + R) <= sum(H) <= capacity, and only refill raises them. docs/algorithm.md has the proof.

A *ticket* is a payment to requests that wait at a peer, even if the peer has no room for it. So the payer reserves the
room: it takes the tokens out of its level and counts them in R until the peer reports that it is done, or for longer
than the peer may use them. The peer *wishes* for a ticket, and uses it only within `TICKET_US` of the wish; what it
neither uses nor has room for, it returns.

Safety depends on this file, `shares.py` and `homes.py`, and on callers. They free the room of an ask only once its
stream is closed (`replication/payments.py`), and that of a ticket only when the peer reports that it is done with it or
after `HOLD_US`, never because a stream is closed (`ledger.py`). They call `take_rest` after each `accept`
(`waiting.py`). `payment_policy.py` decides when and how much is asked for and paid.

A peer's stream is given here as its `stream_number`, this node's own (see `replication.payments.StreamPayments`).

Units: amounts, homes among them, are in 2**-32 tokens, a level in *grains*: a token is period_us * 2**32 grains. So
everything is an integer. Time is microseconds of a clock that never steps: `strict_us`, beside `now_us`, the wall clock
of other buckets, which may be set.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from ratelimit_sidecar.crdt.bucket import Bucket, Entry, Origin
from ratelimit_sidecar.crdt.limit import AnyLimit, TokenBucketLimit

if TYPE_CHECKING:
    from ratelimit_sidecar.crdt.homes import Homes

NEVER_US: Final = -1 << 62

DEMAND_US: Final = 1_000_000
"""Demand is averaged over about this time."""

DECAY_EVERY_US: Final = 10_000
"""Demand decays in steps of this time: to do so with each request would double the time of a `take`."""

TICKET_US: Final = 1_000_000
"""A ticket is good for this time after the wish for it."""

HOLD_US: Final = 1_050_000
"""The payer reserves the room of a ticket for this time at most, and a replica that has just started has no home for as
long, because of what it may have paid before. Clocks that are 0.5 % fast or slow make no difference.
"""

NO_HOME_US: Final = 2_500_000
"""The retry time in answers while this replica has no home. This file does not know how long that lasts."""


class StrictBucket(Bucket):
    """This replica's purse for one strict limit. `Ledger` makes it, sets its home, and drops it when it is idle.

    `take` decides from the level alone. For each `ask` the caller later calls `receive_payment` or `closed`; for each
    `wish` `accept` or `give_up`; for each ticket `set_aside` with tokens in it, `release`.

    Args:
        home: the amount of the limit that is this replica's.
        from_us: the time since when it has that; the bucket was empty then.
        strict_us: the time now; see above for the clock.
        active: the bucket appends itself when a request takes from it. Whoever removes it must reset `is_active`.
        homes: source of later homes; each change is applied as of the time it happened. None if the caller alone sets
            the home.
    """

    __slots__ = (
        "_active",
        "_homes",
        "_kept_until_us",
        "_lacking",
        "_limit",
        "_wanted",
        "_wanted_us",
        "aside",
        "denied_us",
        "envoys_amount",
        "envoys_home",
        "home",
        "home_version",
        "is_active",
        "level",
        "max_level",
        "refill",
        "reserved",
        "tickets",
        "wishes",
    )

    def __init__(
        self,
        key: bytes,
        limit: TokenBucketLimit,
        origin: Origin,
        strict_us: int,
        *,
        home: int,
        from_us: int,
        active: deque[StrictBucket] | None = None,
        homes: Homes | None = None,
    ) -> None:
        super().__init__(key, origin, min(from_us, strict_us))
        self._limit = limit
        self._homes = homes
        self._active = deque() if active is None else active
        self.is_active = False
        self.home = home
        self.home_version = 0 if homes is None else homes.version
        """The number of the last change of homes that this purse has followed, by the count of `homes` or of whoever
        sets its home. 0: it never had a home. -1: its limit has changed, so its home is to be set again
        (`GrantedBucket`)."""
        self.envoys_amount = 0
        """The amount that token buckets of Envoys hold, by RLQS (`Ledger.withhold`). Not part of `home`."""
        self.envoys_home = 0
        """The part of this replica's home whose refill Envoys have: `envoys_amount`, but rescaled when the capacity
        changes. Not part of `home` either."""
        self.level = 0
        """L, in grains at `at_us`. Below 0 after denied hits that were charged."""
        self.reserved: dict[int, int] = {}
        """By the number of a stream, the amount asked for on it and not answered yet. With `aside` it is R."""
        self.tickets: dict[int, int] = {}
        """By number, the amount of a ticket that a peer may still use."""
        self.aside = 0
        """The sum of all tickets."""
        self.wishes: dict[int, int] = {}
        """By number, when this replica wished for a ticket that has not come yet."""
        self._lacking: dict[str, tuple[int, int]] = {}
        """By peer, a lower bound on how many grains its home lacked when it last paid us or was paid by us, and the
        time of that. So no peer is credited with more than it can have (`credit_of`)."""
        self.max_level, self.refill = scaled_home(limit, home)
        """The most that level and reserved room may be together, in grains: the home (H), or the grant of a
        `GrantedBucket`. And the home's refill in grains per microsecond."""
        self._wanted, self._wanted_us = 0, strict_us
        """The tokens that requests asked for lately, in 2**-20 tokens, as of that time; see `demand`."""
        self._kept_until_us = 0
        """By then each limit that it has had would have refilled its home."""
        self.denied_us = NEVER_US
        """Time of the last denial, or of the last request that was put to wait."""
        self.advance(strict_us)

    @property
    def limit(self) -> TokenBucketLimit:
        return self._limit

    def would_admit(self, hits: int, strict_us: int) -> bool:
        """See `Bucket.would_admit`. If it would be denied, it counts as demand and as a denial, as in `take`, so that
        peers are asked; a `take` of the same request then counts as demand once more.
        """
        self.advance(strict_us)
        if self.has(hits):
            return True
        self._note_demand(self._needed(hits))
        self.denied_us = self.at_us
        return False

    def take(self, hits: int, strict_us: int, *, always: bool = False) -> bool:
        self.advance(strict_us)
        needed = self._needed(hits)
        self._note_demand(needed)
        charge = (needed * self._limit.period_us) << 32
        admitted = charge <= self.level
        if admitted:
            self.level -= charge
        else:
            self.denied_us = self.at_us
            if always and hits:
                self.level = max(self.level - charge, self.floor)
        return admitted

    def _needed(self, hits: int) -> int:
        """The tokens that so many hits take if they are admitted.

        A check, of 0 hits, is admitted while the level is not below 0. Without a home a check needs a token: the level
        is 0 there unless it is in debt, so all checks would be admitted, with nothing that could be charged afterwards.
        """
        return hits if hits or self.home else 1

    def _note_demand(self, hits: int) -> None:
        """Count the hits as demand, and mark the bucket as active so that peers are asked."""
        if self.at_us - self._wanted_us >= DECAY_EVERY_US:
            self._decay_demand()
        self._wanted += hits << 20
        if not self.is_active:
            self.is_active = True
            self._active.append(self)

    def _decay_demand(self) -> None:
        """Let what was wanted before count for less, the longer ago it was."""
        elapsed_us = self.at_us - self._wanted_us
        self._wanted = self._wanted * (DEMAND_US - elapsed_us) // DEMAND_US if elapsed_us < DEMAND_US else 0
        self._wanted_us = self.at_us

    def demand(self) -> int:
        """The amount per second that requests asked for lately, admitted or not. Lets it decay up to `at_us`."""
        self._decay_demand()
        return self._wanted << 12

    @property
    def remaining(self) -> int:
        """Whole tokens that this replica can admit by itself at `at_us`."""
        return max(0, self.level // (self._limit.period_us << 32))

    def has(self, hits: int) -> bool:
        """True if it would admit so many hits at `at_us`."""
        return (self._needed(hits) * self._limit.period_us) << 32 <= self.level

    @property
    def floor(self) -> int:
        """The least level, in grains. Debt beyond it is forgiven, so that it takes no longer to repay than that of a
        bucket that is not strict.
        """
        limit = self._limit
        return -self._repaid_per_us * ((limit.debt_ceiling - limit.scaled_capacity) // limit.tokens)

    @property
    def _repaid_per_us(self) -> int:
        """The grains of debt that are repaid in a microsecond; without a home as if the whole limit was here."""
        return scaled_home(self._limit, self.home)[1] or self._limit.tokens << 32

    @property
    def debt(self) -> int:
        return max(0, -(self.level // (self._limit.period_us << 32)))

    @property
    def full_in_us(self) -> int:
        """Microseconds until this replica's home is full, reserved room not considered."""
        return self._refilled_in_us(self.max_level)

    def retry_after_us(self, hits: int) -> int:
        return self._refilled_in_us(min(self.max_level, (hits * self._limit.period_us) << 32))

    def _refilled_in_us(self, level: int) -> int:
        return max(0, -(-(level - self.level) // self.refill)) if self.refill else NO_HOME_US

    def advance(self, strict_us: int) -> None:
        homes = self._homes
        if homes is not None and self.home_version != homes.version:
            missed = homes.since(self.home_version, self.key, self._limit.capacity)
            self.home_version = homes.version
            for since_us, home in missed:
                self.set_home(home, since_us)
        elapsed_us = strict_us - self.at_us
        if elapsed_us > 0:
            top = self.max_level - self.room_reserved if self.reserved or self.aside else self.max_level
            if self.level < top:
                self.level = min(top, self.level + elapsed_us * self.refill)
            if self.level < 0:
                if self.home_version and not self.home:
                    # Nothing refills; it would owe for ever, and could not be dropped.
                    self.level = min(0, self.level + elapsed_us * self._repaid_per_us)
                # Its limit may be another one now.
                self.level = max(self.level, self.floor)
            self.at_us = strict_us

    @property
    def room_reserved(self) -> int:
        """R, in grains."""
        return (sum(self.reserved.values()) + self.aside) * self._limit.period_us

    @property
    def free_room(self) -> int:
        """The grains of the home that are neither in the level nor reserved: the most that can be asked for."""
        return self.max_level - max(0, self.level) - self.room_reserved

    def ask(self, stream_number: int, amount: int) -> None:
        """Reserve room for an ask. The caller sends it, and later calls `receive_payment` or `closed`.

        Args:
            stream_number: of the stream on which it is sent. No other ask of this bucket may be open on it.
            amount: more than 0, and no more than there is room for.
        """
        assert stream_number not in self.reserved
        assert 0 < amount * self._limit.period_us <= self.free_room
        self.reserved[stream_number] = amount

    def pay(self, peer: str, amount: int) -> int:
        """Take up to `amount` out of the level, to send to a peer; returns how much."""
        period_us = self._limit.period_us
        amount = max(0, min(amount, self.level // period_us))
        self.level -= amount * period_us
        self._note_lacking(peer, -amount)
        return amount

    def receive_payment(self, stream_number: int, peer: str, amount: int, max_home: int) -> bool:
        """Add the payment that answers the ask open on `stream_number`.

        Credit the peer at most with what it can have: its home, the refill since, and payments from here.

        Args:
            max_home: the largest that the peer's home can be.

        Returns:
            False if the peer claims more than that, or more than it was asked for.
        """
        credit, asked = self.credit_of(peer, max_home), self.reserved.pop(stream_number)
        grains = min(amount, asked) * self._limit.period_us
        # If the limit was lowered meanwhile, there may be less room than was reserved.
        added = max(0, min(grains, self.free_room, credit))
        self._lacking[peer] = scaled_home(self._limit, max_home)[0] - credit + added, self.at_us
        self.level += added
        return amount <= asked and grains <= credit

    def credit_of(self, peer: str, max_home: int) -> int:
        """The most grains that a peer with such a home can have at `at_us`."""
        home_grains, refill = scaled_home(self._limit, max_home)
        lacking, at_us = self._lacking.get(peer, (0, 0))
        return home_grains - max(0, lacking - (self.at_us - at_us) * refill)

    def set_aside(self, number: int, tokens: int) -> int:
        """Take up to so many whole tokens out of the level for a ticket, and reserve their room.

        Args:
            number: of the ticket; no other of this bucket has had it. If this returns more than 0, the caller later
                calls `release` with it.
        """
        tokens = min(tokens, self.remaining)
        if tokens > 0:
            self.level -= (tokens * self._limit.period_us) << 32
            self.tickets[number] = tokens << 32
            self.aside += tokens << 32
        return max(0, tokens)

    def release(self, number: int, peer: str, returned: int, strict_us: int) -> None:
        """Free the room of a ticket, because the peer is done with it, or after `HOLD_US`; nothing if it is free.

        Args:
            returned: the amount that the peer gives back.
        """
        self.advance(strict_us)
        amount = self.tickets.pop(number, 0)
        self.aside -= amount
        returned = min(returned, amount)
        # If the limit was lowered meanwhile, there may be less room than was reserved.
        self.level += max(0, min(returned * self._limit.period_us, self.free_room))
        self._note_lacking(peer, returned - amount)

    def wish(self, number: int) -> None:
        """Note at `at_us` that a ticket is wished for. The caller later calls `accept`, or `give_up`."""
        self.wishes[number] = self.at_us

    def give_up(self, number: int) -> None:
        """The ticket is not waited for any more. If it comes, it must be given back."""
        self.wishes.pop(number, None)

    def accept(self, number: int, peer: str, tokens: int, max_home: int, strict_us: int) -> int:
        """Add a ticket to the level, even if there is no room for it: the caller takes from it for what waits, and then
        calls `take_rest`, all at this instant.

        Args:
            max_home: as in `receive_payment`.

        Returns:
            The grains added; 0 if the ticket is too old, or is not wished for.
        """
        self.advance(strict_us)
        wished_us = self.wishes.pop(number, NEVER_US)
        if self.at_us - wished_us > TICKET_US:
            return 0
        credit = self.credit_of(peer, max_home)
        added = max(0, min((tokens * self._limit.period_us) << 32, credit))
        self._lacking[peer] = scaled_home(self._limit, max_home)[0] - credit + added, self.at_us
        self.level += added
        return added

    def take_rest(self, peer: str, added: int) -> int:
        """Take out of the level the part of an accepted ticket that was not used and has no room here.

        Args:
            added: what `accept` has returned.

        Returns:
            The amount to give back to the peer.
        """
        left = min(added, max(0, self.level - max(0, self.max_level - self.room_reserved)))
        self.level -= left
        amount = left // self._limit.period_us
        self._note_lacking(peer, -amount)
        return amount

    def _note_lacking(self, peer: str, amount: int) -> None:
        """Note that `amount` less is in a peer's home; more if it is negative."""
        lacking, at_us = self._lacking.get(peer, (0, 0))
        self._lacking[peer] = max(0, lacking + amount * self._limit.period_us), at_us

    def restore(self, amount: int) -> None:
        """Put back what the purse had when this replica was stopped, as far as there is room, and debt to its floor.

        Args:
            amount: what it had; below 0 what it owed.
        """
        top = max(self.level, self.max_level - self.room_reserved)
        self.level = max(self.floor, min(top, self.level + amount * self._limit.period_us))

    def refill_for(self, elapsed_us: int) -> None:
        """Add what is refilled in this time, as far as there is room."""
        top = max(self.level, self.max_level - self.room_reserved)
        self.level = min(top, self.level + elapsed_us * self.refill)

    def closed(self, stream_number: int, strict_us: int) -> None:
        """Free the room reserved on a stream: it is closed, so no answer can come."""
        self.advance(strict_us)
        self.reserved.pop(stream_number, None)

    def set_limit(self, limit: AnyLimit, strict_us: int) -> None:
        """See `Bucket.set_limit`. The caller must call `set_home` afterwards."""
        assert isinstance(limit, TokenBucketLimit)
        self.advance(strict_us)
        self._kept_until_us = max(self._kept_until_us, self.at_us + self.full_in_us)
        # Rounded down, so that a change adds no tokens.
        self.level = self.level * limit.period_us // self._limit.period_us
        self.envoys_home = -(-self.envoys_home * max(1, limit.capacity) // max(1, self._limit.capacity))
        self._limit = limit
        self._lacking.clear()

    def withhold(self, amount: int) -> None:
        """Set `envoys_amount` at `at_us`. It rises only by tokens that the bucket has, which it gives up. The caller
        must call `set_home` afterwards."""
        more = amount - self.envoys_amount
        if more > 0:
            more = min(more, self.home, self.remaining << 32)
            self.level -= more * self._limit.period_us
        self.envoys_amount += more
        # What tokens could not be had for may be some Envoy's until it reports.
        self.envoys_home = max(self.envoys_amount, min(self.envoys_home, amount))

    def set_home(self, home: int, strict_us: int) -> None:
        """Set another home from now on, withheld tokens included; the level is cut to it, and debt to its floor."""
        self.advance(strict_us)
        self.home = max(0, home - max(self.envoys_amount, self.envoys_home))
        self.max_level, self.refill = scaled_home(self._limit, self.home)
        self.level = max(self.floor, min(self.level, max(0, self.max_level - self.room_reserved)))

    def is_idle(self, strict_us: int) -> bool:
        """True when it is full, no ask is open, no ticket set aside and nothing withheld: a new bucket would not have
        more, not even under a limit that it had before. Until then it stays in its ledger: whoever knows of an open ask
        or a ticket looks it up without asking.
        """
        self.advance(strict_us)
        is_full = self.level == self.max_level and not self.reserved and not self.aside and not self.envoys_amount
        return is_full and self.at_us >= self._kept_until_us

    def fold(self, strict_us: int) -> int:
        """This replica's level. A strict bucket has no replicated state."""
        self.advance(strict_us)
        return self.level

    def seal(self, strict_us: int) -> None:
        self.advance(strict_us)

    def merge(self, _entries: Iterable[Entry], _strict_us: int) -> int:
        """Ignore entries: each replica counts only its own takes."""
        return 0

    def _recount(self) -> None:
        pass


def scaled_home(limit: TokenBucketLimit, home: int) -> tuple[int, int]:
    """The size of a home in grains, and its refill in grains per microsecond."""
    return home * limit.period_us, limit.tokens * home // max(1, limit.capacity)
