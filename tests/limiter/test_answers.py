"""What an answer says beyond yes and no, and how rules act on each other in one request."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict
from limiter.requests import NOW_US, OK, OVER_LIMIT, decide, headers_of, make_limiter, make_request

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.ledger import Ledger
from ratelimit_sidecar.crdt.limit import Window
from ratelimit_sidecar.crdt.shares import Membership, Shares
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2 import RateLimitRequest, RateLimitResponse
from ratelimit_sidecar.envoy_api.envoy.type.v3.ratelimit_unit_pb2 import RateLimitUnit
from ratelimit_sidecar.limiter.counts import MAX_NAMES
from ratelimit_sidecar.limiter.decorations import MAX_NAME_CHARS
from ratelimit_sidecar.limiter.key import rule_key
from ratelimit_sidecar.limiter.limiter import Limiter
from ratelimit_sidecar.limiter.rules import Charge, Consistency, Rule, RuleNode, Rules, Unit, limit_of_rate
from ratelimit_sidecar.limiter.settings import AnswerSettings, ResponseHeaders
from ratelimit_sidecar.limiter.wildcard import WildcardSet


def rule(name: str, requests: int = 10, window: Window | None = None, burst: int | None = None, **more: Any) -> Rule:
    return Rule(f"api.{name}", limit_of_rate(requests, Unit.MINUTE, window, burst=burst), requests, Unit.MINUTE, **more)


def rules_of(*rules: Rule, **more: Any) -> Rules:
    """One rule a key, in the domain `api`."""
    return Rules({"api": RuleNode(key_only={rule.name.removeprefix("api."): RuleNode(rule) for rule in rules})}, **more)


def test_a_rule_in_shadow_mode_says_ok_with_nothing_remaining_and_is_charged() -> None:
    limiter = make_limiter(rules_of(rule("a", shadow_mode=True)))
    decide(limiter, make_request({"a": "1"}, hits=10))
    response = decide(limiter, make_request({"a": "1"}, hits=4))
    assert (response.overall_code, response.statuses[0].code, response.statuses[0].limit_remaining) == (OK, OK, 0)
    counts = limiter.counts["api", "api.a"]
    assert (counts.over_limit, counts.over_limit_hits, counts.shadow_mode_hits) == (1, 4, 4)


def test_global_shadow_mode_makes_every_answer_ok_and_leaves_the_statuses() -> None:
    limiter = make_limiter(rules_of(rule("a")), AnswerSettings(shadow_mode=True))
    response = decide(limiter, make_request({"a": "1"}, hits=11))
    assert (response.overall_code, response.statuses[0].code) == (OK, OVER_LIMIT)


@pytest.mark.parametrize(
    ("over", "expected"),
    [
        ({"q1": 11, "q2": 1, "n": 1}, OK),
        ({"q1": 11, "q2": 11, "n": 1}, OVER_LIMIT),
        ({"q1": 1, "q2": 1, "n": 11}, OVER_LIMIT),
        ({"q1": 1, "q2": 1, "n": 1}, OK),
        ({"q1": 11, "n": 1}, OVER_LIMIT),
    ],
)
def test_only_all_quota_rules_of_a_request_together_deny_it(over: dict[str, int], expected: int) -> None:
    limiter = make_limiter(rules_of(rule("q1", quota_mode=True), rule("q2", quota_mode=True), rule("n")))
    request = RateLimitRequest.FromString(make_request(*({key: "x"} for key in over)))
    for descriptor, hits in zip(request.descriptors, over.values(), strict=True):
        descriptor.hits_addend.value = hits
    assert decide(limiter, request.SerializeToString()).overall_code == expected


def test_global_quota_mode_treats_every_rule_so() -> None:
    limiter = make_limiter(rules_of(rule("a"), rule("b", requests=100)), AnswerSettings(quota_mode=True))
    response = decide(limiter, make_request({"a": "1"}, {"b": "1"}, hits=11))
    assert [status.code for status in response.statuses] == [OVER_LIMIT, OK]
    assert response.overall_code == OK


def test_in_global_quota_mode_what_is_not_limited_is_a_quota_that_passes() -> None:
    limiter = make_limiter(rules_of(rule("a")), AnswerSettings(quota_mode=True))
    assert decide(limiter, make_request({"a": "1"}, hits=11)).overall_code == OVER_LIMIT
    assert decide(limiter, make_request({"a": "1"}, {"none": "1"}, hits=11)).overall_code == OK


def test_a_rule_that_another_replaces_does_not_count_in_that_request() -> None:
    limiter = make_limiter(
        rules_of(rule("a", 1, limit_name="small"), rule("b", 100, replaces=frozenset({"small"})), rule("c", 1))
    )
    response = decide(limiter, make_request({"a": "1"}, {"b": "1"}, hits=5))
    assert response.overall_code == OK
    assert not response.statuses[0].HasField("current_limit")
    assert decide(limiter, make_request({"a": "1"})).statuses[0].limit_remaining == 0
    assert decide(limiter, make_request({"c": "1"}, {"b": "1"}, hits=5)).overall_code == OVER_LIMIT


def test_the_answer_names_the_limit() -> None:
    [status] = decide(make_limiter(rules_of(rule("a", limit_name="gold"))), make_request({"a": "1"})).statuses
    assert status.current_limit.name == "gold"


def with_override(raw: bytes, requests: int, unit: int) -> bytes:
    request = RateLimitRequest.FromString(raw)
    request.descriptors[0].limit.requests_per_unit = requests
    request.descriptors[0].limit.unit = unit
    return request.SerializeToString()


def test_a_limit_in_the_request_overrides_the_rule_and_the_lack_of_one_and_is_never_shadowed() -> None:
    limiter = make_limiter(rules_of(rule("a", shadow_mode=True)))
    for descriptor in ({"a": "1"}, {"unknown": "1"}):
        request = with_override(make_request(descriptor), 2, RateLimitUnit.HOUR)
        responses = [decide(limiter, request) for _ in range(3)]
        assert [response.overall_code for response in responses] == [OK, OK, OVER_LIMIT]
        current_limit = responses[0].statuses[0].current_limit
        assert (current_limit.requests_per_unit, current_limit.unit) == (2, RateLimitResponse.RateLimit.HOUR)


@pytest.mark.parametrize("window", list(Window))
@pytest.mark.parametrize("rule_window", [None, *Window])
def test_a_limit_in_the_request_that_changes_finds_what_was_taken(window: Window, rule_window: Window | None) -> None:
    limiter = make_limiter(rules_of(rule("a", window=rule_window), override_window=window))
    for limit, remaining in ((3, [2, 1, 0]), (4, [0]), (6, [1]), (2, [0])):
        request = with_override(make_request({"a": "1"}), limit, RateLimitUnit.MINUTE)
        statuses = [decide(limiter, request).statuses[0] for _ in remaining]
        assert [status.limit_remaining for status in statuses] == remaining
        assert [status.code for status in statuses] == [OVER_LIMIT if limit == 2 else OK] * len(remaining)


def test_a_limit_in_the_request_finds_what_its_rule_counted_in_a_window_whatever_the_default() -> None:
    limiter = make_limiter(rules_of(rule("a", window=Window.FIXED), override_window=Window.SLIDING))
    assert [decide(limiter, make_request({"a": "1"})).statuses[0].limit_remaining for _ in range(2)] == [9, 8]
    request = with_override(make_request({"a": "1"}), 3, RateLimitUnit.MINUTE)
    assert [decide(limiter, request).overall_code for _ in range(2)] == [OK, OVER_LIMIT]


def test_a_limit_in_the_request_needs_a_domain_with_rules() -> None:
    limiter = make_limiter(rules_of(rule("a")))
    request = with_override(make_request({"a": "1"}, domain="other"), 0, RateLimitUnit.HOUR)
    assert decide(limiter, request).overall_code == OK


def test_buckets_of_limits_in_requests_are_known_to_peers_by_their_name() -> None:
    limiter = make_limiter(rules_of(rule("a")))
    request = with_override(make_request({"a": "1"}), 2, RateLimitUnit.HOUR)
    [take] = limiter.plan(request).takes
    assert take.rule is not None
    assert limiter.store.limit_of_key(take.bucket_key) == take.rule.limit


def test_hits_of_charge_always_count_into_debt() -> None:
    limiter = make_limiter(rules_of(rule("tokens", charge=Charge.ALWAYS)))
    assert decide(limiter, make_request({"tokens": "t"}, hits=30)).overall_code == OVER_LIMIT
    [bucket] = limiter.store
    assert bucket.debt == 20
    assert limiter.counts["api", "api.tokens"].tokens == 30
    assert bucket.retry_after_us(1) == 126_000_000
    assert decide(limiter, make_request({"tokens": "t"}), NOW_US + 126_000_000).overall_code == OK


@pytest.mark.parametrize("window", [Window.FIXED, None])
def test_hits_near_the_limit_and_over_it_are_counted_apart(window: Window | None) -> None:
    """At 0.8 of 10 the threshold is 8: of 7 + 3 hits 2 are near, and of 5 more, in a fixed window, all are over."""
    limiter = make_limiter(rules_of(rule("a", window=window)))
    for hits in (7, 3, 5):
        decide(limiter, make_request({"a": "1"}, hits=hits))
    counts = limiter.counts["api", "api.a"]
    assert (counts.total_hits, counts.within_limit_hits) == (15, 10)
    assert (counts.near_limit_hits, counts.over_limit_hits) == (2, 5)


def test_a_fixed_window_splits_the_hits_of_the_request_that_crosses_the_limit() -> None:
    limiter = make_limiter(rules_of(rule("a", window=Window.FIXED)))
    for hits in (7, 5):
        decide(limiter, make_request({"a": "1"}, hits=hits))
    counts = limiter.counts["api", "api.a"]
    assert (counts.over_limit_hits, counts.near_limit_hits) == (2, 2)


def test_response_headers_tell_of_the_descriptor_nearest_its_limit() -> None:
    limiter = make_limiter(
        rules_of(rule("a", 10), rule("b", 5)), AnswerSettings(response_headers=ResponseHeaders("L", "Rem", "Res"))
    )
    assert headers_of(decide(limiter, make_request({"a": "1"}, {"b": "1"}, {"none": "1"}, hits=3))) == {
        "L": "5",
        "Rem": "2",
        "Res": "36",
    }


def test_response_headers_tell_of_the_last_descriptor_over_its_limit() -> None:
    limiter = make_limiter(
        rules_of(rule("a", 1), rule("b", 2), rule("c", 100)), AnswerSettings(response_headers=ResponseHeaders())
    )
    headers = headers_of(decide(limiter, make_request({"a": "1"}, {"b": "1"}, {"c": "1"}, hits=3)))
    assert (headers["RateLimit-Limit"], headers["RateLimit-Remaining"]) == ("2", "2")


def test_no_limit_no_response_headers() -> None:
    limiter = make_limiter(rules_of(rule("a")), AnswerSettings(response_headers=ResponseHeaders()))
    assert headers_of(decide(limiter, make_request({"none": "1"}))) == {}


def test_a_denial_says_when_to_come_back() -> None:
    limiter = make_limiter(rules_of(rule("a", 6, burst=12, retry_after=True, limit_name='say "when"')))
    assert headers_of(decide(limiter, make_request({"a": "1"}, hits=12))) == {}
    headers = headers_of(decide(limiter, make_request({"a": "1"}, hits=2), NOW_US + 1_000_000))
    assert headers == {
        "Retry-After": "19",
        "RateLimit-Policy": '"say \\"when\\"";q=12;w=120',
        "RateLimit": '"say \\"when\\"";r=0;t=19',
        "RateLimit-Limit": "12",
        "RateLimit-Remaining": "0",
        "RateLimit-Reset": "119",
    }
    assert decide(limiter, make_request({"a": "1"}, hits=2), NOW_US + 20_000_000).overall_code == OK


def test_of_several_denials_the_one_that_takes_longest_says_when_to_come_back() -> None:
    limiter = make_limiter(rules_of(rule("a", 60, retry_after=True), rule("b", 1, retry_after=True)))
    decide(limiter, make_request({"a": "1"}, hits=60))
    decide(limiter, make_request({"b": "1"}))
    assert headers_of(decide(limiter, make_request({"a": "1"}, {"b": "1"})))["Retry-After"] == "60"


@pytest.mark.parametrize(("window", "seconds"), [(Window.FIXED, "40"), (Window.SLIDING, "41")])
def test_a_window_says_when_it_has_room_again(window: Window, seconds: str) -> None:
    limiter = make_limiter(rules_of(rule("a", window=window, retry_after=True)))
    decide(limiter, make_request({"a": "1"}, hits=10))
    response = decide(limiter, make_request({"a": "1"}), NOW_US + 20_000_000)
    assert headers_of(response)["Retry-After"] == seconds


@pytest.mark.parametrize("retry_after", [False, True])
def test_all_limits_that_a_request_met_can_be_told_of_in_every_answer(retry_after: bool) -> None:
    rules = rules_of(
        rule("a", 10, limit_name="wide", retry_after=retry_after), rule("b", 2, Window.FIXED), Rule("api.c", None)
    )
    limiter = make_limiter(rules, AnswerSettings(all_limits=True))
    request = make_request({"a": "1"}, {"b": "1"}, {"c": "1"}, {"unknown": "1"})
    policy = '"wide";q=10;w=60, "api.b";q=2;w=60'
    admitted, _, denied = (headers_of(decide(limiter, request)) for _ in range(3))
    assert admitted == {"RateLimit-Policy": policy, "RateLimit": '"wide";r=9;t=6, "api.b";r=1;t=60'}
    assert denied == {"RateLimit-Policy": policy, "RateLimit": '"wide";r=7;t=18, "api.b";r=0;t=60'}
    assert headers_of(decide(limiter, make_request({"unknown": "1"}))) == {}


def test_names_of_limits_are_cut_in_lists_lest_a_proxy_refuse_the_answer() -> None:
    limiter = make_limiter(
        rules_of(*(rule(f"{number}{'a' * 2_000}") for number in range(64))), AnswerSettings(all_limits=True)
    )
    entries = [{f"{number}{'a' * 2_000}": "1"} for number in range(64)]
    headers = headers_of(decide(limiter, make_request(*entries)))
    assert headers["RateLimit"].startswith(f'"{"api.0" + "a" * (MAX_NAME_CHARS - 5)}";r=')
    assert sum(map(len, headers.values())) < 24 * 1_024


def test_a_denial_has_the_rules_body_and_an_admission_has_none() -> None:
    limiter = make_limiter(rules_of(rule("a", 1, body="slow down, ünïcorn")))
    assert decide(limiter, make_request({"a": "1"})).raw_body == b""
    assert decide(limiter, make_request({"a": "1"})).raw_body.decode() == "slow down, ünïcorn"


def test_dynamic_metadata_tells_what_was_asked_and_has_the_metadata_of_the_rules_that_passed() -> None:
    limiter = make_limiter(
        rules_of(rule("a", metadata={"tier": "gold", "n": [1]}), rule("b", 1, metadata={"tier": "none"})),
        AnswerSettings(dynamic_metadata=True),
    )
    response = decide(limiter, make_request({"a": "1"}, {"b": "2"}, hits=3))
    assert MessageToDict(response.dynamic_metadata) == {
        "domain": "api",
        "hitsAddend": 3,
        "descriptors": [{"entries": ["a=1"]}, {"entries": ["b=2"]}],
        "applied": [
            {"rule": "api.a", "hits": 3, "requestsPerUnit": 10, "unit": "MINUTE"},
            {"rule": "api.b", "hits": 3, "requestsPerUnit": 1, "unit": "MINUTE"},
        ],
        "metadata": {"tier": "gold", "n": [1]},
    }


def test_dynamic_metadata_has_limits_and_hits_where_the_request_brings_them_as_go_prints_them() -> None:
    limiter = make_limiter(rules_of(rule("a")), AnswerSettings(dynamic_metadata=True))
    request = RateLimitRequest.FromString(with_override(make_request({"a": "1"}), 2, RateLimitUnit.HOUR))
    request.descriptors[0].hits_addend.value = 0
    said = MessageToDict(decide(limiter, request.SerializeToString()).dynamic_metadata)
    assert said["descriptors"] == [{"entries": ["a=1"], "limit": "requests_per_unit:2 unit:HOUR", "hitsAddend": 0}]
    assert "hitsAddend" not in said
    # Envoy's enumeration of units in requests has none for a week.
    request.descriptors[0].limit.unit = RateLimitResponse.RateLimit.Unit.Value("WEEK")
    said = MessageToDict(decide(limiter, request.SerializeToString()).dynamic_metadata)
    assert said["descriptors"][0]["limit"] == "requests_per_unit:2 unit:7"


def all_or_nothing(*rules: Rule) -> Rules:
    return rules_of(*rules, all_or_nothing=frozenset(("api",)))


WIDE, SMALL = {"wide": "1"}, {"small": "1"}


@pytest.mark.parametrize("window", [None, *Window])
def test_all_or_nothing_a_denied_request_charges_no_limit(window: Window | None) -> None:
    limiter = make_limiter(all_or_nothing(rule("wide", 10, window), rule("small", 2, window)))
    answers = [decide(limiter, make_request(WIDE, SMALL)) for _ in range(6)]
    assert [answer.overall_code for answer in answers] == [OK, OK, *[OVER_LIMIT] * 4]
    assert [[status.code for status in answer.statuses] for answer in answers[2:]] == [[OK, OVER_LIMIT]] * 4
    assert [answer.statuses[0].limit_remaining for answer in answers] == [9, 8, 8, 8, 8, 8]
    [wide, small] = [limiter.counts["api", f"api.{name}"] for name in ("wide", "small")]
    assert (wide.ok, wide.tokens, small.over_limit, small.tokens) == (6, 2, 4, 2)
    assert decide(limiter, make_request(WIDE, hits=8)).overall_code == OK


def test_all_or_nothing_what_is_charged_always_is_charged_all_the_same() -> None:
    limiter = make_limiter(all_or_nothing(rule("wide", charge=Charge.ALWAYS), rule("small", 0)))
    assert decide(limiter, make_request(WIDE, SMALL, hits=4)).statuses[0].limit_remaining == 6
    assert limiter.counts["api", "api.wide"].tokens == 4


def test_all_or_nothing_limits_in_shadow_mode_and_single_quotas_hold_up_nothing() -> None:
    limiter = make_limiter(
        all_or_nothing(
            rule("wide"),
            rule("small", 0, shadow_mode=True),
            rule("q1", 0, quota_mode=True),
            rule("q2", quota_mode=True),
        )
    )
    answer = decide(limiter, make_request(WIDE, SMALL, {"q1": "1"}, {"q2": "1"}))
    assert answer.overall_code == OK
    assert [status.limit_remaining for status in answer.statuses] == [9, 0, 0, 9]
    assert decide(limiter, make_request(WIDE, {"q1": "1"})).overall_code == OVER_LIMIT
    assert decide(limiter, make_request(WIDE)).statuses[0].limit_remaining == 8


def test_all_or_nothing_is_a_matter_of_the_domain() -> None:
    limiter = make_limiter(rules_of(rule("wide"), rule("small", 0), all_or_nothing=frozenset(("other",))))
    assert decide(limiter, make_request(WIDE, SMALL)).statuses[0].limit_remaining == 9


def with_own_hits(request: bytes, hits: int) -> bytes:
    message = RateLimitRequest.FromString(request)
    for descriptor in message.descriptors:
        descriptor.hits_addend.value = hits
    raw: bytes = message.SerializeToString()
    return raw


@pytest.mark.parametrize("window", [None, Window.SLIDING])
def test_costs_that_are_reported_afterwards_count_though_they_are_more_than_is_left(window: Window | None) -> None:
    """As Envoy Gateway asks: with no hits when the request comes, and with its cost when it is done."""
    limiter = make_limiter(rules_of(rule("a", window=window, charge=Charge.REPORTED)))
    check, report = with_own_hits(make_request({"a": "1"}), 0), with_own_hits(make_request({"a": "1"}), 10_000)
    assert [decide(limiter, raw).overall_code for raw in (check, report, check)] == [OK, OVER_LIMIT, OVER_LIMIT]
    assert limiter.counts["api", "api.a"].charged_hits == 10_000


def test_hits_that_are_not_reported_by_the_descriptor_count_when_admitted_only() -> None:
    limiter = make_limiter(rules_of(rule("a", charge=Charge.REPORTED)))
    assert [decide(limiter, make_request({"a": "1"}, hits=11)).overall_code for _ in range(3)] == [OVER_LIMIT] * 3
    assert decide(limiter, make_request({"a": "1"}, hits=10)).overall_code == OK


def test_an_unlimited_rule_that_is_replaced_goes_on_saying_so() -> None:
    limiter = make_limiter(
        rules_of(
            Rule("api.a", None, limit_name="free"),
            rule("b", replaces=frozenset(("free", "own"))),
            rule("c", limit_name="own"),
        )
    )
    answer = decide(limiter, make_request({"a": "1"}, {"b": "1"}, {"c": "1"}))
    assert [status.limit_remaining for status in answer.statuses] == [2**32 - 1, 9, 0]


def test_a_value_that_is_a_pattern_itself_means_that_one() -> None:
    patterns = WildcardSet(
        [(text, RuleNode(rule(f"v_{text}", requests))) for text, requests in (("a*", 1), ("a*c", 2))]
    )
    limiter = make_limiter(Rules({"api": RuleNode(wildcards={"v": patterns})}))
    limits = [
        decide(limiter, make_request({"v": value})).statuses[0].current_limit.requests_per_unit
        for value in ("abc", "a*c", "a*")
    ]
    assert limits == [1, 2, 1]


def test_of_a_request_in_shadow_mode_that_crosses_the_limit_only_what_is_over_counts_as_let_pass() -> None:
    limiter = make_limiter(rules_of(rule("a", window=Window.FIXED, shadow_mode=True)))
    decide(limiter, make_request({"a": "1"}, hits=8))
    decide(limiter, make_request({"a": "1"}, hits=5))
    assert limiter.counts["api", "api.a"].shadow_mode_hits == 3


def test_new_rules_keep_what_was_taken_and_enforce_the_new_limit() -> None:
    limiter = make_limiter(rules_of(rule("a"), rule("b")))
    decide(limiter, make_request({"a": "1"}, {"b": "1"}, hits=6))
    limiter.use_rules(rules_of(rule("a"), rule("b", 20)))
    response = decide(limiter, make_request({"a": "1"}, {"b": "1"}))
    assert [status.limit_remaining for status in response.statuses] == [3, 13]


class Closed(dict[str, RuleNode]):
    """Domains that cannot be gone through any more once they are closed; one of them can be looked up."""

    closed = False

    def values(self) -> Any:
        assert not self.closed
        return super().values()

    def items(self) -> Any:
        assert not self.closed
        return super().items()

    def keys(self) -> Any:
        assert not self.closed
        return super().keys()

    def __iter__(self) -> Any:
        assert not self.closed
        return super().__iter__()


def test_new_rules_come_in_force_without_a_look_at_each() -> None:
    domains = Closed(rules_of(rule("a", 20)).domains)
    rules = Rules(domains)
    limiter = make_limiter(rules_of(rule("a")))
    domains.closed = True
    limiter.use_rules(rules)
    assert decide(limiter, make_request({"a": "1"})).statuses[0].limit_remaining == 19


def test_old_rules_and_what_was_made_of_them_are_handed_over_as_they_are() -> None:
    old = rules_of(rule("a"), rule("b"))
    limiter = make_limiter(old)
    for value in ("1", "2", "3"):
        decide(limiter, make_request({"a": value}, {"b": value}))
    retired = limiter.use_rules(rules_of(rule("c")))
    assert retired.rules is old
    assert (len(retired.plans), len(retired.compiled)) == (3, 2)
    decide(limiter, make_request({"c": "1"}))
    assert (len(retired.plans), len(retired.compiled)) == (3, 2)


def test_new_rules_hold_for_what_peers_say_too() -> None:
    limiter = make_limiter(rules_of(rule("a")))
    [take] = limiter.plan(make_request({"a": "1"})).takes
    limiter.use_rules(rules_of(rule("b")))
    assert limiter.store.limit_of_key(take.bucket_key) is None


def test_a_rule_that_becomes_another_kind_begins_a_new_bucket() -> None:
    limiter = make_limiter(rules_of(rule("a")))
    request = make_request({"a": "1"})
    keys = set()
    for other in (rule("a"), rule("a", window=Window.FIXED), rule("a", consistency=Consistency.LOCAL)):
        limiter.use_rules(rules_of(other))
        assert decide(limiter, request).statuses[0].limit_remaining == 9
        keys.add(limiter.plan(request).takes[0].bucket_key)
    assert len(keys) == 3


def wildcard_rules(shares_bucket: bool = False, **more: Any) -> Rules:
    node = RuleNode(rule("path_/a*", **more), shares_bucket=shares_bucket)
    return Rules({"api": RuleNode(wildcards={"path": WildcardSet([("/a*", node)])})})


def test_every_value_of_a_wildcard_has_its_own_bucket_unless_they_share_one() -> None:
    for shares_bucket, remaining in ((False, 9), (True, 8)):
        limiter = make_limiter(wildcard_rules(shares_bucket))
        decide(limiter, make_request({"path": "/a1"}))
        assert decide(limiter, make_request({"path": "/a2"})).statuses[0].limit_remaining == remaining
        assert len(limiter.store) == (1 if shares_bucket else 2)


def test_values_stand_in_metric_names_only_where_rules_say_so_and_never_without_bound() -> None:
    plain, detailed = make_limiter(wildcard_rules()), make_limiter(wildcard_rules(metric_of_values=True))
    for limiter, values in ((plain, 4), (detailed, MAX_NAMES + 2)):
        for number in range(values):
            limiter.decide(make_request({"path": f"/a{number}"}), NOW_US)
    assert {name: counts.ok for (_, name), counts in plain.counts.items()} == {"api.path_/a*": 4}
    assert {name: counts.ok for (_, name), counts in detailed.counts.items()} == {
        **{f"api.path_/a{number}": 1 for number in range(MAX_NAMES)},
        "api.path_/a*": 2,
    }


def test_after_many_reloads_the_names_of_rules_that_are_gone_are_not_kept() -> None:
    limiter = make_limiter(wildcard_rules(metric_of_values=True))
    for number in range(MAX_NAMES):
        limiter.decide(make_request({"path": f"/a{number}"}), NOW_US)
    counted = []
    for number in range(10):
        limiter.use_rules(rules_of(rule(f"r{number}")))
        decide(limiter, make_request({f"r{number}": "1"}))
        counted.append(len(limiter.counts))
        assert limiter.counts["api", f"api.r{number}"].ok == 1
    assert max(counted) == MAX_NAMES + 3
    assert counted[-1] < 10


def test_a_strict_rule_decides_on_this_replicas_share_and_tells_peers_nothing_of_what_it_takes() -> None:
    shares = Shares(Membership(1, {"here": 1, "there": 1}), "here", NOW_US - 600_000_000)
    ledger = Ledger(shares, Origin("here", 1), lambda key: None)
    rules = rules_of(rule("a", consistency=Consistency.STRICT))
    limiter = Limiter(rules, Origin("here", 1), None, ledger)
    request = make_request({"a": "1"})
    assert [decide(limiter, request).overall_code for _ in range(6)] == [OK] * 5 + [OVER_LIMIT]
    assert (len(limiter.store), len(ledger)) == (0, 1)
    [take] = limiter.plan(request).takes
    assert ledger.limit_of_key(take.bucket_key) == rules_of(rule("a")).match("api", [("a", "1")]).rule.limit
    assert rules.replicated_limit_of_key(take.bucket_key) is None


@pytest.mark.parametrize("window", list(Window))
def test_a_limit_in_the_request_that_is_counted_in_windows_holds_beside_a_strict_token_bucket(window: Window) -> None:
    shares = Shares(Membership(1, {"here": 1}), "here", NOW_US - 600_000_000)
    ledger = Ledger(shares, Origin("here", 1), lambda key: None)
    rules = rules_of(rule("a", consistency=Consistency.STRICT), override_window=window)
    limiter = Limiter(rules, Origin("here", 1), None, ledger)
    request = with_override(make_request({"a": "1"}), 2, RateLimitUnit.MINUTE)
    assert [decide(limiter, request).overall_code for _ in range(3)] == [OK, OK, OVER_LIMIT]
    assert decide(limiter, make_request({"a": "1"})).statuses[0].limit_remaining == 9


def test_a_step_of_the_clock_refills_no_strict_bucket() -> None:
    shares = Shares(Membership(1, {"here": 1}), "here", NOW_US - 600_000_000)
    ledger = Ledger(shares, Origin("here", 1), lambda key: None)
    limiter = Limiter(rules_of(rule("a", consistency=Consistency.STRICT)), Origin("here", 1), None, ledger)
    assert decide(limiter, make_request({"a": "1"}, hits=10)).overall_code == OK
    limiter.clock_steps_us = 3_600_000_000
    assert decide(limiter, make_request({"a": "1"}), NOW_US + 3_600_000_000).overall_code == OVER_LIMIT


def test_a_strict_rule_without_members_is_refused() -> None:
    limiter = make_limiter(rules_of(rule("a")))
    with pytest.raises(ValueError, match="members"):
        limiter.use_rules(rules_of(rule("a", consistency=Consistency.STRICT)))
    assert decide(limiter, make_request({"a": "1"})).overall_code == OK


@pytest.mark.parametrize("consistency", [Consistency.EVENTUAL, Consistency.STRICT])
def test_without_any_room_new_keys_of_a_rule_share_one_bucket_and_old_ones_keep_their_own(
    consistency: Consistency,
) -> None:
    shares = Shares(Membership(1, {"here": 1}), "here", NOW_US - 600_000_000)
    ledger = Ledger(
        shares,
        Origin("here", 1),
        lambda key: None,
        max_buckets=1,
        rule_key=rule_key,
    )
    limiter = Limiter(rules_of(rule("a", consistency=consistency)), Origin("here", 1), None, ledger, max_buckets=1)
    decide(limiter, make_request({"a": "old"}, hits=4))
    for number in range(10):
        assert decide(limiter, make_request({"a": f"new {number}"})).overall_code == OK
    assert decide(limiter, make_request({"a": "newest"})).overall_code == OVER_LIMIT
    assert decide(limiter, make_request({"a": "old"})).statuses[0].limit_remaining == 5
    assert limiter.overflow_decisions["api", "api.a"] == 11
