"""POST /refund: gives a caller back what it has used up, and says how much there was before and is now.

    {"domain": "shop", "entries": [{"key": "user", "value": "eve"}], "tokens": 100}

Without `tokens` the bucket is full afterwards. Who did it, and to what bucket, is logged.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any, Final

import structlog
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ratelimit_sidecar.console.authority import Authority
from ratelimit_sidecar.console.browsers import require_json
from ratelimit_sidecar.console.buckets import describe_entries
from ratelimit_sidecar.limiter.explanation import readable_bucket_name
from ratelimit_sidecar.limiter.limiter import MAX_HITS, Limiter
from ratelimit_sidecar.limiter.refund import NoSuchLimit, NotRefundable, Refunded, refund
from ratelimit_sidecar.telemetry.traces import trace_fields

MAX_ENTRIES: Final = 64

_log = structlog.stdlib.get_logger(__name__)


def refund_endpoint(
    limiter: Limiter, now_us: Callable[[], int], authority: Authority, *, shows_values: bool
) -> Callable[[Request], Awaitable[Response]]:
    """Args:
    now_us: the clock of the decisions.
    shows_values: in the log, of descriptors, as callers gave them.
    """

    async def give_back(request: Request) -> Response:
        require_json(request)
        who = request.client.host if request.client is not None else ""
        try:
            await authority.require(request)
        except HTTPException as error:
            _log.warning("refund_refused", by=who, reason=error.detail, **trace_fields(request.headers.raw))
            raise
        domain, entries, tokens = await asyncio.to_thread(_parsed, await request.body())
        try:
            refunded = refund(limiter, domain, entries, tokens, now_us())
        except NoSuchLimit as error:
            raise HTTPException(404, str(error)) from error
        except NotRefundable as error:
            raise HTTPException(409, str(error)) from error
        # A warning, so that it is there whatever the level of the log.
        _log.warning(
            "refunded",
            audit=True,
            **trace_fields(request.headers.raw),
            by=who,
            domain=domain,
            rule=refunded.rule.name,
            descriptor=[
                f"{entry['key']}={entry['value']}"
                for entry in describe_entries(refunded.bucket.key, shows_values=shows_values)
            ],
            asked="all" if tokens is None else tokens,
            given=refunded.given,
            before=asdict(refunded.before),
            after=asdict(refunded.after),
        )
        return JSONResponse(_described(refunded))

    return give_back


def _described(refunded: Refunded) -> dict[str, object]:
    return {
        "rule": refunded.rule.name,
        "bucket": readable_bucket_name(refunded.bucket.key),
        "capacity": refunded.bucket.limit.capacity,
        "replicated": refunded.bucket.journal is not None,
        "before": asdict(refunded.before),
        "given": refunded.given,
        "after": asdict(refunded.after),
    }


def _parsed(body: bytes) -> tuple[str, list[tuple[str, str]], int | None]:
    """Domain, entries of the descriptor, and how many tokens.

    Raises:
        HTTPException: 400.
    """
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"not JSON: {error}") from error
    if not isinstance(given, dict) or not {"domain", "entries"} <= given.keys() <= {"domain", "entries", "tokens"}:
        raise HTTPException(400, "expected an object with domain, entries and, unless all is to be given back, tokens")
    entries = given["entries"]
    if not isinstance(entries, list) or not 1 <= len(entries) <= MAX_ENTRIES:
        raise HTTPException(400, f"entries: expected a list of 1 to {MAX_ENTRIES} objects with key and value")
    tokens = given.get("tokens")
    if tokens is not None and not (type(tokens) is int and 1 <= tokens <= MAX_HITS):
        raise HTTPException(400, f"tokens: expected 1 to {MAX_HITS}")
    return _text(given["domain"], "domain"), [_entry(entry) for entry in entries], tokens


def _entry(given: Any) -> tuple[str, str]:
    if not isinstance(given, dict) or given.keys() != {"key", "value"}:
        raise HTTPException(400, "entries: expected objects with key and value")
    return _text(given["key"], "key"), _text(given["value"], "value")


def _text(given: Any, name: str) -> str:
    if not isinstance(given, str):
        raise HTTPException(400, f"{name}: expected a text")
    try:
        given.encode()
    except UnicodeEncodeError as error:
        raise HTTPException(400, f"{name}: expected Unicode") from error
    return given
