"""What all regions together may admit, and whether they kept to it (promise P3 in docs/reference/promises.md).

A sidecar's deficit D_i misses only what the others admitted and had not yet delivered to it. Adding n tokens to a
bucket raises its deficit by at most n, so with M missing tokens D_i >= D - M, D being the deficit of one bucket fed
all that was admitted. Take the last request admitted within the T seconds: D_i <= capacity held for it, so
D <= capacity + M. And D is at least all that was admitted less all that can have drained, rate * T. Hence

    admitted <= capacity + rate * T + M

M is at most what the others were offered within L, the longest replication took. Overshoot does not add up over time:
it is debt, and repaid. A remote slot's tokens are placed at its middle, half a slot early at most: worth half a slot's
refill more. And no sidecar denies what one bucket has more than half a slot's refill to spare for, so what all admit
can't stay behind what one bucket would admit by more than the same allowance.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import merge

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.limit import TokenBucketLimit
from ratelimit_sidecar.crdt.token_bucket import TokenBucket

MAX_ERROR_SHARE = 0.01
"""The largest part of requests that may fail. Each failed one may or may not have been charged, so with more of them
the comparison says nothing.
"""


class OneBucket:
    """One bucket for all regions, with no replication between it and them: what the sidecars are measured against."""

    def __init__(self, limit: TokenBucketLimit) -> None:
        self._limit = limit
        self._bucket: TokenBucket | None = None
        self.admitted = 0

    def offer(self, at_s: float) -> None:
        """Offer one request. Times must not go back."""
        at_us = round(at_s * 1_000_000)
        if self._bucket is None:
            self._bucket = TokenBucket(b"one", self._limit, Origin("one", 1), at_us)
        self.admitted += self._bucket.take(1, at_us)
        self._bucket.seal(at_us)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result: numbers of requests of all regions together.

    Args:
        allowance: how far `admitted` may be above `ceiling` (M and the slots' middle) or below `one_bucket`.
        ceiling: capacity + rate * T.
    """

    offered: int
    admitted: int
    errors: int
    one_bucket: int
    ceiling: int
    allowance: int

    @property
    def broken(self) -> str | None:
        """Which promise was broken; None if all were kept."""
        if self.errors > self.offered * MAX_ERROR_SHARE:
            return f"{self.errors} of {self.offered} requests failed"
        if self.admitted > self.ceiling + self.allowance:
            return (
                f"{self.admitted} admitted, more than {self.ceiling} + {self.allowance} "
                "(capacity + refill, and what was under way between the regions)"
            )
        if self.admitted + self.errors < self.one_bucket - self.allowance:
            return f"{self.admitted} admitted, but one bucket would have admitted {self.one_bucket}"
        return None


def judge(
    limit: TokenBucketLimit,
    *,
    admitted: int,
    errors: int,
    one_bucket: int,
    sent_at: Sequence[Sequence[float]],
    last_admitted_at: float,
    lag_s: float,
) -> Verdict:
    """Compare what was admitted with what was promised.

    Args:
        sent_at: for each region, the instant of every request, ascending, in seconds.
        last_admitted_at: an instant at or after the last admission, on the same clock.
        lag_s: the longest a token's way from one sidecar to another has taken.
    """
    offered = sum(map(len, sent_at))
    first_sent_at = min((instants[0] for instants in sent_at if instants), default=last_admitted_at)
    elapsed_s = max(0.0, last_admitted_at - first_sent_at)
    rate = limit.tokens / limit.period_us * 1_000_000
    under_way = max(
        most_within(merge(*(others for at, others in enumerate(sent_at) if at != own)), lag_s)
        for own in range(len(sent_at))
    )
    half_a_slot_s = (1 << limit.exponent) / 2_000_000
    return Verdict(
        offered=offered,
        admitted=admitted,
        errors=errors,
        one_bucket=one_bucket,
        ceiling=math.ceil(limit.capacity + rate * elapsed_s),
        allowance=under_way + math.ceil(rate * half_a_slot_s),
    )


def most_within(instants: Iterable[float], window_s: float) -> int:
    """The most instants, of an ascending series, that any closed window of that length holds."""
    all_instants = list(instants)
    most = start = 0
    for end, instant in enumerate(all_instants, 1):
        while instant - all_instants[start] > window_s:
            start += 1
        most = max(most, end - start)
    return most
