"""Rules files and folders of them, read into the tree that the limiter matches against.

Every problem of every file is found in one go: each level of each file is checked on its own, and a level that is
broken does not keep those below it from being checked.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ratelimit_sidecar.config.bucket import BucketConfig
from ratelimit_sidecar.config.document import Document, load, unreadable
from ratelimit_sidecar.config.errors import ConfigError, KeyPath, Problem, dotted, quoted
from ratelimit_sidecar.config.rules_schema import MAX_REQUESTS_PER_UNIT, Descriptor, RateLimit, RulesFile
from ratelimit_sidecar.config.structure import expected_of, keys_of, validate
from ratelimit_sidecar.config.yaml_data import YamlList, YamlMap
from ratelimit_sidecar.crdt.limit import Limit
from ratelimit_sidecar.limiter.rules import Consistency, Rule, RuleNode, Rules

UNRULED_NAME = "bucket"
"""Name, in metrics, of the rule for descriptors that no other matches; a rule's own name has a dot in it."""

_SUFFIXES = (".yaml", ".yml")
_SECOND_US = 1_000_000


def load_rules(paths: Iterable[Path], *, unruled: BucketConfig | None, default_consistency: Consistency) -> Rules:
    """Read all rules.

    Args:
        paths: files, and folders whose *.yaml and *.yml files are read in order of their names. Subfolders and names
            that begin with a dot are left out: a Kubernetes ConfigMap keeps its older versions there.
        unruled: the bucket for every descriptor that no rule matches; None leaves those unlimited.
        default_consistency: of all rules.

    Raises:
        ConfigError: every problem of every file.
    """
    problems: list[Problem] = []
    domains: dict[str, RuleNode] = {}
    first: dict[str, str] = {}
    for file in _files(paths, problems):
        try:
            document = load(file)
        except ConfigError as error:
            problems += error.problems
            continue
        reader = _FileReader(document, default_consistency)
        domain, root = reader.read()
        problems += reader.problems
        if not domain:
            continue
        if domain in first:
            found = f"{quoted(domain)}, which {first[domain]} has already"
            fix = "put all descriptors of a domain into one file"
            problems.append(document.problem(("domain",), found, "another domain", fix))
        first.setdefault(domain, f"{file}:{document.position(('domain',)).line}")
        domains[domain] = root
    if problems:
        raise ConfigError(problems)
    if unruled is None:
        return Rules(domains)
    return Rules(domains, _bucket_rule(UNRULED_NAME, unruled, default_consistency))


def _files(paths: Iterable[Path], problems: list[Problem]) -> list[Path]:
    """The files behind `paths`, each once."""
    files: list[Path] = []
    for path in paths:
        try:
            if not path.is_dir():
                files.append(path)
                continue
            inside = sorted(entry for entry in path.iterdir() if _is_rules_file(entry))
        except OSError as error:
            problems.append(unreadable(str(path), error, "a readable folder"))
            continue
        if not inside:
            found = "a folder without rules files"
            expected = "at least one file whose name ends in .yaml or .yml"
            fix = "subfolders and names that begin with a dot are not read"
            problems.append(Problem(str(path), None, None, "", found, expected, fix))
        files += inside
    return list(dict.fromkeys(files))


def _is_rules_file(entry: Path) -> bool:
    # A dangling link passes, to be reported when it is read.
    return entry.suffix in _SUFFIXES and not entry.name.startswith(".") and not entry.is_dir()


def _bucket_rule(name: str, bucket: BucketConfig, consistency: Consistency) -> Rule:
    # Without a unit there is no number of requests per unit; the capacity is the nearest that Envoy can show.
    return Rule(name, bucket.limit, min(bucket.capacity, MAX_REQUESTS_PER_UNIT), None, consistency)


def _rule(descriptor: Descriptor, name: str, consistency: Consistency) -> Rule | None:
    """What a descriptor limits; None when it limits nothing itself."""
    if descriptor.bucket is not None:
        return _bucket_rule(name, descriptor.bucket, consistency)
    rate_limit = descriptor.rate_limit
    if rate_limit is None:
        return None
    unit, requests = rate_limit.unit, rate_limit.requests_per_unit
    if unit is None or requests is None:
        return Rule(name, None, consistency=consistency)
    capacity = requests if descriptor.burst is None else descriptor.burst
    # A bucket that holds nothing still needs a rate.
    limit = Limit(tokens=max(requests, 1), period_us=unit.value * _SECOND_US, capacity=capacity)
    return Rule(name, limit, requests, unit, consistency)


