"""What is said of rules that are broken: where, what was found, what was expected, and what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
from config.builders import STANDARD, lines, rules, rules_errors, rules_of, write

from ratelimit_sidecar.config.errors import ConfigError
from ratelimit_sidecar.config.rules_schema import MAX_BODY_BYTES
from ratelimit_sidecar.config.rules_tree import RuleDefaults
from ratelimit_sidecar.crdt.limit import Window

UNITS = "expected one of second, minute, hour, day, week, month, year"
ANOTHER_PERIOD = "choose one of them, or give a bucket in place of rate_limit for any other period"
FILE_KEYS = "domain, charge, charging, ext_authz, descriptors"
DESCRIPTOR_KEYS = (
    "key, value, rate_limit, shadow_mode, quota_mode, detailed_metric, value_to_metric, share_threshold, metadata,"
    " algorithm, burst, bucket, consistency, wait, max_debt, charge, retry_after, body, descriptors"
)
RATE_LIMIT_KEYS = "unit, requests_per_unit, unlimited, name, replaces"
ALGORITHMS = "expected one of token_bucket, fixed_window, sliding_window"
COUNT = "expected a whole number from 1 to 1099511627776"
REQUESTS = "expected a whole number from 0 to 4294967295"
TEXT = "expected text that is not empty"
ADD_DOMAIN = "write the domain of Envoy's rate limit filter, as in domain: shop"
ADD_KEY = "write the key of the entry that the descriptor matches"
UNKNOWN = "remove it, or correct its name"
DAILY = "rate_limit: {unit: day, requests_per_unit: 1}"
NONE_DAILY = "rate_limit: {unit: day, requests_per_unit: 0}"
UNLIMITED = "rate_limit: {unlimited: true}"
BUCKET = "bucket: {capacity: 1, refillRate: 1}"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", f"1:1: found nothing, expected a mapping with the keys {FILE_KEYS}"),
        ("[]", f"1:1: found an empty list, expected a mapping with the keys {FILE_KEYS}"),
        ("descriptors: []", f"1:1: domain: found nothing, {TEXT}; {ADD_DOMAIN}"),
        ("domain:", f"1:1: domain: found nothing, {TEXT}; {ADD_DOMAIN}"),
        ("domain: ~", f"1:1: domain: found nothing, {TEXT}; {ADD_DOMAIN}"),
        ("domain: ''", f'1:1: domain: found "", {TEXT}; {ADD_DOMAIN}'),
        ("domain: [a]", f"1:1: domain: found a list, {TEXT}; {ADD_DOMAIN}"),
        ("domain: a\ndescriptor: []",
         f'2:1: descriptor: found the unknown key "descriptor", expected one of {FILE_KEYS}; did you mean'
         ' "descriptors"?'),
        ("domain: a\nxyz: []", f'2:1: xyz: found the unknown key "xyz", expected one of {FILE_KEYS}; {UNKNOWN}'),
        ("domain: a\ndescriptors: {key: a}",
         "2:1: descriptors: found a mapping, expected a list, each item a descriptor"),
        ("domain: a\n0.25: b",
         f'2:1: "0.25": found the unknown key "0.25", expected one of {FILE_KEYS}; {UNKNOWN}'),
    ],
)  # fmt: skip
def test_a_mistake_in_the_file_is_told_with_its_place_and_its_fix(tmp_path: Path, text: str, line: str) -> None:
    assert rules_errors(tmp_path, text) == [f"rules.yaml:{line}"]


def test_broken_yaml_is_told_with_its_place_and_where_to_look(tmp_path: Path) -> None:
    [line] = rules_errors(tmp_path, "domain: a\ndescriptors: ]")
    # PyYAML's two parsers word it differently.
    assert line.startswith("rules.yaml:2:14: found broken YAML: ")
    assert line.endswith("expected one YAML document; check quotes, brackets and indentation there")


@pytest.mark.parametrize(
    ("descriptor", "line"),
    [
        ("a", f'3:5: descriptors[0]: found "a", expected a mapping with the keys {DESCRIPTOR_KEYS}'),
        ("[a]", f"3:5: descriptors[0]: found a list, expected a mapping with the keys {DESCRIPTOR_KEYS}"),
        ("{value: a}", f"3:5: descriptors[0].key: found nothing, {TEXT}; {ADD_KEY}"),
        ("{key: ''}", f'3:6: descriptors[0].key: found "", {TEXT}; {ADD_KEY}'),
        ("{key: ~}", f"3:6: descriptors[0].key: found nothing, {TEXT}; {ADD_KEY}"),
        ("{key: [a]}", f"3:6: descriptors[0].key: found a list, {TEXT}; {ADD_KEY}"),
        ("{key: a, ? [7] : b}", "3:16: descriptors[0]: found a key that is empty, a mapping or a list, expected text as"
         " a key; give the value a name"),
        ("{key: a, value: [b]}", "3:14: descriptors[0].value: found a list, expected text"),
        ("{key: a, value: 'b\t'}", '3:14: descriptors[0].value: found the value "b\\t", expected no spaces or tabs at'
         " either end; remove them: nothing would match, since those around a request's value are no part of it"),
        ("{key: a, vaule: b}", '3:14: descriptors[0].vaule: found the unknown key "vaule", expected one of'
         f' {DESCRIPTOR_KEYS}; did you mean "value"?'),
        ("{key: a, unit: day}", '3:14: descriptors[0].unit: found the unknown key "unit", expected one of'
         f" {DESCRIPTOR_KEYS}; it belongs below rate_limit: check the indentation"),
        ("{key: a, shadow_mode: 1}", "3:14: descriptors[0].shadow_mode: found 1, expected true or false"),
        ("{key: a, quota_mode: 'true'}",
         '3:14: descriptors[0].quota_mode: found "true", expected true or false; remove the quotes'),
        ("{key: a, metadata: [1]}", "3:14: descriptors[0].metadata: found a list, expected a mapping of any form, at"
         " most 30 mappings and lists inside each other, its numbers within the range of a double"),
        ("{key: a, metadata: {x: [1e999]}}", "3:14: descriptors[0].metadata: found a mapping, expected a mapping of any"
         " form, at most 30 mappings and lists inside each other, its numbers within the range of a double"),
        ("{key: a, share_threshold: true}", "3:14: descriptors[0].share_threshold: found share_threshold of a"
         " descriptor without value, expected a value with *; end the value in *, or remove share_threshold"),
        ("{key: a, value: b, share_threshold: true}", "3:24: descriptors[0].share_threshold: found share_threshold of"
         ' the value "b", expected a value with *; end the value in *, or remove share_threshold'),
        ("{key: a, rate_limit: 5}",
         f"3:14: descriptors[0].rate_limit: found 5, expected a mapping with the keys {RATE_LIMIT_KEYS}"),
        ("{key: a, rate_limit: {requests_per_unit: 1}}", "3:14: descriptors[0].rate_limit.unit: found nothing,"
         f" {UNITS}; add unit, or unlimited: true for no limit"),
        ("{key: a, rate_limit: {unit: day}}", "3:14: descriptors[0].rate_limit.requests_per_unit: found nothing,"
         f" {REQUESTS}; add requests_per_unit, 0 to let nothing through"),
        ("{key: a, rate_limit: {unit: minutes, requests_per_unit: 1}}", '3:27: descriptors[0].rate_limit.unit: found'
         f' "minutes", {UNITS}; did you mean "minute"?'),
        ("{key: a, rate_limit: {unit: fortnight, requests_per_unit: 1}}", '3:27: descriptors[0].rate_limit.unit: found'
         f' "fortnight", {UNITS}; {ANOTHER_PERIOD}'),
        ("{key: a, rate_limit: {unit: UNKNOWN, requests_per_unit: 1}}", '3:27: descriptors[0].rate_limit.unit: found'
         f' "UNKNOWN", {UNITS}; add unit, or unlimited: true for no limit'),
        ("{key: a, rate_limit: {unit: 60, requests_per_unit: 1}}", "3:27: descriptors[0].rate_limit.unit: found 60,"
         f" {UNITS}; {ANOTHER_PERIOD}"),
        ("{key: a, rate_limit: {unlimited: true, unit: fortnight}}", '3:44: descriptors[0].rate_limit.unit: found'
         f' "fortnight", {UNITS}; {ANOTHER_PERIOD}'),
        ("{key: a, rate_limit: {unit: day, requests_per_unit: -1}}",
         f"3:38: descriptors[0].rate_limit.requests_per_unit: found -1, {REQUESTS}"),
        ("{key: a, rate_limit: {unit: day, requests_per_unit: 4294967296}}", "3:38:"
         f" descriptors[0].rate_limit.requests_per_unit: found 4294967296, {REQUESTS}"),
        ("{key: a, rate_limit: {unit: day, requests_per_unit: '1'}}", "3:38:"
         f' descriptors[0].rate_limit.requests_per_unit: found "1", {REQUESTS}; remove the quotes'),
        ("{key: a, rate_limit: {unit: day, requests_per_unit: 0.5}}", "3:38:"
         f" descriptors[0].rate_limit.requests_per_unit: found 0.5, {REQUESTS}"),
        ("{key: a, rate_limit: {unlimited: 1, unit: day, requests_per_unit: 1}}", "3:27:"
         " descriptors[0].rate_limit.unlimited: found 1, expected true or false"),
        ("{key: a, rate_limit: {unlimited: true, unit: Day}}", "3:44: descriptors[0].rate_limit.unit: found unit beside"
         " unlimited, expected one of the two; remove unit or unlimited"),
        ("{key: a, rate_limit: {unlimited: true, name: [x]}}",
         "3:44: descriptors[0].rate_limit.name: found a list, expected text"),
        ("{key: a, rate_limit: {unlimited: true, replaces: x}}", '3:44: descriptors[0].rate_limit.replaces: found "x",'
         ' expected a list, each item a mapping with the key name; write it as a list: ["x"]'),
        ("{key: a, rate_limit: {unlimited: true, replaces: [x]}}", '3:55: descriptors[0].rate_limit.replaces[0]: found'
         ' "x", expected a mapping with the key name'),
        ("{key: a, rate_limit: {unlimited: true, replaces: [{}]}}", "3:55: descriptors[0].rate_limit.replaces[0].name:"
         f" found nothing, {TEXT}; write the name of the rate_limit it replaces, or remove the entry"),
        ("{key: a, rate_limit: {unlimited: true, replaces: [{name: ''}]}}", "3:56:"
         f' descriptors[0].rate_limit.replaces[0].name: found "", {TEXT}; write the name of the rate_limit it replaces,'
         " or remove the entry"),
        ("{key: a, rate_limit: {unlimited: true, name: 5, replaces: [{name: b}, {name: '5'}]}}", "3:76:"
         ' descriptors[0].rate_limit.replaces[1].name: found "5", the name of the same rate_limit, expected the name of'
         " another; remove it, or correct one of the two names"),
        (f"{{key: a, {UNLIMITED}, burst: 5}}", "3:45: descriptors[0].burst: found burst of a limit that lets all"
         " through, expected no burst; remove burst"),
        (f"{{key: a, {NONE_DAILY}, burst: 5}}", "3:61: descriptors[0].burst: found burst of a limit that lets nothing"
         " through, expected no burst; remove burst"),
        (f"{{key: a, {DAILY}, burst: 0}}", f"3:61: descriptors[0].burst: found 0, {COUNT}"),
        (f"{{key: a, {BUCKET}, burst: 5}}", "3:52: descriptors[0].burst: found burst beside bucket, expected bucket"
         " alone; remove it: bucket.capacity is the burst"),
        (f"{{key: a, {BUCKET}, {UNLIMITED}}}", "3:14: descriptors[0].bucket: found a bucket beside rate_limit, expected"
         " one of the two; remove one of them"),
        ("{key: a, bucket: {capacity: 0, refillRate: 1}}", f"3:23: descriptors[0].bucket.capacity: found 0, {COUNT}"),
        (f"{{key: a, {BUCKET}, algorithm: fixed_window}}", "3:52: descriptors[0].algorithm: found fixed_window for a"
         " bucket, expected token_bucket; remove algorithm, or give rate_limit in place of bucket: fixed_window counts"
         " requests in a unit"),
        (f"{{key: a, {BUCKET}, algorithm: token-bucket}}", '3:52: descriptors[0].algorithm: found "token-bucket",'
         f' {ALGORITHMS}; did you mean "token_bucket"?'),
        (f"{{key: a, {DAILY}, algorithm: 5}}", f"3:61: descriptors[0].algorithm: found 5, {ALGORITHMS}"),
        (f"{{key: a, {DAILY}, consistency: strict}}", "3:61: descriptors[0].consistency: found strict, expected it"
         " where the configuration of the sidecar has sync.members; list there who shares the limit, or let consistency"
         " be eventual"),
        (f"{{key: a, {DAILY}, consistency: locale}}", '3:61: descriptors[0].consistency: found "locale", expected'
         ' one of eventual, strict, local; did you mean "local"?'),
        (f"{{key: a, {DAILY}, max_debt: 0}}",
         "3:61: descriptors[0].max_debt: found 0, expected a whole number from 1 to 1024"),
        (f"{{key: a, {DAILY}, max_debt: 1025}}",
         "3:61: descriptors[0].max_debt: found 1025, expected a whole number from 1 to 1024"),
        (f"{{key: a, {DAILY}, charge: never}}", '3:61: descriptors[0].charge: found "never", expected one of admitted,'
         " reported, always"),
        (f"{{key: a, {DAILY}, retry_after: 5}}", "3:61: descriptors[0].retry_after: found 5, expected true or false"),
        (f"{{key: a, {DAILY}, body: ''}}",
         '3:61: descriptors[0].body: found "", expected text of 1 to 16384 bytes'),
        ("{key: a, descriptors: [{key: b, descriptors: [{key: ''}]}]}", "3:52:"
         f' descriptors[0].descriptors[0].descriptors[0].key: found "", {TEXT}; {ADD_KEY}'),
    ],
)  # fmt: skip
def test_a_mistake_in_a_descriptor_is_told_with_its_place_and_its_fix(
    tmp_path: Path, descriptor: str, line: str
) -> None:
    assert rules_errors(tmp_path, f"domain: d\ndescriptors:\n  - {descriptor}\n") == [f"rules.yaml:{line}"]


OF_A_LIMIT = {
    "algorithm": "fixed_window",
    "burst": "5",
    "consistency": "local",
    "max_debt": "5",
    "wait": "250ms",
    "charge": "always",
    "retry_after": "true",
    "body": "Later.",
}


@pytest.mark.parametrize("key", OF_A_LIMIT)
def test_a_key_of_ours_without_a_limit_does_nothing_and_is_a_mistake(tmp_path: Path, key: str) -> None:
    text = f"domain: d\ndescriptors:\n  - {{key: a, {key}: {OF_A_LIMIT[key]}}}\n"
    assert rules_errors(tmp_path, text) == [
        f"rules.yaml:3:14: descriptors[0].{key}: found {key} of a descriptor without a limit, expected rate_limit or"
        f" bucket beside it; add one, or remove {key}"
    ]


@pytest.mark.parametrize("key", OF_A_LIMIT)
def test_a_key_of_ours_beside_unlimited_does_nothing_and_is_a_mistake(tmp_path: Path, key: str) -> None:
    text = f"domain: d\ndescriptors:\n  - {{key: a, {key}: {OF_A_LIMIT[key]}, {UNLIMITED}}}\n"
    assert rules_errors(tmp_path, text) == [
        f"rules.yaml:3:14: descriptors[0].{key}: found {key} of a limit that lets all through, expected no {key};"
        f" remove {key}"
    ]


@pytest.mark.parametrize("key", ["burst", "max_debt", "wait", "charge", "retry_after"])
def test_a_key_that_says_how_to_admit_does_nothing_where_nothing_is_admitted(tmp_path: Path, key: str) -> None:
    text = f"domain: d\ndescriptors:\n  - {{key: a, {key}: {OF_A_LIMIT[key]}, {NONE_DAILY}}}\n"
    assert rules_errors(tmp_path, text) == [
        f"rules.yaml:3:14: descriptors[0].{key}: found {key} of a limit that lets nothing through, expected no {key};"
        f" remove {key}"
    ]


@pytest.mark.parametrize("key", ["burst", "max_debt"])
@pytest.mark.parametrize(
    ("algorithm", "defaults", "says", "fix"),
    [
        ("algorithm: fixed_window, ", STANDARD, "fixed_window", "remove {}, or let algorithm be token_bucket"),
        ("algorithm: sliding_window, ", STANDARD, "sliding_window", "remove {}, or let algorithm be token_bucket"),
        (
            "",
            RuleDefaults(window=Window.FIXED),
            "fixed_window, the default here",
            "add algorithm: token_bucket, or remove {}",
        ),
    ],
)
def test_a_window_has_neither_burst_nor_debt(
    tmp_path: Path, key: str, algorithm: str, defaults: RuleDefaults, says: str, fix: str
) -> None:
    text = f"domain: d\ndescriptors:\n  - {{key: a, {key}: 5, {algorithm}{DAILY}}}\n"
    assert rules_errors(tmp_path, text, defaults) == [
        f"rules.yaml:3:14: descriptors[0].{key}: found {key} with the algorithm {says}, expected {key} with"
        f" token_bucket only; {fix.format(key)}"
    ]


@pytest.mark.parametrize(
    ("descriptors", "keys"),
    [
        # Not also that a window has no burst, nor that 0 requests admit nothing, nor that the second is there twice.
        (f"{{key: a, algorithm: fixed_window, burst: 5, {UNLIMITED}}}", ["[0].algorithm", "[0].burst"]),
        ("{key: a, burst: 5, rate_limit: {unit: day, requests_per_unit: no}}", ["[0].rate_limit.requests_per_unit"]),
        ("{value: x}, {value: x}", ["[0].key", "[1].key"]),
    ],
)
def test_one_cause_is_told_once(tmp_path: Path, descriptors: str, keys: list[str]) -> None:
    found = rules_errors(tmp_path, f"domain: d\ndescriptors: [{descriptors}]\n")
    assert [line.split(": ")[1] for line in found] == [f"descriptors{key}" for key in keys]


@pytest.mark.parametrize("body", ["x" * (MAX_BODY_BYTES + 1), "é" * (MAX_BODY_BYTES // 2 + 1)])
def test_a_body_has_a_bound(tmp_path: Path, body: str) -> None:
    text = f"domain: d\ndescriptors:\n  - {{key: a, {DAILY}, body: {body}}}\n"
    [line] = rules_errors(tmp_path, text)
    assert line.endswith("expected text of 1 to 16384 bytes")


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
      - key: b
        value: x*
      - key: b
        value: x*
    """
    file = tmp_path / "rules.yaml"
    fix = "expected each pair of key and value once a level; merge the two, or give one another value"
    assert rules_errors(tmp_path, text) == [
        f"rules.yaml:8:5: descriptors[2]: found the key and value of descriptors[1] in {file}:4 again, {fix}",
        f"rules.yaml:10:5: descriptors[3]: found the key and value of descriptors[0] in {file}:3 again, {fix}",
        f"rules.yaml:14:5: descriptors[5]: found the key and value of descriptors[4] in {file}:12 again, {fix}",
    ]


