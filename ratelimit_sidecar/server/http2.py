"""One HTTP/2 connection of a gRPC server, without I/O or clock: received bytes in, calls out, bytes to send.

Everything that uses nghttp2, through the package `ngh2`, is in this file, so that another HTTP/2 could take its place.
Rules: RFC 9113 and gRPC's PROTOCOL-HTTP2.md.

Theory of operation. `receive` takes what came from the network and returns what happened, in order. A unary call comes
out as one `Call` when its message is complete; until then it waits in here. A streaming call comes out as `Opened` with
its headers, then `Part`s of its body, and `Lost` if the client gives up. What is no proper call is answered in here.
Whoever drives a connection answers calls with `answer` or `refuse`, sends what `output` returns, closes the transport
when `closed` is true after that, and calls `check` now and then with the time, which ends what takes too long.

Flow control: a message's bytes are acknowledged to the client when they are taken out, so what waits in here is bounded
by the windows; `Budget` bounds it for all connections together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from ngh2 import (
    Configuration,
    DataReceived,
    DenialOfServiceError,
    GoAwayReceived,
    NGH2Error,
    PingAcknowledged,
    RequestReceived,
    Role,
    Setting,
    SettingsReceived,
    StreamClosed,
    StreamReset,
    TrailersReceived,
)
from ngh2 import Connection as Session
from ngh2 import ConnectionClosed as SessionClosed
from ngh2 import Event as SessionEvent

from ratelimit_sidecar.server.framing import MAX_BODY_BYTES, frame, percent_encode, too_large, unframe
from ratelimit_sidecar.server.limits import MAX_HEADER_BYTES, MAX_HEADERS, Limits
from ratelimit_sidecar.server.rpc import Code, Handler, RpcError, Streaming, UnaryHandler

Headers = tuple[tuple[bytes, bytes], ...]

NO_ERROR: Final = 0x0
PROTOCOL_ERROR: Final = 0x1
INTERNAL_ERROR: Final = 0x2
CANCEL: Final = 0x8
ENHANCE_YOUR_CALM: Final = 0xB
"""RFC 9113, section 7."""

STREAM_WINDOW: Final = 2 * MAX_BODY_BYTES
"""A whole message of the largest size fits, and little more is read of a larger one."""

CONNECTION_WINDOW: Final = 16 * MAX_BODY_BYTES

CALL_BYTES: Final = 2_048
"""About what an unfinished call takes, beside its headers and body."""

STREAMING_BYTES: Final = 16 * 1_024
"""About what a streaming call takes: a task, and messages that are small. What its client may send beyond is bounded by
the connection's window."""

CONTROL_FRAMES: Final = 10_000
CONTROL_FRAMES_A_CALL: Final = 4
CONTROL_FRAMES_A_CHECK: Final = 500
"""Frames that carry no part of a call (PING, SETTINGS, WINDOW_UPDATE, RST_STREAM, empty DATA) are paid from a credit
that starts full, and that calls and time fill up again. A client without credit floods, and is disconnected. Clients
send one or two WINDOW_UPDATE or PING frames a call at most."""

RESETS: Final = (10_000, 1_000)
"""Calls that a client may reset at once, and then a second. Envoy resets what is not answered in its timeout: up to
`Limits.streams` at once, when this process was kept from running."""

_CONFIGURATION: Final = Configuration(
    auto_window_update=False,
    max_inbound_header_list_size=MAX_HEADER_BYTES,
    max_inbound_header_count=MAX_HEADERS,
    stream_reset_rate_limit=RESETS,
    # A header list of the largest size, in frames of the least size that there is.
    max_continuations=MAX_HEADER_BYTES // 16_384 + 1,
)

_DRAIN_PING: Final = b"draining"
_LIFE_PING: Final = b"anybody?"

_HEADERS: Final = ((b":status", b"200"), (b"content-type", b"application/grpc"))
_OK_TRAILERS: Final = ((b"grpc-status", b"0"),)


