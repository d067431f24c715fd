"""The sidecar's file and environment."""

from __future__ import annotations

import socket
from decimal import Decimal
from pathlib import Path

import pytest
from certificates import Authority
from config.builders import sidecar, sidecar_errors, write
from pydantic import ValidationError

from ratelimit_sidecar.config.errors import ConfigError
from ratelimit_sidecar.config.rules_tree import RuleDefaults
from ratelimit_sidecar.config.sidecar import load_sidecar_config
from ratelimit_sidecar.crdt.limit import TokenBucketLimit, Window
from ratelimit_sidecar.limiter.rules import Consistency
from ratelimit_sidecar.limiter.settings import AnswerSettings, ResponseHeaders

NAME = "expected a name of 1 to 128 printable characters without spaces"
LISTEN = "expected an address to listen on, host:port, [ipv6]:port or unix:/path"
LISTEN_TCP = "expected an address to listen on, host:port or [ipv6]:port"
PEER = "expected the address of a peer, host:port or [ipv6]:port"
RATE = "expected a number above 0 with at most 12 digits, 9 of them after the point"
KEYS = (
    "node, listen, rules, merge_domains, algorithm, charge, charging, xds, sync, bucket, max_buckets, persistence,"
    " fabric, answers"
)
TOP_KEYS = f"expected one of {KEYS}"
NO_TYPO = "remove it, or correct its name"


def test_without_a_file_everything_has_a_default_and_the_mesh_stays_closed() -> None:
    config = load_sidecar_config(None, {})
    assert config.node.id == socket.gethostname()
    assert config.node.region == "local"
    assert config.listen.grpc == ("0.0.0.0:8081",)
    assert config.listen.admin == "127.0.0.1:8080"
    assert config.listen.sync is None
    assert config.rules == ()
    assert (config.sync.protocol, config.sync.peers) == ("grpc", ())
    assert config.bucket is None
    assert config.xds is None
    assert config.engine is Consistency.EVENTUAL
    assert (config.merge_domains, config.rule_defaults) == (False, RuleDefaults())
    assert config.settings == AnswerSettings()


def test_every_key_can_be_set(tmp_path: Path) -> None:
    (tmp_path / "rules").mkdir()
    Authority().write(tmp_path, "us-east-1-a.us-east-1.mesh.example.com")
    config = sidecar(
        tmp_path,
        """\
        node: {id: us-east-1-a, region: us-east-1}
        listen:
          grpc: ["0.0.0.0:8081", "unix:/run/ratelimit/rls.sock"]
          admin: "[::1]:0"
          admin_token_file: rules
          sync: "10.0.0.1:50051"
        rules: [./rules, /etc/hosts]
        sync:
          protocol: grpc
          peers: [eu-west-2.edge.example.com:50051, "[fe80::1]:50051"]
          tls: {certificate: tls.crt, key: tls.key, ca: ca.crt, peer_names: "*.{region}.mesh.example.com"}
        bucket: {capacity: 1000, refillRate: 0.1}
        merge_domains: true
        algorithm: sliding_window
        answers:
          shadow_mode: true
          quota_mode: true
          near_limit_ratio: 0.5
          response_headers: {enabled: true, limit: L, remaining: Rem, reset: Res}
          dynamic_metadata: true
        """,
    )
    assert (config.node.id, config.node.region) == ("us-east-1-a", "us-east-1")
    assert config.listen.grpc == ("0.0.0.0:8081", "unix:/run/ratelimit/rls.sock")
    assert (config.listen.admin, config.listen.sync) == ("[::1]:0", "10.0.0.1:50051")
    assert config.listen.admin_token_file == tmp_path / "rules"
    assert config.rules == (tmp_path / "rules", Path("/etc/hosts"))
    assert config.sync.peers == ("eu-west-2.edge.example.com:50051", "[fe80::1]:50051")
    assert config.sync.tls is not None
    assert (config.sync.tls.certificate, config.sync.tls.key) == (tmp_path / "tls.crt", tmp_path / "tls.key")
    assert (config.sync.tls.ca, config.sync.tls.peer_names) == (tmp_path / "ca.crt", "*.{region}.mesh.example.com")
    assert config.bucket is not None
    assert config.bucket.refill_rate == Decimal("0.1")
    assert config.bucket.limit() == TokenBucketLimit(tokens=1, period_us=10_000_000, capacity=1000)
    assert config.merge_domains is True
    assert config.rule_defaults == RuleDefaults(window=Window.SLIDING)
    assert config.settings == AnswerSettings(
        shadow_mode=True,
        quota_mode=True,
        near_limit_ratio=0.5,
        response_headers=ResponseHeaders("L", "Rem", "Res"),
        dynamic_metadata=True,
    )


