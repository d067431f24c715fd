"""A server that answers every RateLimitRequest without a decision: what a front end costs by itself.

    python -m benchmarks.serving.empty_handler h2|grpcio ADDRESS

On h2, the sidecar's own front end, a constant of the size of a real answer; on grpcio an echo.
"""

from __future__ import annotations

import asyncio
import sys

import uvloop

from benchmarks.serving.requests import METHOD
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2 import RateLimitResponse
from ratelimit_sidecar.server.front_end import FrontEnd
from ratelimit_sidecar.server.grpc_front_end import GrpcFrontEnd
from ratelimit_sidecar.server.grpcio import GrpcioFrontEnd
from ratelimit_sidecar.server.rpc import Metadata

_LIMIT = RateLimitResponse.RateLimit(requests_per_unit=100_000_000, unit="MINUTE")
_STATUS = RateLimitResponse.DescriptorStatus(code="OK", current_limit=_LIMIT, limit_remaining=99_999_999)
ANSWER: bytes = RateLimitResponse(overall_code="OK", statuses=[_STATUS]).SerializeToString()


def constant(_request: bytes, _metadata: Metadata) -> bytes:
    return ANSWER


def echo(request: bytes, _metadata: Metadata) -> bytes:
    return request


def front_end_at(kind: str, address: str) -> FrontEnd:
    if kind == "grpcio":
        return GrpcioFrontEnd({METHOD: echo}, [address])
    return GrpcFrontEnd({METHOD: constant}, [address])


async def main(kind: str, address: str) -> None:
    front_end = front_end_at(kind, address)
    await front_end.start()
    await front_end.serve()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(sys.argv[1], sys.argv[2]))
