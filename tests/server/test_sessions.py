"""The two sessions of HTTP/2, native and portable: both keep their promises, and do the same for the same client."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import h2.connection
import h2.exceptions
import pytest
from hpack import Decoder, Encoder
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from server.raw_http2 import client_connection

from ratelimit_sidecar.server import portable_http2

try:
    from ratelimit_sidecar.server import native_http2
except ImportError:
    native_http2 = None  # type: ignore[assignment]

needs_native = pytest.mark.native
both = pytest.mark.parametrize(
    "module", [portable_http2, pytest.param(native_http2, marks=needs_native)], ids=["portable", "native"]
)

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
END_STREAM, END_HEADERS, PADDED = 0x1, 0x4, 0x8
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
STREAM_WINDOW = 70_000
CONNECTION_WINDOW = 100_000


def session_of(module: ModuleType, max_header_bytes: int = 4_096) -> Any:
    return module.Session(
        max_streams=8,
        stream_window=STREAM_WINDOW,
        connection_window=CONNECTION_WINDOW,
        max_header_bytes=max_header_bytes,
        resets=(100, 100),
    )


def raw_frame(kind: int, stream_id: int = 0, payload: bytes = b"", flags: int = 0) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream_id.to_bytes(4, "big") + payload


def frames_of(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Kind, flags, stream and payload of each."""
    while data:
        end = 9 + int.from_bytes(data[:3], "big")
        yield data[3], data[4], int.from_bytes(data[5:9], "big"), data[9:end]
        data = data[end:]


def headers_for(path: str, *more: tuple[str, str]) -> list[tuple[str, str]]:
    return [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "test"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
        *more,
    ]


def opening(stream_id: int, path: str = "/wait", *more: tuple[str, str], end: bool = False) -> bytes:
    """HEADERS that refer to nothing before them."""
    block = Encoder().encode(headers_for(path, *more))
    return raw_frame(HEADERS, stream_id, block, END_HEADERS | END_STREAM * end)


def with_client(module: ModuleType, max_header_bytes: int = 4_096) -> Any:
    session = session_of(module, max_header_bytes)
    session.output()
    session.receive(PREFACE + raw_frame(SETTINGS))
    session.output()
    return session


# What each does with a request depends on its path alone, so that both sessions are treated alike.
PATHS = ["/wait", "/refuse", "/text", "/stream", "/never", "/ignore"]


@dataclass
class Served:
    """What a server made of a client's bytes."""

    requests: list[list[tuple]] = field(default_factory=list)
    """A list for each read: what came out."""
    bodies: dict[int, bytes] = field(default_factory=dict)
    headers: dict[int, list] = field(default_factory=dict)
    """Sent on a stream: each list of headers, with its flag for the end of the stream."""
    data: dict[int, bytes] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)
    resets: dict[int, int] = field(default_factory=dict)
    pings: list[tuple[int, bytes]] = field(default_factory=list)
    goaways: list[tuple[int, int]] = field(default_factory=list)
    is_over: bool = False
    broken: bool = False
    granted: int = field(default=0, compare=False)
    """Of the connection's window. The portable session loses some of it."""


