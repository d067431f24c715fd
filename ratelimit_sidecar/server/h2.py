"""The default front end: unary gRPC as ASGI messages on h2corn, an HTTP/2 server in Rust inside this event loop.

One call is: read the body, which is one framed message; call the handler; send headers, the framed answer and
the trailers with the status. A call that fails is answered by headers alone, which then carry the status
("Trailers-Only" in grpc/doc/PROTOCOL-HTTP2.md). Whatever is the same for every call is built once.
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import Final, Literal

import h2corn

from ratelimit_sidecar.server.framing import MAX_BODY_BYTES, frame, percent_encode, too_large, unframe
from ratelimit_sidecar.server.hosting import Hosting
from ratelimit_sidecar.server.limits import (
    BODY_IDLE_SECONDS,
    CONNECTION_IDLE_SECONDS,
    DRAIN_SECONDS,
    HANDSHAKE_SECONDS,
    MAX_CALLS,
    MAX_CONNECTIONS,
    MAX_HEADER_BYTES,
    MAX_STREAMS,
)
from ratelimit_sidecar.server.rpc import Code, FailureLog, Handlers, RpcError

_CONTENT_TYPE: Final = (b"content-type", b"application/grpc")
_TE_TRAILERS: Final = (b"te", b"trailers")

_START: Final[h2corn.HTTPResponseStart] = {
    "type": "http.response.start",
    "status": 200,
    "headers": [_CONTENT_TYPE],
    "trailers": True,
}
_OK_TRAILERS: Final[h2corn.HTTPResponseTrailers] = {
    "type": "http.response.trailers",
    "headers": [(b"grpc-status", b"0")],
}
_NO_BODY: h2corn.HTTPResponseBody = {"type": "http.response.body"}

SENT: Final = "_ReadyNone"
"""The type of what h2corn's sends return when they are done. To await that does nothing, and takes 5 % of the
requests under load; whatever else they return is awaited."""

_Answer = Sequence[h2corn.SendMessage]


class H2FrontEnd(Hosting):
    """A `FrontEnd` (see `server.front_end`).

    Args:
        addresses: as `server.listeners.listen` takes them.
        drain_seconds: what calls in flight get at a stop before they are cancelled.
        log_format: of what h2corn itself writes to stderr: two lines at the start, and its own failures.
    """

    def __init__(
        self,
        handlers: Handlers,
        addresses: Sequence[str],
        *,
        drain_seconds: float = DRAIN_SECONDS,
        log_format: Literal["text", "json"] = "text",
    ) -> None:
        self._handlers = dict(handlers)
        self._failures = FailureLog()
        self._sent: type | None = None
        """The type of that name, once there was one."""
        super().__init__(self._call, addresses, server_config(drain_seconds, log_format))

    async def _call(self, scope: h2corn.Scope, receive: h2corn.Receive, send: h2corn.Send) -> None:
        """One request, as an ASGI application."""
        if scope["type"] != "http":
            # WebSocket over HTTP/2; lifespan is off.
            await send({"type": "websocket.close"})
            return
        path = scope["path"]
        headers = scope["headers"]
        handler = self._handlers.get(path)
        if handler is None or _CONTENT_TYPE not in headers or _TE_TRAILERS not in headers or scope["method"] != "POST":
            refusal = _refusal(scope, known=handler is not None)
            if refusal is not None:
                await _send_all(refusal, send)
                return
            assert handler is not None
        try:
            event = await receive()
            if event["type"] != "http.request":
                return
            body = event.get("body", b"")
            if event.get("more_body"):
                # Nearly always a call is one part, and then the bare end of the stream.
                event = await receive()
                if event["type"] != "http.request" or event.get("body") or event.get("more_body"):
                    whole = await _read_rest(body, event, receive)
                    if whole is None:
                        return
                    body = whole
            answer = handler(unframe(body, headers), headers)
        except RpcError as error:
            await _send_all(_status(error), send)
            return
        except Exception as failure:
            await _send_all(_status(self._failures.status_of(path, failure)), send)
            return
        # When the client is gone, most likely after its timeout, this raises, and h2corn drops it without a word.
        body_message: h2corn.HTTPResponseBody = {"type": "http.response.body", "body": frame(answer)}
        for message in (_START, body_message, _OK_TRAILERS):
            sent = send(message)
            if type(sent) is not self._sent:
                await self._finish(sent)

    async def _finish(self, sent: Awaitable[None]) -> None:
        """Let a send be done that was not the usual one."""
        if self._sent is None and type(sent).__name__ == SENT:
            self._sent = type(sent)
        await sent


def server_config(drain_seconds: float = DRAIN_SECONDS, log_format: Literal["text", "json"] = "text") -> h2corn.Config:
    """How h2corn serves gRPC here, whatever the application: all but where to bind."""
    every_path = h2corn.RequestPolicy(
        path="/*",
        # The limit on a message is kept here, where it can be answered with a gRPC status.
        max_request_body_size=0,
        timeout_request_body_idle=BODY_IDLE_SECONDS,
        h2_timeout_response_stall=BODY_IDLE_SECONDS,
    )
    return h2corn.Config(
        lifespan="off",
        grpc=True,
        # gRPC needs trailers.
        http1=False,
        access_log=False,
        date_header=False,
        log_format=log_format,
        request_policies=(every_path,),
        max_concurrent_streams=MAX_STREAMS,
        limit_concurrency=MAX_CALLS,
        limit_connections=MAX_CONNECTIONS,
        h2_max_header_list_size=MAX_HEADER_BYTES,
        h2_max_header_block_size=MAX_HEADER_BYTES,
        # A whole message of the largest size fits, and little more is read of a larger one.
        h2_initial_stream_window_size=2 * MAX_BODY_BYTES,
        h2_initial_connection_window_size=16 * MAX_BODY_BYTES,
        timeout_handshake=HANDSHAKE_SECONDS,
        timeout_keep_alive=CONNECTION_IDLE_SECONDS,
        timeout_graceful_shutdown=drain_seconds,
    )


async def _read_rest(body: bytes, event: h2corn.ReceiveMessage, receive: h2corn.Receive) -> bytes | None:
    """The whole body of a request.

    Args:
        body: its first part.
        event: its second.

    Returns:
        None when the client gave up.

    Raises:
        RpcError: it is larger than a message may be; the rest is not read.
    """
    parts = bytearray(body)
    while event["type"] == "http.request":
        parts += event.get("body", b"")
        if len(parts) > MAX_BODY_BYTES:
            raise too_large()
        if not event.get("more_body"):
            return bytes(parts)
        event = await receive()
    return None


def _refusal(scope: h2corn.HTTPScope, *, known: bool) -> _Answer | None:
    """The answer to what isn't an ordinary gRPC call of a known method; None if it is acceptable after all."""
    if scope["method"] != "POST":
        return _http_status(405, (b"allow", b"POST"))
    content_type = _header(scope, b"content-type").lower()
    if content_type != b"application/grpc" and not content_type.startswith(
        (b"application/grpc+", b"application/grpc;")
    ):
        return _http_status(415)
    if not known:
        return _status(RpcError(Code.UNIMPLEMENTED, f"unknown method {scope['path']}"))
    if "http.response.trailers" not in scope["extensions"]:
        return _status(RpcError(Code.INTERNAL, "gRPC needs the header 'te: trailers'; a proxy may have removed it"))
    return None


def _header(scope: h2corn.HTTPScope, wanted: bytes) -> bytes:
    return next((value for name, value in scope["headers"] if name == wanted), b"")


def _status(error: RpcError) -> _Answer:
    """Trailers-Only."""
    headers = [
        _CONTENT_TYPE,
        (b"grpc-status", b"%d" % error.code),
        (b"grpc-message", percent_encode(error.message)),
    ]
    if error.code == Code.UNIMPLEMENTED:
        # grpc/doc/compression.md: tell a client that compressed what is understood instead.
        headers.append((b"grpc-accept-encoding", b"identity"))
    return {"type": "http.response.start", "status": 200, "headers": headers}, _NO_BODY


def _http_status(status: int, *headers: tuple[bytes, bytes]) -> _Answer:
    return {"type": "http.response.start", "status": status, "headers": headers}, _NO_BODY


async def _send_all(answer: _Answer, send: h2corn.Send) -> None:
    for message in answer:
        await send(message)
