"""What a request asks for: which buckets it takes from and how much. A value, made from the request and the rules."""

from __future__ import annotations

from dataclasses import dataclass

from envoy.service.ratelimit.v3.rls_pb2 import RateLimitResponse

from ratelimit_sidecar.limiter.counts import RuleCounts
from ratelimit_sidecar.limiter.rules import Rule


@dataclass(frozen=True, slots=True)
class Step:
    """One descriptor of a request: what to take from which bucket.

    Args:
        rule: None when the descriptor is not limited.
        hits: tokens; 0 checks and charges nothing.
        current_limit: as the answer shows it.
        is_replicated: peers are told what it takes.
        is_strict: it takes from this replica's share.
        is_quota: over the limit it does not by itself make the answer OVER_LIMIT.
        charges_denied: hits count although they are denied.
        near_from: tokens above which hits are near the limit.
    """

    rule: Rule | None
    bucket_key: bytes
    hits: int
    current_limit: RateLimitResponse.RateLimit | None
    counts: RuleCounts
    is_replicated: bool = False
    is_strict: bool = False
    is_quota: bool = False
    charges_denied: bool = False
    near_from: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """All of a request.

    Args:
        quotas: steps in quota mode.
        hits: the request's hits addend, for descriptors without their own.
        descriptors: their entries, in order.
        has_extras: the answer has more in it than codes and levels, or may have.
    """

    domain: str
    steps: tuple[Step, ...]
    quotas: int
    hits: int
    descriptors: tuple[tuple[tuple[str, str], ...], ...]
    has_extras: bool
