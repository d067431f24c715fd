"""Every metric of the sidecar, in one table: name, type, labels, help, and how it is read.

Nothing is counted here. At a scrape the collector reads the counters that other parts have anyway, sample by sample, so
metrics cost the request path nothing. `docs/reference/metrics.md` is generated from the same table. Label values come
from the configuration, the mesh and fixed lists, never from a request. So the number of series is bounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from ratelimit_sidecar import __version__
from ratelimit_sidecar.telemetry.metric_readers import (
    Sample,
    listener_certificate,
    mesh_certificate,
    read_certificate,
    read_config,
    read_debt,
    read_decisions,
    read_fabric,
    read_front_end,
    read_front_end_reasons,
    read_latency,
    read_loop,
    read_membership,
    read_overflow_decisions,
    read_payments,
    read_peer_info,
    read_peer_protocol_errors,
    read_peer_refused,
    read_peers,
    read_protocol_errors,
    read_quotas,
    read_quotas_by,
    read_redis,
    read_rules,
    read_source,
    read_source_by,
    read_state,
    read_unknown_keys,
    read_used,
)
from ratelimit_sidecar.telemetry.metric_sources import ScrapeView

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
        read_decisions,
    ),
    Definition(
        "ratelimit_overflow_decisions_total",
        "counter",
        _OWN_RULE,
        "Descriptors decided by a bucket that new keys of a rule share while there is no room for more.",
        read_overflow_decisions,
    ),
    Definition(
        "ratelimit_request_errors_total",
        "counter",
        ("region", "reason"),
        "Requests answered with a gRPC error, by reason.",
        read_source_by(lambda sources: sources, lambda sources: sources.request_errors),
    ),
    Definition(
        "ratelimit_ext_authz_unlimited_total",
        "counter",
        ("region", "reason"),
        "Requests over ext_authz that passed without a limit: of a domain without ext_authz in its rules (no_mapping),"
        " or lacking what its descriptors are made from (no_descriptor).",
        read_source_by(lambda sources: sources, lambda sources: sources.ext_authz_unlimited),
    ),
    Definition(
        "ratelimit_ext_authz_http_connections_refused_total",
        "counter",
        ("region",),
        "Connections to listen.ext_authz_http closed at once since there were too many, of all or of an address.",
        read_source(lambda sources: sources.proxies, lambda places: places.refused),
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
        read_source_by(lambda sources: sources.state, lambda state: {"written": state.taken, "failed": state.failed}),
    ),
    Definition(
        "ratelimit_snapshot_timestamp_seconds",
        "gauge",
        ("region",),
        "When the latest snapshot was started, in seconds since the epoch.",
        read_state(lambda state: None if state.last_us is None else state.last_us / 1e6),
    ),
    Definition(
        "ratelimit_snapshot_buckets",
        "gauge",
        ("region",),
        "Buckets in the latest snapshot.",
        read_state(lambda state: state.buckets),
    ),
    Definition(
        "ratelimit_snapshot_bytes",
        "gauge",
        ("region",),
        "Size of the latest snapshot.",
        read_state(lambda state: state.bytes),
    ),
    Definition(
        "ratelimit_redis_buckets_total",
        "counter",
        ("region", "result"),
        "Buckets written to Redis, or that it would not take for a reason of their own; absent without"
        " `persistence.url`, as are all metrics of Redis.",
        read_source_by(lambda sources: sources.redis, lambda it: {"written": it.written, "refused": it.refused}),
    ),
    Definition(
        "ratelimit_redis_failures_total",
        "counter",
        ("region",),
        "Rounds of writing to Redis, or of reading at the start, that failed.",
        read_redis(lambda redis: redis.failed),
    ),
    Definition(
        "ratelimit_redis_calls_total",
        "counter",
        ("region",),
        "Calls to Redis that were answered.",
        read_redis(lambda redis: redis.calls),
    ),
    Definition(
        "ratelimit_redis_call_seconds_total",
        "counter",
        ("region",),
        "Seconds that they took; no request waits for them.",
        read_redis(lambda redis: redis.call_seconds),
    ),
    Definition(
        "ratelimit_redis_waiting_buckets",
        "gauge",
        ("region",),
        "Buckets whose changes wait to be written to Redis.",
        read_redis(lambda redis: redis.waiting),
    ),
    Definition(
        "ratelimit_redis_write_timestamp_seconds",
        "gauge",
        ("region",),
        "When the latest complete round of writing to Redis began, in seconds since the epoch.",
        read_redis(lambda redis: None if redis.last_us is None else redis.last_us / 1e6),
    ),
    Definition(
        "ratelimit_fabric_ticks_total",
        "counter",
        ("region", "result"),
        "Ticks in which own counts were told to the fabric and the others' received, or that failed; absent without"
        " `fabric`, as all metrics whose names begin with ratelimit_fabric.",
        read_source_by(lambda sources: sources.fabric, lambda it: {"shared": it.ticks, "failed": it.failed}),
    ),
    Definition(
        "ratelimit_fabric_tick_seconds_total",
        "counter",
        ("region",),
        "Seconds that the shared ones took; no request waits for them.",
        read_fabric(lambda fabric: fabric.call_seconds),
    ),
    Definition(
        "ratelimit_fabric_tick_timestamp_seconds",
        "gauge",
        ("region",),
        "When the latest tick was shared, in seconds since the epoch: what others took later is not known here. Of more"
        " than 1,000 buckets in use, each is shared at some ticks only.",
        read_fabric(lambda fabric: None if fabric.last_us is None else fabric.last_us / 1e6),
    ),
    Definition(
        "ratelimit_fabric_buckets",
        "gauge",
        ("region",),
        "Buckets in use here, which are shared.",
        read_fabric(lambda fabric: fabric.buckets),
    ),
    Definition(
        "ratelimit_fabric_gateway",
        "gauge",
        ("region",),
        "1 on the sidecar that speaks for its region, 0 on the others; the sum of a region is to be 1.",
        read_fabric(lambda fabric: 1 if fabric.token else 0),
    ),
    Definition(
        "ratelimit_fabric_gateway_terms_total",
        "counter",
        ("region",),
        "Times that this sidecar became the gateway.",
        read_fabric(lambda fabric: fabric.terms),
    ),
    Definition(
        "ratelimit_fabric_gateway_failures_total",
        "counter",
        ("region",),
        "Times that this sidecar could not be the gateway, since it cannot listen on `listen.sync`.",
        read_fabric(lambda fabric: fabric.gateway_failed),
    ),
    Definition(
        "ratelimit_fabric_unshared_total",
        "counter",
        ("region", "reason"),
        "Changes of buckets that were not shared: `room`, as too many are in use, or what others took has no room here;"
        " `gateway_room`, with other regions, as there is more than the gateway may hold; `redis_room`, as Redis may"
        " hold no more of their rule, each time it is tried; `odd`, as Redis has no bucket there.",
        read_source_by(
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
        read_source_by(lambda sources: sources.drawing, lambda it: {"drawn": it.drawn, "returned": it.returned}),
    ),
    Definition(
        "ratelimit_fabric_strict_failures_total",
        "counter",
        ("region",),
        "Calls to the accounts that failed: until one succeeds, strict limits admit what is held here, and then deny.",
        read_source(lambda sources: sources.drawing, lambda drawing: drawing.failed),
    ),
    Definition(
        "ratelimit_fabric_strict_losses_total",
        "counter",
        ("region",),
        "Times that the server was found to have lost the accounts, or to be another one: strict limits begin empty.",
        read_source(lambda sources: sources.drawing, lambda drawing: drawing.lineages),
    ),
    Definition(
        "ratelimit_connections",
        "gauge",
        ("region",),
        "Open connections of Envoys and other clients; absent with --frontend grpcio, as are the next five.",
        read_front_end(lambda front_end: front_end.open_connections),
    ),
    Definition(
        "ratelimit_connections_accepted_total",
        "counter",
        ("region",),
        "Connections of clients since the start.",
        read_front_end(lambda front_end: front_end.accepted_connections),
    ),
    Definition(
        "ratelimit_accept_failures_total",
        "counter",
        ("region",),
        "Times no connection could be accepted for want of file descriptors or memory.",
        read_front_end(lambda front_end: front_end.accept_failures),
    ),
    Definition(
        "ratelimit_connections_closed_total",
        "counter",
        ("region", "reason"),
        "Connections ended by this side, by reason: the client broke HTTP/2, flooded, stalled, or a bound was reached.",
        read_front_end_reasons(lambda front_end: front_end.closed_connections),
    ),
    Definition(
        "ratelimit_calls_refused_total",
        "counter",
        ("region", "reason"),
        "Calls ended before they were complete: body_idle and too_slow by time, shed when others hold too much memory.",
        read_front_end_reasons(lambda front_end: front_end.refused_calls),
    ),
    Definition(
        "ratelimit_held_bytes",
        "gauge",
        ("region",),
        "Memory held by calls that are not complete, by streaming calls, and by answers that clients let wait.",
        read_front_end(lambda front_end: front_end.held_bytes),
    ),
    Definition(
        "ratelimit_listener_certificate_not_after_timestamp_seconds",
        "gauge",
        ("region",),
        "When the certificate in force for Envoy's calls ends, since the epoch; absent without listen.tls.",
        read_certificate(listener_certificate, lambda certificate: certificate.not_after_s),
    ),
    Definition(
        "ratelimit_listener_certificate_failed_renewals_total",
        "counter",
        ("region",),
        "Times the files of listen.tls could not be used; those before stay in force.",
        read_certificate(listener_certificate, lambda certificate: certificate.failed_renewals),
    ),
    Definition(
        "ratelimit_config_loads_total",
        "counter",
        ("region", "result"),
        "Times rules were loaded, by result (success, error); an error leaves the old ones.",
        read_source_by(lambda sources: sources.rules, lambda rules: rules.loads),
    ),
    Definition(
        "ratelimit_config_last_success_timestamp_seconds",
        "gauge",
        ("region",),
        "When the rules in force were loaded, since the epoch; absent before the first come from an xDS server.",
        read_config(lambda rules: None if rules.last_success_us is None else rules.last_success_us / 1e6),
    ),
    Definition(
        "ratelimit_config_rejected",
        "gauge",
        ("region",),
        "1 while the newest rules could not be used and older ones are in force, otherwise 0.",
        read_config(lambda rules: rules.rejected is not None),
    ),
    Definition(
        "ratelimit_config_source_up",
        "gauge",
        ("region",),
        "1 while new rules are noticed at once (folders are watched, the xDS server is connected), otherwise 0.",
        read_config(lambda rules: not rules.degraded_reason),
    ),
    Definition(
        "openclaw_request_latency_seconds",
        "histogram",
        ("region",),
        "Time from a request's message to its answer's, inside this process.",
        read_latency,
    ),
    Definition(
        "ratelimit_plans_total",
        "counter",
        ("region", "result"),
        "Requests whose plan was in the cache (hit), or had to be made (miss).",
        read_source_by(
            lambda sources: sources.limiter.plan_counts, lambda plans: {"hit": plans.hits, "miss": plans.misses}
        ),
    ),
    Definition(
        "ratelimit_event_loop_longest_stall_seconds",
        "gauge",
        ("region",),
        "Longest time without an answer in the last one to two minutes; up to 4 ms too low.",
        read_loop(lambda loop: loop.longest_seconds),
    ),
    Definition(
        "ratelimit_event_loop_stalls_total",
        "counter",
        ("region",),
        "Times that nothing was answered for more than 5 ms.",
        read_loop(lambda loop: loop.long_stalls),
    ),
    Definition(
        "ratelimit_task_failures_total",
        "counter",
        ("region", "task"),
        "Times a task of the sidecar failed and was restarted: mesh_listener and grpc_listener are ports.",
        read_source_by(lambda sources: sources.supervision, lambda supervision: supervision.restarts),
    ),
    Definition(
        "ratelimit_log_lines_dropped_total",
        "counter",
        ("region",),
        "Lines dropped because the log was read too slowly or could not be written.",
        read_source(lambda sources: sources.log, lambda log: log.dropped_lines),
    ),
    Definition(
        "ratelimit_spans_total",
        "counter",
        ("region", "state"),
        "Spans that have ended, were exported, failed, as the collector did not take them, or were dropped, as too many"
        " waited for it. Absent without tracing.",
        read_source_by(
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
        read_source(lambda sources: sources.clock, lambda clock: clock.gap_us / 1e6),
    ),
    Definition(
        "ratelimit_clock_steps_total",
        "counter",
        ("region", "direction"),
        "Times the clock that limits go by followed a set system clock, forward or back.",
        read_source_by(
            lambda sources: sources.clock,
            lambda clock: {"forward": clock.steps_forward, "back": clock.steps_back},
        ),
    ),
    Definition(
        "openclaw_rate_limit_rejections",
        "unknown",
        _OWN_RULE,
        "Descriptors denied by a rule since start; untyped, since OpenMetrics wants counters to end in `_total`.",
        read_rules(lambda counts: counts.over_limit),
    ),
    Definition(
        "crdt_token_consumed_total",
        "counter",
        _OWN_RULE,
        "Tokens taken on this node; the sum over all nodes is what a limit admitted.",
        read_rules(lambda counts: counts.tokens),
    ),
    Definition(
        "crdt_token_given_back_total",
        "counter",
        _OWN_RULE,
        "Tokens given back on this node: held and not used, and resets and grants.",
        read_rules(lambda counts: counts.given_back),
    ),
    Definition(
        "ratelimit_hits_total",
        "counter",
        _OWN_RULE,
        "Hits asked for (total_hits of envoyproxy/ratelimit).",
        read_rules(lambda counts: counts.total_hits),
    ),
    Definition(
        "ratelimit_within_limit_hits_total",
        "counter",
        _OWN_RULE,
        "Hits admitted (within_limit of envoyproxy/ratelimit).",
        read_rules(lambda counts: counts.within_limit_hits),
    ),
    Definition(
        "ratelimit_near_limit_hits_total",
        "counter",
        _OWN_RULE,
        "Hits above NEAR_LIMIT_RATIO of the limit and not over it (near_limit of envoyproxy/ratelimit).",
        read_rules(lambda counts: counts.near_limit_hits),
    ),
    Definition(
        "ratelimit_over_limit_hits_total",
        "counter",
        _OWN_RULE,
        "Hits over the limit (over_limit of envoyproxy/ratelimit).",
        read_rules(lambda counts: counts.over_limit_hits),
    ),
    Definition(
        "ratelimit_shadow_mode_hits_total",
        "counter",
        _OWN_RULE,
        "Hits over the limit that shadow mode let pass (shadow_mode of envoyproxy/ratelimit).",
        read_rules(lambda counts: counts.shadow_mode_hits),
    ),
    Definition(
        "ratelimit_bucket_used_ratio",
        "gauge",
        (*_OWN_RULE, "rank"),
        "Used part of the capacity of a rule's fullest buckets, rank 1 to 3, above 1 with debt; absent without buckets."
        " As of the last look at all buckets, every 10 s or, with more than 50,000, more seldom. Not of strict rules.",
        read_used,
    ),
    Definition(
        "ratelimit_bucket_debt_tokens",
        "gauge",
        _OWN_RULE,
        "Debt of the rule's bucket that owes most, as of the same look.",
        read_debt,
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
        lambda at: [("", (at.sources.region,), at.sources.limiter.store.places.max_buckets)],
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
        lambda at: [("", (at.sources.region,), 0.5**at.sources.limiter.store.journal.horizon_shift)],
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
        lambda at: [("", (at.sources.region,), at.sources.limiter.store.removals)],
    ),
    Definition(
        "crdt_sync_lag_seconds",
        "gauge",
        _PEER,
        "Age of the oldest delta the peer has not acknowledged, or the lag of the last acknowledged batch.",
        read_peers(lambda peer: peer.lag_seconds),
    ),
    Definition(
        "crdt_pending_buckets",
        "gauge",
        _PEER,
        "Buckets of which the peer has something yet to be sent.",
        read_peers(lambda peer: peer.pending_buckets),
    ),
    Definition(
        "crdt_peer_connected",
        "gauge",
        _PEER,
        "1 while a replication stream with the peer is established, otherwise 0.",
        read_peers(lambda peer: peer.connected),
    ),
    Definition(
        "crdt_peer_info",
        "info",
        (*_PEER, "node", "peer_region", "address", "version", "protocol"),
        "Who the peer is; always 1. The label peer is its node id, or its address until it has been reached.",
        read_peer_info,
    ),
    Definition(
        "crdt_peer_reconnects_total",
        "counter",
        _PEER,
        "Times the peer came back after it had been lost.",
        read_peers(lambda peer: peer.reconnects),
    ),
    Definition(
        "crdt_peer_clock_offset_seconds",
        "gauge",
        _PEER,
        "The peer's clock minus this node's; absent before the first measurement.",
        read_peers(lambda peer: peer.clock_offset_seconds),
    ),
    Definition(
        "crdt_batches_sent_total",
        "counter",
        _PEER,
        "Delta batches sent to the peer.",
        read_peers(lambda peer: peer.batches_sent),
    ),
    Definition(
        "crdt_batches_received_total",
        "counter",
        _PEER,
        "Delta batches received from the peer and applied.",
        read_peers(lambda peer: peer.batches_received),
    ),
    Definition(
        "crdt_entries_sent_total",
        "counter",
        _PEER,
        "Slot entries in the batches sent to the peer.",
        read_peers(lambda peer: peer.entries_sent),
    ),
    Definition(
        "crdt_entries_received_total",
        "counter",
        _PEER,
        "Slot entries in the batches received from the peer.",
        read_peers(lambda peer: peer.entries_received),
    ),
    Definition(
        "crdt_bytes_sent_total",
        "counter",
        _PEER,
        "Bytes of frames of all kinds sent to the peer, before HTTP/2 and TLS.",
        read_peers(lambda peer: peer.bytes_sent),
    ),
    Definition(
        "crdt_bytes_received_total",
        "counter",
        _PEER,
        "Bytes of frames of all kinds received from the peer, before HTTP/2 and TLS.",
        read_peers(lambda peer: peer.bytes_received),
    ),
    Definition(
        "crdt_resyncs_total",
        "counter",
        _PEER,
        "Buckets exchanged with the peer because comparing found that they differ.",
        read_peers(lambda peer: peer.resyncs),
    ),
    Definition(
        "crdt_peer_rules_match",
        "gauge",
        _PEER,
        "1 while the peer has this node's rules, 0 while others; absent while unknown.",
        read_peers(lambda peer: peer.rules_match),
    ),
    Definition(
        "crdt_peer_protocol_errors_total",
        "counter",
        (*_PEER, "reason"),
        "Streams of the peer that this node closed because of what came in, by reason.",
        read_peer_protocol_errors,
    ),
    Definition(
        "crdt_peer_refused_total",
        "counter",
        (*_PEER, "reason"),
        "What the peer told and this node does not believe, by reason: its clock is wrong, its rules are others, or it"
        " lies.",
        read_peer_refused,
    ),
    Definition(
        "crdt_protocol_errors_total",
        "counter",
        ("region", "reason"),
        "Streams that this node closed because of what came in, unidentified peers included.",
        read_protocol_errors,
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
        "Buckets that peers tell or ask of, without a replicated rule (the nodes' rules differ) or room here.",
        read_unknown_keys,
    ),
    Definition(
        "crdt_mesh_certificate_not_after_timestamp_seconds",
        "gauge",
        ("region",),
        "When this node's certificate in force for the mesh ends, since the epoch; absent without sync.tls.",
        read_certificate(mesh_certificate, lambda certificate: certificate.not_after_s),
    ),
    Definition(
        "crdt_mesh_certificate_failed_renewals_total",
        "counter",
        ("region",),
        "Times the files of sync.tls could not be used; those before stay in force.",
        read_certificate(mesh_certificate, lambda certificate: certificate.failed_renewals),
    ),
    Definition(
        "ratelimit_strict_home_share",
        "gauge",
        ("region",),
        "Part of each strict limit that is this node's home now, 0 to 1; absent without sync.members.",
        read_membership(lambda membership: membership.home_share),
    ),
    Definition(
        "ratelimit_strict_membership_settled",
        "gauge",
        ("region",),
        "1 while the home share is what sync.members gives; 0 until all members show the epoch, or just after a start.",
        read_membership(lambda membership: membership.settled),
    ),
    Definition(
        "ratelimit_strict_membership_conflicts",
        "gauge",
        ("region",),
        "Nodes that show other members under the same epoch; while there are any, the smaller share is used.",
        read_membership(lambda membership: len(membership.conflicts)),
    ),
    Definition(
        "ratelimit_strict_buckets",
        "gauge",
        ("region",),
        "Strict buckets in memory: not full, or lately so.",
        read_membership(lambda membership: membership.buckets),
    ),
    Definition(
        "ratelimit_strict_payments_total",
        "counter",
        ("region", "direction"),
        "Payments of tokens of strict limits, sent to peers or received from them.",
        read_payments,
    ),
    Definition(
        "ratelimit_strict_waiting",
        "gauge",
        ("region",),
        "Requests that wait for tokens of other members now; at most 512. Absent without sync.members, as are all of"
        " waits.",
        read_source(lambda sources: sources.waits, lambda waits: waits.waiting),
    ),
    Definition(
        "ratelimit_strict_waits_total",
        "counter",
        ("region", "outcome"),
        "Waits that are over: `served`, there were tokens; `expired`, its `wait` or the client's timeout was over;"
        " `cancelled` by the client; `ended` by new rules, a stop or want of room. All but `cancelled` are decided.",
        read_source_by(lambda sources: sources.waits, lambda waits: waits.counts),
    ),
    Definition(
        "ratelimit_strict_wait_seconds_total",
        "counter",
        ("region", "outcome"),
        "How long those waits took, together.",
        read_source_by(lambda sources: sources.waits, lambda waits: waits.seconds),
    ),
    Definition(
        "ratelimit_strict_waits_refused_total",
        "counter",
        ("region",),
        "Requests that could have waited and were decided at once, because too many others waited.",
        read_source(lambda sources: sources.waits, lambda waits: waits.crowded),
    ),
    Definition(
        "ratelimit_quota_streams",
        "gauge",
        ("region",),
        "Streams on which Envoys report quotas.",
        read_quotas(lambda quotas: len(quotas.streams)),
    ),
    Definition(
        "ratelimit_quota_streams_refused_total",
        "counter",
        ("region",),
        "Streams refused since there were too many, of all, of an address or on a connection.",
        read_source(lambda sources: sources.quota_places, lambda places: places.refused),
    ),
    Definition(
        "ratelimit_quota_buckets",
        "gauge",
        ("region",),
        "Buckets with a quota, each counted once for each Envoy that has it.",
        read_quotas(lambda quotas: quotas.bucket_count),
    ),
    Definition(
        "ratelimit_quota_reports_total",
        "counter",
        ("region",),
        "Reports of Envoys, each bucket in them counted.",
        read_quotas(lambda quotas: quotas.counts.reports),
    ),
    Definition(
        "ratelimit_quota_report_errors_total",
        "counter",
        ("region", "reason"),
        "Of these, of buckets that no rule limits (no_rule; Envoy is told to let all pass), for which there was no "
        "room (no_room), with an id of no pairs, too many or too long (bad_id), whose time runs backwards (bad_time); "
        "and streams that ended because what came was no report (invalid).",
        read_quotas_by(lambda quotas: quotas.counts.errors),
    ),
    Definition(
        "ratelimit_quota_requests_total",
        "counter",
        ("region", "result"),
        "Requests that Envoys have decided by their quotas: allowed, denied. ratelimit_decisions_total and the hits of "
        "each rule have them as well.",
        read_quotas_by(lambda quotas: quotas.counts.requests),
    ),
    Definition(
        "ratelimit_quota_assignments_total",
        "counter",
        ("region",),
        "Assignments sent to Envoys, also those that only renew one.",
        read_quotas(lambda quotas: quotas.counts.assignments),
    ),
    Definition(
        "ratelimit_quota_buckets_forgotten_total",
        "counter",
        ("region", "reason"),
        "Buckets without a request for a minute, which Envoy was told to forget (idle), and buckets that an Envoy no "
        "longer reports (silent).",
        read_quotas_by(lambda quotas: quotas.counts.forgotten),
    ),
)
