"""What Envoys have admitted, charged to the limit's bucket evenly until their next report is due.

All at once it would look like a burst of five seconds: the bucket would be in debt for most of the time, to those who
ask about each request.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ratelimit_sidecar.limiter.limiter import Limiter
from ratelimit_sidecar.limiter.quota_pool import REPORT_US, Pool

CHARGE_PART: Final = 8
"""Of the capacity: no more is charged at once."""

_POOLS_AT_ONCE: Final = 256
"""A tick charges so many."""


class Charges:
    """Charges to buckets what Envoys have reported. Call its `tick` every few milliseconds.

    Args:
        now_us: of the limiter's clock. All other times are of the quotas'.
    """

    def __init__(self, limiter: Limiter, now_us: Callable[[], int]) -> None:
        self._limiter = limiter
        self._now_us = now_us
        self._pools: dict[Pool, None] = {}
        """Those with something pending."""

    def all(self) -> None:
        """Everything that is pending, at once."""
        for pool in list(self._pools):
            self._take(pool, pool.pending)

    def add(self, pool: Pool, hits: int, now_us: int) -> None:
        """An Envoy has admitted so many."""
        if not pool.pending:
            pool.charged_us = now_us
            self._pools[pool] = None
        pool.pending += hits
        pool.charge_until_us = now_us + REPORT_US
        if pool.limit is not None and pool.pending * CHARGE_PART <= pool.limit.capacity:
            self._take(pool, pool.pending)

    def tick(self, now_us: int) -> None:
        """Charge what is due; to be called about ten times a second."""
        for _ in range(min(_POOLS_AT_ONCE, len(self._pools))):
            pool = next(iter(self._pools))
            # To the end of the queue.
            del self._pools[pool]
            self._pools[pool] = None
            left_us = pool.charge_until_us - pool.charged_us
            tokens = pool.pending
            if now_us < pool.charge_until_us:
                tokens = pool.pending * max(0, now_us - pool.charged_us) // left_us
            if tokens:
                pool.charged_us = now_us
                self._take(pool, tokens)

    def _take(self, pool: Pool, tokens: int) -> None:
        pool.pending -= tokens
        if not pool.pending:
            self._pools.pop(pool, None)
        step = pool.step
        if step is not None and tokens and not step.compiled.is_strict:
            self._limiter.charge(step, tokens, self._now_us())
