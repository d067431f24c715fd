"""Sidecars and links that stop for a while and then go on as if nothing had been."""

from __future__ import annotations

import asyncio
import signal

import pytest
from chaos.regions import EAST, NAMES, SOUTH, WEST, Lab, assert_served
from chaos.scenarios import scenario

pytestmark = pytest.mark.slow

STOPPED_S = 30.0
STALLED_S = 8.0
AGREED_WITHIN_S = 5.0


@scenario
async def test_while_a_sidecar_is_stopped_for_30_s_the_others_go_on_and_afterwards_all_agree(lab: Lab) -> None:
    async with lab.three_regions() as regions:
        async with regions.traffic(*NAMES):
            await asyncio.sleep(1)
        # Not all of it may have left it yet.
        regions[WEST].process.signal(signal.SIGSTOP)
        async with regions.traffic(EAST, SOUTH) as traffic:
            await asyncio.sleep(STOPPED_S)
            assert await regions.connected(EAST) == {SOUTH}
        assert_served(traffic)

        async with regions.measuring():
            regions[WEST].process.signal(signal.SIGCONT)
            await regions.until_agreed(within_s=AGREED_WITHIN_S)
        assert regions[WEST].process.returncode is None


@scenario
async def test_a_link_that_stalls_for_8_s_is_shown_to_lag_and_all_agree_once_it_goes_on(lab: Lab) -> None:
    async with lab.three_regions() as regions:
        async with regions.traffic(*NAMES) as traffic:
            regions.ways[EAST, WEST].stall()

            async def lags() -> bool:
                return (await regions.peers(EAST))[WEST]["lag_seconds"] > STALLED_S / 2

            await asyncio.sleep(STALLED_S)
            await regions.until(lags)
        assert_served(traffic)

        async with regions.measuring():
            regions.ways[EAST, WEST].resume()
            await regions.until_agreed(within_s=AGREED_WITHIN_S)
        await regions.until(regions.all_connected)
