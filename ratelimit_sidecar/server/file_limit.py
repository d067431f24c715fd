"""How many file descriptors the process may have, and who gets them.

Every connection takes one. The bounds on connections lie below the limit, so that some are left for files, for the
console and for the streams that this node dials, whatever clients do.
"""

from __future__ import annotations

import resource
from dataclasses import dataclass

RESERVED = 640
"""For 256 dialled peers, 128 connections each of the console and of ext_authz over HTTP, and the process itself, which
has some 30."""


@dataclass(frozen=True, slots=True)
class Descriptors:
    """What each gets.

    Args:
        clients: connections of Envoys and other clients.
        mesh: connections that peers dial.
    """

    clients: int
    mesh: int

    @property
    def total(self) -> int:
        return self.clients + self.mesh + RESERVED


def allot(wanted: Descriptors) -> Descriptors:
    """Raise the process's soft limit to what is wanted, or as near as the hard limit lets, and share out what there is.

    Of less than is wanted, half at most is reserved.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted.total:
        soft = wanted.total if hard == resource.RLIM_INFINITY else min(wanted.total, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= wanted.total:
        return wanted
    left = max(soft - RESERVED, soft // 2)
    clients = left * wanted.clients // (wanted.clients + wanted.mesh)
    return Descriptors(clients, left - clients)