class _FileReader:
    """Reads one file, collecting its problems."""

    def __init__(self, document: Document, consistency: Consistency) -> None:
        self.problems = list(document.problems)
        self._document = document
        self._consistency = consistency

    def read(self) -> tuple[str, RuleNode]:
        """The domain and its tree; with problems, "" and what was readable of it."""
        data = self._document.data
        _, problems = validate(RulesFile, data, self._document)
        self.problems += problems
        if not isinstance(data, YamlMap):
            return "", RuleNode()
        domain = data.get("domain")
        name = domain if isinstance(domain, str) else ""
        return name, self._level(None, data, (), name)

    def _level(self, rule: Rule | None, above: YamlMap, path: KeyPath, name: str) -> RuleNode:
        """The node with `rule` and all descriptors below `above`, which stands at `path`."""
        exact: dict[tuple[str, str], RuleNode] = {}
        key_only: dict[str, RuleNode] = {}
        first: dict[tuple[str, str], KeyPath] = {}
        items = above.get("descriptors")
        for index, item in enumerate(items if isinstance(items, YamlList) else ()):
            at = (*path, "descriptors", index)
            descriptor, problems = validate(Descriptor, item, self._document, at)
            self.problems += problems
            if not isinstance(item, YamlMap):
                continue
            key, value = _entry_of(item)
            own_name = f"{name}.{key}_{value}" if value else f"{name}.{key}"
            if "*" in value:
                self._not_yet_wildcard((*at, "value"))
            if key and (key, value) in first:
                self._duplicate(at, first[key, value])
            first.setdefault((key, value), at)
            self._check_conflicts(item, at)
            own_rule = None if descriptor is None else _rule(descriptor, own_name, self._consistency)
            node = self._level(own_rule, item, at, own_name)
            if value:
                exact[key, value] = node
            else:
                key_only[key] = node
        return RuleNode(rule, exact=exact, key_only=key_only)

    def _check_conflicts(self, item: YamlMap, at: KeyPath) -> None:
        """Report keys that contradict or lack each other, whatever their values are."""
        given = {key for key, value in item.items() if value is not None}
        if {"rate_limit", "bucket"} <= given:
            self._problem((*at, "bucket"), "a bucket beside rate_limit", "one of the two", "remove one of them")
        elif "bucket" in given and "burst" in given:
            self._problem((*at, "burst"), "burst beside bucket", "bucket alone", "bucket.capacity is the burst")
        if not {"rate_limit", "bucket"} & given:
            for key in ("algorithm", "burst"):
                if key in given:
                    fix = f"add rate_limit, or remove {key}"
                    self._problem((*at, key), f"{key} without a limit", "rate_limit beside it", fix)
        rate_limit = item.get("rate_limit")
        if isinstance(rate_limit, YamlMap):
            self._check_rate_limit(rate_limit, "burst" in given, at)

    def _check_rate_limit(self, rate_limit: YamlMap, has_burst: bool, at: KeyPath) -> None:
        unlimited = rate_limit.get("unlimited") is True
        for key in ("unit", "requests_per_unit"):
            has_key = rate_limit.get(key) is not None
            path = (*at, "rate_limit", key)
            if unlimited and has_key:
                self._problem(path, f"{key} beside unlimited", "one of the two", f"remove {key} or unlimited")
            elif not unlimited and not has_key:
                self._problem(path, "nothing", expected_of(keys_of(RateLimit)[key]))
        if has_burst and (unlimited or rate_limit.get("requests_per_unit") == 0):
            found = "burst of a limit that admits " + ("everything" if unlimited else "nothing")
            self._problem((*at, "burst"), found, "no burst", "remove it")

    def _duplicate(self, at: KeyPath, first: KeyPath) -> None:
        line = self._document.position(first).line
        found = f"the key and value of {dotted(first)} in line {line} again"
        fix = "merge the two, or give one another value"
        self._problem(at, found, "each pair of key and value once a level", fix)

    def _not_yet_wildcard(self, path: KeyPath) -> None:
        expected, fix = "a value without *", "wildcards of envoyproxy/ratelimit are not supported here yet"
        self._problem(path, self._document.describe(path), expected, fix)

    def _problem(self, path: KeyPath, found: str, expected: str, fix: str = "") -> None:
        self.problems.append(self._document.problem(path, found, expected, fix))


def _entry_of(item: YamlMap) -> tuple[str, str]:
    """Key and value of a descriptor as the file writes them; "" for what is missing or is no text."""
    key = item.get("key")
    value = item.source_of("value") if item.get("value") is not None else None
    return key if isinstance(key, str) else "", value or ""
