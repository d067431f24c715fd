"""One connection without I/O and on a clock of the test's own: what it takes from a client, and what ends it.

The client is hyper's h2, another implementation of HTTP/2; frames that it would not send are written by hand.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field, replace

import h2.events
import h2.exceptions
import pytest
from h2.settings import SettingCodes
from hypothesis import given, settings
from hypothesis import strategies as st
from server.raw_http2 import client_connection

from ratelimit_sidecar.server import grpc_connection, http2_session
from ratelimit_sidecar.server.bounds import DEFAULT_BOUNDS, MAX_HEADER_BYTES, MAX_MESSAGE_BYTES
from ratelimit_sidecar.server.budget import Budget
from ratelimit_sidecar.server.events import Call, StreamCancelled, StreamData, StreamStarted
from ratelimit_sidecar.server.framing import frame
from ratelimit_sidecar.server.front_end_counts import FrontEndCounts
from ratelimit_sidecar.server.grpc_connection import Connection
from ratelimit_sidecar.server.rpc import Code, RpcError, StreamingMethod

PATH = "/test.Echo/Echo"
STREAM_PATH = "/test.Echo/Stream"
HEADERS = [
    (":method", "POST"),
    (":scheme", "http"),
    (":path", PATH),
    (":authority", "test"),
    ("content-type", "application/grpc"),
    ("te", "trailers"),
]
STREAM_HEADERS = [(name, STREAM_PATH if name == ":path" else value) for name, value in HEADERS]

PING, SETTINGS, DATA, HEADERS_FRAME, RST_STREAM, WINDOW_UPDATE, CONTINUATION = 6, 4, 0, 1, 3, 8, 9
END_HEADERS = 4
EMPTY_DATA = DATA

INITIAL_WINDOW = 65_535
"""Of a client that says nothing else (RFC 9113, section 6.9.2)."""


def echo(message, _metadata):
    return message


async def echo_stream(messages, _metadata):
    async for message in messages:
        yield message


def raw_frame(kind: int, stream_id: int = 0, payload: bytes = b"", flags: int = 0) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream_id.to_bytes(4, "big") + payload


@dataclass
class Pair:
    """A client and the server's connection to it, wired together."""

    budget: Budget = field(default_factory=lambda: Budget(DEFAULT_BOUNDS.held_bytes))
    counts: FrontEndCounts = field(default_factory=FrontEndCounts)
    bounds: dict[str, float] = field(default_factory=dict)
    age_s: float | None = None
    shake_hands: bool = True

    def __post_init__(self) -> None:
        self.server = Connection(
            {PATH.encode(): echo, STREAM_PATH.encode(): StreamingMethod(echo_stream)},
            replace(DEFAULT_BOUNDS, **self.bounds),
            self.budget,
            self.counts,
            now_s=0.0,
            age_s=self.age_s,
        )
        self.client = client_connection()
        self.events: list[h2.events.Event] = []
        if self.shake_hands:
            self.client.initiate_connection()
            self.exchange()

    def exchange(self) -> list:
        """Pass bytes both ways until nobody has more to say; what the server saw."""
        happened = []
        while True:
            sent = self.client.data_to_send()
            if sent:
                happened += self.receive(sent)
            received = self.server.output()
            if received:
                try:
                    self.events += self.client.receive_data(received)
                except h2.exceptions.ProtocolError:
                    return happened
            if not sent and not received:
                return happened

    def receive(self, data: bytes) -> list:
        """What the server sees in these bytes."""
        happened = self.server.receive(data)
        while self.server.has_more:
            happened += self.server.receive(b"")
        return happened

    def send_raw(self, data: bytes) -> list:
        return self.receive(data) + self.exchange()

    def open(self, headers=HEADERS, *, end: bool = False) -> int:
        stream_id = self.client.get_next_available_stream_id()
        self.client.send_headers(stream_id, headers, end_stream=end)
        return stream_id

    def call(self, message: bytes = b"hello") -> int:
        stream_id = self.open()
        self.client.send_data(stream_id, frame(message), end_stream=True)
        return stream_id

    def check(self, now_s: float) -> None:
        self.server.check(now_s)
        self.exchange()

    def of(self, kind: type) -> list:
        return [event for event in self.events if isinstance(event, kind)]

    def answered(self) -> dict[int, bytes]:
        bodies: dict[int, bytes] = {}
        for event in self.of(h2.events.DataReceived):
            bodies[event.stream_id] = bodies.get(event.stream_id, b"") + event.data
        return bodies

    @property
    def goaway_code(self) -> int:
        [*_, last] = self.of(h2.events.ConnectionTerminated)
        return int(last.error_code)


def statuses(pair: Pair) -> list[int]:
    """Of the calls answered by headers alone."""
    found = []
    for event in pair.of(h2.events.ResponseReceived):
        found += [int(value) for name, value in event.headers if name == b"grpc-status"]
    return found


