"""What a caller of a real Envoy sees of the sidecar's answers: headers, statuses, bodies, and hits that Envoy adds."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
import yaml
from prometheus_client.parser import text_string_to_metric_families

from ratelimit_sidecar.demo.bootstrap import EnvoySettings, envoy_bootstrap, to_yaml
from ratelimit_sidecar.demo.ports import HOST, RegionPorts, free_ports
from ratelimit_sidecar.demo.processes import Children, Command
from ratelimit_sidecar.demo.regions import find_envoy

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.asyncio(loop_scope="module")

RULES = """
domain: openclaw
descriptors:
  - key: agent
    algorithm: fixed_window
    rate_limit: {name: per_agent, unit: year, requests_per_unit: 10}
    metadata: {tier: free}
  - {key: agent, value: shadowed, shadow_mode: true, rate_limit: {unit: year, requests_per_unit: 1}}
  - key: agent
    value: denied
    body: '{"error": "slow down"}'
    retry_after: true
    algorithm: fixed_window
    rate_limit: {name: strict, unit: year, requests_per_unit: 1}
  - {key: budget, charge: always, rate_limit: {unit: year, requests_per_unit: 100}}
  - {key: peek, rate_limit: {unit: year, requests_per_unit: 1}}
"""

# Of each what belongs to a request is sent: the query's agent, or a header. What the response says of its length stands
# for what only the response can tell, as the tokens that a language model has used.
ROUTES = """
- match: {prefix: /, headers: [{name: x-own-limit, present_match: true}]}
  route:
    cluster: rating_api
    rate_limits:
      - actions: [{request_headers: {header_name: x-own-limit, descriptor_key: own}}]
        limit: {dynamic_metadata: {metadata_key: {key: test.override, path: [{key: limit}]}}}
- match: {prefix: /}
  route: {cluster: rating_api}
  typed_per_filter_config:
    envoy.filters.http.ratelimit:
      "@type": type.googleapis.com/envoy.extensions.filters.http.ratelimit.v3.RateLimitPerRoute
      rate_limits:
        - actions: [{query_parameters: {query_parameter_name: agent, descriptor_key: agent}}]
          hits_addend: {format: "%DYNAMIC_METADATA(envoy.ratelimit:hits_addend)%"}
        - actions: [{request_headers: {header_name: x-peek, descriptor_key: peek}}]
          hits_addend: {number: 0}
        - actions: [{request_headers: {header_name: x-budget, descriptor_key: budget}}]
          hits_addend: {number: 0}
        - actions: [{request_headers: {header_name: x-budget, descriptor_key: budget}}]
          apply_on_stream_done: true
          hits_addend: {format: "%DYNAMIC_METADATA(test.response:bytes)%"}
"""

# They know what a request costs, here from headers.
FILTERS_BEFORE = """
- name: envoy.filters.http.header_to_metadata
  typed_config:
    "@type": type.googleapis.com/envoy.extensions.filters.http.header_to_metadata.v3.Config
    request_rules:
      - header: x-hits
        on_header_present: {metadata_namespace: envoy.ratelimit, key: hits_addend, type: NUMBER}
        on_header_missing: {metadata_namespace: envoy.ratelimit, key: hits_addend, type: NUMBER, value: "1"}
    response_rules:
      - header: content-length
        on_header_present: {metadata_namespace: test.response, key: bytes, type: NUMBER}
- name: envoy.filters.http.set_metadata
  typed_config:
    "@type": type.googleapis.com/envoy.extensions.filters.http.set_metadata.v3.Config
    metadata:
      - metadata_namespace: test.override
        value: {limit: {requests_per_unit: 2, unit: YEAR}}
