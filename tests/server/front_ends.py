"""Starts and stops front ends for tests."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

from ratelimit_sidecar.server.front_end import FrontEnd
from ratelimit_sidecar.server.grpcio import GrpcioFrontEnd
from ratelimit_sidecar.server.h2 import H2FrontEnd
from ratelimit_sidecar.server.limits import DEFAULT_LIMITS
from ratelimit_sidecar.server.rpc import Handlers, Metadata
from ratelimit_sidecar.server.tls import ServerCertificate

KINDS = {"h2": H2FrontEnd, "grpcio": GrpcioFrontEnd}


def echo(message: bytes, _metadata: Metadata) -> bytes:
    return message


ECHO = {"/test.Echo/Echo": echo}


@contextlib.asynccontextmanager
async def running(
    kind: str,
    handlers: Handlers,
    addresses: Sequence[str] = ("127.0.0.1:0",),
    *,
    certificate: ServerCertificate | None = None,
    **limits: float | None,
) -> AsyncIterator[FrontEnd]:
    """A front end that answers, and is stopped at the end.

    Args:
        limits: those of `Limits` that are not the default.
    """
    front_end: FrontEnd = KINDS[kind](
        handlers, addresses, limits=replace(DEFAULT_LIMITS, **limits), certificate=certificate
    )
    await front_end.start()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(front_end.serve())
        await front_end.ready.wait()
        try:
            yield front_end
        finally:
            await front_end.stop()
