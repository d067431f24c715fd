"""The dashboards, as code: `python deploy/grafana/generate.py` writes dashboards/*.json, which Grafana reads.

All that is shown stands in `DASHBOARDS`. `$region`, `$domain` and `$rule` are what the reader has chosen above, any
number of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from grafana_foundation_sdk.builders import bargauge, common, dashboard, heatmap, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

FOLDER: Final = Path(__file__).parent / "dashboards"

SOURCE: Final = models.DataSourceRef(type_val="prometheus", uid="$datasource")
HEIGHT: Final = 8
WIDTH: Final = 24
"""Of a row, in Grafana's grid."""

RULES: Final = 'region=~"$region", domain=~"$domain", rule=~"$rule"'
REGIONS: Final = 'region=~"$region"'


@dataclass(frozen=True)
class Panel:
    """One panel of a dashboard: what it shows, and how.

    Args:
        kind: time, number, heat, bars, or matrix: of the last values of one query, by region and peer.
        unit: as Grafana names them.
        queries: expression and legend.
    """

    title: str
    description: str
    unit: str
    queries: Sequence[tuple[str, str]]
    kind: str = "time"
    is_signed: bool = False


def by_region(title: str, description: str, unit: str, expression: str) -> Panel:
    return Panel(title, description, unit, [(expression, "{{region}}")])


def by_rule(title: str, description: str, unit: str, expression: str) -> Panel:
    return Panel(title, description, unit, [(expression, "{{domain}} {{rule}}")])


def by_peer(title: str, description: str, unit: str, expression: str) -> Panel:
    return Panel(title, description, unit, [(expression, "{{region}} to {{peer}}")])


Row = tuple[str, Sequence[Panel]]

OVERVIEW: Final[Sequence[Row]] = [
    (
        "Now",
        [
            Panel(
                "Sidecars up",
                "Of those that Prometheus knows.",
                "none",
                [(f'sum by (region) (up{{job="ratelimit-sidecar", {REGIONS}}})', "{{region}}")],
                "number",
            ),
            Panel(
                "Decisions a second",
                "Descriptors decided; a request may have several.",
                "ops",
                [(f"sum by (region) (rate(ratelimit_decisions_total{{{REGIONS}}}[$__rate_interval]))", "{{region}}")],
                "number",
            ),
            Panel(
                "Alerts",
                "Those that fire, and those that will unless it gets better.",
                "none",
                [
                    (
                        'count by (alertname, alertstate) (ALERTS{alertname=~"RateLimit.+"})',
                        "{{alertname}} {{alertstate}}",
                    )
                ],
                "number",
            ),
        ],
    ),
    (
        "Traffic",
        [
            Panel(
                "Decisions",
                "By region and answer.",
                "ops",
                [
                    (
                        "sum by (region, code)"
                        f' (rate(ratelimit_decisions_total{{{REGIONS}, domain=~"$domain|"}}[$__rate_interval]))',
                        "{{region}} {{code}}",
                    )
                ],
            ),
            by_region(
                "Rejections",
                "Part of all decisions. Alerts begin at 0.5 % of an hour and 1 % of five minutes.",
                "percentunit",
                f'sum by (region) (rate(ratelimit_decisions_total{{{REGIONS}, code="OVER_LIMIT"}}[$__rate_interval]))'
                f" / sum by (region) (rate(ratelimit_decisions_total{{{REGIONS}}}[$__rate_interval]))",
            ),
            by_region(
                "Tokens taken",
                "All regions together admit what the limits allow.",
                "ops",
                f"sum by (region) (rate(crdt_token_consumed_total{{{RULES}}}[$__rate_interval]))",
            ),
        ],
    ),
    (
        "Latency",
        [
            Panel(
                "Time to decide",
                "Inside the sidecar, from a request's message to its answer's.",
                "s",
                [
                    (
                        "sum by (le) (increase(openclaw_request_latency_seconds_bucket"
                        f"{{{REGIONS}}}[$__rate_interval]))",
                        "{{le}}",
                    )
                ],
                "heat",
            ),
            Panel(
                "Quantiles",
                "Of the time to decide. It is up to twice what it says, as buckets are.",
                "s",
                [
                    (
                        f"histogram_quantile({quantile}, sum by (region, le) (rate("
                        f"openclaw_request_latency_seconds_bucket{{{REGIONS}}}[$__rate_interval])))",
                        f"{{{{region}}}} p{round(quantile * 100)}",
                    )
                    for quantile in (0.5, 0.99)
                ],
            ),
            by_region(
                "Processor time",
                "Of the busiest sidecar of a region, in cores. One is all that a sidecar can use to answer.",
                "none",
                f"max by (region) (rate(process_cpu_seconds_total[$__rate_interval])"
                f" * on (job, instance) group_left (region) ratelimit_build_info{{{REGIONS}}})",
            ),
        ],
    ),
    (
        "Depletion",
        [
            by_rule(
                "Fullest buckets",
                "Used part of the capacity of each rule's fullest bucket; above 1 with debt.",
                "percentunit",
                f"max by (domain, rule) (ratelimit_bucket_used_ratio{{{RULES}}})",
            ),
            by_region(
                "Requests answered with an error",
                "Envoy lets them pass, or denies them, as its failure mode says.",
                "ops",
                f"sum by (region) (rate(ratelimit_request_errors_total{{{REGIONS}}}[$__rate_interval]))",
            ),
        ],
    ),
]

