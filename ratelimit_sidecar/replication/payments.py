"""The payment protocol of strict limits: asks, payments, wishes and tickets between this node's ledger and peers.

A *purse* is this node's own bucket of a strict limit (`StrictBucket`). Each ask on a stream is answered by one payment
on it, and for each bucket one ask is open on it at a time. So what is pending is bounded, and ends with the stream:
room that was reserved for an ask is free again, and a payment that is lost costs its payer. Wishes are numbered on each
stream, and each is answered by one ticket; one that is not answered within a second is given up.

Sans-I/O, with a clock of its own: strict buckets go by one that never steps, deltas by the wall.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from typing import Final

from ratelimit_sidecar.crdt.ledger import Ledger
from ratelimit_sidecar.crdt.payment_policy import Ask, Payment, Ticket
from ratelimit_sidecar.crdt.shares import TOKEN, ShownMembership
from ratelimit_sidecar.crdt.strict import TICKET_US
from ratelimit_sidecar.crdt.waiting import Wish
from ratelimit_sidecar.mesh_status import MembershipStatus
from ratelimit_sidecar.replication.deltas import MAX_KEY_BYTES, check_key
from ratelimit_sidecar.replication.session import STALL_US
from ratelimit_sidecar.replication.v1 import replication_pb2 as pb
from ratelimit_sidecar.replication.wire import ProtocolError, Reason

TICK_EVERY_US: Final = 20_000
"""The interval between two ticks."""

TICK_WORK: Final = 256
"""The pairs of a bucket and a peer that a tick looks at, about 4 us each: 1 ms, 5 % of the time."""

MAX_OPEN: Final = 1_024
"""The most asks, and the most wishes, without an answer on one stream."""

MAX_WISHES: Final = (1 << 32) - 1 - MAX_OPEN
"""The most wishes on one stream, since their numbers have 32 bits; a tick may make `MAX_OPEN` more. Then the stream
begins anew: after some weeks in which requests wait all the time."""

GIVEN_UP_AT_ONCE: Final = 64
"""The most wishes given up in one step, about 5 us each."""

MAX_BATCH: Final = 16
"""The most asks and payments sent in one frame. An ask takes about 50 us to answer, so a frame delays decisions by 0.8
ms.
"""

MAX_TAKEN: Final = 8 * MAX_BATCH
"""The most asks, payments, wishes, tickets and returns accepted in one frame: more than are sent, since the bounds of a
peer's version may differ.
"""

MAX_BATCH_BYTES: Final = 1 << 16
"""A frame gets no further key when its keys have this many bytes; the last one may exceed it."""

MAX_AMOUNT: Final = (1 << 64) - 1
"""The largest amount in a frame. A node that has room for more asks for this much."""

_NOTHING: Final = ShownMembership(0, {})
"""Stands for the membership of a peer that shows none: an epoch before the first."""


class StreamPayments:
    """The payment protocol's state of one stream: what is to be sent on it, and what has no answer yet.

    Args:
        stream_number: this node's own for the stream; no other stream of this process has it.
    """

    def __init__(self, stream_number: int) -> None:
        self.stream_number = stream_number
        self.unanswered_asks: dict[bytes, int] = {}
        """By key, the times of this node's asks without an answer; oldest first."""
        # Emptied from the front, which a plain dict does in time proportional to what was removed before.
        self.asks_to_send: OrderedDict[bytes, Ask] = OrderedDict()
        self.payments_to_send: OrderedDict[bytes, Payment] = OrderedDict()
        self.can_wish = False
        """True when the peer's version of the protocol has wishes and tickets."""
        self.unanswered_wishes: OrderedDict[int, Wish] = OrderedDict()
        """Wishes without an answer, by number; the oldest first."""
        self.wishes_to_send: deque[pb.Wish] = deque()
        self.tickets_to_send: deque[pb.Ticket] = deque()
        self.returns_to_send: deque[pb.Return] = deque()
        self.last_wish_sent = 0
        """The number of this node's last wish."""
        self.last_wish_received = 0
        """The number of the peer's last wish."""

    def take_frame(self) -> pb.Frame | None:
        """The next frame; None when nothing is pending."""
        frame = pb.Frame()
        payments = frame.payments
        count = key_bytes = 0
        # First the messages for which requests wait.
        while self.returns_to_send and count < MAX_BATCH:
            payments.returns.append(self.returns_to_send.popleft())
            count += 1
        while self.tickets_to_send and count < MAX_BATCH:
            payments.tickets.append(self.tickets_to_send.popleft())
            count += 1
        while self.wishes_to_send and count < MAX_BATCH and key_bytes < MAX_BATCH_BYTES:
            wish = self.wishes_to_send.popleft()
            payments.wishes.append(wish)
            count += 1
            key_bytes += len(wish.key)
        for pending, written in (
            (self.payments_to_send, frame.payments.pays),
            (self.asks_to_send, frame.payments.asks),
        ):
            while pending and count < MAX_BATCH and key_bytes < MAX_BATCH_BYTES:
                key, each = pending.popitem(last=False)
                # The fields have the names of the message's.
                written.add(key=key, **{name: min(value, MAX_AMOUNT) for name, value in each._asdict().items()})
                count += 1
                key_bytes += len(key)
        return frame if count else None


