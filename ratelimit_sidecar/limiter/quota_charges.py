"""Charges the hits that Envoys have admitted to the limit's bucket, spread evenly until their next report is due.

Charged all at once they would look like a burst of five seconds. The bucket would then be in debt most of the time, and
requests that are decided here would be denied.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Final

from ratelimit_sidecar.limiter.assignment import REPORT_US
from ratelimit_sidecar.limiter.limiter import Limiter
from ratelimit_sidecar.limiter.quota_pool import Pool

CHARGE_PART: Final = 8
"""At most 1/8 of the capacity is charged at once when a report arrives."""

_POOLS_AT_ONCE: Final = 256
"""A tick charges this many pools."""


class Charges:
    """Charges the hits that Envoys have reported to the limits' buckets. Call `tick` about ten times a second.

    Args:
        now_us: returns the wall clock, by which buckets are charged. All other times are of the clock of strict limits.
    """

    def __init__(self, limiter: Limiter, now_us: Callable[[], int]) -> None:
        self._limiter = limiter
        self._now_us = now_us
        self._pools: dict[Pool, None] = {}
        """Pools with pending hits."""

    def all(self) -> None:
        """Charge all pending hits at once."""
        for pool in list(self._pools):
            self._take(pool, pool.pending)

    def add(self, pool: Pool, hits: int, strict_us: int, *, is_kept: bool) -> None:
        """An Envoy has admitted `hits`; charge them soon.

        Args:
            is_kept: False for a pool made for this report alone, as there is no room for it. It is charged at once:
                callers can invent any number of them.
        """
        if not is_kept:
            pool.pending += hits
            self._take(pool, pool.pending)
            return
        if not pool.pending:
            pool.charged_us = strict_us
            self._pools[pool] = None
        pool.pending += hits
        pool.charge_until_us = strict_us + REPORT_US
        if pool.limit is not None and pool.pending * CHARGE_PART <= pool.limit.capacity:
            self._take(pool, pool.pending)

    def tick(self, strict_us: int) -> None:
        """Charge the hits that are due by now."""
        for pool in list(islice(self._pools, _POOLS_AT_ONCE)):
            # To the end of the queue.
            del self._pools[pool]
            self._pools[pool] = None
            left_us = pool.charge_until_us - pool.charged_us
            tokens = pool.pending
            if strict_us < pool.charge_until_us:
                tokens = pool.pending * max(0, strict_us - pool.charged_us) // left_us
            if tokens:
                pool.charged_us = strict_us
                self._take(pool, tokens)

    def _take(self, pool: Pool, tokens: int) -> None:
        pool.pending -= tokens
        if not pool.pending:
            self._pools.pop(pool, None)
        take = pool.planned_take
        if take is not None and tokens and not take.compiled.is_strict:
            self._limiter.charge(take, tokens, self._now_us())
