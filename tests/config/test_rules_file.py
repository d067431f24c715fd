"""Rules files into the tree the limiter matches against."""

from __future__ import annotations

import time
from decimal import Decimal
from pathlib import Path

import pytest
from config.builders import lines, one_rule, rules, rules_of, write

from ratelimit_sidecar.config.bucket import BucketConfig
from ratelimit_sidecar.config.errors import ConfigError
from ratelimit_sidecar.config.rules_schema import MAX_METADATA_DEPTH
from ratelimit_sidecar.config.rules_tree import RuleDefaults
from ratelimit_sidecar.crdt.limit import TokenBucketLimit, Window, WindowLimit
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2 import RateLimitResponse
from ratelimit_sidecar.limiter.key import overflow_keys, rule_key
from ratelimit_sidecar.limiter.rules import Charge, Consistency, Match, Rule, Rules, Unit

DAILY = "rate_limit: {unit: day, requests_per_unit: 1}"


def rule_for(tree: Rules, domain: str, *entries: tuple[str, str]) -> Rule | None:
    match: Match | None = tree.match(domain, entries)
    return match.rule if match else None


def matched(tree: Rules, *entries: tuple[str, str]) -> Match:
    """In the domain d, where something must match."""
    match = tree.match("d", entries)
    assert match is not None
    return match


def test_rules_are_found_by_domain_key_and_value_at_every_depth(tmp_path: Path) -> None:
    tree = rules_of(
        tmp_path,
        """\
        domain: shop
        descriptors:
          - key: tenant
            rate_limit: {unit: minute, requests_per_unit: 20}
          - key: tenant
            value: acme
            rate_limit: {unit: Second, requests_per_unit: 5}
            descriptors:
              - key: path
                rate_limit: {unit: DAY, requests_per_unit: 3}
          - key: tenant
            value: internal
        """,
    )
    assert rule_for(tree, "shop", ("tenant", "x")) == Rule(
        "shop.tenant", TokenBucketLimit(20, 60_000_000, 20), 20, Unit.MINUTE, Consistency.EVENTUAL
    )
    assert rule_for(tree, "shop", ("tenant", "acme")) == Rule(
        "shop.tenant_acme", TokenBucketLimit(5, 1_000_000, 5), 5, Unit.SECOND, Consistency.EVENTUAL
    )
    assert rule_for(tree, "shop", ("tenant", "acme"), ("path", "/")) == Rule(
        "shop.tenant_acme.path", TokenBucketLimit(3, 86_400_000_000, 3), 3, Unit.DAY, Consistency.EVENTUAL
    )
    assert rule_for(tree, "shop", ("tenant", "internal")) is None
    assert rule_for(tree, "shop", ("tenant", "x"), ("path", "/")) is None
    assert rule_for(tree, "other", ("tenant", "x")) is None


@pytest.mark.parametrize(
    ("unit", "seconds"),
    [
        ("second", 1),
        ("minute", 60),
        ("hour", 3_600),
        ("day", 86_400),
        ("week", 604_800),
        ("month", 2_592_000),
        ("year", 31_536_000),
    ],
)
def test_every_unit_is_taken_in_any_case(tmp_path: Path, unit: str, seconds: int) -> None:
    for spelling in (unit, unit.upper(), unit.capitalize()):
        rule = one_rule(tmp_path, f"{{key: a, rate_limit: {{unit: {spelling}, requests_per_unit: 1}}}}")
        assert rule.limit == TokenBucketLimit(1, seconds * 1_000_000, 1)


def test_burst_is_the_capacity(tmp_path: Path) -> None:
    rule = one_rule(tmp_path, "{key: a, burst: 70, rate_limit: {unit: minute, requests_per_unit: 20}}")
    assert rule.limit == TokenBucketLimit(20, 60_000_000, 70)
    assert rule.requests_per_unit == 20


