"""The routes of the admin HTTP server. All of them only read, except POST /json, which decides like the gRPC service,
POST /refund, which gives tokens back, and POST /log-level. Answers and errors are JSON, except where another format is
established (/metrics, /healthcheck, /rlconfig).

They share the event loop with the decisions, so each works in slices of at most about a millisecond.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import structlog
from cryptography.fernet import Fernet, InvalidToken
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ratelimit_sidecar import __version__
from ratelimit_sidecar.console.authority import Authority
from ratelimit_sidecar.console.bounds import DEFAULT_BOUNDS
from ratelimit_sidecar.console.browsers import BrowserGuard
from ratelimit_sidecar.console.buckets import BucketDescription, BucketPager, describe_bucket
from ratelimit_sidecar.console.decisions import json_endpoint
from ratelimit_sidecar.console.log_level import log_level_endpoint
from ratelimit_sidecar.console.refunds import refund_endpoint
from ratelimit_sidecar.console.rules import RulesText, comments, describe_rules
from ratelimit_sidecar.crdt.strict import StrictBucket
from ratelimit_sidecar.limiter.key import BUCKET_TYPES, encode_bucket_key
from ratelimit_sidecar.limiter.limiter import Limiter
from ratelimit_sidecar.mesh_status import MembershipStatus, PeerStatus
from ratelimit_sidecar.rules_source.reloader import Reloader
from ratelimit_sidecar.server.deferred import HttpWaits
from ratelimit_sidecar.server.rpc import UnaryHandler
from ratelimit_sidecar.telemetry.exposition import Exposition
from ratelimit_sidecar.telemetry.logs import LogLevel
from ratelimit_sidecar.telemetry.traces import trace_fields

DEFAULT_PAGE_BUCKETS = 100
MAX_PAGE_BUCKETS = 200

DESCRIBED_AT_ONCE = 25
"""Buckets described in one go, in half a millisecond."""

_log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ConsoleSources:
    """The parts of the sidecar that the console shows.

    Args:
        peers: called once a request.
        membership: called once a request; returns None if no limit can be strict.
        missing: what the sidecar still waits for before it is ready, as texts; empty when it is ready.
        degraded: what does not work as it should, as texts.
        now_us: returns the time of the limiter's clock.
        reloader: reloads the limiter's rules.
        should_rate_limit: the method of the gRPC service.
        shows_values: True to show the values that callers chose.
        names: further host names under which the console is reached (see `console.browsers`).
        token_file: the file with the token that allows changes (`console.authority`).
    """

    node: str
    region: str
    limiter: Limiter
    registry: CollectorRegistry
    peers: Callable[[], Sequence[PeerStatus]]
    membership: Callable[[], MembershipStatus | None]
    missing: Callable[[], Sequence[str]]
    degraded: Callable[[], Sequence[str]]
    now_us: Callable[[], int]
    reloader: Reloader
    should_rate_limit: UnaryHandler
    shows_values: bool = False
    names: Sequence[str] = ()
    token_file: Path | None = None


def create_app(sources: ConsoleSources) -> ASGIApp:
    console = _Console(sources)
    routes = [Route(path, endpoint, methods=[method]) for path, method, endpoint, _ in console.endpoints]
    app = Starlette(
        routes=[Route("/", console.index, methods=["GET"]), *routes],
        exception_handlers={HTTPException: _http_error, _BadQuery: _bad_query, Exception: _failure},
    )
    return partial(_log_failures, BrowserGuard(app, sources.names))


class _Console:
    """The endpoints, and the state that lasts from one request to the next."""

    def __init__(self, sources: ConsoleSources) -> None:
        self._sources = sources
        limiter = sources.limiter
        # An empty ledger is false.
        self._pager = BucketPager(limiter.store, *(() if limiter.ledger is None else (limiter.ledger,)))
        self._exposition = Exposition(sources.registry)
        self._rules_text = RulesText(limiter)
        self._seal = Fernet(Fernet.generate_key())
        authority = Authority(sources.token_file)
        self.endpoints: Sequence[tuple[str, str, Callable[[Request], Awaitable[Response]], str]] = (
            ("/metrics", "GET", self.metrics, "Prometheus metrics"),
            ("/healthz", "GET", self.healthz, "200 while the process lives"),
            ("/readyz", "GET", self.readyz, "200 when requests can be sent here, otherwise 503 and what is missing"),
            (
                "/healthcheck",
                "GET",
                self.healthcheck,
                "as envoyproxy/ratelimit has it: 200 or 500; unlike /readyz it does not wait for an xDS server's rules",
            ),
            (
                "/buckets",
                "GET",
                self.buckets,
                f"active buckets; ?domain= selects, ?limit= (1 to {MAX_PAGE_BUCKETS}) and ?after= (next) page",
            ),
            ("/rlconfig", "GET", self.rlconfig, "the rules in force as text, and why the newest ones are not"),
            ("/peers", "GET", self.peers, "the replication mesh as this node sees it"),
            (
                "/json",
                "POST",
                json_endpoint(sources.should_rate_limit, HttpWaits(DEFAULT_BOUNDS.requests // 2)),
                "a RateLimitRequest in JSON: 200 or 429 with the RateLimitResponse, 400 when it is none",
            ),
            (
                "/refund",
                "POST",
                refund_endpoint(limiter, sources.now_us, authority, shows_values=sources.shows_values),
                "gives a caller back what it used up: domain, entries, and tokens unless it is all",
            ),
            (
                "/log-level",
                "POST",
                log_level_endpoint(LogLevel(), authority),
                "logs from another level on: level, and seconds unless it is for good",
            ),
        )

    async def index(self, request: Request) -> Response:
        _no_query(request)
        return JSONResponse(
            {
                "service": "ratelimit-sidecar",
                "version": __version__,
                "node": self._sources.node,
                "region": self._sources.region,
                "endpoints": {path: description for path, _, _, description in self.endpoints},
            }
        )

    async def metrics(self, request: Request) -> Response:
        body, content_type = self._exposition.encode(request.headers.get("accept", ""))
        return StreamingResponse(body, headers={"content-type": content_type})

    async def healthz(self, _request: Request) -> Response:
        return JSONResponse({"alive": True})

    async def readyz(self, _request: Request) -> Response:
        reloader = self._sources.reloader
        missing = list(self._sources.missing())
        if reloader.loaded is None:
            missing.append(f"no rules from {reloader.source} yet")
        return JSONResponse(
            {
                "ready": not missing,
                "missing": missing,
                "degraded": list(self._sources.degraded()),
                "rules": describe_rules(reloader),
            },
            status_code=503 if missing else 200,
        )

    async def healthcheck(self, _request: Request) -> Response:
        # Envoy Gateway restarts its rate limit service by this, also while it has no rules for it.
        missing = self._sources.missing()
        return PlainTextResponse("\n".join(missing) or "OK", status_code=500 if missing else 200)

    async def rlconfig(self, request: Request) -> Response:
        _no_query(request)
        lines = await self._rules_text.pieces()
        about = "".join([f"# {line}\n" for line in comments(describe_rules(self._sources.reloader))])
        return StreamingResponse(_one_by_one([*lines, about.encode()]), media_type="text/plain")

    async def buckets(self, request: Request) -> Response:
        query = _query(request, "after", "limit", "domain")
        limit = _page_size(query.get("limit"))
        after = self._cursor_key(query["after"]) if "after" in query else b""
        domain = query.get("domain")
        prefixes = (
            (b"",)
            if domain is None
            else tuple(encode_bucket_key(bucket_type, domain, ()) for bucket_type in sorted(BUCKET_TYPES))
        )
        limiter = self._sources.limiter
        page = await self._pager.page(after, limit, prefixes)
        described: list[BucketDescription] = []
        for start in range(0, len(page.buckets), DESCRIBED_AT_ONCE):
            now_us = self._sources.now_us()
            strict_us = now_us - limiter.clock_steps_us
            described += [
                describe_bucket(
                    bucket,
                    limiter.rules,
                    strict_us if isinstance(bucket, StrictBucket) else now_us,
                    shows_values=self._sources.shows_values,
                )
                for bucket in page.buckets[start : start + DESCRIBED_AT_ONCE]
            ]
            await asyncio.sleep(0)
        return JSONResponse(
            {
                "active": len(limiter.store) + len(limiter.ledger or ()),
                "buckets": described,
                "next": self._cursor(page.buckets[-1].key) if page.more else None,
            }
        )

    async def peers(self, request: Request) -> Response:
        _no_query(request)
        membership = self._sources.membership()
        return JSONResponse(
            {
                "node": self._sources.node,
                "region": self._sources.region,
                "membership": None if membership is None else asdict(membership),
                "peers": [
                    {**asdict(peer), "protocol_errors": dict(peer.protocol_errors), "refused": dict(peer.refused)}
                    for peer in self._sources.peers()
                ],
            }
        )

    def _cursor(self, bucket_key: bytes) -> str:
        """The cursor is encrypted, since a bucket key has values of callers."""
        return self._seal.encrypt(bucket_key).decode().rstrip("=")

    def _cursor_key(self, given: str) -> bytes:
        try:
            return self._seal.decrypt(given + "=" * (-len(given) % 4))
        except (InvalidToken, ValueError) as error:
            raise _BadQuery(f"after is {given!r}, expected the `next` of another page of this process") from error


async def _one_by_one(pieces: Iterable[bytes]) -> AsyncIterator[bytes]:
    """Pieces of a body, with a turn of the loop for each."""
    for piece in pieces:
        yield piece
        await asyncio.sleep(0)


class _BadQuery(Exception):
    """A query that cannot be answered; its text is for the caller."""


def _query(request: Request, *known: str) -> dict[str, str]:
    given: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name not in known:
            raise _BadQuery(f"unknown parameter {name!r}; known here: {', '.join(known) or 'none'}")
        if name in given:
            raise _BadQuery(f"{name} is given twice")
        given[name] = value
    return given


def _no_query(request: Request) -> None:
    _query(request)


def _page_size(given: str | None) -> int:
    if given is None:
        return DEFAULT_PAGE_BUCKETS
    # int() would take more: signs, spaces, underscores, digits of all scripts.
    if given.isascii() and given.isdecimal() and len(given) <= 4 and 1 <= int(given) <= MAX_PAGE_BUCKETS:
        return int(given)
    raise _BadQuery(f"limit is {given!r}, expected 1 to {MAX_PAGE_BUCKETS}")


async def _bad_query(_request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, status_code=400)


async def _http_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def _failure(_request: Request, _error: Exception) -> Response:
    return JSONResponse({"error": "internal error; the log has the details"}, status_code=500)


async def _log_failures(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Starlette raises a failed request's exception again after its answer; uvicorn would log it without the path."""
    try:
        await app(scope, receive, send)
    except Exception:
        _log.exception("console_request_failed", path=scope.get("path"), **trace_fields(scope.get("headers", ())))
