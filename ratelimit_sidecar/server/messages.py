"""gRPC's length-prefixed messages, cut out of the bytes of a streaming call (grpc/doc/PROTOCOL-HTTP2.md)."""

from __future__ import annotations

from ratelimit_sidecar.server.framing import PREFIX_BYTES, too_large
from ratelimit_sidecar.server.limits import MAX_MESSAGE_BYTES
from ratelimit_sidecar.server.rpc import Code, RpcError


class MessageReader:
    """Bytes in, as they come; whole messages out."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes) -> None:
        self._bytes += data

    @property
    def is_empty(self) -> bool:
        """Whether there is no part of a message left."""
        return not self._bytes

    def next_message(self) -> bytes | None:
        """
        Returns:
            None until there is a whole one.

        Raises:
            RpcError: UNIMPLEMENTED when it is compressed, RESOURCE_EXHAUSTED when it is larger than
                `MAX_MESSAGE_BYTES`. The call cannot go on then.
        """
        if len(self._bytes) < PREFIX_BYTES:
            return None
        length = int.from_bytes(self._bytes[1:PREFIX_BYTES], "big")
        if length > MAX_MESSAGE_BYTES:
            raise too_large()
        if self._bytes[0] != 0:
            raise RpcError(Code.UNIMPLEMENTED, "compressed messages are not supported")
        end = PREFIX_BYTES + length
        if len(self._bytes) < end:
            return None
        message = bytes(self._bytes[PREFIX_BYTES:end])
        del self._bytes[:end]
        return message
