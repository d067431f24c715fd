"""A ledger on the mesh: what it says to peers and when, and what it makes of what they say."""

from __future__ import annotations

import pytest
from replication.builders import ELSEWHERE, NOW_US, PAIR, PER_PLAN, RULES, SIT_OUT_US, key_of, ledger_of

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.ledger import Ledger
from ratelimit_sidecar.crdt.shares import PARTS, Membership, Shares, Shown
from ratelimit_sidecar.crdt.strict import StrictBucket
from ratelimit_sidecar.replication.lending import TICK_EVERY_US, Lending
from ratelimit_sidecar.replication.loans import MAX_FRAME_LOANS, MAX_PENDING, LoanOutbox
from ratelimit_sidecar.replication.status import MembershipStatus
from ratelimit_sidecar.replication.v1 import replication_pb2 as pb
from ratelimit_sidecar.replication.wire import ProtocolError, Reason

KEY = key_of("gold", "plan")


class Node:
    """Its lending, and the clock of it; long past its start."""

    def __init__(self, name: str = "a", *, started_us: int = NOW_US - 2 * SIT_OUT_US) -> None:
        self.strict_us = NOW_US
        self.ledger = ledger_of(name, PAIR, started_us)
        self.lending = Lending(self.ledger, lambda: self.strict_us)

    def bucket(self, key: bytes = KEY) -> StrictBucket:
        return self.ledger.bucket(key, PER_PLAN, self.strict_us)

    def use_up(self, key: bytes = KEY) -> None:
        """Be denied: more is wanted than the home share."""
        self.bucket(key).take(self.bucket(key).remaining, self.strict_us)
        assert not self.bucket(key).take(30, self.strict_us)


def loans_to(node: Node, lender: str) -> pb.Loans:
    """What it tells that peer now."""
    outbox = LoanOutbox()
    outbox.add(node.lending.tick([lender])[lender])
    frame = outbox.take_frame()
    assert frame is not None
    return frame.loans


def answer(node: Node, borrower: str, loans: pb.Loans) -> pb.Loans:
    outbox = LoanOutbox()
    node.lending.receive(borrower, loans, outbox)
    frame = outbox.take_frame()
    return pb.Loans() if frame is None else frame.loans


def test_a_loan_asked_for_is_granted_and_used() -> None:
    a, b = Node("a"), Node("b")
    a.use_up()
    granted = answer(b, "a", loans_to(a, "b"))
    assert answer(a, "b", granted) == pb.Loans()
    assert a.bucket().borrowed_from("b") == b.bucket().lent_to("a") > 0
    assert (b.lending.status().loans_granted, a.lending.status().loans_received) == (1, 1)
    assert (a.lending.status().loans_granted, b.lending.status().loans_received) == (0, 0)


def test_what_is_no_longer_needed_is_given_back() -> None:
    a, b = Node("a"), Node("b")
    a.use_up()
    answer(a, "b", answer(b, "a", loans_to(a, "b")))
    a.strict_us = b.strict_us = NOW_US + 1_100_000
    returned = loans_to(a, "b")
    assert len(returned.returns) == 1
    assert answer(b, "a", returned) == pb.Loans()
    assert b.bucket().lent_to("a") == a.bucket().borrowed_from("b") == 0


def test_the_ledger_is_looked_at_every_50_ms() -> None:
    a = Node()
    a.lending.tick(["b"])
    a.use_up()
    a.strict_us += TICK_EVERY_US - 1
    assert a.lending.tick(["b"]) == {}
    a.strict_us += 1
    assert set(a.lending.tick(["b"])) == {"b"}


def test_a_tick_looks_at_fewer_buckets_the_more_peers_there_are() -> None:
    a = Node()
    for index in range(200):
        a.use_up(key_of(f"{index}", "plan"))
    assert len(a.lending.tick(["b"])["b"].asks) == 102


@pytest.mark.parametrize("lenders", [[], ["stranger"]], ids=["nobody in reach", "no member"])
def test_only_members_in_reach_are_asked(lenders: list[str]) -> None:
    a = Node()
    a.use_up()
    assert a.lending.tick(lenders) == {}


def test_a_borrower_of_what_no_strict_rule_knows_is_told_that_there_is_nothing() -> None:
    b, outbox = Node("b"), LoanOutbox()
    asks = [
        pb.LoanAsk(key=key_of("x", "nobody", ELSEWHERE), number=4, parts=5),
        pb.LoanAsk(key=key_of("ann"), number=1),
    ]
    assert b.lending.receive("a", pb.Loans(asks=asks), outbox) == 2
    frame = outbox.take_frame()
    assert frame is not None
    assert list(frame.loans.grants) == [pb.LoanGrant(key=ask.key, number=ask.number) for ask in asks]
    assert b.lending.status().loans_granted == 0