def test_every_key_of_xds_can_be_set(tmp_path: Path) -> None:
    for name in ("ca.pem", "tls.crt", "tls.key"):
        write(tmp_path / name, "")
    config = sidecar(
        tmp_path,
        """\
        xds:
          server: envoy-gateway:18001
          node_id: rate-limit
          node_metadata: {zone: a}
          headers: {X-Token: abc}
          retry_seconds: 5
          tls: {ca: ca.pem, certificate: tls.crt, key: tls.key, server_name: envoy-gateway}
        """,
    )
    xds = config.xds
    assert xds is not None
    assert (xds.server, xds.node_id, xds.node_metadata) == ("envoy-gateway:18001", "rate-limit", {"zone": "a"})
    assert (xds.headers, xds.retry_seconds) == ({"x-token": "abc"}, 5.0)
    assert xds.tls is not None
    assert (xds.tls.ca, xds.tls.certificate) == (tmp_path / "ca.pem", tmp_path / "tls.crt")
    assert (xds.tls.key, xds.tls.server_name) == (tmp_path / "tls.key", "envoy-gateway")


def test_an_empty_xds_is_there_with_its_defaults(tmp_path: Path) -> None:
    xds = sidecar(tmp_path, "xds: {}").xds
    assert xds is not None
    assert (xds.server, xds.node_id, xds.retry_seconds, xds.tls) == ("localhost:18000", "default", 3.0, None)


def test_response_headers_have_to_be_enabled(tmp_path: Path) -> None:
    assert sidecar(tmp_path, "answers: {response_headers: {limit: L}}").settings.response_headers is None


def test_the_mesh_listens_by_default_when_there_are_peers(tmp_path: Path) -> None:
    assert sidecar(tmp_path, "sync: {peers: [eu:50051], insecure: true}").listen.sync == "0.0.0.0:50051"


def test_a_configuration_cannot_be_changed(tmp_path: Path) -> None:
    with pytest.raises(ValidationError):
        sidecar(tmp_path, "node: {id: a}").node.region = "elsewhere"


def test_a_key_without_a_value_counts_as_left_out(tmp_path: Path) -> None:
    config = sidecar(tmp_path, "node:\n  region:\nlisten:\nrules:\nbucket:\n", {"REGION": "eu"})
    assert config == load_sidecar_config(None, {"REGION": "eu"})


@pytest.mark.parametrize(
    ("engine", "consistency"),
    [
        ("eventual", Consistency.EVENTUAL),
        ("ubos", Consistency.EVENTUAL),
        ("local", Consistency.LOCAL),
        ("", Consistency.EVENTUAL),
    ],
)
def test_crdt_engine_sets_how_limits_are_shared(engine: str, consistency: Consistency) -> None:
    assert load_sidecar_config(None, {"CRDT_ENGINE": engine}).engine is consistency


def test_region_comes_from_the_environment_unless_the_file_has_it(tmp_path: Path) -> None:
    environ = {"REGION": "eu-west-2"}
    assert load_sidecar_config(None, environ).node.region == "eu-west-2"
    assert sidecar(tmp_path, "node: {id: a}", environ).node.region == "eu-west-2"
    assert sidecar(tmp_path, "node: {region: us-east-1}", environ).node.region == "us-east-1"