# Calls


def test_a_call_comes_out_when_its_message_is_complete() -> None:
    pair = Pair()
    stream_id = pair.open()
    pair.client.send_data(stream_id, frame(b"hello")[:4])
    assert pair.exchange() == []
    pair.client.send_data(stream_id, frame(b"hello")[4:], end_stream=True)
    [call] = pair.exchange()
    assert isinstance(call, Call)
    assert (call.path, call.message) == (PATH, b"hello")
    pair.server.answer(call, b"hi")
    pair.exchange()
    assert pair.answered() == {stream_id: frame(b"hi")}
    assert pair.budget.held == 0


def test_an_answer_to_a_client_that_is_gone_is_nothing() -> None:
    pair = Pair()
    stream_id = pair.call()
    [call] = pair.exchange()
    pair.client.reset_stream(stream_id)
    pair.exchange()
    pair.server.answer(call, b"too late")
    pair.server.refuse(call, RpcError(Code.NOT_FOUND, "too late"))
    pair.exchange()
    assert pair.answered() == {}
    pair.call()
    assert len(pair.exchange()) == 1


def test_trailers_end_a_request_too() -> None:
    pair = Pair()
    stream_id = pair.open()
    pair.client.send_data(stream_id, frame(b"hello"))
    pair.client.send_headers(stream_id, [("x-trailer", "1")], end_stream=True)
    [call] = pair.exchange()
    assert call.message == b"hello"


