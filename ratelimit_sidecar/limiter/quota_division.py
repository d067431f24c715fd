"""How the limit of a pool is divided: what there is, who wants how much of it, and what each gets.

Of a strict limit nothing but this node's home share is divided; the bucket does without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ratelimit_sidecar.crdt.limit import Limit
from ratelimit_sidecar.crdt.shares import MAX_WHOLE_CAPACITY, PARTS, parts_of, whole_tokens_up
from ratelimit_sidecar.crdt.store import StoreFull
from ratelimit_sidecar.limiter.assignment import Terms, within_debt
from ratelimit_sidecar.limiter.fair_shares import Group, fair_level, grouped, rounded_want
from ratelimit_sidecar.limiter.limiter import Limiter
from ratelimit_sidecar.limiter.quota_pool import MAX_RATE, Pool

IDLE_PART: Final = 32
"""One part in so many of a limit is for those who want nothing, of all together: so their first requests pass."""

HEADROOM_PART: Final = 64
"""Who had so many requests wants to be able to have one part in so many more."""

MAX_GROUPS: Final = 64
"""Of one demand that peers are told of."""


class Division:
    """Divides limits among the Envoys of all regions, by what each wants.

    Args:
        now_us: of the limiter's clock. All other times are of the quotas'.
    """

    def __init__(self, limiter: Limiter, now_us: Callable[[], int]) -> None:
        self._limiter = limiter
        self._now_us = now_us

    def divide(self, pool: Pool, terms: Terms, now_us: int) -> list[Group]:
        """Set the pool's level and budget anew.

        Returns:
            What is wanted here.
        """
        total = self._total(pool, terms, now_us)
        heard = [group for each in pool.heard.values() for group in each.groups]
        # Those that wait are the lost.
        holds = [hold for hold in pool.holds if not (pool.lost and hold in pool.waiting)]
        everybody = len(holds) + len(pool.lost) + sum([group.members for group in heard])
        wants = [lost.rate for lost in pool.lost]
        for hold in holds:
            # One that is new may want as much as anybody.
            demand = hold.demand if hold.demand >= 0 else total // everybody
            hold.want = min(rounded_want(demand + demand // HEADROOM_PART), MAX_RATE)
            wants.append(hold.want)
        if pool.step is not None and pool.step.compiled.is_strict:
            # What is held no longer is the bucket's again, and what nobody here wants stays there.
            self.withhold(pool, terms, pool.held, now_us)
            total = min(total, max(sum(wants), total // IDLE_PART))
        own = grouped(wants)
        if len(own) > MAX_GROUPS:
            own = _merged(own)
        least = total // (IDLE_PART * max(1, everybody))
        groups = [Group(max(group.want, least), group.members) for group in (*own, *heard)]
        level = fair_level(total, groups)
        pool.level = level
        elsewhere = sum([level.share(max(group.want, least)) * group.members for group in heard])
        pool.budget = total - elsewhere
        for hold in holds:
            hold.want = max(hold.want, least)
        return own

    def release(self, pool: Pool, now_us: int) -> None:
        """Nobody holds anything of it any more."""
        if pool.step is not None and pool.step.compiled.is_strict and pool.terms is not None:
            self.withhold(pool, pool.terms, 0, now_us)

    def _total(self, pool: Pool, terms: Terms, now_us: int) -> int:
        """What can be divided."""
        step, ledger = pool.step, self._limiter.ledger
        if step is None or pool.limit is None:
            return terms.rate
        if step.compiled.is_strict:
            assert ledger is not None
            assert isinstance(pool.limit, Limit)
            return terms.rate * ledger.own_parts(pool.key, pool.limit, now_us) // PARTS
        return within_debt(pool.limit, terms.rate, self._limiter.used(step, self._now_us()))

    def withhold(self, pool: Pool, terms: Terms, rate: int, now_us: int) -> int:
        """Of a strict limit let the bucket do without what all hold together.

        An Envoy whose share rises may find tokens in it at once. So whatever rises, though another's has fallen as
        much, is paid for with tokens of the bucket, to which what has fallen comes back without any.

        Returns:
            The rate that all may hold: less than is asked for, when the bucket is short of tokens.
        """
        ledger, limit = self._limiter.ledger, pool.limit
        assert ledger is not None
        assert isinstance(limit, Limit)
        parts = -(-rate * PARTS // terms.rate) if terms.rate else 0
        if limit.capacity <= MAX_WHOLE_CAPACITY:
            parts = parts_of(min(whole_tokens_up(parts, limit.capacity), limit.capacity), limit.capacity)
        try:
            parts = ledger.withhold(pool.key, limit, parts, now_us)
        except StoreFull:
            return 0
        return terms.rate * parts // PARTS


def _merged(groups: list[Group]) -> list[Group]:
    """In `MAX_GROUPS`, each with the greatest want of those in it: nobody counts for less."""
    size = -(-len(groups) // MAX_GROUPS)
    parts = [groups[at : at + size] for at in range(0, len(groups), size)]
    return [Group(part[-1].want, sum([group.members for group in part])) for part in parts]