@pytest.mark.parametrize(
    ("environ", "line"),
    [
        (
            {"CRDT_ENGINE": "strict"},
            'environment: CRDT_ENGINE: found "strict", expected sync.members as well; list in it the node ids of all'
            " sidecars that share limits, or the regions that have a fabric",
        ),
        (
            {"CRDT_ENGINE": "foo"},
            'environment: CRDT_ENGINE: found "foo", expected eventual (also spelt ubos), strict or local',
        ),
        (
            {"CRDT_ENGINE": "Eventual"},
            'environment: CRDT_ENGINE: found "Eventual", expected eventual (also spelt ubos), strict or local; did you'
            ' mean "eventual"?',
        ),
        ({"REGION": "two words"}, f'environment: REGION: found "two words", {NAME}'),
    ],
)
def test_a_wrong_variable_is_named(environ: dict[str, str], line: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_sidecar_config(None, environ)
    assert str(error.value) == line
    [problem] = error.value.problems
    assert (problem.file, problem.line, problem.column) == ("environment", None, None)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", f"1:1: found nothing, expected a mapping with the keys {KEYS}"),
        ("- a", f"1:1: found a list, expected a mapping with the keys {KEYS}"),
        ("x", f'1:1: found "x", expected a mapping with the keys {KEYS}'),
        ("nodes: {}", f'1:1: nodes: found the unknown key "nodes", {TOP_KEYS}; did you mean "node"?'),
        ("nodes:", f'1:1: nodes: found the unknown key "nodes", {TOP_KEYS}; did you mean "node"?'),
        (
            "sync: {}\npeers: []",
            f'2:1: peers: found the unknown key "peers", {TOP_KEYS}; it belongs below sync: check the indentation',
        ),
        ('"a.b": 1', f'1:1: "a.b": found the unknown key "a.b", {TOP_KEYS}; {NO_TYPO}'),
        (
            "engine: local",
            '1:1: engine: found the key "engine", expected it in the environment; set the environment variable'
            " CRDT_ENGINE instead",
        ),
        ("node: a", '1:1: node: found "a", expected a mapping with the keys id, region'),
        ("node: {id: ''}", f'1:8: node.id: found "", {NAME}'),
        ("node: {id: 7}", f'1:8: node.id: found 7, {NAME}; write it in quotes: "7"'),
        ("node: {id: a b}", f'1:8: node.id: found "a b", {NAME}'),
        ("node:\n  region: [a]", f"2:3: node.region: found a list, {NAME}"),
        ("rules: rules.yaml", '1:1: rules: found "rules.yaml", expected a list, each item the path of a file or folder;'
         ' write it as a list: ["rules.yaml"]'),
        ("rules:\n  a: b", "1:1: rules: found a mapping, expected a list, each item the path of a file or folder"),
        ("rules: ['']", '1:9: rules[0]: found "", expected the path of a file or folder'),
        ("rules: [~]", "1:9: rules[0]: found ~, expected the path of a file or folder"),
        ('rules: ["a\\0b"]', '1:9: rules[0]: found "a\\u0000b", expected the path of a file or folder'),
        ("listen: {grpc: []}", "1:10: listen.grpc: found an empty list, expected at least one address to listen on;"
         " leave the key out for the default"),
        ("listen: {admin: 8080}", f'1:10: listen.admin: found 8080, {LISTEN_TCP}; write it in quotes: "8080"'),
        ("listen: {admin: localhost}", f'1:10: listen.admin: found "localhost", {LISTEN_TCP}; add :port'),
        ("listen: {admin: ':80'}",
         f'1:10: listen.admin: found ":80", {LISTEN_TCP}; for all interfaces write "0.0.0.0:80"'),
        ("listen: {sync: 'a:65536'}", f'1:10: listen.sync: found "a:65536", {LISTEN_TCP}; a port is 0 to 65535'),
        ("listen: {sync: 'unix:/a'}",
         f'1:10: listen.sync: found "unix:/a", {LISTEN_TCP}; a unix socket cannot be used here'),
        ("listen:\n  grpc:\n    - unix:rls.sock", f'3:7: listen.grpc[0]: found "unix:rls.sock", {LISTEN}; after unix:'
         " write the absolute path of the socket, as in unix:/run/ratelimit/rls.sock"),
        ("listen: {grpc: [a:1, a:1]}", '1:22: listen.grpc[1]: found "a:1", which listen.grpc[0] has already, expected'
         " another address; listen on an address only once"),
        ("listen: {admin: '[::1]:1', sync: '[::1]:1'}",
         '1:28: listen.sync: found "[::1]:1", which listen.admin has already, expected'
         " another address; listen on an address only once"),
        ("listen: {admin: 'a:1', ext_authz_http: 'a:1'}",
         '1:24: listen.ext_authz_http: found "a:1", which listen.admin has already, expected'
         " another address; listen on an address only once"),
        ("merge_domains: 1", "1:1: merge_domains: found 1, expected true or false"),
        ("algorithm: leaky", '1:1: algorithm: found "leaky", expected one of token_bucket, fixed_window,'
         " sliding_window"),
        ("answers: {near_limit_ratio: 80}", "1:11: answers.near_limit_ratio: found 80, expected a number from 0 to 1"),
        ("answers: {near_limit_ratio: '0.8'}",
         '1:11: answers.near_limit_ratio: found "0.8", expected a number from 0 to 1; remove the quotes'),
        ("answers: {near_limit_ratio: true}",
         "1:11: answers.near_limit_ratio: found true, expected a number from 0 to 1"),
        ("answers: {response_headers: {reset: a b}}",
         '1:30: answers.response_headers.reset: found "a b", expected the name of an HTTP header'),
        ("answers: {response_headers: true}", "1:11: answers.response_headers: found true, expected a mapping with the"
         " keys enabled, limit, remaining, reset"),
        ("xds: localhost", '1:1: xds: found "localhost", expected a mapping with the keys server, node_id,'
         " node_metadata, headers, retry_seconds, before_rules, tls"),
        ("xds: {server: 'http://a:1/'}", '1:7: xds.server: found "http://a:1/", expected the address of an xDS server,'
         ' host:port or [ipv6]:port; without the scheme: "a:1"'),
        ("xds: {server: 'a:0'}", '1:7: xds.server: found "a:0", expected the address of an xDS server, host:port or'
         " [ipv6]:port; port 0 cannot be called: write the port the server listens on"),
        ("xds: {node_metadata: {a: 1}}", "1:7: xds.node_metadata: found a mapping, expected a mapping of text to text"),
        ("xds: {headers: {grpc-a: x}}", "1:7: xds.headers: found a mapping, expected a mapping of names, in letters,"
         " digits and _ . -, to values in printable ASCII"),
        ("xds: {headers: {a: ü}}", "1:7: xds.headers: found a mapping, expected a mapping of names, in letters, digits"
         " and _ . -, to values in printable ASCII"),
        ("xds: {retry_seconds: 0}", "1:7: xds.retry_seconds: found 0, expected a number from 0.2 to 3600"),
        ("sync: {protocol: http}", '1:8: sync.protocol: found "http", expected grpc'),
        ("sync: {peers: [a]}", f'1:16: sync.peers[0]: found "a", {PEER}; add :port'),
        ("sync: {peers: ['unix:']}", f'1:16: sync.peers[0]: found "unix:", {PEER}; a unix socket cannot be used here'),
        ("sync: {peers: ['a:0']}", f'1:16: sync.peers[0]: found "a:0", {PEER}; port 0 cannot be called: write the port'
         " the peer listens on (listen.sync there)"),
        ("sync: {peers: [a:1, b:1, a:1], insecure: true}",
         '1:26: sync.peers[2]: found "a:1", which sync.peers[0] has already, expected'
         " another address; list each peer once; is another one missing?"),
        ("bucket: {capacity: 1}", f"1:1: bucket.refillRate: found nothing, {RATE}"),
        ("bucket: {capacity: '10', refillRate: 1}",
         '1:10: bucket.capacity: found "10", expected a whole number from 1 to'
         " 1099511627776; remove the quotes"),
        ("bucket: {capacity: 0, refillRate: 1}", "1:10: bucket.capacity: found 0, expected a whole number from 1 to"
         " 1099511627776"),
        ("bucket: {capacity: true, refillRate: 1}", "1:10: bucket.capacity: found true, expected a whole number from 1"
         " to 1099511627776"),
        ("bucket: {capacity: 1.0, refillRate: 1}", "1:10: bucket.capacity: found 1.0, expected a whole number from 1 to"
         " 1099511627776"),
        ("bucket: {capacity: 1099511627777, refillRate: 1}", "1:10: bucket.capacity: found 1099511627777, expected a"
         " whole number from 1 to 1099511627776"),
        ("bucket: {capacity: 1, refillRate: 0}", f"1:23: bucket.refillRate: found 0, {RATE}"),
        ("bucket: {capacity: 1, refillRate: -0.5}", f"1:23: bucket.refillRate: found -0.5, {RATE}"),
        ("bucket: {capacity: 1, refillRate: 1099511627777}", f"1:23: bucket.refillRate: found 1099511627777, {RATE}"),
        ("bucket: {capacity: 1, refillRate: 0.0000000011}", f"1:23: bucket.refillRate: found 0.0000000011, {RATE}"),
        ("bucket: {capacity: 1, refillRate: 1099511627775.9}",
         f"1:23: bucket.refillRate: found 1099511627775.9, {RATE}"),
        ("bucket: {capacity: 1, refillRate: .nan}", f'1:23: bucket.refillRate: found ".nan", {RATE}'),
        ("bucket: {capacity: 1, refillRate: yes}", f"1:23: bucket.refillRate: found yes, {RATE}"),
        ("bucket: {capacity: 1, refillRate: 1e999}", f"1:23: bucket.refillRate: found 1e999, {RATE}"),
        ("bucket: {capacity: 1, refillRate: 1, refill_rate: 1}", '1:38: bucket.refill_rate: found the unknown key'
         ' "refill_rate", expected one of capacity, refillRate; did you mean "refillRate"?'),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_place_and_its_fix(tmp_path: Path, text: str, line: str) -> None:
    assert sidecar_errors(tmp_path, text) == [f"sidecar.yaml:{line}"]


def test_all_mistakes_are_told_at_once_in_order_of_their_lines(tmp_path: Path) -> None:
    text = """\
    node: {id: a, id: b}
    listen: {admin: 1}
    sync: {peers: [a]}
    rules: 5
    """
    places = [line.split(": ")[:2] for line in sidecar_errors(tmp_path, text, {"CRDT_ENGINE": "x"})]
    assert places == [
        ["sidecar.yaml:1:15", "node.id"],
        ["sidecar.yaml:2:10", "listen.admin"],
        ["sidecar.yaml:3:16", "sync.peers[0]"],
        ["sidecar.yaml:4:1", "rules"],
        ["environment", "CRDT_ENGINE"],
    ]


def test_a_rules_path_that_does_not_exist_is_told_where_it_is_written(tmp_path: Path) -> None:
    write(tmp_path / "good.yaml", "domain: d")
    assert sidecar_errors(tmp_path, "rules:\n  - good.yaml\n  - conf/rules\n") == [
        'sidecar.yaml:3:5: rules[1]: found "conf/rules", expected a file or folder that can be read; nothing is there:'
        f' "{tmp_path}/conf/rules"'
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("{}", "persistence: found neither file nor url, expected one of the two; keep one of them"),
        (
            "{file: s, url: 'redis://r'}",
            "persistence: found both file and url, expected one of the two; keep one of them",
        ),
        (
            "{file: s, cluster: true}",
            "persistence.cluster: found cluster beside file, expected it beside url; remove it",
        ),
        (
            "{url: 'redis://a,b'}",
            "persistence.url: found several hosts, expected one; name the Sentinels' master in sentinel, or say"
            " cluster: true",
        ),
        (
            "{url: 'redis://a,b', cluster: true, sentinel: m}",
            "persistence.cluster: found true beside sentinel, expected one of the two; remove one",
        ),
        (
            "{url: 'redis://a', password_file: f, password_variable: V}",
            "persistence.password_file: found password_file beside password_variable, expected one of the two;"
            " remove one",
        ),
        (
            "{url: 'redis://a', tls: {}}",
            "persistence.tls: found files beside a url without TLS, expected a rediss:// url; change one of them",
        ),
    ],
)
def test_keys_of_persistence_that_do_not_go_together_are_told_of(tmp_path: Path, text: str, line: str) -> None:
    [found] = sidecar_errors(tmp_path, f"persistence: {text}")
    assert found.partition(": ")[2] == line


