"""Spans on their way out of the process: to a real OTLP receiver, to a dead one, or nowhere."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from observed import NOW_US, request, small_limiter
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from otlp_receiver import ExportTraceServiceRequest, OtlpReceiver, ReceivedSpan, received_spans
from structlog.testing import capture_logs

from ratelimit_sidecar.config.proxies import spare_loopback
from ratelimit_sidecar.telemetry import export
from ratelimit_sidecar.telemetry.export import SpanCounts, Tracing, TracingError, start_tracing
from ratelimit_sidecar.telemetry.traces import BATCH_SPAN, REQUEST_SPAN, NoTracer, RequestTracer

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
CALLER_ID = "b7ad6b7169203331"
HEADERS = [(b"traceparent", f"00-{TRACE_ID}-{CALLER_ID}-01".encode())]


@pytest.fixture(autouse=True)
def _no_otel_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


@contextlib.contextmanager
def silent_collector() -> Iterator[str]:
    """Something that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def trace_one_request(tracing: Tracing) -> bytes:
    """Returns the key of the bucket it took from."""
    limiter = small_limiter()
    raw = request(("tenant", "acme"))
    tracer = tracing.tracer
    parent = tracer.sampled(HEADERS)
    assert parent is not None
    response = limiter.decide(raw, NOW_US)
    ended_ns = time.time_ns()
    tracer.record(parent, ended_ns - 20_000, ended_ns, limiter.plan(raw), response)
    return limiter.plan(raw).takes[0].bucket_key


def name_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `serve` begins where the environment names one, at which nobody answers here."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "elsewhere.example")
    spare_loopback(os.environ)


@pytest.mark.parametrize("has_proxy", [False, True])
async def test_a_collector_sees_the_request_span_and_the_batch_span_that_links_to_it(
    monkeypatch: pytest.MonkeyPatch, has_proxy: bool
) -> None:
    if has_proxy:
        name_a_proxy(monkeypatch)
    async with OtlpReceiver() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
        tracing = start_tracing("us-1", "us-east-1")
        bucket_key = trace_one_request(tracing)
        of_request = await receiver.span(lambda span: span.name == REQUEST_SPAN)
        assert of_request.trace_id == TRACE_ID
        assert of_request.parent_span_id == CALLER_ID
        assert of_request.kind == "SERVER"
        assert of_request.ended_ns - of_request.started_ns == 20_000
        assert of_request.attributes["ratelimit.domain"] == "edge"

        batch = tracing.tracer.batch_span("eu-1", [bucket_key])
        assert batch is not None
        batch.end()
        of_batch = await receiver.span(lambda span: span.name == BATCH_SPAN)
        assert of_batch.links == [(TRACE_ID, of_request.span_id)]
        assert of_batch.kind == "PRODUCER"
        assert of_batch.parent_span_id == ""
        assert of_batch.trace_id != TRACE_ID
        await tracing.close()


async def test_spans_name_the_service_its_node_and_its_region(monkeypatch: pytest.MonkeyPatch) -> None:
    async with OtlpReceiver() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", receiver.endpoint)
        tracing = start_tracing("us-1", "us-east-1")
        trace_one_request(tracing)
        await tracing.close()
        resource = (await receiver.span(lambda span: True)).resource
    assert resource["service.name"] == "ratelimit-sidecar"
    assert resource["service.instance.id"] == "us-1"
    assert resource["cloud.region"] == "us-east-1"


async def test_the_environment_can_rename_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    async with OtlpReceiver() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
        monkeypatch.setenv("OTEL_SERVICE_NAME", "edge-limits")
        monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "cloud.region=moon,deployment.environment=test")
        tracing = start_tracing("us-1", "us-east-1")
        trace_one_request(tracing)
        await tracing.close()
        resource = (await receiver.span(lambda span: True)).resource
    assert resource["service.name"] == "edge-limits"
    assert resource["cloud.region"] == "moon"
    assert resource["deployment.environment"] == "test"
    assert resource["service.instance.id"] == "us-1"


async def test_closing_exports_what_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    async with OtlpReceiver() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "3600000")
        tracing = start_tracing("us-1", "us-east-1")
        trace_one_request(tracing)
        assert receiver.spans == []
        await tracing.close()
        assert [span.name for span in receiver.spans] == [REQUEST_SPAN]
        assert tracing.counts == SpanCounts(ended=1, exported=1, failed=0)


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
async def test_spans_that_no_collector_takes_are_counted_as_failed(
    monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    with socket.socket() as taken:
        # Nobody listens on it.
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "1")
        tracing = start_tracing("us-1", "us-east-1")
        trace_one_request(tracing)
        assert tracing.counts is not None
        async with asyncio.timeout(60):
            while not tracing.counts.failed:  # noqa: ASYNC110 (another thread)
                await asyncio.sleep(0.01)
        await tracing.close()
        assert tracing.counts == SpanCounts(ended=1, exported=0, failed=1)


