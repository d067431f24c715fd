"""What a bucket costs: a take, and a late remote delta, beside an empty loop in the same run.

    python -m benchmarks.bucket [--json]

Then the same delta in buckets with a real load, from this replica and two peers: there most deltas come after refill
was spilled, and how many of them have all slots folded again depends on how the events mix.

Times are of this machine and this moment; the ratios say more. A take should stay within 1 us, a late delta within 3.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

from ratelimit_sidecar.crdt.bucket import Bucket, Entry, Origin
from ratelimit_sidecar.crdt.journal import Journal
from ratelimit_sidecar.crdt.limit import TokenBucketLimit, Window, WindowLimit
from ratelimit_sidecar.crdt.shares import TOKEN
from ratelimit_sidecar.crdt.slot import slot_id
from ratelimit_sidecar.crdt.strict import StrictBucket
from ratelimit_sidecar.crdt.token_bucket import TokenBucket
from ratelimit_sidecar.crdt.window import FixedWindow, SlidingWindow

NOW_US = 1_790_000_000_000_000
ROUNDS = 200_000
REPEATS = 5
HERE, THERE = Origin("here", 1), Origin("there", 1)

SECOND_US = 1_000_000
FLUSH_US = 20_000
"""Peers tell what is new this often."""
DELAYS_US = (20_000, 100_000)
"""Between a flush and its arrival."""
MIXED_SECONDS = 60
MIXED_LIMITS = {"1000/s, capacity 100": (1_000, 100), "100/s, capacity 1000": (100, 1_000)}
MIXED_LOADS = (0.1, 0.3, 0.9)
"""Of what the limit refills, taken by all replicas together."""

# Never empty at one take a microsecond.
LIMIT = TokenBucketLimit(2_000_000, 1_000_000, 2_000_000)


def empty_loop() -> Callable[[int], object]:
    return lambda now_us: now_us


def take_from(bucket: Bucket) -> Callable[[int], object]:
    take = bucket.take
    return lambda now_us: take(1, now_us)


def heard_late() -> Bucket:
    """A bucket that keeps what is spilled, which at each take is something."""
    bucket = TokenBucket(b"k", LIMIT, HERE, NOW_US, Journal())
    bucket.merge((Entry(THERE, slot_id(NOW_US - 1_000_000, LIMIT.exponent), 1),), NOW_US)
    return bucket


def hear_late(delay_us: int, *, busy: bool) -> Callable[[int], object]:
    """In a bucket that is not full in between a delta simply adds; else spilled refill pays. Half a microsecond of it
    is making the delta.
    """
    limit = LIMIT if busy else TokenBucketLimit(10, 1_000_000, 10)
    bucket = TokenBucket(b"k", limit, HERE, NOW_US, Journal())
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


@dataclass(frozen=True, slots=True)
class Mixed:
    """Late deltas in a bucket with a load."""

    deltas: int
    refolds: int
    """Times that all slots were folded again, for whatever reason."""
    mean_us: float
    p99_us: float


class CountingBucket(TokenBucket):
    refolds = 0

    def _recount(self) -> None:
        self.refolds += 1
        super()._recount()


def takes_of(rng: random.Random, per_second: float) -> Iterable[int]:
    """Instants of single takes at random, as microseconds from the start."""
    at_us = rng.expovariate(per_second) * SECOND_US
    while at_us < MIXED_SECONDS * SECOND_US:
        yield int(at_us)
        at_us += rng.expovariate(per_second) * SECOND_US


def deltas_of(rng: random.Random, peer: Origin, per_second: float, exponent: int) -> Iterable[tuple[int, Entry]]:
    """What a peer tells of its takes, and when it arrives."""
    counts: dict[int, int] = {}
    changed: dict[int, set[int]] = {}
    takes_us = list(takes_of(rng, per_second))
    for taken_us in takes_us:
        changed.setdefault(taken_us // FLUSH_US, set()).add(slot_id(NOW_US + taken_us, exponent))
    next_take = 0
    for flush, slots in changed.items():
        flushed_us = (flush + 1) * FLUSH_US
        while next_take < len(takes_us) and takes_us[next_take] < flushed_us:
            slot = slot_id(NOW_US + takes_us[next_take], exponent)
            counts[slot] = counts.get(slot, 0) + 1
            next_take += 1
        for slot in slots:
            yield flushed_us + rng.randint(*DELAYS_US), Entry(peer, slot, counts[slot])


def mixed_load(limit: TokenBucketLimit, load: float) -> Mixed:
    """A third of the load is taken here, the others by two peers."""
    rng = random.Random(1)
    per_second = load * limit.tokens / limit.period_us * SECOND_US / 3
    events: list[tuple[int, Entry | None]] = [(at_us, None) for at_us in takes_of(rng, per_second)]
    for node in ("there", "elsewhere"):
        events += deltas_of(rng, Origin(node, 1), per_second, limit.exponent)
    events.sort(key=lambda event: event[0])
    bucket = CountingBucket(b"k", limit, HERE, NOW_US, Journal())
    times_ns = []
    for at_us, entry in events:
        if entry is None:
            bucket.take(1, NOW_US + at_us)
            continue
        entries = (entry,)
        started_ns = time.perf_counter_ns()
        bucket.merge(entries, NOW_US + at_us)
        times_ns.append(time.perf_counter_ns() - started_ns)
    times_ns.sort()
    return Mixed(
        deltas=len(times_ns),
        refolds=bucket.refolds,
        mean_us=sum(times_ns) / len(times_ns) / 1e3,
        p99_us=times_ns[len(times_ns) * 99 // 100] / 1e3,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the table")
    arguments = parser.parse_args()
    fixed, sliding = (WindowLimit(2**40, 60_000_000, window) for window in Window)
    steps: dict[str, tuple[Callable[[int], object], int, int]] = {
        "empty loop": (empty_loop(), ROUNDS, 1),
        "take, token bucket": (take_from(TokenBucket(b"k", LIMIT, HERE, NOW_US, Journal())), ROUNDS, 1),
        "take, once late deltas came": (take_from(heard_late()), ROUNDS, 1),
        "take, fixed window": (take_from(FixedWindow(b"k", fixed, HERE, NOW_US, Journal())), ROUNDS, 1),
        "take, sliding window": (take_from(SlidingWindow(b"k", sliding, HERE, NOW_US, Journal())), ROUNDS, 1),
        "take, strict": (
            take_from(
                StrictBucket(b"k", LIMIT, HERE, NOW_US, home=LIMIT.capacity * TOKEN, from_us=NOW_US - 10_000_000)
            ),
            ROUNDS,
            1,
        ),
        "late delta, added": (hear_late(40_000, busy=True), ROUNDS, 1),
        "late delta, full since": (hear_late(1_500_000, busy=False), ROUNDS // 20, 200_000),
    }
    results = {name: measure(*step) for name, step in steps.items()}
    base = results["empty loop"]
    mixed = {
        f"{name}, load {load:.0%}": mixed_load(TokenBucketLimit(tokens, SECOND_US, capacity), load)
        for name, (tokens, capacity) in MIXED_LIMITS.items()
        for load in MIXED_LOADS
    }
    if arguments.json:
        steps_json = {name: {"ns": round(ns, 1), "ratio": round(ns / base, 2)} for name, ns in results.items()}
        print(json.dumps(steps_json | {name: asdict(load) for name, load in mixed.items()}))
        return
    print(f"{'':28}{'ns each':>10}{'x empty loop':>15}")
    for name, ns in results.items():
        print(f"{name:28}{ns:10.0f}{ns / base:15.1f}")
    print(f"\n{'late deltas amid takes':34}{'deltas':>8}{'refolds':>9}{'share':>8}{'mean us':>9}{'p99 us':>9}")
    for name, load in mixed.items():
        share = load.refolds / load.deltas
        print(f"{name:34}{load.deltas:8}{load.refolds:9}{share:8.1%}{load.mean_us:9.2f}{load.p99_us:9.1f}")


if __name__ == "__main__":
    main()
