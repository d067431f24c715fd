"""Bounds on the console's requests, whatever the application: an ASGI middleware.

A request counts among those at work from when it has arrived completely until its answer begins. So it does not count
while it waits for its client, and slow clients cannot keep others out. Probes do not count. Scrapes have
places of their own, until the client has read the answer, since answers are made while they are sent. In each turn of
the event loop one request and one probe or scrape start, in order of arrival. So decisions never wait for more than
these. Requests beyond them wait for a place; there are no more than connections.
"""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ratelimit_sidecar.console.bounds import DEFAULT_BOUNDS, HttpBounds

PROBES = frozenset({"/healthz", "/readyz", "/healthcheck"})
"""Paths that are answered at once, from memory."""
SCRAPE = "/metrics"
MAX_BODY_BYTES = 262_144
"""The largest body; a larger one is answered 413. Parsing that much JSON holds Python's lock for 2 ms."""

_TOO_LARGE = JSONResponse({"error": f"a body may have {MAX_BODY_BYTES} bytes"}, 413)
_TOO_MANY = JSONResponse({"error": "too many other requests are being answered"}, 503)
_TOO_MANY_SCRAPES = JSONResponse({"error": "other scrapes are being answered"}, 503)


class BoundedRequests:
    """Applies the bounds, and reads a request's body before it calls the application.

    Args:
        keeps_bodies: False if the application needs none; it gets an empty one.
    """

    def __init__(self, app: ASGIApp, *, bounds: HttpBounds = DEFAULT_BOUNDS, keeps_bodies: bool = True) -> None:
        self._app = app
        self._bounds = bounds
        self._keeps_bodies = keeps_bodies
        self._places = asyncio.Semaphore(bounds.requests)
        self._scraping: list[str] = []
        """The addresses of current scrapes."""
        self._one_begins = asyncio.Lock()
        self._one_probe_begins = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await _read_body(scope, receive, keeps_it=self._keeps_bodies)
        except _TooLarge:
            await _TOO_LARGE(scope, receive, send)
            return
        if body is None:
            return
        is_probe = scope["path"] in {*PROBES, SCRAPE}
        async with self._one_probe_begins if is_probe else self._one_begins:
            await asyncio.sleep(0)
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_whole() -> Message:
            return unread.pop() if unread else await receive()

        if scope["path"] in PROBES:
            await self._app(scope, receive_whole, send)
        elif scope["path"] == SCRAPE:
            await self._scrape(scope, receive_whole, send)
        else:
            await self._work(scope, receive_whole, send)

    async def _scrape(self, scope: Scope, receive: Receive, send: Send) -> None:
        address = (scope["client"] or ("",))[0]
        bounds = self._bounds
        if len(self._scraping) >= bounds.scrapes or self._scraping.count(address) >= bounds.scrapes_of_address:
            await _TOO_MANY_SCRAPES(scope, receive, send)
            return
        self._scraping.append(address)
        try:
            # When the answer ends early, uvicorn closes the connection.
            async with asyncio.timeout(bounds.scrape):
                await self._app(scope, receive, send)
        except TimeoutError:
            pass
        finally:
            self._scraping.remove(address)

    async def _work(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(self._bounds.place):
                await self._places.acquire()
        except TimeoutError:
            await _TOO_MANY(scope, receive, send)
            return
        is_at_work = True

        def leave() -> None:
            nonlocal is_at_work
            if is_at_work:
                is_at_work = False
                self._places.release()

        async def leave_and_send(message: Message) -> None:
            leave()
            await send(message)

        try:
            await self._app(scope, receive, leave_and_send)
        finally:
            leave()


class _TooLarge(Exception):
    """A request's body is larger than it may be."""


async def _read_body(scope: Scope, receive: Receive, *, keeps_it: bool) -> bytes | None:
    """The body, empty unless it is to be kept; None if the client is gone before it is complete."""
    if int(Headers(scope=scope).get("content-length", "0")) > MAX_BODY_BYTES:
        raise _TooLarge
    body = bytearray()
    length = 0
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        piece = message.get("body", b"")
        length += len(piece)
        if keeps_it:
            body += piece
        if length > MAX_BODY_BYTES:
            raise _TooLarge
        more = message.get("more_body", False)
    return bytes(body)
