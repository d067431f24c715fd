"""The bucket straight from its formula, slow and obvious: what the fast code is compared with."""

from __future__ import annotations

from collections.abc import Iterable

from ratelimit_sidecar.crdt.limit import TokenBucketLimit


def deficit_by_formula(events: Iterable[tuple[int, int]], limit: TokenBucketLimit, now_us: int) -> int:
    """D(t) = max(0, sup over s <= t of [taken in (s, t] - rate * (t - s)]), scaled by the limit's period.

    The supremum is reached just before one of the events, so only those instants are tried.
    """
    placed = [(min(at_us, now_us), tokens) for at_us, tokens in events]
    return max(
        0,
        *(
            sum(tokens for at_us, tokens in placed if at_us >= start_us) * limit.period_us
            - limit.tokens * (now_us - start_us)
            for start_us, _ in placed
        ),
        0,
    )


def most_over_limit(admitted: list[tuple[int, int]], limit: TokenBucketLimit) -> int:
    """The largest excess, scaled, of admitted over capacity + rate * T in any interval; at most 0 keeps the promise."""
    worst = -limit.scaled_capacity
    for first, (start_us, _) in enumerate(admitted):
        total = 0
        for at_us, tokens in admitted[first:]:
            total += tokens
            worst = max(worst, total * limit.period_us - limit.scaled_capacity - limit.tokens * (at_us - start_us))
    return worst
