"""Addresses in a configuration."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter, ValidationError

from ratelimit_sidecar.config.addresses import ListenAddress, PeerAddress

listen = TypeAdapter[str](ListenAddress)
peer = TypeAdapter[str](PeerAddress)


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0:8081",
        "127.0.0.1:0",
        "localhost:65535",
        "rls_1.my-net.example.com.:80",
        "[::]:8081",
        "[fe80::1%eth0]:8081",
        "unix:/run/ratelimit/rls.sock",
        "unix:/" + "a" * 106,
    ],
)
def test_what_can_be_listened_on_is_accepted(address: str) -> None:
    assert listen.validate_python(address) == address


@pytest.mark.parametrize(
    ("address", "fix"),
    [
        ("", "add :port"),
        ("localhost", "add :port"),
        ("8081", "add :port"),
        (":8081", 'for all interfaces write "0.0.0.0:8081"'),
        ("a:", ""),
        ("a:x", ""),
        ("a:-1", ""),
        ("a:٣", ""),
        ("a:65536", "a port is 0 to 65535"),
        ("a b:1", "a host name has letters, digits, - and . only"),
        ("-a:1", "a host name has letters, digits, - and . only"),
        ("a..b:1", "a host name has letters, digits, - and . only"),
        ("a" * 64 + ":1", "a host name has letters, digits, - and . only"),
        ("1.2.3:1", "not an IP address: Expected 4 octets in '1.2.3'"),
        ("::1:8081", "put an IPv6 address into brackets, as in [::1]:8081"),
        ("[::1]", ""),
        ("[::g]:1", "not an IP address: Only hex digits permitted in 'g' in '::g'"),
        ("[a]:1", "not an IP address: At least 3 parts expected in 'a'"),
        ("http://a:1/", 'without the scheme: "a:1"'),
        ("unix:", "after unix: write the absolute path of the socket, as in unix:/run/ratelimit/rls.sock"),
        ("unix:/run/", "after unix: write the absolute path of the socket, as in unix:/run/ratelimit/rls.sock"),
        ("unix:/a\0b", "after unix: write the absolute path of the socket, as in unix:/run/ratelimit/rls.sock"),
        ("unix:/" + "ä" * 54, "choose a shorter path"),
    ],
)
def test_what_cannot_be_listened_on_is_refused_with_a_fix(address: str, fix: str) -> None:
    with pytest.raises(ValidationError) as error:
        listen.validate_python(address)
    [details] = error.value.errors()
    assert details["ctx"]["fix"] == fix


@pytest.mark.parametrize("address", ["a:0", "[::1]:00", "unix:/a"])
def test_a_peer_needs_an_address_that_can_be_called(address: str) -> None:
    with pytest.raises(ValidationError):
        peer.validate_python(address)
