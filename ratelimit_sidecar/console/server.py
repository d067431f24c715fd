"""An HTTP server: uvicorn on one TCP address, inside this event loop. One serves the console, for a scraper, a few
probes and a few people; another one, on its own address, takes requests of Envoy's ext_authz filter over HTTP.

It leaves signals and logging to the process. Only uvicorn's errors are logged: the process itself logs start and stop,
and mistakes of clients must not fill the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket

import anyio
from starlette.types import ASGIApp
from uvicorn import Config, Server

from ratelimit_sidecar.console.bounds import DEFAULT_BOUNDS, HttpBounds
from ratelimit_sidecar.console.connection import MAX_HEAD_BYTES, BoundedConnection, ConsoleConnection
from ratelimit_sidecar.console.proxies import ProxyConnection, ProxyPlaces
from ratelimit_sidecar.console.requests import BoundedRequests
from ratelimit_sidecar.server.accepting import connections_of
from ratelimit_sidecar.server.listeners import Listener, listen

DRAINED_AT_ONCE = 32
"""The connections that are told of a stop in one turn of the loop."""

_TICK_SECONDS = 1.0
"""How often the Date header is renewed."""


class HttpServer:
    """An HTTP/1.1 server of one application. Call `start`, `serve` and `stop` as of a front end (`server.front_end`).

    Args:
        address: `host:port` or `[IPv6]:port`; port 0 for a free one.
        proxies: the places of its connections if proxies ask, whose bodies are read and dropped; None if it is the
            console.
    """

    def __init__(
        self,
        app: ASGIApp,
        address: str,
        *,
        proxies: ProxyPlaces | None = None,
        bounds: HttpBounds = DEFAULT_BOUNDS,
    ) -> None:
        self.ready = asyncio.Event()
        """Set while requests are answered."""
        self._configuration = _configuration(BoundedRequests(app, bounds=bounds, keeps_bodies=proxies is None), bounds)
        self._bounds = bounds
        self._proxies = proxies
        self._configured = address
        self._listeners: list[Listener] = []
        self._serving = False
        self._stopping = asyncio.Event()
        self._ended = asyncio.Event()

    @property
    def address(self) -> str:
        """The address it listens on since `start`; the first one of a name with several."""
        return self._listeners[0].address

    async def start(self) -> None:
        """Bind the address; clients can connect from now on."""
        # anyio, in which Starlette answers piece by piece, imports most of itself when it is first used: a first scrape
        # would hold up the loop for 30 ms.
        async with anyio.create_task_group():
            pass
        self._listeners = listen([self._configured])

    async def serve(self) -> None:
        """Answer until `stop`, or until cancelled, which drains as well."""
        if self._stopping.is_set():
            return
        self._serving = True
        try:
            await self._serve(Server(self._configuration))
        finally:
            self.ready.clear()
            self._close_listeners()
            self._ended.set()

    async def stop(self) -> None:
        """Refuse new connections, and return when requests in flight are answered or the drain time is over."""
        self._stopping.set()
        self.ready.clear()
        if self._serving:
            await self._ended.wait()
        else:
            self._close_listeners()

    async def _serve(self, server: Server) -> None:
        """`Server.serve` without signal handlers, that stops at once and also drains when cancelled."""
        server.config.load()
        server.lifespan = server.config.lifespan_class(server.config)
        await server.startup([])
        async with asyncio.TaskGroup() as tasks:
            accepting = [tasks.create_task(self._accept(server, listener)) for listener in self._listeners]
            try:
                await server.on_tick(0)
                self.ready.set()
                while not self._stopping.is_set():
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(_TICK_SECONDS):
                            await self._stopping.wait()
                    await server.on_tick(0)
            finally:
                self.ready.clear()
                for each in accepting:
                    each.cancel()
                # asyncio watches their sockets until they have ended.
                await asyncio.wait(accepting)
                self._close_listeners()
                await self._drain(server)

    async def _accept(self, server: Server, listener: Listener) -> None:
        """Connect clients, one in a turn of the loop."""
        async for connected, address in connections_of(listener.socket, lambda: None):
            # What is local to it is gone while this waits for the next client.
            await self._connect(server, connected, address)

    async def _connect(self, server: Server, connected: socket.socket, address: str) -> None:
        connection = self._connection(server, address)
        if connection is None:
            connected.close()
            return
        try:
            await asyncio.get_running_loop().connect_accepted_socket(lambda: connection, connected)
        except OSError:
            # The client has reset it already.
            connection.forget()

    def _connection(self, server: Server, address: str) -> BoundedConnection | None:
        """The protocol of a new connection; None if there is no place for it."""
        proxies, state = self._proxies, server.server_state
        if proxies is None:
            return ConsoleConnection(server.config, state, self._bounds)
        budget = proxies.enter(address)
        return None if budget is None else ProxyConnection(proxies, budget, server.config, state, self._bounds)

    async def _drain(self, server: Server) -> None:
        late = asyncio.get_running_loop().call_later(self._bounds.drain, _abort_connections, server)
        try:
            for count, connection in enumerate(list(server.server_state.connections)):
                # uvicorn does the same of all in one turn.
                connection.shutdown()
                if count % DRAINED_AT_ONCE == 0:
                    await asyncio.sleep(0)
            await server.shutdown()
        finally:
            late.cancel()
            _abort_connections(server)
        cancelled = server.server_state.tasks
        if cancelled:
            await asyncio.wait(cancelled)

    def _close_listeners(self) -> None:
        for listener in self._listeners:
            listener.close()


def _configuration(app: ASGIApp, bounds: HttpBounds) -> Config:
    return Config(
        app,
        interface="asgi3",
        # uvicorn does not make it; without it, it would import others to choose from as it begins to serve.
        http=BoundedConnection,
        ws="none",
        loop="none",
        lifespan="off",
        workers=1,
        proxy_headers=False,
        server_header=False,
        log_config=None,
        log_level=logging.ERROR,
        access_log=False,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        timeout_keep_alive=bounds.idle,
        timeout_graceful_shutdown=bounds.drain + bounds.cancel,  # type: ignore[arg-type]  # it may be a fraction
    )


def _abort_connections(server: Server) -> None:
    for connection in list(server.server_state.connections):
        connection.transport.abort()
