"""The sketch that is often given for a replicated token bucket: two counters that only grow, merged by maximum.

    refill:  adds <- min(adds + rate * elapsed, consumes + capacity)      before every take, by the own clock
    take:    admit and consumes <- consumes + 1 when adds - consumes >= 1
    merge:   adds <- max(adds, theirs); consumes <- max(consumes, theirs)

It converges, but not to the truth: of what two regions consume at the same time the maximum forgets the lesser, and a
region that was idle refills, by its own clock, a bucket that others have been emptying.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from benchmarks.admission.policies.policy import FLUSH_US, LocalPolicy, Setup


@dataclass(slots=True)
class _Replica:
    """Both counters are scaled by the limit's `period_us`."""

    adds: int
    consumes: int
    refilled_us: int
    has_news: bool = False


class MaxMerge(LocalPolicy):
    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        now_us = setup.loop.now_us
        self._replicas = [_Replica(setup.limit.scaled_capacity, 0, now_us) for _ in setup.regions]
        for region in setup.regions:
            setup.loop.every(FLUSH_US, partial(self._flush, region), setup.random.randrange(FLUSH_US))

    def take(self, region: int, now_us: int) -> bool:
        limit, replica = self.setup.limit, self._replicas[region]
        added = replica.adds + (now_us - replica.refilled_us) * limit.tokens
        replica.adds = max(replica.adds, min(added, replica.consumes + limit.scaled_capacity))
        replica.refilled_us = now_us
        if replica.adds - replica.consumes < limit.period_us:
            return False
        replica.consumes += limit.period_us
        replica.has_news = True
        return True

    def _flush(self, region: int) -> None:
        replica = self._replicas[region]
        if not replica.has_news:
            return
        replica.has_news = False
        for peer in self.setup.regions:
            if peer != region:
                merge = partial(self._merge, peer, replica.adds, replica.consumes)
                self.setup.send(region, peer, merge)

    def _merge(self, region: int, adds: int, consumes: int) -> None:
        replica = self._replicas[region]
        replica.adds = max(replica.adds, adds)
        replica.consumes = max(replica.consumes, consumes)
