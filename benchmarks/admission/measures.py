"""What is measured on the instants at which requests were admitted."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from benchmarks.admission.demand import SECOND_US
from ratelimit_sidecar.crdt.limit import TokenBucketLimit

ADAPTED_PERCENT = 95
WINDOW_US = 1 * SECOND_US
STEP_US = 20_000


def within(times_us: Sequence[int], start_us: int, end_us: int) -> int:
    """How many of `times_us`, which are in order, lie from `start_us` up to `end_us`."""
    return bisect_left(times_us, end_us) - bisect_left(times_us, start_us)


def adapted_us(limit: TokenBucketLimit, admitted_us: Sequence[int], shift_us: int, end_us: int) -> int | None:
    """How long after the shift the first `WINDOW_US` begins in which `ADAPTED_PERCENT` of its refill are admitted.

    Returns:
        A multiple of `STEP_US`; None when there is no such window before `end_us`.
    """
    enough = -(-WINDOW_US * limit.tokens * ADAPTED_PERCENT // (limit.period_us * 100))
    for start_us in range(shift_us, end_us - WINDOW_US + 1, STEP_US):
        if within(admitted_us, start_us, start_us + WINDOW_US) >= enough:
            return start_us - shift_us
    return None


def used_per_mille(limit: TokenBucketLimit, admitted_us: Sequence[int], start_us: int, end_us: int) -> int:
    """The admissions of a span as a part of its refill, rounded down."""
    return within(admitted_us, start_us, end_us) * limit.period_us * 1_000 // ((end_us - start_us) * limit.tokens)


def percentile(sorted_values: Sequence[int], percent: int) -> int:
    """The least value that `percent` of all do not exceed."""
    return sorted_values[max(0, -(-len(sorted_values) * percent // 100) - 1)]


def series(times_us: Sequence[int], start_us: int, end_us: int, step_us: int) -> tuple[int, ...]:
    """How many lie in each step."""
    return tuple(within(times_us, at_us, at_us + step_us) for at_us in range(start_us, end_us, step_us))
