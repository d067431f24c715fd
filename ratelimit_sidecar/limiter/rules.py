"""What is limited: an immutable tree of rules, matched level by level over a descriptor's entries.

At each level the rule that names key and value wins over the one that names the key alone. A rule applies only when its
depth equals the number of entries: a deeper or shallower match gives no limit. The `unruled` limit, when given,
is for every descriptor that then has none. Matching is on pairs, as in Envoy's RateLimitDescriptor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from ratelimit_sidecar.crdt.limit import Limit
from ratelimit_sidecar.limiter.key import (
    EXACT,
    KEY_ONLY,
    UNRULED,
    KeyEntry,
    decode_bucket_key,
    encode_bucket_key,
)


class Consistency(Enum):
    """How far a rule's buckets are shared (docs/algorithm.md)."""

    EVENTUAL = "eventual"
    """Decided on what has been heard from all replicas: overshoot is bounded, and repaid as debt."""
    LOCAL = "local"
    """Never replicated: every sidecar has the whole limit to itself."""


class Unit(Enum):
    """Envoy's RateLimitResponse.RateLimit.Unit, with the seconds envoyproxy/ratelimit gives each."""

    SECOND = 1
    MINUTE = 60
    HOUR = 3_600
    DAY = 86_400
    WEEK = 7 * 86_400
    MONTH = 30 * 86_400
    YEAR = 365 * 86_400


@dataclass(frozen=True, slots=True)
class Rule:
    """One limit of the rules file.

    Args:
        name: the rule's dotted path, `domain.key_value.key`, as it appears in metrics.
        limit: None for `unlimited`.
        requests_per_unit: what the answer's current_limit shows; 0 to 2**32 - 1.
        unit: None when the rule was given as a bucket: its refill has no unit of Envoy's.
    """

    name: str
    limit: Limit | None
    requests_per_unit: int = 0
    unit: Unit | None = None
    consistency: Consistency = Consistency.EVENTUAL


@dataclass(frozen=True, slots=True)
class RuleNode:
    """One level of the tree: its own rule, and the rules one entry deeper."""

    rule: Rule | None = None
    exact: Mapping[tuple[str, str], RuleNode] = field(default_factory=dict)
    key_only: Mapping[str, RuleNode] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Match:
    """A rule and the bucket of it that a descriptor falls into."""

    rule: Rule
    bucket_key: bytes


@dataclass(frozen=True, slots=True)
class Rules:
    """All rules in force.

    Args:
        domains: the root of each domain's tree.
        unruled: for every descriptor, of any domain, that no rule matches.
    """

    domains: Mapping[str, RuleNode] = field(default_factory=dict)
    unruled: Rule | None = None

    def match(self, domain: str, entries: Sequence[tuple[str, str]]) -> Match | None:
        """The rule for one descriptor; None when it is not limited."""
        path = self._walk(domain, entries)
        if path is not None:
            rule, key_entries = path
            return Match(rule, encode_bucket_key(domain, key_entries))
        if self.unruled is not None:
            key_entries = [KeyEntry(UNRULED, key, value) for key, value in entries]
            return Match(self.unruled, encode_bucket_key(domain, key_entries))
        return None

    def rule_of_key(self, bucket_key: bytes) -> Rule | None:
        """The rule whose bucket has that name; None when no such rule is in force here.

        Raises:
            ValueError: not a bucket's name.
        """
        domain, key_entries = decode_bucket_key(bucket_key)
        if key_entries and all(entry.kind == UNRULED for entry in key_entries):
            return self.unruled
        node = self.domains.get(domain)
        for kind, key, value in key_entries:
            if node is None:
                return None
            node = node.exact.get((key, value)) if kind == EXACT else node.key_only.get(key)
        return node.rule if node is not None else None

    def replicated_limit_of_key(self, bucket_key: bytes) -> Limit | None:
        """The limit of a bucket that peers share; None when there is no such rule here, or it is local."""
        rule = self.rule_of_key(bucket_key)
        if rule is None or rule.consistency is Consistency.LOCAL:
            return None
        return rule.limit

    def __iter__(self) -> Iterator[Rule]:
        """Every rule, in no particular order."""
        nodes = list(self.domains.values())
        while nodes:
            node = nodes.pop()
            nodes += [*node.exact.values(), *node.key_only.values()]
            if node.rule is not None:
                yield node.rule
        if self.unruled is not None:
            yield self.unruled

    def _walk(self, domain: str, entries: Sequence[tuple[str, str]]) -> tuple[Rule, list[KeyEntry]] | None:
        node = self.domains.get(domain)
        key_entries = []
        for key, value in entries:
            if node is None:
                return None
            deeper = node.exact.get((key, value))
            kind = EXACT
            if deeper is None:
                deeper = node.key_only.get(key)
                kind = KEY_ONLY
            node = deeper
            key_entries.append(KeyEntry(kind, key, value))
        if node is None or node.rule is None:
            return None
        return node.rule, key_entries
