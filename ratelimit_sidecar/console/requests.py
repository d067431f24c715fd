"""Bounds on the console's requests, whatever the application: an ASGI middleware.

A request takes part in MAX_REQUESTS from when it has come whole until its answer begins, so that none of them waits for
a client: slow ones can't keep others out.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_REQUESTS = 32
"""That the application works on at once; more are answered 503."""
MAX_BODY_BYTES = 262_144
"""Of a request to /json; a larger one is answered 413. Parsing so much JSON keeps Python's lock for 2 ms."""

_TOO_LARGE = JSONResponse({"error": f"a body may have {MAX_BODY_BYTES} bytes"}, 413)
_TOO_MANY = JSONResponse({"error": f"{MAX_REQUESTS} other requests are being answered"}, 503)


class BoundedRequests:
    """Reads a request's body before the application is called."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._at_work: set[object] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await _read_body(scope, receive)
        except _TooLarge:
            await _TOO_LARGE(scope, receive, send)
            return
        if body is None:
            return
        if len(self._at_work) >= MAX_REQUESTS:
            await _TOO_MANY(scope, receive, send)
            return
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
        place = object()

        async def receive_whole() -> Message:
            return unread.pop() if unread else await receive()

        async def leave_and_send(message: Message) -> None:
            self._at_work.discard(place)
            await send(message)

        self._at_work.add(place)
        try:
            await self._app(scope, receive_whole, leave_and_send)
        finally:
            self._at_work.discard(place)


class _TooLarge(Exception):
    pass


async def _read_body(scope: Scope, receive: Receive) -> bytes | None:
    """None when the client is gone before all of it has come."""
    if int(Headers(scope=scope).get("content-length", "0")) > MAX_BODY_BYTES:
        raise _TooLarge
    body = bytearray()
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            raise _TooLarge
        more = message.get("more_body", False)
    return bytes(body)
