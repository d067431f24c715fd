"""The page about moving from envoyproxy/ratelimit, and the reference of what differs, its variables and its metrics.

The variables are those of its src/settings/settings.go, in its order, and those that its README names besides. What is
the same here is not written down: the fields of `SidecarConfig` name those variables (`FromEnvironment`). Only the
other variables have a verdict in this file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ratelimit_sidecar.config.differences import ANSWERS, RULES, table
from ratelimit_sidecar.config.environment import variables_of
from ratelimit_sidecar.config.sidecar_schema import SidecarConfig


@dataclass(frozen=True, slots=True)
class Same:
    """The variable sets a field of `SidecarConfig`, as in envoyproxy/ratelimit.

    Args:
        note: what to know about it nevertheless.
    """

    note: str = ""


@dataclass(frozen=True, slots=True)
class SameElsewhere:
    """The variable has the same effect here, but is read elsewhere than in the configuration."""

    note: str


@dataclass(frozen=True, slots=True)
class ReplacedBy:
    """The variable is not read; another setting or command here serves its purpose."""

    what: str


@dataclass(frozen=True, slots=True)
class NotNeeded:
    """The variable is not read, and has no purpose here."""

    because: str


Verdict = Same | SameElsewhere | ReplacedBy | NotNeeded

SAME = Same()

_IN_MEMORY = NotNeeded("limits are in memory, shared over `sync.peers`")
_NO_MEMCACHE = NotNeeded("there is no memcached to ask")
_NO_STATSD = NotNeeded("nothing is sent to statsd, see [Its metrics](#its-metrics)")
_BACK_OFF = NotNeeded("waits are random and grow up to `xds.retry_seconds`")

VARIABLES: Mapping[str, Mapping[str, Verdict]] = {
    "Addresses": {
        "HOST": Same("without it `127.0.0.1`, there `0.0.0.0`: set it where probes come over the network"),
        "PORT": SAME,
        "DEBUG_HOST": ReplacedBy("`listen.admin`, which has `/rlconfig` and `/metrics` too"),
        "DEBUG_PORT": ReplacedBy("`listen.admin`, which has `/rlconfig` and `/metrics` too"),
        "GRPC_UDS": Same("an absolute path; as there, in place of host and port"),
        "GRPC_HOST": SAME,
        "GRPC_PORT": SAME,
    },
    "gRPC": {
        "GRPC_MAX_CONNECTION_AGE": SAME,
        "GRPC_MAX_CONNECTION_AGE_GRACE": SAME,
        "GRPC_MAX_CONCURRENT_STREAMS": NotNeeded("streams of a connection and calls in all are always bounded"),
        "GRPC_SERVER_USE_TLS": Same(
            "see [TLS between Envoy and the sidecar](../envoy-tls.md). Together with `GRPC_UDS` it ends the start with"
            " an error"
        ),
        "GRPC_SERVER_TLS_CERT": SAME,
        "GRPC_SERVER_TLS_KEY": SAME,
        "GRPC_CLIENT_TLS_CACERT": Same("the well-known authorities are not trusted besides; it is renewed too"),
        "GRPC_CLIENT_TLS_SAN": Same(
            "a URI may be given as well. Without `GRPC_CLIENT_TLS_CACERT` it ends the start with an error; there it"
            " means nothing"
        ),
    },
    "Logs": {
        "LOG_LEVEL": SameElsewhere(
            "without it `info`, there `warn`; `trace` is `debug` here, and `fatal` and `panic` leave almost nothing"
        ),
        "LOG_FORMAT": SameElsewhere("`text`, which `logfmt` means too, or `json`; another one ends the start with 2"),
    },
    "Rules": {
        "CONFIG_TYPE": SAME,
        "FORCE_START_WITHOUT_INITIAL_CONFIG": NotNeeded(
            "an xDS server is not waited for: until it has sent rules calls get an error, as there, or pass with"
            " `xds.before_rules: pass`"
        ),
        "CONFIG_GRPC_XDS_NODE_ID": SAME,
        "CONFIG_GRPC_XDS_NODE_METADATA": Same("`key=value,key=value`; `:` separates too where there is no `=`"),
        "CONFIG_GRPC_XDS_SERVER_URL": Same("`host:port`; `dns:///` or `passthrough:///` before it says nothing more"),
        "CONFIG_GRPC_XDS_SERVER_CONNECT_RETRY_INTERVAL": Same("it bounds waits that grow"),
        "CONFIG_GRPC_XDS_CLIENT_ADDITIONAL_HEADERS": SAME,
        "CONFIG_GRPC_XDS_SERVER_USE_TLS": SAME,
        "CONFIG_GRPC_XDS_CLIENT_TLS_CERT": SAME,
        "CONFIG_GRPC_XDS_CLIENT_TLS_KEY": SAME,
        "CONFIG_GRPC_XDS_SERVER_TLS_CACERT": SAME,
        "CONFIG_GRPC_XDS_SERVER_TLS_SAN": SAME,
        "XDS_CLIENT_BACKOFF_INITIAL_INTERVAL": _BACK_OFF,
        "XDS_CLIENT_BACKOFF_MAX_INTERVAL": ReplacedBy("`xds.retry_seconds`"),
        "XDS_CLIENT_BACKOFF_RANDOM_FACTOR": _BACK_OFF,
        "XDS_CLIENT_BACKOFF_JITTER": _BACK_OFF,
        "XDS_CLIENT_MAX_MSG_SIZE_IN_BYTES": NotNeeded("several 100,000 rules are taken"),
        "RUNTIME_ROOT": Same(
            "`rules` in the configuration file wins. With neither, nor `RUNTIME_SUBDIRECTORY`, nor xDS, the folder"
            " `/srv/runtime_data/current/config` is read if it is there; there it is with `RUNTIME_WATCH_ROOT=false`"
            " only"
        ),
        "RUNTIME_SUBDIRECTORY": Same(
            "rules lie in `RUNTIME_ROOT/RUNTIME_SUBDIRECTORY/RUNTIME_APPDIRECTORY`, slashes more or less. Without it"
            " there nothing is read, unless `RUNTIME_WATCH_ROOT` is false; here what lies in `RUNTIME_ROOT/config` is"
        ),
        "RUNTIME_APPDIRECTORY": Same("without it `config`, as there"),
        "RUNTIME_IGNOREDOTFILES": NotNeeded("names that begin with a dot are never read"),
        "RUNTIME_WATCH_ROOT": NotNeeded("changes are noticed at files and at links on the way to them"),
        "MERGE_DOMAIN_CONFIG": SAME,
    },
    "Answers": {
        "SHADOW_MODE": SAME,
        "QUOTA_MODE": SAME,
        "NEAR_LIMIT_RATIO": Same("above 1, as 80, no hits are near the limit, as there"),
        "LIMIT_RESPONSE_HEADERS_ENABLED": SAME,
        "LIMIT_LIMIT_HEADER": SAME,
        "LIMIT_REMAINING_HEADER": SAME,
        "LIMIT_RESET_HEADER": SAME,
        "RESPONSE_DYNAMIC_METADATA": SAME,
        "STOP_CACHE_KEY_INCREMENT_WHEN_OVERLIMIT": Same(
            "`charging: all_or_nothing`: a denied request charges no limit; there the limit that denies counts on"
        ),
        "HEALTHY_WITH_AT_LEAST_ONE_CONFIG_LOADED": Same(
            "`/readyz` waits for the rules of an xDS server in any case; broken files end the start with exit code 2"
        ),
    },
    "Metrics and traces": {
        "USE_DOG_STATSD": _NO_STATSD,
        "USE_DOG_STATSD_MOGRIFIERS": NotNeeded("metrics have labels; so are the `DOG_STATSD_MOGRIFIER_*` variables"),
        "USE_STATSD": _NO_STATSD,
        "STATSD_HOST": _NO_STATSD,
        "STATSD_PORT": _NO_STATSD,
        "STATS_FLUSH_INTERVAL": _NO_STATSD,
        "EXTRA_TAGS": ReplacedBy("the labels of Prometheus' scrape configuration"),
        "SANITIZE_DESCRIPTOR_METRIC_DOTS": NotNeeded(
            "keys and values are labels, in which a dot is like any other character"
        ),
        "DISABLE_STATS": NotNeeded("unfetched metrics cost next to nothing"),
        "USE_PROMETHEUS": NotNeeded("always on, at `/metrics` of `listen.admin`"),
        "PROMETHEUS_ADDR": ReplacedBy("`listen.admin`"),
        "PROMETHEUS_PATH": NotNeeded("the path is always `/metrics`"),
        "PROMETHEUS_MAPPER_YAML": NotNeeded("see [Metrics](metrics.md)"),
        "PROMETHEUS_RESPONSE_TIME_AS_MILLISECONDS": NotNeeded("times are in seconds"),
        "TRACING_ENABLED": ReplacedBy("`OTEL_EXPORTER_OTLP_ENDPOINT`: traces are sent when it is set"),
        "TRACING_SERVICE_NAME": ReplacedBy("`OTEL_SERVICE_NAME`"),
        "TRACING_SERVICE_NAMESPACE": ReplacedBy("`OTEL_RESOURCE_ATTRIBUTES`, as in `service.namespace=shop`"),
        "TRACING_SERVICE_INSTANCE_ID": ReplacedBy("`node.id`"),
        "TRACING_EXPORTER_PROTOCOL": ReplacedBy(
            "`OTEL_EXPORTER_OTLP_PROTOCOL`: `grpc`, which is the default, or `http/protobuf`"
        ),
        "TRACING_SAMPLING_RATE": ReplacedBy("Envoy's own sampling: what it traces is traced here too"),
    },
    "Backends": {
        "BACKEND_TYPE": _IN_MEMORY,
        "EXPIRATION_JITTER_MAX_SECONDS": NotNeeded("idle buckets are dropped one by one"),
        "LOCAL_CACHE_SIZE_IN_BYTES": NotNeeded("limits are in memory"),
        "CACHE_KEY_PREFIX": _IN_MEMORY,
        **dict.fromkeys(
            (
                "REDIS_SOCKET_TYPE",
                "REDIS_TYPE",
                "REDIS_URL",
                "REDIS_POOL_SIZE",
                "REDIS_AUTH",
                "REDIS_TLS",
                "REDIS_TLS_CLIENT_CERT",
                "REDIS_TLS_CLIENT_KEY",
                "REDIS_TLS_CACERT",
                "REDIS_TLS_SKIP_HOSTNAME_VERIFICATION",
                "REDIS_PIPELINE_WINDOW",
                "REDIS_PIPELINE_LIMIT",
                "REDIS_USE_EXPLICIT_PIPELINE",
                "REDIS_CLUSTER_PIPELINE_PARALLELISM",
                "REDIS_SENTINEL_AUTH",
                "REDIS_TIMEOUT",
                "REDIS_POOL_ON_EMPTY_BEHAVIOR",
                "REDIS_POOL_ON_EMPTY_WAIT_DURATION",
                "REDIS_HEALTH_CHECK_ACTIVE_CONNECTION",
                "REDIS_STARTUP_INITIAL_INTERVAL",
                "REDIS_STARTUP_MAX_INTERVAL",
                "REDIS_STARTUP_MAX_ELAPSED_TIME",
                "REDIS_PERSECOND",
                "REDIS_PERSECOND_SOCKET_TYPE",
                "REDIS_PERSECOND_TYPE",
                "REDIS_PERSECOND_URL",
                "REDIS_PERSECOND_POOL_SIZE",
                "REDIS_PERSECOND_AUTH",
                "REDIS_PERSECOND_TLS",
                "REDIS_PERSECOND_SENTINEL_AUTH",
                "REDIS_PERSECOND_PIPELINE_WINDOW",
                "REDIS_PERSECOND_PIPELINE_LIMIT",
                "REDIS_PERSECOND_USE_EXPLICIT_PIPELINE",
                "REDIS_PERSECOND_CLUSTER_PIPELINE_PARALLELISM",
                "REDIS_PERSECOND_TIMEOUT",
                "REDIS_PERSECOND_POOL_ON_EMPTY_BEHAVIOR",
                "REDIS_PERSECOND_POOL_ON_EMPTY_WAIT_DURATION",
            ),
            _IN_MEMORY,
        ),
        **dict.fromkeys(
            (
                "MEMCACHE_HOST_PORT",
                "MEMCACHE_MAX_IDLE_CONNS",
                "MEMCACHE_SRV",
                "MEMCACHE_SRV_REFRESH",
                "MEMCACHE_TLS",
                "MEMCACHE_TLS_CLIENT_CERT",
                "MEMCACHE_TLS_CLIENT_KEY",
                "MEMCACHE_TLS_CACERT",
                "MEMCACHE_TLS_SKIP_HOSTNAME_VERIFICATION",
            ),
            _NO_MEMCACHE,
        ),
    },
}

_STEPS = """\
Rules files, environment and Envoy's filter stay as they are; the address of the service changes, and no Redis is
needed.

