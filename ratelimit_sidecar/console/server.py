"""The console's HTTP server: one TCP address, for a scraper, a few probes and a few people."""

from __future__ import annotations

from typing import Literal

import h2corn
from starlette.types import ASGIApp

from ratelimit_sidecar.server.hosting import Hosting
from ratelimit_sidecar.server.limits import MAX_MESSAGE_BYTES

MAX_CONNECTIONS = 128
MAX_REQUESTS = 32
"""At once; more are answered 503."""
MAX_BODY_BYTES = MAX_MESSAGE_BYTES
"""Of a request to /json, which may be as large as one over gRPC."""
DRAIN_SECONDS = 2.0
KEEP_ALIVE_SECONDS = 75.0
"""Longer than Prometheus' default interval (60 s), so that it keeps its connection."""


class ConsoleServer(Hosting):
    """Args:
    address: `host:port` or `[IPv6]:port`; port 0 for a free one.
    log_format: of what h2corn itself writes to stderr.
    """

    def __init__(self, app: ASGIApp, address: str, *, log_format: Literal["text", "json"] = "text") -> None:
        config = h2corn.Config(
            lifespan="off",
            access_log=False,
            log_format=log_format,
            limit_connections=MAX_CONNECTIONS,
            limit_concurrency=MAX_REQUESTS,
            max_request_body_size=MAX_BODY_BYTES,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=DRAIN_SECONDS,
        )
        super().__init__(app, [address], config)

    @property
    def address(self) -> str:
        """Where it listens since `start`; of a name with several addresses the first."""
        return self.addresses[0]