def test_the_windows_are_given_back_however_a_call_ends() -> None:
    pair = Pair()
    for _ in range(40):
        stream_id = pair.open()
        for _ in range(grpc_connection.STREAM_WINDOW // 16_384):
            pair.client.send_data(stream_id, bytes(16_384))
        pair.exchange()
        pair.client.reset_stream(stream_id)
        pair.exchange()
    pair.call()
    assert len(pair.exchange()) == 1
    assert pair.budget.held == 0


def test_an_oversized_message_is_refused_and_what_follows_of_it_ignored() -> None:
    pair = Pair()
    stream_id = pair.open()
    for _ in range(MAX_MESSAGE_BYTES // 16_384 + 1):
        pair.client.send_data(stream_id, bytes(16_384))
        pair.exchange()
    assert statuses(pair) == [Code.RESOURCE_EXHAUSTED]
    assert pair.budget.held == 0


def test_a_streaming_call_comes_out_in_parts() -> None:
    pair = Pair()
    stream_id = pair.open(STREAM_HEADERS)
    pair.client.send_data(stream_id, b"part")
    opened, part = pair.exchange()
    assert isinstance(opened, StreamStarted)
    assert isinstance(part, StreamData)
    assert (opened.path, part.data, part.ended) == (STREAM_PATH, b"part", False)
    pair.server.send(stream_id, b"one")
    pair.server.send(stream_id, b"two")
    pair.server.finish(stream_id, None)
    pair.exchange()
    assert pair.answered() == {stream_id: frame(b"one") + frame(b"two")}
    [trailers] = pair.of(h2.events.TrailersReceived)
    assert (b"grpc-status", b"0") in trailers.headers
    assert pair.budget.held == 0


def test_what_is_said_while_the_socket_takes_nothing_counts_at_the_next_check() -> None:
    pair = Pair(Budget(8 * 200_000))
    stream_id = pair.open(STREAM_HEADERS)
    pair.exchange()
    before = pair.budget.held
    pair.server.send(stream_id, bytes(100_000))
    pair.server.check(0.5)
    assert pair.budget.held >= before + 100_000
    pair.server.send(stream_id, bytes(100_000))
    pair.server.check(1.0)
    assert pair.server.closed
    assert pair.counts.closed_connections["stalled"] == 1


def test_what_a_streaming_call_has_not_used_keeps_its_room_though_its_client_is_done() -> None:
    """Otherwise a client could leave a whole window with each of its calls."""
    pair = Pair()
    for _ in range(20):
        stream_id = pair.open(STREAM_HEADERS)
        with contextlib.suppress(h2.exceptions.FlowControlError):
            for _ in range(8):
                pair.client.send_data(stream_id, bytes(16_384))
        pair.exchange()
        with contextlib.suppress(h2.exceptions.FlowControlError):
            pair.client.send_data(stream_id, b"", end_stream=True)
        pair.exchange()
    assert pair.client.outbound_flow_control_window < 16_384
    for stream_id in range(1, 41, 2):
        pair.server.finish(stream_id, None)
    pair.exchange()
    assert pair.client.outbound_flow_control_window > grpc_connection.CONNECTION_WINDOW // 2


def test_a_streaming_call_that_its_client_resets_is_lost() -> None:
    pair = Pair()
    stream_id = pair.open(STREAM_HEADERS)
    pair.exchange()
    pair.client.reset_stream(stream_id)
    [lost] = pair.exchange()
    assert isinstance(lost, StreamCancelled)
    pair.server.send(stream_id, b"too late")
    pair.server.finish(stream_id, None)
    pair.exchange()
    assert pair.answered() == {}


def test_a_stream_whose_client_has_not_ended_its_side_is_reset_behind_its_trailers() -> None:
    pair = Pair()
    stream_id = pair.open(STREAM_HEADERS)
    pair.exchange()
    pair.server.send(stream_id, b"one")
    pair.server.finish(stream_id, None)
    pair.exchange()
    *_, trailers, ended, reset = pair.events
    assert isinstance(trailers, h2.events.TrailersReceived)
    assert isinstance(ended, h2.events.StreamEnded)
    assert isinstance(reset, h2.events.StreamReset)
    assert (reset.stream_id, reset.error_code) == (stream_id, grpc_connection.NO_ERROR)


def test_a_reset_does_not_overtake_what_its_client_has_no_room_for() -> None:
    pair = Pair(bounds={"stalled": 10})
    stream_id = pair.open(STREAM_HEADERS)
    pair.exchange()
    message = bytes(INITIAL_WINDOW - 5)
    pair.server.send(stream_id, message)
    pair.exchange()
    # Nothing waits but the trailers, and those for the window.
    pair.server.finish(stream_id, None)
    pair.exchange()
    assert pair.of(h2.events.TrailersReceived) == []
    assert pair.of(h2.events.StreamReset) == []
    pair.client.increment_flow_control_window(1_000)
    pair.client.increment_flow_control_window(1_000, stream_id)
    pair.exchange()
    assert len(pair.of(h2.events.TrailersReceived)) == 1
    assert len(pair.of(h2.events.StreamReset)) == 1


def test_a_stream_whose_client_takes_no_trailers_is_reset_after_a_while() -> None:
    pair = Pair(bounds={"stalled": 10})
    stream_id = pair.open(STREAM_HEADERS)
    pair.exchange()
    pair.server.send(stream_id, bytes(INITIAL_WINDOW - 5))
    pair.exchange()
    pair.server.finish(stream_id, None)
    pair.check(9.0)
    assert pair.of(h2.events.StreamReset) == []
    pair.check(10.0)
    [reset] = pair.of(h2.events.StreamReset)
    assert (reset.stream_id, reset.error_code) == (stream_id, grpc_connection.CANCEL)


def test_a_streaming_call_that_http_2_ends_is_lost_though_its_client_says_nothing_more() -> None:
    pair = Pair()
    stream_id = pair.open([*STREAM_HEADERS, ("content-length", "3")])
    pair.exchange()
    pair.server.receive(raw_frame(DATA, stream_id, b"more than that"))
    pair.server.output()
    [lost] = pair.server.events_of_output()
    assert isinstance(lost, StreamCancelled)
    assert pair.server.events_of_output() == []
    assert pair.budget.held == 0


def test_unread_parts_of_streaming_calls_are_bounded_for_all_connections_together() -> None:
    budget = Budget(2_000_000)
    pair = Pair(budget=budget)
    streams = [pair.open(STREAM_HEADERS) for _ in range(3)]
    pair.exchange()
    happened = []
    for stream_id in streams:
        for _ in range(5):
            pair.client.send_data(stream_id, bytes(16_384))
        happened += pair.exchange()
    assert budget.held <= budget.size // 8
    assert [event.stream_id for event in happened if isinstance(event, StreamCancelled)] == streams[2:]
    assert statuses(pair) == [Code.RESOURCE_EXHAUSTED]
    assert pair.counts.refused_calls["shed"] == 1


def test_the_window_of_a_connection_is_whole_again_when_calls_end_unread() -> None:
    pair = Pair()
    for _ in range(3 * grpc_connection.CONNECTION_WINDOW // grpc_connection.STREAM_WINDOW):
        stream_id = pair.open(STREAM_HEADERS)
        for _ in range(grpc_connection.STREAM_WINDOW // 16_384):
            pair.client.send_data(stream_id, bytes(16_384))
        pair.client.reset_stream(stream_id)
        for event in pair.exchange():
            if isinstance(event, StreamData):
                pair.server.acknowledge(event.stream_id, len(event.data))
    assert pair.client.outbound_flow_control_window > grpc_connection.STREAM_WINDOW
    assert pair.budget.held == 0


def test_a_client_that_grants_room_for_each_message_of_a_stream_does_not_flood() -> None:
    pair = Pair()
    stream_id = pair.open(STREAM_HEADERS)
    pair.exchange()
    for _ in range(2 * grpc_connection.CONTROL_FRAMES):
        pair.server.send(stream_id, b"message")
        pair.server.output()
        granted = (len(frame(b"message"))).to_bytes(4, "big")
        pair.server.receive(raw_frame(WINDOW_UPDATE, 0, granted) + raw_frame(WINDOW_UPDATE, stream_id, granted))
    assert not pair.server.closed


def test_a_slow_client_of_a_stream_that_is_refilled_at_once_is_not_stalled() -> None:
    pair = Pair(bounds={"stalled": 10})
    stream_id = pair.open(STREAM_HEADERS)
    pair.exchange()
    for _ in range(10):
        pair.server.send(stream_id, bytes(16_384))
    for second in range(1, 60):
        pair.client.increment_flow_control_window(16_389)
        pair.client.increment_flow_control_window(16_389, stream_id)
        pair.exchange()
        pair.server.send(stream_id, bytes(16_384))
        pair.check(float(second))
        assert pair.server.unsent(stream_id) > 0
    assert not pair.server.closed


def test_a_client_that_takes_nothing_of_a_stream_is_stalled_though_there_is_more_for_it() -> None:
    pair = Pair(bounds={"stalled": 10})
    stream_id = pair.open(STREAM_HEADERS)
    pair.exchange()
    for second in range(1, 13):
        for _ in range(5):
            pair.server.send(stream_id, bytes(16_384))
        pair.check(float(second))
    assert pair.server.closed
    assert pair.counts.closed_connections["stalled"] == 1


# Time


def test_a_client_that_says_nothing_is_disconnected_after_the_time_of_a_handshake() -> None:
    pair = Pair(shake_hands=False, bounds={"handshake": 2})
    pair.server.check(1.9)
    assert not pair.server.closed
    pair.server.check(2.0)
    assert pair.server.closed
    assert pair.counts.closed_connections["handshake"] == 1


def test_a_message_that_stops_in_the_middle_is_reset() -> None:
    pair = Pair(bounds={"body_idle": 10, "call": 30})
    stream_id = pair.open()
    pair.client.send_data(stream_id, b"\0")
    pair.exchange()
    pair.check(9.9)
    assert pair.of(h2.events.StreamReset) == []
    pair.check(10.0)
    [reset] = pair.of(h2.events.StreamReset)
    assert reset.stream_id == stream_id
    assert pair.counts.refused_calls["body_idle"] == 1
    assert pair.budget.held == 0


def test_a_message_that_trickles_is_reset_after_the_time_of_a_call() -> None:
    pair = Pair(bounds={"body_idle": 10, "call": 30})
    stream_id = pair.open()
    for second in range(30):
        pair.client.send_data(stream_id, b"\0")
        pair.check(float(second))
    assert pair.of(h2.events.StreamReset) == []
    pair.check(30.0)
    assert len(pair.of(h2.events.StreamReset)) == 1
    assert pair.counts.refused_calls["too_slow"] == 1


def test_an_idle_connection_is_drained() -> None:
    pair = Pair(bounds={"idle": 100})
    pair.check(50.0)
    pair.call()
    [call] = pair.exchange()
    pair.server.answer(call, b"")
    pair.check(60.0)
    pair.check(159.0)
    assert not pair.server.closed
    pair.check(160.0)
    assert pair.server.closed
    assert pair.counts.closed_connections["idle"] == 1
    assert pair.goaway_code == grpc_connection.NO_ERROR


def test_a_silent_client_of_a_streaming_call_is_asked_for_a_sign_of_life() -> None:
    pair = Pair(bounds={"ping_after": 60})
    pair.open(STREAM_HEADERS)
    pair.check(1.0)
    # h2 answers the PING.
    pair.check(61.0)
    pair.check(121.0)
    pair.check(150.0)
    assert not pair.server.closed


def test_a_client_that_gives_no_sign_of_life_is_disconnected() -> None:
    pair = Pair(bounds={"ping_after": 60})
    pair.open(STREAM_HEADERS)
    pair.check(1.0)
    for now_s in (2.0, 62.0, 121.9):
        pair.server.check(now_s)
        pair.server.output()
        assert not pair.server.closed
    pair.server.check(122.0)
    assert pair.server.closed
    assert pair.counts.closed_connections["silent"] == 1


def test_an_old_connection_is_drained_and_gets_time_for_its_calls() -> None:
    pair = Pair(age_s=100.0, bounds={"age_grace": 50, "call": 1_000, "body_idle": 1_000})
    pair.open()
    pair.check(99.0)
    assert pair.of(h2.events.ConnectionTerminated) == []
    pair.check(100.0)
    # Twice, with the answer to a PING in between.
    assert [event.last_stream_id for event in pair.of(h2.events.ConnectionTerminated)] == [2**31 - 1, 1]
    assert not pair.server.closed
    pair.check(149.0)
    assert not pair.server.closed
    pair.check(150.0)
    assert pair.server.closed


def test_a_drain_says_its_last_word_though_the_client_answers_no_ping() -> None:
    pair = Pair(bounds={"goaway_ping": 1})
    pair.open()
    pair.exchange()
    pair.server.check(5.0)
    pair.server.drain()
    first = pair.server.output()
    pair.server.check(5.9)
    assert pair.server.output() == b""
    pair.server.check(6.0)
    pair.client.receive_data(first + pair.server.output())


def test_a_call_that_crosses_the_first_goaway_is_answered() -> None:
    pair = Pair()
    pair.server.drain()
    goaway = pair.server.output()
    stream_id = pair.call()
    [call] = pair.server.receive(pair.client.data_to_send())
    pair.server.answer(call, b"in time")
    pair.client.receive_data(goaway)
    pair.exchange()
    assert pair.answered() == {stream_id: frame(b"in time")}
    assert pair.server.closed
    assert [event.last_stream_id for event in pair.of(h2.events.ConnectionTerminated)] == [stream_id]


# Bounds


def test_unfinished_calls_may_hold_a_part_of_what_is_free() -> None:
    budget = Budget(1_000_000)
    pair, other = Pair(budget=budget), Pair(budget=budget)
    for _ in range(100):
        pair.open()
        pair.exchange()
    assert pair.counts.refused_calls["shed"] > 0
    assert set(statuses(pair)) == {Code.RESOURCE_EXHAUSTED}
    assert budget.held <= 1_000_000 // 8
    other.open()
    other.exchange()
    assert statuses(other) == []


def test_many_greedy_connections_leave_room_for_a_modest_one() -> None:
    budget = Budget(1_000_000)
    for _ in range(60):
        greedy = Pair(budget=budget)
        for _ in range(100):
            greedy.open()
        greedy.exchange()
    modest = Pair(budget=budget, bounds={"stalled": 10})
    stream_id = modest.call(bytes(1_000))
    [call] = modest.exchange()
    modest.server.answer(call, b"answered")
    modest.exchange()
    assert modest.answered() == {stream_id: frame(b"answered")}


def calls_without_window(pair: Pair, count: int, size: int, headers=HEADERS) -> list[Call]:
    """Calls that were answered with so many bytes, none of which the client lets come."""
    pair.client.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 0})
    pair.exchange()
    calls = []
    for _ in range(count):
        stream_id = pair.open(headers)
        pair.client.send_data(stream_id, frame(b"hello"), end_stream=True)
        for call in pair.exchange():
            pair.server.answer(call, bytes(size))
            calls.append(call)
        pair.exchange()
        if pair.server.closed:
            break
    return calls


def test_answers_that_the_client_lets_wait_count_as_unfinished_calls_do() -> None:
    budget = Budget(1_000_000)
    pair = Pair(budget=budget)
    calls_without_window(pair, 4, 10_000)
    assert budget.held == 4 * (10_000 + grpc_connection.PREFIX_BYTES + grpc_connection.CALL_BYTES)
    pair.client.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 1_000_000})
    pair.exchange()
    assert budget.held == 0
    assert len(pair.answered()) == 4


