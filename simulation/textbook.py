"""A token bucket as in textbooks, in exact integers: what everything else is measured with, and checked by."""

from __future__ import annotations

from collections.abc import Iterable

from ratelimit_sidecar.crdt.limit import TokenBucketLimit


class TextbookBucket:
    """Full at first. Its deficit is scaled by the limit's `period_us`."""

    def __init__(self, limit: TokenBucketLimit) -> None:
        self.limit = limit
        self.deficit = 0
        self._at_us = 0

    def drain(self, now_us: int) -> None:
        """Let it refill until now."""
        self.deficit = max(0, self.deficit - (now_us - self._at_us) * self.limit.tokens)
        self._at_us = now_us

    def take(self, now_us: int, hits: int = 1) -> bool:
        """Admit and charge the tokens when they are there."""
        self.drain(now_us)
        is_admitted = self.deficit + hits * self.limit.period_us <= self.limit.scaled_capacity
        if is_admitted:
            self.deficit += hits * self.limit.period_us
        return is_admitted

    def charge(self, now_us: int, hits: int = 1) -> int:
        """Charge the tokens, whatever there is.

        Returns:
            The scaled deficit above the capacity. The greatest of all charges, when it is more than 0, is the most by
            which what was charged in any interval exceeds capacity + rate * its length: the supremum over all
            intervals is the greatest deficit (the reflected process).
        """
        self.drain(now_us)
        self.deficit += hits * self.limit.period_us
        return self.deficit - self.limit.scaled_capacity


def ideal(limit: TokenBucketLimit, times_us: Iterable[int]) -> int:
    """How many of the requests at `times_us`, in order, one bucket for all regions admits."""
    bucket = TextbookBucket(limit)
    return sum(map(bucket.take, times_us))


def worst_burst(limit: TokenBucketLimit, admitted_us: Iterable[int]) -> int:
    """The most by which the admissions in any interval exceed capacity + rate * its length; 0 when none does.

    Args:
        admitted_us: in order.

    Returns:
        Tokens, rounded up.
    """
    bucket = TextbookBucket(limit)
    return max(0, -(-max(map(bucket.charge, admitted_us), default=0) // limit.period_us))
