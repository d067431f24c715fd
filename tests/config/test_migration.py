"""The pages about envoyproxy/ratelimit say of its variables what the schema does with them, and how to move."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from certificates import Authority
from config.builders import sidecar, write

from ratelimit_sidecar.config.environment import variables_of
from ratelimit_sidecar.config.migration import (
    METRICS,
    VARIABLES,
    NotNeeded,
    ReplacedBy,
    Same,
    SameElsewhere,
    Verdict,
)
from ratelimit_sidecar.config.reference import pages
from ratelimit_sidecar.config.sidecar import SidecarConfig, load_sidecar_config
from ratelimit_sidecar.config.sidecar_schema import ListenTlsConfig, XdsConfig, XdsTlsConfig
from ratelimit_sidecar.crdt.limit import Window
from ratelimit_sidecar.telemetry.logs import configure_logs
from ratelimit_sidecar.telemetry.metrics import METRICS as OUR_METRICS

PAGE = pages()["migration-from-envoyproxy-ratelimit.md"]
VARIABLES_PAGE = pages()["reference/envoyproxy-ratelimit.md"]
OURS = {"REGION", "CRDT_ENGINE"}
"""Variables that envoyproxy/ratelimit has not."""

VERDICTS: list[tuple[str, Verdict]] = [entry for variables in VARIABLES.values() for entry in variables.items()]
READ = dict(variables_of(SidecarConfig))


def of_kind(*kinds: type[Verdict]) -> set[str]:
    return {variable for variable, verdict in VERDICTS if isinstance(verdict, kinds)}


def test_what_the_schema_reads_is_called_the_same_and_nothing_else_is() -> None:
    assert of_kind(Same) == READ.keys() - OURS


@pytest.mark.usefixtures("logs_as_before")
def test_logs_are_set_by_the_same_variables() -> None:
    assert of_kind(SameElsewhere) == {"LOG_LEVEL", "LOG_FORMAT"}
    for variable in of_kind(SameElsewhere):
        with pytest.raises(ValueError, match=variable):
            configure_logs({variable: "neither"}, logging.NullHandler())


def test_every_variable_has_one_row() -> None:
    named = re.findall(r"`([A-Z][A-Z0-9_]+)`", "\n".join(re.findall(r"^\| (`.*?) \|", VARIABLES_PAGE, re.MULTILINE)))
    assert sorted(named) == sorted(variable for variable, _ in VERDICTS)
    assert len(set(named)) == len(named)


def test_a_row_names_the_key_that_a_variable_sets() -> None:
    assert "| `GRPC_HOST`, `GRPC_PORT` | same: `listen.grpc` |\n" in VARIABLES_PAGE
    assert "| `SHADOW_MODE` | same: `answers.shadow_mode` |\n" in VARIABLES_PAGE


def test_what_the_page_tells_to_write_makes_fixed_windows(tmp_path: Path) -> None:
    [text] = re.findall(r"```yaml\n +(algorithm: .*)\n", PAGE)
    assert sidecar(tmp_path, text).rule_defaults.window is Window.FIXED


def test_the_pages_it_leads_to_are_there() -> None:
    docs = Path(__file__).parents[2] / "docs"
    links = re.findall(r"\]\(([^)#]+)(?:#([^)]*))?\)", PAGE)
    assert links
    for path, anchor in links:
        page = (docs / path).read_text()
        headings = [re.sub(r"[^a-z0-9 -]", "", heading.lower()) for heading in re.findall(r"^#+ (.*)$", page, re.M)]
        assert not anchor or anchor in {heading.replace(" ", "-") for heading in headings}


Attribute = Callable[[SidecarConfig], object]

READ_AS: Mapping[str, tuple[str, Attribute, object]] = {
    "STOP_CACHE_KEY_INCREMENT_WHEN_OVERLIMIT": ("true", lambda config: config.charging, "all_or_nothing"),
    "HOST": ("::1", lambda config: config.listen.admin, "[::1]:8080"),
    "PORT": ("9080", lambda config: config.listen.admin, "127.0.0.1:9080"),
    "GRPC_UDS": ("/run/rls.sock", lambda config: config.listen.grpc, ("unix:/run/rls.sock",)),
    "GRPC_HOST": ("::", lambda config: config.listen.grpc, ("[::]:8081",)),
    "GRPC_PORT": ("9081", lambda config: config.listen.grpc, ("0.0.0.0:9081",)),
    "GRPC_MAX_CONNECTION_AGE": ("10m", lambda config: config.listen.max_connection_age_seconds, 600),
    "GRPC_MAX_CONNECTION_AGE_GRACE": ("1m", lambda config: config.listen.max_connection_age_grace_seconds, 60),
    "GRPC_SERVER_USE_TLS": ("true", lambda config: config.listen.tls is None, False),
    "GRPC_SERVER_TLS_CERT": ("{folder}/tls.crt", lambda config: tls(config).certificate.name, "tls.crt"),
    "GRPC_SERVER_TLS_KEY": ("{folder}/tls.key", lambda config: tls(config).key.name, "tls.key"),
    "GRPC_CLIENT_TLS_CACERT": ("{folder}/ca.crt", lambda config: str(tls(config).ca)[-6:], "ca.crt"),
    "GRPC_CLIENT_TLS_SAN": ("envoy", lambda config: tls(config).client_name, "envoy"),
    "CONFIG_TYPE": ("GRPC_XDS_SOTW", lambda config: config.xds is None, False),
    "CONFIG_GRPC_XDS_NODE_ID": ("rls", lambda config: xds(config).node_id, "rls"),
    "CONFIG_GRPC_XDS_NODE_METADATA": ("a=b", lambda config: xds(config).node_metadata, {"a": "b"}),
    "CONFIG_GRPC_XDS_SERVER_URL": ("gateway:18001", lambda config: xds(config).server, "gateway:18001"),
    "CONFIG_GRPC_XDS_SERVER_CONNECT_RETRY_INTERVAL": ("5s", lambda config: xds(config).retry_seconds, 5),
    "CONFIG_GRPC_XDS_CLIENT_ADDITIONAL_HEADERS": ("a:b,c:d", lambda config: xds(config).headers, {"a": "b", "c": "d"}),
    "CONFIG_GRPC_XDS_SERVER_USE_TLS": ("1", lambda config: xds(config).tls is None, False),
    "CONFIG_GRPC_XDS_CLIENT_TLS_CERT": ("{folder}/tls.crt", lambda config: xds_tls(config).certificate, "tls.crt"),
    "CONFIG_GRPC_XDS_CLIENT_TLS_KEY": ("{folder}/tls.key", lambda config: xds_tls(config).key, "tls.key"),
    "CONFIG_GRPC_XDS_SERVER_TLS_CACERT": ("{folder}/ca.crt", lambda config: xds_tls(config).ca, "ca.crt"),
    "CONFIG_GRPC_XDS_SERVER_TLS_SAN": ("gateway", lambda config: xds_tls(config).server_name, "gateway"),
    "RUNTIME_ROOT": ("{folder}", lambda config: config.rules[0].name, "config"),
    "RUNTIME_SUBDIRECTORY": ("/sub/", lambda config: config.rules[0].parts[-2:], ("sub", "config")),
    "RUNTIME_APPDIRECTORY": ("rls", lambda config: config.rules[0].name, "rls"),
    "MERGE_DOMAIN_CONFIG": ("true", lambda config: config.merge_domains, True),
    "SHADOW_MODE": ("true", lambda config: config.settings.shadow_mode, True),
    "QUOTA_MODE": ("true", lambda config: config.settings.quota_mode, True),
    "NEAR_LIMIT_RATIO": ("80", lambda config: config.settings.near_limit_ratio, 1),
    "LIMIT_RESPONSE_HEADERS_ENABLED": ("t", lambda config: config.settings.response_headers is None, False),
    "LIMIT_LIMIT_HEADER": ("X", lambda config: config.answers.response_headers.limit, "X"),
    "LIMIT_REMAINING_HEADER": ("X", lambda config: config.answers.response_headers.remaining, "X"),
    "LIMIT_RESET_HEADER": ("X", lambda config: config.answers.response_headers.reset, "X"),
    "HEALTHY_WITH_AT_LEAST_ONE_CONFIG_LOADED": ("1", lambda config: config.listen.healthy_with_rules_only, True),
    "RESPONSE_DYNAMIC_METADATA": ("true", lambda config: config.settings.dynamic_metadata, True),
}
"""What each variable that means the same is set to, and what is then where in the configuration."""

BESIDE = {
    "GRPC_SERVER_TLS": {"GRPC_SERVER_USE_TLS", "GRPC_SERVER_TLS_CERT", "GRPC_SERVER_TLS_KEY"},
    "GRPC_SERVER_USE_TLS": {"GRPC_SERVER_TLS_CERT", "GRPC_SERVER_TLS_KEY"},
    "GRPC_CLIENT_TLS": {
        "GRPC_SERVER_USE_TLS",
        "GRPC_SERVER_TLS_CERT",
        "GRPC_SERVER_TLS_KEY",
        "GRPC_CLIENT_TLS_CACERT",
    },
    "CONFIG_GRPC_XDS": {"CONFIG_TYPE"},
    "CONFIG_GRPC_XDS_CLIENT_TLS": {
        "CONFIG_TYPE",
        "CONFIG_GRPC_XDS_SERVER_USE_TLS",
        "CONFIG_GRPC_XDS_CLIENT_TLS_CERT",
        "CONFIG_GRPC_XDS_CLIENT_TLS_KEY",
    },
    "CONFIG_GRPC_XDS_SERVER_TLS": {"CONFIG_TYPE", "CONFIG_GRPC_XDS_SERVER_USE_TLS"},
    "RUNTIME_": {"RUNTIME_ROOT"},
}
"""By the beginning of a variable's name: those without which it means nothing."""