@pytest.mark.parametrize("has_proxy", [False, True])
async def test_http_protobuf_is_spoken_when_asked_for(monkeypatch: pytest.MonkeyPatch, has_proxy: bool) -> None:
    if has_proxy:
        name_a_proxy(monkeypatch)
    received: list[tuple[str, list[ReceivedSpan]]] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            received.append((self.path, received_spans(ExportTraceServiceRequest.FromString(body))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with http.server.HTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")
        tracing = start_tracing("us-1", "us-east-1")
        trace_one_request(tracing)
        await tracing.close()
        server.shutdown()
        thread.join()
    [(path, [span])] = received
    assert path == "/v1/traces"
    assert (span.name, span.trace_id) == (REQUEST_SPAN, TRACE_ID)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4317"},
        {"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4317"},
        {"OTEL_TRACES_EXPORTER": "zipkin"},
    ],
    ids=["no endpoint", "sdk disabled", "exporter none", "another exporter"],
)
async def test_tracing_is_off(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    threads = threading.active_count()
    tracing = start_tracing("us-1", "us-east-1")
    assert isinstance(tracing.tracer, NoTracer)
    assert threading.active_count() == threads
    await tracing.close()


async def test_naming_the_otlp_exporter_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    tracing = start_tracing("us-1", "us-east-1")
    assert isinstance(tracing.tracer, RequestTracer)
    await tracing.close()


def test_an_exporter_we_do_not_have_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "zipkin")
    with capture_logs() as logs:
        start_tracing("us-1", "us-east-1")
    [event] = logs
    assert (event["event"], event["exporter"]) == ("exporter_not_supported", "zipkin")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "carrier-pigeon"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "soon"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "zip"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "many"),
    ],
)
def test_a_value_that_cannot_be_used_is_refused(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4317")
    monkeypatch.setenv(variable, value)
    with pytest.raises(TracingError, match=value):
        start_tracing("us-1", "us-east-1")


async def test_a_silent_collector_costs_requests_nothing_and_delays_the_end_by_the_timeout_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with silent_collector() as endpoint, capture_logs() as logs:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "1")
        monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "16")
        monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "16")
        # So that the exporter's thread, which no deadline of ours ends, is gone soon after the test.
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
        tracing = start_tracing("us-1", "us-east-1")
        for _ in range(100):
            trace_one_request(tracing)
        loop = asyncio.get_running_loop()
        began = loop.time()
        await tracing.close(timeout_seconds=0.2)
        assert 0.1 < loop.time() - began < 0.9
        assert tracing.counts is not None
        assert (tracing.counts.ended, tracing.counts.exported) == (100, 0)
        # 16 wait, and at most as many are on their way.
        assert 68 <= tracing.counts.dropped <= 84
    assert {"event": "spans_not_exported", "log_level": "warning", "timeout_seconds": 0.2} in logs


async def test_an_exporter_that_fails_takes_no_answer_away(monkeypatch: pytest.MonkeyPatch) -> None:
    exported = threading.Event()

    class Broken(SpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            exported.set()
            raise RuntimeError("it broke")

    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4317")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "1")
    monkeypatch.setattr(export, "_exporter", Broken)
    tracing = start_tracing("us-1", "us-east-1")
    trace_one_request(tracing)
    assert await asyncio.to_thread(exported.wait, 60)
    trace_one_request(tracing)
    await tracing.close()
    assert tracing.counts == SpanCounts(ended=2, failed=2)


@pytest.mark.parametrize("last_words", ["await tracing.close(timeout_seconds=0.2)", "raise SystemExit(0)"])
def test_a_process_ends_in_time_although_the_collector_is_silent(last_words: str) -> None:
    program = f"""
import asyncio
from test_export import trace_one_request
from ratelimit_sidecar.telemetry.export import start_tracing

async def main():
    tracing = start_tracing("us-1", "us-east-1")
    trace_one_request(tracing)
    {last_words}

asyncio.run(main())
"""
    with silent_collector() as endpoint:
        run_python(program, {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint})


def test_a_process_can_export_whatever_was_installed_last() -> None:
    """In a process of its own: in this one the messages of OpenTelemetry are loaded already."""
    program = """
from ratelimit_sidecar.telemetry.export import start_tracing
start_tracing("us-1", "us-east-1")
"""
    run_python(program, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4317"})


def run_python(program: str, variables: dict[str, str]) -> None:
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **variables, "OTEL_EXPORTER_OTLP_TIMEOUT": "600", "PYTHONPATH": path},
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
