"""The default front end: gRPC on HTTP/2 inside this event loop; each call is answered while its bytes are read."""

from __future__ import annotations

import asyncio
import random
import socket
import time
from collections.abc import Iterator, Mapping, Sequence

from ratelimit_sidecar.server.accepting import clients_of
from ratelimit_sidecar.server.bounds import DEFAULT_BOUNDS, ServerBounds
from ratelimit_sidecar.server.budget import AddressBudget
from ratelimit_sidecar.server.grpc_protocol import FrontEndState, GrpcProtocol
from ratelimit_sidecar.server.listeners import UNIX_PREFIX, Listener, listen, load_certificate
from ratelimit_sidecar.server.rpc import SHUTTING_DOWN, Handlers
from ratelimit_sidecar.server.tls import ServerCertificate
from ratelimit_sidecar.server.turns import Turns

CHECK_BUDGET_SECONDS = 0.000_5
"""The time for which connections are checked before other tasks run. Most checks take a microsecond; that of a
connection with a thousand calls to end takes two milliseconds.
"""

DRAINED_AT_ONCE = 32
"""The connections drained, and streaming calls ended, before other calls are answered: 2 ms."""

SHEDDING_SECONDS = 60.0
"""How long `is_shedding` stays true after something was refused for lack of memory or connections."""

AGE_JITTER = 0.1
"""The age of a connection varies by a tenth, as in gRPC servers, so that connections that came together end
one by one.
"""


