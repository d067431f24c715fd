"""The state of one peer, and of the membership, as values for metrics and the admin console."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from ratelimit_sidecar.crdt.journal import Refused


@dataclass(slots=True)
class PeerCounts:
    """What has passed between this node and one peer since this process's start.

    Args:
        batches_sent: delta batches sent.
        batches_received: delta batches received and applied.
        entries_sent: slot entries in the batches sent.
        entries_received: slot entries in the batches received.
        bytes_sent: of frames of all kinds, as the protocol has them: before HTTP/2 and TLS.
        bytes_received: likewise.
        resyncs: buckets exchanged with the peer because a comparison of both nodes' state found that they differ.
        protocol_errors: streams of this peer that this node closed, by reason (`wire.Reason`).
        refused: parts of the peer's data that this node has refused, by reason (`crdt.journal.Refused`).
    """

    batches_sent: int = 0
    batches_received: int = 0
    entries_sent: int = 0
    entries_received: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    resyncs: int = 0
    protocol_errors: Counter[str] = field(default_factory=Counter)
    refused: Counter[Refused] = field(default_factory=Counter)


@dataclass(slots=True)
class PeerStatus(PeerCounts):
    """One peer at one instant. Counters count from this process's start.

    Args:
        node: the peer's node id; "" for an address that has not been reached yet, or a name that is not resolved.
        region: "" as long as `node` is.
        address: the address dialled, or the far end of the connection for a peer that only dials in.
        version: the peer's software version; "" before it was first reached.
        protocol: the protocol in use, the lower of both nodes' newest; 0 before it was first reached.
        connected: a stream is established.
        lag_seconds: the age of this node's oldest delta the peer has not acknowledged; with none outstanding, the
            lag of the last acknowledged batch.
        pending_buckets: buckets with entries that are still to be sent to the peer.
        rules_match: False while the peer has other rules than this node; None while that is unknown.
        reconnects: how often the peer came back after it had been lost.
        clock_offset_seconds: the peer's clock minus this node's, positive when the peer is ahead; None before the
            first measurement.
        last_error: why the last stream or dial ended; "" if none has.
        failed_dials: dials in a row that were answered, and then ended by an error instead of a stream that lasts.
    """

    node: str = ""
    region: str = ""
    address: str = ""
    version: str = ""
    protocol: int = 0
    connected: bool = False
    lag_seconds: float = 0.0
    pending_buckets: int = 0
    rules_match: bool | None = None
    reconnects: int = 0
    clock_offset_seconds: float | None = None
    last_error: str = ""
    failed_dials: int = 0


@dataclass(frozen=True, slots=True)
class MembershipStatus:
    """The membership of strict limits as this node sees it at one instant. Counters count from this process's start.

    Args:
        epoch: of the membership that this node is configured with.
        home_share: the part of each strict limit that is this node's home now; 0 to 1.
        settled: True if the home is that of the membership. Otherwise it is smaller, because the process has just
            started, or not every member has shown this epoch yet.
        conflicts: nodes that show other members under the same epoch. One of the two nodes is configured wrongly;
            meanwhile this one uses the smaller share.
        buckets: strict buckets in memory.
        payments_sent: asks of peers that were answered with more than nothing.
        payments_received: asks of this node that were answered with more than nothing.
    """

    epoch: int
    home_share: float
    settled: bool
    conflicts: tuple[str, ...]
    buckets: int
    payments_sent: int
    payments_received: int
