"""What metrics are read from: the parts of the sidecar that count, and what one scrape shows of them.

A part that is above this layer, or beside it, is known by the counters that are read of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ratelimit_sidecar.crdt.wait_queues import WaitQueues
from ratelimit_sidecar.limiter.counts import RuleCounts
from ratelimit_sidecar.limiter.fullest import Fullest
from ratelimit_sidecar.limiter.limiter import Limiter
from ratelimit_sidecar.limiter.quota import Quotas
from ratelimit_sidecar.limiter.rules import Rules
from ratelimit_sidecar.mesh_status import MembershipStatus, PeerStatus
from ratelimit_sidecar.telemetry.latency import LatencyHistogram

_ZEROS = RuleCounts()


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
    """What is read of the front end (`ratelimit_sidecar.server.grpc_front_end.GrpcFrontEnd`, a layer above)."""

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
    """What is read of places (`server.budget.Places`, `console.proxies.ProxyPlaces`, layers above)."""

    @property
    def refused(self) -> int: ...


class StateStatus(Protocol):
    """What is read of the snapshots (`ratelimit_sidecar.persistence.snapshot_file.SnapshotStatus`, a layer above)."""

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
        proxies: None without ext_authz over HTTP.
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
    proxies: PlacesStatus | None = None
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


def view_of(sources: MetricSources) -> ScrapeView:
    """What a scrape shows that begins now."""
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
