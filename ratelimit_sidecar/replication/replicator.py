"""One node's side of the mesh: its peers, and the streams to them. Sans-I/O: bytes and instants in, bytes out.

Theory of operation. A *peer* is another node, by its id, whatever the streams to it; a *stream* is a session over one
connection, of which two nodes may have two, as each may dial the other. Both carry deltas inwards, but outwards one of
them is in use, the first established; when it is lost the next takes over, from the full state on. (Moving to a better
one would cost a full state and gain nothing: any live stream is as good.) The stream in use also carries what this node
has to say as a borrower; a loan is granted on the stream on which it was asked for.

Everything that affects a peer lives here: who it is (its incarnation), which stream is in use, what it has yet to hear.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.ledger import Wishes
from ratelimit_sidecar.crdt.shares import Shown
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.replication.deltas import apply_deltas
from ratelimit_sidecar.replication.lending import Lending
from ratelimit_sidecar.replication.loans import LoanOutbox
from ratelimit_sidecar.replication.outbox import Batch, Outbox
from ratelimit_sidecar.replication.session import (
    ClockMeasured,
    DeltasAcknowledged,
    DeltasReceived,
    Established,
    Event,
    LoansReceived,
    Local,
    PeerLeft,
    Session,
)
from ratelimit_sidecar.replication.status import PeerStatus
from ratelimit_sidecar.replication.v1 import replication_pb2 as pb
from ratelimit_sidecar.replication.wire import FAULTLESS, ProtocolError, Reason

MAX_PEERS = 256
"""A full mesh is for tens of sidecars; more nodes than this are a mistake, or an attack on the memory."""

RESTART_US = 2_000_000
"""A node heard from within two pings is alive: another life of it is then another process with the same id."""

FORGET_US = 600_000_000
"""A peer that only dials in, and has not for so long, is not coming back: it was replaced under another name."""


class BatchSpan(Protocol):
    """A trace span that is open while a batch is on its way."""

    def end(self) -> None: ...


class BatchTracer(Protocol):
    """Links batches to the sampled requests in them."""

    def batch_span(self, peer_node: str, bucket_keys: Sequence[bytes], /) -> BatchSpan | None:
        """The span of a batch sent now; None when no sampled request is in it."""


class Peer:
    """Another node. Of its streams `streams[0]`, when there is one, carries this node's deltas, asks and returns."""

    def __init__(self, store: Store, node: str, undelivered_since_us: int | None) -> None:
        self.node = node
        self.region = ""
        self.address = ""
        self.incarnation = 0
        self.is_configured = False
        """True once a configured address has led to it."""
        self.streams: list[Stream] = []
        self.outbox = Outbox(store, undelivered_since_us)
        self.full_state_heard = False
        """True when it has told everything it knew when its stream began."""
        self.clock_offset_us: int | None = None
        self.is_skewed = False
        """True when the clock offset has been warned about."""
        self.last_error = ""
        self.lost_us = 0
        self._spans: deque[BatchSpan | None] = deque()
        self.batches_sent = self.batches_received = 0
        self.entries_sent = self.entries_received = 0
        self.connections = 0
        self.protocol_errors: Counter[str] = Counter()

    @property
    def lends(self) -> bool:
        """True while it can be asked for loans."""
        return bool(self.streams) and self.streams[0].lends

    def sent(self, batch: Batch, tracer: BatchTracer | None) -> None:
        """A batch of its outbox is on its way."""
        self.batches_sent += 1
        self.entries_sent += batch.entries
        self._spans.append(None if tracer is None else tracer.batch_span(self.node, batch.bucket_keys))

    def acknowledged(self, now_us: int) -> None:
        """It has applied the oldest batch on its way."""
        self.outbox.acknowledged(now_us)
        self._end_span()

    def end_spans(self) -> None:
        """Whatever was on its way is given up."""
        while self._spans:
            self._end_span()

    def _end_span(self) -> None:
        span = self._spans.popleft()
        if span is not None:
            span.end()

    def status(self, now_us: int) -> PeerStatus:
        return PeerStatus(
            node=self.node,
            region=self.region,
            address=self.address,
            connected=bool(self.streams),
            lag_seconds=self.outbox.lag_us(now_us) / 1e6,
            pending_buckets=self.outbox.pending_buckets,
            batches_sent=self.batches_sent,
            batches_received=self.batches_received,
            entries_sent=self.entries_sent,
            entries_received=self.entries_received,
            reconnects=max(0, self.connections - 1),
            clock_offset_seconds=None if self.clock_offset_us is None else self.clock_offset_us / 1e6,
            last_error=self.last_error,
            protocol_errors=dict(self.protocol_errors),
        )


