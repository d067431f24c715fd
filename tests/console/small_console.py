"""The console of a small limiter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import httpx
from observed import NOW_US, peer, small_limiter
from prometheus_client import CollectorRegistry

from ratelimit_sidecar.console.app import ConsoleSources, create_app
from ratelimit_sidecar.limiter.limiter import Limiter
from ratelimit_sidecar.mesh_status import MembershipStatus, PeerStatus
from ratelimit_sidecar.rules_source.reloader import Reloader
from ratelimit_sidecar.server.rpc import UnaryHandler
from ratelimit_sidecar.services.ratelimit import RateLimitService
from ratelimit_sidecar.telemetry.latency import LatencyHistogram
from ratelimit_sidecar.telemetry.metric_registry import create_registry
from ratelimit_sidecar.telemetry.metric_sources import MetricSources


class NoTracer:
    def sampled(self, metadata: object) -> None: ...

    def record(self, *_: object) -> None: ...


class Console:
    """`get` is a request to it.

    Args:
        decide: in place of the limiter's own service.
        has_rules: False when their source has yet to give any.
        shows_values: of descriptors.
        token_file: of those who may change state.
    """

    def __init__(
        self,
        limiter: Limiter | None = None,
        decide: UnaryHandler | None = None,
        has_rules: bool = True,
        shows_values: bool = True,
        token_file: Path | None = None,
    ) -> None:
        self.limiter = limiter or small_limiter()
        self.peers: Sequence[PeerStatus] = [peer()]
        self.membership: MembershipStatus | None = None
        self.missing: list[str] = []
        self.degraded: list[str] = []
        self.now_us = NOW_US
        self.reloader = Reloader(
            self.limiter.use_rules, lambda: self.now_us, "files rules", self.limiter.rules if has_rules else None
        )
        self.service = RateLimitService(self.limiter, lambda: self.now_us, LatencyHistogram(), NoTracer())
        self.app = create_app(
            ConsoleSources(
                node="us-1",
                region="us-east-1",
                limiter=self.limiter,
                registry=self._registry(),
                peers=lambda: self.peers,
                membership=lambda: self.membership,
                missing=lambda: self.missing,
                degraded=lambda: self.degraded,
                now_us=lambda: self.now_us,
                reloader=self.reloader,
                should_rate_limit=decide or self.service.should_rate_limit,
                shows_values=shows_values,
                names=["console.example.com"],
                token_file=token_file,
            )
        )

    def _registry(self) -> CollectorRegistry:
        return create_registry(
            MetricSources(
                node="us-1",
                region="us-east-1",
                limiter=self.limiter,
                latency=LatencyHistogram(),
                peers=lambda: self.peers,
                request_errors={},
            )
        )

    async def get(self, path: str, method: str = "GET", **headers: str) -> httpx.Response:
        transport = httpx.ASGITransport(self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://console") as client:
            return await client.request(method, path, headers=headers)

    async def buckets(self, query: str = "") -> list[dict]:
        response = await self.get(f"/buckets{query}")
        assert response.status_code == 200, response.text
        return response.json()["buckets"]

    async def every_page(self, query: str) -> list[list[dict]]:
        pages, after = [], ""
        while True:
            body = (await self.get(f"/buckets?{query}{after}")).json()
            pages.append(body["buckets"])
            if body["next"] is None:
                return pages
            after = f"&after={body['next']}"
