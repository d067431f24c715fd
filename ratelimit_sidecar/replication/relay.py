"""Relaying: when two nodes have lost their stream, a third that reaches both sends each the other's changes.

Nodes tell each other to whom they have a stream (`Status.reaches`). It counts if both ends say so; of an end that has
told this node nothing, the other's word does. Of the nodes that reach both, the one with the lowest id relays. If none
reaches both, every node relays what is new to it. Only what is new is relayed, and nothing is new twice, so it cannot
go round in circles.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Final

from ratelimit_sidecar.replication.peer import Peer

WALK_BACK_US: Final = 10_000_000
"""When a node begins to relay to a peer, it first sends it what was written in this time, twice the silence after which
two nodes notice that they have lost each other."""

TOPOLOGY_CHECK_US: Final = 500_000
"""Interval of topology checks. A peer is sent what it missed only when a stream was missing in two checks, because what
nodes say lags behind while they start."""

MAX_ORIGINS: Final = 1_024
"""The most origins that are relayed. A peer can name any node."""


class Relay:
    """What one node relays: call `look_steps` when the topology has changed, and ask `to_be_told` for each change."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._topology = _Topology((), {}, 1)
        self._of_origin: dict[str, list[Peer]] = {}
        """By origin, the peers that this node passes its takes on to."""
        self._missed: dict[str, set[str]] = {}
        """By peer, the origins that this node passes on to it."""
        self._lasting: dict[str, set[str]] = {}
        """Those of `_missed` that were there in two checks. The peer has been sent what it had missed of them."""
        self.is_needed = False
        """False when all peers reach each other."""

    def look_steps(self, peers: Mapping[str, Peer]) -> Generator[None, None, list[Peer]]:
        """Find out who reaches whom now, in steps.

        Returns:
            Peers that must be told what they have missed of origins that this node now passes on to them.
        """
        connected = tuple(peer for peer in peers.values() if peer.streams)
        nodes = {peer.node for peer in connected}
        said = {peer.node: peer.reported.reaches for peer in connected}
        bits = {node: 1 << number for number, node in enumerate(sorted(nodes | {self._node}))}
        reached_by = Counter(dict.fromkeys(nodes, bits[self._node]))
        is_needed = False
        for peer in connected:
            reaches = peer.reported.reaches
            for node in reaches or ():
                # Who only says that it reaches another one keeps nobody from relaying to it.
                other_end = said.get(node)
                if other_end is None or peer.node in other_end:
                    reached_by[node] |= bits[peer.node]
            is_needed |= reaches is not None and not nodes <= reaches | {peer.node}
            yield
        now = _Topology(connected, reached_by, bits[self._node])
        origins = sorted(reached_by.keys() - {self._node})[:MAX_ORIGINS] if is_needed else []
        of_origin: dict[str, list[Peer]] = {}
        missed: dict[str, set[str]] = {node: set() for node in nodes} if is_needed else {}
        for origin in origins:
            of_origin[origin] = now.to_be_told(origin)
            for peer in of_origin[origin]:
                missed[peer.node].add(origin)
            yield
        before, sent = self._missed, self._lasting
        self._topology, self._of_origin, self._missed, self.is_needed = now, of_origin, missed, is_needed
        self._lasting = {node: origins & before.get(node, set()) for node, origins in missed.items()}
        return [peer for peer in connected if self._lasting.get(peer.node, set()) - sent.get(peer.node, set())]

    @property
    def is_to_look_again(self) -> bool:
        """True when there is a gap that may not last."""
        return self._missed != self._lasting

    def to_be_told(self, origin: str) -> Iterable[Peer]:
        """The peers to whom this node passes on what `origin` takes."""
        found = self._of_origin.get(origin)
        # A node that nobody reaches has ended, and what was received of it is news to all who lack it.
        return found if found is not None else self._topology.to_be_told(origin)


class _Topology:
    """Who has a stream to whom, as of one check.

    Args:
        peers: those that are connected.
        reached_by: by node, who has a stream to it: a bit for each node, the lowest for the lowest id.
        own_bit: this node's.
    """

    def __init__(self, peers: Sequence[Peer], reached_by: Mapping[str, int], own_bit: int) -> None:
        self._peers = peers
        self._reached_by = reached_by
        self._own_bit = own_bit

    def to_be_told(self, origin: str) -> list[Peer]:
        """The peers to whom the node with `own_bit` passes on what `origin` takes."""
        reach_origin = self._reached_by.get(origin, 0)
        return [peer for peer in self._peers if self._must_tell(peer, origin, reach_origin)]

    def _must_tell(self, peer: Peer, origin: str, reach_origin: int) -> bool:
        if peer.reported.reaches is None or origin == peer.node or origin in peer.reported.reaches:
            return False
        reach_both = self._reached_by.get(peer.node, 0) & reach_origin
        return not reach_both or reach_both & -reach_both == self._own_bit
