"""One node's side of the mesh: what it does for all its peers together. Sans-I/O: instants in, jobs in steps out.

Theory of operation. Every 20 ms, or sooner, `mesh` calls for a *flush*, which moves what this node took into the change
log (`changes`), from which each peer's outbox sends it. And it calls for a part of a *round*, which sums up what the
node holds, to be compared (`anti_entropy`). Who the peers are, and which stream is active, is in `peers`; what
is said on a stream in `stream`; what peers cannot send each other is *relayed* (`relay`); and which snapshot to ask for
at a start is decided in `sync_requests`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from ratelimit_sidecar.crdt.bucket import Bucket, Entry, Origin
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.replication.bounds import DEFAULT_BOUNDS, MeshBounds
from ratelimit_sidecar.replication.changes import MAX_BATCH_BUCKETS, ChangeLog
from ratelimit_sidecar.replication.deltas import OnNews
from ratelimit_sidecar.replication.demands import QuotaDemands
from ratelimit_sidecar.replication.key_ids import KeyMemory
from ratelimit_sidecar.replication.pace import Steps
from ratelimit_sidecar.replication.payments import PaymentExchange
from ratelimit_sidecar.replication.peer import BatchTracer, Peer, PeerStream
from ratelimit_sidecar.replication.peers import PEER_FORGOTTEN_US, PeerRegistry
from ratelimit_sidecar.replication.relay import TOPOLOGY_CHECK_US, WALK_BACK_US, Relay
from ratelimit_sidecar.replication.rounds import Summing
from ratelimit_sidecar.replication.session import LocalNode
from ratelimit_sidecar.replication.sync_requests import SyncRequests
from ratelimit_sidecar.replication.v1 import replication_pb2 as pb
from ratelimit_sidecar.replication.wire import MAX_MEMBERS

HELD_UP_BUCKETS = 4 * MAX_BATCH_BUCKETS
"""A peer with more changes than this to be sent is sent urgent buckets before their turn."""

URGENT_BUCKETS = 16
"""The most urgent buckets that are sent at the start of a flush; one more is sent in each step. So they are a small
part of what is sent, although each is sent again in its turn."""


class Replicator:
    """What one node does for all its peers together. Call `flush_steps` at each flush, and `compare_steps` every 20
    ms.

    Args:
        now_us: the start of the process, or near it.
        tracer: None when nothing is traced.
        payments: None on a node without strict limits; otherwise `local` shows its membership.
        demands: None on a node that gives no quotas.
    """

    def __init__(
        self,
        local: LocalNode,
        store: Store,
        now_us: int,
        tracer: BatchTracer | None = None,
        payments: PaymentExchange | None = None,
        *,
        demands: QuotaDemands | None = None,
        bounds: MeshBounds = DEFAULT_BOUNDS,
    ) -> None:
        self.local = local
        self.demands = demands
        self.store = store
        self.changes = ChangeLog(store, now_us)
        self.tracer = tracer
        self.payments = payments
        self.peer_registry = PeerRegistry(store, self.changes, payments, self._note_connected)
        self.peers = self.peer_registry.by_node
        """All of them, by node id."""
        self.sync = SyncRequests(self.peers, self.announce)
        self.key_memory = KeyMemory(bounds.key_id_bytes)
        self.protocol_errors: Counter[str] = Counter()
        """Streams closed by this node, by reason, including those that never said whose they were."""
        self.unknown_keys = 0
        """Buckets that peers told of and no replicated rule here knows."""
        self.rules = 0
        """The digest of the rules in force; 0 before the first `use_rules`."""
        self.status_version = 1
        """Counts up whenever what a status says changes."""
        self.relay = Relay(local.origin.node)
        self.on_news: OnNews | None = None
        """Called with what a peer sent that is new here. It must do no I/O."""
        self._topology_changed = False
        self._topology_checked_us = 0
        self._was_full = False
        self.summing = Summing(store, now_us)

    def flush_steps(self, now_us: int) -> Steps:
        """Move this node's changes into the log and wake the streams that send them; then tick the payments, see what
        must be relayed, and forget peers that have gone. In steps, to be called at each flush."""
        changes = self.changes
        end = changes.end
        self._send_urgent(URGENT_BUCKETS)
        for _ in changes.flush_steps(now_us, has_peers=any(peer.streams for peer in self.peers.values())):
            if changes.end > end:
                self._wake_for(end)
                end = changes.end
            yield
            self._send_urgent(1)
        if changes.end > end:
            self._wake_for(end)
        for stream in self.streams():
            if stream.is_ack_due(now_us):
                stream.wake()
        yield from self._tend_steps(now_us)

    def _wake_for(self, first: int) -> None:
        """Wake the streams for further segments of changes, `first` and those after it, and note what peers without a
        stream miss of them."""
        segment = self.changes.get(first)
        created_us = self.changes.created_us if segment is None else segment.created_us
        if self.peer_registry.first_change_us is None:
            self.peer_registry.first_change_us = created_us
        for peer in self.peers.values():
            stream = peer.active
            if stream is None:
                peer.outbox.note_missed_by_peer(created_us)
            elif not stream.is_paused:
                stream.wake()

    def _send_urgent(self, most: int) -> None:
        """Send peers that have much else to be sent some urgent buckets before their turn."""
        journal = self.store.journal
        most = min(most, len(journal.urgent))
        if not most:
            return
        urgent = [journal.urgent.pop() for _ in range(most)]
        unflushed = len(journal.buckets)
        for peer in self.peers.values():
            if peer.outbox.pending_changes + unflushed > HELD_UP_BUCKETS:
                for bucket in urgent:
                    peer.outbox.send_urgent(bucket)
                peer.wake()

    def compare_steps(self, now_us: int) -> Steps:
        """A part of the round in which what the peers hold is compared; every 20 ms, in steps."""
        if not any(stream.compares for stream in self.streams()):
            self.summing.pause()
            return
        while True:
            done = self.summing.do_piece(now_us)
            if done is not None:
                for peer in self.peers.values():
                    if peer.active is not None and peer.is_comparable(self.rules, now_us):
                        peer.active.compare(done)
            if not self.summing.is_amid_tick:
                return
            yield

    def _tend_steps(self, now_us: int) -> Steps:
        """What comes with each flush: tick the payments, see what must be relayed, and forget peers that have gone."""
        if self.payments is not None:
            self._tick_payments(self.payments)
        yield from self._check_topology_steps(now_us)
        is_full = self.store.full_since_us is not None
        if is_full != self._was_full:
            self._was_full = is_full
            self.announce()
        self.peer_registry.forget(now_us - PEER_FORGOTTEN_US)

    def set_clock(self, origin: Origin, now_us: int) -> None:
        """The clock was set. To be called when no stream is left; what the buckets need is `Store.go_back`.

        Args:
            origin: another life of this node when it was set back, the same one when forward.
        """
        assert not any(self.streams())
        self.local = replace(self.local, origin=origin)
        self.changes.set_clock(now_us)
        self._topology_checked_us = now_us
        self.peer_registry.set_clock(now_us)

    def use_rules(self, digest: int) -> None:
        """Other rules are in force, of which peers are told the digest: nodes with other rules are not compared, since
        the same takes amount to something else there. Peers are asked again for what no rule knew before.

        Args:
            digest: of 64 bits, not 0.
        """
        if digest != self.rules:
            self.rules = digest
            for peer in self.peers.values():
                peer.ask_for_unknown()
            self.announce()

    def announce(self) -> None:
        """Tell all peers this node's status."""
        self.status_version += 1
        for stream in self.streams():
            stream.wake()

    def status(self, peer: Peer) -> pb.Status:
        """What this node says of itself to a peer."""
        reached = [other for other in self.peers.values() if other.streams]
        # More are not taken. Those that only dial in are left out first.
        reached.sort(key=lambda other: not other.is_configured)
        return pb.Status(
            reaches=sorted(other.node for other in reached[:MAX_MEMBERS]),
            rules=self.rules,
            full=self.store.full_since_us is not None,
            joined=self.sync.has_joined,
            sync_request=peer.own_request,
            missed_since_us=peer.ask_again_since_us,
        )

    def note_topology_change(self) -> None:
        """A stream of this node or of a peer has come or gone: see whether something must be relayed."""
        self._topology_changed = True

    def _note_connected(self) -> None:
        self.announce()
        self.note_topology_change()

    def _check_topology_steps(self, now_us: int) -> Steps:
        if not self._topology_changed or now_us - self._topology_checked_us < TOPOLOGY_CHECK_US:
            return
        self._topology_checked_us = now_us
        self._topology_changed = False
        late = yield from self.relay.look_steps(self.peers)
        for peer in late:
            if peer.streams:
                peer.outbox.snapshot(now_us - WALK_BACK_US)
                peer.wake()
        self._topology_changed |= self.relay.is_to_look_again

    def pass_on(self, sender: Peer, bucket: Bucket, entries: Sequence[Entry]) -> None:
        """Relay news from a peer to those that have no stream to its origin."""
        for entry in entries:
            for peer in self.relay.to_be_told(entry.origin.node):
                # Who reaches whom was looked at a moment ago.
                if peer is not sender and peer.streams:
                    peer.outbox.relay(bucket, (entry,))
                    peer.wake()

    def tell(self, bucket: Bucket, entries: Sequence[Entry]) -> None:
        """Tell all peers of these entries, which are of an origin that this node alone speaks for."""
        for peer in self.peers.values():
            if peer.streams:
                peer.outbox.relay(bucket, entries)
                peer.wake()

    def news_callback(self, sender: Peer) -> OnNews | None:
        """What to call with news from that peer; None when nobody needs it."""
        if self.on_news is None:
            return partial(self.pass_on, sender) if self.relay.is_needed else None
        return partial(self._note_news, sender, self.on_news)

    def _note_news(self, sender: Peer, on_news: OnNews, bucket: Bucket, entries: Sequence[Entry]) -> None:
        if self.relay.is_needed:
            self.pass_on(sender, bucket, entries)
        on_news(bucket, entries)

    def is_all_acknowledged(self) -> bool:
        """True when every connected peer has acknowledged everything."""
        return all(peer.outbox.is_all_acknowledged for peer in self.peers.values() if peer.streams)

    def streams(self) -> Iterator[PeerStream]:
        """Every established stream."""
        for peer in self.peers.values():
            yield from peer.streams

    def gateways(self) -> dict[str, str]:
        """The regions that connected peers speak for, by the peer's node id."""
        return {peer.node: peer.region for peer in self.peers.values() if peer.streams and peer.is_gateway}

    def _tick_payments(self, payments: PaymentExchange) -> None:
        streams = {
            peer.node: stream
            for peer in self.peers.values()
            if peer.can_pay and (stream := peer.streams[0].stream_payments) is not None
        }
        for node in payments.tick(streams):
            self.peers[node].wake()
