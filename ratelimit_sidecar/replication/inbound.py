"""What a peer says on one stream, once both ends have accepted each other."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.journal import Refused
from ratelimit_sidecar.replication.anti_entropy import Exchange
from ratelimit_sidecar.replication.deltas import DeltasReader
from ratelimit_sidecar.replication.peer import BatchSpan, Peer
from ratelimit_sidecar.replication.purses import PaymentOutbox
from ratelimit_sidecar.replication.replicator import Replicator
from ratelimit_sidecar.replication.session import (
    ClockMeasured,
    ComparisonReceived,
    DeltasReceived,
    DemandsReceived,
    Event,
    PaymentsReceived,
    Session,
    StatusReceived,
)
from ratelimit_sidecar.replication.v1 import replication_pb2 as pb
from ratelimit_sidecar.replication.wire import read_reaches


class Inbound:
    """Args:
    is_proven: see `DeltasReader`.
    payments: of the stream.
    """

    def __init__(
        self,
        replicator: Replicator,
        session: Session,
        peer: Peer,
        origin: Origin,
        *,
        is_proven: bool,
        payments: PaymentOutbox | None,
    ) -> None:
        self.peer = peer
        self._replicator = replicator
        self._session = session
        self._reader = DeltasReader(origin, is_proven=is_proven)
        self._payments = payments
        self.exchange: Exchange | None = None
        """None once the stream is closed, and with a peer that cannot compare."""
        if session.compares:
            leads = replicator.local.origin.node < peer.node
            self.exchange = Exchange(replicator.summing, replicator.store, peer, leads=leads)
        self._is_over = False
        self._applying: BatchSpan | None = None
        """The span of the deltas that are being applied, when they belong to a trace."""
        self.batch_trace: dict[str, str] = {}
        """For a line of the log: the `trace_id` of the batch that is being applied, or with which the stream ended."""

    def close(self) -> None:
        """Nothing is heard any more."""
        self._is_over = True
        self.exchange = None
        self._end_span()

    def apply(self, event: DeltasReceived | ComparisonReceived, now_us: int) -> Iterator[None]:
        """Apply and acknowledge a batch, or answer a comparison, in steps; no more of them once it is closed.

        Raises:
            ProtocolError: see `DeltasReader.apply` and `Exchange.receive`.
        """
        if isinstance(event, DeltasReceived):
            yield from self._apply(event.deltas, now_us)
            return
        assert self.exchange is not None
        for _ in self.exchange.receive(event.frame):
            yield
            if self._is_over:
                return

    def _apply(self, deltas: pb.Deltas, now_us: int) -> Iterator[None]:
        replicator, peer = self._replicator, self.peer
        on_news = partial(replicator.pass_on, peer) if replicator.relay.is_needed else None
        self.batch_trace = {"trace_id": deltas.trace[:16].hex()} if deltas.trace else {}
        self._applying = peer.received(deltas, replicator.tracer)
        try:
            for applied in self._reader.apply(deltas, replicator.store, now_us, on_news):
                self._note_refused()
                replicator.unknown_keys += applied.unknown_keys
                peer.entries_received += applied.entries
                if not applied.is_last:
                    yield
                    if self._is_over:
                        return
        finally:
            self._note_refused()
        self.batch_trace = {}
        self._end_span()
        if deltas.ends_full_state:
            peer.full_state_heard = True
        self._session.acknowledge(now_us)

    def hear(self, event: Event, now_us: int) -> None:
        """Hear what takes no steps.

        Raises:
            ProtocolError: see `Purses.receive`, `Demands.read` and `read_reaches`.
        """
        match event:
            case PaymentsReceived(payments):
                self._hear_payments(payments)
            case StatusReceived(status):
                self._hear_status(status, now_us)
            case ClockMeasured(offset_us):
                self.peer.clock_offset_us = offset_us
            case DemandsReceived(demands) if self._replicator.demands is not None:
                self._replicator.unknown_keys += self._replicator.demands.read(self.peer.node, demands)

    def _hear_payments(self, payments: pb.Payments) -> None:
        purses = self._replicator.purses
        assert purses is not None
        assert self._payments is not None
        refused = purses.refused
        self._replicator.unknown_keys += purses.receive(self.peer.node, payments, self._payments)
        if purses.refused > refused:
            self.peer.refused[Refused.PAYMENT] += purses.refused - refused

    def _hear_status(self, status: pb.Status, now_us: int) -> None:
        peer = self.peer
        peer.rules = status.rules
        peer.is_full = status.full
        peer.has_joined = status.joined
        self._replicator.sync.decide(peer)
        if status.sync_request != pb.UNDECIDED:
            peer.request = status.sync_request
            peer.grant_request(now_us)
        reaches = read_reaches(status)
        if reaches != peer.reaches:
            peer.reaches = reaches
            self._replicator.change_ways()

    def _end_span(self) -> None:
        if self._applying is not None:
            self._applying.end()
            self._applying = None

    def _note_refused(self) -> None:
        refused = self._replicator.store.journal.refused
        if refused:
            self.peer.refused += refused
            refused.clear()
