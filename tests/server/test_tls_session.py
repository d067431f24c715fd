"""TLS without I/O."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
from certificates import Authority

from ratelimit_sidecar.server.tls import ServerCertificate

SIZE = 4_096


class Client:
    """A client, and the server's session that it is connected to."""

    def __init__(self, folder: Path, *, alpn: str = "h2") -> None:
        authority = Authority()
        certificate = ServerCertificate(authority.write_listener(folder / "server", "sidecar.example"))
        certificate.load()
        self.server = certificate.new_session()
        authority.certificate_to(folder / "trusted.crt")
        context = ssl.create_default_context(cafile=folder / "trusted.crt")
        context.set_alpn_protocols([alpn])
        self._incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.session = context.wrap_bio(self._incoming, self.outgoing, server_hostname="sidecar.example")

    def shake_hands(self) -> None:
        while True:
            try:
                self.session.do_handshake()
                break
            except ssl.SSLWantReadError:
                self.deliver()
                self.take(self.server.send(b""))
        self.deliver()
        self.take(self.server.send(b""))

    def write(self, data: bytes) -> None:
        while data:
            data = data[self.session.write(data) :]

    def say_goodbye(self) -> None:
        with pytest.raises(ssl.SSLWantReadError):
            self.session.unwrap()

    def deliver(self, of: slice = slice(None)) -> list[bytes]:
        """Deliver what was written, and return what the server reads."""
        self.server.receive(self.outgoing.read()[of])
        parts = []
        while self.server.has_more:
            parts.append(self.server.read(SIZE))
        return [part for part in parts if part]

    def take(self, encrypted: bytes) -> None:
        self._incoming.write(encrypted)

    def read(self) -> bytes:
        """All that the server has sent."""
        data = b""
        while True:
            try:
                part = self.session.read(65_536)
            except ssl.SSLWantReadError:
                return data
            except ssl.SSLZeroReturnError:
                return data + b"<goodbye>"
            data += part


@pytest.fixture
def client(tmp_path: Path) -> Client:
    return Client(tmp_path)


@pytest.fixture
def connected(client: Client) -> Client:
    client.shake_hands()
    assert client.server.is_established
    return client


def test_what_is_sent_before_the_handshake_is_over_is_kept_until_then(client: Client) -> None:
    assert client.server.send(b"early") == b""
    client.shake_hands()
    client.take(client.server.send(b" and late"))
    assert client.read() == b"early and late"


def test_what_came_with_the_end_of_the_handshake_is_read(client: Client) -> None:
    with pytest.raises(ssl.SSLWantReadError):
        client.session.do_handshake()
    client.deliver()
    client.take(client.server.send(b""))
    client.session.do_handshake()
    client.write(b"hello")
    assert client.deliver() == [b"hello"]


@pytest.mark.parametrize("size", [1, SIZE, SIZE + 1, 16_384, 100_000])
def test_whatever_the_size_all_arrives_in_slices(connected: Client, size: int) -> None:
    sent = bytes(number % 251 for number in range(size))
    connected.write(sent)
    slices = connected.deliver()
    assert b"".join(slices) == sent
    assert max(map(len, slices)) <= SIZE
    connected.take(connected.server.send(sent))
    assert connected.read() == sent


def test_a_record_may_come_in_pieces(connected: Client) -> None:
    connected.write(b"hello")
    encrypted = connected.outgoing.read()
    read = []
    for at in range(len(encrypted)):
        connected.server.receive(encrypted[at : at + 1])
        while connected.server.has_more:
            read.append(connected.server.read(SIZE))
    assert b"".join(read) == b"hello"


def test_a_goodbye_is_answered_with_one(connected: Client) -> None:
    connected.write(b"last")
    connected.say_goodbye()
    assert connected.deliver() == [b"last"]
    assert connected.server.is_over
    assert connected.server.reject_reason == ""
    connected.take(connected.server.send(b"answer") + connected.server.end())
    assert connected.read() == b"answer<goodbye>"


def test_who_breaks_tls_is_told_so_and_gets_nothing_more(connected: Client) -> None:
    connected.write(b"hello")
    assert connected.deliver(slice(5, None)) == []
    assert (connected.server.is_over, connected.server.reject_reason) == (True, "tls")
    connected.take(connected.server.send(b"answer") + connected.server.end())
    with pytest.raises(ssl.SSLError, match="ALERT"):
        connected.read()


def test_who_does_not_speak_http_2_is_rejected(tmp_path: Path) -> None:
    client = Client(tmp_path, alpn="http/1.1")
    client.shake_hands()
    assert (client.server.is_established, client.server.reject_reason) == (False, "tls")
    client.take(client.server.send(b"answer") + client.server.end())
    assert client.read() == b""