class Server:
    """Runs a session, and answers."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.session = session_of(module)
        self.served = Served()
        self._decoder = Decoder()
        self._open: dict[int, Any] = {}
        self._followed_by_reset: list[Any] = []
        self.send()
        self.served.granted = CONNECTION_WINDOW

    def read(self, data: bytes) -> None:
        served = self.served
        if served.broken or served.is_over:
            return
        try:
            requests = self.session.receive(data)
        except self.module.BrokenSession:
            served.broken = True
            return
        came = []
        for request in requests:
            if request.stream_id not in self._open and not request.lost:
                request.is_wanted = request.path in (b"/wait", b"/stream", b"/never")
                self._open[request.stream_id] = request
            came.append(self._take(request))
        served.requests.append(came)
        self.send()

    def _take(self, request: Any) -> tuple:
        session, served, stream_id = self.session, self.served, request.stream_id
        body = request.take_body() if request.is_wanted and request.path != b"/wait" else b""
        seen = (
            stream_id,
            request.path,
            tuple(request),
            request.header_bytes,
            request.is_plain_call,
            request.ended,
            request.lost,
            body,
            request.may_be_sampled,
        )
        served.bodies[stream_id] = served.bodies.get(stream_id, b"") + body
        match request.path:
            case _ if request.lost:
                pass
            case b"/wait":
                if request.ended:
                    served.bodies[stream_id] = body = request.take_body()
                    session.consume(request, len(body))
                    session.answer(request, body[:1_000])
            case b"/refuse":
                session.respond(request, ((b":status", b"200"), (b"grpc-status", b"5")))
                self._followed_by_reset.append(request)
            case b"/stream":
                if session.begin(request) or request.is_answered:
                    session.send(request, body)
                    session.consume(request, len(body))
                    if request.ended:
                        session.finish(request, ((b"grpc-status", b"0"), (b"x-more", b"1")))
            case b"/never" | b"/ignore":
                pass
            case _:
                session.respond(request, ((b":status", b"404"),), b"There is nothing.")
                self._followed_by_reset.append(request)
        return seen

    def send(self) -> None:
        served, session = self.served, self.session
        try:
            data = session.output()
            for request in self._followed_by_reset:
                if not request.ended:
                    session.reset(request, 0)
            self._followed_by_reset.clear()
            data += session.output()
        except self.module.BrokenSession:
            served.broken = True
            return
        late = [(request.stream_id, request.ended, request.lost) for request in session.late()]
        if late:
            served.requests.append(late)
        served.is_over = session.is_over
        for kind, flags, stream_id, payload in frames_of(data):
            if kind == HEADERS:
                served.headers.setdefault(stream_id, []).append(self._decoder.decode(payload, raw=True))
            elif kind == DATA:
                served.data[stream_id] = served.data.get(stream_id, b"") + payload
            elif kind == RST_STREAM:
                served.resets[stream_id] = int.from_bytes(payload, "big")
            elif kind == PING:
                served.pings.append((flags, payload))
            elif kind == GOAWAY:
                last, code = int.from_bytes(payload[:4], "big"), int.from_bytes(payload[4:8], "big")
                served.goaways.append((last, code))
                assert session.sent_goaway_code == code
            elif kind == WINDOW_UPDATE and stream_id == 0:
                served.granted += int.from_bytes(payload, "big")
            if kind in (HEADERS, DATA) and flags & END_STREAM:
                served.ended.add(stream_id)

    def reset_all(self) -> None:
        """End what is open, as a front end does after a while."""
        for request in self._open.values():
            request.is_wanted = False
            self.session.reset(request, 8)
        self.send()


TRICKY_HEADERS = [
    [("content-length", "5")],
    [("content-length", "40000")],
    [("connection", "close")],
    [("X-Upper", "1")],
    [("x-line", "a\nb")],
    [("tracestate", " a=b")],
    [("tracestate", "a=b\t"), ("x-after", "1")],
    [("te", "trailers ")],
    [("priority", " u=1")],
    [("content-length", " 5")],
    [("upgrade", " x")],
    [("x-blank", " "), (":path", "/late")],
    [(":late", "1")],
    [("x-long", "v" * 1_000)],
    [("cookie", "a=b"), ("cookie", "c=d")],
]

GOOD_VALUES = ["", "a", "a" * 700, "b b" * 700, "c" * 3_000]
BAD_VALUES = [" ", "a=b ", "\t\x01", "b " * 700, "d" * 2_000 + " "]

RAW_PAYLOADS = [
    b"",
    b"\0" * 4,
    b"\0" * 5,
    b"\0\0\0\x08",
    b"\x7f\xff\xff\xff",
    b"\0\0\0\0\0\0\0\0",
    b"\0\x04\0\0\0\0",
    b"\0\x04\x7f\xff\xff\xff",
    b"\x03abc",
    b"\x05ab",
    Encoder().encode(headers_for("/stream")),
    Encoder().encode([("x-trailer", "1")]),
    Encoder().encode(headers_for("/wait"))[:9],
]

streams = st.integers(0, 4)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("open"), st.sampled_from(PATHS), st.booleans()),
        st.tuples(st.just("open_tricky"), st.sampled_from(PATHS), st.sampled_from(TRICKY_HEADERS)),
        st.tuples(
            st.just("data"), streams, st.sampled_from([0, 1, 5, 300, 16_000]), st.booleans(), st.sampled_from([0, 9])
        ),
        st.tuples(st.just("trailers"), streams),
        st.tuples(st.just("reset"), streams),
        st.tuples(st.just("ping")),
        st.tuples(st.just("settings"), st.sampled_from([0, 10, 65_535, 2**31 - 1])),
        st.tuples(st.just("window"), streams, st.sampled_from([1, 1_000, 2**30])),
        st.tuples(
            st.just("raw"),
            st.sampled_from(range(11)),
            st.sampled_from([0, 1, 3, 5, 2, 9, 2**31 - 1]),
            st.sampled_from(RAW_PAYLOADS),
            st.sampled_from([0, 1, 4, 5, 8, 9, 0x20, 0x2C]),
        ),
    ),
    max_size=25,
)


GOOD_BEGINNINGS = [b"", *RAW_PAYLOADS[-3:]]


def begins_with_bad_headers(step: tuple) -> bool:
    """A part of a header block, not its last, that is no HPACK: only the native session sees that at once."""
    if step[0] != "raw":
        return False
    _, kind, _, payload, flags = step
    is_part = kind in (HEADERS, CONTINUATION) and not flags & END_HEADERS
    return is_part and (payload not in GOOD_BEGINNINGS or bool(flags & 0x28))


def sent_by_client(steps: list[tuple]) -> list[bytes]:
    """What a client sends for these, a piece for each of whole frames."""
    client = client_connection()
    client.initiate_connection()
    client.receive_data(session_of(portable_http2).output())
    pieces = [client.data_to_send()]
    opened: list[int] = []
    for step, *arguments in steps:
        try:
            _take_step(client, opened, step, arguments)
        except (h2.exceptions.ProtocolError, LookupError):
            # The client would not send that.
            continue
        if step == "raw":
            kind, stream_id, payload, flags = arguments
            pieces.append(raw_frame(kind, stream_id, payload, flags))
        pieces.append(client.data_to_send())
    return [piece for piece in pieces if piece]


def _take_step(client: h2.connection.H2Connection, opened: list[int], step: str, arguments: list) -> None:
    match step, arguments:
        case "open", [path, end]:
            opened.append(client.get_next_available_stream_id())
            client.send_headers(opened[-1], headers_for(path), end_stream=end)
        case "open_tricky", [path, more]:
            opened.append(client.get_next_available_stream_id())
            client.send_headers(opened[-1], headers_for(path, *more))
        case "data", [index, size, end, padding]:
            client.send_data(opened[index], bytes(size), end_stream=end, pad_length=padding or None)
        case "trailers", [index]:
            client.send_headers(opened[index], [("x-trailer", "1")], end_stream=True)
        case "reset", [index]:
            client.reset_stream(opened[index])
        case "ping", []:
            client.ping(b"12345678")
        case "settings", [window]:
            client.update_settings({4: window})
        case "window", [index, count]:
            client.increment_flow_control_window(count, opened[index] if index else None)


def served_by(module: ModuleType, reads: list[bytes]) -> Server:
    server = Server(module)
    for data in reads:
        server.read(data)
    return server


def one_frame_a_read(pieces: list[bytes]) -> list[bytes]:
    """Cut before each frame."""
    reads = [PREFACE]
    for data in [pieces[0].removeprefix(PREFACE), *pieces[1:]]:
        reads += [raw_frame(kind, stream_id, payload, flags) for kind, flags, stream_id, payload in frames_of(data)]
    return reads


# Both alike


@needs_native
@settings(deadline=None, max_examples=300)
@given(steps)
@example([("open", "/wait", False), ("settings", 0), ("data", 0, 0, True, 0), ("reset", 0)])
def test_both_sessions_do_the_same_for_the_same_client(steps: list[tuple]) -> None:
    assume(not any(map(begins_with_bad_headers, steps)))
    reads = sent_by_client(steps)

    native, portable = served_by(native_http2, reads).served, served_by(portable_http2, reads).served

    assert native == portable


@both
@settings(deadline=None)
@given(steps, st.integers(1, 40))
@example([("raw", 1, 1, bytes(4), 4)], 1)
def test_where_reads_are_cut_changes_nothing(module: ModuleType, steps: list[tuple], size: int) -> None:
    reads = one_frame_a_read(sent_by_client(steps))
    pieces = [data[start : start + size] for data in reads for start in range(0, len(data), size)]

    whole, cut = served_by(module, reads).served, served_by(module, pieces).served

    assert (cut.headers.keys(), cut.ended) == (whole.headers.keys(), whole.ended)
    # With the connection all streams end; some are reset before, if the fault is seen in the middle of a frame.
    assert whole.is_over or cut.resets == whole.resets
    assert (cut.pings, cut.goaways, cut.is_over) == (whole.pings, whole.goaways, whole.is_over)
    answered = whole.ended - whole.resets.keys()
    assert all(cut.bodies[stream_id] == whole.bodies[stream_id] for stream_id in answered)


@both
@pytest.mark.parametrize(
    ("header", "expected"),
    [
        *((("traceparent", f"00-{'a' * 32}-{'b' * 16}-0{digit:x}"), digit % 2 == 1) for digit in range(16)),
        (("traceparent", f"00-{'a' * 32}-{'b' * 16}-0"), False),
        (("traceparent", ""), False),
        (("b3", "0"), True),
        (("x-b3-traceid", "a" * 32), True),
        (("x-b3-sampled", "1"), False),
        (("tracestate", "a=b"), False),
    ],
)
def test_a_request_may_be_sampled_when_a_header_says_so(
    module: ModuleType, header: tuple[str, str], expected: bool
) -> None:
    session = session_of(module)
    [request] = session.receive(PREFACE + raw_frame(SETTINGS) + opening(1, "/a/b", header))
    assert request.may_be_sampled is expected


@both
def test_what_is_no_http2_breaks_a_session_for_good(module: ModuleType) -> None:
    session = session_of(module)

    for _ in range(2):
        with pytest.raises(module.BrokenSession) as broken:
            session.receive(b"GET / HTTP/1.1\r\n\r\n")
        assert broken.value.code == 1
    assert session.is_over


@both
def test_a_broken_session_takes_calls_and_does_nothing(module: ModuleType) -> None:
    session = with_client(module)
    [request, streaming] = session.receive(opening(1) + opening(3))
    session.begin(streaming)
    with pytest.raises(module.BrokenSession):
        # More than may wait for their acknowledgements to be sent.
        session.receive(raw_frame(SETTINGS) * 2_000)

    session.answer(request, b"hello")
    session.send(streaming, b"hello")
    session.finish(streaming, module.OK_TRAILERS)
    session.reset(streaming, 0)
    session.ping(b"12345678")
    session.terminate(0)
    with pytest.raises(module.BrokenSession):
        session.output()


@both
def test_after_its_end_a_session_answers_no_calls(module: ModuleType) -> None:
    session = with_client(module)
    [request] = session.receive(opening(1))
    session.terminate(0)
    session.answer(request, b"hello")

    [goaway] = frames_of(session.output())

    assert goaway[0] == GOAWAY
    assert session.is_over
    assert session.output() == b""


@both
def test_what_was_returned_does_not_change_later(module: ModuleType) -> None:
    session = with_client(module)
    nothing, late = session.receive(raw_frame(PING, payload=b"12345678")), session.late()

    session.receive(opening(1))

    assert (nothing, late) == ([], [])


@both
def test_answers_are_unsent_while_the_client_grants_no_room_and_gone_with_their_stream(module: ModuleType) -> None:
    session = with_client(module)
    session.receive(raw_frame(SETTINGS, payload=b"\0\x04" + bytes(4)))
    [unary, streaming, text] = session.receive(opening(1) + opening(3) + opening(5))
    session.answer(unary, b"hello")
    session.begin(streaming)
    session.send(streaming, b"one")
    session.send(streaming, b"three")
    session.respond(text, ((b":status", b"404"),), b"text")
    session.output()
    unsent = session.unsent, session.unsent_of(unary), session.unsent_of(streaming), session.unsent_of(text)

    session.receive(raw_frame(WINDOW_UPDATE, 3, b"\0\0\0\x0a"))
    session.output()
    in_part = session.unsent_of(streaming)
    for stream_id in (1, 3, 5):
        session.receive(raw_frame(RST_STREAM, stream_id, bytes(4)))

    assert unsent == (10 + 18 + 4, 10, 18, 4)
    assert in_part == 8
    assert session.unsent == 0


# Flow control


def window_lost_by(server: Server, reads: list[bytes]) -> int | None:
    """Bytes of the connection's window that are not given back to an honest client, who sends large messages now."""
    frames = [frame for data in reads for frame in frames_of(data.removeprefix(PREFACE))]
    stream_ids = [frame[2] for frame in frames]
    # What follows headers that have not ended must be more of them.
    is_amid_headers = frames[-1][0] in {HEADERS, CONTINUATION} and not frames[-1][1] & END_HEADERS
    if server.served.is_over or max(stream_ids) > 2**30 or is_amid_headers:
        return None
    taken = sum(len(frame[3]) for frame in frames if frame[0] == DATA)
    granted = server.served.granted
    for stream_id in itertools.count((max(stream_ids) + 1) | 1, 2):
        server.read(opening(stream_id))
        for flags in (0, 0, END_STREAM):
            server.read(raw_frame(DATA, stream_id, bytes(16_000), flags))
            taken += 16_000
        assert not server.served.is_over
        if server.served.granted > granted:
            return CONNECTION_WINDOW + taken - server.served.granted
    raise AssertionError("unreachable")


