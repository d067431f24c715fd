"""All settings of the sidecar, in its file or the environment, and their defaults.

The models below are the only list of options: validation, `serve --help`, docs/reference/configuration.md and the page
about migration come from them.
"""

from __future__ import annotations

import re
import socket
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from ratelimit_sidecar.config.addresses import ListenAddress, PeerAddress, TcpListenAddress, XdsServerAddress
from ratelimit_sidecar.config.bucket import BucketConfig
from ratelimit_sidecar.config.environment import choice, duration, flag, fraction, pairs, switch, text
from ratelimit_sidecar.config.errors import quoted
from ratelimit_sidecar.config.rules_schema import (
    ALL_OR_NOTHING,
    BUCKET_ALGORITHM,
    Algorithm,
    ChargeName,
    Charging,
    Flag,
    RuleDefaults,
    window_of,
)
from ratelimit_sidecar.config.runtime import GRPC_ADDRESS, HTTP_ADDRESS, RUNTIME_FOLDER, XDS_SERVER, XDS_WHEN_ASKED_FOR
from ratelimit_sidecar.config.structure import Expected, Section, ShownDefault, unexpected
from ratelimit_sidecar.crdt.shares import Membership
from ratelimit_sidecar.crdt.store import DEFAULT_MAX_BUCKETS
from ratelimit_sidecar.limiter.rules import Charge, Consistency
from ratelimit_sidecar.limiter.settings import AnswerSettings, ResponseHeaders

DEFAULT_SYNC_ADDRESS = "0.0.0.0:50051"
DEFAULT_LOOPBACK_SYNC_ADDRESS = "127.0.0.1:50051"
"""The default if the mesh has no TLS and is not declared insecure."""

MAX_PATTERN_CHARS = 255
MAX_SNAPSHOT_SECONDS = 3_600
MAX_NAME_CHARS = 128
MAX_RETRY_SECONDS = 3_600
MAX_AGE_SECONDS = 31_536_000

MAX_MEMBERS = 256
MAX_MEMBER_BYTES = 255
MAX_WEIGHT = 1_000_000
MAX_BUCKETS = 100_000_000
MAX_EPOCH = 1_000_000_000
"""Within the range that sidecars accept from each other (replication/wire.py)."""

_ENGINES = {
    "eventual": Consistency.EVENTUAL,
    "ubos": Consistency.EVENTUAL,
    "strict": Consistency.STRICT,
    "local": Consistency.LOCAL,
}

# https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md#requests; -bin would be bytes.
_CALL_HEADER = re.compile(r"(?!grpc-)[0-9a-z_.-]+(?<!-bin)")


def _at_least_one(addresses: tuple[str, ...]) -> tuple[str, ...]:
    if not addresses:
        raise unexpected("at least one address to listen on", "leave the key out for the default")
    return addresses


def _check_name(text: str) -> str:
    if not 1 <= len(text) <= MAX_NAME_CHARS or not text.isprintable() or " " in text:
        raise ValueError("not a name")
    return text


def _check_members(members: dict[str, int]) -> dict[str, int]:
    if not 1 <= len(members) <= MAX_MEMBERS:
        raise unexpected(f"1 to {MAX_MEMBERS} nodes")
    for node, weight in members.items():
        try:
            is_name = len(_check_name(node).encode()) <= MAX_MEMBER_BYTES
        except ValueError:
            is_name = False
        if not is_name:
            expected = (
                f"node ids, each 1 to {MAX_NAME_CHARS} printable characters without spaces, in {MAX_MEMBER_BYTES} bytes"
                " at most"
            )
            raise unexpected(expected, f"correct {quoted(node)}")
        if not 0 <= weight <= MAX_WEIGHT:
            raise unexpected(f"weights from 0 to {MAX_WEIGHT}", f"correct the one of {quoted(node)}")
    if not any(members.values()):
        raise unexpected("a weight above 0", "give at least one of them 1")
    return members


def _check_pattern(text: str) -> str:
    _check_client_name(text.replace("{node}", "n").replace("{region}", "r"))
    return text


def _check_client_name(text: str) -> str:
    if not 1 <= len(text) <= MAX_PATTERN_CHARS or not text.isprintable() or " " in text:
        raise ValueError("not a name")
    if re.search("[{}]", text):
        raise ValueError("braces")
    return text


