"""One input of the fuzzer: a client's bytes, fed to a server's connection, and what must hold whatever they are.

An input begins with a byte of `Flags` and two bytes of a seed. The seed chooses where the client's bytes are cut into
reads, how long the reads are apart, and what the server does in between; the rest is sent by the client. So a whole
run follows from its input.
"""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field, replace
from enum import IntFlag
from typing import Final

from hpack import Encoder

from ratelimit_sidecar.server.bounds import DEFAULT_BOUNDS, MAX_HEADER_BYTES, MAX_MESSAGE_BYTES, MAX_STREAMED_BYTES
from ratelimit_sidecar.server.budget import Budget
from ratelimit_sidecar.server.events import Call, Event, StreamCancelled, StreamData, StreamStarted
from ratelimit_sidecar.server.framing import MAX_BODY_BYTES, frame
from ratelimit_sidecar.server.front_end_counts import FrontEndCounts
from ratelimit_sidecar.server.grpc_connection import Connection
from ratelimit_sidecar.server.http2_session import IS_NATIVE
from ratelimit_sidecar.server.rpc import Code, Metadata, RpcError, StreamingMethod

HEADER_BYTES: Final = 3
"""Flags and seed, before what the client sends."""

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

BUDGET_BYTES: Final = 2 * 1_024 * 1_024
"""So little that inputs reach it."""

LIMITS: Final = replace(DEFAULT_BOUNDS, streams=32, held_bytes=BUDGET_BYTES)

FRAME_HEADER_BYTES: Final = 9

OUTPUT_BYTES_A_FRAME: Final = 4_096
"""At most, for each frame that was received: a status text of 1,024 characters, percent-encoded, or what a handler
answers, beside the message itself."""


class Flags(IntFlag):
    """What a run is like, beside its bytes."""

    RAW_PREFACE = 1
    """The client's preface is among its bytes; otherwise it is sent before them."""
    SMALL_READS = 2
    """Reads of some bytes; otherwise some hundreds."""
    SLOW = 4
    """Time passes between reads, and limits of time are checked."""
    LAZY_OUTPUT = 8
    """Output is taken now and then, as while a client does not read."""
    DRAIN = 16
    """The connection is drained at some time."""
    TERMINATE = 32
    """The connection is terminated at some time."""
    REFUSE = 64
    """Handlers end half of the calls with a status."""
    STREAMING_TALKS = 128
    """Streaming calls send messages, and end by themselves."""


class BrokenPromise(AssertionError):
    """The connection did what it must not do."""


async def _never_run(_requests: AsyncIterator[bytes], _headers: Metadata) -> AsyncGenerator[bytes, None]:
    yield b""


HANDLERS: Final = {
    b"/test.Echo/Echo": lambda message, _headers: message,
    b"/envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit": lambda message, _headers: message,
    b"/grpc.health.v1.Health/Check": lambda _message, _headers: b"\x08\x01",
    b"/grpc.health.v1.Health/Watch": StreamingMethod(_never_run),
    b"/test.Echo/Stream": StreamingMethod(_never_run),
}


@dataclass(slots=True)
class FrameReader:
    """Cuts a direction's bytes into frames, as far as their headers say."""

    rest: bytearray = field(default_factory=bytearray)
    frames: int = 0

    def read(self, data: bytes) -> list[tuple[int, int, int, bytes]]:
        """Type, flags, stream and payload of each frame that is complete now."""
        self.rest += data
        found = []
        while len(self.rest) >= FRAME_HEADER_BYTES:
            end = FRAME_HEADER_BYTES + int.from_bytes(self.rest[:3], "big")
            if len(self.rest) < end:
                break
            stream_id = int.from_bytes(self.rest[5:9], "big") & 0x7FFFFFFF
            found.append((self.rest[3], self.rest[4], stream_id, bytes(self.rest[FRAME_HEADER_BYTES:end])))
            del self.rest[:end]
        self.frames += len(found)
        return found


DATA: Final = 0x0
HEADERS: Final = 0x1
RST_STREAM: Final = 0x3
SETTINGS: Final = 0x4
PING: Final = 0x6
GOAWAY: Final = 0x7
WINDOW_UPDATE: Final = 0x8
CONTINUATION: Final = 0x9
END_STREAM: Final = 0x1
END_HEADERS: Final = 0x4

LIFE_PING: Final = b"anyone??"

