"""An OpenTelemetry collector for tests: takes spans over OTLP/gRPC and hands them out as they come."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import grpc
import grpc.aio
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1 import trace_pb2

Value = str | int | float | bool | list["Value"]


@dataclass(frozen=True)
class ReceivedSpan:
    """A span as it came in. Ids are lower-case hex, "" when absent, as in a `traceparent`."""

    name: str
    kind: str
    """SERVER, PRODUCER, ..."""
    trace_id: str
    span_id: str
    parent_span_id: str
    trace_state: str
    started_ns: int
    ended_ns: int
    attributes: dict[str, Value]
    links: list[tuple[str, str]]
    """Trace id and span id of each."""
    resource: dict[str, Value]
    """Attributes of what sent it: `service.name`, `service.instance.id`, `cloud.region`."""


class OtlpReceiver(TraceServiceServicer):
    """`async with OtlpReceiver() as receiver`; exporters are given OTEL_EXPORTER_OTLP_ENDPOINT=`receiver.endpoint`."""

    def __init__(self, credentials: grpc.ServerCredentials | None = None) -> None:
        self.address = ""
        """host:port."""
        self.requests = 0
        self._credentials = credentials
        self.spans: list[ReceivedSpan] = []
        self._more = asyncio.Condition()
        self._server = grpc.aio.server()

    @property
    def endpoint(self) -> str:
        return f"http://{self.address}"

    async def __aenter__(self) -> Self:
        add_TraceServiceServicer_to_server(self, self._server)
        if self._credentials is None:
            port = self._server.add_insecure_port("127.0.0.1:0")
        else:
            port = self._server.add_secure_port("127.0.0.1:0", self._credentials)
        self.address = f"127.0.0.1:{port}"
        await self._server.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._server.stop(0)

    async def span(
        self,
        predicate: Callable[[ReceivedSpan], bool],
        timeout: float = 10.0,  # noqa: ASYNC109 (it also words the error)
    ) -> ReceivedSpan:
        """The first span that has come or will come for which `predicate` holds.

        Raises:
            AssertionError: none came within `timeout` seconds; its text lists what did.
        """
        try:
            async with asyncio.timeout(timeout), self._more:
                while True:
                    for span in self.spans:
                        if predicate(span):
                            return span
                    await self._more.wait()
        except TimeoutError:
            raise AssertionError(f"no such span within {timeout} s; received: {self.spans}") from None

    async def Export(  # noqa: N802 (gRPC's name)
        self, request: ExportTraceServiceRequest, _context: object
    ) -> ExportTraceServiceResponse:
        async with self._more:
            self.requests += 1
            self.spans += received_spans(request)
            self._more.notify_all()
        return ExportTraceServiceResponse()


def received_spans(request: ExportTraceServiceRequest) -> list[ReceivedSpan]:
    return [
        _received(span, _attributes(of_resource.resource.attributes))
        for of_resource in request.resource_spans
        for of_scope in of_resource.scope_spans
        for span in of_scope.spans
    ]


def _received(span: trace_pb2.Span, resource: dict[str, Value]) -> ReceivedSpan:
    return ReceivedSpan(
        name=span.name,
        kind=trace_pb2.Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_span_id=span.parent_span_id.hex(),
        trace_state=span.trace_state,
        started_ns=span.start_time_unix_nano,
        ended_ns=span.end_time_unix_nano,
        attributes=_attributes(span.attributes),
        links=[(link.trace_id.hex(), link.span_id.hex()) for link in span.links],
        resource=resource,
    )


def _attributes(pairs: list[KeyValue]) -> dict[str, Value]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> Value:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    assert kind is not None
    return getattr(value, kind)
