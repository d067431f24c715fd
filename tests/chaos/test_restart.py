"""Sidecars that end, in whichever way, and come back."""

from __future__ import annotations

import asyncio
import signal

import pytest
from chaos.regions import EAST, NAMES, SOUTH, WEST, Lab, assert_served
from chaos.scenarios import scenario

pytestmark = pytest.mark.slow

BUCKETS = 5_000
DESCRIPTORS = 100
"""In one request."""

CALLERS = 16
"""So many that at any moment something has just been admitted."""


@scenario
async def test_a_killed_sidecar_knows_all_that_its_peers_do_when_it_says_that_it_is_ready_again(lab: Lab) -> None:
    async with lab.three_regions() as regions:
        await regions.take_of_each(EAST, BUCKETS, DESCRIPTORS)
        async with regions.traffic(*NAMES):
            await asyncio.sleep(1)
        await regions.until_agreed()

        await regions.kill(WEST)
        async with regions.traffic(EAST, SOUTH) as traffic:
            await asyncio.sleep(1)
        assert_served(traffic)
        await regions.until_agreed([EAST, SOUTH])

        await regions.start(WEST)
        assert await regions.taken(WEST) == regions.admitted


@scenario
async def test_a_sidecar_that_rejoins_under_traffic_catches_up_while_nobody_waits_for_it(lab: Lab) -> None:
    async with lab.three_regions() as regions:
        await regions.take_of_each(EAST, BUCKETS, DESCRIPTORS)
        await regions.until_agreed()
        await regions.kill(WEST)

        async with regions.traffic(EAST, SOUTH) as traffic:
            await regions.start(WEST)
        assert_served(traffic)
        await regions.until_agreed()


@scenario
async def test_a_rolling_restart_of_all_forgets_nothing(lab: Lab) -> None:
    async with lab.three_regions() as regions:
        async with regions.traffic(*NAMES):
            await asyncio.sleep(1)
        await regions.until_agreed()

        for name in NAMES:
            restarted = regions[name].process
            restarted.signal(signal.SIGTERM)
            assert await restarted.wait() == 0, restarted.log.read_text()
            await regions.start(name)
            assert await regions.taken(name) == regions.admitted

        # Of the lives that admitted it, none is left.
        await regions.until_agreed()


@scenario
async def test_a_sidecar_that_is_stopped_under_load_exits_with_0_and_leaves_all_it_admitted_to_the_others(
    lab: Lab,
) -> None:
    async with lab.three_regions() as regions:
        stopped = regions[WEST].process
        async with regions.traffic(WEST, callers=CALLERS) as traffic, regions.traffic(EAST, SOUTH):
            await asyncio.sleep(1)
            stopped.signal(signal.SIGTERM)
            assert await stopped.wait() == 0, stopped.log.read_text()
        assert traffic[WEST].admitted

        # A request that broke off may have been counted, but none that was let through may be missing.
        await regions.until_agreed([EAST, SOUTH], unanswered=traffic[WEST].unanswered)
