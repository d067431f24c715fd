"""Meshes of this process for tests: real gRPC on loopback, and a clock that tests may move."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable, MutableMapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
from replication.builders import bucket_of, frame, node, store_of, take

from ratelimit_sidecar.crdt.bucket import Bucket
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.mesh_status import PeerStatus
from ratelimit_sidecar.replication.bounds import DEFAULT_BOUNDS, MeshBounds
from ratelimit_sidecar.replication.dialler import RedialWait, redial_seconds
from ratelimit_sidecar.replication.mesh import Mesh
from ratelimit_sidecar.replication.payments import PaymentExchange
from ratelimit_sidecar.replication.peer import BatchTracer
from ratelimit_sidecar.replication.resolver import Resolver
from ratelimit_sidecar.replication.stream_io import METHOD
from ratelimit_sidecar.replication.tls import NodeCertificate
from ratelimit_sidecar.replication.v1 import replication_pb2 as pb
from ratelimit_sidecar.replication.wire import PROTOCOL
from ratelimit_sidecar.supervision import Supervisor

TIMEOUT_SECONDS = 60
"""For anything that is waited for; it takes milliseconds, or a few redials."""


def now_us() -> int:
    return time.time_ns() // 1_000


def free_addresses(how_many: int) -> list[str]:
    """Loopback addresses that nobody listens on now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(how_many)]
    try:
        return [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    finally:
        for each in sockets:
            each.close()


class Sidecar:
    """A store and its mesh."""

    def __init__(self, mesh: Mesh, store: Store, task: asyncio.Task[None]) -> None:
        self.mesh = mesh
        self.store = store
        self.task = task

    def take(self, value: str, hits: int) -> Bucket:
        return take(self.store, value, hits, now_us())

    def tokens(self, value: str) -> int:
        """What this node knows to have been taken."""
        return sum(entry.tokens for entry in bucket_of(self.store, value, now_us()).entries())

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            await self.mesh.until(condition)

    async def knows(self, value: str, tokens: int) -> None:
        await self.until(lambda: self.tokens(value) == tokens)

    def peer(self, name: str) -> PeerStatus | None:
        return next((status for status in self.mesh.status() if status.node == name), None)

    async def connected_to(self, name: str) -> None:
        await self.until(lambda: (status := self.peer(name)) is not None and status.connected)

    async def stop(self) -> None:
        """As on SIGTERM."""
        self.mesh.stop()
        async with asyncio.timeout(TIMEOUT_SECONDS):
            await self.task

    async def kill(self) -> None:
        """As by SIGKILL: connections break without a word."""
        self.task.cancel()
        await asyncio.wait([self.task])


@asynccontextmanager
async def sidecar(
    name: str,
    *,
    incarnation: int = 1,
    listen: str | None = "127.0.0.1:0",
    peers: Sequence[str] = (),
    store: Store | None = None,
    tracer: BatchTracer | None = None,
    clock: Callable[[], int] = now_us,
    steady: Callable[[], int] | None = None,
    payments: PaymentExchange | None = None,
    region: str = "",
    is_gateway: bool = False,
    certificate: NodeCertificate | None = None,
    resolver: Resolver | None = None,
    supervisor: Supervisor | None = None,
    bounds: MeshBounds = DEFAULT_BOUNDS,
    redial: RedialWait = redial_seconds,
) -> AsyncIterator[Sidecar]:
    local = node(name, incarnation)
    own = store_of(local) if store is None else store
    own_mesh = Mesh(
        origin=local.origin,
        region=region or local.region,
        version="0",
        store=own,
        now_us=clock,
        strict_us=steady,
        peers=peers,
        listen=listen,
        tracer=tracer,
        payments=payments,
        is_gateway=is_gateway,
        certificate=certificate,
        resolver=resolver,
        supervisor=supervisor,
        bounds=bounds,
        redial=redial,
    )
    await own_mesh.start()
    try:
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(own_mesh.run())
            yield Sidecar(own_mesh, own, task)
            task.cancel()
    finally:
        # A test may be over before the task has begun.
        await own_mesh.close()


def soon(*_: object) -> float:
    """Of a dial, to be tried again."""
    return 0.01


def at_once(*_: object) -> float:
    return 0.0


def hello(name: str) -> bytes:
    return frame(hello=pb.Hello(protocol=PROTOCOL, node=name, region="eu", incarnation=1, version="0"))


@asynccontextmanager
async def dialled(each: Sidecar) -> AsyncIterator[grpc.aio.StreamStreamCall[bytes, bytes]]:
    """A stream to it, on which nothing has been said."""
    async with grpc.aio.insecure_channel(address_of(each)) as channel:
        yield channel.stream_stream(METHOD)()


def address_of(each: Sidecar) -> str:
    assert each.mesh.bound_address is not None
    return each.mesh.bound_address


def node_of(each: Sidecar) -> str:
    return each.store.origin.node


Logs = list[MutableMapping[str, Any]]
"""What `structlog.testing.capture_logs` gives."""


def events(logs: Logs, event: str) -> Logs:
    return [log for log in logs if log["event"] == event]


async def told(logs: Logs, event: str, times: int = 1) -> Logs:
    """Wait until the log has so many such lines. They may be of other threads, which wake nobody here."""
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while len(found := events(logs, event)) < times:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    return found
