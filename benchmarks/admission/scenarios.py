"""What is simulated: who asks for how much, over which links, and what goes wrong.

Times are relative to the start of the demand. A *shift* is an instant at which the demand moves to another region; from
then to the next shift, or the end, the demand is above the limit, so a policy can be asked how soon it uses it.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.admission.demand import SECOND_US, Load, bursts, hot_spot, steady
from benchmarks.admission.links import Cut, Topology, azure, uniform
from ratelimit_sidecar.crdt.limit import TokenBucketLimit

MS = 1_000

LIMIT = TokenBucketLimit(100, SECOND_US, 200)
FEW = TokenBucketLimit(5, 60 * SECOND_US, 5)

THREE = uniform(3, 80 * MS)
THREE_REAL = azure("East US", "West Europe", "Southeast Asia")
FIVE = uniform(5, 80 * MS)
FIVE_REAL = azure("East US", "West Europe", "Southeast Asia", "Japan East", "Brazil South")


@dataclass(frozen=True, slots=True)
class Scenario:
    name: str
    title: str
    loads: tuple[Load, ...]
    duration_us: int
    topology: Topology = THREE
    limit: TokenBucketLimit = LIMIT
    loss_per_mille: int = 0
    cuts: tuple[Cut, ...] = ()
    shifts_us: tuple[int, ...] = ()

    @property
    def has_faults(self) -> bool:
        return bool(self.loss_per_mille or self.cuts)


def overload(
    name: str, title: str, limit: TokenBucketLimit, topology: Topology = THREE, *, loss_per_mille: int = 0
) -> Scenario:
    """Ten times the limit, the same in every region, for a minute."""
    regions = len(topology.regions)
    demand = 10 * limit.tokens * SECOND_US // limit.period_us
    even = [demand // regions + (region < demand % regions) for region in range(regions)]
    duration_us = 60 * SECOND_US
    loads = steady(even, 0, duration_us)
    return Scenario(name, title, loads, duration_us, topology, limit, loss_per_mille)


def shift(seconds: int = 20) -> Scenario:
    """Twice the limit, evenly, and then all of it from one region."""
    shift_us, end_us = seconds * SECOND_US, 2 * seconds * SECOND_US
    return Scenario(
        "shift",
        "Twice the limit, even until it all moves to one region; 80 ms links",
        steady([67, 67, 66], 0, shift_us) + steady([200], shift_us, end_us),
        end_us,
        shifts_us=(shift_us,),
    )


def partition(before: int = 20, cut: int = 10, after: int = 30) -> Scenario:
    start_us, heal_us, end_us = (seconds * SECOND_US for seconds in (before, before + cut, before + cut + after))
    return Scenario(
        "partition",
        f"Three times the limit, even; region 3 cut off from the others for {cut} s; 80 ms links",
        steady([100, 100, 100], 0, end_us),
        end_us,
        cuts=(Cut(frozenset({2}), start_us, heal_us),),
    )


def scenarios() -> list[Scenario]:
    """All of the report's."""
    return [
        Scenario(
            "below",
            "Nine tenths of the limit, even; 80 ms links",
            steady([30, 30, 30], 0, 60 * SECOND_US),
            60 * SECOND_US,
        ),
        overload("overload", "Ten times the limit, even; 80 ms links", LIMIT),
        overload(
            "overload-slow",
            "Ten times the limit, even; 80 ms links; 10/s with a burst of 1,000",
            TokenBucketLimit(10, SECOND_US, 1_000),
        ),
        overload(
            "overload-fast",
            "Ten times the limit, even; 80 ms links; 500/s with a burst of 500",
            TokenBucketLimit(500, SECOND_US, 500),
        ),
        overload(
            "overload-lossy",
            "Ten times the limit, even; five real regions; 1 % of messages lost",
            LIMIT,
            FIVE_REAL,
            loss_per_mille=10,
        ),
        Scenario(
            "skewed",
            "Twice the limit, 80 : 15 : 5; three real regions",
            steady([160, 30, 10], 0, 60 * SECOND_US),
            60 * SECOND_US,
            THREE_REAL,
        ),
        shift(),
        Scenario(
            "hot-spot",
            "One and a half times the limit in one region, every 8 s in the next, 2/s in the others; five real regions",
            hot_spot(5, 150, 2, 8 * SECOND_US, 40 * SECOND_US),
            40 * SECOND_US,
            FIVE_REAL,
            shifts_us=tuple(seconds * SECOND_US for seconds in (8, 16, 24, 32)),
        ),
        Scenario(
            "bursts",
            "300 requests within 100 ms, every 4 s in the next region, 10/s in each beside; three real regions",
            steady([10, 10, 10], 0, 60 * SECOND_US) + bursts(3, 300, 4 * SECOND_US, 60 * SECOND_US, at_once=False),
            60 * SECOND_US,
            THREE_REAL,
        ),
        Scenario(
            "bursts-at-once",
            "300 requests within 100 ms in every region at the same time, every 10 s; five real regions",
            bursts(5, 300, 10 * SECOND_US, 60 * SECOND_US, at_once=True),
            60 * SECOND_US,
            FIVE_REAL,
        ),
        partition(),
        Scenario(
            "few-three",
            "Five a minute, asked for twice a second in all three regions; 80 ms links",
            steady([2, 2, 2], 0, 600 * SECOND_US),
            600 * SECOND_US,
            limit=FEW,
        ),
        Scenario(
            "few-five",
            "Five a minute, asked for twice a second in all five regions; 80 ms links",
            steady([2, 2, 2, 2, 2], 0, 600 * SECOND_US),
            600 * SECOND_US,
            FIVE,
            FEW,
        ),
        Scenario(
            "few-rotating",
            "Five a minute, asked for twice a second in one region, every 5 s in the next; 80 ms links",
            hot_spot(3, 2, 0, 5 * SECOND_US, 600 * SECOND_US),
            600 * SECOND_US,
            limit=FEW,
        ),
    ]


def distances() -> list[Scenario]:
    """For `eventual` alone: ten times the limit for ten seconds, over ever longer links."""
    return [
        Scenario(
            f"{delay_ms} ms",
            f"Ten times the limit, even; {delay_ms} ms links",
            steady([334, 333, 333], 0, 10 * SECOND_US),
            10 * SECOND_US,
            uniform(3, delay_ms * MS),
        )
        for delay_ms in (5, 10, 20, 40, 80, 120, 160)
    ]


def quick() -> list[Scenario]:
    """A few seconds of what matters most, to see that the simulator works."""
    return [
        Scenario("overload", "Ten times the limit, even", steady([334, 333, 333], 0, 3 * SECOND_US), 3 * SECOND_US),
        shift(seconds=4),
        partition(before=2, cut=6, after=4),
    ]
