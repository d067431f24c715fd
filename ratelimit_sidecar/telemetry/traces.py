"""Spans. Each sampled request has one. Each replicated batch with takes of sampled requests has two, one at each end.
Each batch of such takes that is written to Redis has one.

The caller (Envoy) decides what is sampled. Without a `traceparent` whose sampled flag is set, or without B3 headers
that say so (Zipkin's), there is no span, and the cost is one pass over the names of headers. A batch belongs to no
single request. So its span is the root of a trace of its own and *links* to the requests in it. For that, requests are
remembered by bucket for at most a minute, and each peer's batches link to them once. The peer that applies the batch
continues its trace. Everything here runs on the event loop and waits for nothing; `telemetry/export.py` exports spans.
"""

from __future__ import annotations

import logging
import re
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from opentelemetry.context import Context
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    StatusCode,
    TraceFlags,
    Tracer,
    format_trace_id,
    get_current_span,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2 import RateLimitResponse
from ratelimit_sidecar.limiter.key import readable
from ratelimit_sidecar.limiter.plan import Plan, PlannedTake
from ratelimit_sidecar.limiter.rules import Consistency

# They log a warning for each malformed member of a `tracestate`, so callers could fill the log.
for _name in ("opentelemetry.trace.span", "opentelemetry.trace.propagation.tracecontext"):
    logging.getLogger(_name).setLevel(logging.ERROR)

REQUEST_SPAN = "envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit"
BATCH_SPAN = "replicate batch"
APPLY_SPAN = "apply batch"
WRITE_SPAN = "write to Redis"

MAX_BUCKETS: Final = 128
MAX_REQUESTS_PER_BUCKET: Final = 8
MAX_AGE_NS: Final = 60_000_000_000
"""Bounds of the requests remembered for links. Beyond them the oldest are forgotten, and a batch has fewer links."""

_SAMPLED_FLAG_AT: Final = 54
"""The position of the low digit of trace-flags: 2 + 1 + 32 + 1 + 16 + 1 + 2 (W3C Trace Context, section 3.2)."""
_SAMPLED_DIGITS: Final = b"13579bdf"

_TRACE_ID_BYTES: Final = 16
_SPAN_ID_BYTES: Final = 8

_TRACEPARENT: Final = b"traceparent"

# https://github.com/openzipkin/b3-propagation: one header, or several of which the first two are always there.
_B3: Final = b"b3"
_B3_TRACE_ID: Final = b"x-b3-traceid"
_B3_HEADERS: Final = (_B3_TRACE_ID, b"x-b3-spanid", b"x-b3-sampled", b"x-b3-flags")
_TRACE_HEADERS: Final = frozenset((_TRACEPARENT, _B3, _B3_TRACE_ID))
_B3_IDS: Final = re.compile(rb"(?P<trace>(?:[0-9a-fA-F]{16}){1,2})-(?P<span>[0-9a-fA-F]{16})-[1d](?:-.*)?")

_RPC = {
    # https://opentelemetry.io/docs/specs/semconv/rpc/grpc/
    "rpc.system.name": "grpc",
    "rpc.method": REQUEST_SPAN,
}

_TRACE_IDS: Final = re.compile(rb"00-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}|((?:[0-9a-fA-F]{16}){1,2})(?:-.*)?")

Metadata = Iterable[tuple[bytes, bytes]]
"""Raw request headers; names in lower case."""


def trace_fields(metadata: Metadata) -> dict[str, str]:
    """Fields for a log line: `trace_id` in hexadecimal, if the request belongs to a trace, sampled or not."""
    for name, value in metadata:
        if name in _TRACE_HEADERS:
            ids = _TRACE_IDS.fullmatch(value)
            if ids is not None:
                return {"trace_id": (ids[1] or ids[2].lower().zfill(32)).decode()}
    return {}


@dataclass(slots=True)
class _Taken:
    """A sampled request that took from a bucket.

    Args:
        at_ns: when, on the monotonic clock.
        linked_by: the peers whose batches already have the link; "" for what is written to Redis.
    """

    request: SpanContext
    at_ns: int
    linked_by: set[str] = field(default_factory=set)


class BatchSpan:
    """The span of a batch that is being sent, applied or written."""

    __slots__ = ("span",)

    def __init__(self, span: Span) -> None:
        self.span = span

    @property
    def context(self) -> bytes:
        """Trace id and span id."""
        of = self.span.get_span_context()
        return of.trace_id.to_bytes(_TRACE_ID_BYTES, "big") + of.span_id.to_bytes(_SPAN_ID_BYTES, "big")

    def end(self, error: str = "") -> None:
        if error:
            self.span.set_status(StatusCode.ERROR, error)
        self.span.end()


