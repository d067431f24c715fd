"""What many buckets cost: memory for each, and the longest pauses while they come, are swept and go.

    python -m benchmarks.store [BUCKETS] [--json]

A pause is one call: creating a bucket (a dict that grows copies itself) or one step of the sweep as the sidecar makes
it.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from math import ceil
from pathlib import Path

from ratelimit_sidecar.app import GC_THRESHOLDS
from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.limit import TokenBucketLimit
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.limiter.key import KEY_ONLY, TOKEN_BUCKET, KeyEntry, encode_bucket_key
from ratelimit_sidecar.upkeep import SWEEP_LEAST_SECONDS, SWEEP_PASS_SECONDS

NOW_US = 1_790_000_000_000_000
LIMIT = TokenBucketLimit(10, 1_000_000, 100)


def resident_bytes() -> int:
    fields = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return int(fields[1]) * 4_096


def run(buckets: int) -> dict[str, float]:
    """Times in milliseconds, memory in bytes a bucket."""
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    store = Store(Origin("here", 1), lambda _key: LIMIT, max_buckets=buckets)
    before = resident_bytes()
    longest_create_ns = 0
    now_us = NOW_US
    for number in range(buckets):
        key = encode_bucket_key(TOKEN_BUCKET, "api", [KeyEntry(KEY_ONLY, "user", f"user-{number}")])
        now_us += 1
        started_ns = time.perf_counter_ns()
        store.bucket(key, LIMIT, now_us).take(1, now_us)
        longest_create_ns = max(longest_create_ns, time.perf_counter_ns() - started_ns)
        if number % 1_000 == 0:
            store.drain_changes()
    store.drain_changes()
    used = resident_bytes() - before
    step = ceil(buckets * SWEEP_LEAST_SECONDS / SWEEP_PASS_SECONDS)
    kept_ns = sweep(store, now_us, step)
    dropped_ns = sweep(store, now_us + 3 * LIMIT.horizon_us, step)
    assert len(store) == 0
    return {
        "buckets": buckets,
        "bytes a bucket": round(used / buckets),
        "longest creation, ms": longest_create_ns / 1e6,
        "buckets a sweep step": step,
        "longest step, all kept, ms": max(kept_ns) / 1e6,
        "mean step, all kept, ms": sum(kept_ns) / len(kept_ns) / 1e6,
        "longest step, all dropped, ms": max(dropped_ns) / 1e6,
    }


def sweep(store: Store, now_us: int, step: int) -> list[int]:
    """One pass; nanoseconds of each step."""
    times_ns = []
    for _ in range(ceil(len(store) / step) + 1):
        started_ns = time.perf_counter_ns()
        store.sweep(now_us, step)
        times_ns.append(time.perf_counter_ns() - started_ns)
    while len(store) and store.sweep(now_us, step):
        pass
    return times_ns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("buckets", nargs="?", type=int, default=1_000_000)
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the table")
    arguments = parser.parse_args()
    results = run(arguments.buckets)
    if arguments.json:
        print(json.dumps(results))
        return
    for name, value in results.items():
        print(f"{name:32}{value:14,.3f}" if isinstance(value, float) else f"{name:32}{value:14,}")


if __name__ == "__main__":
    main()
