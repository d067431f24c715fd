"""Three regions of real processes for a test, on free ports."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from ratelimit_sidecar.demo.ports import free_ports
from ratelimit_sidecar.demo.processes import Children
from ratelimit_sidecar.demo.regions import Region, Setup, start_regions

ROOT = Path(__file__).parents[2]
DOMAIN = "openclaw"

SETTLES_WITHIN_S = 60.0
"""Until all sidecars know the same. It takes some 30 ms; the rest is for a busy machine."""


@dataclass(frozen=True, slots=True)
class Cluster:
    children: Children
    regions: list[Region]
    client: httpx.AsyncClient

    async def ask(self, region: Region, agent: str, headers: Mapping[str, str] | None = None) -> httpx.Response:
        """One request through the region's Envoy."""
        return await self.client.get(f"{region.url}/rate", params={"agent": agent}, headers=headers)

    async def remaining(self, region: Region, agent: str) -> int | None:
        """What the region's sidecar thinks is left in the agent's bucket; None when it knows no such bucket."""
        response = await self.client.get(f"{region.admin_url}/buckets", params={"domain": DOMAIN})
        for bucket in response.raise_for_status().json()["buckets"]:
            if [(entry["key"], entry["value"]) for entry in bucket["entries"]] == [("agent", agent)]:
                return int(bucket["remaining"])
        return None

    async def settled_at(self, agent: str, remaining: int) -> None:
        """Wait until every sidecar thinks that so much is left.

        Raises:
            TimeoutError: one still thinks otherwise after `SETTLES_WITHIN_S`.
        """
        async with asyncio.timeout(SETTLES_WITHIN_S):
            for region in self.regions:
                while await self.remaining(region, agent) != remaining:  # noqa: ASYNC110 (another process)
                    await asyncio.sleep(0.02)


@asynccontextmanager
async def three_regions(
    folder: Path, rules: str, *, collector: str | None = None, environment: Mapping[str, str] | None = None
) -> AsyncIterator[Cluster]:
    """The three regions of the demo for as long as the context lasts.

    Args:
        folder: an empty one for configs and logs.
        rules: the text of a rules file of the domain `openclaw`.
        collector: `host:port` for traces.
        environment: of the sidecars.
    """
    rules_file = folder / "rules.yaml"
    rules_file.write_text(rules)
    setup = Setup(
        ports=free_ports(3),
        folder=folder,
        upstream=ROOT / "examples/openclaw/rating_api.py",
        rules=[rules_file],
        collector=collector,
        environment=environment or {},
    )
    async with Children(folder) as children, httpx.AsyncClient(trust_env=False, timeout=60.0) as client:
        yield Cluster(children, await start_regions(children, setup), client)
