"""POST /json, beside what envoyproxy/ratelimit answers there."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
from console.small_console import Console
from google.protobuf.json_format import ParseDict
from hypothesis import given, settings
from hypothesis import strategies as st

from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2 import RateLimitResponse
from ratelimit_sidecar.server.rpc import Code, Metadata, RpcError

TENANT = {"domain": "edge", "descriptors": [{"entries": [{"key": "tenant", "value": "acme"}]}]}


async def post(console: Console, body: bytes | object, **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    transport = httpx.ASGITransport(console.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://console") as client:
        return await client.post("/json", content=content, headers={"content-type": "application/json", **headers})


async def test_ok_is_200_and_over_limit_is_429_with_the_answer_as_json() -> None:
    console = Console()
    responses = [await post(console, TENANT) for _ in range(3)]
    assert [response.status_code for response in responses] == [200, 200, 429]
    assert {response.headers["content-type"] for response in responses} == {"application/json"}
    bodies = [response.json() for response in responses]
    assert [body["overallCode"] for body in bodies] == ["OK", "OK", "OVER_LIMIT"]
    assert bodies[0]["statuses"][0]["limitRemaining"] == 1
    message = ParseDict(bodies[2], RateLimitResponse())
    assert message.statuses[0].code == RateLimitResponse.OVER_LIMIT
    assert message.statuses[0].duration_until_reset.seconds == 60


async def test_it_takes_from_the_same_buckets_and_counts_in_the_same_metrics_as_grpc() -> None:
    console = Console()
    await post(console, {**TENANT, "hitsAddend": 2})
    [bucket] = await console.buckets()
    assert bucket["remaining"] == 0
    metrics = (await console.get("/metrics")).text
    assert 'crdt_token_consumed_total{domain="edge",region="us-east-1",rule="edge.tenant"} 2.0' in metrics


async def test_fields_may_be_spelt_as_in_the_proto_file_too() -> None:
    console = Console()
    assert (await post(console, {**TENANT, "hits_addend": 3})).status_code == 429


@pytest.mark.parametrize("field", ["isNegativeHits", "is_negative_hits"])
async def test_nobody_gives_hits_back_without_the_token_that_a_refund_needs(field: str) -> None:
    console = Console()
    await post(console, {**TENANT, "hitsAddend": 2})
    [descriptor] = TENANT["descriptors"]
    response = await post(console, {**TENANT, "descriptors": [{**descriptor, "hitsAddend": 2, field: True}]})
    assert response.status_code == 400
    [bucket] = await console.buckets()
    assert bucket["remaining"] == 0


async def test_the_headers_of_the_request_reach_the_service() -> None:
    seen: list[tuple[bytes, bytes]] = []

    def remember(_request: bytes, metadata: Metadata) -> bytes:
        seen.extend(metadata)
        return RateLimitResponse(overall_code=RateLimitResponse.OK).SerializeToString()

    response = await post(Console(decide=remember), TENANT, traceparent="00-1-2-01")
    assert (response.status_code, response.json()) == (200, {"overallCode": "OK"})
    assert (b"traceparent", b"00-1-2-01") in seen


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"}",
        b"null",
        b'"edge"',
        b"\xff\xfe",
        b'{"domain": 7}',
        b'{"domain": "edge", "colour": "red"}',
        b'{"domain": "edge", "domain": "edge"}',
        b'{"domain": "\\ud800"}',
        b'{"hitsAddend": -1}',
        b"[" * 60_000,
        b'{"descriptors": ' * 1_000,
    ],
)
async def test_what_is_no_request_is_400_and_is_no_call_of_the_service(body: bytes) -> None:
    console = Console()
    response = await post(console, body)
    assert response.status_code == 400
    assert response.json()["error"].startswith("not a RateLimitRequest in JSON: ")
    assert console.service.errors == {"invalid": 0, "internal": 0, "no_rules": 0}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"descriptors": TENANT["descriptors"]}, "domain must not be empty"),
        ({"domain": "edge"}, "descriptor list must not be empty"),
    ],
)
async def test_what_the_service_refuses_is_400_with_its_reason_and_counts_as_there(body: object, reason: str) -> None:
    console = Console()
    response = await post(console, body)
    assert response.status_code == 400
    assert reason in response.json()["error"]
    assert console.service.errors["invalid"] == 1


async def test_a_failure_of_the_service_is_500() -> None:
    def failing(_request: bytes, _metadata: Metadata) -> bytes:
        raise RpcError(Code.INTERNAL, "out of order")

    response = await post(Console(decide=failing), TENANT)
    assert (response.status_code, response.json()) == (500, {"error": "out of order"})


async def test_an_answer_without_a_code_is_500() -> None:
    response = await post(Console(decide=lambda _request, _metadata: b""), TENANT)
    assert (response.status_code, response.json()) == (500, {})


async def test_only_post_is_answered() -> None:
    response = await Console().get("/json")
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"


texts = st.text(max_size=5)
values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | texts,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["domain", "descriptors", "entries", "key", "value", "hitsAddend", "limit", "unit"])
            | texts,
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=200)
@given(values)
def test_no_json_is_more_than_the_callers_fault(value: object) -> None:
    response = asyncio.run(post(Console(), json.dumps(value).encode()))
    assert response.status_code in (200, 400, 429)
    json.loads(response.text)
