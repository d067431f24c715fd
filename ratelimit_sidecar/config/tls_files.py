"""A certificate, its key and the authority of its peers: PEM files that may be replaced at any time.

`CertificateInForce` holds their last usable content. The files are read again every minute, and on request. If they
cannot be used, as when the new certificate is there and its key is not yet, the former content stays in force.
"""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Literal, NoReturn

import structlog

from ratelimit_sidecar.config.regular_file import read_regular_file
from ratelimit_sidecar.threads import in_daemon_thread

if TYPE_CHECKING:
    import grpc

CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"
"""The ciphers of a server in TLS 1.2: HTTP/2 forbids most others (RFC 9113, section 9.2.2). Envoy and gRPC
offer these.
"""

_log = structlog.stdlib.get_logger(__name__)

Side = Literal["client", "server"]


@dataclass(frozen=True, slots=True)
class TlsPaths:
    """The paths of the files.

    Args:
        ca: None if the other end needs no certificate.
    """

    certificate: Path
    key: Path
    ca: Path | None


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """The content of the files."""

    certificate: bytes
    key: bytes
    ca: bytes | None


@dataclass(frozen=True, slots=True)
class LoadedCertificate:
    """Certificate, key and authority that were checked to belong together.

    Args:
        context: Python's ssl context for HTTP/2. It checks that the other end's certificate is of the authority, but no
            names: the right name depends on who the other end says it is.
        not_after_s: when the certificate ends, in seconds since the epoch; None if that cannot be read.
    """

    files: TlsFiles
    context: ssl.SSLContext
    not_after_s: float | None


def read(paths: TlsPaths) -> TlsFiles:
    """Read the files.

    Raises:
        OSError: a file cannot be read.
    """
    return TlsFiles(
        _bytes_of(paths.certificate), _bytes_of(paths.key), None if paths.ca is None else _bytes_of(paths.ca)
    )


def read_checked(paths: TlsPaths, side: Side) -> tuple[TlsFiles, ssl.SSLContext]:
    """Read the files, and let OpenSSL check that they belong together.

    Raises:
        OSError: a file cannot be read, or they do not belong together; the text names the files.
    """
    files = read(paths)
    context = _context(side)
    if files.ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(cadata=files.ca.decode("ascii", "replace"))
        except (ssl.SSLError, ValueError) as error:
            raise OSError(f"{paths.ca}: no certificates in PEM") from error
    try:
        context.load_cert_chain(paths.certificate, paths.key, password=_refuse_password)
    except ssl.SSLError as error:
        is_mismatch = error.reason == "KEY_VALUES_MISMATCH"
        why = "they do not belong together" if is_mismatch else "not a certificate and its key, in PEM"
        raise OSError(f"{paths.certificate}, {paths.key}: {why}") from error
    # OpenSSL has read the files itself: check that it saw the same content.
    if read(paths) != files:
        raise OSError(f"{paths.certificate}, {paths.key}: they change while they are read")
    return files, context


def not_after_s(certificate: bytes) -> float:
    """When the first certificate of a PEM file ends, in seconds since the epoch.

    Raises:
        ValueError: the end cannot be read.
    """
    # Imported only when needed: 50 ms and 12 MB.
    from cryptography import x509  # noqa: PLC0415

    return x509.load_pem_x509_certificates(certificate)[0].not_valid_after_utc.timestamp()


def end_s(certificate: bytes) -> float | None:
    """As `not_after_s`; None if the end cannot be read. The TLS library accepts the certificate, so it can be used."""
    try:
        return not_after_s(certificate)
    except ValueError:
        return None


class CertificateInForce:
    """The certificate in force: the last usable content of the files. Call `load` first, and run `keep_read` as a task.

    Args:
        side: which end of its connections this program is.
    """

    read_seconds = 60.0
    """How often the files are read without a handshake, since streams may last longer than certificates."""

    def __init__(self, paths: TlsPaths, side: Side) -> None:
        self._paths = paths
        self._side: Side = side
        self._lock = Lock()
        """Only one thread reads the files at a time. The event loop never does, and never waits for this lock."""
        self._in_force: LoadedCertificate | None = None
        self._error = ""
        self.failed_renewals = 0
        """How often the files were read again and could not be used."""

    @property
    def in_force(self) -> LoadedCertificate:
        """The files that were last usable, without reading them again."""
        assert self._in_force is not None
        return self._in_force

    @property
    def not_after_s(self) -> float | None:
        """When the certificate in force ends, in seconds since the epoch; None if that is unknown."""
        return None if self._in_force is None else self._in_force.not_after_s

    def load(self) -> None:
        """Read the files for the first time. It blocks.

        Raises:
            OSError: they cannot be read, or are no certificate, key and authority that belong together.
        """
        files, context = read_checked(self._paths, self._side)
        self._in_force = LoadedCertificate(files, context, end_s(files.certificate))

    def renew(self) -> LoadedCertificate:
        """Read the files again, and return the content in force. It blocks, so do not call it on the event loop."""
        with self._lock:
            error = ""
            try:
                if read(self._paths) != self.in_force.files:
                    self.load()
                    _log.info("certificate_renewed", file=str(self._paths.certificate))
            except OSError as refused:
                error = str(refused)
                self.failed_renewals += 1
            if error and error != self._error:
                _log.error("certificate_not_renewed", why=error, until_then="what was read before stays in force")
            self._error = error
            return self.in_force

    async def keep_read(self) -> None:
        """Read the files again at each interval, until cancelled."""
        while True:
            await asyncio.sleep(self.read_seconds)
            try:
                await in_daemon_thread("certificate", self.renew)
            except Exception:
                # For example the system has no more threads; the next attempt may succeed.
                self.failed_renewals += 1
                _log.exception("certificate_not_renewed", until_then="what was read before stays in force")

    def grpc_server_credentials(self) -> grpc.ServerCredentials:
        """Credentials for a listener of gRPC's library. It renews them at each handshake, in a thread of its own. With
        an authority, clients must have a certificate of it.
        """
        # The import takes 100 ms, and `check` does not need it.
        import grpc  # noqa: PLC0415

        served = self.in_force.files

        def configuration(files: TlsFiles) -> grpc.ServerCertificateConfiguration:
            return grpc.ssl_server_certificate_configuration([(files.key, files.certificate)], files.ca)

        def renewed() -> grpc.ServerCertificateConfiguration | None:
            nonlocal served
            files = self.renew().files
            if files == served:
                return None
            served = files
            return configuration(files)

        return grpc.dynamic_ssl_server_credentials(
            configuration(served), renewed, require_client_authentication=served.ca is not None
        )


def _context(side: Side) -> ssl.SSLContext:
    if side == "client":
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
    else:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.set_ciphers(CIPHERS)
        # RFC 9113, section 9.2.1.
        context.options |= ssl.OP_NO_RENEGOTIATION
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    return context


def _bytes_of(path: Path) -> bytes:
    try:
        return read_regular_file(path)
    except OSError as error:
        raise OSError(f"{path}: {error.strerror}") from error


def _refuse_password() -> NoReturn:
    # Otherwise OpenSSL would ask on the terminal.
    raise OSError("the key is encrypted: keep it as it is, in a file that only this process can read")
