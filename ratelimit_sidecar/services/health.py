"""grpc.health.v1.Health: whether this sidecar answers, for Envoy's health checks and Kubernetes' gRPC probes.

Check only: Watch is a stream, and answered UNIMPLEMENTED, as the protocol allows (grpc/doc/health-checking.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from google.protobuf.message import DecodeError
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from ratelimit_sidecar.server.rpc import Code, Handlers, Metadata, RpcError

OVERALL = ""
"""The service name that asks for the server as a whole."""


class HealthService:
    """One state for all services: they are served by the same process from the same memory.

    Args:
        serving: false while not ready yet, and while draining.
        services: full names of those that can be asked for, besides the server as a whole.
    """

    def __init__(self, serving: Callable[[], bool], services: Iterable[str]) -> None:
        self._serving = serving
        self._known = frozenset((OVERALL, *services))
        self._serving_answer = _answer(HealthCheckResponse.SERVING)
        self._not_serving_answer = _answer(HealthCheckResponse.NOT_SERVING)

    def handlers(self) -> Handlers:
        """For a front end."""
        return {"/grpc.health.v1.Health/Check": self.check}

    def check(self, request: bytes, _metadata: Metadata) -> bytes:
        """Answer a serialized HealthCheckRequest with a serialized HealthCheckResponse.

        Raises:
            RpcError: NOT_FOUND for a service that isn't here, INVALID_ARGUMENT for something else than a
            request.
        """
        try:
            service = HealthCheckRequest.FromString(request).service
        except DecodeError as error:
            raise RpcError(Code.INVALID_ARGUMENT, "not a grpc.health.v1.HealthCheckRequest") from error
        if service not in self._known:
            raise RpcError(Code.NOT_FOUND, f"unknown service {service}")
        return self._serving_answer if self._serving() else self._not_serving_answer


def _answer(status: HealthCheckResponse.ServingStatus) -> bytes:
    raw: bytes = HealthCheckResponse(status=status).SerializeToString()
    return raw
