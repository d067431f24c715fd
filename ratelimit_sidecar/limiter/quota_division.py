"""Divides the limit of a pool among Envoys: how much there is, how much each wants, and how much each gets.

Of a strict limit only this node's home is divided; the strict bucket cannot use the part that Envoys have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ratelimit_sidecar.crdt.limit import TokenBucketLimit, WindowLimit
from ratelimit_sidecar.crdt.shares import TOKEN
from ratelimit_sidecar.crdt.store import StoreFull
from ratelimit_sidecar.limiter.assignment import ShareBase, look_ahead_us, within_debt, within_left, within_window
from ratelimit_sidecar.limiter.fair_shares import Group, fair_level, grouped, rounded_want
from ratelimit_sidecar.limiter.limiter import Limiter
from ratelimit_sidecar.limiter.quota_pool import MAX_RATE, Pool

IDLE_PART: Final = 32
"""All idle Envoys together get 1/32 of the limit, so that their first requests pass."""

HEADROOM_PART: Final = 64
"""A demand is raised by 1/64, as headroom."""

MAX_GROUPS: Final = 64
"""The most groups in a demand that is sent to peers."""


class Division:
    """Divides limits among the Envoys of all regions, by demand.

    Args:
        now_us: returns the wall clock, by which buckets are charged. All other times are of the clock of strict limits.
    """

    def __init__(self, limiter: Limiter, now_us: Callable[[], int]) -> None:
        self._limiter = limiter
        self._now_us = now_us

    def divide(self, pool: Pool, base: ShareBase, strict_us: int) -> list[Group]:
        """Compute the pool's level, budget and burst.

        Returns:
            The demand of this node's Envoys.
        """
        total, pool.share_base = self._left(pool, base, strict_us)
        of_peers = [group for each in pool.peer_demands.values() for group in each.groups]
        # Buckets that wait will get one of the orphaned assignments: count those only once.
        buckets = [bucket for bucket in pool.buckets if not (pool.orphans and bucket in pool.waiting)]
        everybody = len(buckets) + len(pool.orphans) + sum([group.members for group in of_peers])
        wants = [orphan.rate for orphan in pool.orphans]
        for bucket in buckets:
            # The demand of a new bucket is not known yet: assume an equal part.
            demand = bucket.demand if bucket.demand >= 0 else total // everybody
            bucket.want = min(rounded_want(demand + demand // HEADROOM_PART), MAX_RATE)
            wants.append(bucket.want)
        if pool.planned_take is not None and pool.planned_take.compiled.is_strict:
            # The bucket gets back rates that expired, and keeps the rate that nobody here wants.
            self.withhold(pool, base, pool.held, strict_us)
            total = min(total, max(sum(wants), total // IDLE_PART))
        own = grouped(wants)
        if len(own) > MAX_GROUPS:
            own = _merged(own)
        least = total // (IDLE_PART * max(1, everybody))
        groups = [Group(max(group.want, least), group.members) for group in (*own, *of_peers)]
        level = fair_level(total, groups)
        pool.level = level
        elsewhere = sum([level.share(max(group.want, least)) * group.members for group in of_peers])
        pool.budget = total - elsewhere
        for bucket in buckets:
            bucket.want = max(bucket.want, least)
        return own

    def release(self, pool: Pool, strict_us: int) -> None:
        """Give the pool's part back to the strict bucket: no Envoy has an assignment any more."""
        if pool.planned_take is not None and pool.planned_take.compiled.is_strict and pool.share_base is not None:
            self.withhold(pool, pool.share_base, 0, strict_us)

    def _left(self, pool: Pool, base: ShareBase, strict_us: int) -> tuple[int, ShareBase]:
        """The rate that can be divided, and `base` with the burst that is left."""
        take, ledger = pool.planned_take, self._limiter.ledger
        if take is None or pool.limit is None:
            return base.rate, base
        if take.compiled.is_strict:
            assert ledger is not None
            assert isinstance(pool.limit, TokenBucketLimit)
            capacity = pool.limit.capacity
            return base.rate * ledger.shares.home(pool.key, capacity, strict_us) // (TOKEN * max(1, capacity)), base
        limit, charged_us = pool.limit, self._now_us()
        if isinstance(limit, WindowLimit):
            left = self._limiter.left_within(take, look_ahead_us(limit), charged_us)
            return within_window(limit, base.rate, left), base
        used = self._limiter.used(take, charged_us)
        left_base = base._replace(burst=within_left(limit, base.rate, used, pool.pending))
        return within_debt(limit, base.rate, used), left_base

    def withhold(self, pool: Pool, base: ShareBase, rate: int, strict_us: int) -> int:
        """Withhold the rate that Envoys have in total from the bucket of a strict limit.

        An Envoy whose share rises may use that many tokens at once. So each rise is paid for with tokens of the bucket,
        even if another Envoy's share has fallen as much. Shares that fall go back to the bucket without tokens.

        Returns:
            The rate that Envoys may have in total; less than `rate` when the bucket is short of tokens.
        """
        ledger, limit = self._limiter.ledger, pool.limit
        assert ledger is not None
        assert isinstance(limit, TokenBucketLimit)
        # Homes are whole tokens.
        tokens = min(-(-rate * limit.capacity // base.rate), limit.capacity) if base.rate else 0
        try:
            withheld = ledger.withhold(pool.key, limit, tokens * TOKEN, strict_us)
        except StoreFull:
            return 0
        return base.rate * withheld // (TOKEN * max(1, limit.capacity))


def _merged(groups: list[Group]) -> list[Group]:
    """The same groups, merged into `MAX_GROUPS` groups, each with the greatest want of its members. So no member counts
    for less."""
    size = -(-len(groups) // MAX_GROUPS)
    parts = [groups[at : at + size] for at in range(0, len(groups), size)]
    return [Group(part[-1].want, sum([group.members for group in part])) for part in parts]
