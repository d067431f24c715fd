"""What was decided since start, by rule, as the metrics show it. Plain integers: a count costs an addition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ratelimit_sidecar.crdt.bucket import Bucket

if TYPE_CHECKING:
    from ratelimit_sidecar.limiter.plan import Step

MAX_NAMES = 10_000
"""Names counted apart. Rules may put values of requests into names, and callers can invent values without end."""


@dataclass(slots=True)
class RuleCounts:
    """Descriptors, and the hits in them: the latter are envoyproxy/ratelimit's statistics of the same names."""

    ok: int = 0
    """Descriptors admitted."""
    over_limit: int = 0
    """Descriptors denied, or that would have been but for shadow mode."""
    tokens: int = 0
    """Tokens taken from buckets."""
    total_hits: int = 0
    over_limit_hits: int = 0
    """Of a request that crosses the limit only those beyond it."""
    near_limit_hits: int = 0
    """Above the near-limit ratio and not over; of a request that crosses it only those beyond it."""
    within_limit_hits: int = 0
    shadow_mode_hits: int = 0
    """Hits of descriptors that shadow mode let pass."""

    def pass_unlimited(self, hits: int) -> None:
        self.ok += 1
        self.total_hits += hits
        self.within_limit_hits += hits

    def count(self, step: Step, admitted: bool, bucket: Bucket) -> None:
        """A decision, with the bucket as it is afterwards."""
        hits = step.hits
        self.total_hits += hits
        if admitted:
            self.ok += 1
            self.tokens += hits
            self.within_limit_hits += hits
            near = bucket.limit.capacity - bucket.remaining - step.near_from
            if near > 0:
                self.near_limit_hits += min(hits, near)
        else:
            self._count_denied(step, bucket)

    def _count_denied(self, step: Step, bucket: Bucket) -> None:
        hits = step.hits
        self.over_limit += 1
        over = hits
        if step.charges_denied:
            self.tokens += hits
            over = min(hits, bucket.debt)
            # What was still under the limit when these hits came.
            self.near_limit_hits += min(hits - over, bucket.limit.capacity - step.near_from)
        self.over_limit_hits += over
        if step.rule is not None and step.rule.shadow_mode:
            self.shadow_mode_hits += hits


class CountsByRule(dict[tuple[str, str], RuleCounts]):
    """By (domain, name of the rule in metrics); descriptors that no rule limits count under the name ""."""

    def of(self, domain: str, metric_name: str, rule_name: str) -> RuleCounts:
        """The counts of a name.

        Args:
            metric_name: may have values of the request in it.
            rule_name: counts in its place when there are too many names already.
        """
        counts = self.get((domain, metric_name))
        if counts is not None:
            return counts
        name = metric_name if len(self) < MAX_NAMES else rule_name
        return self.setdefault((domain, name), RuleCounts())