1. Check the rules. Each error comes with file, line, column and a fix.

   ```
   ratelimit-sidecar check path/to/config
   ```

2. Count as before, with a `sidecar.yaml` of one line. Without it a limit is a token bucket, which refills evenly.

   ```yaml
   algorithm: fixed_window
   ```

3. Start it where envoyproxy/ratelimit ran, or beside each Envoy, with the same environment:

   ```
   RUNTIME_ROOT=/data RUNTIME_SUBDIRECTORY=ratelimit ratelimit-sidecar serve --config sidecar.yaml
   ```

   With `SHADOW_MODE=true` it counts and answers, and denies nothing.

4. Point the cluster of `rate_limit_service` in Envoy's configuration to it:

   ```yaml
   endpoint: {address: {socket_address: {address: 127.0.0.1, port_value: 8081}}}
   ```

## What differs

- **Sharing.** Without `sync.peers` each sidecar has every limit to itself.
- **State** is in memory; counts in Redis are not taken over. With [`persistence`](state.md) it survives a full stop.
- **A limit in a request's descriptor** shares the counter of the rule that matches, if that is a window of the same
  unit. Beside a token bucket it is a sliding window of its own; with `CRDT_ENGINE=strict` a token bucket of its own.
- **Operators' HTTP** is on `127.0.0.1` unless `HOST` or `listen.admin` is set. `/json` wants
  `Content-Type: application/json`; public names of this address have to be in `listen.admin_names`.
