"""New rules while requests come in."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc.aio
import httpx
from e2e.sidecars import ask, sidecar_command, status
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from ratelimit_sidecar.demo.ports import HOST, free_ports
from ratelimit_sidecar.demo.processes import Children
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2 import RateLimitResponse
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2_grpc import RateLimitServiceStub

LIMIT = 1_000_000
"""A year: 0.03 are refilled in a second."""

USERS = 8
"""Ask all the time, one request after the other."""

WITHIN_S = 60.0
"""It takes half a second; the rest is for a busy machine."""

BROKEN = "domain: shop\ndescriptors:\n  - key: user\n    rate_limit: {unit: fortnight, requests_per_unit: 1}\n"


def rules(*, plans: int) -> str:
    return f"""
domain: shop
descriptors:
  - key: user
    rate_limit: {{unit: year, requests_per_unit: {LIMIT}}}
  - key: plan
    rate_limit: {{unit: year, requests_per_unit: {plans}}}
"""


def replace_file(file: Path, text: str) -> None:
    """As editors and deployments do it."""
    new = file.with_suffix(".new")
    new.write_text(text)
    new.rename(file)


async def test_an_empty_runtime_folder_limits_nothing_until_files_come(tmp_path: Path) -> None:
    ports = free_ports(1).regions[0]
    folder = tmp_path / "data" / "rl" / "config"
    folder.mkdir(parents=True)
    environment = {"RUNTIME_ROOT": str(tmp_path / "data"), "RUNTIME_SUBDIRECTORY": "/rl/"}
    command = sidecar_command(tmp_path, ports, {}, environment=environment)
    async with (
        Children(tmp_path) as children,
        grpc.aio.insecure_channel(f"{HOST}:{ports.grpc}") as channel,
    ):
        await children.start(command)
        stub = RateLimitServiceStub(channel)
        assert (await status(stub, "shop", "plan", "gold")).code == RateLimitResponse.OK
        replace_file(folder / "a.yaml", rules(plans=0))
        async with asyncio.timeout(WITHIN_S):
            while (await status(stub, "shop", "plan", "gold")).code == RateLimitResponse.OK:  # noqa: ASYNC110 (another process)
                await asyncio.sleep(0.02)


async def test_health_checks_wait_for_rules_if_so_configured(tmp_path: Path) -> None:
    ports = free_ports(1).regions[0]
    folder = tmp_path / "config"
    folder.mkdir()
    environment = {"RUNTIME_ROOT": str(tmp_path), "HEALTHY_WITH_AT_LEAST_ONE_CONFIG_LOADED": "true"}
    command = sidecar_command(tmp_path, ports, {}, environment=environment, ready_path="/healthz")
    async with (
        Children(tmp_path) as children,
        httpx.AsyncClient(base_url=f"http://{HOST}:{ports.admin}", trust_env=False, timeout=60) as console,
        grpc.aio.insecure_channel(f"{HOST}:{ports.grpc}") as channel,
    ):
        await children.start(command)
        watch = HealthStub(channel).Watch(HealthCheckRequest(service="ratelimit"), wait_for_ready=True)
        assert (await watch.read()).status == HealthCheckResponse.NOT_SERVING
        response = await console.get("/healthcheck")
        assert response.status_code == 500
        assert "there are no rules of any domain yet" in response.text
        replace_file(folder / "a.yaml", rules(plans=1))
        async with asyncio.timeout(WITHIN_S):
            assert (await watch.read()).status == HealthCheckResponse.SERVING
        assert (await console.get("/healthcheck")).status_code == 200


class Load:
    """Users that ask until they are told to stop."""

    def __init__(self, stub: RateLimitServiceStub) -> None:
        self.answered: Counter[str] = Counter()
        self.wrong: list[object] = []
        self._stub = stub
        self._stopping = False

    def stop(self) -> None:
        self._stopping = True

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for number in range(USERS):
                tasks.create_task(self._keep_asking(f"user {number}"))

    async def _keep_asking(self, user: str) -> None:
        request = ask("shop", "user", user)
        while not self._stopping:
            try:
                answer = await self._stub.ShouldRateLimit(request, timeout=60)
            except grpc.aio.AioRpcError as error:
                self.wrong.append(error)
                continue
            self.answered[user] += 1
            limit = answer.statuses[0].current_limit.requests_per_unit
            if (answer.overall_code, limit) != (RateLimitResponse.OK, LIMIT):
                self.wrong.append(answer)


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Wait until something holds in the sidecar."""
    async with asyncio.timeout(WITHIN_S):
        while not await condition():  # noqa: ASYNC110 (another process)
            await asyncio.sleep(0.02)


async def test_a_reload_under_load_loses_no_request_and_a_bad_file_changes_nothing(tmp_path: Path) -> None:
    ports = free_ports(1).regions[0]
    file = tmp_path / "rules.yaml"
    file.write_text(rules(plans=100))
    async with (
        Children(tmp_path) as children,
        httpx.AsyncClient(base_url=f"http://{HOST}:{ports.admin}", trust_env=False, timeout=60) as console,
    ):
        sidecar = await children.start(sidecar_command(tmp_path, ports, {"rules": [str(file)]}))

        async def reloads() -> dict:
            response = await console.get("/readyz")
            assert response.status_code == 200
            return response.json()["rules"]

        async def is_rejected() -> bool:
            return (await reloads())["rejected"] is not None

        async def is_accepted() -> bool:
            return not await is_rejected()

        async with grpc.aio.insecure_channel(f"{HOST}:{ports.grpc}") as channel, asyncio.TaskGroup() as tasks:
            stub = RateLimitServiceStub(channel)
            load = Load(stub)
            tasks.create_task(load.run())

            async def is_left(limit: int, left: int, *, hits: int = 0) -> bool:
                """Under another limit, what was taken counts from the middle of its slot, so one may have refilled."""
                found = await status(stub, "shop", "plan", "free", hits)
                return found.current_limit.requests_per_unit == limit and found.limit_remaining - left in (0, 1)

            async def has_loaded_again() -> bool:
                metrics = (await console.get("/metrics")).text
                return 'ratelimit_config_loads_total{region="local",result="success"} 4.0' in metrics

            assert await is_left(100, 70, hits=30)
            first = await reloads()

            replace_file(file, rules(plans=200))
            await until(lambda: is_left(200, 170))
            second = await reloads()
            assert second["rejected"] is None
            assert second["in_force"] == 2

            replace_file(file, BROKEN)
            await until(is_rejected)
            third = await reloads()
            assert third["loaded_at"] == second["loaded_at"] >= first["loaded_at"]
            assert f"{file}:4:" in third["rejected"]["problems"][0]
            assert "fortnight" in (await console.get("/rlconfig")).text
            assert await is_left(200, 160, hits=10)

            replace_file(file, rules(plans=50))
            await until(is_accepted)
            assert await is_left(50, 10)

            sidecar.signal(signal.SIGHUP)
            await until(has_loaded_again)
            assert await is_left(50, 10)

            load.stop()

        assert load.wrong == []
        assert len(load.answered) == USERS
        # Nothing was forgotten and nothing was counted twice, whichever rules a request was decided by.
        async with grpc.aio.insecure_channel(f"{HOST}:{ports.grpc}") as channel:
            for user, answered in load.answered.items():
                left = (await status(RateLimitServiceStub(channel), "shop", "user", user, hits=0)).limit_remaining
                assert left - (LIMIT - answered) in (0, 1), user