@needs_native
@settings(deadline=None)
@given(steps, st.integers(1, 20_000))
@example([("raw", HEADERS, 1, b"", 0)], 1)
def test_all_of_the_window_is_given_back(steps: list[tuple], size: int) -> None:
    reads = sent_by_client(steps)
    server = Server(native_http2)
    for data in reads:
        for start in range(0, len(data), size):
            server.read(data[start : start + size])
    server.reset_all()

    assert window_lost_by(server, reads) in (0, None)


@needs_native
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("padding", [0, 100])
def test_a_stream_that_ends_within_a_frame_costs_no_window(path: str, padding: int) -> None:
    server = Server(native_http2)
    data = raw_frame(DATA, 1, bytes([padding]) + bytes(9_000 + padding), PADDED)
    reads = [PREFACE + raw_frame(SETTINGS), opening(1, path), data]
    for read in (*reads[:2], data[:5_000]):
        server.read(read)
    server.reset_all()
    server.read(data[5_000:])

    assert window_lost_by(server, reads) == 0


@needs_native
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("length", ["10", "99999"])
def test_a_body_of_another_length_than_was_said_costs_no_window(path: str, length: str) -> None:
    server = Server(native_http2)
    opened = opening(1, path, ("content-length", length))
    reads = [PREFACE + raw_frame(SETTINGS), opened, raw_frame(DATA, 1, bytes(9_000), END_STREAM)]
    for read in reads:
        server.read(read)
    server.reset_all()

    assert window_lost_by(server, reads) == 0


