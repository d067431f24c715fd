"""Which spans are made, of what, and to whom a batch links."""

from __future__ import annotations

import logging
import random
import time
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from observed import NOW_US, check_only, request, small_limiter
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, Sampler
from opentelemetry.trace import SpanKind, get_current_span

from ratelimit_sidecar.limiter.limiter import Limiter
from ratelimit_sidecar.telemetry.traces import (
    MAX_AGE_NS,
    MAX_BUCKETS,
    MAX_REQUESTS_PER_BUCKET,
    REQUEST_SPAN,
    BatchSpan,
    NoTracer,
    RequestTracer,
)

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
CALLER_ID = "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE_ID}-{CALLER_ID}-01".encode()

STARTED_NS = NOW_US * 1_000
ENDED_NS = STARTED_NS + 25_000


class LogCapture(logging.Handler):
    """What is logged through `logging` meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def __enter__(self) -> LogCapture:
        logging.getLogger().addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger().removeHandler(self)


def headers(traceparent: bytes | None = TRACEPARENT, *more: tuple[bytes, bytes]) -> list[tuple[bytes, bytes]]:
    plain = [(b"content-type", b"application/grpc"), (b"te", b"trailers"), (b"x-traceparent", TRACEPARENT)]
    return plain + ([] if traceparent is None else [(b"traceparent", traceparent)]) + list(more)


@dataclass
class Traced:
    """A limiter whose sampled requests are traced into memory, on a clock that stands still."""

    sampler: Sampler | None = None
    limiter: Limiter = field(default_factory=small_limiter)
    now_ns: int = 0

    def __post_init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider(sampler=self.sampler, shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = RequestTracer(provider.get_tracer("test"), lambda: self.now_ns)

    def decide(self, raw: bytes) -> None:
        parent = self.tracer.sampled(headers())
        assert parent is not None
        response = self.limiter.decide(raw, NOW_US)
        self.tracer.record(parent, STARTED_NS, ENDED_NS, self.limiter.plan(raw), response)

    def key(self, raw: bytes) -> bytes:
        return self.limiter.plan(raw).takes[0].bucket_key

    def spans(self) -> list[ReadableSpan]:
        return list(self.exporter.get_finished_spans())


def read(batch: BatchSpan | None) -> ReadableSpan:
    assert batch is not None
    assert isinstance(batch.span, ReadableSpan)
    return batch.span


def links(batch: BatchSpan | None) -> list[int]:
    return [link.context.span_id for link in read(batch).links]


@pytest.mark.parametrize("flags", ["01", "03", "0b", "ff"])
def test_a_request_with_the_sampled_flag_is_sampled(flags: str) -> None:
    traceparent = TRACEPARENT[:-2] + flags.encode()
    assert Traced().tracer.sampled(headers(traceparent)) is not None


@pytest.mark.parametrize(
    "traceparent",
    [
        None,
        b"",
        TRACEPARENT[:-2] + b"00",
        TRACEPARENT[:-2] + b"02",
        TRACEPARENT[:-2] + b"1a",
        TRACEPARENT[:-1],
        TRACEPARENT[:-1] + b"x",
        TRACEPARENT + b"-more",
        b"ff" + TRACEPARENT[2:],
        TRACEPARENT.replace(TRACE_ID.encode(), b"0" * 32),
        TRACEPARENT.replace(CALLER_ID.encode(), b"0" * 16),
        TRACEPARENT.upper(),
        b"\xff" * 55,
        b"1" * 10_000,
    ],
)
def test_any_other_request_is_not(traceparent: bytes | None) -> None:
    assert Traced().tracer.sampled(headers(traceparent)) is None


def b3(**more: str) -> list[tuple[bytes, bytes]]:
    """Zipkin's headers, with others in place of the given ones; empty for none."""
    given = {"traceid": TRACE_ID, "spanid": CALLER_ID, "sampled": "1", **more}
    return [(f"x-b3-{name}".encode(), value.encode()) for name, value in given.items() if value]


SINGLE = f"{TRACE_ID}-{CALLER_ID}"


