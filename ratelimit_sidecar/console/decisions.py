"""POST /json: the rate limit service for clients without gRPC, as envoyproxy/ratelimit has it.

A RateLimitRequest in protobuf's JSON comes in, and its RateLimitResponse goes out in the same form, with status 200 for
OK and 429 for OVER_LIMIT; 400 is for a body that is no such request, or that the gRPC service refuses; 503 says that
there are no rules yet. In between it is a call of that service: decided, counted and traced alike. JSON is read and
written in a thread, since that takes longer than to decide.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from google.protobuf.json_format import MessageToDict, Parse, ParseError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ratelimit_sidecar.console.browsers import require_json
from ratelimit_sidecar.crdt.waiting import PendingDecision
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2 import RateLimitRequest, RateLimitResponse
from ratelimit_sidecar.server.deferred import HttpWaits
from ratelimit_sidecar.server.rpc import Code, Headers, RpcError, UnaryHandler

_ERROR_STATUS: Mapping[int, int] = {Code.INVALID_ARGUMENT: 400, Code.UNAVAILABLE: 503}
_STATUS = {RateLimitResponse.OK: 200, RateLimitResponse.OVER_LIMIT: 429}


def json_endpoint(should_rate_limit: UnaryHandler, waits: HttpWaits) -> Callable[[Request], Awaitable[Response]]:
    """Make the endpoint.

    Args:
        should_rate_limit: the method of the gRPC service.
    """

    async def decide(request: Request) -> Response:
        require_json(request)
        try:
            message = await asyncio.to_thread(Parse, await request.body(), RateLimitRequest())
        except (ParseError, UnicodeDecodeError) as error:
            raise HTTPException(400, f"not a RateLimitRequest in JSON: {error}") from error
        try:
            answer = should_rate_limit(message.SerializeToString(), Headers(request.headers.raw))
            raw = await waits.answer_of(answer, request.receive) if isinstance(answer, PendingDecision) else answer
        except RpcError as error:
            raise HTTPException(_ERROR_STATUS.get(error.code, 500), error.message) from error
        # There is no answer if the client has gone.
        return Response() if raw is None else await asyncio.to_thread(_in_json, raw)

    return decide


def _in_json(raw: bytes) -> Response:
    response = RateLimitResponse.FromString(raw)
    return JSONResponse(MessageToDict(response), _STATUS.get(response.overall_code, 500))
