"""Payments between the purses of strict limits (crdt/strict.py): what one stream has yet to send of them, and has open.

Each ask on a stream is answered by one payment on it, and for each bucket one ask is open at a time. So what is pending
is bounded, and ends with the stream: an ask not sent has changed nothing, and a payment that is lost costs its payer.
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
"""Asks without an answer on one stream."""

MAX_BATCH: Final = 16
"""Asks and payments in one frame. An ask takes some 50 us to answer: 0.8 ms between two decisions."""

MAX_BATCH_BYTES: Final = 1 << 16
"""Rough, of keys: a frame takes no further one when it has as much."""


class PaymentOutbox:
    """What one stream has to send of payments, and which of its asks are open.

    Args:
        end: names this node's end of the stream, for the life of this process.
    """

    def __init__(self, end: int) -> None:
        self.end = end
        self.open: dict[bytes, int] = {}
        """By key, when this node has asked for what is not answered yet; oldest first."""
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
        """Raises:
        ProtocolError: unexpected; the peer has asked for that already, or for more than may be open.
        """
        if key in self._pays or len(self._pays) >= MAX_OPEN:
            raise ProtocolError(Reason.UNEXPECTED, f"an ask while {len(self._pays)} before it are not answered")

    def pay(self, key: bytes, pay: Pay) -> None:
        self._pays[key] = pay

    def answered(self, key: bytes) -> None:
        """Raises:
        ProtocolError: unexpected; this node has not asked for that.
        """
        if key in self._asks or self.open.pop(key, None) is None:
            raise ProtocolError(Reason.UNEXPECTED, "a payment that answers no ask")

    def waits_since_us(self, now_us: int) -> int:
        """When the oldest ask without an answer was made; `now_us` without one."""
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
    """Raises:
    ProtocolError: too_large.
    """
    count = len(payments.asks) + len(payments.pays)
    if count > MAX_OPEN:
        raise ProtocolError(Reason.TOO_LARGE, f"{count} asks and payments in a frame; at most {MAX_OPEN} are taken")


def read_ask(ask: pb.Ask) -> Ask:
    """Raises:
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
