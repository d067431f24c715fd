"""Many processes on one fabric, and gateways that are killed under load. `make test-all`."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
from persistence.redis_server import WITHIN_S, RedisServer, free_port_numbers, needs_redis

from benchmarks.light_fabric import LightSidecar
from ratelimit_sidecar.demo.ports import HOST
from ratelimit_sidecar.fabric.scripts import FabricKeys

pytestmark = [needs_redis]

LONG_S = 6 * WITHIN_S


class Light:
    """A process of `benchmarks.light_fabric`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def begin(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        await self.process.stdin.drain()

    async def end(self) -> dict[str, float]:
        assert self.process.stdout is not None
        await self.begin()
        async with asyncio.timeout(LONG_S):
            figures: dict[str, float] = json.loads(await self.process.stdout.readline())
            await self.process.wait()
        return figures


@asynccontextmanager
async def light(server: RedisServer, name: str, *options: str) -> AsyncIterator[Light]:
    argv = [sys.executable, "-m", "benchmarks.light_fabric", "--url", server.url, "--name", name, *options]
    pipe = asyncio.subprocess.PIPE
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    process = await asyncio.create_subprocess_exec(*argv, stdin=pipe, stdout=pipe, env=environment)
    try:
        assert process.stdout is not None
        async with asyncio.timeout(LONG_S):
            while (line := await process.stdout.readline()) != b"ready\n":
                assert line, "it has ended"
        yield Light(process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def share_a_limit(server: RedisServer, processes: int, capacity: int, rate: float) -> None:
    """Together they admit the limit, and no more than what they are asked for while it is not known yet."""
    async with AsyncExitStack() as stack:
        options = ("--rate", str(rate), "--capacity", str(capacity))
        made = await asyncio.gather(
            *[stack.enter_async_context(light(server, f"light-{number}", *options)) for number in range(processes)]
        )
        for each in made:
            await each.begin()
        observer = LightSidecar(server.url, "observer", capacity, 1, region="east", sync=None, peers=())
        async with asyncio.timeout(LONG_S):
            while await observer.look() < capacity:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        figures = [await each.end() for each in made]
        admitted = sum(each["admitted"] for each in figures)
        # What is taken is told at the next flush and tick, and heard at one more.
        unknown_s = 2 * max(each["longest_tick"] for each in figures) + 0.1
        assert capacity <= admitted <= capacity + processes * rate * unknown_s
        assert await observer.look() == admitted
        await observer.fabric.close()


@pytest.mark.slow
async def test_processes_share_a_limit(tmp_path: Path) -> None:
    async with RedisServer(tmp_path) as server:
        await share_a_limit(server, 2, 200, 100)


@pytest.mark.long
async def test_thirty_processes_share_a_limit(tmp_path: Path) -> None:
    async with RedisServer(tmp_path) as server:
        await share_a_limit(server, 30, 3_000, 20)


async def holder(server: RedisServer) -> str:
    """The name of the gateway; "" when there is none."""
    async with server.client() as client:
        lease = await client.get(FabricKeys("ratelimit").shards[0].lease)
    return "" if lease is None else str(lease.decode().split(" ")[0])


@pytest.mark.long
async def test_a_gateway_that_is_killed_ten_times_under_load_costs_and_doubles_nothing(tmp_path: Path) -> None:
    east_port, west_port = free_port_numbers(2)
    east_sync, west_sync = f"{HOST}:{east_port}", f"{HOST}:{west_port}"
    async with AsyncExitStack() as stack:
        in_east = await stack.enter_async_context(RedisServer(tmp_path / "east"))
        in_west = await stack.enter_async_context(RedisServer(tmp_path / "west"))
        west = LightSidecar(in_west.url, "west", 10**9, 1, region="west", sync=west_sync, peers=[east_sync])
        west_runs = asyncio.create_task(west.fabric.run())
        loading = [
            await stack.enter_async_context(light(in_east, f"load-{number}", "--rate", "50")) for number in range(2)
        ]
        gateways: dict[str, Light] = {}

        async def add(number: int) -> None:
            options = ("--sync", east_sync, "--peer", west_sync)
            each = await stack.enter_async_context(light(in_east, f"gateway-{number}", *options))
            gateways[f"gateway-{number}-0"] = each

        async def until_another(former: str) -> float:
            began = time.monotonic()
            async with asyncio.timeout(WITHIN_S):
                while (await holder(in_east)) in ("", former):  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            return time.monotonic() - began

        for number in range(2):
            await add(number)
        for each in loading:
            await each.begin()
        gaps = []
        for number in range(10):
            west.take()
            west.flush()
            name = await holder(in_east)
            while not name:
                await asyncio.sleep(0.05)
                name = await holder(in_east)
            gateways[name].process.kill()
            await gateways[name].process.wait()
            gaps.append(await until_another(name))
            await add(2 + number)
        figures = [await each.end() for each in loading]
        expected = sum(each["admitted"] for each in figures) + west.admitted
        async with asyncio.timeout(WITHIN_S):
            while await west.look() != expected:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        await asyncio.sleep(1)
        assert await west.look() == expected, "nothing comes a second time"
        print("another gateway after", [round(gap, 2) for gap in gaps])
        assert sorted(gaps)[5] < 3
        west_runs.cancel()
        await asyncio.wait([west_runs])