RULES_ROWS: Final[Sequence[Row]] = [
    (
        "Who uses what",
        [
            by_rule(
                "Tokens taken",
                "The ten rules that take most, in the chosen regions together.",
                "ops",
                f"topk(10, sum by (domain, rule) (rate(crdt_token_consumed_total{{{RULES}}}[$__rate_interval])))",
            ),
            by_rule(
                "Rejections",
                "The ten rules that deny most.",
                "ops",
                f"topk(10, sum by (domain, rule) (rate(openclaw_rate_limit_rejections{{{RULES}}}[$__rate_interval])))",
            ),
            by_rule(
                "Rejected part",
                "Of what is asked of a rule.",
                "percentunit",
                f"sum by (domain, rule) (rate(openclaw_rate_limit_rejections{{{RULES}}}[$__rate_interval]))"
                f" / sum by (domain, rule) (rate(ratelimit_decisions_total{{{RULES}}}[$__rate_interval]))",
            ),
        ],
    ),
    (
        "Exhaustion",
        [
            Panel(
                "Fullest buckets",
                "Used part of the capacity of the three fullest buckets of each rule.",
                "percentunit",
                [
                    (
                        f"max by (domain, rule, rank) (ratelimit_bucket_used_ratio{{{RULES}}})",
                        "{{domain}} {{rule}} {{rank}}",
                    )
                ],
                "bars",
            ),
            by_rule(
                "Time to exhaustion",
                "Of each rule's fullest bucket, if it goes on to fill as in the last minutes; a day at most, nothing"
                " while none fills.",
                "s",
                "clamp((1 - max by (domain, rule) (ratelimit_bucket_used_ratio{" + RULES + ', rank="1"}))'
                " / (max by (domain, rule) (deriv(ratelimit_bucket_used_ratio{"
                + RULES
                + ', rank="1"}[$__rate_interval])) > 0), 0, 86400)',
            ),
            by_rule(
                "Debt",
                "Tokens taken beyond the limit from the bucket that owes most.",
                "none",
                f"max by (domain, rule) (ratelimit_bucket_debt_tokens{{{RULES}}})",
            ),
        ],
    ),
    (
        "How they are enforced",
        [
            by_rule(
                "Near the limit",
                "Hits above the near-limit ratio (0.8 unless configured).",
                "ops",
                f"sum by (domain, rule) (rate(ratelimit_near_limit_hits_total{{{RULES}}}[$__rate_interval]))",
            ),
            by_rule(
                "Let pass by shadow mode",
                "Hits that would have been denied.",
                "ops",
                f"sum by (domain, rule) (rate(ratelimit_shadow_mode_hits_total{{{RULES}}}[$__rate_interval]))",
            ),
            by_rule(
                "Overflow",
                "Descriptors decided by buckets that several keys share, since there is no room.",
                "ops",
                f"sum by (domain, rule) (rate(ratelimit_overflow_decisions_total{{{RULES}}}[$__rate_interval]))",
            ),
        ],
    ),
    (
        "The rules themselves",
        [
            Panel(
                "Loads",
                "Attempts to load rules, by result.",
                "none",
                [(f"sum by (region, result) (ratelimit_config_loads_total{{{REGIONS}}})", "{{region}} {{result}}")],
            ),
            by_region(
                "Rejected rules",
                "1 while the newest rules could not be used.",
                "none",
                f"max by (region) (ratelimit_config_rejected{{{REGIONS}}})",
            ),
            by_region(
                "Age of the rules",
                "Since they were loaded.",
                "s",
                f"time() - max by (region) (ratelimit_config_last_success_timestamp_seconds{{{REGIONS}}})",
            ),
        ],
    ),
]