def test_the_first_pattern_in_the_file_that_fits_wins_and_an_exact_value_before_all(tmp_path: Path) -> None:
    tree = rules_of(
        tmp_path,
        """\
        domain: d
        descriptors:
          - {key: a, rate_limit: {unit: day, requests_per_unit: 1}}
          - {key: a, value: x*y*, rate_limit: {unit: day, requests_per_unit: 2}}
          - {key: a, value: x*, rate_limit: {unit: day, requests_per_unit: 3}}
          - {key: a, value: xxy, rate_limit: {unit: day, requests_per_unit: 4}}
          - {key: b, value: x*, rate_limit: {unit: day, requests_per_unit: 5}}
        """,
    )
    found = {value: matched(tree, ("a", value)).rule.requests_per_unit for value in ("z", "x1y1", "x1", "xxy")}
    assert found == {"z": 1, "x1y1": 2, "x1": 3, "xxy": 4}
    assert matched(tree, ("a", "x1y1")).rule.name == "d.a_x*y*"
    assert matched(tree, ("b", "x1")).rule.requests_per_unit == 5


def test_values_of_a_pattern_share_a_bucket_only_with_share_threshold(tmp_path: Path) -> None:
    tree = rules_of(
        tmp_path,
        """\
        domain: d
        descriptors:
          - {key: a, value: x*, rate_limit: &limit {unit: day, requests_per_unit: 1}}
          - {key: b, value: x*, share_threshold: true, rate_limit: *limit}
          - {key: c, value: x*z, share_threshold: true, rate_limit: *limit}
        """,
    )
    assert matched(tree, ("a", "x1")).bucket_key != matched(tree, ("a", "x2")).bucket_key
    assert matched(tree, ("b", "x1")).bucket_key == matched(tree, ("b", "x2")).bucket_key
    assert matched(tree, ("c", "x1z")).bucket_key == matched(tree, ("c", "x2z")).bucket_key


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ("", "d.a_x*.b"),
        ("value_to_metric: true, ", "d.a_x1.b"),
        ("share_threshold: true, value_to_metric: true, ", "d.a_x*.b"),
    ],
)
def test_value_to_metric_names_the_value_of_its_own_entry(tmp_path: Path, keys: str, name: str) -> None:
    below = "descriptors: [{key: b, rate_limit: {unit: day, requests_per_unit: 1}}]"
    tree = rules_of(tmp_path, f"domain: d\ndescriptors:\n  - {{key: a, value: x*, {keys}{below}}}")
    assert matched(tree, ("a", "x1"), ("b", "y1")).metric_name == name


def test_detailed_metric_names_all_values(tmp_path: Path) -> None:
    text = "domain: d\ndescriptors: [{key: a, detailed_metric: true, rate_limit: {unit: day, requests_per_unit: 1}}]"
    match = matched(rules_of(tmp_path, text), ("a", "x1"))
    assert (match.rule.name, match.metric_name) == ("d.a", "d.a_x1")


def test_every_other_key_of_theirs_goes_into_the_rule(tmp_path: Path) -> None:
    rule = one_rule(
        tmp_path,
        "{key: a, shadow_mode: true, quota_mode: yes, metadata: {tier: gold, tags: [1, 0.5, {none: ~}]},"
        " rate_limit: {unit: day, requests_per_unit: 1, name: narrow, replaces: [{name: wide}, {name: 7}]}}",
    )
    assert (rule.limit_name, rule.replaces) == ("narrow", frozenset(("wide", "7")))
    assert (rule.shadow_mode, rule.quota_mode) == (True, True)
    assert rule.metadata == {"tier": "gold", "tags": [1, 0.5, {"none": None}]}
    assert type(rule.metadata) is dict


@pytest.mark.parametrize(
    ("text", "requests"), [("010", 8), ("0x10", 16), ("0b11", 3), ("0o10", 8), ("!!int '5'", 5), ("1_000", 1000)]
)
def test_numbers_are_read_as_gos_yaml_reads_them(tmp_path: Path, text: str, requests: int) -> None:
    rule = one_rule(tmp_path, f"{{key: a, value: 010, rate_limit: {{unit: day, requests_per_unit: {text}}}}}")
    assert (rule.requests_per_unit, rule.name) == (requests, "d.a_010")


