"""HTTP proxies that the environment names, for connections to an xDS server and an OTLP collector.

gRPC and requests read `http_proxy` and its fellows by themselves. Loopback is never behind a proxy: `spare_loopback`
writes that into `no_proxy`, which both honour.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from ipaddress import ip_address, ip_network

_LOOPBACK = "localhost,127.0.0.0/8,127.0.0.1,::1"
"""With the usual address besides the network: not everybody knows what a network is."""

_OF_GRPC = ("grpc_proxy", "https_proxy", "http_proxy")
"""As gRPC's core reads them, in this order, whatever the connection."""


def spare_loopback(environ: MutableMapping[str, str]) -> None:
    """Add loopback to what the environment excepts from its proxies. To be called before anything connects."""
    if not any(environ.get(name) or environ.get(name.upper()) for name in (*_OF_GRPC, "all_proxy")):
        return
    # gRPC knows the lower case only.
    excepted = environ.get("no_proxy") or environ.get("NO_PROXY") or ""
    environ["no_proxy"] = f"{excepted},{_LOOPBACK}" if excepted else _LOOPBACK
    if environ.get("no_grpc_proxy"):
        environ["no_grpc_proxy"] += f",{_LOOPBACK}"


def grpc_proxy(host: str, environ: Mapping[str, str]) -> str | None:
    """The proxy through which gRPC connects to `host`, without its password; None when it does so directly."""
    proxy = next((environ[name] for name in _OF_GRPC if environ.get(name)), None)
    excepted = environ.get("no_grpc_proxy") or environ.get("no_proxy") or ""
    if proxy is None or any(_matches(host, entry.strip()) for entry in excepted.split(",") if entry.strip()):
        return None
    return proxy.rpartition("@")[2] or None


def _matches(host: str, entry: str) -> bool:
    try:
        return ip_address(host) in ip_network(entry, strict=False)
    except ValueError:
        # gRPC's core takes each entry for the end of a name.
        return host.lower().endswith(entry.lower())
