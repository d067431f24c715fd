"""POST /refund: who may give a caller back what it used up, and what it says and logs."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
from console.small_console import Console
from observed import NOW_US, request, small_limiter, small_rules, strict_limiter
from structlog.testing import capture_logs

from ratelimit_sidecar.limiter.limiter import Limiter

TENANT = ("tenant", "acme")
ASKED = {"domain": "edge", "entries": [{"key": "tenant", "value": "acme"}]}
TOKEN = "correct horse"


async def post(
    console: Console, body: object = ASKED, client: str = "127.0.0.1", host: str = "127.0.0.1:8080", **headers: str
) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    transport = httpx.ASGITransport(console.app, client=(client, 1234))
    sent = {"content-type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as session:
        return await session.post("/refund", content=content, headers=sent)


def used_up(limiter: Limiter | None = None, **how: object) -> Console:
    """The console of a limiter whose tenant has nothing left."""
    console = Console(limiter, **how)  # type: ignore[arg-type]
    console.limiter.decide(request(TENANT, hits=2), NOW_US)
    return console


def remaining(console: Console) -> int:
    [bucket] = [each for each in console.limiter.store if b"acme" in each.key]
    return bucket.remaining


async def test_all_is_given_back_and_it_says_by_which_rule_and_how_much_there_was_and_is() -> None:
    console = used_up()
    response = await post(console)
    assert (response.status_code, response.json()) == (
        200,
        {
            "rule": "edge.tenant",
            "bucket": "edge / tenant=acme",
            "capacity": 2,
            "replicated": True,
            "before": {"remaining": 0, "debt": 0},
            "given": 2,
            "after": {"remaining": 2, "debt": 0},
        },
    )
    assert remaining(console) == 2


async def test_a_few_tokens_are_given_back_and_no_more_than_fill_the_bucket() -> None:
    console = used_up()
    one = (await post(console, {**ASKED, "tokens": 1})).json()
    assert (one["given"], one["after"]) == (1, {"remaining": 1, "debt": 0})
    rest = (await post(console, {**ASKED, "tokens": 1_000})).json()
    assert (rest["given"], rest["after"]) == (1, {"remaining": 2, "debt": 0})


async def test_peers_are_told_of_it_but_not_where_the_rule_is_local() -> None:
    console = used_up()
    console.limiter.decide(request(("ip", "10.0.0.1"), hits=2), NOW_US)
    console.limiter.store.drain_changes()
    local = (await post(console, {"domain": "edge", "entries": [{"key": "ip", "value": "10.0.0.1"}]})).json()
    assert (local["given"], local["replicated"]) == (2, False)
    assert console.limiter.store.drain_changes() == []
    await post(console)
    [(bucket, slots)] = console.limiter.store.drain_changes()
    assert [entry.tokens for entry in bucket.own_entries(slots)] == [2]


@pytest.mark.parametrize(
    ("body", "status", "error"),
    [
        ({**ASKED, "domain": "egde"}, 404, "no rules for the domain egde; there are rules for: edge"),
        ({"domain": "edge", "entries": [{"key": "user", "value": "1"}]}, 404, "nothing matches user=1"),
        ({"domain": "edge", "entries": [{"key": "plan", "value": "gold"}]}, 409, "edge.plan_gold is unlimited"),
        (b"{", 400, "not JSON"),
        (b"[" * 100_000, 400, "not JSON"),
        ([], 400, "expected an object with domain, entries"),
        ({**ASKED, "colour": "red"}, 400, "expected an object with domain, entries"),
        ({**ASKED, "entries": []}, 400, "entries: expected a list"),
        ({**ASKED, "entries": [{"key": "tenant"}]}, 400, "objects with key and value"),
        ({**ASKED, "entries": [{"key": "tenant", "value": 7}]}, 400, "value: expected a text"),
        (b'{"domain": "\\ud800", "entries": [{"key": "a", "value": "b"}]}', 400, "domain: expected Unicode"),
        ({**ASKED, "tokens": 0}, 400, "tokens: expected 1 to"),
        ({**ASKED, "tokens": True}, 400, "tokens: expected 1 to"),
        ({**ASKED, "tokens": 2**64}, 400, "tokens: expected 1 to"),
    ],
)
async def test_what_cannot_be_done_is_refused_with_the_reason(body: object, status: int, error: str) -> None:
    response = await post(Console(), body)
    assert response.status_code == status, response.text
    assert error in response.json()["error"]


async def test_a_strict_limit_is_not_given_back() -> None:
    response = await post(Console(strict_limiter()))
    assert response.status_code == 409
    assert "the rule edge.tenant is strict" in response.json()["error"]


async def test_without_room_for_a_bucket_of_its_own_there_is_none_to_refill() -> None:
    limiter = Limiter(small_rules(), small_limiter().store.origin, max_buckets=1)
    for number in range(20):
        limiter.decide(request(("tenant", f"other-{number}")), NOW_US)
    response = await post(Console(limiter))
    assert response.status_code == 409
    assert "max_buckets" in response.json()["error"]


@pytest.mark.parametrize(("client", "host"), [("127.0.0.1", "127.0.0.1:8080"), ("::1", "[::1]:8080")])
async def test_without_a_token_file_this_machine_may(client: str, host: str) -> None:
    assert (await post(used_up(), client=client, host=host)).status_code == 200


@pytest.mark.parametrize(
    ("client", "host"),
    [
        ("10.0.0.9", "10.0.0.1:8080"),
        ("10.0.0.9", "127.0.0.1:8080"),
        # What Istio's proxy leads on to the pod it is in, as bytes of TCP or to its loopback.
        ("127.0.0.6", "10.0.0.1:8080"),
        ("127.0.0.6", "127.0.0.1:8080"),
        ("127.0.0.1", "10.0.0.1:8080"),
    ],
)
async def test_without_a_token_file_others_may_not(client: str, host: str) -> None:
    console = used_up()
    response = await post(console, client=client, host=host)
    assert response.status_code == 403
    assert "listen.admin_token_file" in response.json()["error"]
    assert remaining(console) == 0


@pytest.mark.parametrize("header", ["x_forwarded_for", "forwarded", "via", "x_real_ip", "x_envoy_external_address"])
async def test_without_a_token_file_what_a_proxy_on_this_machine_passes_on_is_refused(header: str) -> None:
    console = used_up()
    response = await post(console, **{header: "10.0.0.9"})
    assert response.status_code == 403
    assert header.replace("_", "-") in response.json()["error"]
    assert remaining(console) == 0


async def test_with_a_token_file_whoever_shows_the_token_may_and_nobody_else(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    console = used_up(token_file=file)
    for wrong in ({}, {"authorization": "Bearer "}, {"authorization": f"Basic {TOKEN}"}, {"authorization": "Bearer x"}):
        response = await post(console, **wrong)
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
    assert remaining(console) == 0
    right = {"authorization": f"Bearer {TOKEN}", "x_forwarded_for": "10.0.0.9"}
    assert (await post(console, client="10.0.0.9", **right)).status_code == 200


async def test_a_token_that_is_replaced_holds_at_once(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(TOKEN)
    console = used_up(token_file=file)
    file.write_text("another")
    assert (await post(console, authorization=f"Bearer {TOKEN}")).status_code == 401
    assert (await post(console, authorization="Bearer another")).status_code == 200


@pytest.mark.parametrize("content", [None, "", " \n", "x" * 5_000])
async def test_without_a_usable_token_in_its_file_nobody_may(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "token"
    if content is not None:
        file.write_text(content)
    console = used_up(token_file=file)
    response = await post(console, authorization="Bearer x")
    assert response.status_code == 503
    assert "listen.admin_token_file" in response.json()["error"]
    assert remaining(console) == 0


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content_type": "text/plain"}, 415),
        ({"origin": "https://evil.example.com"}, 403),
        ({"sec_fetch_site": "cross-site"}, 403),
        ({"host": "rebound.example.com"}, 403),
    ],
)
async def test_no_page_of_another_site_can_ask(headers: dict[str, str], status: int) -> None:
    console = used_up()
    assert (await post(console, **headers)).status_code == status
    assert remaining(console) == 0


@pytest.mark.parametrize("shows_values", [True, False])
async def test_the_log_says_who_gave_back_how_much_and_of_what_rule(shows_values: bool) -> None:
    console = used_up(shows_values=shows_values)
    with capture_logs() as logs:
        await post(console, {**ASKED, "tokens": 1}, client="::1")
    [line] = [line for line in logs if line["event"] == "refunded"]
    assert (line["by"], line["domain"], line["rule"]) == ("::1", "edge", "edge.tenant")
    assert (line["asked"], line["given"]) == (1, 1)
    assert (line["before"], line["after"]) == ({"remaining": 0, "debt": 0}, {"remaining": 1, "debt": 0})
    assert ("acme" in str(line)) is shows_values


async def test_the_log_says_who_was_refused() -> None:
    with capture_logs() as logs:
        await post(used_up(), client="10.0.0.9")
    [line] = [line for line in logs if line["event"] == "refund_refused"]
    assert line["by"] == "10.0.0.9"
    assert "acme" not in str(line)