def test_metadata_may_have_keys_that_are_no_text(tmp_path: Path) -> None:
    rule = one_rule(tmp_path, f"{{key: a, {DAILY}, metadata: {{1: x, y: n, inner: [{{2: 0x10, 1.5: z}}]}}}}")
    assert rule.metadata == {"1": "x", "y": False, "inner": [{"2": 16, "1.5": "z"}]}


def test_metadata_is_as_deep_as_an_answer_with_it_can_be_read(tmp_path: Path) -> None:
    def metadata(depth: int) -> str:
        return f"{{key: a, {DAILY}, metadata: {'{a: ' * depth}1{'}' * depth}}}"

    deepest = one_rule(tmp_path, metadata(MAX_METADATA_DEPTH)).metadata
    answer = RateLimitResponse()
    answer.dynamic_metadata.update({"metadata": dict(deepest)})
    assert RateLimitResponse.FromString(answer.SerializeToString()) == answer
    with pytest.raises(ConfigError, match="at most 30 mappings and lists inside each other"):
        one_rule(tmp_path, metadata(MAX_METADATA_DEPTH + 1))


def test_a_hundred_levels_of_descriptors_are_read_and_matched(tmp_path: Path) -> None:
    levels = 100
    text = "domain: d\n" + "".join(f"{'  ' * i}descriptors:\n{'  ' * i}- key: k\n" for i in range(levels))
    rules = rules_of(tmp_path, f"{text}{'  ' * levels}rate_limit: {{unit: day, requests_per_unit: 7}}\n")
    match = rules.match("d", [("k", "v")] * levels)
    assert match is not None
    assert match.rule.requests_per_unit == 7


JOINED = """\
domain: d
descriptors:
  - {key: user, value: 'b*b', rate_limit: {unit: day, requests_per_unit: 1}}
  - {key: user_id, value: eve, rate_limit: {unit: day, requests_per_unit: 2}}
  - {key: 'user*', rate_limit: {unit: day, requests_per_unit: 3}, value_to_metric: true}
  - {key: '*', value: 'x*', rate_limit: {unit: day, requests_per_unit: 4}, share_threshold: true}
  - {key: 'plan*', rate_limit: {unit: day, requests_per_unit: 5}, share_threshold: true}
  - {key: plan, rate_limit: {unit: day, requests_per_unit: 6}}
  - {key: tier, rate_limit: {unit: day, requests_per_unit: 7}}
"""


@pytest.mark.parametrize(
    ("key", "value", "requests"),
    [
        ("user_id", "bob", 3),
        ("user", "eve", 3),
        ("users", "", 3),
        ("user", "bob", 1),
        # The text user_bob fits the first.
        ("user_b", "bob", 1),
        ("user_id", "eve", 2),
        ("tier", "x1", 4),
        ("", "x", 4),
        ("tier", "gold", 7),
        ("plan", "gold", 5),
        ("plane", "", 5),
        ("us", "er", None),
    ],
)
def test_a_wildcard_in_a_key_fits_key_and_value_joined_as_in_envoyproxy_ratelimit(
    tmp_path: Path, key: str, value: str, requests: int | None
) -> None:
    tree = rules_of(tmp_path, JOINED)
    match = tree.match("d", [(key, value)])
    assert (None if match is None else match.rule.requests_per_unit) == requests
    if match is not None:
        assert tree.rule_of_key(match.bucket_key) is match.rule


def test_each_pair_that_a_key_with_a_wildcard_fits_has_a_bucket_or_each_key_shares_one(tmp_path: Path) -> None:
    tree = rules_of(tmp_path, JOINED)
    own = [matched(tree, entry).bucket_key for entry in (("user_id", "a"), ("user_id", "b"), ("user", "a"))]
    assert len(set(own)) == 3
    shared = [matched(tree, entry).bucket_key for entry in (("plan", "a"), ("plan", "b"), ("plans", "a"))]
    assert shared[0] == shared[1] != shared[2]
    assert len({rule_key(key) for key in own}) == len({rule_key(key) for key in shared}) == 1
    for name in (*own, *shared):
        assert all(tree.rule_of_key(key) is tree.rule_of_key(name) for key in overflow_keys(name))
    assert [matched(tree, entry).metric_name for entry in (("user_id", "a"), ("plan", "a"))] == [
        "d.user_id_a",
        "d.plan*",
    ]


