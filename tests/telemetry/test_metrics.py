"""What /metrics says: names, labels and values, by the parsers of those who read it."""

from __future__ import annotations

import asyncio
import random
import shutil
import subprocess
from dataclasses import dataclass, field, replace
from typing import ClassVar

import pytest
from observed import NOW_US, TWO_A_MINUTE, membership, peer, request, small_limiter
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from ratelimit_sidecar import __version__
from ratelimit_sidecar.crdt.wait_queues import WaitQueues
from ratelimit_sidecar.limiter.counts import MAX_NAMES
from ratelimit_sidecar.limiter.fullest import FullestBuckets
from ratelimit_sidecar.limiter.quota import Quotas
from ratelimit_sidecar.limiter.rules import Rule, RuleNode, Rules
from ratelimit_sidecar.server.budget import Places
from ratelimit_sidecar.telemetry import reference
from ratelimit_sidecar.telemetry.export import SpanCounts
from ratelimit_sidecar.telemetry.exposition import SLICE_SAMPLES, Exposition
from ratelimit_sidecar.telemetry.latency import BOUNDS_NS, LatencyHistogram
from ratelimit_sidecar.telemetry.metric_registry import SidecarCollector, create_registry
from ratelimit_sidecar.telemetry.metric_sources import MetricSources
from ratelimit_sidecar.telemetry.metrics import METRICS

OPENMETRICS = "application/openmetrics-text;version=1.0.0"


@dataclass
class Refused:
    refused: int


@dataclass
class State:
    taken: int = 3
    failed: int = 1
    buckets: int = 20
    bytes: int = 900
    last_us: int | None = 1_790_000_000_000_000


@dataclass
class Redis:
    written: int = 30
    refused: int = 1
    failed: int = 2
    calls: int = 9
    call_seconds: float = 0.25
    waiting: int = 4
    last_us: int | None = 1_790_000_000_000_000


@dataclass
class Fabric:
    ticks: int = 40
    failed: int = 2
    call_seconds: float = 0.5
    buckets: int = 7
    token: int = 3
    terms: int = 1
    unshared: int = 4
    odd: int = 1
    odd_at_gateway: int = 1
    gateway_unshared: int = 6
    no_room: int = 2
    no_room_at_gateway: int = 1
    gateway_failed: int = 5
    last_us: int | None = 1_790_000_000_000_000


class Drawing:
    drawn = 8
    returned = 3
    lineages = 1
    failed = 2


@dataclass
class Certificate:
    not_after_s: float | None = 1_800_000_000.5
    failed_renewals: int = 3


@dataclass
class Mesh:
    protocol_errors: dict[str, int] = field(default_factory=lambda: {"malformed": 4})
    unknown_keys: int = 6
    certificate: Certificate | None = field(default_factory=Certificate)


class Loop:
    longest_seconds = 0.006
    long_stalls = 2


class Clock:
    gap_us = -3_600_000_000
    steps_forward = 1
    steps_back = 2


class FrontEnd:
    open_connections = 2
    accepted_connections = 5
    held_bytes = 4_096
    accept_failures = 6
    closed_connections: ClassVar = {"flood": 1, "idle": 2}
    refused_calls: ClassVar = {"shed": 3}


class Supervision:
    restarts: ClassVar = {"mesh_listener": 1}


class Log:
    dropped_lines = 7


@dataclass
class Reloads:
    loads: dict[str, int] = field(default_factory=lambda: {"success": 2, "error": 1})
    last_success_us: int | None = NOW_US
    degraded_reason: str = ""
    rejected: object | None = None


COUNTERS_OF_A_NAME = 10
GAUGES_OF_A_RULE = 4
SERIES_OF_A_PEER = 20
OTHER_SERIES = 100
"""At most."""


