"""ext_authz over HTTP, as an ASGI application: the request itself comes in, and the status says whether it may pass.

Envoy's HTTP form sends the request's method, path and the configured headers, without a body. The path begins with the
filter's `path_prefix`, which names the domain: `/ext_authz/shop`, or `/ext_authz/` for the default one. 200 lets the
request pass; 429 denies it, with the headers and the body for the client. A failure is 503: Envoy's filter treats
statuses from 500 up as errors, and then follows its `failure_mode_allow`. A path without the prefix, or with a domain
that no rules have, is denied with 404. So a filter with another prefix is noticed: with `/ext_authz` the domain would
be the first part of the client's path.
"""

from __future__ import annotations

from typing import Final
from urllib.parse import unquote_to_bytes

from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from ratelimit_sidecar.crdt.waiting import PendingDecision
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2 import RateLimitResponse
from ratelimit_sidecar.limiter.http_mapping import HttpRequest
from ratelimit_sidecar.server.deferred import HttpWaits
from ratelimit_sidecar.server.rpc import FailureLog, Headers, RpcError
from ratelimit_sidecar.services.ext_authz import ExtAuthzService, first_values

PREFIX: Final = b"/ext_authz/"

_NO_PREFIX: Final = JSONResponse({"error": "expected a path_prefix of /ext_authz/ and a domain of the rules"}, 404)


def ext_authz_app(service: ExtAuthzService, waits: HttpWaits) -> ASGIApp:
    failures = FailureLog()

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        raw_path: bytes = scope["raw_path"]
        raw_domain, slash, path = raw_path[len(PREFIX) :].partition(b"/")
        domain = unquote_to_bytes(raw_domain)
        if raw_path.startswith(PREFIX) and service.knows(domain):
            try:
                decision = _decide(service, scope, domain, slash + path)
                raw = await waits.answer_of(decision, receive) if isinstance(decision, PendingDecision) else decision
                if raw is None:
                    return
                response = _answer(raw)
            except Exception as error:
                known = error
                if not isinstance(known, RpcError):
                    known = failures.status_of("ext_authz over HTTP", error, scope["headers"])
                response = JSONResponse({"error": known.message}, 503)
        else:
            response = _NO_PREFIX
        await response(scope, receive, send)

    return answer


def _decide(service: ExtAuthzService, scope: Scope, domain: bytes, path: bytes) -> bytes | PendingDecision:
    http = HttpRequest(first_values(scope["headers"]), {}, path, scope["method"].encode())
    return service.decide(domain, http, Headers(scope["headers"]))


def _answer(raw: bytes) -> Response:
    decision = RateLimitResponse.FromString(raw)
    headers = {header.key: header.value for header in decision.response_headers_to_add}
    if decision.overall_code == RateLimitResponse.OVER_LIMIT:
        return Response(decision.raw_body, 429, headers)
    return Response(b"", 200, headers)
