"""What metrics and the console show of a fabric."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class FabricStatus:
    """Counts since the start, and how a sidecar's part in a fabric is now.

    Args:
        ticks, call_seconds: ticks that were answered, and the seconds they took in all.
        failed: ticks that were not answered.
        buckets: that are shared.
        unshared: changes of buckets for which there was no room among the shared ones, and of what others took.
        no_room, no_room_at_gateway: answers that Redis may hold nothing more of a bucket, since its rule has too many.
        gateway_unshared: how often the gateway had no room for a bucket, or for what was taken, so that other regions
            did not receive it, or this region what they took.
        odd, odd_at_gateway: answers that a bucket cannot be shared, since Redis has something else under its name.
        last_us: when the latest answered tick began, microseconds since the epoch.
        degraded_reason: why nothing is shared; "" when it is.
        token: of the lease that this sidecar holds as the gateway; 0 when it does not.
        terms: how often it became the gateway.
        gateway_failed: how often it could not become the gateway, since it cannot listen.
        gateway_reason: why it cannot listen; "" when it can, or never had to.
    """

    ticks: int = 0
    failed: int = 0
    call_seconds: float = 0.0
    buckets: int = 0
    unshared: int = 0
    odd: int = 0
    odd_at_gateway: int = 0
    gateway_unshared: int = 0
    no_room: int = 0
    no_room_at_gateway: int = 0
    last_us: int | None = None
    degraded_reason: str = ""
    token: int = 0
    terms: int = 0
    gateway_failed: int = 0
    gateway_reason: str = ""


@dataclass(slots=True)
class DrawStatus:
    """Counts since the start of what a sidecar draws for strict limits.

    Args:
        drawn, returned: tokens, from the region's accounts and back into them.
        lineages: how often all accounts of a shard were found to be lost.
        failed: ticks that were not answered.
        degraded_reason: why nothing can be drawn; "" when it can.
    """

    drawn: int = 0
    returned: int = 0
    lineages: int = 0
    failed: int = 0
    degraded_reason: str = ""
