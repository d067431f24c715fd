"""envoy.service.auth.v3.Authorization: rate limits for proxies that ask whether a request may pass.

A thin shell: `limiter.http_mapping` makes of the request what Envoy's rate limit filter would have sent, the rate limit
service answers that, and its answer is said here in the words of ext_authz. So both ask the same buckets. Two forms of
the same question come in, as Envoy has them: a gRPC call, and the request itself over HTTP, without its body
(`services.ext_authz_http`).

Neither a domain without a mapping nor a request that lacks what the mapping needs is an error: it is not limited, as
where Envoy's rate limit filter has no descriptors to send, and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final

from envoy.config.core.v3.base_pb2 import HeaderValueOption
from envoy.service.auth.v3.external_auth_pb2 import CheckResponse, DeniedHttpResponse, OkHttpResponse
from envoy.service.ratelimit.v3.rls_pb2 import RateLimitResponse
from envoy.type.v3.http_status_pb2 import HttpStatus
from google.protobuf.message import DecodeError

from ratelimit_sidecar.limiter.http_mapping import HttpRequest, rate_limit_request
from ratelimit_sidecar.limiter.key import text_of
from ratelimit_sidecar.limiter.rules import Rules
from ratelimit_sidecar.server.rpc import Code, Handlers, Metadata, RpcError
from ratelimit_sidecar.services.ratelimit import RateLimitService
from ratelimit_sidecar.services.v1.check_pb2 import CheckRequest

SERVICE_NAME: Final = "envoy.service.auth.v3.Authorization"

DOMAIN_EXTENSION: Final = b"domain"
"""The context extension that says whose mapping and rules a request is for."""

MAX_HEADERS: Final = 1_024
"""Of a request. Envoy takes 100 by default."""

_PATH: Final = f"/{SERVICE_NAME}/Check"


class ExtAuthzService:
    """One method, `Check`, and the same for a request over HTTP.

    Args:
        rate_limit: which decides; calls that are refused here are counted there.
        rules: those in force, called once a request.
    """

    def __init__(self, rate_limit: RateLimitService, rules: Callable[[], Rules]) -> None:
        self.unlimited = {"no_mapping": 0, "no_descriptor": 0}
        """Requests since the start that no rule was asked for: of a domain without a mapping, or without what any of
        its descriptors is made from."""
        self._rate_limit = rate_limit
        self._rules = rules

    def handlers(self) -> Handlers:
        """For a front end."""
        return {_PATH: self.check}

    def check(self, request: bytes, metadata: Metadata) -> bytes:
        """Answer a serialized CheckRequest with a serialized CheckResponse.

        Raises:
            RpcError: INVALID_ARGUMENT for something else than a request, or one with more than `MAX_HEADERS`; and what
                the rate limit service raises.
        """
        try:
            http = http_request(request)
        except RpcError:
            self._rate_limit.errors["invalid"] += 1
            raise
        domain = http.context_extensions.get(DOMAIN_EXTENSION, b"")
        raw: bytes = _check_response(self.decide(domain, http, metadata)).SerializeToString()
        return raw

    def decide(self, domain: bytes, http: HttpRequest, metadata: Metadata) -> RateLimitResponse:
        """What the rate limit service says of an HTTP request.

        Args:
            domain: empty for the default one of the rules.
            metadata: of the call or request that brought it.

        Raises:
            RpcError: as the rate limit service.
        """
        rules = self._rules()
        name = text_of(domain) or rules.default_domain
        mapping = rules.http_mappings.get(name)
        if mapping is None:
            self.unlimited["no_mapping"] += 1
            return RateLimitResponse(overall_code=RateLimitResponse.OK)
        request = rate_limit_request(name, mapping, http)
        if request is None:
            self.unlimited["no_descriptor"] += 1
            return RateLimitResponse(overall_code=RateLimitResponse.OK)
        return RateLimitResponse.FromString(self._rate_limit.should_rate_limit(request, metadata, in_full=True))


def http_request(check: bytes) -> HttpRequest:
    """What a serialized CheckRequest asks about.

    Raises:
        RpcError: INVALID_ARGUMENT: it is none, or has more than `MAX_HEADERS`.
    """
    try:
        attributes = CheckRequest.FromString(check).attributes
    except DecodeError as error:
        raise RpcError(Code.INVALID_ARGUMENT, "not an envoy.service.auth.v3.CheckRequest") from error
    http = attributes.request.http
    raw_headers = http.header_map.headers
    if len(http.headers) + len(raw_headers) + len(attributes.context_extensions) > MAX_HEADERS:
        raise RpcError(Code.INVALID_ARGUMENT, f"more than {MAX_HEADERS} headers")
    if raw_headers:
        headers = joined((header.key, header.raw_value or header.value) for header in raw_headers)
    else:
        headers = joined((entry.key, entry.value) for entry in http.headers)
    return HttpRequest(
        headers,
        {entry.key: entry.value for entry in attributes.context_extensions},
        http.path,
        http.method,
        attributes.source.address.socket_address.address,
        attributes.source.principal,
    )


def joined(headers: Iterable[tuple[bytes, bytes]]) -> Mapping[bytes, bytes]:
    """By name in lower case, with all values that came under it."""
    values: dict[bytes, list[bytes]] = {}
    for name, value in headers:
        values.setdefault(name.lower(), []).append(value)
    return {name: b",".join(of_name) for name, of_name in values.items()}


def _check_response(decision: RateLimitResponse) -> CheckResponse:
    headers = [
        HeaderValueOption(header=header, append_action=HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD)
        for header in decision.response_headers_to_add
    ]
    if decision.overall_code == RateLimitResponse.OVER_LIMIT:
        denied = DeniedHttpResponse(status=HttpStatus(code=429), headers=headers, body=decision.raw_body.decode())
        response = CheckResponse(denied_response=denied)
        response.status.code = Code.RESOURCE_EXHAUSTED
    else:
        response = CheckResponse(ok_response=OkHttpResponse(response_headers_to_add=headers))
    if decision.HasField("dynamic_metadata"):
        response.dynamic_metadata.CopyFrom(decision.dynamic_metadata)
    return response