"""

RESPONSE_HEADERS = """
- header: {key: x-tier, value: "%DYNAMIC_METADATA(envoy.filters.http.ratelimit:metadata:tier)%"}
"""

ENVIRONMENT = {"RESPONSE_DYNAMIC_METADATA": "true", "LIMIT_RESPONSE_HEADERS_ENABLED": "true"}


@dataclass(frozen=True, slots=True)
class Proxy:
    """An Envoy with its sidecar."""

    client: httpx.AsyncClient
    admin: httpx.AsyncClient

    async def ask(self, agent: str, **headers: object) -> httpx.Response:
        named = {name.replace("_", "-"): str(value) for name, value in headers.items()}
        return await self.client.get("/rate", params={"agent": agent}, headers=named)

    async def charged(self, key: str, tokens: int) -> None:
        """Wait until so many are taken from the bucket of the rule for `key`: some are after the response is sent."""
        async with asyncio.timeout(5):
            while await self._taken(key) != tokens:  # noqa: ASYNC110 (another process)
                await asyncio.sleep(0.01)

    async def decided(self, rule: str, code: str) -> float | None:
        """Descriptors that a rule has decided so, of the sidecar's metrics."""
        text = (await self.admin.get("/metrics")).text
        (family,) = [family for family in text_string_to_metric_families(text) if family.name == "ratelimit_decisions"]
        values = (
            sample.value for sample in family.samples if (sample.labels["rule"], sample.labels["code"]) == (rule, code)
        )
        return next(values, None)

    async def _taken(self, key: str) -> int:
        page = (await self.admin.get("/buckets", params={"limit": 200})).json()
        of_key = [bucket for bucket in page["buckets"] if bucket["rule"] == f"openclaw.{key}"]
        return sum(bucket["capacity"] - bucket["remaining"] + bucket["debt"] for bucket in of_key)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def proxy(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Proxy]:
    folder = tmp_path_factory.mktemp("envoy")
    ports = free_ports(1)
    (region,) = ports.regions
    async with Children(folder) as children:
        upstream = [sys.executable, str(ROOT / "examples/openclaw/rating_api.py"), "--port", str(ports.upstream)]
        await children.start(Command("upstream", upstream, f"http://{HOST}:{ports.upstream}/healthz"))
        await children.start(sidecar(folder, region))
        await children.start(envoy(folder, region, ports.upstream))
        async with (
            httpx.AsyncClient(base_url=f"http://{HOST}:{region.envoy}", trust_env=False) as client,
            httpx.AsyncClient(base_url=f"http://{HOST}:{region.admin}", trust_env=False) as admin,
        ):
            yield Proxy(client, admin)


def sidecar(folder: Path, ports: RegionPorts) -> Command:
    (folder / "rules.yaml").write_text(RULES)
    listen = {"grpc": [f"{HOST}:{ports.grpc}"], "admin": f"{HOST}:{ports.admin}"}
    config = folder / "sidecar.yaml"
    config.write_text(yaml.safe_dump({"listen": listen, "rules": ["rules.yaml"]}))
    argv = [sys.executable, "-m", "ratelimit_sidecar", "serve", "--config", str(config)]
    return Command("sidecar", argv, f"http://{HOST}:{ports.admin}/readyz", ENVIRONMENT)


def envoy(folder: Path, ports: RegionPorts, upstream: int) -> Command:
    settings = EnvoySettings(
        region="local",
        listener=f"{HOST}:{ports.envoy}",
        admin=f"{HOST}:{ports.envoy_admin}",
        upstream=f"{HOST}:{upstream}",
        sidecar=f"{HOST}:{ports.grpc}",
        timeout_ms=1_000,
        failure_mode_deny=True,
    )
    bootstrap = yaml.safe_load(to_yaml(envoy_bootstrap(settings)))
    manager = connection_manager(bootstrap)
    manager["http_filters"] = yaml.safe_load(FILTERS_BEFORE) + manager["http_filters"]
    (host,) = manager["route_config"]["virtual_hosts"]
    host["routes"] = yaml.safe_load(ROUTES)
    host["response_headers_to_add"] = yaml.safe_load(RESPONSE_HEADERS)
    config = folder / "envoy.yaml"
    config.write_text(yaml.safe_dump(bootstrap))
    argv = [find_envoy(), "-c", str(config), "--concurrency", "1", "--log-level", "warning", "--disable-hot-restart"]
    return Command("envoy", argv, f"http://{HOST}:{ports.envoy_admin}/ready")


