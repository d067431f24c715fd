"""A sidecar whose machine has the wrong time, and what it says of that."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import grpc.aio
import httpx
import pytest
from e2e.sidecars import sidecar_command, status

from ratelimit_sidecar.demo.ports import HOST, RegionPorts, free_ports
from ratelimit_sidecar.demo.processes import Children, Command
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2 import RateLimitResponse
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2_grpc import RateLimitServiceStub

WITHIN_S = 60.0
"""It takes a second or two; the rest is for a busy machine."""

RULES = """
domain: shop
descriptors:
  - key: user
    bucket: {capacity: 10, refillRate: 0.01}
"""

_WITH_CLOCK_OF_FILE = """
import runpy, sys, time
path, right_ns = sys.argv.pop(1), time.time_ns
time.time_ns = lambda: right_ns() + int(open(path).read()) * 10**9
runpy.run_module("ratelimit_sidecar", run_name="__main__")
"""


def with_clock_of(file: Path, command: Command) -> Command:
    """The same process on a machine whose system clock is ahead by the seconds in `file`."""
    argv = [sys.executable, "-c", _WITH_CLOCK_OF_FILE, str(file), *command.argv[3:]]
    return replace(command, argv=argv)


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(WITHIN_S):
        while not await condition():  # noqa: ASYNC110 (another process)
            await asyncio.sleep(0.05)


@pytest.mark.slow
async def test_a_clock_an_hour_ahead_shows_and_limits_are_shared_as_soon_as_it_is_set_right(tmp_path: Path) -> None:
    right, wrong = free_ports(2).regions
    rules, clock = tmp_path / "rules.yaml", tmp_path / "ahead"
    rules.write_text(RULES)
    clock.write_text("3600")

    def command(name: str, own: RegionPorts, other: RegionPorts) -> Command:
        sync = {"peers": [f"{HOST}:{other.sync}"]}
        return sidecar_command(tmp_path, own, {"rules": [str(rules)], "sync": sync}, name=name, ready_path="/healthz")

    async with (
        Children(tmp_path) as children,
        httpx.AsyncClient(trust_env=False, timeout=60) as client,
        grpc.aio.insecure_channel(f"{HOST}:{right.grpc}") as right_channel,
        grpc.aio.insecure_channel(f"{HOST}:{wrong.grpc}") as wrong_channel,
    ):

        async def degraded(at: RegionPorts) -> str:
            response = await client.get(f"http://{HOST}:{at.admin}/readyz")
            return " ".join(response.json()["degraded"])

        await children.start(command("right", right, wrong))
        await children.start(with_clock_of(clock, command("wrong", wrong, right)))

        async def is_told() -> bool:
            by_right, by_wrong = await degraded(right), await degraded(wrong)
            return "not shared with wrong: its clock is 36" in by_right and "not shared with right" in by_wrong

        await until(is_told)
        one, other = RateLimitServiceStub(right_channel), RateLimitServiceStub(wrong_channel)
        for _ in range(10):
            assert (await status(other, "shop", "user", "eve")).code == RateLimitResponse.OK

        (tmp_path / "right").write_text("0")
        (tmp_path / "right").replace(clock)

        async def is_over() -> bool:
            return (await status(one, "shop", "user", "eve", hits=0)).limit_remaining <= 1

        await until(is_over)
        assert (await status(other, "shop", "user", "eve", hits=2)).code == RateLimitResponse.OVER_LIMIT
        assert not await degraded(wrong)
        metrics = (await client.get(f"http://{HOST}:{wrong.admin}/metrics")).text
        assert re.search(r'^ratelimit_clock_steps_total\{.*"back".*\} 1', metrics, re.MULTILINE)
        assert "ratelimit_clock_gap_seconds{" in metrics