def tls(config: SidecarConfig) -> ListenTlsConfig:
    assert config.listen.tls is not None
    return config.listen.tls


def xds(config: SidecarConfig) -> XdsConfig:
    assert config.xds is not None
    return config.xds


def xds_tls(config: SidecarConfig) -> XdsTlsConfig:
    given = xds(config).tls
    assert given is not None
    return given


@pytest.mark.parametrize("variable", sorted(of_kind(Same)))
def test_a_variable_that_means_the_same_is_set_as_there(tmp_path: Path, variable: str) -> None:
    Authority().write(tmp_path, "sidecar")
    for folder in ("config", "rls", "sub/config"):
        write(tmp_path / folder / "a.yaml", "domain: d")
    _, attribute, expected = READ_AS[variable]
    names = {variable}.union(*(others for start, others in BESIDE.items() if variable.startswith(start)))
    environ = {name: READ_AS[name][0].replace("{folder}", str(tmp_path)) for name in names}
    found = attribute(load_sidecar_config(None, environ))
    assert (found.name if isinstance(found, Path) else found) == expected


@pytest.mark.parametrize("variable", sorted(of_kind(ReplacedBy, NotNeeded)))
def test_a_variable_that_means_nothing_here_keeps_nobody_from_starting(variable: str) -> None:
    for value in ("true", "any text", "0"):
        assert load_sidecar_config(None, {variable: value}) == load_sidecar_config(None, {})


def test_the_metrics_that_the_page_names_are_there() -> None:
    names = {definition.name for definition in OUR_METRICS}
    for ours in METRICS.values():
        for name in re.findall(r"`((?:ratelimit|openclaw|crdt)_[a-z_]+)", ours):
            assert name.removesuffix("_count") in names
