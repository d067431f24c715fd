"""Metrics on their way to a real OTLP receiver."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc.aio
import pytest
from e2e.sidecars import sidecar_command
from observed import NOW_US, peer, request, small_limiter
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2_grpc import (
    MetricsServiceServicer,
    add_MetricsServiceServicer_to_server,
)
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric
from prometheus_client import CollectorRegistry

from ratelimit_sidecar.demo.ports import free_ports
from ratelimit_sidecar.demo.processes import Children
from ratelimit_sidecar.telemetry.export import TracingError
from ratelimit_sidecar.telemetry.latency import BOUNDS_NS, LatencyHistogram
from ratelimit_sidecar.telemetry.metric_registry import create_registry
from ratelimit_sidecar.telemetry.metric_sources import MetricSources
from ratelimit_sidecar.telemetry.metrics import METRICS
from ratelimit_sidecar.telemetry.push import start_push


@pytest.fixture(autouse=True)
def _no_otel_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


class Receiver(MetricsServiceServicer):
    def __init__(self) -> None:
        self.endpoint = ""
        self.requests: list[ExportMetricsServiceRequest] = []
        self.came = asyncio.Event()

    async def Export(  # noqa: N802 (gRPC's name)
        self, request: ExportMetricsServiceRequest, _context: object
    ) -> ExportMetricsServiceResponse:
        self.requests.append(request)
        self.came.set()
        return ExportMetricsServiceResponse()

    @property
    def metrics(self) -> list[Metric]:
        return [
            metric
            for request in self.requests
            for of_resource in request.resource_metrics
            for of_scope in of_resource.scope_metrics
            for metric in of_scope.metrics
        ]


@asynccontextmanager
async def receiving() -> AsyncIterator[Receiver]:
    server = grpc.aio.server()
    receiver = Receiver()
    add_MetricsServiceServicer_to_server(receiver, server)
    receiver.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield receiver
    finally:
        await server.stop(0)


def some_registry() -> CollectorRegistry:
    limiter = small_limiter()
    for _ in range(3):
        limiter.decide(request(("tenant", "acme")), NOW_US)
    latency = LatencyHistogram()
    for elapsed_ns in (5_000, 30_000, 2_000_000_000):
        latency.observe(elapsed_ns)
    return create_registry(
        MetricSources(
            node="us-1",
            region="us-east-1",
            limiter=limiter,
            latency=latency,
            peers=lambda: [peer()],
            request_errors={"invalid": 1},
        )
    )


@pytest.mark.parametrize("points", [2_000, 10], ids=["in one request", "in several"])
async def test_all_that_is_scraped_is_pushed_under_the_same_names_with_its_kind(
    monkeypatch: pytest.MonkeyPatch, points: int
) -> None:
    async with receiving() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", receiver.endpoint)
        registry = some_registry()
        push = start_push("us-1", "us-east-1", registry)
        assert push is not None
        push.points_per_request = points
        await push.push()

    assert (len(receiver.requests) == 1) == (points == 2_000)
    pushed = {metric.name: metric for metric in receiver.metrics}
    kinds = {metric.name: metric.kind for metric in METRICS}
    scraped = {sample.name for family in registry.collect() for sample in family.samples}
    parts = {f"openclaw_request_latency_seconds_{part}" for part in ("bucket", "count", "sum")}
    assert set(pushed) == scraped - parts | {"openclaw_request_latency_seconds"}
    assert all(metric.sum.is_monotonic for name, metric in pushed.items() if kinds.get(name) == "counter")
    assert all(metric.HasField("gauge") for name, metric in pushed.items() if kinds.get(name) == "gauge")

    (taken,) = [
        point
        for point in pushed["crdt_token_consumed_total"].sum.data_points
        if {of.key: of.value.string_value for of in point.attributes}["rule"] == "edge.tenant"
    ]
    assert taken.as_double == 2
    (latency,) = pushed["openclaw_request_latency_seconds"].histogram.data_points
    assert list(latency.explicit_bounds) == [bound / 1e9 for bound in BOUNDS_NS]
    assert list(latency.bucket_counts) == [1, 0, 1, *[0] * (len(BOUNDS_NS) - 3), 1]
    assert (latency.count, latency.sum) == (3, 2.000_035)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"},
        {"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://127.0.0.1:9", "OTEL_METRICS_EXPORTER": "none"},
        {"OTEL_METRICS_EXPORTER": "otlp", "OTEL_SDK_DISABLED": "true"},
    ],
    ids=["nothing", "an endpoint for all signals", "none", "disabled"],
)
def test_nothing_is_pushed_with(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert start_push("us-1", "us-east-1", CollectorRegistry()) is None


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("OTEL_METRIC_EXPORT_INTERVAL", "soon"),
        ("OTEL_METRIC_EXPORT_INTERVAL", "0"),
        ("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "carrier-pigeon"),
    ],
)
def test_a_value_that_cannot_be_used_is_refused(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "otlp")
    monkeypatch.setenv(variable, value)
    with pytest.raises(TracingError, match=r"OTEL_\* variables say"):
        start_push("us-1", "us-east-1", CollectorRegistry())


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
async def test_without_a_collector_a_push_ends_after_its_first_request(
    monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    with socket.socket() as taken:
        # Nobody listens on it.
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("OTEL_METRICS_EXPORTER", "otlp")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
        push = start_push("us-1", "us-east-1", some_registry())
        assert push is not None
        push.points_per_request = 1
        # Each of a hundred requests would take a second.
        async with asyncio.timeout(60):
            await push.push()


async def test_a_sidecar_pushes_when_its_environment_says_so(tmp_path: Path) -> None:
    async with receiving() as receiver, Children(tmp_path) as children:
        environment = {
            "OTEL_METRICS_EXPORTER": "otlp",
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint,
            "OTEL_TRACES_EXPORTER": "none",
            "OTEL_METRIC_EXPORT_INTERVAL": "100",
        }
        await children.start(sidecar_command(tmp_path, free_ports(1).regions[0], {}, environment=environment))
        async with asyncio.timeout(60):
            await receiver.came.wait()
    (resource,) = receiver.requests[0].resource_metrics
    assert {of.key: of.value.string_value for of in resource.resource.attributes}["service.instance.id"] == "sidecar"
    assert "ratelimit_build_info" in {metric.name for metric in receiver.metrics}
