"""Decides when and how much a replica asks for and pays, for one strict bucket. Safety does not depend on it.

A replica asks its peers when it has denied a request lately, or when it has some demand and its level is below three
quarters of its home. It asks for most of its free room, in proportion to what each peer had left. A replica that is not
short itself pays what its own demand does not need soon, and divides that among the asking peers by their demand. Times
and amounts are those of `strict.py`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from ratelimit_sidecar.crdt.shares import TOKEN, rank
from ratelimit_sidecar.crdt.strict import NEVER_US, StrictBucket, scaled_home

LEAST_ASK_EVERY_US: Final = 20_000
"""A peer is asked again after this time at the earliest."""

PACE_SHIFT: Final = 6
"""A peer is asked again only after 1/64 of the limit has refilled."""

SHORTAGE_US: Final = 500_000
"""A replica counts as short for this time after a denial."""

REPORT_US: Final = 500_000
"""A peer's report (of its level or demand) is used for this time; after it the peer is assumed to be full and to have
no demand."""

PAY_AHEAD_US: Final = 250_000
"""A replica does not ask for the room that it refills itself in this time (up to a quarter of all room), so that its
refill still fits until the answers arrive. It does not pay the tokens that its own demand takes in this time. And if
its home is smaller than eight tokens, it asks a peer that had nothing left again only after this time, because reserved
room does not refill.
"""

REPORT_FORGOTTEN_US: Final = 2_000_000
"""After this time, what a peer reported to have left no longer bounds what is believed to be there for waiting
requests.
"""

RESERVE_SHIFT: Final = 4
"""1/16 of the home, in whole tokens, is never paid, so that a region that wakes up can serve at once."""


class Ask(NamedTuple):
    """A request to a peer for up to `amount`.

    Args:
        level: the level of the node that asks, as an amount.
        demand: the amount that its requests ask for in a second.
        is_short: True if it has denied a request lately.
    """

    amount: int
    level: int
    demand: int
    is_short: bool


class Payment(NamedTuple):
    """The answer to an ask.

    Args:
        left: what the payer could still pay.
    """

    amount: int
    left: int


class Ticket(NamedTuple):
    """The answer to a wish.

    Args:
        tokens: whole ones, set aside.
        left: the amount that the payer could still pay.
    """

    tokens: int
    left: int


@dataclass(slots=True)
class _Peer:
    """The last reports of a peer about one bucket.

    Args:
        max_home: the largest that its home can be.
        left: the amount that it had left when it last answered, at `answered_us`.
        demand: its demand when it last asked, at `demand_us`.
        asked_us: when it was last asked.
    """

    max_home: int = 0
    left: int = 0
    answered_us: int = NEVER_US
    demand: int = 0
    demand_us: int = NEVER_US
    asked_us: int = NEVER_US


@dataclass(slots=True)
class PaymentPolicy:
    """Decides for one strict bucket how much to ask each peer for, and how much to pay a peer that asks."""

    bucket: StrictBucket
    _peers: defaultdict[str, _Peer] = field(default_factory=lambda: defaultdict(_Peer))

    def make_asks(self, streams: Mapping[str, int], strict_us: int) -> dict[str, Ask]:
        """Ask peers for tokens: reserve room for each ask, and note when the peer was asked.

        Args:
            streams: by peer that can be reached, the number of the stream to it.

        Returns:
            The asks to send, by peer; the caller later calls `receive_payment` or `StrictBucket.closed` for each.
        """
        bucket = self.bucket
        bucket.advance(strict_us)
        is_short = self._is_short(strict_us)
        if not is_short and (bucket.level >= bucket.max_level * 3 // 4 or not bucket.demand()):
            return {}
        limit, home, free_room = bucket.limit, bucket.home, bucket.free_room
        free_room -= min(free_room // 4, bucket.refill * PAY_AHEAD_US)
        ask_every_us = max(LEAST_ASK_EVERY_US, (limit.scaled_capacity // limit.tokens) >> PACE_SHIFT)
        ask_slowly_every_us = max(ask_every_us, PAY_AHEAD_US) if home < 8 * TOKEN else ask_every_us
        # What each is likely to have left: at most as much as this replica's home.
        likely: dict[str, int] = {}
        for peer, stream in streams.items():
            payer = self._peers[peer]
            had_nothing = payer.answered_us != NEVER_US and not payer.left
            ask_peer_every_us = ask_slowly_every_us if had_nothing else ask_every_us
            if stream not in bucket.reserved and strict_us - payer.asked_us >= ask_peer_every_us:
                is_known = strict_us - payer.answered_us < REPORT_US
                likely[peer] = min(home, max(payer.left, home >> 5)) if is_known else home
        total, level, demand = sum(likely.values()), max(0, bucket.level) // limit.period_us, bucket.demand()
        asks = {}
        for peer, left in likely.items():
            payer = self._peers[peer]
            grains = free_room * left // total if total else 0
            # No more than the peer is credited with: anything above that would be paid but not counted here.
            if payer.answered_us != NEVER_US:
                grains = min(grains, bucket.credit_of(peer, payer.max_home))
            amount = grains // limit.period_us
            if amount > home >> 8:
                bucket.ask(streams[peer], amount)
                payer.asked_us = strict_us
                asks[peer] = Ask(amount, level, demand, is_short)
        return asks

    def pay(self, peer: str, ask: Ask, strict_us: int) -> Payment:
        """Pay the peer its fair part of the spare tokens."""
        bucket, asker = self.bucket, self._peers[peer]
        bucket.advance(strict_us)
        asker.demand, asker.demand_us = ask.demand, strict_us
        level, reserve = max(0, bucket.level) // bucket.limit.period_us, bucket.home >> RESERVE_SHIFT
        if self._is_short(strict_us):
            # Fractions of a token admit nothing. When both nodes have only a fraction and refill slowly, the node with
            # the higher rank gives its fraction to the other.
            is_slow = bucket.refill * 1_100_000 < TOKEN * bucket.limit.period_us
            gives = is_slow and ask.is_short and level < TOKEN
            if gives and rank(bucket.key, peer) < rank(bucket.key, bucket.origin.node):
                return Payment(bucket.pay(peer, ask.amount), 0)
            return Payment(0, 0)
        kept = max(reserve, bucket.demand() * PAY_AHEAD_US // 1_000_000)
        if not ask.is_short:
            kept = max(kept, (level + ask.level) // 2)
        spare = max(0, level - kept // TOKEN * TOKEN)
        total = sum(each.demand for each in self._peers.values() if strict_us - each.demand_us < REPORT_US)
        if total:
            spare = spare * max(ask.demand, total >> 3) // total
        paid = bucket.pay(peer, min(ask.amount, spare))
        return Payment(paid, max(0, level - paid - reserve))

    def receive_payment(self, peer: str, stream_number: int, pay: Payment, max_home: int, strict_us: int) -> bool:
        """Add a peer's payment; see `StrictBucket.receive_payment`."""
        self.bucket.advance(strict_us)
        self.note_left(peer, pay.left, max_home, strict_us)
        return self.bucket.receive_payment(stream_number, peer, pay.amount, max_home)

    def set_aside(self, number: int, tokens: int, strict_us: int) -> Ticket:
        """Set aside up to `tokens` for requests that wait at a peer, without a reserve: a request that waits there
        counts more than one that may come here.
        """
        bucket = self.bucket
        bucket.advance(strict_us)
        tokens = bucket.set_aside(number, tokens)
        left = 0 if self._is_short(strict_us) else max(0, bucket.level) // bucket.limit.period_us
        return Ticket(tokens, left)

    def note_left(self, peer: str, left: int, max_home: int, strict_us: int) -> None:
        """Note what a peer has left, as it reports with each payment and ticket."""
        payer = self._peers[peer]
        payer.left, payer.max_home, payer.answered_us = left, max_home, strict_us

    def add_left(self, peer: str, more: int) -> None:
        """Note that a peer has `more` left than it reported, because so much is returned to it."""
        self._peers[peer].left += more

    def believed(self, peer: str, strict_us: int) -> int:
        """The amount that a peer is believed to have at `strict_us`.

        That is what it reported and the refill since, and after `REPORT_FORGOTTEN_US` all that it can have; but 0 for
        `REPORT_US` after it reported nothing left. A peer that never answered is believed to have as much as this
        replica's home, and at least a token.
        """
        payer, bucket = self._peers[peer], self.bucket
        since_us = strict_us - payer.answered_us
        if payer.answered_us == NEVER_US:
            return max(bucket.home, TOKEN)
        if since_us < REPORT_US and not payer.left:
            return 0
        home_grains, refill = scaled_home(bucket.limit, payer.max_home)
        credit = bucket.credit_of(peer, payer.max_home)
        if since_us < REPORT_FORGOTTEN_US:
            credit = min(credit, home_grains, payer.left * bucket.limit.period_us + since_us * refill)
        return credit // bucket.limit.period_us

    def _is_short(self, strict_us: int) -> bool:
        return strict_us - self.bucket.denied_us < SHORTAGE_US
