"""Matching, and the names that buckets have on every replica."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit_sidecar.crdt.limit import TokenBucketLimit
from ratelimit_sidecar.limiter.key import (
    BUCKET_TYPES,
    DEFAULT_RULE,
    EXACT,
    KEY_ONLY,
    LOCAL,
    OVERRIDE,
    OVERRIDE_LIMIT,
    PATTERN,
    TOKEN_BUCKET,
    WILDCARD_VALUE,
    KeyEntry,
    decode_bucket_key,
    encode_bucket_key,
)
from ratelimit_sidecar.limiter.rules import Consistency, Rule, RuleNode, Rules

LIMIT = TokenBucketLimit(1, 1_000_000, 1)

texts = st.text(max_size=5) | st.text(min_size=127, max_size=130)
kinds = st.sampled_from([EXACT, KEY_ONLY, DEFAULT_RULE, WILDCARD_VALUE, PATTERN, OVERRIDE, OVERRIDE_LIMIT])
key_entries = st.builds(KeyEntry, kinds, texts, texts)


def make_rule(name: str, consistency: Consistency = Consistency.EVENTUAL) -> RuleNode:
    return RuleNode(Rule(name, LIMIT, consistency=consistency))


@given(st.sampled_from(sorted(BUCKET_TYPES)), texts, st.lists(key_entries, max_size=4))
def test_a_bucket_key_reads_back_as_it_was_written(bucket_type: int, domain: str, entries: list[KeyEntry]) -> None:
    assert decode_bucket_key(encode_bucket_key(bucket_type, domain, entries)) == (bucket_type, domain, entries)


@given(st.binary(max_size=40))
def test_bytes_that_are_no_bucket_key_are_refused_with_value_error(name: bytes) -> None:
    try:
        bucket_type, domain, entries = decode_bucket_key(name)
    except ValueError:
        return
    assert len(encode_bucket_key(bucket_type, domain, entries)) <= len(name)


def test_keys_that_join_to_the_same_text_have_different_buckets() -> None:
    ab_c = encode_bucket_key(TOKEN_BUCKET, "d", [KeyEntry(EXACT, "a_b", "c")])
    a_bc = encode_bucket_key(TOKEN_BUCKET, "d", [KeyEntry(EXACT, "a", "b_c")])
    assert ab_c != a_bc


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([("agent", "vip")], "exact"),
        ([("agent", "other")], "key only"),
        ([("agent", "vip"), ("path", "/a")], "deeper"),
        ([("agent", "other"), ("path", "/a")], None),
        ([("agent", "vip"), ("path", "/a"), ("x", "y")], None),
        ([("path", "/a")], None),
    ],
)
def test_exact_wins_over_key_only_and_depth_must_equal(entries: list[tuple[str, str]], expected: str | None) -> None:
    vip = RuleNode(Rule("exact", LIMIT), key_only={"path": make_rule("deeper")})
    rules = Rules({"api": RuleNode(exact={("agent", "vip"): vip}, key_only={"agent": make_rule("key only")})})
    match = rules.match("api", entries)
    assert (match.rule.name if match else None) == expected


def test_the_rule_of_a_bucket_is_found_again_from_its_name() -> None:
    rules = Rules(
        {"api": RuleNode(exact={("a", "1"): make_rule("one")}, key_only={"a": make_rule("each")})},
        default_rule=Rule("default_rule", LIMIT),
    )
    for domain, entries in (("api", [("a", "1")]), ("api", [("a", "2")]), ("api", [("b", "")]), ("new", [("a", "1")])):
        match = rules.match(domain, entries)
        assert match is not None
        assert rules.rule_of_key(match.bucket_key) is match.rule


def test_a_peer_that_names_a_rule_unknown_or_local_here_gets_no_limit() -> None:
    rules = Rules({"api": RuleNode(key_only={"a": make_rule("local", Consistency.LOCAL)})})
    for entry in (KeyEntry(KEY_ONLY, "a", "1"), KeyEntry(EXACT, "a", "1"), KeyEntry(DEFAULT_RULE, "a", "1")):
        for bucket_type in (TOKEN_BUCKET, TOKEN_BUCKET | LOCAL):
            assert rules.replicated_limit_of_key(encode_bucket_key(bucket_type, "api", [entry])) is None
    assert (
        rules.replicated_limit_of_key(encode_bucket_key(TOKEN_BUCKET, "other", [KeyEntry(KEY_ONLY, "a", "1")])) is None
    )


def test_every_rule_is_listed_once() -> None:
    rules = Rules(
        {
            "api": RuleNode(
                exact={("a", "1"): make_rule("one")}, key_only={"a": RuleNode(key_only={"b": make_rule("two")})}
            )
        },
        default_rule=Rule("default_rule", LIMIT),
    )
    assert sorted(rule.name for rule in rules) == ["default_rule", "one", "two"]


def test_the_digest_is_of_the_shared_rules_in_any_order() -> None:
    one, two, local = make_rule("one"), make_rule("two"), make_rule("three", Consistency.LOCAL)
    rules = Rules({"api": RuleNode(key_only={"a": one, "b": two})})
    same = Rules({"api": RuleNode(key_only={"c": local, "b": two, "a": one})})
    assert rules.digest == same.digest != 0
    others = [
        Rules({"api": RuleNode(key_only={"a": one})}),
        Rules({"api": RuleNode(key_only={"a": one, "b": RuleNode(Rule("two", TokenBucketLimit(2, 1_000_000, 1)))})}),
        Rules({"api": RuleNode(key_only={"a": one, "b": make_rule("two", Consistency.STRICT)})}),
        Rules({"api": RuleNode(key_only={"a": one, "b": two})}, override_consistency=Consistency.LOCAL),
    ]
    assert len({rules.digest, *[other.digest for other in others]}) == 5


@pytest.mark.parametrize("consistency", Consistency)
def test_rules_know_whether_one_of_them_is_strict(consistency: Consistency) -> None:
    deep = Rules({"api": RuleNode(key_only={"a": RuleNode(key_only={"b": make_rule("b", consistency)})})})
    default_rule = Rules(default_rule=Rule("default_rule", LIMIT, consistency=consistency))
    assert deep.has_strict == default_rule.has_strict == (consistency is Consistency.STRICT)


ORDERED = Rules(
    {
        "api": RuleNode(
            exact={("plan", "free"): RuleNode(key_only={"user": make_rule("free")})},
            key_only={"user": RuleNode(key_only={"path": make_rule("path"), "plan": make_rule("plan")})},
        )
    }
)


@pytest.mark.parametrize(
    ("pairs", "ordered"),
    [
        ({"user": "ada", "plan": "free"}, ["plan", "user"]),
        ({"user": "ada", "plan": "gold"}, ["user", "plan"]),
        ({"path": "/", "user": "ada"}, ["user", "path"]),
        # No rule is for these.
        ({"user": "ada"}, ["user"]),
        ({"user": "ada", "path": "/", "plan": "free"}, ["path", "plan", "user"]),
    ],
)
def test_pairs_without_an_order_are_put_into_that_of_a_rule(pairs: dict[str, str], ordered: list[str]) -> None:
    for way in (list(pairs.items()), list(reversed(pairs.items()))):
        assert ORDERED.in_order("api", way) == [(key, pairs[key]) for key in ordered]


def test_the_order_of_very_many_pairs_is_looked_for_no_longer_than_the_bound() -> None:
    node = RuleNode()
    for _ in range(3):
        node = RuleNode(key_only={f"key{number}": node for number in range(20)})
    pairs = [(f"key{number}", "") for number in range(20)]
    assert Rules({"api": node}).in_order("api", pairs) == sorted(pairs)