@both
def test_what_somebody_wants_is_not_given_back_before_it_is_consumed(module: ModuleType) -> None:
    session = with_client(module)
    [request] = session.receive(opening(1))
    request.is_wanted = True
    for flags in (0, 0, 0, END_STREAM):
        session.receive(raw_frame(DATA, 1, bytes(15_000), flags))
    before = list(frames_of(session.output()))

    session.consume(request, 60_000)

    assert before == []
    assert (WINDOW_UPDATE, 0, 0, (60_000).to_bytes(4, "big")) in list(frames_of(session.output()))


@both
@pytest.mark.parametrize("value", ["a=b ", " a=b", "\t", "a\x01b", "a\x7fb"])
def test_a_header_that_http_does_not_allow_is_left_out(module: ModuleType, value: str) -> None:
    session = with_client(module)

    [request] = session.receive(opening(1, "/wait", ("tracestate", value), ("x-after", "1"), end=True))

    assert request.is_plain_call
    assert request.path == b"/wait"
    assert request.get(b"tracestate") is None
    assert request.get(b"x-after") == b"1"
    assert not list(frames_of(session.output()))


@both
@settings(deadline=None, max_examples=300)
@given(
    st.lists(
        st.lists(
            st.tuples(st.sampled_from(["x-a", "x-b", "tracestate"]), st.sampled_from(GOOD_VALUES + BAD_VALUES)),
            max_size=4,
        )
    ),
    st.lists(st.booleans(), min_size=1),
)
def test_whatever_is_left_out_later_headers_are_as_they_were_sent(
    module: ModuleType, calls: list[list[tuple[str, str]]], are_huffman: list[bool]
) -> None:
    """Each may refer to those before it, in calls before it, too."""
    session = with_client(module, 131_072)
    encoder = Encoder()
    for number, (more, is_huffman) in enumerate(zip(calls, itertools.cycle(are_huffman), strict=False)):
        block = encoder.encode(headers_for("/wait", *more), huffman=is_huffman)
        [request] = session.receive(raw_frame(HEADERS, 2 * number + 1, block, END_HEADERS))

        sent = [field for field in headers_for("/wait", *more) if field[1] not in BAD_VALUES]
        fields = [(name.decode(), value.decode()) for name, value in request.headers()]
        if module is portable_http2:
            # It reads no long ones, and keeps them if they are not in Huffman code.
            sent, fields = ([field for field in each if len(field[1]) < 1_000] for each in (sent, fields))
        assert fields == sent
        session.reset(request, 8)
        session.output()


