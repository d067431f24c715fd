"""One connection on a blocking socket, on which anything can be sent, and which is closed in any way.

For clients that idle, never read, break off or break the protocol. What answers is told from what was sent by their
frames alone, as in `generator`, which is for load.
"""

from __future__ import annotations

import socket
import ssl
import struct

from benchmarks.serving.frames import (
    ACK,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEAD_BYTES,
    HEADERS,
    MAX_WINDOW,
    PING,
    RST_STREAM,
    SETTINGS,
    authority,
    connect,
    frame,
    greeting,
    header_block,
)
from benchmarks.serving.requests import ONE_DESCRIPTOR, framed

TIMEOUT_SECONDS = 10.0
_READ_BYTES = 1 << 16


class Refused(Exception):
    """The server has ended a call, or the connection."""


class RawConnection:
    """A blocking connection to a gRPC server, by which frames are written and answers read as they are.

    Args:
        tls: to speak TLS.
        receive_buffer_bytes: of the kernel, about; None for what it chooses.
    """

    def __init__(
        self, address: str, *, tls: ssl.SSLContext | None = None, receive_buffer_bytes: int | None = None
    ) -> None:
        self.socket = connect(address, TIMEOUT_SECONDS)
        if receive_buffer_bytes is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        if tls is not None:
            try:
                self.socket = tls.wrap_socket(self.socket)
            except BaseException:
                self.socket.close()
                raise
        self._block = header_block(authority(address))
        self._next_stream = 1
        self._buffer = b""

    def greet(self, window_bytes: int = MAX_WINDOW) -> None:
        """Send the preface; see `frames.greeting`."""
        self.socket.sendall(greeting(window_bytes))

    def head(self, flags: int = END_HEADERS) -> bytes:
        """The headers of one more call."""
        laid = frame(HEADERS, flags, self._next_stream, self._block)
        self._next_stream += 2
        return laid

    def calls(self, count: int, request: bytes = ONE_DESCRIPTOR) -> bytes:
        """So many whole calls, to be sent at once."""
        message = framed(request)
        return b"".join(self.head() + self.data(message, END_STREAM) for _ in range(count))

    def data(self, payload: bytes, flags: int = 0) -> bytes:
        """Of the call whose headers were laid last."""
        return frame(DATA, flags, self._next_stream - 2, payload)

    def cancel(self) -> bytes:
        """Of the call whose headers were laid last."""
        cancelled = 8
        return frame(RST_STREAM, 0, self._next_stream - 2, struct.pack(">I", cancelled))

    def read_answers(self, count: int) -> int:
        """Read until so many calls have ended.

        Returns:
            how many of them were answered with a message.

        Raises:
            Refused: the server has reset a stream, or ended the connection.
            OSError: of the socket; TimeoutError when nothing comes for TIMEOUT_SECONDS.
        """
        ended = answered = 0
        while ended < count:
            received = self.socket.recv(_READ_BYTES)
            if not received:
                raise Refused("the connection was closed")
            self._buffer += received
            while len(self._buffer) >= HEAD_BYTES:
                after = HEAD_BYTES + int.from_bytes(self._buffer[:3], "big")
                if len(self._buffer) < after:
                    break
                kind, flags, payload = self._buffer[3], self._buffer[4], self._buffer[HEAD_BYTES:after]
                self._buffer = self._buffer[after:]
                if kind in (RST_STREAM, GOAWAY):
                    raise Refused(f"the server sent a frame of type {kind}: {payload.hex()}")
                if kind in (SETTINGS, PING) and not flags & ACK:
                    self.socket.sendall(frame(kind, ACK, 0, payload if kind == PING else b""))
                answered += kind == DATA and len(payload) > 0
                ended += kind in (HEADERS, DATA) and bool(flags & END_STREAM)
        return answered

    def reset(self) -> None:
        """Close so that the server gets a TCP reset; over a unix socket it is an ordinary end."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def close(self) -> None:
        self.socket.close()