def test_a_client_that_lets_more_wait_than_it_may_is_disconnected_at_once() -> None:
    budget = Budget(1_000_000)
    pairs = [Pair(budget=budget) for _ in range(20)]
    for pair in pairs:
        calls_without_window(pair, 1_000, 5_000)
        assert pair.server.closed
        assert pair.counts.closed_connections["stalled"] == 1
        assert pair.goaway_code == grpc_connection.ENHANCE_YOUR_CALM
        assert budget.held <= 1_000_000
        pair.server.release()
    assert budget.held == 0


def test_bytes_that_wait_to_be_handled_count_and_too_many_end_the_connection() -> None:
    budget = Budget(1_000_000)
    pair = Pair(budget=budget)
    pair.server.count_unhandled(100_000)
    assert budget.held == 100_000
    pair.server.count_unhandled(4_000)
    assert (budget.held, pair.server.closed) == (4_000, False)
    pair.server.count_unhandled(200_000)
    assert pair.server.closed
    assert pair.counts.closed_connections["limit"] == 1
    pair.server.release()
    assert budget.held == 0


@pytest.mark.parametrize("rest", [0, 1], ids=["between frames", "within a frame"])
def test_a_client_whose_headers_stop_in_the_middle_is_disconnected(rest: int) -> None:
    pair = Pair(bounds={"body_idle": 10})
    pair.call()
    pair.exchange()
    pair.check(1.0)
    begun = raw_frame(HEADERS_FRAME, 3, pair.client.encoder.encode(HEADERS))
    pair.server.receive(begun[: len(begun) - rest])
    pair.check(2.0)
    pair.check(11.0)
    assert not pair.server.closed
    pair.check(12.0)
    assert pair.server.closed
    assert pair.counts.closed_connections["stalled"] == 1


