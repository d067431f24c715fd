"""A node's ledger of strict limits on the mesh: what it hears from peers, and when it asks them for something.

Sans-I/O, with a clock of its own: strict buckets go by one that never steps (crdt/strict.py), deltas by the wall.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from ratelimit_sidecar.crdt.ledger import Ledger
from ratelimit_sidecar.crdt.paying import Pay
from ratelimit_sidecar.crdt.shares import PARTS, Shown
from ratelimit_sidecar.replication.deltas import MAX_KEY_BYTES
from ratelimit_sidecar.replication.payments import PaymentOutbox, check_count, read_ask, read_pay
from ratelimit_sidecar.replication.session import STALL_US
from ratelimit_sidecar.replication.status import MembershipStatus
from ratelimit_sidecar.replication.v1 import replication_pb2 as pb
from ratelimit_sidecar.replication.wire import ProtocolError, Reason

TICK_EVERY_US: Final = 20_000

TICK_WORK: Final = 256
"""A tick looks at so many pairs of a bucket and a peer, of which each takes some 4 us: 1 ms, 5 % of the time."""

_NOTHING: Final = Shown(0, {})
"""What a peer without a membership shows: an epoch before the first."""


class Purses:
    """What a node's streams call for strict limits: `tick` to ask peers, `receive` for what comes from them.

    Args:
        strict_us: microseconds of a clock that never steps, the one of the ledger's buckets.
    """

    def __init__(self, ledger: Ledger, strict_us: Callable[[], int]) -> None:
        self.ledger = ledger
        self.paid = 0
        """Asks of peers answered with more than nothing."""
        self.received = 0
        """Asks that peers have answered with more than nothing."""
        self.refused = 0
        """Asks and payments of nodes that are no members, and payments of more than a peer can have."""
        self._strict_us = strict_us
        self._ends = 0
        self._tick_due_us = strict_us()

    @property
    def membership(self) -> Shown:
        """What this node shows."""
        membership = self.ledger.shares.membership
        return Shown(membership.epoch, membership.weights)

    def conflicts_with(self, peer: str) -> bool:
        """True when the peer has shown other members under this node's epoch."""
        return peer in self.ledger.shares.conflicts

    def status(self) -> MembershipStatus:
        shares, now_us = self.ledger.shares, self._strict_us()
        settled_us = shares.settled_us()
        return MembershipStatus(
            epoch=shares.membership.epoch,
            home_share=shares.home(now_us) / PARTS,
            settled=settled_us is not None and settled_us <= now_us,
            conflicts=tuple(shares.conflicts),
            buckets=len(self.ledger),
            payments_sent=self.paid,
            payments_received=self.received,
        )

    def new_outbox(self) -> PaymentOutbox:
        """Of another stream."""
        self._ends += 1
        return PaymentOutbox(self._ends)

    def hear(self, peer: str, shown: Shown | None) -> None:
        """A peer has said hello, and what its membership is."""
        self.ledger.shares.hear(peer, shown or _NOTHING, self._strict_us())

    def tick(self, outboxes: Mapping[str, PaymentOutbox]) -> list[str]:
        """Ask peers for what is wanted; to be called every few milliseconds.

        Args:
            outboxes: of the stream in use to each peer that can be asked.

        Returns:
            The peers to which there is something to send.
        """
        now_us = self._strict_us()
        if now_us < self._tick_due_us:
            return []
        self._tick_due_us = now_us + TICK_EVERY_US
        most = TICK_WORK // (4 + len(outboxes))
        ends = {peer: outbox.end for peer, outbox in outboxes.items() if outbox.has_room(most)}
        asks = self.ledger.tick(ends, now_us, most, MAX_KEY_BYTES)
        for peer, wanted in asks.items():
            outboxes[peer].ask(wanted, now_us)
        return list(asks)

    def receive(self, peer: str, payments: pb.Payments, outbox: PaymentOutbox) -> int:
        """Apply a frame of a peer.

        Args:
            outbox: of the stream on which it came; takes the answers.

        Returns:
            The number of buckets that the peer asks for and no strict rule here knows.

        Raises:
            ProtocolError: too_large, bad_key, bad_payment or unexpected. What stood before the bad one has been
                applied, and is as good as if it had come alone.
        """
        check_count(payments)
        now_us = self._strict_us()
        is_member = self.ledger.shares.is_member(peer)
        unknown_keys = 0
        for sent in payments.pays:
            pay = read_pay(sent)
            # Of no use from a node that is no member: it has not been asked.
            outbox.answered(sent.key)
            self.refused += not self.ledger.paid(peer, outbox.end, sent.key, pay, now_us)
            self.received += pay.amount > 0
        for asked in payments.asks:
            ask = read_ask(asked)
            outbox.owe(asked.key)
            answer: Pay | None = Pay(0, 0)
            if not is_member:
                self.refused += 1
            else:
                try:
                    answer = self.ledger.answer(peer, asked.key, ask, now_us)
                except ValueError as error:
                    raise ProtocolError(Reason.BAD_KEY, str(error)) from error
            unknown_keys += answer is None
            self.paid += answer is not None and answer.amount > 0
            outbox.pay(asked.key, answer or Pay(0, 0))
        return unknown_keys

    def check_time(self, outbox: PaymentOutbox) -> None:
        """Raises:
        ProtocolError: stalled. The room that is reserved for an answer is of no use to anybody.
        """
        now_us = self._strict_us()
        if now_us - outbox.waits_since_us(now_us) > STALL_US:
            raise ProtocolError(Reason.STALLED, f"an ask not answered for {STALL_US // 1_000_000} s")

    def closed(self, outbox: PaymentOutbox) -> None:
        """Its stream is closed at this end."""
        self.ledger.closed(outbox.end, outbox.open, self._strict_us())
        outbox.open.clear()

    def forget(self, peer: str) -> None:
        """The peer is not coming back: what it has shown is void."""
        self.ledger.shares.hear(peer, _NOTHING, self._strict_us())
