"""envoy.service.auth.v3.Authorization: rate limits for proxies that ask whether a request may pass.

`limiter.http_mapping` turns the request into the RateLimitRequest that Envoy's rate limit filter would have sent. The
rate limit service answers it, and its answer is translated for ext_authz. So both services use the same buckets. As in
Envoy there are two forms: a gRPC call, and the request itself over HTTP, without its body (`services.ext_authz_http`).

A domain without a mapping, or a request that lacks what the mapping needs, is no error. Such a request is not limited,
as when Envoy's rate limit filter has no descriptors to send; it is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from typing import Final

from google.protobuf.message import DecodeError

from ratelimit_sidecar.crdt.waiting import PendingDecision
from ratelimit_sidecar.envoy_api.envoy.config.core.v3.base_pb2 import HeaderValueOption
from ratelimit_sidecar.envoy_api.envoy.service.auth.v3.external_auth_pb2 import (
    CheckResponse,
    DeniedHttpResponse,
    OkHttpResponse,
)
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2 import RateLimitResponse
from ratelimit_sidecar.envoy_api.envoy.type.v3.http_status_pb2 import HttpStatus, StatusCode
from ratelimit_sidecar.limiter.fields import Malformed, Nested, TooManyFields, check_fields
from ratelimit_sidecar.limiter.http_mapping import HttpRequest, rate_limit_request
from ratelimit_sidecar.limiter.key import text_of
from ratelimit_sidecar.limiter.request import InvalidRequest
from ratelimit_sidecar.limiter.rules import Rules
from ratelimit_sidecar.server.rpc import Code, Handlers, Metadata, RpcError
from ratelimit_sidecar.services.ratelimit import RateLimitService
from ratelimit_sidecar.services.v1.check_pb2 import CheckRequest

SERVICE_NAME: Final = "envoy.service.auth.v3.Authorization"

DOMAIN_EXTENSION: Final = b"domain"
"""The context extension that names the domain."""

MAX_FIELDS: Final = 8_192
"""The most fields of a request that is parsed. A header has three; Envoy accepts 100 headers by default. 4 MiB can hold
two million empty ones, which would take a tenth of a second.
"""

JOINED: Final = frozenset((b"authorization",))
"""Headers that Envoy joins by commas when there are several of the name, before any filter sees them: of those that it
joins, the ones that say who calls.
"""

_OK: Final[bytes] = RateLimitResponse(overall_code=RateLimitResponse.OK).SerializeToString()

_PATH: Final = f"/{SERVICE_NAME}/Check"

_ENTRY: Final[Nested] = {}
_PEER: Final[Nested] = {1: {1: {}}}
_HTTP: Final[Nested] = {3: _ENTRY, 13: {1: _ENTRY}}
NESTED: Final[Nested] = {1: {1: _PEER, 4: {2: _HTTP}, 10: _ENTRY}}
"""The fields of a CheckRequest that are messages, of what is read of it."""


class ExtAuthzService:
    """The service, with one method, `Check`, and the same for a request over HTTP (`decide`).

    Args:
        rate_limit: decides; refused calls are counted there.
        rules: returns the rules in force; called once a request.
    """

    def __init__(self, rate_limit: RateLimitService, rules: Callable[[], Rules]) -> None:
        self.unlimited = {"no_mapping": 0, "no_descriptor": 0}
        """Requests since the start for which no limit was checked: the domain has no mapping, or the request lacks what
        all of its descriptors are made from.
        """
        self._rate_limit = rate_limit
        self._rules = rules

    def handlers(self) -> Handlers:
        """For a front end."""
        return {_PATH: self.check}

    def knows(self, domain: bytes) -> bool:
        """Whether the rules have a domain, or have none at all. Clients must not choose one."""
        domains = self._rules().domains
        return not domain or not domains or text_of(domain) in domains

    def check(self, request: bytes, metadata: Metadata) -> bytes | PendingDecision:
        """Answer a serialized CheckRequest with a serialized CheckResponse, perhaps later.

        Raises:
            RpcError: INVALID_ARGUMENT for something else than a request, or one with more than `MAX_FIELDS`; and what
                the rate limit service raises.
        """
        try:
            http = http_request(request)
        except RpcError:
            self._rate_limit.errors["invalid"] += 1
            raise
        domain = http.context_extensions.get(DOMAIN_EXTENSION, b"")
        decision = self.decide(domain, http, metadata)
        return decision.then(_check_response) if isinstance(decision, PendingDecision) else _check_response(decision)

    def decide(self, domain: bytes, http: HttpRequest, metadata: Metadata) -> bytes | PendingDecision:
        """The rate limit service's answer for an HTTP request: a serialized RateLimitResponse, perhaps later.

        Args:
            domain: empty for the default domain of the rules.
            metadata: of the call or request that brought it.

        Raises:
            RpcError: INVALID_ARGUMENT when its descriptors would be too long; and what the rate limit service raises.
        """
        rules = self._rules()
        name = text_of(domain) or rules.default_domain
        mapping = rules.http_mappings.get(name)
        if mapping is None:
            self.unlimited["no_mapping"] += 1
            return _OK
        try:
            request = rate_limit_request(name, mapping, http)
        except InvalidRequest as error:
            self._rate_limit.errors["invalid"] += 1
            raise RpcError(Code.INVALID_ARGUMENT, str(error)) from error
        if request is None:
            self.unlimited["no_descriptor"] += 1
            return _OK
        return self._rate_limit.should_rate_limit(request, metadata, all_headers=True)


def http_request(check: bytes) -> HttpRequest:
    """The HTTP request in a serialized CheckRequest.

    Raises:
        RpcError: INVALID_ARGUMENT: it is no CheckRequest, or has more than `MAX_FIELDS`.
    """
    try:
        # A field has two bytes or more, so most requests need not be looked at.
        if len(check) > 2 * MAX_FIELDS:
            check_fields(check, NESTED, MAX_FIELDS)
        attributes = CheckRequest.FromString(check).attributes
    except TooManyFields as too_many:
        raise RpcError(Code.INVALID_ARGUMENT, str(too_many)) from too_many
    except (Malformed, DecodeError) as error:
        raise RpcError(Code.INVALID_ARGUMENT, "not an envoy.service.auth.v3.CheckRequest") from error
    http = attributes.request.http
    raw_headers = http.header_map.headers
    if raw_headers:
        raw_values = ((header.key, header.raw_value or header.value) for header in raw_headers)
        headers = first_values(raw_values, JOINED)
    else:
        headers = first_values((entry.key, entry.value) for entry in http.headers)
    return HttpRequest(
        headers,
        {entry.key: entry.value for entry in attributes.context_extensions},
        http.path,
        http.method,
        attributes.source.address.socket_address.address,
        attributes.source.principal,
    )


def first_values(
    headers: Iterable[tuple[bytes, bytes]], joined: Container[bytes] | None = None
) -> Mapping[bytes, bytes]:
    """Headers by name in lower case. Of several with one name the first counts, as in Envoy's rate limit filter:
    otherwise a client could get another bucket by adding a second one, which its upstream ignores.

    Args:
        joined: names in lower case of which Envoy joins several values by commas, so that what is before a comma
            counts; None for all.
    """
    values: dict[bytes, bytes] = {}
    for any_case, value in headers:
        name = any_case.lower()
        if name not in values:
            is_joined = joined is None or name in joined
            values[name] = value.partition(b",")[0].rstrip() if is_joined else value
    return values


def _check_response(raw_decision: bytes) -> bytes:
    """The CheckResponse of a RateLimitResponse, both serialized."""
    decision = RateLimitResponse.FromString(raw_decision)
    headers = [
        HeaderValueOption(header=header, append_action=HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD)
        for header in decision.response_headers_to_add
    ]
    if decision.overall_code == RateLimitResponse.OVER_LIMIT:
        denied = DeniedHttpResponse(
            status=HttpStatus(code=StatusCode.TooManyRequests), headers=headers, body=decision.raw_body.decode()
        )
        response = CheckResponse(denied_response=denied)
        response.status.code = Code.RESOURCE_EXHAUSTED
    else:
        response = CheckResponse(ok_response=OkHttpResponse(response_headers_to_add=headers))
    if decision.HasField("dynamic_metadata"):
        response.dynamic_metadata.CopyFrom(decision.dynamic_metadata)
    raw: bytes = response.SerializeToString()
    return raw
