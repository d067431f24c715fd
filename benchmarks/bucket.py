"""What a bucket costs: a take, and a late remote delta on each of its two paths, beside an empty loop in the same run.

    python -m benchmarks.bucket [--json]

Times are of this machine and this moment; the ratios say more. A take should stay within 1 us, a late delta within 3.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

from ratelimit_sidecar.crdt.bucket import Bucket, Entry, Origin
from ratelimit_sidecar.crdt.limit import Limit, Window, WindowLimit
from ratelimit_sidecar.crdt.shares import PARTS
from ratelimit_sidecar.crdt.slot import slot_id
from ratelimit_sidecar.crdt.strict import StrictBucket
from ratelimit_sidecar.crdt.token_bucket import TokenBucket
from ratelimit_sidecar.crdt.window import FixedWindow, SlidingWindow

NOW_US = 1_790_000_000_000_000
ROUNDS = 200_000
REPEATS = 5
HERE, THERE = Origin("here", 1), Origin("there", 1)

# Never empty at one take a microsecond.
LIMIT = Limit(2_000_000, 1_000_000, 2_000_000)


def empty_loop() -> Callable[[int], object]:
    return lambda now_us: now_us


def take_from(bucket: Bucket) -> Callable[[int], object]:
    take = bucket.take
    return lambda now_us: take(1, now_us)


def hear_late(delay_us: int, *, busy: bool) -> Callable[[int], object]:
    """A delta 40 ms old. In a bucket that is never full it simply adds; in one that was, slots may be folded again."""
    limit = LIMIT if busy else Limit(10, 1_000_000, 10)
    bucket = TokenBucket(b"k", limit, HERE, NOW_US, [])
    if busy:
        bucket.take(limit.capacity, NOW_US)
    counts: dict[int, int] = {}

    def hear(now_us: int) -> object:
        slot = slot_id(now_us - delay_us, limit.exponent)
        counts[slot] = counts.get(slot, 0) + 1
        return bucket.merge((Entry(THERE, slot, counts[slot]),), now_us)

    return hear


def measure(step: Callable[[int], object], rounds: int, gap_us: int) -> float:
    """Nanoseconds a step: the least of some repeats, which is the one least disturbed."""
    now_us = NOW_US
    best = float("inf")
    for _ in range(REPEATS):
        started_ns = time.perf_counter_ns()
        for _ in range(rounds):
            now_us += gap_us
            step(now_us)
        best = min(best, (time.perf_counter_ns() - started_ns) / rounds)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the table")
    arguments = parser.parse_args()
    fixed, sliding = (WindowLimit(2**40, 60_000_000, window) for window in Window)
    steps: dict[str, tuple[Callable[[int], object], int, int]] = {
        "empty loop": (empty_loop(), ROUNDS, 1),
        "take, token bucket": (take_from(TokenBucket(b"k", LIMIT, HERE, NOW_US, [])), ROUNDS, 1),
        "take, fixed window": (take_from(FixedWindow(b"k", fixed, HERE, NOW_US, [])), ROUNDS, 1),
        "take, sliding window": (take_from(SlidingWindow(b"k", sliding, HERE, NOW_US, [])), ROUNDS, 1),
        "take, strict": (
            take_from(StrictBucket(b"k", LIMIT, HERE, NOW_US, home=PARTS, from_us=NOW_US - 10_000_000)),
            ROUNDS,
            1,
        ),
        "late delta, added": (hear_late(40_000, busy=True), ROUNDS, 1),
        "late delta, full since": (hear_late(1_500_000, busy=False), ROUNDS // 20, 200_000),
    }
    results = {name: measure(*step) for name, step in steps.items()}
    base = results["empty loop"]
    if arguments.json:
        print(json.dumps({name: {"ns": round(ns, 1), "ratio": round(ns / base, 2)} for name, ns in results.items()}))
        return
    print(f"{'':28}{'ns each':>10}{'x empty loop':>15}")
    for name, ns in results.items():
        print(f"{name:28}{ns:10.0f}{ns / base:15.1f}")


if __name__ == "__main__":
    main()
