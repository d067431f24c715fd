"""Real sidecars of a region on a fabric, and one of another region that knows them by their gateway."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import grpc.aio
import httpx
import pytest
from e2e.sidecars import sidecar_command, status
from e2e.test_state import LIMIT, RULES, WITHIN_S, remaining, until_remaining
from e2e.test_state_in_redis import until_told
from persistence.redis_server import RedisServer, needs_redis

from ratelimit_sidecar.demo.ports import HOST, RegionPorts, free_ports
from ratelimit_sidecar.demo.processes import Child, Children, Command
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2 import RateLimitResponse
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2_grpc import RateLimitServiceStub
from ratelimit_sidecar.services.quota import SERVICE_NAME as QUOTA_SERVICE_NAME

pytestmark = [needs_redis, pytest.mark.slow]


def commands(
    folder: Path,
    server: RedisServer,
    west: RegionPorts,
    *east: RegionPorts,
    rules: str = RULES,
    sync: Mapping[str, object] | None = None,
) -> list[Command]:
    """Of a sidecar in the west, without a fabric, and of those in the east."""
    (folder / "rules.yaml").write_text(rules)
    files = {"rules": [str(folder / "rules.yaml")]}

    def peers(of: Sequence[RegionPorts]) -> dict[str, object]:
        return {"sync": {"peers": [f"{HOST}:{own.sync}" for own in of], **(sync or {})}}

    made = [sidecar_command(folder, west, {**files, **peers(east)}, name="west")]
    for index, own in enumerate(east):
        config = {
            **files,
            **peers([west]),
            "node": {"id": f"east-{index}", "region": "east"},
            "fabric": {"url": server.url},
        }
        made.append(sidecar_command(folder, own, config, name=f"east-{index}"))
    return made


async def gateways(east: Sequence[RegionPorts]) -> list[int]:
    """Those that are connected to the west."""
    async with httpx.AsyncClient(trust_env=False, timeout=WITHIN_S) as client:
        found = []
        for index, own in enumerate(east):
            body = (await client.get(f"http://{HOST}:{own.admin}/peers")).json()
            if any(peer["connected"] for peer in body["peers"]):
                found.append(index)
        return found


async def answers_quotas(ports: RegionPorts) -> bool:
    """Whether it hands out quotas; on a fabric none does."""
    async with grpc.aio.insecure_channel(f"{HOST}:{ports.grpc}") as channel:
        call = channel.stream_stream(f"/{QUOTA_SERVICE_NAME}/StreamRateLimitQuotas")()
        with suppress(grpc.aio.AioRpcError):
            await call.done_writing()
        async with asyncio.timeout(WITHIN_S):
            return await call.code() is not grpc.StatusCode.UNIMPLEMENTED


async def the_gateway(east: Sequence[RegionPorts]) -> int:
    async with asyncio.timeout(WITHIN_S):
        while True:
            found = await gateways(east)
            if len(found) == 1:
                return found[0]
            await asyncio.sleep(0.05)


async def test_a_region_shares_by_redis_and_with_another_by_whoever_is_its_gateway(tmp_path: Path) -> None:
    west, *east = free_ports(3).regions
    async with RedisServer(tmp_path / "redis") as server, Children(tmp_path) as children:
        running: list[Child] = [await children.start(each) for each in commands(tmp_path, server, west, *east)]
        first = await the_gateway(east)
        for own in (west, *east):
            await remaining(own, "month", 10)
        await until_remaining([west, *east], LIMIT - 30)
        assert await answers_quotas(west)
        assert not await answers_quotas(east[0])
        await children.stop(running[1 + first])
        left = east[1 - first]
        assert await the_gateway([left]) == 0
        for own in (west, left):
            await remaining(own, "month", 10)
        await until_remaining([west, left], LIMIT - 50)
        await children.start(running[1 + first].command)
        await remaining(east[first], "month", 10)
        await until_remaining([west, *east], LIMIT - 60)


async def test_redis_is_never_in_the_way(tmp_path: Path) -> None:
    west, *east = free_ports(3).regions
    async with RedisServer(tmp_path / "redis") as server, Children(tmp_path) as children:
        for each in commands(tmp_path, server, west, *east):
            await children.start(each)
        for own in east:
            await remaining(own, "month", 10)
        await until_remaining(east, LIMIT - 20)
        with server.hanging():
            for own in east:
                await remaining(own, "month", 10)
            await until_told(east[0], "limits are not shared on the fabric: it does not answer in time")
            assert await remaining(east[0], "month") == LIMIT - 30
        await until_remaining([west, *east], LIMIT - 40)


async def test_a_start_waits_for_a_redis_that_answers_a_moment_later(tmp_path: Path) -> None:
    west, own = free_ports(2).regions
    async with RedisServer(tmp_path / "redis") as server, Children(tmp_path) as children:
        _, command = commands(tmp_path, server, west, own)
        with server.hanging():
            starting = asyncio.create_task(children.start(command))
            async with asyncio.timeout(WITHIN_S), httpx.AsyncClient(trust_env=False) as client:
                missing: list[str] = []
                while missing != ["the fabric's Redis has not yet answered"]:
                    with suppress(httpx.TransportError):
                        missing = (await client.get(f"http://{HOST}:{own.admin}/readyz")).json()["missing"]
                    await asyncio.sleep(0.05)
            assert not starting.done()
        await starting
        await until_told(own, "limits are not shared", is_told=False)


STRICT_RULES = """
domain: state
descriptors:
  - {key: paid, consistency: strict, rate_limit: {unit: second, requests_per_unit: 100}}
