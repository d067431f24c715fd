"""The sidecar's file and environment."""

from __future__ import annotations

import socket
from decimal import Decimal
from pathlib import Path

import pytest
from config.builders import sidecar, sidecar_errors, write
from pydantic import ValidationError

from ratelimit_sidecar.config.errors import ConfigError
from ratelimit_sidecar.config.sidecar import load_sidecar_config
from ratelimit_sidecar.crdt.limit import Limit
from ratelimit_sidecar.limiter.rules import Consistency

NAME = "expected a name of 1 to 128 printable characters without spaces"
LISTEN = "expected an address to listen on, host:port, [ipv6]:port or unix:/path"
LISTEN_TCP = "expected an address to listen on, host:port or [ipv6]:port"
PEER = "expected the address of a peer, host:port or [ipv6]:port"
RATE = "expected a number above 0 with at most 12 digits, 9 of them after the point"
TOP_KEYS = "expected one of node, listen, rules, sync, bucket"


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
    assert config.engine is Consistency.EVENTUAL


def test_every_key_can_be_set(tmp_path: Path) -> None:
    (tmp_path / "rules").mkdir()
    config = sidecar(
        tmp_path,
        """\
        node: {id: us-east-1-a, region: us-east-1}
        listen: {grpc: ["0.0.0.0:8081", "unix:/run/ratelimit/rls.sock"], admin: "[::1]:0", sync: "10.0.0.1:50051"}
        rules: [./rules, /]
        sync: {protocol: grpc, peers: [eu-west-2.edge.example.com:50051, "[fe80::1]:50051"]}
        bucket: {capacity: 1000, refillRate: 0.1}
        """,
    )
    assert (config.node.id, config.node.region) == ("us-east-1-a", "us-east-1")
    assert config.listen.grpc == ("0.0.0.0:8081", "unix:/run/ratelimit/rls.sock")
    assert (config.listen.admin, config.listen.sync) == ("[::1]:0", "10.0.0.1:50051")
    assert config.rules == (tmp_path / "rules", Path("/"))
    assert config.sync.peers == ("eu-west-2.edge.example.com:50051", "[fe80::1]:50051")
    assert config.bucket is not None
    assert config.bucket.refill_rate == Decimal("0.1")
    assert config.bucket.limit == Limit(tokens=1, period_us=10_000_000, capacity=1000)


def test_the_mesh_listens_by_default_when_there_are_peers(tmp_path: Path) -> None:
    assert sidecar(tmp_path, "sync: {peers: [eu:50051]}").listen.sync == "0.0.0.0:50051"


def test_a_configuration_cannot_be_changed(tmp_path: Path) -> None:
    with pytest.raises(ValidationError):
        sidecar(tmp_path, "sync: {peers: [eu:50051]}").node.region = "elsewhere"


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
            'environment: CRDT_ENGINE: found "strict", expected eventual (also spelt ubos) or local; "strict" is not'
            " yet available",
        ),
        (
            {"CRDT_ENGINE": "foo"},
            'environment: CRDT_ENGINE: found "foo", expected eventual (also spelt ubos) or local',
        ),
        (
            {"CRDT_ENGINE": "Eventual"},
            'environment: CRDT_ENGINE: found "Eventual", expected eventual (also spelt ubos) or local; did you mean'
            ' "eventual"?',
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
        ("", "1:1: found nothing, expected a mapping with the keys node, listen, rules, sync, bucket"),
        ("- a", "1:1: found a list, expected a mapping with the keys node, listen, rules, sync, bucket"),
        ("x", '1:1: found "x", expected a mapping with the keys node, listen, rules, sync, bucket'),
        ("nodes: {}", f'1:1: nodes: found the unknown key "nodes", {TOP_KEYS}; did you mean "node"?'),
        ("nodes:", f'1:1: nodes: found the unknown key "nodes", {TOP_KEYS}; did you mean "node"?'),
        (
            "sync: {}\npeers: []",
            f'2:1: peers: found the unknown key "peers", {TOP_KEYS}; it belongs below sync: check the indentation',
        ),
        ('"a.b": 1', f'1:1: "a.b": found the unknown key "a.b", {TOP_KEYS}'),
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
        ("listen: {admin: 'a:1', sync: 'a:1'}",
         '1:24: listen.sync: found "a:1", which listen.admin has already, expected'
         " another address; listen on an address only once"),
        ("sync: {protocol: http}", '1:8: sync.protocol: found "http", expected grpc'),
        ("sync: {peers: [a]}", f'1:16: sync.peers[0]: found "a", {PEER}; add :port'),
        ("sync: {peers: ['unix:']}", f'1:16: sync.peers[0]: found "unix:", {PEER}; a unix socket cannot be used here'),
        ("sync: {peers: ['a:0']}", f'1:16: sync.peers[0]: found "a:0", {PEER}; port 0 cannot be called: write the port'
         " the peer listens on (listen.sync there)"),
        ("sync: {peers: [a:1, b:1, a:1]}", '1:26: sync.peers[2]: found "a:1", which sync.peers[0] has already, expected'
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


def test_a_sidecar_may_be_among_its_own_peers(tmp_path: Path) -> None:
    config = sidecar(tmp_path, "listen: {sync: 'a:50051'}\nsync: {peers: ['a:50051', 'b:50051']}")
    assert config.sync.peers == ("a:50051", "b:50051")


def test_port_zero_may_be_listened_on_more_than_once(tmp_path: Path) -> None:
    config = sidecar(tmp_path, "listen: {grpc: ['127.0.0.1:0'], admin: '127.0.0.1:0', sync: '127.0.0.1:0'}")
    assert config.listen.sync == "127.0.0.1:0"
