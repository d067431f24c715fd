"""The protocol of one stream, corner by corner."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from replication.builders import NOW_US, SECOND_US, frame, kind_of, node

from ratelimit_sidecar.config import sidecar_schema as config
from ratelimit_sidecar.crdt.shares import ShownMembership
from ratelimit_sidecar.replication.acks import ACK_DELAY_US, MAX_ACKS_OWED
from ratelimit_sidecar.replication.pings import CLOCK_SAMPLES, PING_EVERY_US
from ratelimit_sidecar.replication.session import (
    FRAMES_WITHIN_US,
    MAX_FRAMES,
    SILENCE_US,
    STALL_US,
    ClockMeasured,
    ComparisonReceived,
    DeltasAcknowledged,
    DeltasReceived,
    Established,
    PaymentsReceived,
    PeerLeft,
    Session,
    StatusReceived,
)
from ratelimit_sidecar.replication.v1 import replication_pb2 as pb
from ratelimit_sidecar.replication.wire import (
    MAX_DETAIL_CHARS,
    MAX_EPOCH,
    MAX_FRAME_BYTES,
    MAX_MEMBERS,
    MAX_NAME_BYTES,
    MAX_WEIGHT,
    PROTOCOL,
    ProtocolError,
    Reason,
    read_reaches,
)

MEMBERSHIP = ShownMembership(3, {"a": 2, "b": 1})


def hello(**fields: object) -> bytes:
    return frame(hello=pb.Hello(**{"protocol": PROTOCOL, "node": "b", "region": "eu", "incarnation": 7, **fields}))


def membership(epoch: int = 3, **weights: int) -> pb.Membership:
    members = [pb.Member(node=name, weight=weight) for name, weight in weights.items()]
    return pb.Membership(epoch=epoch, members=members)


def new_session() -> Session:
    return Session(node("a"), NOW_US)


def paying_session(**fields: object) -> Session:
    """Its node has a membership; the peer has said hello."""
    session = Session(node("a", membership=MEMBERSHIP), NOW_US)
    session.receive(hello(**fields), NOW_US)
    return session


def established() -> Session:
    """Both hellos are through, and the first ping is sent."""
    session = new_session()
    session.receive(hello(), NOW_US)
    assert [kind_of(session.next_frame(NOW_US)) for _ in range(3)] == ["hello", "ping", None]
    return session


def deltas(sequence: int) -> bytes:
    return frame(deltas=pb.Deltas(sequence=sequence))


def assert_closes(session: Session, raw: bytes, reason: Reason) -> None:
    with pytest.raises(ProtocolError) as caught:
        session.receive(raw, NOW_US)
    assert caught.value.reason is reason
    said = pb.Frame.FromString(session.next_frame(NOW_US) or b"")
    assert said.goodbye == pb.Goodbye(reason=reason, detail=caught.value.detail)
    assert session.is_over


def test_a_session_says_hello_first_and_nothing_more_before_it_has_heard_the_peers() -> None:
    session = new_session()
    said = pb.Frame.FromString(session.next_frame(NOW_US) or b"").hello
    assert (said.protocol, said.node, said.region, said.incarnation) == (PROTOCOL, "a", "region of a", 1)
    assert not said.HasField("membership")
    assert session.next_frame(NOW_US + 2 * PING_EVERY_US) is None


def test_the_peers_hello_establishes_it() -> None:
    event = new_session().receive(hello(version="1.2"), NOW_US)
    assert isinstance(event, Established)
    assert (event.origin.node, event.origin.incarnation, event.region, event.version) == ("b", 7, "eu", "1.2")


def test_a_peer_that_speaks_a_newer_protocol_is_spoken_to_in_this_one() -> None:
    assert isinstance(new_session().receive(hello(protocol=9), NOW_US), Established)


def test_a_peer_that_speaks_no_known_protocol_is_told_so() -> None:
    assert_closes(new_session(), hello(protocol=0), Reason.VERSION)


@pytest.mark.parametrize(
    "fields", [{"node": ""}, {"node": "x" * 256}, {"incarnation": 0}, {"region": "x" * 256}], ids=str
)
def test_a_hello_must_name_a_node_and_its_life_within_bounds(fields: dict[str, object]) -> None:
    assert_closes(new_session(), hello(**fields), Reason.MALFORMED)


def test_a_node_with_strict_limits_shows_its_membership() -> None:
    said = pb.Frame.FromString(Session(node("a", membership=MEMBERSHIP), NOW_US).next_frame(NOW_US) or b"").hello
    assert said.membership == membership(3, a=2, b=1)


def test_a_peer_that_has_strict_limits_is_heard_to_have_its_membership() -> None:
    event = new_session().receive(hello(membership=membership(4, b=1, c=0)), NOW_US)
    assert isinstance(event, Established)
    assert event.membership == ShownMembership(4, {"b": 1, "c": 0})


def test_a_peer_without_strict_limits_shows_no_membership() -> None:
    event = new_session().receive(hello(), NOW_US)
    assert isinstance(event, Established)
    assert event.membership is None


@pytest.mark.parametrize(
    "bad",
    [
        membership(0, b=1),
        membership(2**62 + 1, b=1),
        pb.Membership(epoch=1, members=[pb.Member(node=f"n{index}", weight=1) for index in range(MAX_MEMBERS + 1)]),
        pb.Membership(epoch=1, members=[pb.Member(weight=1)]),
        pb.Membership(epoch=1, members=[pb.Member(node="x" * 256, weight=1)]),
        membership(1, b=2**32 + 1),
        pb.Membership(epoch=1, members=[pb.Member(node="b", weight=1), pb.Member(node="b", weight=2)]),
    ],
    ids=["no epoch", "epoch", "members", "no name", "name", "weight", "twice"],
)
def test_a_membership_must_be_within_bounds(bad: pb.Membership) -> None:
    assert_closes(new_session(), hello(membership=bad), Reason.MALFORMED)


def test_as_many_members_as_a_mesh_may_have_are_taken() -> None:
    members = [pb.Member(node=f"{index:0>255}", weight=2**32) for index in range(MAX_MEMBERS)]
    event = new_session().receive(hello(membership=pb.Membership(epoch=2**62, members=members)), NOW_US)
    assert isinstance(event, Established)


def test_whatever_membership_can_be_configured_is_within_those_bounds() -> None:
    assert config.MAX_MEMBERS <= MAX_MEMBERS
    assert config.MAX_MEMBER_BYTES <= MAX_NAME_BYTES
    assert config.MAX_WEIGHT <= MAX_WEIGHT
    assert config.MAX_EPOCH <= MAX_EPOCH


def test_nodes_that_have_shown_each_other_a_membership_pay_each_other() -> None:
    session = paying_session(membership=membership(b=1))
    payments = pb.Payments(asks=[pb.Ask(key=b"k", amount=2)])
    assert session.receive(frame(payments=payments), NOW_US) == PaymentsReceived(payments)
    assert session.send(pb.Frame(payments=payments)) == frame(payments=payments)


@pytest.mark.parametrize(
    "fields", [{}, {"protocol": 3, "membership": membership(b=1)}], ids=["no membership", "older protocol"]
)
def test_a_peer_that_shows_no_membership_or_speaks_a_protocol_without_payments_neither_gets_nor_sends_any(
    fields: dict[str, object],
) -> None:
    session = paying_session(**fields)
    assert not session.can_pay
    assert_closes_after_hello(session, frame(payments=pb.Payments()))


@pytest.mark.parametrize("protocol", [4, 5])
@pytest.mark.parametrize(
    "field", [{"wishes": [pb.Wish()]}, {"tickets": [pb.Ticket()]}, {"returns": [pb.Return()]}], ids=str
)
def test_a_peer_that_speaks_a_protocol_without_wishes_sends_none(protocol: int, field: dict[str, Any]) -> None:
    session = Session(node("a", membership=MEMBERSHIP), NOW_US)
    session.receive(hello(protocol=protocol, membership=membership(3, a=2, b=1)), NOW_US)
    assert (session.can_pay, session.can_wish) == (True, False)
    assert_closes(session, frame(payments=pb.Payments(**field)), Reason.UNEXPECTED)


def test_a_node_without_membership_takes_no_payments_of_a_peer_that_has_one() -> None:
    session = new_session()
    session.receive(hello(membership=membership(b=1)), NOW_US)
    assert not session.can_pay
    assert_closes_after_hello(session, frame(payments=pb.Payments()))


def assert_closes_after_hello(session: Session, raw: bytes) -> None:
    assert kind_of(session.next_frame(NOW_US)) == "hello"
    assert_closes(session, raw, Reason.UNEXPECTED)


@pytest.mark.parametrize("raw", [b"\xff\xff\xff", b"", b"\x9a\x06\x00"], ids=["garbage", "empty", "unknown kind"])
def test_what_is_no_frame_closes_the_stream(raw: bytes) -> None:
    assert_closes(established(), raw, Reason.MALFORMED)


def test_a_frame_beyond_the_bound_is_not_even_parsed() -> None:
    assert_closes(established(), bytes(MAX_FRAME_BYTES + 1), Reason.TOO_LARGE)


def test_nothing_may_come_before_the_hello() -> None:
    assert_closes(new_session(), deltas(1), Reason.UNEXPECTED)


def test_a_second_hello_is_unexpected() -> None:
    assert_closes(established(), hello(), Reason.UNEXPECTED)


def test_deltas_are_handed_on_and_acknowledged_once_they_are_applied() -> None:
    session = established()
    assert isinstance(session.receive(deltas(1), NOW_US), DeltasReceived)
    assert session.next_frame(NOW_US) is None
    session.acknowledge(NOW_US)
    # What is not applied yet is not acknowledged along with what is.
    session.receive(deltas(2), NOW_US)
    assert session.next_frame(NOW_US) == frame(ack=pb.Ack(sequence=1))
    assert session.next_frame(NOW_US) is None


def test_one_acknowledgement_stands_for_all_deltas_heard_before_it() -> None:
    session = established()
    for sequence in (1, 2, 3):
        session.receive(deltas(sequence), NOW_US)
        session.acknowledge(NOW_US)
    assert session.next_frame(NOW_US) == frame(ack=pb.Ack(sequence=3))
    assert session.next_frame(NOW_US) is None


def test_an_acknowledgement_rides_on_the_next_deltas() -> None:
    session = established()
    session.send_deltas(b"", b"", NOW_US)
    session.receive(deltas(1), NOW_US)
    session.acknowledge(NOW_US)
    assert session.next_frame(NOW_US + ACK_DELAY_US - 1) is None
    sent = pb.Frame.FromString(session.send_deltas(b"", b"", NOW_US + 7_999)).deltas
    assert (sent.acknowledged, sent.ack_delay_ms) == (1, 7)
    assert session.next_frame(NOW_US + ACK_DELAY_US) is None
    other = established()
    other.send_deltas(b"", b"", NOW_US)
    event = other.receive(frame(deltas=pb.Deltas(sequence=1, acknowledged=1, ack_delay_ms=7)), NOW_US)
    assert isinstance(event, DeltasReceived)
    assert event.acknowledged == DeltasAcknowledged(1, 7_000)


def test_an_acknowledgement_waits_for_deltas_no_longer_than_for_a_flush() -> None:
    session = established()
    session.send_deltas(b"", b"", NOW_US)
    session.receive(deltas(1), NOW_US)
    session.acknowledge(NOW_US)
    assert not session.is_ack_due(NOW_US + ACK_DELAY_US - 1)
    assert session.is_ack_due(NOW_US + ACK_DELAY_US)
    assert session.next_frame(NOW_US + ACK_DELAY_US) == frame(ack=pb.Ack(sequence=1))


def test_many_deltas_are_acknowledged_at_once() -> None:
    session = established()
    session.send_deltas(b"", b"", NOW_US)
    for sequence in range(1, MAX_ACKS_OWED + 1):
        assert session.next_frame(NOW_US + 1) is None
        session.receive(deltas(sequence), NOW_US + 1)
        session.acknowledge(NOW_US + 1)
    assert session.next_frame(NOW_US + 1) == frame(ack=pb.Ack(sequence=MAX_ACKS_OWED))


def test_an_acknowledgement_to_an_older_node_is_a_frame_of_its_own() -> None:
    session = new_session()
    session.receive(hello(protocol=4), NOW_US)
    said = [session.next_frame(NOW_US) for _ in range(2)]
    assert [kind_of(raw) for raw in said] == ["hello", "ping"]
    session.send_deltas(b"", b"", NOW_US)
    session.receive(deltas(1), NOW_US)
    session.acknowledge(NOW_US)
    assert not pb.Frame.FromString(session.send_deltas(b"", b"", NOW_US)).deltas.acknowledged
    assert session.next_frame(NOW_US) == frame(ack=pb.Ack(sequence=1))


@pytest.mark.parametrize("sequence", [0, 2], ids=["again", "gap"])
def test_deltas_out_of_turn_are_unexpected(sequence: int) -> None:
    assert_closes(established(), deltas(sequence), Reason.UNEXPECTED)


def test_deltas_sent_are_numbered_from_one() -> None:
    session = established()
    sent = [pb.Frame.FromString(session.send_deltas(b"", b"", NOW_US)) for _ in range(2)]
    assert [each.deltas.sequence for each in sent] == [1, 2]


def test_an_acknowledgement_counts_the_frames_it_is_the_first_to_acknowledge() -> None:
    session = established()
    for _ in range(3):
        session.send_deltas(b"", b"", NOW_US)
    assert session.receive(frame(ack=pb.Ack(sequence=2)), NOW_US) == DeltasAcknowledged(2)
    assert session.receive(frame(ack=pb.Ack(sequence=3)), NOW_US) == DeltasAcknowledged(1)


@pytest.mark.parametrize("sequence", [0, 1, 3], ids=["nothing", "again", "not yet sent"])
def test_an_acknowledgement_of_deltas_that_are_not_open_is_unexpected(sequence: int) -> None:
    session = established()
    for _ in range(2):
        session.send_deltas(b"", b"", NOW_US)
    session.receive(frame(ack=pb.Ack(sequence=1)), NOW_US)
    assert_closes(session, frame(ack=pb.Ack(sequence=sequence)), Reason.UNEXPECTED)


def test_a_ping_is_sent_every_second() -> None:
    session = established()
    assert session.next_frame(NOW_US + PING_EVERY_US - 1) is None
    assert session.next_frame(NOW_US + PING_EVERY_US) == frame(ping=pb.Ping(id=2))
    assert session.next_frame(NOW_US + PING_EVERY_US) is None


def test_a_ping_is_answered_with_when_it_was_heard_and_when_the_answer_left() -> None:
    session = established()
    session.receive(frame(ping=pb.Ping(id=5)), NOW_US + 10)
    pong = pb.Pong(id=5, received_us=NOW_US + 10, sent_us=NOW_US + 25)
    assert session.next_frame(NOW_US + 25) == frame(pong=pong)
    assert session.next_frame(NOW_US + 25) is None


def test_pings_not_answered_yet_share_one_pong() -> None:
    session = established()
    for ping_id in (1, 2, 3):
        session.receive(frame(ping=pb.Ping(id=ping_id)), NOW_US)
    assert pb.Frame.FromString(session.next_frame(NOW_US) or b"").pong.id == 3
    assert session.next_frame(NOW_US) is None


@pytest.mark.parametrize("offset_us", [-3_000_000, 0, 250_000])
def test_a_pong_measures_the_peers_clock_without_the_way_and_without_its_pause(offset_us: int) -> None:
    session = established()
    # 40 ms there, 5 ms before the answer, 40 ms back.
    received_us = NOW_US + 40_000 + offset_us
    pong = frame(pong=pb.Pong(id=1, received_us=received_us, sent_us=received_us + 5_000))
    assert session.receive(pong, NOW_US + 85_000) == ClockMeasured(offset_us)


def test_of_the_last_measurements_the_one_with_the_shortest_round_trip_counts() -> None:
    session = established()
    measured = []
    for ping_id, round_trip_us in enumerate([60_000, 20_000, *[90_000] * CLOCK_SAMPLES], start=1):
        sent_us = NOW_US + (ping_id - 1) * PING_EVERY_US
        if ping_id > 1:
            session.next_frame(sent_us)
        # All of the delay is on the way back, which reads as an offset of minus half of it.
        pong = frame(pong=pb.Pong(id=ping_id, received_us=sent_us, sent_us=sent_us))
        event = session.receive(pong, sent_us + round_trip_us)
        assert isinstance(event, ClockMeasured)
        measured.append(event.offset_us)
    assert measured[:2] == [-30_000, -10_000]
    assert set(measured[2:-1]) == {-10_000}
    assert measured[-1] == -45_000


def test_a_pong_that_answers_no_open_ping_is_unexpected() -> None:
    assert_closes(established(), frame(pong=pb.Pong(id=2)), Reason.UNEXPECTED)


def test_pings_that_a_later_pong_has_answered_are_closed() -> None:
    session = established()
    session.next_frame(NOW_US + PING_EVERY_US)
    session.receive(frame(pong=pb.Pong(id=2)), NOW_US + PING_EVERY_US)
    assert_closes(session, frame(pong=pb.Pong(id=1)), Reason.UNEXPECTED)


def test_a_peer_not_heard_from_for_five_seconds_is_dead() -> None:
    session = established()
    session.check_time(NOW_US + SILENCE_US - 1)
    with pytest.raises(ProtocolError, match=r"silent: nothing received for 5\.0 s"):
        session.check_time(NOW_US + SILENCE_US)
    assert kind_of(session.next_frame(NOW_US + SILENCE_US)) == "goodbye"


def test_a_connection_that_never_says_hello_is_dead_as_soon() -> None:
    with pytest.raises(ProtocolError, match="silent"):
        new_session().check_time(NOW_US + SILENCE_US)


def test_any_frame_is_a_sign_of_life() -> None:
    session = established()
    session.receive(frame(ping=pb.Ping(id=1)), NOW_US + 4 * SECOND_US)
    session.check_time(NOW_US + 8 * SECOND_US)


@pytest.mark.parametrize("owes", ["an acknowledgement", "a pong"])
def test_a_peer_that_talks_but_owes_an_answer_for_ten_seconds_is_given_up(owes: str) -> None:
    session = established()
    if owes == "an acknowledgement":
        session.receive(frame(pong=pb.Pong(id=1)), NOW_US)
        session.send_deltas(b"", b"", NOW_US)
    session.receive(frame(ping=pb.Ping(id=1)), NOW_US + STALL_US - 1)
    session.check_time(NOW_US + STALL_US - 1)
    with pytest.raises(ProtocolError, match=r"stalled: no answer for 10\.0 s"):
        session.check_time(NOW_US + STALL_US)


def test_a_goodbye_ends_it() -> None:
    session = established()
    assert session.receive(frame(goodbye=pb.Goodbye(reason="draining", detail="x")), NOW_US) == PeerLeft(
        "draining", "x"
    )
    assert session.is_over
    assert session.next_frame(NOW_US) is None


def test_of_a_goodbye_a_little_is_kept() -> None:
    long = "x" * (MAX_DETAIL_CHARS + 1)
    assert established().receive(frame(goodbye=pb.Goodbye(reason=long, detail=long)), NOW_US) == PeerLeft(
        long[1:], long[1:]
    )


def test_a_peer_may_say_goodbye_instead_of_hello() -> None:
    assert isinstance(new_session().receive(frame(goodbye=pb.Goodbye(reason="version")), NOW_US), PeerLeft)


def test_closing_says_goodbye_and_nothing_that_was_owed() -> None:
    session = established()
    session.receive(deltas(1), NOW_US)
    session.acknowledge(NOW_US)
    session.close(Reason.DRAINING, "shutting down")
    assert not session.is_over
    assert session.next_frame(NOW_US) == frame(goodbye=pb.Goodbye(reason="draining", detail="shutting down"))
    assert session.is_over


def test_what_arrives_after_closing_is_not_looked_at() -> None:
    session = established()
    session.close(Reason.DRAINING, "")
    assert session.receive(b"\xff", NOW_US) is None


def test_a_session_closes_for_the_first_reason_only() -> None:
    session = established()
    session.close(Reason.DRAINING, "")
    session.close(Reason.STALLED, "")
    assert pb.Frame.FromString(session.next_frame(NOW_US) or b"").goodbye.reason == "draining"


def test_closing_because_the_stream_leads_to_itself_still_says_hello_so_that_the_dialling_end_sees_it_too() -> None:
    session = new_session()
    session.close(Reason.SELF, "")
    assert [kind_of(session.next_frame(NOW_US)) for _ in range(3)] == ["hello", "goodbye", None]


def test_a_lost_connection_leaves_nothing_to_say() -> None:
    session = established()
    session.receive(deltas(1), NOW_US)
    session.acknowledge(NOW_US)
    session.lost()
    assert session.next_frame(NOW_US) is None
    assert session.is_over


COMPARISONS = [
    frame(status=pb.Status()),
    frame(digest=pb.Digest()),
    frame(summary=pb.Summary()),
    frame(pull=pb.Pull()),
]


@pytest.mark.parametrize("raw", COMPARISONS, ids=kind_of)
def test_comparisons_are_for_peers_that_speak_of_them(raw: bytes) -> None:
    session = new_session()
    session.receive(hello(protocol=2), NOW_US)
    assert not session.compares
    said = [kind_of(session.next_frame(NOW_US)) for _ in range(3)]
    assert said == ["hello", "ping", None]
    assert_closes(session, raw, Reason.UNEXPECTED)


@pytest.mark.parametrize("raw", COMPARISONS, ids=kind_of)
def test_comparisons_are_handed_on(raw: bytes) -> None:
    session = established()
    event = session.receive(raw, NOW_US)
    kind = pb.Frame.FromString(raw).WhichOneof("kind")
    assert isinstance(event, StatusReceived if kind == "status" else ComparisonReceived)


@pytest.mark.parametrize(("theirs", "spoken"), [(1, 1), (2, 2), (PROTOCOL, PROTOCOL), (PROTOCOL + 9, PROTOCOL)])
def test_both_ends_speak_the_older_ones_protocol(theirs: int, spoken: int) -> None:
    event = new_session().receive(hello(protocol=theirs), NOW_US)
    assert isinstance(event, Established)
    assert event.protocol == spoken


def test_a_peer_that_sends_more_than_it_could_have_to_say_is_too_fast() -> None:
    session = established()
    now_us = NOW_US
    for index in range(3 * MAX_FRAMES):
        # As fast as is allowed: a second's worth in a second.
        now_us = NOW_US + index * FRAMES_WITHIN_US // (MAX_FRAMES - 1)
        session.receive(frame(ping=pb.Ping(id=index)), now_us)
    for index in range(MAX_FRAMES):
        with suppress(ProtocolError):
            session.receive(frame(ping=pb.Ping(id=index)), now_us)
    said = pb.Frame.FromString(session.next_frame(now_us) or b"")
    assert said.goodbye.reason == Reason.TOO_FAST


@pytest.mark.parametrize("reaches", [[""], ["x" * (MAX_NAME_BYTES + 1)], ["x"] * (MAX_MEMBERS + 1)])
def test_a_status_has_bounds(reaches: list[str]) -> None:
    with pytest.raises(ProtocolError) as caught:
        read_reaches(pb.Status(reaches=reaches))
    assert caught.value.reason is Reason.MALFORMED
