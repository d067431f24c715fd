"""A client of TLS 1.3 that makes its records itself, so that it can send what no library sends (RFC 8446)."""

from __future__ import annotations

import hashlib
import hmac
import socket
import ssl
import struct
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

CIPHER = "TLS_AES_256_GCM_SHA384"
"""What Python's client and server agree on."""

_ALERT, _HANDSHAKE, _DATA = b"\x15", b"\x16", b"\x17"


class RecordWriter:
    """What one client sends after its handshake."""

    def __init__(self, secret: bytes) -> None:
        self._use(secret)

    @classmethod
    def shake_hands(cls, connection: socket.socket, context: ssl.SSLContext, folder: Path) -> RecordWriter:
        """Do the handshake as a client; returns the writer for what follows it.

        Args:
            context: the client's; it writes its secrets into the folder.
        """
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.keylog_filename = str(folder / "secrets")
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        session = context.wrap_bio(incoming, outgoing)
        while True:
            try:
                session.do_handshake()
                break
            except ssl.SSLWantReadError:
                connection.sendall(outgoing.read())
                incoming.write(connection.recv(65_536))
        connection.sendall(outgoing.read())
        assert session.cipher()[0] == CIPHER
        secrets = (folder / "secrets").read_text().splitlines()
        [secret] = [line.split()[2] for line in secrets if line.startswith("CLIENT_TRAFFIC_SECRET_0")]
        return cls(bytes.fromhex(secret))

    def data(self, content: bytes) -> bytes:
        return self._record(_DATA, content)

    def key_update(self) -> bytes:
        record = self._record(_HANDSHAKE, b"\x18\0\0\x01\0")
        self._use(_expand(self._secret, b"traffic upd", 48))
        return record

    def goodbye(self) -> bytes:
        """close_notify."""
        return self._record(_ALERT, b"\x01\0")

    def _record(self, kind: bytes, content: bytes) -> bytes:
        header = b"\x17\x03\x03" + struct.pack(">H", len(content) + 1 + 16)
        nonce = (self._iv ^ self._number).to_bytes(12, "big")
        self._number += 1
        return header + self._key.encrypt(nonce, content + kind, header)

    def _use(self, secret: bytes) -> None:
        self._secret = secret
        self._key = AESGCM(_expand(secret, b"key", 32))
        self._iv = int.from_bytes(_expand(secret, b"iv", 12), "big")
        self._number = 0


def _expand(secret: bytes, label: bytes, size: int) -> bytes:
    """HKDF-Expand-Label, for up to one block."""
    label = b"tls13 " + label
    info = struct.pack(">HB", size, len(label)) + label + b"\0"
    return hmac.digest(secret, info + b"\1", hashlib.sha384)[:size]
