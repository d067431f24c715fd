"""TLS of listeners for Envoy: their certificate, and what happens on a connection before HTTP/2 speaks.

Theory of operation. Sockets are accepted here, and each is given its TLS by the certificate, key and authority in force
at that moment: so a renewal needs neither new sockets nor changes to a context in use, and no session of before can be
resumed after it. (asyncio's servers have one context for ever. Its `start_tls` loses what a client says at once, on
uvloop.) A handshake counts as a connection, so there is a bound on them. When it is over and the client is one that is
wanted, its protocol takes its place.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from ipaddress import ip_address

from ratelimit_sidecar.config.certificate_names import accepting
from ratelimit_sidecar.config.sidecar_schema import ListenTlsConfig
from ratelimit_sidecar.config.tls_files import CertificateInForce, TlsPaths
from ratelimit_sidecar.server.accepting import clients_of
from ratelimit_sidecar.server.budget import AddressBudget
from ratelimit_sidecar.server.grpc_protocol import GrpcProtocol, Shared

TIMER_SECONDS = 0.01
"""A timer of the event loop may go off so much early, by its own clock."""

_NAMES = ("DNS", "URI", "IP Address")
"""Of subject alternative names the kinds that are looked at, as Python calls them."""

_OF_NO_CLIENT = ("PEER_DID_NOT_RETURN_A_CERTIFICATE", "NO_CERTIFICATE_RETURNED")
"""What OpenSSL calls it when a client has no certificate."""


class ServerCertificate(CertificateInForce):
    """What a listener shows, and what it wants to be shown."""

    def __init__(self, config: ListenTlsConfig) -> None:
        super().__init__(TlsPaths(config.certificate, config.key, config.ca), "server")
        self._client_name = None if config.client_name is None else _normal(config.client_name)
        self._accepts = None if self._client_name is None else accepting(self._client_name)

    @property
    def wants_name(self) -> bool:
        """Whether not every client of the authority is taken."""
        return self._client_name is not None

    def is_for_client(self, names: Iterable[str]) -> bool:
        """Whether a client may call, whose certificate has these subject alternative names."""
        if self._client_name is None or self._accepts is None:
            return True
        for name in map(_normal, names):
            if self._accepts.fullmatch(name):
                return True
            # A certificate may be for all names with one more part (RFC 9525, section 6.3).
            if name.startswith("*.") and accepting(name).fullmatch(self._client_name):
                return True
        return False


class TlsListeners:
    """Accepts connections over TLS, and gives each to a protocol when its handshake is over.

    Args:
        make_protocol: given the budget of the client's address and the time when it connected; what takes calls.
    """

    def __init__(
        self,
        certificate: ServerCertificate,
        shared: Shared,
        make_protocol: Callable[[AddressBudget, float], GrpcProtocol],
    ) -> None:
        self._certificate = certificate
        self._shared = shared
        self._make_protocol = make_protocol
        self._accepting: set[asyncio.Task[None]] = set()
        self.handshakes: set[asyncio.Task[None]] = set()
        """Those that are not over."""

    def accept(self, listening: socket.socket) -> None:
        """Take clients of a socket, until `stop`."""
        self._accepting.add(self._shared.tasks.create_task(self._accept(listening)))

    async def stop(self) -> None:
        """Take no more clients, and hang up on those whose handshake is not over: they have not made a call yet."""
        running = self._accepting | self.handshakes
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)

    async def _accept(self, listening: socket.socket) -> None:
        shared = self._shared
        async for connected, budget in clients_of(listening, shared):
            task = shared.tasks.create_task(self._shake_hands(connected, budget))
            self.handshakes.add(task)
            task.add_done_callback(self.handshakes.discard)

    async def _shake_hands(self, connected: socket.socket, budget: AddressBudget) -> None:
        loop = asyncio.get_running_loop()
        shared = self._shared
        began_s = loop.time()
        gate = _Gate(self._certificate, partial(self._make_protocol, budget, began_s))
        try:
            await loop.connect_accepted_socket(
                lambda: gate,
                connected,
                ssl=self._certificate.in_force.context,
                ssl_handshake_timeout=shared.limits.handshake,
                ssl_shutdown_timeout=shared.limits.handshake,
            )
        except ssl.SSLError as error:
            gate.why_not = "certificate" if _is_about_client(error) else "tls"
        except OSError:
            # Either it has hung up, or it took too long.
            if loop.time() - began_s >= shared.limits.handshake - TIMER_SECONDS:
                gate.why_not = "handshake"
        except Exception as error:
            # Whatever is in a client's certificate must not end the others' connections.
            gate.why_not = "tls"
            shared.failures.status_of("the TLS handshake", error)
        finally:
            if not gate.has_passed:
                shared.room.leave(budget)
                if gate.why_not:
                    shared.counts.closed_connections[gate.why_not] += 1


class _Gate(asyncio.Protocol):
    """Stands where a connection's protocol will be, until the handshake is over."""

    def __init__(self, certificate: ServerCertificate, make_protocol: Callable[[], GrpcProtocol]) -> None:
        self._certificate = certificate
        self._make_protocol = make_protocol
        self.has_passed = False
        self.why_not = ""
        """A key of `Counts.closed_connections`."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # no BaseTransport
        session: ssl.SSLObject = transport.get_extra_info("ssl_object")
        # RFC 9113, section 3.3: HTTP/2 over TLS is agreed on by ALPN.
        if session.selected_alpn_protocol() != "h2":
            self.why_not = "tls"
        elif not self._certificate.is_for_client(_names_of(session.getpeercert() or {})):
            self.why_not = "certificate"
        if self.why_not:
            transport.abort()
            return
        self.has_passed = True
        protocol = self._make_protocol()
        transport.set_protocol(protocol)  # type: ignore[arg-type] # it has asyncio.Protocol's methods, but is compiled
        protocol.connection_made(transport)


def _names_of(shown: Mapping[str, object]) -> Iterator[str]:
    for kind, name in shown.get("subjectAltName", ()):  # type: ignore[attr-defined]
        if kind in _NAMES:
            yield name


def _normal(name: str) -> str:
    """An IP address in the one way to write it; other names as they are."""
    try:
        return str(ip_address(name.strip()))
    except ValueError:
        return name


def _is_about_client(error: ssl.SSLError) -> bool:
    return isinstance(error, ssl.SSLCertVerificationError) or error.reason in _OF_NO_CLIENT
