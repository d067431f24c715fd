"""Exports spans to a collector with the OpenTelemetry SDK, configured by the standard OTEL_* variables.

Off unless an OTLP endpoint is set or OTEL_TRACES_EXPORTER names otlp. Ended spans go into the SDK's bounded queue
(OTEL_BSP_*), and a thread exports them. When the collector is slow or dead, the oldest spans are lost, never a request.
The resource is `service.name` = ratelimit-sidecar, `service.instance.id` = the node, `cloud.region` = its region, and
in Kubernetes the pod; OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES override them. The exporters read the environment
themselves, so this module does too. All variables: `otel_variables`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

import structlog
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from ratelimit_sidecar import __version__
from ratelimit_sidecar.config.proxies import grpc_proxy
from ratelimit_sidecar.telemetry.logs import LEVELS
from ratelimit_sidecar.telemetry.otel_variables import unused
from ratelimit_sidecar.telemetry.traces import NoTracer, RequestTracer

SERVICE_NAME = "ratelimit-sidecar"

DEFAULT_QUEUE = 2_048
"""Spans, as in the SDK."""

FLUSH_SECONDS = 3.0
"""How long `Tracing.close` waits for the collector: within the 10 s a container is given to stop, after the drain."""

_KUBERNETES: Final = {
    "k8s.pod.name": "POD_NAME",
    "k8s.namespace.name": "POD_NAMESPACE",
    "k8s.node.name": "NODE_NAME",
}
"""Attributes of the resource, by the variables in which the chart gives them to the container."""

_log = structlog.stdlib.get_logger(__name__)


class TracingError(Exception):
    """The OTEL_* variables ask for something impossible; the text is for the user."""


def start_tracing(node: str, region: str) -> Tracing:
    """Start exporting spans, if the environment asks for it.

    Raises:
        TracingError: a variable has a value that the exporter or the SDK rejects.
    """
    check_variables()
    if not _wanted():
        return Tracing(None)
    try:
        provider = TracerProvider(resource=resource_of(node, region), shutdown_on_exit=False)
        queue = int(os.environ.get("OTEL_BSP_MAX_QUEUE_SIZE") or DEFAULT_QUEUE)
        counts = SpanCounts()
        provider.add_span_processor(_CountEnded(counts, queue))
        provider.add_span_processor(BatchSpanProcessor(_CountingExporter(_exporter(), counts), max_queue_size=queue))
    except Exception as error:
        # Whatever the SDK and its exporters raise on a value they cannot use: they have no common class.
        raise TracingError(f"cannot export traces as the OTEL_* variables say: {error}") from error
    return Tracing(provider, counts)


@dataclass(slots=True)
class SpanCounts:
    """Counters of spans since start."""

    ended: int = 0
    exporting: int = 0
    """Spans that are being exported now."""
    exported: int = 0
    failed: int = 0
    """Spans that the collector did not take."""
    dropped: int = 0
    """Spans that did not fit into the queue."""

    @property
    def waiting(self) -> int:
        return self.ended - self.exporting - self.exported - self.failed - self.dropped


class Tracing:
    """Owns the SDK's thread and its connection to the collector.

    Args:
        provider: to be shut down by `close` alone; None when tracing is off.
        counts: of its spans.
    """

    def __init__(self, provider: TracerProvider | None, counts: SpanCounts | None = None) -> None:
        self.counts = counts
        self._provider = provider
        self.tracer: RequestTracer | NoTracer = (
            NoTracer() if provider is None else RequestTracer(provider.get_tracer("ratelimit_sidecar", __version__))
        )

    async def close(self, timeout_seconds: float = FLUSH_SECONDS) -> None:
        """Export the spans that have ended; those not exported within `timeout_seconds` are lost."""
        provider = self._provider
        if provider is None:
            return
        loop = asyncio.get_running_loop()
        flushed = asyncio.Event()

        def shut_down() -> None:
            provider.shutdown()
            # The loop may have been closed meanwhile.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(flushed.set)

        # Not the loop's executor: its end would be waited for however long the collector is silent.
        threading.Thread(target=shut_down, name="flush-spans", daemon=True).start()
        try:
            async with asyncio.timeout(timeout_seconds):
                await flushed.wait()
        except TimeoutError:
            _log.warning("spans_not_exported", timeout_seconds=timeout_seconds)


class _CountEnded(SpanProcessor):
    """Counts spans before they enter the SDK's queue, which drops the oldest span when it is full without saying so.
    While the SDK exports, its queue has more room than this one knows; then one span too many is counted as dropped,
    and later one less.
    """

    def __init__(self, counts: SpanCounts, queue: int) -> None:
        self._counts = counts
        self._queue = queue

    def on_end(self, span: ReadableSpan) -> None:
        if self._counts.waiting >= self._queue:
            self._counts.dropped += 1
        self._counts.ended += 1


class _CountingExporter(SpanExporter):
    """Wraps an exporter and counts its results. Only the SDK's thread exports."""

    def __init__(self, exporter: SpanExporter, counts: SpanCounts) -> None:
        self._exporter = exporter
        self._counts = counts
        # As it is: the SDK looks whether it takes a timeout.
        self.shutdown = exporter.shutdown  # type: ignore[method-assign]

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        is_exported = False
        self._counts.exporting = len(spans)
        try:
            result = self._exporter.export(spans)
            is_exported = result is SpanExportResult.SUCCESS
            return result
        finally:
            self._counts.exporting = 0
            if is_exported:
                self._counts.exported += len(spans)
            else:
                self._counts.failed += len(spans)


