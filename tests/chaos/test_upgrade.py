"""A rolling upgrade from the protocol before this one, under traffic, and one step back."""

from __future__ import annotations

import asyncio
import signal
from dataclasses import replace

import pytest
from chaos.regions import EAST, NAMES, WEST, Lab, Regions, assert_served
from chaos.scenarios import scenario
from chaos.versions import environment_of

from ratelimit_sidecar.replication.wire import PROTOCOL

pytestmark = pytest.mark.long

OLD_COMMIT = "e6e0bb1"
"""One of protocol 5: no tickets."""

DESCRIPTORS = 100
"""In one request."""


async def restart_as(regions: Regions, name: str, environment: dict[str, str]) -> None:
    """Stop a sidecar and start it as that version, while the others are asked."""
    others = [other for other in NAMES if other != name]
    async with regions.traffic(*others) as traffic:
        region = regions[name]
        region.process.signal(signal.SIGTERM)
        assert await region.process.wait() == 0, region.process.log.read_text()
        region.command = replace(region.command, environment=environment)
        await regions.start(name)
        await regions.until(regions.all_connected)
    assert_served(traffic)


async def all_agree_under_traffic(regions: Regions) -> None:
    async with regions.traffic(*NAMES) as traffic:
        await asyncio.sleep(1)
    assert_served(traffic)
    await regions.until_agreed()


@scenario
async def test_sidecars_are_upgraded_one_by_one_under_traffic_and_forget_nothing(lab: Lab) -> None:
    old = environment_of(OLD_COMMIT, lab.folder / "old")
    async with lab.three_regions(environment=old) as regions:
        await regions.take_of_each(EAST, 3_000, DESCRIPTORS)
        await all_agree_under_traffic(regions)
        for upgraded, name in enumerate(NAMES, start=1):
            await restart_as(regions, name, {})
            await all_agree_under_traffic(regions)
            spoken = sorted(peer["protocol"] for peer in (await regions.peers(name)).values())
            assert spoken == [PROTOCOL - 1] * (len(NAMES) - upgraded) + [PROTOCOL] * (upgraded - 1)
        # A step back is as good.
        await restart_as(regions, WEST, old)
        await all_agree_under_traffic(regions)
        for name in NAMES:
            assert not any(peer["protocol_errors"] for peer in (await regions.peers(name)).values())
