"""HTTP/2 load in which every request can ask for another key; h2load sends the same body again and again.

Frames are laid from prepared parts and answers only counted, by their frame headers (RFC 9113, section 4.1), so a
request costs a few microseconds and the server remains what is measured. Closed loop, or at a rate, for which latency
counts from when a request was due: a server that stalls is not spared the requests that it held up.
"""

from __future__ import annotations

import random
import select
import selectors
import socket
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from benchmarks.serving.frames import (
    ACK,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEAD_BYTES,
    HEADERS,
    PING,
    RST_STREAM,
    SETTINGS,
    Headers,
    authority,
    connect,
    frame,
    frame_head,
    greeting,
    header_block,
)
from benchmarks.serving.h2load import Load, LoadFailed
from benchmarks.serving.requests import framed, request

_READ_BYTES = 1 << 18

_ADMITTED = b"\x08\x01"
"""How a RateLimitResponse begins whose overall code is OK: field 1, value 1."""
_MESSAGE_AT = HEAD_BYTES + 5
"""In a DATA frame that begins a gRPC message."""

ANSWER_WITHIN_SECONDS = 10.0

_KEY_DIGITS = 7
Body = Callable[[], bytes]
"""Gives the next request's framed message; raises StopIteration when there are no more."""


def uniform(keys: int, rule: str = "tenant", descriptors: int = 1) -> Body:
    """Requests whose values are drawn from so many, each as likely as any other.

    Args:
        rule: the key of each descriptor.
        descriptors: in each request, at least 1; by chance two of them may be for the same value.
    """
    draw = random.Random(1).random
    body = _body_of_numbers(rule, descriptors)
    drawn = range(descriptors)
    return lambda: body % tuple([int(draw() * keys) for _ in drawn])


def each(keys: int, rule: str = "tenant") -> Body:
    """A request with one descriptor for each of the values that `uniform` draws from, once."""
    return map(_body_of_numbers(rule, 1).__mod__, range(keys)).__next__


def _body_of_numbers(rule: str, descriptors: int) -> bytes:
    """What `%` makes a request's framed message of; all are of one length, so prefixes need not be made anew."""
    zeros = "0" * _KEY_DIGITS
    message = framed(request(*[[(rule, f"tenant-{zeros}")]] * descriptors))
    return message.replace(b"%", b"%%").replace(zeros.encode(), b"%%0%dd" % _KEY_DIGITS)


@dataclass(slots=True)
class Answered:
    """The answers that a generator has got, and how long they took.

    Args:
        latencies_ns: of each answer, in the order they came.
        admitted: how many of the answers admit the request; the others deny it, or are an error.
    """

    seconds: float
    latencies_ns: list[int]
    admitted: int

    @property
    def per_second(self) -> float:
        return len(self.latencies_ns) / self.seconds

    def percentile_us(self, percent: float) -> float:
        ordered = sorted(self.latencies_ns)
        return ordered[min(int(len(ordered) * percent / 100), len(ordered) - 1)] / 1e3


@dataclass(slots=True)
class _Connection:
    socket: socket.socket
    next_stream: int = 1
    buffer: bytes = b""
    began_ns: dict[int, int] = field(default_factory=dict)
    """When the requests under way were due, by stream."""

    def fileno(self) -> int:
        return self.socket.fileno()


