"""What replication costs: bytes on the links and processor time, by how many buckets the same hits are spread over.

    python -m benchmarks.replication [--hits 50000] [--seconds 5] [--buckets 1 100 1000 10000] [--json]

Three regions admit `--hits` a second together and tell each other every 20 ms, as sidecars do, over links of 40 ms on a
virtual clock, so bytes do not depend on this machine. Counted are frames of all kinds, before HTTP/2 and TLS; what is
sent once for each bucket goes in a warm-up before. CPU is the time spent in flushing, encoding, decoding and applying,
for each virtual second: the share of one processor that replication takes from each sidecar. So that nothing else is
counted, the clock goes by ticks, and not by the events of `simulation`.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections import deque
from dataclasses import asdict, dataclass
from itertools import combinations, permutations
from random import Random

from ratelimit_sidecar.app import GC_THRESHOLDS
from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.limit import TokenBucketLimit
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.limiter.key import KEY_ONLY, TOKEN_BUCKET, KeyEntry, encode_bucket_key
from ratelimit_sidecar.replication.bounds import DEFAULT_BOUNDS
from ratelimit_sidecar.replication.replicator import Replicator
from ratelimit_sidecar.replication.session import LocalNode
from ratelimit_sidecar.replication.stream import Stream
from ratelimit_sidecar.replication.wire import PROTOCOL
from simulation.steps import done, next_frame

REGIONS = ("us-east-1", "eu-west-2", "ap-southeast-1")
LINKS = len(list(combinations(REGIONS, 2)))
NOW_US = 1_790_000_000_000_000
SECOND_US = 1_000_000
FLUSH_US = round(DEFAULT_BOUNDS.flush * SECOND_US)
DELAY_US = 40_000
CHECK_TIME_US = 250_000
WARM_UP_US = 2 * SECOND_US

BUCKETS = (1, 100, 1_000, 10_000)
HITS = 50_000
SECONDS = 5


@dataclass(frozen=True, slots=True)
class Cost:
    """What replication costs at a rate of hits: bytes on the links, and processor time.

    Args:
        hits: admitted while it was measured, in all regions; each was told to all other regions.
        bytes_a_hit: on one link, in both directions, for each hit admitted in one of its two regions.
        link_bytes_a_second: on one link, both directions together; the mean of all links.
        entries_a_second: slots of buckets told on one link.
        cpu_share: of one processor, for one sidecar.
    """

    buckets: int
    hits: int
    bytes_a_hit: float
    link_bytes_a_second: float
    entries_a_second: float
    cpu_share: float


class Stopwatch:
    """Adds up the processor time of the blocks under it: `with stopwatch: ...`."""

    def __init__(self) -> None:
        self.spent_ns = 0

    def __enter__(self) -> None:
        self.spent_ns -= time.thread_time_ns()

    def __exit__(self, *_: object) -> None:
        self.spent_ns += time.thread_time_ns()


class Region:
    """A sidecar's store and replicator."""

    def __init__(self, name: str, limit: TokenBucketLimit) -> None:
        self.store = Store(Origin(name, 1), lambda _key: limit)
        self.replicator = Replicator(LocalNode(self.store.origin, name, "0"), self.store, NOW_US)
        self.replicator.use_rules(1)

    @property
    def entries_sent(self) -> int:
        return sum(peer.counts.entries_sent for peer in self.replicator.peers.values())


class Mesh:
    """One connection for each link. Frames arrive `DELAY_US` after they were sent."""

    def __init__(self, regions: list[Region]) -> None:
        self.regions = regions
        self.now_us = NOW_US
        self.bytes_sent = 0
        self.stopwatch = Stopwatch()
        self._on_the_way: deque[tuple[int, Stream, bytes]] = deque()
        self._other_end: dict[Stream, Stream] = {}
        for dialler, listener in combinations(regions, 2):
            ends = [self._end(dialler, is_dialled=True), self._end(listener, is_dialled=False)]
            for end, other in permutations(ends):
                self._other_end[end] = other
        self._send()

    def tick(self) -> None:
        """`FLUSH_US` go by."""
        self.now_us += FLUSH_US
        while self._on_the_way and self._on_the_way[0][0] <= self.now_us:
            _, stream, raw = self._on_the_way.popleft()
            with self.stopwatch:
                done(stream.receive_steps(raw, self.now_us))
            assert stream.error is None, stream.error
        with self.stopwatch:
            for region in self.regions:
                done(region.replicator.flush_steps(self.now_us))
                done(region.replicator.compare_steps(self.now_us))
            if self.now_us % CHECK_TIME_US < FLUSH_US:
                for stream in self._other_end:
                    stream.check_time(self.now_us)
        self._send()

    def _end(self, owner: Region, *, is_dialled: bool) -> Stream:
        return Stream(owner.replicator, "", is_dialled=is_dialled, wake=lambda: None, now_us=self.now_us)

    def _send(self) -> None:
        for stream, other in self._other_end.items():
            while True:
                with self.stopwatch:
                    raw = next_frame(stream, self.now_us)
                if raw is None:
                    break
                self.bytes_sent += len(raw)
                self._on_the_way.append((self.now_us + DELAY_US, other, raw))


