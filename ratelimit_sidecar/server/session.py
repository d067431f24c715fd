"""HTTP/2's session: in C where it could be compiled when this was installed, otherwise on the package ngh2."""

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
