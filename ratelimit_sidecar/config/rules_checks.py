"""Problems of a descriptor whose keys are each valid: keys that contradict each other, or lack another key.

Our own keys are refused where they would have no effect. envoyproxy/ratelimit accepts its keys anywhere, and files that
work there must work here. So of its keys only those are refused that it refuses itself, and a limit without a number.
"""

from __future__ import annotations

from collections.abc import Iterator

from ratelimit_sidecar.config.document import Document
from ratelimit_sidecar.config.errors import KeyPath, Problem, quoted
from ratelimit_sidecar.config.rules_schema import (
    ALGORITHMS,
    BUCKET_ALGORITHM,
    NAMED_PARTS,
    PARTS,
    UNITS,
    RateLimit,
    RuleDefaults,
    is_no_unit,
    window_of,
)
from ratelimit_sidecar.config.structure import expected_of, keys_of
from ratelimit_sidecar.config.yaml_data import YamlList, YamlMap
from ratelimit_sidecar.crdt.limit import Window
from ratelimit_sidecar.limiter.key import BLANKS
from ratelimit_sidecar.limiter.rules import Charge, Consistency
from ratelimit_sidecar.limiter.wildcard import WILDCARD

_OF_A_LIMIT = ("algorithm", "burst", "consistency", "max_debt", "wait", "charge", "retry_after", "body")
"""Our own keys about a limit, which do nothing without one."""

_OF_ADMITTING = ("burst", "max_debt", "wait", "charge", "retry_after")
"""Keys that do nothing when the limit is 0."""

MAX_MAPPED = 64
"""The most descriptors of a mapping from HTTP requests: a few for each kind of limit."""

_OF_A_BUCKET = ("burst", "max_debt")


def contradictions(item: YamlMap, document: Document, at: KeyPath, defaults: RuleDefaults) -> Iterator[Problem]:
    """What is wrong with the descriptor `item`, which stands at `at`, whatever the values of its keys are."""
    given = {key for key, value in item.items() if value is not None and value is not False}
    rate_limit = item.get("rate_limit")
    has_bucket = "bucket" in given
    if "rate_limit" in given and has_bucket:
        yield document.problem((*at, "bucket"), "a bucket beside rate_limit", "one of the two", "remove one of them")
    elif has_bucket and "burst" in given:
        yield document.problem(
            (*at, "burst"), "burst beside bucket", "bucket alone", "remove it: bucket.capacity is the burst"
        )
    if isinstance(rate_limit, YamlMap):
        yield from _rate_limit_problems(rate_limit, document, (*at, "rate_limit"))
    useless = _why_useless(given, rate_limit)
    for key in _OF_A_LIMIT:
        if key in given and key in useless:
            what, expected, fix = useless[key]
            yield document.problem((*at, key), f"{key} of {what}", expected.format(key=key), fix.format(key=key))
    if "rate_limit" in given or has_bucket:
        yield from _algorithm_problems(item, given - useless.keys(), document, at, defaults.window)
        if "wait" in given - useless.keys():
            yield from _wait_problems(item, document, at, defaults)
        if "consistency" not in useless:
            yield from _strict_problems(item, given, document, at, defaults)
    value = item.source_of("value") or ""
    if value != value.strip(BLANKS):
        found = f"the value {quoted(value)}"
        fix = "remove them: nothing would match, since those around a request's value are no part of it"
        yield document.problem((*at, "value"), found, "no spaces or tabs at either end", fix)
    if item.get("share_threshold") is True and WILDCARD not in value + (item.source_of("key") or ""):
        found = f"share_threshold of {f'the value {quoted(value)}' if value else 'a descriptor without value'}"
        fix = f"end the value in {WILDCARD}, or remove share_threshold"
        yield document.problem((*at, "share_threshold"), found, f"a value with {WILDCARD}", fix)


