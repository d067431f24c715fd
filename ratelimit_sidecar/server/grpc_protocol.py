"""asyncio's side of a client's connection: received bytes go into its `grpc_connection.Connection`, calls are answered
at once, and all answers to one read are sent in one write.

Back-pressure: while a client does not read its answers, nothing more is read from it. A long read is handled in slices
for a quantum of time; then its answers are sent, and other connections have their turns.

The loop's time is shared by address (`turns.py`). When an address has sent more than is handled at once, none of its
connections is read until its turn comes: reading thousands of connections takes long, however little each has sent.

With TLS, bytes are decrypted within the same slices, so that a client pays for what it makes OpenSSL do, too. Each step
of a handshake waits for a turn, in a queue of its own: it takes longer than many calls.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from functools import partial
from typing import Final

from ratelimit_sidecar.crdt.waiting import PendingDecision
from ratelimit_sidecar.cycle_collector import young_objects
from ratelimit_sidecar.server.bounds import ServerBounds
from ratelimit_sidecar.server.budget import AddressBudget, ConnectionLimiter, Places
from ratelimit_sidecar.server.events import Call, Event, StreamCancelled, StreamData, StreamStarted
from ratelimit_sidecar.server.front_end_counts import FrontEndCounts
from ratelimit_sidecar.server.grpc_connection import PROTOCOL_ERROR, Connection
from ratelimit_sidecar.server.rpc import NO_PLACE, SHUTTING_DOWN, FailureLog, Handler, RpcError
from ratelimit_sidecar.server.streaming import StreamingCall
from ratelimit_sidecar.server.tls_session import HANDSHAKE_BYTES, TlsSession
from ratelimit_sidecar.server.turns import QUANTUM_NS, StepQueue, Turns

SLICE_BYTES: Final = 4_096
"""The most bytes that are handled in one piece: at most 130 calls, since none is shorter than 31 bytes, or 150
KeyUpdate records of TLS, which take OpenSSL 2 ms.
"""

_OBJECTS: Final = 20
_OBJECTS_OF_STREAM: Final = 35
"""How many objects the cycle collector sees of a connection, and of a streaming call."""

MAX_WRITE_BUFFER_BYTES: Final = 262_144
"""The bytes of unread answers beyond which nothing more is read from the client."""

READ_NS: Final = 10_000
"""The estimated time of a read without the handling of its bytes: the system calls, and asyncio's part."""

LARGE_READ_NS: Final = 50_000
"""The estimated time of a read of all that asyncio takes at once, 256 KiB: so much may have come while a connection
waited.
"""

_perf_counter_ns: Final = time.perf_counter_ns


class FrontEndState:
    """What all connections of a front end share: the handlers of their calls, bounds, counters, and the loop's turns.

    Args:
        handlers: by path.
        tasks: for streaming calls.
        turns: of the event loop.
    """

    def __init__(
        self, handlers: Mapping[bytes, Handler], bounds: ServerBounds, tasks: asyncio.TaskGroup, turns: Turns
    ) -> None:
        self.handlers = handlers
        self.bounds = bounds
        self.tasks = tasks
        self.turns = turns
        self.connection_limiter = ConnectionLimiter(bounds.connections, bounds.held_bytes)
        self.counts = FrontEndCounts()
        self.failures = FailureLog()
        self.connections: set[GrpcProtocol] = set()
        self.lost = asyncio.Event()
        """Set when a connection is closed."""
        self.release_queue = StepQueue()
        """The steps that free them."""
        self.is_draining = False
        self.accepted = 0
        """Connections since the start."""
        self.now_s = 0.0
        """The time of the last check, or accepted connection."""

    def enter(self, address: str) -> AddressBudget | None:
        """Count a new connection. Returns the budget of its address, or None if it must be closed."""
        self.accepted += 1
        budget = self.connection_limiter.enter(address)
        if budget is None:
            self.counts.closed_connections["limit"] += 1
        return budget


