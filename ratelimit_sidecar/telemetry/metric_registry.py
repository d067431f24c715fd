"""The registry of the metrics, from which scrapes and pushes take their samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample as EncodedSample

from ratelimit_sidecar.telemetry.metric_sources import MetricSources, ScrapeView, view_of
from ratelimit_sidecar.telemetry.metrics import METRICS, Definition


def create_registry(sources: MetricSources) -> CollectorRegistry:
    """A registry with all metrics of the sidecar, and those of the process and its Python."""
    registry = CollectorRegistry()
    registry.register(SidecarCollector(sources))
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    return registry


class SidecarCollector(Collector):
    """The sidecar's own metrics, without those of the process."""

    def __init__(self, sources: MetricSources) -> None:
        self._sources = sources

    def describe(self) -> Iterable[Metric]:
        """The families without samples: the library asks for their names when the collector is registered."""
        return [_family(definition) for definition in METRICS]

    def collect(self) -> Iterator[Metric]:
        """The families of all metrics. A sample is read when it is iterated, so a caller can pause in between."""
        view = view_of(self._sources)
        for definition in METRICS:
            family = _family(definition)
            # A list by its type; whoever encodes a family only iterates over it.
            family.samples = _Samples(definition, view)  # type: ignore[assignment]
            yield family


class _Samples:
    def __init__(self, definition: Definition, view: ScrapeView) -> None:
        self._definition = definition
        self._view = view

    def __iter__(self) -> Iterator[EncodedSample]:
        name = self._definition.name
        # Only a histogram's buckets have a value for `le`.
        label_names = (*self._definition.labels, "le")
        for suffix, label_values, value, *exemplar in self._definition.read(self._view):
            labels = dict(zip(label_names, label_values, strict=False))
            yield EncodedSample(name + suffix, labels, value, exemplar=exemplar[0] if exemplar else None)


def _family(definition: Definition) -> Metric:
    # prometheus_client names a family without the suffix that OpenMetrics prescribes for the samples of its kind.
    name = definition.name
    if definition.kind == "counter":
        name = name.removesuffix("_total")
    elif definition.kind == "info":
        name = name.removesuffix("_info")
    return Metric(name, definition.help, definition.kind)