def contradictions_of_mapping(mapping: YamlMap, document: Document, at: KeyPath) -> Iterator[Problem]:
    """What is wrong with the `ext_authz` that stands at `at`, whatever the values of its keys are."""
    descriptors = mapping.get("descriptors")
    if isinstance(descriptors, YamlList) and not 0 < len(descriptors) <= MAX_MAPPED:
        found, fix = f"{len(descriptors)} descriptors", "add one, or remove ext_authz" if not descriptors else ""
        yield document.problem((*at, "descriptors"), found, f"1 to {MAX_MAPPED} descriptors", fix)
    for index, descriptor in enumerate(descriptors if isinstance(descriptors, YamlList) else ()):
        entries = descriptor.get("entries") if isinstance(descriptor, YamlMap) else None
        at_entries = (*at, "descriptors", index, "entries")
        if isinstance(entries, YamlList) and not entries:
            fix = "add one, or remove the descriptor: without entries it is not limited"
            yield document.problem(at_entries, "an empty list", "entries", fix)
        for number, entry in enumerate(entries if isinstance(entries, YamlList) else ()):
            if isinstance(entry, YamlMap):
                yield from _mapped_entry_problems(entry, document, (*at_entries, number))


def _mapped_entry_problems(entry: YamlMap, document: Document, at: KeyPath) -> Iterator[Problem]:
    part = entry.get("from")
    if part is None and entry.get("value") is None:
        yield document.problem((*at, "from"), "nothing", f"one of {', '.join(PARTS)}, or a value", "add from or value")
    elif part is not None and entry.get("value") is not None:
        yield document.problem((*at, "value"), "value beside from", "one of the two", "remove one of them")
    if entry.get("name") is None:
        return
    if part is None or (part in PARTS and part not in NAMED_PARTS):
        found = f"name beside from: {part}" if part is not None else "name without from"
        fix = f"remove it, or let from be {' or '.join(NAMED_PARTS)}"
        yield document.problem((*at, "name"), found, f"name with {' or '.join(NAMED_PARTS)} only", fix)
    elif not entry.source_of("name"):
        yield document.problem((*at, "name"), '""', "text that is not empty", "write the name, or remove the key")


def _why_useless(given: set[str], rate_limit: object) -> dict[str, tuple[str, str, str]]:
    """The keys that would have no effect: what they are keys of, what was expected, and the fix."""
    if not given & {"rate_limit", "bucket"}:
        reason = ("a descriptor without a limit", "rate_limit or bucket beside it", "add one, or remove {key}")
        return dict.fromkeys(_OF_A_LIMIT, reason)
    if isinstance(rate_limit, YamlMap):
        if rate_limit.get("unlimited") is True:
            return dict.fromkeys(_OF_A_LIMIT, ("a limit that lets all through", "no {key}", "remove {key}"))
        requests = rate_limit.get("requests_per_unit")
        if requests == 0 and requests is not False:
            return dict.fromkeys(_OF_ADMITTING, ("a limit that lets nothing through", "no {key}", "remove {key}"))
    return {}


def _algorithm_problems(
    item: YamlMap, given: set[str], document: Document, at: KeyPath, default_window: Window | None
) -> Iterator[Problem]:
    """Keys that a window does not have."""
    algorithm = item.get("algorithm")
    if algorithm is None:
        # A bucket is a token bucket whatever the default is.
        if default_window is None or "bucket" in given:
            return
        name, fix = f"{default_window.value}, the default here", f"add algorithm: {BUCKET_ALGORITHM}, or remove {{key}}"
    else:
        if algorithm not in ALGORITHMS or window_of(str(algorithm)) is None:
            return
        if "bucket" in given:
            fix = f"remove algorithm, or give rate_limit in place of bucket: {algorithm} counts requests in a unit"
            yield document.problem((*at, "algorithm"), f"{algorithm} for a bucket", BUCKET_ALGORITHM, fix)
            return
        name, fix = str(algorithm), f"remove {{key}}, or let algorithm be {BUCKET_ALGORITHM}"
    for key in _OF_A_BUCKET:
        if key in given:
            found = f"{key} with the algorithm {name}"
            yield document.problem((*at, key), found, f"{key} with {BUCKET_ALGORITHM} only", fix.format(key=key))


