"""A certificate, its key and the authority of its peers, as files in PEM that may be replaced at any time."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """What is in them."""

    certificate: bytes
    key: bytes
    ca: bytes


def read(certificate: Path, key: Path, ca: Path) -> TlsFiles:
    """Raises:
    OSError: a file cannot be read.
    """
    return TlsFiles(_bytes_of(certificate), _bytes_of(key), _bytes_of(ca))


def read_checked(certificate: Path, key: Path, ca: Path) -> tuple[TlsFiles, ssl.SSLContext]:
    """Read the files, and let OpenSSL check that they belong together.

    Returns:
        The files, and what a client of HTTP/2 needs. It checks that a server's certificate is of the authority, and no
        names: which one is right depends on who the server says it is.

    Raises:
        OSError: a file cannot be read, or they do not belong together; the text names the files.
    """
    files = read(certificate, key, ca)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.set_alpn_protocols(["h2"])
    try:
        context.load_verify_locations(cadata=files.ca.decode("ascii", "replace"))
    except (ssl.SSLError, ValueError) as error:
        raise OSError(f"{ca}: no certificates in PEM") from error
    try:
        context.load_cert_chain(certificate, key, password=_refuse_password)
    except ssl.SSLError as error:
        is_mismatch = error.reason == "KEY_VALUES_MISMATCH"
        why = "they do not belong together" if is_mismatch else "not a certificate and its key, in PEM"
        raise OSError(f"{certificate}, {key}: {why}") from error
    # OpenSSL has read the files by itself: let it have seen the same.
    if read(certificate, key, ca) != files:
        raise OSError(f"{certificate}, {key}: they change while they are read")
    return files, context


def not_after_s(certificate: bytes) -> float:
    """When the first certificate of a file in PEM ends, in seconds since the epoch.

    Raises:
        ValueError: that cannot be read.
    """
    # Only who has a certificate pays for it: 50 ms and 12 MB.
    from cryptography import x509  # noqa: PLC0415

    return x509.load_pem_x509_certificates(certificate)[0].not_valid_after_utc.timestamp()


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise OSError(f"{path}: {error.strerror}") from error


def _refuse_password() -> NoReturn:
    # Otherwise OpenSSL would ask on the terminal.
    raise OSError("the key is encrypted: keep it as it is, in a file that only this process can read")
