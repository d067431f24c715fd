"""Answers laid by hand: to the byte what protobuf writes for the same answer."""

from __future__ import annotations

from fractions import Fraction
from math import ceil

from hypothesis import given
from hypothesis import strategies as st

from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2 import RateLimitResponse
from ratelimit_sidecar.limiter.encoding import OVERALL_OK, OVERALL_OVER_LIMIT, bare_status, encode_status, status_head

MAX_UINT32 = 2**32 - 1
MAX_SECONDS = 315_576_000_000

# Every number of bits is as likely as any other: what matters are the lengths of the varints.
numbers = st.integers(0, 60).flatmap(lambda bits: st.integers(0, 2**bits - 1))
codes = st.sampled_from((RateLimitResponse.OK, RateLimitResponse.OVER_LIMIT))
limits = st.builds(
    RateLimitResponse.RateLimit,
    name=st.text(max_size=300),
    requests_per_unit=st.integers(0, MAX_UINT32),
    unit=st.sampled_from(RateLimitResponse.RateLimit.Unit.values()),
)
overalls = st.sampled_from(
    ((OVERALL_OK, RateLimitResponse.OK), (OVERALL_OVER_LIMIT, RateLimitResponse.OVER_LIMIT)),
)


@given(overalls, st.lists(st.tuples(codes, limits, numbers, numbers), max_size=3))
def test_codes_and_levels_are_what_protobuf_writes(
    overall: tuple[bytes, int], statuses: list[tuple[int, RateLimitResponse.RateLimit, int, int]]
) -> None:
    laid, code = overall
    expected = RateLimitResponse(overall_code=code)
    for code, limit, remaining, reset_us in statuses:
        laid += encode_status(status_head(code, limit), remaining, reset_us)
        status = expected.statuses.add(code=code, current_limit=limit, limit_remaining=min(remaining, MAX_UINT32))
        # Set in any case: a bucket that is full says so.
        status.duration_until_reset.SetInParent()
        status.duration_until_reset.seconds = min(ceil(Fraction(reset_us, 1_000_000)), MAX_SECONDS)
    assert laid == expected.SerializeToString(deterministic=True)


@given(codes, st.integers(0, MAX_UINT32))
def test_a_status_without_a_bucket_is_what_protobuf_writes(code: int, remaining: int) -> None:
    status = RateLimitResponse.DescriptorStatus(code=code, limit_remaining=remaining)
    assert bare_status(code, remaining) == RateLimitResponse(statuses=[status]).SerializeToString()
