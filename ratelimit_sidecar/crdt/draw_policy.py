"""When and how much a sidecar draws from its region's account, for one granted bucket. Safety does not depend on it.

It holds what its requests ask for in `DRAW_AHEAD_US`, at least as much as the largest request that was denied lately.
While the account has plenty it holds a part of that as well, for the request that comes after a pause. What is held
beyond twice as much goes back. Times and amounts are those of `granted.py`."""

from __future__ import annotations

from typing import Final

from ratelimit_sidecar.crdt.granted import GRANT_US, GrantedBucket, Needs
from ratelimit_sidecar.crdt.payment_policy import PACE_SHIFT, SHORTAGE_US
from ratelimit_sidecar.crdt.shares import TOKEN

DRAW_AHEAD_US: Final = 200_000
"""Some ticks of 50 ms."""

STANDING_US: Final = 10_000_000
"""For so long after its last request a bucket holds something, if the account has plenty. It is renewed once a second.
"""

STANDING_SHIFT: Final = 4
"""What it then holds: 1/16 of what the account has left, rounded up."""

MOST_PACE_US: Final = 1_000_000
"""An account that had too little is asked again when 1/64 of the limit has refilled, or after this."""


def draw_needs(bucket: GrantedBucket, strict_us: int) -> Needs | None:
    """What the bucket needs of its account; None when there is no need to call. The caller has advanced the bucket."""
    target = -(-bucket.demand() * DRAW_AHEAD_US // (1_000_000 * TOKEN))
    if strict_us - bucket.denied_us < SHORTAGE_US:
        target = max(target, bucket.short_of)
    else:
        bucket.short_of = 0
    if strict_us - bucket.used_us < STANDING_US:
        target = max(target, -(-bucket.left >> STANDING_SHIFT))
    limit = bucket.limit
    target = min(target, limit.capacity)
    held = bucket.held
    wanted = max(0, target - held)
    if wanted:
        pace_us = min(MOST_PACE_US, (limit.scaled_capacity // limit.tokens) >> PACE_SHIFT)
        if wanted <= target >> 2 or strict_us - bucket.paced_us < pace_us:
            wanted = 0
    is_ending = bucket.granted > 0 and bucket.expires_us - strict_us < GRANT_US // 2
    if not wanted and held <= 2 * target and not is_ending:
        return None
    return Needs(wanted, 2 * target)
