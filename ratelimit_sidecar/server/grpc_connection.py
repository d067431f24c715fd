"""One HTTP/2 connection of a gRPC server, without I/O or clock: received bytes in, calls out, bytes to send.

nghttp2 does HTTP/2 itself, behind `http2_session.Session`. This file has gRPC's rules for it (PROTOCOL-HTTP2.md) and
the bounds that no client can exceed.

Theory of operation. `receive` takes bytes from the network and returns the events in order. A unary call is one `Call`
event (`events.py`) when its message is complete; until then it waits here. A streaming call is a `StreamStarted` event
with its headers, then `StreamData` events with its body, and `StreamCancelled` if the client gives up. Requests that
are no proper calls are answered here. The caller answers calls with `answer` or `refuse`, sends the bytes that `output`
returns, then handles `events_of_output` and closes the transport if `closed` is true. It also calls `check` regularly
with the time, which ends calls and connections that take too long.

Flow control: a message's bytes are acknowledged to the client when they are taken out. So the windows bound what waits
here, and `Budget` bounds it for all connections together. It also counts answers for which the client grants no window:
a client that has too many of them, or reads them too slowly, is disconnected.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from ratelimit_sidecar.server.bounds import MAX_HEADER_BYTES, MAX_STREAMED_BYTES, ServerBounds
from ratelimit_sidecar.server.budget import Budget
from ratelimit_sidecar.server.events import Call, Event, StreamCancelled, StreamData, StreamStarted
from ratelimit_sidecar.server.framing import MAX_BODY_BYTES, PREFIX_BYTES, percent_encode, too_large, unframe
from ratelimit_sidecar.server.front_end_counts import FrontEndCounts
from ratelimit_sidecar.server.http2_session import OK_TRAILERS, BrokenSession, Request, Session
from ratelimit_sidecar.server.rpc import Code, Handler, RpcError, StreamingMethod

Headers = tuple[tuple[bytes, bytes], ...]

NO_ERROR: Final = 0x0
PROTOCOL_ERROR: Final = 0x1
CANCEL: Final = 0x8
ENHANCE_YOUR_CALM: Final = 0xB
"""RFC 9113, section 7."""

STREAM_WINDOW: Final = 2 * (PREFIX_BYTES + MAX_STREAMED_BYTES)
"""A whole message of a streaming call fits. For a unary message, which may be larger, more window is granted as it
arrives.
"""

CONNECTION_WINDOW: Final = 8 * STREAM_WINDOW

CALL_BYTES: Final = 2_048
"""The estimated memory of an unfinished call, besides its headers and body."""

STREAMING_BYTES: Final = 16 * 1_024
"""The estimated memory of a streaming call, besides its headers and unread messages: a task, and what its handler
holds.
"""

CONTROL_FRAMES: Final = 10_000
CONTROL_FRAMES_A_CALL: Final = 4
CONTROL_FRAMES_A_CHECK: Final = 500
"""Each frame that is not part of a call (PING, SETTINGS, WINDOW_UPDATE, RST_STREAM, empty DATA) costs one credit. The
credit starts full; calls that begin and time fill it up again. A client without credit is flooding, and is
disconnected. Normal clients send at most one or two WINDOW_UPDATE or PING frames for each call, or for each DATA frame
of a streaming call.

