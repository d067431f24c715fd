"""What a client sees of ext_authz: of the gRPC service on every front end, and of its HTTP form."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import grpc.aio
import httpx
import pytest
from config.builders import rules_of
from google.protobuf.json_format import MessageToDict
from observed import NoTelemetry
from server.front_ends import EACH_KIND, channel_to, running

from ratelimit_sidecar.console.server import HttpServer
from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.envoy_api.envoy.config.core.v3.address_pb2 import Address, SocketAddress
from ratelimit_sidecar.envoy_api.envoy.config.core.v3.base_pb2 import HeaderMap, HeaderValue
from ratelimit_sidecar.envoy_api.envoy.service.auth.v3.attribute_context_pb2 import AttributeContext
from ratelimit_sidecar.envoy_api.envoy.service.auth.v3.external_auth_pb2 import CheckRequest, CheckResponse
from ratelimit_sidecar.envoy_api.envoy.service.auth.v3.external_auth_pb2_grpc import AuthorizationStub
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2 import RateLimitRequest, RateLimitResponse
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2_grpc import RateLimitServiceStub
from ratelimit_sidecar.limiter.limiter import Limiter
from ratelimit_sidecar.limiter.rules import Rules
from ratelimit_sidecar.limiter.settings import AnswerSettings
from ratelimit_sidecar.server.deferred import HttpWaits
from ratelimit_sidecar.server.rpc import Code, Headers, RpcError
from ratelimit_sidecar.services.ext_authz import ExtAuthzService
from ratelimit_sidecar.services.ext_authz_http import ext_authz_app
from ratelimit_sidecar.services.ratelimit import RateLimitService
from ratelimit_sidecar.services.v1 import check_pb2 as raw_check
from ratelimit_sidecar.telemetry.latency import LatencyHistogram

RULES = """
domain: shop
ext_authz:
  default: true
  descriptors:
    - entries: [{key: user, from: header, name: X-User-Id}]
    - entries: [{key: method, from: method}, {key: path, from: path}]
    - entries: [{key: remote_address, from: source_address}]
    - entries: [{key: caller, from: principal}]
    - entries: [{key: plan, from: context_extension}, {key: which, value: all}]
descriptors:
  - {key: user, rate_limit: {unit: minute, requests_per_unit: 3, name: per_user}, body: slow down}
  - key: method
    value: POST
    descriptors: [{key: path, value: /orders, rate_limit: {unit: hour, requests_per_unit: 1}}]
  - {key: remote_address, value: 192.0.2.1, rate_limit: {unit: hour, requests_per_unit: 1}}
  - {key: caller, rate_limit: {unit: hour, requests_per_unit: 1}}
  - key: plan
    value: trial
    descriptors: [{key: which, value: all, rate_limit: {unit: hour, requests_per_unit: 1}}]
