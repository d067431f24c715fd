"""Two regions of the real Envoy Gateway and the real Envoy, with sidecars as their rate limit services."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any

import httpx
import pytest
import pytest_asyncio
import yaml

from deployment.cache import Unavailable
from deployment.engine import ROOT
from deployment.gateways import DEPLOY, Gateway, gateways

pytestmark = [pytest.mark.deployment, pytest.mark.asyncio(loop_scope="module")]

EAST, WEST = REGIONS = ("us-east-1", "eu-west-2")
WITHIN_S = 120.0
"""It takes seconds; the rest is for a busy machine."""

LIMITED = "x-ratelimit-limit"

CHANGING = """
apiVersion: gateway.envoyproxy.io/v1alpha1
kind: BackendTrafficPolicy
metadata: {name: changing, namespace: default}
spec:
  targetRefs: [{group: gateway.networking.k8s.io, kind: HTTPRoute, name: changing}]
  rateLimit:
    type: Global
    global:
      rules:
        - limit: {requests: 2, unit: Hour}
"""

ROUTE = """
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: changing, namespace: default}
spec:
  parentRefs: [{name: eg}]
  rules:
    - matches: [{path: {type: PathPrefix, value: /changing}}]
      filters:
        - {type: URLRewrite, urlRewrite: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /rate}}}
      backendRefs: [{group: gateway.envoyproxy.io, kind: Backend, name: shop}]
