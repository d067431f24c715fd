"""How the samples of each metric are read from its source, at a scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from typing import TypeVar

from prometheus_client.samples import Exemplar

from ratelimit_sidecar.limiter.counts import RuleCounts
from ratelimit_sidecar.limiter.quota import Quotas
from ratelimit_sidecar.mesh_status import MembershipStatus, PeerStatus
from ratelimit_sidecar.telemetry.latency import BOUNDS_NS
from ratelimit_sidecar.telemetry.metric_sources import (
    CertificateStatus,
    FabricStatus,
    FrontEndStatus,
    LoopStatus,
    MetricSources,
    RedisStatus,
    RulesStatus,
    ScrapeView,
    StateStatus,
)

_BUCKET_BOUNDS = (*(str(bound_ns / 1e9) for bound_ns in BOUNDS_NS), "+Inf")

_Source = TypeVar("_Source")

Sample = tuple[str, tuple[str, ...], float] | tuple[str, tuple[str, ...], float, Exemplar]
"""Suffix of the sample's name ("" unless a histogram's), label values, value, and an exemplar if there is one."""


def read_decisions(at: ScrapeView) -> Iterator[Sample]:
    region = at.sources.region
    for domain, rule, counts in at.counts():
        yield "", (region, domain, rule, "OK"), counts.ok
        if rule:
            yield "", (region, domain, rule, "OVER_LIMIT"), counts.over_limit


def read_rules(value: Callable[[RuleCounts], float]) -> Callable[[ScrapeView], Iterator[Sample]]:
    """Read a sample for each rule."""

    def read(at: ScrapeView) -> Iterator[Sample]:
        for domain, rule, counts in at.counts():
            # Descriptors without a rule take no tokens and are never denied.
            if rule:
                yield "", (at.sources.region, domain, rule), value(counts)

    return read


def read_used(at: ScrapeView) -> Iterator[Sample]:
    if at.sources.fullest is not None:
        for (domain, rule), fullest in at.sources.fullest.of_rules.items():
            for rank, used in enumerate(fullest.used, start=1):
                yield "", (at.sources.region, domain, rule, str(rank)), used


def read_debt(at: ScrapeView) -> Iterator[Sample]:
    if at.sources.fullest is not None:
        for (domain, rule), fullest in at.sources.fullest.of_rules.items():
            yield "", (at.sources.region, domain, rule), fullest.debt


def read_peers(value: Callable[[PeerStatus], float | None]) -> Callable[[ScrapeView], Iterator[Sample]]:
    """Read a sample for each peer of which there is a value."""

    def read(at: ScrapeView) -> Iterator[Sample]:
        for label, peer in at.peers.items():
            number = value(peer)
            if number is not None:
                yield "", (at.sources.region, label), number

    return read


def read_latency(at: ScrapeView) -> Iterator[Sample]:
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


def read_peer_info(at: ScrapeView) -> Iterator[Sample]:
    for label, peer in at.peers.items():
        # No protocol is spoken before the peer is reached.
        protocol = str(peer.protocol or "")
        yield "", (at.sources.region, label, peer.node, peer.region, peer.address, peer.version, protocol), 1


def read_peer_protocol_errors(at: ScrapeView) -> Iterator[Sample]:
    for label, peer in at.peers.items():
        for reason, count in peer.protocol_errors.items():
            yield "", (at.sources.region, label, reason), count


def read_peer_refused(at: ScrapeView) -> Iterator[Sample]:
    for label, peer in at.peers.items():
        for reason, count in peer.refused.items():
            yield "", (at.sources.region, label, reason), count


def read_protocol_errors(at: ScrapeView) -> Iterator[Sample]:
    if at.sources.replication is not None:
        for reason, count in at.sources.replication.protocol_errors.items():
            yield "", (at.sources.region, reason), count


def read_unknown_keys(at: ScrapeView) -> Iterator[Sample]:
    if at.sources.replication is not None:
        yield "", (at.sources.region,), at.sources.replication.unknown_keys


def mesh_certificate(sources: MetricSources) -> CertificateStatus | None:
    return None if sources.replication is None else sources.replication.certificate


def listener_certificate(sources: MetricSources) -> CertificateStatus | None:
    return sources.listener_certificate


def read_certificate(
    of: Callable[[MetricSources], CertificateStatus | None], value: Callable[[CertificateStatus], float | None]
) -> Callable[[ScrapeView], Iterator[Sample]]:
    """Read one sample from a certificate; none in plain text, or without a value."""

    def read(at: ScrapeView) -> Iterator[Sample]:
        certificate = of(at.sources)
        number = None if certificate is None else value(certificate)
        if number is not None:
            yield "", (at.sources.region,), number

    return read


def read_overflow_decisions(at: ScrapeView) -> Iterator[Sample]:
    region, decisions = at.sources.region, at.sources.limiter.overflow_decisions
    for names in at.rules.names:
        yield "", (region, *names), decisions.get(names, 0)
    for names in list(decisions):
        if names not in at.rules.names:
            yield "", (region, *names), decisions[names]


def read_membership(value: Callable[[MembershipStatus], float]) -> Callable[[ScrapeView], Iterator[Sample]]:
    """Read one sample from the membership of strict limits; none if no limit is strict."""

    def read(at: ScrapeView) -> Iterator[Sample]:
        if at.membership is not None:
            yield "", (at.sources.region,), value(at.membership)

    return read


def read_payments(at: ScrapeView) -> Iterator[Sample]:
    if at.membership is not None:
        yield "", (at.sources.region, "sent"), at.membership.payments_sent
        yield "", (at.sources.region, "received"), at.membership.payments_received


def read_source(
    part: Callable[[MetricSources], _Source | None], value: Callable[[_Source], float | None]
) -> Callable[[ScrapeView], Iterator[Sample]]:
    """Read one sample from a source; none if the source is absent or has no value."""

    def read(at: ScrapeView) -> Iterator[Sample]:
        of = part(at.sources)
        number = None if of is None else value(of)
        if number is not None:
            yield "", (at.sources.region,), number

    return read


def read_source_by(
    part: Callable[[MetricSources], _Source | None], counts: Callable[[_Source], Mapping[str, float]]
) -> Callable[[ScrapeView], Iterator[Sample]]:
    """Read a sample for each name by which a source counts; none if the source is absent."""

    def read(at: ScrapeView) -> Iterator[Sample]:
        of = part(at.sources)
        if of is not None:
            for name, count in counts(of).items():
                yield "", (at.sources.region, name), count

    return read


def read_loop(value: Callable[[LoopStatus], float]) -> Callable[[ScrapeView], Iterator[Sample]]:
    return read_source(lambda sources: sources.loop, value)


def read_front_end(value: Callable[[FrontEndStatus], float]) -> Callable[[ScrapeView], Iterator[Sample]]:
    return read_source(lambda sources: sources.front_end, value)


def read_quotas(value: Callable[[Quotas], float]) -> Callable[[ScrapeView], Iterator[Sample]]:
    return read_source(lambda sources: sources.quotas, value)


def read_quotas_by(counts: Callable[[Quotas], Mapping[str, int]]) -> Callable[[ScrapeView], Iterator[Sample]]:
    return read_source_by(lambda sources: sources.quotas, counts)


def read_state(value: Callable[[StateStatus], float | None]) -> Callable[[ScrapeView], Iterator[Sample]]:
    return read_source(lambda sources: sources.state, value)


def read_redis(value: Callable[[RedisStatus], float | None]) -> Callable[[ScrapeView], Iterator[Sample]]:
    return read_source(lambda sources: sources.redis, value)


def read_fabric(value: Callable[[FabricStatus], float | None]) -> Callable[[ScrapeView], Iterator[Sample]]:
    return read_source(lambda sources: sources.fabric, value)


def read_front_end_reasons(
    counts: Callable[[FrontEndStatus], Mapping[str, int]],
) -> Callable[[ScrapeView], Iterator[Sample]]:
    return read_source_by(lambda sources: sources.front_end, counts)


def read_config(value: Callable[[RulesStatus], float | None]) -> Callable[[ScrapeView], Iterator[Sample]]:
    return read_source(lambda sources: sources.rules, value)