class Generator:
    """Holds the connections; `with Generator(address, Load(2, 16)) as generator: generator.run(...)`.

    Args:
        headers: sent with every request, besides those of gRPC.
    """

    def __init__(self, address: str, load: Load, headers: Headers = ()) -> None:
        self._streams = load.streams
        block = header_block(authority(address), headers)
        self._head = frame_head(len(block), HEADERS, END_HEADERS), block
        self._selector = selectors.DefaultSelector()
        self.connections = [_Connection(connect(address)) for _ in range(load.connections)]
        for connection in self.connections:
            connection.socket.sendall(greeting())
            self._selector.register(connection.socket, selectors.EVENT_READ, connection)
        self._latencies_ns: list[int] = []
        self._admitted = 0

    def __enter__(self) -> Generator:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self.connections:
            connection.socket.close()
        self._selector.close()

    def run(self, body: Body, seconds: float | None, rate: float | None = None) -> Answered:
        """Send for a while, then wait for what is under way.

        Args:
            seconds: None until there are no more requests.
            rate: requests a second over all connections; None for as many as are answered.

        Raises:
            LoadFailed: a request was refused, or the server has gone.
        """
        self._latencies_ns = []
        self._admitted = 0
        began_ns = time.perf_counter_ns()
        ends_ns = began_ns + int((ANSWER_WITHIN_SECONDS * 1_000 if seconds is None else seconds) * 1e9)
        with suppress(StopIteration):
            self._send_until(ends_ns, body, rate)
        elapsed = (time.perf_counter_ns() - began_ns) / 1e9
        in_time = len(self._latencies_ns)
        deadline_ns = time.perf_counter_ns() + int(ANSWER_WITHIN_SECONDS * 1e9)
        while any(connection.began_ns for connection in self.connections):
            if time.perf_counter_ns() > deadline_ns:
                raise LoadFailed(f"requests without an answer after {ANSWER_WITHIN_SECONDS:g} s")
            self._receive(0.5)
        return Answered(elapsed * len(self._latencies_ns) / max(1, in_time), self._latencies_ns, self._admitted)

    def _send_until(self, ends_ns: int, body: Body, rate: float | None) -> None:
        began_ns = time.perf_counter_ns()
        due_ns = deque[int]()
        sent = 0
        while (now_ns := time.perf_counter_ns()) < ends_ns:
            if rate is None:
                for connection in self.connections:
                    self._send(connection, body, [now_ns] * (self._streams - len(connection.began_ns)))
                self._receive(0.5)
            else:
                ought = int((now_ns - began_ns) * rate / 1e9) + 1
                due_ns.extend(began_ns + int(number * 1e9 / rate) for number in range(sent, ought))
                sent = ought
                # Each connection gets the same share, and another one is the first each time that anything is sent.
                if due_ns:
                    self.connections.append(self.connections.pop(0))
                share = -(-len(due_ns) // len(self.connections))
                for connection in self.connections:
                    free = self._streams - len(connection.began_ns)
                    self._send(connection, body, [due_ns.popleft() for _ in range(min(free, share, len(due_ns)))])
                next_due_ns = min(began_ns + int(sent * 1e9 / rate), ends_ns)
                # The selector waits for whole milliseconds, this for microseconds.
                wait_seconds = max(0, next_due_ns - time.perf_counter_ns()) / 1e9
                for connection in select.select(self.connections, (), (), wait_seconds)[0]:
                    self._receive_from(connection)

    def _send(self, connection: _Connection, body: Body, due_ns: list[int]) -> None:
        if not due_ns:
            return
        head, block = self._head
        parts: list[bytes] = []
        stream = connection.next_stream
        for due in due_ns:
            try:
                message = body()
            except StopIteration:
                # What is laid out already is sent first.
                if not parts:
                    raise
                break
            number = stream.to_bytes(4, "big")
            parts += head, number, block, frame_head(len(message), DATA, END_STREAM), number, message
            connection.began_ns[stream] = due
            stream += 2
        connection.next_stream = stream
        connection.socket.sendall(b"".join(parts))

    def _receive(self, timeout: float) -> None:
        for key, _ in self._selector.select(timeout):
            self._receive_from(key.data)

    def _receive_from(self, connection: _Connection) -> None:
        data = connection.socket.recv(_READ_BYTES)
        if not data:
            raise LoadFailed("the server has closed a connection")
        self._read_frames(connection, connection.buffer + data)

    def _read_frames(self, connection: _Connection, data: bytes) -> None:
        now_ns = time.perf_counter_ns()
        at, end = 0, len(data)
        while end - at >= HEAD_BYTES:
            after = at + HEAD_BYTES + (data[at] << 16 | data[at + 1] << 8 | data[at + 2])
            if after > end:
                break
            kind, flags = data[at + 3], data[at + 4]
            if kind == DATA:
                self._admitted += data[at + _MESSAGE_AT : at + _MESSAGE_AT + len(_ADMITTED)] == _ADMITTED
            elif kind == HEADERS and flags & END_STREAM:
                stream = int.from_bytes(data[at + 5 : at + 9], "big")
                self._latencies_ns.append(now_ns - connection.began_ns.pop(stream))
            elif kind in (RST_STREAM, GOAWAY):
                raise LoadFailed(f"the server has refused a request (frame of type {kind})")
            elif kind in (SETTINGS, PING) and not flags & ACK:
                payload = data[at + HEAD_BYTES : after] if kind == PING else b""
                connection.socket.sendall(frame(kind, ACK, 0, payload))
            at = after
        connection.buffer = data[at:]
