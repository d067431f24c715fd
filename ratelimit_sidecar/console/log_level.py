"""POST /log-level: change the level of the log, for a while or for good.

    {"level": "debug", "seconds": 600}

The sender is logged.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

import structlog
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ratelimit_sidecar.console.authority import Authority
from ratelimit_sidecar.console.changes import json_object, require_authority
from ratelimit_sidecar.telemetry.logs import LEVELS, LogLevel, level_name

MAX_SECONDS: Final = 86_400

_log = structlog.stdlib.get_logger(__name__)


def log_level_endpoint(log_level: LogLevel, authority: Authority) -> Callable[[Request], Awaitable[Response]]:
    async def set_level(request: Request) -> Response:
        sender = await require_authority(request, authority, "log_level_refused")
        level, seconds = await asyncio.to_thread(_parsed, await request.body())
        before = log_level.current
        change = {"before": level_name(before), "configured": level_name(log_level.configured), "seconds": seconds}
        # Log at the more verbose of both levels, so that the line is written.
        log_level.set(min(level, before))
        _log.warning("log_level_set", audit=True, to=level_name(level), **change, **sender)
        log_level.set(level, seconds)
        return JSONResponse({"level": level_name(level), **change})

    return set_level


def _parsed(body: bytes) -> tuple[int, int | None]:
    """The level, and for how many seconds.

    Raises:
        HTTPException: 400.
    """
    given = json_object(body, {"level"}, "seconds", "level and, unless it is for good, seconds")
    name, seconds = given["level"], given.get("seconds")
    if not isinstance(name, str) or name.lower() not in LEVELS:
        raise HTTPException(400, f"level: expected one of {', '.join(LEVELS)}")
    if seconds is not None and not (type(seconds) is int and 1 <= seconds <= MAX_SECONDS):
        raise HTTPException(400, f"seconds: expected 1 to {MAX_SECONDS}")
    return LEVELS[name.lower()], seconds
