"""TLS for Envoy's calls is there as it is asked for, or the start ends with an error."""

from __future__ import annotations

from pathlib import Path

import pytest
from certificates import Authority
from config.builders import sidecar, sidecar_errors

from ratelimit_sidecar.config.errors import ConfigError
from ratelimit_sidecar.config.sidecar import SidecarConfig, load_sidecar_config

NEEDED = "expected a certificate, its key and the authorities of all clients"


def with_files(folder: Path) -> Path:
    Authority().write(folder, "a")
    return folder


def variables(folder: Path, **more: str) -> dict[str, str]:
    return {
        "GRPC_SERVER_USE_TLS": "true",
        "GRPC_SERVER_TLS_CERT": str(folder / "tls.crt"),
        "GRPC_SERVER_TLS_KEY": str(folder / "tls.key"),
        **more,
    }


def errors_of(environ: dict[str, str]) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load_sidecar_config(None, environ)
    return str(error.value).splitlines()


def test_paths_in_the_file_start_at_its_folder(tmp_path: Path) -> None:
    text = "listen: {tls: {certificate: tls.crt, key: tls.key, ca: ca.crt, client_name: '*.mesh.example'}}"
    tls = sidecar(with_files(tmp_path), text).listen.tls
    assert tls is not None
    assert (tls.certificate, tls.key, tls.ca) == (tmp_path / "tls.crt", tmp_path / "tls.key", tmp_path / "ca.crt")
    assert tls.client_name == "*.mesh.example"


def test_clients_need_no_certificate_where_no_authority_is_named(tmp_path: Path) -> None:
    tls = sidecar(with_files(tmp_path), "listen: {tls: {certificate: tls.crt, key: tls.key}}").listen.tls
    assert tls is not None
    assert tls.ca is None


def test_it_is_set_by_the_variables_of_envoyproxy_ratelimit(tmp_path: Path) -> None:
    environ = variables(
        with_files(tmp_path), GRPC_CLIENT_TLS_CACERT=str(tmp_path / "ca.crt"), GRPC_CLIENT_TLS_SAN="envoy.example"
    )
    tls = load_sidecar_config(None, environ).listen.tls
    assert tls is not None
    assert (tls.certificate, tls.key, tls.ca) == (tmp_path / "tls.crt", tmp_path / "tls.key", tmp_path / "ca.crt")
    assert tls.client_name == "envoy.example"


def test_variables_complete_what_the_file_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(with_files(tmp_path / "elsewhere"))
    with_files(tmp_path).joinpath("ca.crt").replace(tmp_path / "elsewhere" / "ca.crt")
    text = "listen: {tls: {certificate: tls.crt, key: tls.key}}"
    tls = sidecar(tmp_path, text, {"GRPC_CLIENT_TLS_CACERT": "ca.crt"}).listen.tls
    assert tls is not None
    assert (tls.certificate, tls.ca) == (tmp_path / "tls.crt", Path("ca.crt"))


@pytest.mark.parametrize("given", ["false", "0", ""])
def test_without_the_switch_the_files_mean_nothing(given: str) -> None:
    environ = variables(Path("/nowhere"), GRPC_CLIENT_TLS_CACERT="/nowhere/ca", GRPC_SERVER_USE_TLS=given)
    assert load_sidecar_config(None, environ) == SidecarConfig()


def test_the_switch_without_files_is_an_error_and_never_plain_text() -> None:
    assert errors_of({"GRPC_SERVER_USE_TLS": "true"}) == [
        "environment: listen.tls.certificate: found nothing, expected the path of a file; add it, or set"
        " GRPC_SERVER_TLS_CERT",
        "environment: listen.tls.key: found nothing, expected the path of a file; add it, or set GRPC_SERVER_TLS_KEY",
    ]


def test_every_file_must_be_there(tmp_path: Path) -> None:
    assert errors_of(variables(Path("/nowhere"))) == [
        f'environment: {variable}: found "/nowhere/{name}", expected a file that can be read; nothing is there:'
        f' "/nowhere/{name}"'
        for variable, name in (("GRPC_SERVER_TLS_CERT", "tls.crt"), ("GRPC_SERVER_TLS_KEY", "tls.key"))
    ]


def test_the_files_must_belong_together(tmp_path: Path) -> None:
    with_files(tmp_path)
    Authority().write(tmp_path / "other", "a").key.replace(tmp_path / "tls.key")
    assert sidecar_errors(tmp_path, "listen: {tls: {certificate: tls.crt, key: tls.key}}") == [
        f"sidecar.yaml:1:10: listen.tls: found files that cannot be used, {NEEDED}; {tmp_path}/tls.crt,"
        f" {tmp_path}/tls.key: they do not belong together"
    ]
    assert errors_of(variables(tmp_path)) == [
        f'environment: GRPC_SERVER_USE_TLS: found "true", {NEEDED}; {tmp_path}/tls.crt, {tmp_path}/tls.key: they do not'
        " belong together"
    ]


def test_an_authority_must_be_one(tmp_path: Path) -> None:
    with_files(tmp_path).joinpath("ca.crt").write_text("nothing")
    [line] = errors_of(variables(tmp_path, GRPC_CLIENT_TLS_CACERT=str(tmp_path / "ca.crt")))
    assert f"{tmp_path}/ca.crt: no certificates in PEM" in line


def test_a_clients_name_is_not_asked_for_without_an_authority(tmp_path: Path) -> None:
    assert errors_of(variables(with_files(tmp_path), GRPC_CLIENT_TLS_SAN="envoy.example")) == [
        "environment: listen.tls.ca: found nothing, expected it beside listen.tls.client_name; add the authorities of"
        " clients' certificates, or remove client_name"
    ]


def test_unix_sockets_alone_have_no_tls(tmp_path: Path) -> None:
    assert errors_of(variables(with_files(tmp_path), GRPC_UDS="/run/rls.sock")) == [
        'environment: GRPC_SERVER_USE_TLS: found "true", expected a TCP address in listen.grpc; remove one of the two:'
        " unix sockets stay plain, and the permissions of their folder guard them"
    ]
    text = "listen: {grpc: ['unix:/run/rls.sock', '0.0.0.0:8081'], tls: {certificate: tls.crt, key: tls.key}}"
    assert sidecar(tmp_path, text).listen.tls is not None


@pytest.mark.parametrize("name", ["", "a b", "x" * 256, "{node}"])
def test_a_clients_name_is_one(tmp_path: Path, name: str) -> None:
    text = f"listen:\n  tls: {{client_name: '{name}', certificate: tls.crt, key: tls.key, ca: ca.crt}}\n"
    [line] = sidecar_errors(with_files(tmp_path), text)
    assert line.startswith("sidecar.yaml:2:9: listen.tls.client_name: found ")
    assert line.endswith("expected a DNS name, IP address or URI, in which * may stand")
