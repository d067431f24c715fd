"""What a node knows of one peer, as an immutable value for metrics and the admin console."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PeerStatus:
    """One peer at one instant. Counters count from this process's start.

    Args:
        node: the peer's node id; "" for a configured address that has not been reached yet.
        region: "" as long as `node` is.
        address: the configured address, or the far end of the connection for a peer that only dials in.
        connected: a stream is established.
        lag_seconds: the age of this node's oldest delta the peer has not acknowledged; with none outstanding, the
            lag of the last acknowledged batch.
        pending_buckets: buckets of which the peer has something yet to be sent.
        batches_sent: delta batches sent.
        batches_received: delta batches received and applied.
        entries_sent: slot entries in the batches sent.
        entries_received: slot entries in the batches received.
        reconnects: times the peer came back after it had been lost.
        clock_offset_seconds: the peer's clock minus this node's, positive when the peer is ahead; None before the
            first measurement.
        last_error: why the last stream or dial ended; "" when none has.
        protocol_errors: streams of this peer that this node closed, by reason (`wire.Reason`).
    """

    node: str
    region: str
    address: str
    connected: bool
    lag_seconds: float
    pending_buckets: int
    batches_sent: int
    batches_received: int
    entries_sent: int
    entries_received: int
    reconnects: int
    clock_offset_seconds: float | None
    last_error: str
    protocol_errors: Mapping[str, int]
