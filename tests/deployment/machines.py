"""Machines for programs whose ports, names and folders are fixed: a network namespace each, and a mount namespace for
each program. What listens there is led to free ports of this machine's loopback.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType

import httpx
from chaos.namespaces import Network, network, why_impossible

from deployment.cache import Unavailable
from ratelimit_sidecar.demo.links import Link, Way
from ratelimit_sidecar.demo.ports import HOST
from ratelimit_sidecar.demo.processes import Child, Children, Command


class Machines:
    """`machines` makes it.

    Args:
        folder: for logs and names.
    """

    def __init__(
        self, folder: Path, stack: AsyncExitStack, mount_points: ExitStack, net: Network, children: Children
    ) -> None:
        self._folder = folder
        self._stack = stack
        self._mount_points = mount_points
        self._net = net
        self._children = children
        self.addresses: Mapping[str, str] = net.addresses

    async def start(
        self,
        machine: str,
        name: str,
        argv: Sequence[str],
        ready: tuple[int, str],
        *,
        hosts: Mapping[str, str] = MappingProxyType({}),
        mounts: Mapping[Path, Path] = MappingProxyType({}),
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> Child:
        """Start a program on a machine, and wait until it answers.

        Args:
            name: of its log.
            ready: the port and path that answer 200 over HTTP.
            hosts: addresses by name.
            mounts: what stands in the place of folders, by these.
        """
        names = self._folder / f"{name}.hosts"
        lines = [f"{HOST} localhost", *(f"{address} {each}" for each, address in hosts.items())]
        names.write_text("".join(f"{line}\n" for line in lines))
        for target in mounts:
            self._make_mount_point(target)
        binds = {Path("/etc/hosts"): names, **mounts}
        mount = "; ".join(f"mount --bind {source} {target}" for target, source in binds.items())
        wrapped = ["unshare", "--mount", "sh", "-ec", f'{mount}; exec "$@"', "sh", *argv]
        port, path = ready
        url = f"http://{HOST}:{await self.published(machine, port)}{path}"
        return await self._children.start(Command(name, self._net.inside(machine, wrapped), url, environment))

    async def published(self, machine: str, port: int) -> int:
        """A port of this machine that leads to one of the other's loopback."""
        listener = socket.socket()
        listener.bind((HOST, 0))
        await self._link(listener, partial(self._net.dial, machine, (HOST, port)))
        here: int = listener.getsockname()[1]
        return here

    async def led_here(self, machine: str, port: int) -> None:
        """What listens on that port of this machine's loopback does so on the other's, too."""
        listener = self._net.socket(machine)
        listener.bind((HOST, port))
        await self._link(listener, partial(_dial, port))

    async def client(self, machine: str, port: int) -> httpx.AsyncClient:
        """Each request has its own connection: Envoy drains those that it has when its listener changes."""
        url = f"http://{HOST}:{await self.published(machine, port)}"
        limits = httpx.Limits(max_keepalive_connections=0)
        client = httpx.AsyncClient(base_url=url, trust_env=False, timeout=60, limits=limits)
        return await self._stack.enter_async_context(client)

    async def _link(self, listener: socket.socket, dial: Callable[[], Awaitable[socket.socket]]) -> None:
        await self._stack.enter_async_context(Link(listener, dial, Way(), Way()))

    def _make_mount_point(self, path: Path) -> None:
        if not path.exists():
            path.mkdir()
            self._mount_points.callback(path.rmdir)


@asynccontextmanager
async def machines(folder: Path, names: Sequence[str]) -> AsyncIterator[Machines]:
    """Network namespaces that stand for machines, for as long as the context lasts.

    Raises:
        Unavailable: no namespaces can be made here.
    """
    if (reason := why_impossible()) is not None:
        raise Unavailable(reason)
    async with AsyncExitStack() as stack:
        net = stack.enter_context(network(names))
        # Left after the processes, which have mounts there.
        mount_points = stack.enter_context(ExitStack())
        children = await stack.enter_async_context(Children(folder))
        yield Machines(folder, stack, mount_points, net, children)


async def _dial(port: int) -> socket.socket:
    dialled = socket.socket()
    dialled.setblocking(False)
    await asyncio.get_running_loop().sock_connect(dialled, (HOST, port))
    return dialled
