"""The certificate of listeners for Envoy, and which clients it admits.

Each connection has the certificate, key and authority that are in force when it is accepted. So a renewal needs neither
new sockets nor changes to a context in use, and sessions from before cannot be resumed. (asyncio's servers keep one
context for ever.)
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_address

from ratelimit_sidecar.config.certificate_names import accepting
from ratelimit_sidecar.config.sidecar_schema import ListenTlsConfig
from ratelimit_sidecar.config.tls_files import CertificateInForce, TlsPaths
from ratelimit_sidecar.server.tls_session import TlsSession


class ServerCertificate(CertificateInForce):
    """The certificate that a listener shows, and the check of clients' certificates."""

    def __init__(self, config: ListenTlsConfig) -> None:
        super().__init__(TlsPaths(config.certificate, config.key, config.ca), "server")
        self._client_name = None if config.client_name is None else _normal(config.client_name)
        self._accepts = None if self._client_name is None else accepting(self._client_name)

    def new_session(self) -> TlsSession:
        """The TLS of a new connection."""
        return TlsSession(self.in_force.context, self.may_call)

    @property
    def wants_name(self) -> bool:
        """True if clients of the authority need a certain name."""
        return self._client_name is not None

    def may_call(self, names: Iterable[str]) -> bool:
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


def _normal(name: str) -> str:
    """An IP address in its normal form; other names as they are."""
    try:
        return str(ip_address(name.strip()))
    except ValueError:
        return name