@pytest.mark.parametrize(
    "url",
    [
        *("redis://r", "redis://r:6379/3", "rediss://ada:secret@r", "redis://[::1]:6379", "redis://a:1,b:2,[::1]:3/0"),
        *("unix:///run/redis.sock", "unix://ada@/run/redis.sock?db=2"),
    ],
)
def test_urls_of_redis(tmp_path: Path, url: str) -> None:
    cluster = "," in url
    assert sidecar(tmp_path, f"persistence: {{url: '{url}', cluster: {str(cluster).lower()}}}").persistence is not None


@pytest.mark.parametrize(
    "url",
    [
        *(
            "r:6379",
            "http://r",
            "redis://",
            "redis://r:port",
            "redis://r:0",
            "redis://a,",
            "redis://r/a",
            "redis://r?db=1",
        ),
        *("unix://run/redis.sock", "unix://", "unix:///s?db=x", "unix:///s?x=1"),
    ],
)
def test_what_is_no_url_of_redis(tmp_path: Path, url: str) -> None:
    [found] = sidecar_errors(tmp_path, f"persistence: {{url: '{url}'}}")
    assert (
        "expected redis://host:port/db, rediss:// with TLS, several hosts after commas, or unix:///path?db=0" in found
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "fabric: {url: 'redis://a,b'}",
            "fabric.url: found several hosts, expected one; name the Sentinels' master in sentinel, or say cluster:"
            " true",
        ),
        (
            "fabric: {url: 'redis://a', tls: {ca: /nowhere}}",
            "fabric.tls: found files beside a url without TLS, expected a rediss:// url; change one of them",
        ),
        (
            "fabric: {url: 'redis://a'}\nsync: {peers: ['west:1']}",
            "node.region: found nothing, beside fabric and sync.peers, expected a name that no other region has: what"
            " all its sidecars take is known to others under it; add it",
        ),
        (
            "fabric: {url: 'redis://a'}\npersistence: {file: state}",
            "fabric: found persistence beside fabric, expected one of the two; remove one: the Redis of a fabric keeps"
            " what was taken",
        ),
    ],
)
def test_what_does_not_go_together_with_a_fabric(tmp_path: Path, text: str, problem: str) -> None:
    assert any(problem in found for found in sidecar_errors(tmp_path, text))