class Replicator:
    """All peers of one node.

    Args:
        now_us: the start of the process, or near it.
        tracer: None when nothing is traced.
        lending: None on a node without strict limits; otherwise `local` shows its membership.
    """

    def __init__(
        self,
        local: Local,
        store: Store,
        now_us: int,
        tracer: BatchTracer | None = None,
        lending: Lending | None = None,
    ) -> None:
        self.local = local
        self.store = store
        self.tracer = tracer
        self.lending = lending
        self.peers: dict[str, Peer] = {}
        self.protocol_errors: Counter[str] = Counter()
        """Streams closed by this node, by reason, including those that never said whose they were."""
        self.unknown_keys = 0
        """Buckets that peers told of and no replicated rule here knows."""
        self.first_change_us: int | None = None
        """When this node first took anything: whoever was never reached misses everything since."""
        self._flushed_us = now_us

    def flush(self, now_us: int) -> None:
        """Move own changes from the store's journal, and what the ledger has to say, to what the peers have yet to
        hear; every few milliseconds."""
        changes = self.store.drain_changes()
        # Nobody has noted when each change was made, only that it was not before the last flush.
        created_us, self._flushed_us = self._flushed_us, now_us
        if changes and self.first_change_us is None:
            self.first_change_us = created_us
        for peer in self.peers.values():
            if changes:
                for bucket, slots in changes:
                    peer.outbox.note(bucket, slots, created_us)
                if peer.streams:
                    peer.streams[0].wake()
        if self.lending is not None:
            self._borrow(self.lending)
        self.forget_peers(now_us - FORGET_US)

    def forget_peers(self, lost_before_us: int) -> None:
        """Forget the peers that only ever dialled in and were lost by then."""
        gone = [
            peer.node
            for peer in self.peers.values()
            if not peer.streams and not peer.is_configured and peer.lost_us <= lost_before_us
        ]
        for node in gone:
            del self.peers[node]
            if self.lending is not None:
                self.lending.forget(node)

    def is_settled(self) -> bool:
        """True when every connected peer has acknowledged everything."""
        return all(peer.outbox.is_settled for peer in self.peers.values() if peer.streams)

    def streams(self) -> Iterator[Stream]:
        """Every established stream."""
        for peer in self.peers.values():
            yield from peer.streams

    def _borrow(self, lending: Lending) -> None:
        lenders = {peer.node: peer.streams[0] for peer in self.peers.values() if peer.lends}
        for node, wishes in lending.tick(lenders).items():
            # A return to a peer out of reach need not arrive: its loan ends by itself.
            if node in lenders:
                lenders[node].tell(wishes)


