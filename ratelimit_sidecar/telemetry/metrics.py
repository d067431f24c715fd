"""Every metric of the sidecar, in one table: name, type, labels, help, and how it is read.

Nothing is counted here. At a scrape the collector reads the counters that other parts have anyway, sample by sample, so
metrics cost the request path nothing. `docs/reference/metrics.md` is generated from the same table. Label values come
from the configuration, the mesh and fixed lists, never from a request. So the number of series is bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal, Protocol, TypeVar

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar
from prometheus_client.samples import Sample as EncodedSample

from ratelimit_sidecar import __version__
from ratelimit_sidecar.crdt.wait_queues import WaitQueues
from ratelimit_sidecar.limiter.counts import RuleCounts
from ratelimit_sidecar.limiter.fullest import Fullest
from ratelimit_sidecar.limiter.limiter import Limiter
from ratelimit_sidecar.limiter.quota import Quotas
from ratelimit_sidecar.limiter.rules import Rules
from ratelimit_sidecar.mesh_status import MembershipStatus, PeerStatus
from ratelimit_sidecar.telemetry.latency import BOUNDS_NS, LatencyHistogram

_BUCKET_BOUNDS = (*(str(bound_ns / 1e9) for bound_ns in BOUNDS_NS), "+Inf")


class CertificateStatus(Protocol):
    """What is read of a certificate (`ratelimit_sidecar.config.tls_files.CertificateInForce`)."""

    @property
    def not_after_s(self) -> float | None:
        """When the certificate ends, in seconds since the epoch; None if that is unknown."""

    @property
    def failed_renewals(self) -> int:
        """How often its files were read again and could not be used."""


class Replication(Protocol):
    """What is read of the mesh as a whole."""

    @property
    def protocol_errors(self) -> Mapping[str, int]:
        """Streams that this node has closed, by reason, those of unidentified peers included."""

    @property
    def unknown_keys(self) -> int:
        """Buckets in deltas of peers for which there is no replicated rule here."""

    @property
    def certificate(self) -> CertificateStatus | None:
        """None in plain text."""


class LoopStatus(Protocol):
    """What is read of the event loop (`ratelimit_sidecar.telemetry.stalls.StallMonitor`)."""

    @property
    def longest_seconds(self) -> float: ...
    @property
    def long_stalls(self) -> int: ...


class ClockStatus(Protocol):
    """What is read of the clock (`ratelimit_sidecar.clock.Clock`)."""

    @property
    def gap_us(self) -> int: ...
    @property
    def steps_forward(self) -> int: ...
    @property
    def steps_back(self) -> int: ...


class FrontEndStatus(Protocol):
    """What is read of the front end (`ratelimit_sidecar.server.h2.H2FrontEnd`, a layer above)."""

    @property
    def open_connections(self) -> int: ...
    @property
    def accepted_connections(self) -> int: ...
    @property
    def held_bytes(self) -> int: ...
    @property
    def accept_failures(self) -> int: ...
    @property
    def closed_connections(self) -> Mapping[str, int]: ...
    @property
    def refused_calls(self) -> Mapping[str, int]: ...


class PlacesStatus(Protocol):
    """What is read of a method's places (`ratelimit_sidecar.server.budget.Places`, a layer above)."""

    @property
    def refused(self) -> int: ...