def _check_redis_url(text: str) -> str:
    url = urlsplit(text)
    if url.scheme == "unix":
        if url.netloc.rpartition("@")[2] or not url.path or not re.fullmatch(r"(db=\d{1,6})?", url.query):
            raise ValueError("no path of a socket")
        return text
    if url.scheme not in ("redis", "rediss") or not re.fullmatch(r"/?\d{0,6}", url.path) or url.query:
        raise ValueError("no such scheme or database")
    for host in url.netloc.rpartition("@")[2].split(","):
        parts = urlsplit(f"//{host}")
        # Raises ValueError for a port that is none.
        if not parts.hostname or parts.port == 0:
            raise ValueError("no host")
    return text


def _check_prefix(text: str) -> str:
    if not re.fullmatch(r"[0-9A-Za-z_.:-]{1,64}", text):
        raise ValueError("not a prefix")
    return text


def _to_path(value: object) -> object:
    return Path(value) if isinstance(value, str) and value and "\0" not in value else value


def _to_consistency(value: object) -> object:
    return _ENGINES.get(value, value) if isinstance(value, str) else value


def _to_float(value: object) -> object:
    return float(value) if type(value) is int or isinstance(value, Decimal) else value


def _to_call_headers(headers: dict[str, str]) -> dict[str, str]:
    lower = {name.lower(): value for name, value in headers.items()}
    for name, value in lower.items():
        if not _CALL_HEADER.fullmatch(name) or not value.isascii() or not value.isprintable():
            raise ValueError("not gRPC metadata")
    return lower


Name = Annotated[
    str,
    AfterValidator(_check_name),
    Expected(f"a name of 1 to {MAX_NAME_CHARS} printable characters without spaces", quoting="text"),
]
FilePath = Annotated[Path, BeforeValidator(_to_path), Expected("the path of a file", quoting="text")]
CertificatePath = Annotated[
    Path,
    BeforeValidator(_to_path),
    Expected("the path of a file", quoting="text", or_else="add it, or set GRPC_SERVER_TLS_CERT"),
]
PrivateKeyPath = Annotated[
    Path,
    BeforeValidator(_to_path),
    Expected("the path of a file", quoting="text", or_else="add it, or set GRPC_SERVER_TLS_KEY"),
]
RulesPath = Annotated[Path, BeforeValidator(_to_path), Expected("the path of a file or folder", quoting="text")]
PeerNames = Annotated[
    str,
    AfterValidator(_check_pattern),
    Expected("a DNS name or URI, in which {node}, {region} and * may stand", quoting="text"),
]
ClientName = Annotated[
    str,
    AfterValidator(_check_client_name),
    Expected("a DNS name, IP address or URI, in which * may stand", quoting="text"),
]
Engine = Annotated[
    Consistency,
    BeforeValidator(_to_consistency),
    Expected("eventual (also spelt ubos), strict or local", choices=tuple(_ENGINES)),
]
Members = Annotated[
    dict[str, int],
    Expected("a mapping of node ids to weights, whole numbers, as in a: 1"),
    AfterValidator(_check_members),
]
Epoch = Annotated[int, Field(ge=1, le=MAX_EPOCH), Expected(f"a whole number from 1 to {MAX_EPOCH}", quoting="plain")]
MaxBuckets = Annotated[
    int, Field(ge=1, le=MAX_BUCKETS), Expected(f"a whole number from 1 to {MAX_BUCKETS}", quoting="plain")
]
Ratio = Annotated[
    float, BeforeValidator(_to_float), Field(ge=0, le=1), Expected("a number from 0 to 1", quoting="plain")
]
RetrySeconds = Annotated[
    float,
    BeforeValidator(_to_float),
    Field(ge=0.2, le=MAX_RETRY_SECONDS),
    Expected(f"a number from 0.2 to {MAX_RETRY_SECONDS}", quoting="plain"),
]
SnapshotSeconds = Annotated[
    float,
    BeforeValidator(_to_float),
    Field(ge=1, le=MAX_SNAPSHOT_SECONDS),
    Expected(f"a number from 1 to {MAX_SNAPSHOT_SECONDS}", quoting="plain"),
]
RedisUrl = Annotated[
    str,
    AfterValidator(_check_redis_url),
    Expected(
        "redis://host:port/db, rediss:// with TLS, several hosts after commas, or unix:///path?db=0", quoting="text"
    ),
]
KeyPrefix = Annotated[
    str,
    AfterValidator(_check_prefix),
    Expected("1 to 64 letters, digits and characters of _ . : -", quoting="text"),
]
BeforeRules = Annotated[Literal["error", "pass"], Expected("error or pass", choices=("error", "pass"))]
AgeSeconds = Annotated[
    float,
    BeforeValidator(_to_float),
    Field(ge=0, le=MAX_AGE_SECONDS),
    Expected(f"a number from 0 to {MAX_AGE_SECONDS}", quoting="plain"),
]
# A token, as RFC 9110 has it for field names (5.1).
HeaderName = Annotated[
    str,
    Field(pattern=r"^[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}$"),
    Expected("the name of an HTTP header", quoting="text"),
]
Texts = Annotated[dict[str, str], Expected("a mapping of text to text")]
CallHeaders = Annotated[
    dict[str, str],
    AfterValidator(_to_call_headers),
    Expected("a mapping of names, in letters, digits and _ . -, to values in printable ASCII"),
]

