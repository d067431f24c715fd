"""A mesh is encrypted, or stays on its machine, or is said to need no encryption."""

from __future__ import annotations

from pathlib import Path

import pytest
from certificates import Authority
from config.builders import sidecar, sidecar_errors, write
from cryptography.hazmat.primitives import serialization

TLS = "{certificate: tls.crt, key: tls.key, ca: ca.crt}"
ALONE = "expected an address of this machine alone, as 127.0.0.1, for a mesh without encryption"
WAYS_OUT = "add sync.tls with certificate, key and ca; or, in a network of sidecars alone, sync.insecure: true"
PATTERN = "expected a DNS name or URI, in which {node}, {region} and * may stand"


def with_files(folder: Path) -> Path:
    Authority().write(folder, "a")
    return folder


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.9.9.9:1", "'[::1]:1'", "localhost:1", "LocalHost.:1"])
def test_on_one_machine_nothing_has_to_be_said(tmp_path: Path, address: str) -> None:
    config = sidecar(tmp_path, f"listen: {{sync: {address}}}\nsync: {{peers: [{address}]}}")
    assert config.sync.tls is None
    assert not config.sync.insecure


def test_peers_of_one_machine_call_it_there(tmp_path: Path) -> None:
    assert sidecar(tmp_path, "sync: {peers: ['127.0.0.1:50052']}").listen.sync == "127.0.0.1:50051"


def test_with_tls_all_interfaces_are_listened_on(tmp_path: Path) -> None:
    config = sidecar(with_files(tmp_path), f"sync: {{peers: [eu:50051], tls: {TLS}}}")
    assert config.listen.sync == "0.0.0.0:50051"
    assert config.sync.tls is not None
    assert config.sync.tls.peer_names == "{node}"


@pytest.mark.parametrize("address", ["0.0.0.0:1", "10.0.0.1:1", "[::]:1", "[fd00::1]:1", "localhost.example.com:1"])
def test_a_peer_elsewhere_needs_tls_or_a_word(tmp_path: Path, address: str) -> None:
    text = f'sync:\n  peers: ["127.0.0.1:1", "{address}", "10.9.9.9:1"]\n'
    assert sidecar_errors(tmp_path, text) == [
        f'sidecar.yaml:2:26: sync.peers[1]: found "{address}", {ALONE}; {WAYS_OUT}'
    ]
    assert sidecar(tmp_path, f"{text}  insecure: true\n").sync.insecure
    assert sidecar(with_files(tmp_path), f"{text}  tls: {TLS}\n").sync.tls is not None


def test_so_does_a_listener_for_others(tmp_path: Path) -> None:
    assert sidecar_errors(tmp_path, "sync: {peers: [eu:50051]}\nlisten: {sync: '0.0.0.0:50051'}") == [
        f'sidecar.yaml:2:10: listen.sync: found "0.0.0.0:50051", {ALONE}; {WAYS_OUT}'
    ]


def test_a_mesh_is_not_both_encrypted_and_not(tmp_path: Path) -> None:
    assert sidecar_errors(with_files(tmp_path), f"sync: {{insecure: true, tls: {TLS}}}") == [
        "sidecar.yaml:1:8: sync.insecure: found true, expected it without sync.tls; remove one of the two"
    ]


def test_every_file_must_be_there(tmp_path: Path) -> None:
    write(tmp_path / "tls.key", "")
    assert sidecar_errors(tmp_path, f"sync:\n  tls: {TLS}\n") == [
        f'sidecar.yaml:2:9: sync.tls.certificate: found "tls.crt", expected a file that can be read; nothing is there:'
        f' "{tmp_path}/tls.crt"',
        f'sidecar.yaml:2:45: sync.tls.ca: found "ca.crt", expected a file that can be read; nothing is there:'
        f' "{tmp_path}/ca.crt"',
    ]


def test_the_files_must_belong_together(tmp_path: Path) -> None:
    with_files(tmp_path)
    Authority().write(tmp_path / "other", "a").key.replace(tmp_path / "tls.key")
    assert sidecar_errors(tmp_path, f"sync: {{tls: {TLS}}}") == [
        "sidecar.yaml:1:8: sync.tls: found files that cannot be used, expected a certificate, its key and the"
        f" authorities of all sidecars; {tmp_path}/tls.crt, {tmp_path}/tls.key: they do not belong together"
    ]


def test_a_key_must_not_be_encrypted(tmp_path: Path) -> None:
    key = serialization.load_pem_private_key(with_files(tmp_path).joinpath("tls.key").read_bytes(), None)
    encrypted = serialization.BestAvailableEncryption(b"secret")
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encrypted)
    (tmp_path / "tls.key").write_bytes(pem)
    [line] = sidecar_errors(tmp_path, f"sync: {{tls: {TLS}}}")
    assert "the key is encrypted" in line


def test_a_certificate_alone_is_not_enough(tmp_path: Path) -> None:
    assert sidecar_errors(with_files(tmp_path), "sync: {tls: {certificate: tls.crt}}") == [
        "sidecar.yaml:1:8: sync.tls.key: found nothing, expected the path of a file",
        "sidecar.yaml:1:8: sync.tls.ca: found nothing, expected the path of a file",
    ]


@pytest.mark.parametrize("pattern", ["", "a b", "x" * 256, "{host}", "{node"])
def test_the_pattern_of_names_has_two_things_to_fill_in(tmp_path: Path, pattern: str) -> None:
    text = f"sync:\n  tls:\n    peer_names: '{pattern}'\n    certificate: tls.crt\n    key: tls.key\n    ca: ca.crt\n"
    [line] = sidecar_errors(with_files(tmp_path), text)
    assert line.startswith("sidecar.yaml:3:5: sync.tls.peer_names: found ")
    assert line.endswith(PATTERN)
