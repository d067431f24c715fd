"""One HTTP/1.1 connection: uvicorn's, with bounds on how long a slow client can hold it.

uvicorn itself only bounds the time between two requests. Here a request has to arrive, and an answer to be read,
within a time (`console.bounds`). When too many of the console are open, one is closed: from the address with the most
connections, the one that has waited longest for its client, or if none waits, one that is no probe. So slow or busy
clients, however many, cannot keep probes out. (Those of proxies are in `console.proxies`.)

A client that sends requests before it has the answer to the last (pipelining, which no client of ours does) has its
connection closed after that answer. So each connection waits for its client now and then.
"""

from __future__ import annotations

import asyncio
import sys
import traceback
from collections import Counter
from enum import Enum, IntEnum, auto
from itertools import count

import h11
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from ratelimit_sidecar.console.bounds import HttpBounds
from ratelimit_sidecar.console.requests import PROBES, SCRAPE

PIECE_BYTES = 4_096
"""The bytes that h11 gets at once. It limits only incomplete heads, so a longer head in a single read would be
accepted, and one of 128 KiB holds up the event loop for 50 ms.
"""

MAX_HEAD_BYTES = 16_384
"""The longest incomplete head of a request."""

MAX_HEAD_LINES = 512
"""The most headers of a request. Each costs some microseconds; Envoy sends at most 100 by default."""


class _Claim(IntEnum):
    """How strongly a connection claims to stay open when one must be closed: the smallest is closed first."""

    SLOW = auto()
    UNANSWERED = auto()
    NEW = auto()
    PROBED = auto()


class _Wait(Enum):
    """The event that the connection waits for, which decides its deadline."""

    SEND_REQUEST = auto()
    TAKE_ANSWER = auto()
    SEND_NEXT_REQUEST = auto()
    """uvicorn bounds this wait."""


_numbers = count()
"""Numbers the connections in the order they came: uvloop's clock goes by milliseconds, in which several may come."""


class BoundedConnection(H11Protocol):
    """uvicorn's connection with these bounds on time."""

    def __init__(self, config: Config, server_state: ServerState, bounds: HttpBounds) -> None:
        super().__init__(config, server_state, {})
        self._bounds = bounds
        self._wait: _Wait | None = None
        """None while the application handles a request."""
        self._waits_since = 0.0
        self._deadline: asyncio.TimerHandle | None = None
        self._head_lines = 0
        """The lines received of a head that is not complete."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # So writing is paused whenever the client has not read everything.
        transport.set_write_buffer_limits(high=0)
        self._watch()

    def data_received(self, data: bytes) -> None:
        for start in range(0, len(data), PIECE_BYTES):
            piece = data[start : start + PIECE_BYTES]
            if self.conn.their_state is h11.IDLE:
                self._head_lines += piece.partition(b"\r\n\r\n")[0].count(b"\n")
                if self._head_lines > MAX_HEAD_LINES:
                    self.send_400_response("too many headers")
                    break
            super().data_received(piece)
            if self.conn.their_state is not h11.IDLE:
                self._head_lines = 0
            if self.transport.is_closing():
                break
        self._watch()

    def on_response_complete(self) -> None:
        if self.conn.their_state is h11.DONE and self.conn.trailing_data[0]:
            # The client has pipelined.
            self.transport.close()
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        # Of a connection that was reset uvicorn leaves this timer, and it holds the connection until it is over.
        self._unset_keepalive_if_required()
        if self._deadline is not None:
            self._deadline.cancel()

    def send_400_response(self, msg: str) -> None:
        # h11's exception is a local of a frame in its own traceback, and so is this connection; the garbage collection
        # that would find them is practically never run (app.GC_THRESHOLDS).
        error = sys.exception()
        if error is not None:
            traceback.clear_frames(error.__traceback__)
        # A body can turn out to be malformed after its request was answered with 413.
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.abort()

    def abort(self) -> None:
        """Close without sending the rest, and forget the connection at once."""
        self.forget()
        self.transport.abort()

    def forget(self) -> None:
        """Do not count it as open any more. May be called again."""
        self.connections.discard(self)

    @property
    def is_idle(self) -> bool:
        """Whether all its requests are answered, and no part of the next one was read."""
        return self._wait is _Wait.SEND_NEXT_REQUEST

    @property
    def is_at_work(self) -> bool:
        """Whether the application handles a request."""
        return self._wait is None

    def _watch(self) -> None:
        """Set a new deadline if the connection now waits for another event; call this after each one.

        While it waits for the same event, the deadline stays. So a request that trickles in gets no more time than one
        that does not come.
        """
        wait = self._waits_for()
        if wait is self._wait:
            return
        self._wait = wait
        self._waits_since = self.loop.time()
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if wait is _Wait.SEND_REQUEST:
            self._deadline = self.loop.call_later(self._bounds.request, self._end_slow_request)
        elif wait is _Wait.TAKE_ANSWER:
            self._deadline = self.loop.call_later(self._bounds.answer, self.abort)

    def _end_slow_request(self) -> None:
        """The time for a request is over, and not all of it was read."""
        self.abort()

    def _waits_for(self) -> _Wait | None:
        if self.flow.write_paused:
            return _Wait.TAKE_ANSWER
        if self.timeout_keep_alive_task is not None:
            return _Wait.SEND_NEXT_REQUEST
        if self.conn.their_state in (h11.IDLE, h11.SEND_BODY):
            return _Wait.SEND_REQUEST
        return None


class ConsoleConnection(BoundedConnection):
    """One of the console's, which may have to make room for a new one."""

    def __init__(self, config: Config, server_state: ServerState, bounds: HttpBounds) -> None:
        super().__init__(config, server_state, bounds)
        self._number = next(_numbers)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._bounds.connections:
            self._make_room()

    def _make_room(self) -> None:
        others = [other for other in self.connections if isinstance(other, ConsoleConnection) and other is not self]
        held = Counter(other._address for other in others)
        order = [(-held[other._address], other._claim(), other._waits_since, other._number, other) for other in others]
        *_, claim, _, _, other = min(order)
        (self if claim is _Claim.PROBED else other).abort()

    def _claim(self) -> _Claim:
        if self._wait is not None:
            is_new = self.loop.time() - self._waits_since < self._bounds.new
            return _Claim.NEW if is_new else _Claim.SLOW
        return _Claim.PROBED if self.scope["path"] in {*PROBES, SCRAPE} else _Claim.UNANSWERED

    @property
    def _address(self) -> str:
        return self.client[0] if self.client else ""