_SETTINGS = AnswerSettings()
_HEADERS = ResponseHeaders()


class NodeConfig(Section):
    """The identity of this sidecar."""

    id: Annotated[Name, ShownDefault("the host name")] = Field(
        default_factory=socket.gethostname, description="Name of this sidecar; no two in one mesh may share it."
    )
    region: Annotated[Name, text("REGION")] = Field(
        "local", description="Region this sidecar runs in; the `region` label of its metrics."
    )


class ListenTlsConfig(Section):
    """TLS for Envoy's calls over TCP; the files are read again every minute."""

    certificate: Annotated[CertificatePath, text("GRPC_SERVER_TLS_CERT")] = Field(
        description="PEM file of this sidecar's certificate, and those between it and the authority that Envoy trusts."
    )
    key: Annotated[PrivateKeyPath, text("GRPC_SERVER_TLS_KEY")] = Field(
        description="PEM file of its private key, not encrypted."
    )
    ca: Annotated[FilePath | None, text("GRPC_CLIENT_TLS_CACERT")] = Field(
        None,
        description="PEM file of the authorities that sign clients' certificates. With it, clients without such a"
        " certificate are refused.",
    )
    client_name: Annotated[ClientName | None, text("GRPC_CLIENT_TLS_SAN")] = Field(
        None,
        description="DNS name, IP address or URI that must be among a client's subject alternative names; `*` stands"
        " for any one part between dots or slashes.",
    )


class ListenConfig(Section):
    """The addresses on which this sidecar answers."""

    grpc: Annotated[tuple[ListenAddress, ...], Field(strict=False), AfterValidator(_at_least_one), GRPC_ADDRESS] = (
        Field(("0.0.0.0:8081",), description="Where Envoy calls the rate limit service; port 0 lets the system pick.")
    )
    tls: Annotated[ListenTlsConfig | None, switch("GRPC_SERVER_USE_TLS")] = Field(
        None,
        description="TLS on the TCP addresses of `listen.grpc`, with this key or the variable `true`. Unix sockets"
        " stay plain.",
    )
    max_connection_age_seconds: Annotated[AgeSeconds, duration("GRPC_MAX_CONNECTION_AGE")] = Field(
        86_400.0,
        description="Age, up to a tenth more or less, at which a connection to `listen.grpc` is drained, so that Envoys"
        " spread over new sidecars; 0 for never.",
    )
    max_connection_age_grace_seconds: Annotated[AgeSeconds, duration("GRPC_MAX_CONNECTION_AGE_GRACE")] = Field(
        3_600.0, description="Time for calls in flight then, before the connection is closed; 0 for no end."
    )
    healthy_with_rules_only: Annotated[Flag, flag("HEALTHY_WITH_AT_LEAST_ONE_CONFIG_LOADED")] = Field(
        False,
        description="Health checks, on `listen.grpc` and `listen.admin`, fail while there are no rules at all.",
    )
    admin: Annotated[TcpListenAddress, HTTP_ADDRESS] = Field(
        "127.0.0.1:8080", description="HTTP for operators: metrics, health, buckets and peers."
    )
    ext_authz_http: Annotated[TcpListenAddress | None, ShownDefault("not opened")] = Field(
        None,
        description="Where Envoy's ext_authz filter sends requests in its HTTP form; in its gRPC form it calls"
        " `listen.grpc`. Plain text: whoever can connect can use up limits.",
    )
    admin_names: tuple[Name, ...] = Field(
        (),
        strict=False,
        description="Public host names by which `listen.admin` is called. Others are refused, but for probes and"
        " scrapes, so that no web page can read it through somebody's browser.",
    )
    admin_shows_values: Flag = Field(
        False,
        description="Show values that callers gave in `/buckets` and in the log of what is given back; otherwise by a"
        " hash.",
    )
    admin_token_file: FilePath | None = Field(
        None,
        description="File with the token for changing state over `listen.admin`, as `ratelimit-sidecar reset` does;"
        " read for each request. Without it only this machine itself may, on loopback and not through a proxy.",
    )
    sync: Annotated[
        TcpListenAddress | None,
        ShownDefault(
            f"{DEFAULT_SYNC_ADDRESS} when sync.peers is not empty, 127.0.0.1 without sync.tls and sync.insecure;"
            " otherwise not opened"
        ),
    ] = Field(None, description="Where the sidecars of the mesh call.")


