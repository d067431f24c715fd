"""Payments of strict limits (crdt/strict.py): the asks and payments that one stream has to send, and its open asks.

Each ask is answered by one payment on the same stream, and for each bucket one ask is open at a time. So the pending
ones are bounded, and end with the stream: an unsent ask has changed nothing, and a lost payment is lost for its payer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Final

from ratelimit_sidecar.crdt.paying import Ask, Pay
from ratelimit_sidecar.crdt.strict import MAX_AMOUNT
from ratelimit_sidecar.replication.deltas import check_key
from ratelimit_sidecar.replication.v1 import replication_pb2 as pb
from ratelimit_sidecar.replication.wire import ProtocolError, Reason

MAX_OPEN: Final = 1_024
"""The most open asks on one stream."""

MAX_BATCH: Final = 16
"""The most asks and payments in one frame. Answering an ask takes about 50 us: 0.8 ms between two decisions."""

MAX_BATCH_BYTES: Final = 1 << 16
"""About the most bytes of keys in a frame."""


class PaymentOutbox:
    """The asks and payments that one stream has to send, and its open asks.

    Args:
        end: the number of this node's end of the stream, unique in this process.
    """

    def __init__(self, end: int) -> None:
        self.end = end
        self.open: dict[bytes, int] = {}
        """By key, when this node made an ask that is not answered yet; oldest first."""
        # Emptied from the front, which a plain dict does in time proportional to what was removed before.
        self._asks: OrderedDict[bytes, Ask] = OrderedDict()
        self._pays: OrderedDict[bytes, Pay] = OrderedDict()

    def has_room(self, asks: int) -> bool:
        return len(self.open) + asks <= MAX_OPEN

    def ask(self, asks: Mapping[bytes, Ask], now_us: int) -> None:
        for key, ask in asks.items():
            self._asks[key] = ask
            self.open[key] = now_us

    def owe(self, key: bytes) -> None:
        """Note that a payment for this key is owed to the peer.

        Raises:
            ProtocolError: unexpected; the peer has asked for that already, or for more than may be open.
        """
        if key in self._pays or len(self._pays) >= MAX_OPEN:
            raise ProtocolError(Reason.UNEXPECTED, f"an ask while {len(self._pays)} before it are not answered")

    def pay(self, key: bytes, pay: Pay) -> None:
        self._pays[key] = pay

    def answered(self, key: bytes) -> None:
        """Note that the ask for this key was answered.

        Raises:
            ProtocolError: unexpected; this node has not asked for that.
        """
        if key in self._asks or self.open.pop(key, None) is None:
            raise ProtocolError(Reason.UNEXPECTED, "a payment that answers no ask")

    def waits_since_us(self, now_us: int) -> int:
        """When the oldest open ask was made; `now_us` without one."""
        return next(iter(self.open.values()), now_us)

    def take_frame(self) -> pb.Frame | None:
        """The next frame; None when nothing is pending."""
        if not self._pays and not self._asks:
            return None
        frame = pb.Frame()
        payments = frame.payments
        count = key_bytes = 0
        for pending, written in ((self._pays, payments.pays), (self._asks, payments.asks)):
            while pending and count < MAX_BATCH and key_bytes < MAX_BATCH_BYTES:
                key, each = pending.popitem(last=False)
                # The fields have the names of the message's.
                written.add(key=key, **each._asdict())
                count += 1
                key_bytes += len(key)
        return frame


def check_count(payments: pb.Payments) -> None:
    """Check the number of asks and payments in a frame.

    Raises:
        ProtocolError: too_large.
    """
    count = len(payments.asks) + len(payments.pays)
    if count > MAX_OPEN:
        raise ProtocolError(Reason.TOO_LARGE, f"{count} asks and payments in a frame; at most {MAX_OPEN} are taken")


def read_ask(ask: pb.Ask) -> Ask:
    """Read a peer's ask, and check its numbers.

    Raises:
        ProtocolError: bad_key or bad_payment; so `read_pay`.
    """
    check_key(ask.key)
    return Ask(_amount(ask.amount), _amount(ask.level), _amount(ask.demand), ask.is_short)


def read_pay(pay: pb.Pay) -> Pay:
    check_key(pay.key)
    return Pay(_amount(pay.amount), _amount(pay.left))


def _amount(amount: int) -> int:
    if amount > MAX_AMOUNT:
        raise ProtocolError(Reason.BAD_PAYMENT, f"an amount of {amount}; they go up to 2**62")
    return amount
