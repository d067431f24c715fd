"""Who shares strict limits, and which limits can be strict."""

from __future__ import annotations

from pathlib import Path

import pytest
from config.builders import one_rule, rules_errors, rules_of, sidecar, sidecar_errors

from ratelimit_sidecar.config.rules_schema import RuleDefaults
from ratelimit_sidecar.config.sidecar_schema import MAX_EPOCH, MAX_MEMBERS, MAX_WEIGHT
from ratelimit_sidecar.crdt.shares import Membership
from ratelimit_sidecar.limiter.rules import Consistency, Window

STRICT = {"CRDT_ENGINE": "strict"}
DAILY = "rate_limit: {unit: day, requests_per_unit: 1}"
BUCKET = "bucket: {capacity: 1, refillRate: 1}"
WITH_MEMBERS = RuleDefaults(has_members=True)
STRICT_UNLESS_SAID = RuleDefaults(Consistency.STRICT, has_members=True)
A_MAPPING = "expected a mapping of node ids to weights, whole numbers, as in a: 1"
NAMES = "expected node ids, each 1 to 128 printable characters without spaces, in 255 bytes at most"


def test_without_members_nobody_shares_strict_limits(tmp_path: Path) -> None:
    config = sidecar(tmp_path, "node: {id: a}")
    assert config.membership is None
    assert not config.rule_defaults.has_members


def test_members_are_the_nodes_that_share_strict_limits_by_their_weights(tmp_path: Path) -> None:
    config = sidecar(tmp_path, "sync: {members: {a: 2, b: 1, c: 0}}", STRICT)
    assert config.membership == Membership(1, {"a": 2, "b": 1, "c": 0})
    assert config.rule_defaults == RuleDefaults(Consistency.STRICT, has_members=True)


def test_a_change_of_members_has_an_epoch_and_names_those_before(tmp_path: Path) -> None:
    config = sidecar(tmp_path, "sync: {members: {a: 1, b: 1}, epoch: 7, previous_members: {a: 1}}")
    assert config.membership == Membership(7, {"a": 1, "b": 1}, {"a": 1})


