"""A client that does not read its answers is not read from, either."""

from __future__ import annotations

import asyncio
import socket

from ratelimit_sidecar.server.grpc_protocol import GrpcProtocol, Shared
from ratelimit_sidecar.server.limits import DEFAULT_LIMITS
from ratelimit_sidecar.server.turns import Turns


async def test_while_answers_wait_for_a_client_nothing_more_of_it_is_read() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with theirs:
        async with asyncio.TaskGroup() as tasks:
            shared = Shared({}, DEFAULT_LIMITS, tasks, Turns())
            budget = shared.enter("a client")
            assert budget is not None
            protocol = GrpcProtocol(shared, budget, None)
            # It has asyncio.Protocol's methods, but is compiled.
            transport, _ = await asyncio.get_running_loop().connect_accepted_socket(lambda: protocol, ours)  # type: ignore[type-var]
            assert transport.is_reading()
            protocol.pause_writing()
            assert not transport.is_reading()
            protocol.resume_writing()
            assert transport.is_reading()
            transport.abort()
