"""TLS between sidecars: each end shows a certificate, which must be for the node that the end says it is.

Theory of operation. A listener learns from gRPC which names are in a client's certificate. A dialler does not: gRPC for
Python tells it nothing of the server's, and compares it with one DNS name at most. So a dial has two handshakes. The
first is made by Python's ssl module, which checks the chain against the authority and gives the certificate; then gRPC
connects, and is given this one certificate as all that it trusts. Whoever answers must hold its private key, so the
names read in the first handshake are those of the other end of the second.

The files are read again at each handshake, and every minute, so that what is wrong with them is known before it
matters. What cannot be used, as when the new certificate is there and its key is not yet, changes nothing: what was
read before stays in force.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from threading import Lock

import grpc
import grpc.aio
import structlog

from ratelimit_sidecar.config.sidecar_schema import SyncTlsConfig
from ratelimit_sidecar.config.tls_files import TlsFiles, not_after_s, read, read_checked
from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.replication.wire import ProtocolError, Reason

READ_SECONDS = 60.0
"""How often the files are read without a handshake: streams may last for months, and certificates do not."""

_MAX_NAMES_TOLD = 5

_log = structlog.stdlib.get_logger(__name__)


class UntrustedError(Exception):
    """A handshake that came to nothing; its text says why, and what to do."""


@dataclass(frozen=True, slots=True)
class PeerCertificate:
    """What the other end has shown, and its authority has signed.

    Args:
        names: its subject alternative names of the kinds DNS and URI.
    """

    names: frozenset[str]

    def check(self, pattern: str, origin: Origin, region: str) -> None:
        """Check that it is for the node that says it is `origin`, in `region`.

        Args:
            pattern: with `{node}` and `{region}` for these, and `*` for one part of a name between dots or slashes.

        Raises:
            ProtocolError: it is not.
        """
        wanted = pattern.replace("{node}", origin.node).replace("{region}", region)
        accepts = _expression(pattern, origin.node, region)
        if not any(accepts.fullmatch(name) for name in self.names):
            found = ", ".join(sorted(self.names)[:_MAX_NAMES_TOLD]) or "no DNS name and no URI"
            raise ProtocolError(
                Reason.CERTIFICATE, f"the certificate of {origin.node!r} must be for {wanted}; it is for {found}"
            )


@dataclass(frozen=True, slots=True)
class Pinned:
    """A dialled end's certificate.

    Args:
        pem: all that gRPC is to trust.
        server_name: one of its names, as gRPC insists on comparing one.
    """

    certificate: PeerCertificate
    pem: bytes
    server_name: str


class NodeCertificate:
    """This node's certificate, its key, and the authority of all nodes' certificates; in force as the files say now."""

    def __init__(self, config: SyncTlsConfig) -> None:
        self.peer_names = config.peer_names
        self._paths = config.certificate, config.key, config.ca
        self._lock = Lock()
        """gRPC asks in a thread of its own."""
        self._files: TlsFiles | None = None
        self._context: ssl.SSLContext | None = None
        self._error = ""
        self.failed_renewals = 0
        """Times that the files were read again and could not be used."""
        self.not_after_s: float | None = None
        """When the certificate in force ends, in seconds since the epoch; None when that cannot be read in it."""

    def load(self) -> None:
        """Read the files for the first time.

        Raises:
            OSError: they cannot be read, or are no certificate, key and authority that belong together.
        """
        self._read()

    async def keep_read(self) -> None:
        """Read the files again and again, until cancelled. To be called after `load`."""
        while True:
            await asyncio.sleep(READ_SECONDS)
            await asyncio.to_thread(self._in_force)

    def _read(self) -> None:
        self._files, self._context = read_checked(*self._paths)
        try:
            self.not_after_s = not_after_s(self._files.certificate)
        except ValueError:
            # OpenSSL takes it: that is what counts.
            self.not_after_s = None

    def _in_force(self) -> tuple[TlsFiles, ssl.SSLContext]:
        with self._lock:
            assert self._files is not None
            assert self._context is not None
            error = ""
            try:
                if read(*self._paths) != self._files:
                    self._read()
                    _log.info("certificate_renewed", file=str(self._paths[0]))
            except OSError as refused:
                error = str(refused)
                self.failed_renewals += 1
            if error and error != self._error:
                _log.error("certificate_not_renewed", why=error, until_then="what was read before stays in force")
            self._error = error
            return self._files, self._context

    def server_credentials(self) -> grpc.ServerCredentials:
        """Of the listener: for clients with a certificate only. To be called after `load`."""
        served = self._in_force()[0]

        def renewed() -> grpc.ServerCertificateConfiguration | None:
            nonlocal served
            files = self._in_force()[0]
            if files == served:
                return None
            served = files
            return _server_configuration(files)

        return grpc.dynamic_ssl_server_credentials(
            _server_configuration(served), renewed, require_client_authentication=True
        )

    async def look_at(self, host: str, port: int) -> Pinned:
        """The certificate of who listens there, checked against the authority; the first of a dial's two handshakes.

        Raises:
            UntrustedError: the two ends do not trust each other.
            OSError: nobody can be reached there.
        """
        _, context = await asyncio.to_thread(self._in_force)
        try:
            reader, writer = await asyncio.open_connection(host, port, ssl=context)
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
        """For the second handshake: with this very certificate at the other end, or none at all."""
        files = self._in_force()[0]
        return grpc.ssl_channel_credentials(pinned.pem, files.key, files.certificate)


def of_client(auth_context: Mapping[str, Iterable[bytes]]) -> PeerCertificate:
    """The certificate of a client, as gRPC tells its listener (`ServicerContext.auth_context`)."""
    names = [*auth_context.get("peer_dns", ()), *auth_context.get("peer_uri", ())]
    return PeerCertificate(frozenset(name.decode("utf-8", "replace") for name in names))


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


def _expression(pattern: str, node: str, region: str) -> re.Pattern[str]:
    """What a name has to match; node and region stand for themselves, whatever is in them."""
    # DNS names are the same in either case (RFC 4343), those of SPIFFE are not.
    is_uri = "://" in pattern
    any_part = "[^/]+" if is_uri else "[^.]+"
    parts = {"{node}": re.escape(node), "{region}": re.escape(region), "*": any_part}
    text = "".join(parts.get(part) or re.escape(part) for part in re.split(r"(\{node\}|\{region\}|\*)", pattern))
    return re.compile(text, re.NOFLAG if is_uri else re.IGNORECASE | re.ASCII)


def _server_configuration(files: TlsFiles) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(files.key, files.certificate)], files.ca)
