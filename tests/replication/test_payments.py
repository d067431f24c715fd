"""A ledger on the mesh: what it asks peers for and when, and what it makes of what they say."""

from __future__ import annotations

import pytest
from replication.builders import ELSEWHERE, NOW_US, PAIR, PER_PLAN, RULES, SIT_OUT_US, key_of, ledger_of

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.ledger import Ledger
from ratelimit_sidecar.crdt.shares import Membership, Shares, ShownMembership
from ratelimit_sidecar.crdt.strict import HOLD_US, TICKET_US, StrictBucket
from ratelimit_sidecar.crdt.waiting import Outcome, PendingDecision, Wish
from ratelimit_sidecar.mesh_status import MembershipStatus
from ratelimit_sidecar.replication.deltas import MAX_KEY_BYTES
from ratelimit_sidecar.replication.payments import MAX_OPEN, MAX_WISHES, TICK_EVERY_US, PaymentExchange, StreamPayments
from ratelimit_sidecar.replication.v1 import replication_pb2 as pb
from ratelimit_sidecar.replication.wire import ProtocolError, Reason

KEY = key_of("gold", "plan")
TOKEN = 1 << 32


class Node:
    """Its purses, the clock of them, and its end of a stream; long past its start."""

    def __init__(self, name: str = "a", *, started_us: int = NOW_US - 2 * SIT_OUT_US) -> None:
        self.strict_us = NOW_US
        self.ledger = ledger_of(name, PAIR, started_us)
        self.payments = PaymentExchange(self.ledger, lambda: self.strict_us)
        self.stream = self.payments.new_stream()
        self.stream.can_wish = True

    def bucket(self, key: bytes = KEY) -> StrictBucket:
        return self.ledger.bucket(key, PER_PLAN, self.strict_us)

    def use_up(self, key: bytes = KEY) -> None:
        """Be denied: more is wanted than the home holds."""
        self.bucket(key).take(self.bucket(key).remaining, self.strict_us)
        assert not self.bucket(key).take(30, self.strict_us)

    def wait(self, hits: int = 1) -> PendingDecision:
        """A request that waits, because the purse is empty and b is believed to be full."""
        bucket = self.bucket()
        bucket.take(bucket.remaining, self.strict_us)
        self.ledger.queues.tick(["b"], self.strict_us, 0, MAX_KEY_BYTES)
        waiting = PendingDecision(hits, lambda now_us: b"%d" % bucket.take(hits, now_us), 250_000)
        assert self.ledger.wait(KEY, waiting, self.strict_us)
        return waiting

    def asks(self, peer: str = "b") -> pb.Payments:
        self.payments.tick({peer: self.stream})
        return said_by(self.stream)

    def receive(self, peer: str, payments: pb.Payments) -> pb.Payments:
        self.payments.receive(peer, payments, self.stream)
        return said_by(self.stream)


def said_by(stream: StreamPayments) -> pb.Payments:
    frame = stream.take_frame()
    return pb.Payments() if frame is None else frame.payments


def ask_for(tokens: int, key: bytes = KEY) -> pb.Payments:
    return pb.Payments(asks=[pb.Ask(key=key, amount=tokens * TOKEN, is_short=True)])


def test_what_is_asked_for_is_paid_and_used() -> None:
    a, b = Node("a"), Node("b")
    a.use_up()
    assert a.receive("b", b.receive("a", a.asks())) == pb.Payments()
    assert (b.payments.status().payments_sent, a.payments.status().payments_received) == (1, 1)
    assert (a.payments.status().payments_sent, b.payments.status().payments_received) == (0, 0)
    assert a.bucket().level + b.bucket().level == 50 * TOKEN * PER_PLAN.period_us
    assert a.bucket().take(30, NOW_US)


def test_the_ledger_is_looked_at_every_20_ms() -> None:
    a = Node()
    a.asks()
    a.use_up()
    a.strict_us += TICK_EVERY_US - 1
    assert not a.asks().asks
    a.strict_us += 1
    assert a.asks().asks