def connection_manager(bootstrap: Any) -> Any:
    (listener,) = bootstrap["static_resources"]["listeners"]
    (chain,) = listener["filter_chains"]
    (network_filter,) = chain["filters"]
    return network_filter["typed_config"]


async def test_a_caller_sees_its_limit_in_envoys_x_ratelimit_headers(proxy: Proxy) -> None:
    response = await proxy.ask("ada")
    assert response.status_code == 200
    assert response.json()["agent"] == "ada"
    assert response.headers["x-ratelimit-limit"] == '10, 10;w=31536000;name="per_agent"'
    assert response.headers["x-ratelimit-remaining"] == "9"
    assert 0 < int(response.headers["x-ratelimit-reset"]) <= 31_536_000


async def test_a_caller_sees_the_sidecars_own_headers_on_every_answer(proxy: Proxy) -> None:
    for remaining in (9, 8):
        headers = (await proxy.ask("bob")).headers
        assert (headers["ratelimit-limit"], headers["ratelimit-remaining"]) == ("10", str(remaining))
        assert 0 < int(headers["ratelimit-reset"]) <= 31_536_000


async def test_a_caller_is_denied_with_429_once_its_limit_is_used_up(proxy: Proxy) -> None:
    assert [(await proxy.ask("cyd")).status_code for _ in range(12)] == [200] * 10 + [429] * 2
    response = await proxy.ask("cyd")
    assert response.headers["x-envoy-ratelimited"] == "true"
    assert response.headers["x-ratelimit-remaining"] == "0"
    assert response.content == b""


async def test_a_denial_has_the_rules_body_and_says_when_to_come_back(proxy: Proxy) -> None:
    assert (await proxy.ask("denied")).status_code == 200
    response = await proxy.ask("denied")
    assert response.status_code == 429
    assert response.json() == {"error": "slow down"}
    wait = int(response.headers["retry-after"])
    assert 0 < wait <= 31_536_000
    assert response.headers["ratelimit-policy"] == '"strict";q=1;w=31536000'
    assert response.headers["ratelimit"] == f'"strict";r=0;t={wait}'
    assert response.headers["ratelimit-limit"] == "1"


async def test_a_rule_in_shadow_mode_denies_nobody_and_counts_what_it_would_have(proxy: Proxy) -> None:
    responses = [await proxy.ask("shadowed") for _ in range(4)]
    assert [response.status_code for response in responses] == [200] * 4
    assert [response.headers["x-ratelimit-remaining"] for response in responses] == ["0"] * 4
    assert await proxy.decided("openclaw.agent_shadowed", "OVER_LIMIT") == 3


async def test_hits_come_from_metadata_that_another_filter_has_set(proxy: Proxy) -> None:
    assert (await proxy.ask("dan", x_hits=4)).headers["x-ratelimit-remaining"] == "6"
    assert (await proxy.ask("dan")).headers["x-ratelimit-remaining"] == "5"
    assert (await proxy.ask("dan", x_hits=6)).status_code == 429


async def test_what_a_response_has_used_is_charged_into_debt_and_denies_the_next_request(proxy: Proxy) -> None:
    used = 0
    while used <= 100:
        response = await proxy.ask("eve", x_budget="eve")
        assert response.status_code == 200, f"{used} used"
        used += len(response.content)
        await proxy.charged("budget", used)
    assert (await proxy.ask("eve", x_budget="eve")).status_code == 429


async def test_a_descriptor_of_no_hits_only_looks(proxy: Proxy) -> None:
    responses = [await proxy.ask("fay", x_peek="fay") for _ in range(5)]
    assert [response.status_code for response in responses] == [200] * 5
    assert {response.headers["x-ratelimit-remaining"] for response in responses} == {"1"}


async def test_a_limit_that_envoy_sends_overrides_the_rules(proxy: Proxy) -> None:
    responses = [await proxy.ask("gus", x_own_limit="gus") for _ in range(3)]
    assert [response.status_code for response in responses] == [200, 200, 429]
    assert responses[0].headers["x-ratelimit-limit"].startswith("2, ")


async def test_metadata_of_the_rule_that_passed_reaches_envoy(proxy: Proxy) -> None:
    assert (await proxy.ask("hal")).headers["x-tier"] == "free"