class Stream:
    """A session over one connection, from the moment the connection is there.

    Args:
        address: of the far end.
        is_dialled: True when this node has dialled a configured address.
        wake: called when `next_frame` may have something new.
    """

    def __init__(
        self, replicator: Replicator, address: str, *, is_dialled: bool, wake: Callable[[], None], now_us: int
    ) -> None:
        self._replicator = replicator
        self._session = Session(replicator.local, now_us)
        self._loans = LoanOutbox()
        self.address = address
        self.is_dialled = is_dialled
        self.wake = wake
        self.peer: Peer | None = None
        """Whose stream it is: from the peer's Hello until the stream is closing."""
        self.has_joined = False
        """True from the peer's Hello on, if it was accepted."""
        self.error: ProtocolError | None = None
        """What this node closes the stream for."""
        self.why_ended = ""
        """Set when the stream is closing or over, by whichever end."""

    @property
    def is_over(self) -> bool:
        """True when there is nothing more to send or to hear: the connection should be closed."""
        return self._session.is_over

    @property
    def lends(self) -> bool:
        """True when loans can be asked for and granted on it."""
        return self._session.lends

    @property
    def heard_us(self) -> int:
        """When the last frame arrived."""
        return self._session.heard_us

    def receive(self, raw: bytes, now_us: int) -> None:
        """Take one frame in and apply it. A bad one leaves the stream closing, with `error` set."""
        try:
            event = self._session.receive(raw, now_us)
            if event is not None:
                self._handle(event, now_us)
        except ProtocolError as error:
            self.fail(error, now_us)
        self.wake()

    def check_time(self, now_us: int) -> None:
        """To be called a few times a second: pings, and notices a dead peer, which leaves the stream closing."""
        try:
            self._session.check_time(now_us)
        except ProtocolError as error:
            self.fail(error, now_us)
        self.wake()

    def next_frame(self, now_us: int) -> bytes | None:
        """The next frame to be sent now; None when there is none before the next `wake`."""
        raw = self._session.next_frame(now_us)
        peer = self.peer
        if raw is not None or peer is None:
            return raw
        loans = self._loans.take_frame()
        if loans is not None:
            return self._session.send_loans(loans)
        if peer.streams[0] is not self:
            return None
        batch = peer.outbox.take_batch(now_us)
        if batch is None:
            return None
        peer.sent(batch, self._replicator.tracer)
        return self._session.send_deltas(batch.frame, now_us)

    def tell(self, wishes: Wishes) -> None:
        """Send the peer what the ledger has to say to it."""
        self._loans.add(wishes)
        self.wake()

    def fail(self, error: ProtocolError, now_us: int) -> None:
        """Close the stream for `error`, which is counted."""
        self.error = error
        self._session.close(error.reason, error.detail)
        if error.reason not in FAULTLESS:
            self._replicator.protocol_errors[error.reason] += 1
            if self.peer is not None:
                self.peer.protocol_errors[error.reason] += 1
        self._leave(str(error), now_us)
        self.wake()

    def close(self, reason: Reason, detail: str, now_us: int) -> None:
        """Say Goodbye; from now on nothing is sent but that, and nothing heard."""
        self._session.close(reason, detail)
        self._leave(f"{reason}: {detail}", now_us)
        self.wake()

    def lost(self, why: str, now_us: int) -> None:
        """The connection is gone. To be called once for every stream, however it ended."""
        self._session.lost()
        self._leave(why, now_us)
        self.wake()

    def _handle(self, event: Event, now_us: int) -> None:
        match event:
            case Established(origin, region, _, membership):
                self._join(self._find_peer(origin, now_us), origin, region, membership)
            case PeerLeft(reason, detail):
                self._leave(f"the peer closed the stream: {reason}: {detail}", now_us)
            case DeltasReceived(deltas):
                self._apply(deltas, now_us)
            case DeltasAcknowledged(frames):
                assert self.peer is not None
                for _ in range(frames):
                    self.peer.acknowledged(now_us)
            case LoansReceived(loans):
                self._lend(loans)
            case ClockMeasured(offset_us):
                assert self.peer is not None
                self.peer.clock_offset_us = offset_us

    def _apply(self, deltas: pb.Deltas, now_us: int) -> None:
        peer, sender = self.peer, self._session.peer
        assert peer is not None
        assert sender is not None
        applied = apply_deltas(self._replicator.store, deltas, sender, now_us)
        self._replicator.unknown_keys += applied.unknown_keys
        peer.batches_received += 1
        peer.entries_received += applied.entries
        if deltas.ends_full_state:
            peer.full_state_heard = True

    def _lend(self, loans: pb.Loans) -> None:
        replicator = self._replicator
        assert self.peer is not None
        assert replicator.lending is not None
        replicator.unknown_keys += replicator.lending.receive(self.peer.node, loans, self._loans)

    def _find_peer(self, origin: Origin, now_us: int) -> Peer:
        replicator = self._replicator
        own = replicator.local.origin
        if origin == own:
            raise ProtocolError(Reason.SELF, f"{self.address} leads back to this process")
        if origin.node == own.node:
            raise _duplicate_node(origin.node)
        peer = replicator.peers.get(origin.node)
        if peer is None:
            if len(replicator.peers) >= MAX_PEERS:
                replicator.forget_peers(now_us)
            if len(replicator.peers) >= MAX_PEERS:
                raise ProtocolError(Reason.TOO_MANY_PEERS, f"{MAX_PEERS} peers are known already")
            # A node that this one was not told of misses nothing before it comes.
            since_us = replicator.first_change_us if self.is_dialled else None
            peer = replicator.peers[origin.node] = Peer(replicator.store, origin.node, since_us)
        elif peer.streams and peer.incarnation != origin.incarnation:
            if now_us - max(stream.heard_us for stream in peer.streams) < RESTART_US:
                raise _duplicate_node(origin.node)
            for stream in list(peer.streams):
                stream.close(Reason.SUPERSEDED, "the node has restarted", now_us)
        return peer

    def _join(self, peer: Peer, origin: Origin, region: str, membership: Shown | None) -> None:
        self.peer = peer
        self.has_joined = True
        peer.incarnation = origin.incarnation
        peer.region = region
        if self.is_dialled or not peer.is_configured:
            peer.address = self.address
        peer.is_configured |= self.is_dialled
        peer.streams.append(self)
        if len(peer.streams) == 1:
            peer.connections += 1
            peer.outbox.open(origin)
        if self._replicator.lending is not None:
            self._replicator.lending.hear(peer.node, membership)

    def _leave(self, why: str, now_us: int) -> None:
        """Stop being the peer's stream; another one of the peer's, if there is one, takes over."""
        self.why_ended = self.why_ended or why
        peer, self.peer = self.peer, None
        if peer is None:
            return
        peer.last_error = why
        was_in_use = peer.streams[0] is self
        peer.streams.remove(self)
        if was_in_use:
            peer.outbox.close()
            peer.end_spans()
            if peer.streams:
                peer.outbox.open(Origin(peer.node, peer.incarnation))
                peer.streams[0].wake()
        if not peer.streams:
            peer.lost_us = now_us
            peer.full_state_heard = False
            peer.clock_offset_us = None
            if self._replicator.lending is not None:
                self._replicator.lending.lost(peer.node)


def _duplicate_node(node: str) -> ProtocolError:
    return ProtocolError(
        Reason.DUPLICATE_NODE, f"two live sidecars have the node id {node!r}: give each a node.id of its own"
    )
