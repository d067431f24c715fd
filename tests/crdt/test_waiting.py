"""Requests that wait for tickets: who may, who is served, what becomes of the tokens."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from crdt.test_ledger import ENDS, LIMIT, NOW_US, make_ledger

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.gateway_ledger import GatewayLedger
from ratelimit_sidecar.crdt.ledger import Ledger
from ratelimit_sidecar.crdt.limit import TokenBucketLimit
from ratelimit_sidecar.crdt.payment_policy import Ticket
from ratelimit_sidecar.crdt.shares import TOKEN, Membership, Shares
from ratelimit_sidecar.crdt.strict import HOLD_US, TICKET_US, StrictBucket
from ratelimit_sidecar.crdt.wait_queues import WaitQueues
from ratelimit_sidecar.crdt.waiting import (
    MAX_WAITING,
    MAX_WAITING_OF_BUCKET,
    SERVED_AT_ONCE,
    Outcome,
    PendingDecision,
    Wish,
)

KEY = b"k"
SLOW = TokenBucketLimit(1, 60_000_000, 200)
"""Nothing refills during a test: half of it is this node's."""


class Node:
    """Its ledger, and its requests that wait."""

    def __init__(self, node: str = "a", limit: TokenBucketLimit = SLOW, *, has: int = 0) -> None:
        self.now_us = NOW_US
        self.limit = limit
        self.ledger = make_ledger(node, limit=limit)
        self.bucket.restore(limit.capacity * TOKEN)
        assert self.bucket.take(self.bucket.remaining - has, self.now_us)
        self.queues.tick(["b"], self.now_us, 10, 100)

    @property
    def bucket(self) -> StrictBucket:
        return self.ledger.bucket(KEY, self.limit, self.now_us)

    @property
    def queues(self) -> WaitQueues:
        return self.ledger.queues

    def wait(self, hits: int = 1, decide: Callable[[int], bytes] | None = None) -> PendingDecision | None:
        """A request; None if it must be decided at once."""
        bucket = self.bucket
        bucket.advance(self.now_us)
        waiting = PendingDecision(hits, decide or (lambda now_us: b"%d" % bucket.take(hits, now_us)), 250_000)
        return waiting if self.ledger.wait(KEY, waiting, self.now_us) else None

    def wait_for(self, *hits: int) -> list[PendingDecision]:
        waiting = [self.wait(each) for each in hits]
        assert all(each is not None for each in waiting)
        return [each for each in waiting if each is not None]

    def wish(self, number: int = 1) -> Wish:
        """What the next tick wishes for of b."""
        tokens = self.queues.tick(["b"], self.now_us, 10, 100)["b"][KEY]
        self.bucket.wish(number)
        return Wish("b", KEY, tokens, self.now_us)


def test_who_waits_is_served_from_a_ticket() -> None:
    here, there = Node("a"), Node("b", has=100)
    waiting = here.wait_for(1, 1, 1)
    wish = here.wish()
    assert wish.tokens == 3
    ticket = there.ledger.set_aside(1, "a", KEY, wish.tokens, NOW_US)
    assert ticket == Ticket(3, 97 * TOKEN)
    assert here.ledger.accept(1, wish, ticket, NOW_US) == 0
    assert [(each.outcome, each.result()) for each in waiting] == [(Outcome.SERVED, b"1")] * 3
    assert there.bucket.room_reserved == 3 * SLOW.period_us * TOKEN
    there.ledger.release(1, 0, NOW_US)
    assert there.bucket.room_reserved == 0


def test_who_waited_first_is_served_first_even_if_another_needs_less() -> None:
    here = Node()
    first, second = here.wait_for(3, 1)
    here.ledger.accept(1, here.wish(), Ticket(2, 0), NOW_US)
    assert (first.outcome, second.outcome) == (None, None)
    assert here.bucket.remaining == 2


def test_what_has_room_is_kept_of_a_ticket_and_the_rest_is_given_back() -> None:
    here = Node(has=98)
    [waiting] = here.wait_for(100)
    wish = here.wish()
    assert wish.tokens == 2
    here.queues.end(waiting, Outcome.CANCELLED, NOW_US)
    assert here.bucket.take(1, NOW_US)
    assert here.ledger.accept(1, wish, Ticket(2, 50 * TOKEN), NOW_US) == 0
    assert here.bucket.remaining == 99
    [waiting] = here.wait_for(101)
    wish = here.wish(2)
    here.queues.end(waiting, Outcome.CANCELLED, NOW_US)
    assert here.ledger.accept(2, wish, Ticket(2, 0), NOW_US) == TOKEN
    assert here.bucket.level == here.bucket.max_level