def test_small_answers_that_wait_count_with_their_calls() -> None:
    budget = Budget(1_000_000)
    pair = Pair(budget=budget)
    calls = calls_without_window(pair, 1_000, 1)
    assert pair.server.closed
    assert len(calls) <= 1_000_000 // 8 // grpc_connection.CALL_BYTES + 1


def test_the_headers_of_a_call_are_not_kept_until_its_answer_is_taken() -> None:
    pair = Pair()
    [call] = calls_without_window(pair, 1, 10, [*HEADERS, ("x-long", "v" * 4_000)])
    assert list(call.request) == []
    assert call.path == ""


def test_a_client_that_takes_a_byte_now_and_then_is_disconnected() -> None:
    pair = Pair(bounds={"stalled": 10})
    calls_without_window(pair, 3, 10_000)
    for second in range(1, 13):
        pair.client.increment_flow_control_window(1, 1)
        pair.exchange()
        pair.check(float(second))
    assert pair.server.closed
    assert pair.counts.closed_connections["stalled"] == 1


def test_a_client_that_takes_all_in_time_stays_though_more_waits_all_the_while() -> None:
    pair = Pair(bounds={"stalled": 10})
    calls_without_window(pair, 1, 1_000)
    streams = [1]
    for second in range(1, 60):
        streams.append(pair.call())
        for call in pair.exchange():
            pair.server.answer(call, bytes(1_000))
        if second > 5:
            pair.client.increment_flow_control_window(2_000, streams[second - 6])
        pair.check(float(second))
        assert pair.budget.held
    assert not pair.server.closed
    assert len(pair.answered()) == 54


