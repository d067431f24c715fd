"""The decision core: raw request in, raw answer out, at an instant given by the test."""

from __future__ import annotations

import gc

import pytest
from limiter.requests import NOW_US, OK, OVER_LIMIT, decide, make_limiter, make_request

from ratelimit_sidecar.crdt.limit import TokenBucketLimit
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2 import RateLimitRequest, RateLimitResponse
from ratelimit_sidecar.envoy_api.envoy.type.v3.ratelimit_unit_pb2 import RateLimitUnit
from ratelimit_sidecar.limiter.encoding import varint
from ratelimit_sidecar.limiter.limiter import MAX_HITS, Limiter
from ratelimit_sidecar.limiter.plan import Plan, PlannedTake
from ratelimit_sidecar.limiter.plan_cache import MAX_PLAN_BYTES, MAX_PLANS_BYTES, PlanCache
from ratelimit_sidecar.limiter.request import MAX_DESCRIPTORS, MAX_ENTRIES, InvalidRequest
from ratelimit_sidecar.limiter.rules import Charge, Consistency, Rule, RuleNode, Rules, Unit

PER_AGENT = Rule("api.agent", TokenBucketLimit(20, 60_000_000, 20), 20, Unit.MINUTE)
VIP = Rule("api.agent_vip", TokenBucketLimit(1_000, 1_000_000, 1_000), 1_000, Unit.SECOND)
STAFF = Rule("api.agent_staff", None)
PER_PATH = Rule("api.path", TokenBucketLimit(5, 1_000_000, 5), 5, Unit.SECOND, Consistency.LOCAL)
DEFAULT_RULE = Rule("default_rule", TokenBucketLimit(1, 1_000_000, 3), 3)
RULES = Rules(
    {
        "api": RuleNode(
            exact={("agent", "vip"): RuleNode(VIP), ("agent", "staff"): RuleNode(STAFF)},
            key_only={"agent": RuleNode(PER_AGENT), "path": RuleNode(PER_PATH)},
        )
    }
)


def test_a_caller_is_denied_once_its_bucket_is_empty_and_admitted_again_when_a_token_has_refilled() -> None:
    limiter, request = make_limiter(RULES), make_request({"agent": "a"})
    assert [decide(limiter, request).overall_code for _ in range(21)] == [OK] * 20 + [OVER_LIMIT]
    assert decide(limiter, request, NOW_US + 3_000_000).overall_code == OK


def test_the_status_tells_the_limit_what_is_left_and_when_the_bucket_is_full() -> None:
    [status] = decide(make_limiter(RULES), make_request({"agent": "a"}, hits=5)).statuses
    assert status.code == OK
    assert (status.current_limit.requests_per_unit, status.current_limit.unit) == (
        20,
        RateLimitResponse.RateLimit.MINUTE,
    )
    assert status.limit_remaining == 15
    assert status.duration_until_reset.ToMicroseconds() == 15_000_000


def test_statuses_are_in_the_order_of_the_descriptors_and_one_that_is_over_makes_the_answer_over() -> None:
    limiter = make_limiter(RULES)
    response = decide(limiter, make_request({"agent": "vip"}, {"agent": "a"}, {"colour": "red"}, hits=21))
    assert response.overall_code == OVER_LIMIT
    assert [status.code for status in response.statuses] == [OK, OVER_LIMIT, OK]
    assert not response.statuses[2].HasField("current_limit")


def test_a_descriptor_over_its_limit_does_not_keep_the_others_from_being_charged() -> None:
    limiter = make_limiter(RULES)
    decide(limiter, make_request({"agent": "a"}, {"agent": "vip"}, hits=21))
    [status] = decide(limiter, make_request({"agent": "vip"})).statuses
    assert status.limit_remaining == 1_000 - 21 - 1


def test_each_value_of_a_key_has_its_own_bucket() -> None:
    limiter = make_limiter(RULES)
    decide(limiter, make_request({"agent": "a"}, hits=20))
    assert decide(limiter, make_request({"agent": "b"}, hits=20)).overall_code == OK


