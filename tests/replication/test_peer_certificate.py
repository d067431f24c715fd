"""Which certificates are for a node."""

from __future__ import annotations

from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from certificates import Authority

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.replication.tls import PeerCertificate, of_client
from ratelimit_sidecar.replication.wire import ProtocolError, Reason

SPIFFE = "spiffe://mesh/region/{region}/sa/{node}"


def is_accepted(pattern: str, *names: str, node: str = "a", region: str = "eu") -> bool:
    """Whether a certificate with these names is for that node of that region."""
    try:
        PeerCertificate(frozenset(names)).check(pattern, Origin(node, 1), region)
    except ProtocolError:
        return False
    return True


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("{node}", "a"),
        ("{node}.{region}.mesh.example", "a.eu.mesh.example"),
        ("*.{region}.mesh.example", "whoever.eu.mesh.example"),
        ("ratelimit.mesh.example", "ratelimit.mesh.example"),
        (SPIFFE, "spiffe://mesh/region/eu/sa/a"),
        ("spiffe://mesh/*/sa/{node}", "spiffe://mesh/a.b/sa/a"),
    ],
)
def test_one_of_its_names_must_be_the_pattern_filled_in(pattern: str, name: str) -> None:
    assert is_accepted(pattern, "another.example", name)
    assert not is_accepted(pattern, "another.example")
    assert not is_accepted(pattern)


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("{node}", "b"),
        ("{node}.{region}.mesh.example", "b.eu.mesh.example"),
        ("{node}.{region}.mesh.example", "a.us.mesh.example"),
        ("*.{region}.mesh.example", "a.us.mesh.example"),
        (SPIFFE, "spiffe://mesh/region/us/sa/a"),
        (SPIFFE, "spiffe://mesh/region/eu/sa/b"),
    ],
)
def test_a_name_of_another_node_or_region_is_none(pattern: str, name: str) -> None:
    assert not is_accepted(pattern, name)


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("{node}.mesh.example", "a.mesh.example.evil.example"),
        ("{node}.mesh.example", "evil.a.mesh.example"),
        ("{node}.mesh.example", "a-mesh.example"),
        ("{node}.mesh.example", "*.mesh.example"),
        ("*.{region}.mesh.example", "a.b.eu.mesh.example"),
        ("*.{region}.mesh.example", ".eu.mesh.example"),
        ("spiffe://mesh/*/sa/{node}", "spiffe://mesh/x/y/sa/a"),
    ],
)
def test_the_whole_name_counts_and_a_star_is_one_part_of_it(pattern: str, name: str) -> None:
    assert not is_accepted(pattern, name)


@pytest.mark.parametrize(("node", "name"), [(".*", "b"), ("a|b", "b"), ("*", "b"), ("{region}", "eu")])
def test_a_node_id_stands_for_itself_alone(node: str, name: str) -> None:
    assert not is_accepted("{node}", name, node=node)
    assert is_accepted("{node}", node, node=node)


@pytest.mark.parametrize(("ends_in", "is_accepted"), [(timedelta(seconds=-2), False), (timedelta(minutes=1), True)])
def test_the_certificate_of_a_client_must_not_have_ended(tmp_path: Path, ends_in: timedelta, is_accepted: bool) -> None:
    """In a session that a client resumes nobody has looked."""
    written = Authority().write(tmp_path / "a", "a", not_after=datetime.now(UTC) + ends_in)
    certificate = of_client({"peer_dns": [b"a"], "x509_pem_cert": [written.certificate.read_bytes()]})
    with nullcontext() if is_accepted else pytest.raises(ProtocolError, match="has ended"):
        certificate.check("{node}", Origin("a", 1), "eu")


def test_dns_names_are_the_same_in_either_case_and_uris_are_not() -> None:
    assert is_accepted("{node}.mesh.example", "A.MESH.Example")
    assert is_accepted("{node}.mesh.example", "a.mesh.example", node="A")
    assert not is_accepted(SPIFFE, "spiffe://mesh/region/EU/sa/a")


def test_letters_that_are_the_same_in_other_scripts_alone_are_not() -> None:
    kelvin = "\N{KELVIN SIGN}"
    assert kelvin.lower() == "k"
    assert not is_accepted("{node}", "k", node=kelvin)


def test_who_is_refused_is_told_what_was_wanted_and_some_of_what_was_found() -> None:
    certificate = PeerCertificate(frozenset(f"{letter}.example" for letter in "abcdefg"))
    with pytest.raises(ProtocolError) as refused:
        certificate.check("{node}.{region}", Origin("eu-1", 1), "eu")
    assert refused.value.reason is Reason.CERTIFICATE
    assert refused.value.detail == (
        "the certificate of 'eu-1' must be for eu-1.eu; it is for a.example, b.example, c.example, d.example, e.example"
    )
    with pytest.raises(ProtocolError, match="it is for no DNS name and no URI"):
        PeerCertificate(frozenset()).check("{node}", Origin("eu-1", 1), "eu")
