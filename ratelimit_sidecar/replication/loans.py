"""Loans of strict shares (crdt/strict.py) to and from Loans frames, and what of them is yet to be sent on one stream.

What is pending is kept by bucket, like all that is yet to be sent: the newest ask, and the newest return and grant with
the tokens of those they stand for. To forget what was not sent is always safe: a lost ask has changed nothing at the
lender, and of a lost grant or return nobody uses the share, nor the tokens, until the loan ends by itself. So what is
pending is bounded, and ends with its stream. For one bucket a return goes out before an ask made after it; an ask made
before it is not sent any more, since the return renounces what it would bring.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Final

from ratelimit_sidecar.crdt.ledger import Wishes
from ratelimit_sidecar.crdt.limit import MAX_CAPACITY
from ratelimit_sidecar.crdt.shares import PARTS
from ratelimit_sidecar.crdt.strict import Ask, Grant, Return
from ratelimit_sidecar.replication.deltas import MAX_KEY_BYTES
from ratelimit_sidecar.replication.v1 import replication_pb2 as pb
from ratelimit_sidecar.replication.wire import ProtocolError, Reason

MAX_NUMBER: Final = 1 << 62
"""Of an ask. They begin below 2**31 and rise by one a few times a second."""

MAX_PENDING: Final = 1_024
"""Asks on one stream; returns; grants. More than a node makes until an ask without an answer is made anew."""

MAX_BATCH_LOANS: Final = 16
"""Sent in one frame. An ask takes some 50 us to answer: 0.8 ms between two decisions."""

MAX_BATCH_BYTES: Final = 1 << 16
"""Rough, of keys: a frame takes no further loan when it has as much."""

MAX_FRAME_LOANS: Final = 1_024
"""Taken from one frame. Far above what is sent, so that a peer with other bounds is understood."""


class LoanOutbox:
    """What is yet to be sent on one stream."""

    def __init__(self) -> None:
        # Emptied from the front, which a plain dict does in time proportional to what was removed before.
        self._returns: OrderedDict[bytes, Return] = OrderedDict()
        self._asks: OrderedDict[bytes, Ask] = OrderedDict()
        self._grants: OrderedDict[bytes, Grant] = OrderedDict()

    def __len__(self) -> int:
        return len(self._returns) + len(self._asks) + len(self._grants)

    def add(self, wishes: Wishes) -> None:
        """What the ledger has to tell the peer; each once, in the order in which the ledger has said it."""
        for key, returned in wishes.returns.items():
            self._asks.pop(key, None)
            before = self._returns.get(key)
            if before is not None:
                self._returns[key] = returned._replace(tokens=_sum(before.tokens, returned.tokens))
            elif _has_room(self._returns, key):
                self._returns[key] = returned
        for key, ask in wishes.asks.items():
            if key in self._asks or _has_room(self._asks, key):
                self._asks[key] = ask

    def has_room_for_grant(self, key: bytes) -> bool:
        """False when a grant would be lost: then nothing should be lent."""
        return key in self._grants or _has_room(self._grants, key)

    def grant(self, key: bytes, grant: Grant) -> None:
        """Answer the peer."""
        before = self._grants.get(key)
        if before is not None:
            grant = grant._replace(tokens=_sum(before.tokens, grant.tokens))
        self._grants[key] = grant

    def take_frame(self) -> pb.Frame | None:
        """The next frame; None when nothing is pending."""
        if not self:
            return None
        frame = pb.Frame()
        loans = frame.loans
        count = key_bytes = 0
        # All returns are out before the first ask.
        for pending, written in (
            (self._returns, loans.returns),
            (self._asks, loans.asks),
            (self._grants, loans.grants),
        ):
            while pending and count < MAX_BATCH_LOANS and key_bytes < MAX_BATCH_BYTES:
                key, loan = pending.popitem(last=False)
                # The fields have the names of the message's.
                written.add(key=key, **loan._asdict())
                count += 1
                key_bytes += len(key)
        return frame


def check_count(loans: pb.Loans) -> None:
    """Raises:
    ProtocolError: too_large.
    """
    count = len(loans.returns) + len(loans.asks) + len(loans.grants)
    if count > MAX_FRAME_LOANS:
        raise ProtocolError(Reason.TOO_LARGE, f"{count} loans in a frame; at most {MAX_FRAME_LOANS} are taken")


def read_returns(loans: pb.Loans) -> Iterator[tuple[bytes, Return]]:
    """Raises:
    ProtocolError: bad_key or bad_loan; those before the bad one have been yielded. So with asks and grants.
    """
    for loan in loans.returns:
        yield _key(loan.key), Return(_number(loan.number), _parts(loan.parts), _tokens(loan.tokens))


def read_asks(loans: pb.Loans) -> Iterator[tuple[bytes, Ask]]:
    for loan in loans.asks:
        yield _key(loan.key), Ask(_number(loan.number), _parts(loan.parts))


def read_grants(loans: pb.Loans) -> Iterator[tuple[bytes, Grant]]:
    for loan in loans.grants:
        yield (
            _key(loan.key),
            Grant(_number(loan.number), _parts(loan.parts), _tokens(loan.tokens), _parts(loan.available)),
        )


def _key(key: bytes) -> bytes:
    if not 1 <= len(key) <= MAX_KEY_BYTES:
        raise ProtocolError(Reason.BAD_KEY, f"a bucket key must have 1 to {MAX_KEY_BYTES} bytes, not {len(key)}")
    return key


def _number(number: int) -> int:
    if number > MAX_NUMBER:
        raise ProtocolError(Reason.BAD_LOAN, f"a loan of number {number}; they go up to 2**62")
    return number


def _parts(parts: int) -> int:
    if parts > PARTS:
        raise ProtocolError(Reason.BAD_LOAN, f"a loan of {parts} parts; a limit has 2**32")
    return parts


def _tokens(tokens: int) -> int:
    if tokens > MAX_CAPACITY:
        raise ProtocolError(Reason.BAD_LOAN, f"a loan with {tokens} tokens; a bucket holds at most 2**40")
    return tokens


def _sum(tokens: int, more: int) -> int:
    return min(tokens + more, MAX_CAPACITY)


def _has_room(
    pending: OrderedDict[bytes, Return] | OrderedDict[bytes, Ask] | OrderedDict[bytes, Grant], key: bytes
) -> bool:
    return len(pending) < MAX_PENDING and len(key) <= MAX_KEY_BYTES
