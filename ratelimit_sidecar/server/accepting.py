"""Accepts connections on a listening socket, also when the system runs out of file descriptors or memory.

In that case clients wait in the socket's backlog, and accepting is tried again every second.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import AsyncIterator, Callable

import structlog

from ratelimit_sidecar.server.budget import AddressBudget
from ratelimit_sidecar.server.grpc_protocol import FrontEndState

RETRY_SECONDS = 1.0
"""The wait after a failure; that of asyncio's own servers is as long."""

_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
"""Errors of accept(2) that concern the whole process or system; all others concern one connection."""

_log = structlog.stdlib.get_logger(__name__)


async def connections_of(
    listening: socket.socket, note_failure: Callable[[], None]
) -> AsyncIterator[tuple[socket.socket, str]]:
    """Yield connections and their IP addresses ("" over a unix socket), for ever.

    Args:
        note_failure: called whenever one cannot be accepted for lack of resources.
    """
    loop = asyncio.get_running_loop()
    is_exhausted = False
    while True:
        try:
            connected, address = await loop.sock_accept(listening)
        except OSError as error:
            if error.errno in _EXHAUSTED:
                note_failure()
                if not is_exhausted:
                    is_exhausted = True
                    _log.error("accept_failed", why=error.strerror, tried_again_every_seconds=RETRY_SECONDS)
                await asyncio.sleep(RETRY_SECONDS)
            continue
        if is_exhausted:
            is_exhausted = False
            _log.info("accepting_again")
        yield connected, address[0] if address else ""


async def clients_of(
    listening: socket.socket, shared: FrontEndState
) -> AsyncIterator[tuple[socket.socket, AddressBudget]]:
    """Yield, for ever, the connections that the connection limiter admits, and close all others."""
    async for connected, address in connections_of(listening, shared.counts.note_accept_failure):
        budget = shared.enter(address)
        if budget is None:
            connected.close()
        else:
            yield connected, budget
