"""The rate limit service of a node whose requests wait."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from console.small_console import NoTracer
from limiter.requests import NOW_US, make_request
from limiter.test_waiting import PLAN, Node, rules_of

from ratelimit_sidecar.crdt.wait_queues import WaitQueues
from ratelimit_sidecar.services.ratelimit import SERVICE_NAME, RateLimitService, RequestTracer
from ratelimit_sidecar.services.waits import Waits
from ratelimit_sidecar.telemetry.latency import LatencyHistogram

PATH = f"/{SERVICE_NAME}/ShouldRateLimit"
REQUEST = make_request({"plan": "gold"})


class WaitingService:
    """Its purse is empty, and its peer is believed to have as much as its home holds.

    Args:
        wait_ms: of the rule.
        home: tokens.
    """

    def __init__(self, wait_ms: int = 1_000, home: int = 2_000, tracer: RequestTracer | None = None) -> None:
        limit = replace(PLAN.limit, capacity=2 * home)
        self.node = Node(replace(PLAN, limit=limit, wait_us=wait_ms * 1_000))
        self.limiter, self.queues = self.node.limiter, self.node.ledger.queues
        self.limiter.decide(make_request({"plan": "gold"}, hits=home), NOW_US)
        self.waits = Waits(self.queues, lambda: NOW_US)
        self.service = RateLimitService(
            self.limiter, lambda: NOW_US, LatencyHistogram(), tracer or NoTracer(), waits=self.waits
        )
        assert isinstance(self.queues, WaitQueues)

    async def until_waiting(self, count: int) -> None:
        await until(lambda: self.queues.waiting == count)

    def use_rules_without_limit(self) -> None:
        self.limiter.use_rules(rules_of())


async def until(is_so: Callable[[], bool]) -> None:
    """Let other tasks run until something is so."""
    async with asyncio.timeout(10):
        while not is_so():  # noqa: ASYNC110
            await asyncio.sleep(0.001)
