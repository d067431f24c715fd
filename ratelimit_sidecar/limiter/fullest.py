"""The fullest buckets of each rule: how near its callers are to being denied.

A pass looks at all buckets of a store, some at a time. Its result is shown until the next pass is over. So the work is
spread over time, and the result is up to two passes old. For each rule a few numbers are kept, and nothing that
callers choose.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from ratelimit_sidecar.crdt.bucket import Bucket
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.crdt.window import SlidingWindow
from ratelimit_sidecar.limiter.key import decode_bucket_key, rule_key
from ratelimit_sidecar.limiter.rules import Rules

FREED_PER_BUCKET: Final = 4
"""For each bucket looked at, this many objects of a former pass are freed. A pass leaves no more than that for each of
its buckets.
"""

RANKS: Final = 3
"""The buckets shown for each rule, the fullest first."""


@dataclass(slots=True)
class Fullest:
    """The fullest buckets of one rule."""

    used: list[float] = field(default_factory=list)
    """The used parts of the capacity of at most `RANKS` buckets, the greatest first; above 1 with debt."""
    debt: int = 0
    """The greatest debt of a bucket, in whole tokens."""

    def add(self, used: float, debt: int) -> None:
        self.debt = max(self.debt, debt)
        if len(self.used) < RANKS:
            self.used.append(used)
        elif used > self.used[-1]:
            self.used[-1] = used
        else:
            return
        self.used.sort(reverse=True)


class FullestBuckets:
    """Finds the fullest buckets of each rule in one store. Call `look` regularly, and read `of_rules`."""

    def __init__(self, store: Store) -> None:
        self.of_rules: dict[tuple[str, str], Fullest] = {}
        """The result of the last whole pass, by domain and name of the rule."""
        self._store = store
        self._walk: Iterator[Bucket] = store.walk()
        self._of_rules: dict[tuple[str, str], Fullest] = {}
        self._of_keys: dict[bytes, Fullest | None] = {}
        """By rule key, since finding the rule takes longer."""
        self._former: list[object] = []
        """Objects of former passes. To free those of 20,000 rules in one step takes 5 ms."""

    def look(self, rules: Rules, now_us: int, most: int) -> int:
        """Look at the next `most` buckets, or fewer if they are sliding windows with many slots.

        Args:
            rules: the current rules; buckets of other rules do not count. They may change during a pass. They are not
                kept here, since freeing them would take long.
            now_us: not less than in the call before.

        Returns:
            How many it has looked at; less than `most` also at the end of a pass.
        """
        del self._former[-FREED_PER_BUCKET * most :]
        looked = 0
        left = most
        while left > 0:
            bucket = next(self._walk, None)
            if bucket is None:
                self._former += [*self.of_rules, *self.of_rules.values(), *self._of_keys]
                self.of_rules = self._of_rules
                self._begin()
                break
            looked += 1
            # Other buckets advance without looking at their slots.
            left -= bucket.looks if isinstance(bucket, SlidingWindow) else 1
            capacity = bucket.limit.capacity
            fullest = self._fullest(rules, bucket.key)
            if fullest is not None and capacity > 0:
                bucket.advance(now_us)
                debt = bucket.debt
                fullest.add((capacity - bucket.remaining + debt) / capacity, debt)
        return looked

    def _begin(self) -> None:
        self._walk = self._store.walk()
        self._of_rules = {}
        self._of_keys = {}

    def _fullest(self, rules: Rules, key: bytes) -> Fullest | None:
        of_rule = rule_key(key)
        if of_rule in self._of_keys:
            return self._of_keys[of_rule]
        fullest: Fullest | None = None
        rule = rules.rule_of_key(key)
        if rule is not None:
            domain = decode_bucket_key(key)[1]
            names = (domain if domain in rules.domains else "", rule.name)
            fullest = self._of_rules.setdefault(names, Fullest())
        self._of_keys[of_rule] = fullest
        return fullest