class XdsTlsConfig(Section):
    """TLS to the xDS server; without it the stream is plain text."""

    ca: Annotated[
        FilePath | None, text("CONFIG_GRPC_XDS_SERVER_TLS_CACERT"), ShownDefault("the well-known authorities")
    ] = Field(None, description="PEM file of the authorities whose certificates the server may have.")
    certificate: Annotated[FilePath | None, text("CONFIG_GRPC_XDS_CLIENT_TLS_CERT")] = Field(
        None, description="PEM file of this sidecar's own certificate, for a server that asks for one."
    )
    key: Annotated[FilePath | None, text("CONFIG_GRPC_XDS_CLIENT_TLS_KEY")] = Field(
        None, description="PEM file of its private key."
    )
    server_name: Annotated[Name | None, text("CONFIG_GRPC_XDS_SERVER_TLS_SAN"), ShownDefault("the host of server")] = (
        Field(None, description="Name that the server's certificate has to be for.")
    )


class XdsConfig(Section):
    """The server that sends the rules over xDS, as Envoy Gateway does, in place of `rules`."""

    server: Annotated[XdsServerAddress, XDS_SERVER] = Field("localhost:18000", description="Its address.")
    node_id: Annotated[Name, text("CONFIG_GRPC_XDS_NODE_ID")] = Field(
        "default", description="The node that this sidecar says it is: the server chooses the rules by it."
    )
    node_metadata: Annotated[Texts, pairs("CONFIG_GRPC_XDS_NODE_METADATA", "=:")] = Field(
        {}, description="Further metadata of the node, sent to the server."
    )
    headers: Annotated[CallHeaders, pairs("CONFIG_GRPC_XDS_CLIENT_ADDITIONAL_HEADERS", ":=", secret=True)] = Field(
        {}, description="Headers of the call, for example for authorization."
    )
    retry_seconds: Annotated[RetrySeconds, duration("CONFIG_GRPC_XDS_SERVER_CONNECT_RETRY_INTERVAL")] = Field(
        3.0, description="The longest wait between two attempts to connect."
    )
    before_rules: BeforeRules = Field(
        "error",
        description="What calls get before the first rules: `error` (UNAVAILABLE), so that Envoy's `failure_mode_deny`"
        " decides, or `pass`, so that nothing is limited but by `bucket`.",
    )
    tls: Annotated[XdsTlsConfig | None, switch("CONFIG_GRPC_XDS_SERVER_USE_TLS")] = Field(
        None,
        description="TLS to the server, with this key or the variable `true`; otherwise plain text.",
    )


class SyncTlsConfig(Section):
    """TLS between sidecars, which show each other certificates. The files are read again at each handshake and every
    minute, so a renewed certificate is used without a restart.
    """

    certificate: FilePath = Field(description="PEM file of this sidecar's certificate, and those between it and `ca`.")
    key: FilePath = Field(description="PEM file of its private key, not encrypted.")
    ca: FilePath = Field(description="PEM file of the authorities that sign the certificates of all sidecars.")
    peer_names: PeerNames = Field(
        "{node}",
        description="DNS name or URI that must be among a sidecar's subject alternative names: `{node}` and `{region}`"
        " stand for its own, `*` for any one part between dots or slashes.",
    )


