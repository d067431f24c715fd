"""Sidecars whose rules come from an xDS server."""

from __future__ import annotations

import asyncio
import re
import signal
from pathlib import Path

import grpc.aio
import httpx
import pytest
from e2e.sidecars import sidecar_command, status
from rules_source.xds_server import XdsServer, broken, config, serving

from ratelimit_sidecar.demo.ports import HOST, free_ports
from ratelimit_sidecar.demo.processes import Children
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2 import RateLimitResponse
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2_grpc import RateLimitServiceStub

EVICTED = re.compile(r"^crdt_buckets_evicted_total\{.*\} 1(\.0)?$", re.MULTILINE)

WITHIN_S = 60.0
"""It takes a fraction of a second; the rest is for a busy machine."""


def xds(port: int) -> dict[str, str]:
    """The environment that envoyproxy/ratelimit has at Envoy Gateway, as far as it is about rules."""
    return {
        "CONFIG_TYPE": "GRPC_XDS_SOTW",
        "CONFIG_GRPC_XDS_SERVER_URL": f"{HOST}:{port}",
        "CONFIG_GRPC_XDS_NODE_ID": "envoy-ratelimit",
        "CONFIG_GRPC_XDS_SERVER_CONNECT_RETRY_INTERVAL": "200ms",
    }


async def until_ready(console: httpx.AsyncClient) -> None:
    async with asyncio.timeout(WITHIN_S):
        while (await console.get("/readyz")).status_code != 200:  # noqa: ASYNC110 (another process)
            await asyncio.sleep(0.02)


async def test_before_the_server_has_sent_rules_calls_pass_if_so_configured(tmp_path: Path) -> None:
    ports = free_ports(1)
    own = ports.regions[0]
    given = {"xds": {"server": f"{HOST}:{ports.upstream}", "before_rules": "pass"}}
    command = sidecar_command(tmp_path, own, given, ready_path="/healthz")
    async with (
        Children(tmp_path) as children,
        grpc.aio.insecure_channel(f"{HOST}:{own.grpc}") as channel,
    ):
        await children.start(command)
        assert (await status(RateLimitServiceStub(channel), "shop", "user", "eve")).code == RateLimitResponse.OK


async def test_it_refuses_before_the_server_is_there_and_is_ready_and_limits_once_it_has_sent_rules(
    tmp_path: Path,
) -> None:
    ports = free_ports(1)
    own = ports.regions[0]
    command = sidecar_command(tmp_path, own, {}, environment=xds(ports.upstream), ready_path="/healthz")
    async with (
        Children(tmp_path) as children,
        httpx.AsyncClient(base_url=f"http://{HOST}:{own.admin}", trust_env=False, timeout=60) as console,
        grpc.aio.insecure_channel(f"{HOST}:{own.grpc}") as channel,
    ):
        await children.start(command)
        stub = RateLimitServiceStub(channel)

        waiting = await console.get("/readyz")
        assert waiting.status_code == 503
        assert waiting.json()["missing"] == [f"no rules from xDS server {HOST}:{ports.upstream} yet"]
        assert (await console.get("/healthcheck")).status_code == 200
        async with asyncio.timeout(WITHIN_S):
            while "UNAVAILABLE" not in (await console.get("/rlconfig")).text:  # noqa: ASYNC110 (another process)
                await asyncio.sleep(0.02)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await status(stub, "shop", "user", "eve")
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        assert error.value.details() == "no rules have been loaded yet"
        body = {"domain": "shop", "descriptors": [{"entries": [{"key": "user", "value": "eve"}]}]}
        assert (await console.post("/json", json=body)).status_code == 503
        metrics = (await console.get("/metrics")).text
        assert 'ratelimit_request_errors_total{reason="no_rules",region="local"} 2.0' in metrics

        server = XdsServer()
        server.publish("1", config("shop", "user", unit="DAY", requests_per_unit=1))
        async with serving(server, f"{HOST}:{ports.upstream}"):
            async with asyncio.timeout(WITHIN_S):
                while (waiting := await console.get("/readyz")).json()["missing"] != [  # noqa: ASYNC110
                    "the xDS server may not have said all yet",
                    "peers have not yet told all they know",
                ]:
                    await asyncio.sleep(0.02)
            assert waiting.status_code == 503
            await until_ready(console)
            codes = [(await status(stub, "shop", "user", "eve")).code for _ in range(2)]
            assert codes == [RateLimitResponse.OK, RateLimitResponse.OVER_LIMIT]
            first, _ = await server.heard(), await server.heard()
            assert first.node.id == "envoy-ratelimit"

            server.publish("2", broken("shop"))
            nack = await server.heard()
            assert nack.version_info == "1"
            assert "descriptors[0].rate_limit.unit" in nack.error_detail.message
            assert "descriptors[0].rate_limit.unit" in (await console.get("/rlconfig")).text
            assert (await console.get("/readyz")).status_code == 200

        assert (await status(stub, "shop", "user", "eve")).code == RateLimitResponse.OVER_LIMIT


