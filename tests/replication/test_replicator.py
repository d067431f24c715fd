"""Peers and their streams: who is who, what is counted, and what is forgotten."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
from replication.builders import (
    ELSEWHERE,
    NOW_US,
    PAIR,
    PER_PLAN,
    PER_USER,
    SECOND_US,
    SIT_OUT_US,
    flush,
    frame,
    key_of,
    kind_of,
    ledger_of,
    node,
    store_of,
    take,
)

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.strict import StrictBucket
from ratelimit_sidecar.replication.acks import ACK_DELAY_US
from ratelimit_sidecar.replication.changes import FLUSH_STEP_BUCKETS, MAX_BATCH_BUCKETS
from ratelimit_sidecar.replication.outbox import WHOLE_BATCH_BUCKETS
from ratelimit_sidecar.replication.pace import PIECE_WORK
from ratelimit_sidecar.replication.payments import MAX_BATCH, TICK_EVERY_US, PaymentExchange
from ratelimit_sidecar.replication.peers import MAX_PEERS, PEER_FORGOTTEN_US, RESTART_US
from ratelimit_sidecar.replication.replicator import Replicator
from ratelimit_sidecar.replication.session import STALL_US
from ratelimit_sidecar.replication.stream import PEER_PAUSE_US, SNAPSHOT_PAUSE_US, Stream
from ratelimit_sidecar.replication.v1 import replication_pb2 as pb
from ratelimit_sidecar.replication.wire import Reason
from simulation.steps import done, next_frame, receive


class Span:
    def __init__(self, peer_node: str, bucket_keys: Sequence[bytes]) -> None:
        self.peer_node = peer_node
        self.bucket_keys = bucket_keys
        self.has_ended = False
        self.context = b"its trace"

    def end(self) -> None:
        assert not self.has_ended
        self.has_ended = True


class Tracer:
    """Traces the batches that have buckets in them."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.applying: list[tuple[str, bytes, Span]] = []

    def batch_span(self, peer_node: str, bucket_keys: Sequence[bytes]) -> Span | None:
        if not bucket_keys:
            return None
        self.spans.append(Span(peer_node, bucket_keys))
        return self.spans[-1]

    def apply_span(self, peer_node: str, context: bytes) -> Span:
        self.applying.append((peer_node, context, Span(peer_node, ())))
        return self.applying[-1][2]


def replicator(name: str, incarnation: int = 1, tracer: Tracer | None = None) -> Replicator:
    local = node(name, incarnation)
    return Replicator(local, store_of(local), NOW_US, tracer)


def stream_of(
    owner: Replicator, *, is_dialled: bool = False, now_us: int = NOW_US, wake: Callable[[], None] = lambda: None
) -> Stream:
    return Stream(owner, "far end", is_dialled=is_dialled, wake=wake, now_us=now_us)


MEMBERS = pb.Membership(epoch=1, members=[pb.Member(node=name, weight=1) for name in "ab"])
PLAN = key_of("gold", "plan")


class Strict(Replicator):
    """Of a member that has its home share, a half of each strict limit; the clock of it is a number."""

    def __init__(self, name: str) -> None:
        self.strict_us = NOW_US
        self.ledger = ledger_of(name, PAIR, NOW_US - 2 * SIT_OUT_US)
        payments = PaymentExchange(self.ledger, lambda: self.strict_us)
        local = node(name, membership=payments.membership)
        super().__init__(local, store_of(local), NOW_US, payments=payments)

    def plan(self, value: str = "gold") -> StrictBucket:
        return self.ledger.bucket(key_of(value, "plan"), PER_PLAN, self.strict_us)

    def use_up(self, value: str = "gold") -> None:
        """Want more than the home share, and say so to the peers."""
        bucket = self.plan(value)
        bucket.take(bucket.remaining, self.strict_us)
        assert not bucket.take(30, self.strict_us)

    def say(self) -> None:
        self.strict_us += TICK_EVERY_US
        flush(self, NOW_US)


def hello(name: str, incarnation: int = 1, **fields: object) -> bytes:
    return frame(hello=pb.Hello(**{"protocol": 4, "node": name, "region": "eu", "incarnation": incarnation, **fields}))


def exchange(one: Stream, other: Stream, now_us: int = NOW_US) -> None:
    """Carry frames both ways until neither end has any."""
    busy = True
    while busy:
        busy = False
        for sender, receiver in ((one, other), (other, one)):
            while (raw := next_frame(sender, now_us)) is not None:
                receive(receiver, raw, now_us)
                busy = True


def said_by(stream: Stream) -> list[bytes]:
    """All that it has to send now."""
    said = []
    while (raw := next_frame(stream, NOW_US)) is not None:
        said.append(raw)
    return said


def connected(one: Replicator, other: Replicator, now_us: int = NOW_US) -> tuple[Stream, Stream]:
    """Streams of a connection that `one` has dialled."""
    dialled, accepted = stream_of(one, is_dialled=True, now_us=now_us), stream_of(other, now_us=now_us)
    exchange(dialled, accepted, now_us)
    return dialled, accepted


