"""POST /log-level: log from another level on, for a while or for good.

    {"level": "debug", "seconds": 600}

Who did it is logged.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Final

import structlog
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ratelimit_sidecar.console.authority import Authority
from ratelimit_sidecar.console.browsers import require_json
from ratelimit_sidecar.telemetry.logs import LEVELS, LogLevel, level_name
from ratelimit_sidecar.telemetry.traces import trace_fields

MAX_SECONDS: Final = 86_400

_log = structlog.stdlib.get_logger(__name__)


def log_level_endpoint(log_level: LogLevel, authority: Authority) -> Callable[[Request], Awaitable[Response]]:
    async def change(request: Request) -> Response:
        require_json(request)
        about = {"by": request.client.host if request.client is not None else "", **trace_fields(request.headers.raw)}
        try:
            await authority.require(request)
        except HTTPException as error:
            _log.warning("log_level_refused", reason=error.detail, **about)
            raise
        level, seconds = await asyncio.to_thread(_parsed, await request.body())
        before = log_level.current
        told = {"before": level_name(before), "configured": level_name(log_level.configured), "seconds": seconds}
        # By the level of the two that lets it through.
        log_level.set(min(level, before))
        _log.warning("log_level_set", audit=True, to=level_name(level), **told, **about)
        log_level.set(level, seconds)
        return JSONResponse({"level": level_name(level), **told})

    return change


def _parsed(body: bytes) -> tuple[int, int | None]:
    """The level, and for how many seconds.

    Raises:
        HTTPException: 400.
    """
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"not JSON: {error}") from error
    if not isinstance(given, dict) or not {"level"} <= given.keys() <= {"level", "seconds"}:
        raise HTTPException(400, "expected an object with level and, unless it is for good, seconds")
    name, seconds = given["level"], given.get("seconds")
    if not isinstance(name, str) or name.lower() not in LEVELS:
        raise HTTPException(400, f"level: expected one of {', '.join(LEVELS)}")
    if seconds is not None and not (type(seconds) is int and 1 <= seconds <= MAX_SECONDS):
        raise HTTPException(400, f"seconds: expected 1 to {MAX_SECONDS}")
    return LEVELS[name.lower()], seconds