- **A folder of rules** is read without its subfolders. Anything but `*.yaml`, `*.yml` and `*.md` in it is an error at
  the start. A folder that loses all its files keeps its rules; in envoyproxy/ratelimit it loses them.
- **Health checks** answer the same for `ratelimit`, `envoy.service.ratelimit.v3.RateLimitService` and no service name;
  in envoyproxy/ratelimit the last is always SERVING.

With `algorithm: fixed_window` all else is the same, in every field of every answer (`make test-all` compares them),
apart from the rare cases in the tables of [answers](reference/envoyproxy-ratelimit.md#answers-that-differ) and [rules
files](reference/envoyproxy-ratelimit.md#rules-files-that-are-read-otherwise). The same page has each [environment
variable](reference/envoyproxy-ratelimit.md#its-environment-variables) and
[metric](reference/envoyproxy-ratelimit.md#its-metrics).
"""

_DIFFERENCES = """\
How to move: [migration](../migration-from-envoyproxy-ratelimit.md).

## Answers that differ

With `algorithm: fixed_window`:
"""

_RULES = """\
## Rules files that are read otherwise

All others are accepted or refused alike.
"""

_METRICS = """\
## Its metrics

Domain and rule of `ratelimit.service.rate_limit.shop.user_eve.over_limit` are labels here: `domain`, and `rule` with
the text `shop.user_eve`.
"""

METRICS: Mapping[str, str] = {
    "`*.total_hits`": "`ratelimit_hits_total`",
    "`*.within_limit`": "`ratelimit_within_limit_hits_total`",
    "`*.near_limit`": "`ratelimit_near_limit_hits_total`",
    "`*.over_limit`": "`ratelimit_over_limit_hits_total`",
    "`*.shadow_mode`": "`ratelimit_shadow_mode_hits_total`",
    "`*.over_limit_with_local_cache`": "nothing: there is no cache before a Redis",
    "`*.domain_not_found`": '`ratelimit_decisions_total{domain="",rule=""}`, in descriptors, of all such domains',
    "`config_load_success`, `config_load_error`": "`ratelimit_config_loads_total`, by `result`",
    "`call.should_rate_limit.service_error`": "`ratelimit_request_errors_total`, by `reason`",
    "`call.should_rate_limit.redis_error`, `redis.*`, `memcache.*`": "nothing: no request waits for such a server",
    "`global_shadow_mode`": '`ratelimit_decisions_total{code="OVER_LIMIT"}`: in shadow mode those are let through',
    "`ratelimit_server.ShouldRateLimit.total_requests`": "`openclaw_request_latency_seconds_count`",
    "`ratelimit_server.ShouldRateLimit.response_time`": "`openclaw_request_latency_seconds`, a histogram",
}
"""What dashboards read there, and what they read here."""

_AFTER_METRICS = """\
`/stats` of the debug port is `/metrics` of `listen.admin` here, in Prometheus' text format; OTLP can be
[pushed](otel.md). For statsd or Datadog let the agent there fetch `/metrics`, as Telegraf's `prometheus`
input, the OpenTelemetry Collector's `prometheus` receiver and Datadog's OpenMetrics check do.
"""

_VARIABLES = """\
## Its environment variables

The configuration file wins over variables. Booleans are Go's (`1`, `t`, `T`, `TRUE`, `true`, `True`; `0` to `False`).
"""


def migration_page(generated: str) -> str:
    """The page on how to move from envoyproxy/ratelimit.

    Args:
        generated: the line that says that the page is generated.
    """
    return "\n\n".join(("# Moving from envoyproxy/ratelimit", generated, _STEPS))


def reference_page(generated: str) -> str:
    """The reference page on what differs from envoyproxy/ratelimit, and on its variables and metrics.

    Args:
        generated: the line that says that the page is generated.
    """
    parts = ["# envoyproxy/ratelimit: differences, variables and metrics", generated]
    parts += [_DIFFERENCES, table(ANSWERS), _RULES, table(RULES), _VARIABLES]
    for group, variables in VARIABLES.items():
        rows = ["| Variable | Here |", "|---|---|", *(f"| {names} | {text} |" for names, text in _rows(variables))]
        parts.append("\n".join((f"### {group}", "", *rows)))
    rows = ["| There | Here |", "|---|---|", *(f"| {theirs} | {ours} |" for theirs, ours in METRICS.items())]
    parts += [_METRICS, "\n".join(rows), _AFTER_METRICS]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def _rows(variables: Mapping[str, Verdict]) -> Iterator[tuple[str, str]]:
    """Rows of the table of variables; neighbours with the same verdict share one row."""
    keys = dict(variables_of(SidecarConfig))
    names: list[str] = []
    last = ""
    for name, verdict in variables.items():
        text = _said_of(verdict, keys.get(name, ""))
        if names and text != last:
            yield ", ".join(names), last
            names = []
        names.append(f"`{name}`")
        last = text
    if names:
        yield ", ".join(names), last


def _said_of(verdict: Verdict, key: str) -> str:
    match verdict:
        case Same(note):
            return f"same: `{key}`" + (f"; {note}" if note else "")
        case SameElsewhere(note):
            return f"same; {note}"
        case ReplacedBy(what):
            return f"replaced by {what}"
        case NotNeeded(because):
            return f"not needed: {because}"
