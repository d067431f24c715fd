"""A web page of somebody else reaches the console through a browser, and gets nothing of it."""

from __future__ import annotations

import pytest
from console.small_console import Console
from console.test_json import TENANT, post

REBOUND = {"host": "evil.example:8080"}


@pytest.mark.parametrize(
    "sent",
    [
        {"content-type": "text/plain"},
        {"content-type": ""},
        {"content-type": "application/x-www-form-urlencoded"},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://["},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        REBOUND,
    ],
)
async def test_a_page_of_another_site_spends_no_tokens(sent: dict[str, str]) -> None:
    console = Console()
    response = await post(console, TENANT, **sent)
    assert response.status_code in {403, 415}, response.text
    assert await console.buckets() == []


async def test_the_consoles_own_site_and_programs_may() -> None:
    console = Console()
    own = {"origin": "http://console", "sec-fetch-site": "same-origin"}
    assert [(await post(console, TENANT, **sent)).status_code for sent in ({}, own)] == [200, 200]


@pytest.mark.parametrize("path", ["/", "/buckets", "/peers", "/rlconfig", "/nothing"])
async def test_under_a_name_that_somebody_else_may_own_nothing_is_shown(path: str) -> None:
    response = await Console().get(path, **REBOUND)
    assert response.status_code == 403
    assert "listen.admin_names" in response.json()["error"]


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/healthcheck", "/metrics"])
async def test_probes_and_scrapes_call_it_what_they_like(path: str) -> None:
    assert (await Console().get(path, **REBOUND)).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "10.1.2.3:8080",
        "[fd00::1]:8080",
        "localhost:8080",
        "ratelimit:8080",
        "ratelimit.envoy.svc:8080",
        "ratelimit.envoy.svc.cluster.local",
        "Console.Example.com:8080",
    ],
)
async def test_addresses_and_names_that_are_nobody_elses_are_known(host: str) -> None:
    assert (await Console().get("/peers", host=host)).status_code == 200


@pytest.mark.parametrize("host", ["[", "a.b:port:port", "10.1.2.3.evil.example", "x.localhost.evil.example", "evil.sv"])
async def test_what_only_looks_like_one_is_not(host: str) -> None:
    assert (await Console().get("/peers", host=host)).status_code == 403