def sources(
    limiter=None, *, peers=(), request_errors=None, latency=None, rules=None, shared=None, fullest=None
) -> MetricSources:
    return MetricSources(
        node="us-1",
        region="us-east-1",
        limiter=limiter or small_limiter(),
        latency=latency or LatencyHistogram(),
        peers=lambda: peers,
        request_errors=request_errors or {},
        ext_authz_unlimited={"no_mapping": 3},
        proxies=Refused(4),
        replication=Mesh(),
        rules=rules or Reloads(),
        membership=lambda: shared,
        loop=Loop(),
        clock=Clock(),
        front_end=FrontEnd(),
        listener_certificate=Certificate(),
        state=State(),
        redis=Redis(),
        fabric=Fabric(),
        drawing=Drawing(),
        supervision=Supervision(),
        log=Log(),
        fullest=fullest,
        spans=SpanCounts(ended=9, exported=4, failed=3, dropped=2),
        quotas=Quotas(limiter or small_limiter(), NOW_US, lambda: NOW_US),
        quota_places=Places(1),
        waits=WaitQueues(),
    )


def busy_sources() -> MetricSources:
    """With at least one sample for every metric."""
    limiter = small_limiter()
    for _ in range(3):
        limiter.decide(request(("tenant", "acme"), ("plan", "gold"), ("nothing", "limits this")), NOW_US)
    latency = LatencyHistogram()
    latency.observe(30_000)
    fullest = FullestBuckets(limiter.store)
    fullest.look(limiter.rules, NOW_US, 100)
    return sources(
        limiter, peers=[peer()], request_errors={"invalid": 1}, latency=latency, shared=membership(), fullest=fullest
    )


def test_a_front_end_tells_of_its_connections_and_of_what_it_refused() -> None:
    registry = create_registry(busy_sources())
    assert sample(registry, "ratelimit_connections", region="us-east-1") == 2
    assert sample(registry, "ratelimit_connections_accepted_total", region="us-east-1") == 5
    assert sample(registry, "ratelimit_connections_closed_total", region="us-east-1", reason="idle") == 2
    assert sample(registry, "ratelimit_calls_refused_total", region="us-east-1", reason="shed") == 3
    assert sample(registry, "ratelimit_held_bytes", region="us-east-1") == 4_096
    assert sample(registry, "ratelimit_accept_failures_total", region="us-east-1") == 6


def test_failed_tasks_and_lost_log_lines_are_counted() -> None:
    registry = create_registry(busy_sources())
    assert sample(registry, "ratelimit_task_failures_total", region="us-east-1", task="mesh_listener") == 1
    assert sample(registry, "ratelimit_log_lines_dropped_total", region="us-east-1") == 7


def test_spans_that_have_ended_and_what_became_of_them_is_counted() -> None:
    registry = create_registry(busy_sources())
    states = [
        sample(registry, "ratelimit_spans_total", state=state) for state in ("ended", "exported", "failed", "dropped")
    ]
    assert states == [9, 4, 3, 2]


def test_a_clock_that_is_far_from_the_systems_shows_and_so_does_each_step() -> None:
    registry = create_registry(busy_sources())
    assert sample(registry, "ratelimit_clock_gap_seconds", region="us-east-1") == -3_600
    assert sample(registry, "ratelimit_clock_steps_total", region="us-east-1", direction="forward") == 1
    assert sample(registry, "ratelimit_clock_steps_total", region="us-east-1", direction="back") == 2


async def encoded(registry: CollectorRegistry, accept: str) -> bytes:
    pieces, _ = Exposition(registry).encode(accept)
    return b"".join([piece async for piece in pieces])


