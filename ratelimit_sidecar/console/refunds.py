"""POST /refund: gives tokens back to a caller, and returns the levels before and after.

    {"domain": "shop", "entries": [{"key": "user", "value": "eve"}], "tokens": 100}

Without `tokens` the bucket is full afterwards. The sender and the bucket are logged.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any, Final

import structlog
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ratelimit_sidecar.console.authority import Authority
from ratelimit_sidecar.console.buckets import describe_entries
from ratelimit_sidecar.console.changes import json_object, require_authority
from ratelimit_sidecar.limiter.explanation import readable_bucket_name
from ratelimit_sidecar.limiter.limiter import MAX_HITS, Limiter
from ratelimit_sidecar.limiter.refund import NoSuchLimit, NotRefundable, Refunded, refund

MAX_ENTRIES: Final = 64

_log = structlog.stdlib.get_logger(__name__)


def refund_endpoint(
    limiter: Limiter, now_us: Callable[[], int], authority: Authority, *, shows_values: bool
) -> Callable[[Request], Awaitable[Response]]:
    """Make the endpoint.

    Args:
        now_us: returns the time of the limiter's clock.
        shows_values: True if the log shows the values that callers chose.
    """

    async def give_back(request: Request) -> Response:
        sender = await require_authority(request, authority, "refund_refused")
        domain, entries, tokens = await asyncio.to_thread(_parsed, await request.body())
        try:
            refunded = refund(limiter, domain, entries, tokens, now_us())
        except NoSuchLimit as error:
            raise HTTPException(404, str(error)) from error
        except NotRefundable as error:
            raise HTTPException(409, str(error)) from error
        # A warning, so that it is logged at every usual level.
        _log.warning(
            "refunded",
            audit=True,
            **sender,
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
        "replicated": refunded.bucket.is_replicated,
        "before": asdict(refunded.before),
        "given": refunded.given,
        "after": asdict(refunded.after),
    }


def _parsed(body: bytes) -> tuple[str, list[tuple[str, str]], int | None]:
    """Domain, entries of the descriptor, and how many tokens.

    Raises:
        HTTPException: 400.
    """
    given = json_object(
        body, {"domain", "entries"}, "tokens", "domain, entries and, unless all is to be given back, tokens"
    )
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
