"""Takes out of a client's bytes the headers for which ngh2 would reset the stream, so that `portable_http2` leaves them
out, as `native_http2` does.

Envoy copies what its own clients send into the headers of its calls (a tracestate, with blanks around it), and lets a
request pass if its call fails. ngh2 has no option for it. So header blocks are decoded here and written anew; all other
frames pass as they are.
"""

from __future__ import annotations

import re
from typing import Final

from hpack import Decoder, HPACKError, OversizedHeaderListError
from hpack.hpack import encode_integer

PREFACE_BYTES: Final = 24
FRAME_HEAD_BYTES: Final = 9
MAX_FRAME_BYTES: Final = 16_384
"""The largest frame of a client, since SETTINGS_MAX_FRAME_SIZE keeps its default."""
MAX_VALUE_BYTES: Final = 65_536
"""The largest one that ngh2 takes; for a longer one it ends the connection."""

_HEADERS: Final = 0x1
_CONTINUATION: Final = 0x9
_END_STREAM: Final = 0x1
_END_HEADERS: Final = 0x4
_PADDED: Final = 0x8
_PRIORITY: Final = 0x20
_PRIORITY_BYTES: Final = 5

_BAD_BLOCK: Final = b"\x80"
"""No HPACK: for this ngh2 ends the connection with COMPRESSION_ERROR."""

_NAME: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]*(?:[A-Z]|(?<=.)\Z)")
"""What ngh2 takes, or resets the stream for also natively: a name with a capital."""
_VALUE: Final = re.compile(rb"(?:[^\x00-\x20\x7f](?:[^\x00-\x08\x0a-\x1f\x7f]*[^\x00-\x20\x7f])?)?")
_AUTHORITY: Final = re.compile(rb"[!$%&'()*+,\-.0-9:;=A-Z\[\]_a-z~]*")
_JUDGED: Final = frozenset((b"te", b"content-length", b"connection", b"keep-alive", b"proxy-connection", b"upgrade"))
"""Headers whose values both sessions judge by other rules: a wrong one resets the stream."""

Fields = list[tuple[bytes, bytes]]


class TooManyHeaders(Exception):
    """A header block is larger than it may be, or comes in too many parts."""


class HeaderFilter:
    """Of one connection. Give it all bytes of the client in turn, and ngh2 what it returns.

    Args:
        max_header_bytes: of a header list.
    """

    def __init__(self, max_header_bytes: int) -> None:
        self._decoder = Decoder(max_header_list_size=max_header_bytes)
        self._max_parts = max_header_bytes // MAX_FRAME_BYTES + 2
        self._passing = PREFACE_BYTES
        """How many of the next bytes pass as they are."""
        self._unread = b""
        """The beginning of a frame."""
        self._parts: list[bytes] = []
        """Of a header block that is not complete. ngh2 has its first frame, but with nothing of the block."""
        self._stream = b""
        """Whose block it is."""

    def receive(self, data: bytes | memoryview) -> bytes:
        """Returns what ngh2 is to receive.

        Raises:
            TooManyHeaders: end the connection.
        """
        data = self._unread + bytes(data)
        passed: list[bytes] = []
        at = 0
        while True:
            if self._passing:
                part = data[at : at + self._passing]
                passed.append(part)
                at += len(part)
                self._passing -= len(part)
            if len(data) - at < FRAME_HEAD_BYTES:
                break
            length, kind = int.from_bytes(data[at : at + 3]), data[at + 3]
            size = FRAME_HEAD_BYTES + length
            if length > MAX_FRAME_BYTES or (not self._parts and kind != _HEADERS):
                self._passing = size
                continue
            if len(data) - at < size:
                break
            passed += self._take_part(data[at : at + size])
            at += size
        self._unread = data[at:]
        return b"".join(passed)

    def _take_part(self, part: bytes) -> list[bytes]:
        """Take a frame of a header block, or one amid a block that is none of it; returns those that ngh2 is to have.
        What is wrong with frames is left to ngh2."""
        kind, flags, stream, payload = part[3], part[4], part[5:FRAME_HEAD_BYTES], part[FRAME_HEAD_BYTES:]
        begin = b""
        if not self._parts:
            head_bytes = (flags & _PADDED > 0) + _PRIORITY_BYTES * (flags & _PRIORITY > 0)
            padding = payload[0] if flags & _PADDED and payload else 0
            if len(payload) < head_bytes + padding:
                return [part]
            self._stream = stream
            begin = payload[flags & _PADDED > 0 : head_bytes]
            payload = payload[head_bytes : len(payload) - padding]
        elif kind != _CONTINUATION or stream != self._stream:
            return [part]
        self._parts.append(payload)
        if len(self._parts) > self._max_parts:
            raise TooManyHeaders
        kept = flags & (_END_STREAM | _PRIORITY)
        if flags & _END_HEADERS:
            block = self._cleaned(b"".join(self._parts))
            self._parts = []
            return _frames(kind, kept | _END_HEADERS, stream, begin + block)
        return [] if kind == _CONTINUATION else [_frame(kind, kept, stream, begin)]

    def _cleaned(self, block: bytes) -> bytes:
        try:
            fields = [(bytes(name), bytes(value)) for name, value in self._decoder.decode(block, raw=True)]
        except OversizedHeaderListError as error:
            raise TooManyHeaders from error
        except HPACKError:
            return _BAD_BLOCK
        return b"".join([_literal(name, value) for name, value in _without_bad(fields)])


def _without_bad(fields: Fields) -> Fields:
    """Without headers that are left out. One before a pseudo-header is a mistake that ngh2 has to see."""
    good = []
    has_left_out = False
    for name, value in fields:
        if name[:1] == b":" and has_left_out:
            return fields
        if name[:1] == b":" or name in _JUDGED or _is_good(name, value):
            good.append((name, value))
        else:
            has_left_out = True
    return good


def _is_good(name: bytes, value: bytes) -> bool:
    if not _NAME.match(name) or len(value) > MAX_VALUE_BYTES:
        return False
    return (_AUTHORITY if name == b"host" else _VALUE).fullmatch(value) is not None


def _literal(name: bytes, value: bytes) -> bytes:
    """A field that refers to nothing before it (RFC 7541, 6.2.2)."""
    return b"\0" + encode_integer(len(name), 7) + name + encode_integer(len(value), 7) + value


def _frames(kind: int, flags: int, stream: bytes, payload: bytes) -> list[bytes]:
    """A frame with END_HEADERS among its flags, or several in its place."""
    frames = []
    while len(payload) > MAX_FRAME_BYTES:
        frames.append(_frame(kind, flags & ~_END_HEADERS, stream, payload[:MAX_FRAME_BYTES]))
        kind, flags, payload = _CONTINUATION, _END_HEADERS, payload[MAX_FRAME_BYTES:]
    return [*frames, _frame(kind, flags, stream, payload)]


def _frame(kind: int, flags: int, stream: bytes, payload: bytes) -> bytes:
    return len(payload).to_bytes(3) + bytes((kind, flags)) + stream + payload
