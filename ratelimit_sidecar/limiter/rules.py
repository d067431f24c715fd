"""Rules: an immutable tree, matched level by level over a descriptor's entries.

At each level the first of these leads on: the rule that names key and value; the first wildcard, in file order, that
fits the value; the rule that names the key alone. A rule applies only when its depth equals the number of entries. A
descriptor that no rule matches has the `default_rule`, if there is one. A limit in the request itself overrides all of
this in a domain that has rules. Matching is on pairs, as in Envoy's RateLimitDescriptor; the order is that of
envoyproxy/ratelimit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Final

from ratelimit_sidecar.crdt.limit import DEFAULT_MAX_DEBT, AnyLimit, TokenBucketLimit, Window, WindowLimit
from ratelimit_sidecar.limiter.http_mapping import HttpMapping
from ratelimit_sidecar.limiter.key import (
    BLANKS,
    DEFAULT_RULE,
    EXACT,
    FIXED_WINDOW,
    KEY_ONLY,
    LOCAL,
    OVERFLOW,
    OVERRIDE,
    OVERRIDE_LIMIT,
    PATTERN,
    SLIDING_WINDOW,
    STRICT_TOKEN_BUCKET,
    TOKEN_BUCKET,
    WILDCARD_VALUE,
    KeyEntry,
    bounded,
    bucket_key_head,
    caller_entries,
    decode_bucket_key,
    encode_bucket_key,
    entry_bytes,
    hash64,
    is_overflow_key,
)
from ratelimit_sidecar.limiter.wildcard import WildcardSet

MAX_REQUESTS_PER_UNIT: Final = 2**32 - 1

JOINED: Final = ""
"""The key in `RuleNode.wildcards` for patterns on key and value joined by an underscore, as all patterns are in
envoyproxy/ratelimit. A level uses it when one of its patterns has a wildcard in its key. No real key is empty.
"""

MAX_ORDER_TRIES: Final = 256
"""The most entries tried against a level, about 2 us each. With n pairs, rules that have the keys in one order need n*n
tries at most.
"""

_SECOND_US: Final = 1_000_000


class Consistency(Enum):
    """How far a rule's buckets are shared (docs/algorithm.md)."""

    EVENTUAL = "eventual"
    """Decided on what was received from all replicas. Overshoot is bounded, and repaid as debt."""
    STRICT = "strict"
    """Decided on this replica's share of the limit, so all replicas together never exceed it. Token buckets only."""
    LOCAL = "local"
    """Never replicated: every sidecar has the whole limit to itself."""


class Charge(Enum):
    """Which hits of a token bucket or a sliding window count. A fixed window counts all of them."""

    ADMITTED = "admitted"
    """Admitted hits."""
    REPORTED = "reported"
    """Admitted hits, and all hits of descriptors with a hits_addend: with it Envoy reports afterwards what a request
    has cost.
    """
    ALWAYS = "always"
    """All hits; denied ones become debt."""


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
        unit: None when the rule was given as a bucket, whose refill has no unit of Envoy's.
        limit_name: the `name` in `rate_limit`: shown in the answer, and used by `replaces` of other rules.
        replaces: limit names of rules that do not count in a request that this one matches.
        shadow_mode: True to decide and charge, but answer OK.
        quota_mode: True if this rule alone, over its limit, does not make the answer OVER_LIMIT; all such rules of a
            request together do.
        retry_after: True if headers of a denial say when to come back.
        body: the body of the response to a denied request; empty for Envoy's own.
        metadata: goes into the answer's dynamic metadata when the rule admits.
        metric_of_values: True if the name in metrics has all values of the request (`detailed_metric`).
        wait_us: how long a request may wait for tokens of other replicas; 0 unless strict.
    """

    name: str
    limit: AnyLimit | None
    requests_per_unit: int = 0
    unit: Unit | None = None
    consistency: Consistency = Consistency.EVENTUAL
    limit_name: str = ""
    replaces: frozenset[str] = frozenset()
    shadow_mode: bool = False
    quota_mode: bool = False
    charge: Charge = Charge.ADMITTED
    retry_after: bool = False
    body: str = ""
    metadata: Mapping[str, object] = field(default_factory=dict, hash=False)
    metric_of_values: bool = False
    wait_us: int = 0

    bucket_type: int = field(init=False, compare=False)
    """The bucket type of its bucket keys."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "bucket_type", _bucket_type(self.limit, self.consistency))


