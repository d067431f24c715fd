"""What an Envoy is told to enforce: a part of a limit as a token bucket of Envoy's (envoy.type.v3.TokenBucket).

Envoy takes the interval of a token bucket in whole seconds, and does not notice when nothing but that has changed. It
refills continuously, at tokens by seconds: so the interval is fixed by the limit, long enough that a thousandth of the
limit is a whole token, and only the numbers of tokens change. Less than that is nothing: DENY_ALL.

Rates are in billionths of a token per second.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from ratelimit_sidecar.crdt.limit import AnyLimit, Limit, WindowLimit

TOKEN: Final = 1_000_000_000
"""One token per second, as a rate."""

SECOND_US: Final = 1_000_000

STEPS: Final = 1_000
"""A share is a multiple of one part in so many of the limit, at most."""

REPAY_S: Final = 10

LEAST_PART: Final = 8
"""One part in so many of a limit can always be shared: a debt that was heard of late must not stop everybody."""

_MAX_UINT32: Final = 2**32 - 1


class Assignment(NamedTuple):
    """A token bucket; without tokens ALLOW_ALL or DENY_ALL.

    Args:
        rate: what it stands for, which is at least what it admits in the long run.
    """

    max_tokens: int
    tokens_per_fill: int
    fill_interval_s: int
    rate: int
    allows_all: bool = False

    def is_like(self, other: Assignment) -> bool:
        """Whether Envoy does the same for both."""
        return self[:3] == other[:3] and self.allows_all == other.allows_all


ALLOW_ALL: Final = Assignment(0, 0, 0, 0, allows_all=True)
DENY_ALL: Final = Assignment(0, 0, 0, 0)


class Terms(NamedTuple):
    """What of a limit shares are made from.

    Args:
        rate: the whole of it.
        burst: tokens at once, of all together. A window has none: what a token bucket lets through at once comes on
            top of what it refills while the window lasts. So it is a second's refill, and one token at least.
        fill_interval_s: of all its shares.
    """

    rate: int
    burst: int
    fill_interval_s: int


def terms_of(limit: AnyLimit) -> Terms:
    tokens = limit.tokens if isinstance(limit, Limit) else limit.requests
    rate = tokens * SECOND_US * TOKEN // limit.period_us
    burst = limit.capacity
    if isinstance(limit, WindowLimit):
        burst = min(burst, max(1, rate // TOKEN))
    return Terms(rate if burst else 0, burst, max(1, -(-STEPS * TOKEN // max(1, rate))))


def assign(terms: Terms, share: int, *, is_strict: bool = False) -> Assignment:
    """Args:
    share: of the rate.
    is_strict: a part of the burst that is less than a token is none; otherwise it is one, since without any
        nothing would ever be admitted.
    """
    per_fill = min(share * terms.fill_interval_s // TOKEN, _MAX_UINT32)
    most = terms.burst * share // terms.rate if terms.rate else 0
    most = min(most if is_strict else max(most, 1), _MAX_UINT32)
    if not per_fill or not most:
        return DENY_ALL
    return Assignment(most, per_fill, terms.fill_interval_s, share)


def after(told: Assignment | None, assignment: Assignment) -> Assignment:
    """The assignment, such that Envoy notices it: the limit, and with it the interval, may have changed."""
    if (
        told is None
        or told[:2] != assignment[:2]
        or told.fill_interval_s == assignment.fill_interval_s
        or not assignment.tokens_per_fill
    ):
        return assignment
    return assignment._replace(tokens_per_fill=max(1, assignment.tokens_per_fill - 1))


def within_debt(limit: AnyLimit, rate: int, used: int) -> int:
    """The rate that may be shared while so much of a limit is used: all of it, less what brings it back within
    `REPAY_S`, or the time in which it refills when that is longer.

    Envoys are told of it every five seconds, so a shorter time would overshoot. A quarter of a token bucket is left to
    those who ask for each request. In a window it is no matter how much is used, as long as it is within the limit.

    Args:
        used: tokens, also those taken beyond the limit.
    """
    kept = limit.capacity - (limit.capacity // 4 if isinstance(limit, Limit) else 0)
    if used <= kept or not rate:
        return rate
    seconds = max(REPAY_S, limit.capacity * TOKEN // rate)
    return max(rate // LEAST_PART, rate - (used - kept) * TOKEN // seconds)