@pytest.mark.parametrize(
    "given",
    [
        b3(),
        b3(sampled="true", parentspanid="05e3ac9a4f6e3b90"),
        b3(sampled="", flags="1"),
        [(b"b3", f"{SINGLE}-1".encode())],
        [(b"b3", f"{SINGLE.upper()}-d-05e3ac9a4f6e3b90".encode())],
        # Of both the single header counts.
        [*b3(sampled="0"), (b"b3", f"{SINGLE}-1".encode())],
    ],
)
def test_without_a_traceparent_zipkins_headers_continue_a_trace(given: list[tuple[bytes, bytes]]) -> None:
    tracer = Traced().tracer
    parent = tracer.sampled(headers(None, *given))
    assert parent is not None
    context = get_current_span(parent).get_span_context()
    assert (f"{context.trace_id:032x}", f"{context.span_id:016x}") == (TRACE_ID, CALLER_ID)


def test_a_trace_id_of_64_bits_is_one_of_128_with_zeros_before_it() -> None:
    parent = Traced().tracer.sampled(headers(None, *b3(traceid=TRACE_ID[16:])))
    assert parent is not None
    assert f"{get_current_span(parent).get_span_context().trace_id:032x}" == "0" * 16 + TRACE_ID[16:]


@pytest.mark.parametrize(
    "given",
    [
        b3(sampled="0"),
        b3(sampled=""),
        b3(spanid=""),
        b3(traceid=""),
        b3(traceid="0" * 32),
        b3(traceid=TRACE_ID + "0"),
        b3(spanid="x" * 16),
        [(b"b3", b"0")],
        [(b"b3", b"1")],
        [(b"b3", SINGLE.encode())],
        [(b"b3", f"{SINGLE}-0".encode())],
        [(b"b3", b"\xff" * 60)],
        [*b3(), (b"traceparent", TRACEPARENT[:-2] + b"00")],
    ],
)
def test_other_headers_of_zipkin_are_not_sampled(given: list[tuple[bytes, bytes]]) -> None:
    assert Traced().tracer.sampled(headers(None, *given)) is None


def test_random_bytes_in_the_header_are_survived() -> None:
    tracer = Traced().tracer
    rng = random.Random(1)
    for _ in range(2_000):
        garbled = bytearray(TRACEPARENT)
        for _ in range(rng.randrange(4)):
            garbled[rng.randrange(len(garbled))] = rng.randrange(256)
        tracer.sampled(headers(bytes(garbled), (b"tracestate", rng.randbytes(20))))
        tracer.sampled(headers(None, (b"b3", bytes(garbled[3:]))))
        tracer.sampled(headers(None, *b3(), (b"x-b3-traceid", rng.randbytes(32))))


