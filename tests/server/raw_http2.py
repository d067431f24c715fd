"""A client that sends what no gRPC library would send, frame by frame."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import ssl
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass, field

import h2.config
import h2.connection
import h2.events
from h2.connection import ConnectionInputs, ConnectionState
from h2.errors import ErrorCodes
from h2.settings import SettingCodes, Settings
from hpack import Encoder

GRPC_HEADERS = ((b"content-type", b"application/grpc"), (b"te", b"trailers"))


@dataclass
class Answer:
    headers: dict[bytes, bytes] = field(default_factory=dict)
    body: bytes = b""
    trailers: dict[bytes, bytes] = field(default_factory=dict)
    reset: int | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def http_status(self) -> int:
        return int(self.headers[b":status"])

    @property
    def trailers_only(self) -> bool:
        return b"grpc-status" in self.headers

    @property
    def code(self) -> int:
        return int((self.headers if self.trailers_only else self.trailers)[b"grpc-status"])

    @property
    def message(self) -> bytes:
        return (self.headers if self.trailers_only else self.trailers)[b"grpc-message"]


def client_connection() -> h2.connection.H2Connection:
    """A client's side of a connection, which sends whatever headers it is told to."""
    client = h2.connection.H2Connection(
        h2.config.H2Configuration(
            header_encoding=None, normalize_outbound_headers=False, validate_outbound_headers=False
        )
    )
    # h2 regards a connection as closed once it is told to go; RFC 9113 (6.8) has it finish the open streams.
    machine = client.state_machine
    told_to_go = (ConnectionState.CLIENT_OPEN, ConnectionInputs.RECV_GOAWAY)
    transitions = {**machine._transitions, told_to_go: (None, ConnectionState.CLIENT_OPEN)}  # noqa: SLF001
    machine._transitions = transitions  # noqa: SLF001 (h2 has no other way)
    # It would also forget the answer to a PING that came with that.
    client.clear_outbound_data_buffer = lambda: None
    return client


