"""One stream with a peer: its session (`session`), what frames do at this node, and which are sent. Sans-I/O.

Deltas, demands for quotas and asks go out on a peer's active stream only (`Peer.active`); asks are paid, and digests
answered, on the stream on which they were received.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.journal import Refused
from ratelimit_sidecar.replication.anti_entropy import Exchange
from ratelimit_sidecar.replication.deltas import DeltasReader
from ratelimit_sidecar.replication.pace import Steps
from ratelimit_sidecar.replication.payments import StreamPayments
from ratelimit_sidecar.replication.peer import BatchSpan, Peer
from ratelimit_sidecar.replication.replicator import Replicator
from ratelimit_sidecar.replication.rounds import Round
from ratelimit_sidecar.replication.session import (
    ClockMeasured,
    ComparisonReceived,
    DeltasAcknowledged,
    DeltasReceived,
    Established,
    Event,
    PaymentsReceived,
    PeerLeft,
    QuotaDemandsReceived,
    Session,
    StatusReceived,
)
from ratelimit_sidecar.replication.v1 import replication_pb2 as pb
from ratelimit_sidecar.replication.wire import FAULTLESS, ProtocolError, Reason, read_reaches

SNAPSHOT_PAUSE_US = 2_000
"""The pause after each batch, while a snapshot is not acknowledged."""

PEER_PAUSE_US = 500
"""The pause between two batches to one peer, times the number of peers: a batch costs some 0.1 ms of the loop whatever
is in it, so all together take a fifth of it at most.
"""

LEAST_PEERS_PAUSE_US = 20_000
"""With so few peers that the pause would be shorter than this there is none: a flush comes no more often."""

LongEvent = DeltasReceived | ComparisonReceived | QuotaDemandsReceived
"""An event that may take longer than a step: `Inbound.apply_steps` applies it in several."""


class Inbound:
    """Applies what a peer sends on one stream, from its Hello on, if this node has accepted it.

    Args:
        address: of the far end, without its port.
        is_proven: the peer is known to be the node that it says it is (see `DeltasReader`).
        stream_payments: of the stream.
    """

    def __init__(
        self,
        replicator: Replicator,
        session: Session,
        peer: Peer,
        origin: Origin,
        *,
        address: str,
        is_proven: bool,
        stream_payments: StreamPayments | None,
    ) -> None:
        self.peer = peer
        self._replicator = replicator
        self._session = session
        self._reader = DeltasReader(origin, is_proven=is_proven, key_memory=replicator.key_memory, address=address)
        self._stream_payments = stream_payments
        self.exchange: Exchange | None = None
        """None once the stream is closed, and with a peer that cannot compare."""
        if session.compares:
            leads = replicator.local.origin.node < peer.node
            self.exchange = Exchange(replicator.summing, replicator.store, peer, leads=leads)
        self._peer_has_sent_deltas = self._is_over = False
        self._applying: BatchSpan | None = None
        """The span of the deltas that are being applied, when they belong to a trace."""
        self.batch_trace: dict[str, str] = {}
        """For a line of the log: the `trace_id` of the batch that is being applied, or with which the stream ended."""

    def close(self) -> None:
        """Call it when the stream is closing: nothing more is applied."""
        self._is_over = True
        self.exchange = None
        self._reader.close()
        if self.peer.newest_reader is self._reader:
            self.peer.newest_reader = None
        self._end_span()

    def apply_steps(self, event: LongEvent, now_us: int) -> Steps:
        """Apply and acknowledge a batch, read demands, or answer a comparison, in steps; no more of them once it is
        closed.

        Raises:
            ProtocolError: see `DeltasReader.apply_steps`, `QuotaDemands.read_steps` and `Exchange.receive_steps`.
        """
        if isinstance(event, DeltasReceived):
            yield from self._apply_steps(event.deltas, now_us)
            return
        if isinstance(event, QuotaDemandsReceived):
            yield from self._read_steps(event.demands)
            return
        assert self.exchange is not None
        for _ in self.exchange.receive_steps(event.frame):
            yield
            if self._is_over:
                return

    def _apply_steps(self, deltas: pb.Deltas, now_us: int) -> Steps:
        replicator, peer = self._replicator, self.peer
        if not self._peer_has_sent_deltas:
            self._peer_has_sent_deltas = True
            peer.use_reader(self._reader)
        on_news = replicator.news_callback(peer)
        self.batch_trace = {"trace_id": deltas.trace[:16].hex()} if deltas.trace else {}
        self._applying = peer.note_received(deltas, replicator.tracer)
        try:
            for applied in self._reader.apply_steps(deltas, replicator.store, now_us, on_news):
                self._note_refused()
                if applied.unknown_keys:
                    replicator.unknown_keys += applied.unknown_keys
                    peer.note_unknown(now_us)
                peer.counts.entries_received += applied.entries
                if not applied.is_last:
                    yield
                    if self._is_over:
                        return
        finally:
            self._note_refused()
        self.batch_trace = {}
        self._end_span()
        if deltas.ends_full_state:
            peer.reported.has_ended_snapshot = True
            if peer.ask_again_since_us:
                peer.ask_again_since_us = 0
                replicator.announce()
        self._session.acknowledge(now_us)

    def receive(self, event: Event, now_us: int) -> None:
        """Apply an event that takes no steps.

        Raises:
            ProtocolError: see `PaymentExchange.receive` and `read_reaches`.
        """
        match event:
            case PaymentsReceived(payments):
                self._receive_payments(payments)
            case StatusReceived(status):
                self._receive_status(status, now_us)
            case ClockMeasured(offset_us):
                self.peer.reported.clock_offset_us = offset_us

    def _read_steps(self, demands: Sequence[pb.Demand]) -> Steps:
        replicator = self._replicator
        if replicator.demands is None:
            return
        for unknown_keys in replicator.demands.read_steps(self.peer.node, demands):
            replicator.unknown_keys += unknown_keys
            yield
            if self._is_over:
                return

    def _receive_payments(self, payments: pb.Payments) -> None:
        exchange = self._replicator.payments
        assert exchange is not None
        assert self._stream_payments is not None
        refused = exchange.refused
        self._replicator.unknown_keys += exchange.receive(self.peer.node, payments, self._stream_payments)
        if exchange.refused > refused:
            self.peer.counts.refused[Refused.PAYMENT] += exchange.refused - refused

    def _receive_status(self, status: pb.Status, now_us: int) -> None:
        peer = self.peer
        peer.reported.rules = status.rules
        peer.reported.is_full = status.full
        peer.reported.has_joined = status.joined
        self._replicator.sync.decide(peer)
        if status.sync_request != pb.UNDECIDED:
            peer.reported.request = status.sync_request
            peer.grant_request(now_us)
        peer.grant_missed(status.missed_since_us)
        reaches = read_reaches(status)
        if reaches != peer.reported.reaches:
            peer.reported.reaches = reaches
            self._replicator.note_topology_change()

    def _end_span(self) -> None:
        if self._applying is not None:
            self._applying.end()
            self._applying = None

    def _note_refused(self) -> None:
        refused = self._replicator.store.journal.refused
        if refused:
            self.peer.counts.refused += refused
            refused.clear()


class Stream:
    """One stream with a peer, from the moment the connection is there.

    Args:
        address: of the far end.
        is_dialled: True when this node has dialled a configured address.
        wake: called when `next_frame` may have something new.
        check_peer: asked about who the peer says it is, and its region, before that has any effect; raises
            ProtocolError to refuse it.
        is_proven: the far end has shown a certificate, of which `check_peer` sees whether it is for the node that it
            says it is.
    """

    def __init__(
        self,
        replicator: Replicator,
        address: str,
        *,
        is_dialled: bool,
        wake: Callable[[], None],
        now_us: int,
        check_peer: Callable[[Origin, str], None] | None = None,
        is_proven: bool = False,
    ) -> None:
        self._replicator = replicator
        self._is_proven = is_proven
        self._session = Session(replicator.local, now_us)
        self.stream_payments = None if replicator.payments is None else replicator.payments.new_stream()
        self._demands_told = 0
        self._inbound: Inbound | None = None
        """From the peer's Hello on, if it was accepted."""
        self._status_told = 0
        self._pause_owed_us = 0
        self.address = address
        self.is_dialled = is_dialled
        self.is_paused = False
        """True while changes need not wake it. Set by `stream_io`, which keeps the pauses (`take_pause_us`)."""
        self.wake = wake
        self._check_peer = check_peer
        self.peer: Peer | None = None
        """Whose stream it is: from the peer's Hello until the stream is closing."""
        self.error: ProtocolError | None = None
        """Why this node closes the stream."""
        self.peer_reason = ""
        """Why the peer has closed it, as its Goodbye says."""
        self.why_ended = ""
        """Set when the stream is closing or over, by whichever end."""

    @property
    def is_accepted(self) -> bool:
        """True from the peer's Hello on, if it was accepted."""
        return self._inbound is not None

    @property
    def batch_trace(self) -> dict[str, str]:
        """Fields for a log line of this stream (see `Inbound.batch_trace`)."""
        return {} if self._inbound is None else self._inbound.batch_trace

    @property
    def is_over(self) -> bool:
        """True when there is nothing more to send or to receive: the connection should be closed."""
        return self._session.is_over

    @property
    def can_pay(self) -> bool:
        """True when the ends can ask and pay each other on it."""
        return self._session.can_pay

    @property
    def compares(self) -> bool:
        """True when both ends can compare what they hold."""
        return self._session.compares

    @property
    def received_us(self) -> int:
        """When the last frame arrived."""
        return self._session.received_us

    def receive_steps(self, raw: bytes, now_us: int) -> Steps:
        """Receive one frame and apply it, in steps; do them all before the next frame. After a bad frame the stream is
        closing, and `error` says why."""
        try:
            event = self._session.receive(raw, now_us)
            if self.peer is not None:
                self.peer.counts.bytes_received += len(raw)
            if event is not None:
                yield from self._handle_steps(event, now_us)
        except ProtocolError as error:
            self.fail(error, now_us)
        self.wake()

    def is_ack_due(self, now_us: int) -> bool:
        """True when an acknowledgement has waited in vain for Deltas to carry it: call `wake`."""
        return self._session.is_ack_due(now_us)

    def compare(self, done: Round) -> None:
        """Compare with the peer what both held in a round that is done here."""
        if self._inbound is not None and self._inbound.exchange is not None:
            self._inbound.exchange.note_round(done)
            self.wake()

    def check_time(self, now_us: int) -> None:
        """Ping, and close the stream of a dead peer. Call it a few times a second."""
        try:
            self._session.check_time(now_us)
            if self._replicator.payments is not None and self.stream_payments is not None:
                self._replicator.payments.check_time(self.stream_payments)
        except ProtocolError as error:
            self.fail(error, now_us)
        self.wake()

    def write(self, now_us: int) -> bool:
        """Do a step towards the next batch of deltas, which `next_frame` returns once it is whole. To be called when
        that has nothing: a peer waits for its pong or a payment no longer than for a step.

        Returns:
            False when there was nothing to write.
        """
        peer = self.peer
        return peer is not None and peer.active is self and peer.outbox.write(now_us)

    def next_frame(self, now_us: int) -> bytes | None:
        """The next frame of what is ready to be sent; None when there is none before the next `write` or `wake`."""
        raw = self._session.next_frame(now_us, self._write_quota_demands)
        peer = self.peer
        if peer is None:
            return raw
        if raw is None:
            raw = self._take_frame(peer, now_us)
        if raw is not None:
            peer.counts.bytes_sent += len(raw)
        return raw

    def take_pause_us(self) -> int:
        """How long to wait before the next `write`, since both ends have decisions to make, too. Call it after each
        frame that was sent; it is 0 unless that was a batch."""
        pause_us, self._pause_owed_us = self._pause_owed_us, 0
        return pause_us

    def tell_status_again(self) -> None:
        """The peer may have missed this node's status."""
        self._status_told = 0
        self.wake()

    def fail(self, error: ProtocolError, now_us: int) -> None:
        """Close the stream for `error`, which is counted."""
        # The tracebacks of that one and of its cause would keep what it is about until the stream is gone.
        self.error = ProtocolError(error.reason, error.detail)
        self._session.close(error.reason, error.detail)
        if error.reason not in FAULTLESS:
            self._replicator.protocol_errors[error.reason] += 1
            if self.peer is not None:
                self.peer.counts.protocol_errors[error.reason] += 1
        self._leave(str(error), now_us)

    def close(self, reason: Reason, detail: str, now_us: int) -> None:
        """Say Goodbye; from now on nothing is sent but that, and nothing received."""
        self._session.close(reason, detail)
        self._leave(f"{reason}: {detail}", now_us)

    def lost(self, why: str, now_us: int) -> None:
        """The connection is gone. To be called once for every stream, however it ended."""
        self._session.lost()
        self._leave(why, now_us)

    def _take_frame(self, peer: Peer, now_us: int) -> bytes | None:
        frame = None if self.stream_payments is None else self.stream_payments.take_frame()
        if frame is None:
            frame = self._take_comparison(peer)
        if frame is not None:
            return self._session.send(frame)
        batch = peer.outbox.take_batch() if peer.active is self else None
        if batch is None:
            return None
        self._pause_owed_us = _pause_us(
            len(self._replicator.store.journal.peers), peer.outbox.has_unacknowledged_snapshot
        )
        trace = peer.note_sent(batch, self._replicator.tracer)
        return self._session.send_deltas(batch.payload, trace, now_us)

    def _take_comparison(self, peer: Peer) -> pb.Frame | None:
        exchange = None if self._inbound is None else self._inbound.exchange
        if exchange is None:
            return None
        newest = self._replicator.status_version
        if self._status_told != newest:
            self._status_told = newest
            return pb.Frame(status=self._replicator.status(peer))
        return exchange.take_frame()

    def _write_quota_demands(self, ping: pb.Ping) -> None:
        demands, peer = self._replicator.demands, self.peer
        if demands is not None and peer is not None and peer.active is self:
            self._demands_told = demands.write(ping, self._demands_told)

    def _handle_steps(self, event: Event, now_us: int) -> Steps:
        if not isinstance(event, LongEvent):
            self._receive(event, now_us)
            return
        if isinstance(event, DeltasReceived) and event.acknowledged is not None:
            self._receive(event.acknowledged, now_us)
        assert self._inbound is not None
        yield from self._inbound.apply_steps(event, now_us)

    def _receive(self, event: Event, now_us: int) -> None:
        match event:
            case Established():
                self._join(event, now_us)
            case PeerLeft(reason, detail):
                self._receive_goodbye(reason, detail, now_us)
            case DeltasAcknowledged(frames, delay_us):
                assert self.peer is not None
                for _ in range(frames):
                    self.peer.acknowledged(now_us - delay_us)
                self.wake()
            case _:
                assert self._inbound is not None
                self._inbound.receive(event, now_us)

    def _receive_goodbye(self, reason: str, detail: str, now_us: int) -> None:
        self.peer_reason = reason
        for stream in [] if self.peer is None or reason != Reason.CLOCK_SET else list(self.peer.streams):
            # It has closed all of them, and comes back as another life of the node.
            if stream is not self:
                stream.close(Reason.SUPERSEDED, "the peer's clock was set", now_us)
        self._leave(f"the peer closed the stream: {reason}: {detail}", now_us)

    def _join(self, who: Established, now_us: int) -> None:
        replicator, origin = self._replicator, who.origin
        if self._check_peer is not None:
            self._check_peer(origin, who.region)
        peer = self.peer = replicator.peer_registry.find(self, replicator.local.origin, origin, now_us)
        is_proven = self.is_dialled or self._is_proven
        address = self.address.rpartition(":")[0]
        self._inbound = Inbound(
            replicator,
            self._session,
            peer,
            origin,
            address=address,
            is_proven=is_proven,
            stream_payments=self.stream_payments,
        )
        if self.stream_payments is not None:
            self.stream_payments.can_wish = self._session.can_wish
        replicator.peer_registry.join(self, peer, who)
        if replicator.payments is not None:
            replicator.payments.receive_shown(peer.node, who.membership)

    def _leave(self, why: str, now_us: int) -> None:
        """Stop being the peer's stream."""
        self.why_ended = self.why_ended or why
        peer, self.peer = self.peer, None
        if self._inbound is not None:
            self._inbound.close()
        if self._replicator.payments is not None and self.stream_payments is not None:
            self._replicator.payments.closed(self.stream_payments)
        if peer is not None:
            if peer.streams == [self]:
                self._replicator.sync.lose(peer)
            self._replicator.peer_registry.leave(self, peer, why, now_us)
        self.wake()


def _pause_us(peers: int, has_unacknowledged_snapshot: bool) -> int:
    """After a batch, where there are so many peers."""
    pause_us = PEER_PAUSE_US * peers
    if pause_us > LEAST_PEERS_PAUSE_US:
        return pause_us
    return SNAPSHOT_PAUSE_US if has_unacknowledged_snapshot else 0