def test_two_nodes_tell_each_other_everything_and_then_each_change() -> None:
    a, b = replicator("a"), replicator("b")
    take(a.store, "ann", 5, NOW_US)
    take(b.store, "bob", 7, NOW_US)
    one, other = connected(a, b)
    assert {bucket.key for bucket in a.store} == {bucket.key for bucket in b.store} == {key_of("ann"), key_of("bob")}
    take(b.store, "ann", 1, NOW_US)
    flush(b, NOW_US)
    exchange(one, other)
    assert a.store.get(key_of("ann")).remaining == 994  # type: ignore[union-attr]


def test_of_two_streams_to_a_peer_the_first_established_carries_the_deltas() -> None:
    a, b = replicator("a"), replicator("b")
    first, _ = connected(a, b)
    second, _ = connected(a, b)
    take(a.store, "ann", 1, NOW_US)
    flush(a, NOW_US)
    assert next_frame(second, NOW_US) is None
    assert kind_of(next_frame(first, NOW_US)) == "deltas"


def test_a_peer_counts_what_went_each_way() -> None:
    a, b = replicator("a"), replicator("b")
    take(a.store, "ann", 5, NOW_US)
    connected(a, b)
    at_a, at_b = a.peers["b"].counts, b.peers["a"].counts
    assert (at_a.batches_sent, at_a.entries_sent) == (at_b.batches_received, at_b.entries_received) == (1, 1)
    assert (at_a.batches_received, at_a.entries_received) == (at_b.batches_sent, at_b.entries_sent) == (1, 0)


def test_a_peers_status_shows_it() -> None:
    a, b = replicator("a"), replicator("b")
    connected(a, b)
    status = a.peers["b"].status(NOW_US, 0)
    assert (status.node, status.region, status.address, status.connected) == ("b", "region of b", "far end", True)
    assert (status.lag_seconds, status.pending_buckets, status.reconnects, status.last_error) == (0.0, 0, 0, "")
    assert status.clock_offset_seconds == 0.0


def test_a_peer_has_been_heard_out_once_it_has_told_its_full_state() -> None:
    a, b = replicator("a"), replicator("b")
    one = stream_of(a, is_dialled=True)
    receive(one, hello("b"), NOW_US)
    assert not a.peers["b"].reported.has_ended_snapshot
    receive(one, frame(deltas=pb.Deltas(sequence=1, ends_full_state=True)), NOW_US)
    assert a.peers["b"].reported.has_ended_snapshot
    one.lost("cut", NOW_US)
    assert not a.peers["b"].reported.has_ended_snapshot
    assert b.peers == {}


def test_an_address_that_leads_back_to_this_process_is_recognised_at_both_ends_and_is_no_error() -> None:
    a = replicator("a")
    dialled, accepted = connected(a, a)
    assert [stream.error.reason for stream in (dialled, accepted) if stream.error] == [Reason.SELF, Reason.SELF]
    assert dialled.is_over
    assert accepted.is_over
    assert a.peers == {}
    assert a.protocol_errors == {}


def test_a_peer_that_merely_says_so_is_not_taken_for_this_process() -> None:
    dialled = stream_of(replicator("a"), is_dialled=True)
    receive(dialled, frame(goodbye=pb.Goodbye(reason="self")), NOW_US)
    assert dialled.error is None


def test_another_live_process_with_this_nodes_id_is_refused_with_the_fix() -> None:
    a, namesake = replicator("a", 1), replicator("a", 2)
    dialled, accepted = connected(a, namesake)
    fix = "duplicate_node: two live sidecars have the node id 'a': give each a node.id of its own"
    assert str(accepted.error) == fix
    assert dialled.why_ended == f"the peer closed the stream: {fix}"
    assert dialled.is_over
    assert accepted.is_over
    assert a.peers == namesake.peers == {}


def test_a_second_life_of_a_peer_that_was_just_heard_from_is_refused() -> None:
    a = replicator("a")
    first = stream_of(a)
    receive(first, hello("b", 1), NOW_US)
    second = stream_of(a)
    receive(second, hello("b", 2), NOW_US + RESTART_US - 1)
    assert second.error is not None
    assert second.error.reason is Reason.DUPLICATE_NODE
    assert a.peers["b"].streams == [first]
    assert a.protocol_errors == {"duplicate_node": 1}


def test_a_second_life_of_a_peer_that_has_fallen_silent_takes_its_place() -> None:
    a = replicator("a")
    first, second = stream_of(a), stream_of(a)
    receive(first, hello("b", 1), NOW_US)
    receive(second, hello("b", 2), NOW_US + RESTART_US)
    peer = a.peers["b"]
    assert (peer.streams, peer.incarnation, peer.connections) == ([second], 2, 2)
    assert next_frame(first, NOW_US) == frame(goodbye=pb.Goodbye(reason="superseded", detail="the node has restarted"))
    assert a.protocol_errors == {}


