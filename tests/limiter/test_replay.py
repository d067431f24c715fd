"""Replaying requests of the past: enforced, and bounded in memory."""

from __future__ import annotations

import pytest
from limiter.requests import NOW_US, OVER_LIMIT, decide, make_limiter, make_request

from ratelimit_sidecar.crdt.limit import TokenBucketLimit
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2 import RateLimitRequest
from ratelimit_sidecar.envoy_api.envoy.type.v3.ratelimit_unit_pb2 import RateLimitUnit
from ratelimit_sidecar.limiter.replay import Replay
from ratelimit_sidecar.limiter.rules import Consistency, Rule, RuleNode, Rules
from ratelimit_sidecar.limiter.settings import AnswerSettings
from ratelimit_sidecar.limiter.wildcard import WildcardSet

ONE_A_SECOND = TokenBucketLimit(1, 1_000_000, 1)
SECOND_US = 1_000_000


def request(*descriptors: dict[str, str]) -> RateLimitRequest:
    return RateLimitRequest.FromString(make_request(*descriptors))


def user(name: object) -> RateLimitRequest:
    return request({"user": str(name)})


def rules_of_users(*, shadow_mode: bool = False, limit: TokenBucketLimit = ONE_A_SECOND) -> Rules:
    return Rules({"api": RuleNode(key_only={"user": RuleNode(Rule("api.user", limit, shadow_mode=shadow_mode))})})


def test_it_denies_what_a_limiter_denies() -> None:
    rules = rules_of_users()
    replay, limiter = Replay(rules, AnswerSettings()), make_limiter(rules)
    instants = [NOW_US + step * 300_000 for step in range(50)]
    denied = [decide(limiter, make_request({"user": "eve"}), at_us).overall_code == OVER_LIMIT for at_us in instants]
    assert [replay.ask(user("eve"), at_us) for at_us in instants] == denied
    assert (replay.requests.asked, replay.requests.denied) == (50, sum(denied))


@pytest.mark.parametrize("kind", ["exact", "wildcard", "key", "below"])
def test_rules_in_shadow_mode_are_enforced_wherever_they_stand(kind: str) -> None:
    node = RuleNode(Rule("api.rule", TokenBucketLimit(1, 1, 0), shadow_mode=True))
    root = {
        "exact": RuleNode(exact={("user", "eve"): node}),
        "wildcard": RuleNode(wildcards={"user": WildcardSet([("e*", node)])}),
        "key": RuleNode(key_only={"user": node}),
        "below": RuleNode(key_only={"plan": RuleNode(key_only={"user": node})}),
    }[kind]
    entries = {"plan": "gold", "user": "eve"} if kind == "below" else {"user": "eve"}
    replay = Replay(Rules({"api": root}), AnswerSettings())
    assert replay.ask(request(entries), NOW_US)
    assert replay.rules["api.rule"].in_shadow_mode


def test_global_shadow_mode_is_not_kept_and_quota_mode_is() -> None:
    rules = Rules(
        {
            "api": RuleNode(
                key_only={
                    "a": RuleNode(Rule("api.a", TokenBucketLimit(1, 1, 0))),
                    "b": RuleNode(Rule("api.b", ONE_A_SECOND)),
                }
            )
        }
    )
    assert Replay(rules, AnswerSettings(shadow_mode=True)).ask(request({"a": ""}), NOW_US)
    assert not Replay(rules, AnswerSettings(quota_mode=True)).ask(request({"a": ""}, {"b": ""}), NOW_US)


@pytest.mark.parametrize("consistency", Consistency)
def test_a_limit_that_the_request_brings_counts_whole(consistency: Consistency) -> None:
    replay = Replay(Rules({"api": RuleNode()}, override_consistency=consistency), AnswerSettings())
    asked = user("eve")
    asked.descriptors[0].limit.requests_per_unit = 2
    asked.descriptors[0].limit.unit = RateLimitUnit.DAY
    assert [replay.ask(asked, NOW_US) for _ in range(3)] == [False, False, True]


def test_buckets_that_are_full_again_are_dropped() -> None:
    replay = Replay(rules_of_users(), AnswerSettings())
    for number in range(20_000):
        replay.ask(user(number), NOW_US + number * SECOND_US)
    assert len(replay.limiter.store) < 2_100
    assert replay.limiter.store.removals > 17_000


def test_buckets_in_use_are_kept() -> None:
    replay = Replay(rules_of_users(limit=TokenBucketLimit(1, 3_600 * SECOND_US, 1)), AnswerSettings())
    for number in range(5_000):
        replay.ask(user(number), NOW_US)
    assert all(replay.ask(user(number), NOW_US + SECOND_US) for number in range(5_000))


def test_of_too_many_denied_descriptors_those_denied_most_are_kept_and_the_rest_counted() -> None:
    replay = Replay(rules_of_users(limit=TokenBucketLimit(1, 1, 0)), AnswerSettings(), max_denied_descriptors=10)
    for _ in range(3):
        replay.ask(user("often"), NOW_US)
    for number in range(100):
        replay.ask(user(number), NOW_US)
    kept = replay.denied_descriptors
    assert len(kept) <= 10
    assert kept["api", (("user", "often"),)].denied == 3
    assert sum(tally.denied for tally in kept.values()) + replay.other_denials == replay.requests.denied == 103


def test_a_descriptor_is_told_apart_from_its_first_denial_on() -> None:
    replay = Replay(rules_of_users(), AnswerSettings())
    for at_us in (0, 500_000, 600_000, 2_000_000):
        replay.ask(user("eve"), at_us)
    replay.ask(user("ada"), 2_000_000)
    (((domain, entries), tally),) = replay.denied_descriptors.items()
    assert (domain, entries) == ("api", (("user", "eve"),))
    assert (tally.denied, tally.first_denied_us) == (2, 500_000)
