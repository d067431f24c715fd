"""Which addresses a node dials: those it is configured with, and those that the configured names resolve to.

Theory of operation. A configured peer is an IP address, which is one *target* for ever, or a *name*, which is resolved
again and again and has a target for each of its addresses (a headless service of Kubernetes has one for each pod). Two
names with an address in common share its target. A target that no name has any more is kept for a grace time and while
its stream lives, as DNS servers leave out what is there; a name that cannot be resolved keeps all it had.

Everything that affects a target lives here. Instants are microseconds of this node's clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address

from ratelimit_sidecar.replication.stream import Stream

GRACE_US = 30_000_000
"""What an address that its name has lost gets to come back."""

MAX_ADDRESSES = 256
"""Of one name that are dialled: as many as there can be peers (`replicator.MAX_PEERS`)."""


@dataclass(slots=True, eq=False)
class Target:
    """An address to dial, `host:port`."""

    address: str
    node: str = ""
    """Whom it led to last."""
    is_self: bool = False
    has_failed: bool = False
    """True when at least one dial has shown that nobody can be reached there, or nobody who would talk."""
    last_error: str = ""
    protocol_errors: Counter[str] = field(default_factory=Counter)
    stream: Stream | None = None
    """While one is carried."""
    gone_us: int | None = None
    """Since when no name has the address; None while one has, and for what is configured as an IP address."""
    is_misconfigured: bool = False
    """True when its last dial showed what only people can mend: an id that two nodes have, a certificate for another
    node."""
    is_mute: bool = False
    """True when its last dial got no answer in time."""

    @property
    def family(self) -> int:
        """4 or 6, of an IP address; 0 of a name."""
        host = host_of(self.address)
        return ip_address(host.partition("%")[0]).version if _is_ip(host) else 0

    @property
    def is_joined(self) -> bool:
        """True while its stream's peer has said who it is and was accepted."""
        return self.stream is not None and self.stream.peer is not None


@dataclass(slots=True, eq=False)
class Name:
    """A configured peer that is no IP address.

    Args:
        configured: `host:port`.
    """

    configured: str
    addresses: tuple[str, ...] = ()
    """What it resolved to last, as `ip:port`."""
    is_settled: bool = False
    """True once it was resolved or could not be."""
    error: str = ""
    """Why it cannot be resolved now; "" when it can, or that was not tried yet."""


class Targets:
    """All addresses of a node's peers, and the names that they come from.

    Args:
        peers: `host:port`, as configured; any may stand there twice.
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
        """Note what a name has been resolved to.

        Args:
            addresses: `ip:port`; at least one.

        Returns:
            Targets that are new.
        """
        name.addresses = tuple(sorted(set(addresses))[:MAX_ADDRESSES])
        name.is_settled, name.error = True, ""
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
        """Those whose grace has ended and that have no stream; they are targets no longer."""
        retired = [
            target
            for target in self
            if target.gone_us is not None and now_us - target.gone_us >= GRACE_US and not target.is_joined
        ]
        for target in retired:
            del self._targets[target.address]
        return retired

    def leads_to(self, node: str) -> bool:
        """Whether any target led to that node last."""
        return any(target.node == node for target in self)

    def is_reached_otherwise(self, target: Target) -> bool:
        """Whether another target's stream is to the node that this one led to last."""
        return bool(target.node) and any(
            other.is_joined and other.node == target.node for other in self if other is not target
        )

    def unreached(self) -> list[Target]:
        """Those that have led to nobody yet, and should have: of a name with addresses of both IPv4 and IPv6, one
        family will often not be listened on."""
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
    """Of `host:port`, or `[ipv6]:port`, with or without the scheme that gRPC puts before it."""
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
