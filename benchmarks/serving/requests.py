"""What is asked in the benchmarks, and the rules it is asked under.

The limits are wide: what is measured is the price of admitting, which is what a limiter does nearly always. The rule
`denied` is used up by its first request.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from ratelimit_sidecar.envoy_api.envoy.extensions.common.ratelimit.v3.ratelimit_pb2 import RateLimitDescriptor
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2 import RateLimitRequest

METHOD = "/envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit"
DOMAIN = "benchmark"

RULES = f"""\
domain: {DOMAIN}
descriptors:
  - key: tenant
    rate_limit: {{unit: minute, requests_per_unit: 100000000}}
  - key: agent
    rate_limit: {{unit: minute, requests_per_unit: 100000000}}
  - key: denied
    rate_limit: {{unit: day, requests_per_unit: 1}}
  - key: tenant
    value: three
    descriptors:
      - key: path
        descriptors:
          - key: user
            rate_limit: {{unit: minute, requests_per_unit: 100000000}}
"""

Entries = list[tuple[str, str]]


def request(*descriptors: Entries, domain: str = DOMAIN, hits: int = 0) -> bytes:
    """A serialized RateLimitRequest.

    Args:
        hits: its hits addend; 0 leaves it out, as Envoy does, and means one.
    """
    message = RateLimitRequest(
        domain=domain,
        hits_addend=hits,
        descriptors=[
            RateLimitDescriptor(entries=[RateLimitDescriptor.Entry(key=key, value=value) for key, value in entries])
            for entries in descriptors
        ],
    )
    raw: bytes = message.SerializeToString()
    return raw


ONE_DESCRIPTOR = request([("tenant", "acme")])
TWO_OF_THREE = request(
    [("tenant", "three"), ("path", "/v1/orders"), ("user", "eve")],
    [("tenant", "three"), ("path", "/v1/refunds"), ("user", "eve")],
)
DENIED = request([("denied", "acme")])


UNSAMPLED = (("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00"),)
"""Headers of a request whose caller traces, and has decided not to sample this one (W3C Trace Context)."""


def framed(message: bytes) -> bytes:
    """As gRPC puts it on a stream: flags, length, message."""
    return struct.pack(">BI", 0, len(message)) + message


def keyed(keys: int) -> Iterator[bytes]:
    """One request for each of so many tenants, all of one length."""
    for number in range(keys):
        yield request([("tenant", f"tenant-{number:07}")])
