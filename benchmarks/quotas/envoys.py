"""Envoys with quotas, on virtual time: what of Envoy's rate limit quota filter its server has to do with.

The simulator and the tests of `limiter.quota` share it. Time goes by in even steps, and not from event to event as in
`simulation`: an Envoy refills its buckets all the time, and nothing here crosses a network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import exp
from random import Random
from typing import Protocol

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.ledger import Ledger
from ratelimit_sidecar.crdt.shares import Membership, Shares
from ratelimit_sidecar.limiter.assignment import REPORT_US, SECOND_US, Assignment
from ratelimit_sidecar.limiter.limiter import Limiter
from ratelimit_sidecar.limiter.quota import Quotas
from ratelimit_sidecar.limiter.quota_pool import Action, Pairs, QuotaStream, Usage
from ratelimit_sidecar.limiter.rules import Rules

PAIR = Membership(1, {"node": 1, "elsewhere": 1})
"""Of strict limits: a half is this node's."""

STEP_US = 50_000
START_US = 1_700_000_000_000_000
DOMAIN = "api"
ADA: Pairs = (("agent", "ada"),)


class Server(Protocol):
    """What an Envoy speaks to: `Quotas`, or something in its place."""

    def open(self, wake: Callable[[], None]) -> QuotaStream: ...
    def close(self, stream: QuotaStream) -> None: ...
    def report(self, stream: QuotaStream, domain: str, usages: Iterable[Usage], now_us: int) -> None: ...
    def take_actions(self, stream: QuotaStream, now_us: int, most: int) -> list[Action]: ...
    def tick(self, now_us: int) -> None: ...


@dataclass(slots=True)
class EnvoyBucket:
    told: Assignment | None = None
    tokens: float = 0.0
    allowed: int = 0
    denied: int = 0
    reported_us: int = 0
    expires_us: int = 0
    owed: float = 0.0
    denies: bool = False
    """What is asked while nothing is assigned."""

    def obey(self, assignment: Assignment, now_us: int, ttl_us: int) -> None:
        self.expires_us = now_us + ttl_us
        before, self.told = self.told, assignment
        if before is not None and before[:2] == assignment[:2]:
            return
        # Envoy keeps how full it is.
        full = self.tokens / before.max_tokens if before is not None and before.max_tokens else 1.0
        self.tokens = assignment.max_tokens * full

    def ask(self, now_us: int) -> None:
        if self.told is not None and self.expires_us <= now_us:
            self.told = None
        told = self.told
        if told is None:
            is_allowed = not self.denies
        elif told.max_tokens:
            is_allowed = self.tokens >= 1
            self.tokens -= is_allowed
        else:
            is_allowed = told.allows_all
        self.allowed += is_allowed
        self.denied += not is_allowed

    def refill(self, elapsed_us: int) -> None:
        told = self.told
        if told is not None and told.fill_interval_s:
            refill = told.tokens_per_fill * elapsed_us / told.fill_interval_s / SECOND_US
            self.tokens = min(told.max_tokens, self.tokens + refill)


