"""Pushes the metrics of /metrics to a collector by OTLP, for operators without scrapes.

Off unless OTEL_METRICS_EXPORTER names otlp, or OTEL_EXPORTER_OTLP_METRICS_ENDPOINT is set; an endpoint for all signals
does not turn it on. Every OTEL_METRIC_EXPORT_INTERVAL milliseconds the registry is read a slice at a time, as for a
scrape (`exposition.py`), and a thread sends it in requests of bounded size. A slow or absent collector costs metrics,
never a request.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator, Sequence
from typing import Final

from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricExporter,
    MetricExportResult,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.samples import Sample

from ratelimit_sidecar import __version__
from ratelimit_sidecar.telemetry.export import (
    TracingError,
    export_protocol,
    is_sdk_disabled,
    names_otlp,
    resource_of,
)
from ratelimit_sidecar.telemetry.exposition import sample_slices
from ratelimit_sidecar.threads import in_daemon_thread

_DEFAULT_INTERVAL_MS: Final = "60000"


def start_push(node: str, region: str, registry: CollectorRegistry) -> MetricsPush | None:
    """The push of the registry, if the environment asks for one.

    Raises:
        TracingError: a variable has an unusable value.
    """
    if not _wanted():
        return None
    try:
        interval_ms = float(os.environ.get("OTEL_METRIC_EXPORT_INTERVAL") or _DEFAULT_INTERVAL_MS)
        if interval_ms <= 0:
            raise ValueError("OTEL_METRIC_EXPORT_INTERVAL must be above 0")
        return MetricsPush(registry, _exporter(), resource_of(node, region), interval_ms / 1e3)
    except Exception as error:
        # Exporters raise various exceptions, without a common class, on values they cannot use.
        raise TracingError(f"cannot push metrics as the OTEL_* variables say: {error}") from error


class MetricsPush:
    """Pushes the metrics to a collector while `run` runs."""

    points_per_request = 2_000
    """About 0.3 MB; collectors accept 4 MB by default."""

    def __init__(
        self, registry: CollectorRegistry, exporter: MetricExporter, resource: Resource, interval_seconds: float
    ) -> None:
        self._registry = registry
        self._exporter = exporter
        self._resource = resource
        self._interval_seconds = interval_seconds
        self._began_ns = time.time_ns()

    async def run(self) -> None:
        """Push at each interval, until cancelled."""
        while True:
            await asyncio.sleep(self._interval_seconds)
            await self.push()

    async def push(self) -> None:
        """Push all metrics once. If the collector refuses some, which the exporter logs, the rest is left for the next
        time.
        """
        metrics: list[Metric] = []
        points = 0
        for family, samples, _ in sample_slices(self._registry, whole_histograms=True):
            if not samples:
                continue
            metrics += _converted(family, samples, self._began_ns, time.time_ns())
            points += len(samples)
            if points >= self.points_per_request:
                if not await self._send(metrics):
                    return
                metrics, points = [], 0
            await asyncio.sleep(0)
        await self._send(metrics)

    async def _send(self, metrics: Sequence[Metric]) -> bool:
        scope = ScopeMetrics(InstrumentationScope("ratelimit_sidecar", __version__), metrics, "")
        data = MetricsData([ResourceMetrics(self._resource, [scope], "")])
        result = await in_daemon_thread("push-metrics", lambda: self._exporter.export(data))
        return result is MetricExportResult.SUCCESS


def _converted(family: Family, samples: Sequence[Sample], began_ns: int, now_ns: int) -> Iterator[Metric]:
    """The samples as OTLP metrics, with the names that a scrape has."""
    if family.type == "histogram":
        histogram = Histogram(_histograms(samples, began_ns, now_ns), AggregationTemporality.CUMULATIVE)
        yield Metric(family.name, family.documentation, "", histogram)
        return
    points = [NumberDataPoint(sample.labels, began_ns, now_ns, float(sample.value)) for sample in samples]
    data: Sum | Gauge
    if family.type == "counter":
        data = Sum(points, AggregationTemporality.CUMULATIVE, is_monotonic=True)
    else:
        data = Gauge(points)
    yield Metric(samples[0].name, family.documentation, "", data)


def _histograms(samples: Sequence[Sample], began_ns: int, now_ns: int) -> list[HistogramDataPoint]:
    """The histogram of each set of labels, from its samples."""
    by_labels: dict[tuple[tuple[str, str], ...], list[Sample]] = {}
    for sample in samples:
        labels = tuple(sorted((name, value) for name, value in sample.labels.items() if name != "le"))
        by_labels.setdefault(labels, []).append(sample)
    made = []
    for labels, samples_of in by_labels.items():
        totals = [int(sample.value) for sample in samples_of if sample.name.endswith("_bucket")]
        bounds = [float(sample.labels["le"]) for sample in samples_of if sample.name.endswith("_bucket")]
        (total_sum,) = [sample.value for sample in samples_of if sample.name.endswith("_sum")]
        counts = [total - before for total, before in zip(totals, [0, *totals], strict=False)]
        # Minimum and maximum are unknown.
        unknown = float("nan")
        made.append(
            HistogramDataPoint(
                dict(labels), began_ns, now_ns, totals[-1], total_sum, counts, bounds[:-1], unknown, unknown
            )
        )
    return made


def _wanted() -> bool:
    if is_sdk_disabled():
        return False
    named = names_otlp("OTEL_METRICS_EXPORTER")
    return bool(os.environ.get("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT")) if named is None else named


def _exporter() -> MetricExporter:
    # Imported here: who does not push need not load them.
    if export_protocol("METRICS") == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import (  # noqa: PLC0415
            OTLPMetricExporter as GrpcMetricExporter,
        )

        return GrpcMetricExporter()
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import (  # noqa: PLC0415
        OTLPMetricExporter as HttpMetricExporter,
    )

    return HttpMetricExporter()
