"""What a client has done on a connection: `grpc_connection.Connection` returns these events, in order."""

from __future__ import annotations

from ratelimit_sidecar.server.http2_session import Request
from ratelimit_sidecar.server.rpc import StreamingMethod, UnaryHandler


class Call:
    """A unary call. `Connection.receive` returns it when its `message` is complete."""

    def __init__(self, request: Request, handler: UnaryHandler, now_s: float) -> None:
        self.request = request
        """The HTTP request; iterating over it yields the headers."""
        self.handler = handler
        self.message = b""
        # While its message is incomplete, or its answer is deferred (`Connection.defer`): bytes so far, bytes counted
        # in the budget, when the call began, and when bytes were last received.
        self.body_bytes = 0
        self.held = 0
        self.began_s = now_s
        self.received_s = now_s

    @property
    def path(self) -> str:
        return self.request.path.decode("utf-8", "replace")


class StreamStarted:
    """A streaming call has begun."""

    def __init__(self, request: Request, method: StreamingMethod) -> None:
        self.request = request
        """The HTTP request; iterating over it yields the headers."""
        self.method = method
        self.stream_id = request.stream_id

    @property
    def path(self) -> str:
        return self.request.path.decode("utf-8", "replace")


class StreamData:
    """Bytes of a streaming call, in order; messages begin and end anywhere in them.

    Acknowledge them when they are used up (`Connection.acknowledge`).
    """

    def __init__(self, stream_id: int, data: bytes, ended: bool) -> None:
        self.stream_id = stream_id
        self.data = data
        self.ended = ended
        """True if the client sends no more."""


class StreamCancelled:
    """The client has given up on a streaming call, or one whose answer is deferred; or its stream was reset."""

    def __init__(self, stream_id: int) -> None:
        self.stream_id = stream_id


Event = Call | StreamStarted | StreamData | StreamCancelled
