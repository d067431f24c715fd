"""One strict limit on real processes that are stopped, killed, cut off and upgraded: never more than the limit."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import combinations
from random import Random
from typing import NamedTuple

import grpc.aio
import pytest
from chaos.regions import EAST, NAMES, WEST, Lab, Regions
from chaos.scenarios import scenario
from chaos.versions import environment_of
from e2e.sidecars import ask

from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2 import RateLimitResponse
from ratelimit_sidecar.replication.wire import PAYING_PROTOCOL

pytestmark = pytest.mark.long

PER_SECOND = 20_000
CAPACITY = 12_000
RULES = f"""
domain: shop
descriptors:
  - key: plan
    consistency: strict
    rate_limit: {{unit: second, requests_per_unit: {PER_SECOND}}}
    burst: {CAPACITY}
"""
HITS = 100
"""Of a request, on average: a thousand a second are five times the limit."""

SLEW = 0.005
"""By how much the clock of a sidecar, and so its refill, may be faster than the one of this test."""

ADMISSIONS = int(os.environ.get("STRICT_ADMISSIONS", "1000000"))
CALLERS = 4

LOANS_COMMIT = "ef0ce5c"
"""The last one with loans, protocol 3."""

PROTOCOL_4_COMMIT = "55b144f"
PROTOCOL_5_COMMIT = "e6e0bb1"

MEMBERS = dict.fromkeys(NAMES, 1)


class Admission(NamedTuple):
    """Let through somewhen between the two instants, of this process's monotonic clock."""

    asked_s: float
    answered_s: float
    hits: int


class Load:
    """Asks regions for far more than the limit, for as long as it runs.

    Args:
        of: the regions that are asked; changed at will.
    """

    def __init__(self, regions: Regions, seed: int) -> None:
        self.of = set(NAMES)
        self.admissions: list[Admission] = []
        self.admitted = 0
        self._regions = regions
        self._random = Random(seed)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as tasks:
            callers = [tasks.create_task(self._call(name)) for name in NAMES for _ in range(CALLERS)]
            try:
                yield
            finally:
                for caller in callers:
                    caller.cancel()

    async def admits(self, hits: int) -> None:
        """Wait until so much more is admitted."""
        wanted = self.admitted + hits
        while self.admitted < wanted:  # noqa: ASYNC110 (many events, of other processes)
            await asyncio.sleep(0.02)

    async def _call(self, name: str) -> None:
        while True:
            hits = self._random.randint(1, 2 * HITS)
            asked_s = time.monotonic()
            try:
                if name in self.of:
                    answer = await self._regions[name].stub.ShouldRateLimit(
                        ask("shop", "plan", "gold", hits), timeout=60
                    )
                    if answer.overall_code == RateLimitResponse.OK:
                        self.admissions.append(Admission(asked_s, time.monotonic(), hits))
                        self.admitted += hits
                        continue
            except grpc.aio.AioRpcError:
                # Killed, or not yet up again.
                pass
            await asyncio.sleep(0.005)


def most_beyond_the_limit(admissions: Iterable[Admission]) -> float:
    """Tokens above `capacity + rate * T` in the worst interval; 0 or less keeps the promise.

    Of an interval only those count that were asked for and answered within it: they were let through in it, whatever
    the requests had to wait on their ways.
    """
    rate, worst = PER_SECOND * (1 + SLEW), float("-inf")
    by_answer = sorted(admissions, key=lambda admission: admission.answered_s)
    # Of a power of two, so that the leaves are in order.
    size = 1 << len(by_answer).bit_length()
    # A tree over them in that order, of those asked for since some instant: of each node the hits in all, and the most,
    # up to any answer in it, above what the rate gives until then.
    hits, most = [0] * 2 * size, [float("-inf")] * 2 * size
    for leaf in sorted(range(len(by_answer)), key=lambda index: by_answer[index].asked_s, reverse=True):
        admission, node = by_answer[leaf], size + leaf
        hits[node], most[node] = admission.hits, admission.hits - rate * admission.answered_s
        while node > 1:
            node //= 2
            left, right = 2 * node, 2 * node + 1
            hits[node] = hits[left] + hits[right]
            most[node] = max(most[left], hits[left] + most[right])
        worst = max(worst, most[1] + rate * admission.asked_s - CAPACITY)
    return worst


