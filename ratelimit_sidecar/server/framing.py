"""gRPC's length-prefixed messages and percent-encoded status text, for calls with one message each way.

A message is a byte of flags (0, or 1 for compressed), four bytes of length, big-endian, and that many bytes
(grpc/doc/PROTOCOL-HTTP2.md). The statuses for malformed bodies follow grpc/doc/statuscodes.md and compression.md.
"""

from __future__ import annotations

from typing import Final
from urllib.parse import quote

from ratelimit_sidecar.server.bounds import MAX_MESSAGE_BYTES
from ratelimit_sidecar.server.rpc import Code, Metadata, RpcError

PREFIX_BYTES: Final = 5

MAX_BODY_BYTES: Final = PREFIX_BYTES + MAX_MESSAGE_BYTES

MAX_STATUS_TEXT: Final = 1_024
"""The longest status message that is sent, in characters. It may quote the caller's input, and is sent in a header."""

_PLAIN = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")


_PREFIXES: Final = tuple(b"\0" + length.to_bytes(4, "big") for length in range(1_024))
"""The prefixes of uncompressed messages of usual lengths."""


def frame(message: bytes) -> bytes:
    """A message with its prefix, uncompressed."""
    length = len(message)
    return (_PREFIXES[length] if length < len(_PREFIXES) else b"\0" + length.to_bytes(4, "big")) + message


def unframe(body: bytes, metadata: Metadata) -> bytes:
    """The one message of a unary call's whole request body.

    Raises:
        RpcError: UNIMPLEMENTED when it is compressed, or when there is no message or more than one;
            RESOURCE_EXHAUSTED when it is larger than `MAX_MESSAGE_BYTES`; INTERNAL when the framing is
            broken.
    """
    length = len(body) - PREFIX_BYTES
    if 0 <= length < len(_PREFIXES) and body.startswith(_PREFIXES[length]):
        return body[PREFIX_BYTES:]
    if 0 <= length <= MAX_MESSAGE_BYTES and body[0] == 0 and int.from_bytes(body[1:5], "big") == length:
        return body[PREFIX_BYTES:]
    raise _what_is_wrong(body, metadata)


def too_large(max_bytes: int = MAX_MESSAGE_BYTES) -> RpcError:
    """The status for a message beyond the limit."""
    return RpcError(Code.RESOURCE_EXHAUSTED, f"the request is larger than {max_bytes} bytes")


def compressed(flags: int, metadata: Metadata) -> RpcError:
    """The status for a message whose flags are not 0."""
    if flags != 1:
        return RpcError(Code.INTERNAL, f"the message's flags are {flags}; they can be 0 or 1")
    encoding = next((value for name, value in metadata if name == b"grpc-encoding"), b"identity")
    if encoding == b"identity":
        return RpcError(Code.INTERNAL, "the message is flagged as compressed, but grpc-encoding names no compression")
    return RpcError(Code.UNIMPLEMENTED, "compressed messages are not supported")


def percent_encode(text: str) -> bytes:
    """A status message as the value of `grpc-message`, of at most `MAX_STATUS_TEXT` bytes."""
    encoded = quote(text[:MAX_STATUS_TEXT], safe=_PLAIN, errors="replace").encode("ascii")
    if len(encoded) <= MAX_STATUS_TEXT:
        return encoded
    cut = encoded[:MAX_STATUS_TEXT]
    # Of a percent sign and two digits all or none.
    start = cut.rfind(b"%", -2)
    return cut if start < 0 else cut[:start]


def _what_is_wrong(body: bytes, metadata: Metadata) -> RpcError:
    if not body:
        return RpcError(Code.UNIMPLEMENTED, "the call carries no message; the method takes exactly one")
    if len(body) < PREFIX_BYTES:
        return RpcError(Code.INTERNAL, "the message's length prefix is cut short")
    flags, length = body[0], int.from_bytes(body[1:5], "big")
    if length > MAX_MESSAGE_BYTES:
        return too_large()
    if flags != 0:
        return compressed(flags, metadata)
    received = len(body) - PREFIX_BYTES
    if length > received:
        return RpcError(Code.INTERNAL, f"the message is cut short: {received} of {length} bytes")
    return RpcError(Code.UNIMPLEMENTED, "the call carries more than one message; the method takes exactly one")
