"""However many requests a client has under way at once, and while one of two sidecars stops, Envoy lets none pass that
is over its limit.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import httpx
import pytest
import yaml
from e2e.examples import EXAMPLES, with_ports

from ratelimit_sidecar.demo.bootstrap import EnvoySettings, envoy_bootstrap, to_yaml
from ratelimit_sidecar.demo.ports import HOST, free_ports
from ratelimit_sidecar.demo.processes import Children, Command
from ratelimit_sidecar.demo.regions import find_envoy

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]

CONNECTIONS = 12
AT_ONCE = 100 * CONNECTIONS
"""All that httpx sends on a connection at once; more than the 1,024 of Envoy's default circuit breaker."""

HTTP_AT_ONCE = 300
"""Of ext_authz over HTTP, which needs as many connections."""

RULES = """
domain: openclaw
descriptors:
  - {key: agent, rate_limit: {unit: year, requests_per_unit: 1}}
"""

MAPPING = """
ext_authz:
  default: true
  descriptors: [{entries: [{key: agent, from: header, name: x-agent}]}]
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


async def test_with_ext_authz_over_http_each_request_has_a_connection_and_none_is_closed_unanswered(
    tmp_path: Path,
) -> None:
    ports = free_ports(2)
    own, of_envoy = ports.regions
    rules = (
        RULES + "ext_authz: {default: true, descriptors: [{entries: [{key: agent, from: header, name: x-agent}]}]}\n"
    )
    (tmp_path / "rules.yaml").write_text(rules)
    listen = {
        "grpc": [f"{HOST}:{own.grpc}"],
        "admin": f"{HOST}:{own.admin}",
        # Nothing else takes this port.
        "ext_authz_http": f"{HOST}:{own.envoy}",
    }
    (tmp_path / "sidecar.yaml").write_text(yaml.safe_dump({"listen": listen, "rules": ["rules.yaml"]}))
    example = (EXAMPLES / "filters" / "envoy-ext-authz-http.yaml").read_text()
    # Whatever is closed is denied with 403, as by Envoy's default.
    example = example.replace("failure_mode_allow: true", "failure_mode_allow: false").replace("5s", "120s")
    example = example.replace("exact: x-user-id", "exact: x-agent").replace("/ext_authz/shop", "/ext_authz/openclaw")
    of_ports = {8_000: own.admin, 8_082: own.envoy, 10_000: of_envoy.envoy, 9_901: of_envoy.envoy_admin}
    (tmp_path / "envoy.yaml").write_text(with_ports(example, of_ports))
    async with Children(tmp_path) as children, AsyncExitStack() as stack:
        argv = [sys.executable, "-m", "ratelimit_sidecar", "serve", "--config", str(tmp_path / "sidecar.yaml")]
        sidecar = await children.start(Command("sidecar", argv, f"http://{HOST}:{own.admin}/readyz"))
        argv = [find_envoy(), "-c", str(tmp_path / "envoy.yaml"), "--concurrency", "1", "--disable-hot-restart"]
        await children.start(Command("envoy", argv, f"http://{HOST}:{of_envoy.envoy_admin}/ready"))
        envoy = await stack.enter_async_context(
            httpx.AsyncClient(
                base_url=f"http://{HOST}:{of_envoy.envoy}", timeout=120, limits=httpx.Limits(max_connections=None)
            )
        )
        admin = await stack.enter_async_context(
            httpx.AsyncClient(base_url=f"http://{HOST}:{of_envoy.envoy_admin}", timeout=120)
        )

        async def code() -> int:
            return (await envoy.get("/healthz", headers={"x-agent": "eve"})).status_code

        async def asked() -> int:
            stats = (await admin.get("/stats", params={"filter": "^cluster.sidecar.upstream_rq_active$"})).text
            return int(stats.rpartition(" ")[2])

        assert [await code(), await code()] == [200, 429]
        sidecar.signal(signal.SIGSTOP)
        try:
            answers = [asyncio.ensure_future(code()) for _ in range(HTTP_AT_ONCE)]
            async with asyncio.timeout(60):
                while await asked() < HTTP_AT_ONCE:  # noqa: ASYNC110 (another process)
                    await asyncio.sleep(0.05)
        finally:
            sidecar.signal(signal.SIGCONT)
        assert await asyncio.gather(*answers) == HTTP_AT_ONCE * [429]


async def test_while_one_of_two_sidecars_stops_the_other_one_answers_for_it(tmp_path: Path) -> None:
    (gateway,) = [
        patch["patch"]["value"]["typed_config"]
        for patch in yaml.safe_load((ROOT / "deploy/istio/gateway.yaml").read_text())["spec"]["configPatches"]
        if patch["applyTo"] == "HTTP_FILTER"
    ]
    first, second = free_ports(2).regions
    # None of it is counted: what each of them is asked is over the limit.
    (tmp_path / "rules.yaml").write_text(RULES.replace("requests_per_unit: 1", "requests_per_unit: 0"))
    for region in (first, second):
        listen = {"grpc": [f"{HOST}:{region.grpc}"], "admin": f"{HOST}:{region.admin}"}
        (tmp_path / f"{region.grpc}.yaml").write_text(yaml.safe_dump({"listen": listen, "rules": ["rules.yaml"]}))
    settings = EnvoySettings(
        region="local",
        listener=f"{HOST}:{first.envoy}",
        admin=f"{HOST}:{first.envoy_admin}",
        upstream=f"{HOST}:{second.admin}",
        sidecar=f"{HOST}:{first.grpc}",
        timeout_ms=60_000,
    )
    envoy = yaml.safe_load(to_yaml(envoy_bootstrap(settings)))
    (cluster,) = [each for each in envoy["static_resources"]["clusters"] if each["name"] == "ratelimit_sidecar"]
    endpoints = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
    address = {"socket_address": {"address": HOST, "port_value": second.grpc}}
    endpoints.append({"endpoint": {"address": address}})
    (manager,) = envoy["static_resources"]["listeners"][0]["filter_chains"][0]["filters"]
    asks = manager["typed_config"]["http_filters"][0]["typed_config"]["rate_limit_service"]["grpc_service"]
    asks["retry_policy"] = gateway["rate_limit_service"]["grpc_service"]["retry_policy"]
    (tmp_path / "envoy.yaml").write_text(yaml.safe_dump(envoy))
    async with Children(tmp_path) as children:
        sidecars = [
            await children.start(
                Command(
                    f"sidecar-{region.grpc}",
                    [sys.executable, "-m", "ratelimit_sidecar", "serve", "--config", f"{tmp_path}/{region.grpc}.yaml"],
                    f"http://{HOST}:{region.admin}/readyz",
                )
            )
            for region in (first, second)
        ]
        argv = [find_envoy(), "-c", str(tmp_path / "envoy.yaml"), "--concurrency", "1", "--disable-hot-restart"]
        await children.start(Command("envoy", argv, f"http://{HOST}:{first.envoy_admin}/ready"))
        async with httpx.AsyncClient(base_url=f"http://{HOST}:{first.envoy}", timeout=120) as client:

            async def codes(count: int) -> list[int]:
                return [(await client.get("/healthz", params={"agent": "eve"})).status_code for _ in range(count)]

            assert await codes(10) == 10 * [429]
            asking = asyncio.create_task(codes(300))
            sidecars[0].signal(signal.SIGTERM)
            assert await asking == 300 * [429]
            assert await codes(10) == 10 * [429]
