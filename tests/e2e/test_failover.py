"""examples/edge/failover.yaml with the real Envoy: a cloud's upstreams die, traffic moves to the other, limits hold."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import httpx
import pytest
from e2e.examples import EXAMPLES, running, with_ports

from ratelimit_sidecar.demo.ports import HOST, free_ports
from ratelimit_sidecar.demo.processes import Children, Command
from ratelimit_sidecar.demo.regions import find_envoy

pytestmark = pytest.mark.slow

MODEL = str(EXAMPLES / "llm-tokens/model.py")
LIMIT = 40


async def test_traffic_moves_to_the_other_cloud_and_the_limit_is_the_same(tmp_path: Path) -> None:
    ports = free_ports(3)
    other_zone, other_cloud, envoy = ports.regions
    changed = {"unit: second, requests_per_unit: 50": f"unit: year, requests_per_unit: {LIMIT}"}
    async with (
        running(tmp_path, "edge", "llm-tokens/model.py", [], changed_rules=changed) as clients,
        Children(tmp_path) as children,
        httpx.AsyncClient(trust_env=False, timeout=60) as client,
    ):
        upstreams = {
            name: await children.start(
                Command(name, [sys.executable, MODEL, "--port", str(port)], f"http://{HOST}:{port}/healthz")
            )
            for name, port in {"a-1": ports.upstream, "a-2": other_zone.grpc, "b-1": other_cloud.grpc}.items()
        }
        moved = {
            8_000: ports.upstream,
            8_001: other_zone.grpc,
            8_002: other_cloud.grpc,
            8_081: clients["grpc"].base_url.port,
            10_000: envoy.envoy,
            9_901: envoy.envoy_admin,
        }
        config = tmp_path / "failover.yaml"
        text = (EXAMPLES / "edge/failover.yaml").read_text().replace("timeout: 5s", "timeout: 30s")
        config.write_text(with_ports(text, moved))
        argv = [find_envoy(), "-c", str(config), "--concurrency", "1", "--disable-hot-restart"]
        admin = f"http://{HOST}:{envoy.envoy_admin}"
        await children.start(Command("envoy", argv, f"{admin}/ready"))

        async def is_healthy(name: str) -> bool:
            wanted = f"{HOST}:{moved[{'a-1': 8_000, 'a-2': 8_001, 'b-1': 8_002}[name]]}::health_flags::healthy"
            return wanted in (await client.get(f"{admin}/clusters")).text

        async def until_healthy(*names: str) -> None:
            async with asyncio.timeout(60):
                for name in upstreams:
                    while await is_healthy(name) != (name in names):  # noqa: ASYNC110 (another process)
                        await asyncio.sleep(0.05)

        async def ask(number: int) -> list[int]:
            asked = [
                await client.get(f"http://{HOST}:{envoy.envoy}/healthz", headers={"x-api-key": "eve"})
                for _ in range(number)
            ]
            return [response.status_code for response in asked]

        await until_healthy("a-1", "a-2", "b-1")
        assert await ask(LIMIT // 4) == [200] * (LIMIT // 4)
        await children.kill(upstreams["a-1"])
        await children.kill(upstreams["a-2"])
        # Whether health checks have noticed yet or not.
        assert await ask(LIMIT // 4) == [200] * (LIMIT // 4)
        await until_healthy("b-1")
        assert await ask(LIMIT // 2 + 5) == [200] * (LIMIT // 2) + [429] * 5
