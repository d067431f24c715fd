"""Who passes on what to whom, when the way between two nodes is cut.

Nodes tell each other whom they have a stream to. When two of them do not reach each other, the one with the lowest id
among those that reach both passes on to each what the other takes, as it comes; nodes further apart than that are
served by whoever hears something new of them. What is passed on is news, and news only once, so nothing goes round in
circles.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ratelimit_sidecar.replication.peer import Peer

WALK_BACK_US = 10_000_000
"""How far back a node is told what it may have missed when another one begins to pass things on to it: twice the
silence after which the two that are cut off from each other notice."""


class Relay:
    """One node's part in it."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._peers: tuple[Peer, ...] = ()
        """Those that are connected."""
        self._of_origin: dict[str, tuple[Peer, ...]] = {}
        self._missed: dict[str, frozenset[str]] = {}
        """By peer, the origins that this node passes on to it."""
        self.is_needed = False
        """False when all peers reach each other."""

    def update(self, peers: Mapping[str, Peer]) -> list[Peer]:
        """Somebody's streams have changed.

        Returns:
            Peers that must now be told of origins of which this node told them nothing before.
        """
        self._peers = tuple(peer for peer in peers.values() if peer.streams)
        self._of_origin.clear()
        nodes = {peer.node for peer in self._peers}
        self.is_needed = any(peer.reaches is not None and nodes - peer.reaches - {peer.node} for peer in self._peers)
        before, self._missed = self._missed, {}
        late = []
        if self.is_needed:
            known = nodes.union(*(peer.reaches or () for peer in self._peers)) - {self._node}
            for peer in self._peers:
                missed = frozenset(origin for origin in known if self._must_tell(peer, origin))
                self._missed[peer.node] = missed
                if missed - before.get(peer.node, frozenset()):
                    late.append(peer)
        return late

    def to_be_told(self, origin: str) -> Iterable[Peer]:
        """The peers to whom this node passes on what `origin` takes."""
        found = self._of_origin.get(origin)
        if found is None:
            found = tuple(peer for peer in self._peers if self._must_tell(peer, origin))
            self._of_origin[origin] = found
        return found

    def _must_tell(self, peer: Peer, origin: str) -> bool:
        if peer.reaches is None or origin == peer.node or origin in peer.reaches:
            return False
        reach_both = [
            other.node
            for other in self._peers
            if other.reaches is not None and peer.node in other.reaches and origin in other.reaches
        ]
        if any(other.node == origin for other in self._peers):
            reach_both.append(self._node)
        return not reach_both or min(reach_both) == self._node
