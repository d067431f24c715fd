"""Starts and stops front ends for tests."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

import grpc
import grpc.aio
import grpclib.client
import pytest
from certificates import Authority

from ratelimit_sidecar.server.bounds import DEFAULT_BOUNDS
from ratelimit_sidecar.server.front_end import FrontEnd
from ratelimit_sidecar.server.grpc_front_end import GrpcFrontEnd
from ratelimit_sidecar.server.grpcio import GrpcioFrontEnd
from ratelimit_sidecar.server.rpc import Handlers, Metadata
from ratelimit_sidecar.server.tls import ServerCertificate
from ratelimit_sidecar.server.turns import Turns

KINDS = {"h2": GrpcFrontEnd, "grpcio": GrpcioFrontEnd}

EACH_KIND = ["h2", pytest.param("grpcio", marks=pytest.mark.thorough)]
"""What `make test` has for the one that sidecars have, and `make test-slow` also for the one that is for comparison."""


def echo(message: bytes, _metadata: Metadata) -> bytes:
    return message


ECHO = {"/test.Echo/Echo": echo}


class Tls:
    """Certificates of both ends, which each must show."""

    def __init__(self, folder: Path) -> None:
        authority = Authority()
        config = authority.write_listener(folder, "localhost", clients=authority, client_name="envoy.example")
        self.certificate = ServerCertificate(config)
        self.of_client = authority.write(folder / "client", "envoy.example")

    def credentials(self) -> grpc.ChannelCredentials:
        files = self.of_client
        return grpc.ssl_channel_credentials(*(path.read_bytes() for path in (files.ca, files.key, files.certificate)))

    def context(self, *, check_hostname: bool = True) -> ssl.SSLContext:
        """Of a client with Python's own TLS."""
        context = ssl.create_default_context(cafile=self.of_client.ca)
        context.check_hostname = check_hostname
        context.load_cert_chain(self.of_client.certificate, self.of_client.key)
        context.set_alpn_protocols(["h2"])
        return context


def channel_to(address: str, tls: Tls | None = None) -> grpc.aio.Channel:
    if tls is None:
        return grpc.aio.insecure_channel(address)
    options = (("grpc.ssl_target_name_override", "localhost"),)
    return grpc.aio.secure_channel(address, tls.credentials(), options=options)


def independent_channel_to(address: str, tls: Tls | None = None) -> grpclib.client.Channel:
    """Of grpclib, which has another HTTP/2."""
    if address.startswith("unix:"):
        return grpclib.client.Channel(path=address.removeprefix("unix:"))
    return grpclib.client.Channel("localhost", int(address.rpartition(":")[2]), ssl=tls and tls.context())


@contextlib.asynccontextmanager
async def running(
    kind: str,
    handlers: Handlers,
    addresses: Sequence[str] = ("127.0.0.1:0",),
    *,
    certificate: ServerCertificate | None = None,
    turns: Turns | None = None,
    **bounds: float | None,
) -> AsyncIterator[FrontEnd]:
    """A front end that answers, and is stopped at the end.

    Args:
        turns: of the h2 front end.
        bounds: those of `ServerBounds` that are not the default.
    """
    more = {} if turns is None else {"turns": turns}
    front_end: FrontEnd = KINDS[kind](
        handlers, addresses, bounds=replace(DEFAULT_BOUNDS, **bounds), certificate=certificate, **more
    )
    await front_end.start()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(front_end.serve())
        await front_end.ready.wait()
        try:
            yield front_end
        finally:
            await front_end.stop()
