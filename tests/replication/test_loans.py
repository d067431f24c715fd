"""Loans on the wire, and what of them waits for its turn."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit_sidecar.crdt.ledger import Wishes
from ratelimit_sidecar.crdt.limit import MAX_CAPACITY
from ratelimit_sidecar.crdt.shares import PARTS
from ratelimit_sidecar.crdt.strict import Ask, Grant, Return
from ratelimit_sidecar.replication.deltas import MAX_KEY_BYTES
from ratelimit_sidecar.replication.loans import (
    MAX_BATCH_BYTES,
    MAX_BATCH_LOANS,
    MAX_FRAME_LOANS,
    MAX_NUMBER,
    MAX_PENDING,
    LoanOutbox,
    check_count,
    read_asks,
    read_grants,
    read_returns,
)
from ratelimit_sidecar.replication.v1 import replication_pb2 as pb
from ratelimit_sidecar.replication.wire import MAX_FRAME_BYTES, ProtocolError, Reason

keys = st.binary(min_size=1, max_size=20)
numbers, parts, tokens = st.integers(0, MAX_NUMBER), st.integers(0, PARTS), st.integers(0, MAX_CAPACITY)


def next_loans(outbox: LoanOutbox) -> pb.Loans:
    """The next frame, as it arrives."""
    frame = outbox.take_frame()
    assert frame is not None
    raw = frame.SerializeToString()
    assert len(raw) <= MAX_FRAME_BYTES
    return pb.Frame.FromString(raw).loans


def read_all(loans: pb.Loans) -> list[tuple[bytes, Return | Ask | Grant]]:
    check_count(loans)
    return [*read_returns(loans), *read_asks(loans), *read_grants(loans)]


@given(st.dictionaries(keys, st.builds(Ask, numbers, parts), max_size=5))
def test_asks_arrive_as_they_were_made(asks: dict[bytes, Ask]) -> None:
    outbox = LoanOutbox()
    outbox.add(Wishes(asks=asks))
    assert dict(read_asks(next_loans(outbox) if asks else pb.Loans())) == asks


@given(st.dictionaries(keys, st.builds(Return, numbers, parts, tokens), min_size=1, max_size=5))
def test_returns_arrive_as_they_were_made(returns: dict[bytes, Return]) -> None:
    outbox = LoanOutbox()
    outbox.add(Wishes(returns=returns))
    assert dict(read_returns(next_loans(outbox))) == returns


@given(st.dictionaries(keys, st.builds(Grant, numbers, parts, tokens, parts), min_size=1, max_size=5))
def test_grants_arrive_as_they_were_made(grants: dict[bytes, Grant]) -> None:
    outbox = LoanOutbox()
    for key, grant in grants.items():
        outbox.grant(key, grant)
    assert dict(read_grants(next_loans(outbox))) == grants


def test_everything_is_sent_once() -> None:
    outbox = LoanOutbox()
    outbox.add(Wishes(asks={b"k": Ask(1, 5)}, returns={b"other": Return(1, 0, 0)}))
    outbox.grant(b"k", Grant(7, 5, 0, 0))
    assert len(outbox) == 3
    next_loans(outbox)
    assert len(outbox) == 0
    assert outbox.take_frame() is None


def test_of_the_asks_for_one_bucket_the_newest_is_sent() -> None:
    outbox = LoanOutbox()
    outbox.add(Wishes(asks={b"k": Ask(1, 5)}))
    outbox.add(Wishes(asks={b"k": Ask(2, 6)}))
    assert list(read_asks(next_loans(outbox))) == [(b"k", Ask(2, 6))]


def test_a_return_stands_for_those_before_it_with_all_their_tokens() -> None:
    outbox = LoanOutbox()
    outbox.add(Wishes(returns={b"k": Return(3, 9, 10)}))
    outbox.add(Wishes(returns={b"k": Return(4, 2, 30)}))
    assert list(read_returns(next_loans(outbox))) == [(b"k", Return(4, 2, 40))]


def test_a_grant_stands_for_those_before_it_with_all_their_tokens() -> None:
    outbox = LoanOutbox()
    outbox.grant(b"k", Grant(3, 9, 10, 11))
    outbox.grant(b"k", Grant(4, 2, 30, 12))
    assert list(read_grants(next_loans(outbox))) == [(b"k", Grant(4, 2, 40, 12))]


def test_tokens_put_together_stay_within_what_a_peer_takes() -> None:
    outbox = LoanOutbox()
    for number in (1, 2):
        outbox.add(Wishes(returns={b"k": Return(number, 0, MAX_CAPACITY)}))
    assert list(read_returns(next_loans(outbox))) == [(b"k", Return(2, 0, MAX_CAPACITY))]


def test_a_return_renounces_the_ask_that_was_not_sent_before_it_and_precedes_the_one_after_it() -> None:
    outbox = LoanOutbox()
    outbox.add(Wishes(asks={b"k": Ask(5, 1), b"other": Ask(2, 1)}))
    outbox.add(Wishes(returns={b"k": Return(5, 0, 3)}))
    assert list(read_asks(next_loans(outbox))) == [(b"other", Ask(2, 1))]
    outbox.add(Wishes(returns={b"r%d" % index: Return(1, 0, 0) for index in range(MAX_BATCH_LOANS)}))
    outbox.add(Wishes(returns={b"k": Return(6, 0, 3)}))
    outbox.add(Wishes(asks={b"k": Ask(7, 1)}))
    assert list(read_asks(next_loans(outbox))) == []
    last = next_loans(outbox)
    assert list(read_returns(last)) == [(b"k", Return(6, 0, 3))]
    assert list(read_asks(last)) == [(b"k", Ask(7, 1))]


def test_a_frame_takes_so_many_loans_and_key_bytes_that_it_is_answered_between_two_decisions() -> None:
    outbox = LoanOutbox()
    outbox.add(Wishes(asks={b"%d" % index: Ask(1, 1) for index in range(MAX_BATCH_LOANS + 1)}))
    assert [len(next_loans(outbox).asks) for _ in range(2)] == [MAX_BATCH_LOANS, 1]
    part = bytes(MAX_BATCH_BYTES // 5)
    outbox.add(Wishes(asks={part + b"%d" % index: Ask(1, 1) for index in range(6)}))
    assert [len(next_loans(outbox).asks) for _ in range(2)] == [5, 1]


def test_what_is_pending_is_bounded_and_a_known_bucket_is_always_updated() -> None:
    outbox = LoanOutbox()
    names = [b"%d" % index for index in range(MAX_PENDING + 5)]
    outbox.add(Wishes(asks=dict.fromkeys(names, Ask(1, 1))))
    outbox.add(Wishes(returns={b"r" + name: Return(1, 0, 0) for name in names}))
    for name in names:
        if outbox.has_room_for_grant(name):
            outbox.grant(name, Grant(1, 1, 0, 0))
    assert len(outbox) == 3 * MAX_PENDING
    assert outbox.has_room_for_grant(names[0])
    outbox.add(Wishes(asks={names[0]: Ask(2, 9)}, returns={b"r" + names[0]: Return(2, 0, 8)}))
    assert len(outbox) == 3 * MAX_PENDING
    assert next(read_returns(next_loans(outbox))) == (b"r" + names[0], Return(2, 0, 8))
    for _ in range(MAX_PENDING // MAX_BATCH_LOANS - 1):
        assert not next_loans(outbox).asks
    assert next(read_asks(next_loans(outbox))) == (names[0], Ask(2, 9))


def test_a_key_too_long_for_a_peer_is_not_sent() -> None:
    outbox = LoanOutbox()
    key = bytes(MAX_KEY_BYTES + 1)
    outbox.add(Wishes(asks={key: Ask(1, 1)}, returns={key: Return(1, 0, 0)}))
    assert len(outbox) == 0
    assert not outbox.has_room_for_grant(key)


@pytest.mark.parametrize(
    ("loans", "reason"),
    [
        (pb.Loans(asks=[pb.LoanAsk(number=1)]), Reason.BAD_KEY),
        (pb.Loans(asks=[pb.LoanAsk(key=bytes(MAX_KEY_BYTES + 1))]), Reason.BAD_KEY),
        (pb.Loans(asks=[pb.LoanAsk(key=b"k", number=MAX_NUMBER + 1)]), Reason.BAD_LOAN),
        (pb.Loans(asks=[pb.LoanAsk(key=b"k", parts=PARTS + 1)]), Reason.BAD_LOAN),
        (pb.Loans(grants=[pb.LoanGrant(number=1)]), Reason.BAD_KEY),
        (pb.Loans(grants=[pb.LoanGrant(key=b"k", number=MAX_NUMBER + 1)]), Reason.BAD_LOAN),
        (pb.Loans(grants=[pb.LoanGrant(key=b"k", parts=PARTS + 1)]), Reason.BAD_LOAN),
        (pb.Loans(grants=[pb.LoanGrant(key=b"k", tokens=MAX_CAPACITY + 1)]), Reason.BAD_LOAN),
        (pb.Loans(grants=[pb.LoanGrant(key=b"k", available=PARTS + 1)]), Reason.BAD_LOAN),
        (pb.Loans(returns=[pb.LoanReturn(number=1)]), Reason.BAD_KEY),
        (pb.Loans(returns=[pb.LoanReturn(key=b"k", number=MAX_NUMBER + 1)]), Reason.BAD_LOAN),
        (pb.Loans(returns=[pb.LoanReturn(key=b"k", parts=PARTS + 1)]), Reason.BAD_LOAN),
        (pb.Loans(returns=[pb.LoanReturn(key=b"k", tokens=MAX_CAPACITY + 1)]), Reason.BAD_LOAN),
        (pb.Loans(asks=[pb.LoanAsk(key=b"k")] * MAX_FRAME_LOANS, returns=[pb.LoanReturn(key=b"k")]), Reason.TOO_LARGE),
    ],
)
def test_a_loan_out_of_its_bounds_is_refused(loans: pb.Loans, reason: Reason) -> None:
    with pytest.raises(ProtocolError) as caught:
        read_all(loans)
    assert caught.value.reason is reason


def test_as_many_loans_as_a_frame_may_have_are_taken() -> None:
    check_count(pb.Loans(grants=[pb.LoanGrant(key=b"k")] * MAX_FRAME_LOANS))