def test_a_second_life_of_a_peer_whose_streams_are_lost_takes_its_place_at_once() -> None:
    a = replicator("a")
    first, second = stream_of(a), stream_of(a)
    receive(first, hello("b", 1), NOW_US)
    first.lost("the peer hung up", NOW_US)
    receive(second, hello("b", 2), NOW_US)
    assert a.peers["b"].status(NOW_US, 0).reconnects == 1


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"\xff", "malformed"),
        (frame(deltas=pb.Deltas(sequence=1, buckets=[pb.BucketDelta(key=b"\x09")])), "bad_key"),
    ],
    ids=["broken frame", "broken content"],
)
def test_a_bad_frame_closes_its_stream_and_is_counted_by_reason(raw: bytes, reason: str) -> None:
    a = replicator("a")
    bad, good = stream_of(a), stream_of(a)
    receive(bad, hello("b"), NOW_US)
    receive(good, hello("c"), NOW_US)
    receive(bad, raw, NOW_US)
    assert pb.Frame.FromString(next_frame(bad, NOW_US) or b"").goodbye.reason == reason
    assert bad.is_over
    assert a.protocol_errors == {reason: 1}
    status = a.peers["b"].status(NOW_US, 0)
    assert (status.connected, status.protocol_errors) == (False, {reason: 1})
    assert status.last_error.startswith(reason)
    assert a.peers["c"].streams == [good]


def test_what_was_not_applied_is_not_acknowledged() -> None:
    stream = stream_of(replicator("a"))
    receive(stream, hello("b"), NOW_US)
    receive(stream, frame(deltas=pb.Deltas(sequence=1, buckets=[pb.BucketDelta(key=b"\x09")])), NOW_US)
    assert pb.Frame.FromString(next_frame(stream, NOW_US) or b"").WhichOneof("kind") == "goodbye"
    assert next_frame(stream, NOW_US) is None


def test_a_stream_that_never_said_whose_it_is_is_counted_too() -> None:
    a = replicator("a")
    receive(stream_of(a), b"\xff", NOW_US)
    assert a.protocol_errors == {"malformed": 1}
    assert a.peers == {}


def test_a_dead_peers_stream_is_closed_by_the_clock() -> None:
    a = replicator("a")
    stream = stream_of(a)
    receive(stream, hello("b"), NOW_US)
    stream.check_time(NOW_US + 5 * SECOND_US)
    assert a.peers["b"].status(NOW_US, 0).last_error.startswith("silent")
    assert a.protocol_errors == {"silent": 1}


def test_buckets_that_no_rule_knows_are_counted() -> None:
    a = replicator("a")
    stream = stream_of(a)
    receive(stream, hello("b"), NOW_US)
    buckets = [
        pb.BucketDelta(key=key_of("x", "nobody", ELSEWHERE)),
        pb.BucketDelta(key=key_of("y", "nobody", ELSEWHERE)),
    ]
    receive(stream, frame(deltas=pb.Deltas(sequence=1, buckets=buckets)), NOW_US)
    assert a.unknown_keys == 2
    assert not stream.is_over


def many_deltas(buckets: int) -> bytes:
    """The first of a stream."""
    run = pb.SlotRun(exponent=PER_USER.exponent, slots=[NOW_US >> PER_USER.exponent], tokens=[1])
    told = [pb.BucketDelta(key=key_of(f"user-{number}"), runs=[run]) for number in range(buckets)]
    return frame(deltas=pb.Deltas(sequence=1, buckets=told, ends_full_state=True))


def test_deltas_are_applied_in_pieces_and_acknowledged_after_the_last() -> None:
    a = replicator("a")
    stream = stream_of(a)
    receive(stream, hello("b"), NOW_US)
    said_by(stream)
    applied = []
    for _ in stream.receive_steps(many_deltas(2 * PIECE_WORK + 1), NOW_US):
        applied.append((len(a.store), a.peers["b"].reported.has_ended_snapshot, len(said_by(stream))))
    applied.append((len(a.store), a.peers["b"].reported.has_ended_snapshot, len(said_by(stream))))
    assert applied == [(PIECE_WORK, False, 0), (2 * PIECE_WORK, False, 0), (2 * PIECE_WORK + 1, True, 1)]
    assert a.peers["b"].counts.entries_received == 2 * PIECE_WORK + 1


def test_a_stream_that_ends_between_two_pieces_applies_no_more() -> None:
    a = replicator("a")
    stream = stream_of(a)
    receive(stream, hello("b"), NOW_US)
    applying = stream.receive_steps(many_deltas(2 * PIECE_WORK), NOW_US)
    next(applying)
    stream.lost("gone", NOW_US)
    done(applying)
    assert len(a.store) == PIECE_WORK
    assert not a.peers["b"].reported.has_ended_snapshot


def test_a_bad_delta_in_a_later_piece_closes_the_stream() -> None:
    a = replicator("a")
    stream = stream_of(a)
    receive(stream, hello("b"), NOW_US)
    said_by(stream)
    deltas = pb.Frame.FromString(many_deltas(PIECE_WORK)).deltas
    deltas.buckets.add(key=b"\x09")
    assert len(list(stream.receive_steps(frame(deltas=deltas), NOW_US))) == 1
    [said] = said_by(stream)
    assert pb.Frame.FromString(said).goodbye.reason == "bad_key"


def test_a_goodbye_is_remembered_as_the_reason() -> None:
    a, b = replicator("a"), replicator("b")
    dialled, accepted = connected(a, b)
    accepted.close(Reason.DRAINING, "the sidecar is shutting down", NOW_US)
    exchange(dialled, accepted)
    assert dialled.is_over
    assert a.peers["b"].last_error == "the peer closed the stream: draining: the sidecar is shutting down"


