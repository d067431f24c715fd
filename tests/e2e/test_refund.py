"""What one sidecar is told to give back, another one admits: real processes, asked by the command."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc.aio
import pytest
from e2e.sidecars import sidecar_command, status

from ratelimit_sidecar.demo.ports import HOST, RegionPorts, free_ports
from ratelimit_sidecar.demo.processes import Children
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2 import RateLimitResponse
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2_grpc import RateLimitServiceStub

pytestmark = pytest.mark.long

RULES = """
domain: shop
descriptors:
  - key: user
    rate_limit: {unit: day, requests_per_unit: 100}
"""


@asynccontextmanager
async def asking(ports: RegionPorts) -> AsyncIterator[RateLimitServiceStub]:
    async with grpc.aio.insecure_channel(f"{HOST}:{ports.grpc}") as channel:
        yield RateLimitServiceStub(channel)


async def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "ratelimit_sidecar", *arguments]
    return await asyncio.to_thread(subprocess.run, argv, capture_output=True, text=True, timeout=60, check=False)


async def until_remaining(stub: RateLimitServiceStub, expected: int) -> None:
    async with asyncio.timeout(60):
        while True:
            if (await status(stub, "shop", "user", "eve", 0)).limit_remaining == expected:
                return
            await asyncio.sleep(0.05)


async def test_what_one_region_is_told_to_give_back_another_one_admits(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(RULES)
    token_file = tmp_path / "token"
    token_file.write_text("secret")
    one, other = free_ports(2).regions
    commands = [
        sidecar_command(
            tmp_path,
            own,
            {
                "rules": [str(tmp_path / "rules.yaml")],
                "sync": {"peers": [f"{HOST}:{peer.sync}"]},
            },
            name=name,
            listen={"admin_token_file": str(token_file)},
        )
        for name, own, peer in (("one", one, other), ("other", other, one))
    ]
    async with Children(tmp_path) as children, asking(one) as here, asking(other) as there:
        for command in commands:
            await children.start(command)
        assert (await status(here, "shop", "user", "eve", 100)).code == RateLimitResponse.OK
        await until_remaining(there, 0)
        reset = ["reset", "shop", "user=eve", "--admin", f"http://{HOST}:{other.admin}"]
        assert "expected the header Authorization" in (await run(*reset)).stderr
        assert "after   100 left" in (await run(*reset, "--token-file", str(token_file))).stdout
        await until_remaining(here, 100)
        assert (await status(here, "shop", "user", "eve", 100)).code == RateLimitResponse.OK
