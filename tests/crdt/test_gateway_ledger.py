"""The purses of a region at its gateway: it pays what it was granted, and asks for what it was granted room for."""

from __future__ import annotations

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.gateway_ledger import GatewayLedger, gateway_needs
from ratelimit_sidecar.crdt.granted import GRANT_US, DrawReply, GrantedBucket, Needs
from ratelimit_sidecar.crdt.limit import TokenBucketLimit
from ratelimit_sidecar.crdt.payment_policy import SHORTAGE_US, Ask, Payment
from ratelimit_sidecar.crdt.shares import TOKEN, Membership, Shares

KEY = b"k"
LIMIT = TokenBucketLimit(100, 1_000_000, 100)
NOW_US = 10**12
END = 1


def gateway() -> GatewayLedger:
    shares = Shares(Membership(1, {"east": 1, "west": 1}), "east", NOW_US)
    shares.from_us = NOW_US
    return GatewayLedger(shares, Origin("east", 1), lambda _key: LIMIT)


def bucket_of(ledger: GatewayLedger) -> GrantedBucket:
    bucket = ledger.bucket(KEY, LIMIT, NOW_US)
    assert isinstance(bucket, GrantedBucket)
    bucket.home = 50 * TOKEN
    return bucket


def answered(ledger: GatewayLedger, now_us: int, *, tokens: int = 0, room: int = 0, left: int = 0) -> Needs:
    """A call to the account, and what that grants."""
    bucket = bucket_of(ledger)
    needs = gateway_needs(bucket, now_us)
    assert needs is not None
    request = bucket.draw(needs)
    bucket.grant_received(
        request, DrawReply(request.kept, min(tokens, needs.wanted), min(room, needs.room), left), 1, now_us
    )
    return needs


def asks(ledger: GatewayLedger, now_us: int) -> dict[str, dict[bytes, Ask]]:
    return ledger.tick({"west": END}, now_us, 16, 1_000)


def test_what_the_region_is_short_of_is_asked_for_as_far_as_there_is_room() -> None:
    ledger = gateway()
    ledger.note_short(KEY, NOW_US, 50_000)
    assert asks(ledger, NOW_US) == {}
    assert answered(ledger, NOW_US, room=30).room == LIMIT.capacity
    [ask] = asks(ledger, NOW_US)["west"].values()
    assert 0 < ask.amount <= 30 * TOKEN
    assert ask.is_short


def test_what_is_paid_goes_into_the_account() -> None:
    ledger = gateway()
    ledger.note_short(KEY, NOW_US, 50_000)
    answered(ledger, NOW_US, room=30)
    asks(ledger, NOW_US)
    assert ledger.receive_payment("west", END, KEY, Payment(20 * TOKEN, 0), NOW_US)
    bucket = bucket_of(ledger)
    assert bucket.held == 20
    needs = gateway_needs(bucket, NOW_US)
    assert needs is not None
    request = bucket.draw(needs)
    assert (request.ends, request.back, request.kept) == (30, 20, 0)


def test_a_payment_after_the_grant_has_ended_does_not_count() -> None:
    ledger = gateway()
    ledger.note_short(KEY, NOW_US, 50_000)
    answered(ledger, NOW_US, room=30)
    asks(ledger, NOW_US)
    ledger.receive_payment("west", END, KEY, Payment(20 * TOKEN, 0), NOW_US + GRANT_US)
    assert bucket_of(ledger).held == 0


def test_what_another_member_asks_for_is_drawn_and_then_paid() -> None:
    ledger = gateway()
    ask = Ask(10 * TOKEN, 0, 100 * TOKEN, is_short=True)
    assert ledger.pay("west", KEY, ask, NOW_US) == Payment(0, 0)
    answered(ledger, NOW_US, left=40)
    assert answered(ledger, NOW_US, tokens=10, left=30).wanted == 10
    pay = ledger.pay("west", KEY, ask, NOW_US)
    assert pay is not None
    assert pay.amount == 10 * TOKEN
    assert pay.left > 0
    assert bucket_of(ledger).held == 0


def test_what_was_drawn_for_others_is_not_paid_once_its_grant_has_ended() -> None:
    ledger = gateway()
    ask = Ask(10 * TOKEN, 0, 100 * TOKEN, is_short=True)
    ledger.pay("west", KEY, ask, NOW_US)
    answered(ledger, NOW_US, left=40)
    answered(ledger, NOW_US, tokens=10, left=30)
    pay = ledger.pay("west", KEY, ask, NOW_US + GRANT_US)
    assert pay is not None
    assert pay.amount == 0


def test_one_that_is_short_itself_pays_nothing_and_keeps_nothing() -> None:
    ledger = gateway()
    ask = Ask(10 * TOKEN, 0, 100 * TOKEN, is_short=True)
    ledger.pay("west", KEY, ask, NOW_US)
    answered(ledger, NOW_US, left=40)
    answered(ledger, NOW_US, tokens=10, left=30)
    ledger.note_short(KEY, NOW_US, 50_000)
    assert ledger.pay("west", KEY, ask, NOW_US) == Payment(0, 0)
    assert bucket_of(ledger).draw(Needs(0, 0)).back == 10


def test_when_nobody_asks_any_more_all_goes_back() -> None:
    ledger = gateway()
    ask = Ask(10 * TOKEN, 0, 100 * TOKEN, is_short=True)
    ledger.pay("west", KEY, ask, NOW_US)
    answered(ledger, NOW_US, left=40)
    answered(ledger, NOW_US, tokens=10, left=30)
    later_us = NOW_US + SHORTAGE_US
    assert answered(ledger, later_us).max_held == 0
    assert bucket_of(ledger).held == 0
    assert gateway_needs(bucket_of(ledger), later_us) is None