class Budget:
    """What unfinished calls of all connections may hold in memory.

    Each connection may hold an eighth of what is free: so those that hold much leave room for others, however many they
    are (dynamic thresholds, Choudhury and Hahne 1998).

    Args:
        size: bytes.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.held = 0

    def allows(self, connection_bytes: int) -> bool:
        """Whether a connection may hold so much in all."""
        return connection_bytes <= (self.size - self.held) // 8


class Counts:
    """What the connections of a front end have refused since the start, by reason. Read by metrics."""

    def __init__(self) -> None:
        self.refused_calls = dict.fromkeys(("shed", "body_idle", "too_slow"), 0)
        """Calls ended before they were complete: others hold too much memory, or their message came too slowly."""
        self.closed_connections = dict.fromkeys(
            (
                "protocol_error",
                "flood",
                "handshake",
                "tls",
                "certificate",
                "idle",
                "silent",
                "stalled",
                "age",
                "limit",
                "drain",
            ),
            0,
        )
        """Connections closed by this end, by the reason."""


class Call:
    """A unary call; `message` is complete once it was returned by `receive`."""

    def __init__(self, stream_id: int, path: str, handler: UnaryHandler, headers: Headers, now_s: float) -> None:
        self.stream_id = stream_id
        self.path = path
        self.handler = handler
        self.headers = headers
        self.message = b""
        # While it waits: the bytes so far, what they count in the budget, and since when.
        self.body = bytearray()
        self.held = 0
        self.began_s = now_s
        self.heard_s = now_s


class Opened:
    """A streaming call has begun."""

    def __init__(self, stream_id: int, path: str, method: Streaming, headers: Headers, ended: bool) -> None:
        self.stream_id = stream_id
        self.path = path
        self.method = method
        self.headers = headers
        self.ended = ended
        """The client has sent all it wants to."""


class Part:
    """Bytes of a streaming call, in order; messages begin and end anywhere in them. Acknowledge them when they are
    used up (`Connection.acknowledge`)."""

    def __init__(self, stream_id: int, data: bytes, ended: bool) -> None:
        self.stream_id = stream_id
        self.data = data
        self.ended = ended


class Lost:
    """The client has given up on a streaming call, or its stream was reset."""

    def __init__(self, stream_id: int) -> None:
        self.stream_id = stream_id


Event = Call | Opened | Part | Lost


class Connection:
    """One connection of a client.

    Args:
        handlers: by path.
        now_s: of the clock that `check` is given.
        age_s: after which it is drained; None for never.
    """

    def __init__(
        self,
        handlers: Mapping[bytes, Handler],
        limits: Limits,
        budget: Budget,
        counts: Counts,
        *,
        now_s: float,
        age_s: float | None = None,
    ) -> None:
        self.closed = False
        """Nothing more is to be received; close the transport when the last output is sent."""
        self.streaming: dict[int, bool] = {}
        """Streaming calls that are open; whether their headers were sent."""
        self._handlers = handlers
        self._limits = limits
        self._budget = budget
        self._counts = counts
        self._now_s = now_s
        self._began_s = now_s
        self._heard_s = now_s
        self._heard = False
        self._waiting: dict[int, Call] = {}
        self._held = 0
        self._credit = CONTROL_FRAMES
        self._last_stream_id = 0
        self._shaken_hands = False
        self._age_s = age_s
        self._is_draining = False
        self._drain_ping_s = now_s
        self._owes_drain_ping = False
        self._has_said_last_stream = False
        self._has_asked_for_life = False
        self._client_said_goodbye = False
        self._half_closed: dict[int, float] = {}
        """Streaming calls that were ended before the client had sent all, and since when."""
        self._answered_early: list[int] = []
        """Calls answered before their request is complete, to be reset."""
        self._unsent = 0
        self._unsent_since_s = now_s
        self._late: list[Event] = []
        """What happened while output was made."""
        self._has_failed = False
        self._goaway = b""
        """The last frame of a connection whose session has failed."""
        self._session = Session(Role.SERVER, _CONFIGURATION)
        self._session.initiate_connection(
            {
                Setting.MAX_CONCURRENT_STREAMS: limits.streams,
                Setting.INITIAL_WINDOW_SIZE: STREAM_WINDOW,
                Setting.MAX_HEADER_LIST_SIZE: MAX_HEADER_BYTES,
            }
        )
        self._session.set_local_window_size(CONNECTION_WINDOW)

    # Receiving

    def receive(self, data: bytes | memoryview) -> list[Event]:
        """Take bytes of the network, and return what has happened.

        Calls come out complete; those that the client has already given up on do not.
        """
        happened = self._late
        if happened:
            self._late = []
        else:
            happened = []
        if self.closed:
            return happened
        self._heard = True
        try:
            self._session.receive_data(data)
        except DenialOfServiceError:
            self._fail(ENHANCE_YOUR_CALM, "flood")
            return happened
        except NGH2Error:
            self._fail(PROTOCOL_ERROR, "protocol_error")
            return happened
        self._take_events(happened)
        if self._credit < 0:
            self.terminate(ENHANCE_YOUR_CALM, "flood")
            happened.clear()
        return happened

    def _take_events(self, happened: list[Event]) -> None:
        opened: list[Call] = []
        for event in self._session.events():
            if isinstance(event, RequestReceived):
                call = self._open(event.stream_id, event.headers, event.end_stream, happened)
                if call is not None:
                    opened.append(call)
            elif isinstance(event, DataReceived):
                self._take_data(event.stream_id, event.data, event.end_stream, happened)
            elif isinstance(event, StreamClosed):
                # Most are of calls that are answered and forgotten.
                if event.stream_id in self._waiting or event.stream_id in self.streaming:
                    self._lose(event.stream_id, happened)
            else:
                self._take_control(event, happened)
        if self._waiting:
            for call in opened:
                if call.stream_id in self._waiting:
                    self._hold(call, CALL_BYTES + _size(call.headers))
        if self._credit < CONTROL_FRAMES:
            self._credit += CONTROL_FRAMES_A_CALL * len(happened)

    def _take_data(self, stream_id: int, data: bytes, ended: bool, happened: list[Event]) -> None:
        waiting = self._waiting.get(stream_id)
        if waiting is not None:
            if ended:
                self._complete(waiting, data, happened)
            else:
                self._append(waiting, data)
        elif stream_id in self.streaming and (data or ended):
            happened.append(Part(stream_id, data, ended))
        else:
            # Of a call that is already answered, or nothing.
            self._credit -= 1
            if data:
                self.acknowledge(stream_id, len(data))

    def _take_control(self, event: SessionEvent, happened: list[Event]) -> None:
        """What is no part of a call, or the end of one."""
        if isinstance(event, TrailersReceived):
            # They end a request, as the end of its body would.
            waiting = self._waiting.get(event.stream_id)
            if waiting is not None:
                self._complete(waiting, b"", happened)
            elif event.stream_id in self.streaming:
                happened.append(Part(event.stream_id, b"", ended=True))
            return
        if isinstance(event, SessionClosed):
            self._note_end(event.error_code)
            return
        self._credit -= 1
        if isinstance(event, StreamReset):
            # The events of one read are looked at together: this call may be among them, complete.
            _remove(event.stream_id, happened)
        elif isinstance(event, SettingsReceived):
            self._shaken_hands = True
        elif isinstance(event, GoAwayReceived):
            self._client_said_goodbye = True
        elif isinstance(event, PingAcknowledged) and event.opaque_data == _DRAIN_PING:
            self._say_last_stream()

    def _open(self, stream_id: int, headers: Headers, ended: bool, happened: list[Event]) -> Call | None:
        """A request's headers: a waiting call, or None when that is not what it is."""
        self._last_stream_id = stream_id
        path = method = content_type = te = b""
        for name, value in headers:
            if name == b":path":
                path = value
            elif name == b":method":
                method = value
            elif name == b"content-type":
                content_type = value
            elif name == b"te":
                te = value
        handler = self._handlers.get(path)
        if method != b"POST":
            self._respond(stream_id, ((b":status", b"405"), (b"allow", b"POST")), ended)
        elif content_type != b"application/grpc" and not _is_grpc(content_type):
            self._respond(stream_id, ((b":status", b"415"),), ended)
        elif handler is None:
            unknown = path.decode("utf-8", "replace")
            self._refuse(stream_id, RpcError(Code.UNIMPLEMENTED, f"unknown method {unknown}"), ended)
        elif te != b"trailers":
            missing = "gRPC needs the header 'te: trailers'; a proxy may have removed it"
            self._refuse(stream_id, RpcError(Code.INTERNAL, missing), ended)
        elif isinstance(handler, Streaming):
            self._open_streaming(Opened(stream_id, path.decode(), handler, headers, ended), happened)
        elif ended:
            self._complete(Call(stream_id, path.decode(), handler, headers, self._now_s), b"", happened)
        else:
            call = Call(stream_id, path.decode(), handler, headers, self._now_s)
            self._waiting[stream_id] = call
            return call
        return None

    def _open_streaming(self, opened: Opened, happened: list[Event]) -> None:
        if not self._budget.allows(self._held + STREAMING_BYTES):
            self._shed(opened.stream_id, opened.ended)
            return
        self._held += STREAMING_BYTES
        self._budget.held += STREAMING_BYTES
        self.streaming[opened.stream_id] = False
        happened.append(opened)

    def _complete(self, call: Call, data: bytes, happened: list[Event]) -> None:
        """The last part of a unary call's message."""
        stream_id = call.stream_id
        self._waiting.pop(stream_id, None)
        body = data
        if call.body:
            call.body += data
            body = bytes(call.body)
            call.body = bytearray()
        if call.held:
            self._release(call)
        if body:
            self.acknowledge(stream_id, len(body))
        try:
            call.message = unframe(body, call.headers)
        except RpcError as error:
            self._refuse(stream_id, error, ended=True)
        else:
            happened.append(call)

    def _append(self, call: Call, data: bytes) -> None:
        """A part of a unary call's message that is not its last."""
        if not data:
            self._credit -= 1
            return
        call.heard_s = self._now_s
        call.body += data
        if len(call.body) > MAX_BODY_BYTES:
            self._drop(call)
            self._refuse(call.stream_id, too_large(), ended=False)
        else:
            self._hold(call, len(data))

    def _lose(self, stream_id: int, happened: list[Event]) -> None:
        call = self._waiting.get(stream_id)
        if call is not None:
            self._drop(call)
        if stream_id in self.streaming:
            self._forget_streaming(stream_id)
            happened.append(Lost(stream_id))

    def _hold(self, call: Call, count: int) -> None:
        """Count what a waiting call holds; shed it when that is too much."""
        if self._budget.allows(self._held + count):
            call.held += count
            self._held += count
            self._budget.held += count
        else:
            self._drop(call)
            self._shed(call.stream_id, ended=False)

    def _drop(self, call: Call) -> None:
        """Forget a waiting call."""
        del self._waiting[call.stream_id]
        if call.body:
            self.acknowledge(call.stream_id, len(call.body))
        self._release(call)

    def _release(self, call: Call) -> None:
        self._held -= call.held
        self._budget.held -= call.held
        call.held = 0

    def _shed(self, stream_id: int, ended: bool) -> None:
        self._counts.refused_calls["shed"] += 1
        self._refuse(stream_id, RpcError(Code.RESOURCE_EXHAUSTED, "too many unfinished calls"), ended)

    def acknowledge(self, stream_id: int, count: int) -> None:
        """Let the client send as many bytes more. What was acknowledged must have been received."""
        try:
            self._session.acknowledge_received_data(count, stream_id)
        except NGH2Error:
            # The session is being terminated.
            return

    # Answering

    def answer(self, call: Call, message: bytes) -> None:
        """Answer a unary call. If the client is gone, nothing happens."""
        stream_id = call.stream_id
        session = self._session
        try:
            session.send_response(stream_id, _HEADERS)
            session.send_data(stream_id, frame(message))
            session.send_trailers(stream_id, _OK_TRAILERS)
        except NGH2Error:
            # Its stream, or the connection, has ended since the call came out.
            return

    def refuse(self, call: Call, error: RpcError) -> None:
        """Answer a unary call with a status."""
        self._refuse(call.stream_id, error, ended=True)

    def _refuse(self, stream_id: int, error: RpcError, ended: bool) -> None:
        """Answer with a status alone ("Trailers-Only")."""
        self._respond(stream_id, (*_HEADERS, *_status(error)), ended)

    def _respond(self, stream_id: int, headers: Sequence[tuple[bytes, bytes]], ended: bool) -> None:
        """Answer with headers alone; what the client has yet to send of its request is no longer wanted (RFC 9113,
        section 8.1).

        Args:
            ended: the request is complete.
        """
        try:
            self._session.send_response(stream_id, headers, end_stream=True)
        except NGH2Error:
            return
        if not ended:
            self._answered_early.append(stream_id)

    def send(self, stream_id: int, message: bytes) -> None:
        """Send a message of a streaming call. If the client is gone, nothing happens."""
        has_headers = self.streaming.get(stream_id)
        if has_headers is None:
            return
        try:
            if not has_headers:
                self._session.send_response(stream_id, _HEADERS)
                self.streaming[stream_id] = True
            self._session.send_data(stream_id, frame(message))
        except NGH2Error:
            return

    def finish(self, stream_id: int, error: RpcError | None, ended: bool) -> None:
        """End a streaming call.

        Args:
            error: None for OK.
            ended: the client has sent all it wants to.
        """
        has_headers = self.streaming.get(stream_id)
        if has_headers is None:
            return
        self._forget_streaming(stream_id)
        trailers = _OK_TRAILERS if error is None else _status(error)
        if not has_headers:
            self._respond(stream_id, (*_HEADERS, *trailers), ended)
            return
        try:
            self._session.send_trailers(stream_id, trailers)
        except NGH2Error:
            return
        if not ended:
            # A reset now could overtake what is still to be sent. Clients end their side when they are told.
            self._half_closed[stream_id] = self._now_s

    def unsent(self, stream_id: int) -> int:
        """Bytes of a streaming call that its client does not take yet."""
        return self._session.queued_body_size(stream_id)

    def _forget_streaming(self, stream_id: int) -> None:
        del self.streaming[stream_id]
        self._held -= STREAMING_BYTES
        self._budget.held -= STREAMING_BYTES

    # Sending, and the end

    def output(self) -> bytes:
        """What is to be sent now; look at `closed` afterwards."""
        goaway = self._goaway
        if self._has_failed:
            self._goaway = b""
            return goaway
        try:
            data = self._session.data_to_send()
            if self._answered_early or self._owes_drain_ping:
                self._send_what_follows()
                data += self._session.data_to_send()
        except NGH2Error:
            self._fail(INTERNAL_ERROR, "protocol_error")
            return self.output()
        for event in self._session.events():
            if isinstance(event, StreamClosed):
                if event.stream_id in self._waiting or event.stream_id in self.streaming:
                    self._lose(event.stream_id, self._late)
                elif self._half_closed:
                    self._half_closed.pop(event.stream_id, None)
            elif isinstance(event, SessionClosed):
                self._note_end(event.error_code)
        return data

    def _send_what_follows(self) -> None:
        """Frames that would overtake those before them, were they given to nghttp2 at the same time."""
        for stream_id in self._answered_early:
            self._reset_stream(stream_id, NO_ERROR)
        self._answered_early.clear()
        if self._owes_drain_ping:
            self._owes_drain_ping = False
            self._ping(_DRAIN_PING)

    def terminate(self, code: int, reason: str) -> None:
        """End the connection: after GOAWAY with this code nothing more is received or answered.

        Args:
            reason: a key of `Counts.closed_connections`.
        """
        if self.closed:
            return
        self.closed = True
        self._counts.closed_connections[reason] += 1
        try:
            self._session.terminate_connection(code)
        except NGH2Error:
            self._fail(code, reason)

    def drain(self) -> None:
        """Take no new calls, and end when those that are here are over.

        A first GOAWAY asks the client to open no more; a PING tells when it has heard that, and then a second GOAWAY
        says which calls were taken (RFC 9113, section 6.8).
        """
        if self.closed or self._is_draining:
            return
        self._is_draining = True
        if not self._shaken_hands:
            self.terminate(NO_ERROR, "drain")
            return
        self._drain_ping_s = self._now_s
        self._owes_drain_ping = True
        try:
            self._session.send_shutdown_notice()
        except NGH2Error:
            return

    def _say_last_stream(self) -> None:
        if self._is_draining and not self._has_said_last_stream:
            self._has_said_last_stream = True
            try:
                self._session.send_goaway(NO_ERROR)
            except NGH2Error:
                return

    def check(self, now_s: float) -> None:
        """End what has taken too long.

        Args:
            now_s: seconds of a clock that never goes back.
        """
        self._now_s = now_s
        if self.closed:
            return
        limits = self._limits
        if self._heard:
            self._heard = False
            self._has_asked_for_life = False
            self._heard_s = now_s
        self._credit = min(CONTROL_FRAMES, self._credit + CONTROL_FRAMES_A_CHECK)
        if not self._shaken_hands:
            if now_s - self._began_s >= limits.handshake:
                self.terminate(PROTOCOL_ERROR, "handshake")
            return
        if self._is_draining and now_s - self._drain_ping_s >= limits.goaway_ping:
            self._say_last_stream()
        self._check_calls(now_s)
        self._check_output(now_s)
        silent_s = now_s - self._heard_s
        if self.streaming:
            if silent_s >= 2 * limits.ping_after:
                self.terminate(NO_ERROR, "silent")
            elif silent_s >= limits.ping_after and not self._has_asked_for_life:
                self._has_asked_for_life = True
                self._ping(_LIFE_PING)
        elif silent_s >= limits.idle and not self._is_draining:
            self._counts.closed_connections["idle"] += 1
            self.drain()
        if self._age_s is not None and now_s - self._began_s >= self._age_s:
            if not self._is_draining:
                self._counts.closed_connections["age"] += 1
                self.drain()
            elif now_s - self._began_s >= self._age_s + limits.age_grace:
                self.terminate(NO_ERROR, "drain")

    def _check_calls(self, now_s: float) -> None:
        limits = self._limits
        for call in list(self._waiting.values()):
            if now_s - call.began_s >= limits.call:
                self._reset(call, "too_slow")
            elif now_s - call.heard_s >= limits.body_idle:
                self._reset(call, "body_idle")
        while self._half_closed:
            stream_id, since_s = next(iter(self._half_closed.items()))
            if now_s - since_s < limits.stalled:
                return
            del self._half_closed[stream_id]
            self._reset_stream(stream_id, CANCEL)

    def _check_output(self, now_s: float) -> None:
        """A client that grants no room for its answers is disconnected, as is one that lets too many of them wait."""
        unsent = self._session.queued_body_size()
        if not self._unsent or unsent < self._unsent:
            self._unsent_since_s = now_s
        self._unsent = unsent
        if not unsent:
            return
        if now_s - self._unsent_since_s >= self._limits.stalled or not self._budget.allows(self._held + unsent):
            self.terminate(ENHANCE_YOUR_CALM, "stalled")

    def _reset(self, call: Call, reason: str) -> None:
        self._counts.refused_calls[reason] += 1
        self._drop(call)
        self._reset_stream(call.stream_id, CANCEL)

    def _reset_stream(self, stream_id: int, code: int) -> None:
        try:
            self._session.reset_stream(stream_id, code)
        except NGH2Error:
            return

    def _ping(self, payload: bytes) -> None:
        try:
            self._session.ping(payload)
        except NGH2Error:
            return

    def _note_end(self, code: int) -> None:
        """nghttp2 is done: the last call of a drain is over, the client has said goodbye, or it broke HTTP/2."""
        if not self.closed:
            self.closed = True
            if code and not self._is_draining and not self._client_said_goodbye:
                self._counts.closed_connections["flood" if code == ENHANCE_YOUR_CALM else "protocol_error"] += 1

    def _fail(self, code: int, reason: str) -> None:
        """The session is lost, and with it what was to be sent; its last word is written by hand."""
        if not self.closed:
            self.closed = True
            self._counts.closed_connections[reason] += 1
        self._has_failed = True
        self._goaway = b"\0\0\x08\x07\0\0\0\0\0" + self._last_stream_id.to_bytes(4, "big") + code.to_bytes(4, "big")

    def release(self) -> None:
        """Give back what its calls hold. To be called once, when the transport is gone."""
        self._budget.held -= self._held
        self._held = 0
        self._waiting.clear()
        self.streaming.clear()


def _is_grpc(content_type: bytes) -> bool:
    return content_type.lower() == b"application/grpc" or content_type.lower().startswith(
        (b"application/grpc+", b"application/grpc;")
    )


def _size(headers: Headers) -> int:
    """As RFC 9113 (6.5.2) counts it."""
    return sum(len(name) + len(value) + 32 for name, value in headers)


def _remove(stream_id: int, happened: list[Event]) -> None:
    """Take out a complete unary call that the client has reset."""
    for index, event in enumerate(happened):
        if isinstance(event, Call) and event.stream_id == stream_id:
            del happened[index]
            return


def _status(error: RpcError) -> tuple[tuple[bytes, bytes], ...]:
    status = ((b"grpc-status", b"%d" % error.code), (b"grpc-message", percent_encode(error.message)))
    if error.code == Code.UNIMPLEMENTED:
        # grpc/doc/compression.md: tell a client that compressed what is understood instead.
        return (*status, (b"grpc-accept-encoding", b"identity"))
    return status
