"""The connections of proxies that ask over HTTP/1.1, such as Envoys with ext_authz.

A proxy has one connection for each request under way, and denies the request, or lets it pass, when it is closed. So,
unlike the console's, one is closed for another only while it is idle. An address may have as many as are free
(`ConnectionLimiter`); beyond that the longest idle ones of all are closed, or else the new one. Even that may cost a
request, which the proxy is about to send on it. So an address with half of what it may have is told with each answer to
close that connection itself, and idle ones never take up all of its places. A new connection is idle, too: an Envoy
whose client has gone keeps the one that it opened for it, and sends the next request on it whenever that comes.

Thousands of them may be read at the same moment. As in the gRPC front end, an address that sends more than is handled
at once waits for its turns (`server.turns`), and so does the end of a connection.
"""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import Final

import h11
from uvicorn import Config
from uvicorn.protocols.http.flow_control import CLOSE_HEADER
from uvicorn.server import ServerState

from ratelimit_sidecar.console.bounds import HttpBounds
from ratelimit_sidecar.console.connection import MAX_HEAD_BYTES, PIECE_BYTES, BoundedConnection
from ratelimit_sidecar.server.budget import AddressBudget, ConnectionLimiter
from ratelimit_sidecar.server.grpc_protocol import LARGE_READ_NS, READ_NS
from ratelimit_sidecar.server.turns import StepQueue, Turns

MAX_CONNECTIONS: Final = 4_096
"""As many as of gRPC. By its default circuit breaker an Envoy opens 1,024."""

KEPT_HEAD_BYTES: Final = MAX_HEAD_BYTES + PIECE_BYTES
"""So much is kept of a head that is not complete: a piece more than is accepted."""

MAX_UNREAD_BYTES: Final = 128 * 1_024 * 1_024
"""An address may hold a third of it: a head for each of its connections."""

HEADER_BYTES: Final = 200
"""What h11 and uvicorn keep of a short header until the request's body is there."""

MAKE_ROOM: Final = 2
"""So many idle connections are closed for a new one: what is free, and what its address has, may each be one short."""


class ProxyPlaces:
    """The places of the connections of one server, and their turns.

    Args:
        most: connections at once.
        turns: of the event loop.
        unread_bytes: the most memory for received bytes that wait for their turn.
    """

    def __init__(self, most: int, turns: Turns, unread_bytes: int = MAX_UNREAD_BYTES) -> None:
        self.turns = turns
        self.release_queue = StepQueue()
        """The steps that free them."""
        self.refused = 0
        """Connections for which there was no place."""
        self._limiter = ConnectionLimiter(most, unread_bytes)
        self._idle: dict[ProxyConnection, None] = {}
        """The longest idle one first."""

    def enter(self, address: str) -> AddressBudget | None:
        """Take a place for a new connection of this address, to be given to `leave` later. Returns None if there is
        none: close it.
        """
        budget = self._limiter.enter(address)
        for _ in range(MAKE_ROOM):
            if budget is None and self._idle:
                next(iter(self._idle)).abort()
                budget = self._limiter.enter(address)
        self.refused += budget is None
        return budget

    def is_crowded(self, connection: ProxyConnection) -> bool:
        """Whether it should be closed by its proxy after the answer."""
        return self._limiter.is_crowded(connection.budget)

    def leave(self, connection: ProxyConnection) -> None:
        """Give its place back."""
        self.note_idle(connection, is_idle=False)
        self._limiter.leave(connection.budget)

    def note_idle(self, connection: ProxyConnection, *, is_idle: bool) -> None:
        """Note whether it may be closed for another one."""
        if is_idle is (connection in self._idle):
            return
        if is_idle:
            self._idle[connection] = None
        else:
            del self._idle[connection]