def test_the_first_reason_for_which_a_stream_ended_stays() -> None:
    a = replicator("a")
    stream = stream_of(a)
    receive(stream, hello("b"), NOW_US)
    receive(stream, b"\xff", NOW_US)
    stream.lost("the connection was closed", NOW_US)
    assert stream.why_ended == a.peers["b"].last_error == "malformed: not a Frame"


def test_batches_are_traced_from_sending_to_acknowledgement() -> None:
    tracer = Tracer()
    a, b = replicator("a", tracer=tracer), replicator("b")
    one, other = connected(a, b)
    take(a.store, "ann", 1, NOW_US)
    flush(a, NOW_US)
    sent = next_frame(one, NOW_US)
    assert sent is not None
    [span] = tracer.spans
    assert (span.peer_node, span.bucket_keys, span.has_ended) == ("b", (key_of("ann"),), False)
    receive(other, sent, NOW_US)
    exchange(one, other, NOW_US + ACK_DELAY_US)
    assert span.has_ended


def applying_a_traced_batch(tracer: Tracer) -> tuple[Stream, Iterator[None]]:
    """The stream of a node with that tracer, and the rest of the batch that it applies."""
    a, b = replicator("a", tracer=Tracer()), replicator("b", tracer=tracer)
    one, other = connected(a, b)
    for number in range(PIECE_WORK + 1):
        take(a.store, f"user {number}", 1, NOW_US)
    flush(a, NOW_US)
    sent = next_frame(one, NOW_US)
    assert sent is not None
    applying = other.receive_steps(sent, NOW_US)
    next(applying)
    return other, applying


def test_who_applies_a_traced_batch_continues_its_trace_until_it_is_applied() -> None:
    tracer = Tracer()
    other, applying = applying_a_traced_batch(tracer)
    [(peer_node, context, span)] = tracer.applying
    assert (peer_node, context, span.has_ended) == ("a", b"its trace", False)
    assert other.batch_trace == {"trace_id": b"its trace".hex()}
    done(applying)
    assert span.has_ended
    assert other.batch_trace == {}


def test_the_span_of_a_batch_that_is_being_applied_ends_with_the_stream() -> None:
    tracer = Tracer()
    other, _ = applying_a_traced_batch(tracer)
    other.lost("cut", NOW_US)
    assert [span.has_ended for _, _, span in tracer.applying] == [True]
    # For the line that tells of the end.
    assert other.batch_trace == {"trace_id": b"its trace".hex()}


def test_a_trace_span_ends_with_the_stream_when_its_batch_is_lost() -> None:
    tracer = Tracer()
    a, b = replicator("a", tracer=tracer), replicator("b")
    one, _ = connected(a, b)
    take(a.store, "ann", 1, NOW_US)
    flush(a, NOW_US)
    assert next_frame(one, NOW_US) is not None
    one.lost("cut", NOW_US)
    assert [span.has_ended for span in tracer.spans] == [True]


def test_a_configured_peer_misses_everything_taken_before_it_was_first_reached() -> None:
    a, b = replicator("a"), replicator("b")
    take(a.store, "ann", 1, NOW_US)
    flush(a, NOW_US + SECOND_US)
    dialled = stream_of(a, is_dialled=True)
    receive(dialled, hello("b"), NOW_US + 9 * SECOND_US)
    assert a.peers["b"].outbox.lag_us(NOW_US + 9 * SECOND_US) == 9 * SECOND_US
    assert b.peers == {}


def test_a_peer_that_nobody_had_announced_misses_nothing_before_it_comes() -> None:
    a = replicator("a")
    take(a.store, "ann", 1, NOW_US)
    flush(a, NOW_US)
    receive(stream_of(a), hello("b"), NOW_US + 9 * SECOND_US)
    assert a.peers["b"].outbox.lag_us(NOW_US + 9 * SECOND_US) == 0


def test_a_configured_peer_that_dialled_in_first_has_missed_what_it_has_not_been_told_all_the_same() -> None:
    a = replicator("a")
    take(a.store, "ann", 1, NOW_US)
    flush(a, NOW_US + SECOND_US)
    receive(stream_of(a), hello("b"), NOW_US + 9 * SECOND_US)
    dialled = stream_of(a, is_dialled=True)
    receive(dialled, hello("b"), NOW_US + 9 * SECOND_US)
    assert a.peers["b"].outbox.lag_us(NOW_US + 9 * SECOND_US) == 9 * SECOND_US


def test_changes_count_as_made_at_the_flush_before() -> None:
    a, b = replicator("a"), replicator("b")
    connected(a, b)
    flush(a, NOW_US + 20_000)
    take(a.store, "ann", 1, NOW_US + 39_000)
    flush(a, NOW_US + 40_000)
    assert a.peers["b"].outbox.lag_us(NOW_US + 50_000) == 30_000


def test_many_changes_are_flushed_in_steps_and_what_is_taken_meanwhile_waits() -> None:
    a, b = replicator("a"), replicator("b")
    connected(a, b)
    flush(a, NOW_US + 20_000)
    for number in range(2 * FLUSH_STEP_BUCKETS + 1):
        take(a.store, f"user-{number}", 1, NOW_US + 39_000)
    outbox = a.peers["b"].outbox
    flushed = []
    for step, _ in enumerate(a.flush_steps(NOW_US + 40_000)):
        flushed.append(outbox.pending_buckets)
        take(a.store, f"late-{step}", 1, NOW_US + 40_000 + step)
    assert flushed == [FLUSH_STEP_BUCKETS, 2 * FLUSH_STEP_BUCKETS]
    assert outbox.pending_buckets == 2 * FLUSH_STEP_BUCKETS + 1
    assert outbox.lag_us(NOW_US + 50_000) == 30_000
    done(a.flush_steps(NOW_US + 60_000))
    assert outbox.pending_buckets == 2 * FLUSH_STEP_BUCKETS + 3


