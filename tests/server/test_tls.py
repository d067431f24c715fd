"""TLS of both front ends."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import grpc.aio
import pytest
from certificates import Authority
from server.front_ends import EACH_KIND, ECHO, KINDS, running
from server.raw_http2 import connected
from server.tls_records import RecordWriter
from server.work_clock import PerTurn, WorkClock
from structlog.testing import capture_logs
from young import collected_when_told

from ratelimit_sidecar.config.tls_files import LoadedCertificate
from ratelimit_sidecar.server.framing import frame
from ratelimit_sidecar.server.front_end import FrontEnd
from ratelimit_sidecar.server.grpc_front_end import GrpcFrontEnd
from ratelimit_sidecar.server.listeners import ListenError
from ratelimit_sidecar.server.rpc import Code
from ratelimit_sidecar.server.tls import ServerCertificate
from ratelimit_sidecar.server.tls_session import HANDSHAKE_BYTES

PATH = "/test.Echo/Echo"
NAME = "sidecar.example"
WITHIN_S = 30


def _hello() -> bytes:
    outgoing = ssl.MemoryBIO()
    session = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=NAME)
    with contextlib.suppress(ssl.SSLWantReadError):
        session.do_handshake()
    return outgoing.read()


HELLO = _hello()
"""A client's first message, which may be sent any number of times."""


@pytest.fixture(params=EACH_KIND)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


class Client:
    """Trusts one authority; may have a certificate."""

    def __init__(
        self,
        folder: Path,
        trusted: Authority,
        issuer: Authority | None = None,
        *names: str,
        not_after: datetime | None = None,
    ) -> None:
        folder.mkdir()
        self._ca = folder / "trusted.crt"
        trusted.certificate_to(self._ca)
        self._files = None if issuer is None else issuer.write(folder / "own", *names, not_after=not_after)

    async def call(self, front_end: FrontEnd, message: bytes = b"hello") -> bytes:
        files = self._files
        own = (None, None) if files is None else (files.key.read_bytes(), files.certificate.read_bytes())
        credentials = grpc.ssl_channel_credentials(self._ca.read_bytes(), *own)
        options = (("grpc.ssl_target_name_override", NAME), ("grpc.use_local_subchannel_pool", 1))
        async with grpc.aio.secure_channel(front_end.addresses[0], credentials, options=options) as channel:
            return await channel.unary_unary(PATH)(message, timeout=WITHIN_S)

    async def is_refused(self, front_end: FrontEnd) -> grpc.StatusCode:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await self.call(front_end)
        return refused.value.code()

    def context(self) -> ssl.SSLContext:
        """For Python's own TLS, which is told to check no names."""
        context = ssl.create_default_context(cafile=self._ca)
        context.check_hostname = False
        context.set_alpn_protocols(["h2"])
        if self._files is not None:
            context.load_cert_chain(self._files.certificate, self._files.key)
        return context


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(WITHIN_S):
        while not condition():  # noqa: ASYNC110 (another thread, or the other end)
            await asyncio.sleep(0.01)


def closed(front_end: FrontEnd) -> dict[str, int]:
    """How many connections were ended for which reason; only h2 knows."""
    assert isinstance(front_end, GrpcFrontEnd)
    return {reason: count for reason, count in front_end.closed_connections.items() if count}