"""


async def admitted(ports: RegionPorts, hits: int) -> bool:
    async with grpc.aio.insecure_channel(f"{HOST}:{ports.grpc}") as channel:
        answer = await status(RateLimitServiceStub(channel), "state", "paid", "x", hits)
        return answer.code == RateLimitResponse.OK


async def until_admitted(ports: RegionPorts, hits: int) -> None:
    async with asyncio.timeout(WITHIN_S):
        while not await admitted(ports, hits):  # noqa: ASYNC110
            await asyncio.sleep(0.05)


async def until_paid(gateway: RegionPorts, asked: RegionPorts) -> None:
    """Ask one of the region for more than this refills, until another one has paid."""
    async with httpx.AsyncClient(trust_env=False, timeout=WITHIN_S) as client, asyncio.timeout(WITHIN_S):
        while True:
            for _ in range(10):
                await admitted(asked, 10)
            membership = (await client.get(f"http://{HOST}:{gateway.admin}/peers")).json()["membership"]
            if membership is not None and membership["payments_received"] > 0:
                assert membership["home_share"] == 0.5
                return


async def test_a_region_is_one_member_of_strict_limits_beside_a_sidecar_of_another(tmp_path: Path) -> None:
    west, *east = free_ports(3).regions
    async with RedisServer(tmp_path / "redis") as server, Children(tmp_path) as children:
        sync = {"members": {"west": 1, "east": 1}}
        made = commands(tmp_path, server, west, *east, rules=STRICT_RULES, sync=sync)
        running = [await children.start(each) for each in made]
        gateway = await the_gateway(east)
        # More than the home of a sidecar in the mesh, and all that there is of the region's.
        for own in east:
            await until_admitted(own, 25)
        await until_paid(east[gateway], east[1 - gateway])
        async with httpx.AsyncClient(trust_env=False, timeout=WITHIN_S) as client:
            text = (await client.get(f"http://{HOST}:{east[1 - gateway].admin}/metrics")).text
        assert 'ratelimit_fabric_strict_tokens_total{direction="drawn",region="east"}' in text
        await children.stop(running[1 + gateway])
        left = east[1 - gateway]
        assert await the_gateway([left]) == 0
        await until_paid(left, left)
