"""grpc.health.v1.Health: whether this sidecar answers, for Envoy's health checks, Kubernetes' gRPC probes, and gRPC
clients that watch whom they call (grpc/doc/health-checking.md)."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable

from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse, HealthListResponse

from ratelimit_sidecar.server.rpc import Code, Handlers, Metadata, RpcError, StreamingMethod, first_message, read_small
from ratelimit_sidecar.server.turn_event import TurnEvent
from ratelimit_sidecar.server.turns import StepQueue, Turns

SERVICE_NAME = "grpc.health.v1.Health"

RATELIMIT_NAME = "ratelimit"
"""The service name that envoyproxy/ratelimit's own health checks use."""

OVERALL = ""
"""The service name that asks for the server as a whole."""


class HealthService:
    """The service. It has one state for all services, since one process serves them from the same memory.

    Call `changed` whenever the result of `serving` has changed.

    Args:
        serving: returns False while the sidecar is not ready, and while it drains.
        services: full names of the known services, besides the server as a whole.
        turns: of the event loop; its own if None.
    """

    def __init__(self, serving: Callable[[], bool], services: Iterable[str], turns: Turns | None = None) -> None:
        self._serving = serving
        self._known = frozenset((OVERALL, *services))
        self._answers = {
            status: _answer(status)
            for status in (
                HealthCheckResponse.SERVING,
                HealthCheckResponse.NOT_SERVING,
                HealthCheckResponse.SERVICE_UNKNOWN,
            )
        }
        self._watchers: dict[TurnEvent, None] = {}
        """One for each watching client; it is set when the state may have changed."""
        self._turns = turns or Turns()
        self._queue = StepQueue()

    def handlers(self) -> Handlers:
        """For a front end."""
        return {
            f"/{SERVICE_NAME}/Check": self.check,
            f"/{SERVICE_NAME}/List": self.list,
            f"/{SERVICE_NAME}/Watch": StreamingMethod(self.watch),
        }

    def changed(self) -> None:
        """Send the new state to watching clients, soon."""
        for change in self._watchers:
            change.set()

    def check(self, request: bytes, _metadata: Metadata) -> bytes:
        """Answer a serialized HealthCheckRequest with a serialized HealthCheckResponse.

        Raises:
            RpcError: NOT_FOUND for a service that isn't here, INVALID_ARGUMENT for something else than a
            request.
        """
        service = _service_of(request)
        if service not in self._known:
            raise RpcError(Code.NOT_FOUND, f"unknown service {service}")
        return self._answers[self._status()]

    def list(self, _request: bytes, _metadata: Metadata) -> bytes:
        """Answer a HealthListRequest, which has no fields, with a serialized HealthListResponse."""
        answer = HealthCheckResponse(status=self._status())
        raw: bytes = HealthListResponse(statuses=dict.fromkeys(self._known, answer)).SerializeToString()
        return raw

    async def watch(self, requests: AsyncIterator[bytes], _metadata: Metadata) -> AsyncGenerator[bytes, None]:
        """Answer a serialized HealthCheckRequest with a serialized HealthCheckResponse now and after each change. An
        unknown service gets one answer, and no changes.

        Raises:
            RpcError: INVALID_ARGUMENT for anything but a request, UNIMPLEMENTED without one.
        """
        is_known = _service_of(await first_message(requests)) in self._known
        told = None
        change = TurnEvent(self._turns, self._queue)
        self._watchers[change] = None
        try:
            while True:
                status = self._status() if is_known else HealthCheckResponse.SERVICE_UNKNOWN
                if status != told:
                    told = status
                    yield self._answers[status]
                # Also for a change while the answer was sent.
                await change.wait()
        finally:
            del self._watchers[change]

    def _status(self) -> HealthCheckResponse.ServingStatus:
        return HealthCheckResponse.SERVING if self._serving() else HealthCheckResponse.NOT_SERVING


def _service_of(request: bytes) -> str:
    service: str = read_small(HealthCheckRequest.FromString, request, "grpc.health.v1.HealthCheckRequest").service
    return service


def _answer(status: HealthCheckResponse.ServingStatus) -> bytes:
    raw: bytes = HealthCheckResponse(status=status).SerializeToString()
    return raw