class GrpcFrontEnd:
    """The default `FrontEnd` (see `server.front_end`).

    Args:
        addresses: as `server.listeners.listen` takes them.
        certificate: for TCP addresses; None for plain text.
        turns: of the event loop; its own if None.
    """

    def __init__(
        self,
        handlers: Handlers,
        addresses: Sequence[str],
        *,
        bounds: ServerBounds = DEFAULT_BOUNDS,
        certificate: ServerCertificate | None = None,
        turns: Turns | None = None,
    ) -> None:
        self.ready = asyncio.Event()
        self._bounds = bounds
        self._certificate = certificate
        self._tasks = asyncio.TaskGroup()
        self._shared = FrontEndState(
            {path.encode(): handler for path, handler in handlers.items()}, bounds, self._tasks, turns or Turns()
        )
        self._configured = addresses
        self._listeners: list[Listener] = []
        self._accepting: list[asyncio.Task[None]] = []
        self._stopping = asyncio.Event()
        self._ended = asyncio.Event()
        self._is_serving = False
        self._shed = 0
        self._is_shedding_until_s = 0.0

    @property
    def addresses(self) -> Sequence[str]:
        return [listener.address for listener in self._listeners]

    @property
    def open_connections(self) -> int:
        return len(self._shared.connections)

    @property
    def accepted_connections(self) -> int:
        """Connections accepted since the start."""
        return self._shared.accepted

    @property
    def held_bytes(self) -> int:
        """The memory that unfinished calls hold."""
        return self._shared.connection_limiter.budget.held

    @property
    def closed_connections(self) -> Mapping[str, int]:
        """Connections that this side has closed, by reason."""
        return self._shared.counts.closed_connections

    @property
    def accept_failures(self) -> int:
        """How often a connection could not be accepted, for lack of file descriptors or memory."""
        return self._shared.counts.accept_failures

    @property
    def refused_calls(self) -> Mapping[str, int]:
        """Calls ended before they were complete, by reason."""
        return self._shared.counts.refused_calls

    @property
    def is_shedding(self) -> bool:
        """True if calls or connections were refused lately, for lack of memory or connections."""
        return self._is_shedding_until_s > self._shared.now_s

    async def start(self) -> None:
        if self._certificate is not None:
            await load_certificate(self._certificate, self._configured)
        self._listeners = listen(self._configured)

    async def serve(self) -> None:
        if self._stopping.is_set():
            return
        self._is_serving = True
        try:
            async with self._tasks:
                chores = [self._tasks.create_task(self._check())]
                if self._certificate is not None:
                    chores.append(self._tasks.create_task(self._certificate.keep_read()))
                for listener in self._listeners:
                    self._accept(listener)
                self.ready.set()
                try:
                    await self._stopping.wait()
                finally:
                    await self._drain()
                    for chore in chores:
                        chore.cancel()
        finally:
            self._close_listeners()
            self._ended.set()

    async def stop(self) -> None:
        self._stopping.set()
        self.ready.clear()
        if self._is_serving:
            await self._ended.wait()
        else:
            self._close_listeners()

    def _accept(self, listener: Listener) -> None:
        certificate = None if listener.address.startswith(UNIX_PREFIX) else self._certificate
        self._accepting.append(self._tasks.create_task(self._accept_clients(listener.socket, certificate)))

    async def _accept_clients(self, listening: socket.socket, certificate: ServerCertificate | None) -> None:
        async for connected, budget in clients_of(listening, self._shared):
            await self._connect(connected, budget, certificate)

    async def _connect(
        self, connected: socket.socket, budget: AddressBudget, certificate: ServerCertificate | None
    ) -> None:
        loop = asyncio.get_running_loop()
        protocol: GrpcProtocol | None = None
        try:
            protocol = self._protocol(budget, loop.time(), certificate)
            # It has asyncio.Protocol's methods, but is compiled.
            await loop.connect_accepted_socket(lambda: protocol, connected)  # type: ignore[type-var]
        except Exception as error:
            # The client may have reset it already. Whatever failed, other connections are accepted.
            if not isinstance(error, OSError):
                self._shared.failures.status_of("accepting a connection", error)
            if protocol not in self._shared.connections:
                self._shared.connection_limiter.leave(budget)

    def _protocol(self, budget: AddressBudget, began_s: float, certificate: ServerCertificate | None) -> GrpcProtocol:
        """Make the protocol of a new connection.

        Args:
            began_s: when the client connected.
            certificate: None for plain text.
        """
        age_s = self._bounds.age
        if age_s is not None:
            age_s *= random.uniform(1 - AGE_JITTER, 1 + AGE_JITTER)
        self._shared.now_s = began_s
        return GrpcProtocol(self._shared, budget, age_s, None if certificate is None else certificate.new_session())

    async def _check(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self._bounds.check_every)
            self._shared.now_s = loop.time()
            self._note_shedding()
            began_s = time.perf_counter()
            for connection in self._connections():
                if time.perf_counter() - began_s >= CHECK_BUDGET_SECONDS:
                    await asyncio.sleep(0)
                    began_s = time.perf_counter()
                self._shared.now_s = loop.time()
                try:
                    connection.check(self._shared.now_s)
                except Exception as error:
                    # A fault of this program in dealing with one connection must not end the others.
                    self._shared.failures.status_of("the check of a connection", error)
                    connection.fail()

    def _connections(self) -> Iterator[GrpcProtocol]:
        """The connections that are open now. Each reference is dropped at its turn: freeing thousands at once takes
        milliseconds."""
        left = list(self._shared.connections)
        while left:
            yield left.pop()

    def _note_shedding(self) -> None:
        shed = self.refused_calls["shed"] + self.closed_connections["limit"] + self.accept_failures
        if shed > self._shed:
            self._shed = shed
            self._is_shedding_until_s = self._shared.now_s + SHEDDING_SECONDS

    async def _drain(self) -> None:
        self.ready.clear()
        self._close_listeners()
        shared = self._shared
        shared.is_draining = True
        done = 0
        for connection in self._connections():
            for call in connection.streaming_calls():
                call.end(SHUTTING_DOWN)
                done = await _yield_after(done)
            connection.drain()
            done = await _yield_after(done)
        try:
            async with asyncio.timeout(self._bounds.drain):
                await self._until_all_are_lost()
        except TimeoutError:
            for connection in self._connections():
                connection.abort()
                done = await _yield_after(done)
            await self._until_all_are_lost()

    async def _until_all_are_lost(self) -> None:
        while self._shared.connections:
            self._shared.lost.clear()
            await self._shared.lost.wait()

    def _close_listeners(self) -> None:
        for accepting in self._accepting:
            accepting.cancel()
        for listener in self._listeners:
            listener.close()


async def _yield_after(done: int) -> int:
    """Count one more drained connection or call, and let other tasks run after every `DRAINED_AT_ONCE`."""
    done += 1
    if done % DRAINED_AT_ONCE == 0:
        await asyncio.sleep(0)
    return done