HONEST_HEADERS: Final = Encoder().encode(
    [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", "/grpc.health.v1.Health/Check"),
        (":authority", "test"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ]
)
"""Of a call. It refers to nothing that was sent before."""

HONEST_CALLS: Final = 10
"""With so many messages of the largest size a server has to give back at least half of its window, which is when it
says so."""

HIGHEST_STREAM: Final = 2**31 - 1 - 2 * HONEST_CALLS
MAX_FRAME_BYTES: Final = 16_384


class Run:
    """A connection, who drives it, and what was seen of it."""

    def __init__(self, flags: Flags, seed: int) -> None:
        self.flags = flags
        self.random = random.Random(seed)
        self.budget = Budget(BUDGET_BYTES)
        self.now_s = 1_000.0
        self.connection = Connection(HANDLERS, LIMITS, self.budget, FrontEndCounts(), now_s=self.now_s)
        self.sent = FrameReader()
        self.sent_bytes = 0
        self.goaways = 0
        self.granted_bytes = 0
        """Of the connection's window."""
        self.pings_answered = 0
        self.received = FrameReader()
        self.is_between_frames = True
        self.received_bytes = 0
        self.data_bytes = 0
        """Of the connection's window, taken by the client."""
        self.highest_stream = 0
        self.messages_bytes = 0
        """Of the answers that handlers gave."""
        self.seen_calls: set[int] = set()
        self.streaming: dict[int, bool] = {}
        """Streaming calls that are open; whether the client has ended its side."""
        self.over: set[int] = set()
        """Streams on which the server has ended its side."""
        self.answered: set[int] = set()
        """Streams on which a response has begun."""

    def play(self, data: bytes) -> None:
        """Feed all of it, then end.

        Raises:
            BrokenPromise
        """
        self.take_output()
        self.granted_bytes = 0
        if Flags.RAW_PREFACE not in self.flags:
            self.receive(PREFACE)
        at = 0
        while at < len(data) and not self.connection.closed:
            size = self.random.randint(1, 24) if Flags.SMALL_READS in self.flags else self.random.randint(1, 4_096)
            self.receive(data[at : at + size])
            at += size
            self.between_reads()
        self.end()

    def receive(self, data: bytes) -> None:
        self.received_bytes += len(data)
        for kind, flags, stream_id, payload in self.received.read(data if data != PREFACE else b""):
            self.highest_stream = max(self.highest_stream, stream_id)
            self.data_bytes += len(payload) if kind == DATA else 0
            self.is_between_frames = kind not in (HEADERS, CONTINUATION) or bool(flags & END_HEADERS)
        events = self.connection.receive(data)
        while self.connection.has_more:
            events += self.connection.receive(b"")
        for event in events:
            self.take(event)
        if Flags.LAZY_OUTPUT not in self.flags or self.random.random() < 0.1:
            self.take_output()
        self.check_held()

    def take(self, event: Event) -> None:
        stream_id = event.request.stream_id if isinstance(event, Call) else event.stream_id
        if isinstance(event, Call):
            _promise(stream_id not in self.seen_calls, f"the call on stream {stream_id} came out twice")
            _promise(len(event.message) <= MAX_MESSAGE_BYTES, f"a message of {len(event.message)} bytes came out")
            self.seen_calls.add(stream_id)
            if Flags.REFUSE in self.flags and self.random.random() < 0.5:
                self.connection.refuse(event, RpcError(Code.INTERNAL, "refusé: 100 %\r\n"))
            else:
                message = event.handler(event.message, event.request)
                self.messages_bytes += len(message)
                self.connection.answer(event, message)
        elif isinstance(event, StreamStarted):
            _promise(stream_id not in self.seen_calls, f"the streaming call on stream {stream_id} came out twice")
            self.seen_calls.add(stream_id)
            self.streaming[stream_id] = False
        elif isinstance(event, StreamData):
            _promise(stream_id in self.seen_calls, f"a part came out for stream {stream_id}, which was not opened")
            if stream_id in self.streaming:
                _promise(not self.streaming[stream_id], f"a part came out on stream {stream_id} after its end")
                self.streaming[stream_id] = event.ended
            if event.data and self.random.random() < 0.8:
                self.connection.acknowledge(stream_id, len(event.data))
        elif isinstance(event, StreamCancelled):
            _promise(stream_id in self.seen_calls, f"stream {stream_id} was lost, and not opened")
            self.streaming.pop(stream_id, None)

    def between_reads(self) -> None:
        choice = self.random.random()
        if Flags.SLOW in self.flags:
            self.now_s += choice * 3
            self.connection.check(self.now_s)
        if Flags.STREAMING_TALKS in self.flags:
            for stream_id in list(self.streaming):
                if choice < 0.4:
                    self.messages_bytes += 100
                    self.connection.send(stream_id, b"m" * 100)
                elif choice < 0.5:
                    del self.streaming[stream_id]
                    error = None if choice < 0.45 else RpcError(Code.UNAVAILABLE, "over")
                    self.connection.finish(stream_id, error)
        if Flags.DRAIN in self.flags and choice < 0.1:
            self.connection.drain()
        if Flags.TERMINATE in self.flags and choice > 0.98:
            self.connection.terminate(0, "drain")

    def take_output(self) -> None:
        """Look at what the client gets: whole frames, one answer a stream, and nothing after its end."""
        data = self.connection.output()
        for event in self.connection.events_of_output():
            self.take(event)
        self.sent_bytes += len(data)
        for kind, flags, stream_id, payload in self.sent.read(data):
            if kind in (DATA, HEADERS):
                _promise(stream_id not in self.over, f"a frame of type {kind} was sent on stream {stream_id}, ended")
                _promise(kind == HEADERS or stream_id in self.answered, f"stream {stream_id} has DATA before HEADERS")
                self.answered.add(stream_id)
                if flags & END_STREAM:
                    self.over.add(stream_id)
            elif kind == RST_STREAM:
                self.over.add(stream_id)
            else:
                self.goaways += kind == GOAWAY
                if kind == WINDOW_UPDATE and stream_id == 0:
                    self.granted_bytes += int.from_bytes(payload, "big")
                self.pings_answered += kind == PING and payload == LIFE_PING
                _promise(kind in (SETTINGS, PING, GOAWAY, WINDOW_UPDATE), f"a frame of unexpected type {kind} was sent")
        _promise(not self.sent.rest, "output ends in the middle of a frame")
        bound = 1_024 + self.messages_bytes + OUTPUT_BYTES_A_FRAME * (1 + self.received_bytes // FRAME_HEADER_BYTES)
        _promise(self.sent_bytes <= bound, f"{self.sent_bytes} bytes were sent for {self.received_bytes}")

    def check_held(self) -> None:
        held = self.budget.held
        # What one read brings is weighed after it.
        bound = BUDGET_BYTES // 8 + 2 * (MAX_BODY_BYTES + MAX_HEADER_BYTES)
        _promise(0 <= held <= bound, f"unfinished calls hold {held} bytes")

    def end(self) -> None:
        """All limits of time pass; then nothing may be left, and a connection that lives answers."""
        self.take_output()
        self.let_time_pass()
        for stream_id in list(self.streaming):
            self.connection.finish(stream_id, None)
        self.streaming.clear()
        self.take_output()
        self.let_time_pass()
        if not self.connection.closed:
            _promise(self.budget.held == 0, f"{self.budget.held} bytes are held, and no call is open")
            self.look_for_life()
            self.look_for_window()
        self.connection.release()
        _promise(self.budget.held == 0, f"{self.budget.held} bytes are held after the connection's end")
        if self.connection.closed:
            _promise(self.connection.receive(PREFACE) == [], "something came out after the end")
            _promise(self.connection.output() == b"", "something is sent after the end")

    def let_time_pass(self) -> None:
        for _ in range(3):
            self.now_s += LIMITS.call + LIMITS.stalled
            self.connection.check(self.now_s)
            for event in self.connection.receive(b""):
                self.take(event)
            self.take_output()

    @property
    def expects_a_frame(self) -> bool:
        """Whether what was sent so far ends where another frame may begin."""
        return Flags.RAW_PREFACE not in self.flags and not self.received.rest and self.is_between_frames

    def look_for_life(self) -> None:
        """A connection that is not closed answers a PING."""
        if not self.expects_a_frame:
            return
        self.receive(b"\0\0\x08\x06\0\0\0\0\0" + LIFE_PING)
        self.take_output()
        _promise(self.connection.closed or self.pings_answered > 0, "a connection that lives did not answer a PING")

    def look_for_window(self) -> None:
        """An honest client can send large messages, and gets back all of the window, also what others have used."""
        if not self.data_bytes or not self.expects_a_frame or self.goaways or self.highest_stream > HIGHEST_STREAM:
            return
        body = frame(bytes(MAX_STREAMED_BYTES))
        stream_id = self.highest_stream + 1 | 1
        granted = self.granted_bytes
        lost: int | None = None
        for _ in range(HONEST_CALLS):
            self.receive(_frame(HEADERS, END_HEADERS, stream_id, HONEST_HEADERS))
            for start in range(0, len(body), MAX_FRAME_BYTES):
                part = body[start : start + MAX_FRAME_BYTES]
                self.receive(_frame(DATA, END_STREAM * (start + len(part) == len(body)), stream_id, part))
                self.take_output()
                if lost is None and self.granted_bytes > granted:
                    # What comes after it is granted with the next half of a window.
                    lost = self.data_bytes - self.granted_bytes
            if self.connection.closed:
                # An honest client can be the one that is taken for a flood.
                return
            _promise(stream_id in self.seen_calls, "an honest client's call did not come out")
            if lost is not None:
                _promise(lost == 0 or not IS_NATIVE, f"{lost} bytes of the window are lost")
                return
            stream_id += 2
        _promise(not IS_NATIVE, "no window was given back")


def _frame(kind: int, flags: int, stream_id: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream_id.to_bytes(4, "big") + payload


def _promise(is_kept: bool, otherwise: str) -> None:
    if not is_kept:
        raise BrokenPromise(otherwise)


def play(data: bytes) -> Run:
    """Play an input of the fuzzer.

    Raises:
        BrokenPromise: what must hold did not.
    """
    header = data[:HEADER_BYTES].ljust(HEADER_BYTES, b"\0")
    run = Run(Flags(header[0]), int.from_bytes(header[1:], "big"))
    run.play(data[HEADER_BYTES:])
    return run
