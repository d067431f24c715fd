"""`eventual`, the sidecar's default: the real buckets, store, outboxes and sessions, frames and all, on virtual time.

Only what moves bytes is simulated: the flush timer, the dialling, and a connection, which ends when the code at either
end says so or has heard nothing for too long. Every pair of regions has one, dialled by the first of the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from benchmarks.admission.policies.policy import FLUSH_US, LocalPolicy, Setup
from benchmarks.replication import do, next_frame
from ratelimit_sidecar.crdt.bucket import Base, Entry, Origin
from ratelimit_sidecar.crdt.limit import AnyLimit, Limit
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.replication.carrier import CHECK_TIME_SECONDS
from ratelimit_sidecar.replication.dialler import CONNECT_SECONDS, FIRST_REDIAL_SECONDS, MAX_REDIAL_SECONDS
from ratelimit_sidecar.replication.replicator import Replicator
from ratelimit_sidecar.replication.session import Local
from ratelimit_sidecar.replication.stream import Stream

KEY = b"the limit"
CHECK_TIME_US = round(CHECK_TIME_SECONDS * 1_000_000)
CONNECT_US = round(CONNECT_SECONDS * 1_000_000)
FIRST_REDIAL_US = round(FIRST_REDIAL_SECONDS * 1_000_000)
MAX_REDIAL_US = round(MAX_REDIAL_SECONDS * 1_000_000)


class Eventual(LocalPolicy):
    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        timeline = setup.timeline
        self._undelivered = 0
        self._admitted = 0
        self.nodes = [_Node(setup, region) for region in setup.regions]
        for node in self.nodes:
            first_us = timeline.now_us + setup.random.randrange(FLUSH_US)
            timeline.every(FLUSH_US, first_us, node.flush)
            timeline.every(CHECK_TIME_US, first_us, node.check_time)
            for peer in self.nodes[node.region + 1 :]:
                _Link(setup, node, peer)

    @property
    def undelivered(self) -> int:
        return self._undelivered

    def take(self, region: int, now_us: int) -> bool:
        node = self.nodes[region]
        admitted = node.store.bucket(KEY, self.setup.limit, now_us).take(1, now_us)
        if admitted:
            self._undelivered = max(self._undelivered, self._admitted - node.admitted - node.store.heard)
            node.admitted += 1
            self._admitted += 1
        return admitted


class _CountingStore(Store):
    """A store that counts what it has heard of the other origins."""

    def __init__(self, origin: Origin, limit: Limit) -> None:
        super().__init__(origin, lambda _key: limit)
        self.heard = 0
        """Tokens of other origins that have ever entered the bucket by their slots."""
        self._counted: dict[tuple[Origin, int], int] = {}

    def join(
        self,
        key: bytes,
        limit: AnyLimit,
        base: Base | None,
        entries: Sequence[Entry],
        now_us: int,
        *,
        replicated: bool = True,
        sender: Origin | None = None,
    ) -> int:
        news = super().join(key, limit, base, entries, now_us, replicated=replicated, sender=sender)
        taken = self._buckets[key].taken
        for origin, slot, tokens in entries:
            # One that came after its slot was sealed has been ignored.
            is_held = taken.get(origin, {}).get(slot, 0) >= tokens
            before = self._counted.get((origin, slot), 0)
            if origin != self.origin and is_held and tokens > before:
                self._counted[origin, slot] = tokens
                self.heard += tokens - before
        return news


class _Node:
    def __init__(self, setup: Setup, region: int) -> None:
        self.region = region
        self.name = setup.network.topology.regions[region]
        self.admitted = 0
        origin = Origin(self.name, 1)
        self.store = _CountingStore(origin, setup.limit)
        self._timeline = setup.timeline
        self.replicator = Replicator(Local(origin, self.name, "simulated"), self.store, setup.timeline.now_us)
        self.ends: list[_End] = []

    def flush(self) -> None:
        do(self.replicator.flush_steps(self._timeline.now_us))
        do(self.replicator.compare_steps(self._timeline.now_us))

    def check_time(self) -> None:
        for end in list(self.ends):
            end.check_time()


class _Link:
    """Dials, for ever: at once when a connection has ended, then with the mesh's random waits between attempts."""

    def __init__(self, setup: Setup, dialler: _Node, listener: _Node) -> None:
        self.setup = setup
        self._dialler = dialler
        self._listener = listener
        self._attempts = 0
        self.dial()

    def dial(self) -> None:
        setup, one, other = self.setup, self._dialler.region, self._listener.region
        if setup.network.is_cut(one, other):
            wait_us = setup.random.randrange(min(MAX_REDIAL_US, FIRST_REDIAL_US << self._attempts))
            self._attempts += 1
            setup.timeline.after(CONNECT_US + wait_us, self.dial)
        else:
            self._attempts = 0
            setup.timeline.after(setup.network.topology.round_trip_us(one, other), self._connect)

    def _connect(self) -> None:
        dialling, listening = _End(self, self._dialler, is_dialled=True), _End(self, self._listener, is_dialled=False)
        dialling.start(listening)
        listening.start(dialling)


class _End:
    """One end of a connection."""

    def __init__(self, link: _Link, node: _Node, *, is_dialled: bool) -> None:
        self._link = link
        self.node = node
        self._is_open = True
        self._is_pumping = False
        self._timeline = link.setup.timeline
        self._stream = Stream(
            node.replicator, "", is_dialled=is_dialled, wake=self._pump_soon, now_us=self._timeline.now_us
        )

    def start(self, other: _End) -> None:
        self._other = other
        self.node.ends.append(self)
        self._pump_soon()

    def check_time(self) -> None:
        self._stream.check_time(self._timeline.now_us)

    def _receive(self, raw: bytes) -> None:
        if self._is_open:
            do(self._stream.receive_steps(raw, self._timeline.now_us))

    def _pump_soon(self) -> None:
        if not self._is_pumping:
            self._is_pumping = True
            self._timeline.at(self._timeline.now_us, self._pump)

    def _pump(self) -> None:
        self._is_pumping = False
        if not self._is_open:
            return
        while (raw := next_frame(self._stream, self._timeline.now_us)) is not None:
            self._link.setup.network.send(self.node.region, self._other.node.region, partial(self._other._receive, raw))
        if self._stream.is_over:
            self._close()

    def _close(self) -> None:
        self._is_open = False
        self.node.ends.remove(self)
        self._stream.lost("the connection has ended", self._timeline.now_us)
        if self._stream.is_dialled:
            self._link.dial()
