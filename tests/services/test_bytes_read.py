"""However many fields are packed into the bytes of a message, reading it does not hold the loop."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from google.protobuf.descriptor import Descriptor
from observed import NoTelemetry

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.limiter.fields import Nested
from ratelimit_sidecar.limiter.http_mapping import MAX_VALUES_BYTES, EntrySource, HttpRequest, Part, rate_limit_request
from ratelimit_sidecar.limiter.limiter import Limiter
from ratelimit_sidecar.limiter.request import InvalidRequest
from ratelimit_sidecar.limiter.rules import Rules
from ratelimit_sidecar.server.bounds import MAX_MESSAGE_BYTES
from ratelimit_sidecar.server.rpc import Code, Headers, RpcError
from ratelimit_sidecar.services.ext_authz import MAX_FIELDS, NESTED, ExtAuthzService, http_request
from ratelimit_sidecar.services.health import HealthService
from ratelimit_sidecar.services.ratelimit import RateLimitService
from ratelimit_sidecar.services.v1.check_pb2 import CheckRequest
from ratelimit_sidecar.telemetry.latency import LatencyHistogram

EMPTY_FIELDS = MAX_MESSAGE_BYTES // 2 - 64


def field(number: int, raw: bytes) -> bytes:
    length = len(raw)
    out = bytearray([number << 3 | 2])
    while length > 0x7F:
        out.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes([*out, length]) + raw


def check_of(*path: int) -> bytes:
    """A CheckRequest of 4 MiB: at the end of the path of fields is one without content, two million times."""
    raw = bytes([path[-1] << 3 | 2, 0]) * EMPTY_FIELDS
    for number in reversed(path[:-1]):
        raw = field(number, raw)
    return raw


def ext_authz(request: bytes) -> None:
    rate_limit = RateLimitService(
        Limiter(Rules({}), Origin("node", 1)), lambda: 1_700_000_000_000_000, LatencyHistogram(), NoTelemetry()
    )
    ExtAuthzService(rate_limit, lambda: Rules({})).check(request, Headers())


def health(request: bytes) -> None:
    HealthService(lambda: True, []).check(request, Headers())


@pytest.mark.parametrize(
    ("ask", "request_bytes"),
    [
        (ext_authz, check_of(1, 4, 2, 3)),
        (ext_authz, check_of(1, 4, 2, 13, 1)),
        (ext_authz, check_of(1, 4, 2, 3, 1)),
        (ext_authz, check_of(1, 10)),
        (ext_authz, check_of(1, 1, 1, 1, 2)),
        (ext_authz, check_of(1)),
        (ext_authz, check_of(9)),
        (health, b"\x0a\x00" * EMPTY_FIELDS),
        (health, b"\x10\x00" * EMPTY_FIELDS),
    ],
    ids=["headers", "header_map", "header", "extensions", "address", "attributes", "unknown", "service", "other"],
)
def test_a_request_of_two_million_fields_is_refused_before_it_is_parsed(
    ask: Callable[[bytes], None], request_bytes: bytes
) -> None:
    begin_s = time.thread_time()
    with pytest.raises(RpcError) as refused:
        ask(request_bytes)
    took_s = time.thread_time() - begin_s
    assert refused.value.code == Code.INVALID_ARGUMENT
    # A millisecond compiled; to parse it takes a tenth of a second, or half of that.
    assert took_s < 0.03


def nested_of(message: Descriptor) -> Nested:
    return {field.number: nested_of(field.message_type) for field in message.fields if field.message_type is not None}


def test_all_fields_that_are_read_of_a_check_request_are_counted() -> None:
    assert nested_of(CheckRequest.DESCRIPTOR) == NESTED


def test_a_request_of_as_many_headers_as_may_be_is_read_however_long_they_are() -> None:
    request = CheckRequest()
    most = MAX_FIELDS // 3 - 3
    for number in range(most):
        request.attributes.request.http.header_map.headers.add(key=b"name-%d" % number, raw_value=b"v" * 1_000)
    raw = request.SerializeToString()
    assert len(raw) > 2 * MAX_FIELDS
    assert len(http_request(raw).headers) == most
    with pytest.raises(RpcError, match=f"more than {MAX_FIELDS} fields"):
        http_request(raw + raw)


def test_a_long_value_that_is_in_many_descriptors_is_refused_before_it_is_copied() -> None:
    header = EntrySource(b"k", Part.HEADER, b"x-long")
    http = HttpRequest({b"x-long": b"v" * (MAX_VALUES_BYTES // 64)}, {}, b"/", b"GET")
    request = rate_limit_request("d", ((header,),) * 64, http)
    assert request is not None
    assert len(request) > MAX_VALUES_BYTES
    with pytest.raises(InvalidRequest):
        rate_limit_request("d", ((header,),) * 65, http)


@pytest.mark.parametrize("end", [b"\x0a", b"\x0a\x05", b"\xff" * 11, b"\x04", b"\x00"])
def test_a_long_request_that_is_none_is_refused(end: bytes) -> None:
    with pytest.raises(RpcError, match=r"not an envoy\.service\.auth\.v3\.CheckRequest"):
        http_request(field(9, bytes(2 * MAX_FIELDS)) + end)
