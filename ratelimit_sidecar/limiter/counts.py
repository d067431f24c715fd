"""What was decided since start, by rule, as the metrics show it. Plain integers: a count costs an addition."""

from __future__ import annotations

from collections.abc import Sized
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
    admitted_hits: int = 0
    """Hits of admitted descriptors that have a limit."""
    unlimited_hits: int = 0
    denied_hits: int = 0
    charged_hits: int = 0
    """Of those denied: taken all the same."""
    over_limit_hits: int = 0
    """Of a request that crosses the limit only those beyond it."""
    near_limit_hits: int = 0
    """Above the near-limit ratio and not over; of a request that crosses it only those beyond it."""
    shadow_mode_hits: int = 0
    """Hits over the limit that shadow mode let pass."""
    given_back: int = 0
    """Tokens that requests took and gave back again; `tokens` has them."""

    @property
    def tokens(self) -> int:
        """Tokens taken from buckets."""
        return self.admitted_hits + self.charged_hits

    @property
    def within_limit_hits(self) -> int:
        return self.admitted_hits + self.unlimited_hits

    @property
    def total_hits(self) -> int:
        return self.within_limit_hits + self.denied_hits

    def pass_unlimited(self, hits: int, *, is_ruled: bool) -> None:
        """A descriptor that needs no bucket.

        Args:
            is_ruled: a rule says so; hits of others are not counted.
        """
        self.ok += 1
        if is_ruled:
            self.unlimited_hits += hits

    def deny(self, step: Step, bucket: Bucket, *, is_charged: bool) -> None:
        """A denied descriptor, with the bucket as it is afterwards. An admitted one `Limiter.decide` counts itself.

        Args:
            is_charged: False when nothing of the request is, whatever the step says.
        """
        hits, compiled = step.hits, step.compiled
        self.over_limit += 1
        self.denied_hits += hits
        over = hits
        if step.charges_denied and is_charged:
            self.charged_hits += hits
            over = min(hits, bucket.debt)
            # What was still under the limit when these hits came.
            self.near_limit_hits += min(hits - over, bucket.limit.capacity - compiled.near_from)
        self.over_limit_hits += over
        if compiled.is_shadow:
            self.shadow_mode_hits += over


class CountsByRule(dict[tuple[str, str], RuleCounts]):
    """By (domain, name of the rule in metrics); descriptors that no rule limits count under the name ""."""

    def has_room_for(self, names: Sized) -> bool:
        """Whether most of what is here can be of these rules; false after many reloads, since names of rules that are
        gone are not taken out one by one."""
        return len(self) <= MAX_NAMES + 2 * len(names)

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
