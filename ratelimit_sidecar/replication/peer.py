"""What a node knows of one peer, whatever the streams to it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, fields
from typing import Final, Protocol

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.mesh_status import PeerCounts, PeerStatus
from ratelimit_sidecar.replication.changes import ChangeLog
from ratelimit_sidecar.replication.deltas import DeltasReader
from ratelimit_sidecar.replication.lag import Batch
from ratelimit_sidecar.replication.outbox import Outbox
from ratelimit_sidecar.replication.payments import StreamPayments
from ratelimit_sidecar.replication.rounds import SETTLE_US, Round
from ratelimit_sidecar.replication.v1 import replication_pb2 as pb
from ratelimit_sidecar.replication.wire import Reason

TOLD_LATE_US: Final = 10_000_000
"""How far back a peer is asked again for buckets that had no rule here: it tells of takes of this age at most, except
in a snapshot. Its flushes may wait, and its clock may be behind."""


class PeerStream(Protocol):
    """A stream, as its peer and the replicator use it; `stream.Stream` is one."""

    address: str
    is_dialled: bool
    is_paused: bool
    stream_payments: StreamPayments | None
    wake: Callable[[], None]

    @property
    def received_us(self) -> int: ...

    @property
    def can_pay(self) -> bool: ...

    @property
    def compares(self) -> bool: ...

    def is_ack_due(self, now_us: int) -> bool: ...

    def compare(self, done: Round) -> None: ...

    def tell_status_again(self) -> None: ...

    def close(self, reason: Reason, detail: str, now_us: int) -> None: ...


class BatchSpan(Protocol):
    """A trace span that is open while a batch is on its way, or while one is applied."""

    @property
    def context(self) -> bytes:
        """For whoever continues the trace: `Deltas.trace`."""

    def end(self) -> None: ...


class BatchTracer(Protocol):
    """Links batches to the sampled requests in them."""

    def batch_span(self, peer_node: str, bucket_keys: Sequence[bytes], /) -> BatchSpan | None:
        """The span of a batch sent now; None when no sampled request is in it."""

    def apply_span(self, peer_node: str, context: bytes, /) -> BatchSpan | None:
        """The span of a batch that is applied from now on.

        Args:
            context: what came with it; perhaps nonsense.
        """


@dataclass(slots=True)
class PeerReports:
    """What a peer has reported of itself on its current streams.

    Args:
        has_ended_snapshot: it has sent all of the snapshot that it was asked for, or of what the lost stream missed.
        reaches: nodes that it has a stream to; None while it has not reported it.
        has_joined: its peers have sent it what they know.
        request: which snapshot it asks for.
        is_full: it has no room for buckets of new keys.
        rules: a digest of those it replicates by; 0 while it has not reported it.
        asks_since_us: it asks for what was written since then; 0 for nothing.
    """

    has_ended_snapshot: bool = False
    reaches: frozenset[str] | None = None
    has_joined: bool = False
    request: pb.SyncRequest = pb.UNDECIDED
    is_full: bool = False
    rules: int = 0
    asks_since_us: int = 0
    clock_offset_us: int | None = None


class Peer:
    """A remote node and everything known about it."""

    def __init__(self, store: Store, changes: ChangeLog, node: str) -> None:
        self.node = node
        self.region = ""
        self.address = ""
        self.incarnation = 0
        self.version = ""
        self.protocol = 0
        self.is_gateway = False
        """It speaks for its region; another node may follow it."""
        self.fabric: Origin | None = None
        """Under which it then tells what its region took, while it is connected."""
        self.is_configured = False
        """True once a configured address has led to it."""
        self.streams: list[PeerStream] = []
        """Established ones, the active one first."""
        self.outbox = Outbox(store, changes)
        self.reported = PeerReports()
        self.counts = PeerCounts()
        self.own_request: pb.SyncRequest = pb.UNDECIDED
        """Which snapshot this node asks it for."""
        self.unknown_since_us: int | None = None
        """Since when it has told of buckets that no rule here knows; None since the rules last changed."""
        self.ask_again_since_us = 0
        """This node asks it again for what was written since then, until it has sent it; 0 for nothing."""
        self.is_skewed = False
        """True when the clock offset has been warned about."""
        self.last_error = ""
        self.failed_dials = 0
        self.lost_us = 0
        """When its last stream ended."""
        self._spans: deque[BatchSpan | None] = deque()
        self.connections = 0
        """How often it was connected by a first stream."""
        self.newest_reader: DeltasReader | None = None
        """Reads the stream that last began to carry Deltas; None when that stream has ended."""

    @property
    def active(self) -> PeerStream | None:
        """The stream on which this node sends deltas, asks and wishes. On others it sends answers, status and pings."""
        return self.streams[0] if self.streams else None

    def wake(self) -> None:
        """Wake the active stream: there is something to send."""
        if self.streams:
            self.streams[0].wake()

    def grant_request(self, now_us: int) -> None:
        """Begin to send the snapshot that it has asked for, if it has."""
        if self.reported.request != pb.UNDECIDED:
            self.outbox.serve_request(now_us, recent=self.reported.request == pb.RECENT)

    def note_unknown(self, now_us: int) -> None:
        """It has told of a bucket that no rule here knows."""
        # A snapshot may have what is of any age, and an answer what was written since it was asked for.
        since_us = max(1, now_us - TOLD_LATE_US) if self.reported.has_ended_snapshot else 1
        if self.ask_again_since_us:
            since_us = min(since_us, self.ask_again_since_us)
        known_us = self.unknown_since_us
        self.unknown_since_us = since_us if known_us is None else min(known_us, since_us)

    def ask_for_unknown(self) -> None:
        """Other rules are in force: ask it for what no rule knew before, unless there was none."""
        if self.unknown_since_us is not None:
            since_us = self.ask_again_since_us or self.unknown_since_us
            self.ask_again_since_us, self.unknown_since_us = min(since_us, self.unknown_since_us), None

    def grant_missed(self, since_us: int) -> None:
        """Begin to send what was written since then, if it asks for that and has not before; 0 for nothing."""
        if since_us != self.reported.asks_since_us:
            self.reported.asks_since_us = since_us
            if since_us:
                self.outbox.snapshot(since_us)
                self.wake()

    def forget_streams(self, now_us: int) -> None:
        """Its last stream has ended: what it reported of itself on them is over."""
        self.lost_us = now_us
        self.own_request = pb.UNDECIDED
        self.reported = PeerReports()

    @property
    def can_pay(self) -> bool:
        """True while it can be asked for tokens of strict limits."""
        return bool(self.streams) and self.streams[0].can_pay

    def note_sent(self, batch: Batch, tracer: BatchTracer | None) -> bytes:
        """Count a batch of its outbox that is sent now; returns the context of its trace, "" when it has none."""
        self.counts.batches_sent += 1
        self.counts.entries_sent += batch.entries
        span = None if tracer is None else tracer.batch_span(self.node, batch.bucket_keys)
        self._spans.append(span)
        return b"" if span is None else span.context

    def use_reader(self, reader: DeltasReader) -> None:
        """Its Deltas come on another stream from now on, so it has lost the one before."""
        if self.newest_reader is not None:
            self.newest_reader.is_newest = False
        self.newest_reader = reader

    def note_received(self, deltas: pb.Deltas, tracer: BatchTracer | None) -> BatchSpan | None:
        """Count a batch of its Deltas, which is applied from now on.

        Returns:
            Its span, which whoever applies it ends; None when it belongs to no trace.
        """
        self.counts.batches_received += 1
        return tracer.apply_span(self.node, deltas.trace) if tracer is not None and deltas.trace else None

    def acknowledged(self, now_us: int) -> None:
        """Note that it has applied the oldest batch on its way."""
        self.outbox.acknowledged(now_us)
        self._end_span()

    def end_spans(self) -> None:
        """End the spans of all batches on their way, which are lost."""
        while self._spans:
            self._end_span()

    def _end_span(self) -> None:
        span = self._spans.popleft()
        if span is not None:
            span.end()

    def rules_match(self, rules: int) -> bool | None:
        """Whether it replicates by the rules with that digest; None while that is not known."""
        return self.reported.rules == rules if self.reported.rules and rules else None

    def is_comparable(self, rules: int, now_us: int) -> bool:
        """True when both ends have received what counts in the round of now.

        Args:
            rules: a digest of this node's rules.
        """
        is_told = not self.outbox.has_unacknowledged_snapshot and not self.outbox.is_behind(now_us - SETTLE_US)
        return self.reported.has_ended_snapshot and is_told and self.rules_match(rules) is not False

    def status(self, now_us: int, rules: int) -> PeerStatus:
        """What metrics and the console show of it.

        Args:
            rules: a digest of this node's rules.
        """
        return PeerStatus(
            node=self.node,
            region=self.region,
            address=self.address,
            version=self.version,
            protocol=self.protocol,
            connected=bool(self.streams),
            lag_seconds=self.outbox.lag_us(now_us) / 1e6,
            pending_buckets=self.outbox.pending_buckets,
            rules_match=self.rules_match(rules),
            reconnects=max(0, self.connections - 1),
            clock_offset_seconds=None if self.reported.clock_offset_us is None else self.reported.clock_offset_us / 1e6,
            last_error=self.last_error,
            failed_dials=self.failed_dials,
            **{counter.name: copy(getattr(self.counts, counter.name)) for counter in fields(PeerCounts)},
        )
