"""Invented keys: what a flood of them leaves to honest callers, new ones and others, under its own rule and others."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from joined import join
from limiter.requests import NOW_US, OK, OVER_LIMIT, decide, make_request

from ratelimit_sidecar.crdt.bucket import Entry, Origin
from ratelimit_sidecar.crdt.limit import Window
from ratelimit_sidecar.crdt.slot import slot_id
from ratelimit_sidecar.limiter.key import (
    BUCKET_TYPES,
    DEFAULT_RULE,
    EXACT,
    KEY_ONLY,
    OVERFLOW,
    OVERFLOW_BUCKETS,
    OVERRIDE,
    OVERRIDE_LIMIT,
    PATTERN,
    TOKEN_BUCKET,
    WILDCARD_VALUE,
    KeyEntry,
    encode_bucket_key,
    is_overflow_key,
    overflow_keys,
    rule_key,
)
from ratelimit_sidecar.limiter.limiter import Limiter
from ratelimit_sidecar.limiter.rules import Rule, RuleNode, Rules, Unit, limit_of_rate

MAX_BUCKETS = 45_000
REQUESTS = 10


def a_day(name: str) -> Rule:
    return Rule(name, limit_of_rate(REQUESTS, Unit.DAY, Window.FIXED), REQUESTS, Unit.DAY)


RULES = Rules({"api": RuleNode(key_only={"user": RuleNode(a_day("api.user")), "ip": RuleNode(a_day("api.ip"))})})


@pytest.fixture(scope="module")
def flooded() -> Limiter:
    """Ten times as many keys as there is room for overflow buckets were invented after the store was full."""
    limiter = Limiter(RULES, Origin("here", 1), max_buckets=MAX_BUCKETS)
    limiter.decide(make_request({"user": "known"}, hits=4), NOW_US)
    for number in range(MAX_BUCKETS + 4 * OVERFLOW_BUCKETS):
        limiter.decide(make_request({"user": f"invented {number}"}), NOW_US)
    return limiter


def test_new_callers_share_with_a_sliver_of_a_flood(flooded: Limiter) -> None:
    new = [decide(flooded, make_request({"user": f"new {number}"})).overall_code for number in range(500)]
    # Some 21,000 keys in 4,096 buckets of 10 tokens: by chance one in twenty is full.
    assert new.count(OVER_LIMIT) <= 40
    assert flooded.overflow_decisions["api", "api.user"] > 4 * OVERFLOW_BUCKETS


def test_a_known_caller_has_what_it_had(flooded: Limiter) -> None:
    assert decide(flooded, make_request({"user": "known"})).statuses[0].limit_remaining == REQUESTS - 5


def test_a_new_caller_is_limited_nevertheless(flooded: Limiter) -> None:
    codes = [decide(flooded, make_request({"user": "greedy"})).overall_code for _ in range(REQUESTS + 1)]
    assert codes[-1] == OVER_LIMIT


def test_other_rules_have_room_as_before(flooded: Limiter) -> None:
    before = len(flooded.store)
    for number in range(300):
        assert decide(flooded, make_request({"ip": f"{number}"})).statuses[0].limit_remaining == REQUESTS - 1
    assert len(flooded.store) == before + 300
    assert ("api", "api.ip") not in flooded.overflow_decisions


def test_buckets_stay_below_their_bound_and_the_alarm_is_on(flooded: Limiter) -> None:
    assert len(flooded.store) <= MAX_BUCKETS
    assert flooded.store.full_since_us == NOW_US


def test_peers_share_overflow_buckets() -> None:
    limiter = Limiter(RULES, Origin("here", 1), max_buckets=1)
    [take] = limiter.plan(make_request({"user": "ada"})).takes
    numbered, last = overflow_keys(take.bucket_key)
    limit = a_day("").limit
    assert limit is not None
    for key in (numbered, last):
        assert limiter.store.limit_of_key(key) == limit
    slot = slot_id(NOW_US, limit.exponent)
    assert join(limiter.store, last, None, [Entry(Origin("there", 1), slot, REQUESTS)], NOW_US) == 1
    decide(limiter, make_request({"ip": "full now"}))
    assert decide(limiter, make_request({"user": "ada"})).overall_code == OVER_LIMIT


texts = st.text(max_size=3)
rules_entries = st.lists(
    st.builds(KeyEntry, st.sampled_from([EXACT, KEY_ONLY, PATTERN, WILDCARD_VALUE]), texts, texts), min_size=1
)
default_rule_entries = st.lists(st.builds(KeyEntry, st.just(DEFAULT_RULE), texts, texts), min_size=1)
override_entries = st.builds(
    lambda entries, requests, unit: [*entries, KeyEntry(OVERRIDE_LIMIT, str(requests), unit)],
    st.lists(st.builds(KeyEntry, st.just(OVERRIDE), texts, texts)),
    st.integers(0, 2**32 - 1),
    st.sampled_from(sorted(Unit.__members__)),
)
names = st.builds(
    encode_bucket_key,
    st.sampled_from(sorted(bucket_type for bucket_type in BUCKET_TYPES if not bucket_type & OVERFLOW)),
    texts,
    rules_entries | default_rule_entries | override_entries,
)


@given(names)
def test_an_overflow_bucket_is_its_rules_and_the_last_is_that_of_all_of_them(name: bytes) -> None:
    numbered, last = overflow_keys(name)
    assert rule_key(numbered) == rule_key(last) == last
    assert last[1:] == rule_key(name)[1:]
    assert is_overflow_key(numbered)
    assert is_overflow_key(last)
    assert not is_overflow_key(name)
    assert rule_key(rule_key(name)) == rule_key(name)


@given(names, st.text(max_size=5))
def test_only_so_many_overflow_buckets_of_a_rule_are_known(name: bytes, number: str) -> None:
    _, last = overflow_keys(name)
    invented = last + encode_bucket_key(0, "", [KeyEntry(WILDCARD_VALUE, "", number)])[2:]
    assert is_overflow_key(invented) == (number in {str(known) for known in range(OVERFLOW_BUCKETS)})


def test_an_honest_caller_is_admitted_again_once_the_flood_is_over_and_its_buckets_are_idle() -> None:
    limiter = Limiter(RULES, Origin("here", 1), max_buckets=100)
    for number in range(1_000):
        limiter.decide(make_request({"user": f"invented {number}"}), NOW_US)
    request = make_request({"user": "ada"})
    assert decide(limiter, request).overall_code == OVER_LIMIT
    later_us = NOW_US + 3 * 86_400_000_000
    limiter.store.drain_changes()
    limiter.store.sweep(later_us, len(limiter.store))
    assert limiter.store.full_since_us is None
    assert decide(limiter, request, later_us).overall_code == OK
    assert limiter.store.get(limiter.plan(request).takes[0].bucket_key) is not None


def test_every_replica_and_version_has_the_same_overflow_bucket_for_a_key() -> None:
    name = encode_bucket_key(TOKEN_BUCKET, "api", [KeyEntry(KEY_ONLY, "user", "ada")])
    last = b"\x40\x03api\x01\x04user\x00"
    assert overflow_keys(name) == (last + b"\x03\x00\x043770", last)
