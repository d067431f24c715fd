"""Requests that wait: which may, and how they are decided in the end."""

from __future__ import annotations

from dataclasses import replace

import pytest
from limiter.requests import NOW_US, OK, OVER_LIMIT, make_request

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.ledger import Ledger
from ratelimit_sidecar.crdt.limit import TokenBucketLimit
from ratelimit_sidecar.crdt.payment_policy import Ticket
from ratelimit_sidecar.crdt.shares import TOKEN, Membership, Shares
from ratelimit_sidecar.crdt.waiting import Outcome, PendingDecision, Wish
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2 import RateLimitResponse
from ratelimit_sidecar.limiter.limiter import MAX_WAITING_BYTES, Limiter
from ratelimit_sidecar.limiter.rules import Charge, Consistency, Rule, RuleNode, Rules, Unit
from ratelimit_sidecar.limiter.settings import AnswerSettings

PLAN = Rule("api.plan", TokenBucketLimit(1, 60_000_000, 10), 1, Unit.MINUTE, Consistency.STRICT, wait_us=250_000)
TEAM = replace(PLAN, name="api.team")
HURRIED = replace(PLAN, name="api.hurried", wait_us=0)
USER = Rule("api.user", TokenBucketLimit(1, 60_000_000, 2), 1, Unit.MINUTE)
REQUEST = make_request({"plan": "gold"})


def rules_of(*rules: Rule) -> Rules:
    return Rules({"api": RuleNode(key_only={rule.name.removeprefix("api."): RuleNode(rule) for rule in rules})})


class Node:
    """A limiter with half of each strict limit. The other half is b's, of which it may wish."""

    def __init__(self, *rules: Rule, settings: AnswerSettings | None = None) -> None:
        shares = Shares(Membership(1, {"a": 1, "b": 1}), "a", started_us=0)
        in_force = rules_of(*(rules or (PLAN, TEAM, HURRIED, USER)))
        self.ledger = Ledger(shares, Origin("a", 1), in_force.strict_limit_of_key)
        self.limiter = Limiter(in_force, Origin("a", 1), settings, self.ledger)
        self.ledger.queues.tick(["b"], NOW_US, 10, 1_000)

    def use_up(self, *descriptors: dict[str, str]) -> None:
        for descriptor in descriptors:
            assert code_of(self.limiter.decide(make_request(descriptor, hits=5), NOW_US)) == OK

    def wait(self, request: bytes = REQUEST) -> PendingDecision:
        waiting = self.limiter.decide_or_wait(request, NOW_US)
        assert isinstance(waiting, PendingDecision)
        return waiting

    def code_now(self, request: bytes) -> int:
        answer = self.limiter.decide_or_wait(request, NOW_US)
        assert isinstance(answer, bytes)
        return code_of(answer)

    def come(self, tokens: int) -> None:
        """A ticket of b for what is wished."""
        [(key, wished)] = self.ledger.queues.tick(["b"], NOW_US, 10, 1_000)["b"].items()
        self.ledger.queues.by_key[key].policy.bucket.wish(1)
        self.ledger.accept(1, Wish("b", key, wished, NOW_US), Ticket(tokens, 1_000 * TOKEN), NOW_US)


def code_of(answer: bytes) -> int:
    return RateLimitResponse.FromString(answer).overall_code


def test_a_request_that_finds_the_purse_short_waits_and_is_admitted_with_a_ticket() -> None:
    node = Node()
    node.use_up({"plan": "gold"})
    waiting = node.wait()
    node.come(1)
    assert waiting.outcome is Outcome.SERVED
    assert code_of(waiting.result()) == OK


def test_it_is_denied_when_nothing_comes() -> None:
    node = Node()
    node.use_up({"plan": "gold"})
    waiting = node.wait()
    node.ledger.queues.end(waiting, Outcome.EXPIRED, NOW_US + 250_000)
    assert code_of(waiting.result()) == OVER_LIMIT


def test_decide_never_waits() -> None:
    node = Node()
    node.use_up({"plan": "gold"})
    assert code_of(node.limiter.decide(REQUEST, NOW_US)) == OVER_LIMIT


