"""Turns one document of rules into the tree of its domain.

Each level is checked on its own, so a broken one does not hide problems of those below it. The caller passes the first
level: if domains are merged, several documents build one tree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ratelimit_sidecar.config.bucket import BucketConfig
from ratelimit_sidecar.config.document import Document
from ratelimit_sidecar.config.errors import KeyPath, dotted
from ratelimit_sidecar.config.rules_checks import contradictions, contradictions_of_mapping
from ratelimit_sidecar.config.rules_schema import (
    ALL_OR_NOTHING,
    AuthzEntry,
    Descriptor,
    ExtAuthz,
    RateLimit,
    RuleDefaults,
    RulesFile,
    window_of,
)
from ratelimit_sidecar.config.structure import validate
from ratelimit_sidecar.config.yaml_data import YamlList, YamlMap
from ratelimit_sidecar.crdt.limit import DEFAULT_MAX_DEBT, AnyLimit, Window
from ratelimit_sidecar.limiter.http_mapping import EntrySource, HttpMapping, Part
from ratelimit_sidecar.limiter.rules import JOINED, MAX_REQUESTS_PER_UNIT, Rule, RuleNode, Unit, limit_of_rate
from ratelimit_sidecar.limiter.wildcard import WILDCARD, WildcardSet


@dataclass(slots=True)
class Level:
    """The descriptors of one level, while it grows."""

    exact: dict[tuple[str, str], RuleNode] = field(default_factory=dict)
    patterns: list[tuple[str, str, RuleNode]] = field(default_factory=list)
    """Key, value and node, in file order."""
    key_only: dict[str, RuleNode] = field(default_factory=dict)
    first: dict[tuple[str, str], tuple[Document, KeyPath]] = field(default_factory=dict)
    """Where each key and value was given first."""

    def add(self, key: str, value: str, node: RuleNode) -> None:
        if WILDCARD in key or WILDCARD in value:
            self.patterns.append((key, value, node))
        elif not value:
            self.key_only[key] = node
        else:
            self.exact[key, value] = node

    def forget_places(self) -> None:
        """Free the places when everything is read. One by one: freeing 20,000 at once would hold Python's lock for 6
        ms.
        """
        while self.first:
            self.first.popitem()

    def node(self, rule: Rule | None = None, item: Mapping[str, object] | None = None) -> RuleNode:
        """The finished level as a node of the tree. `item` is the descriptor above it, and `rule` that descriptor's
        rule; both are left out for the root of a domain."""
        wildcards = {key: WildcardSet(patterns) for key, patterns in self._patterns_by_key().items()}
        above = item or {}
        return RuleNode(
            rule,
            self.exact,
            wildcards,
            self.key_only,
            shares_bucket=above.get("share_threshold") is True,
            value_in_metric=above.get("value_to_metric") is True,
        )

    def _patterns_by_key(self) -> dict[str, list[tuple[str, RuleNode]]]:
        if any(WILDCARD in key for key, _, _ in self.patterns):
            joined = [(f"{key}_{value}" if value else key, node) for key, value, node in self.patterns]
            return {JOINED: joined}
        by_key: dict[str, list[tuple[str, RuleNode]]] = {}
        for key, value, node in self.patterns:
            by_key.setdefault(key, []).append((value, node))
        return by_key


def shown_capacity(bucket: BucketConfig) -> int:
    """The requests per unit that Envoy is shown for a bucket: its capacity, since a bucket has no unit."""
    return min(bucket.capacity, MAX_REQUESTS_PER_UNIT)


class TreeReader:
    """Reads one document, and collects its problems.

    The document follows the grammar in `rules_schema`. If there are problems, the tree must not be used.
    """

    def __init__(self, document: Document, defaults: RuleDefaults) -> None:
        self.problems = list(document.problems)
        self.all_or_nothing = defaults.all_or_nothing
        """The domain's `all_or_nothing`, or the default."""
        self.mapping: HttpMapping | None = None
        """The document's mapping from HTTP requests to descriptors."""
        self.is_default = False
        """True if the mapping is also for requests that name no domain."""
        self._document = document
        self._defaults = defaults

    def read_domain(self) -> str:
        """The domain; "" when it is missing."""
        data = self._document.data
        file, problems = validate(RulesFile, data, self._document)
        self.problems += problems
        if file is not None and file.charge is not None:
            self._defaults = replace(self._defaults, charge=file.charge)
        if file is not None and file.charging is not None:
            self.all_or_nothing = file.charging == ALL_OR_NOTHING
        if file is not None and file.ext_authz is not None:
            self.mapping, self.is_default = _mapping(file.ext_authz), file.ext_authz.default
        if isinstance(data, YamlMap):
            mapping = data.get("ext_authz")
            if isinstance(mapping, YamlMap):
                self.problems += contradictions_of_mapping(mapping, self._document, ("ext_authz",))
        return _text(data, "domain") if isinstance(data, YamlMap) else ""

    def read_descriptors(self, domain: str, level: Level) -> None:
        """Add all descriptors to the first `level` of the domain."""
        if isinstance(self._document.data, YamlMap):
            self._read_level(self._document.data, (), domain, level)

    def _read_level(self, above: YamlMap, path: KeyPath, name: str, level: Level) -> None:
        items = above.get("descriptors")
        for index, item in enumerate(items if isinstance(items, YamlList) else ()):
            at = (*path, "descriptors", index)
            descriptor, problems = validate(Descriptor, item, self._document, at)
            self.problems += problems
            if not isinstance(item, YamlMap):
                continue
            self.problems += contradictions(item, self._document, at, self._defaults)
            key, value = _text(item, "key"), _text(item, "value")
            if key and (key, value) in level.first:
                self._duplicate(at, level.first[key, value])
            level.first.setdefault((key, value), (self._document, at))
            own_name = f"{name}.{key}_{value}" if value else f"{name}.{key}"
            below = Level()
            self._read_level(item, at, own_name, below)
            below.forget_places()
            level.add(key, value, below.node(self._rule(descriptor, own_name), item))

    def _rule(self, descriptor: Descriptor | None, name: str) -> Rule | None:
        """The rule of a descriptor; None if the descriptor itself has no limit."""
        if descriptor is None or (descriptor.rate_limit is None and descriptor.bucket is None):
            return None
        limit, requests_per_unit, unit = _limit(descriptor, self._defaults.window)
        rate_limit = descriptor.rate_limit or RateLimit()
        return Rule(
            name,
            limit,
            requests_per_unit,
            unit,
            descriptor.consistency or self._defaults.consistency,
            limit_name=rate_limit.name or "",
            replaces=frozenset(other.name for other in rate_limit.replaces),
            shadow_mode=descriptor.shadow_mode,
            quota_mode=descriptor.quota_mode,
            charge=descriptor.charge or self._defaults.charge,
            retry_after=descriptor.retry_after,
            body=descriptor.body or "",
            metadata=descriptor.metadata or {},
            metric_of_values=descriptor.detailed_metric,
            wait_us=descriptor.wait or 0,
        )

    def _duplicate(self, at: KeyPath, first: tuple[Document, KeyPath]) -> None:
        document, path = first
        found = f"the key and value of {dotted(path)} in {document.place(path)} again"
        fix = "merge the two, or give one another value"
        self.problems.append(self._document.problem(at, found, "each pair of key and value once a level", fix))