def measure(buckets: int, hits_a_second: int, seconds: int, seed: int = 1) -> Cost:
    """The same arguments give the same bytes."""
    random = Random(seed)
    # Twice of what is asked for: so all is admitted, and as many slots are written as at any limit that is in use.
    a_second = max(1, 2 * hits_a_second // buckets)
    limit = TokenBucketLimit(a_second, SECOND_US, 2 * a_second)
    keys = [
        encode_bucket_key(TOKEN_BUCKET, "api", [KeyEntry(KEY_ONLY, "user", f"user-{number}")])
        for number in range(buckets)
    ]
    regions = [Region(name, limit) for name in REGIONS]
    mesh = Mesh(regions)
    hits_a_tick = hits_a_second * FLUSH_US // (SECOND_US * len(regions))

    def run(ticks: int) -> int:
        admitted = 0
        for _ in range(ticks):
            for region in regions:
                for _ in range(hits_a_tick):
                    at_us = mesh.now_us + random.randrange(FLUSH_US)
                    bucket = region.store.bucket(random.choice(keys), limit, at_us)
                    admitted += bucket.take(1, at_us)
            mesh.tick()
        return admitted

    run(WARM_UP_US // FLUSH_US)
    bytes_before, entries_before = mesh.bytes_sent, sum(region.entries_sent for region in regions)
    mesh.stopwatch.spent_ns = 0
    hits = run(seconds * SECOND_US // FLUSH_US)
    sent = mesh.bytes_sent - bytes_before
    entries = sum(region.entries_sent for region in regions) - entries_before
    _check_all_arrived(mesh, keys)
    return Cost(
        buckets=buckets,
        hits=hits,
        # Each hit is told on two links.
        bytes_a_hit=sent / (2 * hits),
        link_bytes_a_second=sent / LINKS / seconds,
        entries_a_second=entries / LINKS / seconds,
        cpu_share=mesh.stopwatch.spent_ns / 1e9 / seconds / len(regions),
    )


def _check_all_arrived(mesh: Mesh, keys: list[bytes]) -> None:
    for _ in range(4 * DELAY_US // FLUSH_US):
        mesh.tick()
    first, *others = (region.store for region in mesh.regions)
    for key in keys:
        bucket = first.get(key)
        taken = {} if bucket is None else bucket.taken
        for store in others:
            other = store.get(key)
            assert ({} if other is None else other.taken) == taken, "the regions do not hold the same"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--hits", type=int, default=HITS, help="a second, in all regions together (default: %(default)s)"
    )
    parser.add_argument("--seconds", type=int, default=SECONDS, help="virtual ones (default: %(default)s)")
    parser.add_argument("--buckets", type=int, nargs="+", default=BUCKETS, help="that the hits are spread over")
    parser.add_argument("--json", action="store_true", help="one JSON array in place of the table")
    arguments = parser.parse_args()
    gc.set_threshold(*GC_THRESHOLDS)
    costs = [measure(buckets, arguments.hits, arguments.seconds) for buckets in arguments.buckets]
    if arguments.json:
        print(json.dumps([asdict(cost) for cost in costs]))
        return
    print(f"{arguments.hits:,} hits a second over {len(REGIONS)} regions, protocol {PROTOCOL}")
    print(f"{'hot buckets':>12}{'bytes a hit':>14}{'kB/s a link':>14}{'entries/s a link':>18}{'CPU share':>12}")
    for cost in costs:
        print(
            f"{cost.buckets:12,}{cost.bytes_a_hit:14.2f}{cost.link_bytes_a_second / 1e3:14,.0f}"
            f"{cost.entries_a_second:18,.0f}{cost.cpu_share:12.1%}"
        )


if __name__ == "__main__":
    main()