def test_what_waits_is_counted_once_at_the_end() -> None:
    node = Node()
    node.use_up({"plan": "gold"})
    counts = node.limiter.counts["api", "api.plan"]
    before = (counts.ok, counts.admitted_hits, counts.over_limit_hits, counts.near_limit_hits)
    waiting = node.wait()
    assert (counts.ok, counts.admitted_hits, counts.over_limit_hits, counts.near_limit_hits) == before
    node.come(1)
    assert code_of(waiting.result()) == OK
    assert (counts.ok, counts.admitted_hits) == (before[0] + 1, before[1] + 1)
    assert counts.over_limit_hits == before[2]


def test_a_request_with_one_short_limit_waits_and_takes_nothing_of_the_others_meanwhile() -> None:
    node = Node()
    node.use_up({"plan": "gold"})
    waiting = node.wait(make_request({"user": "ann"}, {"plan": "gold"}, {"team": "red"}))
    assert node.code_now(make_request({"user": "ann"}, hits=2)) == OK
    node.ledger.queues.end(waiting, Outcome.EXPIRED, NOW_US)
    statuses = RateLimitResponse.FromString(waiting.result()).statuses
    assert [status.code for status in statuses] == [OVER_LIMIT, OVER_LIMIT, OK]


@pytest.mark.parametrize(
    "other",
    [{"team": "red"}, {"hurried": "x"}, {"user": "ann"}],
    ids=["one that may wait", "one that may not", "one that is not strict"],
)
def test_a_request_with_two_short_limits_is_decided_at_once(other: dict[str, str]) -> None:
    node = Node()
    node.use_up({"plan": "gold"})
    assert node.code_now(make_request(other, hits=2 if "user" in other else 5)) == OK
    assert node.code_now(make_request({"plan": "gold"}, other)) == OVER_LIMIT
    assert node.code_now(make_request(other, {"plan": "gold"})) == OVER_LIMIT


def test_a_rule_without_wait_decides_at_once() -> None:
    node = Node()
    node.use_up({"hurried": "x"})
    assert node.code_now(make_request({"hurried": "x"})) == OVER_LIMIT


@pytest.mark.parametrize(
    "rule",
    [
        replace(PLAN, shadow_mode=True),
        replace(PLAN, quota_mode=True),
        replace(PLAN, charge=Charge.ALWAYS),
        replace(PLAN, consistency=Consistency.LOCAL),
    ],
    ids=["in shadow mode", "a quota", "charged always", "not strict"],
)
def test_no_request_waits_where_its_answer_would_not_depend_on_it(rule: Rule) -> None:
    node = Node(rule)
    node.limiter.decide(make_request({"plan": "gold"}, hits=10), NOW_US)
    assert isinstance(node.limiter.decide_or_wait(REQUEST, NOW_US), bytes)


def test_no_request_waits_in_global_shadow_mode() -> None:
    node = Node(PLAN, settings=AnswerSettings(shadow_mode=True))
    node.use_up({"plan": "gold"})
    assert node.code_now(REQUEST) == OK


def test_a_long_request_is_decided_at_once() -> None:
    node = Node()
    node.use_up({"plan": "gold"})
    long = make_request({"plan": "gold"}, {"colour": "x" * MAX_WAITING_BYTES})
    assert node.code_now(long) == OVER_LIMIT


def test_when_rules_change_who_waits_is_decided_by_the_new_ones() -> None:
    node = Node()
    node.use_up({"plan": "gold"})
    waiting, other = node.wait(), node.wait(make_request({"plan": "gold"}, {"user": "ann"}))
    node.limiter.use_rules(rules_of(USER))
    node.ledger.queues.tick(["b"], NOW_US, 10, 1_000)
    for each in (waiting, other):
        assert each.outcome is Outcome.CALLED_OFF
        assert code_of(each.result()) == OK
    assert len(RateLimitResponse.FromString(other.result()).statuses) == 2


def test_all_or_nothing_takes_nothing_when_the_wait_is_in_vain() -> None:
    rules = replace(rules_of(PLAN, USER), all_or_nothing=frozenset({"api"}))
    node = Node()
    node.limiter.use_rules(rules)
    node.use_up({"plan": "gold"})
    waiting = node.wait(make_request({"plan": "gold"}, {"user": "ann"}))
    node.ledger.queues.end(waiting, Outcome.EXPIRED, NOW_US)
    assert code_of(waiting.result()) == OVER_LIMIT
    assert node.code_now(make_request({"user": "ann"}, hits=2)) == OK