class StateStatus(Protocol):
    """What is read of the snapshots (`ratelimit_sidecar.persistence.snapshots.SnapshotStatus`, a layer above)."""

    @property
    def taken(self) -> int: ...
    @property
    def failed(self) -> int: ...
    @property
    def buckets(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    @property
    def last_us(self) -> int | None: ...


class RedisStatus(Protocol):
    """What is read of the state in Redis (`ratelimit_sidecar.persistence.redis_store.RedisStatus`, a layer above)."""

    @property
    def written(self) -> int: ...
    @property
    def refused(self) -> int: ...
    @property
    def failed(self) -> int: ...
    @property
    def calls(self) -> int: ...
    @property
    def call_seconds(self) -> float: ...
    @property
    def waiting(self) -> int: ...
    @property
    def last_us(self) -> int | None: ...


class DrawStatus(Protocol):
    """What is read of strict limits on a fabric (`ratelimit_sidecar.fabric.status.DrawStatus`, a layer above)."""

    @property
    def drawn(self) -> int: ...
    @property
    def returned(self) -> int: ...
    @property
    def lineages(self) -> int: ...
    @property
    def failed(self) -> int: ...


class FabricStatus(Protocol):
    """What is read of the fabric (`ratelimit_sidecar.fabric.status.FabricStatus`, a layer above)."""

    @property
    def ticks(self) -> int: ...
    @property
    def failed(self) -> int: ...
    @property
    def call_seconds(self) -> float: ...
    @property
    def buckets(self) -> int: ...
    @property
    def token(self) -> int: ...
    @property
    def terms(self) -> int: ...
    @property
    def unshared(self) -> int: ...
    @property
    def odd(self) -> int: ...
    @property
    def odd_at_gateway(self) -> int: ...
    @property
    def gateway_unshared(self) -> int: ...
    @property
    def no_room(self) -> int: ...
    @property
    def no_room_at_gateway(self) -> int: ...
    @property
    def gateway_failed(self) -> int: ...
    @property
    def last_us(self) -> int | None: ...


class SupervisionStatus(Protocol):
    """What is read of supervised tasks (`ratelimit_sidecar.supervision.Supervisor`)."""

    @property
    def restarts(self) -> Mapping[str, int]: ...


class LogStatus(Protocol):
    """What is read of the log (`ratelimit_sidecar.telemetry.log_writer.LogWriter`)."""

    @property
    def dropped_lines(self) -> int: ...


class SpansStatus(Protocol):
    """What is read of the spans (`ratelimit_sidecar.telemetry.export.SpanCounts`)."""

    @property
    def ended(self) -> int: ...
    @property
    def exported(self) -> int: ...
    @property
    def failed(self) -> int: ...
    @property
    def dropped(self) -> int: ...


class FullestStatus(Protocol):
    """What is read of the fullest buckets (`ratelimit_sidecar.limiter.fullest.FullestBuckets`)."""

    @property
    def of_rules(self) -> Mapping[tuple[str, str], Fullest]: ...


class RulesStatus(Protocol):
    """What is read of the rules' reloads (`ratelimit_sidecar.rules_source.reloader.Reloader`, a sibling layer)."""

    @property
    def loads(self) -> Mapping[str, int]:
        """Attempts to put rules in force, by result."""

    @property
    def last_success_us(self) -> int | None:
        """When the rules in force were loaded, in microseconds since the epoch."""

    @property
    def rejected(self) -> object | None:
        """The newest attempt, if it failed."""

    @property
    def degraded_reason(self) -> str:
        """Why changes at their source may be noticed late; "" if they are not."""


@dataclass(frozen=True, slots=True)
class MetricSources:
    """The parts that metrics are read from.

    Args:
        peers: called once a scrape.
        request_errors: refused requests, by reason.
        ext_authz_unlimited: requests over ext_authz without a limit, by reason.
        replication: None if this node has no mesh.
        rules: None if the rules never change.
        membership: called once a scrape; returns None if no limit can be strict.
        loop: None if the event loop is not measured.
        clock: None if time is not the machine's.
        front_end: None if the library that carries calls has no counters.
        listener_certificate: None if Envoy's calls come in plain text.
        state: None without state in a file.
        redis: None without state in Redis.
        fabric: None without a fabric.
        drawing: None without strict limits on one.
        supervision: None without supervised tasks.
        log: None if log lines are written at once.
        fullest: None if the fullest buckets are not measured.
        spans: None without tracing.
        quotas: None if Envoys get no quotas; so is `quota_places`.
        waits: None if no limit can be strict.
    """

    node: str
    region: str
    limiter: Limiter
    latency: LatencyHistogram
    peers: Callable[[], Sequence[PeerStatus]]
    request_errors: Mapping[str, int]
    ext_authz_unlimited: Mapping[str, int] = field(default_factory=dict)
    replication: Replication | None = None
    rules: RulesStatus | None = None
    membership: Callable[[], MembershipStatus | None] = lambda: None
    loop: LoopStatus | None = None
    clock: ClockStatus | None = None
    front_end: FrontEndStatus | None = None
    listener_certificate: CertificateStatus | None = None
    state: StateStatus | None = None
    redis: RedisStatus | None = None
    fabric: FabricStatus | None = None
    drawing: DrawStatus | None = None
    supervision: SupervisionStatus | None = None
    log: LogStatus | None = None
    fullest: FullestStatus | None = None
    spans: SpansStatus | None = None
    quotas: Quotas | None = None
    quota_places: PlacesStatus | None = None
    waits: WaitQueues | None = None


@dataclass(frozen=True, slots=True)
class ScrapeView:
    """What one scrape shows: the sources, and what was read of them once for all metrics.

    Args:
        rules: the rules in force.
        counted: domain and rule name of everything that has counters.
        peers: by the value of the label `peer`.
    """

    sources: MetricSources
    rules: Rules
    counted: Sequence[tuple[str, str]]
    peers: Mapping[str, PeerStatus]
    membership: MembershipStatus | None

    def counts(self) -> Iterator[tuple[str, str, RuleCounts]]:
        """Domain, rule name and current counters. Rules without requests have zeros, so that `rate()` of an alert sees
        their first increment.
        """
        counts = self.sources.limiter.counts
        for domain, rule in self.rules.names:
            yield domain, rule, counts.get((domain, rule), _ZEROS)
        for domain, rule in self.counted:
            if (domain, rule) not in self.rules.names:
                yield domain, rule, counts.get((domain, rule), _ZEROS)


_ZEROS = RuleCounts()


_Source = TypeVar("_Source")

Sample = tuple[str, tuple[str, ...], float] | tuple[str, tuple[str, ...], float, Exemplar]
"""Suffix of the sample's name ("" unless a histogram's), label values, value, and an exemplar if there is one."""

Kind = Literal["counter", "gauge", "histogram", "info", "unknown"]


@dataclass(frozen=True, slots=True)
class Definition:
    """One metric.

    Args:
        name: as exposed, with the suffix of its kind.
        read: reads its samples; their label values are in the order of `labels`.
    """

    name: str
    kind: Kind
    labels: tuple[str, ...]
    help: str
    read: Callable[[ScrapeView], Iterable[Sample]]


def _read_decisions(at: ScrapeView) -> Iterator[Sample]:
    region = at.sources.region
    for domain, rule, counts in at.counts():
        yield "", (region, domain, rule, "OK"), counts.ok
        if rule:
            yield "", (region, domain, rule, "OVER_LIMIT"), counts.over_limit


def _read_rules(value: Callable[[RuleCounts], float]) -> Callable[[ScrapeView], Iterator[Sample]]:
    def read(at: ScrapeView) -> Iterator[Sample]:
        for domain, rule, counts in at.counts():
            # Descriptors without a rule take no tokens and are never denied.
            if rule:
                yield "", (at.sources.region, domain, rule), value(counts)

    return read


def _read_used(at: ScrapeView) -> Iterator[Sample]:
    if at.sources.fullest is not None:
        for (domain, rule), fullest in at.sources.fullest.of_rules.items():
            for rank, used in enumerate(fullest.used, start=1):
                yield "", (at.sources.region, domain, rule, str(rank)), used


def _read_debt(at: ScrapeView) -> Iterator[Sample]:
    if at.sources.fullest is not None:
        for (domain, rule), fullest in at.sources.fullest.of_rules.items():
            yield "", (at.sources.region, domain, rule), fullest.debt


def _read_peers(value: Callable[[PeerStatus], float | None]) -> Callable[[ScrapeView], Iterator[Sample]]:
    def read(at: ScrapeView) -> Iterator[Sample]:
        for label, peer in at.peers.items():
            number = value(peer)
            if number is not None:
                yield "", (at.sources.region, label), number

    return read


def _read_latency(at: ScrapeView) -> Iterator[Sample]:
    region, latency = at.sources.region, at.sources.latency
    totals = list(accumulate(latency.counts))
    for bound, total, latest in zip(_BUCKET_BOUNDS, totals, latency.exemplars, strict=True):
        if latest is None:
            yield "_bucket", (region, bound), total
        else:
            exemplar = Exemplar({"trace_id": latest.trace_id}, latest.elapsed_ns / 1e9, latest.ended_ns / 1e9)
            yield "_bucket", (region, bound), total, exemplar
    yield "_count", (region,), totals[-1]
    yield "_sum", (region,), latency.sum_ns / 1e9


def _read_peer_info(at: ScrapeView) -> Iterator[Sample]:
    for label, peer in at.peers.items():
        # No protocol is spoken before the peer is reached.
        protocol = str(peer.protocol or "")
        yield "", (at.sources.region, label, peer.node, peer.region, peer.address, peer.version, protocol), 1


def _read_peer_protocol_errors(at: ScrapeView) -> Iterator[Sample]:
    for label, peer in at.peers.items():
        for reason, count in peer.protocol_errors.items():
            yield "", (at.sources.region, label, reason), count


def _read_peer_refused(at: ScrapeView) -> Iterator[Sample]:
    for label, peer in at.peers.items():
        for reason, count in peer.refused.items():
            yield "", (at.sources.region, label, reason), count


def _read_protocol_errors(at: ScrapeView) -> Iterator[Sample]:
    if at.sources.replication is not None:
        for reason, count in at.sources.replication.protocol_errors.items():
            yield "", (at.sources.region, reason), count


def _read_unknown_keys(at: ScrapeView) -> Iterator[Sample]:
    if at.sources.replication is not None:
        yield "", (at.sources.region,), at.sources.replication.unknown_keys


def _of_mesh(sources: MetricSources) -> CertificateStatus | None:
    return None if sources.replication is None else sources.replication.certificate


def _of_listener(sources: MetricSources) -> CertificateStatus | None:
    return sources.listener_certificate


def _read_certificate(
    of: Callable[[MetricSources], CertificateStatus | None], value: Callable[[CertificateStatus], float | None]
) -> Callable[[ScrapeView], Iterator[Sample]]:
    def read(at: ScrapeView) -> Iterator[Sample]:
        certificate = of(at.sources)
        number = None if certificate is None else value(certificate)
        if number is not None:
            yield "", (at.sources.region,), number

    return read


def _read_overflow_decisions(at: ScrapeView) -> Iterator[Sample]:
    region, decisions = at.sources.region, at.sources.limiter.overflow_decisions
    for names in at.rules.names:
        yield "", (region, *names), decisions.get(names, 0)
    for names in list(decisions):
        if names not in at.rules.names:
            yield "", (region, *names), decisions[names]


def _read_membership(value: Callable[[MembershipStatus], float]) -> Callable[[ScrapeView], Iterator[Sample]]:
    def read(at: ScrapeView) -> Iterator[Sample]:
        if at.membership is not None:
            yield "", (at.sources.region,), value(at.membership)

    return read


def _read_payments(at: ScrapeView) -> Iterator[Sample]:
    if at.membership is not None:
        yield "", (at.sources.region, "sent"), at.membership.payments_sent
        yield "", (at.sources.region, "received"), at.membership.payments_received


def _read_source(
    part: Callable[[MetricSources], _Source | None], value: Callable[[_Source], float | None]
) -> Callable[[ScrapeView], Iterator[Sample]]:
    """Read one sample from a source; none if the source is absent or has no value."""

    def read(at: ScrapeView) -> Iterator[Sample]:
        of = part(at.sources)
        number = None if of is None else value(of)
        if number is not None:
            yield "", (at.sources.region,), number

    return read


def _read_source_by(
    part: Callable[[MetricSources], _Source | None], counts: Callable[[_Source], Mapping[str, float]]
) -> Callable[[ScrapeView], Iterator[Sample]]:
    """Read a sample for each name by which a source counts; none if the source is absent."""

    def read(at: ScrapeView) -> Iterator[Sample]:
        of = part(at.sources)
        if of is not None:
            for name, count in counts(of).items():
                yield "", (at.sources.region, name), count

    return read


def _read_loop(value: Callable[[LoopStatus], float]) -> Callable[[ScrapeView], Iterator[Sample]]:
    return _read_source(lambda sources: sources.loop, value)


def _read_front_end(value: Callable[[FrontEndStatus], float]) -> Callable[[ScrapeView], Iterator[Sample]]:
    return _read_source(lambda sources: sources.front_end, value)


def _read_quotas(value: Callable[[Quotas], float]) -> Callable[[ScrapeView], Iterator[Sample]]:
    return _read_source(lambda sources: sources.quotas, value)


def _read_quotas_by(counts: Callable[[Quotas], Mapping[str, int]]) -> Callable[[ScrapeView], Iterator[Sample]]:
    return _read_source_by(lambda sources: sources.quotas, counts)


def _read_state(value: Callable[[StateStatus], float | None]) -> Callable[[ScrapeView], Iterator[Sample]]:
    return _read_source(lambda sources: sources.state, value)


def _read_redis(value: Callable[[RedisStatus], float | None]) -> Callable[[ScrapeView], Iterator[Sample]]:
    return _read_source(lambda sources: sources.redis, value)


def _read_fabric(value: Callable[[FabricStatus], float | None]) -> Callable[[ScrapeView], Iterator[Sample]]:
    return _read_source(lambda sources: sources.fabric, value)


def _read_front_end_reasons(
    counts: Callable[[FrontEndStatus], Mapping[str, int]],
) -> Callable[[ScrapeView], Iterator[Sample]]:
    return _read_source_by(lambda sources: sources.front_end, counts)


def _read_config(value: Callable[[RulesStatus], float | None]) -> Callable[[ScrapeView], Iterator[Sample]]:
    return _read_source(lambda sources: sources.rules, value)


_OWN_RULE = ("region", "domain", "rule")
_PEER = ("region", "peer")

METRICS: tuple[Definition, ...] = (
    Definition(
        "ratelimit_build_info",
        "info",
        ("version", "node", "region"),
        "The running version, and the node it runs as; always 1.",
        lambda at: [("", (__version__, at.sources.node, at.sources.region), 1)],
    ),
    Definition(
        "ratelimit_decisions_total",
        "counter",
        (*_OWN_RULE, "code"),
        "Descriptors decided, by rule and code (OK, OVER_LIMIT); rule is empty where no rule limits the descriptor.",
        _read_decisions,
    ),
    Definition(
        "ratelimit_overflow_decisions_total",
        "counter",
        _OWN_RULE,
        "Descriptors decided by a bucket that new keys of a rule share while there is no room for more.",
        _read_overflow_decisions,
    ),
    Definition(
        "ratelimit_request_errors_total",
        "counter",
        ("region", "reason"),
        "Requests answered with a gRPC error, by reason.",
        _read_source_by(lambda sources: sources, lambda sources: sources.request_errors),
    ),
    Definition(
        "ratelimit_ext_authz_unlimited_total",
        "counter",
        ("region", "reason"),
        "Requests over ext_authz that passed without a limit: of a domain without ext_authz in its rules (no_mapping),"
        " or lacking what its descriptors are made from (no_descriptor).",
        _read_source_by(lambda sources: sources, lambda sources: sources.ext_authz_unlimited),
    ),
    Definition(
        "ratelimit_ignored_overrides_total",
        "counter",
        ("region",),
        "Limits in requests that were not enforced because their unit is unknown; the rule's limit held.",
        lambda at: [("", (at.sources.region,), at.sources.limiter.ignored_overrides)],
    ),
    Definition(
        "ratelimit_snapshots_total",
        "counter",
        ("region", "result"),
        "Snapshots of the buckets that were written, or could not be; absent without `persistence.file`, as are all"
        " metrics of snapshots.",
        _read_source_by(lambda sources: sources.state, lambda state: {"written": state.taken, "failed": state.failed}),
    ),
    Definition(
        "ratelimit_snapshot_timestamp_seconds",
        "gauge",
        ("region",),
        "When the latest snapshot was started, in seconds since the epoch.",
        _read_state(lambda state: None if state.last_us is None else state.last_us / 1e6),
    ),
    Definition(
        "ratelimit_snapshot_buckets",
        "gauge",
        ("region",),
        "Buckets in the latest snapshot.",
        _read_state(lambda state: state.buckets),
    ),
    Definition(
        "ratelimit_snapshot_bytes",
        "gauge",
        ("region",),
        "Size of the latest snapshot.",
        _read_state(lambda state: state.bytes),
    ),
    Definition(
        "ratelimit_redis_buckets_total",
        "counter",
        ("region", "result"),
        "Buckets written to Redis, or that it would not take for a reason of their own; absent without"
        " `persistence.url`, as are all metrics of Redis.",
        _read_source_by(lambda sources: sources.redis, lambda it: {"written": it.written, "refused": it.refused}),
    ),
    Definition(
        "ratelimit_redis_failures_total",
        "counter",
        ("region",),
        "Rounds of writing to Redis, or of reading at the start, that failed.",
        _read_redis(lambda redis: redis.failed),
    ),
    Definition(
        "ratelimit_redis_calls_total",
        "counter",
        ("region",),
        "Calls to Redis that were answered.",
        _read_redis(lambda redis: redis.calls),
    ),
    Definition(
        "ratelimit_redis_call_seconds_total",
        "counter",
        ("region",),
        "Seconds that they took; no request waits for them.",
        _read_redis(lambda redis: redis.call_seconds),
    ),
    Definition(
        "ratelimit_redis_waiting_buckets",
        "gauge",
        ("region",),
        "Buckets whose changes wait to be written to Redis.",
        _read_redis(lambda redis: redis.waiting),
    ),
    Definition(
        "ratelimit_redis_write_timestamp_seconds",
        "gauge",
        ("region",),
        "When the latest complete round of writing to Redis began, in seconds since the epoch.",
        _read_redis(lambda redis: None if redis.last_us is None else redis.last_us / 1e6),
    ),
    Definition(
        "ratelimit_fabric_ticks_total",
        "counter",
        ("region", "result"),
        "Ticks in which own counts were told to the fabric and the others' received, or that failed; absent without"
        " `fabric`, as all metrics whose names begin with ratelimit_fabric.",
        _read_source_by(lambda sources: sources.fabric, lambda it: {"shared": it.ticks, "failed": it.failed}),
    ),
    Definition(
        "ratelimit_fabric_tick_seconds_total",
        "counter",
        ("region",),
        "Seconds that the shared ones took; no request waits for them.",
        _read_fabric(lambda fabric: fabric.call_seconds),
    ),
    Definition(
        "ratelimit_fabric_tick_timestamp_seconds",
        "gauge",
        ("region",),
        "When the latest tick was shared, in seconds since the epoch: what others took later is not known here. Of more"
        " than 1,000 buckets in use, each is shared at some ticks only.",
        _read_fabric(lambda fabric: None if fabric.last_us is None else fabric.last_us / 1e6),
    ),
    Definition(
        "ratelimit_fabric_buckets",
        "gauge",
        ("region",),
        "Buckets in use here, which are shared.",
        _read_fabric(lambda fabric: fabric.buckets),
    ),
    Definition(
        "ratelimit_fabric_gateway",
        "gauge",
        ("region",),
        "1 on the sidecar that speaks for its region, 0 on the others; the sum of a region is to be 1.",
        _read_fabric(lambda fabric: 1 if fabric.token else 0),
    ),
    Definition(
        "ratelimit_fabric_gateway_terms_total",
        "counter",
        ("region",),
        "Times that this sidecar became the gateway.",
        _read_fabric(lambda fabric: fabric.terms),
    ),
    Definition(
        "ratelimit_fabric_gateway_failures_total",
        "counter",
        ("region",),
        "Times that this sidecar could not be the gateway, since it cannot listen on `listen.sync`.",
        _read_fabric(lambda fabric: fabric.gateway_failed),
    ),
    Definition(
        "ratelimit_fabric_unshared_total",
        "counter",
        ("region", "reason"),
        "Changes of buckets that were not shared: `room`, as too many are in use; `gateway_room`, with other regions,"
        " as there are more than the gateway may hold; `redis_room`, as Redis may hold no more of their rule, each time"
        " it is tried; `odd`, as Redis has no bucket there.",
        _read_source_by(
            lambda sources: sources.fabric,
            lambda fabric: {
                "room": fabric.unshared,
                "gateway_room": fabric.gateway_unshared,
                "redis_room": fabric.no_room + fabric.no_room_at_gateway,
                "odd": fabric.odd + fabric.odd_at_gateway,
            },
        ),
    ),
    Definition(
        "ratelimit_fabric_strict_tokens_total",
        "counter",
        ("region", "direction"),
        "Tokens of strict limits that were `drawn` from the region's accounts, and `returned` into them; absent without"
        " `sync.members`, as are the next two.",
        _read_source_by(lambda sources: sources.drawing, lambda it: {"drawn": it.drawn, "returned": it.returned}),
    ),
    Definition(
        "ratelimit_fabric_strict_failures_total",
        "counter",
        ("region",),
        "Calls to the accounts that failed: until one succeeds, strict limits admit what is held here, and then deny.",
        _read_source(lambda sources: sources.drawing, lambda drawing: drawing.failed),
    ),
    Definition(
        "ratelimit_fabric_strict_losses_total",
        "counter",
        ("region",),
        "Times that the server was found to have lost the accounts, or to be another one: strict limits begin empty.",
        _read_source(lambda sources: sources.drawing, lambda drawing: drawing.lineages),
    ),
    Definition(
        "ratelimit_connections",
        "gauge",
        ("region",),
        "Open connections of Envoys and other clients; absent with --frontend grpcio, as are the next five.",
        _read_front_end(lambda front_end: front_end.open_connections),
    ),
    Definition(
        "ratelimit_connections_accepted_total",
        "counter",
        ("region",),
        "Connections of clients since the start.",
        _read_front_end(lambda front_end: front_end.accepted_connections),
    ),
    Definition(
        "ratelimit_accept_failures_total",
        "counter",
        ("region",),
        "Times no connection could be accepted for want of file descriptors or memory.",
        _read_front_end(lambda front_end: front_end.accept_failures),
    ),
    Definition(
        "ratelimit_connections_closed_total",
        "counter",
        ("region", "reason"),
        "Connections ended by this side, by reason: the client broke HTTP/2, flooded, stalled, or a bound was reached.",
        _read_front_end_reasons(lambda front_end: front_end.closed_connections),
    ),
    Definition(
        "ratelimit_calls_refused_total",
        "counter",
        ("region", "reason"),
        "Calls ended before they were complete: body_idle and too_slow by time, shed when others hold too much memory.",
        _read_front_end_reasons(lambda front_end: front_end.refused_calls),
    ),
    Definition(
        "ratelimit_held_bytes",
        "gauge",
        ("region",),
        "Memory held by calls that are not complete, by streaming calls, and by answers that clients let wait.",
        _read_front_end(lambda front_end: front_end.held_bytes),
    ),
    Definition(
        "ratelimit_listener_certificate_not_after_timestamp_seconds",
        "gauge",
        ("region",),
        "When the certificate in force for Envoy's calls ends, since the epoch; absent without listen.tls.",
        _read_certificate(_of_listener, lambda certificate: certificate.not_after_s),
    ),
    Definition(
        "ratelimit_listener_certificate_failed_renewals_total",
        "counter",
        ("region",),
        "Times the files of listen.tls could not be used; those before stay in force.",
        _read_certificate(_of_listener, lambda certificate: certificate.failed_renewals),
    ),
    Definition(
        "ratelimit_config_loads_total",
        "counter",
        ("region", "result"),
        "Times rules were loaded, by result (success, error); an error leaves the old ones.",
        _read_source_by(lambda sources: sources.rules, lambda rules: rules.loads),
    ),
    Definition(
        "ratelimit_config_last_success_timestamp_seconds",
        "gauge",
        ("region",),
        "When the rules in force were loaded, since the epoch; absent before the first come from an xDS server.",
        _read_config(lambda rules: None if rules.last_success_us is None else rules.last_success_us / 1e6),
    ),
    Definition(
        "ratelimit_config_rejected",
        "gauge",
        ("region",),
        "1 while the newest rules could not be used and older ones are in force, otherwise 0.",
        _read_config(lambda rules: rules.rejected is not None),
    ),
    Definition(
        "ratelimit_config_source_up",
        "gauge",
        ("region",),
        "1 while new rules are noticed at once (folders are watched, the xDS server is connected), otherwise 0.",
        _read_config(lambda rules: not rules.degraded_reason),
    ),
    Definition(
        "openclaw_request_latency_seconds",
        "histogram",
        ("region",),
        "Time from a request's message to its answer's, inside this process.",
        _read_latency,
    ),
    Definition(
        "ratelimit_plans_total",
        "counter",
        ("region", "result"),
        "Requests whose plan was in the cache (hit), or had to be made (miss).",
        _read_source_by(
            lambda sources: sources.limiter.plan_counts, lambda plans: {"hit": plans.hits, "miss": plans.misses}
        ),
    ),
    Definition(
        "ratelimit_event_loop_longest_stall_seconds",
        "gauge",
        ("region",),
        "Longest time without an answer in the last one to two minutes; up to 4 ms too low.",
        _read_loop(lambda loop: loop.longest_seconds),
    ),
    Definition(
        "ratelimit_event_loop_stalls_total",
        "counter",
        ("region",),
        "Times that nothing was answered for more than 5 ms.",
        _read_loop(lambda loop: loop.long_stalls),
    ),
    Definition(
        "ratelimit_task_failures_total",
        "counter",
        ("region", "task"),
        "Times a task of the sidecar failed and was restarted: mesh_listener and grpc_listener are ports.",
        _read_source_by(lambda sources: sources.supervision, lambda supervision: supervision.restarts),
    ),
    Definition(
        "ratelimit_log_lines_dropped_total",
        "counter",
        ("region",),
        "Lines dropped because the log was read too slowly or could not be written.",
        _read_source(lambda sources: sources.log, lambda log: log.dropped_lines),
    ),
    Definition(
        "ratelimit_spans_total",
        "counter",
        ("region", "state"),
        "Spans that have ended, were exported, failed, as the collector did not take them, or were dropped, as too many"
        " waited for it. Absent without tracing.",
        _read_source_by(
            lambda sources: sources.spans,
            lambda spans: {
                "ended": spans.ended,
                "exported": spans.exported,
                "failed": spans.failed,
                "dropped": spans.dropped,
            },
        ),
    ),
    Definition(
        "ratelimit_clock_gap_seconds",
        "gauge",
        ("region",),
        "The system clock minus the one that limits go by. From 10 s on it was set, and is not believed yet.",
        _read_source(lambda sources: sources.clock, lambda clock: clock.gap_us / 1e6),
    ),
    Definition(
        "ratelimit_clock_steps_total",
        "counter",
        ("region", "direction"),
        "Times the clock that limits go by followed a set system clock, forward or back.",
        _read_source_by(
            lambda sources: sources.clock,
            lambda clock: {"forward": clock.steps_forward, "back": clock.steps_back},
        ),
    ),
    Definition(
        "openclaw_rate_limit_rejections",
        "unknown",
        _OWN_RULE,
        "Descriptors denied by a rule since start; only rises, and is untyped because of its name.",
        _read_rules(lambda counts: counts.over_limit),
    ),
    Definition(
        "crdt_token_consumed_total",
        "counter",
        _OWN_RULE,
        "Tokens taken on this node; the sum over all nodes is what a limit admitted.",
        _read_rules(lambda counts: counts.tokens),
    ),
    Definition(
        "crdt_token_given_back_total",
        "counter",
        _OWN_RULE,
        "Tokens given back on this node: held and not used, and resets and grants.",
        _read_rules(lambda counts: counts.given_back),
    ),
    Definition(
        "ratelimit_hits_total",
        "counter",
        _OWN_RULE,
        "Hits asked for (total_hits of envoyproxy/ratelimit).",
        _read_rules(lambda counts: counts.total_hits),
    ),
    Definition(
        "ratelimit_within_limit_hits_total",
        "counter",
        _OWN_RULE,
        "Hits admitted (within_limit of envoyproxy/ratelimit).",
        _read_rules(lambda counts: counts.within_limit_hits),
    ),
    Definition(
        "ratelimit_near_limit_hits_total",
        "counter",
        _OWN_RULE,
        "Hits above NEAR_LIMIT_RATIO of the limit and not over it (near_limit of envoyproxy/ratelimit).",
        _read_rules(lambda counts: counts.near_limit_hits),
    ),
    Definition(
        "ratelimit_over_limit_hits_total",
        "counter",
        _OWN_RULE,
        "Hits over the limit (over_limit of envoyproxy/ratelimit).",
        _read_rules(lambda counts: counts.over_limit_hits),
    ),
    Definition(
        "ratelimit_shadow_mode_hits_total",
        "counter",
        _OWN_RULE,
        "Hits over the limit that shadow mode let pass (shadow_mode of envoyproxy/ratelimit).",
        _read_rules(lambda counts: counts.shadow_mode_hits),
    ),
    Definition(
        "ratelimit_bucket_used_ratio",
        "gauge",
        (*_OWN_RULE, "rank"),
        "Used part of the capacity of a rule's fullest buckets, rank 1 to 3, above 1 with debt; absent without buckets."
        " As of the last look at all buckets, every 10 s or, with more than 50,000, more seldom. Not of strict rules.",
        _read_used,
    ),
    Definition(
        "ratelimit_bucket_debt_tokens",
        "gauge",
        _OWN_RULE,
        "Debt of the rule's bucket that owes most, as of the same look.",
        _read_debt,
    ),
    Definition(
        "crdt_buckets",
        "gauge",
        ("region",),
        "Active buckets in memory: not full, or with consumption inside the horizon.",
        lambda at: [("", (at.sources.region,), len(at.sources.limiter.store))],
    ),
    Definition(
        "crdt_buckets_limit",
        "gauge",
        ("region",),
        "The most buckets at once (max_buckets); a rule flooded with new keys gets 8/9 of them.",
        lambda at: [("", (at.sources.region,), at.sources.limiter.store.room.most)],
    ),
    Definition(
        "crdt_slots",
        "gauge",
        ("region",),
        "Slots that token buckets hold, as of the last pass over all, once a minute; 4 times max_buckets at most.",
        lambda at: [("", (at.sources.region,), at.sources.limiter.store.slots)],
    ),
    Definition(
        "crdt_horizon_ratio",
        "gauge",
        ("region",),
        "For what part of their horizon token buckets hold slots: 1, or less where there would be too many.",
        lambda at: [("", (at.sources.region,), 0.5**at.sources.limiter.store.horizon_shift)],
    ),
    Definition(
        "crdt_refused_keys_total",
        "counter",
        ("region",),
        "Deltas of peers dropped because there was no room for a bucket of their key.",
        lambda at: [("", (at.sources.region,), at.sources.limiter.store.refused_keys)],
    ),
    Definition(
        "crdt_buckets_evicted_total",
        "counter",
        ("region",),
        "Idle buckets dropped from memory.",
        lambda at: [("", (at.sources.region,), at.sources.limiter.store.evicted)],
    ),
    Definition(
        "crdt_sync_lag_seconds",
        "gauge",
        _PEER,
        "Age of the oldest delta the peer has not acknowledged, or the lag of the last acknowledged batch.",
        _read_peers(lambda peer: peer.lag_seconds),
    ),
    Definition(
        "crdt_pending_buckets",
        "gauge",
        _PEER,
        "Buckets of which the peer has something yet to be sent.",
        _read_peers(lambda peer: peer.pending_buckets),
    ),
    Definition(
        "crdt_peer_connected",
        "gauge",
        _PEER,
        "1 while a replication stream with the peer is established, otherwise 0.",
        _read_peers(lambda peer: peer.connected),
    ),
    Definition(
        "crdt_peer_info",
        "info",
        (*_PEER, "node", "peer_region", "address", "version", "protocol"),
        "Who the peer is; always 1. The label peer is its node id, or its address until it has been reached.",
        _read_peer_info,
    ),
    Definition(
        "crdt_peer_reconnects_total",
        "counter",
        _PEER,
        "Times the peer came back after it had been lost.",
        _read_peers(lambda peer: peer.reconnects),
    ),
    Definition(
        "crdt_peer_clock_offset_seconds",
        "gauge",
        _PEER,
        "The peer's clock minus this node's; absent before the first measurement.",
        _read_peers(lambda peer: peer.clock_offset_seconds),
    ),
    Definition(
        "crdt_batches_sent_total",
        "counter",
        _PEER,
        "Delta batches sent to the peer.",
        _read_peers(lambda peer: peer.batches_sent),
    ),
    Definition(
        "crdt_batches_received_total",
        "counter",
        _PEER,
        "Delta batches received from the peer and applied.",
        _read_peers(lambda peer: peer.batches_received),
    ),
    Definition(
        "crdt_entries_sent_total",
        "counter",
        _PEER,
        "Slot entries in the batches sent to the peer.",
        _read_peers(lambda peer: peer.entries_sent),
    ),
    Definition(
        "crdt_entries_received_total",
        "counter",
        _PEER,
        "Slot entries in the batches received from the peer.",
        _read_peers(lambda peer: peer.entries_received),
    ),
    Definition(
        "crdt_bytes_sent_total",
        "counter",
        _PEER,
        "Bytes of frames of all kinds sent to the peer, before HTTP/2 and TLS.",
        _read_peers(lambda peer: peer.bytes_sent),
    ),
    Definition(
        "crdt_bytes_received_total",
        "counter",
        _PEER,
        "Bytes of frames of all kinds received from the peer, before HTTP/2 and TLS.",
        _read_peers(lambda peer: peer.bytes_received),
    ),
    Definition(
        "crdt_resyncs_total",
        "counter",
        _PEER,
        "Buckets exchanged with the peer because comparing found that they differ.",
        _read_peers(lambda peer: peer.resyncs),
    ),
    Definition(
        "crdt_peer_rules_match",
        "gauge",
        _PEER,
        "1 while the peer has this node's rules, 0 while others; absent while unknown.",
        _read_peers(lambda peer: peer.rules_match),
    ),
    Definition(
        "crdt_peer_protocol_errors_total",
        "counter",
        (*_PEER, "reason"),
        "Streams of the peer that this node closed because of what came in, by reason.",
        _read_peer_protocol_errors,
    ),
    Definition(
        "crdt_peer_refused_total",
        "counter",
        (*_PEER, "reason"),
        "What the peer told and this node does not believe, by reason: its clock is wrong, its rules are others, or it"
        " lies.",
        _read_peer_refused,
    ),
    Definition(
        "crdt_protocol_errors_total",
        "counter",
        ("region", "reason"),
        "Streams that this node closed because of what came in, unidentified peers included.",
        _read_protocol_errors,
    ),
    Definition(
        "crdt_left_out_buckets_total",
        "counter",
        ("region",),
        "Times a bucket was not sent, kept or compared, since a number in it does not fit into the protocol.",
        lambda at: [("", (at.sources.region,), at.sources.limiter.store.journal.left_out)],
    ),
    Definition(
        "crdt_unknown_keys_total",
        "counter",
        ("region",),
        "Buckets in deltas of peers without a replicated rule here: the nodes' rules differ.",
        _read_unknown_keys,
    ),
    Definition(
        "crdt_mesh_certificate_not_after_timestamp_seconds",
        "gauge",
        ("region",),
        "When this node's certificate in force for the mesh ends, since the epoch; absent without sync.tls.",
        _read_certificate(_of_mesh, lambda certificate: certificate.not_after_s),
    ),
    Definition(
        "crdt_mesh_certificate_failed_renewals_total",
        "counter",
        ("region",),
        "Times the files of sync.tls could not be used; those before stay in force.",
        _read_certificate(_of_mesh, lambda certificate: certificate.failed_renewals),
    ),
    Definition(
        "ratelimit_strict_home_share",
        "gauge",
        ("region",),
        "Part of each strict limit that is this node's home now, 0 to 1; absent without sync.members.",
        _read_membership(lambda membership: membership.home_share),
    ),
    Definition(
        "ratelimit_strict_membership_settled",
        "gauge",
        ("region",),
        "1 while the home share is what sync.members gives; 0 until all members show the epoch, or just after a start.",
        _read_membership(lambda membership: membership.settled),
    ),
    Definition(
        "ratelimit_strict_membership_conflicts",
        "gauge",
        ("region",),
        "Nodes that show other members under the same epoch; while there are any, the smaller share is used.",
        _read_membership(lambda membership: len(membership.conflicts)),
    ),
    Definition(
        "ratelimit_strict_buckets",
        "gauge",
        ("region",),
        "Strict buckets in memory: not full, or lately so.",
        _read_membership(lambda membership: membership.buckets),
    ),
    Definition(
        "ratelimit_strict_payments_total",
        "counter",
        ("region", "direction"),
        "Payments of tokens of strict limits, sent to peers or received from them.",
        _read_payments,
    ),
    Definition(
        "ratelimit_strict_waiting",
        "gauge",
        ("region",),
        "Requests that wait for tokens of other members now; at most 512. Absent without sync.members, as are all of"
        " waits.",
        _read_source(lambda sources: sources.waits, lambda waits: waits.waiting),
    ),
    Definition(
        "ratelimit_strict_waits_total",
        "counter",
        ("region", "outcome"),
        "Waits that are over: `served`, there were tokens; `expired`, its `wait` or the client's timeout was over;"
        " `cancelled` by the client; `ended` by a change of rules or at a stop. All but `cancelled` were then decided.",
        _read_source_by(lambda sources: sources.waits, lambda waits: waits.counts),
    ),
    Definition(
        "ratelimit_strict_wait_seconds_total",
        "counter",
        ("region", "outcome"),
        "How long those waits took, together.",
        _read_source_by(lambda sources: sources.waits, lambda waits: waits.seconds),
    ),
    Definition(
        "ratelimit_strict_waits_refused_total",
        "counter",
        ("region",),
        "Requests that could have waited and were decided at once, because too many others waited.",
        _read_source(lambda sources: sources.waits, lambda waits: waits.crowded),
    ),
    Definition(
        "ratelimit_quota_streams",
        "gauge",
        ("region",),
        "Streams on which Envoys report quotas.",
        _read_quotas(lambda quotas: len(quotas.streams)),
    ),
    Definition(
        "ratelimit_quota_streams_refused_total",
        "counter",
        ("region",),
        "Streams refused since there were too many, of all, of an address or on a connection.",
        _read_source(lambda sources: sources.quota_places, lambda places: places.refused),
    ),
    Definition(
        "ratelimit_quota_buckets",
        "gauge",
        ("region",),
        "Buckets with a quota, each counted once for each Envoy that has it.",
        _read_quotas(lambda quotas: quotas.bucket_count),
    ),
    Definition(
        "ratelimit_quota_reports_total",
        "counter",
        ("region",),
        "Reports of Envoys, each bucket in them counted.",
        _read_quotas(lambda quotas: quotas.counts.reports),
    ),
    Definition(
        "ratelimit_quota_report_errors_total",
        "counter",
        ("region", "reason"),
        "Of these, of buckets that no rule limits (no_rule; Envoy is told to let all pass), for which there was no "
        "room (no_room), with an id of no pairs, too many or too long (bad_id), whose time runs backwards (bad_time).",
        _read_quotas_by(lambda quotas: quotas.counts.errors),
    ),
    Definition(
        "ratelimit_quota_requests_total",
        "counter",
        ("region", "result"),
        "Requests that Envoys have decided by their quotas: allowed, denied. ratelimit_decisions_total and the hits of "
        "each rule have them as well.",
        _read_quotas_by(lambda quotas: quotas.counts.requests),
    ),
    Definition(
        "ratelimit_quota_assignments_total",
        "counter",
        ("region",),
        "Assignments sent to Envoys, also those that only renew one.",
        _read_quotas(lambda quotas: quotas.counts.assignments),
    ),
    Definition(
        "ratelimit_quota_buckets_forgotten_total",
        "counter",
        ("region", "reason"),
        "Buckets without a request for a minute, which Envoy was told to forget (idle), and buckets that an Envoy no "
        "longer reports (silent).",
        _read_quotas_by(lambda quotas: quotas.counts.forgotten),
    ),
)


def create_registry(sources: MetricSources) -> CollectorRegistry:
    """A registry with all metrics of the sidecar, and those of the process and its Python."""
    registry = CollectorRegistry()
    registry.register(SidecarCollector(sources))
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    GCCollector(registry=registry)
    return registry


class SidecarCollector(Collector):
    """The sidecar's own metrics, without those of the process."""

    def __init__(self, sources: MetricSources) -> None:
        self._sources = sources

    def describe(self) -> Iterable[Metric]:
        """The families without samples: the library asks for their names when the collector is registered."""
        return [_family(definition) for definition in METRICS]

    def collect(self) -> Iterator[Metric]:
        """The families of all metrics. A sample is read when it is iterated, so a caller can pause in between."""
        view = _view_of(self._sources)
        for definition in METRICS:
            family = _family(definition)
            # A list by its type; whoever encodes a family only iterates over it.
            family.samples = _Samples(definition, view)  # type: ignore[assignment]
            yield family


class _Samples:
    def __init__(self, definition: Definition, view: ScrapeView) -> None:
        self._definition = definition
        self._view = view

    def __iter__(self) -> Iterator[EncodedSample]:
        name = self._definition.name
        # Only a histogram's buckets have a value for `le`.
        label_names = (*self._definition.labels, "le")
        for suffix, label_values, value, *exemplar in self._definition.read(self._view):
            labels = dict(zip(label_names, label_values, strict=False))
            yield EncodedSample(name + suffix, labels, value, exemplar=exemplar[0] if exemplar else None)


def _family(definition: Definition) -> Metric:
    # prometheus_client names a family without the suffix that OpenMetrics prescribes for the samples of its kind.
    name = definition.name
    if definition.kind == "counter":
        name = name.removesuffix("_total")
    elif definition.kind == "info":
        name = name.removesuffix("_info")
    return Metric(name, definition.help, definition.kind)


def _view_of(sources: MetricSources) -> ScrapeView:
    limiter = sources.limiter
    return ScrapeView(sources, limiter.rules, list(limiter.counts), _by_label(sources.peers()), sources.membership())


def _by_label(peers: Iterable[PeerStatus]) -> dict[str, PeerStatus]:
    labelled: dict[str, PeerStatus] = {}
    for peer in peers:
        label = peer.node or peer.address
        if label in labelled:
            # The same node under an address it had before: two series with equal labels would spoil the scrape.
            label = f"{label}@{peer.address}"
        labelled[label] = peer
    return labelled