def test_a_client_that_grants_no_room_for_its_answers_is_disconnected() -> None:
    pair = Pair(bounds={"stalled": 10})
    pair.client.update_settings({SettingCodes.INITIAL_WINDOW_SIZE: 0})
    pair.call()
    [call] = pair.exchange()
    pair.server.answer(call, b"never taken")
    pair.check(1.0)
    pair.check(10.0)
    assert not pair.server.closed
    pair.check(11.0)
    assert pair.server.closed
    assert pair.counts.closed_connections["stalled"] == 1
    assert pair.goaway_code == grpc_connection.ENHANCE_YOUR_CALM


@pytest.mark.parametrize(
    "flood",
    [
        raw_frame(PING, payload=b"12345678"),
        raw_frame(SETTINGS),
        raw_frame(WINDOW_UPDATE, payload=(1).to_bytes(4, "big")),
    ],
    ids=["ping", "settings", "window_update"],
)
def test_frames_that_carry_nothing_are_not_taken_for_ever(flood: bytes) -> None:
    pair = Pair()
    sent = 0
    last = b""
    while not pair.server.closed:
        assert sent < 2 * grpc_connection.CONTROL_FRAMES
        pair.server.receive(flood * 100)
        last = pair.server.output()
        sent += 100
    pair.events += pair.client.receive_data(last[-17:])
    assert pair.counts.closed_connections["flood"] == 1
    assert pair.goaway_code == grpc_connection.ENHANCE_YOUR_CALM


def test_empty_data_frames_are_not_taken_for_ever() -> None:
    pair = Pair()
    stream_id = pair.open()
    pair.exchange()
    sent = 0
    while not pair.server.closed:
        assert sent < 2 * grpc_connection.CONTROL_FRAMES
        pair.server.receive(raw_frame(EMPTY_DATA, stream_id) * 100)
        pair.server.output()
        sent += 100
    # Here or in nghttp2, which has a bound of its own on frames that carry nothing.
    assert pair.counts.closed_connections["flood"] + pair.counts.closed_connections["protocol_error"] == 1


@pytest.mark.parametrize("reads", [1, 2])
def test_resets_do_not_end_the_other_calls_of_a_proxy(reads: int) -> None:
    """A proxy passes on what its clients open and reset; nothing is left of it here (CVE-2023-44487)."""
    pair = Pair()
    for _ in range(grpc_connection.CONTROL_FRAMES + 2_000):
        stream_id = pair.open()
        if reads == 2:
            pair.server.receive(pair.client.data_to_send())
        pair.client.reset_stream(stream_id)
        pair.server.receive(pair.client.data_to_send())
        assert not pair.server.closed
        pair.server.output()
    assert pair.budget.held == 0
    pair.call()
    [call] = pair.server.receive(pair.client.data_to_send())
    assert isinstance(call, Call)


def test_as_many_resets_as_an_envoy_sends_after_a_stall_are_taken() -> None:
    pair = Pair()
    for _ in range(8):
        streams = [pair.open() for _ in range(int(DEFAULT_BOUNDS.streams))]
        pair.exchange()
        for stream_id in streams:
            pair.client.reset_stream(stream_id)
        pair.exchange()
    assert not pair.server.closed


