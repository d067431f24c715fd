"""What environment variables say where the file says nothing: those of envoyproxy/ratelimit, read as it reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
from config.builders import lines, sidecar, sidecar_errors, write

from ratelimit_sidecar.config import runtime
from ratelimit_sidecar.config.errors import ConfigError
from ratelimit_sidecar.config.runtime import RUNTIME_FOLDER
from ratelimit_sidecar.config.sidecar import SidecarConfig, load_sidecar_config
from ratelimit_sidecar.limiter.settings import ResponseHeaders

XDS = {"CONFIG_TYPE": "GRPC_XDS_SOTW"}


def config_of(**environ: str) -> SidecarConfig:
    return load_sidecar_config(None, environ)


def errors_of(folder: Path = Path("/nowhere"), **environ: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load_sidecar_config(None, environ)
    return lines(error, folder)


@pytest.mark.parametrize(
    ("given", "value"),
    [
        *((given, True) for given in ("1", "t", "T", "TRUE", "true", "True")),
        *((given, False) for given in ("0", "f", "F", "FALSE", "false", "False", "")),
    ],
)
def test_a_boolean_is_read_as_go_reads_it(given: str, value: bool) -> None:
    assert config_of(MERGE_DOMAIN_CONFIG=given).merge_domains is value


@pytest.mark.parametrize("given", ["yes", "on", "tRUE", "2", " true"])
def test_what_go_takes_for_no_boolean_is_none(given: str) -> None:
    assert errors_of(SHADOW_MODE=given) == [f'environment: SHADOW_MODE: found "{given}", expected true or false']


def test_answers_are_set_by_their_variables() -> None:
    settings = config_of(
        SHADOW_MODE="true",
        QUOTA_MODE="t",
        NEAR_LIMIT_RATIO="0.9",
        LIMIT_RESPONSE_HEADERS_ENABLED="1",
        LIMIT_LIMIT_HEADER="X-Limit",
        LIMIT_REMAINING_HEADER="X-Remaining",
        LIMIT_RESET_HEADER="X-Reset",
        RESPONSE_DYNAMIC_METADATA="TRUE",
    ).settings
    assert (settings.shadow_mode, settings.quota_mode, settings.dynamic_metadata) == (True, True, True)
    assert settings.near_limit_ratio == 0.9
    assert settings.response_headers == ResponseHeaders("X-Limit", "X-Remaining", "X-Reset")


@pytest.mark.parametrize(("given", "ratio"), [("80", 1), ("1.5", 1), ("1", 1), (".8", 0.8), ("8e-1", 0.8), ("0", 0)])
def test_of_a_ratio_above_1_nothing_is_near(given: str, ratio: float) -> None:
    """There nothing is either: the part of the limit is more than the limit."""
    assert config_of(NEAR_LIMIT_RATIO=given).settings.near_limit_ratio == ratio


@pytest.mark.parametrize("given", ["-1", "true", "nan"])
def test_what_is_no_ratio_is_refused(given: str) -> None:
    assert errors_of(NEAR_LIMIT_RATIO=given) == [
        f'environment: NEAR_LIMIT_RATIO: found "{given}", expected a number from 0 to 1'
    ]


def test_the_file_wins_key_by_key(tmp_path: Path) -> None:
    text = "answers: {near_limit_ratio: 0.5, response_headers: {limit: L}}\nmerge_domains: false\n"
    environ = {"NEAR_LIMIT_RATIO": "0.9", "LIMIT_LIMIT_HEADER": "X", "LIMIT_RESET_HEADER": "R", "QUOTA_MODE": "1"}
    config = sidecar(tmp_path, text, {**environ, "MERGE_DOMAIN_CONFIG": "true"})
    headers = config.answers.response_headers
    assert (config.answers.near_limit_ratio, headers.limit, headers.reset) == (0.5, "L", "R")
    assert (config.merge_domains, config.answers.quota_mode) == (False, True)


@pytest.mark.parametrize(
    ("environ", "line"),
    [
        ({"NEAR_LIMIT_RATIO": "80%"}, 'NEAR_LIMIT_RATIO: found "80%", expected a number from 0 to 1'),
        ({"LIMIT_RESET_HEADER": "a:b"}, 'LIMIT_RESET_HEADER: found "a:b", expected the name of an HTTP header'),
        ({"CONFIG_TYPE": "XDS"}, 'CONFIG_TYPE: found "XDS", expected FILE or GRPC_XDS_SOTW'),
        (
            {**XDS, "CONFIG_GRPC_XDS_SERVER_URL": "gateway"},
            'CONFIG_GRPC_XDS_SERVER_URL: found "gateway", expected the address of an xDS server, host:port or'
            " [ipv6]:port; add :port",
        ),
        (
            {**XDS, "CONFIG_GRPC_XDS_NODE_METADATA": "a"},
            'CONFIG_GRPC_XDS_NODE_METADATA: found "a", expected pairs as in key:value,key:value',
        ),
        (
            {**XDS, "CONFIG_GRPC_XDS_SERVER_CONNECT_RETRY_INTERVAL": "3"},
            'CONFIG_GRPC_XDS_SERVER_CONNECT_RETRY_INTERVAL: found "3", expected a duration such as 3s or 1m30s',
        ),
        (
            {**XDS, "CONFIG_GRPC_XDS_SERVER_CONNECT_RETRY_INTERVAL": "2h"},
            'CONFIG_GRPC_XDS_SERVER_CONNECT_RETRY_INTERVAL: found "2h", expected a number from 0.2 to 3600',
        ),
        (
            {**XDS, "CONFIG_GRPC_XDS_SERVER_USE_TLS": "yes"},
            'CONFIG_GRPC_XDS_SERVER_USE_TLS: found "yes", expected true or false',
        ),
        (
            {**XDS, "CONFIG_GRPC_XDS_SERVER_USE_TLS": "1", "CONFIG_GRPC_XDS_SERVER_TLS_CACERT": "/nowhere/ca"},
            'CONFIG_GRPC_XDS_SERVER_TLS_CACERT: found "/nowhere/ca", expected a file that can be read; nothing is'
            ' there: "/nowhere/ca"',
        ),
        (
            {"GRPC_HOST": "a", "GRPC_PORT": "x"},
            'GRPC_HOST, GRPC_PORT: found "a" and "x", expected an address to listen on, host:port, [ipv6]:port or'
            " unix:/path",
        ),
        (
            {"PORT": "99999"},
            'PORT: found "99999", expected an address to listen on, host:port or [ipv6]:port; a port is 0 to 65535',
        ),
        (
            {"GRPC_UDS": "rls.sock"},
            'GRPC_UDS: found "rls.sock", expected an address to listen on, host:port, [ipv6]:port or unix:/path; after'
            " unix: write the absolute path of the socket, as in unix:/run/ratelimit/rls.sock",
        ),
        (
            {"GRPC_SERVER_USE_TLS": "maybe", "GRPC_SERVER_TLS_CERT": "/tls.crt"},
            'GRPC_SERVER_USE_TLS: found "maybe", expected true or false',
        ),
        (
            {"GRPC_MAX_CONNECTION_AGE": "86400"},
            'GRPC_MAX_CONNECTION_AGE: found "86400", expected a duration such as 3s or 1m30s',
        ),
        (
            {"GRPC_MAX_CONNECTION_AGE_GRACE": "9000h"},
            'GRPC_MAX_CONNECTION_AGE_GRACE: found "9000h", expected a number from 0 to 31536000',
        ),
        (
            {"RUNTIME_ROOT": "/nowhere", "RUNTIME_SUBDIRECTORY": "rls"},
            'RUNTIME_ROOT, RUNTIME_SUBDIRECTORY: found "/nowhere" and "rls", expected a file or folder that can be'
            ' read; nothing is there: "/nowhere/rls/config"',
        ),
    ],
)
def test_a_wrong_variable_is_named(environ: dict[str, str], line: str) -> None:
    assert errors_of(**environ) == [f"environment: {line}"]


@pytest.mark.parametrize("given", ["false", "0", ""])
def test_without_tls_its_files_mean_nothing(given: str) -> None:
    assert config_of(GRPC_SERVER_USE_TLS=given, GRPC_SERVER_TLS_CERT="/tls.crt") == config_of()


@pytest.mark.parametrize(
    ("environ", "grpc", "admin"),
    [
        ({"GRPC_HOST": "127.0.0.1"}, "127.0.0.1:8081", "127.0.0.1:8080"),
        ({"GRPC_PORT": "9081", "PORT": "9080"}, "0.0.0.0:9081", "127.0.0.1:9080"),
        ({"GRPC_HOST": "[::]", "GRPC_PORT": "1", "HOST": "0.0.0.0"}, "[::]:1", "0.0.0.0:8080"),
        ({"GRPC_UDS": "/run/rls.sock", "GRPC_PORT": "1"}, "unix:/run/rls.sock", "127.0.0.1:8080"),
        ({"GRPC_HOST": "::", "HOST": "::"}, "[::]:8081", "[::]:8080"),
        ({"GRPC_HOST": "::1", "HOST": "fe80::1"}, "[::1]:8081", "[fe80::1]:8080"),
        ({"GRPC_PORT": "0x1F91", "PORT": "+8_080"}, "0.0.0.0:8081", "127.0.0.1:8080"),
    ],
)
def test_addresses_are_put_together_from_their_halves(environ: dict[str, str], grpc: str, admin: str) -> None:
    listen = config_of(**environ).listen
    assert (listen.grpc, listen.admin) == ((grpc,), admin)


def test_an_address_in_the_file_wins_over_both_halves(tmp_path: Path) -> None:
    environ = {"GRPC_HOST": "1.2.3.4", "GRPC_PORT": "1", "HOST": "1.2.3.4", "PORT": "1"}
    config = sidecar(tmp_path, "listen: {grpc: ['127.0.0.1:0'], admin: '127.0.0.1:0'}", environ)
    assert (config.listen.grpc, config.listen.admin) == (("127.0.0.1:0",), "127.0.0.1:0")


@pytest.mark.parametrize(
    ("environ", "folder"),
    [
        ({"RUNTIME_SUBDIRECTORY": "rls"}, "rls/config"),
        ({}, "config"),
        ({"RUNTIME_SUBDIRECTORY": "rls", "RUNTIME_APPDIRECTORY": "limits"}, "rls/limits"),
    ],
)
def test_rules_lie_where_runtime_variables_say(tmp_path: Path, environ: dict[str, str], folder: str) -> None:
    write(tmp_path / folder / "a.yaml", "domain: d")
    assert config_of(RUNTIME_ROOT=str(tmp_path), **environ).rules == (tmp_path / folder,)


def test_a_subdirectory_alone_is_below_their_root() -> None:
    [line] = errors_of(RUNTIME_SUBDIRECTORY="rls")
    assert line.endswith('nothing is there: "/srv/runtime_data/current/rls/config"')


def test_an_app_directory_alone_says_nothing() -> None:
    assert config_of(RUNTIME_APPDIRECTORY="limits").rules == ()


def test_a_runtime_folder_is_relative_to_the_working_directory_and_not_to_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data" / "config" / "a.yaml", "domain: d")
    config = load_sidecar_config(write(Path("conf/sidecar.yaml"), "{}"), {"RUNTIME_ROOT": "data"})
    assert config.rules == (Path("data/config"),)


@pytest.mark.parametrize("rules", ["rules: [a.yaml]", "rules: []"])
def test_rules_in_the_file_win_over_runtime_variables(tmp_path: Path, rules: str) -> None:
    write(tmp_path / "a.yaml", "domain: d")
    config = sidecar(tmp_path, rules, {"RUNTIME_ROOT": "/nowhere"})
    assert [path.name for path in config.rules] == (["a.yaml"] if "a.yaml" in rules else [])


def test_over_xds_runtime_variables_mean_nothing() -> None:
    assert config_of(**XDS, RUNTIME_ROOT="/nowhere").rules == ()


@pytest.mark.parametrize(
    ("root", "subdirectory", "app_directory", "folder"),
    [
        ("/data", "/rl", "/config", "/data/rl/config"),
        ("/data", "/", "config", "/data/config"),
        ("/data/", "", "config", "/data/config"),
        ("data", "..", "config", "config"),
        ("/data", "//rl//", "config/", "/data/rl/config"),
        ("/data", "rl", "/", "/data/rl"),
        ("//data", "../x", "", "/x/config"),
        ("/data", "./rl", ".", "/data/rl"),
        ("/", "/", "/", "/"),
    ],
)
def test_runtime_variables_are_joined_as_go_joins_paths(
    root: str, subdirectory: str, app_directory: str, folder: str
) -> None:
    values = {"RUNTIME_ROOT": root, "RUNTIME_SUBDIRECTORY": subdirectory, "RUNTIME_APPDIRECTORY": app_directory}
    assert RUNTIME_FOLDER.read({name: value for name, value in values.items() if value}) == [folder]


class TestWithNeitherRulesNorVariables:
    @pytest.fixture(autouse=True)
    def _default_root(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(runtime, "DEFAULT_ROOT", str(tmp_path / "current"))
        write(tmp_path / "current" / "config" / "a.yaml", "domain: d")
        write(tmp_path / "current" / "limits" / "a.yaml", "domain: d")

    def test_the_default_folder_is_read_where_it_is_there(self, tmp_path: Path) -> None:
        assert config_of().rules == (tmp_path / "current/config",)
        assert config_of(RUNTIME_APPDIRECTORY="limits").rules == (tmp_path / "current/limits",)
        assert config_of(RUNTIME_APPDIRECTORY="none").rules == ()
        assert sidecar(tmp_path, "algorithm: fixed_window").rules == (tmp_path / "current/config",)

    def test_what_is_there_beside_the_rules_is_told(self, tmp_path: Path) -> None:
        write(tmp_path / "current" / "config" / "b.txt", "domain: e")
        [line] = errors_of(tmp_path)
        assert line.startswith("current/config/b.txt: found the name")

    @pytest.mark.parametrize("text", ["rules: []", "xds: {}"])
    def test_a_file_that_says_where_rules_come_from_is_believed(self, tmp_path: Path, text: str) -> None:
        assert sidecar(tmp_path, text).rules == ()

    def test_over_xds_it_is_not_read(self) -> None:
        assert config_of(**XDS).rules == ()

    def test_variables_win(self, tmp_path: Path) -> None:
        write(tmp_path / "other" / "config" / "a.yaml", "domain: d")
        assert config_of(RUNTIME_ROOT=str(tmp_path / "other")).rules == (tmp_path / "other/config",)


@pytest.mark.parametrize("source", ["environment", "file"])
def test_what_a_folder_of_rules_holds_and_would_not_be_read_is_an_error(tmp_path: Path, source: str) -> None:
    folder = tmp_path / "config"
    names = ["a.yaml", "b.yml", ".c.yaml", "..data/a.yaml", "limits.conf", "team/d.yaml", "empty/x.txt", "README.md"]
    for name in names:
        write(folder / name, "domain: d")
    lines_told = (
        errors_of(folder, RUNTIME_ROOT=str(tmp_path))
        if source == "environment"
        else [line.removeprefix("config/") for line in sidecar_errors(tmp_path, "rules: [config]")]
    )
    assert lines_told == [
        'limits.conf: found the name "limits.conf", expected a name that ends in .yaml or .yml in a folder of rules;'
        " rename it, or move it away",
        "team: found rules in a subfolder, expected a folder without subfolders; list both folders, in the"
        " configuration file under rules",
    ]


def test_a_subfolder_that_is_listed_too_is_none(tmp_path: Path) -> None:
    write(tmp_path / "rules" / "a.yaml", "domain: a")
    write(tmp_path / "rules" / "team" / "b.yaml", "domain: b")
    assert len(sidecar(tmp_path, "rules: [rules, rules/team]").rules) == 2


@pytest.mark.parametrize("scheme", ["", "dns:///", "passthrough:///"])
def test_an_xds_server_may_be_written_as_a_target_of_grpc(scheme: str) -> None:
    xds = config_of(**XDS, CONFIG_GRPC_XDS_SERVER_URL=f"{scheme}gateway:18000").xds
    assert xds is not None
    assert xds.server == "gateway:18000"


@pytest.mark.parametrize(
    ("given", "pairs"),
    [
        ("a=b,c=d=e", {"a": "b", "c": "d=e"}),
        ("a.io/x:y=b", {"a.io/x:y": "b"}),
        ("a:b,", {"a": "b"}),
    ],
)
def test_metadata_of_the_node_is_separated_by_equals_signs_or_colons(given: str, pairs: dict[str, str]) -> None:
    xds = config_of(**XDS, CONFIG_GRPC_XDS_NODE_METADATA=given).xds
    assert xds is not None
    assert xds.node_metadata == pairs


def test_xds_is_set_by_its_variables(tmp_path: Path) -> None:
    for name in ("ca", "crt", "key"):
        write(tmp_path / name, "")
    xds = config_of(
        **XDS,
        CONFIG_GRPC_XDS_SERVER_URL="gateway:18001",
        CONFIG_GRPC_XDS_NODE_ID="rls",
        CONFIG_GRPC_XDS_NODE_METADATA="a:b, c=d:e",
        CONFIG_GRPC_XDS_CLIENT_ADDITIONAL_HEADERS="X-Token:abc",
        CONFIG_GRPC_XDS_SERVER_CONNECT_RETRY_INTERVAL="1m1.5s",
        CONFIG_GRPC_XDS_SERVER_USE_TLS="true",
        CONFIG_GRPC_XDS_SERVER_TLS_CACERT=str(tmp_path / "ca"),
        CONFIG_GRPC_XDS_CLIENT_TLS_CERT=str(tmp_path / "crt"),
        CONFIG_GRPC_XDS_CLIENT_TLS_KEY=str(tmp_path / "key"),
        CONFIG_GRPC_XDS_SERVER_TLS_SAN="gateway",
    ).xds
    assert xds is not None
    assert (xds.server, xds.node_id) == ("gateway:18001", "rls")
    assert (xds.node_metadata, xds.headers) == ({"a": "b", "c": "d:e"}, {"x-token": "abc"})
    assert xds.retry_seconds == 61.5
    assert xds.tls is not None
    assert [path and path.name for path in (xds.tls.ca, xds.tls.certificate, xds.tls.key)] == ["ca", "crt", "key"]
    assert xds.tls.server_name == "gateway"


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"CONFIG_TYPE": "FILE", "CONFIG_GRPC_XDS_SERVER_URL": "no address"},
        {"CONFIG_GRPC_XDS_SERVER_USE_TLS": "true", "CONFIG_GRPC_XDS_SERVER_TLS_CACERT": "/nowhere"},
    ],
)
def test_without_config_type_the_variables_of_xds_mean_nothing(environ: dict[str, str]) -> None:
    assert load_sidecar_config(None, environ) == config_of()


def test_without_tls_switched_on_the_files_for_it_mean_nothing() -> None:
    xds = config_of(**XDS, CONFIG_GRPC_XDS_SERVER_USE_TLS="false", CONFIG_GRPC_XDS_SERVER_TLS_CACERT="/nowhere").xds
    assert xds is not None
    assert xds.tls is None


def test_variables_complete_an_xds_that_the_file_has(tmp_path: Path) -> None:
    xds = sidecar(tmp_path, "xds: {node_id: a}", {"CONFIG_GRPC_XDS_SERVER_URL": "gateway:1", "CONFIG_TYPE": "FILE"}).xds
    assert xds is not None
    assert (xds.node_id, xds.server) == ("a", "gateway:1")


@pytest.mark.parametrize(
    ("environ", "age", "grace"),
    [
        ({}, 86_400, 3_600),
        ({"GRPC_MAX_CONNECTION_AGE": "1h30m", "GRPC_MAX_CONNECTION_AGE_GRACE": "500ms"}, 5_400, 0.5),
        ({"GRPC_MAX_CONNECTION_AGE": "0", "GRPC_MAX_CONNECTION_AGE_GRACE": "0s"}, 0, 0),
    ],
)
def test_the_age_of_connections_is_set_in_gos_spelling(environ: dict[str, str], age: float, grace: float) -> None:
    listen = config_of(**environ).listen
    assert (listen.max_connection_age_seconds, listen.max_connection_age_grace_seconds) == (age, grace)


def test_all_wrong_variables_are_told_at_once() -> None:
    found = errors_of(SHADOW_MODE="x", PORT="x", CONFIG_TYPE="x", GRPC_SERVER_USE_TLS="x", CRDT_ENGINE="x")
    assert {line.split(": ")[1] for line in found} == {
        "CONFIG_TYPE",
        "GRPC_SERVER_USE_TLS",
        "PORT",
        "SHADOW_MODE",
        "CRDT_ENGINE",
    }


@pytest.mark.parametrize("given", ["Bearer abc", "authorization:Bearer\tabc"])
def test_a_token_in_a_header_is_not_shown_when_it_is_wrong(given: str) -> None:
    [line] = errors_of(**XDS, CONFIG_GRPC_XDS_CLIENT_ADDITIONAL_HEADERS=given)
    assert line.startswith(
        "environment: CONFIG_GRPC_XDS_CLIENT_ADDITIONAL_HEADERS: found a value that is kept to itself"
    )
    assert "abc" not in line
