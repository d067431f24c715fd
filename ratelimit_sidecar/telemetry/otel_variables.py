"""The OTEL_* variables that the OpenTelemetry SDK for Python documents: what each does here, or why it does nothing.

docs/reference/otel.md is made from this table, and one that is set and does nothing is told at the start.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

_SIGNALS: Final = ("", "TRACES_", "METRICS_")

_NO_LOGS: Final = "logs are written to stderr, not sent"
_AS_SCRAPED: Final = "what is pushed is what a scrape shows"
_ONLY_SDK: Final = "it chooses a part of the SDK that the sidecar sets up itself"


def _each(name: str, does: str) -> dict[str, str]:
    """For all signals, and for one."""
    return {f"OTEL_EXPORTER_OTLP_{signal}{name}": does for signal in _SIGNALS}


USED: Final[Mapping[str, str]] = {
    "OTEL_SDK_DISABLED": "`true`: no spans, and no metrics are pushed",
    "OTEL_SERVICE_NAME": "`service.name`; `ratelimit-sidecar` unless set",
    "OTEL_RESOURCE_ATTRIBUTES": "attributes of the resource, in the place of ours where they have the same name",
    "OTEL_EXPERIMENTAL_RESOURCE_DETECTORS": "more attributes, as `process`, `os` or `host` find them",
    "OTEL_TRACES_EXPORTER": "`otlp` or `none`; otlp where there is an endpoint for traces",
    "OTEL_METRICS_EXPORTER": "`otlp` or `none`; otlp where there is an endpoint for metrics alone",
    "OTEL_TRACES_SAMPLER": "which of the requests that Envoy samples have spans here; as Envoy says unless set",
    "OTEL_TRACES_SAMPLER_ARG": "of the sampler",
    "OTEL_LOG_LEVEL": "from which level on the SDK logs",
    "OTEL_PYTHON_CONTEXT": "as in the SDK",
    **dict.fromkeys(
        (
            "OTEL_ATTRIBUTE_COUNT_LIMIT",
            "OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT",
            "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT",
            "OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT",
            "OTEL_SPAN_LINK_COUNT_LIMIT",
        ),
        "bounds what is in a span",
    ),
    "OTEL_BSP_MAX_QUEUE_SIZE": "spans that wait for the collector; more are dropped (`ratelimit_spans_total`)",
    "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "spans in a request to the collector",
    "OTEL_BSP_SCHEDULE_DELAY": "milliseconds between two requests",
    **_each("ENDPOINT", "where to send to"),
    **_each("PROTOCOL", "`grpc` (unless set) or `http/protobuf`"),
    **_each("HEADERS", "sent with each request"),
    **_each("TIMEOUT", "seconds that the collector gets to take a request, with all tries"),
    **_each("COMPRESSION", "`gzip` or `none`"),
    **_each("INSECURE", "`true`: no TLS, for grpc and an endpoint without a scheme"),
    **_each("CERTIFICATE", "file with the authorities that sign the collector's certificate"),
    **_each("CLIENT_CERTIFICATE", "file with ours"),
    **_each("CLIENT_KEY", "file with its key"),
    "OTEL_METRIC_EXPORT_INTERVAL": "milliseconds between two pushes",
    **{
        f"OTEL_PYTHON_EXPORTER_OTLP_{protocol}_{signal}CREDENTIAL_PROVIDER": "as in the SDK"
        for protocol in ("GRPC", "HTTP")
        for signal in _SIGNALS
    },
    "OTEL_PYTHON_EXPORTER_OTLP_GRPC_RETRYABLE_ERROR_CODES": "as in the SDK",
}

UNUSED: Final[Mapping[str, str]] = {
    "OTEL_PROPAGATORS": "`traceparent` and, in its absence, the headers of B3 are always understood",
    **dict.fromkeys(
        ("OTEL_BSP_EXPORT_TIMEOUT", "OTEL_METRIC_EXPORT_TIMEOUT"),
        "the SDK's exporters do not use it; OTEL_EXPORTER_OTLP_TIMEOUT does the same",
    ),
    **dict.fromkeys(
        ("OTEL_SPAN_EVENT_COUNT_LIMIT", "OTEL_EVENT_ATTRIBUTE_COUNT_LIMIT", "OTEL_LINK_ATTRIBUTE_COUNT_LIMIT"),
        "the sidecar's spans have no events, and their links no attributes",
    ),
    "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE": f"{_AS_SCRAPED}: totals since the start",
    "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION": _AS_SCRAPED,
    "OTEL_METRICS_EXEMPLAR_FILTER": "exemplars are shown at a scrape; they are of sampled requests",
    **dict.fromkeys(
        ("OTEL_EXPORTER_PROMETHEUS_HOST", "OTEL_EXPORTER_PROMETHEUS_PORT"),
        "`listen.admin` says where metrics are scraped",
    ),
    **dict.fromkeys(("OTEL_EXPORTER_ZIPKIN_ENDPOINT", "OTEL_EXPORTER_ZIPKIN_TIMEOUT"), "only OTLP is spoken"),
    **dict.fromkeys(
        (
            "OTEL_LOGS_EXPORTER",
            *(f"OTEL_BLRP_{name}" for name in ("EXPORT_TIMEOUT", "MAX_EXPORT_BATCH_SIZE", "MAX_QUEUE_SIZE")),
            "OTEL_BLRP_SCHEDULE_DELAY",
            "OTEL_LOGRECORD_ATTRIBUTE_COUNT_LIMIT",
            "OTEL_LOGRECORD_ATTRIBUTE_VALUE_LENGTH_LIMIT",
            "OTEL_PYTHON_LOGGING_AUTO_INSTRUMENTATION_ENABLED",
            *(name.replace("TRACES", "LOGS") for name in USED if name.startswith("OTEL_EXPORTER_OTLP_TRACES_")),
            "OTEL_PYTHON_EXPORTER_OTLP_GRPC_LOGS_CREDENTIAL_PROVIDER",
            "OTEL_PYTHON_EXPORTER_OTLP_HTTP_LOGS_CREDENTIAL_PROVIDER",
        ),
        _NO_LOGS,
    ),
    **dict.fromkeys(
        (
            "OTEL_CONFIG_FILE",
            "OTEL_PYTHON_ID_GENERATOR",
            "OTEL_PYTHON_LOGGER_CONFIGURATOR",
            "OTEL_PYTHON_LOGGER_PROVIDER",
            "OTEL_PYTHON_METER_CONFIGURATOR",
            "OTEL_PYTHON_METER_PROVIDER",
            "OTEL_PYTHON_SDK_INTERNAL_METRICS_ENABLED",
            "OTEL_PYTHON_TRACER_CONFIGURATOR",
            "OTEL_PYTHON_TRACER_PROVIDER",
        ),
        _ONLY_SDK,
    ),
}


def unused(environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Variables that are set and do nothing, and why."""
    for name, why in UNUSED.items():
        if environ.get(name):
            yield name, why