def test_a_region_with_a_fabric_is_one_member_of_strict_limits(tmp_path: Path) -> None:
    members = "sync: {members: {east: 1, west: 1}}"
    config = sidecar(tmp_path, f"node: {{id: a, region: east}}\nfabric: {{url: 'redis://a'}}\n{members}")
    assert config.member == "east"
    assert sidecar(tmp_path, f"node: {{id: a, region: east}}\n{members}").member == "a"


def test_the_files_of_a_fabric_are_beside_the_configuration(tmp_path: Path) -> None:
    fabric = sidecar(tmp_path, "fabric: {url: 'redis://a', password_file: password}").fabric
    assert fabric is not None
    assert fabric.password_file == tmp_path / "password"


def test_rules_come_from_files_or_over_xds(tmp_path: Path) -> None:
    write(tmp_path / "good.yaml", "domain: d")
    assert sidecar_errors(tmp_path, "xds: {}\nrules: [good.yaml]") == [
        "sidecar.yaml:2:1: rules: found rules beside xds, expected one of the two; remove rules or xds"
    ]
    assert sidecar_errors(tmp_path, "rules: [good.yaml]", {"CONFIG_TYPE": "GRPC_XDS_SOTW"}) == [
        "sidecar.yaml:1:1: rules: found rules beside CONFIG_TYPE of the environment, expected one of the two; remove"
        " rules or CONFIG_TYPE of the environment"
    ]


