"""Several replicas of one strict bucket on virtual time: demand, delays, losses, cuts, crashes and skewed clocks.

The oracle is outside: every admission of every replica, at its true time, goes through one bucket that never refuses.
Its deficit above the capacity is what was admitted beyond `capacity + rate * T` in some interval.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.lending import Loans
from ratelimit_sidecar.crdt.limit import Limit
from ratelimit_sidecar.crdt.shares import Membership, Shares
from ratelimit_sidecar.crdt.strict import Ask, Grant, Return, StrictBucket

TICK_US = 50_000
START_US = 1_000_000_000


@dataclass
class Replica:
    node: str
    skew_us: int
    shares: Shares
    loans: Loans
    life: int = 1

    @property
    def bucket(self) -> StrictBucket:
        return self.loans.bucket


@dataclass
class StrictCluster:
    """Args:
    delay_us: one way, between any two.
    drift_ppm: how much faster or slower clocks run at most, each drawn from the seed.
    """

    limit: Limit
    nodes: tuple[str, ...] = ("a", "b", "c")
    seed: int = 0
    delay_us: int = 40_000
    loss: float = 0.0
    max_skew_us: int = 0
    drift_ppm: int = 0
    weights: dict[str, int] | None = None
    now_us: int = START_US
    admitted: dict[str, int] = field(default_factory=dict)
    denied: dict[str, int] = field(default_factory=dict)
    cut: set[frozenset[str]] = field(default_factory=set)
    replicas: dict[str, Replica] = field(default_factory=dict)
    most_share: int = 0
    """Most parts in use at one moment by all replicas."""
    most_level: int = 0
    """Most scaled tokens held at one moment by all replicas."""
    worst: int = 0
    """Most scaled tokens beyond `capacity + rate * T` in any interval; 0 keeps the promise."""

    def __post_init__(self) -> None:
        self.random = Random(self.seed)
        self.membership = Membership(1, self.weights or dict.fromkeys(self.nodes, 1))
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._deficit = 0
        self._deficit_us = self.now_us
        self._drift = {node: self.random.randint(-self.drift_ppm, self.drift_ppm) for node in self.nodes}
        for node in self.nodes:
            self.start(node)
            self.at(self.random.randrange(TICK_US), lambda node=node: self._tick(node))

    def clock_us(self, node: str, skew_us: int) -> int:
        elapsed_us = self.now_us - START_US
        return self.now_us + skew_us + elapsed_us * self._drift[node] // 1_000_000

    def at(self, after_us: int, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now_us + after_us, self.random.getrandbits(60), event))

    def run(self, duration_us: int) -> None:
        end_us = self.now_us + duration_us
        while self._events and self._events[0][0] <= end_us:
            self.now_us, _, event = heapq.heappop(self._events)
            event()
        self.now_us = end_us

    def start(self, node: str) -> None:
        """A life of a replica: it remembers nothing."""
        skew_us = self.random.randint(-self.max_skew_us, self.max_skew_us)
        now_us = self.clock_us(node, skew_us)
        shares = Shares(self.membership, node, now_us)
        bucket = StrictBucket(
            b"k",
            self.limit,
            Origin(node, 1),
            now_us,
            home=shares.home_of_key(b"k", self.limit.capacity, shares.from_us),
            from_us=shares.from_us,
        )
        life = self.random.getrandbits(40)
        self.replicas[node] = Replica(node, skew_us, shares, Loans(bucket, self.random.getrandbits(31)), life)

    def crash(self, node: str) -> None:
        del self.replicas[node]
        for replica in self.replicas.values():
            replica.loans.lost(node)

    def take(self, node: str, hits: int = 1) -> bool:
        replica = self.replicas.get(node)
        if replica is None:
            return False
        admitted = replica.bucket.take(hits, self.clock_us(node, replica.skew_us))
        counts = self.admitted if admitted else self.denied
        counts[node] = counts.get(node, 0) + hits
        if admitted:
            self._note(hits)
        return admitted

    def demand(self, node: str, per_second: int, duration_us: int) -> None:
        """Single hits at random instants, `per_second` on average."""
        for _ in range(per_second * duration_us // 1_000_000):
            self.at(self.random.randrange(duration_us), lambda: self.take(node))

    def total_admitted(self) -> int:
        return sum(self.admitted.values())

    def _look(self) -> None:
        """Stricter than the oracle of admissions, as it needs no demand: what the sums of shares and levels come to."""
        buckets = []
        for node, replica in self.replicas.items():
            replica.bucket.advance(self.clock_us(node, replica.skew_us))
            buckets.append(replica.bucket)
        self.most_share = max(self.most_share, sum(bucket.share for bucket in buckets))
        self.most_level = max(self.most_level, sum(max(0, bucket.level) for bucket in buckets))

    def _note(self, hits: int) -> None:
        elapsed_us = self.now_us - self._deficit_us
        self._deficit = max(0, self._deficit - elapsed_us * self.limit.tokens) + hits * self.limit.period_us
        self._deficit_us = self.now_us
        self.worst = max(self.worst, self._deficit - self.limit.ceiling)

    def _tick(self, node: str) -> None:
        self.at(TICK_US, lambda: self._tick(node))
        self._look()
        replica = self.replicas.get(node)
        if replica is None:
            return
        now_us = self.clock_us(node, replica.skew_us)
        homes = {
            other: peer.shares.home(peer.shares.from_us)
            for other, peer in self.replicas.items()
            if other != node and frozenset((node, other)) not in self.cut
        }
        asks, returns = replica.loans.ask(homes, now_us)
        for lender, returned in returns.items():
            self._send(node, lender, returned)
        for lender, ask in asks.items():
            self._send(node, lender, ask)

    def _send(self, source: str, target: str, message: Ask | Grant | Return) -> None:
        lives = self.replicas[source].life, self.replicas[target].life if target in self.replicas else 0
        if self.random.random() < self.loss:
            return
        self.at(self.delay_us, lambda: self._receive(source, target, lives, message))

    def _receive(self, source: str, target: str, lives: tuple[int, int], message: Ask | Grant | Return) -> None:
        replica = self.replicas.get(target)
        # A stream ends with either process, and with a cut.
        if replica is None or replica.life != lives[1] or frozenset((source, target)) in self.cut:
            return
        now_us = self.clock_us(target, replica.skew_us)
        if isinstance(message, Ask):
            grant = replica.loans.answer(source, message, now_us)
            if source in self.replicas and self.replicas[source].life == lives[0]:
                self._send(target, source, grant)
        elif isinstance(message, Grant):
            replica.loans.granted(source, message, now_us)
        else:
            replica.loans.returned(source, message, now_us)
        self._look()
