"""However many requests a client has under way at once, Envoy lets none pass that is over its limit."""

from __future__ import annotations

import asyncio
import signal
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
import yaml

from ratelimit_sidecar.demo.bootstrap import EnvoySettings, envoy_bootstrap, to_yaml
from ratelimit_sidecar.demo.ports import HOST, free_ports
from ratelimit_sidecar.demo.processes import Children, Command
from ratelimit_sidecar.demo.regions import find_envoy

CONNECTIONS = 12
AT_ONCE = 100 * CONNECTIONS
"""All that httpx sends on a connection at once; more than the 1,024 of Envoy's default circuit breaker."""

RULES = """
domain: openclaw
descriptors:
  - {key: agent, rate_limit: {unit: year, requests_per_unit: 1}}
"""


async def test_requests_beyond_a_thousand_at_once_wait_for_their_answers(tmp_path: Path) -> None:
    (region,) = free_ports(1).regions
    (tmp_path / "rules.yaml").write_text(RULES)
    listen = {"grpc": [f"{HOST}:{region.grpc}"], "admin": f"{HOST}:{region.admin}"}
    (tmp_path / "sidecar.yaml").write_text(yaml.safe_dump({"listen": listen, "rules": ["rules.yaml"]}))
    settings = EnvoySettings(
        region="local",
        listener=f"{HOST}:{region.envoy}",
        admin=f"{HOST}:{region.envoy_admin}",
        upstream=f"{HOST}:{region.admin}",
        sidecar=f"{HOST}:{region.grpc}",
        timeout_ms=120_000,
    )
    (tmp_path / "envoy.yaml").write_text(to_yaml(envoy_bootstrap(settings)))
    async with Children(tmp_path) as children, AsyncExitStack() as stack:
        argv = [sys.executable, "-m", "ratelimit_sidecar", "serve", "--config", str(tmp_path / "sidecar.yaml")]
        sidecar = await children.start(Command("sidecar", argv, f"http://{HOST}:{region.admin}/readyz"))
        argv = [find_envoy(), "-c", str(tmp_path / "envoy.yaml"), "--concurrency", "1", "--disable-hot-restart"]
        await children.start(Command("envoy", argv, f"http://{HOST}:{region.envoy_admin}/ready"))
        clients = [
            await stack.enter_async_context(
                httpx.AsyncClient(base_url=f"http://{HOST}:{region.envoy}", http1=False, http2=True, timeout=120)
            )
            for _ in range(CONNECTIONS)
        ]
        admin = await stack.enter_async_context(
            httpx.AsyncClient(base_url=f"http://{HOST}:{region.envoy_admin}", timeout=120)
        )

        async def code(number: int) -> int:
            return (await clients[number % CONNECTIONS].get("/healthz", params={"agent": "eve"})).status_code

        async def under_way() -> int:
            stats = (await admin.get("/stats", params={"filter": "^http.ingress.downstream_rq_active$"})).text
            return int(stats.rpartition(" ")[2])

        assert [await code(number) for number in range(CONNECTIONS)] == [200] + (CONNECTIONS - 1) * [429]
        sidecar.signal(signal.SIGSTOP)
        try:
            answers = [asyncio.ensure_future(code(number)) for number in range(AT_ONCE)]
            async with asyncio.timeout(60):
                while await under_way() < AT_ONCE:  # noqa: ASYNC110 (another process)
                    await asyncio.sleep(0.05)
        finally:
            sidecar.signal(signal.SIGCONT)
        assert await asyncio.gather(*answers) == AT_ONCE * [429]
