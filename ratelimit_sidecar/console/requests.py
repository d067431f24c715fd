"""Bounds on the console's requests, whatever the application: an ASGI middleware.

A request takes part in MAX_REQUESTS from when it has come whole until its answer begins, so that none of them waits for
a client: slow ones can't keep others out. Probes need no place among them, and scrapes have MAX_SCRAPES of their own,
until their answers, which are made while they are sent, have been taken. One request begins in a turn of the event
loop, and one probe or scrape, in the order in which they came: however many come, decisions wait for no more.
"""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_REQUESTS = 32
"""That the application works on at once; more are answered 503."""
PROBES = frozenset({"/healthz", "/readyz", "/healthcheck"})
"""Answered at once, from what is known."""
SCRAPE = "/metrics"
MAX_SCRAPES = 8
MAX_SCRAPES_OF_ADDRESS = 4
"""A pair of Prometheus servers behind one address, and people."""
SCRAPE_SECONDS = 60.0
"""After which an answer to one that is not taken is given up: Prometheus' longest usual interval."""
MAX_BODY_BYTES = 262_144
"""Of a request to /json; a larger one is answered 413. Parsing so much JSON keeps Python's lock for 2 ms."""

_TOO_LARGE = JSONResponse({"error": f"a body may have {MAX_BODY_BYTES} bytes"}, 413)
_TOO_MANY = JSONResponse({"error": f"{MAX_REQUESTS} other requests are being answered"}, 503)
_TOO_MANY_SCRAPES = JSONResponse({"error": "other scrapes are being answered"}, 503)


class BoundedRequests:
    """Reads a request's body before the application is called."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._at_work: set[object] = set()
        self._scraping: list[str] = []
        """The addresses of those who do."""
        self._one_begins = asyncio.Lock()
        self._one_probe_begins = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await _read_body(scope, receive)
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
        if len(self._scraping) >= MAX_SCRAPES or self._scraping.count(address) >= MAX_SCRAPES_OF_ADDRESS:
            await _TOO_MANY_SCRAPES(scope, receive, send)
            return
        self._scraping.append(address)
        try:
            # uvicorn closes a connection whose answer ends before it is whole.
            async with asyncio.timeout(SCRAPE_SECONDS):
                await self._app(scope, receive, send)
        except TimeoutError:
            pass
        finally:
            self._scraping.remove(address)

    async def _work(self, scope: Scope, receive: Receive, send: Send) -> None:
        if len(self._at_work) >= MAX_REQUESTS:
            await _TOO_MANY(scope, receive, send)
            return
        place = object()

        async def leave_and_send(message: Message) -> None:
            self._at_work.discard(place)
            await send(message)

        self._at_work.add(place)
        try:
            await self._app(scope, receive, leave_and_send)
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
