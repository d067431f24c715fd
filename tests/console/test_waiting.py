"""Requests over HTTP that wait: `/json`, and ext_authz over HTTP."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import httpx
import pytest
from console.small_console import Console
from console.test_json import post
from services.waiting_service import WaitingService

from ratelimit_sidecar.console.bounds import DEFAULT_BOUNDS
from ratelimit_sidecar.console.requests import BoundedRequests
from ratelimit_sidecar.crdt.waiting import Outcome
from ratelimit_sidecar.limiter.http_mapping import EntrySource, Part
from ratelimit_sidecar.server.deferred import HttpWaits
from ratelimit_sidecar.services.ext_authz import ExtAuthzService
from ratelimit_sidecar.services.ext_authz_http import ext_authz_app

GOLD = {"domain": "api", "descriptors": [{"entries": [{"key": "plan", "value": "gold"}]}]}
AT_ONCE_S = 30
MAPPING = ((EntrySource(b"plan", Part.HEADER, b"x-plan"),),)


class Http:
    """Both over HTTP, on places of their own.

    Args:
        wait_ms: of the rule; by itself no wait is over before the test is.
    """

    def __init__(self, wait_ms: int = 600_000) -> None:
        self.service = WaitingService(wait_ms)
        limiter = self.service.limiter
        rules = limiter.rules
        self.console = Console(limiter, self.service.service.should_rate_limit)
        self.console.app = BoundedRequests(self.console.app)
        with_mapping = replace(rules, http_mappings={"api": MAPPING}, default_domain="api")
        authz = ExtAuthzService(self.service.service, lambda: with_mapping)
        self.authz = BoundedRequests(ext_authz_app(authz, HttpWaits(DEFAULT_BOUNDS.requests // 2)))

    async def check(self) -> httpx.Response:
        transport = httpx.ASGITransport(self.authz)
        async with httpx.AsyncClient(transport=transport, base_url="http://console") as client:
            return await client.get("/ext_authz/api/", headers={"x-plan": "gold"})


async def test_a_request_to_json_waits_and_is_answered() -> None:
    http = Http()
    answer = asyncio.create_task(post(http.console, GOLD))
    await http.service.until_waiting(1)
    http.service.node.come(1)
    assert (await answer).status_code == 200


async def test_a_request_to_json_whose_wait_is_over_is_denied() -> None:
    assert (await post(Http(wait_ms=1).console, GOLD)).status_code == 429


async def test_ext_authz_over_http_waits_and_is_answered() -> None:
    http = Http()
    answers = [asyncio.create_task(http.check()) for _ in range(2)]
    await http.service.until_waiting(2)
    http.service.node.come(2)
    assert [answer.status_code for answer in await asyncio.gather(*answers)] == [200, 200]
    assert (await Http(wait_ms=1).check()).status_code == 429


async def test_those_that_wait_leave_half_of_the_places_to_others() -> None:
    """However many would wait: those beyond half of the places are decided at once."""
    http = Http()
    for ask in (lambda: post(http.console, GOLD), http.check):
        waiting = [asyncio.create_task(ask()) for _ in range(DEFAULT_BOUNDS.requests // 2)]
        await http.service.until_waiting(DEFAULT_BOUNDS.requests // 2)
        async with asyncio.timeout(AT_ONCE_S):
            assert {(await ask()).status_code for _ in range(2 * DEFAULT_BOUNDS.requests)} == {429}
        http.service.node.come(DEFAULT_BOUNDS.requests // 2)
        assert {(await each).status_code for each in waiting} == {200}


async def test_a_client_that_goes_ends_its_wait_and_gives_its_place_back() -> None:
    http = Http()
    for _ in range(2 * DEFAULT_BOUNDS.requests):
        await ask_and_go(http.console.app, http.service)
    assert http.service.queues.counts[Outcome.CANCELLED] == 2 * DEFAULT_BOUNDS.requests
    answer = asyncio.create_task(post(http.console, GOLD))
    await http.service.until_waiting(1)
    http.service.node.come(1)
    assert (await answer).status_code == 200


async def test_a_request_that_fails_before_its_answer_gives_its_place_back() -> None:
    async def fail(*_: object) -> None:
        raise ConnectionResetError

    transport = httpx.ASGITransport(BoundedRequests(fail))
    async with httpx.AsyncClient(transport=transport, base_url="http://console") as client:
        for _ in range(2 * DEFAULT_BOUNDS.requests):
            with pytest.raises(ConnectionResetError):
                await client.get("/json")


async def ask_and_go(app: BoundedRequests, service: WaitingService) -> None:
    """Over ASGI: the client is gone once its request waits."""
    gone = asyncio.Event()
    messages = [{"type": "http.request", "body": json.dumps(GOLD).encode(), "more_body": False}]

    async def receive() -> dict[str, object]:
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(_message: object) -> None: ...

    headers = [(b"content-type", b"application/json"), (b"host", b"console.example.com")]
    scope = {"type": "http", "method": "POST", "path": "/json", "raw_path": b"/json", "query_string": b""}
    asking = asyncio.create_task(app({**scope, "headers": headers, "client": ("10.0.0.1", 1)}, receive, send))
    await service.until_waiting(1)
    gone.set()
    await asking
    await service.until_waiting(0)
