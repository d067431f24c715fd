"""A latency histogram for the request path: a search over a dozen integers and two additions, without locks.

Written and read on the event loop alone.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Final, NamedTuple

FIRST_BOUND_NS: Final = 10_000

BOUNDS_NS: Final = (
    FIRST_BOUND_NS,
    25_000,
    50_000,
    100_000,
    250_000,
    500_000,
    1_000_000,
    2_500_000,
    5_000_000,
    10_000_000,
    20_000_000,
    50_000_000,
    100_000_000,
)
"""Upper bounds, inclusive: from 10 us, about a decision from memory, to 100 ms, five times Envoy's default timeout."""


class Exemplar(NamedTuple):
    """A sampled request that fell into a bucket."""

    trace_id: str
    elapsed_ns: int
    ended_ns: int
    """When it was answered, in nanoseconds since the epoch."""


class LatencyHistogram:
    """Counts how long requests took."""

    __slots__ = ("counts", "exemplars", "sum_ns")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_NS) + 1)
        """The number of observations up to each bound and above the one before; the last is for those above
        all bounds.
        """
        self.exemplars: list[Exemplar | None] = [None] * len(self.counts)
        """The latest exemplar of each bucket."""
        self.sum_ns = 0

    def observe(self, elapsed_ns: int) -> None:
        # Nearly all requests are below the first bound: no search.
        self.counts[0 if elapsed_ns <= FIRST_BOUND_NS else bisect_left(BOUNDS_NS, elapsed_ns)] += 1
        self.sum_ns += elapsed_ns

    def exemplify(self, trace_id: str, elapsed_ns: int, ended_ns: int) -> None:
        """Keep a sampled request as the exemplar of its bucket; it is observed already."""
        self.exemplars[bisect_left(BOUNDS_NS, elapsed_ns)] = Exemplar(trace_id, elapsed_ns, ended_ns)