@pytest.mark.parametrize(
    ("sync", "line"),
    [
        ("members: [a, b]", f"1:8: sync.members: found a list, {A_MAPPING}"),
        ("members: {a: x}", f"1:8: sync.members: found a mapping, {A_MAPPING}"),
        ("members: {a: true}", f"1:8: sync.members: found a mapping, {A_MAPPING}"),
        ("members: {}", "1:8: sync.members: found an empty mapping, expected 1 to 256 nodes"),
        ("members: {two words: 1}", f'1:8: sync.members: found a mapping, {NAMES}; correct "two words"'),
        ("members: {a: 1, b: -1}",
         '1:8: sync.members: found a mapping, expected weights from 0 to 1000000; correct the one of "b"'),
        ("members: {a: 1000001}",
         '1:8: sync.members: found a mapping, expected weights from 0 to 1000000; correct the one of "a"'),
        ("members: {a: 0, b: 0}",
         "1:8: sync.members: found a mapping, expected a weight above 0; give at least one of them 1"),
        ("members: {a: 1}, epoch: 0", "1:25: sync.epoch: found 0, expected a whole number from 1 to 1000000000"),
        ("members: {a: 1}, epoch: 2", "1:1: sync.previous_members: found nothing, expected the members of epoch 1; add"
         " them: without them this sidecar would use its new share beside others that still use their old ones"),
        ("members: {a: 1}, previous_members: {b: 1}", "1:25: sync.previous_members: found members before epoch 1,"
         " expected an epoch above 1; let epoch be one more than it was with them"),
        ("members: {a: 1}, epoch: 2, previous_members: {b: x}",
         f"1:35: sync.previous_members: found a mapping, {A_MAPPING}"),
        ("epoch: 2",
         "1:8: sync.epoch: found epoch without members, expected sync.members beside it; add members, or remove epoch"),
        ("previous_members: {a: 1}", "1:8: sync.previous_members: found previous_members without members, expected"
         " sync.members beside it; add members, or remove previous_members"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_members_is_told_with_its_place_and_its_fix(tmp_path: Path, sync: str, line: str) -> None:
    assert sidecar_errors(tmp_path, f"sync: {{{sync}}}") == [f"sidecar.yaml:{line}"]


def test_as_many_members_as_a_mesh_may_have_are_taken_and_no_more(tmp_path: Path) -> None:
    def listed(count: int) -> str:
        members = ", ".join(f"{f'n{index}':->128}: {MAX_WEIGHT}" for index in range(count))
        return f"sync: {{members: {{{members}}}, epoch: {MAX_EPOCH}, previous_members: {{a: 1}}}}"

    membership = sidecar(tmp_path, listed(MAX_MEMBERS)).membership
    assert membership is not None
    assert len(membership.weights) == MAX_MEMBERS
    [line] = sidecar_errors(tmp_path, listed(MAX_MEMBERS + 1))
    assert "expected 1 to 256 nodes" in line


def test_a_member_whose_name_peers_would_not_take_is_refused(tmp_path: Path) -> None:
    assert sidecar(tmp_path, f"sync: {{members: {{{127 * 'é'}: 1}}}}").membership
    [line] = sidecar_errors(tmp_path, f"sync: {{members: {{{128 * 'é'}: 1}}}}")
    assert NAMES in line


def test_where_all_limits_are_strict_the_default_algorithm_must_be_one_that_can_be(tmp_path: Path) -> None:
    text = "algorithm: fixed_window\nsync: {members: {a: 1}}"
    assert sidecar_errors(tmp_path, text, STRICT) == [
        "sidecar.yaml:1:1: algorithm: found fixed_window of strict limits, expected token_bucket, which alone can be"
        " strict; remove it, or let CRDT_ENGINE be eventual"
    ]
    assert sidecar(tmp_path, text).membership


@pytest.mark.parametrize("limit", [DAILY, BUCKET, f"algorithm: token_bucket, {DAILY}"])
def test_a_token_bucket_can_be_strict(tmp_path: Path, limit: str) -> None:
    rule = one_rule(tmp_path, f"{{key: a, {limit}, consistency: strict}}", WITH_MEMBERS)
    assert rule.consistency is Consistency.STRICT
    assert one_rule(tmp_path, f"{{key: a, {limit}}}", STRICT_UNLESS_SAID).consistency is Consistency.STRICT


def test_a_bucket_can_be_strict_whatever_the_default_algorithm_is(tmp_path: Path) -> None:
    defaults = RuleDefaults(window=Window.FIXED, has_members=True)
    assert one_rule(tmp_path, f"{{key: a, {BUCKET}, consistency: strict}}", defaults).consistency is Consistency.STRICT


def test_a_rule_can_be_eventual_where_others_are_strict(tmp_path: Path) -> None:
    text = f"{{key: a, {DAILY}, algorithm: fixed_window, consistency: eventual}}"
    assert one_rule(tmp_path, text, STRICT_UNLESS_SAID).consistency is Consistency.EVENTUAL


def test_a_limit_that_a_request_brings_is_strict_where_all_are(tmp_path: Path) -> None:
    assert rules_of(tmp_path, "domain: d", STRICT_UNLESS_SAID).override_consistency is Consistency.STRICT


@pytest.mark.parametrize(
    ("descriptor", "defaults", "line"),
    [
        (f"{DAILY}, algorithm: sliding_window, consistency: strict", WITH_MEMBERS,
         "consistency: found strict with the algorithm sliding_window, expected strict with token_bucket only; let"
         " algorithm be token_bucket, or consistency eventual"),
        (f"{DAILY}, consistency: strict", RuleDefaults(window=Window.FIXED, has_members=True),
         "consistency: found strict with the algorithm fixed_window, the default here, expected strict with"
         " token_bucket only; let algorithm be token_bucket, or consistency eventual"),
        (f"{DAILY}, algorithm: fixed_window", STRICT_UNLESS_SAID,
         "algorithm: found fixed_window, of a strict limit, expected token_bucket, which alone can be strict; let"
         " algorithm be token_bucket, or add consistency: eventual"),
        (DAILY, RuleDefaults(Consistency.STRICT, Window.FIXED, has_members=True),
         "algorithm: found fixed_window, the default here, of a strict limit, expected token_bucket, which alone can be"
         " strict; let algorithm be token_bucket, or add consistency: eventual"),
        ("rate_limit: {unlimited: true}, consistency: strict", RuleDefaults(),
         "consistency: found consistency of a limit that lets all through, expected no consistency; remove"
         " consistency"),
    ],
)  # fmt: skip
def test_a_limit_that_cannot_be_strict_is_told_with_its_fix(
    tmp_path: Path, descriptor: str, defaults: RuleDefaults, line: str
) -> None:
    [told] = rules_errors(tmp_path, f"domain: d\ndescriptors:\n  - {{key: a, {descriptor}}}\n", defaults)
    assert told.partition("descriptors[0].")[2] == line


@pytest.mark.parametrize(
    ("wait", "wait_us"), [("1ms", 1_000), ("250ms", 250_000), ("1s", 1_000_000), ("1000ms", 1_000_000)]
)
def test_requests_of_a_strict_limit_may_wait(tmp_path: Path, wait: str, wait_us: int) -> None:
    assert (
        one_rule(tmp_path, f"{{key: a, {DAILY}, consistency: strict, wait: {wait}}}", WITH_MEMBERS).wait_us == wait_us
    )
    assert one_rule(tmp_path, f"{{key: a, {DAILY}, wait: {wait}}}", STRICT_UNLESS_SAID).wait_us == wait_us
    assert one_rule(tmp_path, f"{{key: a, {DAILY}}}", STRICT_UNLESS_SAID).wait_us == 0


@pytest.mark.parametrize(
    ("descriptor", "line"),
    [
        (f"{DAILY}, wait: 250ms",
         "wait: found wait with consistency eventual, expected wait with strict only; remove it, or let consistency be"
         " strict"),
        (f"{DAILY}, consistency: local, wait: 250ms",
         "wait: found wait with consistency local, expected wait with strict only; remove it, or let consistency be"
         " strict"),
        (f"{DAILY}, consistency: strict, wait: 250ms, shadow_mode: true",
         "wait: found wait beside shadow_mode, expected wait without shadow_mode; remove wait, or shadow_mode"),
        (f"{DAILY}, consistency: strict, wait: 250ms, quota_mode: true",
         "wait: found wait beside quota_mode, expected wait without quota_mode; remove wait, or quota_mode"),
        (f"{DAILY}, consistency: strict, wait: 250ms, charge: always",
         "wait: found wait beside charge: always, expected wait without charge; remove wait, or charge"),
        *[(f"{DAILY}, consistency: strict, wait: {wait}",
           f"wait: found {found}, expected a time of 1ms to 1s, such as 250ms")
          for wait, found in [("0ms", '"0ms"'), ("1001ms", '"1001ms"'), ("2s", '"2s"'), ("0.5s", '"0.5s"'),
                              ("250", "250"), ("-1ms", '"-1ms"'), ("soon", '"soon"'), ("true", "true")]],
    ],
)  # fmt: skip
def test_a_wait_that_cannot_be_is_told_with_its_place_and_its_fix(tmp_path: Path, descriptor: str, line: str) -> None:
    [told] = rules_errors(tmp_path, f"domain: d\ndescriptors:\n  - {{key: a, {descriptor}}}\n", WITH_MEMBERS)
    assert told.startswith("rules.yaml:3:")
    assert told.partition("descriptors[0].")[2] == line
