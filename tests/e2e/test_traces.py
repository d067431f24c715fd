"""One trace from the caller through Envoy into the sidecar, and from there to the batch that carries it on and to where
that is applied."""

from pathlib import Path

import pytest
from e2e.cluster import three_regions
from otlp_receiver import OtlpReceiver
from server.raw_http2 import connected

RULES = """
domain: openclaw
descriptors:
  - key: agent
    rate_limit: {unit: day, requests_per_unit: 20}
"""

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLER_SPAN_ID = "00f067aa0ba902b7"

ENVOY_FLUSH_S = 15.0
"""Envoy exports its spans every 5 s."""


@pytest.mark.slow
async def test_a_request_is_followed_through_envoy_and_sidecar_and_by_its_batch_into_the_other_region(
    tmp_path: Path,
) -> None:
    async with (
        OtlpReceiver() as receiver,
        three_regions(
            tmp_path, RULES, collector=receiver.address, environment={"OTEL_BSP_SCHEDULE_DELAY": "100"}
        ) as cluster,
    ):
        east = cluster.regions[0]

        traceparent = {"traceparent": f"00-{TRACE_ID}-{CALLER_SPAN_ID}-01"}
        assert (await cluster.ask(east, "claw", traceparent)).status_code == 200

        decision = await receiver.span(lambda span: span.kind == "SERVER" and span.name.endswith("/ShouldRateLimit"))
        assert decision.trace_id == TRACE_ID
        batch = await receiver.span(lambda span: (decision.trace_id, decision.span_id) in span.links)
        assert batch.kind == "PRODUCER"
        assert batch.resource["service.name"] == "ratelimit-sidecar-us-east-1"
        applied = await receiver.span(lambda span: span.kind == "CONSUMER" and span.parent_span_id == batch.span_id)
        assert applied.trace_id == batch.trace_id
        assert applied.resource["cloud.region"] == str(batch.attributes["ratelimit.peer"]).removesuffix("-a")
        parent = await receiver.span(lambda span: span.span_id == decision.parent_span_id, ENVOY_FLUSH_S)
        assert parent.resource["service.name"] == "envoy-us-east-1"
        assert parent.trace_id == TRACE_ID


@pytest.mark.slow
async def test_no_tracestate_of_a_client_makes_envoys_call_fail(tmp_path: Path) -> None:
    """Envoy's tracer copies it as it is into the call, with the blanks that HTTP/2 lets a client put around it."""
    async with OtlpReceiver() as receiver, three_regions(tmp_path, RULES, collector=receiver.address) as cluster:
        traceparent = (b"traceparent", f"00-{TRACE_ID}-{CALLER_SPAN_ID}-01".encode())
        statuses = {}
        async with connected(cluster.regions[0].url.removeprefix("http://")) as client:
            for state in [b"a=b"] * 20 + [b"a=b", b"a=b ", b" a=b", b"\t", b"a" * 50_000]:
                headers = [traceparent, (b"tracestate", state)]
                statuses[state[:9]] = (await client.call("/rate?agent=claw", b"", headers, method=b"GET")).http_status
        assert statuses == dict.fromkeys(statuses, 429)