@both
def test_a_value_that_is_too_long_to_be_read_is_left_out_or_kept(module: ModuleType) -> None:
    session = with_client(module, 131_072)
    encoder = Encoder()
    blocks = [encoder.encode(headers_for("/wait", ("tracestate", "a" * 30_000), ("x-b", "b"))) for _ in range(2)]
    sent = b""
    for stream_id, block in zip((1, 3), blocks, strict=True):
        sent += raw_frame(HEADERS, stream_id, block[:16_000]) + raw_frame(
            CONTINUATION, stream_id, block[16_000:], END_HEADERS
        )

    requests = session.receive(sent)
    while session.has_more:
        requests += session.receive(b"")

    assert [request.get(b"x-b") for request in requests] == [b"b", b"b"]
    assert {request.get(b"tracestate") for request in requests} <= {None, b"a" * 30_000}


def test_a_header_block_of_very_many_fields_that_say_nothing_ends_the_portable_connection() -> None:
    session = with_client(portable_http2)

    with pytest.raises(portable_http2.BrokenSession):
        session.receive(raw_frame(HEADERS, 1, b"\x20" * 10_000, END_HEADERS))


@both
def test_a_header_for_which_nghttp2_would_end_the_connection_does_not(module: ModuleType) -> None:
    """Envoy's SkyWalking tracer sends the path of 60 KiB that a client may choose, in base64."""
    session = with_client(module, 131_072)
    block = Encoder().encode(headers_for("/wait", ("sw8", "~{" * 41_000)), huffman=False)
    parts = [block[start : start + 16_384] for start in range(0, len(block), 16_384)]
    frames = [raw_frame(HEADERS, 1, parts[0], END_STREAM), *[raw_frame(CONTINUATION, 1, part) for part in parts[1:-1]]]

    session.receive(b"".join(frames))
    requests = session.receive(raw_frame(CONTINUATION, 1, parts[-1], END_HEADERS))
    while session.has_more:
        requests += session.receive(b"")

    assert requests[0].is_plain_call
    assert not session.is_over


