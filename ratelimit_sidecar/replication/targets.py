"""The addresses that a node dials: the configured ones, and those that configured names resolve to.

Theory of operation. A configured peer is either an IP address, which is one *target* for ever, or a *name*. A name is
resolved again and again and has a target for each of its addresses (a headless service of Kubernetes has one for each
pod). Two names with a common address share its target. A target without a name is kept for a grace time and while its
stream lives, since DNS servers leave out existing addresses. A name that cannot be resolved keeps all its addresses.

Everything that affects a target is in this file. Times are microseconds of this node's clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address

from ratelimit_sidecar.mesh_status import PeerStatus
from ratelimit_sidecar.replication.stream import Stream

GRACE_US = 30_000_000
"""How long an address is kept after its name no longer has it."""

MAX_ADDRESSES = 256
"""The most addresses dialled of one name: as many as nodes may dial in (`peers.MAX_PEERS`)."""


@dataclass(slots=True, eq=False)
class Target:
    """An address to dial, `host:port`."""

    address: str
    node: str = ""
    """The node that it last led to; "" for none yet."""
    is_self: bool = False
    has_failed: bool = False
    """True if dials have shown that no peer can be reached there, or none that accepts the stream."""
    first_dialled_us: int | None = None
    """By the clock that never steps; None before."""
    last_error: str = ""
    failed_dials: int = 0
    """See `PeerStatus`."""
    protocol_errors: Counter[str] = field(default_factory=Counter)
    stream: Stream | None = None
    """The current stream; None without one."""
    gone_us: int | None = None
    """Since when no name has the address; None while one has it, and for a configured IP address."""
    is_misconfigured: bool = False
    """True if its last dial showed an error that people have to fix: two nodes with one id, a certificate for another
    node.
    """
    is_mute: bool = False
    """True if its last dial got no answer in time."""

    @property
    def family(self) -> int:
        """4 or 6 for an IP address; 0 for a name."""
        host = host_of(self.address)
        return ip_address(host.partition("%")[0]).version if _is_ip(host) else 0

    @property
    def is_joined(self) -> bool:
        """True while it has a stream whose peer was accepted."""
        return self.stream is not None and self.stream.peer is not None


@dataclass(slots=True, eq=False)
class Name:
    """A configured peer that is a name, not an IP address.

    Args:
        configured: `host:port`.
    """

    configured: str
    addresses: tuple[str, ...] = ()
    """The addresses that it last resolved to, as `ip:port`."""
    is_settled: bool = False
    """True once it was resolved, or has no addresses however often one asks."""
    failed_lookups: int = 0
    """In a row."""
    error: str = ""
    """Why it cannot be resolved now; "" if it can, or was not tried yet."""


class Targets:
    """All addresses of a node's peers, and the names that they come from.

    Args:
        peers: `host:port`, as configured; duplicates are allowed.
    """

    def __init__(self, peers: Sequence[str]) -> None:
        self._targets: dict[str, Target] = {}
        self.names: list[Name] = []
        for peer in dict.fromkeys(peers):
            if _is_ip(host_of(peer)):
                self._targets[peer] = Target(peer)
            else:
                self.names.append(Name(peer))
        self._fixed = frozenset(self._targets)

    def __iter__(self) -> Iterator[Target]:
        return iter(list(self._targets.values()))

    def resolved(self, name: Name, addresses: Iterable[str], now_us: int) -> list[Target]:
        """Note the addresses that a name was resolved to.

        Args:
            addresses: `ip:port`; at least one.

        Returns:
            The new targets.
        """
        name.addresses = tuple(sorted(set(addresses))[:MAX_ADDRESSES])
        name.is_settled, name.failed_lookups, name.error = True, 0, ""
        new = []
        for address in name.addresses:
            if address not in self._targets:
                new.append(self._targets.setdefault(address, Target(address)))
        wanted = self._fixed.union(*(each.addresses for each in self.names))
        for address, target in self._targets.items():
            if address in wanted:
                target.gone_us = None
            elif target.gone_us is None:
                target.gone_us = now_us
        return new

    def take_retired(self, now_us: int) -> list[Target]:
        """Remove and return targets without a stream whose grace time is over."""
        retired = [
            target
            for target in self
            if target.gone_us is not None and now_us - target.gone_us >= GRACE_US and not target.is_joined
        ]
        for target in retired:
            del self._targets[target.address]
        return retired

    def leads_to(self, node: str) -> bool:
        """True if any target last led to that node."""
        return any(target.node == node for target in self)

    def is_reached_otherwise(self, target: Target) -> bool:
        """True if another target has a stream to the node that this one last led to."""
        return bool(target.node) and any(
            other.is_joined and other.node == target.node for other in self if other is not target
        )

    def statuses(self, lag_seconds: float, gateways: Container[str] = ()) -> list[PeerStatus]:
        """The statuses of addresses that have led to nobody yet, and of names that are not resolved.

        Args:
            lag_seconds: of a peer that was never reached.
            gateways: connected nodes that speak for their region. A name that leads to one has addresses of others,
                which do not listen; they are left out.
        """
        led = {target.address for target in self if target.node in gateways}
        spoken_for = {
            address for name in self.names if not led.isdisjoint(name.addresses) for address in name.addresses
        }
        unreached = [
            PeerStatus(
                address=target.address,
                lag_seconds=lag_seconds,
                last_error=target.last_error,
                failed_dials=target.failed_dials,
                protocol_errors=target.protocol_errors,
            )
            for target in self.unreached()
            if target.address not in spoken_for
        ]
        unresolved = [
            PeerStatus(address=name.configured, lag_seconds=lag_seconds, last_error=name.error)
            for name in self.names
            if name.error
        ]
        return unreached + unresolved

    def unreached(self) -> list[Target]:
        """Targets that should have led to a node and have not. If a name has both IPv4 and IPv6 addresses, one family
        may have no listener; then its targets are left out.
        """
        reached = {
            (name.configured, other.family)
            for name in self.names
            for other in self
            if (other.node or other.is_self) and other.address in name.addresses
        }
        return [
            target
            for target in self
            if not target.node
            and not target.is_self
            and not any(
                target.address in name.addresses and (name.configured, 10 - target.family) in reached
                for name in self.names
            )
        ]


def host_of(address: str) -> str:
    """The host of `host:port` or `[ipv6]:port`, with or without gRPC's scheme before it."""
    host = address.rpartition(":")[0]
    for scheme in ("ipv4:", "ipv6:"):
        host = host.removeprefix(scheme)
    # gRPC escapes the brackets.
    return host.replace("%5B", "[").replace("%5D", "]").removeprefix("[").removesuffix("]")


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


def _is_ip(host: str) -> bool:
    try:
        ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True