PARTS = "header, context_extension, path, method, source_address, principal"
NAMED_ONLY = (
    "expected name with header or context_extension only; remove it, or let from be header or context_extension"
)


@pytest.mark.parametrize(
    ("ext_authz", "line"),
    [
        ("{}",
         "2:1: ext_authz.descriptors: found nothing, expected a list, each item a mapping with the key entries"),
        ("{descriptors: []}",
         "2:13: ext_authz.descriptors: found 0 descriptors, expected 1 to 64 descriptors; add one, or remove"
         " ext_authz"),
        ("{descriptors: [{entries: []}]}",
         "2:28: ext_authz.descriptors[0].entries: found an empty list, expected entries; add one, or remove the"
         " descriptor: without entries it is not limited"),
        ("{descriptors: [{entries: [{from: path}]}]}",
         "2:38: ext_authz.descriptors[0].entries[0].key: found nothing, expected text that is not empty; write the key"
         " that a descriptor of the rules has"),
        ("{descriptors: [{entries: [{key: a, from: headers}]}]}",
         f'2:47: ext_authz.descriptors[0].entries[0].from: found "headers", expected one of {PARTS}; did you mean'
         ' "header"?'),
        ("{descriptors: [{entries: [{key: a}]}]}",
         f"2:38: ext_authz.descriptors[0].entries[0].from: found nothing, expected one of {PARTS}, or a value; add from"
         " or value"),
        ("{descriptors: [{entries: [{key: a, from: path, value: b}]}]}",
         "2:59: ext_authz.descriptors[0].entries[0].value: found value beside from, expected one of the two; remove one"
         " of them"),
        ("{descriptors: [{entries: [{key: a, from: path, name: b}]}]}",
         f"2:59: ext_authz.descriptors[0].entries[0].name: found name beside from: path, {NAMED_ONLY}"),
        ("{descriptors: [{entries: [{key: a, value: b, name: c}]}]}",
         f"2:57: ext_authz.descriptors[0].entries[0].name: found name without from, {NAMED_ONLY}"),
        ('{descriptors: [{entries: [{key: a, from: header, name: ""}]}]}',
         '2:61: ext_authz.descriptors[0].entries[0].name: found "", expected text that is not empty; write the name, or'
         " remove the key"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_mapping_is_told_with_its_place_and_its_fix(tmp_path: Path, ext_authz: str, line: str) -> None:
    assert rules_errors(tmp_path, f"domain: a\next_authz: {ext_authz}") == [f"rules.yaml:{line}"]


def test_a_mapping_has_no_more_descriptors_than_are_matched_in_a_moment(tmp_path: Path) -> None:
    def text(descriptors: int) -> str:
        return f"domain: a\next_authz: {{descriptors: [{'{entries: [{key: a, from: path}]},' * descriptors}]}}"

    rules_of(tmp_path, text(64))
    [line] = rules_errors(tmp_path, text(65))
    assert line.endswith("found 65 descriptors, expected 1 to 64 descriptors")


def test_one_domain_has_one_mapping_and_one_of_them_is_the_default(tmp_path: Path) -> None:
    mapping = "ext_authz: {default: true, descriptors: [{entries: [{key: a, from: path}]}]}"
    first, second = (write(tmp_path / f"{name}.yaml", f"domain: {name}\n{mapping}") for name in ("a", "b"))
    again = write(tmp_path / "c.yaml", f"domain: a\n{mapping}")
    with pytest.raises(ConfigError) as error:
        rules(first, second, again, merge_domains=True)
    assert lines(error, tmp_path) == [
        f'b.yaml:2:13: ext_authz.default: found true, as in {first}:2 for "a", expected it for one domain; remove one'
        " of the two",
        f"c.yaml:2:1: ext_authz: found a second mapping, beside that in {first}:2, expected one a domain; put the"
        " descriptors of both into one",
    ]
