"""TLS of listeners for Envoy: the certificate, and the handshake of each connection.

Theory of operation. Sockets are accepted here, and each gets its TLS context from the certificate, key and authority in
force at that moment. So a renewal needs neither new sockets nor changes to a context in use, and sessions from before
cannot be resumed. (asyncio's servers keep one context for ever. Its `start_tls` on uvloop loses bytes that a client
sends at once.) A handshake counts as a connection, so the number of handshakes is bounded. After the handshake, if the
client is accepted, the real protocol takes over.
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
from ratelimit_sidecar.server.grpc_protocol import FrontEndState, GrpcProtocol

TIMER_SECONDS = 0.01
"""A timer of the event loop may go off this much early."""

_NAMES = ("DNS", "URI", "IP Address")
"""The kinds of subject alternative names that are checked, as Python calls them."""

_OF_NO_CLIENT = ("PEER_DID_NOT_RETURN_A_CERTIFICATE", "NO_CERTIFICATE_RETURNED")
"""OpenSSL's reasons when a client has no certificate."""


class ServerCertificate(CertificateInForce):
    """The certificate that a listener shows, and the check of clients' certificates."""

    def __init__(self, config: ListenTlsConfig) -> None:
        super().__init__(TlsPaths(config.certificate, config.key, config.ca), "server")
        self._client_name = None if config.client_name is None else _normal(config.client_name)
        self._accepts = None if self._client_name is None else accepting(self._client_name)

    @property
    def wants_name(self) -> bool:
        """True if clients of the authority need a certain name."""
        return self._client_name is not None

    def is_for_client(self, names: Iterable[str]) -> bool:
        """True if a client whose certificate has these subject alternative names may call."""
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
        make_protocol: makes the protocol that takes calls, from the budget of the client's address and the time when
            the client connected.
    """

    def __init__(
        self,
        certificate: ServerCertificate,
        shared: FrontEndState,
        make_protocol: Callable[[AddressBudget, float], GrpcProtocol],
    ) -> None:
        self._certificate = certificate
        self._shared = shared
        self._make_protocol = make_protocol
        self._accepting: set[asyncio.Task[None]] = set()
        self.handshakes: set[asyncio.Task[None]] = set()
        """Handshakes in progress."""

    def accept(self, listening: socket.socket) -> None:
        """Accept clients on a socket, until `stop`."""
        self._accepting.add(self._shared.tasks.create_task(self._accept(listening)))

    async def stop(self) -> None:
        """Accept no more clients, and close connections in their handshake: they have no calls yet."""
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
        handshake = _HandshakeProtocol(self._certificate, partial(self._make_protocol, budget, began_s))
        try:
            await loop.connect_accepted_socket(
                lambda: handshake,
                connected,
                ssl=self._certificate.in_force.context,
                ssl_handshake_timeout=shared.limits.handshake,
                ssl_shutdown_timeout=shared.limits.handshake,
            )
        except ssl.SSLError as error:
            handshake.reject_reason = "certificate" if _is_about_client(error) else "tls"
        except OSError:
            # The client closed the connection, or took too long.
            if loop.time() - began_s >= shared.limits.handshake - TIMER_SECONDS:
                handshake.reject_reason = "handshake"
        except Exception as error:
            # Nothing in a client's certificate may end other connections.
            handshake.reject_reason = "tls"
            shared.failures.status_of("the TLS handshake", error)
        finally:
            if not handshake.has_passed:
                shared.connection_limiter.leave(budget)
                if handshake.reject_reason:
                    shared.counts.closed_connections[handshake.reject_reason] += 1


class _HandshakeProtocol(asyncio.Protocol):
    """The protocol of a connection until its handshake is over."""

    def __init__(self, certificate: ServerCertificate, make_protocol: Callable[[], GrpcProtocol]) -> None:
        self._certificate = certificate
        self._make_protocol = make_protocol
        self.has_passed = False
        self.reject_reason = ""
        """Why the client was rejected, a key of `FrontEndCounts.closed_connections`; empty if it was not."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # no BaseTransport
        session: ssl.SSLObject = transport.get_extra_info("ssl_object")
        # RFC 9113, section 3.3: HTTP/2 over TLS is agreed on by ALPN.
        if session.selected_alpn_protocol() != "h2":
            self.reject_reason = "tls"
        elif not self._certificate.is_for_client(_names_of(session.getpeercert() or {})):
            self.reject_reason = "certificate"
        if self.reject_reason:
            transport.abort()
            return
        self.has_passed = True
        # While its address waits at most one read of it is done. By itself asyncio would go on to fill a buffer.
        transport.set_read_buffer_limits(1)  # type: ignore[attr-defined]
        protocol = self._make_protocol()
        transport.set_protocol(protocol)  # type: ignore[arg-type] # it has asyncio.Protocol's methods, but is compiled
        protocol.connection_made(transport)


def _names_of(shown: Mapping[str, object]) -> Iterator[str]:
    for kind, name in shown.get("subjectAltName", ()):  # type: ignore[attr-defined]
        if kind in _NAMES:
            yield name


def _normal(name: str) -> str:
    """An IP address in its normal form; other names as they are."""
    try:
        return str(ip_address(name.strip()))
    except ValueError:
        return name


def _is_about_client(error: ssl.SSLError) -> bool:
    return isinstance(error, ssl.SSLCertVerificationError) or error.reason in _OF_NO_CLIENT
