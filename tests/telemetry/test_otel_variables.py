"""The OTEL_* variables that the SDK documents: each is in our table, and does what that says."""

from __future__ import annotations

import http.server
import logging
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import opentelemetry.environment_variables
import opentelemetry.sdk.environment_variables
import pytest
from certificates import Authority
from otlp_receiver import OtlpReceiver, ReceivedSpan
from structlog.testing import capture_logs
from telemetry.test_export import trace_one_request

from ratelimit_sidecar.telemetry import reference
from ratelimit_sidecar.telemetry.export import TracingError, start_tracing
from ratelimit_sidecar.telemetry.otel_variables import UNUSED, USED
from ratelimit_sidecar.telemetry.traces import BATCH_SPAN, REQUEST_SPAN


@pytest.fixture(autouse=True)
def _no_otel_variables(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    logger = logging.getLogger("opentelemetry")
    level = logger.level
    yield
    logger.setLevel(level)


async def exported(monkeypatch: pytest.MonkeyPatch, **variables: str) -> list[ReceivedSpan]:
    """The spans of two requests and of a batch that carries both."""
    async with OtlpReceiver() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        tracing = start_tracing("us-1", "us-east-1")
        keys = {trace_one_request(tracing) for _ in range(2)}
        batch = tracing.tracer.batch_span("eu-1", keys)
        if batch is not None:
            batch.end()
        await tracing.close()
    return receiver.spans


def of_name(spans: list[ReceivedSpan], name: str) -> ReceivedSpan:
    return next(span for span in spans if span.name == name)


def test_every_variable_that_the_sdk_documents_is_in_the_table_once() -> None:
    documented = {
        value
        for module in (opentelemetry.environment_variables, opentelemetry.sdk.environment_variables)
        for name, value in vars(module).items()
        if name.lstrip("_").startswith("OTEL_")
    }
    assert documented == {*USED, *UNUSED}
    assert not USED.keys() & UNUSED.keys()


def test_the_page_has_each_attribute_of_spans_and_of_their_resource() -> None:
    telemetry = Path(reference.__file__).parent
    sources = (telemetry / "traces.py").read_text() + (telemetry / "export.py").read_text()
    attributes = set(re.findall(r'"((?:ratelimit|db|cloud|k8s|service)\.[a-z_.]+)":', sources))
    _, _, section = reference.render_otel().partition("\n## Attributes of spans\n")
    assert set(re.findall(r"`([a-z0-9]+\.[a-z_.]+)`", section)) == attributes - {"service.name"}


def test_the_page_is_made_from_the_table() -> None:
    assert reference.OTEL_PAGE.read_text() == reference.render_otel(), (
        "run python -m ratelimit_sidecar.telemetry.reference"
    )


@pytest.mark.parametrize("name", UNUSED)
def test_one_that_does_nothing_is_told_with_the_reason(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "something")
    with capture_logs() as logs:
        start_tracing("us-1", "us-east-1")
    [line] = logs
    assert (line["event"], line["variable"]) == ("otel_variable_unused", name)
    assert line["why"]


@pytest.mark.parametrize(
    ("name", "value", "attributes"),
    [
        ("OTEL_ATTRIBUTE_COUNT_LIMIT", "1", 1),
        ("OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "2", 2),
    ],
)
async def test_the_attributes_of_a_span_are_bounded(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, attributes: int
) -> None:
    span = of_name(await exported(monkeypatch, **{name: value}), REQUEST_SPAN)
    assert len(span.attributes) == attributes


@pytest.mark.parametrize("name", ["OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT", "OTEL_SPAN_ATTRIBUTE_VALUE_LENGTH_LIMIT"])
async def test_the_length_of_attributes_is_bounded(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    span = of_name(await exported(monkeypatch, **{name: "2"}), REQUEST_SPAN)
    assert span.attributes["ratelimit.domain"] == "ed"


@pytest.mark.parametrize(("variables", "links"), [({}, 2), ({"OTEL_SPAN_LINK_COUNT_LIMIT": "1"}, 1)])
async def test_the_links_of_a_span_are_bounded(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], links: int
) -> None:
    assert len(of_name(await exported(monkeypatch, **variables), BATCH_SPAN).links) == links


@pytest.mark.parametrize(
    "variables",
    [
        {"OTEL_TRACES_SAMPLER": "always_off"},
        {"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0"},
    ],
    ids=["sampler", "argument"],
)
async def test_the_sampler_chooses_among_what_envoy_samples(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    assert await exported(monkeypatch, **variables) == []


async def test_detectors_add_to_the_resource(monkeypatch: pytest.MonkeyPatch) -> None:
    [span, *_] = await exported(monkeypatch, OTEL_EXPERIMENTAL_RESOURCE_DETECTORS="process")
    assert span.resource["process.pid"] == os.getpid()
    assert span.resource["service.name"] == "ratelimit-sidecar"


async def test_the_resource_names_the_pod_and_its_node_in_kubernetes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"POD_NAME": "rl-0", "POD_NAMESPACE": "edge", "NODE_NAME": "worker-7"}.items():
        monkeypatch.setenv(name, value)
    [span, *_] = await exported(monkeypatch, OTEL_RESOURCE_ATTRIBUTES="k8s.node.name=renamed")
    assert span.resource["k8s.pod.name"] == "rl-0"
    assert span.resource["k8s.namespace.name"] == "edge"
    assert span.resource["k8s.node.name"] == "renamed"


async def test_a_request_to_the_collector_has_as_many_spans_as_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    async with OtlpReceiver() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
        monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "1")
        tracing = start_tracing("us-1", "us-east-1")
        for _ in range(3):
            trace_one_request(tracing)
        await tracing.close()
    assert receiver.requests == len(receiver.spans) == 3


@pytest.mark.parametrize("signal", ["", "TRACES_"])
async def test_a_collector_that_knows_its_senders_is_spoken_to_over_tls(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, signal: str
) -> None:
    files = Authority().write(tmp_path, "127.0.0.1")
    pair = (files.key.read_bytes(), files.certificate.read_bytes())
    credentials = grpc.ssl_server_credentials([pair], files.ca.read_bytes(), require_client_auth=True)
    async with OtlpReceiver(credentials) as receiver:
        monkeypatch.setenv(f"OTEL_EXPORTER_OTLP_{signal}ENDPOINT", f"https://{receiver.address}")
        monkeypatch.setenv(f"OTEL_EXPORTER_OTLP_{signal}CERTIFICATE", str(files.ca))
        monkeypatch.setenv(f"OTEL_EXPORTER_OTLP_{signal}CLIENT_CERTIFICATE", str(files.certificate))
        monkeypatch.setenv(f"OTEL_EXPORTER_OTLP_{signal}CLIENT_KEY", str(files.key))
        tracing = start_tracing("us-1", "us-east-1")
        trace_one_request(tracing)
        await tracing.close()
        assert [span.name for span in receiver.spans] == [REQUEST_SPAN]


@pytest.mark.parametrize("signal", ["", "TRACES_"])
async def test_an_endpoint_without_a_scheme_is_spoken_to_as_insecure_says(
    monkeypatch: pytest.MonkeyPatch, signal: str
) -> None:
    async with OtlpReceiver() as receiver:
        monkeypatch.setenv(f"OTEL_EXPORTER_OTLP_{signal}ENDPOINT", receiver.address)
        monkeypatch.setenv(f"OTEL_EXPORTER_OTLP_{signal}INSECURE", "true")
        tracing = start_tracing("us-1", "us-east-1")
        trace_one_request(tracing)
        await tracing.close()
        assert [span.name for span in receiver.spans] == [REQUEST_SPAN]


@pytest.mark.parametrize("signal", ["", "TRACES_"])
async def test_headers_and_compression_are_those_that_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, signal: str
) -> None:
    received: list[tuple[str | None, str | None]] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            received.append((self.headers["x-tenant"], self.headers["content-encoding"]))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with http.server.HTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        path = "/v1/traces" if signal else ""
        monkeypatch.setenv(f"OTEL_EXPORTER_OTLP_{signal}ENDPOINT", f"http://127.0.0.1:{server.server_port}{path}")
        monkeypatch.setenv(f"OTEL_EXPORTER_OTLP_{signal}PROTOCOL", "http/protobuf")
        monkeypatch.setenv(f"OTEL_EXPORTER_OTLP_{signal}HEADERS", "x-tenant=edge")
        monkeypatch.setenv(f"OTEL_EXPORTER_OTLP_{signal}COMPRESSION", "gzip")
        tracing = start_tracing("us-1", "us-east-1")
        trace_one_request(tracing)
        await tracing.close()
        server.shutdown()
        thread.join()
    assert received == [("edge", "gzip")]


def test_the_sdk_logs_from_the_level_on_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_LOG_LEVEL", "ERROR")
    start_tracing("us-1", "us-east-1")
    assert logging.getLogger("opentelemetry").level == logging.ERROR
    monkeypatch.setenv("OTEL_LOG_LEVEL", "loud")
    with pytest.raises(TracingError, match="OTEL_LOG_LEVEL is 'loud', expected one of"):
        start_tracing("us-1", "us-east-1")