"""

BARE_RULES = """
domain: bare
descriptors: [{key: user, rate_limit: {unit: minute, requests_per_unit: 1}}]
"""

OK = 0
RESOURCE_EXHAUSTED = 8
CHECK = "/envoy.service.auth.v3.Authorization/Check"


@dataclass
class Sidecar:
    limiter: Limiter
    rate_limit: RateLimitService
    ext_authz: ExtAuthzService
    folder: Path
    now_us: int = 1_700_000_000_000_000
    channel: grpc.aio.Channel | None = None

    async def check(self, attributes: AttributeContext) -> CheckResponse:
        return await AuthorizationStub(self.channel).Check(CheckRequest(attributes=attributes), timeout=60)

    async def check_raw(self, request: bytes) -> CheckResponse:
        assert self.channel is not None
        return CheckResponse.FromString(await self.channel.unary_unary(CHECK)(request, timeout=60))

    async def statuses(self, attributes: AttributeContext, times: int) -> list[int]:
        return [status_of(await self.check(attributes)) for _ in range(times)]


def sidecar_with(folder: Path, rules: str = RULES) -> Sidecar:
    bare = rules_of(folder, BARE_RULES).domains
    found = rules_of(folder, rules)
    limiter = Limiter(replace(found, domains={**found.domains, **bare}), Origin("node", 1))
    rate_limit = RateLimitService(limiter, lambda: sidecar.now_us, LatencyHistogram(), NoTelemetry())
    sidecar = Sidecar(limiter, rate_limit, ExtAuthzService(rate_limit, lambda: limiter.rules), folder)
    return sidecar


@pytest.fixture(params=EACH_KIND)
async def sidecar(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Sidecar]:
    sidecar = sidecar_with(tmp_path)
    handlers = {**sidecar.rate_limit.handlers(), **sidecar.ext_authz.handlers()}
    async with running(request.param, handlers) as front_end, channel_to(front_end.addresses[0]) as channel:
        sidecar.channel = channel
        yield sidecar


def attributes(
    headers: Mapping[str, str] | None = None,
    *,
    path: str = "",
    method: str = "",
    address: str = "",
    principal: str = "",
    **context_extensions: str,
) -> AttributeContext:
    http = AttributeContext.HttpRequest(headers=headers or {}, path=path, method=method)
    source = AttributeContext.Peer(principal=principal)
    if address:
        source.address.CopyFrom(Address(socket_address=SocketAddress(address=address, port_value=1_234)))
    request = AttributeContext.Request(http=http)
    return AttributeContext(source=source, request=request, context_extensions=context_extensions)


def status_of(response: CheckResponse) -> int:
    """As the HTTP client sees it."""
    if response.status.code == OK:
        assert response.HasField("ok_response")
        return 200
    assert response.status.code == RESOURCE_EXHAUSTED
    return response.denied_response.status.code


def headers_of(response: CheckResponse) -> dict[str, str]:
    options = (*response.ok_response.response_headers_to_add, *response.denied_response.headers)
    return {option.header.key: option.header.value for option in options}


EVE = {"x-user-id": "eve"}


async def test_a_request_passes_until_its_limit_is_used_up_and_is_then_denied_with_429(sidecar: Sidecar) -> None:
    assert await sidecar.statuses(attributes(EVE), 4) == [200, 200, 200, 429]
    assert await sidecar.statuses(attributes({"x-user-id": "ada"}), 1) == [200]
    sidecar.now_us += 20_000_000
    assert await sidecar.statuses(attributes(EVE), 2) == [200, 429]


async def test_an_admitted_request_shows_its_limits_to_the_client(sidecar: Sidecar) -> None:
    headers = headers_of(await sidecar.check(attributes(EVE, path="/orders", method="POST")))
    assert headers["RateLimit-Policy"] == '"per_user";q=3;w=60, "shop.method_POST.path_/orders";q=1;w=3600'
    assert headers["RateLimit"] == '"per_user";r=2;t=20, "shop.method_POST.path_/orders";r=0;t=3600'
    assert "Retry-After" not in headers


async def test_a_denial_says_when_to_come_back_and_has_the_body_of_the_rule(sidecar: Sidecar) -> None:
    await sidecar.statuses(attributes(EVE), 3)
    response = await sidecar.check(attributes(EVE))
    assert response.denied_response.body == "slow down"
    headers = headers_of(response)
    assert headers["Retry-After"] == "20"
    assert (headers["RateLimit-Policy"], headers["RateLimit"]) == ('"per_user";q=3;w=60', '"per_user";r=0;t=20')


async def test_a_limit_that_lets_nothing_through_does_not_ask_to_come_back(sidecar: Sidecar) -> None:
    nothing = RULES.replace("unit: minute, requests_per_unit: 3", "unit: minute, requests_per_unit: 0")
    sidecar.limiter.use_rules(rules_of(sidecar.folder, nothing))
    response = await sidecar.check(attributes(EVE))
    assert status_of(response) == 429
    assert set(headers_of(response)) == {"RateLimit-Policy", "RateLimit"}


async def test_calls_of_the_rate_limit_service_take_from_the_same_bucket(sidecar: Sidecar) -> None:
    request = RateLimitRequest(domain="shop")
    request.descriptors.add().entries.add(key="user", value="eve")
    response = await RateLimitServiceStub(sidecar.channel).ShouldRateLimit(request, timeout=60)
    assert response.statuses[0].limit_remaining == 2
    assert await sidecar.statuses(attributes(EVE), 3) == [200, 200, 429]
    response = await RateLimitServiceStub(sidecar.channel).ShouldRateLimit(request, timeout=60)
    assert response.overall_code == RateLimitResponse.OVER_LIMIT


@pytest.mark.parametrize(
    "limited",
    [
        attributes(path="/orders?page=1", method="POST"),
        attributes(address="192.0.2.1"),
        attributes(principal="spiffe://shop/cart"),
        attributes(plan="trial"),
    ],
    ids=["method and path", "source address", "principal", "context extension"],
)
async def test_descriptors_are_made_of_all_parts_of_a_request(sidecar: Sidecar, limited: AttributeContext) -> None:
    assert await sidecar.statuses(limited, 2) == [200, 429]


async def test_a_query_or_a_fragment_begins_no_new_bucket(sidecar: Sidecar) -> None:
    paths = ("/orders?page=1", "/orders?page=2", "/orders", "/orders#top?")
    responses = [await sidecar.check(attributes(path=path, method="POST")) for path in paths]
    assert [status_of(response) for response in responses] == [200, 429, 429, 429]


@pytest.mark.parametrize(
    "unlimited",
    [
        attributes(),
        attributes({"x-user": "eve"}),
        attributes(path="/orders"),
        attributes({"x-user-id": "eve"}, domain="bare"),
        attributes({"x-user-id": "eve"}, domain="unheard_of"),
        AttributeContext(),
    ],
    ids=["nothing", "another header", "no method", "no mapping", "no such domain", "no attributes"],
)
async def test_a_request_that_lacks_what_the_mapping_needs_passes(
    sidecar: Sidecar, unlimited: AttributeContext
) -> None:
    assert await sidecar.statuses(unlimited, 5) == [200] * 5
    assert sum(sidecar.ext_authz.unlimited.values()) == 5
    assert not sidecar.rate_limit.errors["invalid"]


async def test_the_domain_is_named_by_a_context_extension(sidecar: Sidecar) -> None:
    assert await sidecar.statuses(attributes(EVE, domain="shop"), 4) == [200, 200, 200, 429]
    assert await sidecar.statuses(attributes(EVE), 1) == [429]


async def test_an_empty_header_is_a_value_and_a_missing_one_is_none(sidecar: Sidecar) -> None:
    assert await sidecar.statuses(attributes({"x-user-id": ""}), 4) == [200, 200, 200, 429]


async def test_headers_may_come_raw_and_several_times(sidecar: Sidecar) -> None:
    context = attributes()
    values = [HeaderValue(key="x-user-id", raw_value=value) for value in (b"eve", b"bob")]
    context.request.http.header_map.CopyFrom(HeaderMap(headers=[HeaderValue(key="x", value="y"), *values]))
    assert await sidecar.statuses(context, 3) == [200] * 3
    assert await sidecar.statuses(attributes({"x-user-id": "eve"}), 1) == [429]


async def test_a_client_that_adds_a_second_header_gets_no_other_bucket(sidecar: Sidecar) -> None:
    assert await sidecar.statuses(attributes({"x-user-id": "mal"}), 3) == [200] * 3
    # Envoy joins them where it does not send them raw.
    for joined in ("mal,bob", "mal, bob", "mal,"):
        assert await sidecar.statuses(attributes({"x-user-id": joined}), 1) == [429]
    context = attributes()
    headers = [HeaderValue(key="x-user-id", raw_value=value) for value in (b"mal", b"bob")]
    context.request.http.header_map.CopyFrom(HeaderMap(headers=headers))
    assert await sidecar.statuses(context, 1) == [429]


async def test_raw_headers_may_have_commas(sidecar: Sidecar) -> None:
    for value in (b"1,5", b"1,6"):
        context = attributes()
        context.request.http.header_map.CopyFrom(HeaderMap(headers=[HeaderValue(key="x-user-id", raw_value=value)]))
        assert await sidecar.statuses(context, 4) == [200] * 3 + [429]


async def test_a_second_authorization_begins_no_new_bucket_although_envoy_joins_them(sidecar: Sidecar) -> None:
    rules = RULES.replace("name: X-User-Id", "name: Authorization")
    sidecar.limiter.use_rules(rules_of(sidecar.folder, rules))
    statuses = []
    for value in (b"Bearer eve", b"Bearer eve,1", b"Bearer eve, 2", b"Bearer eve ,3"):
        context = attributes()
        headers = [HeaderValue(key="authorization", raw_value=value)]
        context.request.http.header_map.CopyFrom(HeaderMap(headers=headers))
        statuses += await sidecar.statuses(context, 1)
    assert statuses == [200] * 3 + [429]


@pytest.mark.parametrize("part", ["header", "raw header", "path", "principal", "context extension"])
async def test_values_that_are_not_utf_8_are_limited_each_by_itself(sidecar: Sidecar, part: str) -> None:
    rules = f"""
      domain: shop
      ext_authz:
        default: true
        descriptors: [{{entries: [{{key: any, from: {part.replace("raw ", "").replace(" ", "_")}}}]}}]
      descriptors: [{{key: any, rate_limit: {{unit: hour, requests_per_unit: 1}}}}]
    """
    sidecar.limiter.use_rules(rules_of(sidecar.folder, rules))

    def request(value: bytes) -> bytes:
        message = raw_check.CheckRequest()
        attributes = message.attributes
        match part:
            case "header":
                attributes.request.http.headers.add(key=b"any", value=value)
            case "raw header":
                attributes.request.http.header_map.headers.add(key=b"any", raw_value=value)
            case "path":
                attributes.request.http.path = value
            case "principal":
                attributes.source.principal = value
            case "context extension":
                attributes.context_extensions.add(key=b"any", value=value)
        return message.SerializeToString()

    values = (b"/\xff", b"/\xfe", b"/\xff", b"/\xfe")
    responses = [await sidecar.check_raw(request(value)) for value in values]
    assert [status_of(response) for response in responses] == [200, 200, 429, 429]


@pytest.mark.parametrize("domain", [b"\xff", b"shop\xff"])
async def test_a_domain_that_is_not_utf_8_is_one_without_rules(sidecar: Sidecar, domain: bytes) -> None:
    request = raw_check.CheckRequest()
    request.attributes.context_extensions.add(key=b"domain", value=domain)
    assert status_of(await sidecar.check_raw(request.SerializeToString())) == 200


async def test_what_is_no_check_request_is_refused(sidecar: Sidecar) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await sidecar.check_raw(b"\xff\xff")
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert sidecar.rate_limit.errors["invalid"] == 1


async def test_a_client_that_repeats_a_header_very_often_is_limited(sidecar: Sidecar) -> None:
    context = attributes()
    headers = [HeaderValue(key="x-user-id", raw_value=b"eve")] * 2_500
    context.request.http.header_map.CopyFrom(HeaderMap(headers=headers))
    assert await sidecar.statuses(context, 4) == [200] * 3 + [429]


async def test_a_request_whose_descriptors_would_be_longer_than_a_call_may_be_is_refused(tmp_path: Path) -> None:
    entries = "\n".join(f"    - entries: [{{key: k{number}, from: path}}]" for number in range(64))
    sidecar = sidecar_with(
        tmp_path, f"domain: d\ndescriptors: []\next_authz:\n  default: true\n  descriptors:\n{entries}\n"
    )
    check = CheckRequest(attributes=attributes(path="/" + "p" * 70_000)).SerializeToString()
    with pytest.raises(RpcError) as refused:
        sidecar.ext_authz.check(check, Headers())
    assert refused.value.code == Code.INVALID_ARGUMENT
    assert sidecar.rate_limit.errors["invalid"] == 1


@pytest.fixture
async def over_http(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    server = HttpServer(ext_authz_app(sidecar_with(tmp_path).ext_authz, HttpWaits(0)), "127.0.0.1:0")
    await server.start()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(server.serve())
        await server.ready.wait()
        try:
            async with httpx.AsyncClient(base_url=f"http://{server.address}", trust_env=False, timeout=60) as client:
                yield client
        finally:
            await server.stop()


async def test_over_http_the_status_says_whether_the_request_may_pass(over_http: httpx.AsyncClient) -> None:
    headers = {"x-user-id": "eve", "host": "shop.example.com"}
    responses = [await over_http.get("/ext_authz/shop/orders", headers=headers) for _ in range(4)]
    assert [response.status_code for response in responses] == [200, 200, 200, 429]
    assert responses[0].headers["ratelimit"] == '"per_user";r=2;t=20'
    assert responses[0].content == b""
    denied = responses[-1]
    assert (denied.headers["retry-after"], denied.headers["ratelimit"]) == ("20", '"per_user";r=0;t=20')
    assert denied.text == "slow down"


async def test_over_http_a_second_header_gets_no_other_bucket(over_http: httpx.AsyncClient) -> None:
    one, other = httpx.Headers({"x-user-id": "mal"}), httpx.Headers([("x-user-id", "mal"), ("x-user-id", "bob")])
    codes = [(await over_http.get("/ext_authz/", headers=headers)).status_code for headers in [one, other] * 2]
    assert codes == [200, 200, 200, 429]


async def test_over_http_method_and_path_are_those_behind_the_prefix(over_http: httpx.AsyncClient) -> None:
    responses = [await over_http.post(f"/ext_authz/shop/orders?page={number}") for number in range(2)]
    assert [response.status_code for response in responses] == [200, 429]
    assert (await over_http.get("/ext_authz/shop/orders")).status_code == 200
    assert (await over_http.post("/ext_authz/shop/")).status_code == 200


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "PUT", "DELETE", "PURGE"])
async def test_over_http_a_request_may_have_any_method(over_http: httpx.AsyncClient, method: str) -> None:
    responses = [await over_http.request(method, "/ext_authz/shop/", headers=EVE) for _ in range(4)]
    assert [response.status_code for response in responses] == [200, 200, 200, 429]
    assert responses[-1].text == ("" if method == "HEAD" else "slow down")


async def test_over_http_an_empty_domain_is_the_default_one(over_http: httpx.AsyncClient) -> None:
    responses = [await over_http.post(f"/ext_authz/{domain}/orders") for domain in ("", "shop", "%73hop")]
    assert [response.status_code for response in responses] == [200, 429, 429]


async def test_over_http_a_domain_without_a_mapping_passes(over_http: httpx.AsyncClient) -> None:
    assert (await over_http.get("/ext_authz/bare/", headers=EVE)).status_code == 200


async def test_over_http_a_client_cannot_choose_a_domain_without_that_being_noticed(
    over_http: httpx.AsyncClient,
) -> None:
    """As with a path_prefix of /ext_authz, without a slash at its end."""
    for path in ("/orders", "/orders/1", "/sho%70s/", "/%ff", "/shop*"):
        assert (await over_http.get(f"/ext_authz{path}", headers=EVE)).status_code == 404


async def test_over_http_all_domains_pass_while_the_rules_have_none(tmp_path: Path) -> None:
    sidecar = sidecar_with(tmp_path)
    sidecar.limiter.use_rules(Rules())
    assert sidecar.ext_authz.knows(b"shop")


async def test_over_http_a_value_that_is_not_utf_8_is_limited(over_http: httpx.AsyncClient) -> None:
    headers = [(b"x-user-id", b"\xff")]
    statuses = [(await over_http.get("/ext_authz/shop/", headers=headers)).status_code for _ in range(4)]
    assert statuses == [200, 200, 200, 429]


async def test_over_http_a_path_without_the_prefix_is_found_out(over_http: httpx.AsyncClient) -> None:
    for path in ("/orders", "/ext_authz", "/json", "/metrics", "/healthz"):
        assert (await over_http.get(path)).status_code == 404


async def test_dynamic_metadata_says_what_was_asked_where_it_is_on(tmp_path: Path) -> None:
    settings = AnswerSettings(dynamic_metadata=True)
    limiter = Limiter(rules_of(tmp_path, RULES), Origin("node", 1), settings)
    rate_limit = RateLimitService(limiter, lambda: 1_700_000_000_000_000, LatencyHistogram(), NoTelemetry())
    request = CheckRequest(attributes=attributes(EVE))
    answer = ExtAuthzService(rate_limit, lambda: limiter.rules).check(request.SerializeToString(), Headers())
    metadata = MessageToDict(CheckResponse.FromString(answer).dynamic_metadata)
    assert metadata["domain"] == "shop"
    assert metadata["descriptors"] == [{"entries": ["user=eve"]}]
