"""How RateLimitService feeds telemetry. What it decides is in tests/limiter and tests/conformance."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.envoy_api.envoy.extensions.common.ratelimit.v3.ratelimit_pb2 import RateLimitDescriptor
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2 import RateLimitRequest, RateLimitResponse
from ratelimit_sidecar.limiter.limiter import Limiter
from ratelimit_sidecar.limiter.plan import Plan
from ratelimit_sidecar.limiter.rules import Rules
from ratelimit_sidecar.server.rpc import Code, Headers, Metadata, RpcError
from ratelimit_sidecar.services.ratelimit import RateLimitService
from ratelimit_sidecar.telemetry.latency import Exemplar, LatencyHistogram

REQUEST = RateLimitRequest(
    domain="shop", descriptors=[RateLimitDescriptor(entries=[RateLimitDescriptor.Entry(key="user", value="ada")])]
).SerializeToString()
SAMPLED = Headers([(b"traceparent", b"sampled")])
NOW_US = 1_700_000_000_000_000


@dataclass
class Observed:
    """A request tracer, and the latencies."""

    latency: LatencyHistogram = field(default_factory=LatencyHistogram)
    looked_at: list[Metadata] = field(default_factory=list)
    records: list[tuple[object, int, int, Plan, bytes]] = field(default_factory=list)

    @property
    def timed(self) -> int:
        """Calls."""
        return sum(self.latency.counts)

    def sampled(self, metadata: Metadata) -> object | None:
        self.looked_at.append(metadata)
        return "the caller" if (b"traceparent", b"sampled") in list(metadata) else None

    def record(self, parent: object, started_ns: int, ended_ns: int, plan: Plan, response: bytes) -> str:
        self.records.append((parent, started_ns, ended_ns, plan, response))
        return "its trace"


def service_with(observed: Observed) -> RateLimitService:
    limiter = Limiter(Rules(), Origin("node", 1))
    return RateLimitService(limiter, lambda: NOW_US, observed.latency, observed)


def test_a_call_that_is_not_sampled_is_timed_and_not_recorded() -> None:
    observed = Observed()
    metadata = Headers([(b"traceparent", b"not sampled")])
    service_with(observed).should_rate_limit(REQUEST, metadata)
    assert observed.timed == 1
    assert observed.latency.sum_ns > 0
    assert observed.looked_at == [metadata]
    assert observed.records == []


def test_the_headers_of_a_call_that_cannot_be_sampled_are_not_looked_at() -> None:
    class Untraced:
        may_be_sampled = False

        def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
            raise AssertionError

    observed = Observed()
    service_with(observed).should_rate_limit(REQUEST, Untraced())
    assert (observed.timed, observed.looked_at) == (1, [])


def test_the_plan_of_a_sampled_call_is_made_once_however_large() -> None:
    observed = Observed()
    limiter = Limiter(Rules(), Origin("node", 1))
    entry = RateLimitDescriptor.Entry(key="user", value="a" * 60_000)
    large = RateLimitRequest(domain="shop", descriptors=[RateLimitDescriptor(entries=[entry])]).SerializeToString()
    RateLimitService(limiter, lambda: NOW_US, observed.latency, observed).should_rate_limit(large, SAMPLED)
    assert limiter.plan_counts.misses == len(observed.records) == 1


def test_a_sampled_call_is_recorded_with_its_plan_and_answer() -> None:
    observed = Observed()
    before_ns = time.time_ns()
    response = service_with(observed).should_rate_limit(REQUEST, SAMPLED)
    ((parent, started_ns, ended_ns, plan, recorded),) = observed.records
    assert parent == "the caller"
    assert before_ns - 1_000_000 <= started_ns < ended_ns <= time.time_ns()
    assert ended_ns - started_ns == observed.latency.sum_ns
    exemplars = [of for of in observed.latency.exemplars if of is not None]
    assert exemplars == [Exemplar("its trace", observed.latency.sum_ns, ended_ns)]
    assert plan.domain == "shop"
    assert recorded == response
    assert RateLimitResponse.FromString(response).overall_code == RateLimitResponse.OK


def test_an_invalid_request_is_counted_and_neither_timed_nor_traced() -> None:
    observed = Observed()
    service = service_with(observed)
    with pytest.raises(RpcError, match="domain must not be empty") as caught:
        service.should_rate_limit(b"", SAMPLED)
    assert caught.value.code == Code.INVALID_ARGUMENT
    assert service.errors == {"invalid": 1, "internal": 0, "no_rules": 0}
    assert (observed.timed, observed.looked_at, observed.records) == (0, [], [])


def test_a_fault_in_here_is_counted_and_passed_on() -> None:
    observed = Observed()
    service = RateLimitService(Limiter(Rules(), Origin("node", 1)), lambda: 1 // 0, observed.latency, observed)
    with pytest.raises(ZeroDivisionError):
        service.should_rate_limit(REQUEST, SAMPLED)
    assert service.errors == {"invalid": 0, "internal": 1, "no_rules": 0}
    assert (observed.timed, observed.looked_at, observed.records) == (0, [], [])


def test_its_method_is_envoys() -> None:
    assert list(service_with(Observed()).handlers()) == ["/envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit"]


def test_tracing_that_fails_takes_no_answer_away(capfd: pytest.CaptureFixture[str]) -> None:
    class Broken(Observed):
        def sampled(self, metadata: Metadata) -> object | None:
            raise RuntimeError("no tracing today")

    service = service_with(Broken())
    answers = {service.should_rate_limit(REQUEST, SAMPLED) for _ in range(3)}
    assert [RateLimitResponse.FromString(answer).overall_code for answer in answers] == [RateLimitResponse.OK]
    assert capfd.readouterr().out.count("rpc_failed") == 1
