"""Rules files into the tree the limiter matches against."""

from __future__ import annotations

import time
from decimal import Decimal
from pathlib import Path

import pytest
from config.builders import lines, rules, rules_errors, rules_of, write

from ratelimit_sidecar.config.bucket import BucketConfig
from ratelimit_sidecar.config.errors import ConfigError
from ratelimit_sidecar.config.rules_schema import Descriptor, RateLimit
from ratelimit_sidecar.crdt.limit import Limit
from ratelimit_sidecar.limiter.rules import Consistency, Match, Rule, Rules, Unit

UNITS = "expected one of second, minute, hour, day, week, month, year"
DESCRIPTOR_KEYS = "key, value, rate_limit, algorithm, burst, bucket, descriptors"
COUNT = "expected a whole number from 1 to 1099511627776"
REQUESTS = "expected a whole number from 0 to 4294967295"
UNSUPPORTED = "envoyproxy/ratelimit knows it, it is not supported here yet: remove it"


def rule_for(tree: Rules, domain: str, *entries: tuple[str, str]) -> Rule | None:
    match: Match | None = tree.match(domain, entries)
    return match.rule if match else None


def one_rule(folder: Path, descriptor: str) -> Rule:
    """The only rule of a file with that one descriptor, written as a flow mapping."""
    [rule] = rules_of(folder, f"domain: d\ndescriptors:\n  - {descriptor}\n")
    return rule


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
        "shop.tenant", Limit(20, 60_000_000, 20), 20, Unit.MINUTE, Consistency.EVENTUAL
    )
    assert rule_for(tree, "shop", ("tenant", "acme")) == Rule(
        "shop.tenant_acme", Limit(5, 1_000_000, 5), 5, Unit.SECOND, Consistency.EVENTUAL
    )
    assert rule_for(tree, "shop", ("tenant", "acme"), ("path", "/")) == Rule(
        "shop.tenant_acme.path", Limit(3, 86_400_000_000, 3), 3, Unit.DAY, Consistency.EVENTUAL
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
        assert rule.limit == Limit(1, seconds * 1_000_000, 1)


def test_burst_is_the_capacity(tmp_path: Path) -> None:
    rule = one_rule(tmp_path, "{key: a, burst: 70, rate_limit: {unit: minute, requests_per_unit: 20}}")
    assert rule.limit == Limit(20, 60_000_000, 70)
    assert rule.requests_per_unit == 20


def test_zero_requests_per_unit_denies_all(tmp_path: Path) -> None:
    rule = one_rule(tmp_path, "{key: a, rate_limit: {unit: minute, requests_per_unit: 0}}")
    assert rule.limit is not None
    assert rule.limit.capacity == 0


def test_unlimited_is_a_rule_without_a_limit(tmp_path: Path) -> None:
    assert one_rule(tmp_path, "{key: a, rate_limit: {unlimited: true}}") == Rule("d.a", None)


def test_a_bucket_stands_in_place_of_rate_limit(tmp_path: Path) -> None:
    rule = one_rule(tmp_path, "{key: a, algorithm: token_bucket, bucket: {capacity: 9, refillRate: 2.5}}")
    assert rule == Rule("d.a", Limit(5, 2_000_000, 9), 9, None)


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
    assert bucket.limit.tokens * period_us == tokens * bucket.limit.period_us


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
def test_a_value_is_taken_as_it_is_written(tmp_path: Path, written: str, value: str) -> None:
    rule = one_rule(tmp_path, f"{{key: a, value: {written}, bucket: {{capacity: 1, refillRate: 1}}}}")
    assert rule.name == f"d.a_{value}"


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


def test_all_rules_take_the_default_consistency_and_the_rest_falls_into_the_unruled_bucket(tmp_path: Path) -> None:
    file = write(tmp_path / "a.yaml", "domain: d\ndescriptors: [{key: a, rate_limit: {unlimited: yes}}]")
    bucket = BucketConfig(capacity=1000, refillRate=Decimal(10))
    tree = rules(file, unruled=bucket, default_consistency=Consistency.LOCAL)
    assert {rule.consistency for rule in tree} == {Consistency.LOCAL}
    assert rule_for(tree, "other", ("x", "y")) == Rule(
        "bucket", Limit(10, 1_000_000, 1000), 1000, None, Consistency.LOCAL
    )


def test_no_paths_are_no_rules() -> None:
    assert rules() == Rules()


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


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "1:1: found nothing, expected a mapping with the keys domain, descriptors"),
        ("[]", "1:1: found an empty list, expected a mapping with the keys domain, descriptors"),
        ("descriptors: []", "1:1: domain: found nothing, expected text that is not empty"),
        ("domain:", "1:1: domain: found nothing, expected text that is not empty"),
        ("domain: ''", '1:1: domain: found "", expected text that is not empty'),
        ("domain: 5", '1:1: domain: found 5, expected text that is not empty; write it in quotes: "5"'),
        ("domain: a\ndescriptor: []", '2:1: descriptor: found the unknown key "descriptor", expected one of domain,'
         ' descriptors; did you mean "descriptors"?'),
        ("domain: a\ndescriptors: {key: a}",
         "2:1: descriptors: found a mapping, expected a list, each item a descriptor"),
        ("domain: a\n0.25: b", "2:1: found 0.25 as a key, expected text as a key"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_file_is_told_with_its_place_and_its_fix(tmp_path: Path, text: str, line: str) -> None:
    assert rules_errors(tmp_path, text) == [f"rules.yaml:{line}"]


@pytest.mark.parametrize(
    ("descriptor", "line"),
    [
        ("a", f'3:5: descriptors[0]: found "a", expected a mapping with the keys {DESCRIPTOR_KEYS}'),
        ("[a]", f"3:5: descriptors[0]: found a list, expected a mapping with the keys {DESCRIPTOR_KEYS}"),
        ("{value: a}", "3:5: descriptors[0].key: found nothing, expected text that is not empty"),
        ("{key: ''}", '3:6: descriptors[0].key: found "", expected text that is not empty'),
        ("{key: 10}", '3:6: descriptors[0].key: found 10, expected text that is not empty; write it in quotes: "10"'),
        ("{key: on}", '3:6: descriptors[0].key: found on, expected text that is not empty; write it in quotes: "on"'),
        ("{key: [a]}", "3:6: descriptors[0].key: found a list, expected text that is not empty"),
        ("{key: a, value: [b]}", "3:14: descriptors[0].value: found a list, expected text"),
        ("{key: a, value: b*c}", '3:14: descriptors[0].value: found "b*c", expected a value without *; wildcards of'
         " envoyproxy/ratelimit are not supported here yet"),
        ("{key: a, vaule: b}", f'3:14: descriptors[0].vaule: found the unknown key "vaule", expected one of'
         f' {DESCRIPTOR_KEYS}; did you mean "value"?'),
        ("{key: a, unit: day}", f'3:14: descriptors[0].unit: found the unknown key "unit", expected one of'
         f" {DESCRIPTOR_KEYS}; it belongs below rate_limit: check the indentation"),
        *(
            (f"{{key: a, {key}: true}}", f'3:14: descriptors[0].{key}: found the key "{key}", expected one of'
             f" {DESCRIPTOR_KEYS}; {UNSUPPORTED}")
            for key in sorted(Descriptor.not_yet)
        ),
        *(
            (f"{{key: a, rate_limit: {{unlimited: true, {key}: x}}}}", f'3:44: descriptors[0].rate_limit.{key}: found'
             f' the key "{key}", expected one of unit, requests_per_unit, unlimited; {UNSUPPORTED}')
            for key in sorted(RateLimit.not_yet)
        ),
        ("{key: a, rate_limit: 5}", "3:14: descriptors[0].rate_limit: found 5, expected a mapping with the keys unit,"
         " requests_per_unit, unlimited"),
        ("{key: a, rate_limit: {requests_per_unit: 1}}",
         f"3:14: descriptors[0].rate_limit.unit: found nothing, {UNITS}"),
        ("{key: a, rate_limit: {unit: day}}", "3:14: descriptors[0].rate_limit.requests_per_unit: found nothing,"
         f" {REQUESTS}"),
        ("{key: a, rate_limit: {unit: minutes, requests_per_unit: 1}}", '3:27: descriptors[0].rate_limit.unit: found'
         f' "minutes", {UNITS}; did you mean "minute"?'),
        ("{key: a, rate_limit: {unit: UNKNOWN, requests_per_unit: 1}}", '3:27: descriptors[0].rate_limit.unit: found'
         f' "UNKNOWN", {UNITS}'),
        ("{key: a, rate_limit: {unit: 60, requests_per_unit: 1}}", "3:27: descriptors[0].rate_limit.unit: found 60,"
         f" {UNITS}"),
        ("{key: a, rate_limit: {unit: day, requests_per_unit: -1}}",
         "3:38: descriptors[0].rate_limit.requests_per_unit:"
         f" found -1, {REQUESTS}"),
        ("{key: a, rate_limit: {unit: day, requests_per_unit: 4294967296}}", "3:38:"
         f" descriptors[0].rate_limit.requests_per_unit: found 4294967296, {REQUESTS}"),
        ("{key: a, rate_limit: {unit: day, requests_per_unit: '1'}}", "3:38:"
         f' descriptors[0].rate_limit.requests_per_unit: found "1", {REQUESTS}; remove the quotes'),
        ("{key: a, rate_limit: {unit: day, requests_per_unit: 0.5}}", "3:38:"
         f" descriptors[0].rate_limit.requests_per_unit: found 0.5, {REQUESTS}"),
        ("{key: a, rate_limit: {unlimited: 1, unit: day, requests_per_unit: 1}}", "3:27:"
         " descriptors[0].rate_limit.unlimited: found 1, expected true or false"),
        ("{key: a, rate_limit: {unlimited: true, unit: day}}", "3:44: descriptors[0].rate_limit.unit: found unit beside"
         " unlimited, expected one of the two; remove unit or unlimited"),
        ("{key: a, rate_limit: {unlimited: true, requests_per_unit: 5}}", "3:44:"
         " descriptors[0].rate_limit.requests_per_unit: found requests_per_unit beside unlimited, expected one of the"
         " two; remove requests_per_unit or unlimited"),
        ("{key: a, rate_limit: {unlimited: true}, burst: 5}", "3:45: descriptors[0].burst: found burst of a limit that"
         " admits everything, expected no burst; remove it"),
        ("{key: a, rate_limit: {unit: day, requests_per_unit: 0}, burst: 5}", "3:61: descriptors[0].burst: found burst"
         " of a limit that admits nothing, expected no burst; remove it"),
        ("{key: a, rate_limit: {unit: day, requests_per_unit: 1}, burst: 0}", f"3:61: descriptors[0].burst: found 0,"
         f" {COUNT}"),
        ("{key: a, burst: 5}", "3:14: descriptors[0].burst: found burst without a limit, expected rate_limit beside it;"
         " add rate_limit, or remove burst"),
        ("{key: a, algorithm: token_bucket}",
         "3:14: descriptors[0].algorithm: found algorithm without a limit, expected"
         " rate_limit beside it; add rate_limit, or remove algorithm"),
        ("{key: a, bucket: {capacity: 1, refillRate: 1}, burst: 5}", "3:52: descriptors[0].burst: found burst beside"
         " bucket, expected bucket alone; bucket.capacity is the burst"),
        ("{key: a, bucket: {capacity: 1, refillRate: 1}, rate_limit: {unlimited: true}}", "3:14: descriptors[0].bucket:"
         " found a bucket beside rate_limit, expected one of the two; remove one of them"),
        ("{key: a, bucket: {capacity: 0, refillRate: 1}}", f"3:23: descriptors[0].bucket.capacity: found 0, {COUNT}"),
        ("{key: a, bucket: {capacity: 1, refillRate: 1}, algorithm: fixed_window}", '3:52: descriptors[0].algorithm:'
         ' found "fixed_window", expected token_bucket; "fixed_window" is not yet available'),
        ("{key: a, bucket: {capacity: 1, refillRate: 1}, algorithm: token-bucket}", '3:52: descriptors[0].algorithm:'
         ' found "token-bucket", expected token_bucket; did you mean "token_bucket"?'),
        ("{key: a, descriptors: [{key: b, descriptors: [{key: ''}]}]}", "3:52:"
         ' descriptors[0].descriptors[0].descriptors[0].key: found "", expected text that is not empty'),
    ],
)  # fmt: skip
def test_a_mistake_in_a_descriptor_is_told_with_its_place_and_its_fix(
    tmp_path: Path, descriptor: str, line: str
) -> None:
    assert rules_errors(tmp_path, f"domain: d\ndescriptors:\n  - {descriptor}\n") == [f"rules.yaml:{line}"]


def test_the_same_key_and_value_twice_on_one_level_names_the_first(tmp_path: Path) -> None:
    text = """\
    domain: d
    descriptors:
      - key: a
      - key: a
        value: 1
        descriptors:
          - key: a
      - key: a
        value: "1"
      - key: a
        value:
    """
    fix = "expected each pair of key and value once a level; merge the two, or give one another value"
    assert rules_errors(tmp_path, text) == [
        f"rules.yaml:8:5: descriptors[2]: found the key and value of descriptors[1] in line 4 again, {fix}",
        f"rules.yaml:10:5: descriptors[3]: found the key and value of descriptors[0] in line 3 again, {fix}",
    ]


def test_a_domain_in_two_files_names_the_first(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "# comment\ndomain: d\n")
    write(tmp_path / "b.yaml", "descriptors: []\ndomain: d\n")
    with pytest.raises(ConfigError) as error:
        rules(tmp_path)
    assert lines(error, tmp_path) == [
        f'b.yaml:2:1: domain: found "d", which {tmp_path}/a.yaml:2 has already, expected another domain; put all'
        " descriptors of a domain into one file"
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


def test_a_folder_without_rules_files_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "rules" / "README.md", "")
    with pytest.raises(ConfigError) as error:
        rules(tmp_path / "rules")
    assert lines(error, tmp_path) == [
        "rules: found a folder without rules files, expected at least one file whose name ends in .yaml or .yml;"
        " subfolders and names that begin with a dot are not read"
    ]


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


def test_ten_thousand_rules_load_in_moments(tmp_path: Path) -> None:
    descriptors = "".join(
        f"  - key: tenant\n    value: t{i}\n    rate_limit: {{unit: minute, requests_per_unit: {i}}}\n"
        for i in range(10_000)
    )
    file = write(tmp_path / "a.yaml", f"domain: d\ndescriptors:\n{descriptors}")
    started = time.process_time()
    tree = rules(file)
    # Takes half a second of CPU time; whatever is quadratic takes minutes.
    assert time.process_time() - started < 5
    assert sum(1 for _ in tree) == 10_000
