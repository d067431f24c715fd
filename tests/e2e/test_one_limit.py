"""A limit of 20 a minute over three real Envoys."""

import asyncio
import time
from itertools import cycle
from pathlib import Path

import httpx
from e2e.cluster import three_regions

from ratelimit_sidecar.demo.promise import most_within

LIMIT = 20
REFILL_S = 60 / LIMIT
REQUESTS = 60
GAP_S = 0.025

IN_FLIGHT_S = 0.4
"""Longer than a delta is ever under way on loopback: the flush interval is 20 ms, the rest is for a busy machine."""

HALF_SLOT_S = 2**20 / 1e6 / 2

RULES = f"""
domain: openclaw
descriptors:
  - key: agent
    rate_limit: {{unit: minute, requests_per_unit: {LIMIT}}}
"""


async def test_three_regions_share_one_limit(tmp_path: Path) -> None:
    """The bound: 20, what has refilled (one every 3 s), and what was in flight.

    A sidecar that admits one too many has not heard yet of what the two others admitted shortly before. So the
    overshoot is at most what the two others were sent within the time that a delta needs: here 2/3 of the 16
    requests that are sent in `IN_FLIGHT_S`. Three limits of their own would admit all 60.
    """
    async with three_regions(tmp_path, RULES) as cluster:
        answers: list[tuple[float, httpx.Response]] = []
        started_at = time.monotonic()
        for number, region in zip(range(REQUESTS), cycle(cluster.regions), strict=False):
            await asyncio.sleep(max(0.0, started_at + number * GAP_S - time.monotonic()))
            answers.append((time.monotonic(), await cluster.ask(region, "claw")))
        refilled = int((time.monotonic() - started_at) / REFILL_S)

        allowed = [response for _, response in answers if response.status_code == 200]
        denied = [response for _, response in answers if response.status_code == 429]
        in_flight = max(
            most_within((at for number, (at, _) in enumerate(answers) if number % 3 != own), IN_FLIGHT_S)
            for own in range(3)
        )
        assert len(allowed) + len(denied) == REQUESTS
        assert LIMIT <= len(allowed) <= LIMIT + refilled + in_flight < REQUESTS

        for response in denied:
            assert response.headers["x-ratelimit-limit"] == "20, 20;w=60"
            assert response.headers["x-ratelimit-remaining"] == "0"
            assert 0 < int(response.headers["x-ratelimit-reset"]) <= 4 * 60
        assert allowed[0].headers["x-ratelimit-remaining"] == str(LIMIT - 1)

        # Every delta has arrived, so from here on no region admits more than has refilled, and each one of that only
        # until it hears of the others. What others took counts from the middle of its slot, and so does its refill.
        await asyncio.sleep(IN_FLIGHT_S)
        later = [await cluster.ask(region, "claw") for region in cluster.regions]
        refilled_meanwhile = int((time.monotonic() + HALF_SLOT_S - started_at) / REFILL_S) - refilled
        assert [response.status_code for response in later].count(200) <= len(later) * refilled_meanwhile