async def disturb(regions: Regions, random: Random) -> None:
    """One fault, from its beginning to its end."""
    name = random.choice(NAMES)
    match random.choice(["stop", "kill", "cut", "cut", "unplug"]):
        case "stop":
            regions[name].process.signal(signal.SIGSTOP)
            await asyncio.sleep(random.choice([0.3, 2, 7]))
            regions[name].process.signal(signal.SIGCONT)
        case "kill":
            await regions.kill(name)
            await asyncio.sleep(random.choice([0, 1]))
            await regions.start(name)
        case "cut":
            one, other = random.choice(list(combinations(NAMES, 2)))
            regions.network.cut(one, other)
            await asyncio.sleep(random.choice([0.5, 7]))
            regions.network.heal(one, other)
        case "unplug":
            regions.network.unplug(name)
            await asyncio.sleep(random.choice([0.5, 7]))
            regions.network.plug_in(name)


@scenario
async def test_of_a_million_admissions_through_stops_kills_and_cuts_none_is_beyond_the_limit(lab: Lab) -> None:
    """STRICT_ADMISSIONS are as many as are wanted."""
    await admit_through_faults(lab, RULES, ADMISSIONS)


@scenario
async def test_nor_is_any_where_requests_wait_for_tickets(lab: Lab) -> None:
    await admit_through_faults(lab, f"{RULES}    wait: 200ms\n", ADMISSIONS // 2)


async def admit_through_faults(lab: Lab, rules: str, admissions: int) -> None:
    random = Random(1)
    async with lab.three_regions(rules, MEMBERS) as regions:
        load, faults = Load(regions, seed=2), 0
        async with load.running():
            while load.admitted < admissions:
                load.of = set(random.sample(NAMES, random.choice([1, 2, 3, 3])))
                await disturb(regions, random)
                faults += 1
                await asyncio.sleep(random.choice([0, 1, 3]))
        beyond = most_beyond_the_limit(load.admissions)
        print(
            f"{load.admitted} admitted in {len(load.admissions)} requests, {faults} faults, {beyond:.0f} at most beyond"
        )
        assert beyond <= 0
        assert faults > 5


@scenario
async def test_sidecars_are_upgraded_from_loans_to_purses_one_by_one_within_the_limit(lab: Lab) -> None:
    await upgrade(lab, LOANS_COMMIT, 3)


@scenario
async def test_sidecars_are_upgraded_from_protocol_4_one_by_one_within_the_limit(lab: Lab) -> None:
    await upgrade(lab, PROTOCOL_4_COMMIT, 4)


@scenario
async def test_sidecars_are_upgraded_from_protocol_5_one_by_one_within_the_limit(lab: Lab) -> None:
    await upgrade(lab, PROTOCOL_5_COMMIT, 5)


async def upgrade(lab: Lab, commit: str, protocol: int) -> None:
    async with lab.three_regions(RULES, MEMBERS, environment_of(commit, lab.folder / "old")) as regions:
        load = Load(regions, seed=3)
        async with load.running():
            load.of = {EAST}
            await load.admits(3 * PER_SECOND)
            for upgraded, name in enumerate(NAMES, start=1):
                load.of = set(NAMES) if upgraded % 2 else {EAST, WEST}
                assert {peer["protocol"] for peer in (await regions.peers(name)).values()} == {protocol}
                await regions.kill(name)
                region = regions[name]
                region.command = replace(region.command, environment={})
                await regions.start(name)
                await regions.until(regions.all_connected)
                await load.admits(2 * PER_SECOND)
                if upgraded == 1 and protocol < PAYING_PROTOCOL:
                    # Between old and new nothing is lent or paid.
                    membership = (await regions.read(name, "/peers"))["membership"]
                    assert (membership["payments_sent"], membership["payments_received"]) == (0, 0)
            load.of = {EAST}
            await load.admits(5 * PER_SECOND)
        assert most_beyond_the_limit(load.admissions) <= 0
        membership = (await regions.read(EAST, "/peers"))["membership"]
        assert membership["payments_received"] > 0
