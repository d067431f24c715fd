"""Virtual time, and links between regions on it.

A link keeps order and loses nothing, as TCP does: what is lost is sent again, and what was sent after it waits. During
a short cut everything waits; a cut longer than a session bears silence ends the connection, and what was on its way is
gone.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from itertools import count
from random import Random
from typing import NamedTuple

from benchmarks.admission.links import Topology
from ratelimit_sidecar.replication.session import SILENCE_US


class Timeline:
    """What happens when, one after the other; at the same instant in the order it was said."""

    def __init__(self, start_us: int) -> None:
        self.now_us = start_us
        self._actions: list[tuple[int, int, Callable[[], None]]] = []
        self._order = count()

    def at(self, time_us: int, action: Callable[[], None]) -> None:
        heapq.heappush(self._actions, (time_us, next(self._order), action))

    def after(self, delay_us: int, action: Callable[[], None]) -> None:
        self.at(self.now_us + delay_us, action)

    def every(self, period_us: int, first_us: int, action: Callable[[], None]) -> None:
        def run() -> None:
            action()
            self.at(self.now_us + period_us, run)

        self.at(first_us, run)

    def run_until(self, time_us: int) -> None:
        """Carry out everything up to and including `time_us`."""
        actions = self._actions
        while actions and actions[0][0] <= time_us:
            self.now_us, _, action = heapq.heappop(actions)
            action()
        self.now_us = time_us


class Cut(NamedTuple):
    """No way between `isolated` regions and the others, from `start_us` up to `end_us`."""

    isolated: frozenset[int]
    start_us: int
    end_us: int

    def parts(self, one: int, other: int) -> bool:
        return (one in self.isolated) is not (other in self.isolated)

    def later(self, by_us: int) -> Cut:
        return Cut(self.isolated, self.start_us + by_us, self.end_us + by_us)

    @property
    def ends_connections(self) -> bool:
        return self.end_us - self.start_us >= SILENCE_US


class Network:
    """Args:
    loss_per_mille: of all messages; each is lost again with the same probability when it is sent again.
    """

    def __init__(
        self, timeline: Timeline, topology: Topology, random: Random, loss_per_mille: int, cuts: Sequence[Cut]
    ) -> None:
        self.topology = topology
        self.cuts = cuts
        self._timeline = timeline
        self._random = random
        self._loss_per_mille = loss_per_mille
        regions = len(topology.regions)
        self._last_arrival_us = [[0] * regions for _ in range(regions)]
        self.longest_us = [list(delays) for delays in topology.one_way_us]
        """From region to region, the longest that a message was on its way."""

    def send(self, origin: int, target: int, deliver: Callable[[], None]) -> None:
        """Call `deliver` when the message arrives; never, when its connection ends before."""
        sent_us = self._timeline.now_us
        one_way_us = self.topology.one_way_us[origin][target]
        arrival_us = sent_us + one_way_us
        if self._loss_per_mille:
            while self._random.randrange(1_000) < self._loss_per_mille:
                arrival_us += self._recovery_us(origin, target)
        for cut in self.cuts:
            if cut.parts(origin, target) and cut.start_us < arrival_us and sent_us < cut.end_us:
                if cut.ends_connections:
                    return
                arrival_us = max(arrival_us, cut.end_us + one_way_us)
        arrival_us = max(arrival_us, self._last_arrival_us[origin][target])
        self._last_arrival_us[origin][target] = arrival_us
        self.longest_us[origin][target] = max(self.longest_us[origin][target], arrival_us - sent_us)
        self._timeline.at(arrival_us, deliver)

    def _recovery_us(self, origin: int, target: int) -> int:
        """How much later a lost message arrives while others follow it: what is acknowledged a round trip later shows
        the gap, and a quarter of one more is left for reordering (RACK, RFC 8985).
        """
        return self.topology.round_trip_us(origin, target) * 5 // 4

    def is_cut(self, one: int, other: int) -> bool:
        now_us = self._timeline.now_us
        return any(cut.parts(one, other) and cut.start_us <= now_us < cut.end_us for cut in self.cuts)
