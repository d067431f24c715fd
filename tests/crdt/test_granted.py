"""A bucket that spends what its region's account granted, and what it calls for. tests/fabric has the account."""

from __future__ import annotations

from young import collected_when_told

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.draw_policy import DRAW_AHEAD_US, STANDING_US, draw_needs
from ratelimit_sidecar.crdt.granted import GRANT_US, DrawReply, GrantedBucket, GrantLedger, Needs
from ratelimit_sidecar.crdt.limit import TokenBucketLimit
from ratelimit_sidecar.crdt.payment_policy import SHORTAGE_US
from ratelimit_sidecar.crdt.shares import Membership, Shares
from ratelimit_sidecar.crdt.strict import DEMAND_US

LIMIT = TokenBucketLimit(100, 1_000_000, 100)
NOW_US = 10**12


def holding(tokens: int, *, left: int = 0) -> GrantedBucket:
    bucket = GrantedBucket(b"k", LIMIT, Origin("a", 1), NOW_US)
    bucket.grant_received(bucket.draw(Needs(tokens, tokens)), DrawReply(0, tokens, 0, left), 1, NOW_US)
    return bucket


def test_it_admits_what_it_holds_and_no_more() -> None:
    bucket = holding(3)
    assert [bucket.take(1, NOW_US) for _ in range(4)] == [True, True, True, False]