def _bucket_type(limit: AnyLimit | None, consistency: Consistency) -> int:
    if consistency is Consistency.STRICT:
        return STRICT_TOKEN_BUCKET
    local = LOCAL if consistency is Consistency.LOCAL else 0
    if limit is None or isinstance(limit, TokenBucketLimit):
        return TOKEN_BUCKET | local
    return (FIXED_WINDOW if limit.window is Window.FIXED else SLIDING_WINDOW) | local


@dataclass(frozen=True, slots=True)
class RuleNode:
    """One level of the tree: its own rule, and the rules one entry deeper.

    Args:
        wildcards: by key, the patterns for its values; or all under `JOINED`.
        shares_bucket: True if all values that its pattern fits share one bucket (`share_threshold`).
        value_in_metric: True if the name in metrics has the value of the request (`value_to_metric`).
    """

    rule: Rule | None = None
    exact: dict[tuple[str, str], RuleNode] = field(default_factory=dict)
    wildcards: dict[str, WildcardSet[RuleNode]] = field(default_factory=dict)
    key_only: dict[str, RuleNode] = field(default_factory=dict)
    shares_bucket: bool = False
    value_in_metric: bool = False

    @property
    def children(self) -> Iterator[RuleNode]:
        yield from self.exact.values()
        for wildcards in self.wildcards.values():
            for _, node in wildcards.patterns:
                yield node
        yield from self.key_only.values()


class EntryMatch:
    """How one entry of a descriptor was matched. No dataclass, so that mypyc compiles its constructor.

    Args:
        kind: EXACT, PATTERN or KEY_ONLY (see `limiter.key`).
        pattern: the value in the rules; empty for KEY_ONLY.
        is_joined: True if the pattern is for key and value joined (see `JOINED`).
    """

    __slots__ = ("is_joined", "key", "kind", "node", "pattern", "value")

    def __init__(
        self, kind: int, key: str, value: str, pattern: str, node: RuleNode, *, is_joined: bool = False
    ) -> None:
        self.kind = kind
        self.key = key
        self.value = value
        self.pattern = pattern
        self.node = node
        self.is_joined = is_joined


class Match:
    """The rule of a descriptor, and its bucket. No dataclass, so that mypyc compiles its constructor.

    Args:
        metric_name: the rule's name in metrics, with values of the request if the rules ask for them.
        is_override: True if the rule was made for this request, from the limit in it.
    """

    __slots__ = ("bucket_key", "is_override", "metric_name", "rule")

    def __init__(self, rule: Rule, bucket_key: bytes, metric_name: str, is_override: bool = False) -> None:
        self.rule = rule
        self.bucket_key = bucket_key
        self.metric_name = metric_name
        self.is_override = is_override