def test_every_key_of_ours_goes_into_the_rule(tmp_path: Path) -> None:
    rule = one_rule(
        tmp_path,
        "{key: a, algorithm: token_bucket, burst: 9, consistency: local, max_debt: 7, charge: always,"
        " retry_after: true, body: 429, rate_limit: {unit: second, requests_per_unit: 5}}",
    )
    assert rule.limit == TokenBucketLimit(5, 1_000_000, 9, max_debt=7)
    assert rule.consistency is Consistency.LOCAL
    assert (rule.charge, rule.retry_after, rule.body) == (Charge.ALWAYS, True, "429")


def test_a_bucket_may_have_max_debt(tmp_path: Path) -> None:
    rule = one_rule(tmp_path, "{key: a, max_debt: 7, bucket: {capacity: 9, refillRate: 1}}")
    assert rule.limit == TokenBucketLimit(1, 1_000_000, 9, max_debt=7)


@pytest.mark.parametrize("window", Window)
def test_an_algorithm_counts_in_windows(tmp_path: Path, window: Window) -> None:
    limit = "rate_limit: {unit: minute, requests_per_unit: 5}"
    windowed = WindowLimit(5, 60_000_000, window)
    assert one_rule(tmp_path, f"{{key: a, algorithm: {window.value}, {limit}}}").limit == windowed
    assert one_rule(tmp_path, f"{{key: a, {limit}}}", RuleDefaults(window=window)).limit == windowed
    other = one_rule(tmp_path, f"{{key: a, algorithm: token_bucket, {limit}}}", RuleDefaults(window=window))
    assert other.limit == TokenBucketLimit(5, 60_000_000, 5)


def test_a_bucket_is_a_token_bucket_whatever_the_default(tmp_path: Path) -> None:
    defaults = RuleDefaults(window=Window.FIXED)
    bucket = BucketConfig(capacity=3, refillRate=Decimal(1))
    assert one_rule(tmp_path, "{key: a, bucket: {capacity: 3, refillRate: 1}}", defaults).limit == bucket.limit()
    assert rules(default_rule=bucket, defaults=defaults).default_rule == Rule("bucket", bucket.limit(), 3)
    indebted = one_rule(tmp_path, "{key: a, max_debt: 2, bucket: {capacity: 3, refillRate: 1}}", defaults)
    assert indebted.limit == bucket.limit(max_debt=2)


def test_a_limit_that_a_request_brings_takes_the_defaults(tmp_path: Path) -> None:
    tree = rules_of(tmp_path, "domain: d", RuleDefaults(Consistency.LOCAL, Window.SLIDING))
    match = tree.override("d", [("a", "x")], 5, Unit.MINUTE)
    assert match is not None
    assert match.rule.limit == WindowLimit(5, 60_000_000, Window.SLIDING)
    assert match.rule.consistency is Consistency.LOCAL


def test_a_limit_that_a_request_brings_is_counted_in_a_sliding_window_where_rules_are_token_buckets(
    tmp_path: Path,
) -> None:
    assert rules_of(tmp_path, "domain: d").override_window is Window.SLIDING
    strict = RuleDefaults(Consistency.STRICT, has_members=True)
    assert rules_of(tmp_path, "domain: d", strict).override_window is None