class RequestTracer:
    """Makes the spans of requests and batches, and remembers which sampled request took from which bucket.

    Args:
        tracer: the SDK's, so that its sampler and limits (OTEL_TRACES_SAMPLER, OTEL_SPAN_*) apply.
        monotonic_ns: returns nanoseconds, to measure the age of what is remembered.
    """

    def __init__(self, tracer: Tracer, monotonic_ns: Callable[[], int] = time.monotonic_ns) -> None:
        self._tracer = tracer
        self._monotonic_ns = monotonic_ns
        self._propagator = TraceContextTextMapPropagator()
        self._taken: OrderedDict[bytes, deque[_Taken]] = OrderedDict()
        """By bucket key; the bucket used last is at the end."""

    def sampled(self, metadata: Metadata) -> Context | None:
        """The caller's span context if it is sampled, to pass to `record`."""
        has_b3 = False
        for name, value in metadata:
            if name not in _TRACE_HEADERS:
                continue
            if name != _TRACEPARENT:
                has_b3 = True
            elif len(value) > _SAMPLED_FLAG_AT and value[_SAMPLED_FLAG_AT] in _SAMPLED_DIGITS:
                return self._parent(value, metadata)
            else:
                return None
        return self._parent_of_b3(metadata) if has_b3 else None

    def record(self, parent: object, started_ns: int, ended_ns: int, plan: Plan, response: bytes) -> str | None:
        """Make the span of an answered request.

        Args:
            parent: what `sampled` returned.
            started_ns: nanoseconds since the epoch; so is `ended_ns`.
            response: the answer, a serialized RateLimitResponse for `plan`.

        Returns:
            The trace's id in hexadecimal; None when our own sampler leaves the span out.
        """
        assert isinstance(parent, Context)
        answer = RateLimitResponse.FromString(response)
        decided = [
            (take, status.code == RateLimitResponse.OVER_LIMIT)
            for take, status in zip(plan.takes, answer.statuses, strict=True)
        ]
        limited = [
            (take.rule, status.limit_remaining)
            for take, status in zip(plan.takes, answer.statuses, strict=True)
            if take.rule is not None and take.rule.limit is not None
        ]
        span = self._tracer.start_span(
            REQUEST_SPAN,
            parent,
            SpanKind.SERVER,
            attributes={
                **_RPC,
                "rpc.response.status_code": "OK",
                "ratelimit.domain": readable(plan.domain),
                "ratelimit.code": RateLimitResponse.Code.Name(answer.overall_code),
                "ratelimit.over_limit": [take.rule.name for take, over in decided if over and take.rule],
                # Side by side: an element each for every descriptor that has a limit.
                "ratelimit.rules": [rule.name for rule, _ in limited],
                "ratelimit.remaining": [remaining for _, remaining in limited],
                "ratelimit.consistency": [rule.consistency.value for rule, _ in limited],
            },
            start_time=started_ns,
        )
        span.end(ended_ns)
        context = span.get_span_context()
        if not context.trace_flags.sampled:
            return None
        for take, over in decided:
            if not over and _replicates(take):
                self._remember(take.bucket_key, context)
        return format_trace_id(context.trace_id)

    def batch_span(self, peer_node: str, bucket_keys: Iterable[bytes]) -> BatchSpan | None:
        """Start the span of a batch about to be sent to a peer; whoever sends it ends it at the acknowledgement.

        Args:
            bucket_keys: the buckets in the batch.

        Returns:
            None when no sampled request took from them that the peer's batches have no link to yet.
        """
        links = self._links(peer_node, bucket_keys)
        if not links:
            return None
        return self._root_span(BATCH_SPAN, SpanKind.PRODUCER, {"ratelimit.peer": peer_node}, links)

    def write_span(self, bucket_keys: Sequence[bytes]) -> BatchSpan | None:
        """Start the span of a batch about to be written to Redis; whoever writes it ends it then.

        Returns:
            None when no sampled request took from these buckets that no such span links to yet.
        """
        links = self._links("", bucket_keys)
        if not links:
            return None
        # https://opentelemetry.io/docs/specs/semconv/database/redis/
        attributes: dict[str, str | int] = {"db.system.name": "redis", "db.operation.batch.size": len(bucket_keys)}
        return self._root_span(WRITE_SPAN, SpanKind.CLIENT, attributes, links)

    def _links(self, linked_by: str, bucket_keys: Iterable[bytes]) -> list[Link]:
        """Links to the requests that took from these buckets, each once."""
        if not self._taken:
            return []
        oldest_ns = self._monotonic_ns() - MAX_AGE_NS
        self._forget_before(oldest_ns)
        # By span, so that a request which took from several of the buckets is one link.
        links: dict[int, Link] = {}
        for key in bucket_keys:
            for taken in self._taken.get(key, ()):
                if taken.at_ns >= oldest_ns and linked_by not in taken.linked_by:
                    taken.linked_by.add(linked_by)
                    links[taken.request.span_id] = Link(taken.request)
        return list(links.values())

    def _root_span(
        self, name: str, kind: SpanKind, attributes: Mapping[str, str | int], links: Sequence[Link]
    ) -> BatchSpan:
        # In an empty context: the root of a trace.
        return BatchSpan(self._tracer.start_span(name, Context(), kind, attributes=attributes, links=links))

    def apply_span(self, peer_node: str, context: bytes) -> BatchSpan | None:
        """Start the span of a batch that is being applied; whoever applies it ends it then.

        Args:
            context: of the batch's span at the peer that has sent it, as `BatchSpan.context` has it. A peer may send
                anything.

        Returns:
            None when that is no context.
        """
        if len(context) != _TRACE_ID_BYTES + _SPAN_ID_BYTES:
            return None
        trace, span = context[:_TRACE_ID_BYTES], context[_TRACE_ID_BYTES:]
        sent = SpanContext(
            int.from_bytes(trace, "big"), int.from_bytes(span, "big"), is_remote=True, trace_flags=TraceFlags(1)
        )
        if not sent.is_valid:
            return None
        parent = set_span_in_context(NonRecordingSpan(sent), Context())
        return BatchSpan(
            self._tracer.start_span(APPLY_SPAN, parent, SpanKind.CONSUMER, attributes={"ratelimit.peer": peer_node})
        )

    def _parent(self, traceparent: bytes, metadata: Metadata) -> Context | None:
        carrier = {
            "traceparent": [traceparent.decode("latin-1")],
            "tracestate": [value.decode("latin-1") for name, value in metadata if name == b"tracestate"],
        }
        context = self._propagator.extract(carrier, Context())
        return context if get_current_span(context).get_span_context().is_valid else None

    def _parent_of_b3(self, metadata: Metadata) -> Context | None:
        headers = dict(metadata)
        single = headers.get(_B3)
        if single is None:
            trace, span, sampled, flags = [headers.get(name, b"") for name in _B3_HEADERS]
            # Debug means sampled too.
            state = b"1" if sampled in (b"1", b"true") or flags == b"1" else b"0"
            single = b"-".join((trace, span, state))
        ids = _B3_IDS.fullmatch(single)
        if ids is None:
            return None
        return self._parent(b"00-%b-%b-01" % (ids["trace"].lower().zfill(32), ids["span"].lower()), ())

    def _remember(self, bucket_key: bytes, request: SpanContext) -> None:
        taken = self._taken.setdefault(bucket_key, deque(maxlen=MAX_REQUESTS_PER_BUCKET))
        taken.append(_Taken(request, self._monotonic_ns()))
        self._taken.move_to_end(bucket_key)
        if len(self._taken) > MAX_BUCKETS:
            self._taken.popitem(last=False)

    def _forget_before(self, oldest_ns: int) -> None:
        while self._taken:
            key, taken = next(iter(self._taken.items()))
            if taken[-1].at_ns >= oldest_ns:
                return
            del self._taken[key]


class NoTracer:
    """Stands for a `RequestTracer` while tracing is off."""

    def sampled(self, metadata: Metadata) -> None:
        return None

    def record(self, parent: object, started_ns: int, ended_ns: int, plan: Plan, response: bytes) -> None:
        """Never called, since nothing is sampled."""

    def batch_span(self, peer_node: str, bucket_keys: Iterable[bytes]) -> None:
        return None

    def apply_span(self, peer_node: str, context: bytes) -> None:
        return None

    def write_span(self, bucket_keys: Sequence[bytes]) -> None:
        return None


def _replicates(take: PlannedTake) -> bool:
    rule = take.rule
    return rule is not None and rule.limit is not None and rule.consistency is not Consistency.LOCAL and take.hits > 0
