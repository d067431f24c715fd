"""`strict`, shares and loans: the real buckets and lending of the sidecar, with messages in place of frames.

Equal home shares. Every flush each region looks at its demand and asks, returns or answers as `crdt/lending.py` says.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from benchmarks.admission.policies.policy import FLUSH_US, LocalPolicy, Setup
from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.lending import Loans
from ratelimit_sidecar.crdt.shares import LOAN_US, home_parts, home_parts_of_key
from ratelimit_sidecar.crdt.strict import Ask, Grant, Return, StrictBucket
from ratelimit_sidecar.replication.session import SILENCE_US

RECONNECT_US = 1_000_000
"""After a cut that has ended a connection: the mesh's waits between attempts are mostly shorter."""


class Strict(LocalPolicy):
    never_exceeds = True

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        timeline, names = setup.timeline, setup.network.topology.regions
        key, weights = b"the limit", dict.fromkeys(names, 1)
        home = home_parts(weights, names[0])
        # The regions were started long ago: their shares are theirs, and full.
        limit = setup.limit
        began_us = timeline.now_us - limit.ceiling // limit.tokens - 2 * LOAN_US
        homes = [home_parts_of_key(weights, name, key, limit.capacity) for name in names]
        self._buckets = [
            StrictBucket(key, limit, Origin(name, 1), began_us, home=each, from_us=began_us)
            for name, each in zip(names, homes, strict=True)
        ]
        self._loans = [Loans(bucket, setup.random.getrandbits(31)) for bucket in self._buckets]
        self._homes = [{peer: home for peer in names if peer != name} for name in names]
        for region in setup.regions:
            timeline.every(FLUSH_US, timeline.now_us + setup.random.randrange(FLUSH_US), partial(self._flush, region))
        for cut in setup.network.cuts:
            if cut.ends_connections:
                timeline.at(cut.start_us + SILENCE_US, partial(self._part, cut.parts))
                timeline.at(cut.end_us + RECONNECT_US, partial(self._rejoin, cut.parts, home))

    def take(self, region: int, now_us: int) -> bool:
        return self._buckets[region].take(1, now_us)

    def _flush(self, region: int) -> None:
        names, network = self.setup.network.topology.regions, self.setup.network
        asks, returns = self._loans[region].ask(self._homes[region], self.setup.timeline.now_us)
        for peer in self.setup.regions:
            if (ask := asks.get(names[peer])) is not None:
                network.send(region, peer, partial(self._asked, peer, region, ask))
            if (returned := returns.get(names[peer])) is not None:
                network.send(region, peer, partial(self._returned, peer, names[region], returned))

    def _asked(self, region: int, borrower: int, ask: Ask) -> None:
        names, now_us = self.setup.network.topology.regions, self.setup.timeline.now_us
        grant = self._loans[region].answer(names[borrower], ask, now_us)
        self.setup.network.send(region, borrower, partial(self._granted, borrower, names[region], grant))

    def _granted(self, region: int, lender: str, grant: Grant) -> None:
        self._loans[region].granted(lender, grant, self.setup.timeline.now_us)

    def _returned(self, region: int, borrower: str, returned: Return) -> None:
        self._loans[region].returned(borrower, returned, self.setup.timeline.now_us)

    def _part(self, parts: Callable[[int, int], bool]) -> None:
        for one in self.setup.regions:
            for other in self.setup.regions:
                if parts(one, other):
                    name = self.setup.network.topology.regions[other]
                    del self._homes[one][name]
                    self._loans[one].lost(name)

    def _rejoin(self, parts: Callable[[int, int], bool], home: int) -> None:
        for one in self.setup.regions:
            for other in self.setup.regions:
                if parts(one, other):
                    self._homes[one][self.setup.network.topology.regions[other]] = home