@pytest.mark.slow
async def test_a_proxy_of_the_environment_is_not_for_a_server_on_loopback(tmp_path: Path) -> None:
    ports = free_ports(1)
    own = ports.regions[0]
    nobody = f"http://{HOST}:{own.sync}"
    environment = {**xds(ports.upstream), "http_proxy": nobody, "https_proxy": nobody, "no_proxy": "elsewhere.example"}
    command = sidecar_command(tmp_path, own, {}, environment=environment, ready_path="/healthz")
    server = XdsServer()
    server.publish("1", config("shop", "user", unit="DAY", requests_per_unit=1))
    async with (
        Children(tmp_path) as children,
        httpx.AsyncClient(base_url=f"http://{HOST}:{own.admin}", trust_env=False, timeout=60) as console,
        serving(server, f"{HOST}:{ports.upstream}"),
    ):
        await children.start(command)
        await until_ready(console)


@pytest.mark.slow
async def test_while_a_server_never_answers_idle_buckets_are_dropped_as_ever(tmp_path: Path) -> None:
    """Their changes waited for a mesh that never started, and so the buckets stayed, until there was no room left."""
    ports = free_ports(1)
    own = ports.regions[0]
    config = {"bucket": {"capacity": 1_000, "refillRate": 1_000}, "xds": {"before_rules": "pass"}}
    command = sidecar_command(tmp_path, own, config, environment=xds(ports.upstream), ready_path="/healthz")
    async with (
        Children(tmp_path) as children,
        httpx.AsyncClient(base_url=f"http://{HOST}:{own.admin}", trust_env=False, timeout=60) as console,
        grpc.aio.insecure_channel(f"{HOST}:{own.grpc}") as channel,
    ):
        await children.start(command)
        assert (await status(RateLimitServiceStub(channel), "shop", "user", "eve")).limit_remaining == 999
        # A horizon of 10 s, and a pass of the sweep.
        async with asyncio.timeout(10 + WITHIN_S):
            while not EVICTED.search((await console.get("/metrics")).text):  # noqa: ASYNC110
                await asyncio.sleep(0.2)


@pytest.mark.slow
async def test_it_can_be_stopped_before_it_has_any_rules(tmp_path: Path) -> None:
    ports = free_ports(1)
    peers = {"sync": {"peers": [f"{HOST}:{ports.regions[0].sync}"]}}
    command = sidecar_command(tmp_path, ports.regions[0], peers, environment=xds(ports.upstream), ready_path="/healthz")
    async with Children(tmp_path) as children:
        sidecar = await children.start(command)
        sidecar.signal(signal.SIGTERM)
        async with asyncio.timeout(WITHIN_S):
            assert await sidecar.wait() == 0, sidecar.log.read_text()


@pytest.mark.slow
async def test_a_sidecar_that_comes_back_learns_from_its_peers_what_its_rules_are_about(tmp_path: Path) -> None:
    """Peers tell all they know as soon as they are connected, and nothing can be made of it without rules."""
    ports = free_ports(2)
    environment = xds(ports.upstream)
    peers = {"sync": {"peers": [f"{HOST}:{region.sync}" for region in ports.regions]}}
    first, second = (
        sidecar_command(tmp_path, region, peers, name=name, environment=environment, ready_path=ready_path)
        for name, region, ready_path in zip(("first", "second"), ports.regions, ("/readyz", "/healthz"), strict=True)
    )
    server = XdsServer()
    rules = config("shop", "user", unit="DAY", requests_per_unit=20)
    async with (
        Children(tmp_path) as children,
        httpx.AsyncClient(base_url=f"http://{HOST}:{ports.regions[1].admin}", trust_env=False, timeout=60) as console,
        grpc.aio.insecure_channel(f"{HOST}:{ports.regions[0].grpc}") as channel,
        grpc.aio.insecure_channel(f"{HOST}:{ports.regions[1].grpc}") as other_channel,
    ):
        async with serving(server, f"{HOST}:{ports.upstream}"):
            server.publish("1", rules)
            await children.start(first)
        assert (await status(RateLimitServiceStub(channel), "shop", "user", "eve", hits=15)).limit_remaining == 5

        await children.start(second)
        late = XdsServer()
        late.publish("1", rules)
        async with serving(late, f"{HOST}:{ports.upstream}"):
            await until_ready(console)
            left = (await status(RateLimitServiceStub(other_channel), "shop", "user", "eve", hits=0)).limit_remaining
            assert left == 5
