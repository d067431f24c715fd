"""Counters of decisions since start, by rule, as the metrics show them. Plain integers: a count costs an addition."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ratelimit_sidecar.crdt.bucket import Bucket

if TYPE_CHECKING:
    from ratelimit_sidecar.limiter.plan import PlannedTake

MAX_NAMES: Final = 10_000
"""The most names with counters of their own. Rules may put values of requests into names, and callers can invent
values.
"""


@dataclass(slots=True)
class RuleCounts:
    """Counters of descriptors, and of hits: the latter are envoyproxy/ratelimit's statistics of the same names."""

    ok: int = 0
    """Descriptors admitted."""
    over_limit: int = 0
    """Descriptors over the limit, those in shadow mode included."""
    admitted_hits: int = 0
    """Hits of admitted descriptors that have a limit."""
    unlimited_hits: int = 0
    denied_hits: int = 0
    charged_hits: int = 0
    """Denied hits that were charged all the same."""
    over_limit_hits: int = 0
    """Hits over the limit; of a request that crosses the limit only those beyond it."""
    near_limit_hits: int = 0
    """Hits above the near-limit ratio and within the limit."""
    shadow_mode_hits: int = 0
    """Hits over the limit that shadow mode admitted."""
    given_back: int = 0
    """Tokens that were given back; `tokens` still counts them."""

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

    def count_unlimited(self, hits: int, *, is_ruled: bool) -> None:
        """Count a descriptor without limit.

        Args:
            is_ruled: True if a rule makes it unlimited. Hits of descriptors without any rule are not counted.
        """
        self.ok += 1
        if is_ruled:
            self.unlimited_hits += hits

    def count_denied(self, take: PlannedTake, bucket: Bucket, *, is_charged: bool) -> None:
        """Count a denied descriptor. `Limiter.decide` itself counts admitted ones.

        Args:
            bucket: the bucket after the decision.
            is_charged: False when nothing of the request is charged, whatever the take says.
        """
        hits, compiled = take.hits, take.compiled
        self.over_limit += 1
        self.denied_hits += hits
        over = hits
        if take.charges_denied and is_charged:
            self.charged_hits += hits
            over = min(hits, bucket.debt)
            # The part of these hits that was still within the limit.
            self.near_limit_hits += min(hits - over, bucket.limit.capacity - compiled.near_from)
        self.over_limit_hits += over
        if compiled.is_shadow:
            self.shadow_mode_hits += over


CountsByRule = dict[tuple[str, str], RuleCounts]
"""Counters by (domain, name of the rule in metrics). Descriptors without rule count under the name ""."""


def has_room_for(counts: CountsByRule, names: Sized) -> bool:
    """Whether there are few enough counters to keep them with these rules. False after many reloads, since the names of
    former rules are not removed one by one.
    """
    return len(counts) <= MAX_NAMES + 2 * len(names)


def counts_of(counts: CountsByRule, domain: str, metric_name: str, rule_name: str) -> RuleCounts:
    """The counters of a name.

    Args:
        metric_name: may contain values of the request.
        rule_name: used instead when there are too many names already.
    """
    found = counts.get((domain, metric_name))
    if found is not None:
        return found
    name = metric_name if len(counts) < MAX_NAMES else rule_name
    return counts.setdefault((domain, name), RuleCounts())