class SyncConfig(Section):
    """The mesh of sidecars that share their limits."""

    protocol: Annotated[Literal["grpc"], Expected("grpc", choices=("grpc",))] = Field(
        "grpc", description="How sidecars talk to each other."
    )
    peers: Annotated[tuple[PeerAddress, ...], Field(strict=False)] = Field(
        (),
        description="The `listen.sync` addresses of the other sidecars; this one may be among them. A name is resolved"
        " every few seconds, and each of its addresses is called.",
    )
    tls: SyncTlsConfig | None = Field(
        None, description="TLS between sidecars, which show each other certificates. All of a mesh have it, or none."
    )
    insecure: Flag = Field(
        False,
        description="Talk to other machines without TLS: whoever reaches `listen.sync` can then use up any limit."
        " For a network of sidecars alone.",
    )
    members: Members | None = Field(
        None,
        description="Who shares strict limits: every sidecar's `node.id`, this one's too, and its weight; the same on"
        " all of them. A sidecar's part of each limit is its weight by the sum of all. A region with a `fabric` is one"
        " member, named as in `node.region`.",
    )
    epoch: Epoch = Field(
        1, description="Number of these members; one more with each change of them, which reaches all before the next."
    )
    previous_members: Members | None = Field(
        None,
        description="The members of the epoch before, while `epoch` is above 1. A node that leaves is stopped before"
        " the new epoch is rolled out.",
    )


class ResponseHeadersConfig(Section):
    """Headers that tell callers the limit nearest to its end."""

    enabled: Annotated[Flag, flag("LIMIT_RESPONSE_HEADERS_ENABLED")] = Field(
        False, description="Whether they are sent."
    )
    limit: Annotated[HeaderName, text("LIMIT_LIMIT_HEADER")] = Field(
        _HEADERS.limit, description="Name of the header with the limit."
    )
    remaining: Annotated[HeaderName, text("LIMIT_REMAINING_HEADER")] = Field(
        _HEADERS.remaining, description="Name of the header with what is left of it."
    )
    reset: Annotated[HeaderName, text("LIMIT_RESET_HEADER")] = Field(
        _HEADERS.reset, description="Name of the header with the seconds until it is whole again."
    )


class RedisTlsConfig(Section):
    """TLS to a `rediss://` server; the files are read for each connection."""

    ca: Annotated[FilePath | None, ShownDefault("the well-known authorities")] = Field(
        None, description="PEM file of the authorities whose certificates the server may have."
    )
    certificate: FilePath | None = Field(
        None, description="PEM file of this sidecar's own certificate, for a server that asks for one."
    )
    key: FilePath | None = Field(None, description="PEM file of its private key, not encrypted.")


_CLUSTER = (
    "Whether `url` is of a Redis Cluster. Name several nodes there: at its start a sidecar asks those alone, and of a"
    " name with several addresses only the first when that one hangs."
)


class PersistenceConfig(Section):
    """Where buckets are kept across restarts: in a `file`, or in Redis or Valkey at a `url`. Without it, a sidecar that
    starts has only the state of its peers.
    """

    file: FilePath | None = Field(
        None,
        description="The file of the latest snapshot, on a disk that outlives the process. A sidecar has its own.",
    )
    url: RedisUrl | None = Field(
        None,
        description="Redis or Valkey: `redis://user@host:6379/0`, `rediss://` with TLS, or `unix:///path?db=0`. Of"
        " Sentinels or of a Cluster's nodes several, as in `redis://a:26379,b:26379/0`. Sidecars may share it.",
    )
    sentinel: Name | None = Field(
        None, description="The name of the master that the Sentinels at `url` know; without it they are no Sentinels."
    )
    cluster: Flag = Field(False, description=_CLUSTER)
    password_file: FilePath | None = Field(
        None, description="The file with the password; it is read again after each failure."
    )
    password_variable: Name | None = Field(None, description="The environment variable that holds the password.")
    tls: RedisTlsConfig | None = Field(None, description="Files for a `rediss://` server.")
    prefix: KeyPrefix = Field(
        "ratelimit", description="The prefix of all keys in Redis. Each mesh that shares a server needs its own."
    )
    every_seconds: Annotated[SnapshotSeconds | None, ShownDefault("10 for a file, 1 for Redis")] = Field(
        None,
        description="Least seconds between snapshots, or writes to Redis. A process that is killed loses the takes"
        " since the last one.",
    )


