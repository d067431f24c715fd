"""What the names of peers resolve to, asked of the system: its hosts file, its DNS, whatever else it is set up with."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Thread
from typing import Any


async def system_addresses(host: str, port: int) -> Sequence[str]:
    """The IP addresses of a host.

    How long that may take is set where the system's resolver is (resolv.conf(5): `timeout`, `attempts`).

    Raises:
        OSError: it has none, or nobody can tell.
        UnicodeError: no host can have such a name.
    """
    found: Future[list[tuple[Any, ...]]] = Future()
    # From now on it can't be cancelled: the thread ends when the system has answered, whoever still waits.
    found.set_running_or_notify_cancel()
    # Neither the loop's threads nor uvloop's: the process ends only after those have, which is a minute for a name with
    # some search domains while the name servers are silent; and there are few of them, for files to be read too.
    Thread(target=_resolve, args=(host, port, found), name=f"resolve {host}", daemon=True).start()
    return [str(sockaddr[0]) for *_, sockaddr in await asyncio.wrap_future(found)]


def _resolve(host: str, port: int, found: Future[list[tuple[Any, ...]]]) -> None:
    try:
        found.set_result(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    except (OSError, UnicodeError) as error:
        found.set_exception(error)


@dataclass(frozen=True, slots=True)
class Resolver:
    """Args:
    addresses: as `system_addresses`.
    every_seconds: how often each name is resolved, give or take a fifth.
    """

    addresses: Callable[[str, int], Awaitable[Sequence[str]]] = system_addresses
    every_seconds: float = 5.0
