"""gRPC's length-prefixed messages, cut out of the bytes of a streaming call (grpc/doc/PROTOCOL-HTTP2.md)."""

from __future__ import annotations

from ratelimit_sidecar.server.framing import PREFIX_BYTES, compressed, too_large
from ratelimit_sidecar.server.limits import MAX_STREAMED_BYTES
from ratelimit_sidecar.server.rpc import Code, Metadata, RpcError


class MessageReader:
    """Splits received bytes into gRPC messages. `feed` bytes, and call `next_message`.

    Args:
        metadata: of the call.
        most: the largest message, in bytes.
    """

    def __init__(self, metadata: Metadata, most: int = MAX_STREAMED_BYTES) -> None:
        self._metadata = metadata
        self._most = most
        self._bytes = bytearray()

    def feed(self, data: bytes) -> None:
        self._bytes += data

    @property
    def waiting(self) -> int:
        """The number of bytes that were fed and are not part of a returned message."""
        return len(self._bytes)

    def next_message(self, ended: bool) -> bytes | None:
        """The next complete message, if there is one.

        Args:
            ended: no more bytes will come.

        Returns:
            None until the next message is complete, and when no bytes are left.

        Raises:
            RpcError: UNIMPLEMENTED when it is compressed, RESOURCE_EXHAUSTED when it is larger than
                it may be, INTERNAL when it is broken or cut short. The call cannot go on then.
        """
        if len(self._bytes) >= PREFIX_BYTES:
            flags = self._bytes[0]
            length = int.from_bytes(self._bytes[1:PREFIX_BYTES], "big")
            if length > self._most:
                raise too_large(self._most)
            if flags != 0:
                raise compressed(flags, self._metadata)
            end = PREFIX_BYTES + length
            if len(self._bytes) >= end:
                message = bytes(self._bytes[PREFIX_BYTES:end])
                del self._bytes[:end]
                return message
        if ended and self._bytes:
            raise RpcError(Code.INTERNAL, "the last message is cut short")
        return None
