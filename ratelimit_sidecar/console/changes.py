"""Requests to the console that change state: who may send them, and the JSON in them."""

from __future__ import annotations

import json
from collections.abc import Set as AbstractSet

import structlog
from starlette.exceptions import HTTPException
from starlette.requests import Request

from ratelimit_sidecar.console.authority import Authority
from ratelimit_sidecar.console.browsers import require_json
from ratelimit_sidecar.telemetry.traces import trace_fields

_log = structlog.stdlib.get_logger(__name__)


async def require_authority(request: Request, authority: Authority, refused: str) -> dict[str, str]:
    """Return if the request may change state. If not, that is logged.

    Args:
        refused: the event to log.

    Returns:
        Who sent the request, as fields for the log.

    Raises:
        HTTPException: as `Authority.require`; 415 without a JSON content type.
    """
    require_json(request)
    sender = {"by": request.client.host if request.client is not None else "", **trace_fields(request.headers.raw)}
    try:
        await authority.require(request)
    except HTTPException as error:
        _log.warning(refused, reason=error.detail, **sender)
        raise
    return sender


def json_object(body: bytes, required: AbstractSet[str], optional: str, expected: str) -> dict[str, object]:
    """The JSON object in a request, with the required keys and perhaps the optional one.

    Args:
        expected: the object in words, for the error.

    Raises:
        HTTPException: 400.
    """
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"not JSON: {error}") from error
    if not isinstance(given, dict) or not required <= given.keys() <= required | {optional}:
        raise HTTPException(400, f"expected an object with {expected}")
    return given
