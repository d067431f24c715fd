"""Takes the streams that peers dial, on grpc.aio."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import grpc
import grpc.aio

from ratelimit_sidecar.replication.bounds import DEFAULT_BOUNDS, MeshBounds
from ratelimit_sidecar.replication.stream_io import METHOD, OPTIONS, SERVICE
from ratelimit_sidecar.replication.tls import NodeCertificate

FAILED_CHECK_SECONDS = 0.25
"""Interval of checks that the listener still takes streams."""

_SERVER_OPTIONS = (
    *OPTIONS,
    # Who dials opens one stream on each connection; the next one may come before the last has ended.
    ("grpc.max_concurrent_streams", 2),
    # Without this a second process could share the port, and neither would know.
    ("grpc.so_reuseport", 0),
    # Lets the peers' keepalive be.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
)

Accept = Callable[[object, "grpc.aio.ServicerContext[bytes, bytes]"], Awaitable[None]]
"""Carries a stream that a peer has dialled."""


class Listener:
    """The address on which this node takes streams. Call `bind`, then `serve`.

    Args:
        address: `host:port`; port 0 takes a free one.
        certificate: None for plain text.
    """

    def __init__(
        self,
        address: str,
        *,
        certificate: NodeCertificate | None,
        accept: Accept,
        bounds: MeshBounds = DEFAULT_BOUNDS,
    ) -> None:
        self.address = address
        """Where it is bound, once it is."""
        self._certificate = certificate
        self._accept = accept
        self._options = (
            *_SERVER_OPTIONS,
            ("grpc.max_allowed_incoming_connections", bounds.connections),
            ("grpc.server_handshake_timeout_ms", int(bounds.handshake * 1_000)),
            ("grpc.max_connection_idle_ms", int(bounds.idle * 1_000)),
        )
        self._streams = bounds.streams
        self._server: grpc.aio.Server | None = None

    async def bind(self) -> None:
        """Listen on the address.

        Raises:
            OSError: the address cannot be listened on.
        """
        server = grpc.aio.server(options=self._options, maximum_concurrent_rpcs=self._streams)
        # No (de)serializers: frames are bytes here.
        handler = grpc.stream_stream_rpc_method_handler(self._accept)
        method = METHOD.rpartition("/")[2]
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, {method: handler})])
        try:
            if self._certificate is None:
                port = server.add_insecure_port(self.address)
            else:
                port = server.add_secure_port(self.address, self._certificate.grpc_server_credentials())
        except RuntimeError as error:
            await server.stop(None)
            # The C core logs the cause to stderr and keeps it from its caller.
            raise OSError("the address is taken, or is none of this machine's") from error
        await server.start()
        self._server = server
        self.address = f"{self.address.rpartition(':')[0]}:{port}"

    async def serve(self) -> None:
        """Take streams until `stop`, or raise what has ended gRPC's loop that takes calls.

        That loop ends when a client sends a path that is not UTF-8, and gRPC offers no hook to refuse such a call. So
        the listener is made anew; peers dial again, and streams that this node has dialled go on.
        """
        if self._server is None:
            await self.bind()
        server = self._server
        assert server is not None
        try:
            # With a time-out it tells of the failure also while streams are open.
            while await server.wait_for_termination(FAILED_CHECK_SECONDS):
                pass
        except Exception:
            self._server = None
            await server.stop(None)
            raise

    async def stop(self, grace_seconds: float | None = None) -> None:
        """Free the address; streams get so long to end."""
        if self._server is not None:
            await self._server.stop(grace_seconds)