def sample(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(name, {"region": "us-east-1", **labels})


def test_an_observation_counts_in_the_bucket_whose_bound_it_reaches() -> None:
    latency = LatencyHistogram()
    for elapsed_ns in (0, BOUNDS_NS[0], BOUNDS_NS[0] + 1, BOUNDS_NS[-1], BOUNDS_NS[-1] + 1):
        latency.observe(elapsed_ns)
    assert latency.counts[:2] == [2, 1]
    assert latency.counts[-2:] == [1, 1]
    assert sum(latency.counts) == 5
    assert latency.sum_ns == 2 * BOUNDS_NS[0] + 2 * BOUNDS_NS[-1] + 2


def test_the_latency_histogram_is_cumulative_and_in_seconds() -> None:
    latency = LatencyHistogram()
    for elapsed_ns in (8_000, 20_000, 2_000_000_000):
        latency.observe(elapsed_ns)
    registry = create_registry(sources(latency=latency))
    name = "openclaw_request_latency_seconds"
    assert sample(registry, f"{name}_bucket", region="us-east-1", le="1e-05") == 1
    assert sample(registry, f"{name}_bucket", region="us-east-1", le="2.5e-05") == 2
    assert sample(registry, f"{name}_bucket", region="us-east-1", le="0.1") == 2
    assert sample(registry, f"{name}_bucket", region="us-east-1", le="+Inf") == 3
    assert sample(registry, f"{name}_count", region="us-east-1") == 3
    assert sample(registry, f"{name}_sum", region="us-east-1") == pytest.approx(2.000028)


def test_decisions_are_counted_by_domain_rule_and_code() -> None:
    registry = create_registry(busy_sources())

    def decisions(rule: str, code: str) -> float | None:
        return sample(registry, "ratelimit_decisions_total", domain="edge", rule=rule, code=code)

    assert decisions("edge.tenant", "OK") == 2
    assert decisions("edge.tenant", "OVER_LIMIT") == 1
    assert decisions("edge.plan_gold", "OK") == 3
    assert decisions("", "OK") == 3
    assert decisions("", "OVER_LIMIT") is None


def test_rejections_and_tokens_carry_region_domain_and_rule() -> None:
    registry = create_registry(busy_sources())
    labels = {"region": "us-east-1", "domain": "edge", "rule": "edge.tenant"}
    assert sample(registry, "openclaw_rate_limit_rejections", **labels) == 1
    assert sample(registry, "crdt_token_consumed_total", **labels) == 2


def test_a_rule_that_no_request_has_met_counts_zero() -> None:
    rules = Rules({"edge": RuleNode(key_only={"user": RuleNode(Rule("edge.user", TWO_A_MINUTE))})})
    registry = create_registry(sources(small_limiter(rules)))
    assert sample(registry, "ratelimit_decisions_total", domain="edge", rule="edge.user", code="OVER_LIMIT") == 0
    assert sample(registry, "openclaw_rate_limit_rejections", region="us-east-1", domain="edge", rule="edge.user") == 0


def test_the_limit_for_what_no_rule_matches_counts_zero_before_its_first_request() -> None:
    limiter = small_limiter(Rules(default_rule=Rule("default_rule", TWO_A_MINUTE)))
    registry = create_registry(sources(limiter))
    assert sample(registry, "ratelimit_decisions_total", domain="", rule="default_rule", code="OK") == 0
    limiter.decide(request(("any", "thing"), domain="anywhere"), NOW_US)
    assert sample(registry, "ratelimit_decisions_total", domain="", rule="default_rule", code="OK") == 1


async def test_callers_cannot_add_series() -> None:
    limiter = small_limiter()
    registry = create_registry(sources(limiter))
    limiter.decide(request(("tenant", "a")), NOW_US)
    limiter.decide(request(("unknown", "a"), domain="a"), NOW_US)
    limiter.decide(request(("unknown", "a")), NOW_US)
    before = await encoded(registry, "")
    for value in range(50):
        limiter.decide(request(("tenant", f"t{value}"), ("unknown", f"u{value}")), NOW_US)
        limiter.decide(request(("tenant", "a"), domain=f"d{value}"), NOW_US)
    after = await encoded(registry, "")
    assert after.count(b"\n") == before.count(b"\n")


def test_buckets_and_evictions_are_shown() -> None:
    limiter = small_limiter()
    limiter.decide(request(("tenant", "a"), ("tenant", "b")), NOW_US)
    limiter.store.drain_changes()
    registry = create_registry(sources(limiter))
    assert sample(registry, "crdt_buckets", region="us-east-1") == 2
    limiter.store.sweep(NOW_US + 10**9, 1)
    assert sample(registry, "crdt_buckets", region="us-east-1") == 1
    assert sample(registry, "crdt_buckets_evicted_total", region="us-east-1") == 1


def test_each_peer_has_its_lag_under_its_node_id() -> None:
    registry = create_registry(sources(peers=[peer("eu-1", lag_seconds=0.08), peer("ap-1", lag_seconds=1.5)]))
    assert sample(registry, "crdt_sync_lag_seconds", region="us-east-1", peer="eu-1") == 0.08
    assert sample(registry, "crdt_sync_lag_seconds", region="us-east-1", peer="ap-1") == 1.5


async def test_a_peer_that_was_never_reached_is_named_by_its_address() -> None:
    registry = create_registry(sources(peers=[peer("", "ap.example.com:50051", clock_offset_seconds=None)]))
    labels = {"region": "us-east-1", "peer": "ap.example.com:50051"}
    assert sample(registry, "crdt_peer_connected", **labels) == 0
    body = await encoded(registry, "")
    assert b"crdt_peer_clock_offset_seconds{" not in body


async def test_a_node_known_under_two_addresses_makes_no_duplicate_series() -> None:
    registry = create_registry(sources(peers=[peer("eu-1", "10.0.0.1:50051"), peer("eu-1", "10.0.0.2:50051")]))
    body = await encoded(registry, "")
    series = [line.rsplit(b" ", 1)[0] for line in body.splitlines() if not line.startswith(b"#")]
    assert len(series) == len(set(series))
    assert sample(registry, "crdt_peer_connected", region="us-east-1", peer="eu-1@10.0.0.2:50051") == 1


def test_replication_counters_are_shown_by_peer_and_reason() -> None:
    registry = create_registry(busy_sources())
    of_peer = {"region": "us-east-1", "peer": "eu-1"}
    for name, value in {
        "crdt_pending_buckets": 3,
        "crdt_peer_connected": 1,
        "crdt_peer_reconnects_total": 2,
        "crdt_peer_clock_offset_seconds": 0.002,
        "crdt_batches_sent_total": 40,
        "crdt_batches_received_total": 50,
        "crdt_entries_sent_total": 400,
        "crdt_entries_received_total": 500,
        "crdt_bytes_sent_total": 6_000,
        "crdt_bytes_received_total": 7_000,
        "crdt_resyncs_total": 4,
        "crdt_peer_rules_match": 1,
    }.items():
        assert sample(registry, name, **of_peer) == value, name
    assert sample(registry, "crdt_peer_protocol_errors_total", **of_peer, reason="malformed") == 1
    assert sample(registry, "crdt_peer_refused_total", **of_peer, reason="ahead") == 9
    assert sample(registry, "crdt_protocol_errors_total", region="us-east-1", reason="malformed") == 4
    assert sample(registry, "crdt_unknown_keys_total", region="us-east-1") == 6


def test_what_a_peer_runs_is_shown_once_it_has_said_so() -> None:
    unreached = replace(peer("", "10.0.0.9:50051"), version="", protocol=0, rules_match=None)
    registry = create_registry(sources(peers=[peer(), unreached]))
    known, unknown = {"region": "us-east-1", "peer": "eu-1"}, {"region": "us-east-1", "peer": "10.0.0.9:50051"}
    who = {"node": "eu-1", "peer_region": "eu-west-2", "address": "eu.example.com:50051"}
    assert sample(registry, "crdt_peer_info", **known, **who, version="1.2.3", protocol="3") == 1
    nobody = {"node": "", "peer_region": "", "address": "10.0.0.9:50051", "version": "", "protocol": ""}
    assert sample(registry, "crdt_peer_info", **unknown, **nobody) == 1
    assert sample(registry, "crdt_peer_rules_match", **unknown) is None


def test_who_shares_strict_limits_is_shown() -> None:
    registry = create_registry(busy_sources())
    for name, value in {"home_share": 0.25, "membership_settled": 1, "membership_conflicts": 1, "buckets": 7}.items():
        assert sample(registry, f"ratelimit_strict_{name}", region="us-east-1") == value, name
    for direction, value in {"sent": 11, "received": 13}.items():
        assert sample(registry, "ratelimit_strict_payments_total", region="us-east-1", direction=direction) == value


def test_where_no_limit_can_be_strict_nothing_is_shown_of_shares() -> None:
    registry = create_registry(sources())
    assert b"ratelimit_strict_home_share{" not in generate_latest(registry)


CERTIFICATES = pytest.mark.parametrize("whose", ["crdt_mesh_certificate", "ratelimit_listener_certificate"])


@CERTIFICATES
def test_when_a_certificate_ends_and_how_often_it_could_not_be_renewed_is_shown(whose: str) -> None:
    registry = create_registry(sources())
    for name, value in {"not_after_timestamp_seconds": 1_800_000_000.5, "failed_renewals_total": 3}.items():
        assert sample(registry, f"{whose}_{name}", region="us-east-1") == value


@CERTIFICATES
@pytest.mark.parametrize(
    ("certificate", "left"), [(None, []), (Certificate(not_after_s=None), ["failed_renewals_total"])]
)
def test_of_a_certificate_that_is_not_there_or_whose_end_is_not_known_nothing_is_made_up(
    whose: str, certificate: Certificate | None, left: list[str]
) -> None:
    shown = replace(sources(), replication=Mesh(certificate=certificate), listener_certificate=certificate)
    registry = create_registry(shown)
    names = ("not_after_timestamp_seconds", "failed_renewals_total")
    found = [name for name in names if sample(registry, f"{whose}_{name}", region="us-east-1") is not None]
    assert found == left


def test_the_longest_stall_of_the_loop_and_the_number_of_long_ones_are_shown() -> None:
    registry = create_registry(sources())
    assert sample(registry, "ratelimit_event_loop_longest_stall_seconds", region="us-east-1") == 0.006
    assert sample(registry, "ratelimit_event_loop_stalls_total", region="us-east-1") == 2


def test_plans_are_counted_by_whether_they_were_remembered_over_reloads() -> None:
    limiter = small_limiter()
    registry = create_registry(sources(limiter))
    for _ in range(3):
        limiter.decide(request(("tenant", "a")), NOW_US)
    limiter.use_rules(limiter.rules)
    limiter.decide(request(("tenant", "a")), NOW_US)
    assert sample(registry, "ratelimit_plans_total", result="hit") == 2
    assert sample(registry, "ratelimit_plans_total", result="miss") == 2


def test_request_errors_and_the_build_are_shown() -> None:
    registry = create_registry(busy_sources())
    assert sample(registry, "ratelimit_request_errors_total", reason="invalid") == 1
    assert sample(registry, "ratelimit_ext_authz_unlimited_total", reason="no_mapping") == 3
    assert sample(registry, "ratelimit_ext_authz_http_connections_refused_total", region="us-east-1") == 4
    assert sample(registry, "ratelimit_build_info", version=__version__, node="us-1", region="us-east-1") == 1


async def test_every_metric_of_the_table_is_exposed_under_its_own_name_in_both_formats() -> None:
    registry = create_registry(busy_sources())
    for accept, parse in (("", parse_text), (OPENMETRICS, parse_openmetrics)):
        body = await encoded(registry, accept)
        exposed = {sample.name: sample.labels for family in parse(body.decode()) for sample in family.samples}
        for metric in METRICS:
            name = f"{metric.name}_count" if metric.kind == "histogram" else metric.name
            assert set(exposed[name]) == set(metric.labels), metric.name
        assert {"process_cpu_seconds_total", "python_info", "python_gc_collections_total"} <= set(exposed)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_has_nothing_to_complain_about() -> None:
    body = asyncio.run(encoded(create_registry(busy_sources()), ""))
    checked = subprocess.run(["promtool", "check", "metrics"], input=body, capture_output=True, check=False)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, b"")


