"""The HTTP/2 session that `grpc_connection.py` uses: `native_http2.pyx` (C) if it was compiled when this was installed,
otherwise `portable_http2.py`, on the package ngh2. `native_http2.pyi` describes what both offer.
"""

from __future__ import annotations

try:
    from ratelimit_sidecar.server.native_http2 import OK_TRAILERS, BrokenSession, Request, Session

    IS_NATIVE = True
except ImportError:
    from ratelimit_sidecar.server.portable_http2 import (  # type: ignore[assignment]
        OK_TRAILERS,
        BrokenSession,
        Request,
        Session,
    )

    IS_NATIVE = False

__all__ = ["IS_NATIVE", "OK_TRAILERS", "BrokenSession", "Request", "Session"]