def test_no_more_asks_are_open_than_a_stream_may_have() -> None:
    a = Node()
    for index in range(2 * MAX_OPEN):
        a.use_up(key_of(f"{index}", "plan"))
    for _ in range(100):
        a.strict_us += TICK_EVERY_US
        a.asks()
    assert MAX_OPEN - 100 < len(a.stream.unanswered_asks) <= MAX_OPEN


def test_only_members_are_asked() -> None:
    a = Node()
    a.use_up()
    assert a.asks("stranger") == pb.Payments()


def test_a_key_too_long_for_a_peer_is_not_sent() -> None:
    a = Node()
    a.use_up(bytes(MAX_KEY_BYTES + 1))
    a.use_up()
    assert [ask.key for ask in a.asks().asks] == [KEY]


def test_a_peer_that_asks_for_what_no_strict_rule_knows_is_told_that_there_is_nothing() -> None:
    b = Node("b")
    asks = [pb.Ask(key=key_of("x", "nobody", ELSEWHERE), amount=4), pb.Ask(key=key_of("ann"), amount=1)]
    assert b.payments.receive("a", pb.Payments(asks=asks), b.stream) == 2
    assert list(said_by(b.stream).pays) == [pb.Pay(key=ask.key) for ask in asks]
    assert b.payments.status().payments_sent == 0


def test_a_node_that_is_no_member_is_paid_nothing() -> None:
    b = Node("b")
    assert list(b.receive("stranger", ask_for(10)).pays) == [pb.Pay(key=KEY)]
    assert b.bucket().remaining == 50
    assert b.payments.refused == 1


def test_a_payment_of_more_than_the_payer_can_have_counts_as_what_was_asked_for() -> None:
    b = Node("b")
    b.use_up()
    b.asks("a")
    b.receive("a", pb.Payments(pays=[pb.Pay(key=KEY, amount=2**62)]))
    assert b.bucket().remaining <= 50
    assert b.payments.refused == 1