MESH: Final[Sequence[Row]] = [
    (
        "Lag",
        [
            Panel(
                "From region to peer",
                "How late what is admitted in a region (rows) is heard by a peer (columns), now.",
                "s",
                [(f"max by (region, peer) (crdt_sync_lag_seconds{{{REGIONS}}})", "")],
                "matrix",
            ),
            by_peer(
                "Lag",
                "The alert begins at 0.5 s.",
                "s",
                f"max by (region, peer) (crdt_sync_lag_seconds{{{REGIONS}}})",
            ),
            by_peer(
                "Streams",
                "1 while there is one.",
                "none",
                f"min by (region, peer) (crdt_peer_connected{{{REGIONS}}})",
            ),
        ],
    ),
    (
        "What is sent",
        [
            by_peer(
                "Bytes",
                "Of frames of all kinds, before HTTP/2 and TLS.",
                "Bps",
                f"sum by (region, peer) (rate(crdt_bytes_sent_total{{{REGIONS}}}[$__rate_interval]))",
            ),
            by_peer(
                "Entries",
                "Counts of slots; the same bucket is sent at most once in a batch.",
                "ops",
                f"sum by (region, peer) (rate(crdt_entries_sent_total{{{REGIONS}}}[$__rate_interval]))",
            ),
            by_peer(
                "Yet to be sent",
                "Buckets of which the peer has something to hear.",
                "none",
                f"sum by (region, peer) (crdt_pending_buckets{{{REGIONS}}})",
            ),
        ],
    ),
    (
        "Trouble",
        [
            by_peer(
                "Resyncs",
                "Buckets exchanged since a comparison found that both nodes differ.",
                "ops",
                f"sum by (region, peer) (rate(crdt_resyncs_total{{{REGIONS}}}[$__rate_interval]))",
            ),
            by_peer(
                "Reconnects",
                "Times that the peer came back.",
                "none",
                f"sum by (region, peer) (crdt_peer_reconnects_total{{{REGIONS}}})",
            ),
            Panel(
                "Refused",
                "What peers tell and this node does not believe, and streams closed for what came in.",
                "ops",
                [
                    (
                        f"sum by (region, peer, reason) (rate(crdt_peer_refused_total{{{REGIONS}}}[$__rate_interval]))",
                        "{{region}} from {{peer}}: {{reason}}",
                    ),
                    (
                        f"sum by (region, reason) (rate(crdt_protocol_errors_total{{{REGIONS}}}[$__rate_interval]))",
                        "{{region}} closed: {{reason}}",
                    ),
                ],
            ),
        ],
    ),
    (
        "Agreement",
        [
            Panel(
                "Clocks",
                "The peer's minus this node's. From 10 s on they do not believe each other.",
                "s",
                [(f"max by (region, peer) (crdt_peer_clock_offset_seconds{{{REGIONS}}})", "{{region}} to {{peer}}")],
                is_signed=True,
            ),
            Panel(
                "System clock",
                "Minus the one that limits are counted by.",
                "s",
                [(f"max by (region) (ratelimit_clock_gap_seconds{{{REGIONS}}})", "{{region}}")],
                is_signed=True,
            ),
            by_peer(
                "Rules",
                "1 while the peer replicates under the same rules.",
                "none",
                f"min by (region, peer) (crdt_peer_rules_match{{{REGIONS}}})",
            ),
        ],
    ),
]