def _mapping(section: ExtAuthz) -> HttpMapping:
    return tuple([tuple([_entry_source(entry) for entry in of.entries]) for of in section.descriptors])


def _entry_source(entry: AuthzEntry) -> EntrySource:
    key, part = entry.key, entry.source
    if part is None:
        text = entry.value or ""
    else:
        text = key if entry.name is None else entry.name
        if part is Part.HEADER:
            text = text.lower()
    return EntrySource(key.encode(), part, text.encode())


def _limit(descriptor: Descriptor, default_window: Window | None) -> tuple[AnyLimit | None, int, Unit | None]:
    """The limit, its requests per unit and its unit; None if unlimited."""
    max_debt = descriptor.max_debt or DEFAULT_MAX_DEBT
    if descriptor.bucket is not None:
        return descriptor.bucket.limit(max_debt), shown_capacity(descriptor.bucket), None
    rate_limit = descriptor.rate_limit or RateLimit()
    requests, unit = rate_limit.requests_per_unit, rate_limit.unit
    if rate_limit.unlimited or requests is None or unit is None:
        return None, 0, None
    window = default_window if descriptor.algorithm is None else window_of(descriptor.algorithm)
    return limit_of_rate(requests, unit, window, burst=descriptor.burst, max_debt=max_debt), requests, unit


def _text(item: YamlMap, key: str) -> str:
    """A scalar as it is written in the file; "" if it is missing or no scalar."""
    return (item.source_of(key) or "") if item.get(key) is not None else ""
