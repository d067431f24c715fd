"""What is not read from: a client that does not read its answers, and one whose address waits for its turn."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import socket
import ssl
import termios
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from certificates import Authority
from server.raw_http2 import client_connection
from server.tls_records import RecordWriter
from server.work_clock import PerTurn, WorkClock

from ratelimit_sidecar.server.bounds import DEFAULT_BOUNDS, ServerBounds
from ratelimit_sidecar.server.budget import AddressBudget
from ratelimit_sidecar.server.grpc_protocol import (
    LARGE_READ_NS,
    MAX_WRITE_BUFFER_BYTES,
    READ_NS,
    FrontEndState,
    GrpcProtocol,
)
from ratelimit_sidecar.server.tls import ServerCertificate
from ratelimit_sidecar.server.tls_session import TlsSession
from ratelimit_sidecar.server.turns import QUANTUM_NS, Turns

MANY = 500

READ_AT_ONCE = 2 * QUANTUM_NS // READ_NS
"""An address has to wait when it has filled a quantum twice in a turn of the loop."""


class Server:
    """Connections of a front end, each with the socket of its client."""

    def __init__(self, shared: FrontEndState) -> None:
        self._shared = shared
        self.closed = shared.counts.closed_connections
        self.transports: list[asyncio.Transport] = []
        self.clients: list[socket.socket] = []

    async def connect(self, address: str, tls: TlsSession | None = None) -> tuple[GrpcProtocol, AddressBudget]:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        budget = self._shared.enter(address)
        assert budget is not None
        protocol = GrpcProtocol(self._shared, budget, None, tls)
        # It has asyncio.Protocol's methods, but is compiled.
        transport, _ = await asyncio.get_running_loop().connect_accepted_socket(lambda: protocol, ours)  # type: ignore[type-var]
        self.transports.append(transport)
        self.clients.append(theirs)
        return protocol, budget

    def being_read(self) -> list[int]:
        """The numbers of the connections that are read from, in the order in which they were made."""
        return [number for number, transport in enumerate(self.transports) if transport.is_reading()]

    def unread(self) -> int:
        """How many connections have bytes that nobody has read."""
        sockets = [transport.get_extra_info("socket") for transport in self.transports]
        return sum(fcntl.ioctl(each.fileno(), termios.FIONREAD, bytes(4)) != bytes(4) for each in sockets)

    def closing(self) -> int:
        """How many connections are closed, or about to be."""
        return sum(transport.is_closing() for transport in self.transports)


@contextlib.asynccontextmanager
async def serving(turns: Turns, bounds: ServerBounds = DEFAULT_BOUNDS) -> AsyncIterator[Server]:
    async with asyncio.TaskGroup() as tasks:
        server = Server(FrontEndState({}, bounds, tasks, turns))
        yield server
        for transport, client in zip(server.transports, server.clients, strict=True):
            transport.abort()
            client.close()


def greeting() -> bytes:
    """What an HTTP/2 client sends first."""
    client = client_connection()
    client.initiate_connection()
    return client.data_to_send()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 (in the same turns of the loop)
            await asyncio.sleep(0)


async def test_while_answers_wait_for_a_client_nothing_more_of_it_is_read() -> None:
    async with serving(Turns()) as server:
        protocol, _ = await server.connect("a client")
        assert server.being_read() == [0]
        protocol.pause_writing()
        assert server.being_read() == []
        protocol.resume_writing()
        assert server.being_read() == [0]


@pytest.mark.parametrize("size", [100_000, MAX_WRITE_BUFFER_BYTES + 1])
async def test_answers_that_a_client_does_not_read_count_as_its_memory(size: int) -> None:
    async with serving(Turns()) as server:
        protocol, budget = await server.connect("a client")
        transport, client = server.transports[0], server.clients[0]
        while transport.get_write_buffer_size() < size:
            transport.write(bytes(size))
        if size <= MAX_WRITE_BUFFER_BYTES:
            protocol.check(0)
        assert budget.held == transport.get_write_buffer_size()
        client.setblocking(False)
        while transport.get_write_buffer_size():
            with contextlib.suppress(BlockingIOError):
                client.recv(1 << 20)
            await asyncio.sleep(0)
        protocol.check(0)
        assert budget.held == 0


@pytest.mark.parametrize("size", [100_000, MAX_WRITE_BUFFER_BYTES + 1])
async def test_a_client_for_whose_unread_answers_there_is_no_room_is_cut_off(size: int) -> None:
    async with serving(Turns(), replace(DEFAULT_BOUNDS, held_bytes=8 * 90_000)) as server:
        protocol, budget = await server.connect("a client")
        transport = server.transports[0]
        while transport.get_write_buffer_size() < size and not transport.is_closing():
            transport.write(bytes(size))
        protocol.check(0)
        assert server.closed["limit"] == 1
        await until(lambda: budget.connections == 0)
        assert budget.held == 0


async def test_when_an_address_has_to_wait_none_of_its_connections_is_read_before_its_turn() -> None:
    clock = WorkClock()
    async with serving(clock.turns) as server:
        for address in ["other", *["busy"] * 250]:
            _, busy = await server.connect(address)
        clock.turns.note(busy.call_queue, QUANTUM_NS)
        assert len(server.being_read()) == 251
        clock.turns.note(busy.call_queue, QUANTUM_NS)
        being_read = [server.being_read()]
        while len(being_read[-1]) < 251:
            await asyncio.sleep(0)
            being_read.append(server.being_read())
        assert being_read[0] == [0]
        # What a read takes is time of the address, whatever there is to be read.
        at_once = QUANTUM_NS // LARGE_READ_NS
        counts = [len(after) - len(before) for before, after in itertools.pairwise(being_read)]
        assert counts == [at_once] * (250 // at_once) + [250 % at_once]


async def test_after_its_handshake_a_connection_waits_for_turns_of_calls_alone(tmp_path: Path) -> None:
    authority = Authority()
    certificate = ServerCertificate(authority.write_listener(tmp_path / "server", "sidecar.example"))
    certificate.load()
    authority.certificate_to(tmp_path / "trusted.crt")
    context = ssl.create_default_context(cafile=tmp_path / "trusted.crt")
    context.check_hostname = False
    context.set_alpn_protocols(["h2"])
    async with serving(Turns()) as server:
        _, budget = await server.connect("a client", certificate.new_session())
        assert (len(budget.handshake_queue.on_waiting), len(budget.call_queue.on_waiting)) == (1, 0)
        await asyncio.to_thread(RecordWriter.shake_hands, server.clients[0], context, tmp_path)
        await until(lambda: len(budget.call_queue.on_waiting) == 1)
        assert not budget.handshake_queue.on_waiting


async def test_a_read_is_time_of_its_address_however_little_is_read() -> None:
    async with serving(Turns()) as server:
        protocol, _ = await server.connect("a client")
        for _ in range(READ_AT_ONCE):
            protocol.data_received(b"")
        assert server.being_read() == []


@pytest.mark.parametrize("is_paused", ["before", "after"])
async def test_who_reads_answers_again_is_read_again_in_the_turn_of_its_address(is_paused: str) -> None:
    clock = WorkClock()
    async with serving(clock.turns) as server:
        protocol, budget = await server.connect("a client")
        if is_paused == "before":
            protocol.pause_writing()
        clock.turns.join(budget.call_queue, lambda: None)
        if is_paused == "after":
            protocol.pause_writing()
        protocol.resume_writing()
        assert server.being_read() == []
        await asyncio.sleep(0)
        assert server.being_read() == [0]


async def test_of_frames_that_very_many_send_at_once_a_few_are_read_in_one_turn_of_the_loop() -> None:
    async with serving(Turns()) as server:
        for _ in range(MANY):
            await server.connect("busy")
        for client in server.clients:
            client.sendall(greeting())
        await until(lambda: server.unread() < MANY)
        assert server.unread() >= MANY - READ_AT_ONCE
        assert server.being_read() == []
        await until(lambda: not server.unread())


async def test_of_very_many_that_leave_at_once_a_few_are_let_go_in_one_turn_of_the_loop() -> None:
    async with serving(Turns()) as server:
        for _ in range(MANY):
            _, budget = await server.connect("busy")
        for client in server.clients:
            client.shutdown(socket.SHUT_WR)
        await until(lambda: server.closing() > 0)
        assert server.closing() <= READ_AT_ONCE
        await until(lambda: not budget.connections)
        # Nothing is left of them.
        assert not budget.call_queue.on_waiting


async def test_what_very_many_held_that_are_cut_off_at_once_is_freed_in_turns_of_the_loop() -> None:
    ticks = itertools.count(step=QUANTUM_NS // 10)
    async with serving(Turns(lambda: next(ticks))) as server:
        for _ in range(MANY):
            _, budget = await server.connect("busy")
        async with PerTurn(lambda: MANY - budget.connections) as freed:
            for transport in server.transports:
                transport.abort()
            await until(lambda: not budget.connections)
        assert freed.most <= 10