class FabricConfig(Section):
    """A Redis or Valkey through which the sidecars of a region share their buckets, instead of streams between all of
    them. One of them, the gateway, has the region's streams to `sync.peers`, and listens at `listen.sync`. Regions need
    different names (`node.region`).
    """

    url: RedisUrl = Field(
        description="As in `persistence`: `redis://user@host:6379/0`, `rediss://` with TLS, or `unix:///path?db=0`; of"
        " Sentinels several, as in `redis://a:26379,b:26379/0`, or of a Cluster's nodes. All"
        " sidecars of a region have the same."
    )
    sentinel: Name | None = Field(
        None, description="The name of the master that the Sentinels at `url` know; without it they are no Sentinels."
    )
    cluster: Flag = Field(False, description=_CLUSTER)
    password_file: FilePath | None = Field(
        None, description="The file of the password, which is read anew after each failure."
    )
    password_variable: Name | None = Field(None, description="The environment variable that holds the password.")
    tls: RedisTlsConfig | None = Field(None, description="Files for a `rediss://` server.")
    prefix: KeyPrefix = Field(
        "ratelimit", description="What all keys in Redis begin with: regions that share a server need one each."
    )


class AnswersConfig(Section):
    """Settings for every answer to Envoy, whichever rule it comes from."""

    shadow_mode: Annotated[Flag, flag("SHADOW_MODE")] = Field(
        _SETTINGS.shadow_mode,
        description="Let every request pass, whatever its limits say; they are charged and counted.",
    )
    quota_mode: Annotated[Flag, flag("QUOTA_MODE")] = Field(
        _SETTINGS.quota_mode, description="Treat every rule as if it had `quota_mode`."
    )
    near_limit_ratio: Annotated[Ratio, fraction("NEAR_LIMIT_RATIO")] = Field(
        _SETTINGS.near_limit_ratio,
        description="Hits above this part of a limit count as near it, in metrics.",
    )
    response_headers: ResponseHeadersConfig = Field(
        default_factory=ResponseHeadersConfig, description="Headers that tell callers the limit nearest to its end."
    )
    all_limits: Flag = Field(
        _SETTINGS.all_limits,
        description="Show callers in every answer all limits that the request met, in the lists `RateLimit-Policy` and"
        " `RateLimit` of draft-ietf-httpapi-ratelimit-headers. A name of more than 128 characters is cut.",
    )
    dynamic_metadata: Annotated[Flag, flag("RESPONSE_DYNAMIC_METADATA")] = Field(
        _SETTINGS.dynamic_metadata,
        description="Send Envoy the request's descriptors, and the `metadata` of the rules that admitted it, as dynamic"
        " metadata. A text of more than 1,024 characters is cut.",
    )


