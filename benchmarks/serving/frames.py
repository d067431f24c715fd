"""HTTP/2 frames of a client that calls ShouldRateLimit (RFC 9113, section 4), laid by hand: any of them can be sent.

Headers are in HPACK (RFC 7541) with names of its static table, and nothing is added to the dynamic one. So every
request's block is the same, and a connection has no state besides the number of its next stream.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable

from benchmarks.serving.requests import METHOD

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
END_STREAM, END_HEADERS, ACK = 0x1, 0x4, 0x1
HEAD_BYTES = 9
INITIAL_WINDOW = 65_535
MAX_WINDOW = 2**31 - 1

_INITIAL_WINDOW_SIZE = 4

Headers = Iterable[tuple[str, str]]


def frame_head(length: int, kind: int, flags: int) -> bytes:
    """All of a frame's head but the four bytes of the stream's number."""
    return length.to_bytes(3, "big") + bytes((kind, flags))


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return frame_head(len(payload), kind, flags) + stream.to_bytes(4, "big") + payload


def greeting(window_bytes: int = MAX_WINDOW) -> bytes:
    """A connection's first bytes.

    Args:
        window_bytes: what the server may send on each stream, and on the connection if it is more than the initial
            65,535 bytes, before it has to wait for more window.
    """
    more = window_bytes - INITIAL_WINDOW
    return (
        PREFACE
        + frame(SETTINGS, 0, 0, struct.pack(">HI", _INITIAL_WINDOW_SIZE, window_bytes))
        + (frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", more)) if more > 0 else b"")
    )


def header_block(authority: str, more: Headers = ()) -> bytes:
    """Of a call of ShouldRateLimit."""
    post, http, authority_index, path_index = 0x83, 0x86, 1, 4
    content_type = b"\x0f" + bytes((31 - 15,)) + _string("application/grpc")
    return (
        bytes((post, http, path_index))
        + _string(METHOD)
        + bytes((authority_index,))
        + _string(authority)
        + content_type
        + b"".join(b"\x00" + _string(name) + _string(value) for name, value in (("te", "trailers"), *more))
    )


def authority(address: str) -> str:
    return "localhost" if address.startswith("unix:") else address


def connect(address: str, timeout_seconds: float | None = None) -> socket.socket:
    """A socket that is connected to a server, without delay for small writes.

    Args:
        address: `host:port` or `unix:/path`.
        timeout_seconds: of this, and of whatever is then done with the socket.
    """
    if address.startswith("unix:"):
        connected = socket.socket(socket.AF_UNIX)
        connected.settimeout(timeout_seconds)
        connected.connect(address.removeprefix("unix:"))
        return connected
    host, _, port = address.rpartition(":")
    connected = socket.create_connection((host.strip("[]"), int(port)), timeout_seconds)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connected


def _string(text: str) -> bytes:
    assert len(text) < 127, "a longer one needs a longer length"
    return bytes((len(text),)) + text.encode("ascii")
