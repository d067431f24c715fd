"""Which snapshot a node that has just started asks each of its peers for.

One peer sends it everything, each other one only its own changes of the last seconds. If all sent everything, a node
with ten peers would take ten times as long to start. Whoever dials in can say that it knows everything. So if the one
that was asked first is none of the configured peers, the first of those that has been there is asked, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ratelimit_sidecar.replication.peer import Peer
from ratelimit_sidecar.replication.v1 import replication_pb2 as pb


class SyncRequests:
    """Decides what to ask each peer for. A peer learns it from the status that this node sends it.

    Args:
        announce: sends all peers the status.
    """

    def __init__(self, peers: Mapping[str, Peer], announce: Callable[[], object]) -> None:
        self.has_joined = True
        """False from a start until peers have sent what they know, or nobody waits for that any more."""
        self._peers = peers
        self._announce = announce
        self._source: Peer | None = None
        """The peer that is asked for everything, before `has_joined`."""

    @property
    def is_receiving_all(self) -> bool:
        """True while a peer sends everything."""
        return self._source is not None and not self._source.reported.has_ended_snapshot

    def join(self) -> None:
        """Note that peers have sent what they know, or that nobody waits for it any more."""
        if not self.has_joined:
            self.has_joined = True
            self._announce()

    def decide(self, peer: Peer) -> None:
        """Decide what to ask a peer for that has reported its status. What was once asked for is not taken back."""
        if peer.own_request == pb.UNDECIDED and self.has_joined:
            # A node that has just started knows nothing that is old and that this one does not.
            request = pb.EVERYTHING if peer.reported.has_joined else pb.RECENT
        else:
            if peer.reported.has_joined and not self.has_joined and self._is_better_source(peer):
                self._source = peer
                # Of what it has sent so far the end was that of something else.
                peer.reported.has_ended_snapshot &= peer.own_request == pb.EVERYTHING
            request = pb.EVERYTHING if self._source is peer else max(peer.own_request, pb.RECENT)
        if request != peer.own_request:
            peer.own_request = request
            self._announce()

    def _is_better_source(self, peer: Peer) -> bool:
        return self._source is None or (peer.is_configured and not self._source.is_configured)

    def lose(self, peer: Peer) -> None:
        """The last stream of a peer is ending. If it was to send everything, and has not, another one is asked."""
        if self._source is not peer or self.has_joined or peer.reported.has_ended_snapshot:
            return
        self._source = None
        for other in self._peers.values():
            if other is not peer and other.streams and other.own_request != pb.UNDECIDED:
                self.decide(other)
