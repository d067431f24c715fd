"""TLS between sidecars: each end shows a certificate, which must be for the node that the end says it is.

Theory of operation. A listener learns the names in a client's certificate from gRPC. A dialler does not: gRPC for
Python tells it nothing about the server's certificate, and compares it with at most one DNS name. So a dial has two
handshakes. Python's ssl module does the first one, checks the chain against the authority and returns the certificate.
Then gRPC connects, and trusts only that one certificate. The end that answers must have its private key, so the names
read in the first handshake are those of the other end of the second.

The files are read again at each handshake, and every minute, so that errors in them are known before they matter
(`config.tls_files`).
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import grpc
import grpc.aio

from ratelimit_sidecar.config.certificate_names import accepting
from ratelimit_sidecar.config.sidecar_schema import SyncTlsConfig
from ratelimit_sidecar.config.tls_files import CertificateInForce, TlsPaths, end_s
from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.replication.wire import ProtocolError, Reason
from ratelimit_sidecar.threads import in_daemon_thread

_MAX_NAMES_TOLD = 5


class UntrustedError(Exception):
    """A failed handshake; the text says why, and what to do."""


@dataclass(frozen=True, slots=True)
class PeerCertificate:
    """The certificate that the other end has shown, signed by the authority.

    Args:
        names: its subject alternative names of the kinds DNS and URI.
        not_after_s: when it ends, in seconds since the epoch; None if the handshake has looked, or nobody can tell.
    """

    names: frozenset[str]
    not_after_s: float | None = None

    def check(self, pattern: str, origin: Origin, region: str) -> None:
        """Check that it is for the node that says it is `origin`, in `region`.

        Args:
            pattern: with `{node}` and `{region}` for these, and `*` for one part of a name between dots or slashes.

        Raises:
            ProtocolError: it is not, or it has ended.
        """
        if self.not_after_s is not None and self.not_after_s < time.time():
            raise ProtocolError(Reason.CERTIFICATE, f"the certificate of {origin.node!r} has ended")
        wanted = pattern.replace("{node}", origin.node).replace("{region}", region)
        accepts = accepting(pattern, {"{node}": origin.node, "{region}": region})
        if not any(accepts.fullmatch(name) for name in self.names):
            found = ", ".join(sorted(self.names)[:_MAX_NAMES_TOLD]) or "no DNS name and no URI"
            raise ProtocolError(
                Reason.CERTIFICATE, f"the certificate of {origin.node!r} must be for {wanted}; it is for {found}"
            )


@dataclass(frozen=True, slots=True)
class Pinned:
    """The certificate of a dialled peer.

    Args:
        pem: the only certificate that gRPC must trust.
        server_name: one of its names, since gRPC insists on comparing one.
    """

    certificate: PeerCertificate
    pem: bytes
    server_name: str


class NodeCertificate(CertificateInForce):
    """This node's certificate, its key, and the authority of all nodes' certificates (see `CertificateInForce`)."""

    def __init__(self, config: SyncTlsConfig) -> None:
        super().__init__(TlsPaths(config.certificate, config.key, config.ca), "client")
        self.peer_names = config.peer_names

    async def look_at(self, host: str, port: int) -> Pinned:
        """The certificate of a listener, checked against the authority: the first of a dial's two handshakes.

        Raises:
            UntrustedError: the two ends do not trust each other.
            OSError: nobody can be reached there.
        """
        latest = await in_daemon_thread("certificate", self.renew)
        try:
            reader, writer = await asyncio.open_connection(host, port, ssl=latest.context)
            try:
                connection: ssl.SSLObject = writer.get_extra_info("ssl_object")
                shown, der = connection.getpeercert(), connection.getpeercert(binary_form=True)
                # In TLS 1.3 a server looks at the client's certificate after its own part is over; then HTTP/2 speaks.
                is_accepted = bool(await reader.read(1))
            finally:
                writer.transport.abort()
        except ssl.SSLCertVerificationError as error:
            raise UntrustedError(
                f"its certificate is not trusted: {error.verify_message}; is it of the authority in sync.tls.ca?"
            ) from error
        except ssl.SSLError as error:
            raise UntrustedError(f"the TLS handshake failed: {error.reason}; does it have sync.tls?") from error
        if not is_accepted:
            raise UntrustedError("it hung up after the TLS handshake: does it trust this node's certificate?")
        assert shown is not None
        assert der is not None
        return _pinned(shown, der)

    def channel_credentials(self, pinned: Pinned) -> grpc.ChannelCredentials:
        """Credentials for the second handshake, which trust only that certificate."""
        files = self.in_force.files
        return grpc.ssl_channel_credentials(pinned.pem, files.key, files.certificate)


def of_client(auth_context: Mapping[str, Iterable[bytes]]) -> PeerCertificate:
    """The certificate of a client, from gRPC's `ServicerContext.auth_context`.

    It may have ended: nobody has looked when the client has resumed a TLS session, which it may do for days.
    """
    names = [*auth_context.get("peer_dns", ()), *auth_context.get("peer_uri", ())]
    [pem] = auth_context["x509_pem_cert"]
    return PeerCertificate(frozenset(name.decode("utf-8", "replace") for name in names), end_s(pem))


def _pinned(shown: Mapping[str, object], der: bytes) -> Pinned:
    names: dict[str, list[str]] = {}
    for kind, name in shown.get("subjectAltName", ()):  # type: ignore[attr-defined]
        names.setdefault(kind, []).append(name)
    dns, uri = names.get("DNS", []), names.get("URI", [])
    subject = [value for part in shown.get("subject", ()) for key, value in part if key == "commonName"]  # type: ignore[attr-defined]
    comparable = [*dns, *names.get("IP Address", []), *subject]
    if not comparable:
        raise UntrustedError("its certificate must have a DNS name, beside others: gRPC takes no server without")
    pem = ssl.DER_cert_to_PEM_cert(der).encode()
    return Pinned(PeerCertificate(frozenset([*dns, *uri])), pem, comparable[0])
