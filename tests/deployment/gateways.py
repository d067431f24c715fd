"""Envoy Gateway without Kubernetes, with the real Envoy, one gateway a region: two machines each, one for the sidecar.

They run what is in deploy/envoy-gateway, with other folders.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx
import yaml
from certificates import Authority

from deployment import tools
from deployment.machines import Machines, machines
from ratelimit_sidecar.demo.regions import find_envoy

ROOT: Final = Path(__file__).parents[2]
DEPLOY: Final = ROOT / "deploy/envoy-gateway"
STANDALONE: Final = DEPLOY / "standalone"

CALLED: Final = "envoy-ratelimit.envoy-gateway-system.svc.cluster.local"
"""By what Envoy Gateway tells Envoy to call its rate limit service."""

CERTIFICATES: Final = Path("/certs")
"""Where Envoy looks for the authority of that service, in `ca.crt`."""

PROBE: Final = 8_081, "/readyz"
"""Of Envoy Gateway, once it watches its files."""

_ENVOY_VERSION: Final = "1.40.0"
_PROXY, _CONSOLE = 8_888, 8_080
_UPSTREAMS: Final = {8_000: "openclaw/rating_api.py", 8_001: "llm-tokens/model.py"}


@dataclass(frozen=True, slots=True)
class Gateway:
    """A region: Envoy Gateway with its Envoy, and a sidecar.

    Args:
        proxy: of Envoy.
        console: of the sidecar.
        admin: gives Envoy's, once it runs.
    """

    folder: Path
    proxy: httpx.AsyncClient
    console: httpx.AsyncClient
    admin: Callable[[], Awaitable[httpx.AsyncClient]]

    def write(self, name: str, text: str) -> None:
        """A file of resources, new or changed; at once, as Envoy Gateway watches."""
        new = self.folder / name
        new.write_text(text)
        new.rename(self.folder / "etc/resources" / name)

    def delete(self, name: str) -> None:
        (self.folder / "etc/resources" / name).unlink()


@asynccontextmanager
async def gateways(folder: Path, regions: Sequence[str]) -> AsyncIterator[dict[str, Gateway]]:
    """A gateway in each region, by name, for as long as the context lasts.

    Args:
        folder: an empty one.

    Raises:
        Unavailable: a program is missing, or network namespaces are.
    """
    tools.path("envoy-gateway")
    names = [f"{kind}-{number}" for number in range(len(regions)) for kind in ("gateway", "sidecar")]
    authority = Authority()
    async with machines(folder, names) as own:
        mesh = {name: own.addresses[f"sidecar-{number}"] for number, name in enumerate(regions)}
        yield {
            name: await _start(own, folder / name, name, number, mesh, authority) for number, name in enumerate(regions)
        }


async def _start(
    own: Machines, folder: Path, region: str, number: int, mesh: Mapping[str, str], authority: Authority
) -> Gateway:
    on_gateway, on_sidecar = f"gateway-{number}", f"sidecar-{number}"
    program = _set_up(folder)
    hosts = {
        "envoy-gateway": own.addresses[on_gateway],
        CALLED: own.addresses[on_sidecar],
        **{f"{name}.mesh.example.com": address for name, address in mesh.items()},
    }
    authority.write(folder / "mesh", f"{region}.mesh.example.com")
    config = yaml.safe_load(with_folders((STANDALONE / "sidecar.yaml").read_text(), folder))
    config["node"] = {"id": region, "region": region}
    config["listen"]["admin_shows_values"] = True
    config["sync"]["peers"] = [f"{name}.mesh.example.com:50051" for name in mesh if name != region]
    (folder / "sidecar.yaml").write_text(yaml.safe_dump(config))

    async def admin() -> httpx.AsyncClient:
        return await own.client(on_gateway, _admin_port(folder))

    gateway = Gateway(folder, await own.client(on_gateway, _PROXY), await own.client(on_sidecar, _CONSOLE), admin)
    gateway.write("gateway.yaml", (STANDALONE / "gateway.yaml").read_text())
    for port, upstream in _UPSTREAMS.items():
        argv = [sys.executable, str(ROOT / "examples" / upstream), "--port", str(port)]
        await own.start(on_gateway, f"{Path(upstream).stem}-{region}", argv, (port, "/healthz"))
    mounts = {CERTIFICATES: folder / "etc/certs/envoy-rate-limit"}
    argv = [program, "server", f"--config-path={folder}/envoy-gateway.yaml"]
    await own.start(on_gateway, f"envoy-gateway-{region}", argv, PROBE, hosts=hosts, mounts=mounts)
    argv = [sys.executable, "-m", "ratelimit_sidecar", "serve", f"--config={folder}/sidecar.yaml"]
    await own.start(on_sidecar, f"sidecar-{region}", argv, (_CONSOLE, "/healthz"), hosts=hosts)
    return gateway


def _admin_port(folder: Path) -> int:
    (file,) = folder.glob("var/run/*/admin-address.txt")
    return int(file.read_text().rpartition(":")[2])


def _set_up(folder: Path) -> str:
    """Certificates, Envoy, and Envoy Gateway's configuration; gives the program."""
    program = str(tools.path("envoy-gateway"))
    (folder / "etc/resources").mkdir(parents=True)
    envoy = folder / f"var/data/envoy-versions/{_ENVOY_VERSION}/bin/envoy"
    envoy.parent.mkdir(parents=True)
    envoy.symlink_to(find_envoy())
    subprocess.run([program, "certgen", "--local", f"--config-home={folder}/etc"], check=True, capture_output=True)
    # On a busy machine a sidecar may take longer than the time-out there.
    text = (STANDALONE / "envoy-gateway.yaml").read_text().replace("timeout: 5s", "timeout: 30s")
    (folder / "envoy-gateway.yaml").write_text(with_folders(text, folder))
    return program


def with_folders(text: str, folder: Path) -> str:
    replaced = {
        "/etc/ratelimit-sidecar/mesh": f"{folder}/mesh",
        "/etc/envoy-gateway": f"{folder}/etc",
        "/var/lib/envoy-gateway": f"{folder}/var",
    }
    for there, here in replaced.items():
        text = text.replace(there, here)
    return text