class PaymentExchange:
    """Exchanges tokens between the purses in `ledger` and those of peers. Call `tick` to ask peers, `receive` for each
    frame of theirs, and `closed` when a stream is closed.

    Args:
        strict_us: microseconds of a clock that never steps, the one of the ledger's buckets.
    """

    def __init__(self, ledger: Ledger, strict_us: Callable[[], int]) -> None:
        self.ledger = ledger
        self.payments_sent = 0
        """Asks of peers answered with more than nothing."""
        self.payments_received = 0
        """Asks that peers have answered with more than nothing."""
        self.refused = 0
        """Asks and wishes of nodes that are no members, and payments of more than a peer can have."""
        self._strict_us = strict_us
        self._last_stream_number = 0
        self._tick_due_us = strict_us()

    @property
    def membership(self) -> ShownMembership:
        """The membership that this node shows to peers."""
        membership = self.ledger.shares.membership
        return ShownMembership(membership.epoch, membership.weights)

    def conflicts_with(self, peer: str) -> bool:
        """True when the peer has shown other members under this node's epoch."""
        return peer in self.ledger.shares.conflicts

    def status(self) -> MembershipStatus:
        shares, strict_us = self.ledger.shares, self._strict_us()
        return MembershipStatus(
            epoch=shares.membership.epoch,
            home_share=shares.home_fraction(strict_us),
            settled=shares.is_epoch_everywhere and strict_us >= shares.from_us,
            conflicts=tuple(shares.conflicts),
            buckets=len(self.ledger),
            payments_sent=self.payments_sent,
            payments_received=self.payments_received,
        )

    def new_stream(self) -> StreamPayments:
        """The payments of a new stream."""
        self._last_stream_number += 1
        return StreamPayments(self._last_stream_number)

    def receive_shown(self, peer: str, shown: ShownMembership | None) -> None:
        """Note the membership that a peer shows in its hello; None when the peer has gone, and shows none any more."""
        self.ledger.shares.receive(peer, shown or _NOTHING, self._strict_us())

    def set_id_taken(self, *, is_taken: bool) -> None:
        """While another process has this node's id, of which each member has one home, this one has none."""
        self.ledger.shares.is_id_taken = is_taken

    def tick(self, streams: Mapping[str, StreamPayments]) -> list[str]:
        """Ask peers for tokens that are needed here and wish for tickets, free the room of old tickets, serve requests
        that wait, and end the waits that `WaitQueues.end_all` called off. To be called at each flush, without peers
        too: it does something every `TICK_EVERY_US`.

        Args:
            streams: by peer that can be asked, the stream in use.

        Returns:
            The peers to which there is something to send.
        """
        strict_us = self._strict_us()
        if strict_us < self._tick_due_us:
            return []
        self._tick_due_us = strict_us + TICK_EVERY_US
        most = max(1, TICK_WORK // (4 + len(streams)))
        numbers = {
            peer: stream.stream_number
            for peer, stream in streams.items()
            if len(stream.unanswered_asks) + most <= MAX_OPEN
        }
        asks = self.ledger.tick(numbers, strict_us, most, MAX_KEY_BYTES)
        for peer, wanted in asks.items():
            streams[peer].asks_to_send.update(wanted)
            streams[peer].unanswered_asks.update(dict.fromkeys(wanted, strict_us))
        return [*asks, *self._wish(streams, strict_us, most)]

    def _wish(self, streams: Mapping[str, StreamPayments], strict_us: int, most: int) -> list[str]:
        """Wish for the tokens that requests wait for; returns the peers to which there is something to send."""
        for stream in streams.values():
            self._give_up(stream, strict_us)
        peers = [
            peer
            for peer, stream in streams.items()
            if stream.can_wish
            and stream.last_wish_sent <= MAX_WISHES
            and len(stream.unanswered_wishes) + most <= MAX_OPEN
            and self.ledger.shares.is_member(peer)
        ]
        wishes = self.ledger.queues.tick(peers, strict_us, most, MAX_KEY_BYTES)
        for peer, wanted in wishes.items():
            stream = streams[peer]
            for key, tokens in wanted.items():
                stream.last_wish_sent += 1
                self.ledger.queues.by_key[key].policy.bucket.wish(_ticket_number(stream, stream.last_wish_sent))
                stream.unanswered_wishes[stream.last_wish_sent] = Wish(peer, key, tokens, strict_us)
                stream.wishes_to_send.append(pb.Wish(number=stream.last_wish_sent, key=key, tokens=tokens))
        return list(wishes)

    def _give_up(self, stream: StreamPayments, strict_us: int) -> None:
        """Give up wishes that are too old to be answered."""
        for _ in range(min(GIVEN_UP_AT_ONCE, len(stream.unanswered_wishes))):
            number, wish = next(iter(stream.unanswered_wishes.items()))
            if strict_us - wish.at_us <= TICKET_US:
                return
            del stream.unanswered_wishes[number]
            self.ledger.queues.by_key[wish.key].give_up(_ticket_number(stream, number), wish)

    def receive(self, peer: str, payments: pb.Payments, stream: StreamPayments) -> int:
        """Apply a frame of a peer.

        Args:
            stream: on which the frame came; gets the answers.

        Returns:
            The number of asks and wishes for which there is no strict rule here, or no room.

        Raises:
            ProtocolError: too_large, bad_key or unexpected. What stood before the bad one has been applied, and is as
                good as if it had come alone.
        """
        count = len(payments.asks) + len(payments.pays)
        count += len(payments.wishes) + len(payments.tickets) + len(payments.returns)
        if count > MAX_TAKEN:
            raise ProtocolError(
                Reason.TOO_LARGE, f"{count} asks and payments in a frame; at most {MAX_TAKEN} are taken"
            )
        strict_us = self._strict_us()
        unknown_keys = self._receive_tickets(peer, payments, stream, strict_us)
        for pay in payments.pays:
            # Of no use from a node that is no member: it has not been asked.
            if pay.key in stream.asks_to_send or stream.unanswered_asks.pop(pay.key, None) is None:
                raise ProtocolError(Reason.UNEXPECTED, "a payment that answers no ask")
            received = Payment(pay.amount, pay.left)
            self.refused += not self.ledger.receive_payment(peer, stream.stream_number, pay.key, received, strict_us)
            self.payments_received += pay.amount > 0
        for ask in payments.asks:
            check_key(ask.key)
            if ask.key in stream.payments_to_send or len(stream.payments_to_send) >= MAX_OPEN:
                raise ProtocolError(
                    Reason.UNEXPECTED, f"an ask while {len(stream.payments_to_send)} before it are not answered"
                )
            answer: Payment | None = Payment(0, 0)
            if self.ledger.shares.is_member(peer):
                asked = Ask(ask.amount, ask.level, ask.demand, ask.is_short)
                try:
                    answer = self.ledger.pay(peer, ask.key, asked, strict_us)
                except ValueError as error:
                    raise ProtocolError(Reason.BAD_KEY, str(error)) from error
            else:
                self.refused += 1
            unknown_keys += answer is None
            stream.payments_to_send[ask.key] = answer = answer or Payment(0, 0)
            self.payments_sent += answer.amount > 0
        return unknown_keys

    def _receive_tickets(self, peer: str, payments: pb.Payments, stream: StreamPayments, strict_us: int) -> int:
        """The part of `receive` that is about requests that wait: returns, tickets and wishes."""
        ledger = self.ledger
        for back in payments.returns:
            # It may have expired. The stream's number is in the ticket's, so it is of this peer.
            ledger.release(_ticket_number(stream, back.number), back.amount, strict_us)
        for ticket in payments.tickets:
            if ticket.number > stream.last_wish_sent:
                raise ProtocolError(Reason.UNEXPECTED, "a ticket that answers no wish")
            asked, returned = stream.unanswered_wishes.pop(ticket.number, None), ticket.tokens * TOKEN
            if asked is not None:
                given = Ticket(min(ticket.tokens, asked.tokens), ticket.left)
                returned = ledger.accept(_ticket_number(stream, ticket.number), asked, given, strict_us)
            # Of a return too many nothing is said: then the peer keeps the ticket's room until `HOLD_US`.
            if ticket.tokens and len(stream.returns_to_send) < MAX_OPEN:
                stream.returns_to_send.append(pb.Return(number=ticket.number, amount=min(returned, MAX_AMOUNT)))
        unknown_keys = 0
        for wish in payments.wishes:
            check_key(wish.key)
            if wish.number <= stream.last_wish_received:
                raise ProtocolError(Reason.UNEXPECTED, f"a wish {wish.number} after wish {stream.last_wish_received}")
            stream.last_wish_received = wish.number
            if not ledger.shares.is_member(peer):
                self.refused += 1
                continue
            if len(stream.tickets_to_send) >= MAX_OPEN:
                # The peer does not read. It gives the wish up.
                continue
            try:
                answer = ledger.set_aside(_ticket_number(stream, wish.number), peer, wish.key, wish.tokens, strict_us)
            except ValueError as error:
                raise ProtocolError(Reason.BAD_KEY, str(error)) from error
            unknown_keys += answer is None
            answer = answer or Ticket(0, 0)
            stream.tickets_to_send.append(
                pb.Ticket(number=wish.number, tokens=answer.tokens, left=min(answer.left, MAX_AMOUNT))
            )
        return unknown_keys

    def check_time(self, stream: StreamPayments) -> None:
        """Give up wishes that are too old, and check that the peer answers asks in time.

        Raises:
            ProtocolError: stalled, since the room that is reserved for an answer is of no use to anybody; or exhausted.
        """
        strict_us = self._strict_us()
        self._give_up(stream, strict_us)
        if strict_us - next(iter(stream.unanswered_asks.values()), strict_us) > STALL_US:
            raise ProtocolError(Reason.STALLED, f"an ask not answered for {STALL_US // 1_000_000} s")
        if stream.last_wish_sent > MAX_WISHES:
            raise ProtocolError(Reason.EXHAUSTED, f"{MAX_WISHES} wishes were made on this stream")

    def closed(self, stream: StreamPayments) -> None:
        """Free the room of a stream's unanswered asks, and give up its wishes: it is closed at this end. What was set
        aside for the peer's wishes stays so: the peer may have used its ticket, or may yet get it."""
        self.ledger.closed(stream.stream_number, stream.unanswered_asks, self._strict_us())
        stream.unanswered_asks.clear()
        for number, wish in stream.unanswered_wishes.items():
            self.ledger.queues.by_key[wish.key].give_up(_ticket_number(stream, number), wish)
        stream.unanswered_wishes.clear()


def _ticket_number(stream: StreamPayments, number: int) -> int:
    """The number of a ticket, or of the wish for it, among those of all streams.

    Wish 5 of this node and wish 5 of the peer on one stream get the same number. They do not meet: bucket and ledger
    keep what this node wished for and what it set aside for peers apart.
    """
    return stream.stream_number << 32 | number
