"""Clients that idle, never read, or come and go rudely: what is measured of a server, and when that is a failure."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Iterator

import pytest
import trustme
from click.testing import CliRunner

from benchmarks import churn, idle_connections, never_reads
from benchmarks.churn import RUDE, Growth, Visitors
from benchmarks.serving.raw import RawConnection, Refused
from benchmarks.serving.requests import RULES
from benchmarks.serving.servers import Server, Servers, running_servers

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    with running_servers() as servers:
        yield servers


@pytest.fixture(scope="module")
def sidecar(servers: Servers) -> Server:
    return servers.sidecar("asked", rules=RULES)


def test_answers_are_told_from_refusals(sidecar: Server) -> None:
    connection = RawConnection(sidecar.address)
    connection.greet()
    connection.socket.sendall(connection.calls(3))
    assert connection.read_answers(3) == 3
    connection.socket.sendall(connection.calls(1, b"\xff"))
    assert connection.read_answers(1) == 0, "a status alone is no message"
    connection.socket.sendall(b"not a frame" * 10)
    with pytest.raises(Refused):
        connection.read_answers(1)
    connection.close()


def test_idle_connections_are_served_and_take_memory(sidecar: Server) -> None:
    given = ["--server", f"{sidecar.address}@{sidecar.pid}", "--connections", "50", "--seconds", "0", "--json"]
    run = CliRunner().invoke(idle_connections.main, given)
    assert run.exit_code == 0, run.output
    idle = json.loads(run.stdout)
    assert idle["connections"] == 50
    assert 0 < idle["before"] <= idle["open"]
    assert CliRunner().invoke(idle_connections.main, [*given, "--at-most-mb", "-1"]).exit_code == 1


def test_a_server_that_is_sent_to_for_ever_stops_reading_or_closes(sidecar: Server) -> None:
    given = ["--server", f"{sidecar.address}@{sidecar.pid}", "--connections", "1", "--patience", "0.5", "--json"]
    run = CliRunner().invoke(never_reads.main, given)
    assert run.exit_code == 0, run.output
    for outcome in json.loads(run.stdout):
        assert outcome["end"] in {never_reads.STOPPED, never_reads.CLOSED}, outcome
        assert outcome["sent_mb"] > 0
        assert 0 < outcome["slowest_ms"] < 5_000


def test_a_server_survives_every_kind_of_visit() -> None:
    """Two addresses, one of each kind: each rude way twice, and a polite visit after each."""
    with churn.visited(None, []) as (server, addresses):
        visitors = Visitors(addresses)
        wrong = churn.churn(
            server, visitors, per_second=4 * len(RUDE), seconds=3.0, every=1.0, at_most_percent=float("inf")
        )
    assert wrong == []
    assert set(visitors.rude) == {way.__name__.strip("_").replace("_", " ") for way in RUDE}
    assert visitors.polite >= 4 * len(RUDE)


async def test_where_tls_is_spoken_visitors_speak_it(sidecar: Server) -> None:
    async with tls_in_front(sidecar.address) as address:
        visitors = Visitors([f"tls:{address}"])
        for _ in range(2 * len(RUDE)):
            await asyncio.to_thread(visitors.come)
        visitors.let_leave(float("inf"))
    assert (visitors.polite, visitors.failures) == (len(RUDE), {})


@contextlib.asynccontextmanager
async def tls_in_front(address: str) -> AsyncIterator[str]:
    """Where TLS is spoken for a server that does not itself."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    context.set_alpn_protocols(["h2"])
    host, port = address.split(":")

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        to_server = await asyncio.open_connection(host, int(port))
        await asyncio.gather(_copy(reader, to_server[1]), _copy(to_server[0], writer))

    server = await asyncio.start_server(pass_on, "127.0.0.1", 0, ssl=context)
    async with server:
        yield "127.0.0.1:{1}".format(*server.sockets[0].getsockname())


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65_536):
            writer.write(data)
    writer.close()


def test_growth_is_from_the_middle_third_to_the_last_so_that_filling_caches_is_none() -> None:
    growth = Growth.of([10, 50, 100, 100, 100, 100, 110, 110, 500])
    assert (growth.middle, growth.last) == (100, 110)
    assert growth.percent == pytest.approx(10)


def test_a_server_that_grows_is_a_failure(sidecar: Server) -> None:
    given = ["--server", f"{sidecar.address}@{sidecar.pid}", "--seconds", "3", "--per-second", "20"]
    run = CliRunner().invoke(churn.main, [*given, "--at-most-percent", "-100"])
    assert run.exit_code == 1
    assert "it grows by more than -100 %" in run.output
