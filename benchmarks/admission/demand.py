"""Who asks when: requests drawn from a seed, each for one token.

A load puts a fixed number of requests at random instants of its span, which is a Poisson process given its count: as
irregular as independent clients are, but with the same total for every seed. Integers only, so that no platform's
floating point can move a request.
"""

from __future__ import annotations

from collections.abc import Iterable
from random import Random
from typing import NamedTuple

SECOND_US = 1_000_000


class Request(NamedTuple):
    at_us: int
    region: int


class Load(NamedTuple):
    """`per_second` requests a second to one region, from `start_us` up to `end_us`."""

    region: int
    start_us: int
    end_us: int
    per_second: int


def draw(loads: Iterable[Load], random: Random) -> list[Request]:
    """The requests of all `loads`, in time order."""
    requests = [
        Request(random.randrange(load.start_us, load.end_us), load.region)
        for load in loads
        for _ in range(load.per_second * (load.end_us - load.start_us) // SECOND_US)
    ]
    requests.sort()
    return requests


def steady(per_second: Iterable[int], start_us: int, end_us: int) -> tuple[Load, ...]:
    """A load for each region."""
    return tuple(Load(region, start_us, end_us, rate) for region, rate in enumerate(per_second) if rate)


def hot_spot(regions: int, hot: int, background: int, stay_us: int, end_us: int) -> tuple[Load, ...]:
    """`hot` requests a second to one region, which every `stay_us` is the next; `background` to each of the others."""
    return tuple(
        Load(region, start_us, start_us + stay_us, hot if region == start_us // stay_us % regions else background)
        for start_us in range(0, end_us, stay_us)
        for region in range(regions)
    )


def bursts(
    regions: int, requests: int, every_us: int, end_us: int, *, at_once: bool, length_us: int = 100_000
) -> tuple[Load, ...]:
    """`requests` within `length_us`, each time to the next region or, `at_once`, to every one of them."""
    per_second = requests * SECOND_US // length_us
    return tuple(
        Load(region, start_us, start_us + length_us, per_second)
        for number, start_us in enumerate(range(every_us, end_us - every_us + 1, every_us))
        for region in (range(regions) if at_once else [number % regions])
    )