def test_tokens_and_a_ticket_together_serve_a_request_that_neither_could() -> None:
    here = Node(has=2)
    [waiting] = here.wait_for(5)
    wish = here.wish()
    assert wish.tokens == 3
    here.ledger.accept(1, wish, Ticket(3, 0), NOW_US)
    assert waiting.result() == b"1"


@pytest.mark.parametrize(("late_us", "admitted"), [(0, True), (1, False)])
def test_a_ticket_counts_for_a_second_after_the_wish_and_is_then_given_back_whole(late_us: int, admitted: bool) -> None:
    here = Node()
    [waiting] = here.wait_for(1)
    wish = here.wish()
    returned = here.ledger.accept(1, wish, Ticket(1, 0), NOW_US + TICKET_US + late_us)
    assert returned == (0 if admitted else TOKEN)
    assert (waiting.outcome is Outcome.SERVED) is admitted


def test_a_ticket_counts_once() -> None:
    here = Node()
    here.wait_for(1, 1)
    wish = here.wish()
    here.ledger.accept(1, wish, Ticket(1, 0), NOW_US)
    assert here.bucket.accept(1, "b", 1, 100 * TOKEN, NOW_US) == 0


def test_the_room_of_a_ticket_is_free_after_its_time_and_what_is_returned_later_does_not_count() -> None:
    there = Node("b", has=100)
    there.ledger.set_aside(1, "a", KEY, 40, NOW_US)
    there.ledger.tick(ENDS, NOW_US + HOLD_US - 1, 10, 100)
    assert there.bucket.room_reserved
    there.ledger.tick(ENDS, NOW_US + HOLD_US, 10, 100)
    assert not there.bucket.room_reserved
    there.ledger.release(1, 40 * TOKEN, NOW_US + HOLD_US)
    assert there.bucket.remaining == 60


def test_what_is_returned_in_time_is_there_again_but_no_more_than_the_ticket() -> None:
    there = Node("b", has=100)
    there.ledger.set_aside(1, "a", KEY, 40, NOW_US)
    assert there.bucket.take(50, NOW_US)
    there.ledger.release(1, 90 * TOKEN, NOW_US)
    assert there.bucket.remaining == 50
    assert there.bucket.aside == 0


def test_a_bucket_with_a_ticket_under_way_does_not_refill_its_room_and_is_not_dropped() -> None:
    there = Node("b", LIMIT, has=50)
    there.ledger.set_aside(1, "a", KEY, 40, NOW_US)
    later_us = NOW_US + HOLD_US
    there.bucket.advance(later_us)
    assert there.bucket.remaining == 10
    there.ledger.sweep(later_us, 10)
    assert len(there.ledger) == 1


def test_a_peer_that_is_short_itself_sets_nothing_aside_while_its_own_requests_wait() -> None:
    there = Node("b", has=1)
    there.wait_for(2)
    assert there.ledger.set_aside(1, "a", KEY, 1, NOW_US) == Ticket(0, 0)


def test_a_request_is_decided_at_once_when_peers_are_not_believed_to_have_what_all_need_who_wait() -> None:
    here = Node()
    here.wait_for(60, 40)
    assert here.wait(1) is None


def test_nobody_waits_without_a_peer_that_can_be_wished_of() -> None:
    here = Node()
    here.queues.tick([], NOW_US, 10, 100)
    assert here.wait() is None
    here.queues.tick(["b"], NOW_US, 10, len(KEY) - 1)
    assert here.wait() is None


def test_what_a_peer_says_that_it_has_left_is_believed() -> None:
    here = Node()
    here.wait_for(1)
    here.ledger.accept(1, here.wish(), Ticket(1, 5 * TOKEN), NOW_US)
    here.now_us += 20_000
    assert here.wait(6) is None
    assert here.wait(5) is not None


def test_a_peer_that_was_short_is_wished_of_again_after_half_a_second() -> None:
    here = Node(limit=LIMIT)
    here.wait_for(1)
    here.ledger.accept(1, here.wish(), Ticket(0, 0), NOW_US)
    here.now_us += 499_999
    assert here.wait(45) is None
    here.now_us += 20_001
    here.bucket.take(here.bucket.remaining, here.now_us)
    assert here.wait(1) is not None


