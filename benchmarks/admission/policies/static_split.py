"""A static split: each region enforces its Nth of the limit by itself, and nobody says anything to anybody."""

from __future__ import annotations

from benchmarks.admission.policies.policy import LocalPolicy, Setup
from ratelimit_sidecar.crdt.limit import TokenBucketLimit
from simulation.textbook import TextbookBucket


class StaticSplit(LocalPolicy):
    never_exceeds = True

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        limit, regions = setup.limit, len(setup.regions)
        part = TokenBucketLimit(limit.tokens, limit.period_us * regions, limit.capacity // regions)
        self._buckets = [TextbookBucket(part) for _ in setup.regions]

    def take(self, region: int, now_us: int) -> bool:
        return self._buckets[region].take(now_us)
