"""Proxies of the environment: never for loopback."""

from __future__ import annotations

import pytest

from ratelimit_sidecar.config.proxies import grpc_proxy, spare_loopback

PROXY = "http://user:secret@proxy.example:3128"


@pytest.mark.parametrize("name", ["grpc_proxy", "https_proxy", "http_proxy"])
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.9.10", "::1"])
def test_loopback_is_reached_directly(name: str, host: str) -> None:
    environ = {name: PROXY}
    spare_loopback(environ)
    assert grpc_proxy(host, environ) is None


@pytest.mark.parametrize("excepted", ["no_proxy", "NO_PROXY", "no_grpc_proxy"])
def test_what_the_environment_excepts_is_reached_directly(excepted: str) -> None:
    environ = {"https_proxy": PROXY, excepted: "10.0.0.0/8, .cluster.local"}
    spare_loopback(environ)
    assert grpc_proxy("10.1.2.3", environ) is None
    assert grpc_proxy("xds.cluster.local", environ) is None
    assert grpc_proxy("localhost", environ) is None
    assert grpc_proxy("elsewhere.example", environ) == "proxy.example:3128"


def test_what_goes_through_a_proxy_is_named_without_its_password() -> None:
    assert grpc_proxy("xds.example", {"http_proxy": PROXY}) == "proxy.example:3128"


def test_without_a_proxy_the_environment_stays_as_it_is() -> None:
    environ = {"NO_PROXY": "a"}
    spare_loopback(environ)
    assert environ == {"NO_PROXY": "a"}
    assert grpc_proxy("xds.example", environ) is None