@pytest.mark.parametrize(("accept", "whole"), [("", generate_latest), (OPENMETRICS, generate_openmetrics)])
async def test_encoding_in_slices_gives_what_encoding_at_once_gives(accept: str, whole) -> None:
    registry = CollectorRegistry()
    registry.register(SidecarCollector(sources(small_limiter(many_rules(3 * SLICE_SAMPLES + 1)))))
    body = await encoded(registry, accept)
    assert body == whole(registry)


@pytest.mark.parametrize(("accept", "whole"), [("", generate_latest), (OPENMETRICS, generate_openmetrics)])
async def test_no_value_of_a_caller_breaks_the_lines_of_a_slice(accept: str, whole) -> None:
    detailed = Rule("edge.user", TWO_A_MINUTE, metric_of_values=True)
    limiter = small_limiter(Rules({"edge": RuleNode(key_only={"user": RuleNode(detailed)})}))
    for number in range(2 * SLICE_SAMPLES):
        limiter.decide(request(("user", f'"{number}\\\r# EOF\n# \x85\u2028')), NOW_US)
    registry = CollectorRegistry()
    registry.register(SidecarCollector(sources(limiter)))
    assert await encoded(registry, accept) == whole(registry)


async def test_a_version_that_is_none_gets_the_classic_format() -> None:
    _, content_type = Exposition(create_registry(sources())).encode("application/openmetrics-text;version=\xff")
    assert content_type.startswith("text/plain")


