"""`ratelimit-sidecar explain`: one request, or many from a trace."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from ratelimit_sidecar.cli.explain import explain
from ratelimit_sidecar.cli.trace_file import MAX_LINE_BYTES, BadLine, parse_line

RULES = """
domain: shop
descriptors:
  - key: plan
    value: go*
    descriptors:
      - {key: user, rate_limit: {unit: minute, requests_per_unit: 20}}
  - {key: plan, value: a*}
  - {key: plan, value: "*d"}
  - {key: user, value: eve, rate_limit: {name: eve, unit: hour, requests_per_unit: 2}}
  - {key: user, value: bob, shadow_mode: true, rate_limit: {unit: hour, requests_per_unit: 1}}
  - {key: path, value: /api/*, share_threshold: true, rate_limit: {unit: hour, requests_per_unit: 3}}
  - {key: path, rate_limit: {unlimited: true}}
  - {key: vip, rate_limit: {replaces: [{name: eve}], unit: hour, requests_per_unit: 100}}
"""


class Explain:
    """Runs the command over a folder with one rules file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rules = folder / "rules.yaml"
        self.rules.write_text(RULES)

    def run(self, *arguments: str, stdin: bytes | None = None) -> Result:
        return CliRunner().invoke(explain, ["--rules", str(self.rules), *arguments], stdin)

    def text(self, *arguments: str) -> str:
        result = self.run(*arguments)
        assert result.exit_code == 0, result.stderr
        return result.stdout

    def json(self, *arguments: str) -> Any:
        return json.loads(self.text("--format", "json", *arguments))

    def descriptor(self, descriptor: str) -> Any:
        (only,) = self.json("shop", descriptor)["descriptors"]
        return only

    def trace(self, *lines: dict[str, object] | str) -> str:
        file = self.folder / "trace.jsonl"
        file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        return str(file)


@pytest.fixture
def command(tmp_path: Path) -> Explain:
    return Explain(tmp_path)


def tried(level: Any) -> list[tuple[str, str | None, str]]:
    return [(attempt["way"], attempt["pattern"], attempt["result"]) for attempt in level["tried"]]


def test_it_says_level_by_level_what_was_tried_and_what_matched(command: Explain) -> None:
    descriptor = command.descriptor("plan=gold,user=eve")
    first, second = descriptor["levels"]
    assert (first["key"], first["value"], first["match"]) == ("plan", "gold", "wildcard")
    assert tried(first) == [
        ("exact", None, "no such rule"),
        ("wildcard", "go*", "matches"),
        ("wildcard", "a*", "does not fit"),
        ("wildcard", "*d", "fits too, but comes later"),
        ("key", None, "no such rule"),
    ]
    assert (second["match"], tried(second)) == ("key", [("exact", None, "no such rule"), ("key", None, "matches")])


def test_the_rule_its_bucket_and_the_answer_of_a_full_bucket_are_shown(command: Explain) -> None:
    descriptor = command.descriptor("plan=gold,user=eve")
    assert descriptor["rule"] == "shop.plan_go*.user"
    assert descriptor["bucket"] == {
        "name": "shop / plan=gold / user=eve",
        "algorithm": "token_bucket",
        "capacity": 20,
        "consistency": "eventual",
        "refill_per_second": pytest.approx(1 / 3),
    }
    assert (descriptor["answer"], descriptor["remaining"], descriptor["reset_in_seconds"]) == ("OK", 19, 3)


def test_an_exact_pair_is_shown_with_what_comes_after_it(command: Explain) -> None:
    command.rules.write_text(RULES + "  - {key: user}\n  - {key: user, value: e*}\n")
    (level,) = command.descriptor("user=eve")["levels"]
    assert tried(level) == [
        ("exact", None, "matches"),
        ("wildcard", "e*", "fits too, but comes later"),
        ("key", None, "fits too, but comes later"),
    ]


def test_a_shared_bucket_says_so(command: Explain) -> None:
    assert command.descriptor("path=/api/a")["bucket"]["name"] == "shop / path=/api/* (all values share it)"


def test_an_unlimited_rule_has_no_bucket(command: Explain) -> None:
    descriptor = command.descriptor("path=/")
    assert (descriptor["rule"], descriptor["bucket"], descriptor["answer"]) == ("shop.path", None, "OK")


@pytest.mark.parametrize(
    ("domain", "descriptor", "why"),
    [
        ("nowhere", "user=eve", "no rules for the domain nowhere; there are rules for: shop"),
        ("shop", "user=ada", "nothing matches user=ada"),
        ("shop", "plan=gold,host=a", "nothing matches host=a"),
        ("shop", "plan=gold", "the rules go deeper: they have limits for an entry more, with the key user"),
        ("shop", "plan=abc", "the rules name it, but set no limit"),
        ("shop", "user=eve,host=a", "the rules end before host=a"),
    ],
)
def test_it_says_why_nothing_is_limited(command: Explain, domain: str, descriptor: str, why: str) -> None:
    answer = command.json(domain, descriptor)
    assert answer["answer"] == "OK"
    assert answer["descriptors"][0]["why_unlimited"] == why
    assert f"limit    none: {why}" in command.text(domain, descriptor)


def test_where_nothing_matches_the_keys_are_named_that_rules_have_there(command: Explain) -> None:
    text = command.text("shop", "usr=eve")
    assert "nothing matches; the rules here have the keys: path, plan, user, vip" in text


def test_many_patterns_that_do_not_fit_are_counted(command: Explain) -> None:
    more = "".join(f"  - {{key: host, value: h{number}*}}\n" for number in range(30))
    command.rules.write_text(RULES + more)
    (level,) = command.descriptor("host=x")["levels"]
    assert level["patterns_that_do_not_fit"] == 30
    assert len(level["tried"]) == 7
    assert "25 more values with * do not fit" in command.text("shop", "host=x")


def test_several_descriptors_are_one_request_in_which_rules_replace_each_other(command: Explain) -> None:
    answer = command.json("shop", "user=eve", "vip=yes")
    assert [descriptor["replaced"] for descriptor in answer["descriptors"]] == [True, False]
    assert "another descriptor's rule replaces this one" in command.text("shop", "user=eve", "vip=yes")


def test_a_rule_that_denies_everything_is_shown_to_do_so(command: Explain) -> None:
    command.rules.write_text("domain: shop\ndescriptors: [{key: a, rate_limit: {unit: day, requests_per_unit: 0}}]")
    text = command.text("shop", "a=1")
    assert "0 per day: denies everything" in text
    assert "answer: OVER_LIMIT" in text


def test_text_shows_the_way_in_marks(command: Explain) -> None:
    lines = command.text("shop", "plan=gold,user=eve").splitlines()
    assert [line.split()[1:] for line in lines if line.strip().startswith("->")] == [
        ["plan=go*", "matches"],
        ["user,", "with", "any", "value", "matches"],
    ]
    assert "  rule     shop.plan_go*.user" in lines
    assert "  limit    token bucket: holds 20, refills at 20 per minute (one every 3 s)" in lines
    assert "  bucket   shop / plan=gold / user=eve" in lines
    assert "  answer   OK, 19 remaining, reset in 3 s" in lines


@pytest.mark.parametrize(("algorithm", "words"), [("fixed_window", "fixed window"), ("sliding_window", "sliding")])
def test_the_configuration_gives_the_algorithm(command: Explain, algorithm: str, words: str) -> None:
    config = command.folder / "sidecar.yaml"
    config.write_text(f"algorithm: {algorithm}")
    assert f"{words}" in command.text("--config", str(config), "shop", "user=eve")
    bucket = command.json("--config", str(config), "shop", "user=eve")["descriptors"][0]["bucket"]
    assert (bucket["algorithm"], bucket["window_seconds"]) == (algorithm, 3600)


def test_the_configuration_gives_rules_and_the_bucket_for_all_else(command: Explain) -> None:
    config = command.folder / "sidecar.yaml"
    config.write_text("rules: [rules.yaml]\nbucket: {capacity: 7, refillRate: 2}")
    result = CliRunner().invoke(explain, ["--config", str(config), "--format", "json", "shop", "user=ada"])
    (descriptor,) = json.loads(result.stdout)["descriptors"]
    assert (descriptor["rule"], descriptor["bucket"]["capacity"], descriptor["remaining"]) == ("bucket", 7, 6)


def test_the_environment_counts_as_it_does_for_serve(command: Explain) -> None:
    other = command.folder / "other.yaml"
    other.write_text("domain: shop\ndescriptors: [{key: host, rate_limit: {unit: day, requests_per_unit: 5}}]")
    arguments = ["--rules", str(command.rules), "--rules", str(other), "shop", "host=a"]
    assert CliRunner().invoke(explain, arguments).exit_code == 2
    merged = CliRunner().invoke(explain, arguments, env={"MERGE_DOMAIN_CONFIG": "true"})
    assert "  rule     shop.host" in merged.stdout


def test_a_comma_and_an_equals_sign_can_be_in_a_value(command: Explain) -> None:
    assert command.descriptor(r"user=a\,b=c\\,x=")["entries"] == [["user", "a,b=c\\"], ["x", ""]]


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("shop",),
        ("shop", "user"),
        ("shop", "user=eve,"),
        ("shop", "=eve"),
        ("", "user=eve"),
        ("--trace", "-", "shop", "user=eve"),
        ("--trace", "/no/such/file"),
    ],
)
def test_arguments_that_make_no_sense_end_with_2(command: Explain, arguments: Sequence[str]) -> None:
    result = command.run(*arguments)
    assert result.exit_code == 2
    assert "Error: " in result.stderr


def test_no_rules_at_all_end_with_2() -> None:
    result = CliRunner().invoke(explain, ["shop", "user=eve"])
    assert result.exit_code == 2
    assert "no rules" in result.stderr


def test_broken_rules_are_reported_and_end_with_2(command: Explain) -> None:
    command.rules.write_text("domain: shop\ndescriptors: [{value: x}]")
    result = command.run("shop", "user=eve")
    assert result.exit_code == 2
    assert f"{command.rules}:2:15: descriptors[0].key" in result.stderr
    assert result.stdout == ""


def ask(at: object, *descriptors: list[list[str]], **more: object) -> dict[str, object]:
    return {"time": at, "domain": "shop", "descriptors": list(descriptors), **more}


EVE, ADA, BOB = ([["user", name]] for name in ("eve", "ada", "bob"))


def test_a_replay_says_who_would_have_been_denied_and_when_first(command: Explain) -> None:
    trace = command.trace(
        ask("2026-01-01T00:00:00Z", EVE),
        ask("2026-01-01T00:00:01Z", EVE),
        ask("2026-01-01T00:00:02Z", EVE, [["path", "/x"]]),
        ask("2026-01-01T00:00:03Z", EVE),
        ask("2026-01-01T00:30:02Z", EVE),
        ask("2026-01-01T00:30:03Z", ADA),
    )
    replayed = command.json("--trace", trace)
    assert replayed["requests"] == {
        "asked": 6,
        "denied": 2,
        "first_denied": "2026-01-01T00:00:02.000Z",
        "in_shadow_mode": False,
    }
    assert (replayed["from"], replayed["to"]) == ("2026-01-01T00:00:00.000Z", "2026-01-01T00:30:03.000Z")
    assert replayed["unlimited_descriptors"] == 1
    assert [(rule["rule"], rule["asked"], rule["denied"]) for rule in replayed["rules"]] == [
        ("shop.user_eve", 5, 2),
        ("shop.path", 1, 0),
    ]
    (denied,) = replayed["denied_descriptors"]
    assert denied == {
        "domain": "shop",
        "entries": [["user", "eve"]],
        "denied": 2,
        "first_denied": "2026-01-01T00:00:02.000Z",
    }
    assert replayed["broken_lines"] == 0


def test_a_replay_in_text_is_a_summary_and_two_tables(command: Explain) -> None:
    text = command.text("--trace", command.trace(*(ask(second, EVE, BOB) for second in range(4))))
    assert text.splitlines() == [
        "4 requests from 1970-01-01T00:00:00.000Z to 1970-01-01T00:00:03.000Z: 3 would have been denied (75.0%)",
        "the first at 1970-01-01T00:00:01.000Z",
        "",
        "rule                         descriptors  denied         first denied",
        "shop.user_bob (shadow mode)            4       3  75.0%  1970-01-01T00:00:01.000Z",
        "shop.user_eve                          4       2  50.0%  1970-01-01T00:00:02.000Z",
        "",
        "descriptor      denied  first denied",
        "shop: user=bob       3  1970-01-01T00:00:01.000Z",
        "shop: user=eve       2  1970-01-01T00:00:02.000Z",
    ]


def test_a_replay_enforces_what_is_in_global_shadow_mode(command: Explain) -> None:
    config = command.folder / "sidecar.yaml"
    config.write_text("answers: {shadow_mode: true}")
    text = command.text("--config", str(config), "--trace", command.trace(*(ask(0, EVE) for _ in range(3))))
    assert "1 would have been denied" in text
    assert "as it is now none would be: global shadow mode is on" in text


def test_a_replay_counts_hits_and_takes_descriptors_as_protobuf_writes_them(command: Explain) -> None:
    entries = [{"key": "user", "value": "eve"}]
    trace = command.trace(
        ask(0, EVE, hits=3),
        ask(0, {"entries": entries, "hitsAddend": 3}),  # type: ignore[arg-type]
        ask(0, {"entries": entries, "limit": {"requestsPerUnit": 0, "unit": "DAY"}}),  # type: ignore[arg-type]
        ask(0, EVE, hits=2),
    )
    assert command.json("--trace", trace)["requests"]["denied"] == 3


@pytest.fixture
def far_from_utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("far_from_utc")
def test_times_are_numbers_of_seconds_or_iso_8601_with_or_without_a_zone() -> None:
    expected = 1_767_225_600_250_000
    for written in (
        "1767225600.25",
        '"2026-01-01T00:00:00.25"',
        '"2026-01-01T01:00:00.25+01:00"',
        '"2026-01-01T00:00:00.25Z"',
    ):
        recorded = parse_line(f'{{"time": {written}, "domain": "shop", "descriptors": []}}'.encode())
        assert recorded.at_us == expected


def test_a_request_older_than_the_one_before_counts_at_its_time_and_is_told_of(command: Explain) -> None:
    trace = command.trace(ask(100, EVE), ask(100, EVE), ask(90, EVE))
    replayed = command.json("--trace", trace)
    assert (replayed["late_requests"], replayed["requests"]["denied"]) == (1, 1)
    assert replayed["requests"]["first_denied"] == replayed["to"] == "1970-01-01T00:01:40.000Z"
    assert "1 were older than the one before them" in command.text("--trace", trace)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"domain": "shop", "descriptors": []}', "no time"),
        ('{"time": 0, "domain": "shop"}', "descriptors is no list"),
        ('{"time": 0, "domain": "shop", "descriptors": [], "hit": 1}', "unknown key 'hit'"),
        ('{"time": "noon", "domain": "shop", "descriptors": []}', "neither a number of seconds nor ISO 8601"),
        ('{"time": true, "domain": "shop", "descriptors": []}', "neither a number of seconds nor ISO 8601"),
        ('{"time": -1, "domain": "shop", "descriptors": []}', "before 1970"),
        ('{"time": 1e999999999, "domain": "shop", "descriptors": []}', "after 9999"),
        ('{"time": NaN, "domain": "shop", "descriptors": []}', "after 9999"),
        ('{"time": 0, "domain": "shop", "descriptors": [[["user", 1]]]}', 'no [key, value] of texts: ["user", 1]'),
        ('{"time": 0, "domain": "shop", "descriptors": [{"entry": []}]}', "no rate limit request"),
        ('{"time": 0, "domain": "shop", "descriptors": ["user"]}', "neither a list of [key, value] nor an object"),
        ('{"time": 0, "domain": 1, "descriptors": []}', "no rate limit request"),
        ('{"time": 0, "domain": "shop", "descriptors": [], "hits": -1}', "no rate limit request"),
        ('{"time": 0, "domain": "shop", "descriptors": [], "hits": 1.5}', "no rate limit request"),
        ('{"time": 0, "domain": "", "descriptors": [[["user", "eve"]]]}', "domain must not be empty"),
        ('{"time": 0, "domain": "shop", "descriptors": []}', "descriptor list must not be empty"),
    ],
)
def test_a_broken_line_is_reported_with_its_number_and_the_rest_is_replayed(
    command: Explain, line: str, why: str
) -> None:
    trace = command.trace(ask(0, EVE), "", line, ask(0, EVE), ask(0, EVE))
    result = command.run("--trace", trace, "--format", "json")
    assert result.exit_code == 2
    (report,) = result.stderr.splitlines()
    assert report.startswith(f"{trace}:3: ")
    assert why in report
    replayed = json.loads(result.stdout)
    assert (replayed["broken_lines"], replayed["requests"]["asked"], replayed["requests"]["denied"]) == (1, 3, 1)


def test_of_many_broken_lines_the_first_are_shown(command: Explain) -> None:
    result = command.run("--trace", command.trace(*["x"] * 50))
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 21
    assert "30 more broken lines" in result.stderr
    assert result.stdout == "no requests\n"


def test_a_line_too_long_for_memory_is_skipped(command: Explain) -> None:
    trace = command.trace(ask(0, EVE), "x" * (3 * MAX_LINE_BYTES), ask(0, EVE))
    result = command.run("--trace", trace, "--format", "json")
    assert result.stderr == f"{trace}:2: longer than 1048576 bytes\n"
    assert json.loads(result.stdout)["requests"]["asked"] == 2


def test_a_trace_can_come_from_stdin(command: Explain) -> None:
    lines = "\n".join(json.dumps(ask(0, EVE)) for _ in range(3))
    result = command.run("--trace", "-", "--format", "json", stdin=lines.encode())
    assert (result.exit_code, json.loads(result.stdout)["requests"]["denied"]) == (0, 1)


def test_a_terminal_is_shown_how_far_it_is(command: Explain) -> None:
    trace = command.trace(*(ask(second, EVE) for second in range(3_000)))
    ours, theirs = pty.openpty()
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        finished = subprocess.run(
            [sys.executable, "-m", "ratelimit_sidecar", "explain", "--rules", str(command.rules), "--trace", trace],
            stdout=subprocess.PIPE,
            stderr=theirs,
            check=True,
        )
        os.close(theirs)
        shown = terminal.read(65_536).decode()
    assert "replaying" in shown
    assert "100%" in shown
    assert finished.stdout.startswith(b"3,000 requests ")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


KEYS = ("time", "domain", "descriptors", "hits", "check", "bucket_id", "requests", "seconds")


@given(st.fixed_dictionaries({}, optional=dict.fromkeys(KEYS, json_values)))
def test_any_json_is_a_request_or_a_bad_line(item: dict[str, object]) -> None:
    with contextlib.suppress(BadLine):
        parse_line(json.dumps(item).encode())


@given(json_values)
def test_any_descriptor_is_one_or_a_bad_line(descriptor: object) -> None:
    with contextlib.suppress(BadLine):
        parse_line(json.dumps({"time": 0, "domain": "d", "descriptors": [descriptor]}).encode())


@given(st.binary(max_size=40))
def test_any_bytes_are_a_request_or_a_bad_line(line: bytes) -> None:
    with contextlib.suppress(BadLine):
        parse_line(line)


def test_a_strict_rule_is_explained_without_the_members_that_share_it(tmp_path: Path) -> None:
    explained = Explain(tmp_path)
    explained.rules.write_text(
        "domain: d\ndescriptors: [{key: a, consistency: strict, rate_limit: {unit: day, requests_per_unit: 7}}]\n"
    )
    assert "7" in explained.text("d", "a=b")
    (tmp_path / "sidecar.yaml").write_text("node: {id: a}")
    refused = explained.run("--config", str(tmp_path / "sidecar.yaml"), "d", "a=b")
    assert refused.exit_code == 2
    assert "sync.members" in refused.stderr


def test_it_says_that_a_request_may_wait_and_does_not_wait_itself(tmp_path: Path) -> None:
    explained = Explain(tmp_path)
    explained.rules.write_text(
        "domain: d\ndescriptors:\n"
        "  - {key: a, consistency: strict, wait: 250ms, rate_limit: {unit: day, requests_per_unit: 7}}\n"
    )
    assert "a request may wait 250 ms for tokens of other members; here it does not" in explained.text("d", "a=b")


EXT_AUTHZ = """
ext_authz:
  descriptors:
    - entries: [{key: user, from: header, name: X-User-Id}]
    - entries: [{key: path, from: path}]
"""


def check_request(explained: Explain, domain: str, headers: dict[str, str], path: str = "") -> str:
    http = {"headers": headers, "path": path}
    attributes = {"contextExtensions": {"domain": domain} if domain else {}, "request": {"http": http}}
    file = explained.folder / "check.json"
    file.write_text(json.dumps({"attributes": attributes}))
    return str(file)


def test_a_request_over_ext_authz_is_explained_by_the_descriptors_it_is_made_into(tmp_path: Path) -> None:
    explained = Explain(tmp_path)
    explained.rules.write_text(RULES + EXT_AUTHZ)
    file = check_request(explained, "shop", {"x-user-id": "eve"}, "/api/orders?page=1")
    assert explained.text("--check", file) == explained.text("shop", "user=eve", "path=/api/orders")


@pytest.mark.parametrize(
    ("domain", "headers", "why"),
    [
        ("shop", {"x-user": "eve"}, "not limited: it lacks what each descriptor of 'shop' is made from"),
        ("bar", {}, "not limited: it names the domain 'bar'; domains with ext_authz: shop"),
        ("", {}, "not limited: it names no domain, and there is no default one; domains with ext_authz: shop"),
    ],
)
def test_why_a_request_over_ext_authz_is_not_limited(
    tmp_path: Path, domain: str, headers: dict[str, str], why: str
) -> None:
    explained = Explain(tmp_path)
    explained.rules.write_text(RULES + EXT_AUTHZ)
    file = check_request(explained, domain, headers)
    assert explained.text("--check", file) == f"{why}\n"
    assert explained.json("--check", file) == {"unlimited": why}


def test_a_trace_may_have_requests_over_ext_authz_and_reports_of_quotas(tmp_path: Path) -> None:
    explained = Explain(tmp_path)
    explained.rules.write_text(RULES + EXT_AUTHZ)
    mapped = json.loads(Path(check_request(explained, "shop", {"x-user-id": "eve"}, "/")).read_text())
    unmapped = {"attributes": {"request": {"http": {"path": "/"}}, "contextExtensions": {"domain": "other"}}}
    trace = explained.trace(
        {"time": 100, "domain": "shop", "bucket_id": {"user": "eve"}, "requests": 1, "seconds": 10},
        *({"time": 100 + number, "check": mapped} for number in range(3)),
        {"time": 104, "check": unmapped},
        {"time": 110, "domain": "shop", "bucket_id": {"user": "eve"}, "requests": 4},
    )
    replayed = explained.json("--trace", trace)
    # Two an hour are eve's; one that no mapping is for passes.
    assert (replayed["requests"]["asked"], replayed["requests"]["denied"]) == (9, 6)
    assert replayed["late_requests"] == 0


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ({"time": 0, "check": {"attribute": 1}}, "no CheckRequest"),
        ({"time": 0, "check": {}, "domain": "shop"}, "unknown key 'domain'; known are time, check"),
        ({"time": 0, "domain": "shop", "bucket_id": {"user": "eve"}}, "requests is no whole number"),
        ({"time": 0, "domain": "shop", "bucket_id": {"user": 1}, "requests": 1}, "bucket_id is no object of texts"),
        ({"time": 0, "domain": "shop", "bucket_id": {}, "requests": 1, "seconds": 1.5}, "seconds is no whole number"),
    ],
)
def test_a_line_of_another_kind_that_is_none_is_told(command: Explain, line: dict[str, object], why: str) -> None:
    result = command.run("--trace", command.trace(line))
    assert result.exit_code == 2
    assert why in result.stderr


def test_what_is_no_check_request_is_told(tmp_path: Path) -> None:
    result = Explain(tmp_path).run("--check", "-", stdin=b'{"attribute": 1}')
    assert result.exit_code == 2
    assert "not a CheckRequest in JSON" in result.stderr
