"""Envoy Gateway without Kubernetes, with the real Envoy, one gateway a region: two machines each, one for the sidecar.

Their ports are fixed, so each machine is a network namespace; Envoy's, and the sidecar's console, are led to free ports
of this machine. Both run what is in deploy/envoy-gateway, with other folders.
"""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import httpx
import yaml
from certificates import Authority
from chaos.namespaces import Network, network, why_impossible

from deployment import tools
from deployment.cache import Unavailable
from ratelimit_sidecar.demo.links import Link, Way
from ratelimit_sidecar.demo.ports import HOST
from ratelimit_sidecar.demo.processes import Children, Command
from ratelimit_sidecar.demo.regions import find_envoy

ROOT: Final = Path(__file__).parents[2]
DEPLOY: Final = ROOT / "deploy/envoy-gateway"
STANDALONE: Final = DEPLOY / "standalone"

CALLED: Final = "envoy-ratelimit.envoy-gateway-system.svc.cluster.local"
"""By what Envoy Gateway tells Envoy to call its rate limit service."""

ENVOY_CA: Final = Path("/certs")
"""Where Envoy looks for the authority of that service, in `ca.crt`."""

_ENVOY_VERSION: Final = "1.40.0"
_PROXY, _CONSOLE = 8_888, 8_080


@dataclass(frozen=True, slots=True)
class Gateway:
    """Args:
    proxy: of Envoy.
    console: of the sidecar.
    """

    folder: Path
    proxy: httpx.AsyncClient
    console: httpx.AsyncClient

    def write(self, name: str, text: str) -> None:
        """A file of resources, new or changed; at once, as Envoy Gateway watches."""
        new = self.folder / name
        new.write_text(text)
        new.rename(self.folder / "etc/resources" / name)

    def delete(self, name: str) -> None:
        (self.folder / "etc/resources" / name).unlink()


@asynccontextmanager
async def gateways(folder: Path, regions: Sequence[str]) -> AsyncIterator[dict[str, Gateway]]:
    """
    Args:
        folder: an empty one.

    Raises:
        Unavailable: a program is missing, or network namespaces are.
    """
    if (reason := why_impossible()) is not None:
        raise Unavailable(reason)
    tools.path("envoy-gateway")
    machines = [f"{kind}-{number}" for number in range(len(regions)) for kind in ("gateway", "sidecar")]
    authority = Authority()
    async with AsyncExitStack() as stack:
        net = stack.enter_context(network(machines))
        stack.enter_context(_mount_point(ENVOY_CA))
        children = await stack.enter_async_context(Children(folder))
        mesh = {name: net.addresses[f"sidecar-{number}"] for number, name in enumerate(regions)}
        yield {
            name: await _start(stack, net, children, folder / name, name, number, mesh, authority)
            for number, name in enumerate(regions)
        }


async def _start(
    stack: AsyncExitStack,
    net: Network,
    children: Children,
    folder: Path,
    region: str,
    number: int,
    mesh: Mapping[str, str],
    authority: Authority,
) -> Gateway:
    on_gateway, on_sidecar = f"gateway-{number}", f"sidecar-{number}"
    (folder / "etc/resources").mkdir(parents=True)
    program = tools.path("envoy-gateway")
    envoy = folder / f"var/data/envoy-versions/{_ENVOY_VERSION}/bin/envoy"
    envoy.parent.mkdir(parents=True)
    envoy.symlink_to(find_envoy())
    _make_certificates(program, folder)
    names = {"envoy-gateway": net.addresses[on_gateway], CALLED: net.addresses[on_sidecar]}
    names |= {f"{name}.mesh.example.com": address for name, address in mesh.items()}
    hosts = folder / "hosts"
    hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in names.items()))

    authority.write(folder / "mesh", f"{region}.mesh.example.com")
    config = yaml.safe_load(_with_folders((STANDALONE / "sidecar.yaml").read_text(), folder))
    config["node"] = {"id": region, "region": region}
    config["listen"]["admin_shows_values"] = True
    config["sync"]["peers"] = [f"{name}.mesh.example.com:50051" for name in mesh if name != region]
    (folder / "sidecar.yaml").write_text(yaml.safe_dump(config))
    # On a busy machine a sidecar may take longer than the 100 ms there.
    text = (STANDALONE / "envoy-gateway.yaml").read_text().replace("timeout: 100ms", "timeout: 30s")
    (folder / "envoy-gateway.yaml").write_text(_with_folders(text, folder))

    proxy, console = [
        await _published(stack, net, machine, port) for machine, port in ((on_gateway, _PROXY), (on_sidecar, _CONSOLE))
    ]
    gateway = Gateway(folder, proxy, console)
    gateway.write("gateway.yaml", (STANDALONE / "gateway.yaml").read_text())

    def inside(machine: str, name: str, ready: httpx.URL | str, *argv: str) -> Command:
        """With names and certificates of its own, in a mount namespace of its own."""
        mounts = f"mount --bind {hosts} /etc/hosts; mount --bind {folder}/etc/certs/envoy-rate-limit {ENVOY_CA}"
        wrapped = ["unshare", "--mount", "sh", "-ec", f'{mounts}; exec "$@"', "sh", *argv]
        return Command(f"{name}-{region}", net.inside(machine, wrapped), str(ready))

    for port, program_of_upstream in ((8_000, "openclaw/rating_api.py"), (8_001, "llm-tokens/model.py")):
        upstream = await _published(stack, net, on_gateway, port)
        argv = [sys.executable, str(ROOT / "examples" / program_of_upstream), "--port", str(port)]
        name = Path(program_of_upstream).stem
        await children.start(inside(on_gateway, name, upstream.base_url.join("/healthz"), *argv))
    probe = await _published(stack, net, on_gateway, 8_081)
    argv = [str(program), "server", f"--config-path={folder}/envoy-gateway.yaml"]
    await children.start(inside(on_gateway, "envoy-gateway", probe.base_url.join("/readyz"), *argv))
    argv = [sys.executable, "-m", "ratelimit_sidecar", "serve", f"--config={folder}/sidecar.yaml"]
    await children.start(inside(on_sidecar, "sidecar", console.base_url.join("/healthz"), *argv))
    return gateway


def _make_certificates(program: Path, folder: Path) -> None:
    subprocess.run([program, "certgen", "--local", f"--config-home={folder}/etc"], check=True, capture_output=True)


def _with_folders(text: str, folder: Path) -> str:
    replaced = {
        "/etc/ratelimit-sidecar/mesh": f"{folder}/mesh",
        "/etc/envoy-gateway": f"{folder}/etc",
        "/var/lib/envoy-gateway": f"{folder}/var",
    }
    for there, here in replaced.items():
        text = text.replace(there, here)
    return text


async def _published(stack: AsyncExitStack, net: Network, machine: str, port: int) -> httpx.AsyncClient:
    """A client of what listens on that port of the machine's loopback. Each request has a connection of its own: Envoy
    goes on with those it has as its listener was when they came.
    """
    listener = socket.socket()
    listener.bind((HOST, 0))
    here = listener.getsockname()[1]
    await stack.enter_async_context(Link(listener, partial(net.dial, machine, (HOST, port)), Way(), Way()))
    limits = httpx.Limits(max_keepalive_connections=0)
    client = httpx.AsyncClient(base_url=f"http://{HOST}:{here}", trust_env=False, timeout=60, limits=limits)
    return await stack.enter_async_context(client)


@contextmanager
def _mount_point(path: Path) -> Iterator[None]:
    made = not path.exists()
    path.mkdir(exist_ok=True)
    try:
        yield
    finally:
        if made:
            path.rmdir()