class RawClient:
    """One HTTP/2 connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._h2 = client_connection()
        self._answers: defaultdict[int, Answer] = defaultdict(Answer)
        self.told_to_go = asyncio.Event()
        self.last_streams: list[int] = []
        """Of each GOAWAY."""
        self.pings = 0
        """From the server."""
        self.gone = asyncio.Event()
        self._is_held = False
        self._h2.initiate_connection()
        self._flush()

    def open(
        self,
        path: str | bytes,
        headers: Iterable[tuple[bytes, bytes]] = GRPC_HEADERS,
        *,
        method: bytes = b"POST",
        protocol: bytes | None = None,
        end: bool = False,
    ) -> int:
        """Start a request; with a protocol, an extended CONNECT (RFC 8441)."""
        stream = self._h2.get_next_available_stream_id()
        raw_path = path if isinstance(path, bytes) else path.encode()
        pseudo = [(b":method", method), (b":scheme", b"http"), (b":path", raw_path), (b":authority", b"test")]
        if protocol is not None:
            pseudo.append((b":protocol", protocol))
        self._h2.send_headers(stream, [*pseudo, *headers], end_stream=end)
        self._flush()
        return stream

    def send(self, stream: int, data: bytes, *, end: bool = True) -> None:
        self._h2.send_data(stream, data, end_stream=end)
        self._flush()

    def grant(self, stream: int, count: int) -> None:
        """Let the server send so many bytes more; at first it may send 65,535."""
        self._h2.increment_flow_control_window(count)
        self._h2.increment_flow_control_window(count, stream)
        self._flush()

    def grant_connection(self, count: int) -> None:
        """The same for all streams together, though not for one of them."""
        self._h2.increment_flow_control_window(count)
        self._flush()

    def room(self, stream: int) -> int:
        """Bytes that the server lets this client send."""
        return self._h2.local_flow_control_window(stream)

    def received(self, stream: int) -> bytes:
        """The body so far."""
        return self._answers[stream].body

    def has_ended(self, stream: int) -> bool:
        return self._answers[stream].ended.is_set()

    def vanish(self) -> None:
        """Read and say nothing any more, without hanging up."""
        self._writer.transport.pause_reading()

    def write(self, data: bytes) -> None:
        """Send what may be no HTTP/2 at all."""
        self._writer.write(data)

    def cancel(self, stream: int) -> None:
        self._h2.reset_stream(stream, ErrorCodes.CANCEL)
        self._flush()

    async def call(
        self, path: str, body: bytes, headers: Iterable[tuple[bytes, bytes]] = GRPC_HEADERS, *, method: bytes = b"POST"
    ) -> Answer:
        stream = self.open(path, headers, method=method, end=not body)
        if body:
            self.send(stream, body)
        return await self.answer(stream)

    async def answer(self, stream: int) -> Answer:
        answer = self._answers[stream]
        await asyncio.wait_for(answer.ended.wait(), 30)
        return answer

    async def ping(self) -> None:
        """Return when the server has read all that was sent so far."""
        self._ponged = asyncio.Event()
        self._h2.ping(b"12345678")
        self._flush()
        await asyncio.wait_for(self._ponged.wait(), 30)

    async def read(self) -> None:
        # A server that cuts off a connection may reset it.
        with contextlib.suppress(ConnectionResetError):
            while data := await self._reader.read(65_536):
                for event in self._h2.receive_data(data):
                    self._take(event)
                self._flush()
        self.gone.set()

    def _take(self, event: h2.events.Event) -> None:
        match event:
            case h2.events.ResponseReceived():
                self._answers[event.stream_id].headers = dict(event.headers)
            case h2.events.DataReceived():
                self._answers[event.stream_id].body += event.data
            case h2.events.TrailersReceived():
                self._answers[event.stream_id].trailers = dict(event.headers)
            case h2.events.StreamReset():
                self._answers[event.stream_id].reset = event.error_code
                self._answers[event.stream_id].ended.set()
            case h2.events.StreamEnded():
                self._answers[event.stream_id].ended.set()
            case h2.events.PingReceived():
                self.pings += 1
            case h2.events.PingAckReceived():
                self._ponged.set()
            case h2.events.ConnectionTerminated():
                self.last_streams.append(event.last_stream_id)
                self.told_to_go.set()

    @contextlib.contextmanager
    def one_write(self) -> Iterator[None]:
        """What is sent within the block leaves together."""
        self._is_held = True
        yield
        self._is_held = False
        self._flush()

    def _flush(self) -> None:
        if not self._is_held:
            self._writer.write(self._h2.data_to_send())


@contextlib.asynccontextmanager
async def connected(address: str, context: ssl.SSLContext | None = None) -> AsyncIterator[RawClient]:
    """A client connected to `host:port` or `unix:PATH`; with a context over TLS."""
    if address.startswith("unix:"):
        reader, writer = await asyncio.open_unix_connection(address.removeprefix("unix:"))
    else:
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port), ssl=context)
    client = RawClient(reader, writer)
    async with asyncio.TaskGroup() as tasks:
        reading = tasks.create_task(client.read())
        yield client
        reading.cancel()
        if context is None:
            writer.close()
        else:
            # Without waiting for the server's goodbye of TLS.
            writer.transport.abort()


class ReluctantClient:
    """A client that grants all the room there is for answers, and reads none until it is told to."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._h2 = client_connection()
        self._h2.local_settings = Settings(
            client=True, initial_values={SettingCodes.INITIAL_WINDOW_SIZE: 2**31 - 1, SettingCodes.ENABLE_PUSH: 0}
        )
        self._h2.initiate_connection()
        self._h2.increment_flow_control_window(2**30)
        writer.write(self._h2.data_to_send())
        writer.transport.set_write_buffer_limits(0)

    async def call_until_stuck(self, path: str, body: bytes, seconds: float) -> int:
        """Call until the system has taken nothing for so long.

        Returns:
            How many calls.

        Raises:
            ConnectionError: the server has hung up.
        """
        # h2 would refuse to open as many streams as this does, so the frames are laid by hand.
        pseudo = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", path.encode()), (b":authority", b"test")]
        block = Encoder().encode([*pseudo, *GRPC_HEADERS])
        for number in itertools.count(1):
            stream = (2 * number - 1).to_bytes(4, "big")
            headers = len(block).to_bytes(3, "big") + b"\x01\x04" + stream + block
            data = len(body).to_bytes(3, "big") + b"\x00\x01" + stream + body
            self._writer.write(headers + data)
            try:
                async with asyncio.timeout(seconds):
                    await self._writer.drain()
            except TimeoutError:
                return number
        raise AssertionError("unreachable")

    async def count_answers(self, until: int) -> int:
        """Read until there are as many answers."""
        buffer = b""
        ended = 0
        while ended < until:
            buffer += await asyncio.wait_for(self._reader.read(1 << 20), 30)
            at = 0
            while len(buffer) - at >= 9:
                end = at + 9 + int.from_bytes(buffer[at : at + 3], "big")
                if len(buffer) < end:
                    break
                kind, flags = buffer[at + 3], buffer[at + 4]
                # HEADERS with END_STREAM; or a call refused, for want of a stream.
                ended += (kind == 1 and flags & 1) or kind == 3
                at = end
            buffer = buffer[at:]
        return ended


@contextlib.asynccontextmanager
async def reluctant(address: str) -> AsyncIterator[ReluctantClient]:
    host, _, port = address.rpartition(":")
    # The least that asyncio's reader takes by itself.
    reader, writer = await asyncio.open_connection(host, int(port), limit=1)
    yield ReluctantClient(reader, writer)
    writer.transport.abort()