"""


def policies() -> str:
    """Envoy Gateway 1.9.1 ends with a panic when a file has a number there; without it each request costs 1."""
    text = (DEPLOY / "policies.yaml").read_text()
    changed = text.replace("request: {from: Number, number: 0}\n", "")
    assert changed != text
    return changed


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def regions(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[dict[str, Gateway]]:
    try:
        async with gateways(tmp_path_factory.mktemp("gateways"), REGIONS) as running:
            for gateway in running.values():
                gateway.write("policies.yaml", policies())
            for gateway in running.values():
                await until(partial(limited, gateway, "/users", {"x-user-id": "early"}))
                await until(partial(ready, gateway))
            yield running
    except Unavailable as unavailable:
        pytest.skip(str(unavailable))


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(WITHIN_S):
        while not await condition():  # noqa: ASYNC110 (other processes)
            await asyncio.sleep(0.1)


async def ask(
    gateway: Gateway, path: str, headers: Mapping[str, str] | None = None, method: str = "GET"
) -> httpx.Response:
    return await gateway.proxy.request(method, path if "?" in path else f"{path}?agent=claw", headers=headers)


async def limited(gateway: Gateway, path: str, headers: Mapping[str, str] | None = None) -> bool:
    """Whether a limit was asked for."""
    return LIMITED in (await ask(gateway, path, headers)).headers


async def ready(gateway: Gateway) -> bool:
    return (await gateway.console.get("/readyz")).status_code == 200


async def denied(gateway: Gateway, path: str) -> bool:
    return (await ask(gateway, path)).status_code == 429


async def remaining(gateway: Gateway, value: str) -> int | None:
    """What the sidecar knows to be left of the bucket of a caller."""
    buckets = (await gateway.console.get("/buckets", params={"domain": "default/eg/http", "limit": 200})).json()
    found = [each for each in buckets["buckets"] if each["entries"][-1]["value"] == value]
    return found[0]["remaining"] if found else None


async def knows(gateway: Gateway, user: str, left: int) -> bool:
    return await remaining(gateway, user) == left


async def statuses(
    gateway: Gateway, requests: int, path: str, headers: Mapping[str, str] | None = None, method: str = "GET"
) -> list[int]:
    return [(await ask(gateway, path, headers, method)).status_code for _ in range(requests)]


async def test_three_pass_and_the_fourth_is_denied(regions: dict[str, Gateway]) -> None:
    answers = [await ask(regions[EAST], "/everybody") for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert answers[0].json()["agent"] == "claw"
    assert [answer.headers["x-ratelimit-remaining"] for answer in answers] == ["2", "1", "0", "0"]
    assert answers[0].headers[LIMITED] == "3, 3;w=3600"


PASS_3 = [200] * 3 + [429]


@pytest.mark.parametrize(
    "asked",
    [
        pytest.param(
            [
                ("GET", "/plans", {"x-plan": "free"}, PASS_3),
                ("GET", "/plans", {"x-plan": "gold"}, [200] * 5 + [429]),
                ("GET", "/plans", {"x-plan": "silver"}, [429]),
            ],
            id="a header",
        ),
        pytest.param(
            [
                ("GET", "/users", {"x-user-id": "eve"}, PASS_3),
                ("GET", "/users", {"x-user-id": "adam"}, PASS_3),
                ("GET", "/users", {}, [200] * 5),
            ],
            id="each value of a header",
        ),
        pytest.param(
            [
                ("GET", "/network", {"x-forwarded-for": "198.51.100.1"}, [200, 200]),
                ("GET", "/network", {"x-forwarded-for": "198.51.100.2"}, [200, 429]),
                ("GET", "/network", {"x-forwarded-for": "203.0.113.1"}, [200] * 5),
            ],
            id="a network",
        ),
        pytest.param(
            [
                ("GET", "/addresses", {"x-forwarded-for": "192.0.2.1"}, PASS_3),
                ("GET", "/addresses", {"x-forwarded-for": "192.0.2.2"}, PASS_3),
                ("GET", "/addresses", {"x-forwarded-for": "203.0.113.1"}, [200] * 5),
            ],
            id="each address of a network",
        ),
        pytest.param(
            # The upstream knows no POST: 405 is its own answer.
            [("POST", "/orders", {}, [405] * 3 + [429]), ("GET", "/orders", {}, [200] * 5)],
            id="a method",
        ),
        pytest.param(
            [("GET", "/searches/slow", {}, [404] * 3 + [429]), ("GET", "/searches", {}, [200] * 5)],
            id="a path",
        ),
        pytest.param(
            [("GET", "/queries?agent=eve", {}, PASS_3), ("GET", "/queries?agent=adam", {}, PASS_3)],
            id="each value of a query parameter",
        ),
        pytest.param(
            [
                ("POST", "/tenants", {"x-tenant": "a"}, [405, 429]),
                # As with Envoy Gateway's own service, the denied one counts for the other rule.
                ("GET", "/tenants", {"x-tenant": "a"}, [200, 429]),
                ("GET", "/tenants", {"x-tenant": "b"}, PASS_3),
            ],
            id="two rules, one of them of two things",
        ),
        pytest.param(
            [("GET", "/carts", {}, [200, 200]), ("GET", "/checkout", {}, [200, 429]), ("GET", "/carts", {}, [429])],
            id="one limit for two routes",
        ),
    ],
)
async def test_a_policy_limits_whom_it_names_and_nobody_else(
    regions: dict[str, Gateway], asked: Sequence[tuple[str, str, Mapping[str, str], Sequence[int]]]
) -> None:
    for method, path, headers, expected in asked:
        answers = await statuses(regions[EAST], len(expected), path, headers, method)
        assert answers == expected, (method, path, headers)


def is_set_for_bursts(cluster: Mapping[str, Any]) -> bool:
    (threshold,) = cluster["circuit_breakers"]["thresholds"]
    (options,) = cluster["typed_extension_protocol_options"].values()
    frames = options["explicit_http_config"]["http2_protocol_options"].get("max_outbound_control_frames")
    return (threshold["max_requests"], threshold["max_pending_requests"], frames) == (100_000,) * 3


async def has_cluster_for_bursts(gateway: Gateway, name: str) -> bool:
    admin = await gateway.admin()
    dump = (await admin.get("/config_dump", params={"resource": "dynamic_active_clusters"})).json()
    return any(
        each["cluster"]["name"] == name and is_set_for_bursts(each["cluster"]) for each in dump.get("configs", ())
    )


async def test_thousands_of_requests_at_once_wait_for_the_sidecar(regions: dict[str, Gateway]) -> None:
    assert await has_cluster_for_bursts(regions[EAST], "ratelimit_cluster")


async def test_so_do_thousands_that_wait_for_authorization(regions: dict[str, Gateway]) -> None:
    """Without a Kubernetes API the cluster's name lacks the kind, and there is no Service."""
    gateway = regions[WEST]
    text = (ROOT / "examples/filters/envoy-gateway.yaml").read_text()
    policy, patch, _ = yaml.safe_load_all(
        text.replace("securitypolicy/shop/", "/default/").replace("namespace: shop", "namespace: default")
    )
    policy["spec"]["targetRefs"][0]["name"] = "changing"
    backend = {"group": "gateway.envoyproxy.io", "kind": "Backend", "name": "shop"}
    policy["spec"]["extAuth"]["grpc"]["backendRefs"] = [backend]
    gateway.write("authorized-route.yaml", ROUTE)
    gateway.write("authorization.yaml", yaml.safe_dump_all([policy, patch]))
    await until(lambda: has_cluster_for_bursts(gateway, "/default/shop-ratelimit/extauth/0"))


