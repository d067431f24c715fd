"""A request is found in Jaeger, by way of a collector, with the batch that carries it into another region: all real."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from e2e.cluster import three_regions
from e2e.test_traces import CALLER_SPAN_ID, RULES, TRACE_ID

from deployment import tools
from deployment.cache import Unavailable
from deployment.engine import ROOT
from ratelimit_sidecar.demo.ports import HOST, free_ports
from ratelimit_sidecar.demo.processes import Children, Command

# CI runs it, too, where both programs are in the cache.
pytestmark = pytest.mark.slow

DELIVERED: list[Path] = [ROOT / "deploy/otel/collector.yaml", ROOT / "deploy/otel/jaeger.yaml"]

WITHIN_S = 120.0
"""Envoy exports its spans every 5 s; the rest is for a busy machine."""


@dataclass(frozen=True, slots=True)
class Span:
    """As Jaeger's API shows it."""

    name: str
    service: str
    trace_id: str
    span_id: str
    parents: list[str]
    links: list[tuple[str, str]]
    """Trace id and span id of each."""
    tags: Mapping[str, Any]


class Jaeger:
    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def trace(self, trace_id: str) -> list[Span]:
        answer = await self._client.get(f"/api/traces/{trace_id}")
        return [] if answer.status_code == httpx.codes.NOT_FOUND else _spans(answer.raise_for_status().json())

    async def of_service(self, service: str) -> list[Span]:
        answer = await self._client.get("/api/traces", params={"service": service, "limit": 100, "lookback": "1h"})
        return _spans(answer.raise_for_status().json())


def _spans(answer: Any) -> list[Span]:
    found = []
    for trace in answer["data"]:
        for span in trace["spans"]:
            refers = [(of["refType"], of["traceID"], of["spanID"]) for of in span["references"]]
            found.append(
                Span(
                    name=span["operationName"],
                    service=trace["processes"][span["processID"]]["serviceName"],
                    trace_id=span["traceID"],
                    span_id=span["spanID"],
                    parents=[span_id for kind, _, span_id in refers if kind == "CHILD_OF"],
                    links=[(trace_id, span_id) for kind, trace_id, span_id in refers if kind == "FOLLOWS_FROM"],
                    tags={tag["key"]: tag["value"] for tag in span["tags"]},
                )
            )
    return found


def _metrics_at(port: int) -> dict[str, object]:
    return {"readers": [{"pull": {"exporter": {"prometheus": {"host": HOST, "port": port}}}}]}


def collector(folder: Path, otlp: int, http: int, own: int, jaeger: int) -> Command:
    """As it is delivered, on ports that are free."""
    moved = folder / "ports.yaml"
    protocols = {"grpc": {"endpoint": f"{HOST}:{otlp}"}, "http": {"endpoint": f"{HOST}:{http}"}}
    telemetry = {"metrics": _metrics_at(own)}
    moved.write_text(
        yaml.safe_dump({"receivers": {"otlp": {"protocols": protocols}}, "service": {"telemetry": telemetry}})
    )
    files = [argument for file in [*DELIVERED, moved] for argument in ("--config", str(file))]
    return Command(
        "collector",
        [str(tools.path("otelcol")), *files],
        f"http://{HOST}:{own}/metrics",
        {"JAEGER_ENDPOINT": f"{HOST}:{jaeger}"},
    )


def jaeger_all_in_one(folder: Path, otlp: int, query: int, query_grpc: int, own: int) -> Command:
    config = {
        "service": {
            "extensions": ["jaeger_storage", "jaeger_query"],
            "pipelines": {"traces": {"receivers": ["otlp"], "exporters": ["jaeger_storage_exporter"]}},
            "telemetry": {"metrics": _metrics_at(own)},
        },
        "extensions": {
            "jaeger_storage": {"backends": {"memory": {"memory": {"max_traces": 10_000}}}},
            "jaeger_query": {
                "storage": {"traces": "memory"},
                "http": {"endpoint": f"{HOST}:{query}"},
                "grpc": {"endpoint": f"{HOST}:{query_grpc}"},
            },
        },
        "receivers": {"otlp": {"protocols": {"grpc": {"endpoint": f"{HOST}:{otlp}"}}}},
        "exporters": {"jaeger_storage_exporter": {"trace_storage": "memory"}},
    }
    file = folder / "jaeger.yaml"
    file.write_text(yaml.safe_dump(config))
    return Command("jaeger", [str(tools.path("jaeger")), "--config", str(file)], f"http://{HOST}:{query}/api/services")


@asynccontextmanager
async def observed(folder: Path) -> AsyncIterator[tuple[str, Jaeger]]:
    """Where spans are sent to, and where they can be seen."""
    to, beside = free_ports(2).regions
    async with Children(folder) as children:
        await children.start(
            jaeger_all_in_one(folder, otlp=beside.grpc, query=beside.admin, query_grpc=beside.sync, own=beside.envoy)
        )
        await children.start(collector(folder, otlp=to.grpc, http=to.admin, own=to.envoy, jaeger=beside.grpc))
        async with httpx.AsyncClient(base_url=f"http://{HOST}:{beside.admin}", trust_env=False, timeout=30) as client:
            yield f"{HOST}:{to.grpc}", Jaeger(client)


async def one(ask: Callable[[], Any], predicate: Callable[[Span], bool]) -> Span:
    """The first span for which it holds, once there is one."""
    spans: list[Span] = []
    try:
        async with asyncio.timeout(WITHIN_S):
            while True:
                spans = await ask()
                for span in spans:
                    if predicate(span):
                        return span
                await asyncio.sleep(0.2)
    except TimeoutError:
        raise AssertionError(f"no such span; Jaeger has {spans}") from None


async def test_a_request_is_followed_in_jaeger_from_envoy_into_the_other_region(tmp_path: Path) -> None:
    try:
        for name in ("otelcol", "jaeger"):
            tools.ensure(name)
    except Unavailable as unavailable:
        pytest.skip(str(unavailable))
    async with (
        observed(tmp_path) as (address, jaeger),
        three_regions(tmp_path, RULES, collector=address, environment={"OTEL_BSP_SCHEDULE_DELAY": "100"}) as cluster,
    ):
        east = cluster.regions[0]
        traceparent = {"traceparent": f"00-{TRACE_ID}-{CALLER_SPAN_ID}-01"}
        assert (await cluster.ask(east, "claw", traceparent)).status_code == httpx.codes.OK

        decision = await one(
            lambda: jaeger.trace(TRACE_ID),
            lambda span: span.service.startswith("ratelimit-sidecar") and span.name.endswith("/ShouldRateLimit"),
        )
        asked = await one(lambda: jaeger.trace(TRACE_ID), lambda span: span.span_id in decision.parents)
        assert asked.service == "envoy-us-east-1"
        batch = await one(
            lambda: jaeger.of_service(decision.service), lambda span: (TRACE_ID, decision.span_id) in span.links
        )
        assert batch.trace_id != TRACE_ID
        applied = await one(lambda: jaeger.trace(batch.trace_id), lambda span: batch.span_id in span.parents)
        assert applied.service != decision.service
        assert applied.tags["ratelimit.peer"] != batch.tags["ratelimit.peer"]
