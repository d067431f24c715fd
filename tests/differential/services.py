"""The two services beside each other, with the same rules and environment: a Redis, envoyproxy/ratelimit, a sidecar."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
from e2e.sidecars import sidecar_command

from differential.build import Reference, Unavailable
from ratelimit_sidecar.demo.ports import HOST, free_ports
from ratelimit_sidecar.demo.processes import Children, Command
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2_grpc import RateLimitServiceStub

START_SECONDS = 30.0


def redis_server() -> str:
    """The path of a Redis or Valkey server.

    Raises:
        Unavailable: there is none.
    """
    program = shutil.which("redis-server") or shutil.which("valkey-server")
    if program is None:
        raise Unavailable("no redis-server is installed: envoyproxy/ratelimit counts in it")
    return program


@asynccontextmanager
async def both(
    reference: Reference, folder: Path, rules: Mapping[str, str], environment: Mapping[str, str]
) -> AsyncIterator[tuple[RateLimitServiceStub, RateLimitServiceStub]]:
    """Stubs of envoyproxy/ratelimit and of the sidecar.

    Args:
        folder: an empty one, of a short name: a socket lies in it.
        rules: files by name.
        environment: of both.
    """
    rules_folder = folder / "ratelimit" / "config"
    rules_folder.mkdir(parents=True)
    for name, text in rules.items():
        (rules_folder / name).write_text(text, encoding="utf-8")
    here, there = free_ports(2).regions
    async with _redis(folder / "redis.sock"), Children(folder) as children:
        their_command = Command(
            name="envoyproxy-ratelimit",
            argv=[str(reference.service)],
            ready_url=f"http://{HOST}:{there.admin}/healthcheck",
            environment={
                "GRPC_HOST": HOST,
                "GRPC_PORT": str(there.grpc),
                "HOST": HOST,
                "PORT": str(there.admin),
                "DEBUG_HOST": HOST,
                "DEBUG_PORT": str(there.sync),
                "RUNTIME_ROOT": str(folder),
                "RUNTIME_SUBDIRECTORY": "ratelimit",
                "REDIS_SOCKET_TYPE": "unix",
                "REDIS_URL": str(folder / "redis.sock"),
                "USE_STATSD": "false",
                "LOG_LEVEL": "error",
                **environment,
            },
        )
        our_command = sidecar_command(
            folder, here, {"algorithm": "fixed_window", "rules": [str(rules_folder)]}, environment=environment
        )
        await asyncio.gather(children.start(their_command), children.start(our_command))
        async with (
            grpc.aio.insecure_channel(f"{HOST}:{there.grpc}") as their_channel,
            grpc.aio.insecure_channel(f"{HOST}:{here.grpc}") as our_channel,
        ):
            yield RateLimitServiceStub(their_channel), RateLimitServiceStub(our_channel)


@asynccontextmanager
async def _redis(socket: Path) -> AsyncIterator[None]:
    """A Redis that listens on a unix socket only and keeps nothing."""
    process = await asyncio.create_subprocess_exec(
        *(redis_server(), "--port", "0", "--unixsocket", str(socket), "--save", "", "--appendonly", "no"),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        cwd=socket.parent,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(START_SECONDS):
            while b"ready to accept connections" not in (line := await process.stdout.readline()):
                assert line, "redis-server ended"
        yield
    finally:
        process.kill()
        await process.wait()