def test_a_stream_is_woken_once_for_what_fills_a_batch_and_at_the_end_of_a_flush() -> None:
    a, b = replicator("a"), replicator("b")
    woken: list[None] = []
    stream = stream_of(a, wake=lambda: woken.append(None))
    exchange(stream, stream_of(b))
    for buckets, times in ((1, 1), (MAX_BATCH_BUCKETS, 1), (MAX_BATCH_BUCKETS + 1, 2), (0, 0)):
        for number in range(buckets):
            take(a.store, f"user {number}", 1, NOW_US)
        woken.clear()
        done(a.flush_steps(NOW_US))
        assert len(woken) == times, buckets


def test_there_is_a_pause_after_each_batch_of_a_full_state_and_no_other_frame() -> None:
    a = replicator("a")
    for number in range(WHOLE_BATCH_BUCKETS + 1):
        take(a.store, f"user {number}", 1, NOW_US)
    stream = stream_of(a)
    receive(stream, hello("b", protocol=2), NOW_US)
    sent = [(kind_of(next_frame(stream, NOW_US)), stream.take_pause_us(), stream.take_pause_us()) for _ in range(4)]
    assert sent == [
        ("hello", 0, 0),
        ("ping", 0, 0),
        ("deltas", SNAPSHOT_PAUSE_US, 0),
        ("deltas", SNAPSHOT_PAUSE_US, 0),
    ]
    receive(stream, frame(ack=pb.Ack(sequence=2)), NOW_US)
    take(a.store, "ann", 1, NOW_US)
    flush(a, NOW_US)
    assert (kind_of(next_frame(stream, NOW_US)), stream.take_pause_us()) == ("deltas", 0)


