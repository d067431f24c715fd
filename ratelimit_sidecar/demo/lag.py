"""Measures how long replication takes, from the sidecars' own `/peers`, in seconds."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress

import httpx

from ratelimit_sidecar.demo.regions import Region, read_peers

_POLL_S = 0.2


class LagMeter:
    """Polls every region's sidecar while `run` runs."""

    def __init__(self, regions: Sequence[Region]) -> None:
        self._regions = regions
        self.lags_s: dict[str, float] = {}
        """By region, the last lag to its slowest peer."""
        self.longest_s = 0.0
        """No token took longer than this: the largest lag seen, and the longest time between two polls. `/peers` shows
        the age of the oldest unacknowledged token, so one that took longer was seen with at least that age.
        """
        self._largest_s = 0.0
        self._longest_gap_s = 0.0

    async def run(self) -> None:
        async with httpx.AsyncClient(trust_env=False) as client, asyncio.TaskGroup() as polling:
            for region in self._regions:
                polling.create_task(self._poll(client, region))

    async def _poll(self, client: httpx.AsyncClient, region: Region) -> None:
        looked_at = time.monotonic()
        while True:
            # A sidecar that doesn't answer widens the gap, and thereby `longest_s`.
            with suppress(httpx.HTTPError):
                lag_s = (await read_peers(client, region)).lag_s
                now = time.monotonic()
                self._largest_s = max(self._largest_s, lag_s)
                self._longest_gap_s = max(self._longest_gap_s, now - looked_at)
                self.longest_s = self._largest_s + self._longest_gap_s
                self.lags_s[region.name] = lag_s
                looked_at = now
            await asyncio.sleep(_POLL_S)
