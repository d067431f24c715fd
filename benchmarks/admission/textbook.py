"""A token bucket as in textbooks, in exact integers: what everything else is measured with."""

from __future__ import annotations

from collections.abc import Iterable

from ratelimit_sidecar.crdt.limit import Limit


class TextbookBucket:
    """Full at first. Its deficit is scaled by the limit's `period_us`."""

    def __init__(self, limit: Limit) -> None:
        self.limit = limit
        self.deficit = 0
        self._at_us = 0

    def take(self, now_us: int) -> bool:
        """Admit and charge one token when it is there."""
        limit = self.limit
        deficit = max(0, self.deficit - (now_us - self._at_us) * limit.tokens)
        admitted = deficit + limit.period_us <= limit.ceiling
        self.deficit = deficit + limit.period_us if admitted else deficit
        self._at_us = now_us
        return admitted


def ideal(limit: Limit, times_us: Iterable[int]) -> int:
    """How many of the requests at `times_us`, in order, one bucket for all regions admits."""
    bucket = TextbookBucket(limit)
    return sum(map(bucket.take, times_us))


def worst_burst(limit: Limit, admitted_us: Iterable[int]) -> int:
    """The most by which the admissions in any interval exceed capacity + rate * its length; 0 when none does.

    The supremum over all intervals is the greatest deficit of one bucket charged with all admissions (the reflected
    process), less the capacity: one pass finds it.

    Args:
        admitted_us: in order.

    Returns:
        Tokens, rounded up.
    """
    tokens, period_us = limit.tokens, limit.period_us
    deficit = worst = at_us = 0
    for now_us in admitted_us:
        deficit = max(0, deficit - (now_us - at_us) * tokens) + period_us
        worst = max(worst, deficit)
        at_us = now_us
    return max(0, -((limit.ceiling - worst) // period_us))