class ProxyConnection(BoundedConnection):
    """A proxy's connection.

    Args:
        budget: its place, from `ProxyPlaces.enter`. It leaves it when it is lost, or at `forget`.
    """

    def __init__(
        self, places: ProxyPlaces, budget: AddressBudget, config: Config, server_state: ServerState, bounds: HttpBounds
    ) -> None:
        super().__init__(config, server_state, bounds)
        self.budget = budget
        self._places = places
        self._turns = places.turns
        self._queue = budget.call_queue
        self._unread = bytearray()
        """Received bytes that wait for a turn."""
        self._waiting_bytes = 0
        """Of the headers of a request whose body is not there, counted in the budget."""
        self._is_in_line = False
        self._has_left = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        # uvicorn's timer of idle connections, which it sets after each answer.
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)
        super().connection_made(transport)
        self._queue.on_waiting.add(self._stand_in_line)

    def data_received(self, data: bytes) -> None:
        if self._queue.is_waiting or self._is_in_line:
            self._keep(data)
            return
        started_ns = time.perf_counter_ns()
        super().data_received(data[:PIECE_BYTES])
        if len(data) > PIECE_BYTES:
            self._keep(data[PIECE_BYTES:])
        self._turns.note(self._queue, time.perf_counter_ns() - started_ns + READ_NS)

    def eof_received(self) -> None:
        self._turns.note(self._queue, READ_NS)

    def on_response_complete(self) -> None:
        # An idle connection need not keep the last request's headers.
        self.cycle.scope = self.scope = {}  # type: ignore[typeddict-item]
        self.headers = []
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self.forget()
        self._turns.join(self._places.release_queue, partial(super().connection_lost, exc))

    def forget(self) -> None:
        super().forget()
        if not self._has_left:
            self._has_left = True
            self._queue.on_waiting.discard(self._stand_in_line)
            self.budget.count(-len(self._unread) - self._waiting_bytes)
            self._unread.clear()
            self._waiting_bytes = 0
            self._places.leave(self)

    def _keep(self, data: bytes) -> None:
        if self._has_left:
            return
        if self.conn.their_state is h11.IDLE:
            passed = self.conn.trailing_data[0]
            excess = len(passed) + len(self._unread) + len(data) - KEPT_HEAD_BYTES
            if excess > 0 and b"\r\n\r\n" not in b"".join((passed, self._unread, data)):
                # No more of such a head is needed to refuse it.
                data = data[: max(0, len(data) - excess)]
        if not self.budget.allows(len(self._unread) + len(data), len(data)):
            self.abort()
            return
        self.budget.count(len(data))
        self._unread += data
        self._stand_in_line()

    def _stand_in_line(self) -> None:
        """Read nothing until the address has its turn."""
        if self._is_in_line or self.transport.is_closing():
            return
        self._is_in_line = True
        # The next request may have come already.
        self._places.note_idle(self, is_idle=False)
        self.transport.pause_reading()
        self._turns.join(self._queue, self._take_turn)

    def _take_turn(self) -> None:
        self._is_in_line = False
        if self.transport.is_closing():
            return
        piece = bytes(self._unread[:PIECE_BYTES])
        del self._unread[:PIECE_BYTES]
        self.budget.count(-len(piece))
        if piece:
            super().data_received(piece)
        if self._unread:
            self._stand_in_line()
        elif not (self.transport.is_closing() or self.flow.read_paused):
            self.transport.resume_reading()
            self._turns.charge(LARGE_READ_NS)
        self._watch()

    def _end_slow_request(self) -> None:
        if self._is_in_line:
            # What is missing of it may have come.
            self._deadline = self.loop.call_later(self._bounds.request, self._end_slow_request)
        else:
            super()._end_slow_request()

    def _count_waiting(self) -> None:
        waiting = HEADER_BYTES * len(self.headers) if self.conn.their_state is h11.SEND_BODY else 0
        more = waiting - self._waiting_bytes
        if more > 0 and not self.budget.allows(len(self._unread) + waiting, more):
            self.abort()
            return
        self.budget.count(more)
        self._waiting_bytes = waiting

    def _watch(self) -> None:
        super()._watch()
        if not self._has_left:
            self._count_waiting()
        if not self._has_left:
            self._places.note_idle(self, is_idle=self.is_idle and not self._is_in_line)
            if self.is_at_work and self._places.is_crowded(self) and CLOSE_HEADER not in self.headers:
                # uvicorn answers as if the proxy had asked for it.
                self.headers.append(CLOSE_HEADER)