@pytest.mark.parametrize(
    "descriptor",
    [
        # envoyproxy/ratelimit accepts these, so files that have them must go on working.
        "{key: a, shadow_mode: true, quota_mode: true, detailed_metric: true, value_to_metric: true, metadata: {x: 1}}",
        "{key: a, rate_limit: {unlimited: true, requests_per_unit: 5}}",
        "{key: a, rate_limit: {unlimited: true, unit: unknown, name: ''}}",
        "{key: a, shadow_mode: true, rate_limit: {unlimited: true, name: x, replaces: [{name: y}]}}",
        "{key: a, rate_limit: {unit: day, requests_per_unit: 1, replaces: [{name: nothing has that name}]}}",
        "{key: a, value: x, value_to_metric: true, share_threshold: false, rate_limit: , descriptors: }",
        # False is as good as nothing.
        "{key: a, retry_after: false}",
    ],
)
def test_what_does_nothing_but_no_harm_is_accepted(tmp_path: Path, descriptor: str) -> None:
    assert "a" in str(rules_of(tmp_path, f"domain: d\ndescriptors: [{descriptor}]").domains["d"])


def test_zero_requests_per_unit_denies_all(tmp_path: Path) -> None:
    rule = one_rule(tmp_path, "{key: a, rate_limit: {unit: minute, requests_per_unit: 0}}")
    assert rule.limit is not None
    assert rule.limit.capacity == 0


def test_unlimited_is_a_rule_without_a_limit(tmp_path: Path) -> None:
    assert one_rule(tmp_path, "{key: a, rate_limit: {unlimited: true}}") == Rule("d.a", None)


def test_a_bucket_stands_in_place_of_rate_limit(tmp_path: Path) -> None:
    rule = one_rule(tmp_path, "{key: a, algorithm: token_bucket, bucket: {capacity: 9, refillRate: 2.5}}")
    assert rule == Rule("d.a", TokenBucketLimit(5, 2_000_000, 9), 9, None)


def test_a_capacity_beyond_uint32_is_shown_to_envoy_as_the_largest(tmp_path: Path) -> None:
    rule = one_rule(tmp_path, "{key: a, bucket: {capacity: 5000000000, refillRate: 1}}")
    assert rule.requests_per_unit == 2**32 - 1


@pytest.mark.parametrize(
    ("refill_rate", "tokens", "period_us"),
    [
        ("10", 10, 1_000_000),
        ("0.1", 1, 10_000_000),
        ("1e-9", 1, 10**15),
        ("1099.511627776", 1_099_511_627_776, 10**15),
        ("1099511627776", 1_099_511_627_776, 1_000_000),
        # Longer than promised, but still an exact ratio.
        ("0.00152587890625", 1, 655_360_000),
    ],
)
def test_a_refill_rate_is_exact(refill_rate: str, tokens: int, period_us: int) -> None:
    bucket = BucketConfig(capacity=1, refillRate=Decimal(refill_rate))
    assert bucket.limit().tokens * period_us == tokens * bucket.limit().period_us


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("10", "10"),
        ("1.50", "1.50"),
        ("yes", "yes"),
        ("0x1F", "0x1F"),
        ("010", "010"),
        ("'a b'", "a b"),
        ("1_0", "1_0"),
    ],
)
def test_keys_and_values_are_taken_as_they_are_written(tmp_path: Path, written: str, value: str) -> None:
    rule = one_rule(tmp_path, f"{{key: {written}, value: {written}, bucket: {{capacity: 1, refillRate: 1}}}}")
    assert rule.name == f"d.{value}_{value}"


def test_a_domain_and_a_limit_may_be_named_by_a_number(tmp_path: Path) -> None:
    text = "domain: 10\ndescriptors: [{key: a, rate_limit: {unit: day, requests_per_unit: 1, name: 1.50}}]"
    [rule] = rules_of(tmp_path, text)
    assert (rule.name, rule.limit_name) == ("10.a", "1.50")


@pytest.mark.parametrize("written", ["", "''", "~"])
def test_a_value_without_text_is_a_rule_for_every_value(tmp_path: Path, written: str) -> None:
    text = f"domain: d\ndescriptors:\n  - key: a\n    value: {written}\n    rate_limit: {{unlimited: true}}\n"
    assert rule_for(rules_of(tmp_path, text), "d", ("a", "anything")) is not None