STRICT: Final[Sequence[Row]] = [
    (
        "Shares",
        [
            by_region(
                "Home share",
                "Part of each strict limit that is a node's own; the sum over all members is 1 at most.",
                "percentunit",
                f"sum by (region) (ratelimit_strict_home_share{{{REGIONS}}})",
            ),
            by_region(
                "Settled",
                "1 when all nodes of a region use the share that sync.members gives.",
                "none",
                f"min by (region) (ratelimit_strict_membership_settled{{{REGIONS}}})",
            ),
            by_region(
                "Conflicts",
                "Nodes that show other members under the same epoch.",
                "none",
                f"max by (region) (ratelimit_strict_membership_conflicts{{{REGIONS}}})",
            ),
        ],
    ),
    (
        "Use",
        [
            by_rule(
                "Tokens taken",
                "Choose strict rules above: no other label tells them.",
                "ops",
                f"sum by (domain, rule) (rate(crdt_token_consumed_total{{{RULES}}}[$__rate_interval]))",
            ),
            Panel(
                "Rejections",
                "By region: one that rejects while others do not has too small a share.",
                "ops",
                [
                    (
                        "sum by (region, domain, rule)"
                        f" (rate(openclaw_rate_limit_rejections{{{RULES}}}[$__rate_interval]))",
                        "{{region}} {{domain}} {{rule}}",
                    )
                ],
            ),
            Panel(
                "Payments",
                "Tokens of purses move between nodes: sent to peers that had asked, and received.",
                "ops",
                [
                    (
                        "sum by (region, direction)"
                        f" (rate(ratelimit_strict_payments_total{{{REGIONS}}}[$__rate_interval]))",
                        "{{region}} {{direction}}",
                    )
                ],
            ),
            Panel(
                "Waits",
                "Requests that waited for tokens of other members, by how their wait ended.",
                "ops",
                [
                    (
                        f"sum by (region, outcome) (rate(ratelimit_strict_waits_total{{{REGIONS}}}[$__rate_interval]))",
                        "{{region}} {{outcome}}",
                    )
                ],
            ),
            Panel(
                "Time of a wait",
                "In the mean. An Envoy whose timeout is shorter lets the request pass, or denies it, by itself.",
                "s",
                [
                    (
                        "sum by (region, outcome)"
                        f" (rate(ratelimit_strict_wait_seconds_total{{{REGIONS}}}[$__rate_interval]))"
                        " / sum by (region, outcome)"
                        f" (rate(ratelimit_strict_waits_total{{{REGIONS}}}[$__rate_interval]))",
                        "{{region}} {{outcome}}",
                    )
                ],
            ),
            by_region(
                "Buckets",
                "Strict ones in memory: not full, or lately so.",
                "none",
                f"sum by (region) (ratelimit_strict_buckets{{{REGIONS}}})",
            ),
        ],
    ),
    (
        "Regions on a fabric",
        [
            Panel(
                "Tokens drawn",
                "From the region's accounts in Redis, and returned into them.",
                "ops",
                [
                    (
                        "sum by (region, direction)"
                        f" (rate(ratelimit_fabric_strict_tokens_total{{{REGIONS}}}[$__rate_interval]))",
                        "{{region}} {{direction}}",
                    )
                ],
            ),
            by_region(
                "Failed calls",
                "While there are any, a sidecar admits what it holds, and then denies.",
                "ops",
                f"sum by (region) (rate(ratelimit_fabric_strict_failures_total{{{REGIONS}}}[$__rate_interval]))",
            ),
            by_region(
                "Lost accounts",
                "As the sidecars found out: limits of the region began empty.",
                "none",
                f"max by (region) (increase(ratelimit_fabric_strict_losses_total{{{REGIONS}}}[$__rate_interval]))",
            ),
        ],
    ),
]