async def test_the_loop_runs_between_slices() -> None:
    registry = create_registry(sources(small_limiter(many_rules(20 * SLICE_SAMPLES))))
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count_turns())
    body = await encoded(registry, "")
    counting.cancel()
    samples = sum(not line.startswith(b"#") for line in body.splitlines())
    assert turns >= samples / SLICE_SAMPLES


def test_the_reference_page_is_up_to_date() -> None:
    assert reference.PAGE.read_text() == reference.render(), "run python -m ratelimit_sidecar.telemetry.reference"


def many_rules(count: int) -> Rules:
    exact = {("user", f"u{n}"): RuleNode(Rule(f"edge.user_u{n}", TWO_A_MINUTE)) for n in range(count)}
    return Rules({"edge": RuleNode(exact=exact)})


def test_loads_of_rules_are_counted_by_result_with_the_time_of_the_last_good_one() -> None:
    registry = create_registry(sources())
    assert sample(registry, "ratelimit_config_loads_total", result="success") == 2
    assert sample(registry, "ratelimit_config_loads_total", result="error") == 1
    assert sample(registry, "ratelimit_config_last_success_timestamp_seconds") == NOW_US / 1e6
    assert sample(registry, "ratelimit_config_source_up") == 1
    assert sample(registry, "ratelimit_config_rejected") == 0


