"""Envoys with the configuration of examples/quotas, and their sidecars."""

from __future__ import annotations

import asyncio
import copy
import re
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import yaml
from prometheus_client.parser import text_string_to_metric_families

from ratelimit_sidecar.demo.ports import HOST, RegionPorts
from ratelimit_sidecar.demo.processes import Command
from ratelimit_sidecar.demo.regions import find_envoy

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "quotas"


def envoy_command(
    folder: Path, name: str, ports: RegionPorts, sidecar_port: int, upstream: int, tenants: str = "acme|globex|initech"
) -> Command:
    """The command of an Envoy with the example's quota filter.

    Args:
        upstream: where it answers itself, as the upstream of its other listener.
        tenants: a regular expression for those that have a bucket each.
    """
    example = (EXAMPLE / "envoy.yaml").read_text()
    assert 'regex: "acme|globex|initech"' in example
    config = yaml.safe_load(example.replace("acme|globex|initech", tenants))
    config["node"] = {"id": name, "cluster": "test"}
    config["admin"]["address"]["socket_address"]["port_value"] = ports.envoy_admin
    resources = config["static_resources"]
    (listener,) = resources["listeners"]
    listener["address"]["socket_address"].update(address=HOST, port_value=ports.envoy)
    for cluster, port in zip(resources["clusters"], (upstream, sidecar_port), strict=True):
        (locality,) = cluster["load_assignment"]["endpoints"]
        locality["lb_endpoints"][0]["endpoint"]["address"]["socket_address"]["port_value"] = port
    resources["listeners"].append(_answering(listener, upstream))
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config))
    argv = [find_envoy(), "-c", str(file), "--concurrency", "1", "--log-level", "warning", "--disable-hot-restart"]
    return Command(name, argv, f"http://{HOST}:{ports.envoy_admin}/ready")


def _answering(listener: Any, port: int) -> Any:
    answering = copy.deepcopy(listener)
    answering["name"] = "upstream"
    answering["address"]["socket_address"]["port_value"] = port
    manager = answering["filter_chains"][0]["filters"][0]["typed_config"]
    del manager["http_filters"][:-1]
    (host,) = manager["route_config"]["virtual_hosts"]
    host["routes"] = [{"match": {"prefix": "/"}, "direct_response": {"status": 200}}]
    return answering


def sidecar_command(
    folder: Path, name: str, ports: RegionPorts, peers: Sequence[RegionPorts] = (), front_end: str = "h2"
) -> Command:
    listen = {"grpc": [f"{HOST}:{ports.grpc}"], "admin": f"{HOST}:{ports.admin}", "sync": f"{HOST}:{ports.sync}"}
    config: Mapping[str, object] = {
        "node": {"id": name},
        "listen": listen,
        "rules": [str(EXAMPLE / "rules")],
        "sync": {"protocol": "grpc", "peers": [f"{HOST}:{peer.sync}" for peer in peers]},
    }
    file = folder / f"{name}-config.yaml"
    file.write_text(yaml.safe_dump(config))
    argv = [sys.executable, "-m", "ratelimit_sidecar", "serve", "--config", str(file), "--frontend", front_end]
    return Command(name, argv, f"http://{HOST}:{ports.admin}/readyz")


class Load:
    """Requests through one Envoy, sent when they are due, on connections of HTTP/1.1: few for the processor to do."""

    def __init__(self, port: int, per_second: float, tenant: str = "acme") -> None:
        self.per_second = per_second
        self.statuses: Counter[int] = Counter()
        self._port = port
        self._request = f"GET / HTTP/1.1\r\nhost: test\r\nx-tenant: {tenant}\r\n\r\n".encode("latin-1")
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def run(self) -> None:
        """Until cancelled."""
        due = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            while True:
                due += 1 / self.per_second
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                tasks.create_task(self.ask())

    async def ask(self) -> int:
        """Returns the status."""
        reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection(HOST, self._port)
        try:
            writer.write(self._request)
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head)
            await reader.readexactly(int(length[1]) if length is not None else 0)
        except BaseException:
            writer.close()
            raise
        self._idle.append((reader, writer))
        status = int(head.split()[1])
        self.statuses[status] += 1
        return status

    def close(self) -> None:
        while self._idle:
            self._idle.pop()[1].close()


@asynccontextmanager
async def running(*loads: Load) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(load.run()) for load in loads]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for load in loads:
            load.close()


class Rate(NamedTuple):
    """Requests a second."""

    admitted: float
    asked: float


async def admitted_within(seconds: float, loads: Sequence[Load]) -> list[Rate]:
    before, began = [load.statuses.copy() for load in loads], time.monotonic()
    await asyncio.sleep(seconds)
    elapsed = time.monotonic() - began
    more = [load.statuses - was for load, was in zip(loads, before, strict=True)]
    return [Rate(statuses[200] / elapsed, statuses.total() / elapsed) for statuses in more]


async def metric(client: httpx.AsyncClient, ports: RegionPorts, name: str, **labels: str) -> float:
    text = (await client.get(f"http://{HOST}:{ports.admin}/metrics")).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    found = [sample.value for sample in samples if sample.name == name and labels.items() <= sample.labels.items()]
    return sum(found)