@dataclass(frozen=True, slots=True)
class Rules:
    """All rules in force.

    Args:
        domains: the root of each domain's tree.
        default_rule: the rule for every descriptor, of any domain, that no other rule matches.
        override_window: the window of overrides (limits in requests); None for a token bucket.
        override_consistency: how overrides are shared.
        override_charge: which hits of overrides count.
        all_or_nothing: the domains in which a denied request is charged nothing.
        http_mappings: by domain, how descriptors are made from HTTP requests.
        default_domain: the domain for HTTP requests that name none; "" for none.
    """

    domains: dict[str, RuleNode] = field(default_factory=dict)
    default_rule: Rule | None = None
    override_window: Window | None = None
    override_consistency: Consistency = Consistency.EVENTUAL
    override_charge: Charge = Charge.ADMITTED
    all_or_nothing: frozenset[str] = frozenset()
    http_mappings: Mapping[str, HttpMapping] = field(default_factory=dict)
    default_domain: str = ""

    digest: int = field(init=False, compare=False)
    """64 bits, never 0. Equal on replicas whose rules treat equal takes alike."""
    has_strict: bool = field(init=False, compare=False)
    """True if a rule is strict. Computed here, in the thread that reads the rules, so that putting them in force is
    quick.
    """
    names: Mapping[tuple[str, str], None] = field(init=False, compare=False)
    """Domain and name of each rule, as metrics label it. Computed here for the same reason."""

    def __post_init__(self) -> None:
        # A sum does not depend on the order of rules. Sorting 20,000 would hold Python's lock for 5 ms.
        digest = hash64(f"{self.override_window} {self.override_consistency}".encode())
        has_strict = False
        names: dict[tuple[str, str], None] = {}
        for domain, rule in self._by_domain():
            names[domain, rule.name] = None
            if rule.consistency is not Consistency.LOCAL:
                digest += hash64(f"{rule.name} {rule.bucket_type} {rule.limit}".encode())
            if rule.consistency is Consistency.STRICT:
                has_strict = True
        object.__setattr__(self, "digest", digest % 2**64 or 1)
        object.__setattr__(self, "has_strict", has_strict)
        object.__setattr__(self, "names", names)

    def match(self, domain: str, entries: Sequence[tuple[str, str]]) -> Match | None:
        """The match for one descriptor; None when it is not limited."""
        levels = self.walk(domain, entries)
        rule = _rule_of_levels(levels, entries)
        if rule is not None:
            return _match_of_levels(domain, levels, rule)
        if self.default_rule is not None:
            key_entries = caller_entries(DEFAULT_RULE, entries)
            key = encode_bucket_key(self.default_rule.bucket_type, bounded(domain), key_entries)
            return Match(self.default_rule, key, self.default_rule.name)
        return None

    def override(self, domain: str, entries: Sequence[tuple[str, str]], requests: int, unit: Unit) -> Match | None:
        """The match for a descriptor that brings its own limit (an override); None when the domain has no rules.

        With windows the bucket depends on the unit alone, as in envoyproxy/ratelimit. So overrides with different
        limits count together, and also with requests without override if the descriptor's rule counts in windows of the
        same unit. Strict overrides are token buckets, and each limit has a bucket of its own, since the rate differs.
        """
        if domain not in self.domains:
            return None
        levels = self.walk(domain, entries)
        beside = _rule_of_levels(levels, entries)
        # An override counts by the value, not by the pattern; the two can be the same text.
        if (
            beside is not None
            and beside.unit is unit
            and isinstance(beside.limit, WindowLimit)
            and not any(level.node.shares_bucket and not _is_pattern_itself(level) for level in levels)
        ):
            rule = self._override_rule(domain, requests, unit, beside.limit.window)
            rule = replace(rule, consistency=beside.consistency)
            key = _match_of_levels(domain, levels, beside).bucket_key
            return Match(rule, key, rule.name, is_override=True)
        rule = self._override_rule(domain, requests, unit, self.override_window)
        key_entries = caller_entries(OVERRIDE, entries)
        counted = requests if self.override_window is None else 0
        key_entries.append(KeyEntry(OVERRIDE_LIMIT, str(counted), unit.name))
        return Match(rule, encode_bucket_key(rule.bucket_type, domain, key_entries), rule.name, is_override=True)

    def walk(self, domain: str, entries: Sequence[tuple[str, str]]) -> list[EntryMatch]:
        """How the entries were matched. There are fewer levels than entries when an entry did not match."""
        levels: list[EntryMatch] = []
        node = self.domains.get(domain)
        for key, value in entries:
            if node is None:
                break
            level = _descend(node, key, value)
            if level is None:
                break
            levels.append(level)
            node = level.node
        return levels

    def in_order(self, domain: str, pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
        """Order pairs that come without an order, so that a rule matches all of them.

        At each level the first pair by key that leads to a rule is used. The pairs are in order of their keys when
        there is no such order, or it is not found within `MAX_ORDER_TRIES`.
        """
        by_key = sorted(pairs)
        root = self.domains.get(domain)
        found = None if root is None else _order(root, by_key, [MAX_ORDER_TRIES])
        return by_key if found is None else found

    def rule_of_key(self, bucket_key: bytes) -> Rule | None:
        """The rule whose bucket has this key; None when no such rule is in force here.

        Raises:
            ValueError: not a bucket key.
        """
        bucket_type, domain, key_entries = decode_bucket_key(bucket_key)
        if bucket_type & OVERFLOW:
            if not is_overflow_key(bucket_key):
                return None
            if key_entries and key_entries[-1].kind == WILDCARD_VALUE:
                # The number of the overflow bucket.
                key_entries.pop()
        if not key_entries:
            return None
        if key_entries[-1].kind == OVERRIDE_LIMIT:
            rule = self._override_rule_of(domain, key_entries[-1])
        elif all(entry.kind == DEFAULT_RULE for entry in key_entries):
            rule = self.default_rule
        else:
            node = self.domains.get(domain)
            for kind, key, value in key_entries:
                if node is None:
                    return None
                node = _child(node, kind, key, value)
            rule = node.rule if node is not None else None
        return rule if rule is not None and rule.bucket_type | OVERFLOW == bucket_type | OVERFLOW else None

    def replicated_limit_of_key(self, bucket_key: bytes) -> AnyLimit | None:
        """The limit of a replicated bucket; None when there is no such rule here."""
        return self._limit_of_key(bucket_key, Consistency.EVENTUAL)

    def local_limit_of_key(self, bucket_key: bytes) -> AnyLimit | None:
        """The limit of a bucket that is not replicated; None when there is no such rule here."""
        return self._limit_of_key(bucket_key, Consistency.LOCAL)

    def strict_limit_of_key(self, bucket_key: bytes) -> AnyLimit | None:
        """The limit of a strict bucket; None when there is no such rule here."""
        return self._limit_of_key(bucket_key, Consistency.STRICT)

    def __iter__(self) -> Iterator[Rule]:
        """Every rule, in no particular order."""
        for _, rule in self._by_domain():
            yield rule

    def _by_domain(self) -> Iterator[tuple[str, Rule]]:
        """The `default_rule` has the domain ""."""
        for domain, root in self.domains.items():
            nodes = [root]
            while nodes:
                node = nodes.pop()
                nodes += node.children
                if node.rule is not None:
                    yield domain, node.rule
        if self.default_rule is not None:
            yield "", self.default_rule

    def _limit_of_key(self, bucket_key: bytes, consistency: Consistency) -> AnyLimit | None:
        rule = self.rule_of_key(bucket_key)
        return rule.limit if rule is not None and rule.consistency is consistency else None

    def _override_rule(self, domain: str, requests: int, unit: Unit, window: Window | None) -> Rule:
        limit = limit_of_rate(requests, unit, window)
        return Rule(f"{domain}.override", limit, requests, unit, self.override_consistency, charge=self.override_charge)

    def _override_rule_of(self, domain: str, entry: KeyEntry) -> Rule | None:
        if domain not in self.domains:
            return None
        if not (entry.key.isascii() and entry.key.isdecimal() and int(entry.key) <= MAX_REQUESTS_PER_UNIT):
            raise ValueError("bucket key with a limit that is no number")
        if entry.value not in Unit.__members__:
            raise ValueError("bucket key with an unknown unit")
        return self._override_rule(domain, int(entry.key), Unit[entry.value], self.override_window)


def limit_of_rate(
    requests: int, unit: Unit, window: Window | None, *, burst: int | None = None, max_debt: int = DEFAULT_MAX_DEBT
) -> AnyLimit:
    """The limit of `requests` per `unit`.

    Args:
        window: None for a token bucket.
        burst: its capacity; None for `requests`.

    Raises:
        ValueError: a number is outside its range.
    """
    period_us = unit.value * _SECOND_US
    if window is not None:
        return WindowLimit(requests, period_us, window)
    capacity = requests if burst is None else burst
    # A limit of 0 needs a rate, too, but has no capacity.
    return TokenBucketLimit(requests or 1, period_us, capacity if requests else 0, max_debt)


def _descend(node: RuleNode, key: str, value: str) -> EntryMatch | None:
    value = value.strip(BLANKS)
    deeper = node.exact.get((key, value)) if node.exact else None
    if deeper is not None:
        return EntryMatch(EXACT, key, value, value, deeper)
    if node.wildcards:
        level = _descend_by_pattern(node, key, value)
        if level is not None:
            return level
    deeper = node.key_only.get(key)
    return EntryMatch(KEY_ONLY, key, value, "", deeper) if deeper is not None else None


def _descend_by_pattern(node: RuleNode, key: str, value: str) -> EntryMatch | None:
    joined = node.wildcards.get(JOINED)
    wildcards = node.wildcards.get(key) if joined is None else joined
    if wildcards is not None:
        found = wildcards.find(value if joined is None else f"{key}_{value}")
        if found is not None:
            pattern, node_of_pattern = found
            return EntryMatch(PATTERN, key, value, pattern, node_of_pattern, is_joined=joined is not None)
    if joined is not None:
        # A key with a wildcard, without value, is looked up literally.
        deeper = joined.item_of(key)
        if deeper is not None:
            return EntryMatch(PATTERN, key, value, key, deeper, is_joined=True)
    return None


def _is_pattern_itself(level: EntryMatch) -> bool:
    return level.pattern == (f"{level.key}_{level.value}" if level.is_joined else level.value)


def _child(node: RuleNode, kind: int, key: str, value: str) -> RuleNode | None:
    """The node that an entry of a bucket key leads to."""
    if kind == EXACT:
        return node.exact.get((key, value))
    if kind == KEY_ONLY:
        return node.key_only.get(key)
    if kind == PATTERN:
        wildcards = node.wildcards.get(key)
        return wildcards.item_of(value) if wildcards is not None else None
    # The PATTERN entry before it has led to the node already.
    return node if kind == WILDCARD_VALUE else None


def _rule_of_levels(levels: list[EntryMatch], entries: Sequence[tuple[str, str]]) -> Rule | None:
    """The rule that applies: its depth equals the number of entries."""
    return levels[-1].node.rule if levels and len(levels) == len(entries) else None


def _match_of_levels(domain: str, levels: list[EntryMatch], rule: Rule) -> Match:
    bucket_key = bucket_key_head(rule.bucket_type, domain)
    for level in levels:
        if level.is_joined:
            # Key and value of the caller follow the pattern; the value is empty if all values share one bucket.
            value = "" if level.node.shares_bucket else bounded(level.value)
            bucket_key += entry_bytes(PATTERN, JOINED, level.pattern)
            bucket_key += entry_bytes(WILDCARD_VALUE, bounded(level.key), value)
            continue
        value = bounded(level.value) if level.kind == KEY_ONLY else level.pattern
        bucket_key += entry_bytes(level.kind, level.key, value)
        if level.kind == PATTERN and not level.node.shares_bucket:
            bucket_key += entry_bytes(WILDCARD_VALUE, level.key, bounded(level.value))
    return Match(rule, bucket_key, _metric_name(domain, levels, rule))


def _metric_name(domain: str, levels: list[EntryMatch], rule: Rule) -> str:
    if not rule.metric_of_values and not any(level.node.value_in_metric for level in levels):
        return rule.name
    parts = [domain]
    for level in levels:
        shows_value = rule.metric_of_values or level.node.value_in_metric
        text = bounded(level.value) if shows_value and not level.node.shares_bucket else level.pattern
        if level.is_joined:
            parts.append(text if text is level.pattern else f"{bounded(level.key)}_{text}")
            continue
        parts.append(f"{level.key}_{text}" if text else level.key)
    return ".".join(parts)


def _order(node: RuleNode, left: list[tuple[str, str]], tries: list[int]) -> list[tuple[str, str]] | None:
    """Find an order of `left` in which a rule matches; see `Rules.in_order`.

    Args:
        tries: a list of one number, the tries that are left, which is counted down.
    """
    if not left:
        return [] if node.rule is not None else None
    for at, (key, value) in enumerate(left):
        if not tries[0]:
            return None
        tries[0] -= 1
        level = _descend(node, key, value)
        if level is not None:
            below = _order(level.node, left[:at] + left[at + 1 :], tries)
            if below is not None:
                return [(key, value), *below]
    return None