def test_rules_that_were_rejected_show_until_others_are_loaded() -> None:
    registry = create_registry(sources(rules=Reloads(rejected="line 3")))
    assert sample(registry, "ratelimit_config_rejected") == 1


def test_of_each_rule_the_three_fullest_buckets_show_and_the_greatest_debt() -> None:
    limiter = small_limiter()
    for tenant, hits in (("a", 1), ("b", 2), ("c", 1), ("d", 1)):
        limiter.decide(request(("tenant", tenant), hits=hits), NOW_US)
    fullest = FullestBuckets(limiter.store)
    registry = create_registry(sources(limiter, fullest=fullest))
    tenants = {"domain": "edge", "rule": "edge.tenant"}
    assert sample(registry, "ratelimit_bucket_used_ratio", **tenants, rank="1") is None, "before the first look is over"

    fullest.look(limiter.rules, NOW_US, 5)

    ranks = [sample(registry, "ratelimit_bucket_used_ratio", **tenants, rank=rank) for rank in "1234"]
    assert ranks == [1, 0.5, 0.5, None]
    assert sample(registry, "ratelimit_bucket_debt_tokens", **tenants) == 0


async def test_a_bucket_of_latency_shows_the_trace_of_the_latest_sampled_request_in_openmetrics_alone() -> None:
    latency = LatencyHistogram()
    for elapsed_ns in (30_000, 40_000, 2_000_000_000):
        latency.observe(elapsed_ns)
    latency.exemplify("a" * 32, 30_000, NOW_US * 1_000)
    latency.exemplify("b" * 32, 40_000, NOW_US * 1_000)
    latency.exemplify("c" * 32, 2_000_000_000, NOW_US * 1_000)
    registry = create_registry(sources(latency=latency))

    families = parse_openmetrics((await encoded(registry, OPENMETRICS)).decode())
    (histogram,) = [family for family in families if family.name == "openclaw_request_latency_seconds"]
    shown = {of.labels["le"]: of.exemplar for of in histogram.samples if of.exemplar is not None}
    assert {le: exemplar.labels for le, exemplar in shown.items()} == {
        "5e-05": {"trace_id": "b" * 32},
        "+Inf": {"trace_id": "c" * 32},
    }
    assert (shown["5e-05"].value, float(shown["5e-05"].timestamp)) == (0.000_04, NOW_US / 1e6)
    assert b"trace_id" not in await encoded(registry, "")