@contextlib.asynccontextmanager
async def raw(front_end: FrontEnd) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection without TLS."""
    host, _, port = front_end.addresses[0].rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield reader, writer
    finally:
        writer.close()


async def test_a_client_that_trusts_the_authority_is_answered(kind: str, tmp_path: Path) -> None:
    authority = Authority()
    certificate = ServerCertificate(authority.write_listener(tmp_path / "server", NAME))
    client = Client(tmp_path / "client", authority)
    async with running(kind, ECHO, certificate=certificate) as front_end:
        for message in (b"hello", bytes(60_000)):
            assert await client.call(front_end, message) == message
        stranger = Client(tmp_path / "stranger", Authority())
        assert await stranger.is_refused(front_end) is grpc.StatusCode.UNAVAILABLE
        assert await client.call(front_end) == b"hello"


async def test_an_address_with_several_sockets_has_tls_on_tcp_alone(kind: str, tmp_path: Path) -> None:
    authority = Authority()
    config = authority.write_listener(tmp_path / "server", NAME, clients=authority, client_name="envoy.example")
    client = Client(tmp_path / "client", authority, authority, "envoy.example")
    unix = f"unix:{tmp_path}/rls.sock"
    async with running(kind, ECHO, ["127.0.0.1:0", unix], certificate=ServerCertificate(config)) as front_end:
        assert await client.call(front_end) == b"hello"
        async with grpc.aio.insecure_channel(unix) as channel:
            assert await channel.unary_unary(PATH)(b"plain", timeout=WITHIN_S) == b"plain"


async def test_with_an_authority_of_clients_each_must_have_a_certificate_of_it(kind: str, tmp_path: Path) -> None:
    authority, of_clients = Authority(), Authority()
    config = authority.write_listener(tmp_path / "server", NAME, clients=of_clients)
    known = Client(tmp_path / "known", authority, of_clients, "whoever.example")
    without = Client(tmp_path / "without", authority)
    unknown = Client(tmp_path / "unknown", authority, authority, "whoever.example")
    async with running(kind, ECHO, certificate=ServerCertificate(config)) as front_end:
        for stranger in (without, unknown):
            assert await stranger.is_refused(front_end) is grpc.StatusCode.UNAVAILABLE
        assert await known.call(front_end) == b"hello"
        if kind == "h2":
            assert closed(front_end).keys() == {"certificate"}


async def test_a_client_whose_certificate_has_ended_is_refused(kind: str, tmp_path: Path) -> None:
    authority = Authority()
    config = authority.write_listener(tmp_path / "server", NAME, clients=authority)
    client = Client(tmp_path / "client", authority, authority, "envoy.example")
    authority.write(tmp_path / "client" / "own", "envoy.example", not_after=datetime.now(UTC) - timedelta(minutes=1))
    async with running(kind, ECHO, certificate=ServerCertificate(config)) as front_end:
        assert await client.is_refused(front_end) is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    ("wanted", "shown"),
    [
        ("envoy.example", "envoy.example"),
        ("envoy.example", "Envoy.EXAMPLE"),
        ("envoy.mesh.example", "*.mesh.example"),
        ("*.mesh.example", "envoy.mesh.example"),
        ("10.0.0.1", "10.0.0.1"),
        ("2001:db8::1", "2001:db8::1"),
    ],
)
async def test_a_client_of_the_name_that_is_wanted_is_answered(
    kind: str, tmp_path: Path, wanted: str, shown: str
) -> None:
    authority = Authority()
    config = authority.write_listener(tmp_path / "server", NAME, clients=authority, client_name=wanted)
    client = Client(tmp_path / "client", authority, authority, "another.example", shown)
    async with running(kind, ECHO, certificate=ServerCertificate(config)) as front_end:
        assert await client.call(front_end) == b"hello"


@pytest.mark.parametrize(
    ("wanted", "shown"),
    [
        ("envoy.example", "other.example"),
        ("envoy.example", "envoy.example.evil.example"),
        ("a.b.mesh.example", "*.mesh.example"),
        ("10.0.0.1", "10.0.0.2"),
    ],
)
async def test_a_client_of_another_name_is_refused(kind: str, tmp_path: Path, wanted: str, shown: str) -> None:
    authority = Authority()
    config = authority.write_listener(tmp_path / "server", NAME, clients=authority, client_name=wanted)
    client = Client(tmp_path / "client", authority, authority, shown)
    async with running(kind, ECHO, certificate=ServerCertificate(config)) as front_end:
        code = await client.is_refused(front_end)
        if kind == "h2":
            # It gets no connection; gRPC's library looks when there is a call.
            assert code is grpc.StatusCode.UNAVAILABLE
            assert closed(front_end).keys() == {"certificate"}
            assert front_end.open_connections == 0
        else:
            assert code is grpc.StatusCode.PERMISSION_DENIED


async def test_a_client_may_be_known_by_a_uri(kind: str, tmp_path: Path) -> None:
    authority = Authority()
    pattern = "spiffe://mesh/ns/*/sa/envoy"
    config = authority.write_listener(tmp_path / "server", NAME, clients=authority, client_name=pattern)
    answered = Client(tmp_path / "answered", authority, authority, "x")
    authority.write_with_uri(tmp_path / "answered" / "own", "spiffe://mesh/ns/shop/sa/envoy", "x", peer_names="x")
    refused = Client(tmp_path / "refused", authority, authority, "x")
    authority.write_with_uri(tmp_path / "refused" / "own", "spiffe://mesh/ns/shop/sa/other", "x", peer_names="x")
    async with running(kind, ECHO, certificate=ServerCertificate(config)) as front_end:
        assert await answered.call(front_end) == b"hello"
        await refused.is_refused(front_end)


@pytest.mark.parametrize(
    "said", [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\xff"]
)
async def test_a_client_in_plain_text_is_hung_up_on_and_harms_nobody(kind: str, tmp_path: Path, said: bytes) -> None:
    authority = Authority()
    certificate = ServerCertificate(authority.write_listener(tmp_path / "server", NAME))
    client = Client(tmp_path / "client", authority)
    async with running(kind, ECHO, certificate=certificate) as front_end, raw(front_end) as (reader, writer):
        writer.write(said)
        writer.write_eof()
        async with asyncio.timeout(WITHIN_S):
            with contextlib.suppress(ConnectionResetError):
                assert b"HTTP" not in await reader.read()
        assert await client.call(front_end) == b"hello"


@pytest.mark.parametrize(
    "spoil",
    [lambda context: context.set_alpn_protocols(["http/1.1"]), lambda context: context.set_ciphers("AES256-SHA")],
)
async def test_without_http_2_or_what_it_needs_there_is_no_connection(
    tmp_path: Path, spoil: Callable[[ssl.SSLContext], None]
) -> None:
    authority = Authority()
    certificate = ServerCertificate(authority.write_listener(tmp_path / "server", NAME))
    context = Client(tmp_path / "client", authority).context()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    async with running("h2", ECHO, certificate=certificate) as front_end:
        spoil(context)
        host, _, port = front_end.addresses[0].rpartition(":")
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection(host, int(port), ssl=context)
            async with asyncio.timeout(WITHIN_S):
                assert await reader.read() == b""
            writer.close()
        await until(lambda: closed(front_end) == {"tls": 1})


async def test_tls_1_2_is_spoken_too(kind: str, tmp_path: Path) -> None:
    authority = Authority()
    config = authority.write_listener(tmp_path / "server", NAME, clients=authority)
    context = Client(tmp_path / "client", authority, authority, "envoy.example").context()
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    async with (
        running(kind, ECHO, certificate=ServerCertificate(config)) as front_end,
        connected(front_end.addresses[0], context) as client,
    ):
        answer = await client.call(PATH, frame(b"hello"))
    assert (answer.body, answer.code) == (frame(b"hello"), Code.OK)


async def test_a_silent_client_is_disconnected_after_the_time_for_handshakes(tmp_path: Path) -> None:
    authority = Authority()
    certificate = ServerCertificate(authority.write_listener(tmp_path / "server", NAME))
    client = Client(tmp_path / "client", authority)
    async with running("h2", ECHO, certificate=certificate, handshake=0.3, connections=1) as front_end:
        async with raw(front_end) as (reader, _):
            # It takes the place of who would be served.
            assert await client.is_refused(front_end) is grpc.StatusCode.UNAVAILABLE
            assert closed(front_end).keys() == {"limit"}
            async with asyncio.timeout(WITHIN_S):
                with contextlib.suppress(ConnectionResetError):
                    assert await reader.read() == b""
        await until(lambda: closed(front_end).get("handshake") == 1)
        assert await client.call(front_end) == b"hello"


async def test_who_comes_and_goes_without_a_word_is_no_failure(tmp_path: Path) -> None:
    """As probes of a TCP port do."""
    authority = Authority()
    certificate = ServerCertificate(authority.write_listener(tmp_path / "server", NAME))
    client = Client(tmp_path / "client", authority)
    async with running("h2", ECHO, certificate=certificate) as front_end, raw(front_end) as (reader, writer):
        writer.write_eof()
        async with asyncio.timeout(WITHIN_S):
            assert await reader.read() == b""
        assert await client.call(front_end) == b"hello"
        assert closed(front_end) == {}
        assert front_end.accepted_connections == 2


async def test_a_handshake_that_hangs_does_not_hold_up_a_stop(kind: str, tmp_path: Path) -> None:
    certificate = ServerCertificate(Authority().write_listener(tmp_path / "server", NAME))
    async with (
        running(kind, ECHO, certificate=certificate, handshake=60, drain=60) as front_end,
        raw(front_end) as (reader, writer),
    ):
        writer.write(b"\x16\x03\x01")
        if kind == "h2":
            await until(lambda: front_end.accepted_connections == 1)
        async with asyncio.timeout(WITHIN_S):
            await front_end.stop()
            if kind == "h2":
                with contextlib.suppress(ConnectionResetError):
                    assert await reader.read() == b""


async def test_in_each_turn_of_the_loop_one_step_of_one_handshake_is_done(tmp_path: Path) -> None:
    """However many addresses send at the same moment."""
    authority = Authority()
    certificate = ServerCertificate(authority.write_listener(tmp_path / "server", NAME))
    context = Client(tmp_path / "client", authority).context()
    clock = WorkClock()
    hellos = 0

    def count(*_: object) -> None:
        nonlocal hellos
        clock.work()
        hellos += 1

    async with contextlib.AsyncExitStack() as stack:
        front_end = await stack.enter_async_context(running("h2", ECHO, certificate=certificate, turns=clock.turns))
        host, _, port = front_end.addresses[0].rpartition(":")
        other = await stack.enter_async_context(connected(front_end.addresses[0], context))
        # OpenSSL calls it within the step that signs.
        certificate.in_force.context.sni_callback = count
        writers = []
        for number in range(40):
            _, writer = await asyncio.open_connection(host, int(port), local_addr=(f"127.0.0.{1 + number % 20}", 0))
            stack.callback(writer.close)
            writers.append(writer)
        async with PerTurn(lambda: hellos) as per_turn:
            for writer in writers:
                writer.write(HELLO)
            # Calls of the same address do not wait for handshakes.
            assert (await other.call(PATH, frame(b"hello"))).code == Code.OK
            assert hellos < 40
            await until(lambda: hellos == 40)
        assert per_turn.most == 1


async def test_handshakes_that_have_begun_count_as_memory(tmp_path: Path) -> None:
    authority = Authority()
    certificate = ServerCertificate(authority.write_listener(tmp_path / "server", NAME))
    client = Client(tmp_path / "client", authority)
    # Each connection may hold an eighth of what is free: these two, and no third one.
    async with running("h2", ECHO, certificate=certificate, held_bytes=9 * (HANDSHAKE_BYTES + 10_000)) as front_end:
        assert isinstance(front_end, GrpcFrontEnd)
        async with raw(front_end) as (_, first), raw(front_end) as (_, second), raw(front_end) as (reader, third):
            # One that says nothing needs little.
            await until(lambda: front_end.open_connections == 3)
            assert front_end.held_bytes == 0
            first.write(HELLO[:100])
            second.write(HELLO[:100])
            await until(lambda: front_end.held_bytes == 2 * HANDSHAKE_BYTES)
            third.write(HELLO[:100])
            async with asyncio.timeout(WITHIN_S):
                with contextlib.suppress(ConnectionResetError):
                    assert await reader.read() == b""
            assert closed(front_end) == {"limit": 1}
        await until(lambda: front_end.held_bytes == 0)
        assert await client.call(front_end) == b"hello"


@pytest.mark.parametrize(
    ("kind_of_record", "is_closed"),
    [("key updates", True), ("key updates and now and then a byte", True), ("a byte each", False)],
)
async def test_records_that_carry_next_to_nothing_take_the_loop_no_longer_than_others_and_those_of_nothing_an_end(
    tmp_path: Path, kind_of_record: str, is_closed: bool
) -> None:
    authority = Authority()
    certificate = ServerCertificate(authority.write_listener(tmp_path / "server", NAME))
    context = Client(tmp_path / "client", authority).context()

    def flood() -> None:
        host, _, port = front_end.addresses[0].rpartition(":")
        with socket.create_connection((host, int(port)), WITHIN_S) as connection:
            writer = RecordWriter.shake_hands(connection, context, tmp_path)
            connection.sendall(writer.data(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"))
            # Frames of a type that nobody knows.
            unknown = (b"\0\x40\0\x42\0\0\0\0\0" + bytes(16_384)) * 4
            if kind_of_record == "key updates":
                records = [writer.key_update() for _ in range(20_000)]
            elif is_closed:
                records = [
                    writer.key_update() if at % 4 else writer.data(unknown[at // 4 : at // 4 + 1])
                    for at in range(20_000)
                ]
            else:
                records = [writer.data(unknown[at : at + 1]) for at in range(len(unknown))]
            with contextlib.suppress(ConnectionError):
                connection.sendall(b"".join(records) + writer.goodbye())
                while connection.recv(65_536):
                    pass

    async with running("h2", ECHO, certificate=certificate) as front_end:
        with collected_when_told():
            async with PerTurn(time.thread_time_ns) as per_turn:
                await asyncio.to_thread(flood)
        assert closed(front_end) == ({"tls": 1} if is_closed else {})
    # All at once it was 200 ms and more.
    assert per_turn.most < 50_000_000


async def test_who_says_goodbye_is_told_goodbye(tmp_path: Path) -> None:
    authority = Authority()
    certificate = ServerCertificate(authority.write_listener(tmp_path / "server", NAME))
    context = Client(tmp_path / "client", authority).context()

    def say_goodbye() -> None:
        host, _, port = front_end.addresses[0].rpartition(":")
        with socket.create_connection((host, int(port)), WITHIN_S) as plain:
            encrypted = context.wrap_socket(plain)
            assert encrypted.recv(1_024)
            with encrypted.unwrap() as plain_again:
                assert plain_again.recv(1) == b""

    async with running("h2", ECHO, certificate=certificate) as front_end:
        await asyncio.to_thread(say_goodbye)
        assert closed(front_end) == {}


async def test_a_client_that_does_not_read_its_answers_is_disconnected(tmp_path: Path) -> None:
    authority = Authority()
    certificate = ServerCertificate(authority.write_listener(tmp_path / "server", NAME))
    context = Client(tmp_path / "client", authority).context()
    async with (
        running("h2", ECHO, certificate=certificate, stalled=0.2, check_every=0.02) as front_end,
        connected(front_end.addresses[0], context) as client,
        asyncio.timeout(30),
    ):
        await client.ping()
        client.vanish()
        for _ in range(64):
            client.send(client.open(PATH), frame(bytes(16_000)))
        await until(lambda: closed(front_end).get("stalled") == 1)


async def test_renewed_certificates_and_authorities_need_no_restart(kind: str, tmp_path: Path) -> None:
    before, after, clients_before, clients_after = Authority(), Authority(), Authority(), Authority()
    certificate = ServerCertificate(before.write_listener(tmp_path / "server", NAME, clients=clients_before))
    old = Client(tmp_path / "old", before, clients_before, "envoy.example")
    new = Client(tmp_path / "new", after, clients_after, "envoy.example")
    with_old_certificate = Client(tmp_path / "half", after, clients_before, "envoy.example")
    async with (
        running(kind, ECHO, certificate=certificate) as front_end,
        connected(front_end.addresses[0], old.context()) as open_before,
    ):
        assert await old.call(front_end) == b"hello"
        await new.is_refused(front_end)
        after.write_listener(tmp_path / "server", NAME, clients=clients_after)
        await asyncio.to_thread(certificate.renew)
        assert await new.call(front_end) == b"hello"
        for each in (old, with_old_certificate):
            assert await each.is_refused(front_end) is grpc.StatusCode.UNAVAILABLE
        # Connections go on with what they began with.
        answer = await open_before.call(PATH, frame(b"hello"))
        assert answer.code == Code.OK


both_versions = pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])


async def resume(
    front_end: FrontEnd, context: ssl.SSLContext, session: ssl.SSLSession | None
) -> tuple[bool, ssl.SSLSession | None]:
    """Connect.

    Returns:
        Whether this session was resumed, and the one to resume next.

    Raises:
        ssl.SSLError, ConnectionResetError: refused.
    """

    def connect() -> tuple[bool, ssl.SSLSession | None]:
        host, _, port = front_end.addresses[0].rpartition(":")
        with (
            socket.create_connection((host, int(port)), WITHIN_S) as plain,
            context.wrap_socket(plain, session=session) as encrypted,
        ):
            # Settings come after the tickets of TLS 1.3, and after what the server thinks of the certificate.
            if not encrypted.recv(9):
                raise ConnectionResetError
            return bool(encrypted.session_reused), encrypted.session

    return await asyncio.to_thread(connect)


@both_versions
async def test_no_session_of_before_a_renewal_is_resumed(tmp_path: Path, version: ssl.TLSVersion) -> None:
    """That would be to trust a client by an authority that is no longer trusted."""
    authority, clients = Authority(), Authority()
    certificate = ServerCertificate(authority.write_listener(tmp_path / "server", NAME, clients=clients))
    context = Client(tmp_path / "client", authority, clients, "envoy.example").context()
    context.minimum_version = context.maximum_version = version
    async with running("h2", ECHO, certificate=certificate) as front_end:
        _, session = await resume(front_end, context, None)
        is_resumed, session = await resume(front_end, context, session)
        assert is_resumed
        Authority().write_listener(tmp_path / "server", NAME, clients=Authority())
        await asyncio.to_thread(certificate.renew)
        context.verify_mode = ssl.CERT_NONE
        with pytest.raises((ssl.SSLError, ConnectionResetError)):
            await resume(front_end, context, session)


@both_versions
async def test_no_session_is_resumed_after_the_end_of_its_certificate(tmp_path: Path, version: ssl.TLSVersion) -> None:
    authority, clients = Authority(), Authority()
    certificate = ServerCertificate(authority.write_listener(tmp_path / "server", NAME, clients=clients))
    ends = datetime.now(UTC) + timedelta(seconds=4)
    context = Client(tmp_path / "client", authority, clients, "envoy.example", not_after=ends).context()
    context.minimum_version = context.maximum_version = version
    async with running("h2", ECHO, certificate=certificate) as front_end:
        _, session = await resume(front_end, context, None)
        is_resumed, session = await resume(front_end, context, session)
        assert is_resumed
        await until(lambda: datetime.now(UTC) > ends)
        with pytest.raises((ssl.SSLError, ConnectionResetError)):
            await resume(front_end, context, session)
        assert closed(front_end) == {"certificate": 1}


@pytest.mark.parametrize(
    ("break_it", "why"),
    [
        (lambda folder: Authority().write(folder / "new", NAME).key.replace(folder / "tls.key"), "not belong together"),
        (lambda folder: (folder / "tls.crt").write_bytes(b"half"), "not a certificate and its key"),
        (lambda folder: (folder / "ca.crt").write_bytes(b""), "no certificates in PEM"),
        (lambda folder: (folder / "tls.key").unlink(), "No such file or directory"),
    ],
    ids=["the key is another's", "no certificate", "no authority", "no key"],
)
async def test_files_that_are_broken_at_a_renewal_change_nothing_and_are_told_once(
    kind: str, tmp_path: Path, break_it: Callable[[Path], object], why: str
) -> None:
    authority = Authority()
    certificate = ServerCertificate(authority.write_listener(tmp_path / "server", NAME, clients=authority))
    certificate.read_seconds = 0.01
    client = Client(tmp_path / "client", authority, authority, "envoy.example")
    with capture_logs() as logs:
        async with running(kind, ECHO, certificate=certificate) as front_end:
            break_it(tmp_path / "server")
            await until(lambda: certificate.failed_renewals > 3)
            assert await client.call(front_end) == b"hello"
            [error] = [log for log in logs if log["event"] == "certificate_not_renewed"]
            assert why in error["why"]
            after = Authority()
            after.write_listener(tmp_path / "server", NAME, clients=authority)
            await until(lambda: any(log["event"] == "certificate_renewed" for log in logs))
            renewed = Client(tmp_path / "renewed", after, authority, "envoy.example")
            assert await renewed.call(front_end) == b"hello"


class WithoutThreads(ServerCertificate):
    """It cannot be read again."""

    read_seconds = 0.01

    def renew(self) -> LoadedCertificate:
        raise RuntimeError("can't start new thread")


async def test_a_renewal_that_fails_for_want_of_threads_ends_nothing(kind: str, tmp_path: Path) -> None:
    authority = Authority()
    certificate = WithoutThreads(authority.write_listener(tmp_path / "server", NAME, clients=authority))
    client = Client(tmp_path / "client", authority, authority, "envoy.example")
    async with running(kind, ECHO, certificate=certificate) as front_end:
        await until(lambda: certificate.failed_renewals > 1)
        assert await client.call(front_end) == b"hello"


async def test_without_usable_files_nothing_is_listened_on(kind: str, tmp_path: Path) -> None:
    config = Authority().write_listener(tmp_path, NAME)
    Authority().write(tmp_path / "other", NAME).key.replace(config.key)
    with pytest.raises(ListenError, match="they do not belong together"):
        await KINDS[kind](ECHO, ["127.0.0.1:0"], certificate=ServerCertificate(config)).start()
