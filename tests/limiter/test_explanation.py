"""Explanations, where the command line does not reach."""

from __future__ import annotations

import pytest
from limiter.requests import NOW_US, OK

from ratelimit_sidecar.crdt.limit import TokenBucketLimit
from ratelimit_sidecar.limiter.explanation import MatchKind, Result, explain, readable_bucket_name
from ratelimit_sidecar.limiter.request import InvalidRequest
from ratelimit_sidecar.limiter.rules import JOINED, Consistency, Rule, RuleNode, Rules
from ratelimit_sidecar.limiter.settings import AnswerSettings
from ratelimit_sidecar.limiter.wildcard import WildcardSet

TEN_A_SECOND = TokenBucketLimit(10, 1_000_000, 10)


@pytest.mark.parametrize("consistency", Consistency)
def test_the_answer_is_that_of_a_whole_full_bucket_whoever_shares_it(consistency: Consistency) -> None:
    rule = Rule("api.user", TEN_A_SECOND, 10, consistency=consistency)
    for rules in (Rules({"api": RuleNode(key_only={"user": RuleNode(rule)})}), Rules(default_rule=rule)):
        for _ in range(2):
            (descriptor,) = explain(rules, AnswerSettings(), "api", [[("user", "eve")]], NOW_US).descriptors
            assert descriptor.match is not None
            assert descriptor.match.rule is rule
            assert (descriptor.status.code, descriptor.status.limit_remaining) == (OK, 9)


def test_a_bucket_is_named_by_what_tells_it_from_others() -> None:
    leaf = RuleNode(Rule("rule", TEN_A_SECOND))
    patterns = WildcardSet(
        [("/own/*", RuleNode(key_only={"user": leaf})), ("/*", RuleNode(key_only={"user": leaf}, shares_bucket=True))]
    )
    rules = Rules({"api": RuleNode(wildcards={"path": patterns}, exact={("a", "1"): leaf})})
    names = []
    for entries in ([("path", "/own/x"), ("user", "eve")], [("path", "/x"), ("user", "eve")], [("a", "1")]):
        match = rules.match("api", entries)
        assert match is not None
        names.append(readable_bucket_name(match.bucket_key))
    assert names == [
        "api / path=/own/x / user=eve",
        "api / path=/* (all values share it) / user=eve",
        "api / a=1",
    ]


def test_a_pattern_for_key_and_value_is_explained_as_one_for_values_is() -> None:
    leaf = RuleNode(Rule("rule", TEN_A_SECOND))
    rules = Rules({"api": RuleNode(wildcards={JOINED: WildcardSet([("user_b*", leaf), ("user*", leaf)])})})
    (descriptor,) = explain(rules, AnswerSettings(), "api", [[("user", "eve")]], NOW_US).descriptors
    [level] = descriptor.levels
    assert [(attempt.pattern, attempt.result) for attempt in level.attempts if attempt.way is MatchKind.WILDCARD] == [
        ("user_b*", Result.DOES_NOT_FIT),
        ("user*", Result.MATCHES),
    ]
    assert descriptor.match is not None
    assert readable_bucket_name(descriptor.match.bucket_key) == "api / user=eve"
    (descriptor,) = explain(rules, AnswerSettings(), "api", [[("plan", "x")]], NOW_US).descriptors
    assert descriptor.why_unlimited == "nothing matches plan=x"
    assert descriptor.levels[0].keys == ("user*", "user_b*")


def test_a_request_that_is_none_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="must not be empty"):
        explain(Rules(), AnswerSettings(), "api", [], NOW_US)