def _strict_problems(
    item: YamlMap, given: set[str], document: Document, at: KeyPath, defaults: RuleDefaults
) -> Iterator[Problem]:
    """Keys and settings that a strict limit needs, and keys that it does not have."""
    strict, eventual = Consistency.STRICT.value, Consistency.EVENTUAL.value
    algorithm, window = item.get("algorithm"), ""
    if "bucket" not in given:
        if algorithm is None and defaults.window is not None:
            window = f"{defaults.window.value}, the default here"
        elif algorithm in ALGORITHMS and algorithm != BUCKET_ALGORITHM:
            window = str(algorithm)
    if "consistency" not in given:
        if window and defaults.consistency is Consistency.STRICT:
            fix = f"let algorithm be {BUCKET_ALGORITHM}, or add consistency: {eventual}"
            expected = f"{BUCKET_ALGORITHM}, which alone can be {strict}"
            yield document.problem((*at, "algorithm"), f"{window}, of a {strict} limit", expected, fix)
        return
    if item.get("consistency") != strict:
        return
    if not defaults.has_members:
        expected = "it where the configuration of the sidecar has sync.members"
        fix = f"list there who shares the limit, or let consistency be {eventual}"
        yield document.problem((*at, "consistency"), strict, expected, fix)
    if window:
        fix = f"let algorithm be {BUCKET_ALGORITHM}, or consistency {eventual}"
        found, expected = f"{strict} with the algorithm {window}", f"{strict} with {BUCKET_ALGORITHM} only"
        yield document.problem((*at, "consistency"), found, expected, fix)


def _wait_problems(item: YamlMap, document: Document, at: KeyPath, defaults: RuleDefaults) -> Iterator[Problem]:
    """`wait` where it would have no effect: only requests of strict limits wait, and only if the answer is enforced."""
    strict = Consistency.STRICT.value
    found = item.get("consistency") or defaults.consistency.value
    if found != strict:
        fix = f"remove it, or let consistency be {strict}"
        yield document.problem((*at, "wait"), f"wait with consistency {found}", f"wait with {strict} only", fix)
    for key, value, beside in (
        ("shadow_mode", True, "shadow_mode"),
        ("quota_mode", True, "quota_mode"),
        ("charge", Charge.ALWAYS.value, f"charge: {Charge.ALWAYS.value}"),
    ):
        if item.get(key) == value:
            fix = f"remove wait, or {key}"
            yield document.problem((*at, "wait"), f"wait beside {beside}", f"wait without {key}", fix)


def _rate_limit_problems(rate_limit: YamlMap, document: Document, at: KeyPath) -> Iterator[Problem]:
    unit = rate_limit.get("unit")
    if rate_limit.get("unlimited") is True:
        # Their requests_per_unit beside unlimited says nothing, and is accepted as it is there.
        if isinstance(unit, str) and unit.lower() in UNITS:
            fix = "remove unit or unlimited"
            yield document.problem((*at, "unit"), "unit beside unlimited", "one of the two", fix)
    else:
        if is_no_unit(unit):
            expected, fix = expected_of(keys_of(RateLimit)["unit"]), "add unit, or unlimited: true for no limit"
            yield document.problem((*at, "unit"), document.describe((*at, "unit")), expected, fix)
        if rate_limit.get("requests_per_unit") is None:
            expected = expected_of(keys_of(RateLimit)["requests_per_unit"])
            fix = "add requests_per_unit, 0 to let nothing through"
            yield document.problem((*at, "requests_per_unit"), "nothing", expected, fix)
    name = rate_limit.source_of("name")
    replaces = rate_limit.get("replaces")
    for index, other in enumerate(replaces if isinstance(replaces, YamlList) else ()):
        if name and isinstance(other, YamlMap) and other.source_of("name") == name:
            found, expected = f"{quoted(name)}, the name of the same rate_limit", "the name of another"
            fix = "remove it, or correct one of the two names"
            yield document.problem((*at, "replaces", index, "name"), found, expected, fix)
