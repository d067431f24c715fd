"""The examples of examples/filters, each as a real Envoy beside one sidecar: what callers see of each filter."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio
from e2e.examples import running
from server.raw_http2 import connected

UPSTREAM = "openclaw/rating_api.py"
FILTERS = ("envoy-ratelimit", "envoy-ext-authz", "envoy-ext-authz-http")
OVER_EXT_AUTHZ = FILTERS[1:]

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def proxies(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[dict[str, httpx.AsyncClient]]:
    async with running(tmp_path_factory.mktemp("filters"), "filters", UPSTREAM, FILTERS) as clients:
        yield clients


async def ask(proxy: httpx.AsyncClient, user: str | bytes | None) -> httpx.Response:
    headers = [] if user is None else [(b"x-user-id", user.encode() if isinstance(user, str) else user)]
    return await proxy.get("/rate?agent=claw", headers=headers)


@pytest.mark.parametrize("name", FILTERS)
async def test_a_caller_passes_three_times_and_is_then_told_when_to_come_back(
    proxies: dict[str, httpx.AsyncClient], name: str
) -> None:
    responses = [await ask(proxies[name], name) for _ in range(4)]
    assert [response.status_code for response in responses] == [200, 200, 200, 429]
    assert responses[0].json()["agent"] == "claw"
    denied = responses[-1]
    assert denied.text == "three a minute"
    wait = int(denied.headers["retry-after"])
    assert 0 < wait <= 20
    assert denied.headers["ratelimit-policy"] == '"shop.user";q=3;w=60'
    assert denied.headers["ratelimit"] == f'"shop.user";r=0;t={wait}'


@pytest.mark.parametrize("name", OVER_EXT_AUTHZ)
async def test_over_ext_authz_a_caller_that_passes_sees_what_is_left(
    proxies: dict[str, httpx.AsyncClient], name: str
) -> None:
    response = await ask(proxies[name], f"first of {name}")
    assert response.status_code == 200
    assert response.headers["ratelimit-policy"] == '"shop.user";q=3;w=60'
    assert response.headers["ratelimit"] == '"shop.user";r=2;t=20'


async def test_one_limit_is_shared_by_all_filters(proxies: dict[str, httpx.AsyncClient]) -> None:
    statuses = [(await ask(proxies[name], "eve")).status_code for name in (*FILTERS, *FILTERS)]
    assert statuses == [200] * 3 + [429] * 3


@pytest.mark.parametrize(("name", "of_another"), [*zip(FILTERS, (200, 200, 429), strict=True)])
async def test_a_value_that_is_not_utf_8_is_limited(
    proxies: dict[str, httpx.AsyncClient], name: str, of_another: int
) -> None:
    """Over HTTP together with others: Envoy sends one `!` for all bytes that are no UTF-8."""
    mine, other = name.encode() + b"\xff", name.encode() + b"\xfe"
    statuses = [(await ask(proxies[name], user)).status_code for user in (mine, mine, mine, mine, other)]
    assert statuses == [200, 200, 200, 429, of_another]


@pytest.mark.parametrize("name", FILTERS)
async def test_who_puts_spaces_and_tabs_around_a_name_is_the_same_caller(
    proxies: dict[str, httpx.AsyncClient], name: str
) -> None:
    """Envoy takes them away from HTTP/1.1 alone, and what is behind it does not see them."""
    url = proxies[name].base_url
    around = [f"{before}a-{name}{after}".encode() for before in ("", " ", "\t") for after in ("", "  ", "\t")]
    async with connected(f"{url.host}:{url.port}") as client:
        answers = [await client.call("/rate?agent=claw", b"", [(b"x-user-id", user)], method=b"GET") for user in around]
    assert [answer.http_status for answer in answers] == [200] * 3 + [429] * 6


@pytest.mark.parametrize("name", FILTERS)
async def test_a_caller_without_a_name_is_not_limited(proxies: dict[str, httpx.AsyncClient], name: str) -> None:
    assert [(await ask(proxies[name], None)).status_code for _ in range(5)] == [200] * 5


@pytest.mark.slow
@pytest.mark.parametrize("name", FILTERS)
async def test_while_the_sidecar_is_away_requests_pass(tmp_path: Path, name: str) -> None:
    async with running(tmp_path, "filters", UPSTREAM, [name], with_sidecar=False) as clients:
        assert [(await ask(clients[name], "eve")).status_code for _ in range(5)] == [200] * 5