@pytest.mark.parametrize("hits", [PER_USER.capacity, PER_USER.capacity // 8])
def test_what_much_was_taken_from_is_told_at_once_to_a_peer_that_has_much_to_hear(hits: int) -> None:
    a, b = replicator("a"), replicator("b")
    stream, far_end = connected(a, b)
    for number in range(8 * MAX_BATCH_BUCKETS):
        take(a.store, f"user {number}", 1, NOW_US)
    spent = take(a.store, "ann", hits, NOW_US)
    # The flush itself has hardly begun.
    next(a.flush_steps(NOW_US))
    raw = next_frame(stream, NOW_US)
    assert raw is not None
    receive(far_end, raw, NOW_US)
    copy = b.store.get(spent.key)
    assert copy is not None
    assert copy.remaining == spent.remaining


def test_nor_is_it_told_twice_where_it_comes_soon_anyhow() -> None:
    a, b = replicator("a"), replicator("b")
    stream, far_end = connected(a, b)
    take(a.store, "ann", PER_USER.capacity, NOW_US)
    flush(a, NOW_US)
    exchange(stream, far_end)
    assert stream.peer is not None
    assert stream.peer.counts.batches_sent == 2, "the snapshot and the change"
    assert not a.store.journal.urgent


@pytest.mark.parametrize(("peers", "pause_us"), [(40, 0), (41, 41 * PEER_PAUSE_US), (200, 100_000)])
def test_with_many_peers_each_is_sent_fewer_batches(peers: int, pause_us: int) -> None:
    a = replicator("a")
    streams = [stream_of(a) for _ in range(peers)]
    for number, stream in enumerate(streams):
        receive(stream, hello(f"b{number}", protocol=2), NOW_US)
    stream = streams[-1]
    while next_frame(stream, NOW_US) is not None:
        stream.take_pause_us()
    receive(stream, frame(ack=pb.Ack(sequence=1)), NOW_US)
    take(a.store, "ann", 1, NOW_US)
    flush(a, NOW_US)
    assert kind_of(next_frame(stream, NOW_US)) == "deltas"
    assert (stream.take_pause_us(), stream.take_pause_us()) == (pause_us, 0)


def test_a_flush_moves_all_there_is_also_when_another_one_is_under_way() -> None:
    a, b = replicator("a"), replicator("b")
    connected(a, b)
    for number in range(2 * FLUSH_STEP_BUCKETS):
        take(a.store, f"user-{number}", 1, NOW_US)
    under_way = a.flush_steps(NOW_US + 20_000)
    next(under_way)
    take(a.store, "late", 1, NOW_US + 20_000)
    flush(a, NOW_US + 20_000)
    assert a.peers["b"].outbox.pending_buckets == 2 * FLUSH_STEP_BUCKETS + 1
    assert a.peers["b"].outbox.lag_us(NOW_US + 30_000) == 30_000
    assert a.store.drain_changes() == []
    done(under_way)
    assert a.peers["b"].outbox.pending_buckets == 2 * FLUSH_STEP_BUCKETS + 1


def test_the_journal_is_drained_although_there_are_no_peers() -> None:
    a = replicator("a")
    take(a.store, "ann", 1, NOW_US)
    flush(a, NOW_US)
    assert a.store.drain_changes() == []


def test_a_peer_that_only_dials_in_is_forgotten_a_while_after_it_was_lost() -> None:
    a = replicator("a")
    inbound, dialled = stream_of(a), stream_of(a, is_dialled=True)
    receive(inbound, hello("b"), NOW_US)
    receive(dialled, hello("c"), NOW_US)
    flush(a, NOW_US + 2 * PEER_FORGOTTEN_US)
    assert set(a.peers) == {"b", "c"}
    lost_us = NOW_US + 2 * PEER_FORGOTTEN_US
    inbound.lost("gone", lost_us)
    dialled.lost("gone", lost_us)
    flush(a, lost_us + PEER_FORGOTTEN_US - 1)
    assert set(a.peers) == {"b", "c"}
    flush(a, lost_us + PEER_FORGOTTEN_US)
    assert set(a.peers) == {"c"}


def test_peers_are_bounded_and_lost_ones_make_room() -> None:
    a = replicator("a")
    streams = [stream_of(a) for _ in range(MAX_PEERS)]
    for index, stream in enumerate(streams):
        receive(stream, hello(f"b{index}"), NOW_US)
    refused = stream_of(a)
    receive(refused, hello("one more"), NOW_US)
    assert refused.error is not None
    assert refused.error.reason is Reason.TOO_MANY_PEERS
    streams[0].lost("gone", NOW_US)
    receive(stream_of(a), hello("one more"), NOW_US)
    assert "one more" in a.peers
    assert len(a.peers) == MAX_PEERS


def test_the_configured_address_is_shown_rather_than_the_far_end_of_an_inbound_stream() -> None:
    a = replicator("a")
    receive(Stream(a, "b.example:50051", is_dialled=True, wake=lambda: None, now_us=NOW_US), hello("b"), NOW_US)
    receive(Stream(a, "ipv4:10.0.0.9:41234", is_dialled=False, wake=lambda: None, now_us=NOW_US), hello("b"), NOW_US)
    assert a.peers["b"].address == "b.example:50051"


def test_a_peers_new_life_is_told_what_its_last_one_took() -> None:
    a = replicator("a")
    first = replicator("b", 1)
    take(first.store, "ann", 5, NOW_US)
    one, _ = connected(first, a)
    for stream in list(a.peers["b"].streams):
        stream.lost("killed", NOW_US)
    second = replicator("b", 2)
    connected(second, a)
    bucket = second.store.get(key_of("ann"))
    assert bucket is not None
    assert [(entry.origin, entry.tokens) for entry in bucket.entries()] == [(Origin("b", 1), 5)]
    assert one.peer is not None


@pytest.mark.interpreted
def test_a_member_in_want_is_paid_by_another_one() -> None:
    a, b = Strict("a"), Strict("b")
    one, other = connected(a, b)
    a.use_up()
    a.say()
    exchange(one, other)
    assert (a.payments and a.payments.payments_received, b.payments and b.payments.payments_sent) == (1, 1)
    assert a.plan().remaining > 20


@pytest.mark.interpreted
def test_asks_go_out_on_the_stream_in_use_before_any_deltas_and_are_paid_where_they_came_in() -> None:
    a, b = Strict("a"), Strict("b")
    (a1, b1), (a2, b2) = [(stream_of(a), stream_of(b)) for _ in range(2)]
    said = {stream: next_frame(stream, NOW_US) or b"" for stream in (a1, b1, a2, b2)}
    # The first stream is in use at one end, the second at the other.
    for receiver, sender in ((a1, b1), (b2, a2), (a2, b2), (b1, a1)):
        receive(receiver, said[sender], NOW_US)
    for one, other in ((a1, b1), (a2, b2)):
        exchange(one, other)
    assert (a.peers["b"].streams, b.peers["a"].streams) == ([a1, a2], [b2, b1])
    a.use_up()
    take(a.store, "ann", 1, NOW_US)
    a.say()
    assert said_by(a2) == []
    asks, deltas = said_by(a1)
    assert (kind_of(asks), kind_of(deltas)) == ("payments", "deltas")
    receive(b1, asks, NOW_US)
    assert said_by(b2) == []
    [pays] = said_by(b1)
    assert [pay.key for pay in pb.Frame.FromString(pays).payments.pays] == [PLAN]


@pytest.mark.interpreted
def test_a_stream_is_woken_when_there_is_something_to_ask_for() -> None:
    a = Strict("a")
    woken: list[None] = []
    stream = stream_of(a, wake=lambda: woken.append(None))
    receive(stream, hello("b", membership=MEMBERS), NOW_US)
    a.say()
    woken.clear()
    a.use_up()
    a.say()
    assert woken


@pytest.mark.interpreted
def test_more_asks_than_a_frame_takes_go_out_in_several() -> None:
    a, b = Strict("a"), Strict("b")
    one, _ = connected(a, b)
    for index in range(MAX_BATCH + 1):
        a.use_up(f"{index}")
    a.say()
    frames = [pb.Frame.FromString(next_frame(one, NOW_US) or b"") for _ in range(2)]
    assert [len(each.payments.asks) for each in frames] == [MAX_BATCH, 1]


@pytest.mark.interpreted
@pytest.mark.parametrize(
    "fields", [{"protocol": 3}, {"protocol": 3, "membership": MEMBERS}, {}], ids=["old", "odd", "not strict"]
)
def test_a_peer_that_cannot_pay_is_not_asked_and_hears_what_is_eventual(fields: dict[str, object]) -> None:
    a = Strict("a")
    stream = stream_of(a)
    receive(stream, hello("b", **fields), NOW_US)
    said_by(stream)
    a.use_up()
    take(a.store, "ann", 1, NOW_US)
    a.say()
    assert [kind_of(raw) for raw in said_by(stream)] == ["deltas"]


@pytest.mark.interpreted
def test_a_peer_is_heard_to_have_the_membership_it_shows() -> None:
    a = Strict("a")
    assert a.payments is not None
    receive(stream_of(a), hello("c", membership=pb.Membership(epoch=1, members=MEMBERS.members[:1])), NOW_US)
    assert a.payments.status().conflicts == ("c",)
    a.peer_registry.forget(NOW_US)
    assert a.payments.status().conflicts == ("c",)
    for stream in list(a.streams()):
        stream.lost("gone", NOW_US)
    a.peer_registry.forget(NOW_US)
    assert a.payments.status().conflicts == ()


@pytest.mark.interpreted
def test_what_was_asked_for_on_a_lost_stream_is_asked_for_anew_on_the_next_one() -> None:
    a, b = Strict("a"), Strict("b")
    one, other = connected(a, b)
    a.use_up()
    a.say()
    for stream in (one, other):
        stream.lost("cut", NOW_US)
    one, other = connected(a, b)
    a.say()
    exchange(one, other)
    assert a.plan().remaining > 20


@pytest.mark.interpreted
def test_what_is_paid_on_a_stream_that_has_closed_at_the_receiver_does_not_count() -> None:
    a, b = Strict("a"), Strict("b")
    first, first_at_b = connected(a, b)
    second, second_at_b = connected(a, b)
    a.use_up()
    a.say()
    for raw in said_by(first):
        receive(first_at_b, raw, NOW_US)
    pays = said_by(first_at_b)
    assert a.plan().reserved
    first.close(Reason.DRAINING, "", NOW_US)
    assert not a.plan().reserved
    for raw in pays:
        receive(first, raw, NOW_US)
    assert a.plan().remaining <= 1
    a.strict_us += 100_000
    a.say()
    exchange(second, second_at_b)
    assert a.payments is not None
    assert a.payments.payments_received == 1


@pytest.mark.interpreted
@pytest.mark.parametrize("twice", [False, True])
def test_a_payment_that_answers_no_ask_closes_its_stream(twice: bool) -> None:
    a, b = Strict("a"), Strict("b")
    one, other = connected(a, b)
    if twice:
        a.use_up()
        a.say()
        exchange(one, other)
    receive(one, frame(payments=pb.Payments(pays=[pb.Pay(key=PLAN, amount=1)])), NOW_US)
    assert a.protocol_errors == {"unexpected": 1}


@pytest.mark.interpreted
def test_an_ask_that_is_never_answered_closes_its_stream_and_frees_the_room() -> None:
    a, b = Strict("a"), Strict("b")
    one, _ = connected(a, b)
    a.use_up()
    a.say()
    assert a.plan().reserved
    a.strict_us += STALL_US
    one.check_time(NOW_US)
    assert a.plan().reserved
    a.strict_us += 1
    one.check_time(NOW_US)
    assert not a.plan().reserved
    assert a.protocol_errors == {"stalled": 1}


@pytest.mark.interpreted
def test_buckets_asked_for_that_no_strict_rule_knows_are_counted() -> None:
    a = Strict("a")
    stream = stream_of(a)
    receive(stream, hello("b", membership=MEMBERS), NOW_US)
    receive(stream, frame(payments=pb.Payments(asks=[pb.Ask(key=key_of("ann"), amount=1)])), NOW_US)
    assert a.unknown_keys == 1
    assert not stream.is_over


@pytest.mark.interpreted
def test_a_bad_ask_closes_its_stream_and_is_counted_by_reason() -> None:
    a = Strict("a")
    stream = stream_of(a)
    receive(stream, hello("b", membership=MEMBERS), NOW_US)
    receive(stream, frame(payments=pb.Payments(asks=[pb.Ask(key=b"\x09")])), NOW_US)
    assert pb.Frame.FromString(next_frame(stream, NOW_US) or b"").goodbye.reason == "bad_key"
    assert a.protocol_errors == {"bad_key": 1}


def test_an_older_status_that_comes_late_does_not_stay() -> None:
    a, b, c = (replicator(name) for name in "abc")
    (a1, b1), (a2, b2) = connected(a, b), connected(b, a)[::-1]
    ac, ca = connected(a, c)
    late = said_by(a2)
    exchange(a1, b1)
    assert b.peers["a"].reported.reaches == {"b", "c"}
    ac.lost("cut", NOW_US)
    # What tells of it is lost with the second stream, on which an older one comes in after all.
    lost = said_by(a2)
    exchange(a1, b1)
    assert b.peers["a"].reported.reaches == {"b"}
    assert lost
    for raw in late:
        receive(b2, raw, NOW_US)
    assert b.peers["a"].reported.reaches == {"b", "c"}
    for stream in (a2, b2):
        stream.lost("reset", NOW_US)
    exchange(a1, b1)
    assert b.peers["a"].reported.reaches == {"b"}
    assert ca.peer is not None


def test_a_stream_that_ends_gives_back_the_room_of_its_keys_whoever_ends_it() -> None:
    a, b = replicator("a"), replicator("b")
    take(b.store, "ann", 1, NOW_US)
    free = a.key_memory.free
    for end in ("lost", "left", "faulty"):
        one, other = connected(a, b)
        take(b.store, "ann", 1, NOW_US)
        flush(b, NOW_US)
        exchange(one, other)
        assert a.key_memory.free < free
        if end == "lost":
            one.lost("reset", NOW_US)
        elif end == "left":
            other.close(Reason.DRAINING, "", NOW_US)
            exchange(other, one)
        else:
            receive(one, b"no frame", NOW_US)
        one.lost("reset", NOW_US)
        other.lost("reset", NOW_US)
        assert a.key_memory.free == free


def starting(name: str) -> Replicator:
    """A node that waits for its peers to tell what they know."""
    found = replicator(name)
    found.sync.has_joined = False
    return found


OLD_US = NOW_US - 30 * SECOND_US


def knowing(name: str, *values: str) -> Replicator:
    """A node that has long been there."""
    found = replicator(name)
    for value in values:
        take(found.store, value, 1, OLD_US)
    flush(found, OLD_US)
    return found


def known_to(each: Replicator) -> set[bytes]:
    return {bucket.key for bucket in each.store}


def test_a_node_that_starts_is_told_everything_by_one_peer_and_what_is_recent_by_the_others() -> None:
    a, b, c = starting("a"), knowing("b", "ann", "bob"), knowing("c", "ann", "bob")
    take(c.store, "cem", 1, NOW_US - SECOND_US)
    flush(c, NOW_US)
    connected(a, b)
    connected(a, c)
    assert known_to(a) == {key_of("ann"), key_of("bob"), key_of("cem")}
    assert (b.peers["a"].counts.entries_sent, c.peers["a"].counts.entries_sent) == (2, 1)
    assert all(peer.reported.has_ended_snapshot for peer in a.peers.values())


def test_a_node_that_starts_believes_a_peer_that_it_dials_before_one_that_came_by_itself() -> None:
    a, b, empty = starting("a"), knowing("b", "ann"), knowing("0")
    connected(empty, a)
    assert a.peers["0"].reported.has_ended_snapshot
    # It has dialled in, too, and was not known to be one of those that are configured.
    one, other = connected(b, a)
    assert known_to(a) == set()
    connected(a, b)
    exchange(one, other)
    assert known_to(a) == {key_of("ann")}
    assert a.peers["b"].reported.has_ended_snapshot
    assert not a.sync.is_receiving_all


def test_a_peer_that_is_asked_for_everything_after_all_has_not_sent_it_yet() -> None:
    a, b, empty = starting("a"), knowing("b", "ann"), knowing("0")
    connected(empty, a)
    connected(b, a)
    assert a.peers["b"].reported.has_ended_snapshot
    one, other = stream_of(a, is_dialled=True), stream_of(b)
    while a.peers["b"].own_request != pb.EVERYTHING:
        for sender, receiver in ((one, other), (other, one)):
            for raw in said_by(sender):
                receive(receiver, raw, NOW_US)
    assert a.sync.is_receiving_all
    assert not a.peers["b"].reported.has_ended_snapshot


def test_when_the_peer_that_tells_everything_is_lost_another_one_does() -> None:
    a, b, c = starting("a"), knowing("b", "ann"), knowing("c", "ann")
    one, other = stream_of(a, is_dialled=True), stream_of(b)
    # It has heard how b stands, and what it then says is on its way.
    while not a.peers or a.peers["b"].own_request != pb.EVERYTHING:
        for sender, receiver in ((one, other), (other, one)):
            for raw in said_by(sender):
                receive(receiver, raw, NOW_US)
    ac, ca = connected(a, c)
    assert known_to(a) == set()
    one.lost("reset", NOW_US)
    exchange(ac, ca)
    assert known_to(a) == {key_of("ann")}


def test_nodes_that_start_together_wait_for_one_that_has_been_there() -> None:
    a, b = starting("a"), starting("b")
    take(b.store, "old", 1, OLD_US)
    one, other = connected(a, b)
    assert known_to(a) == set()
    # It has given up waiting, or been told by others.
    b.sync.join()
    exchange(one, other)
    assert known_to(a) == {key_of("old")}


def test_a_node_that_has_been_there_is_told_by_one_that_has_just_started_what_is_recent() -> None:
    a, b = knowing("a"), starting("b")
    take(b.store, "old", 1, OLD_US)
    flush(b, OLD_US)
    take(b.store, "recent", 1, NOW_US)
    flush(b, NOW_US)
    connected(a, b)
    assert known_to(a) == {key_of("recent")}


def test_two_nodes_that_have_been_there_tell_each_other_everything_when_they_first_meet() -> None:
    a, b = knowing("a", "ann"), knowing("b", "bob")
    connected(a, b)
    assert known_to(a) == known_to(b) == {key_of("ann"), key_of("bob")}