A call that is reset costs less than one that is answered, so resets are no flood (CVE-2023-44487): clients of a proxy
make it send as many as they like, and with the connection all its other calls would end, which then pass.
"""

FEW_BYTES: Final = 16_384
"""A client is not disconnected for bytes that wait (for its window or its socket, or to be handled) as long as they are
this few."""

MAX_SHOWN_PATH: Final = 100
"""So many bytes of an unknown method are in the answer, lest requests of a few bytes have answers of kilobytes."""

DATA_FRAME_BYTES: Final = 16_384
"""The largest DATA frame, unless its receiver asks for larger ones (RFC 9113, section 4.2)."""

RESETS: Final = (1 << 30, 1 << 30)
"""The resets that nghttp2 allows a client at once, and then in each second: any number; `CONTROL_FRAMES`
says why."""

_DRAIN_PING: Final = b"draining"
_KEEPALIVE_PING: Final = b"anybody?"

_GRPC_HEADERS: Final = ((b":status", b"200"), (b"content-type", b"application/grpc"))
_PLAIN_TEXT: Final = ((b"content-type", b"text/plain"),)
_NO_GRPC: Final = b"This port speaks gRPC: POST, with content-type application/grpc.\n"


class _Stream:
    """A streaming call that is open."""

    def __init__(self, request: Request, held: int) -> None:
        self.request = request
        self.held = held
        """The bytes counted for it in the budget."""


class Connection:
    """One connection of a client; see above for how to drive it.

    Args:
        handlers: by path.
        now_s: the time, by the clock that `check` is given.
        age_s: the connection is drained at this age; None for never.
    """

    def __init__(
        self,
        handlers: Mapping[bytes, Handler],
        bounds: ServerBounds,
        budget: Budget,
        counts: FrontEndCounts,
        *,
        now_s: float,
        age_s: float | None = None,
    ) -> None:
        self.has_more = False
        """True if `receive` has to be called again, without bytes, for the rest of those that it has taken."""
        self.closed = False
        """True when nothing more is received. Close the transport once the last output is sent."""
        self._handlers = handlers
        self._bounds = bounds
        self._budget = budget
        self._counts = counts
        self._session = Session(
            max_streams=bounds.streams,
            stream_window=STREAM_WINDOW,
            connection_window=CONNECTION_WINDOW,
            max_header_bytes=MAX_HEADER_BYTES,
            resets=RESETS,
        )
        self._incomplete: dict[int, Call] = {}
        """Unary calls whose message is not complete."""
        self._streaming: dict[int, _Stream] = {}
        self._deferred: dict[int, Call] = {}
        """Complete calls that are answered later."""
        self._held = 0
        """All bytes of this connection that are counted in the budget."""
        self._credit = CONTROL_FRAMES
        self._begun = 0
        """Calls that began since the credit was last computed."""
        self._control_frames = 0
        """The session's control frames that were already charged to the credit."""
        self._last_stream_id = 0
        self._answered_early: list[Request] = []
        """Requests answered before they were complete; their streams are still to be reset."""
        self._half_closed: dict[int, tuple[Request, float]] = {}
        """Streaming calls that ended before the client had sent everything, and since when."""
        self._events_of_output: list[Event] = []
        """Events that arose while output was produced."""
        self._goaway: bytes | None = None
        """The last frame of a connection whose session has failed."""
        self._now_s = now_s
        self._began_s = now_s
        self._received_s = now_s
        self._has_received = False
        self._has_pinged = False
        self._age_s = age_s
        self._is_draining = False
        self._drain_ping_s = now_s
        self._owes_drain_ping = False
        self._has_sent_final_goaway = False
        self._untaken = 0
        """The bytes of answers that wait for the client's window, counted in the budget."""
        # The stream whose headers were not complete at the last check, and since when.
        self._amid_headers_of, self._amid_headers_since_s = 0, now_s
        self._unhandled = 0
        """The memory of bytes that were read and not yet passed to `receive`, counted in the budget."""
        self._amid_headers = self._unread = 0
        """The memory of headers that are not complete, and of answers that the socket has not taken, counted in the
        budget."""
        self._untaken_since_s = now_s
        self._due = 0
        """The count of bytes taken by the client (since the start) at which all that waited at `_untaken_since_s` is
        taken."""

    # Receiving

    def receive(self, data: bytes | memoryview) -> list[Event]:
        """Take bytes from the network, and return the events in order.

        Unary calls are returned when they are complete, unless the client has given up on them already.
        """
        events: list[Event] = []
        self.has_more = False
        if self.closed:
            return events
        self._has_received = True
        session = self._session
        try:
            requests = session.receive(data)
        except BrokenSession as broken:
            self._fail(broken.code)
            return events
        for request in requests:
            if request.is_wanted:
                self._go_on(request, events)
                continue
            self._begun += 1
            if not request.lost:
                self._open(request, events)
        if session.control_frames != self._control_frames:
            self._pay_for_control_frames()
        if session.amid_header_bytes != self._amid_headers:
            self._count_amid_headers()
        if self._is_draining and session.ponged == _DRAIN_PING:
            self._send_final_goaway()
        self.has_more = session.has_more and not self.closed
        return events

    def count_unhandled(self, size: int) -> None:
        """Note the memory of bytes of the client that were read and wait for `receive`. If that is more than the budget
        allows, the client is disconnected.
        """
        before, self._unhandled = self._unhandled, size
        if size != before and not self._count_waiting(before, size):
            self.terminate(ENHANCE_YOUR_CALM, "limit")

    def count_unread(self, size: int) -> bool:
        """Note the memory of answers that the socket did not take yet. Returns False if that is more than the budget
        allows: disconnect the client at once, as to close waits until it has read them.
        """
        before, self._unread = self._unread, size
        return self._count_waiting(before, size)

    def _count_amid_headers(self) -> None:
        """Note the memory of headers that are not complete. As `count_unhandled`."""
        before, self._amid_headers = self._amid_headers, self._session.amid_header_bytes
        if not self._count_waiting(before, self._amid_headers):
            self.terminate(ENHANCE_YOUR_CALM, "limit")

    def _count_waiting(self, before: int, size: int) -> bool:
        """Count that `size` bytes of one kind wait now, not `before`. Returns False if those are more than may wait."""
        more = size - before
        has_room = more <= 0 or size <= FEW_BYTES or self._budget.allows(self._held + more, more)
        self._count(more)
        return has_room

    def _open(self, request: Request, events: list[Event]) -> None:
        """Handle a new request: its headers have arrived, and perhaps all of it."""
        self._last_stream_id = request.stream_id
        handler = self._handlers.get(request.path)
        if handler is None or not request.is_plain_call:
            refused = self._refuse_unless_call(request, is_known=handler is not None)
            if refused or handler is None:
                return
        if isinstance(handler, StreamingMethod):
            self._open_streaming(request, handler, events)
            return
        call = Call(request, handler, self._now_s)
        if request.ended:
            self._complete(call, events)
        else:
            request.is_wanted = True
            self._incomplete[request.stream_id] = call
            self._hold(call, CALL_BYTES + request.header_bytes)
            if request.is_wanted:
                self._note_body(call)

    def _refuse_unless_call(self, request: Request, *, is_known: bool) -> bool:
        """Answer a request that is no call of a known method. Returns False if it is one."""
        if request.is_oversized:
            self._refuse(request, RpcError(Code.RESOURCE_EXHAUSTED, f"more than {MAX_HEADER_BYTES} bytes of headers"))
        elif request.get(b":method") != b"POST":
            self._respond(request, ((b":status", b"405"), (b"allow", b"POST"), *_PLAIN_TEXT), _NO_GRPC)
        elif not _is_grpc(request.get(b"content-type") or b""):
            self._respond(request, ((b":status", b"415"), *_PLAIN_TEXT), _NO_GRPC)
        elif not is_known:
            path = request.path[:MAX_SHOWN_PATH].decode("ascii", "backslashreplace")
            self._refuse(request, RpcError(Code.UNIMPLEMENTED, f"unknown method {path}"))
        elif request.get(b"te") != b"trailers":
            missing = "gRPC needs the header 'te: trailers'; a proxy may have removed it"
            self._refuse(request, RpcError(Code.INTERNAL, missing))
        else:
            return False
        return True

    def _open_streaming(self, request: Request, method: StreamingMethod, events: list[Event]) -> None:
        held = STREAMING_BYTES + request.header_bytes
        if not self._budget.allows(self._held + held, held):
            self._shed(request)
            return
        self._count(held)
        request.is_wanted = True
        stream = _Stream(request, held)
        self._streaming[request.stream_id] = stream
        events.append(StreamStarted(request, method))
        self._take_data(stream, events)

    def _take_data(self, stream: _Stream, events: list[Event]) -> None:
        """Take the bytes of a streaming call that have arrived, if any."""
        request = stream.request
        count = request.body_bytes
        if not count and not request.ended:
            return
        if self._budget.allows(self._held + count, count):
            stream.held += count
            self._count(count)
            events.append(StreamData(request.stream_id, request.take_body(), request.ended))
        else:
            self._counts.refused_calls["shed"] += 1
            self.finish(request.stream_id, _too_many_calls())
            events.append(StreamCancelled(request.stream_id))

    def _go_on(self, request: Request, events: list[Event]) -> None:
        """Handle more bytes of a call that was opened before, or its end."""
        stream_id = request.stream_id
        call = self._incomplete.get(stream_id)
        if call is not None:
            if request.lost:
                self._drop(call)
            elif request.ended:
                del self._incomplete[stream_id]
                self._release(call)
                request.is_wanted = False
                self._session.consume(request, CONNECTION_WINDOW)
                self._complete(call, events)
            else:
                self._note_body(call)
            return
        call = self._deferred.get(stream_id)
        if call is not None:
            if request.lost:
                self._release_deferred(call)
                events.append(StreamCancelled(stream_id))
            return
        stream = self._streaming.get(stream_id)
        if stream is None:
            return
        if request.lost:
            self._forget_streaming(stream)
            events.append(StreamCancelled(stream_id))
        else:
            self._take_data(stream, events)

    def _complete(self, call: Call, events: list[Event]) -> None:
        try:
            call.message = unframe(call.request.take_body(), call.request)
        except RpcError as error:
            self._refuse(call.request, error)
        else:
            events.append(call)

    def _note_body(self, call: Call) -> None:
        """Count a further part of a message that is not complete yet."""
        came = call.request.body_bytes - call.body_bytes
        if not came:
            return
        call.body_bytes += came
        call.received_s = self._now_s
        if call.body_bytes > MAX_BODY_BYTES:
            self._drop(call)
            self._refuse(call.request, too_large())
        else:
            self._hold(call, came)
            self._session.consume(call.request, came)

    def _hold(self, call: Call, count: int) -> None:
        """Count memory for an incomplete call; refuse the call if that is too much."""
        if self._budget.allows(self._held + count, count):
            call.held += count
            self._count(count)
        else:
            self._drop(call)
            self._shed(call.request)

    def _count(self, count: int) -> None:
        """Change the count of memory that its calls hold."""
        self._held += count
        self._budget.count(count)

    def _drop(self, call: Call) -> None:
        """Forget an incomplete call."""
        call.request.is_wanted = False
        call.request.take_body()
        del self._incomplete[call.request.stream_id]
        self._release(call)

    def _release(self, call: Call) -> None:
        self._count(-call.held)
        call.held = 0

    def _shed(self, request: Request) -> None:
        self._counts.refused_calls["shed"] += 1
        self._refuse(request, _too_many_calls())

    def _pay_for_control_frames(self) -> None:
        frames = self._session.control_frames
        self._credit += CONTROL_FRAMES_A_CALL * self._begun - (frames - self._control_frames)
        self._control_frames, self._begun = frames, 0
        if self._credit > CONTROL_FRAMES:
            self._credit = CONTROL_FRAMES
        elif self._credit < 0:
            self.terminate(ENHANCE_YOUR_CALM, "flood")

    # Answering. When the stream or the connection has ended meanwhile, nothing happens.

    def defer(self, call: Call) -> bool:
        """Keep a complete call, to be answered later; `StreamCancelled` says if the client gives up before.

        Returns:
            False if it must be answered now: the calls of the connection, or of all, hold too much memory.
        """
        request = call.request
        held = CALL_BYTES + request.header_bytes + len(call.message)
        if self.closed or not self._budget.allows(self._held + held, held):
            return False
        self._count(held)
        call.held = held
        request.is_wanted = True
        self._deferred[request.stream_id] = call
        return True

    def _release_deferred(self, call: Call) -> None:
        call.request.is_wanted = False
        del self._deferred[call.request.stream_id]
        self._release(call)

    def answer(self, call: Call, message: bytes) -> None:
        """Answer a unary call."""
        if call.held:
            self._release_deferred(call)
        self._session.answer(call.request, message)

    def refuse(self, call: Call, error: RpcError) -> None:
        """Answer a unary call with a status."""
        if call.held:
            self._release_deferred(call)
        self._refuse(call.request, error)

    def _refuse(self, request: Request, error: RpcError) -> None:
        """Answer with a status alone ("Trailers-Only")."""
        self._respond(request, (*_GRPC_HEADERS, *_status(error)))

    def _respond(self, request: Request, headers: Headers, body: bytes = b"") -> None:
        """Answer at once. The rest of the request is not wanted any more (RFC 9113, section 8.1)."""
        self._session.respond(request, headers, body)
        if not request.ended:
            self._answered_early.append(request)

    def send(self, stream_id: int, message: bytes) -> None:
        """Send a message of a streaming call."""
        stream = self._streaming.get(stream_id)
        if stream is None:
            return
        self._session.begin(stream.request)
        self._session.send(stream.request, message)
        size = PREFIX_BYTES + len(message)
        # The client may answer each frame with two WINDOW_UPDATE frames.
        if self._credit < CONTROL_FRAMES:
            self._credit += CONTROL_FRAMES_A_CALL * (1 + size // DATA_FRAME_BYTES)

    def finish(self, stream_id: int, error: RpcError | None) -> None:
        """End a streaming call.

        Args:
            error: None for OK.
        """
        stream = self._streaming.get(stream_id)
        if stream is None:
            return
        self._forget_streaming(stream)
        request = stream.request
        trailers = OK_TRAILERS if error is None else _status(error)
        if request.is_answered:
            self._session.finish(request, trailers)
            if not request.ended:
                self._half_closed[stream_id] = (request, self._now_s)
        else:
            self._respond(request, (*_GRPC_HEADERS, *trailers))

    def unsent(self, stream_id: int) -> int:
        """The bytes of a streaming call that are not sent yet, because the client grants no window."""
        stream = self._streaming.get(stream_id)
        return 0 if stream is None else self._session.unsent_of(stream.request)

    def acknowledge(self, stream_id: int, count: int) -> None:
        """Acknowledge bytes of `StreamData` that are used up: the client may send as many more."""
        stream = self._streaming.get(stream_id)
        if stream is not None:
            stream.held -= count
            self._count(-count)
            self._session.consume(stream.request, count)

    def _forget_streaming(self, stream: _Stream) -> None:
        request = stream.request
        request.is_wanted = False
        request.take_body()
        # The client may send the rest, which is not read.
        self._session.consume(request, CONNECTION_WINDOW)
        del self._streaming[request.stream_id]
        self._count(-stream.held)

    # Sending, and the end

    def output(self) -> bytes:
        """Return the bytes to send now. Handle `events_of_output` and look at `closed` after that."""
        if self._goaway is not None:
            goaway, self._goaway = self._goaway, b""
            return goaway
        session = self._session
        try:
            data = session.output()
            if self._answered_early or self._half_closed or self._owes_drain_ping:
                self._send_what_follows()
                data += session.output()
        except BrokenSession as broken:
            self._fail(broken.code)
            return self.output()
        for request in session.late():
            self._go_on(request, self._events_of_output)
        if not self.closed and session.is_over:
            self._note_end()
        if (session.finished or session.unsent or self._untaken) and not self._count_untaken():
            self.terminate(ENHANCE_YOUR_CALM, "stalled")
            data += session.output()
        return data

    def _count_untaken(self) -> bool:
        """Count the answers that wait for the client's window, and the streams that are open because of them.

        Returns:
            False when they are more than the client may have.
        """
        before, self._untaken = self._untaken, self._session.unsent + CALL_BYTES * self._session.finished
        return self._count_waiting(before, self._untaken) or self.closed

    def events_of_output(self) -> list[Event]:
        """Events that arose while output was produced; call it after `output`."""
        events = self._events_of_output
        if events:
            self._events_of_output = []
        return events

    def _send_what_follows(self) -> None:
        """Send the frames that must come after the others. nghttp2 would send them first if it got all at the same
        time.
        """
        for request in self._answered_early:
            self._session.reset(request, NO_ERROR)
        self._answered_early.clear()
        for request, _since_s in list(self._half_closed.values()):
            if self._session.has_sent_all(request):
                del self._half_closed[request.stream_id]
                self._session.reset(request, NO_ERROR)
        if self._owes_drain_ping:
            self._owes_drain_ping = False
            self._session.ping(_DRAIN_PING)

    def terminate(self, code: int, reason: str) -> None:
        """End the connection: after a GOAWAY with this code nothing more is received or answered.

        Args:
            reason: a key of `FrontEndCounts.closed_connections`.
        """
        if not self.closed:
            self.closed = True
            self._counts.closed_connections[reason] += 1
            self._session.terminate(code)

    def drain(self) -> None:
        """Take no new calls, and end when the current ones are over.

        A first GOAWAY asks the client to open no more. The answer to a PING shows that the client has received it. Then
        a second GOAWAY says which calls were taken (RFC 9113, section 6.8).
        """
        if self.closed or self._is_draining:
            return
        self._is_draining = True
        if not self._session.has_settings:
            self.terminate(NO_ERROR, "drain")
            return
        self._drain_ping_s = self._now_s
        self._owes_drain_ping = True
        self._session.send_shutdown_notice()

    def _send_final_goaway(self) -> None:
        if not self._has_sent_final_goaway:
            self._has_sent_final_goaway = True
            self._session.send_goaway()

    def check(self, now_s: float) -> None:
        """End calls and connections that take too long.

        Args:
            now_s: seconds of a clock that never goes back.
        """
        self._now_s = now_s
        if self.closed:
            return
        if self._has_received:
            self._has_received = False
            self._has_pinged = False
            self._received_s = now_s
        self._credit = min(CONTROL_FRAMES, self._credit + CONTROL_FRAMES_A_CHECK)
        if not self._session.has_settings:
            if now_s - self._began_s >= self._bounds.handshake:
                self.terminate(PROTOCOL_ERROR, "handshake")
            return
        if self._is_draining and now_s - self._drain_ping_s >= self._bounds.goaway_ping:
            self._send_final_goaway()
        self._check_calls(now_s)
        self._check_headers(now_s)
        self._check_output(now_s)
        self._check_silence(now_s)
        self._check_age(now_s)

    def _check_calls(self, now_s: float) -> None:
        bounds = self._bounds
        for call in list(self._incomplete.values()):
            if now_s - call.began_s >= bounds.call:
                self._reset(call, "too_slow")
            elif now_s - call.received_s >= bounds.body_idle:
                self._reset(call, "body_idle")
        while self._half_closed:
            stream_id, (request, since_s) = next(iter(self._half_closed.items()))
            if now_s - since_s < bounds.stalled:
                return
            del self._half_closed[stream_id]
            self._session.reset(request, CANCEL)

    def _reset(self, call: Call, reason: str) -> None:
        self._counts.refused_calls[reason] += 1
        self._drop(call)
        self._session.reset(call.request, CANCEL)

    def _check_headers(self, now_s: float) -> None:
        """Disconnect a client whose headers stop in the middle: nothing else can come before the rest of them."""
        stream_id = self._session.amid_headers_of
        # A busy client may be in the middle of some at each check, and each time of others.
        if not stream_id or stream_id != self._amid_headers_of:
            self._amid_headers_of, self._amid_headers_since_s = stream_id, now_s
        elif now_s - self._amid_headers_since_s >= self._bounds.body_idle:
            self.terminate(PROTOCOL_ERROR, "stalled")

    def _check_output(self, now_s: float) -> None:
        """Disconnect a client that does not take in time what waits for it."""
        session = self._session
        # While its socket takes nothing there is no `output`.
        if session.unsent and not self._count_untaken():
            self.terminate(ENHANCE_YOUR_CALM, "stalled")
        elif not session.unsent or session.taken >= self._due:
            self._untaken_since_s = now_s
            self._due = session.taken + session.unsent
        elif now_s - self._untaken_since_s >= self._bounds.stalled:
            self.terminate(ENHANCE_YOUR_CALM, "stalled")

    def _check_silence(self, now_s: float) -> None:
        bounds = self._bounds
        silent_s = now_s - self._received_s
        if self._streaming:
            if silent_s >= 2 * bounds.ping_after:
                self.terminate(NO_ERROR, "silent")
            elif silent_s >= bounds.ping_after and not self._has_pinged:
                self._has_pinged = True
                self._session.ping(_KEEPALIVE_PING)
        elif silent_s >= bounds.idle and not self._is_draining:
            self._counts.closed_connections["idle"] += 1
            self.drain()

    def _check_age(self, now_s: float) -> None:
        age_s = now_s - self._began_s
        if self._session.needs_replacing:
            self.drain()
        if self._age_s is None or age_s < self._age_s:
            return
        if not self._is_draining:
            self._counts.closed_connections["age"] += 1
            self.drain()
        elif age_s >= self._age_s + self._bounds.age_grace:
            self.terminate(NO_ERROR, "drain")

    def _note_end(self) -> None:
        """Note that nghttp2 is done: the last call of a drain is over, the client said goodbye, or it broke HTTP/2."""
        self.closed = True
        code = self._session.sent_goaway_code
        if code and not self._session.said_goodbye:
            self._counts.closed_connections["flood" if code == ENHANCE_YOUR_CALM else "protocol_error"] += 1

    def _fail(self, code: int) -> None:
        """Close after a failure of the session. Its unsent output is lost, so the GOAWAY is written by hand."""
        if not self.closed:
            self.closed = True
            self._counts.closed_connections["flood" if code == ENHANCE_YOUR_CALM else "protocol_error"] += 1
        last = self._last_stream_id.to_bytes(4, "big") + code.to_bytes(4, "big")
        self._goaway = b"\0\0\x08\x07\0\0\0\0\0" + last

    def release(self) -> None:
        """Free the memory that its calls count in the budget. Call it once, when the transport is gone."""
        self.closed = True
        self._budget.count(-self._held)
        self._held = self._unhandled = self._amid_headers = self._untaken = self._unread = 0
        self._incomplete.clear()
        self._deferred.clear()
        self._streaming.clear()


def _is_grpc(content_type: bytes) -> bool:
    content_type = content_type.lower()
    return content_type == b"application/grpc" or content_type.startswith((b"application/grpc+", b"application/grpc;"))


def _too_many_calls() -> RpcError:
    return RpcError(Code.RESOURCE_EXHAUSTED, "too many unfinished calls")


def _status(error: RpcError) -> Headers:
    status = ((b"grpc-status", b"%d" % error.code), (b"grpc-message", percent_encode(error.message)))
    if error.code == Code.UNIMPLEMENTED:
        # grpc/doc/compression.md: tell clients which encodings are supported.
        return (*status, (b"grpc-accept-encoding", b"identity"))
    return status
