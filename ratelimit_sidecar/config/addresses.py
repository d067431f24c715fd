"""Addresses as they are written in a configuration: `host:port`, `[ipv6]:port` and, to listen on, `unix:/path`."""

from __future__ import annotations

import re
from ipaddress import AddressValueError, IPv4Address, IPv6Address, ip_address
from typing import Annotated

from pydantic import AfterValidator

from ratelimit_sidecar.config.structure import Expected, unexpected

MAX_UNIX_PATH_BYTES = 107
"""Of `sockaddr_un.sun_path` on Linux (unix(7)), less its terminating zero."""

_TCP = "host:port or [ipv6]:port"
_LISTEN = "an address to listen on, host:port, [ipv6]:port or unix:/path"
_LISTEN_TCP = f"an address to listen on, {_TCP}"
_PEER = f"the address of a peer, {_TCP}"
_XDS_SERVER = f"the address of an xDS server, {_TCP}"

_UNIX = "unix:"
_BRACKETED = re.compile(r"\[(?P<host>[^][]*)\]:(?P<port>[0-9]{1,5})")
_PLAIN = re.compile(r"(?P<host>[^:]*):(?P<port>[0-9]{1,5})")
# A label as in RFC 1123, and the underscore that Docker Compose gives its hosts.
_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST_NAME = re.compile(rf"(?=.{{1,253}}$){_LABEL}(?:\.{_LABEL})*\.?")
_MAX_PORT = 65_535


def _listen(text: str) -> str:
    if not text.startswith(_UNIX):
        return _tcp(text, _LISTEN)
    path = text.removeprefix(_UNIX)
    if not path.startswith("/") or path.endswith("/") or "\0" in path:
        raise unexpected(
            _LISTEN, "after unix: write the absolute path of the socket, as in unix:/run/ratelimit/rls.sock"
        )
    if len(path.encode()) > MAX_UNIX_PATH_BYTES:
        raise unexpected(f"a socket path of at most {MAX_UNIX_PATH_BYTES} bytes", "choose a shorter path")
    return text


def _listen_tcp(text: str) -> str:
    return _tcp(text, _LISTEN_TCP)


def _peer(text: str) -> str:
    return _callable(text, _PEER, "write the port the peer listens on (listen.sync there)")


def _xds_server(text: str) -> str:
    return _callable(text, _XDS_SERVER, "write the port the server listens on")


def _callable(text: str, expected: str, fix: str) -> str:
    text = _tcp(text, expected)
    if text.rpartition(":")[2].strip("0") == "":
        raise unexpected(expected, f"port 0 cannot be called: {fix}")
    return text


def _tcp(text: str, expected: str) -> str:
    if text.startswith(_UNIX):
        raise unexpected(expected, "a unix socket cannot be used here")
    match = _BRACKETED.fullmatch(text) or _PLAIN.fullmatch(text)
    if match is None:
        raise unexpected(expected, _shape_fix(text))
    host = match["host"]
    if not host:
        raise unexpected(expected, f'for all interfaces write "0.0.0.0:{match["port"]}"')
    if int(match["port"]) > _MAX_PORT:
        raise unexpected(expected, f"a port is 0 to {_MAX_PORT}")
    try:
        if text.startswith("["):
            IPv6Address(host)
        elif host.replace(".", "").isdigit():
            IPv4Address(host)
        elif not _HOST_NAME.fullmatch(host):
            raise unexpected(expected, "a host name has letters, digits, - and . only")
    except AddressValueError as error:
        raise unexpected(expected, f"not an IP address: {error}") from None
    return text


def _shape_fix(text: str) -> str:
    if "://" in text:
        return f'without the scheme: "{text.partition("://")[2].rstrip("/")}"'
    if text.count(":") > 1 and not text.startswith("["):
        return "put an IPv6 address into brackets, as in [::1]:8081"
    if ":" not in text:
        return "add :port"
    return ""


def is_loopback(address: str) -> bool:
    """Whether an address, as the types below take it, is reached from its own machine alone."""
    host = address.rpartition(":")[0].removeprefix("[").removesuffix("]")
    try:
        return ip_address(host).is_loopback
    except ValueError:
        # A name: this one alone is the machine's own by definition (RFC 6761, 6.3).
        return host.removesuffix(".").lower() == "localhost"


ListenAddress = Annotated[str, Expected(_LISTEN, quoting="text"), AfterValidator(_listen)]
"""`host:port`, `[ipv6]:port` or `unix:/path`; port 0 is one the system picks."""

TcpListenAddress = Annotated[str, Expected(_LISTEN_TCP, quoting="text"), AfterValidator(_listen_tcp)]
"""`host:port` or `[ipv6]:port`; port 0 is one the system picks."""

PeerAddress = Annotated[str, Expected(_PEER, quoting="text"), AfterValidator(_peer)]
"""`host:port` or `[ipv6]:port`, port 1 to 65535."""

XdsServerAddress = Annotated[str, Expected(_XDS_SERVER, quoting="text"), AfterValidator(_xds_server)]
"""As `PeerAddress`."""