@pytest.mark.parametrize("between", [b" ", b"\t", b",", b"@", b"a", b"=", b" ,", b"a=b,"])
def test_no_tracestate_takes_long_to_read(between: bytes) -> None:
    tracer = Traced().tracer
    given = headers(TRACEPARENT, (b"tracestate", b"a=b" + between * (60_000 // len(between)) + b"c"))
    began = time.perf_counter()
    tracer.sampled(given)
    assert time.perf_counter() - began < 0.5


def test_a_request_span_continues_the_callers_trace() -> None:
    traced = Traced()
    traced.decide(request(("tenant", "acme")))
    [span] = traced.spans()
    assert span.name == REQUEST_SPAN
    assert span.kind is SpanKind.SERVER
    assert f"{span.context.trace_id:032x}" == TRACE_ID
    assert f"{span.parent.span_id:016x}" == CALLER_ID
    assert (span.start_time, span.end_time) == (STARTED_NS, ENDED_NS)


def test_the_callers_tracestate_is_kept() -> None:
    traced = Traced()
    raw = request(("tenant", "acme"))
    parent = traced.tracer.sampled(headers(TRACEPARENT, (b"tracestate", b"vendor=opaque")))
    response = traced.limiter.decide(raw, NOW_US)
    traced.tracer.record(parent, STARTED_NS, ENDED_NS, traced.limiter.plan(raw), response)
    [span] = traced.spans()
    assert span.context.trace_state.to_header() == "vendor=opaque"


def test_a_request_span_says_what_was_decided() -> None:
    traced = Traced()
    raw = request(("tenant", "acme"), ("plan", "gold"), ("nothing", "limits this"), hits=2)
    traced.decide(raw)
    traced.decide(raw)
    admitted, denied = traced.spans()
    assert dict(admitted.attributes) == {
        "rpc.system.name": "grpc",
        "rpc.method": "envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit",
        "rpc.response.status_code": "OK",
        "ratelimit.domain": "edge",
        "ratelimit.code": "OK",
        "ratelimit.over_limit": (),
        "ratelimit.rules": ("edge.tenant",),
        "ratelimit.remaining": (0,),
        "ratelimit.consistency": ("eventual",),
    }
    assert denied.attributes["ratelimit.code"] == "OVER_LIMIT"
    assert denied.attributes["ratelimit.over_limit"] == ("edge.tenant",)


def test_a_batch_links_to_the_sampled_requests_that_took_from_its_buckets() -> None:
    traced = Traced()
    acme, other = request(("tenant", "acme")), request(("tenant", "other"))
    traced.decide(acme)
    traced.decide(other)
    traced.decide(acme)
    first, _, third = (span.context.span_id for span in traced.spans())
    batch = traced.tracer.batch_span("eu-1", [b"untraced", traced.key(acme)])
    assert links(batch) == [first, third]
    span = read(batch)
    assert span.kind is SpanKind.PRODUCER
    assert span.parent is None
    assert dict(span.attributes) == {"ratelimit.peer": "eu-1"}


def test_what_is_written_to_redis_links_to_the_sampled_requests_in_it_once() -> None:
    traced = Traced()
    raw = request(("tenant", "acme"))
    assert traced.tracer.write_span([traced.key(raw)]) is None
    traced.decide(raw)
    written = traced.tracer.write_span([b"untraced", traced.key(raw)])
    assert links(written) == [traced.spans()[0].context.span_id]
    span = read(written)
    assert span.kind is SpanKind.CLIENT
    assert span.parent is None
    assert dict(span.attributes) == {"db.system.name": "redis", "db.operation.batch.size": 2}
    assert traced.tracer.write_span([traced.key(raw)]) is None
    assert len(links(traced.tracer.batch_span("eu-1", [traced.key(raw)]))) == 1


def test_the_peer_that_applies_a_batch_continues_its_trace() -> None:
    traced, there = Traced(), Traced()
    raw = request(("tenant", "acme"))
    traced.decide(raw)
    sent = traced.tracer.batch_span("eu-1", [traced.key(raw)])
    assert sent is not None
    applied = there.tracer.apply_span("us-1", sent.context)
    assert applied is not None
    applied.end()
    [span] = there.spans()
    assert span.kind is SpanKind.CONSUMER
    assert span.parent is not None
    assert (span.parent.trace_id, span.parent.span_id) == (read(sent).context.trace_id, read(sent).context.span_id)
    assert span.context.trace_id == read(sent).context.trace_id


@pytest.mark.parametrize("context", [b"", bytes(24), bytes(16) + b"12345678", b"x" * 23, b"x" * 100])
def test_what_is_no_context_of_a_batch_is_ignored(context: bytes) -> None:
    traced = Traced()
    assert traced.tracer.apply_span("us-1", context) is None
    assert NoTracer().apply_span("us-1", context) is None


def test_each_peer_gets_a_link_once() -> None:
    traced = Traced()
    raw = request(("tenant", "acme"))
    traced.decide(raw)
    keys = [traced.key(raw)]
    assert len(links(traced.tracer.batch_span("eu-1", keys))) == 1
    assert len(links(traced.tracer.batch_span("ap-1", keys))) == 1
    assert traced.tracer.batch_span("eu-1", keys) is None
    assert traced.tracer.batch_span("ap-1", keys) is None
    traced.decide(raw)
    assert len(links(traced.tracer.batch_span("eu-1", keys))) == 1


def test_a_request_that_took_from_several_buckets_of_a_batch_is_one_link() -> None:
    traced = Traced()
    raw = request(("tenant", "a"), ("tenant", "b"))
    traced.decide(raw)
    keys = [take.bucket_key for take in traced.limiter.plan(raw).takes]
    assert len(links(traced.tracer.batch_span("eu-1", keys))) == 1
    assert len(links(traced.tracer.batch_span("ap-1", keys[:1]))) == 1
    assert len(links(traced.tracer.batch_span("ap-1", keys[1:]))) == 1


@pytest.mark.parametrize(
    "raw",
    [
        request(("tenant", "acme"), hits=3),
        check_only(("tenant", "acme")),
        request(("ip", "10.0.0.1")),
        request(("plan", "gold")),
        request(("nothing", "limits this")),
    ],
    ids=["denied", "no hits", "local", "unlimited", "no rule"],
)
def test_what_takes_nothing_that_replicates_is_not_linked(raw: bytes) -> None:
    traced = Traced()
    traced.decide(raw)
    assert len(traced.spans()) == 1
    assert traced.tracer.batch_span("eu-1", [traced.key(raw)]) is None


def test_a_request_the_sdk_does_not_sample_is_not_linked() -> None:
    traced = Traced(sampler=ALWAYS_OFF)
    raw = request(("tenant", "acme"))
    traced.decide(raw)
    assert traced.tracer.batch_span("eu-1", [traced.key(raw)]) is None


def test_only_the_newest_requests_of_a_bucket_are_remembered() -> None:
    traced = Traced()
    raw = request(("tenant", "acme"))
    for _ in range(MAX_REQUESTS_PER_BUCKET + 1):
        # A limiter of its own for each, so that none is denied.
        traced.limiter = small_limiter()
        traced.decide(raw)
    newest = [span.context.span_id for span in traced.spans()][1:]
    assert links(traced.tracer.batch_span("eu-1", [traced.key(raw)])) == newest


def test_only_the_buckets_taken_from_last_are_remembered() -> None:
    traced = Traced()
    raws = [request(("tenant", f"t{number}")) for number in range(MAX_BUCKETS)]
    for raw in [*raws, raws[0], request(("tenant", "one more"))]:
        traced.decide(raw)
    assert traced.tracer.batch_span("eu-1", [traced.key(raws[1])]) is None
    assert len(links(traced.tracer.batch_span("eu-1", [traced.key(raws[0])]))) == 2
    assert len(links(traced.tracer.batch_span("eu-1", map(traced.key, raws)))) == MAX_BUCKETS - 2


def test_a_batch_long_after_a_request_does_not_link_to_it() -> None:
    traced = Traced()
    raw = request(("tenant", "acme"))
    traced.decide(raw)
    traced.now_ns += MAX_AGE_NS
    assert traced.tracer.batch_span("eu-1", [traced.key(raw)]) is not None
    traced.now_ns += 1
    assert traced.tracer.batch_span("ap-1", [traced.key(raw)]) is None
    # What is too old costs nothing any more.
    keys = iter([traced.key(raw)])
    assert traced.tracer.batch_span("ap-1", keys) is None
    assert list(keys) == [traced.key(raw)]


def test_a_bucket_in_use_does_not_keep_its_old_requests() -> None:
    traced = Traced()
    raw = request(("tenant", "acme"))
    traced.decide(raw)
    traced.now_ns += MAX_AGE_NS + 1
    traced.decide(raw)
    _, second = (span.context.span_id for span in traced.spans())
    assert links(traced.tracer.batch_span("eu-1", [traced.key(raw)])) == [second]


def test_nothing_is_sampled_or_linked_while_tracing_is_off() -> None:
    tracer = NoTracer()
    assert tracer.sampled(headers()) is None
    assert tracer.batch_span("eu-1", [b"k"]) is None


@given(
    st.binary(max_size=60)
    | st.builds(
        lambda at, byte: TRACEPARENT[:at] + byte + TRACEPARENT[at + 1 :],
        st.integers(0, 54),
        st.binary(min_size=1, max_size=1),
    ),
    st.binary(max_size=80) | st.text("abc=,@* \t\xe9", max_size=60).map(str.encode),
)
def test_whatever_a_caller_says_of_its_trace_is_no_error_and_not_logged(traceparent: bytes, tracestate: bytes) -> None:
    with LogCapture() as log:
        Traced().tracer.sampled(headers(traceparent, (b"tracestate", tracestate)))
    assert log.records == []
