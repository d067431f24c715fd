"""gRPC's length-prefixed messages, cut out of the bytes of a streaming call (grpc/doc/PROTOCOL-HTTP2.md)."""

from __future__ import annotations

from ratelimit_sidecar.server.bounds import MAX_STREAMED_BYTES
from ratelimit_sidecar.server.framing import PREFIX_BYTES, compressed, too_large
from ratelimit_sidecar.server.rpc import Code, Metadata, RpcError


class MessageReader:
    """Splits received bytes into gRPC messages. `feed` bytes, and call `next_message` or `next_part`, always the same.

    Args:
        metadata: of the call.
    """

    def __init__(self, metadata: Metadata) -> None:
        self._metadata = metadata
        self._bytes = bytearray()
        self._to_come = 0
        """Bytes of a message that `next_part` has begun."""

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
                `MAX_STREAMED_BYTES`, INTERNAL when it is broken or cut short. The call cannot go on then.
        """
        length = self._length()
        if length is not None:
            if length > MAX_STREAMED_BYTES:
                raise too_large(MAX_STREAMED_BYTES)
            if len(self._bytes) >= PREFIX_BYTES + length:
                return self._take(PREFIX_BYTES, length)
        self._check_end(ended)
        return None

    def next_part(self, ended: bool) -> bytes | None:
        """What has come of a message that is not returned yet; empty for an empty message. A message may have any size.

        Args:
            ended: no more bytes will come.

        Returns:
            None until more bytes come, and when no bytes are left.

        Raises:
            RpcError: as `next_message`, but for the size.
        """
        start = 0
        if not self._to_come:
            length = self._length()
            if length is None:
                self._check_end(ended)
                return None
            self._to_come, start = length, PREFIX_BYTES
        elif not self._bytes:
            self._check_end(ended)
            return None
        size = min(self._to_come, len(self._bytes) - start)
        self._to_come -= size
        return self._take(start, size)

    def _length(self) -> int | None:
        """The length of the next message; None if its prefix is not complete."""
        if len(self._bytes) < PREFIX_BYTES:
            return None
        if self._bytes[0] != 0:
            raise compressed(self._bytes[0], self._metadata)
        return int.from_bytes(self._bytes[1:PREFIX_BYTES], "big")

    def _take(self, start: int, size: int) -> bytes:
        taken = bytes(self._bytes[start : start + size])
        del self._bytes[: start + size]
        return taken

    def _check_end(self, ended: bool) -> None:
        if ended and (self._bytes or self._to_come):
            raise RpcError(Code.INTERNAL, "the last message is cut short")
