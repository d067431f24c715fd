"""Real sidecars that run out of something: nobody reads their log, their disk is full, descriptors are used up."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio
import httpx
import yaml
from e2e.sidecars import status
from envoy.service.ratelimit.v3.rls_pb2_grpc import RateLimitServiceStub

from ratelimit_sidecar.demo.ports import HOST, RegionPorts, free_ports

RULES = """
domain: openclaw
descriptors:
  - key: agent
    rate_limit: {unit: day, requests_per_unit: 20}
"""

WITHIN_S = 30.0


@dataclass
class Serving:
    process: asyncio.subprocess.Process
    ports: RegionPorts
    admin: httpx.AsyncClient

    async def answers(self, path: str) -> httpx.Response:
        """Ask until there is an answer."""
        async with asyncio.timeout(WITHIN_S):
            while True:
                with suppress(httpx.TransportError):
                    return await self.admin.get(path)
                await asyncio.sleep(0.05)

    async def is_ready(self) -> None:
        async with asyncio.timeout(WITHIN_S):
            while (await self.answers("/readyz")).status_code != 200:  # noqa: ASYNC110
                await asyncio.sleep(0.05)

    async def decides(self) -> None:
        async with grpc.aio.insecure_channel(f"{HOST}:{self.ports.grpc}") as channel:
            assert (await status(RateLimitServiceStub(channel), "openclaw", "agent", "claw")).limit_remaining < 20

    async def metric(self, name: str) -> float:
        """The sum of its samples."""
        text = (await self.answers("/metrics")).text
        return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name))

    async def stopped(self) -> int:
        """The exit code after SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(WITHIN_S):
            return await self.process.wait()


@asynccontextmanager
async def serving(
    folder: Path,
    *,
    stderr: int | None = None,
    arguments: Sequence[str] = (),
    shell: str = "",
    config: dict[str, object] | None = None,
) -> AsyncIterator[Serving]:
    """
    Args:
        shell: what a shell does before it becomes the sidecar.
    """
    ports = free_ports(1).regions[0]
    rules = folder / "rules"
    rules.mkdir(exist_ok=True)
    (rules / "openclaw.yaml").write_text(RULES)
    listen = {"grpc": [f"{HOST}:{ports.grpc}"], "admin": f"{HOST}:{ports.admin}", "sync": f"{HOST}:{ports.sync}"}
    file = folder / "sidecar.yaml"
    file.write_text(yaml.safe_dump({"listen": listen, "rules": [str(rules)], **(config or {})}))
    serve = [sys.executable, "-m", "ratelimit_sidecar", "serve", "--config", str(file), *arguments]
    process = await asyncio.create_subprocess_exec(
        "sh", "-c", f'{shell}\nexec "$@"', "sh", *serve, stdin=asyncio.subprocess.DEVNULL, stderr=stderr
    )
    try:
        async with httpx.AsyncClient(base_url=f"http://{HOST}:{ports.admin}", trust_env=False) as admin:
            yield Serving(process, ports, admin)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def test_a_log_that_nobody_reads_holds_up_nothing(tmp_path: Path) -> None:
    read, write = os.pipe()
    filling = os.open(f"/proc/self/fd/{write}", os.O_WRONLY | os.O_NONBLOCK)
    with suppress(BlockingIOError):
        while True:
            os.write(filling, bytes(65_536))
    os.close(filling)

    async with serving(tmp_path, stderr=write) as sidecar:
        os.close(write)
        await sidecar.is_ready()
        for _ in range(3):
            # Each is logged.
            sidecar.process.send_signal(signal.SIGHUP)
            await sidecar.decides()
        assert (await sidecar.answers("/healthz")).status_code == 200
        assert await sidecar.stopped() == 0
    os.close(read)


async def test_a_full_disk_costs_log_lines_and_nothing_else(tmp_path: Path) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    async with serving(tmp_path, stderr=full) as sidecar:
        os.close(full)
        await sidecar.is_ready()
        await sidecar.decides()
        assert await sidecar.metric("ratelimit_log_lines_dropped_total") > 0
        assert await sidecar.stopped() == 0
