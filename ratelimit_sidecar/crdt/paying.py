"""When and how much a replica asks for and pays, of one strict bucket. Safety does not depend on anything in here.

A replica that was short of tokens, or has less than three quarters of its home and some demand, asks its peers: for
most of its room, in proportion to what each had left. A replica that is not short itself pays what its own demand does
not need soon, and divides that among those who ask by their demand. Times and amounts are those of `strict.py`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from ratelimit_sidecar.crdt.shares import TOKEN, rank
from ratelimit_sidecar.crdt.strict import NEVER_US, StrictBucket

LEAST_PACE_US: Final = 20_000
PACE_SHIFT: Final = 6
"""A peer is asked again no sooner than a sixty-fourth of the limit has refilled."""

RECENT_US: Final = 500_000
"""So long a replica counts as short after it has denied something, and what peers have said last as true. After that
a peer counts as full, and wants nothing."""

SOON_US: Final = 250_000
"""Room is left for what refills until then, up to a quarter of it, and tokens for the demand until then. Of a home of
less than eight tokens, a peer that had nothing is not asked sooner: room reserved in vain does not refill."""

RESERVE_SHIFT: Final = 4
"""A sixteenth of the home, in whole tokens, is not paid, so that a region that wakes up can serve at once."""


class Ask(NamedTuple):
    """For up to `amount`.

    Args:
        level: what the one who asks has.
        demand: what it is asked for in a second.
        is_short: it has denied something of late.
    """

    amount: int
    level: int
    demand: int
    is_short: bool


class Pay(NamedTuple):
    """The answer to an ask.

    Args:
        left: what the payer could have paid besides.
    """

    amount: int
    left: int


@dataclass(slots=True)
class _Peer:
    """What it had left when it answered last, what its demand was when it asked last, and when it was asked last.

    Args:
        most: that its home can be.
    """

    most: int = 0
    left: int = 0
    answered_us: int = NEVER_US
    demand: int = 0
    heard_us: int = NEVER_US
    asked_us: int = NEVER_US


@dataclass(slots=True)
class Paying:
    """Asks and pays for one bucket."""

    bucket: StrictBucket
    _peers: defaultdict[str, _Peer] = field(default_factory=lambda: defaultdict(_Peer))

    def asks(self, ends: Mapping[str, int], now_us: int) -> dict[str, Ask]:
        """What to ask each peer for now; room for it has been reserved.

        Args:
            ends: by peer that can be reached, this node's end of the stream to it.
        """
        bucket = self.bucket
        bucket.advance(now_us)
        is_short = self._is_short(now_us)
        if not is_short and (bucket.level >= bucket.ceiling * 3 // 4 or not bucket.demand):
            return {}
        room = bucket.room - min(bucket.room // 4, bucket.refill * SOON_US)
        likely = {
            peer: self._likely(self._peers[peer], now_us)
            for peer, end in ends.items()
            if end not in bucket.reserved and now_us - self._peers[peer].asked_us >= self._pace_us(self._peers[peer])
        }
        total, period_us = sum(likely.values()), bucket.limit.period_us
        level, demand = max(0, bucket.level) // period_us, bucket.demand
        asks = {}
        for peer, left in likely.items():
            payer = self._peers[peer]
            grains = room * left // total if total else 0
            # No more than it will be believed: beyond that it would pay for nothing.
            if payer.answered_us != NEVER_US:
                grains = min(grains, bucket.credit_of(peer, payer.most))
            amount = grains // period_us
            if amount > bucket.home >> 8:
                bucket.ask(ends[peer], amount)
                payer.asked_us = now_us
                asks[peer] = Ask(amount, level, demand, is_short)
        return asks

    def answer(self, peer: str, ask: Ask, now_us: int) -> Pay:
        """Pay what a peer's fair part is of what can be spared."""
        bucket, asker = self.bucket, self._peers[peer]
        bucket.advance(now_us)
        asker.demand, asker.heard_us = ask.demand, now_us
        level, reserve = max(0, bucket.level) // bucket.limit.period_us, bucket.home >> RESERVE_SHIFT
        if self._is_short(now_us):
            # Fractions of a token admit nothing. When both have no more, and will not soon, one gets the other's.
            is_slow = bucket.refill * 1_100_000 < TOKEN * bucket.limit.period_us
            is_behind = rank(bucket.key, peer) < rank(bucket.key, bucket.origin.node)
            gives = is_slow and ask.is_short and level < TOKEN and is_behind
            return Pay(bucket.pay(peer, ask.amount) if gives else 0, 0)
        kept = max(reserve, bucket.demand * SOON_US // 1_000_000)
        if not ask.is_short:
            kept = max(kept, (level + ask.level) // 2)
        spare = max(0, level - kept // TOKEN * TOKEN)
        total = sum(each.demand for each in self._peers.values() if now_us - each.heard_us < RECENT_US)
        if total:
            spare = spare * max(ask.demand, total >> 3) // total
        paid = bucket.pay(peer, min(ask.amount, spare))
        return Pay(paid, max(0, level - paid - reserve))

    def paid(self, peer: str, end: int, pay: Pay, most: int, now_us: int) -> bool:
        """A peer has answered; see `StrictBucket.paid`."""
        self.bucket.advance(now_us)
        payer = self._peers[peer]
        payer.left, payer.most, payer.answered_us = pay.left, most, now_us
        return self.bucket.paid(end, peer, pay.amount, most)

    def _pace_us(self, peer: _Peer) -> int:
        limit = self.bucket.limit
        pace_us = max(LEAST_PACE_US, (limit.ceiling // limit.tokens) >> PACE_SHIFT)
        had_nothing = peer.answered_us != NEVER_US and not peer.left
        return max(pace_us, SOON_US) if had_nothing and self.bucket.home < 8 * TOKEN else pace_us

    def _is_short(self, now_us: int) -> bool:
        return now_us - self.bucket.denied_us < RECENT_US

    def _likely(self, peer: _Peer, now_us: int) -> int:
        """What it has left, for all that is known: as much as this replica's home at most."""
        home = self.bucket.home
        return home if now_us - peer.answered_us >= RECENT_US else min(home, max(peer.left, home >> 5))
