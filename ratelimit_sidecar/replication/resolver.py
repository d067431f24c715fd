"""What the names of peers resolve to, asked of the system: its hosts file, its DNS, whatever else it is set up with."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass


async def system_addresses(host: str, port: int) -> Sequence[str]:
    """The IP addresses of a host.

    How long that may take is set where the system's resolver is (resolv.conf(5): `timeout`, `attempts`).

    Raises:
        OSError: it has none, or nobody can tell.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(sockaddr[0]) for *_, sockaddr in found]


@dataclass(frozen=True, slots=True)
class Resolver:
    """Args:
    addresses: as `system_addresses`.
    every_seconds: how often each name is resolved, give or take a fifth.
    """

    addresses: Callable[[str, int], Awaitable[Sequence[str]]] = system_addresses
    every_seconds: float = 5.0