async def test_an_hour_of_random_values_leaves_the_series_as_many_as_they_were() -> None:
    limiter = small_limiter()
    fullest = FullestBuckets(limiter.store)
    registry = create_registry(sources(limiter, fullest=fullest))

    async def series() -> int:
        return sum(not line.startswith(b"#") for line in (await encoded(registry, "")).splitlines())

    def send(at_us: int, number: int) -> None:
        for key in ("tenant", "ip", f"key{number}"):
            limiter.decide(request((key, f"value{number}"), domain="edge"), at_us)
        limiter.decide(request(("tenant", "value"), domain=f"domain{number}"), at_us)

    for number in range(3):
        send(NOW_US, number)
    fullest.look(limiter.rules, NOW_US, 1_000)
    before = await series()

    for number in range(3, 3_600):
        send(NOW_US + number * 1_000_000, number)
    fullest.look(limiter.rules, NOW_US + 3_600_000_000, 1_000_000)

    assert await series() == before


@pytest.mark.long
async def test_an_hour_of_random_values_in_names_leaves_the_series_under_the_stated_bound() -> None:
    """docs/observability.md states it."""
    detailed = Rule("edge.user", TWO_A_MINUTE, metric_of_values=True)
    limiter = small_limiter(Rules({"edge": RuleNode(key_only={"user": RuleNode(detailed)})}))
    fullest = FullestBuckets(limiter.store)
    peers = [peer()]
    registry = create_registry(sources(limiter, peers=peers, fullest=fullest))
    bound = COUNTERS_OF_A_NAME * (MAX_NAMES + 1) + GAUGES_OF_A_RULE + SERIES_OF_A_PEER * len(peers) + OTHER_SERIES
    values = random.Random(23)

    sent = 0
    for second in range(3_600):
        for _ in range(5):
            limiter.decide(request(("user", f"{values.getrandbits(64):x}")), NOW_US + second * 1_000_000)
            sent += 1
    fullest.look(limiter.rules, NOW_US + 3_600_000_000, 1_000_000)

    series = sum(not line.startswith(b"#") for line in (await encoded(registry, "")).splitlines())
    assert sent > MAX_NAMES
    assert series <= bound


def test_every_metric_names_the_region() -> None:
    assert [metric.name for metric in METRICS if "region" not in metric.labels] == []


def test_rules_that_have_not_come_yet_have_no_time_and_their_source_is_down() -> None:
    waiting = Reloads({"success": 0, "error": 0}, None, "not connected yet")
    registry = create_registry(sources(rules=waiting))
    assert sample(registry, "ratelimit_config_loads_total", result="success") == 0
    assert sample(registry, "ratelimit_config_last_success_timestamp_seconds") is None
    assert sample(registry, "ratelimit_config_source_up") == 0
