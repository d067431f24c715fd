"""Open-loop HTTP traffic: requests leave at their appointed times, however long the answers take.

Kept of it: when each request left, what was answered, and the latest latencies. Times are seconds of the monotonic
clock.
"""

from __future__ import annotations

import asyncio
import math
import time
from array import array
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle

import httpx

TIMEOUT_S = 5.0
MAX_IN_FLIGHT = 64
"""A region. A request that is due beyond it counts as unanswered: a stalled Envoy must not hold up the others'."""

LATENCIES_KEPT = 1_000

HOT_SHARE = 0.8


@dataclass(slots=True)
class RegionTraffic:
    """What one region was sent and what it answered."""

    name: str
    url: str
    sent_at: array[float] = field(default_factory=lambda: array("d"))
    """Every departure, in order."""
    admitted: int = 0
    denied: int = 0
    errors: int = 0
    """Answers that are neither, and requests without an answer."""
    in_flight: int = 0
    last_admitted_at: float = -math.inf
    """When the last answer that admitted came."""
    latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=LATENCIES_KEPT))

    def depart(self) -> float:
        sent_at = time.monotonic()
        self.sent_at.append(sent_at)
        self.in_flight += 1
        return sent_at

    def arrive(self, sent_at: float, status: int | None) -> None:
        """Count an answer.

        Args:
            status: None when there was no answer.
        """
        now = time.monotonic()
        self.in_flight -= 1
        if status == httpx.codes.OK:
            self.admitted += 1
            self.last_admitted_at = now
        elif status == httpx.codes.TOO_MANY_REQUESTS:
            self.denied += 1
        else:
            self.errors += 1
        if status is not None:
            self.latencies_s.append(now - sent_at)

    def latency_ms(self, quantile: float) -> float:
        """Of the latest `LATENCIES_KEPT` answers, by the nearest rank; NaN before the first."""
        latencies = sorted(self.latencies_s)
        if not latencies:
            return math.nan
        return latencies[max(0, math.ceil(quantile * len(latencies)) - 1)] * 1_000


@dataclass(frozen=True, slots=True)
class Phase:
    """How the load is spread for a while: a share a region, together 1."""

    title: str
    shares: tuple[float, ...]


def phases(regions: Sequence[str]) -> list[Phase]:
    """Even first, then each region hot once."""
    count = len(regions)
    even = Phase("the same load everywhere", (1 / count,) * count)
    cold = (1 - HOT_SHARE) / (count - 1)
    hot = [
        Phase(
            f"{HOT_SHARE:.0%} of the load in {name}",
            tuple(HOT_SHARE if other == name else cold for other in regions),
        )
        for name in regions
    ]
    return [even, *hot]


class Traffic:
    """Sends GET requests for one path to every region, one phase after the other.

    Args:
        regions: (name, URL of its Envoy).
        path: with its query.
        rate: requests a second, all regions together.
        departed: told the instant of each departure, in order.
        phase_s: how long each phase lasts.
    """

    def __init__(
        self,
        regions: Sequence[tuple[str, str]],
        path: str,
        rate: float,
        departed: Callable[[float], None],
        *,
        phase_s: float = 4.0,
    ) -> None:
        self._phase_s = phase_s
        self.regions = [RegionTraffic(name, url) for name, url in regions]
        self._phases = phases([name for name, _ in regions])
        self.phase = self._phases[0]
        self._path = path
        self._rate = rate
        self._departed = departed

    async def run(self, stop: asyncio.Event) -> None:
        """Send until `stop` is set, then wait for the answers still out (at most `TIMEOUT_S`)."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=MAX_IN_FLIGHT)
        async with (
            httpx.AsyncClient(trust_env=False, timeout=TIMEOUT_S, limits=limits) as client,
            asyncio.TaskGroup() as sending,
        ):
            async for region in self._due(stop):
                sent_at = region.depart()
                self._departed(sent_at)
                if region.in_flight > MAX_IN_FLIGHT:
                    region.arrive(sent_at, None)
                else:
                    sending.create_task(self._send(client, region, sent_at))

    async def _due(self, stop: asyncio.Event) -> AsyncIterator[RegionTraffic]:
        """Yields a region whenever a request is due there."""
        start = time.monotonic()
        owed = [0.0] * len(self.regions)
        for phase in cycle(self._phases):
            self.phase = phase
            for tick in range(round(self._phase_s * self._rate)):
                if await _set_before(start + tick / self._rate, stop):
                    return
                # The region furthest behind its share comes next, so each gets its requests evenly spaced.
                owed = [debt + share for debt, share in zip(owed, phase.shares, strict=True)]
                due = max(range(len(owed)), key=owed.__getitem__)
                owed[due] -= 1
                yield self.regions[due]
            start += self._phase_s

    async def _send(self, client: httpx.AsyncClient, region: RegionTraffic, sent_at: float) -> None:
        try:
            response = await client.get(f"{region.url}{self._path}")
        except httpx.TransportError:
            region.arrive(sent_at, None)
        else:
            region.arrive(sent_at, response.status_code)


async def _set_before(at: float, event: asyncio.Event) -> bool:
    """Wait until an instant or the event, whichever comes first; True when the event was."""
    try:
        async with asyncio.timeout(at - time.monotonic()):
            await event.wait()
    except TimeoutError:
        return False
    return True