def test_wishes_that_are_not_answered_give_no_hope_once_they_are_given_up() -> None:
    """Of a silent peer, or on a stream that is closed."""
    here = Node()
    waiting = here.wait_for(60)
    wish = here.wish()
    for each in waiting:
        here.queues.end(each, Outcome.EXPIRED, NOW_US)
    here.queues.tick([], NOW_US, 10, 100)
    here.queues.by_key[KEY].give_up(1, wish)
    here.queues.tick([], NOW_US, 10, 100)
    assert KEY not in here.queues.by_key
    # A ticket that comes all the same is given back.
    assert here.bucket.accept(1, "b", 60, 100 * TOKEN, NOW_US) == 0


def test_cancelling_denies_nobody_else_the_waiting() -> None:
    """What is given back counts again as what the peer has, so requests that come and go do not use up the hope."""
    here = Node(has=100)
    for number in range(1, 20):
        [waiting] = here.wait_for(180)
        wish = here.wish(number)
        here.queues.end(waiting, Outcome.CANCELLED, NOW_US)
        returned = here.ledger.accept(number, wish, Ticket(wish.tokens, 20 * TOKEN), NOW_US)
        assert returned == wish.tokens * TOKEN
    assert here.bucket.remaining == 100


def test_a_cancelled_request_is_not_decided() -> None:
    here = Node()
    decided: list[int] = []

    def decide(now_us: int) -> bytes:
        decided.append(now_us)
        return b""

    waiting = here.wait(1, decide)
    assert waiting is not None
    here.queues.end(waiting, Outcome.CANCELLED, NOW_US)
    here.queues.end(waiting, Outcome.EXPIRED, NOW_US)
    assert decided == []
    assert here.queues.waiting == 0
    assert here.queues.counts[Outcome.CANCELLED] == 1


def test_a_request_whose_time_is_over_is_decided_by_what_there_is_then() -> None:
    here = Node()
    [waiting] = here.wait_for(1)
    here.queues.end(waiting, Outcome.EXPIRED, NOW_US + 250_000)
    assert waiting.result() == b"0"
    assert (here.queues.counts[Outcome.EXPIRED], here.queues.seconds[Outcome.EXPIRED]) == (1, 0.25)


def test_refill_and_payments_serve_as_well() -> None:
    here = Node(limit=LIMIT)
    [waiting] = here.wait_for(1)
    here.now_us += 20_000
    here.queues.tick(["b"], here.now_us, 10, 100)
    assert waiting.result() == b"1"


def test_a_tick_ends_a_bounded_number_of_waits() -> None:
    here = Node(limit=TokenBucketLimit(1, 60_000_000, 2_000))
    here.wait_for(*[1] * (3 * SERVED_AT_ONCE))
    here.queues.end_all()
    for left in (2, 1, 0):
        here.queues.tick(["b"], NOW_US, 10, 100)
        assert here.queues.waiting == left * SERVED_AT_ONCE
    assert here.queues.counts[Outcome.CALLED_OFF] == 3 * SERVED_AT_ONCE


