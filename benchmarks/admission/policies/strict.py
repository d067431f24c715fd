"""`strict`, purses: the real buckets and payments of the sidecar, with messages in place of frames. Equal homes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks.admission.policies.policy import FLUSH_US, LocalPolicy, Setup
from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.paying import Ask, Pay, Paying
from ratelimit_sidecar.crdt.shares import home_of
from ratelimit_sidecar.crdt.strict import StrictBucket
from ratelimit_sidecar.replication.session import SILENCE_US

RECONNECT_US = 1_000_000
"""After a cut that has ended a connection: the mesh's waits between attempts are mostly shorter."""


class Strict(LocalPolicy):
    never_exceeds = True

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        timeline, names, limit = setup.timeline, setup.network.topology.regions, setup.limit
        key, weights = b"the limit", dict.fromkeys(names, 1)
        # The regions were started long ago: their homes are full.
        began_us = timeline.now_us - limit.ceiling // limit.tokens - 1_000_000
        self._names = names
        self._most = [home_of(weights, name, key, limit.capacity) for name in names]
        self._purses = [
            Paying(StrictBucket(key, limit, Origin(name, 1), began_us, home=home, from_us=began_us))
            for name, home in zip(names, self._most, strict=True)
        ]
        self._ends = 0
        self._open: list[dict[str, int]] = [{} for _ in names]
        for one in setup.regions:
            for other in range(one):
                self._connect(one, other)
            timeline.every(FLUSH_US, timeline.now_us + setup.random.randrange(FLUSH_US), partial(self._flush, one))
        for cut in setup.network.cuts:
            if cut.ends_connections:
                timeline.at(cut.start_us + SILENCE_US, partial(self._each_parted, cut.parts, self._part))
                timeline.at(cut.end_us + RECONNECT_US, partial(self._each_parted, cut.parts, self._connect))

    def take(self, region: int, now_us: int) -> bool:
        return self._purses[region].bucket.take(1, now_us)

    def _flush(self, region: int) -> None:
        ends = self._open[region]
        asks = self._purses[region].asks(ends, self.setup.timeline.now_us)
        for peer in self.setup.regions:
            if (ask := asks.get(self._names[peer])) is not None:
                end = ends[self._names[peer]]
                self.setup.network.send(region, peer, partial(self._asked, peer, region, end, ask))

    def _asked(self, region: int, peer: int, end: int, ask: Ask) -> None:
        if self._open[region].get(self._names[peer]) == end:
            pay = self._purses[region].answer(self._names[peer], ask, self.setup.timeline.now_us)
            self.setup.network.send(region, peer, partial(self._paid, peer, region, end, pay))

    def _paid(self, region: int, payer: int, end: int, pay: Pay) -> None:
        if self._open[region].get(self._names[payer]) == end:
            now_us = self.setup.timeline.now_us
            self._purses[region].paid(self._names[payer], end, pay, self._most[payer], now_us)

    def _each_parted(self, parts: Callable[[int, int], bool], do: Callable[[int, int], None]) -> None:
        for one in self.setup.regions:
            for other in range(one):
                if parts(one, other):
                    do(one, other)

    def _connect(self, one: int, other: int) -> None:
        self._ends += 1
        self._open[one][self._names[other]] = self._open[other][self._names[one]] = self._ends

    def _part(self, one: int, other: int) -> None:
        for region, peer in ((one, other), (other, one)):
            end = self._open[region].pop(self._names[peer])
            self._purses[region].bucket.closed(end, self.setup.timeline.now_us)