def test_the_tokens_of_a_return_can_be_lent_by_the_ask_in_the_same_frame() -> None:
    b = Node("b")
    [granted] = answer(b, "a", pb.Loans(asks=[pb.LoanAsk(key=KEY, number=1, parts=PARTS)])).grants
    loans = pb.Loans(
        returns=[pb.LoanReturn(key=KEY, number=1, tokens=granted.tokens)],
        asks=[pb.LoanAsk(key=KEY, number=2, parts=PARTS // 4)],
    )
    [again] = answer(b, "a", loans).grants
    assert (again.parts, again.tokens) == (PARTS // 4, 25)
    assert b.bucket().lent_to("a") == PARTS // 4


def test_a_node_that_is_no_member_borrows_nothing_and_lends_nothing() -> None:
    b = Node("b")
    [granted] = answer(b, "stranger", pb.Loans(asks=[pb.LoanAsk(key=KEY, number=1, parts=PARTS)])).grants
    assert (granted.parts, granted.tokens, granted.available) == (0, 0, 0)
    b.use_up()
    asked = loans_to(b, "a").asks[0]
    answer(b, "stranger", pb.Loans(grants=[pb.LoanGrant(key=KEY, number=asked.number, parts=PARTS // 2, tokens=50)]))
    assert not b.bucket().take(1, NOW_US)
    assert b.lending.refused == 2


def test_a_grant_of_more_than_the_lender_can_have_counts_as_its_share() -> None:
    b = Node("b")
    b.use_up()
    asked = loans_to(b, "a").asks[0]
    answer(b, "a", pb.Loans(grants=[pb.LoanGrant(key=KEY, number=asked.number, parts=PARTS, tokens=2**40)]))
    assert b.bucket().borrowed_from("a") == PARTS // 2
    assert b.bucket().remaining == 50


@pytest.mark.parametrize("key", [b"\x09", b""], ids=["no bucket's name", "empty"])
def test_an_ask_that_names_no_bucket_is_refused(key: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        answer(Node(), "b", pb.Loans(asks=[pb.LoanAsk(key=key, number=1, parts=1)]))
    assert caught.value.reason is Reason.BAD_KEY


def test_nothing_is_lent_while_the_borrower_does_not_read_the_answers() -> None:
    b, outbox = Node("b"), LoanOutbox()
    for index in range(MAX_PENDING + 1):
        key = key_of(f"{index}", "plan")
        b.lending.receive("a", pb.Loans(asks=[pb.LoanAsk(key=key, number=1, parts=PARTS // 8)]), outbox)
    assert len(outbox) == MAX_PENDING
    assert b.lending.status().loans_granted == MAX_PENDING
    assert len(b.ledger) == MAX_PENDING


def test_an_answer_after_the_peer_was_lost_is_not_used() -> None:
    a, b = Node("a"), Node("b")
    a.use_up()
    granted = answer(b, "a", loans_to(a, "b"))
    a.lending.lost("b")
    answer(a, "b", granted)
    assert a.bucket().borrowed_from("b") == 0


def test_the_membership_is_shown_as_it_is_configured() -> None:
    assert Node().lending.membership == Shown(1, PAIR.weights)


def test_the_status_shows_the_home_share_and_whether_it_is_settled() -> None:
    node = Node(started_us=NOW_US)
    assert node.lending.status() == MembershipStatus(
        epoch=1, home_share=0.0, settled=False, conflicts=(), buckets=0, loans_granted=0, loans_received=0
    )
    node.strict_us += SIT_OUT_US
    node.bucket()
    assert node.lending.status() == MembershipStatus(
        epoch=1, home_share=0.5, settled=True, conflicts=(), buckets=1, loans_granted=0, loans_received=0
    )


def test_a_peer_with_other_members_is_a_conflict_until_it_shows_the_same_or_is_forgotten() -> None:
    node = Node()
    for end in (lambda: node.lending.hear("b", Shown(1, PAIR.weights)), lambda: node.lending.forget("b")):
        node.lending.hear("b", Shown(1, {"a": 1, "b": 3}))
        assert (node.lending.status().conflicts, node.lending.status().home_share) == (("b",), 0.25)
        end()
        assert (node.lending.status().conflicts, node.lending.status().home_share) == ((), 0.5)


def test_a_member_that_comes_back_without_a_membership_no_longer_counts_as_having_shown_it() -> None:
    shares = Shares(Membership(2, PAIR.weights, {"a": 1, "b": 2}), "a", NOW_US - 2 * SIT_OUT_US)
    ledger = Ledger(shares, Origin("a", 1), RULES.strict_limit_of_key, 0)
    lending = Lending(ledger, lambda: NOW_US)
    shares.hear("b", lending.membership, NOW_US - SIT_OUT_US)
    assert lending.status().settled
    lending.hear("b", None)
    status = lending.status()
    assert (status.settled, status.home_share) == (False, pytest.approx(1 / 3))


def test_more_loans_than_a_frame_may_have_are_not_even_looked_at() -> None:
    b = Node("b")
    with pytest.raises(ProtocolError) as caught:
        answer(b, "a", pb.Loans(asks=[pb.LoanAsk(key=KEY, number=1, parts=1)] * (MAX_FRAME_LOANS + 1)))
    assert caught.value.reason is Reason.TOO_LARGE
    assert len(b.ledger) == 0
