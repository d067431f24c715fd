"""The HTTP/2 session of `native_http2` on the package ngh2, for installations without a C compiler.

This one is slower, and differs in some points. When a stream ends in the middle of a DATA frame, ngh2 does not say how
much of that frame had arrived, so as much of the connection's window is lost. A connection that has lost half of its
window must be replaced. A request with headers that are too large ends its connection. Long headers are left out
(`portable_headers`), what is no HPACK is noticed at the end of its block, and a name that HTTP does not allow resets
the stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import ngh2
from ngh2 import DataReceived, NGH2Error, RequestReceived, StreamClosed, TrailersReceived

from ratelimit_sidecar.server.framing import frame
from ratelimit_sidecar.server.portable_headers import HeaderFilter, TooManyHeaders, is_left_out

ENHANCE_YOUR_CALM: Final = 0xB
PROTOCOL_ERROR: Final = 0x1

MAX_FRAME_BYTES: Final = 16_384
"""The largest DATA frame of a client, since SETTINGS_MAX_FRAME_SIZE keeps its default."""

OK_TRAILERS: Final = ((b"grpc-status", b"0"),)
_POST: Final = (b":method", b"POST")
_CONTENT_TYPE: Final = (b"content-type", b"application/grpc")
_TE: Final = (b"te", b"trailers")
_FLAG_AT: Final = 54
_SAMPLED: Final = frozenset(b"%c" % digit for digit in b"13579bdf")
"""The low digit of trace-flags, where the lowest bit is set (W3C Trace Context, 3.2)."""
_B3: Final = (b"b3", b"x-b3-traceid")
_GRPC_HEADERS: Final = ((b":status", b"200"), (b"content-type", b"application/grpc"))

Headers = tuple[tuple[bytes, bytes], ...]


class BrokenSession(Exception):
    """The session has failed: nothing more can be received or sent.

    Args:
        code: of HTTP/2, for a GOAWAY.
    """

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def _says_sampled(name: bytes, value: bytes) -> bool:
    if name == b"traceparent":
        return value[_FLAG_AT : _FLAG_AT + 1] in _SAMPLED
    return name in _B3


class Request:
    """A request and its stream; `native_http2.pyi` describes it."""

    __slots__ = (
        "_headers",
        "body",
        "ended",
        "header_bytes",
        "is_answered",
        "is_finished",
        "is_listed",
        "is_oversized",
        "is_plain_call",
        "is_wanted",
        "lost",
        "may_be_sampled",
        "path",
        "stream_id",
        "unconsumed",
    )

    def __init__(self, stream_id: int, headers: Headers, ended: bool) -> None:
        self.stream_id = stream_id
        self.path = b""
        for name, value in headers:
            if name == b":path":
                self.path = value
                break
        self.is_plain_call = _POST in headers and _CONTENT_TYPE in headers and _TE in headers
        self.may_be_sampled = any(_says_sampled(name, value) for name, value in headers)
        self.is_oversized = False
        self.ended = ended
        self.lost = False
        self.is_wanted = False
        self.is_answered = self.is_finished = False
        self.is_listed = True
        self.body: bytes | bytearray = b""
        self.unconsumed = 0
        self._headers = headers
        self.header_bytes = sum(len(name) + len(value) + 32 for name, value in headers)

    @property
    def body_bytes(self) -> int:
        return len(self.body)

    def take_body(self) -> bytes:
        body = self.body
        self.body = b""
        return bytes(body)

    def headers(self) -> Headers:
        return self._headers

    def get(self, name: bytes) -> bytes | None:
        return next((value for other, value in self._headers if other == name), None)

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        return iter(self._headers)

    def forget_headers(self) -> None:
        self._headers = ()
        self.path = b""


class Session:
    """A server's session of HTTP/2; `native_http2.pyi` describes it."""

    def __init__(
        self,
        *,
        max_streams: int,
        stream_window: int,
        connection_window: int,
        max_header_bytes: int,
        resets: tuple[int, int],
    ) -> None:
        self.control_frames = 0
        self.has_settings = False
        self.said_goodbye = False
        self.ponged = b""
        self.sent_goaway_code = 0
        self.is_over = False
        self.has_more = False
        self.finished = 0
        self._submitted = 0
        """The bytes of answers so far."""
        self._connection_window = connection_window
        self._requests: dict[int, Request] = {}
        self._changed: list[Request] = []
        self._unconsumed = 0
        self._header_filter = HeaderFilter(max_header_bytes)
        configuration = ngh2.Configuration(
            auto_window_update=False,
            max_inbound_header_list_size=max_header_bytes,
            max_inbound_header_count=max_header_bytes,
            stream_reset_rate_limit=resets,
            max_continuations=max_header_bytes // 16_384 + 1,
        )
        self._connection = ngh2.Connection(ngh2.Role.SERVER, configuration)
        self._connection.initiate_connection(
            {
                ngh2.Setting.MAX_CONCURRENT_STREAMS: max_streams,
                ngh2.Setting.INITIAL_WINDOW_SIZE: stream_window,
                ngh2.Setting.MAX_HEADER_LIST_SIZE: max_header_bytes,
            }
        )
        self._connection.set_local_window_size(connection_window)

    @property
    def unsent(self) -> int:
        return self._connection.queued_body_size()

    @property
    def taken(self) -> int:
        return self._submitted - self.unsent

    @property
    def amid_headers_of(self) -> int:
        return self._header_filter.stream_id

    @property
    def amid_header_bytes(self) -> int:
        return self._header_filter.held_bytes

    @property
    def needs_replacing(self) -> bool:
        try:
            used = self._connection_window - self._connection.local_window_size
        except NGH2Error:
            return False
        # nghttp2 announces consumed bytes when they are half of the window.
        return used > self._connection_window // 2 + self._unconsumed + MAX_FRAME_BYTES

    def receive(self, data: bytes | memoryview) -> list[Request]:
        try:
            self._connection.receive_data(self._header_filter.receive(data))
        except (TooManyHeaders, ngh2.DenialOfServiceError) as error:
            self.is_over = True
            raise BrokenSession(ENHANCE_YOUR_CALM) from error
        except NGH2Error as error:
            self.is_over = True
            raise BrokenSession(PROTOCOL_ERROR) from error
        self._take_events()
        return self.late()

    def late(self) -> list[Request]:
        changed = self._changed
        if not changed:
            return []
        self._changed = []
        for request in changed:
            request.is_listed = False
        return changed

    def output(self) -> bytes:
        try:
            data = self._connection.data_to_send()
        except NGH2Error as error:
            raise BrokenSession(PROTOCOL_ERROR) from error
        self._take_events()
        return data

    def answer(self, request: Request, message: bytes) -> None:
        if request.lost or request.is_answered:
            return
        request.is_answered = True
        self._note_finished(request)
        connection, stream_id = self._connection, request.stream_id
        data = frame(message)
        try:
            connection.send_response(stream_id, _GRPC_HEADERS)
            connection.send_data(stream_id, data)
            self._submitted += len(data)
            connection.send_trailers(stream_id, OK_TRAILERS)
        except NGH2Error:
            return

    def begin(self, request: Request) -> bool:
        return self._begin(request, _GRPC_HEADERS, end_stream=False)

    def send(self, request: Request, message: bytes) -> None:
        self._send(request, frame(message))

    def finish(self, request: Request, trailers: Headers) -> None:
        self._note_finished(request)
        try:
            self._connection.send_trailers(request.stream_id, trailers)
        except NGH2Error:
            return

    def respond(self, request: Request, headers: Headers, body: bytes = b"") -> None:
        if self._begin(request, headers, end_stream=not body) and body:
            self._send(request, body, end_stream=True)
        self._note_finished(request)
        if not request.is_wanted:
            self.consume(request, request.unconsumed)

    def unsent_of(self, request: Request) -> int:
        return self._connection.queued_body_size(request.stream_id)

    def has_sent_all(self, request: Request) -> bool:
        if request.lost:
            return True
        try:
            # Trailers wait behind the body, and then for an open window.
            return (
                self._connection.queued_body_size(request.stream_id) == 0
                and self._connection.remote_window_size > 0
                and self._connection.stream_remote_window_size(request.stream_id) > 0
            )
        except ngh2.NGH2Error:
            return False

    def reset(self, request: Request, code: int) -> None:
        try:
            self._connection.reset_stream(request.stream_id, code)
        except NGH2Error:
            return

    def consume(self, request: Request, count: int) -> None:
        count = min(count, request.unconsumed)
        if count <= 0:
            return
        request.unconsumed -= count
        self._unconsumed -= count
        self._acknowledge(request.stream_id, count)

    def ping(self, payload: bytes) -> None:
        try:
            self._connection.ping(payload)
        except NGH2Error:
            return

    def send_shutdown_notice(self) -> None:
        try:
            self._connection.send_shutdown_notice()
        except NGH2Error:
            return

    def send_goaway(self) -> None:
        try:
            self._connection.send_goaway()
        except NGH2Error:
            return

    def terminate(self, code: int) -> None:
        try:
            self._connection.terminate_connection(code)
        except NGH2Error:
            return

    def _note_finished(self, request: Request) -> None:
        """Its answer is complete. Until the client has taken it the stream stays open, and the request with it."""
        if not request.is_finished and not request.lost:
            request.is_finished = True
            self.finished += 1
        request.forget_headers()

    def _begin(self, request: Request, headers: Headers, *, end_stream: bool) -> bool:
        if request.lost or request.is_answered:
            return False
        request.is_answered = True
        try:
            self._connection.send_response(request.stream_id, headers, end_stream=end_stream)
        except NGH2Error:
            return False
        return True

    def _send(self, request: Request, data: bytes, *, end_stream: bool = False) -> None:
        try:
            self._connection.send_data(request.stream_id, data, end_stream=end_stream)
        except NGH2Error:
            return
        self._submitted += len(data)

    def _acknowledge(self, stream_id: int, count: int) -> None:
        try:
            self._connection.acknowledge_received_data(count, stream_id)
        except NGH2Error:
            return

    def _take_events(self) -> None:
        requests = self._requests
        for event in self._connection.events():
            if isinstance(event, RequestReceived):
                headers = tuple([field for field in event.headers if not is_left_out(field[1])])
                request = Request(event.stream_id, headers, event.end_stream)
                requests[request.stream_id] = request
                self._changed.append(request)
            elif isinstance(event, DataReceived):
                self._take_data(event.stream_id, event.data, event.end_stream)
            elif isinstance(event, StreamClosed):
                closed = requests.pop(event.stream_id, None)
                if closed is not None:
                    closed.lost = True
                    self.finished -= closed.is_finished
                    if closed.unconsumed:
                        self.consume(closed, closed.unconsumed)
                    if closed.is_wanted:
                        self._note(closed)
            elif isinstance(event, TrailersReceived):
                # They end a request, as the end of its body would.
                self._take_data(event.stream_id, b"", ended=True)
            else:
                self._take_control(event)

    def _take_control(self, event: ngh2.Event) -> None:
        if isinstance(event, ngh2.ConnectionClosed):
            self.is_over = True
            self.sent_goaway_code = event.error_code
            return
        self.control_frames += 1
        if isinstance(event, ngh2.SettingsReceived):
            self.has_settings = True
        elif isinstance(event, ngh2.PingAcknowledged):
            self.ponged = event.opaque_data
        elif isinstance(event, ngh2.GoAwayReceived):
            self.said_goodbye = True

    def _take_data(self, stream_id: int, data: bytes, ended: bool) -> None:
        request = self._requests.get(stream_id)
        if request is None:
            self.control_frames += 1
            if data:
                self._acknowledge(stream_id, len(data))
            return
        if ended:
            request.ended = True
        if not data:
            self.control_frames += not ended
        elif ended and not request.is_wanted:
            if not request.is_answered:
                request.body = request.body + data if request.body else data
            self._acknowledge(stream_id, len(data))
        else:
            self._append(request, data)
        if request.is_wanted:
            self._note(request)
        elif ended and request.unconsumed:
            self.consume(request, request.unconsumed)

    def _append(self, request: Request, data: bytes) -> None:
        """Append a part of a body."""
        request.unconsumed += len(data)
        self._unconsumed += len(data)
        if request.is_answered and not request.is_wanted:
            self.consume(request, len(data))
        else:
            if not isinstance(request.body, bytearray):
                request.body = bytearray(request.body)
            request.body += data

    def _note(self, request: Request) -> None:
        if not request.is_listed:
            request.is_listed = True
            self._changed.append(request)