def test_a_descriptors_own_hits_override_the_requests_and_zero_only_checks() -> None:
    limiter = make_limiter(RULES)
    request = RateLimitRequest.FromString(make_request({"agent": "a"}, hits=7))
    request.descriptors[0].hits_addend.value = 0
    [status] = decide(limiter, request.SerializeToString()).statuses
    assert status.limit_remaining == 20
    request.descriptors[0].hits_addend.value = 3
    [status] = decide(limiter, request.SerializeToString()).statuses
    assert status.limit_remaining == 17


def with_field(request: bytes, *path_and_value: int) -> bytes:
    """The request with a field more in its only descriptor, as newer Envoys write it than the bindings here know.

    Args:
        path_and_value: the numbers of the messages' fields on the way, that of the field, and a varint's value.
    """
    *path, number, value = path_and_value
    field = bytes((number << 3, value))
    for message in reversed(path):
        field = bytes((message << 3 | 2, len(field))) + field
    parsed = RateLimitRequest.FromString(request)
    parsed.descriptors[0].MergeFromString(field)
    return parsed.SerializeToString()


@pytest.mark.parametrize(
    ("unit", "multiplier", "answered"),
    [("HOUR", 24, "DAY"), ("SECOND", 60, "MINUTE"), ("HOUR", 1, "HOUR"), ("HOUR", 0, "HOUR")],
)
def test_a_limit_in_a_request_is_per_so_many_units_as_it_says(unit: str, multiplier: int, answered: str) -> None:
    request = RateLimitRequest.FromString(make_request({"agent": "a"}))
    request.descriptors[0].limit.requests_per_unit = 3
    request.descriptors[0].limit.unit = RateLimitUnit.Value(unit)
    raw = with_field(request.SerializeToString(), 2, 3, 1, multiplier)
    [status] = decide(make_limiter(RULES), raw).statuses
    assert (status.current_limit.requests_per_unit, status.limit_remaining) == (3, 2)
    assert RateLimitResponse.RateLimit.Unit.Name(status.current_limit.unit) == answered


def test_a_limit_per_a_period_that_no_unit_has_is_ignored_and_counted() -> None:
    limiter = make_limiter(RULES)
    request = RateLimitRequest.FromString(make_request({"agent": "a"}))
    request.descriptors[0].limit.requests_per_unit = 3
    request.descriptors[0].limit.unit = RateLimitUnit.SECOND
    [status] = decide(limiter, with_field(request.SerializeToString(), 2, 3, 1, 30)).statuses
    assert status.limit_remaining == 19
    assert limiter.ignored_overrides == 1


def test_no_limit_applies_to_a_deeper_descriptor_or_another_domain() -> None:
    limiter = make_limiter(RULES)
    for request in (make_request({"agent": "a", "path": "/"}), make_request({"agent": "a"}, domain="other")):
        [status] = decide(limiter, request).statuses
        assert (status.code, status.HasField("current_limit")) == (OK, False)


def test_an_unlimited_rule_says_so() -> None:
    [status] = decide(make_limiter(RULES), make_request({"agent": "staff"}, hits=10**6)).statuses
    assert (status.code, status.limit_remaining) == (OK, 2**32 - 1)


def test_descriptors_that_no_rule_matches_share_the_default_rules_limit_each_with_its_own_bucket() -> None:
    limiter = make_limiter(Rules(RULES.domains, DEFAULT_RULE))
    red = make_request({"colour": "red"}, domain="other")
    assert [decide(limiter, red).overall_code for _ in range(4)] == [OK] * 3 + [OVER_LIMIT]
    assert decide(limiter, make_request({"colour": "blue"}, domain="other")).overall_code == OK
    assert decide(limiter, make_request({"agent": "a"})).statuses[0].current_limit.requests_per_unit == 20