def test_nothing_refills_here() -> None:
    bucket = holding(3)
    bucket.take(3, NOW_US)
    assert not bucket.take(1, NOW_US + GRANT_US // 2)


def test_a_grant_ends_and_does_not_come_back() -> None:
    bucket = holding(3)
    assert bucket.take(1, NOW_US + GRANT_US - 1)
    assert not bucket.take(1, NOW_US + GRANT_US)
    # An answer that comes late.
    bucket.grant_received(bucket.draw(Needs(0, 3)), DrawReply(0, 0, 0, 0), 1, NOW_US + GRANT_US)
    assert not bucket.take(1, NOW_US + GRANT_US)


def test_a_call_ends_the_former_grant_and_counts_what_is_left_of_it() -> None:
    bucket = holding(10)
    bucket.take(4, NOW_US)
    request = bucket.draw(Needs(5, 3))
    assert (request.ends, request.kept, request.back, request.wanted) == (10, 3, 3, 5)
    # Spent while the call is on its way.
    bucket.take(1, NOW_US)
    bucket.grant_received(request, DrawReply(3, 5, 0, 0), 1, NOW_US)
    assert (bucket.held, bucket.granted) == (7, 8)


def test_what_is_charged_beyond_the_debt_ceiling_is_forgiven_and_the_rest_drawn() -> None:
    bucket = holding(3)
    bucket.take(2**48, NOW_US, always=True)
    owed = bucket.debt
    assert owed <= LIMIT.debt_ceiling // LIMIT.period_us
    bucket.grant_received(bucket.draw(Needs(100, 100)), DrawReply(0, 100, 0, 0), 1, NOW_US)
    assert bucket.debt == owed - 100


def test_without_an_answer_it_spends_what_it_holds_until_the_former_end_and_the_next_call_ends_nothing() -> None:
    bucket = holding(10)
    bucket.draw(Needs(5, 6))
    request = bucket.draw(Needs(5, 2))
    assert (request.generation, request.ends, request.kept, request.back) == (-1, 0, 6, 0)
    assert bucket.take(1, NOW_US + GRANT_US - 1)
    assert not bucket.take(1, NOW_US + GRANT_US)


def test_an_answer_that_nothing_was_done_leaves_all_as_it_was() -> None:
    bucket = holding(10)
    bucket.not_done(bucket.draw(Needs(5, 6)))
    request = bucket.draw(Needs(0, 10))
    assert (request.generation, request.ends, request.kept) == (1, 10, 10)


def test_what_was_kept_is_given_up_when_its_grant_had_ended_for_the_account() -> None:
    bucket = holding(10)
    bucket.grant_received(bucket.draw(Needs(2, 10)), DrawReply(0, 2, 0, 0), 5, NOW_US)
    assert bucket.held == 2


def test_another_limit_takes_its_tokens_along_and_adds_none() -> None:
    bucket = holding(10)
    bucket.set_limit(TokenBucketLimit(7, 3_000_000, 20), NOW_US)
    assert bucket.held in (9, 10)
    assert bucket.granted == 10


def test_it_wants_what_it_denied_lately() -> None:
    bucket = holding(0)
    assert not bucket.take(30, NOW_US)
    assert draw_needs(bucket, NOW_US) == Needs(30, 60)
    bucket.advance(NOW_US + SHORTAGE_US)
    later = draw_needs(bucket, NOW_US + SHORTAGE_US)
    assert later is not None
    assert later.wanted < 10


def test_it_wants_what_will_be_asked_for_soon() -> None:
    bucket = holding(100)
    for step in range(100):
        bucket.take(1, NOW_US + step * 10_000)
    now_us = NOW_US + 1_000_000
    bucket.advance(now_us)
    wanted = draw_needs(bucket, now_us)
    assert wanted is not None
    assert 50 * DRAW_AHEAD_US // 1_000_000 <= wanted.wanted <= 100 * DRAW_AHEAD_US // 1_000_000


def test_while_there_is_plenty_it_holds_something_for_the_request_after_a_pause() -> None:
    bucket = holding(0, left=50)
    bucket.take(0, NOW_US)
    assert draw_needs(bucket, NOW_US) == Needs(4, 8)
    bucket.advance(NOW_US + STANDING_US)
    assert draw_needs(bucket, NOW_US + STANDING_US) is None


def test_what_is_held_is_renewed_before_it_ends() -> None:
    bucket = holding(4, left=50)
    bucket.take(0, NOW_US)
    assert draw_needs(bucket, NOW_US) is None
    now_us = NOW_US + GRANT_US // 2 + 1
    bucket.advance(now_us)
    assert draw_needs(bucket, now_us) == Needs(0, 8)


def test_an_account_that_had_too_little_is_asked_again_when_something_has_refilled() -> None:
    slow = TokenBucketLimit(5, 60_000_000, 5)
    bucket = GrantedBucket(b"k", slow, Origin("a", 1), NOW_US)
    bucket.take(1, NOW_US)
    bucket.paced_us = NOW_US
    assert draw_needs(bucket, NOW_US + 50_000) is None
    bucket.take(1, NOW_US + 1_000_000)
    assert draw_needs(bucket, NOW_US + 1_000_000) == Needs(1, 2)


def test_nothing_is_drawn_for_a_request_that_is_never_admitted() -> None:
    bucket = holding(1, left=16)
    assert not bucket.take(LIMIT.capacity + 1, NOW_US)
    assert not bucket.would_admit(LIMIT.capacity + 1, NOW_US)
    assert draw_needs(bucket, NOW_US) is None
    assert not bucket.take(LIMIT.capacity, NOW_US)
    needed = draw_needs(bucket, NOW_US)
    assert needed is not None
    assert needed.wanted == LIMIT.capacity - 1


def make_ledger() -> GrantLedger:
    return GrantLedger(Shares(Membership(1, {"here": 1}), "here", NOW_US), Origin("a", 1), lambda _key: LIMIT)


def test_a_turn_is_a_look_at_one_bucket_however_many_are_used_no_more() -> None:
    ledger = make_ledger()
    for number in range(100):
        ledger.bucket(b"k%d" % number, LIMIT, NOW_US).take(1, NOW_US)
    later_us = NOW_US + 2 * DEMAND_US
    used = ledger.bucket(b"used", LIMIT, later_us)
    used.take(1, later_us)
    assert [ledger.next_active(later_us) for _ in range(101)] == [None] * 100 + [used]
    assert ledger.active == 1


def test_granted_buckets_that_come_and_go_are_not_all_young_to_the_cycle_collector() -> None:
    ledger = make_ledger()
    with collected_when_told() as young_objects:
        for number in range(1_000):
            ledger.bucket(b"k%d" % number, LIMIT, NOW_US).take(1, NOW_US)
        young = young_objects()
    assert sum(isinstance(found, GrantedBucket) for found in young) < 400
