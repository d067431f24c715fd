"""Regions that are cut off from each other, and the moment in which they no longer are."""

from __future__ import annotations

import asyncio

import pytest
from chaos.regions import EAST, NAMES, SOUTH, WEST, Lab, assert_served
from chaos.scenarios import scenario

pytestmark = pytest.mark.slow

PARTITION_S = 20.0
HEALS_WITHIN_S = 2.0


@scenario
async def test_all_agree_2_s_after_a_partition_of_20_s_in_which_every_side_admitted(lab: Lab) -> None:
    async with lab.three_regions() as regions:
        async with regions.traffic(*NAMES) as traffic:
            regions.network.unplug(SOUTH)
            await asyncio.sleep(PARTITION_S)
            assert await regions.connected(EAST) == {WEST}
            assert await regions.connected(SOUTH) == set()
        assert_served(traffic)
        # It was a partition: south knows of nobody's hits but its own.
        assert await regions.taken(SOUTH) == traffic[SOUTH].admitted

        async with regions.measuring():
            regions.network.plug_in(SOUTH)
            await regions.until_agreed(within_s=HEALS_WITHIN_S)


@scenario
async def test_with_one_link_of_a_triangle_cut_all_agree_through_the_third_region(lab: Lab) -> None:
    async with lab.three_regions() as regions:
        regions.network.cut(EAST, SOUTH)
        async with regions.traffic(*NAMES):

            async def noticed() -> bool:
                return SOUTH not in await regions.connected(EAST) and EAST not in await regions.connected(SOUTH)

            await regions.until(noticed)
        await regions.until_agreed()

        # Nor is it a matter of luck: what is admitted from now on gets around, too.
        async with regions.traffic(EAST):
            await asyncio.sleep(1)
        await regions.until_agreed()
        assert SOUTH not in await regions.connected(EAST)

        regions.network.heal(EAST, SOUTH)
        await regions.until(regions.all_connected)
        await regions.until_agreed()
