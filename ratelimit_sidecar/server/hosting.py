"""h2corn inside this event loop: everything that speaks HTTP here is hosted so, whatever application it is.

h2corn accepts on sockets bound here and given to it as descriptors: its own binding would take a live unix socket's
file away, and it keeps its descriptors open while it drains.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import h2corn

from ratelimit_sidecar.server.listeners import Listener, listen

RUNTIME_THREADS = 1
"""Python answers on one thread; a second one for I/O would compete with it. h2corn has them once in a process."""


class Hosting:
    """Its life is that of a front end (see `server.front_end`).

    Args:
        addresses: as `server.listeners.listen` takes them.
        config: all but where to bind.
    """

    def __init__(self, app: h2corn.Application, addresses: Sequence[str], config: h2corn.Config) -> None:
        self.ready = asyncio.Event()
        """Set while requests are answered."""
        self._app = app
        self._configured = addresses
        self._config = config
        self._listeners: list[Listener] = []
        self._server: h2corn.Server | None = None
        self._stopping = False
        self._ended = asyncio.Event()

    @property
    def addresses(self) -> Sequence[str]:
        """Where it listens since `start`, with the ports that the system chose where 0 was asked for."""
        return [listener.address for listener in self._listeners]

    async def start(self) -> None:
        """Bind every address; clients can connect from here on.

        Raises:
            ListenError: one address cannot be bound; then none is.
        """
        self._listeners = listen(self._configured)

    async def serve(self) -> None:
        """Answer until `stop`, or until cancelled, which drains as well."""
        if self._stopping:
            return
        descriptors = tuple(f"fd://{listener.socket.fileno()}" for listener in self._listeners)
        self._server = h2corn.Server(
            self._app, replace(self._config, bind=descriptors, runtime_threads=RUNTIME_THREADS)
        )
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._server.serve())
                await self._announce(self._server)
        finally:
            self.ready.clear()
            self._close_listeners()
            self._ended.set()

    async def stop(self) -> None:
        """Refuse new connections, and return when what is in flight is answered or the drain time is over."""
        self._stopping = True
        self.ready.clear()
        if self._server is not None:
            self._server.shutdown()
        self._close_listeners()
        if self._server is not None:
            await self._ended.wait()

    async def _announce(self, server: h2corn.Server) -> None:
        try:
            await server.wait_started()
        except RuntimeError:
            if self._stopping:
                return
            raise
        self.ready.set()

    def _close_listeners(self) -> None:
        for listener in self._listeners:
            listener.close()
