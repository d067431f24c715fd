"""Requests, and the answers to them, as the tests of the limiter speak of them."""

from __future__ import annotations

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.envoy_api.envoy.extensions.common.ratelimit.v3.ratelimit_pb2 import RateLimitDescriptor
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2 import RateLimitRequest, RateLimitResponse
from ratelimit_sidecar.limiter.limiter import Limiter
from ratelimit_sidecar.limiter.rules import Rules
from ratelimit_sidecar.limiter.settings import AnswerSettings

# The beginning of a minute.
NOW_US = 1_790_000_040_000_000
OK, OVER_LIMIT = RateLimitResponse.OK, RateLimitResponse.OVER_LIMIT


def make_limiter(rules: Rules, settings: AnswerSettings | None = None) -> Limiter:
    return Limiter(rules, Origin("here", 1), settings)


def make_request(*descriptors: dict[str, str], domain: str = "api", hits: int = 0) -> bytes:
    return RateLimitRequest(
        domain=domain,
        hits_addend=hits,
        descriptors=[
            RateLimitDescriptor(
                entries=[RateLimitDescriptor.Entry(key=key, value=value) for key, value in entries.items()]
            )
            for entries in descriptors
        ],
    ).SerializeToString()


def decide(limiter: Limiter, request: bytes, now_us: int = NOW_US) -> RateLimitResponse:
    return RateLimitResponse.FromString(limiter.decide(request, now_us))


def headers_of(response: RateLimitResponse) -> dict[str, str]:
    return {header.key: header.value for header in response.response_headers_to_add}
