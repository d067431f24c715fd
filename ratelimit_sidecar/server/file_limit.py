"""The limit on file descriptors, and its division among the parts of the process.

Every connection takes one. The bounds on connections are below the limit, so that clients cannot use up the descriptors
for files, the console and the streams that this node dials.
"""

from __future__ import annotations

import resource
from dataclasses import dataclass

RESERVED = 512
"""Reserved for 256 dialled peers, 128 connections of the console, and about 30 of the process itself."""


@dataclass(frozen=True, slots=True)
class FileLimits:
    """The file descriptors for each kind of connection.

    Args:
        clients: connections of Envoys and other clients.
        mesh: connections that peers dial.
        proxies: connections to ext_authz over HTTP.
    """

    clients: int
    mesh: int
    proxies: int = 0

    @property
    def total(self) -> int:
        return self.clients + self.mesh + self.proxies + RESERVED


def raise_file_limit(wanted: FileLimits) -> FileLimits:
    """Raise the process's soft limit to what is wanted, or as far as the hard limit allows, and divide it.

    If there are fewer descriptors than wanted, the reserve is at most half of them.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted.total:
        soft = wanted.total if hard == resource.RLIM_INFINITY else min(wanted.total, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= wanted.total:
        return wanted
    left = max(soft - RESERVED, soft // 2)
    share = wanted.total - RESERVED
    clients, proxies = left * wanted.clients // share, left * wanted.proxies // share
    return FileLimits(clients, left - clients - proxies, proxies)