def check_variables() -> None:
    """Apply variables that the SDK documents but ignores, and log variables that do nothing here.

    Raises:
        TracingError: a variable has an impossible value.
    """
    for name, why in unused(os.environ):
        _log.warning("otel_variable_unused", variable=name, why=why)
    level = os.environ.get("OTEL_LOG_LEVEL")
    if level:
        if level.lower() not in LEVELS:
            raise TracingError(f"OTEL_LOG_LEVEL is {level!r}, expected one of {', '.join(LEVELS)}")
        logging.getLogger("opentelemetry").setLevel(LEVELS[level.lower()])


def is_sdk_disabled() -> bool:
    return os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"


def names_otlp(variable: str) -> bool | None:
    """Whether a variable with a list of exporters names otlp, the only one there is; None when it names none."""
    exporters = [name.strip() for name in os.environ.get(variable, "").split(",") if name.strip()]
    for name in exporters:
        if name not in ("otlp", "none"):
            _log.warning("exporter_not_supported", variable=variable, exporter=name, supported="otlp, none")
    return "otlp" in exporters if exporters else None


def export_protocol(signal: str) -> str:
    """The protocol to export a signal with. The proxy that it would go through is logged, if there is one.

    Args:
        signal: as in the names of variables, for example TRACES.

    Raises:
        ValueError: there is no such protocol.
    """
    protocol = _protocol(signal)
    _log_proxy(signal)
    return protocol


def _protocol(signal: str) -> str:
    protocol = (
        os.environ.get(f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL")
        or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
        or "grpc"
    )
    if protocol not in ("grpc", "http/protobuf"):
        raise ValueError(f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol!r}, expected grpc or http/protobuf")
    return protocol


def _log_proxy(signal: str) -> None:
    endpoint = urlsplit(
        os.environ.get(f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT") or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") or ""
    )
    proxy = grpc_proxy(endpoint.hostname or "localhost", os.environ)
    if proxy is not None:
        _log.warning("through_proxy", server=endpoint.netloc, proxy=proxy)


def _wanted() -> bool:
    if is_sdk_disabled():
        return False
    named = names_otlp("OTEL_TRACES_EXPORTER")
    if named is not None:
        return named
    return any(os.environ.get(name) for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"))


def _exporter() -> SpanExporter:
    # Imported here: who does not trace need not load them.
    if export_protocol("TRACES") == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import (  # noqa: PLC0415
            OTLPSpanExporter as GrpcSpanExporter,
        )

        return GrpcSpanExporter()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415
        OTLPSpanExporter as HttpSpanExporter,
    )

    return HttpSpanExporter()


def resource_of(node: str, region: str) -> Resource:
    """The attributes of this process that spans and metrics are exported with."""
    ours = {
        "service.name": SERVICE_NAME,
        "service.version": __version__,
        "service.instance.id": node,
        "cloud.region": region,
        **{attribute: os.environ[name] for attribute, name in _KUBERNETES.items() if os.environ.get(name)},
    }
    return Resource.create({**ours, **OTELResourceDetector().detect().attributes})