async def test_no_client_leaves_the_end_of_a_response_unread_for_long(regions: dict[str, Gateway]) -> None:
    admin = await regions[EAST].admin()
    dump = (await admin.get("/config_dump", params={"resource": "dynamic_listeners"})).json()
    (chain,) = [
        each["active_state"]["listener"]["default_filter_chain"]
        for each in dump["configs"]
        if each["name"] == "default/eg/http"
    ]
    assert chain["filters"][0]["typed_config"]["stream_flush_timeout"] == "10s"


async def test_a_response_costs_the_tokens_that_it_says_it_used_or_the_most(regions: dict[str, Gateway]) -> None:
    async def complete(team: str, tokens: int, **options: object) -> httpx.Response:
        body = {"messages": [{"content": "hello"}], "max_tokens": tokens, **options}
        return await regions[EAST].proxy.post("/v1/chat/completions", json=body, headers={"x-team": team})

    first = await complete("red", 589)
    assert (first.status_code, first.headers["x-ratelimit-remaining"]) == (200, "999")
    assert first.json()["usage"]["total_tokens"] == 590

    async def charged(team: str, left: int) -> bool:
        """Once Envoy knows that the response is over, which the caller may know first."""
        return await remaining(regions[EAST], team) == left

    await until(partial(charged, "red", 409))
    assert (await complete("red", 589)).status_code == 200, "it costs 1 until it says more"

    async def in_debt() -> bool:
        return await remaining(regions[EAST], "red") == 0

    await until(in_debt)
    assert (await complete("red", 1)).status_code == 429
    assert (await complete("blue", 1, stream=True)).status_code == 200, "it says nothing"
    await until(partial(charged, "blue", 399))
    said = {"stream": True, "stream_options": {"include_usage": True}}
    assert (await complete("green", 99, **said)).status_code == 200
    await until(partial(charged, "green", 899))
    long = await complete("white", 599, **said)
    assert (long.status_code, len(long.content) > 50_000) == (200, True)
    await until(partial(charged, "white", 400))

    regions[EAST].write("policies.yaml", policies().replace("request: 600s", "request: 1ms"))
    teams = count()

    async def costs_the_most() -> bool:
        """The model may have worked all the same."""
        team = f"late {next(teams)}"
        try:
            if (await complete(team, 599)).status_code != 504:
                return False
        except httpx.RemoteProtocolError:
            # The time was over amid the response.
            return False
        await until(partial(charged, team, 399))
        return True

    await until(costs_the_most)


async def test_a_limit_holds_in_both_regions_together(regions: dict[str, Gateway]) -> None:
    eve = {"x-user-id": "eve of both"}
    assert await statuses(regions[EAST], 2, "/users", eve) == [200, 200]
    await until(lambda: knows(regions[WEST], "eve of both", 1))
    assert await statuses(regions[WEST], 2, "/users", eve) == [200, 429]
    await until(lambda: knows(regions[EAST], "eve of both", 0))
    assert await statuses(regions[EAST], 1, "/users", eve) == [429]


async def test_a_policy_changes_and_ends_while_all_is_running(regions: dict[str, Gateway]) -> None:
    gateway = regions[EAST]

    async def limit_is(header: str | None) -> bool:
        answer = await ask(gateway, "/changing")
        return answer.headers.get(LIMITED) == header

    async def forgotten(route: str) -> bool:
        return route not in (await gateway.console.get("/rlconfig")).text

    gateway.write("changing-route.yaml", ROUTE)
    gateway.write("changing.yaml", CHANGING)
    await until(lambda: limit_is("2, 2;w=3600"))
    await until(lambda: denied(gateway, "/changing"))
    gateway.write("changing.yaml", CHANGING.replace("requests: 2", "requests: 20"))
    await until(lambda: limit_is("20, 20;w=3600"))
    gateway.delete("changing.yaml")
    await until(lambda: limit_is(None))
    await until(lambda: forgotten("changing"))
    assert await statuses(gateway, 25, "/changing") == [200] * 25