PERSISTENCE: Final[Sequence[Row]] = [
    (
        "Snapshots in files",
        [
            by_region(
                "Age of the latest",
                "What has been counted since is lost if all sidecars stop at once.",
                "s",
                f"time() - min by (region) (ratelimit_snapshot_timestamp_seconds{{{REGIONS}}})",
            ),
            Panel(
                "Written and failed",
                "A minute.",
                "opm",
                [
                    (
                        "60 * sum by (region, result)"
                        f" (rate(ratelimit_snapshots_total{{{REGIONS}}}[$__rate_interval]))",
                        "{{region}} {{result}}",
                    )
                ],
            ),
            by_region(
                "Size",
                "Of the latest.",
                "bytes",
                f"max by (region) (ratelimit_snapshot_bytes{{{REGIONS}}})",
            ),
        ],
    ),
    (
        "Redis",
        [
            by_region(
                "Age of the latest write",
                "Since all that waited was written. What has been counted since is lost if all sidecars stop at once.",
                "s",
                f"time() - min by (region) (ratelimit_redis_write_timestamp_seconds{{{REGIONS}}})",
            ),
            by_region(
                "Waiting",
                "Buckets whose changes are yet to be written; from 100,000 on everything is written again.",
                "none",
                f"max by (region) (ratelimit_redis_waiting_buckets{{{REGIONS}}})",
            ),
            Panel(
                "Buckets written, and failures",
                "Failures are of whole rounds; refused is what Redis would not join for a reason of its own.",
                "ops",
                [
                    (
                        f"sum by (region, result) (rate(ratelimit_redis_buckets_total{{{REGIONS}}}[$__rate_interval]))",
                        "{{region}} {{result}}",
                    ),
                    (
                        f"sum by (region) (rate(ratelimit_redis_failures_total{{{REGIONS}}}[$__rate_interval]))",
                        "{{region}} failures",
                    ),
                ],
            ),
            by_region(
                "Time of a call",
                "On average. No request waits for it.",
                "s",
                f"sum by (region) (rate(ratelimit_redis_call_seconds_total{{{REGIONS}}}[$__rate_interval]))"
                f" / sum by (region) (rate(ratelimit_redis_calls_total{{{REGIONS}}}[$__rate_interval]))",
            ),
        ],
    ),
    (
        "In memory",
        [
            Panel(
                "Buckets",
                "Active ones, and how many there may be.",
                "none",
                [
                    (f"sum by (region) (crdt_buckets{{{REGIONS}}})", "{{region}}"),
                    (f"sum by (region) (crdt_buckets_limit{{{REGIONS}}})", "{{region}} at most"),
                ],
            ),
            by_region(
                "Dropped",
                "Idle buckets a second.",
                "ops",
                f"sum by (region) (rate(crdt_buckets_evicted_total{{{REGIONS}}}[$__rate_interval]))",
            ),
            by_region(
                "Memory",
                "Resident, of the largest process.",
                "bytes",
                "max by (region) (process_resident_memory_bytes"
                f" * on (job, instance) group_left (region) ratelimit_build_info{{{REGIONS}}})",
            ),
        ],
    ),
    (
        "The process",
        [
            by_region(
                "Longest stall",
                "Time in which nothing was answered, in the last one to two minutes.",
                "s",
                f"max by (region) (ratelimit_event_loop_longest_stall_seconds{{{REGIONS}}})",
            ),
            by_region(
                "Log lines lost",
                "The log is read too slowly, or cannot be written.",
                "ops",
                f"sum by (region) (rate(ratelimit_log_lines_dropped_total{{{REGIONS}}}[$__rate_interval]))",
            ),
            by_region(
                "Open connections",
                "Of Envoys and other clients.",
                "none",
                f"sum by (region) (ratelimit_connections{{{REGIONS}}})",
            ),
        ],
    ),
]

