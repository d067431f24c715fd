"""What the names of peers resolve to, asked of the system: its hosts file, its DNS, whatever else it is set up with."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from ratelimit_sidecar.threads import in_daemon_thread


async def system_addresses(host: str, port: int) -> Sequence[str]:
    """The IP addresses of a host.

    How long that may take is set where the system's resolver is (resolv.conf(5): `timeout`, `attempts`).

    Raises:
        OSError: it has none, or nobody can tell.
        UnicodeError: no host can have such a name.
        RuntimeError: the system has no more threads.
    """
    # A name with some search domains takes a minute while the name servers are silent.
    found = await in_daemon_thread(f"resolve {host}", lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    return [str(sockaddr[0]) for *_, sockaddr in found]


@dataclass(frozen=True, slots=True)
class Resolver:
    """How names are resolved, and how often.

    Args:
        addresses: as `system_addresses`.
        every_seconds: how often each name is resolved, give or take a fifth.
        first_seconds: the same, until it was resolved once or is known to have no addresses.
    """

    addresses: Callable[[str, int], Awaitable[Sequence[str]]] = system_addresses
    every_seconds: float = 5.0
    first_seconds: float = 0.5
