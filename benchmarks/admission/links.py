"""How long the way between regions is, and when there is none.

`AZURE_RTT_MS` are measurements: the 95th percentile of round trips between Azure regions over the 30 days up to
2026-07-30, as published by Microsoft ("Azure network round-trip latency statistics",
learn.microsoft.com/azure/networking/azure-network-latency). That table has a number for each direction; here is the
larger of the two. A one-way delay is taken as half a round trip.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations

from ratelimit_sidecar.replication.session import SILENCE_US
from simulation.network import Way, Ways

AZURE_RTT_MS = {
    ("East US", "West Europe"): 91,
    ("East US", "Southeast Asia"): 229,
    ("East US", "Japan East"): 165,
    ("East US", "Brazil South"): 121,
    ("West Europe", "Southeast Asia"): 182,
    ("West Europe", "Japan East"): 242,
    ("West Europe", "Brazil South"): 191,
    ("Southeast Asia", "Japan East"): 74,
    ("Southeast Asia", "Brazil South"): 337,
    ("Japan East", "Brazil South"): 275,
}


@dataclass(frozen=True, slots=True)
class Topology:
    """Regions, and how far they are from each other.

    Args:
        regions: their names.
        one_way_us: `one_way_us[a][b]` is the time from region a to region b; the same both ways.
    """

    regions: tuple[str, ...]
    one_way_us: tuple[tuple[int, ...], ...]

    def ways(self, loss_per_mille: int) -> Ways:
        """The ways of a simulated network between these regions.

        Args:
            loss_per_mille: of all messages.
        """
        return {
            (one, other): Way(self.one_way_us[source][target], loss=loss_per_mille / 1_000)
            for (source, one), (target, other) in permutations(enumerate(self.regions), 2)
        }


@dataclass(frozen=True, slots=True)
class Cut:
    """No way between `isolated` regions and the others, from `start_us` up to `end_us`."""

    isolated: frozenset[int]
    start_us: int
    end_us: int

    @property
    def ends_connections(self) -> bool:
        return self.end_us - self.start_us >= SILENCE_US


def uniform(regions: int, one_way_us: int) -> Topology:
    """Regions that are all equally far from each other."""
    names = tuple(f"region {number + 1}" for number in range(regions))
    return _topology(names, lambda _one, _other: one_way_us)


def azure(*regions: str) -> Topology:
    """Regions by the names in `AZURE_RTT_MS`."""

    def one_way_us(one: str, other: str) -> int:
        round_trip_ms = AZURE_RTT_MS.get((one, other)) or AZURE_RTT_MS[other, one]
        return round_trip_ms * 1_000 // 2

    return _topology(regions, one_way_us)


def _topology(regions: tuple[str, ...], one_way_us: Callable[[str, str], int]) -> Topology:
    return Topology(
        regions,
        tuple(tuple(0 if one == other else one_way_us(one, other) for other in regions) for one in regions),
    )
