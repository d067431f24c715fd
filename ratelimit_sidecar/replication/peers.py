"""Which streams lead to which peer, and who may join.

A *peer* is another node, by its id, whatever the streams to it; two nodes may have two, as each may dial the other. The
first established is the *active* one, on which this node sends (`Peer.active`). When it is lost the next takes over,
beginning with a snapshot. (To move to a better one would cost a snapshot and gain nothing: any live stream is as good.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.replication.changes import ChangeLog
from ratelimit_sidecar.replication.payments import PaymentExchange
from ratelimit_sidecar.replication.peer import Peer, PeerStream
from ratelimit_sidecar.replication.session import Established
from ratelimit_sidecar.replication.wire import ProtocolError, Reason

MAX_PEERS: Final = 256
"""The most nodes that only dial in. A full mesh is for tens of sidecars; more nodes are a mistake, or an attack on the
memory. A configured peer always has its place.
"""

MAX_DIALLED_IN: Final = 3
"""Streams of one peer that it has dialled. Two are usual while it comes back by another way than it was lost on."""

RESTART_US: Final = 2_000_000
"""A node that sent a frame within two pings is alive: another life of it is then another process with the same id."""

PEER_FORGOTTEN_US: Final = 600_000_000
"""A peer that only dials in, and has not for so long, is not coming back: it was replaced under another name."""


class PeerRegistry:
    """All peers of a node, and the streams to each. Call `find` and then `join` for a stream, and `leave` at its end.

    Args:
        on_change: called when a first stream to a peer has come, or the last one has gone.
    """

    def __init__(
        self, store: Store, changes: ChangeLog, payments: PaymentExchange | None, on_change: Callable[[], object]
    ) -> None:
        self.by_node: dict[str, Peer] = {}
        self.first_change_us: int | None = None
        """When this node first took anything: whoever was never reached misses everything since."""
        self._store = store
        self._changes = changes
        self._payments = payments
        self._on_change = on_change

    def find(self, stream: PeerStream, own: Origin, origin: Origin, now_us: int) -> Peer:
        """The peer of a new stream, which says that it is `origin`; closes older streams that must make way for it.

        Raises:
            ProtocolError: it is refused.
        """
        if origin == own:
            raise ProtocolError(Reason.SELF, f"{stream.address} leads back to this process")
        if origin.node == own.node:
            raise _duplicate_node(origin.node)
        peer = self.by_node.get(origin.node)
        if peer is None:
            if not stream.is_dialled and not self._has_room(now_us):
                raise ProtocolError(Reason.TOO_MANY_PEERS, f"{MAX_PEERS} peers have dialled in already")
            peer = self.by_node[origin.node] = Peer(self._store, self._changes, origin.node)
        elif peer.streams and peer.incarnation != origin.incarnation:
            self._supersede(peer, stream, now_us)
        elif not stream.is_dialled:
            self._make_way(peer, now_us)
        return peer

    def join(self, stream: PeerStream, peer: Peer, who: Established) -> None:
        """A stream is the peer's from now on."""
        peer.incarnation = who.origin.incarnation
        peer.region = who.region
        peer.version = who.version
        peer.protocol = who.protocol
        peer.is_gateway = who.is_gateway
        if stream.is_dialled or not peer.is_configured:
            peer.address = stream.address
        if stream.is_dialled and not peer.is_configured:
            # One that nobody has configured misses nothing before it comes. One that is may have dialled in first.
            peer.outbox.count_as_undelivered(self.first_change_us)
        peer.is_configured |= stream.is_dialled
        peer.streams.append(stream)
        self._store.journal.peers.add(who.origin)
        self._note_fabric(peer, region_origin(who.region) if who.is_gateway else None)
        if len(peer.streams) == 1:
            peer.connections += 1
            peer.outbox.open(who.origin, compares=stream.compares)
            self._on_change()

    def leave(self, stream: PeerStream, peer: Peer, why: str, now_us: int) -> None:
        """A stream is the peer's no more; another one of the peer's, if there is one, takes over."""
        peer.last_error = why
        was_active = peer.active is stream
        peer.streams.remove(stream)
        if was_active:
            peer.outbox.close(now_us)
            peer.end_spans()
        origin, following = Origin(peer.node, peer.incarnation), peer.active
        if following is None:
            self._store.journal.peers.discard(origin)
            self._note_fabric(peer, None)
            peer.forget_streams(now_us)
            self._on_change()
            return
        if was_active:
            peer.outbox.open(origin, compares=following.compares)
            peer.grant_request(now_us)
            following.wake()
        for other in peer.streams:
            # The newest status may have been on its way on this one, and an older one on the others.
            other.tell_status_again()

    def _note_fabric(self, peer: Peer, origin: Origin | None) -> None:
        """What a gateway tells of its region has room as what it takes itself."""
        former, peer.fabric = peer.fabric, origin
        peers = self._store.journal.peers
        if former is not None and not any(other.fabric == former for other in self.by_node.values()):
            peers.discard(former)
        if origin is not None:
            peers.add(origin)

    def forget(self, lost_before_us: int) -> None:
        """Forget the peers that only ever dialled in and were lost by then."""
        gone = [
            peer.node
            for peer in self.by_node.values()
            if not peer.streams and not peer.is_configured and peer.lost_us <= lost_before_us
        ]
        for node in gone:
            self._forget(node)

    def release(self, node: str) -> None:
        """No configured address leads to that peer any more: without a stream it is forgotten at once."""
        peer = self.by_node.get(node)
        if peer is None:
            return
        peer.is_configured = False
        if not peer.streams:
            self._forget(node)

    def set_clock(self, now_us: int) -> None:
        """The clock was set, and no stream is left."""
        if self.first_change_us is not None:
            self.first_change_us = now_us
        for peer in self.by_node.values():
            peer.outbox.forget_times()
            peer.lost_us = now_us

    def _supersede(self, peer: Peer, stream: PeerStream, now_us: int) -> None:
        """A new stream is of another life of the peer than those it has: make way for it, or refuse it."""
        is_alive = now_us - max(other.received_us for other in peer.streams) < RESTART_US
        if not is_alive:
            reason, detail = Reason.SUPERSEDED, "the node has restarted"
        elif stream.is_dialled and not any(other.is_dialled for other in peer.streams):
            # Whoever came by itself may say that it is anybody.
            reason, detail = Reason.DUPLICATE_NODE, f"the address configured here leads to another {peer.node!r}"
        else:
            raise _duplicate_node(peer.node)
        for other in list(peer.streams):
            other.close(reason, detail, now_us)

    def _make_way(self, peer: Peer, now_us: int) -> None:
        """One more stream that a peer has dialled is coming: each holds the names of thousands of buckets."""
        dialled_in = [stream for stream in peer.streams if not stream.is_dialled]
        if len(dialled_in) >= MAX_DIALLED_IN:
            oldest = min(dialled_in, key=lambda stream: stream.received_us)
            oldest.close(Reason.SUPERSEDED, f"the node has dialled {MAX_DIALLED_IN} further streams", now_us)

    def _has_room(self, now_us: int) -> bool:
        """Whether one more may dial in. Those that have gone make room."""
        if self._dialled_in() >= MAX_PEERS:
            self.forget(now_us)
        return self._dialled_in() < MAX_PEERS

    def _dialled_in(self) -> int:
        return sum(not peer.is_configured for peer in self.by_node.values())

    def _forget(self, node: str) -> None:
        del self.by_node[node]
        if self._payments is not None:
            self._payments.receive_shown(node, None)


def region_origin(region: str) -> Origin:
    """The origin of everything that the sidecars of a region with a fabric took, for other regions."""
    return Origin(f"{region} (fabric)", 1)


def _duplicate_node(node: str) -> ProtocolError:
    return ProtocolError(
        Reason.DUPLICATE_NODE, f"two live sidecars have the node id {node!r}: give each a node.id of its own"
    )