def test_only_replicated_rules_have_buckets_that_peers_may_name() -> None:
    limiter = make_limiter(Rules(RULES.domains, DEFAULT_RULE))
    decide(limiter, make_request({"agent": "a"}, {"path": "/"}, {"colour": "red"}))
    keys = [
        take.bucket_key for take in limiter.plan(make_request({"agent": "a"}, {"path": "/"}, {"colour": "red"})).takes
    ]
    assert [limiter.store.limit_of_key(key) for key in keys] == [PER_AGENT.limit, None, DEFAULT_RULE.limit]
    assert [bucket.key for bucket, _ in limiter.store.drain_changes()] == [keys[0], keys[2]]


@pytest.mark.parametrize(
    ("request_bytes", "message"),
    [
        (b"\xff\xff\xff", "not an envoy.service"),
        (make_request({"agent": "a"}, domain=""), "domain must not be empty"),
        (make_request(), "descriptor list must not be empty"),
        (make_request(*[{"agent": "a"}] * (MAX_DESCRIPTORS + 1)), "more than 512 rate limit descriptors"),
        (make_request(*[dict.fromkeys(map(str, range(17)), "a")] * MAX_DESCRIPTORS), "more than 8192 entries"),
    ],
)
def test_a_request_that_nothing_can_answer_is_refused_with_the_reason(request_bytes: bytes, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        make_limiter(RULES).decide(request_bytes, NOW_US)


@pytest.mark.parametrize("field", ["descriptors", "entries", "unknown"])
def test_a_message_of_the_most_bytes_with_as_many_fields_as_fit_is_refused_before_they_are_gone_through(
    field: str,
) -> None:
    fields = {"descriptors": b"\x12\0", "entries": b"\x0a\0", "unknown": b"\x78\0"}[field] * (2 * 1_024 * 1_024 - 8)
    head = make_request({"agent": "a"})
    raw = head + (b"\x12" + varint(len(fields)) + fields if field == "entries" else fields)
    with pytest.raises(InvalidRequest, match="more than"):
        make_limiter(RULES).decide(raw, NOW_US)


def test_a_request_has_at_most_so_many_entries() -> None:
    entries = dict.fromkeys(map(str, range(MAX_ENTRIES)), "a")
    assert decide(make_limiter(RULES), make_request(entries)).overall_code == OK


def test_a_plan_is_made_once_for_equal_requests_unless_they_are_too_long_to_keep() -> None:
    limiter = make_limiter(RULES)
    short, long = make_request({"agent": "a"}), make_request({"agent": "a" * MAX_PLAN_BYTES})
    assert limiter.plan(short) is limiter.plan(bytes(bytearray(short)))
    assert limiter.plan(long) is not limiter.plan(long)
    assert [take.bucket_key for take in limiter.plan(long).takes] == [
        take.bucket_key for take in limiter.plan(long).takes
    ]


def test_decisions_are_counted_by_rule_and_domains_that_callers_invent_are_counted_together() -> None:
    limiter = make_limiter(RULES)
    decide(limiter, make_request({"agent": "a"}, hits=15))
    decide(limiter, make_request({"agent": "b"}, hits=15))
    decide(limiter, make_request({"agent": "b"}, hits=15))
    for domain in ("x", "y", "z"):
        decide(limiter, make_request({"agent": "a"}, domain=domain))
    counts = limiter.counts["api", "api.agent"]
    assert (counts.ok, counts.over_limit, counts.tokens) == (2, 1, 30)
    assert limiter.counts["", ""].ok == 3
    assert len(limiter.counts) == 2


def test_a_bucket_that_takes_longer_to_refill_than_a_duration_can_say_is_answered_all_the_same() -> None:
    slow = Rule("api.slow", TokenBucketLimit(1, 10**15, 2**40))
    limiter = make_limiter(Rules({"api": RuleNode(key_only={"slow": RuleNode(slow)})}))
    [status] = decide(limiter, make_request({"slow": "1"}, hits=2**32 - 1)).statuses
    assert status.duration_until_reset.seconds == 315_576_000_000


def test_a_bucket_that_was_dropped_meanwhile_is_taken_from_anew() -> None:
    limiter, request = make_limiter(RULES), make_request({"agent": "a"})
    decide(limiter, request)
    later_us = NOW_US + 3_600_000_000
    limiter.store.drain_changes()
    limiter.store.sweep(later_us, 10)
    assert limiter.store.removals == 1
    decide(limiter, request, later_us)
    [bucket] = limiter.store
    assert bucket.remaining == 19


def test_a_descriptor_without_entries_is_not_limited_and_the_others_are() -> None:
    limiter = make_limiter(Rules(RULES.domains, DEFAULT_RULE))
    answer = decide(limiter, make_request({"agent": "a"}, {}, hits=21))
    assert [status.code for status in answer.statuses] == [OVER_LIMIT, OK]


def test_hits_beyond_what_peers_can_be_told_count_as_the_most_they_can() -> None:
    rule = Rule("api.slow", TokenBucketLimit(1, 10**6, 2**40), charge=Charge.ALWAYS)
    limiter = make_limiter(Rules({"api": RuleNode(key_only={"slow": RuleNode(rule)})}))
    request = RateLimitRequest.FromString(make_request({"slow": "1"}))
    request.descriptors[0].hits_addend.value = 2**64 - 1
    assert decide(limiter, request.SerializeToString()).overall_code == OVER_LIMIT
    [bucket] = limiter.store
    assert [entry.tokens for entry in bucket.entries()] == [MAX_HITS]


def fill(limiter: Limiter) -> dict[bytes, Plan]:
    """Ask for plans until none is kept at first sight any more; returns those that are kept."""
    kept: dict[bytes, Plan] = {}
    while True:
        request = make_request({"agent": f"a{len(kept)}"})
        plan = limiter.plan(request)
        if limiter.plan(request) is not plan:
            return kept
        kept[request] = plan
        assert len(kept) < 50_000, "nothing is bounded"


def test_of_the_requests_that_come_once_few_push_out_a_plan() -> None:
    limiter = make_limiter(RULES)
    kept = fill(limiter)
    for number in range(5_000):
        limiter.plan(make_request({"agent": f"b{number}"}))
    # One in 256 is taken for one that was seen.
    assert sum(limiter.plan(request) is not plan for request, plan in kept.items()) < 100


def test_a_plan_asked_for_twice_is_kept_also_when_there_are_many() -> None:
    limiter, late = make_limiter(RULES), make_request({"agent": "late"})
    fill(limiter)
    assert limiter.plan(late) is not limiter.plan(late)
    assert limiter.plan(late) is limiter.plan(late)


def test_the_cycle_collector_does_not_see_plans_that_are_kept() -> None:
    """Otherwise it visits all of them at once: see `plan_cache`."""
    limiter = make_limiter(RULES)
    kept = limiter.plan(make_request({"agent": "a", "path": "/"}, {"agent": "b"}))
    seen = [kept]
    for held in seen:
        assert not gc.is_tracked(held), type(held)
        seen += [part for part in gc.get_referents(held) if isinstance(part, PlannedTake | tuple)]
    assert len(seen) == 1 + len([kept.takes, *kept.takes]) + len([kept.descriptors, *kept.descriptors]) + 3


def test_plans_are_bounded_in_bytes_not_in_number() -> None:
    cache, limiter = PlanCache(), make_limiter(RULES)
    assert len(fill(limiter)) > 16_000
    large = [make_request(*[{"agent": f"{number}.{index}"} for index in range(40)]) for number in range(2_100)]
    for request in large * 2:
        if request not in cache.plans:
            cache.keep(request, limiter.plan(request))
    assert 1_000 < len(cache.plans) < 2_000
    assert cache.bytes <= MAX_PLANS_BYTES
