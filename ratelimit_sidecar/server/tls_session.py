"""TLS of one connection, without I/O: received bytes in, decrypted bytes out; bytes to send in, encrypted bytes out.

Theory of operation. `receive` takes bytes of the network, a slice at a time, and `read` decrypts, until `has_more` is
false. Everything that costs time happens in `read`, as the handshake, and records without any content such as
KeyUpdate. So the caller can time it, and do it in turns (asyncio and uvloop decrypt as fast as a client sends). What is
sent before the handshake is over is kept until then. The handshake is part of `read`: first `is_established` is true,
then there is something to read; or `is_over` is.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Final

HANDSHAKE_BYTES: Final = 192 * 1_024
"""The estimated memory of a handshake: OpenSSL keeps room for a whole message as soon as that is announced, for a
ClientHello up to 171 KiB. An established connection needs a few KiB.
"""

RECORD_BYTES: Final = 16_384
"""The largest record (RFC 8446, section 5.1)."""

MAX_OVERHEAD_BYTES: Final = 32_768
"""The most bytes received that carry nothing, as KeyUpdates do. (Go's crypto/tls takes 16 records in a row.) It is more
than the longest record, which carries nothing until it is complete.
"""

OVERHEAD_BYTES_A_BYTE: Final = 64
"""So many bytes received are forgotten for each that is read. The shortest record with a byte has 23."""

_NAMES: Final = ("DNS", "URI", "IP Address")
"""The kinds of subject alternative names that are checked, as Python calls them."""

_OF_NO_CLIENT: Final = ("PEER_DID_NOT_RETURN_A_CERTIFICATE", "NO_CERTIFICATE_RETURNED")
"""OpenSSL's reasons when a client has no certificate."""


class TlsSession:
    """The server's side of one connection.

    Args:
        may_call: whether a client whose certificate has these subject alternative names may call.
    """

    def __init__(self, context: ssl.SSLContext, may_call: Callable[[Iterable[str]], bool]) -> None:
        self._may_call = may_call
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._early = b""
        """What is to be sent when the handshake is over."""
        self._overhead_bytes = 0
        """The bytes received of an established connection, less what those that were read account for."""
        self.is_established = False
        """True when the handshake is over and the client is accepted."""
        self.has_more = False
        """True if `read` has to be called again before `receive`."""
        self.is_over = False
        """True if nothing more can be read: the client has ended it, or was rejected."""
        self.reject_reason = ""
        """Why the client was rejected, a key of `FrontEndCounts.closed_connections`; empty if it was not."""

    def receive(self, data: bytes | memoryview) -> None:
        """Take bytes of the network. Keep them few: one `read` may have to deal with all of them."""
        self._incoming.write(data)
        self.has_more = True
        if self.is_established:
            self._overhead_bytes += len(data)

    def read(self, size: int) -> bytes:
        """Decrypt at most so many bytes, or go on with the handshake. Look at `is_over` afterwards.

        Returns:
            Bytes of one record; empty if there is none yet.
        """
        if not self.is_established:
            self._shake_hands()
            return b""
        try:
            data = self._object.read(size)
        except ssl.SSLWantReadError:
            self.has_more = False
            if self._overhead_bytes > MAX_OVERHEAD_BYTES:
                self._end("tls")
            return b""
        except ssl.SSLError:
            self._end("tls")
            return b""
        self._overhead_bytes = max(0, self._overhead_bytes - OVERHEAD_BYTES_A_BYTE * len(data))
        if self._overhead_bytes > MAX_OVERHEAD_BYTES:
            self._end("tls")
            return b""
        if data:
            self.has_more = self._incoming.pending > 0 or (len(data) == size and self._object.pending() > 0)
        else:
            self._end("")
        return data

    def send(self, data: bytes) -> bytes:
        """Encrypt; the result has whatever else is to be sent now, too, and may be empty."""
        if not self.is_established:
            self._early += data
            return self._outgoing.read()
        if self._early:
            data = self._early + data
            self._early = b""
        if not data or self.reject_reason:
            return self._outgoing.read()
        records: list[bytes] = []
        sent = 0
        while sent < len(data):
            sent += self._object.write(data[sent : sent + RECORD_BYTES])
            # Read after each record: `MemoryBIO` keeps the most memory that it ever needed.
            records.append(self._outgoing.read())
        return b"".join(records)

    def end(self) -> bytes:
        """What to send last: that nothing more comes, if the client has been accepted."""
        if self.is_established and not self.reject_reason:
            # It raises, as the client has not said the same yet. That is not waited for (RFC 8446, section 6.1).
            with suppress(ssl.SSLError):
                self._object.unwrap()
        return self._outgoing.read()

    def _shake_hands(self) -> None:
        connection = self._object
        try:
            connection.do_handshake()
        except ssl.SSLWantReadError:
            self.has_more = False
            return
        except ssl.SSLError as error:
            self._end("certificate" if _is_about_client(error) else "tls")
            return
        # RFC 9113, section 3.3: HTTP/2 over TLS is agreed on by ALPN.
        shown = connection.getpeercert() or {}
        if connection.selected_alpn_protocol() != "h2":
            self._end("tls")
        elif _has_ended(shown) or not self._may_call(_names_of(shown)):
            self._end("certificate")
        else:
            self.is_established = True
            self.has_more = self._incoming.pending > 0

    def _end(self, reject_reason: str) -> None:
        self.is_over = True
        self.has_more = False
        self.reject_reason = reject_reason


def _names_of(shown: Mapping[str, object]) -> Iterator[str]:
    for kind, name in shown.get("subjectAltName", ()):  # type: ignore[attr-defined]
        if kind in _NAMES:
            yield name


def _has_ended(shown: Mapping[str, object]) -> bool:
    """OpenSSL does not look when a session is resumed, which a client may go on doing for ever (each resumption of TLS
    1.3 gives a new ticket).
    """
    ends = shown.get("notAfter")
    return isinstance(ends, str) and ssl.cert_time_to_seconds(ends) < time.time()


def _is_about_client(error: ssl.SSLError) -> bool:
    return isinstance(error, ssl.SSLCertVerificationError) or error.reason in _OF_NO_CLIENT
