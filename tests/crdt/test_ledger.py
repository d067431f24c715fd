"""All strict buckets of a replica: which of them speak to whom, and which may be forgotten."""

from __future__ import annotations

import pytest

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.ledger import LOST_AT_ONCE, Ledger
from ratelimit_sidecar.crdt.lending import ASK_AGAIN_US
from ratelimit_sidecar.crdt.limit import Limit, Window, WindowLimit
from ratelimit_sidecar.crdt.shares import LOAN_GUARD_US, LOAN_US, PARTS, Membership, Shares, parts_of
from ratelimit_sidecar.crdt.store import StoreFull
from ratelimit_sidecar.crdt.strict import Ask, Return

LIMIT = Limit(100, 1_000_000, 100)
STARTED_US = 1_000_000_000
NOW_US = STARTED_US + LOAN_US + LOAN_GUARD_US + 2_000_000
HOMES = {"b": PARTS // 2}


def make_ledger(node: str = "a") -> Ledger:
    limits = {b"k": LIMIT, b"window": WindowLimit(1, 1_000_000, Window.FIXED)}
    shares = Shares(Membership(1, {"a": 1, "b": 1}), node, STARTED_US)
    return Ledger(shares, Origin(node, 1), limits.get, first_number=0)


def test_a_bucket_begins_full_with_its_home_share_when_it_was_not_asked_for_since_the_start() -> None:
    bucket = make_ledger().bucket(b"k", LIMIT, NOW_US)
    assert (bucket.share, bucket.remaining) == (PARTS // 2, 50)


def test_a_replica_just_started_admits_nothing_of_its_own() -> None:
    assert not make_ledger().bucket(b"k", LIMIT, STARTED_US).take(1, STARTED_US)


def test_a_bucket_that_is_short_asks_and_uses_what_it_is_granted() -> None:
    here, there = make_ledger("a"), make_ledger("b")
    bucket = here.bucket(b"k", LIMIT, NOW_US)
    assert bucket.take(50, NOW_US)
    assert not bucket.take(40, NOW_US)
    wishes = here.tick(HOMES, NOW_US, most=10)["b"]
    grant = there.answer("a", b"k", wishes.asks[b"k"], NOW_US)
    assert grant is not None
    here.granted("b", b"k", grant, NOW_US)
    assert bucket.take(40, NOW_US)
    later_us = NOW_US + 1_500_000
    returned = here.tick(HOMES, later_us, most=10)["b"].returns[b"k"]
    there.returned("a", b"k", returned, later_us)
    assert there.bucket(b"k", LIMIT, later_us).share == PARTS // 2


def test_nothing_is_said_about_a_bucket_nobody_asks_for() -> None:
    ledger = make_ledger()
    ledger.bucket(b"k", LIMIT, NOW_US)
    assert ledger.tick(HOMES, NOW_US, most=10) == {}


def test_a_tick_looks_at_no_more_buckets_than_it_may_and_at_all_in_turn() -> None:
    ledger = make_ledger()
    keys = [b"k%d" % index for index in range(10)]
    for key in keys:
        ledger.bucket(key, LIMIT, NOW_US).take(60, NOW_US)
    asked = [key for _ in range(3) for key in ledger.tick(HOMES, NOW_US, most=4)["b"].asks]
    assert asked == keys


def test_a_lost_peer_is_asked_again_for_all_buckets_though_only_some_are_told_of_its_loss_at_once() -> None:
    ledger = make_ledger()
    count = LOST_AT_ONCE + 3
    for index in range(count):
        ledger.bucket(b"k%d" % index, LIMIT, NOW_US).take(60, NOW_US)

    def asked(now_us: int) -> int:
        wishes = ledger.tick(HOMES, now_us, most=count)
        return len(wishes["b"].asks) if wishes else 0

    assert asked(NOW_US) == count
    ledger.lost("b")
    assert asked(NOW_US + 1_000) == LOST_AT_ONCE
    assert asked(NOW_US + ASK_AGAIN_US) == 3


def test_nobody_borrows_of_a_key_without_a_strict_token_bucket_here() -> None:
    ledger = make_ledger()
    assert ledger.answer("b", b"unknown", Ask(1, 1), NOW_US) is None
    assert ledger.answer("b", b"window", Ask(1, 1), NOW_US) is None
    assert len(ledger) == 0


def test_returns_and_grants_of_unknown_keys_change_nothing() -> None:
    ledger = make_ledger()
    ledger.returned("b", b"k", Return(1, 0, 5), NOW_US)
    assert len(ledger) == 0


def test_a_full_bucket_without_loans_is_dropped_and_no_other() -> None:
    ledger = make_ledger()
    ledger.bucket(b"k", LIMIT, NOW_US).take(10, NOW_US)
    ledger.answer("b", b"k", Ask(1, PARTS // 4), NOW_US)
    ledger.tick(HOMES, NOW_US, most=10)
    assert ledger.sweep(NOW_US, most=10) == 0
    later_us = NOW_US + LOAN_US + LOAN_GUARD_US + 3_000_000
    ledger.tick(HOMES, later_us, most=10)
    assert ledger.sweep(later_us, most=10) == 1
    assert len(ledger) == 0


def test_a_bucket_made_anew_uses_no_grant_to_an_ask_from_before_it_was_dropped() -> None:
    here, there = make_ledger("a"), make_ledger("b")
    bucket = here.bucket(b"k", LIMIT, NOW_US)
    bucket.take(50, NOW_US)
    assert not bucket.take(40, NOW_US)
    late = there.answer("a", b"k", here.tick(HOMES, NOW_US, most=10)["b"].asks[b"k"], NOW_US)
    assert late is not None
    assert late.parts > 0
    # The answer does not come. Nobody wants anything any more, and the bucket is dropped.
    later_us = NOW_US + LOAN_US + LOAN_GUARD_US + 3_000_000
    here.tick(HOMES, later_us, most=10)
    assert here.sweep(later_us, most=10) == 1
    bucket = here.bucket(b"k", LIMIT, later_us)
    bucket.take(50, later_us)
    assert not bucket.take(40, later_us)
    here.tick(HOMES, later_us, most=10)
    # Now it comes: the lender's loan has ended long ago.
    here.granted("b", b"k", late, later_us)
    assert bucket.share == PARTS // 2


def test_a_new_limit_is_enforced_on_the_live_bucket() -> None:
    ledger = make_ledger()
    ledger.bucket(b"k", LIMIT, NOW_US).take(50, NOW_US)
    bucket = ledger.bucket(b"k", Limit(100, 1_000_000, 400), NOW_US)
    bucket.advance(NOW_US + 2_000_000)
    assert bucket.remaining == 100


def test_an_ask_for_nothing_is_answered_with_nothing() -> None:
    grant = make_ledger().answer("b", b"k", Ask(1, 0), NOW_US)
    assert grant is not None
    assert (grant.parts, grant.tokens) == (0, 0)


def test_a_full_ledger_has_no_room_for_new_keys_and_lends_nothing_of_them() -> None:
    shares = Shares(Membership(1, {"a": 1, "b": 1}), "a", STARTED_US)
    ledger = Ledger(
        shares,
        Origin("a", 1),
        lambda _key: LIMIT,
        first_number=0,
        max_buckets=1,
        rule_key=lambda _key: b"rule",
    )
    ledger.bucket(b"k", LIMIT, NOW_US).take(1, NOW_US)
    with pytest.raises(StoreFull):
        ledger.bucket(b"other", LIMIT, NOW_US)
    assert ledger.answer("b", b"other", Ask(1, 1), NOW_US) is None
    assert ledger.bucket(b"rule", LIMIT, NOW_US).take(1, NOW_US)
    assert ledger.bucket(b"k", LIMIT, NOW_US).take(1, NOW_US)


def test_what_is_withheld_is_no_longer_the_buckets_nor_lent_and_comes_back_without_tokens() -> None:
    ledger = make_ledger()
    bucket = ledger.bucket(b"k", LIMIT, NOW_US)
    assert bucket.take(20, NOW_US)
    # Of its 50 tokens 30 are left: no more can be somebody else's.
    assert ledger.withhold(b"k", LIMIT, PARTS // 2, NOW_US) == parts_of(30, 100)
    assert bucket.remaining == 0
    assert bucket.home_now == PARTS // 2 - parts_of(30, 100)
    grant = ledger.answer("b", b"k", Ask(1, PARTS), NOW_US)
    assert grant is not None
    assert grant.parts <= parts_of(20, 100)
    assert ledger.withhold(b"k", LIMIT, 0, NOW_US) == 0
    assert bucket.home_now == ledger.own_parts(b"k", LIMIT, NOW_US) == PARTS // 2
    assert bucket.remaining == 0


def test_what_is_lent_is_not_withheld() -> None:
    ledger = make_ledger()
    ledger.bucket(b"k", LIMIT, NOW_US)
    grant = ledger.answer("b", b"k", Ask(1, parts_of(40, 100)), NOW_US)
    assert grant is not None
    assert ledger.withhold(b"k", LIMIT, PARTS // 2, NOW_US) <= PARTS // 2 - grant.parts


def test_nothing_is_withheld_before_there_is_a_home_share() -> None:
    assert make_ledger().withhold(b"k", LIMIT, PARTS // 2, STARTED_US) == 0
