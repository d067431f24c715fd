"""State that survives: a real sidecar is stopped, or killed, and starts again with its file."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import grpc.aio
import httpx
import pytest
from e2e.sidecars import sidecar_command, status

from ratelimit_sidecar.config.rules_file import load_rules
from ratelimit_sidecar.config.rules_schema import RuleDefaults
from ratelimit_sidecar.crdt.shares import Membership
from ratelimit_sidecar.demo.ports import HOST, RegionPorts, free_ports
from ratelimit_sidecar.demo.processes import ChildFailed, Children, Command
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2_grpc import RateLimitServiceStub
from ratelimit_sidecar.persistence.purse_file import holder_of, write_purses

LIMIT = 1_000
RULES = f"""
domain: shop
descriptors:
  - key: month
    algorithm: fixed_window
    rate_limit: {{unit: month, requests_per_unit: {LIMIT}}}
  - key: alone
    algorithm: fixed_window
    consistency: local
    rate_limit: {{unit: month, requests_per_unit: {LIMIT}}}
"""
STRICT_RULES = f"""
domain: shop
descriptors:
  - key: plan
    consistency: strict
    rate_limit: {{unit: month, requests_per_unit: {LIMIT}}}
"""
WITHIN_S = 60.0


@asynccontextmanager
async def asking(ports: RegionPorts) -> AsyncIterator[RateLimitServiceStub]:
    async with grpc.aio.insecure_channel(f"{HOST}:{ports.grpc}") as channel:
        yield RateLimitServiceStub(channel)


async def remaining(ports: RegionPorts, key: str, hits: int = 0) -> int:
    async with asking(ports) as stub:
        left: int = (await status(stub, "shop", key, "ada", hits)).limit_remaining
        return left


def commands(folder: Path, ports: Sequence[RegionPorts], file: str = "state-{}") -> list[Command]:
    (folder / "rules.yaml").write_text(RULES)
    made = []
    for index, own in enumerate(ports):
        peers = [f"{HOST}:{other.sync}" for other in ports if other is not own]
        config = {
            "rules": [str(folder / "rules.yaml")],
            "sync": {"peers": peers},
            "persistence": {"file": str(folder / file.format(index)), "every_seconds": 1},
        }
        made.append(sidecar_command(folder, own, config, name=f"node-{index}"))
    return made


@pytest.mark.slow
async def test_when_all_stop_and_start_again_the_limits_are_where_they_were(tmp_path: Path) -> None:
    ports = free_ports(3).regions
    async with Children(tmp_path) as children:
        running = [await children.start(command) for command in commands(tmp_path, ports)]
        for own in ports:
            await remaining(own, "month", 10)
            await remaining(own, "alone", 7)
        await until_remaining(ports, LIMIT - 30)
        await children.stop(*running)
        for child in running:
            await children.start(child.command)
        for own in ports:
            assert await remaining(own, "month") == LIMIT - 30
            assert await remaining(own, "alone") == LIMIT - 7


async def test_one_that_is_killed_loses_what_came_after_its_last_snapshot_only(tmp_path: Path) -> None:
    [own] = free_ports(1).regions
    [command] = commands(tmp_path, [own])
    async with Children(tmp_path) as children:
        child = await children.start(command)
        await remaining(own, "month", 40)
        await until_saved(own, since=time.time())
        await remaining(own, "month", 3)
        await children.kill(child)
        await children.start(command)
        assert await remaining(own, "month") in {LIMIT - 40, LIMIT - 43}


@pytest.mark.slow
async def test_a_limit_whose_rule_comes_after_the_start_is_where_it_was(tmp_path: Path) -> None:
    [own] = free_ports(1).regions
    folder, elsewhere = tmp_path / "rules", tmp_path / "elsewhere.yaml"
    folder.mkdir()
    elsewhere.write_text(RULES)
    file = elsewhere.rename(folder / "rules.yaml")
    config = {"rules": [str(folder)], "persistence": {"file": str(tmp_path / "state")}}
    async with Children(tmp_path) as children:
        child = await children.start(sidecar_command(tmp_path, own, config, name="node"))
        assert await remaining(own, "month", 40) == LIMIT - 40
        await children.stop(child)
        file.rename(elsewhere)
        await children.start(child.command)
        elsewhere.rename(file)
        await until_remaining([own], LIMIT - 40)


@pytest.mark.slow
async def test_a_strict_limit_goes_on_where_a_clean_stop_left_it_and_begins_empty_after_a_kill(tmp_path: Path) -> None:
    [own] = free_ports(1).regions
    rules = tmp_path / "strict.yaml"
    rules.write_text(STRICT_RULES)
    config = {
        "rules": [str(rules)],
        "sync": {"members": {"node": 1}},
        "persistence": {"file": str(tmp_path / "state")},
    }
    match = load_rules([rules], defaults=RuleDefaults(has_members=True)).match("shop", [("plan", "ada")])
    assert match is not None
    kept, holder = tmp_path / "state.purses", holder_of("node", Membership(1, {"node": 1}))
    write_purses(kept, holder, [(match.bucket_key, 500 << 32)], age_us=0)
    async with Children(tmp_path) as children:
        child = await children.start(sidecar_command(tmp_path, own, config, name="node"))
        assert await remaining(own, "plan", 10) == 490
        assert not kept.exists()
        await children.stop(child)
        with socket.create_server((HOST, own.grpc)), pytest.raises(ChildFailed):
            await children.start(child.command)
        child = await children.start(child.command)
        assert await remaining(own, "plan", 10) == 480
        await children.kill(child)
        await children.start(child.command)
        assert await remaining(own, "plan") == 0


@pytest.mark.slow
async def test_a_second_sidecar_on_the_same_file_does_not_start(tmp_path: Path) -> None:
    first, second = free_ports(2).regions
    [command, other] = commands(tmp_path, [first, second], file="state")
    async with Children(tmp_path) as children:
        await children.start(command)
        process = await asyncio.create_subprocess_exec(*other.argv, stderr=asyncio.subprocess.PIPE)
        _, said = await asyncio.wait_for(process.communicate(), WITHIN_S)
    assert process.returncode == 1
    assert b"another process keeps its state in it" in said


async def until_remaining(ports: Sequence[RegionPorts], expected: int) -> None:
    async with asyncio.timeout(WITHIN_S):
        while True:
            if [await remaining(own, "month") for own in ports] == [expected] * len(ports):
                return
            await asyncio.sleep(0.05)


async def until_saved(own: RegionPorts, since: float) -> None:
    """A snapshot was begun after that instant."""
    async with asyncio.timeout(WITHIN_S), httpx.AsyncClient(trust_env=False) as client:
        while True:
            text = (await client.get(f"http://{HOST}:{own.admin}/metrics")).text
            for line in text.splitlines():
                if line.startswith("ratelimit_snapshot_timestamp_seconds") and float(line.rsplit(" ", 1)[1]) > since:
                    return
            await asyncio.sleep(0.05)
