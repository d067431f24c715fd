"""An assignment: a part of a limit that an Envoy enforces as a token bucket (envoy.type.v3.TokenBucket).

Envoy takes the fill interval in whole seconds, and ignores a change of the interval alone. It refills continuously, at
tokens by seconds. So the interval is fixed by the limit, long enough that 1/1,000 of the limit is a whole token, and
only the numbers of tokens change. A smaller share is DENY_ALL.

Rates are in billionths of a token per second.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from ratelimit_sidecar.crdt.limit import AnyLimit, TokenBucketLimit, Window, WindowLimit

TOKEN: Final = 1_000_000_000
"""One token per second, as a rate."""

SECOND_US: Final = 1_000_000

STEPS: Final = 1_000
"""Shares are multiples of 1/1,000 of the limit, or finer."""

REPAY_S: Final = 10

REPORT_US: Final = 5 * SECOND_US
"""The time between two reports of an Envoy, whatever its `reporting_interval`."""

_TWO_REPORTS_US: Final = 2 * REPORT_US
"""From a change of the demand until all Envoys have shares that suit it."""

LEAST_PART: Final = 8
"""At least 1/8 of a token bucket can always be shared, so that a debt reported late does not stop all Envoys."""

_MAX_UINT32: Final = 2**32 - 1


class Assignment(NamedTuple):
    """A token bucket, or without tokens ALLOW_ALL or DENY_ALL.

    Args:
        rate: the share it was made from; it admits no more than that in the long run.
    """

    max_tokens: int
    tokens_per_fill: int
    fill_interval_s: int
    rate: int
    allows_all: bool = False


ALLOW_ALL: Final = Assignment(0, 0, 0, 0, allows_all=True)
DENY_ALL: Final = Assignment(0, 0, 0, 0)


class ShareBase(NamedTuple):
    """The rate, burst and fill interval from which shares of a limit are made.

    Args:
        rate: the rate of the whole limit.
        burst: tokens that all shares together may hold at once: of a token bucket those that are left (`within_left`).
            A window has no burst of its own, and a burst comes on top of the refill during the window. So it is one
            second's refill, and at least one token.
        fill_interval_s: the same for all shares.
    """

    rate: int
    burst: int
    fill_interval_s: int


def share_base_of(limit: AnyLimit) -> ShareBase:
    tokens = limit.tokens if isinstance(limit, TokenBucketLimit) else limit.requests
    rate = tokens * SECOND_US * TOKEN // limit.period_us
    burst = limit.capacity
    if isinstance(limit, WindowLimit):
        burst = min(burst, max(1, rate // TOKEN))
    return ShareBase(rate if burst else 0, burst, max(1, -(-STEPS * TOKEN // max(1, rate))))


def assign(base: ShareBase, share: int, *, is_strict: bool = False) -> Assignment:
    """Make the assignment for a share of the rate.

    Args:
        is_strict: if the part of the burst is less than a token, there is none. Otherwise it is one token, since a
            bucket without any would never admit anything.
    """
    per_fill = min(share * base.fill_interval_s // TOKEN, _MAX_UINT32)
    most = base.burst * share // base.rate if base.rate else 0
    most = min(most if is_strict else max(most, 1), _MAX_UINT32)
    if not per_fill or not most:
        return DENY_ALL
    return Assignment(most, per_fill, base.fill_interval_s, share)


def noticeable(previous: Assignment | None, new: Assignment) -> Assignment:
    """Change `new` a little if Envoy would otherwise not notice the change.

    That is when only the fill interval differs, after a change of the limit.
    """
    if (
        previous is None
        or previous[:2] != new[:2]
        or previous.fill_interval_s == new.fill_interval_s
        or not new.tokens_per_fill
    ):
        return new
    return new._replace(tokens_per_fill=max(1, new.tokens_per_fill - 1))


def within_debt(limit: TokenBucketLimit, rate: int, used: int) -> int:
    """The rate that may be shared while `used` tokens of a token bucket are used.

    It is the whole rate, less what brings the bucket back within `REPAY_S`, or its refill time if that is longer.
    Envoys get a new share every five seconds, so a shorter time would overshoot. A quarter of the bucket is left to
    requests that are decided here.

    Args:
        used: tokens, those beyond the limit included.
    """
    kept = limit.capacity - limit.capacity // 4
    if used <= kept or not rate:
        return rate
    seconds = max(REPAY_S, limit.capacity * TOKEN // rate)
    return max(rate // LEAST_PART, rate - (used - kept) * TOKEN // seconds)


def within_left(limit: TokenBucketLimit, rate: int, used: int, pending: int) -> int:
    """The burst that may be shared while `used` tokens of a token bucket are used: what is left, but at least one
    second's refill.

    An Envoy's bucket that is made anew begins full. So what is not left would be admitted with each such bucket.

    Args:
        pending: tokens that are to be charged until the next report. What is refilled meanwhile is free for them.
    """
    refill = rate // TOKEN
    left = limit.capacity - used - max(0, pending - REPORT_US // SECOND_US * refill)
    return max(left, min(refill, limit.capacity))


def look_ahead_us(limit: WindowLimit) -> int:
    """How far ahead `within_window` looks: two reports, or a whole slot of a sliding window, since it leaves all at
    once. But at most half of the window: if it looks over all of it, it sees nothing of what is used.
    """
    slot_us = 1 << limit.exponent if limit.window is Window.SLIDING else 0
    return min(max(_TWO_REPORTS_US, slot_us), limit.period_us // 2)


def within_window(limit: WindowLimit, rate: int, left: int) -> int:
    """The rate that may be shared while `left` tokens can be taken within `look_ahead_us`.

    It is the whole rate while at least half of what that admits in this time is left. With less it falls to 0. The
    other half is for the delay of a report: a window may begin with what Envoys admitted five seconds before, and then
    those alone seem to use more than the limit. Shares cannot follow a window that is shorter than two reports, so
    there the rate falls less.
    """
    half_us = look_ahead_us(limit) // 2
    missing = rate * half_us - left * TOKEN * SECOND_US
    return max(0, rate - max(0, missing) // max(REPORT_US, half_us))