class SidecarConfig(Section):
    """All settings of `ratelimit-sidecar serve`."""

    node: NodeConfig = Field(default_factory=NodeConfig, description="The identity of this sidecar.")
    listen: ListenConfig = Field(
        default_factory=ListenConfig, description="The addresses on which this sidecar answers."
    )
    rules: Annotated[tuple[RulesPath, ...], Field(strict=False), RUNTIME_FOLDER] = Field(
        (),
        description="Rules files, or folders of them: `*.yaml` and `*.yml`, and nothing else but `*.md` and names that"
        " begin with a dot; one may be empty. Relative paths start at the folder of the configuration file. Without"
        " this key and `xds`, `/srv/runtime_data/current/config` is read if it is there.",
    )
    merge_domains: Annotated[Flag, flag("MERGE_DOMAIN_CONFIG")] = Field(
        False, description="Put together the descriptors of rules files with the same domain."
    )
    algorithm: Algorithm = Field(
        BUCKET_ALGORITHM,
        description="The algorithm of rules without their own `algorithm`.",
    )
    charge: Annotated[ChargeName | None, ShownDefault("admitted; with `xds` reported")] = Field(
        None, description="Which hits count, for domains and rules without their own setting (see `charge` of a rule)."
    )
    charging: Annotated[Charging, choice("STOP_CACHE_KEY_INCREMENT_WHEN_OVERLIMIT", ALL_OR_NOTHING)] = Field(
        "each",
        description="Whether a denied request charges `each` limit that it meets, or `all_or_nothing`; for domains"
        " without their own setting.",
    )
    xds: Annotated[XdsConfig | None, XDS_WHEN_ASKED_FOR] = Field(
        None,
        description="The server that sends the rules over xDS, as Envoy Gateway does, in place of `rules`; with this"
        " key or `CONFIG_TYPE=GRPC_XDS_SOTW`.",
    )
    sync: SyncConfig = Field(default_factory=SyncConfig, description="The mesh of sidecars that share their limits.")
    bucket: BucketConfig | None = Field(
        None, description="A bucket for every descriptor that no rule matches; without it those are not limited."
    )
    max_buckets: Annotated[
        MaxBuckets | None,
        ShownDefault(f"as many as have room in half of the memory beside the process, {DEFAULT_MAX_BUCKETS} at most"),
    ] = Field(
        None,
        description="Buckets kept at once, of strict limits and of others each; 440 bytes to 1.6 kB a bucket, in a mesh"
        " 5.9 kB, with sliding windows, strict limits and a fabric more. Beyond, new keys of a rule share"
        " overflow buckets. The memory is that of the cgroup (a container's limit), or of the machine.",
    )
    persistence: PersistenceConfig | None = Field(
        None, description="Where buckets are kept across restarts; not at all when this key is not there."
    )
    fabric: FabricConfig | None = Field(
        None,
        description="A Redis through which the sidecars of a region share their buckets. Without this key each has a"
        " stream to every other one.",
    )
    answers: AnswersConfig = Field(
        default_factory=AnswersConfig,
        description="Settings for every answer to Envoy, whichever rule it comes from.",
    )
    engine: Annotated[Engine, text("CRDT_ENGINE", only=True), ShownDefault("eventual")] = Field(
        Consistency.EVENTUAL,
        description="How limits are shared: `eventual` (or `ubos`) over the whole mesh; `strict` divided among the"
        " `sync.members`, which pay each other tokens; `local` not at all: each sidecar has every limit to itself."
        " `consistency` of a rule wins.",
    )

    @property
    def rule_defaults(self) -> RuleDefaults:
        """The defaults of rules."""
        # Envoy Gateway's policies have no such setting, and report the cost of requests afterwards.
        charge = self.charge or (Charge.ADMITTED if self.xds is None else Charge.REPORTED)
        return RuleDefaults(
            self.engine,
            window_of(self.algorithm),
            has_members=self.sync.members is not None,
            charge=charge,
            all_or_nothing=self.charging == ALL_OR_NOTHING,
        )

    @property
    def membership(self) -> Membership | None:
        """The membership of strict limits; None if no limit can be strict."""
        sync = self.sync
        return None if sync.members is None else Membership(sync.epoch, sync.members, sync.previous_members)

    @property
    def member(self) -> str:
        """The member of strict limits that this sidecar is, or belongs to."""
        return self.node.id if self.fabric is None else self.node.region

    @property
    def settings(self) -> AnswerSettings:
        """The settings for every answer."""
        answers, headers = self.answers, self.answers.response_headers
        return AnswerSettings(
            shadow_mode=answers.shadow_mode,
            quota_mode=answers.quota_mode,
            near_limit_ratio=answers.near_limit_ratio,
            response_headers=(
                ResponseHeaders(headers.limit, headers.remaining, headers.reset) if headers.enabled else None
            ),
            all_limits=answers.all_limits,
            dynamic_metadata=answers.dynamic_metadata,
        )

    @model_validator(mode="after")
    def _listen_for_peers(self) -> Self:
        if self.sync.peers and self.listen.sync is None:
            is_open = self.sync.tls is not None or self.sync.insecure
            address = DEFAULT_SYNC_ADDRESS if is_open else DEFAULT_LOOPBACK_SYNC_ADDRESS
            listen = self.listen.model_copy(update={"sync": address})
            # The model is frozen only for its users.
            object.__setattr__(self, "listen", listen)
        return self
