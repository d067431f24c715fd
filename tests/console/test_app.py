"""What each admin endpoint answers."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from urllib.parse import quote

import pytest
from console.small_console import Console
from joined import join
from observed import NOW_US, TWO_A_MINUTE, membership, request, small_limiter, small_rules, strict_limiter
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from structlog.testing import capture_logs

from ratelimit_sidecar import __version__
from ratelimit_sidecar.console.app import MAX_PAGE_BUCKETS, ConsoleSources, create_app
from ratelimit_sidecar.crdt.bucket import Entry, Origin
from ratelimit_sidecar.crdt.slot import slot_id
from ratelimit_sidecar.limiter.rules import Rule, RuleNode, Rules
from ratelimit_sidecar.mesh_status import PeerStatus


async def test_the_root_lists_the_endpoints_and_each_of_them_answers() -> None:
    console = Console()
    body = (await console.get("/")).json()
    assert (body["node"], body["region"], body["version"]) == ("us-1", "us-east-1", __version__)
    readable = {"/metrics", "/healthz", "/readyz", "/healthcheck", "/buckets", "/rlconfig", "/peers"}
    assert set(body["endpoints"]) == {*readable, "/json", "/refund", "/log-level"}
    for path in readable:
        assert (await console.get(path)).status_code == 200, path


@pytest.mark.parametrize(
    ("accept", "content_type", "parse"),
    [
        ("", "text/plain; version=0.0.4", parse_text),
        (
            "application/openmetrics-text;version=1.0.0",
            "application/openmetrics-text; version=1.0.0",
            parse_openmetrics,
        ),
    ],
)
async def test_metrics_come_in_the_format_the_scraper_accepts(accept: str, content_type: str, parse) -> None:
    console = Console()
    console.limiter.decide(request(("tenant", "acme")), NOW_US)
    response = await console.get("/metrics", accept=accept)
    assert response.headers["content-type"].startswith(content_type)
    names = {sample.name for family in parse(response.text) for sample in family.samples}
    assert {"crdt_token_consumed_total", "crdt_sync_lag_seconds", "process_cpu_seconds_total"} <= names


async def test_a_living_process_is_healthy_though_not_ready() -> None:
    console = Console()
    console.missing = ["peers have not answered yet"]
    assert (await console.get("/healthz")).status_code == 200
    response = await console.get("/readyz")
    assert response.status_code == 503
    body = response.json()
    assert (body["ready"], body["missing"]) == (False, ["peers have not answered yet"])


async def test_it_is_ready_though_degraded_and_says_why() -> None:
    console = Console()
    console.degraded = ["calls were refused"]
    response = await console.get("/readyz")
    assert (response.status_code, response.json()["degraded"]) == (200, ["calls were refused"])


async def test_it_is_ready_when_nothing_is_missing() -> None:
    response = await Console().get("/readyz")
    body = response.json()
    assert (response.status_code, body["ready"], body["missing"]) == (200, True, [])


async def test_the_probes_of_envoyproxy_ratelimit_get_200_and_ok_or_500() -> None:
    console = Console()
    response = await console.get("/healthcheck")
    assert (response.status_code, response.text) == (200, "OK")
    console.missing = ["the sidecar is shutting down"]
    response = await console.get("/healthcheck")
    assert (response.status_code, response.text) == (500, "the sidecar is shutting down")


async def test_only_readiness_waits_for_rules_that_have_not_come_yet() -> None:
    console = Console(has_rules=False)
    response = await console.get("/readyz")
    assert response.status_code == 503
    assert response.json()["missing"] == ["no rules from files rules yet"]
    assert (await console.get("/healthcheck")).status_code == 200
    await console.reloader.load(small_rules)
    assert (await console.get("/readyz")).status_code == 200


async def test_peers_are_listed_with_all_that_is_known_of_them() -> None:
    body = (await Console().get("/peers")).json()
    assert (body["node"], body["region"]) == ("us-1", "us-east-1")
    assert body["peers"] == [
        {
            "node": "eu-1",
            "region": "eu-west-2",
            "address": "eu.example.com:50051",
            "version": "1.2.3",
            "protocol": 3,
            "connected": True,
            "lag_seconds": 0.08,
            "pending_buckets": 3,
            "batches_sent": 40,
            "batches_received": 50,
            "entries_sent": 400,
            "entries_received": 500,
            "bytes_sent": 6_000,
            "bytes_received": 7_000,
            "resyncs": 4,
            "rules_match": True,
            "reconnects": 2,
            "clock_offset_seconds": 0.002,
            "last_error": "",
            "failed_dials": 0,
            "protocol_errors": {"malformed": 1},
            "refused": {"ahead": 9},
        }
    ]


async def test_who_shares_strict_limits_is_shown_beside_the_peers() -> None:
    console = Console()
    assert (await console.get("/peers")).json()["membership"] is None
    console.membership = membership()
    assert (await console.get("/peers")).json()["membership"] == {
        "epoch": 3,
        "home_share": 0.25,
        "settled": True,
        "conflicts": ["eu-1"],
        "buckets": 7,
        "payments_sent": 11,
        "payments_received": 13,
    }


async def test_a_strict_bucket_is_shown_as_the_part_of_it_that_this_node_has() -> None:
    console = Console(strict_limiter())
    console.limiter.decide(request(("tenant", "acme")), NOW_US)
    # A step of the wall clock refills nothing.
    console.limiter.clock_steps_us = 3_600_000_000
    console.now_us = NOW_US + console.limiter.clock_steps_us + 15_000_000
    body = (await console.get("/buckets?domain=edge")).json()
    [bucket] = body["buckets"]
    assert (body["active"], bucket["rule"], bucket["capacity"]) == (1, "edge.tenant", 2)
    assert (bucket["share"], bucket["remaining"], bucket["full_in_seconds"]) == (0.5, 0, 45.0)


async def test_a_bucket_is_shown_in_words_and_tokens() -> None:
    console = Console()
    console.limiter.decide(request(("tenant", "acme"), hits=2), NOW_US)
    console.now_us = NOW_US + 15_000_000
    assert await console.buckets() == [
        {
            "domain": "edge",
            "entries": [{"key": "tenant", "value": "acme", "match": "key"}],
            "rule": "edge.tenant",
            "capacity": 2,
            "remaining": 0,
            "debt": 0,
            "full_in_seconds": 45.0,
            "replicated": True,
            "share": None,
            "origins": 1,
            "slots": 1,
        }
    ]


async def test_debt_to_other_replicas_is_shown() -> None:
    console = Console()
    raw = request(("tenant", "acme"), hits=2)
    console.limiter.decide(raw, NOW_US)
    key = console.limiter.plan(raw).takes[0].bucket_key
    slot = slot_id(NOW_US, TWO_A_MINUTE.exponent)
    join(console.limiter.store, key, None, [Entry(Origin("eu-1", 7), slot, 1)], NOW_US)
    [bucket] = await console.buckets()
    assert bucket["debt"] == 1
    assert bucket["remaining"] == 0
    assert (bucket["origins"], bucket["slots"]) == (2, 2)


async def test_a_bucket_that_nobody_replicates_says_so() -> None:
    console = Console()
    console.limiter.decide(request(("ip", "10.0.0.1")), NOW_US)
    [bucket] = await console.buckets()
    assert (bucket["rule"], bucket["replicated"]) == ("edge.ip", False)


async def test_a_bucket_of_the_limit_for_everything_else_says_that_no_rule_matched() -> None:
    console = Console(small_limiter(Rules(default_rule=Rule("default_rule", TWO_A_MINUTE))))
    console.limiter.decide(request(("a key", "öäü"), domain="anywhere"), NOW_US)
    [bucket] = await console.buckets()
    assert bucket["entries"] == [{"key": "a key", "value": "öäü", "match": "none"}]
    assert (bucket["domain"], bucket["rule"]) == ("anywhere", "default_rule")


async def test_pages_together_list_every_bucket_once() -> None:
    console = Console()
    for number in range(25):
        console.limiter.decide(request(("tenant", f"t{number}")), NOW_US)
    pages = await console.every_page("limit=10")
    assert [len(page) for page in pages] == [10, 10, 5]
    values = [bucket["entries"][0]["value"] for page in pages for bucket in page]
    assert sorted(values) == sorted(f"t{number}" for number in range(25))


async def test_the_last_page_says_so_even_when_it_is_full() -> None:
    console = Console()
    for number in range(4):
        console.limiter.decide(request(("tenant", f"t{number}")), NOW_US)
    assert [len(page) for page in await console.every_page("limit=2")] == [2, 2]


async def test_one_domain_can_be_selected() -> None:
    console = Console(small_limiter(Rules(default_rule=Rule("default_rule", TWO_A_MINUTE))))
    for domain in ("edge", "edge2", "e", "edg", "other domain"):
        for value in ("1", "2"):
            console.limiter.decide(request(("k", value), domain=domain), NOW_US)
    for domain in ("edge", "other domain"):
        pages = await console.every_page(f"limit=1&domain={quote(domain)}")
        assert [bucket["domain"] for page in pages for bucket in page] == [domain, domain]
    assert await console.buckets("?domain=nowhere") == []


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("limit=0", f"limit is '0', expected 1 to {MAX_PAGE_BUCKETS}"),
        (f"limit={MAX_PAGE_BUCKETS + 1}", f"expected 1 to {MAX_PAGE_BUCKETS}"),
        ("limit=-1", "limit is '-1'"),
        ("limit=ten", "limit is 'ten'"),
        ("limit=", "limit is ''"),
        ("limit=" + "9" * 5000, "limit is"),
        ("limit=%D9%A1", "limit is"),
        ("limit=1&limit=2", "limit is given twice"),
        ("after=***", "after is '***', expected the `next` of another page"),
        ("after=AAAAA", "after is 'AAAAA'"),
        ("after=_____w", "after is '_____w'"),
        ("after=%C3%A4", "after is 'ä'"),
        ("offset=3", "unknown parameter 'offset'; known here: after, limit, domain"),
    ],
)
async def test_a_bad_query_is_answered_400_with_what_is_wrong(query: str, message: str) -> None:
    response = await Console().get(f"/buckets?{query}")
    assert response.status_code == 400
    assert message in response.json()["error"]


async def test_an_unknown_path_and_a_wrong_method_are_answered_in_json() -> None:
    console = Console()
    response = await console.get("/nothing")
    assert (response.status_code, response.json()) == (404, {"error": "Not Found"})
    response = await console.get("/peers", "POST")
    assert (response.status_code, response.json()) == (405, {"error": "Method Not Allowed"})
    assert "GET" in response.headers["allow"]


async def test_a_failure_is_answered_500_and_logged_once_with_its_traceback() -> None:
    console = Console()

    def broken() -> Sequence[PeerStatus]:
        raise RuntimeError("the secret detail")

    sources = ConsoleSources(
        node="us-1",
        region="us-east-1",
        limiter=console.limiter,
        registry=CollectorRegistry(),
        peers=broken,
        membership=lambda: None,
        missing=list,
        degraded=list,
        now_us=lambda: NOW_US,
        reloader=console.reloader,
        should_rate_limit=console.service.should_rate_limit,
    )
    console.app = create_app(sources)
    with capture_logs() as logs:
        response = await console.get("/peers", b3="463ac35c9f6413ad-a2fb4a1d1a96d312-0")
    assert response.status_code == 500
    assert "secret" not in response.text
    assert [(log["event"], log["path"], log["trace_id"], log["exc_info"]) for log in logs] == [
        ("console_request_failed", "/peers", "0" * 16 + "463ac35c9f6413ad", True)
    ]


async def test_every_answer_is_json_that_other_parsers_accept() -> None:
    console = Console()
    console.limiter.decide(request(("tenant", "acme")), NOW_US)
    for path in ("/", "/healthz", "/readyz", "/buckets", "/peers", "/nothing"):
        response = await console.get(path)
        assert response.headers["content-type"] == "application/json"
        json.loads(response.text, parse_constant=pytest.fail)


async def test_what_callers_chose_is_not_shown_unless_asked_for_and_not_in_the_cursor_either() -> None:
    token = "Bearer-0123456789-0123456789"
    limiter = small_limiter(
        Rules({"edge": RuleNode(key_only={"authorization": RuleNode(Rule("edge.authorization", TWO_A_MINUTE))})})
    )
    hides, shows = (Console(limiter, shows_values=shows_values) for shows_values in (False, True))
    for suffix in ("a", "b", "c"):
        limiter.decide(request(("authorization", token + suffix)), NOW_US)
    response = await hides.get("/buckets?limit=2")
    shown = json.dumps([response.text, base64.urlsafe_b64decode(response.json()["next"] + "==").decode("latin-1")])
    assert token not in shown
    values = {bucket["entries"][0]["value"] for page in await hides.every_page("limit=2") for bucket in page}
    assert len(values) == 3
    assert {bucket["entries"][0]["value"] for bucket in await shows.buckets()} == {token + each for each in "abc"}