DASHBOARDS: Final = {
    "overview": ("Rate limits: overview", OVERVIEW),
    "rules": ("Rate limits: rules", RULES_ROWS),
    "mesh": ("Rate limits: mesh", MESH),
    "strict": ("Rate limits: strict limits", STRICT),
    "persistence": ("Rate limits: persistence and process", PERSISTENCE),
}

AnyPanel = bargauge.Panel | heatmap.Panel | stat.Panel | table.Panel | timeseries.Panel


def _panel(panel: Panel) -> AnyPanel:
    built: AnyPanel
    if panel.kind == "heat":
        built = heatmap.Panel().calculate(False).color(heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME))
    elif panel.kind == "number":
        built = stat.Panel()
    elif panel.kind == "bars":
        built = bargauge.Panel().min(0).max(1)
    elif panel.kind == "matrix":
        built = table.Panel().with_transformation(
            models.DataTransformerConfig(
                id_val="groupingToMatrix",
                options={"columnField": "peer", "rowField": "region", "valueField": "Value"},
            )
        )
    else:
        built = timeseries.Panel().tooltip(common.VizTooltipOptions().mode(common_models.TooltipDisplayMode.MULTI))
        if not panel.is_signed:
            built = built.min(0)
    built = built.title(panel.title).description(panel.description).unit(panel.unit).datasource(SOURCE)
    for number, (expression, legend) in enumerate(panel.queries):
        query = prometheus.Dataquery().expr(expression).legend_format(legend).ref_id("ABCDEFGH"[number])
        if panel.kind == "heat":
            query = query.format(PromQueryFormat.HEATMAP).exemplar(True)
        elif panel.kind == "matrix":
            query = query.instant().format(PromQueryFormat.TABLE)
        elif panel.kind in ("number", "bars"):
            query = query.instant()
        built = built.with_target(query)
    return built


def _variable(name: str, query: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(name.title())
        .datasource(SOURCE)
        .query(query)
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(models.VariableOption(selected=True, text="All", value="$__all"))
    )


def _dashboard(name: str) -> models.Dashboard:
    title, rows = DASHBOARDS[name]
    built = (
        dashboard.Dashboard(title)
        .uid(f"ratelimit-{name}")
        .tags(["ratelimit"])
        .refresh("30s")
        .time("now-3h", "now")
        .link(
            dashboard.DashboardLink("Others")
            .type(models.DashboardLinkType.DASHBOARDS)
            .tags(["ratelimit"])
            .keep_time(True)
        )
        .with_variable(dashboard.DatasourceVariable("datasource").label("Source").type("prometheus"))
        .with_variable(_variable("region", "label_values(ratelimit_build_info, region)"))
        .with_variable(_variable("domain", "label_values(crdt_token_consumed_total, domain)"))
        .with_variable(_variable("rule", 'label_values(crdt_token_consumed_total{domain=~"$domain"}, rule)'))
    )
    for row, panels in rows:
        built = built.with_row(dashboard.Row(row))
        for panel in panels:
            built = built.with_panel(_panel(panel).height(HEIGHT).span(WIDTH // len(panels)))
    return built.build()


def render(name: str) -> str:
    """The JSON of a dashboard."""
    return JSONEncoder(sort_keys=True, indent=2).encode(_dashboard(name)) + "\n"


if __name__ == "__main__":
    for name in DASHBOARDS:
        (FOLDER / f"{name}.json").write_text(render(name))