# What only the native one needs to be asked


@needs_native
@pytest.mark.parametrize(
    "mistake",
    [
        lambda session, request: session.answer(None, b""),
        lambda session, request: session.answer(request, None),
        lambda session, request: session.begin(None),
        lambda session, request: session.send(request, None),
        lambda session, request: session.finish(request, None),
        lambda session, request: session.finish(request, ((b"a", None),)),
        lambda session, request: session.finish(request, ((b"a",),)),
        lambda session, request: session.respond(request, ((b"a", "text"),)),
        lambda session, request: session.consume(None, 1),
        lambda session, request: session.reset(None, 1),
        lambda session, request: session.ping(b"short"),
        lambda session, request: session.receive("text"),
        lambda session, request: request.get(None),
        lambda session, request: type(session)(),
    ],
)
def test_a_mistake_raises_and_breaks_nothing(mistake: Any) -> None:
    session = with_client(native_http2)
    [request, other] = session.receive(opening(1, end=True) + opening(3, end=True))

    with pytest.raises((TypeError, ValueError)):
        mistake(session, request)

    session.answer(other, b"hello")
    assert (DATA, 0, 3, b"\0\0\0\0\x05hello") in list(frames_of(session.output()))


@needs_native
def test_a_request_outlives_its_session() -> None:
    [request] = with_client(native_http2).receive(opening(1) + raw_frame(DATA, 1, b"body"))

    assert request.get(b":path") == b"/wait"
    assert request.take_body() == b"body"
    assert not gc.is_tracked(session_of(native_http2))
