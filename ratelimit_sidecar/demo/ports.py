"""Which TCP ports of 127.0.0.1 a set of regions uses, and who holds one that is taken."""

from __future__ import annotations

import fcntl
import os
import random
import socket
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import BinaryIO

from ratelimit_sidecar.demo import DemoError

HOST = "127.0.0.1"

_FREE_RANGE = range(15_000, 32_000)
"""Below the range (32768 up, on Linux) from which outgoing connections get their ports."""


class PortTaken(DemoError):
    """Its text names the port and, where it can be found out, the process that holds it."""


@dataclass(frozen=True, slots=True)
class RegionPorts:
    """The ports of one region's Envoy and sidecar."""

    envoy: int
    """Where callers go."""
    envoy_admin: int
    """Envoy's admin page."""
    grpc: int
    """Where Envoy asks the sidecar."""
    admin: int
    """The sidecar's metrics and readiness."""
    sync: int
    """Where the other sidecars connect."""


@dataclass(frozen=True, slots=True)
class Ports:
    """The ports of all regions, and of the upstream that they share."""

    upstream: int
    regions: tuple[RegionPorts, ...]

    def all(self) -> list[int]:
        kinds = fields(RegionPorts)
        return [self.upstream, *(getattr(region, kind.name) for region in self.regions for kind in kinds)]


def ports_from(base: int, regions: int) -> Ports:
    """Envoys at base + 1, 2, ...; their admin pages at + 11, ...; the sidecars at + 21 (gRPC), + 31 (admin) and + 41
    (sync); the upstream at base + 50.
    """
    return Ports(
        upstream=base + 50,
        regions=tuple(
            RegionPorts(*(base + tens + number for tens in (0, 10, 20, 30, 40))) for number in range(1, regions + 1)
        ),
    )


def free_ports(regions: int) -> Ports:
    """Ports nobody listens on, for tests that run beside each other: none is given twice while the process that got it
    lives, also before anybody listens there.
    """
    kinds = len(fields(RegionPorts))
    found: list[int] = []
    candidates = random.sample(_FREE_RANGE, len(_FREE_RANGE))
    while len(found) < 1 + regions * kinds:
        port = candidates.pop()
        if _claim(port) and _is_free(port):
            found.append(port)
    upstream, *rest = found
    return Ports(upstream, tuple(RegionPorts(*rest[at : at + kinds]) for at in range(0, len(rest), kinds)))


_claimed: set[int] = set()
"""By this process, which its own locks do not stop."""


def _claim(port: int) -> bool:
    if port in _claimed:
        return False
    try:
        fcntl.lockf(_claims(), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, port)
    except OSError:
        return False
    _claimed.add(port)
    return True


@cache
def _claims() -> BinaryIO:
    """A file with a byte for each port: who has locked it has claimed that port, until its process ends."""
    return Path(tempfile.gettempdir(), f"ratelimit-sidecar-ports-{os.getuid()}").open("ab")


def ensure_free(ports: Iterable[int]) -> None:
    """Check that nobody listens on these ports.

    Raises:
        PortTaken: somebody listens on one of them.
    """
    for port in ports:
        if not _is_free(port):
            raise PortTaken(f"port {port} is taken by {_holder(port) or 'another process'}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As the servers do: connections of an earlier run in TIME_WAIT are no obstacle.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def _holder(port: int) -> str | None:
    """`name (pid N)` of the process that listens on a port, as far as Linux's /proc shows it to this user."""
    sockets = {f"socket:[{inode}]" for inode in _listening_inodes(port)}
    for process in Path("/proc").glob("[0-9]*"):
        # A process may end while it is looked at, or belong to somebody else.
        with suppress(OSError):
            if any(str(handle.readlink()) in sockets for handle in (process / "fd").iterdir()):
                return f"{(process / 'comm').read_text().strip()} (pid {process.name})"
    return None


def _listening_inodes(port: int) -> Sequence[str]:
    inodes = []
    for table in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in Path("/proc/net", table).read_text().splitlines()[1:]:
                # proc(5): local address as hex:hex, state 0A is LISTEN, the tenth column is the inode.
                columns = line.split()
                if columns[3] == "0A" and int(columns[1].rpartition(":")[2], 16) == port:
                    inodes.append(columns[9])
    return inodes
