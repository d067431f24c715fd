"""Hits of a descriptor with `is_negative_hits` are given back: what a request may cost is held, and later settled."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from limiter.requests import NOW_US, OK, OVER_LIMIT, decide, make_limiter
from limiter.test_answers import rule, rules_of

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.ledger import Ledger
from ratelimit_sidecar.crdt.limit import Window
from ratelimit_sidecar.crdt.shares import Membership, Shares
from ratelimit_sidecar.limiter.limiter import Limiter
from ratelimit_sidecar.limiter.rules import Charge, Consistency, Rule, Unit, limit_of_rate
from ratelimit_sidecar.limiter.v1.request_pb2 import Request

WINDOWS = [None, Window.SLIDING, Window.FIXED]


def asking(*hits: int, key: str = "a") -> bytes:
    """A request with a descriptor for each of `hits`; negative ones are given back."""
    request = Request(domain=b"api")
    for each in hits:
        descriptor = request.descriptors.add(is_negative_hits=each < 0)
        descriptor.entries.add(key=key.encode(), value=b"1")
        descriptor.hits_addend.value = abs(each)
    raw: bytes = request.SerializeToString()
    return raw


def left(limiter: Limiter, key: str = "a") -> int:
    return decide(limiter, asking(0, key=key)).statuses[0].limit_remaining


@pytest.mark.parametrize("settled", [(-8, 3), (3, -8)])
def test_what_was_held_is_given_back_and_what_was_used_is_charged(settled: tuple[int, ...]) -> None:
    limiter = make_limiter(rules_of(rule("a", 10)))
    assert decide(limiter, asking(8)).overall_code == OK
    answer = decide(limiter, asking(*settled))
    assert [status.code for status in answer.statuses] == [OK, OK]
    assert left(limiter) == 7
    assert limiter.counts["api", "api.a"].given_back == 8


@pytest.mark.parametrize("window", WINDOWS)
def test_what_was_used_is_charged_though_more_was_used_than_held(window: Window | None) -> None:
    limiter = make_limiter(rules_of(rule("a", 10, window=window)))
    decide(limiter, asking(8))
    decide(limiter, asking(-8, 12))
    assert decide(limiter, asking(0)).overall_code == OVER_LIMIT
    assert limiter.counts["api", "api.a"].tokens == 8 + 12


def test_no_more_is_given_back_than_was_taken() -> None:
    limiter = make_limiter(rules_of(rule("a", 10)))
    decide(limiter, asking(1))
    assert decide(limiter, asking(-(2**60))).overall_code == OK
    assert left(limiter) == 10
    assert limiter.counts["api", "api.a"].given_back == 1


def test_what_is_used_of_another_limit_is_not_charged_beyond_it() -> None:
    limiter = make_limiter(rules_of(rule("a", 10), rule("b", 10)))
    request = Request.FromString(asking(-3))
    request.MergeFrom(Request.FromString(asking(11, key="b")))
    request.domain = b"api"
    assert decide(limiter, request.SerializeToString()).statuses[1].code == OVER_LIMIT
    assert left(limiter, "b") == 10


def test_hits_of_the_request_are_given_back_by_a_descriptor_without_its_own() -> None:
    limiter = make_limiter(rules_of(rule("a", 10)))
    decide(limiter, asking(8))
    request = Request.FromString(asking(-1))
    request.hits_addend = 5
    request.descriptors[0].ClearField("hits_addend")
    decide(limiter, request.SerializeToString())
    assert left(limiter) == 7


def test_what_is_given_back_counts_although_the_request_charges_nothing() -> None:
    """All or nothing: the request is denied by another limit."""
    limiter = make_limiter(rules_of(rule("a", 10), rule("b", 0), all_or_nothing=frozenset(("api",))))
    decide(limiter, asking(8))
    request = Request.FromString(asking(-8))
    request.MergeFrom(Request.FromString(asking(1, key="b")))
    request.domain = b"api"
    assert decide(limiter, request.SerializeToString()).overall_code == OVER_LIMIT
    assert left(limiter) == 10


def test_a_strict_limit_gives_nothing_back() -> None:
    """What all sidecars hold together is never more than the limit."""
    shares = Shares(Membership(1, {"here": 1}), "here", NOW_US - 600_000_000)
    rules = rules_of(rule("a", 10, consistency=Consistency.STRICT))
    limiter = Limiter(rules, Origin("here", 1), None, Ledger(shares, Origin("here", 1), lambda key: None))
    decide(limiter, asking(8))
    assert decide(limiter, asking(-8)).overall_code == OK
    assert left(limiter) == 2


@pytest.mark.parametrize("window", list(Window))
def test_a_window_gives_nothing_back(window: Window) -> None:
    """What two sidecars give back of it would not be summed."""
    limiter = make_limiter(rules_of(rule("a", 10, window=window)))
    decide(limiter, asking(8))
    decide(limiter, asking(-8))
    assert left(limiter) == 2


@given(st.lists(st.tuples(st.integers(1, 100), st.integers(0, 120)), max_size=30), st.integers(1, 4))
def test_a_peer_that_hears_of_holds_that_were_settled_has_as_much_left(
    requests: list[tuple[int, int]], max_debt: int
) -> None:
    """Also when all that was held within one slot is more than the debt that is remembered."""
    limit = limit_of_rate(100, Unit.MINUTE, None, max_debt=max_debt)
    rules = rules_of(Rule("api.a", limit, 100, Unit.MINUTE))
    limiter = make_limiter(rules)
    for held, spent in requests:
        if decide(limiter, asking(held)).overall_code == OK:
            decide(limiter, asking(-held, spent))
    decide(limiter, asking(0))
    peer = Limiter(rules, Origin("there", 1), None)
    for bucket in limiter.store:
        peer.store.join(bucket.key, limit, bucket.base_to_send, list(bucket.entries()), NOW_US)
        there = peer.store.get(bucket.key)
        assert there is not None
        there.advance(NOW_US)
        assert there.fold(NOW_US) == bucket.fold(NOW_US)
        assert abs(there.remaining - bucket.remaining) <= 1


def test_a_hold_is_charged_by_its_limit_and_not_into_debt() -> None:
    limiter = make_limiter(rules_of(rule("a", 10, charge=Charge.ADMITTED)))
    assert [decide(limiter, asking(11)).overall_code for _ in range(2)] == [OVER_LIMIT] * 2
    assert left(limiter) == 10


def test_an_unlimited_descriptor_gives_back_nothing() -> None:
    limiter = make_limiter(rules_of(rule("a")))
    assert decide(limiter, asking(-5, key="other"), NOW_US).overall_code == OK
