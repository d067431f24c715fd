"""A server's HTTP/2 session: the interface that `native_http2.pyx` and `portable_http2.py` offer alike, described here
for both.

Feed `Session.receive` with what the socket gives, and send what `output` returns after each call that may have produced
some. Answer a `Request` once: with `answer`; with `begin`, `send` and `finish`; with `respond`; or with `reset`.
"""

from collections.abc import Iterator

class BrokenSession(Exception):
    """The session has failed: nothing more can be received or sent.

    Args:
        code: of HTTP/2, for a GOAWAY.
    """

    code: int
    def __init__(self, code: int) -> None: ...

class Request:
    """A request and its stream. `Session.receive` returns it when its headers are complete, and again when more has
    arrived while `is_wanted` is set. Once it is answered it has no headers any more.
    """

    is_wanted: bool
    """Set it to get the request again when more of it arrives."""
    @property
    def stream_id(self) -> int: ...
    @property
    def path(self) -> bytes:
        """ "" without a path."""

    @property
    def is_plain_call(self) -> bool:
        """A POST of exactly `application/grpc` with `te: trailers`, not oversized: what nearly everybody sends."""

    @property
    def may_be_sampled(self) -> bool:
        """Its `traceparent` has the sampled flag (W3C Trace Context, 3.2), or it has headers of B3, whatever they
        say.
        """

    @property
    def is_oversized(self) -> bool:
        """Its headers were too large; they are empty here."""

    @property
    def ended(self) -> bool:
        """True if the client has sent everything."""

    @property
    def lost(self) -> bool:
        """True if the stream is closed: the client has reset it, or it is answered."""

    @property
    def is_answered(self) -> bool:
        """True if the headers of its response were submitted."""

    @property
    def header_bytes(self) -> int:
        """The size of the headers as RFC 9113 (6.5.2) counts it."""

    @property
    def body_bytes(self) -> int:
        """The number of bytes of the body that were received and not taken."""

    def take_body(self) -> bytes:
        """The bytes of the body received since the last call."""

    def headers(self) -> tuple[tuple[bytes, bytes], ...]:
        """All headers, pseudo-headers too, as pairs of bytes; so does iterating."""

    def get(self, name: bytes) -> bytes | None:
        """The value of the first header of that name, or None."""

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]: ...

class Session:
    """A server's session of HTTP/2. Methods that take a request do nothing when its stream is closed or the session
    ends.

    Args:
        max_streams: the most open streams.
        stream_window, connection_window: bytes a client may send before they are consumed.
        max_header_bytes: the largest headers of a request; with larger ones it is `Request.is_oversized`.
        resets: streams that a client may reset at once, and then in each second.
    """

    def __init__(
        self,
        *,
        max_streams: int,
        stream_window: int,
        connection_window: int,
        max_header_bytes: int,
        resets: tuple[int, int],
    ) -> None: ...
    @property
    def unsent(self) -> int:
        """The bytes of answers that wait for window from the client."""

    @property
    def taken(self) -> int:
        """The bytes of answers that the client has taken since the start, or will not take because the stream is
        closed.
        """

    @property
    def finished(self) -> int:
        """Streams that are open though their answers are complete: the client has not taken them yet."""

    @property
    def amid_headers_of(self) -> int:
        """The stream of the request whose headers have begun and are not complete; 0 when there is none."""

    @property
    def amid_header_bytes(self) -> int:
        """The memory of headers that are not complete."""

    @property
    def has_more(self) -> bool:
        """True if `receive` has to be called again, without bytes, for the rest of those that it has taken."""

    @property
    def control_frames(self) -> int:
        """The frames received since the start that carry no part of a request."""

    @property
    def has_settings(self) -> bool:
        """True if the client's SETTINGS have arrived."""

    @property
    def said_goodbye(self) -> bool:
        """True if the client has sent GOAWAY."""

    @property
    def ponged(self) -> bytes:
        """The payload of the last acknowledged PING."""

    @property
    def sent_goaway_code(self) -> int:
        """The code of the latest GOAWAY that was sent."""

    @property
    def needs_replacing(self) -> bool:
        """True if the connection has lost so much of its window that the client will stall; never in `native_http2`."""

    @property
    def is_over(self) -> bool:
        """True if nothing more is to be received or sent."""

    def receive(self, data: bytes | memoryview) -> list[Request]:
        """Take bytes of the network.

        Returns:
            The requests whose headers came with them, and those that are wanted and of which something came, each once.

        Raises:
            BrokenSession: the client has broken HTTP/2 in a way that nghttp2 has no GOAWAY for, or floods.
        """

    def late(self) -> list[Request]:
        """As `receive`, for events that arose while output was produced."""

    def output(self) -> bytes:
        """What is to be sent now.

        Raises:
            BrokenSession: as in `receive`, or there is no memory for it. What was to be sent is lost.
        """

    def answer(self, request: Request, message: bytes) -> None:
        """Answer with one gRPC message and the status OK."""

    def begin(self, request: Request) -> bool:
        """Send the headers of a gRPC response with messages.

        Returns:
            Whether messages can be sent.
        """

    def send(self, request: Request, message: bytes) -> None:
        """Send a gRPC message, after `begin`."""

    def finish(self, request: Request, trailers: tuple[tuple[bytes, bytes], ...]) -> None:
        """End a response after what was sent before."""

    def respond(self, request: Request, headers: tuple[tuple[bytes, bytes], ...], body: bytes = b"") -> None:
        """Answer with these headers, and perhaps a body that is no gRPC message."""

    def unsent_of(self, request: Request) -> int:
        """The bytes of a response that wait for window from the client."""

    def has_sent_all(self, request: Request) -> bool:
        """Whether all of a finished response has left with the output so far, trailers too. Where that cannot be told,
        it is false.
        """

    def reset(self, request: Request, code: int) -> None:
        """Close the stream with an error code of HTTP/2."""

    def consume(self, request: Request, count: int) -> None:
        """Let the client send as many bytes more. The rest is consumed when the stream is closed, or already at the end
        of the request when it is not wanted then.
        """

    def ping(self, payload: bytes) -> None:
        """Send a PING with these 8 bytes; `ponged` tells when it is acknowledged."""

    def send_shutdown_notice(self) -> None:
        """Send a GOAWAY that asks for no new streams, and still accepts them."""

    def send_goaway(self) -> None:
        """Send a GOAWAY that says which streams were taken."""

    def terminate(self, code: int) -> None:
        """Send a last GOAWAY; nothing is received after it."""

OK_TRAILERS: tuple[tuple[bytes, bytes], ...]
"""The trailers of a gRPC call that has succeeded."""
