"""Random rules and requests: what is compiled for look-up agrees with the naive matcher."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st
from limiter.naive_rules import (
    DOMAIN,
    Descriptor,
    Entries,
    Outcome,
    files,
    fits,
    naive_match,
    paths,
    patterns,
    requests,
    values_for,
)

from ratelimit_sidecar.crdt.limit import TokenBucketLimit, Window, WindowLimit
from ratelimit_sidecar.limiter.rules import MAX_REQUESTS_PER_UNIT, Consistency, Match, Rule, RuleNode, Rules, Unit
from ratelimit_sidecar.limiter.wildcard import WildcardSet

LIMIT = TokenBucketLimit(1, 1_000_000, 1)


def compiled(file: Sequence[Descriptor], consistency: Consistency = Consistency.EVENTUAL) -> Rules:
    return Rules({DOMAIN: _node(file, None, DOMAIN, consistency)})


def _node(level: Sequence[Descriptor], descriptor: Descriptor | None, name: str, consistency: Consistency) -> RuleNode:
    exact, key_only = {}, {}
    patterns: dict[str, list[tuple[str, RuleNode]]] = {}
    for child in level:
        child_name = f"{name}.{child.key}_{child.value}" if child.value else f"{name}.{child.key}"
        node = _node(child.children, child, child_name, consistency)
        if "*" in child.value:
            patterns.setdefault(child.key, []).append((child.value, node))
        elif child.value:
            exact[child.key, child.value] = node
        else:
            key_only[child.key] = node
    wildcards = {key: WildcardSet(of_key) for key, of_key in patterns.items()}
    if descriptor is None:
        return RuleNode(None, exact, wildcards, key_only)
    rule = Rule(name, LIMIT, consistency=consistency, metric_of_values=descriptor.detailed_metric)
    return RuleNode(
        rule if descriptor.limits else None,
        exact,
        wildcards,
        key_only,
        descriptor.share_threshold,
        descriptor.value_to_metric,
    )


@given(st.data())
def test_a_request_meets_the_rule_that_reading_the_file_finds(data: st.DataObject) -> None:
    file = data.draw(files())
    rules = compiled(file)
    names = {path: rule_name(path) for path in paths(file)}
    for _ in range(5):
        entries = data.draw(requests(file))
        expected, match = naive_match(file, entries), rules.match(DOMAIN, entries)
        assert (match.rule.name if match else None) == (names[expected.path] if expected else None)
        assert (match.metric_name if match else None) == (expected.metric if expected else None)


def rule_name(path: Sequence[Descriptor]) -> str:
    return ".".join([DOMAIN, *(f"{level.key}_{level.value}" if level.value else level.key for level in path)])


@given(st.data())
def test_two_requests_share_a_bucket_when_rule_and_values_are_the_same_or_the_pattern_is_shared(
    data: st.DataObject,
) -> None:
    file = data.draw(files())
    rules = compiled(file)
    seen: dict[bytes, Outcome] = {}
    buckets: dict[tuple[object, ...], bytes] = {}
    for _ in range(8):
        entries = data.draw(requests(file))
        expected, match = naive_match(file, entries), rules.match(DOMAIN, entries)
        if expected is None or match is None:
            continue
        identity = (expected.path, expected.bucket)
        assert buckets.setdefault(identity, match.bucket_key) == match.bucket_key
        first = seen.setdefault(match.bucket_key, expected)
        assert (first.path, first.bucket) == identity


@given(st.data(), st.sampled_from(Consistency))
def test_the_rule_of_every_bucket_is_found_again_from_its_name(data: st.DataObject, consistency: Consistency) -> None:
    file = data.draw(files())
    rules = compiled(file, consistency)
    match = rules.match(DOMAIN, data.draw(requests(file)))
    if match is not None:
        assert rules.rule_of_key(match.bucket_key) is match.rule
        limits = rules.replicated_limit_of_key(match.bucket_key), rules.strict_limit_of_key(match.bucket_key)
        assert limits == (
            match.rule.limit if consistency is Consistency.EVENTUAL else None,
            match.rule.limit if consistency is Consistency.STRICT else None,
        )


@given(st.data())
def test_in_another_domain_nothing_is_limited_and_no_limit_of_a_request_counts(data: st.DataObject) -> None:
    file = data.draw(files())
    rules, entries = compiled(file), data.draw(requests(file))
    assert rules.match("elsewhere", entries) is None
    assert rules.override("elsewhere", entries, 1, Unit.SECOND) is None


@given(st.data())
def test_what_no_rule_limits_belongs_to_the_bucket_for_all_else_with_all_its_values(data: st.DataObject) -> None:
    file = data.draw(files())
    default_rule = Rule("bucket", LIMIT)
    rules = Rules(compiled(file).domains, default_rule)
    one, other = data.draw(requests(file)), data.draw(requests(file))
    unlimited = [entries for entries in (one, other) if naive_match(file, entries) is None]
    matches = [match for match in (rules.match(DOMAIN, entries) for entries in unlimited) if match is not None]
    assert [match.rule for match in matches] == [default_rule] * len(unlimited)
    assert all(rules.rule_of_key(match.bucket_key) is default_rule for match in matches)
    assert len({match.bucket_key for match in matches}) == len(set(map(tuple, unlimited)))


@given(st.data(), st.integers(0, MAX_REQUESTS_PER_UNIT), st.sampled_from(Unit), st.none() | st.sampled_from(Window))
def test_a_limit_in_the_request_has_a_bucket_for_all_its_values_and_the_limit_or_for_windows_the_unit(
    data: st.DataObject, requests_per_unit: int, unit: Unit, window: Window | None
) -> None:
    file = data.draw(files())
    rules = Rules(compiled(file).domains, override_window=window)
    entries = data.draw(requests(file))

    def override(entries: Entries, requests_per_unit: int, unit: Unit) -> Match:
        match = rules.override(DOMAIN, entries, requests_per_unit, unit)
        assert match is not None
        return match

    given_limit = override(entries, requests_per_unit, unit)
    assert (given_limit.rule.requests_per_unit, given_limit.rule.unit) == (requests_per_unit, unit)
    other_unit = Unit.DAY if unit is not Unit.DAY else Unit.HOUR
    others = [
        override([*entries, ("a", "")], requests_per_unit, unit),
        override(entries, requests_per_unit, other_unit),
    ]
    other_limit = override(entries, requests_per_unit ^ 1, unit)
    configured = rules.match(DOMAIN, entries)
    found = rules.rule_of_key(given_limit.bucket_key)
    assert found is not None
    is_shared = configured is not None and configured.bucket_key == given_limit.bucket_key
    if window is None and not is_shared:
        assert found == given_limit.rule
        others += [other_limit, *([configured] if configured is not None else [])]
    else:
        # Counted by the unit alone, and with what its rule counts by the same.
        assert isinstance(found.limit, WindowLimit)
        assert found.limit.period_us == unit.value * 1_000_000
        assert other_limit.bucket_key == given_limit.bucket_key
        if configured is not None and is_shared:
            assert (configured.rule.unit, configured.rule.bucket_type) == (unit, given_limit.rule.bucket_type)
    assert given_limit.bucket_key not in {other.bucket_key for other in others}


@given(st.lists(st.text("xyz*", min_size=1).filter(lambda text: "*" in text), max_size=6), st.text("xyz\n"))
@settings(max_examples=5 * settings().max_examples)
def test_the_first_pattern_in_file_order_that_fits_is_found(texts: list[str], value: str) -> None:
    found = WildcardSet((text, order) for order, text in enumerate(texts)).find(value)
    fitting = [(text, order) for order, text in enumerate(texts) if fits(text, value)]
    assert found == (fitting[0] if fitting else None)


@given(st.data())
def test_a_pattern_is_found_by_a_value_made_from_it_unless_one_before_fits_as_well(data: st.DataObject) -> None:
    texts = data.draw(st.lists(patterns, min_size=1, max_size=6, unique=True))
    text = data.draw(st.sampled_from(texts))
    value = data.draw(values_for(Descriptor("a", text)))
    found = WildcardSet((text, text) for text in texts).find(value)
    assert found is not None
    assert texts.index(found[0]) <= texts.index(text)
    assert WildcardSet((text, text) for text in texts).item_of(text) == text