class GrpcProtocol:
    """The `asyncio.Protocol` of one connection (https://docs.python.org/3/library/asyncio-protocol.html).

    Args:
        budget: of the client's address. It is returned to `connection_limiter` when the connection is closed.
        age_s: the connection is drained at this age; None for never.
        tls: None for plain text.
    """

    def __init__(
        self, shared: FrontEndState, budget: AddressBudget, age_s: float | None, tls: TlsSession | None = None
    ) -> None:
        self._shared = shared
        self._budget = budget
        self._turns = shared.turns
        self._tls = tls
        self._is_shaking_hands = tls is not None
        self._queue = budget.call_queue if tls is None else budget.handshake_queue
        self._connection = Connection(
            shared.handlers, shared.bounds, budget, shared.counts, now_s=shared.now_s, age_s=age_s
        )
        self._transport: asyncio.Transport | None = None
        self._streaming: dict[int, StreamingCall] = {}
        self._waiting: dict[int, PendingDecision] = {}
        """The waits of calls that are answered later, by stream."""
        self._blocked: set[StreamingCall] = set()
        """Streaming calls that wait for their client to read."""
        self._unfed: memoryview | None = None
        """Received bytes that were not given to the connection yet."""
        self._events: list[Event] = []
        self._next_event = 0
        """The index of the next one to be handled of `_events`, the events of the last slice."""
        self._is_in_line = False
        """True while it waits for its address' turn."""
        self._is_paused = False
        """True while the client does not read its answers."""
        self._is_closing = False
        self._unwritten = 0
        self._unwritten_since_s = shared.now_s

    # What asyncio calls

    def connection_made(self, transport: asyncio.Transport) -> None:
        shared = self._shared
        self._transport = transport
        shared.connections.add(self)
        self._queue.on_waiting.add(self._stand_in_line)
        young_objects.note(_OBJECTS)
        transport.set_write_buffer_limits(MAX_WRITE_BUFFER_BYTES)
        if shared.is_draining:
            self._connection.drain()
        self._flush()

    def data_received(self, data: bytes) -> None:
        if self._queue.is_waiting or self._is_shaking_hands:
            self._keep_unhandled(memoryview(data))
            self._stand_in_line()
        else:
            started_ns = _perf_counter_ns()
            self._feed(data)
            self._turns.note(self._queue, _perf_counter_ns() - started_ns + READ_NS)

    def _feed(self, data: bytes) -> None:
        if self._tls is None and len(data) <= SLICE_BYTES:
            events = self._connection.receive(data)
            if len(events) > 1 or self._connection.has_more:
                self._events = events
                self._feed_slices()
            else:
                for event in events:
                    self._handle(event)
                self._flush()
        else:
            self._unfed = memoryview(data)
            self._feed_slices()

    def _keep_unhandled(self, rest: memoryview) -> None:
        """Keep bytes that are not handled now. A client that makes too many wait is disconnected."""
        self._unfed = rest
        self._count_unhandled()
        if self._connection.closed:
            self._flush()

    def eof_received(self) -> bool:
        """The client has half-closed; asyncio closes once everything is written."""
        self._turns.note(self._queue, READ_NS)
        return False

    def pause_writing(self) -> None:
        self._is_paused = True
        self._stop_reading()
        self._count_unread()

    def resume_writing(self) -> None:
        self._is_paused = False
        self._flush()
        if self._is_behind():
            self._stand_in_line()
        self._resume_reading()

    def _count_unread(self) -> None:
        transport = self._transport
        if transport is not None and not self._connection.count_unread(transport.get_write_buffer_size()):
            self._is_closing = True
            self._shared.counts.closed_connections["limit"] += 1
            transport.abort()

    def connection_lost(self, _error: Exception | None) -> None:
        """Thousands may be lost at once, so what they held is freed in turns."""
        self._transport = None
        self._connection.closed = True
        self._turns.join(self._shared.release_queue, self._end)

    def _end(self) -> None:
        self._forget_unhandled()
        self._cancel_all()
        self._connection.release()
        self._queue.on_waiting.discard(self._stand_in_line)
        self._shared.connection_limiter.leave(self._budget)
        self._shared.connections.discard(self)
        self._shared.lost.set()

    # What the front end calls

    def check(self, now_s: float) -> None:
        """End calls and connections that take too long."""
        transport = self._transport
        if transport is None:
            return
        unwritten = transport.get_write_buffer_size()
        if not self._unwritten or unwritten < self._unwritten:
            self._unwritten_since_s = now_s
        self._unwritten = unwritten
        if unwritten and now_s - self._unwritten_since_s >= self._shared.bounds.stalled:
            if not self._is_closing:
                self._shared.counts.closed_connections["stalled"] += 1
            transport.abort()
            return
        self._count_unread()
        self._connection.check(now_s)
        if self._is_paused and self._connection.closed:
            transport.abort()
        self._flush()

    def drain(self) -> None:
        """Take no new calls, and close when those in flight are answered. The caller ends the streaming calls first,
        since they might never end by themselves.
        """
        self._connection.drain()
        self._flush()

    def streaming_calls(self) -> list[StreamingCall]:
        """The streaming calls that are open now."""
        return list(self._streaming.values())

    def abort(self) -> None:
        """Close at once."""
        if self._transport is not None:
            self._shared.counts.closed_connections["drain"] += 1
            self._transport.abort()

    def fail(self) -> None:
        """Close at once after an internal error."""
        if self._transport is not None:
            self._shared.counts.closed_connections["internal"] += 1
            self._transport.abort()

    # Calls

    def _is_behind(self) -> bool:
        """True if some received bytes or events are not handled yet."""
        if self._unfed is not None or self._next_event < len(self._events) or self._connection.has_more:
            return True
        tls = self._tls
        return tls is not None and tls.has_more

    def _forget_unhandled(self) -> None:
        self._unfed = None
        self._events = []
        self._next_event = 0
        if self._tls is not None:
            self._tls.has_more = False
        self._connection.count_unhandled(0)

    def _count_unhandled(self) -> None:
        """Count the memory of received bytes that wait, and of a handshake that has begun."""
        size = 0 if self._unfed is None else len(self._unfed)
        self._connection.count_unhandled(size + HANDSHAKE_BYTES if self._is_shaking_hands else size)

    def _feed_slices(self) -> None:
        """Handle received bytes for one quantum; what is left waits for a turn."""
        started_ns = _perf_counter_ns()
        while True:
            events = self._events
            while self._next_event < len(events):
                event = events[self._next_event]
                self._next_event += 1
                self._handle(event)
                if _perf_counter_ns() - started_ns >= QUANTUM_NS:
                    break
            if not self._is_behind() or self._is_paused:
                break
            if _perf_counter_ns() - started_ns >= QUANTUM_NS:
                self._count_unhandled()
                self._flush()
                if self._transport is not None and not self._is_paused and not self._is_closing:
                    self._stand_in_line()
                return
            tls = self._tls
            if self._connection.has_more:
                data: bytes | memoryview = b""
            elif tls is None:
                data = self._next_slice()
            else:
                data = self._decrypt(tls)
            if data or self._connection.has_more:
                self._events = self._connection.receive(data)
                self._next_event = 0
        if not self._is_behind():
            self._events = []
            self._next_event = 0
            self._count_unhandled()
        self._flush()

    def _next_slice(self) -> memoryview:
        """Take a slice of the received bytes that wait."""
        rest = self._unfed
        assert rest is not None
        self._unfed = rest[SLICE_BYTES:] if len(rest) > SLICE_BYTES else None
        return rest[:SLICE_BYTES]

    def _decrypt(self, tls: TlsSession) -> bytes:
        """Take a slice of what the received bytes say, or go on with the handshake, which says nothing."""
        if not tls.has_more:
            tls.receive(self._next_slice())
        data = tls.read(SLICE_BYTES)
        if tls.is_over:
            self._forget_unhandled()
            if tls.reject_reason:
                self._connection.terminate(PROTOCOL_ERROR, tls.reject_reason)
            self._flush()
            if not self._is_closing:
                self._close()
        elif self._is_shaking_hands and tls.is_established:
            self._is_shaking_hands = False
            self._queue.on_waiting.discard(self._stand_in_line)
            self._queue = self._budget.call_queue
            self._queue.on_waiting.add(self._stand_in_line)
        return data

    def _stand_in_line(self) -> None:
        """Read nothing until the address has its turn."""
        if not self._is_in_line:
            self._is_in_line = True
            self._stop_reading()
            self._turns.join(self._queue, self._on_turn)

    def _on_turn(self) -> None:
        self._is_in_line = False
        if self._transport is None or self._is_paused:
            return
        try:
            if self._is_behind():
                self._feed_slices()
            self._resume_reading()
            self._turns.charge(LARGE_READ_NS)
        except Exception as failure:
            # Others wait for their turns.
            self._shared.failures.status_of("bytes of a client", failure)
            self.fail()

    def _stop_reading(self) -> None:
        if self._transport is not None and not self._is_closing:
            self._transport.pause_reading()

    def _resume_reading(self) -> None:
        if self._transport is None or self._is_closing or self._is_paused or self._is_in_line or self._is_behind():
            return
        self._transport.resume_reading()

    def _handle(self, event: Event) -> None:
        if isinstance(event, Call):
            self._answer(event)
        elif isinstance(event, StreamData):
            streaming = self._streaming.get(event.stream_id)
            if streaming is not None:
                streaming.feed(event.data, event.ended)
        elif isinstance(event, StreamStarted):
            self._begin_streaming(event)
        elif isinstance(event, StreamCancelled):
            streaming = self._streaming.get(event.stream_id)
            if streaming is not None:
                streaming.cancel()
            waiting = self._waiting.pop(event.stream_id, None)
            if waiting is not None:
                waiting.cancel()

    def _answer(self, call: Call, waiting: PendingDecision | None = None) -> None:
        """Answer a call.

        Args:
            waiting: the wait that its handler returned earlier, which has a result now; None to call the handler.
        """
        try:
            response = call.handler(call.message, call.request) if waiting is None else waiting.result()
            if isinstance(response, PendingDecision):
                if self._connection.defer(call):
                    self._wait(call, response)
                    return
                response.end_now()
                response = response.result()
        except RpcError as error:
            self._connection.refuse(call, error)
        except Exception as failure:
            self._connection.refuse(call, self._shared.failures.status_of(call.path, failure, call.request))
        else:
            self._connection.answer(call, response)

    def _wait(self, call: Call, waiting: PendingDecision) -> None:
        # The handler keeps the message itself.
        call.message = b""
        self._waiting[call.request.stream_id] = waiting
        waiting.on_end = partial(self._answer_deferred, call, waiting)

    def _answer_deferred(self, call: Call, waiting: PendingDecision) -> None:
        del self._waiting[call.request.stream_id]
        self._answer(call, waiting)
        self._flush()

    def _cancel_all(self) -> None:
        """End all calls: there is no client to answer."""
        for call in self._streaming.values():
            call.cancel()
        for waiting in self._waiting.values():
            waiting.cancel()
        self._waiting.clear()

    def _begin_streaming(self, opened: StreamStarted) -> None:
        stream_id = opened.stream_id
        if self._shared.is_draining:
            # The client has not seen the GOAWAY yet.
            self._connection.finish(stream_id, SHUTTING_DOWN)
            return
        places = opened.method.places
        if places is not None and not places.enter(self, self._budget.address):
            self._connection.finish(stream_id, NO_PLACE)
            return
        call = StreamingCall(
            opened,
            self._connection,
            self._shared.failures,
            self._flush,
            turns=self._turns,
            queue=self._budget.stream_queue,
            blocked=self._blocked,
            fail=self.fail,
        )
        self._streaming[stream_id] = call
        young_objects.note(_OBJECTS_OF_STREAM)
        call.start(self._shared.tasks, lambda: self._end_streaming(stream_id, places))

    def _end_streaming(self, stream_id: int, places: Places | None) -> None:
        del self._streaming[stream_id]
        if places is not None:
            places.leave(self, self._budget.address)

    def _flush(self) -> None:
        transport = self._transport
        if transport is None or self._is_paused or self._is_closing:
            return
        connection = self._connection
        data = connection.output()
        if self._tls is not None:
            data = self._tls.send(data)
        if data:
            transport.write(data)
        if connection.closed:
            self._close()
            return
        if self._streaming or self._waiting:
            events = connection.events_of_output()
            if self._next_event < len(self._events):
                # Handle them after the earlier events.
                self._events.extend(events)
            else:
                for event in events:
                    self._handle(event)
        if self._blocked:
            for call in self._blocked:
                call.wake()
            self._blocked.clear()

    def _close(self) -> None:
        """Close when everything is written."""
        self._is_closing = True
        self._forget_unhandled()
        transport = self._transport
        if transport is not None:
            if self._tls is not None:
                transport.write(self._tls.end())
            transport.close()
        self._cancel_all()