def test_pairs_whose_underscored_texts_are_equal_do_not_collide(tmp_path: Path) -> None:
    tree = rules_of(
        tmp_path,
        """\
        domain: d
        descriptors:
          - {key: a_b, value: c, bucket: {capacity: 1, refillRate: 1}}
          - {key: a, value: b_c, bucket: {capacity: 2, refillRate: 1}}
        """,
    )
    assert [rule.requests_per_unit for rule in tree] == [2, 1]


def test_anchors_and_merge_keys_repeat_a_limit(tmp_path: Path) -> None:
    tree = rules_of(
        tmp_path,
        """\
        domain: d
        descriptors:
          - {key: a, rate_limit: &slow {unit: hour, requests_per_unit: 1}}
          - {key: b, rate_limit: {<<: *slow, requests_per_unit: 2}}
        """,
    )
    assert sorted((rule.name, rule.requests_per_unit) for rule in tree) == [("d.a", 1), ("d.b", 2)]


def test_all_rules_take_the_default_consistency_and_the_rest_has_the_default_rule(
    tmp_path: Path,
) -> None:
    file = write(tmp_path / "a.yaml", "domain: d\ndescriptors: [{key: a, rate_limit: {unlimited: yes}}]")
    bucket = BucketConfig(capacity=1000, refillRate=Decimal(10))
    tree = rules(file, default_rule=bucket, defaults=RuleDefaults(Consistency.LOCAL))
    assert {rule.consistency for rule in tree} == {Consistency.LOCAL}
    assert rule_for(tree, "other", ("x", "y")) == Rule(
        "bucket", TokenBucketLimit(10, 1_000_000, 1000), 1000, None, Consistency.LOCAL
    )


def test_no_paths_are_no_rules() -> None:
    assert rules() == Rules(override_window=Window.SLIDING)


def test_a_folder_gives_its_yaml_files_as_kubernetes_mounts_them(tmp_path: Path) -> None:
    """A ConfigMap's files are links into ..data, a link to the folder of the current version."""
    current = tmp_path / "..2026_01_01"
    write(current / "b.yaml", "domain: b")
    write(current / "a.yml", "domain: a")
    (tmp_path / "..data").symlink_to(current.name)
    for name in ("b.yaml", "a.yml"):
        (tmp_path / name).symlink_to(f"..data/{name}")
    write(tmp_path / ".hidden.yaml", "not: rules")
    write(tmp_path / "README.md", "not: rules")
    write(tmp_path / "sub.yaml" / "c.yaml", "not: rules")
    assert list(rules(tmp_path).domains) == ["a", "b"]


def test_a_file_named_twice_is_read_once(tmp_path: Path) -> None:
    file = write(tmp_path / "a.yaml", "domain: a")
    assert list(rules(tmp_path, file).domains) == ["a"]


def test_a_domain_in_two_files_names_the_first(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "# comment\ndomain: d\n")
    write(tmp_path / "b.yaml", "descriptors: []\ndomain: d\n")
    with pytest.raises(ConfigError) as error:
        rules(tmp_path)
    assert lines(error, tmp_path) == [
        f'b.yaml:2:1: domain: found "d", which {tmp_path}/a.yaml:2 has already, expected another domain; put all'
        " descriptors of a domain into one file, or turn merge_domains on"
    ]


def test_merged_domains_are_one_tree_in_the_order_of_the_files(tmp_path: Path) -> None:
    write(
        tmp_path / "a.yaml",
        """\
        domain: d
        descriptors:
          - {key: a, value: x*, rate_limit: {unit: day, requests_per_unit: 1}}
        """,
    )
    write(
        tmp_path / "b.yaml",
        """\
        domain: d
        descriptors:
          - {key: a, value: xy*, rate_limit: {unit: day, requests_per_unit: 2}}
          - {key: b, rate_limit: {unit: day, requests_per_unit: 3}}
        """,
    )
    tree = rules(tmp_path, merge_domains=True)
    assert [matched(tree, entry).rule.requests_per_unit for entry in (("a", "xyz"), ("b", ""))] == [1, 3]
    assert sum(1 for _ in tree) == 3