def test_a_tick_serves_a_bounded_number_whatever_they_wait_for() -> None:
    limit = TokenBucketLimit(1, 60_000_000, 2_000)
    ledger = make_ledger(limit=limit)
    ledger.limit_of_key = lambda _key: limit
    ledger.queues.tick(["b"], NOW_US, 10, 100)
    for key in (b"one", b"other"):
        assert all(join(ledger, key, limit) for _ in range(SERVED_AT_ONCE // 2 + 1))
        ledger.bucket(key, limit, NOW_US).level += limit.scaled_capacity << 32
    ledger.queues.tick(["b"], NOW_US, 10, 100)
    assert ledger.queues.counts[Outcome.SERVED] == SERVED_AT_ONCE


def test_a_ticket_serves_a_bounded_number_and_what_is_left_is_kept() -> None:
    here = Node(limit=TokenBucketLimit(1, 60_000_000, 2_000))
    here.wait_for(*[1] * (SERVED_AT_ONCE + 10))
    wish = here.wish()
    assert here.ledger.accept(1, wish, Ticket(wish.tokens, 0), NOW_US) == 0
    assert here.queues.counts[Outcome.SERVED] == SERVED_AT_ONCE
    here.queues.tick(["b"], NOW_US, 10, 100)
    assert here.queues.counts[Outcome.SERVED] == SERVED_AT_ONCE + 10


def test_when_rules_change_those_who_wait_are_decided_and_others_may_wait_again() -> None:
    here = Node()
    [before] = here.wait_for(1)
    here.queues.end_all()
    [after] = here.wait_for(1)
    here.queues.tick(["b"], NOW_US, 10, 100)
    assert (before.outcome, after.outcome) == (Outcome.CALLED_OFF, None)


def test_at_a_stop_all_are_decided_and_none_waits_any_more() -> None:
    here = Node()
    [waiting] = here.wait_for(1)
    here.queues.close()
    assert here.wait() is None
    here.queues.tick(["b"], NOW_US, 10, 100)
    assert waiting.outcome is Outcome.CALLED_OFF


def test_no_more_wait_for_a_bucket_and_in_all_than_may() -> None:
    limit = TokenBucketLimit(1, 60_000_000, 10_000)
    ledger = make_ledger(limit=limit)
    ledger.limit_of_key = lambda _key: limit
    ledger.queues.tick(["b"], NOW_US, 10, 100)
    keys = [b"%d" % number for number in range(1 + MAX_WAITING // MAX_WAITING_OF_BUCKET)]
    joined = [join(ledger, key, limit) for key in keys for _ in range(MAX_WAITING_OF_BUCKET + 1)]
    assert sum(joined) == ledger.queues.waiting == MAX_WAITING
    assert ledger.queues.crowded == len(joined) - MAX_WAITING
    assert not joined[MAX_WAITING_OF_BUCKET]


def test_requests_that_come_and_go_between_two_ticks_leave_no_more_lines_than_may_wait() -> None:
    limit = TokenBucketLimit(1, 60_000_000, 10_000)
    ledger = make_ledger(limit=limit)
    ledger.limit_of_key = lambda _key: limit
    queues = ledger.queues
    queues.tick(["b"], NOW_US, 10, 100)
    for number in range(2 * MAX_WAITING):
        key = b"%d" % number
        ledger.bucket(key, limit, NOW_US)
        waiting = PendingDecision(1, lambda _now_us: b"", 250_000)
        if ledger.wait(key, waiting, NOW_US):
            queues.end(waiting, Outcome.EXPIRED, NOW_US)
    assert (queues.waiting, len(queues.by_key), queues.crowded) == (0, MAX_WAITING, MAX_WAITING)


def join(ledger: Ledger, key: bytes, limit: TokenBucketLimit) -> bool:
    ledger.bucket(key, limit, NOW_US)
    return ledger.wait(key, PendingDecision(1, lambda _now_us: b"", 250_000), NOW_US)


def test_a_decision_that_fails_costs_neither_the_others_nor_the_ticket() -> None:
    here = Node()

    def fail(_now_us: int) -> bytes:
        raise RuntimeError("broken")

    broken = here.wait(1, fail)
    [sound] = here.wait_for(1)
    assert broken is not None
    assert here.ledger.accept(1, here.wish(), Ticket(2, 0), NOW_US) == 0
    assert sound.result() == b"1"
    with pytest.raises(RuntimeError, match="broken"):
        broken.result()
    assert here.queues.waiting == 0
    assert here.bucket.remaining == 1


def test_of_a_limit_of_few_tokens_nobody_is_asked_while_requests_wait() -> None:
    few = TokenBucketLimit(1, 12_000_000, 4)
    here = Node(limit=few)
    assert not here.bucket.take(1, NOW_US)
    [waiting] = here.wait_for(1)
    assert not here.ledger.tick(ENDS, NOW_US, 10, 100)
    here.queues.end(waiting, Outcome.EXPIRED, NOW_US)
    here.queues.tick(["b"], NOW_US, 10, 100)
    assert here.ledger.tick(ENDS, NOW_US, 10, 100)


def test_a_payer_is_believed_no_more_than_its_home_holds_with_tickets_too() -> None:
    here = Node()
    here.wait_for(60)
    here.ledger.accept(1, here.wish(), Ticket(60, 100 * TOKEN), NOW_US)
    here.bucket.take(here.bucket.remaining, NOW_US)
    assert here.bucket.credit_of("b", 100 * TOKEN) == 40 * SLOW.period_us * TOKEN
    here.bucket.wish(2)
    assert here.bucket.accept(2, "b", 60, 100 * TOKEN, NOW_US) == 40 * SLOW.period_us * TOKEN


def test_in_a_region_with_a_fabric_nothing_is_set_aside_and_no_request_waits() -> None:
    """What was granted ends sooner than a ticket might."""
    shares = Shares(Membership(1, {"a": 1, "b": 1}), "a", 0)
    ledger = GatewayLedger(shares, Origin("a", 1), lambda _key: LIMIT)
    ledger.bucket(KEY, LIMIT, NOW_US).level = 50 * TOKEN * LIMIT.period_us
    assert ledger.set_aside(1, "b", KEY, 5, NOW_US) == Ticket(0, 0)
    assert not join(ledger, KEY, LIMIT)