def test_the_file_with_the_token_of_the_admin_address_must_be_there(tmp_path: Path) -> None:
    [error] = sidecar_errors(tmp_path, "listen: {admin_token_file: token}")
    assert error.startswith(
        'sidecar.yaml:1:10: listen.admin_token_file: found "token", expected a file that can be read;'
    )


def test_files_for_tls_must_be_there_and_a_certificate_needs_its_key(tmp_path: Path) -> None:
    write(tmp_path / "tls.crt", "")
    assert sidecar_errors(tmp_path, "xds:\n  tls:\n    ca: ca.pem\n    certificate: tls.crt\n") == [
        "sidecar.yaml:2:3: xds.tls.key: found nothing, expected the key that belongs to xds.tls.certificate; add it, or"
        " remove certificate",
        'sidecar.yaml:3:5: xds.tls.ca: found "ca.pem", expected a file that can be read; nothing is there:'
        f' "{tmp_path}/ca.pem"',
    ]


def test_a_sidecar_may_be_among_its_own_peers(tmp_path: Path) -> None:
    config = sidecar(tmp_path, "listen: {sync: 'a:50051'}\nsync: {peers: ['a:50051', 'b:50051'], insecure: true}")
    assert config.sync.peers == ("a:50051", "b:50051")


def test_port_zero_may_be_listened_on_more_than_once(tmp_path: Path) -> None:
    config = sidecar(tmp_path, "listen: {grpc: ['127.0.0.1:0'], admin: '127.0.0.1:0', sync: '127.0.0.1:0'}")
    assert config.listen.sync == "127.0.0.1:0"
