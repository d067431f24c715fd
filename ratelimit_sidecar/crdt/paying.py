"""When and how much a replica asks for and pays, for one strict bucket. Safety does not depend on this file.

A replica asks its peers when it has denied a request lately, or when it has some demand and its level is below three
quarters of its home. It asks for most of its free room, in proportion to what each peer had left. A replica that is not
short itself pays what its own demand does not need soon, and divides that among the asking peers by their demand. Times
are those of `strict.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from ratelimit_sidecar.crdt.shares import rank
from ratelimit_sidecar.crdt.strict import MAX_AMOUNT, NEVER_US, WINDOW_US, StrictBucket

LEAST_PACE_US: Final = 20_000
"""A peer is asked again after this time at the earliest."""

PACE_SHIFT: Final = 6
"""A peer is asked again only after 1/64 of the limit has refilled."""

NOTHING_US: Final = 250_000
"""When a home is smaller than eight tokens, a peer that had nothing left is asked again only after this time, because
reserved room does not refill.
"""

STALE_US: Final = 2_000_000
"""A peer's report of what it has left is too old after this time. Then the peer is assumed to have all of its home."""

OWN_REFILL_US: Final = 300_000
"""As much room as refills in this time is not asked for (up to a quarter of all room), so that the own refill still
fits before the answers arrive.
"""

RESERVE_SHIFT: Final = 4
"""1/16 of the home, in whole tokens, is never paid, so that a region that wakes up can serve at once."""

RESERVE_US: Final = 200_000
"""The tokens that the recent demand takes in this time are not paid either."""

ASKERS_US: Final = 1_000_000
"""Spare tokens are divided among the peers that asked within this time."""


class Ask(NamedTuple):
    """A request to a peer for up to `amount`. Amounts are in 2**-32 tokens.

    Args:
        level: the level of the node that asks.
        demand: the tokens that its requests ask for in a second.
        is_short: True if it has denied a request lately.
    """

    amount: int
    level: int
    demand: int
    is_short: bool


class Pay(NamedTuple):
    """The answer to an ask.

    Args:
        left: what the payer could still pay.
    """

    amount: int
    left: int


class _Report(NamedTuple):
    """An amount that a peer reported, and when."""

    amount: int
    at_us: int


@dataclass(slots=True)
class Paying:
    """The policy of one strict bucket: how much to ask each peer for, and how much to pay a peer that asks.

    Args:
        node: this replica.
    """

    bucket: StrictBucket
    node: str
    _left: dict[str, _Report] = field(default_factory=dict)
    """By peer, what it had left when it last answered."""
    _demand: dict[str, _Report] = field(default_factory=dict)
    """By peer, its demand when it last asked."""
    _asked_us: dict[str, int] = field(default_factory=dict)
    """By peer, when it was last asked."""

    def asks(self, ends: Mapping[str, int], homes: Mapping[str, int], now_us: int) -> dict[str, Ask]:
        """The asks to send now, by peer. Room is reserved for each.

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
            # No more than the peer is credited with: anything above that would be paid but not counted here.
            amount = min(min(grains, bucket.credit_of(peer, grains)) // limit.period_us, MAX_AMOUNT)
            if amount > 0 and amount * limit.period_us > ceiling >> 8:
                bucket.ask(ends[peer], amount)
                self._asked_us[peer] = now_us
                asks[peer] = Ask(amount, min(level, MAX_AMOUNT), min(demand, MAX_AMOUNT), is_short)
        return asks

    def answer(self, peer: str, ask: Ask, now_us: int) -> Pay:
        """Pay the peer its fair part of the spare tokens."""
        bucket = self.bucket
        bucket.advance(now_us)
        self._demand[peer] = _Report(ask.demand, now_us)
        period_us = bucket.limit.period_us
        token, level, home = 1 << 32, max(0, bucket.level) // period_us, bucket.ceiling // period_us
        reserve = home >> RESERVE_SHIFT
        if self._is_short(now_us):
            # Fractions of a token admit nothing. When both nodes have only a fraction and refill slowly, the node with
            # the lower rank gives its fraction to the other.
            is_slow = bucket.refill * 1_100_000 < token * period_us
            yields = is_slow and ask.is_short and level < token and rank(bucket.key, peer) < rank(bucket.key, self.node)
            return Pay(bucket.pay(peer, ask.amount) if yields else 0, 0)
        kept = max(reserve, bucket.demand * RESERVE_US // 1_000_000)
        if not ask.is_short:
            kept = max(kept, (level + ask.level) // 2)
        spare = max(0, level - kept // token * token)
        others = sum(
            report.amount
            for other, report in self._demand.items()
            if other != peer and now_us - report.at_us < ASKERS_US
        )
        if others:
            total = others + ask.demand
            spare = spare * max(ask.demand, total >> 3) // total
        paid = bucket.pay(peer, min(ask.amount, spare))
        return Pay(paid, min(max(0, level - paid - reserve), MAX_AMOUNT))

    def paid(self, peer: str, end: int, pay: Pay, most: int, now_us: int) -> bool:
        """Add a peer's payment; see `StrictBucket.paid`."""
        self.bucket.advance(now_us)
        self._left[peer] = _Report(pay.left, now_us)
        return self.bucket.paid(end, peer, pay.amount, most)

    def _pace_us(self, peer: str, pace_us: int) -> int:
        report = self._left.get(peer)
        is_small = self.bucket.ceiling < self.bucket.limit.period_us << 35
        return max(pace_us, NOTHING_US) if is_small and report is not None and not report.amount else pace_us

    def _is_short(self, now_us: int) -> bool:
        return now_us - self.bucket.denied_us < WINDOW_US

    def _likely(self, peer: str, home: int, now_us: int) -> int:
        """An estimate of what a peer has left."""
        report = self._left.get(peer)
        if report is None or now_us - report.at_us >= STALE_US:
            return home
        return min(home, max(report.amount, home >> 5))