def test_merged_files_that_repeat_a_descriptor_name_the_first(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "domain: d\ndescriptors:\n  - {key: a, value: x}\n")
    write(tmp_path / "b.yaml", "domain: d\ndescriptors: [{key: b}, {key: a, value: x}]\n")
    with pytest.raises(ConfigError) as error:
        rules(tmp_path, merge_domains=True)
    assert lines(error, tmp_path) == [
        f"b.yaml:2:25: descriptors[1]: found the key and value of descriptors[0] in {tmp_path}/a.yaml:3 again, expected"
        " each pair of key and value once a level; merge the two, or give one another value"
    ]


def test_all_mistakes_of_all_files_are_told_at_once(tmp_path: Path) -> None:
    write(
        tmp_path / "a.yaml",
        """\
        domain: d
        descriptors:
          - kye: a
            rate_limit: {unit: fortnight, requests_per_unit: -1}
            descriptors:
              - key: b
                burst: 1
          - nonsense
        domain: e
        """,
    )
    write(tmp_path / "b.yaml", "domain: ]")
    write(tmp_path / "c.yaml", "domain: d\ndescriptors: [{key: a, key: b}]")
    with pytest.raises(ConfigError) as error:
        rules(tmp_path, tmp_path / "absent.yaml")
    assert [line.split(": ")[:2] for line in lines(error, tmp_path)] == [
        ["a.yaml:3:5", "descriptors[0].key"],
        ["a.yaml:3:5", "descriptors[0].kye"],
        ["a.yaml:4:18", "descriptors[0].rate_limit.unit"],
        ["a.yaml:4:35", "descriptors[0].rate_limit.requests_per_unit"],
        ["a.yaml:7:9", "descriptors[0].descriptors[0].burst"],
        ["a.yaml:8:5", "descriptors[1]"],
        ["a.yaml:9:1", "domain"],
        ["b.yaml:1:9", "found broken YAML"],
        ["c.yaml:1:1", "domain"],
        ["c.yaml:2:24", "descriptors[0].key"],
        ["absent.yaml", "found no such file, expected a readable YAML file; check its path"],
    ]


def test_a_folder_without_rules_files_has_no_rules_yet(tmp_path: Path) -> None:
    write(tmp_path / "rules" / "README.md", "")
    assert list(rules(tmp_path / "rules")) == []


def test_a_dangling_link_in_a_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").symlink_to("gone")
    with pytest.raises(ConfigError) as error:
        rules(tmp_path)
    assert lines(error, tmp_path) == ["a.yaml: found no such file, expected a readable YAML file; check its path"]


def test_a_folder_that_may_not_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    # File modes do not keep root out, and tests may run as root.
    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(ConfigError) as error:
        rules(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: found that it cannot be read (Permission denied), expected a readable folder"
    )


PLAIN = "  - {{key: tenant, value: t{i}, rate_limit: {{unit: minute, requests_per_unit: 5}}}}\n"
PREFIXED = (
    "  - {{key: tenant, value: t{i}-*, share_threshold: true, rate_limit: {{unit: minute, requests_per_unit: 5}}}}\n"
)
SPLIT = "  - {{key: tenant, value: a*{i}*z, rate_limit: {{unit: minute, requests_per_unit: 5}}}}\n"


@pytest.mark.parametrize(
    "descriptor", [PLAIN, pytest.param(PREFIXED, marks=pytest.mark.slow), pytest.param(SPLIT, marks=pytest.mark.slow)]
)
def test_ten_thousand_rules_load_in_moments(tmp_path: Path, descriptor: str) -> None:
    descriptors = "".join(descriptor.format(i=i) for i in range(10_000))
    file = write(tmp_path / "a.yaml", f"domain: d\ndescriptors:\n{descriptors}")
    started = time.process_time()
    tree = rules(file)
    # Takes about a second of CPU time on a busy machine; whatever is quadratic takes minutes.
    assert time.process_time() - started < 5
    assert sum(1 for _ in tree) == 10_000
