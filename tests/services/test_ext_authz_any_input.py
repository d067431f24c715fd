"""Whatever a CheckRequest holds, ext_authz answers it or refuses it with a status."""

from __future__ import annotations

import pytest
from config.builders import rules_of
from hypothesis import given
from hypothesis import strategies as st
from observed import NoTelemetry

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.envoy_api.envoy.service.auth.v3.external_auth_pb2 import CheckResponse
from ratelimit_sidecar.limiter.limiter import Limiter
from ratelimit_sidecar.server.rpc import Code, Headers, RpcError
from ratelimit_sidecar.services.ext_authz import ExtAuthzService
from ratelimit_sidecar.services.ratelimit import RateLimitService
from ratelimit_sidecar.services.v1.check_pb2 import CheckRequest
from ratelimit_sidecar.telemetry.latency import LatencyHistogram

RULES = """
domain: shop
ext_authz:
  default: true
  descriptors:
    - entries: [{key: header, from: header, name: a}]
    - entries: [{key: extension, from: context_extension, name: a}, {key: method, from: method}]
    - entries: [{key: path, from: path}, {key: address, from: source_address}, {key: principal, from: principal}]
descriptors:
  - {key: header, rate_limit: {unit: hour, requests_per_unit: 1}, body: "für später"}
  - key: extension
    detailed_metric: true
    descriptors: [{key: method, rate_limit: {unit: hour, requests_per_unit: 1}}]
  - key: path
    descriptors: [{key: address, descriptors: [{key: principal, rate_limit: {unit: hour, requests_per_unit: 1}}]}]
"""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> ExtAuthzService:
    limiter = Limiter(rules_of(tmp_path_factory.mktemp("rules"), RULES), Origin("node", 1))
    rate_limit = RateLimitService(limiter, lambda: 1_700_000_000_000_000, LatencyHistogram(), NoTelemetry())
    return ExtAuthzService(rate_limit, lambda: limiter.rules)


texts = st.binary(max_size=40) | st.sampled_from([b"", b"a", b"shop", b"domain", b"\xff" * 200])
entries = st.lists(st.tuples(texts, texts), max_size=3)


@given(headers=entries, raw_headers=entries, extensions=entries, single=st.tuples(texts, texts, texts, texts))
def test_a_request_of_any_bytes_is_answered(
    service: ExtAuthzService,
    headers: list[tuple[bytes, bytes]],
    raw_headers: list[tuple[bytes, bytes]],
    extensions: list[tuple[bytes, bytes]],
    single: tuple[bytes, bytes, bytes, bytes],
) -> None:
    request = CheckRequest()
    attributes = request.attributes
    http = attributes.request.http
    http.path, http.method, attributes.source.principal, address = single
    attributes.source.address.socket_address.address = address
    for key, value in headers:
        http.headers.add(key=key, value=value)
    for key, value in raw_headers:
        http.header_map.headers.add(key=key, raw_value=value)
    for key, value in extensions:
        attributes.context_extensions.add(key=key, value=value)
    response = CheckResponse.FromString(service.check(request.SerializeToString(), Headers()))
    assert response.status.code in (Code.OK, Code.RESOURCE_EXHAUSTED)


@given(st.binary(max_size=200))
def test_any_bytes_are_answered_or_refused(service: ExtAuthzService, request_bytes: bytes) -> None:
    try:
        CheckResponse.FromString(service.check(request_bytes, Headers()))
    except RpcError as error:
        assert error.code == Code.INVALID_ARGUMENT  # noqa: PT017 (mostly nothing is raised)
