"""Who passes on what to whom, when the way between two nodes is cut.

Nodes tell each other whom they have a stream to. When two of them do not reach each other, the one with the lowest id
among those that reach both passes on to each what the other takes, as it comes; nodes further apart than that are
served by whoever hears something new of them. What is passed on is news, and news only once, so nothing goes round in
circles.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Final

from ratelimit_sidecar.replication.peer import Peer

WALK_BACK_US: Final = 10_000_000
"""How far back a node is told what it may have missed when another one begins to pass things on to it: twice the
silence after which the two that are cut off from each other notice."""

EVERY_US: Final = 500_000
"""Between two looks at who reaches whom, of which a gap has to outlast one: while nodes start, what one has said is
behind what it knows, and there seem to be gaps everywhere."""

MAX_ORIGINS: Final = 1_024
"""That are looked at. A peer can name any."""


class Relay:
    """One node's part in it."""

    def __init__(self, node: str) -> None:
        self._node = node
        self._peers: tuple[Peer, ...] = ()
        """Those that are connected."""
        self._reached_by: Counter[str] = Counter()
        """By node, who has a stream to it: a bit for each node, the lowest for the lowest id."""
        self._own_bit = 1
        self._of_origin: dict[str, list[Peer]] = {}
        self._missed: dict[str, set[str]] = {}
        """By peer, the origins that this node passes on to it."""
        self._lasting: dict[str, set[str]] = {}
        """Of these, the ones since the look before the last, of which the peer has been told what it had missed."""
        self.is_needed = False
        """False when all peers reach each other."""

    def look(self, peers: Mapping[str, Peer]) -> list[Peer]:
        """See who reaches whom now.

        Returns:
            Peers that must be told what they have missed of origins that this node now passes on to them.
        """
        self._peers = tuple(peer for peer in peers.values() if peer.streams)
        nodes = {peer.node for peer in self._peers}
        bits = {node: 1 << number for number, node in enumerate(sorted(nodes | {self._node}))}
        self._own_bit = bits[self._node]
        self._reached_by = Counter(dict.fromkeys(nodes, self._own_bit))
        for peer in self._peers:
            for node in peer.said.reaches or ():
                self._reached_by[node] |= bits[peer.node]
        self._of_origin.clear()
        before, self._missed = self._missed, {}
        told, self._lasting = self._lasting, {}
        self.is_needed = any(
            peer.said.reaches is not None and nodes - peer.said.reaches - {peer.node} for peer in self._peers
        )
        late = []
        if self.is_needed:
            origins = sorted(self._reached_by.keys() - {self._node})[:MAX_ORIGINS]
            self._missed = {node: set() for node in nodes}
            for origin in origins:
                to_be_told = self._of_origin[origin] = [p for p in self._peers if self._must_tell(p, origin)]
                for peer in to_be_told:
                    self._missed[peer.node].add(origin)
            for peer in self._peers:
                lasting = self._missed[peer.node] & before.get(peer.node, set())
                self._lasting[peer.node] = lasting
                if lasting - told.get(peer.node, set()):
                    late.append(peer)
        return late

    @property
    def is_to_look_again(self) -> bool:
        """True when there is a gap that may not last."""
        return self._missed != self._lasting

    def to_be_told(self, origin: str) -> Iterable[Peer]:
        """The peers to whom this node passes on what `origin` takes."""
        found = self._of_origin.get(origin)
        # A node that nobody reaches has ended, and what was heard of it is news to all who have not heard it.
        return found if found is not None else [peer for peer in self._peers if self._must_tell(peer, origin)]

    def _must_tell(self, peer: Peer, origin: str) -> bool:
        if peer.said.reaches is None or origin == peer.node or origin in peer.said.reaches:
            return False
        reach_both = self._reached_by[peer.node] & self._reached_by.get(origin, 0)
        return not reach_both or reach_both & -reach_both == self._own_bit
