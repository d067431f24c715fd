"""Walks over all buckets, step by step while requests are answered: idle ones are dropped, the fullest found."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from math import ceil

import structlog

from ratelimit_sidecar.crdt.ledger import Ledger
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.limiter.fullest import FullestBuckets
from ratelimit_sidecar.limiter.limiter import Limiter

SWEEP_BUCKETS = 167
SWEEP_PASS_SECONDS = 60.0
SWEEP_LEAST_SECONDS, SWEEP_MOST_SECONDS = 0.01, 1.0
"""A sweep step looks at this many buckets in half a millisecond, or at fewer that hold many slots. Steps follow each
other so that a pass over all buckets takes a minute: every 10 ms with a million of them. An idle sidecar hardly wakes
up for it.
"""

FULLEST_BUCKETS = 100
FULLEST_PASS_SECONDS = 10.0
FULLEST_LEAST_SECONDS, FULLEST_MOST_SECONDS = 0.02, 5.0
"""A step looks at this many buckets for how full they are (0.1 ms; 0.8 us each, measured with 200,000). Up to 50,000
buckets take 10 s. A million take over three minutes, in 0.5 % of the loop's time.
"""

_log = structlog.stdlib.get_logger(__name__)


async def sweep(buckets: Store | Ledger, now_us: Callable[[], int], limiter: Limiter) -> None:
    """Drop idle buckets, for ever.

    Args:
        now_us: the clock of the buckets.
        limiter: decides by them.
    """
    left = most = 0
    seconds = SWEEP_LEAST_SECONDS
    while True:
        await asyncio.sleep(seconds)
        if left <= 0:
            left = most = len(buckets)
            _warn_when_full(buckets, limiter)
        # What is dropped during a pass must not make it longer.
        most = max(most, len(buckets))
        step = max(SWEEP_BUCKETS, ceil(most * SWEEP_LEAST_SECONDS / SWEEP_PASS_SECONDS))
        looked = buckets.sweep(now_us(), step)
        left -= looked
        pace = SWEEP_PASS_SECONDS * looked / max(most, 1)
        seconds = max(SWEEP_LEAST_SECONDS, min(SWEEP_MOST_SECONDS, pace)) if looked else SWEEP_MOST_SECONDS


def _warn_when_full(buckets: Store | Ledger, limiter: Limiter) -> None:
    """Log once a pass that a store is full, or has too many slots. Metrics count the decisions of overflow buckets."""
    if isinstance(buckets, Store) and buckets.journal.horizon_shift:
        part = 0.5**buckets.journal.horizon_shift
        _log.warning("too_many_slots", slots=buckets.slots, most_slots=buckets.most_slots, part_of_horizon=part)
    if not buckets.places.is_ample:
        overflowed = sum(limiter.overflow_decisions.values())
        _log.warning(
            "buckets_full", buckets=len(buckets), max_buckets=buckets.places.max_buckets, overflow_decisions=overflowed
        )


async def look_for_fullest(fullest: FullestBuckets, now_us: Callable[[], int], limiter: Limiter) -> None:
    """Find the fullest buckets of the limiter's store, for ever."""
    seconds = FULLEST_LEAST_SECONDS
    while True:
        await asyncio.sleep(seconds)
        looked = fullest.look(limiter.rules, now_us(), FULLEST_BUCKETS)
        pace = FULLEST_PASS_SECONDS * looked / max(len(limiter.store), 1)
        seconds = max(FULLEST_LEAST_SECONDS, min(FULLEST_MOST_SECONDS, pace)) if looked else FULLEST_MOST_SECONDS
