"""When and how much a replica asks for and pays, of one strict bucket. Safety does not depend on anything in here.

A replica that was short of tokens, or has less than three quarters of its home and some demand, asks its peers: for
most of its room, in proportion to what each had left. A replica that is not short itself pays what its own demand does
not need soon, and divides that among those who ask by their demand. Times are those of `strict.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from ratelimit_sidecar.crdt.shares import rank
from ratelimit_sidecar.crdt.strict import MAX_AMOUNT, NEVER_US, WINDOW_US, StrictBucket

LEAST_PACE_US: Final = 20_000
PACE_SHIFT: Final = 6
"""A peer is asked again no sooner than a sixty-fourth of the limit has refilled."""

NOTHING_US: Final = 250_000
"""With a home of less than eight tokens, nor sooner than that if it had nothing left: room reserved in vain does
not refill."""

STALE_US: Final = 2_000_000
"""What a peer said so long ago that it had left may hold no longer: it counts as full."""

OWN_REFILL_US: Final = 300_000
"""Room that is not asked for, up to a quarter of it: own refill must find room until the answers are there."""

RESERVE_SHIFT: Final = 4
"""A sixteenth of the home, in whole tokens, is not paid, so that a region that wakes up can serve at once."""

RESERVE_US: Final = 200_000
"""Nor what the demand of late takes in such a time."""

ASKERS_US: Final = 1_000_000
"""What is left is divided among those who have asked within such a time."""


class Ask(NamedTuple):
    """For up to `amount`. Amounts are 2**-32 tokens.

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


class _Told(NamedTuple):
    amount: int
    at_us: int


@dataclass(slots=True)
class Paying:
    """The policy of one strict bucket: what to ask of which peer, and what to pay one that asks.

    Args:
        node: this replica.
    """

    bucket: StrictBucket
    node: str
    _left: dict[str, _Told] = field(default_factory=dict)
    """By peer, what it had left when it answered last."""
    _demand: dict[str, _Told] = field(default_factory=dict)
    """By peer, its demand when it asked last."""
    _asked_us: dict[str, int] = field(default_factory=dict)

    def asks(self, ends: Mapping[str, int], homes: Mapping[str, int], now_us: int) -> dict[str, Ask]:
        """What to ask each peer for now; room for it has been reserved.

        Args:
            ends: by peer that can be reached, this node's end of the stream to it.
            homes: by node, its part of each limit.
        """
        bucket = self.bucket
        bucket.advance(now_us)
        limit, ceiling = bucket.limit, bucket.ceiling
        is_short = self._is_short(now_us)
        if not is_short and (bucket.level >= ceiling * 3 // 4 or not bucket.asked):
            return {}
        room = ceiling - bucket.level - bucket.room_reserved
        room -= min(room // 4, bucket.refill * OWN_REFILL_US)
        pace_us = max(LEAST_PACE_US, (limit.ceiling // limit.tokens) >> PACE_SHIFT)
        likely = {
            peer: self._likely(peer, limit.capacity * homes[peer], now_us)
            for peer, end in ends.items()
            if end not in bucket.reserved
            and now_us - self._asked_us.get(peer, NEVER_US) >= self._pace_us(peer, pace_us)
        }
        total = sum(likely.values())
        asks = {}
        level, demand = max(0, bucket.level) // limit.period_us, bucket.demand
        for peer, left in likely.items():
            grains = room * left // total if total else 0
            # No more than it will be believed: beyond that it would pay for nothing.
            amount = min(min(grains, bucket.credit_of(peer, grains)) // limit.period_us, MAX_AMOUNT)
            if amount > 0 and amount * limit.period_us > ceiling >> 8:
                bucket.ask(ends[peer], amount)
                self._asked_us[peer] = now_us
                asks[peer] = Ask(amount, min(level, MAX_AMOUNT), min(demand, MAX_AMOUNT), is_short)
        return asks

    def answer(self, peer: str, ask: Ask, now_us: int) -> Pay:
        """Pay what a peer's fair part is of what can be spared."""
        bucket = self.bucket
        bucket.advance(now_us)
        self._demand[peer] = _Told(ask.demand, now_us)
        period_us = bucket.limit.period_us
        token, level, home = 1 << 32, max(0, bucket.level) // period_us, bucket.ceiling // period_us
        reserve = home >> RESERVE_SHIFT
        if self._is_short(now_us):
            # Fractions of a token admit nothing. When both have no more, and will not soon, one gets the other's.
            is_slow = bucket.refill * 1_100_000 < token * period_us
            yields = is_slow and ask.is_short and level < token and rank(bucket.key, peer) < rank(bucket.key, self.node)
            return Pay(bucket.pay(peer, ask.amount) if yields else 0, 0)
        kept = max(reserve, bucket.demand * RESERVE_US // 1_000_000)
        if not ask.is_short:
            kept = max(kept, (level + ask.level) // 2)
        spare = max(0, level - kept // token * token)
        others = sum(
            told.amount for other, told in self._demand.items() if other != peer and now_us - told.at_us < ASKERS_US
        )
        if others:
            total = others + ask.demand
            spare = spare * max(ask.demand, total >> 3) // total
        paid = bucket.pay(peer, min(ask.amount, spare))
        return Pay(paid, min(max(0, level - paid - reserve), MAX_AMOUNT))

    def paid(self, peer: str, end: int, pay: Pay, most: int, now_us: int) -> bool:
        """A peer has answered; see `StrictBucket.paid`."""
        self.bucket.advance(now_us)
        self._left[peer] = _Told(pay.left, now_us)
        return self.bucket.paid(end, peer, pay.amount, most)

    def _pace_us(self, peer: str, pace_us: int) -> int:
        told = self._left.get(peer)
        is_small = self.bucket.ceiling < self.bucket.limit.period_us << 35
        return max(pace_us, NOTHING_US) if is_small and told is not None and not told.amount else pace_us

    def _is_short(self, now_us: int) -> bool:
        return now_us - self.bucket.denied_us < WINDOW_US

    def _likely(self, peer: str, home: int, now_us: int) -> int:
        """What a peer has left, for all that is known."""
        told = self._left.get(peer)
        if told is None or now_us - told.at_us >= STALE_US:
            return home
        return min(home, max(told.amount, home >> 5))
