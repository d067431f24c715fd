"""kill -9 of a sidecar, and its return."""

import asyncio
from pathlib import Path

import pytest
from e2e.cluster import Cluster, three_regions

from ratelimit_sidecar.demo.regions import Region, wait_connected

LIMIT = 20
RULES = f"""
domain: openclaw
descriptors:
  - key: agent
    rate_limit: {{unit: day, requests_per_unit: {LIMIT}}}
"""


@pytest.mark.slow
async def test_the_others_answer_while_a_sidecar_is_dead_and_it_denies_what_was_used_up_when_it_is_back(
    tmp_path: Path,
) -> None:
    async with three_regions(tmp_path, RULES) as cluster:
        east, victim, south = cluster.regions
        # Half of it is the victim's own doing, of which its next life knows only through the others.
        for region in (east, victim):
            assert [(await cluster.ask(region, "claw")).status_code for _ in range(LIMIT // 2)] == [200] * (LIMIT // 2)
        await cluster.settled_at("claw", remaining=0)

        await cluster.children.kill(victim.sidecar)

        for region in (east, south):
            assert (await cluster.ask(region, "claw")).status_code == 429
            assert (await cluster.ask(region, f"new in {region.name}")).status_code == 200
        assert [(await cluster.ask(east, "meanwhile")).status_code for _ in range(LIMIT)] == [200] * LIMIT
        # Its own Envoy is set to fail closed here.
        assert (await cluster.ask(victim, "claw")).status_code == 503

        victim.sidecar = await cluster.children.start(victim.sidecar.command)
        await wait_connected(cluster.regions)
        await cluster.settled_at("meanwhile", remaining=0)

        assert await first_decision(cluster, victim, "claw") == 429
        assert await first_decision(cluster, victim, "meanwhile") == 429
        await cluster.settled_at("claw", remaining=0)


async def first_decision(cluster: Cluster, region: Region, agent: str) -> int:
    """The first answer that is a decision: Envoy may need a moment to connect to a new sidecar."""
    async with asyncio.timeout(60):
        while True:
            status = (await cluster.ask(region, agent)).status_code
            if status != 503:
                return status
            await asyncio.sleep(0.05)
