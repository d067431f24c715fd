"""Two sidecars, as processes, whose mesh has TLS and whose peers are a name."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import grpc.aio
import httpx
import pytest
import yaml
from certificates import Authority
from e2e.sidecars import sidecar_command, status

from ratelimit_sidecar.demo.ports import HOST, RegionPorts, free_ports
from ratelimit_sidecar.demo.processes import Child, Children, Command
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2_grpc import RateLimitServiceStub

WITHIN_S = 60
POLL_S = 0.05

RULES = {
    "domain": "shop",
    "descriptors": [{"key": "user", "rate_limit": {"unit": "day", "requests_per_unit": 20}}],
}


def command(folder: Path, authority: Authority, name: str, own: RegionPorts, ports: tuple[RegionPorts, ...]) -> Command:
    files = authority.write(folder / f"tls-{name}", f"{name}.mesh.example")
    (folder / "rules.yaml").write_text(yaml.safe_dump(RULES))
    tls = {"certificate": str(files.certificate), "key": str(files.key), "ca": str(files.ca)}
    sync = {
        # Of IPv6, on which nobody listens, and of IPv4.
        "peers": [f"localhost:{each.sync}" for each in ports],
        "tls": {**tls, "peer_names": "{node}.mesh.example"},
    }
    return sidecar_command(folder, own, {"rules": [str(folder / "rules.yaml")], "sync": sync}, name=name)


async def until_left(port: RegionPorts, left: int) -> None:
    async with grpc.aio.insecure_channel(f"{HOST}:{port.grpc}") as channel, asyncio.timeout(WITHIN_S):
        while (await status(RateLimitServiceStub(channel), "shop", "user", "eve", hits=0)).limit_remaining != left:  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)


async def until_only_peer(port: RegionPorts, node: str, address: str) -> None:
    url = f"http://{HOST}:{port.admin}/peers"
    async with httpx.AsyncClient(trust_env=False) as console, asyncio.timeout(WITHIN_S):
        found: list[tuple[str, str]] = []
        while found != [(node, address)]:
            await asyncio.sleep(POLL_S)
            found = [(peer["node"], peer["address"]) for peer in (await console.get(url)).json()["peers"]]


async def take(port: RegionPorts, hits: int) -> None:
    async with grpc.aio.insecure_channel(f"{HOST}:{port.grpc}") as channel:
        await status(RateLimitServiceStub(channel), "shop", "user", "eve", hits=hits)


async def stop(sidecar: Child) -> None:
    sidecar.signal(signal.SIGTERM)
    async with asyncio.timeout(WITHIN_S):
        assert await sidecar.wait() == 0, sidecar.log.read_text()


@pytest.mark.slow
async def test_sidecars_share_a_limit_over_tls_and_a_restarted_one_comes_with_a_renewed_certificate(
    tmp_path: Path,
) -> None:
    ports, authority = free_ports(2).regions, Authority()
    first, second = (
        command(tmp_path, authority, name, own, ports) for name, own in zip(("east", "west"), ports, strict=True)
    )
    async with Children(tmp_path) as children:
        await children.start(first)
        west = await children.start(second)
        await take(ports[0], 5)
        await until_left(ports[1], 15)
        await take(ports[1], 3)
        await until_left(ports[0], 12)
        # By a dial of its own too, after which the other family is not missed.
        await until_only_peer(ports[0], "west", f"127.0.0.1:{ports[1].sync}")

        await stop(west)
        authority.write(tmp_path / "tls-west", "west.mesh.example")
        await children.start(second)
        await until_left(ports[1], 12)
        await take(ports[1], 2)
        await until_left(ports[0], 10)