@dataclass(slots=True)
class Envoy:
    """A simulated Envoy with the quota filter: it asks for assignments, reports, and admits what it is assigned.

    Args:
        demand: requests a second, by bucket.
        phase_us: when it reports.
        random: by which requests come; None where they come evenly.
    """

    node: Node | None
    demand: dict[Pairs, float]
    phase_us: int = 0
    random: Random | None = None
    buckets: dict[Pairs, EnvoyBucket] = field(default_factory=dict)
    stream: QuotaStream | None = None
    denies: bool = False
    """What is asked while nothing is assigned; otherwise it is let through."""
    is_deaf: bool = False
    """It does not read what it is sent."""
    admitted: int = 0
    forgotten: int = 0

    def lose_stream(self) -> None:
        """Its connection is gone; it connects again when its next report is due."""
        stream, self.stream = self.stream, None
        if stream is not None and self.node is not None:
            self.node.server.close(stream)

    def step(self, now_us: int) -> None:
        for pairs, demand in self.demand.items():
            bucket = self.buckets.get(pairs)
            wanted = self._arrivals(demand) + (bucket.owed if bucket else 0.0)
            if bucket is None:
                if wanted <= 0:
                    continue
                bucket = self.buckets[pairs] = EnvoyBucket(reported_us=now_us, denies=self.denies)
                bucket.ask(now_us)
                wanted -= 1
                self._connect()
                self._report([pairs], now_us)
            bucket.refill(STEP_US)
            while wanted >= 1:
                bucket.ask(now_us)
                wanted -= 1
            bucket.owed = wanted
        if (now_us - self.phase_us) % REPORT_US == 0 and self.buckets:
            self._connect()
            self._report(list(self.buckets), now_us)

    def listen(self, now_us: int) -> None:
        if self.stream is None or self.node is None or self.is_deaf:
            return
        for action in self.node.server.take_actions(self.stream, now_us, 100):
            pairs = next(pairs for pairs in self.buckets if repr(pairs).encode() == action.bucket_id)
            if action.assignment is None:
                self.forgotten += 1
                del self.buckets[pairs]
            else:
                self.buckets[pairs].obey(action.assignment, now_us, self.node.ttl_us)

    def _arrivals(self, demand: float) -> float:
        """In a step."""
        mean = demand * STEP_US / SECOND_US
        if self.random is None:
            return mean
        # Knuth, The Art of Computer Programming, 3.4.1.
        arrivals, product, least = -1, 1.0, exp(-mean)
        while product > least:
            arrivals += 1
            product *= self.random.random()
        return arrivals

    def _connect(self) -> None:
        if self.stream is None and self.node is not None:
            self.stream = self.node.server.open(lambda: None)

    def _report(self, of: list[Pairs], now_us: int) -> None:
        usages = []
        for pairs in of:
            bucket = self.buckets[pairs]
            elapsed_s = (now_us - bucket.reported_us) // SECOND_US
            usages.append(Usage(repr(pairs).encode(), pairs, bucket.allowed, bucket.denied, elapsed_s))
            self.admitted += bucket.allowed
            bucket.reported_us, bucket.allowed, bucket.denied = now_us, 0, 0
        if self.stream is not None and self.node is not None:
            self.node.server.report(self.stream, DOMAIN, usages, now_us)


class Node:
    """A server of quotas.

    Args:
        server: in the place of `quotas`.
        bounds: of `quotas`, by name.
    """

    ttl_us = 20 * SECOND_US

    def __init__(
        self, world: World, rules: Rules, learning_us: int, server: Server | None = None, **bounds: int
    ) -> None:
        # Long in its membership: it has its home share.
        shares = Shares(PAIR, "node", world.now_us - 10 * SECOND_US)
        origin = Origin("node", len(world.nodes) + 1)
        self.ledger = Ledger(shares, origin, rules.strict_limit_of_key)
        self.limiter = Limiter(rules, origin, ledger=self.ledger)
        self.quotas = Quotas(self.limiter, world.now_us, lambda: world.now_us, learning_us=learning_us, **bounds)
        self.server: Server = self.quotas if server is None else server
        self.told: dict[Node, int] = {}


@dataclass
class World:
    """Nodes, of which all tell each other, and Envoys."""

    rules: Rules
    now_us: int = START_US
    nodes: list[Node] = field(default_factory=list)
    envoys: list[Envoy] = field(default_factory=list)
    watch: Callable[[], None] = lambda: None

    def node(self, learning_us: int = 0, server: Server | None = None, **bounds: int) -> Node:
        self.nodes.append(Node(self, self.rules, learning_us, server, **bounds))
        return self.nodes[-1]

    def envoy(self, node: Node | None, demand: float, pairs: Pairs = ADA, phase_us: int = 0) -> Envoy:
        self.envoys.append(Envoy(node, {pairs: demand}, phase_us))
        return self.envoys[-1]

    def run(self, seconds: float) -> list[int]:
        """Returns what each Envoy has admitted meanwhile."""
        before = [_admitted(envoy) for envoy in self.envoys]
        for _ in range(int(seconds * SECOND_US / STEP_US)):
            self.now_us += STEP_US
            for envoy in self.envoys:
                envoy.step(self.now_us)
            for node in self.nodes:
                node.server.tick(self.now_us)
                for peer in self.nodes:
                    if peer is not node:
                        for version, key, groups in node.quotas.demands(peer.told.get(node, 0), 100):
                            peer.told[node] = version
                            peer.quotas.receive(str(id(node)), key, groups, self.now_us)
            for envoy in self.envoys:
                envoy.listen(self.now_us)
            self.watch()
        return [_admitted(envoy) - was for envoy, was in zip(self.envoys, before, strict=True)]

    def assigned(self) -> list[Assignment]:
        """What all Envoys enforce at the moment."""
        told = [bucket.told for envoy in self.envoys for bucket in envoy.buckets.values()]
        return [assignment for assignment in told if assignment is not None]


def _admitted(envoy: Envoy) -> int:
    return envoy.admitted + sum(bucket.allowed for bucket in envoy.buckets.values())
