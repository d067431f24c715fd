"""A server that answers every RateLimitRequest with the same bytes: what a front end costs by itself.

    python -m benchmarks.serving.empty_handler h2|grpcio ADDRESS

On h2 it is the barest ASGI application that speaks gRPC, on the same server with the same settings as the sidecar's,
and the answer has the size of a real one. On grpcio it is an echo.
"""

from __future__ import annotations

import asyncio
import sys

import h2corn
import uvloop
from envoy.service.ratelimit.v3.rls_pb2 import RateLimitResponse

from benchmarks.serving.requests import METHOD, framed
from ratelimit_sidecar.server.grpcio import GrpcioFrontEnd
from ratelimit_sidecar.server.h2 import server_config
from ratelimit_sidecar.server.hosting import Hosting

_LIMIT = RateLimitResponse.RateLimit(requests_per_unit=100_000_000, unit="MINUTE")
_STATUS = RateLimitResponse.DescriptorStatus(code="OK", current_limit=_LIMIT, limit_remaining=99_999_999)
ANSWER: bytes = RateLimitResponse(overall_code="OK", statuses=[_STATUS]).SerializeToString()

_START: h2corn.HTTPResponseStart = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"application/grpc")],
    "trailers": True,
}
_BODY: h2corn.HTTPResponseBody = {"type": "http.response.body", "body": framed(ANSWER)}
_END: h2corn.HTTPResponseTrailers = {"type": "http.response.trailers", "headers": [(b"grpc-status", b"0")]}


async def _application(scope: h2corn.Scope, receive: h2corn.Receive, send: h2corn.Send) -> None:
    """Reads the body and answers."""
    while (await receive()).get("more_body"):
        pass
    await send(_START)
    await send(_BODY)
    await send(_END)


async def main(front_end: str, address: str) -> None:
    if front_end == "grpcio":
        server: Hosting | GrpcioFrontEnd = GrpcioFrontEnd({METHOD: lambda request, _metadata: request}, [address])
    else:
        server = Hosting(_application, [address], server_config())
    await server.start()
    await server.serve()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(sys.argv[1], sys.argv[2]))
