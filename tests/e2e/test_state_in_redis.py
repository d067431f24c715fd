"""State in Redis: real sidecars are killed, all at once, and start again; and Redis is never in their way."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest
from e2e.sidecars import sidecar_command
from e2e.test_state import LIMIT, RULES, WITHIN_S, remaining, until_remaining
from persistence.redis_server import RedisServer, needs_redis

from ratelimit_sidecar.demo.ports import HOST, RegionPorts, free_ports
from ratelimit_sidecar.demo.processes import Children, Command

pytestmark = needs_redis


def commands(folder: Path, ports: Sequence[RegionPorts], server: RedisServer) -> list[Command]:
    (folder / "rules.yaml").write_text(RULES)
    made = []
    for index, own in enumerate(ports):
        config = {
            "rules": [str(folder / "rules.yaml")],
            "sync": {"peers": [f"{HOST}:{other.sync}" for other in ports if other is not own]},
            "persistence": {"url": server.url},
        }
        made.append(sidecar_command(folder, own, config, name=f"node-{index}"))
    return made


async def text_at(own: RegionPorts, path: str) -> str:
    async with httpx.AsyncClient(trust_env=False, timeout=WITHIN_S) as client:
        answer = await client.get(f"http://{HOST}:{own.admin}{path}")
    assert answer.status_code == 200
    return answer.text


async def until_written(own: RegionPorts, buckets: int) -> None:
    """At least so many, of at most nine."""
    expected = re.compile(rf'ratelimit_redis_buckets_total\{{region="local",result="written"\}} [{buckets}-9]\.0')
    async with asyncio.timeout(WITHIN_S):
        while True:
            if expected.search(await text_at(own, "/metrics")):
                return
            await asyncio.sleep(0.05)


async def until_told(own: RegionPorts, text: str, *, is_told: bool = True) -> None:
    """Until /readyz, which does not fail, says that of Redis, or says it no more."""
    async with asyncio.timeout(WITHIN_S):
        while True:
            if (text in await text_at(own, "/readyz")) is is_told:
                return
            await asyncio.sleep(0.05)


@pytest.mark.slow
async def test_when_all_are_killed_and_start_again_a_monthly_limit_is_where_it_was(tmp_path: Path) -> None:
    ports = free_ports(3).regions
    async with RedisServer(tmp_path / "redis") as server, Children(tmp_path) as children:
        running = [await children.start(command) for command in commands(tmp_path, ports, server)]
        for own in ports:
            await remaining(own, "month", 10)
        await until_remaining(ports, LIMIT - 30)
        for own in ports:
            await until_written(own, 1)
        for child in running:
            child.signal(signal.SIGKILL)
        await asyncio.gather(*[child.wait() for child in running])
        for child in running:
            await children.kill(child)
        # The first one that starts knows all of it, with no peer to ask.
        await children.start(running[0].command)
        assert await remaining(ports[0], "month") == LIMIT - 30
        for child in running[1:]:
            await children.start(child.command)
        await until_remaining(ports, LIMIT - 30)


async def test_one_that_stops_cleanly_loses_nothing(tmp_path: Path) -> None:
    [own] = free_ports(1).regions
    async with RedisServer(tmp_path / "redis") as server, Children(tmp_path) as children:
        [command] = commands(tmp_path, [own], server)
        child = await children.start(command)
        await remaining(own, "month", 10)
        await children.stop(child)
        await children.start(command)
        assert await remaining(own, "month") == LIMIT - 10


@pytest.mark.slow
async def test_redis_is_never_in_the_way(tmp_path: Path) -> None:
    [own] = free_ports(1).regions
    async with RedisServer(tmp_path / "redis") as server, Children(tmp_path) as children:
        [command] = commands(tmp_path, [own], server)
        child = await children.start(command)
        await remaining(own, "month", 10)
        await until_written(own, 1)
        with server.hanging():
            await remaining(own, "month", 10)
            await until_told(own, "the state is not kept in Redis: it does not answer in time")
            assert await remaining(own, "month", 10) == LIMIT - 30
        await server.kill()
        await server.start()
        await until_told(own, "the state is not kept in Redis", is_told=False)
        await until_written(own, 2)
        await children.kill(child)
        await children.start(command)
        assert await remaining(own, "month") == LIMIT - 30


async def test_without_it_nothing_of_redis_is_imported(tmp_path: Path) -> None:
    program = (
        "import sys; import ratelimit_sidecar.cli.serve, ratelimit_sidecar.app;"
        "sys.exit(any(name.partition('.')[0] == 'redis' or 'redis' in name for name in sys.modules))"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", program, env=dict(os.environ), cwd=tmp_path)
    assert await asyncio.wait_for(process.wait(), WITHIN_S) == 0