def test_pings_between_calls_are_no_flood() -> None:
    pair = Pair()
    pair.client.increment_flow_control_window(2**30)
    for _ in range(grpc_connection.CONTROL_FRAMES // grpc_connection.CONTROL_FRAMES_A_CALL + 100):
        for _ in range(grpc_connection.CONTROL_FRAMES_A_CALL):
            pair.client.ping(b"12345678")
        pair.call()
        [call] = pair.server.receive(pair.client.data_to_send())
        pair.server.answer(call, b"")
        pair.client.receive_data(pair.server.output())
    assert not pair.server.closed


def test_headers_without_an_end_are_not_taken_for_ever() -> None:
    """CVE-2024-27316: CONTINUATION frames."""
    pair = Pair()
    literal = b"\x00\x01a\x7f\x80\x7e" + b"a" * 16_255
    pair.server.receive(raw_frame(1, 1, literal))
    for _ in range(20):
        if pair.server.closed:
            break
        pair.server.receive(raw_frame(9, 1, literal))
        last = pair.server.output()
    assert pair.server.closed
    pair.events += pair.client.receive_data(last[-17:])
    assert pair.goaway_code in (grpc_connection.ENHANCE_YOUR_CALM, grpc_connection.PROTOCOL_ERROR)


def test_a_header_list_of_the_largest_size_is_taken_and_a_larger_one_refused() -> None:
    pair = Pair()
    names = [(f"x-{number:04}", "v" * 962) for number in range(MAX_HEADER_BYTES // 1_000 - 1)]
    stream_id = pair.client.get_next_available_stream_id()
    pair.client.send_headers(stream_id, [*HEADERS, *names])
    pair.client.send_data(stream_id, frame(b""), end_stream=True)
    assert len(pair.exchange()) == 1
    pair.client.send_headers(pair.client.get_next_available_stream_id(), [*HEADERS, *names, *names[:10]])
    pair.exchange()
    if http2_session.IS_NATIVE:
        assert statuses(pair) == [Code.RESOURCE_EXHAUSTED]
        assert not pair.server.closed
    else:
        assert pair.goaway_code == grpc_connection.ENHANCE_YOUR_CALM


def test_headers_of_many_times_the_largest_size_are_reset_before_they_end() -> None:
    """Each byte can stand for thousands."""
    pair = Pair()
    stream_id = pair.open([*HEADERS, *[("x-long", "v" * 1_000)] * 450])
    pair.exchange()
    if http2_session.IS_NATIVE:
        [reset] = pair.of(h2.events.StreamReset)
        assert reset.stream_id == stream_id
        pair.call()
        assert len(pair.exchange()) == 1
    else:
        assert pair.goaway_code == grpc_connection.ENHANCE_YOUR_CALM


@pytest.mark.native
def test_bytes_that_stand_for_very_many_of_headers_are_taken_in_steps() -> None:
    pair = Pair()
    streams = [pair.open([*HEADERS, *[("x-long", "v" * 3_000)] * 40], end=True) for _ in range(10)]
    # A request without a message is answered at once, so what is answered was looked at.
    sent = pair.client.data_to_send()
    assert len(sent) < 6_000
    steps = 0
    pair.server.receive(sent)
    while pair.server.has_more:
        steps += 1
        pair.events += pair.client.receive_data(pair.server.output())
        assert len(pair.of(h2.events.StreamEnded)) <= 3 * steps
        pair.server.receive(b"")
    pair.exchange()
    assert {ended.stream_id for ended in pair.of(h2.events.StreamEnded)} == set(streams)
    assert steps >= 4


@pytest.mark.native
def test_trailers_of_many_times_the_largest_size_are_reset_before_they_end() -> None:
    pair = Pair()
    stream_id = pair.open()
    pair.exchange()
    pair.client.send_headers(stream_id, [("x-long", "v" * 3_000)] * 150, end_stream=True)
    pair.exchange()
    [reset] = pair.of(h2.events.StreamReset)
    assert reset.stream_id == stream_id
    pair.call()
    assert len(pair.exchange()) == 1


def without_end(headers: bytes) -> bytes:
    """A HEADERS frame without END_HEADERS."""
    assert (headers[3], headers[4]) == (HEADERS_FRAME, END_HEADERS)
    return headers[:4] + b"\0" + headers[5:]


@pytest.mark.native
def test_headers_that_are_not_complete_count_as_memory() -> None:
    pair = Pair()
    pair.open([*HEADERS, *[("x-long", "v" * 3_000)] * 20])
    pair.server.receive(without_end(pair.client.data_to_send()))
    assert pair.budget.held > 60_000
    pair.server.receive(raw_frame(CONTINUATION, 1, flags=END_HEADERS))
    # As those of any call that is not complete.
    assert 60_000 < pair.budget.held < 65_000
    pair.send_raw(raw_frame(RST_STREAM, 1, bytes(4)))
    assert pair.budget.held == 0


@pytest.mark.native
def test_headers_that_are_too_large_are_not_kept() -> None:
    pair = Pair()
    pair.open([*HEADERS, *[("x-long", "v" * 3_000)] * 50])
    pair.server.receive(without_end(pair.client.data_to_send()))
    assert pair.budget.held == 0


def test_a_client_whose_headers_hold_too_much_memory_before_they_end_is_disconnected() -> None:
    pair = Pair(budget=Budget(500_000))
    pair.open([*HEADERS, *[("x-long", f"{number}" + "v" * 3_000) for number in range(30)]])
    pair.send_raw(pair.client.data_to_send()[:-1])
    assert pair.server.closed
    assert pair.counts.closed_connections["limit"] == 1
    pair.server.release()
    assert pair.budget.held == 0


def test_a_client_whose_headers_stop_is_disconnected_though_another_call_ends_meanwhile() -> None:
    pair = Pair(bounds={"body_idle": 10})
    pair.call()
    sent = pair.client.data_to_send()
    pair.open()
    [call] = pair.server.receive(sent + without_end(pair.client.data_to_send()))
    pair.server.answer(call, b"")
    pair.check(1.0)
    pair.check(10.0)
    assert not pair.server.closed
    pair.check(11.0)
    assert pair.counts.closed_connections["stalled"] == 1


def test_a_busy_client_may_be_amid_headers_at_each_check() -> None:
    pair = Pair(bounds={"body_idle": 10})
    rest = b""
    for second in range(30):
        pair.open()
        begun = without_end(pair.client.data_to_send())
        pair.send_raw(rest + begun)
        rest = raw_frame(CONTINUATION, 2 * second + 1, flags=END_HEADERS)
        pair.check(float(second))
        assert not pair.server.closed
    pair.check(39.0)
    assert pair.counts.closed_connections["stalled"] == 1


def test_what_is_no_http2_ends_the_connection() -> None:
    pair = Pair(shake_hands=False)
    assert pair.server.receive(b"GET / HTTP/1.1\r\n\r\n") == []
    assert pair.server.closed
    assert not pair.server.output().startswith(b"HTTP")
    assert pair.counts.closed_connections["protocol_error"] == 1


def test_a_connection_that_breaks_http2_is_told_how() -> None:
    pair = Pair()
    pair.send_raw(raw_frame(EMPTY_DATA, 0, b"data on stream 0"))
    assert pair.server.closed
    assert pair.goaway_code == grpc_connection.PROTOCOL_ERROR
    assert pair.counts.closed_connections["protocol_error"] == 1


def test_a_client_that_says_goodbye_is_let_go() -> None:
    pair = Pair()
    pair.client.close_connection()
    pair.exchange()
    assert pair.server.closed
    assert not any(pair.counts.closed_connections.values())


@settings(deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("open"), st.integers(0, 1)),
            st.tuples(st.just("data"), st.integers(0, 4), st.integers(0, 40_000), st.booleans()),
            st.tuples(st.just("reset"), st.integers(0, 4)),
            st.tuples(st.just("check"), st.floats(0, 20)),
            st.tuples(st.just("drain")),
            st.tuples(st.just("finish"), st.integers(0, 4)),
        ),
        max_size=40,
    )
)
def test_whatever_happens_what_calls_hold_is_given_back(steps: list[tuple]) -> None:
    pair = Pair(budget=Budget(2_000_000), bounds={"body_idle": 10, "call": 30})
    streams: list[int] = []
    now_s = 0.0
    for step, *arguments in steps:
        try:
            match step, arguments:
                case "open", [streaming]:
                    streams.append(pair.open(STREAM_HEADERS if streaming else HEADERS))
                case "data", [index, size, end] if index < len(streams):
                    pair.client.send_data(streams[index], bytes(min(size, 16_384)), end_stream=end)
                case "reset", [index] if index < len(streams):
                    pair.client.reset_stream(streams[index])
                case "finish", [index] if index < len(streams):
                    pair.server.finish(streams[index], None)
                case "check", [seconds]:
                    now_s += seconds
                    pair.server.check(now_s)
                case "drain", []:
                    pair.server.drain()
        except (h2.exceptions.ProtocolError, KeyError):
            # The client would not send that, or has forgotten the stream.
            continue
        for event in pair.exchange():
            if isinstance(event, Call):
                pair.server.answer(event, event.message)
            elif isinstance(event, StreamData) and event.data:
                pair.server.acknowledge(event.stream_id, len(event.data))
    pair.exchange()
    assert 0 <= pair.budget.held <= pair.budget.size // 8
    pair.server.release()
    assert pair.budget.held == 0