@pytest.mark.parametrize("key", [b"\x09", b""], ids=["no bucket's name", "empty"])
def test_an_ask_that_names_no_bucket_is_refused(key: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        Node().receive("b", ask_for(1, key))
    assert caught.value.reason is Reason.BAD_KEY


def test_an_ask_before_the_one_before_it_is_answered_is_refused() -> None:
    b = Node("b")
    b.payments.receive("a", ask_for(1), b.stream)
    with pytest.raises(ProtocolError) as caught:
        b.payments.receive("a", ask_for(1), b.stream)
    assert caught.value.reason is Reason.UNEXPECTED


def test_nothing_is_kept_for_a_peer_that_does_not_read_the_answers() -> None:
    b = Node("b")
    for index in range(MAX_OPEN):
        b.payments.receive("a", ask_for(1, key_of(f"{index}", "plan")), b.stream)
    with pytest.raises(ProtocolError) as caught:
        b.payments.receive("a", ask_for(1), b.stream)
    assert caught.value.reason is Reason.UNEXPECTED
    assert len(b.ledger) == MAX_OPEN


def test_more_than_a_frame_may_have_is_not_even_looked_at() -> None:
    b = Node("b")
    with pytest.raises(ProtocolError) as caught:
        b.receive("a", pb.Payments(asks=[pb.Ask(key=KEY, amount=1)] * (MAX_OPEN + 1)))
    assert caught.value.reason is Reason.TOO_LARGE
    assert len(b.ledger) == 0


def test_the_membership_is_shown_as_it_is_configured() -> None:
    assert Node().payments.membership == ShownMembership(1, PAIR.weights)


def test_the_status_shows_the_home_share_and_whether_it_is_settled() -> None:
    node = Node(started_us=NOW_US)
    assert node.payments.status() == MembershipStatus(
        epoch=1, home_share=0.0, settled=False, conflicts=(), buckets=0, payments_sent=0, payments_received=0
    )
    node.payments.receive_shown("b", ShownMembership(1, PAIR.weights))
    assert not node.payments.status().settled
    node.strict_us += HOLD_US
    node.bucket()
    assert node.payments.status() == MembershipStatus(
        epoch=1, home_share=0.5, settled=True, conflicts=(), buckets=1, payments_sent=0, payments_received=0
    )


def test_a_peer_with_other_members_is_a_conflict_until_it_shows_the_same_or_is_forgotten() -> None:
    node = Node()
    for end in (
        lambda: node.payments.receive_shown("b", ShownMembership(1, PAIR.weights)),
        lambda: node.payments.receive_shown("b", None),
    ):
        node.payments.receive_shown("b", ShownMembership(1, {"a": 1, "b": 3}))
        assert (node.payments.status().conflicts, node.payments.status().home_share) == (("b",), 0.25)
        end()
        assert (node.payments.status().conflicts, node.payments.status().home_share) == ((), 0.5)


def test_a_member_that_comes_back_without_a_membership_no_longer_counts_as_having_shown_it() -> None:
    shares = Shares(Membership(2, PAIR.weights, {"a": 1, "b": 2}), "a", NOW_US - 2 * SIT_OUT_US)
    payments = PaymentExchange(Ledger(shares, Origin("a", 1), RULES.strict_limit_of_key), lambda: NOW_US)
    shares.receive("b", payments.membership, NOW_US - SIT_OUT_US)
    assert payments.status().settled
    payments.receive_shown("b", None)
    status = payments.status()
    assert (status.settled, status.home_share) == (False, pytest.approx(1 / 3))


def test_who_waits_is_served_from_a_ticket_that_a_peer_sends() -> None:
    a, b = Node("a"), Node("b")
    waiting = a.wait(3)
    said = a.asks()
    assert list(said.wishes) == [pb.Wish(number=1, key=KEY, tokens=3)]
    answer = b.receive("a", pb.Payments(wishes=said.wishes))
    assert list(answer.tickets) == [pb.Ticket(number=1, tokens=3, left=47 * TOKEN)]
    assert list(a.receive("b", answer).returns) == [pb.Return(number=1)]
    assert (waiting.outcome, waiting.result()) == (Outcome.SERVED, b"1")
    assert b.bucket().aside == 3 * TOKEN
    b.receive("a", pb.Payments(returns=[pb.Return(number=1)]))
    assert b.bucket().aside == 0


def test_a_peer_that_knows_of_no_wishes_is_not_wished_of() -> None:
    a = Node()
    a.wait()
    a.stream.can_wish = False
    assert not a.asks().wishes


def test_a_wish_that_is_not_answered_is_given_up_after_a_second_and_a_later_ticket_given_back() -> None:
    a = Node()
    waiting = a.wait()
    assert a.asks().wishes
    a.ledger.queues.end(waiting, Outcome.EXPIRED, a.strict_us)
    a.strict_us += TICKET_US
    a.payments.check_time(a.stream)
    assert a.stream.unanswered_wishes
    a.strict_us += 1
    a.payments.check_time(a.stream)
    assert not a.stream.unanswered_wishes
    assert list(a.receive("b", pb.Payments(tickets=[pb.Ticket(number=1, tokens=1)])).returns) == [
        pb.Return(number=1, amount=TOKEN)
    ]


def test_wishes_end_with_their_stream() -> None:
    a = Node()
    a.ledger.queues.end(a.wait(), Outcome.EXPIRED, a.strict_us)
    waiting = a.wait()
    assert a.asks().wishes
    a.payments.closed(a.stream)
    assert not a.bucket().wishes
    a.ledger.queues.end(waiting, Outcome.EXPIRED, a.strict_us)
    assert a.ledger.queues.by_key[KEY].is_over


def test_no_more_wishes_are_open_than_a_stream_may_have() -> None:
    a = Node()
    for _ in range(2 * MAX_OPEN):
        a.stream.last_wish_sent += 1
        a.stream.unanswered_wishes[a.stream.last_wish_sent] = Wish("b", KEY, 1, a.strict_us)
    a.wait()
    assert not a.asks().wishes


def test_a_stream_on_which_there_are_no_numbers_left_for_wishes_is_closed_and_not_wished_on() -> None:
    a = Node()
    a.stream.last_wish_sent = MAX_WISHES
    a.wait()
    a.payments.check_time(a.stream)
    assert [wish.number for wish in a.asks().wishes] == [MAX_WISHES + 1]
    with pytest.raises(ProtocolError) as caught:
        a.payments.check_time(a.stream)
    assert caught.value.reason is Reason.EXHAUSTED
    a.strict_us += TICK_EVERY_US
    a.wait(9)
    assert not a.asks().wishes


def test_a_ticket_for_more_than_was_wished_counts_as_what_was_wished() -> None:
    a = Node()
    a.wait(3)
    a.asks()
    a.receive("b", pb.Payments(tickets=[pb.Ticket(number=1, tokens=50)]))
    assert a.bucket().remaining == 0


def test_a_ticket_that_answers_no_wish_is_refused() -> None:
    with pytest.raises(ProtocolError) as caught:
        Node().receive("b", pb.Payments(tickets=[pb.Ticket(number=1, tokens=1)]))
    assert caught.value.reason is Reason.UNEXPECTED


def test_the_same_ticket_again_serves_nobody() -> None:
    a = Node()
    a.wait()
    a.asks()
    ticket = pb.Payments(tickets=[pb.Ticket(number=1, tokens=1, left=9 * TOKEN)])
    a.receive("b", ticket)
    waiting = a.wait()
    assert list(a.receive("b", ticket).returns) == [pb.Return(number=1, amount=TOKEN)]
    assert waiting.outcome is None


def test_wishes_must_be_numbered_upwards() -> None:
    b = Node("b")
    wish = pb.Payments(wishes=[pb.Wish(number=1, key=KEY, tokens=1)])
    b.receive("a", wish)
    with pytest.raises(ProtocolError) as caught:
        b.receive("a", wish)
    assert caught.value.reason is Reason.UNEXPECTED


def test_a_wish_for_what_no_strict_rule_knows_or_of_no_member_gets_nothing() -> None:
    b = Node("b")
    wish = pb.Wish(number=1, key=key_of("x", "nobody", ELSEWHERE), tokens=1)
    assert b.payments.receive("a", pb.Payments(wishes=[wish]), b.stream) == 1
    assert list(said_by(b.stream).tickets) == [pb.Ticket(number=1)]
    assert not b.receive("stranger", pb.Payments(wishes=[pb.Wish(number=2, key=KEY, tokens=1)])).tickets
    assert (b.payments.refused, b.bucket().remaining) == (1, 50)


def test_no_tickets_are_kept_for_a_peer_that_does_not_read_them() -> None:
    b = Node("b")
    for number in range(2 * MAX_OPEN):
        b.payments.receive("a", pb.Payments(wishes=[pb.Wish(number=number + 1, key=KEY)]), b.stream)
    assert len(b.stream.tickets_to_send) == MAX_OPEN


def test_what_is_returned_on_another_stream_frees_nothing() -> None:
    b = Node("b")
    b.receive("a", pb.Payments(wishes=[pb.Wish(number=1, key=KEY, tokens=5)]))
    other = b.payments.new_stream()
    b.payments.receive("c", pb.Payments(returns=[pb.Return(number=1, amount=5 * TOKEN)]), other)
    assert b.bucket().aside == 5 * TOKEN


def test_a_ticket_that_was_not_sent_ends_with_its_stream_and_keeps_its_room() -> None:
    """The peer may have started anew, and number its wishes from 1 again."""
    a, b = Node("a"), Node("b")
    b.payments.receive("a", pb.Payments(wishes=[pb.Wish(number=1, key=KEY, tokens=5)]), b.stream)
    b.payments.closed(b.stream)
    b.stream = b.payments.new_stream()
    assert not said_by(b.stream).tickets
    waiting = a.wait(3)
    tickets = b.receive("a", pb.Payments(wishes=a.asks().wishes)).tickets
    assert [(ticket.number, ticket.tokens) for ticket in tickets] == [(1, 3)]
    assert b.bucket().aside == 8 * TOKEN
    b.receive("a", a.receive("b", pb.Payments(tickets=tickets)))
    assert waiting.outcome is Outcome.SERVED
    assert (b.bucket().aside, b.bucket().remaining) == (5 * TOKEN, 42)
