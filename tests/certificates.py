"""Certificates for tests, made when they run; `trustme` and `cryptography` make them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from ratelimit_sidecar.config.sidecar_schema import ListenTlsConfig, SyncTlsConfig
from ratelimit_sidecar.replication.tls import NodeCertificate


class Authority:
    """Signs certificates, and writes them where a node's configuration says."""

    def __init__(self, signed: trustme.CA | None = None) -> None:
        self._authority = trustme.CA() if signed is None else signed

    def child(self) -> Authority:
        """One that this one has signed."""
        return Authority(self._authority.create_child_ca())

    def write(
        self, folder: Path, *names: str, peer_names: str = "{node}", not_after: datetime | None = None
    ) -> SyncTlsConfig:
        """A certificate for these DNS names or IP addresses, in the files of a node."""
        config = config_in(folder, peer_names)
        issued = self._authority.issue_cert(*names, not_after=not_after)
        config.certificate.write_bytes(b"".join(each.bytes() for each in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(config.key)
        self._authority.cert_pem.write_to_path(config.ca)
        return config

    def write_with_uri(self, folder: Path, uri: str, common_name: str, *, peer_names: str) -> SyncTlsConfig:
        """One for a URI alone, as SPIFFE has it."""
        config = config_in(folder, peer_names)
        key = ec.generate_private_key(ec.SECP256R1())
        signer = serialization.load_pem_private_key(self._authority.private_key_pem.bytes(), None)
        assert isinstance(signer, ec.EllipticCurvePrivateKey)
        issuer = x509.load_pem_x509_certificate(self._authority.cert_pem.bytes())
        now = datetime.now(UTC)
        subject = [x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)] if common_name else []
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name(subject))
            .issuer_name(issuer.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(hours=1))
            .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
            .sign(signer, hashes.SHA256())
        )
        config.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        config.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        self._authority.cert_pem.write_to_path(config.ca)
        return config

    def write_listener(
        self, folder: Path, *names: str, clients: Authority | None = None, client_name: str | None = None
    ) -> ListenTlsConfig:
        """A certificate for a listener.

        Args:
            clients: who signs the certificates that it asks its clients for; None when it asks for none.
        """
        files = self.write(folder, *names)
        if clients is not None:
            clients.certificate_to(files.ca)
        ca = None if clients is None else files.ca
        return ListenTlsConfig(certificate=files.certificate, key=files.key, ca=ca, client_name=client_name)

    def certificate_to(self, path: Path) -> None:
        self._authority.cert_pem.write_to_path(path)

    def of(self, folder: Path, *names: str, peer_names: str = "{node}") -> NodeCertificate:
        """A node's certificate, not loaded yet."""
        return NodeCertificate(self.write(folder, *names, peer_names=peer_names))


def config_in(folder: Path, peer_names: str = "{node}") -> SyncTlsConfig:
    folder.mkdir(exist_ok=True)
    return SyncTlsConfig(
        certificate=folder / "tls.crt", key=folder / "tls.key", ca=folder / "ca.crt", peer_names=peer_names
    )
