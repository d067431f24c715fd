"""Replaces in a client's bytes the header values for which ngh2 would reset the stream, so that `portable_http2` leaves
those headers out, as `native_http2` does.

Envoy copies what its own clients send into the headers of its calls (a tracestate, with blanks around it), and lets a
request pass if its call fails. ngh2 has no option for it. So header blocks are read here, but neither decoded nor
indexed: where a later block refers to the value, HPACK's dynamic table has the stand-in. That is shorter, so the table
holds at least what the client expects, and its newest come first. All else passes as it is.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final

from hpack import HPACKError
from hpack.huffman_table import decode_huffman

PREFACE_BYTES: Final = 24
FRAME_HEAD_BYTES: Final = 9
MAX_FRAME_BYTES: Final = 16_384
"""The largest frame of a client, since SETTINGS_MAX_FRAME_SIZE keeps its default."""
MAX_VALUE_BYTES: Final = 65_536
"""The largest one that ngh2 takes; for a longer one it ends the connection."""
MAX_READ_BYTES: Final = 1_024
"""A longer value in Huffman code is left out unread: to read it takes 0.2 us a byte, and no call needs it."""

_HEADERS: Final = 0x1
_CONTINUATION: Final = 0x9
_END_STREAM: Final = 0x1
_END_HEADERS: Final = 0x4
_PADDED: Final = 0x8
_PRIORITY: Final = 0x20
_PRIORITY_BYTES: Final = 5

_VALUE: Final = re.compile(rb"(?:[^\x00-\x20\x7f](?:[^\x00-\x08\x0a-\x1f\x7f]*[^\x00-\x20\x7f])?)?")
_PSEUDO_HEADERS: Final = range(1, 8)
"""Of requests, in HPACK's static table (RFC 7541, appendix A)."""
_LEFT_OUT: Final = b"\xff"
_STAND_IN: Final = b"\x01" + _LEFT_OUT
_ENTRY_BYTES: Final = 32
"""What a field takes of a table, or a list, besides its name and value (RFC 7541, 4.1)."""


class TooManyHeaders(Exception):
    """A header block is larger than it may be, or comes in too many parts."""


class HeaderFilter:
    """Of one connection. Give it all bytes of the client in turn, and ngh2 what it returns.

    Args:
        max_header_bytes: of a header list.
    """

    def __init__(self, max_header_bytes: int) -> None:
        self._max_fields = max_header_bytes // _ENTRY_BYTES
        self._max_parts = max_header_bytes // MAX_FRAME_BYTES + 2
        self._passing = PREFACE_BYTES
        """How many of the next bytes pass as they are."""
        self._unread = b""
        """The beginning of a frame."""
        self._parts: list[bytes] = []
        """Of a header block that is not complete. ngh2 has its first frame, but with nothing of the block."""
        self._block_of = 0
        """Its stream."""

    @property
    def stream_id(self) -> int:
        """Whose header block has begun and is not complete; 0 when there is none."""
        if self._parts:
            return self._block_of
        return _stream_id(self._unread) if len(self._unread) >= FRAME_HEAD_BYTES else 0

    @property
    def held_bytes(self) -> int:
        """The memory of that block."""
        return len(self._unread) + sum(map(len, self._parts)) if self.stream_id else 0

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
            begins = kind == _HEADERS and _stream_id(data[at : at + FRAME_HEAD_BYTES])
            if length > MAX_FRAME_BYTES or not (self._parts or begins):
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
            self._block_of = _stream_id(part)
            begin = payload[flags & _PADDED > 0 : head_bytes]
            payload = payload[head_bytes : len(payload) - padding]
        elif kind != _CONTINUATION or _stream_id(part) != self._block_of:
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
        """With stand-ins. What is no HPACK stays, for ngh2 to see."""
        parts: list[bytes] = []
        at = since = fields = 0
        try:
            while at < len(block):
                fields += 1
                if fields > self._max_fields:
                    raise TooManyHeaders
                first = block[at]
                if first & 0x80:
                    _, at = _integer(block, at, 7)
                elif first & 0x60 == 0x20:
                    _, at = _integer(block, at, 5)
                else:
                    name, at = _integer(block, at, 6 if first & 0x40 else 4)
                    if not name:
                        at = _end_of_text(block, at)
                    value_at, at = at, _end_of_text(block, at)
                    if name not in _PSEUDO_HEADERS and not _is_good(block, value_at, at):
                        parts += block[since:value_at], _STAND_IN
                        since = at
        except IndexError:
            return block
        return b"".join([*parts, block[since:]])


def is_left_out(value: bytes) -> bool:
    """Whether this is the stand-in."""
    return value == _LEFT_OUT


def _stream_id(frame: bytes) -> int:
    return int.from_bytes(frame[5:FRAME_HEAD_BYTES]) & 0x7FFFFFFF


def _is_good(block: bytes, value_at: int, end: int) -> bool:
    size, start = _integer(block, value_at, 7)
    text = block[start:end]
    if block[value_at] & 0x80:
        return size <= MAX_READ_BYTES and _is_good_in_huffman_code(text)
    return size <= MAX_VALUE_BYTES and _VALUE.fullmatch(text) is not None


def _integer(block: bytes, at: int, bits: int) -> tuple[int, int]:
    """An integer (RFC 7541, 5.1), and where it ends.

    Raises:
        IndexError: it does not end, or is longer than any length.
    """
    most = (1 << bits) - 1
    number = block[at] & most
    at += 1
    if number < most:
        return number, at
    for shift in range(0, 28, 7):
        part = block[at]
        at += 1
        number += (part & 0x7F) << shift
        if part < 0x80:
            return number, at
    raise IndexError


def _end_of_text(block: bytes, at: int) -> int:
    size, start = _integer(block, at, 7)
    if start + size > len(block):
        raise IndexError
    return start + size


@lru_cache(1_024)
def _is_good_in_huffman_code(text: bytes) -> bool:
    try:
        return _VALUE.fullmatch(decode_huffman(text)) is not None
    except HPACKError:
        # ngh2 ends the connection.
        return True


def _frames(kind: int, flags: int, stream: bytes, payload: bytes) -> list[bytes]:
    """A frame with END_HEADERS among its flags, or several in its place."""
    frames = []
    while len(payload) > MAX_FRAME_BYTES:
        frames.append(_frame(kind, flags & ~_END_HEADERS, stream, payload[:MAX_FRAME_BYTES]))
        kind, flags, payload = _CONTINUATION, _END_HEADERS, payload[MAX_FRAME_BYTES:]
    return [*frames, _frame(kind, flags, stream, payload)]


def _frame(kind: int, flags: int, stream: bytes, payload: bytes) -> bytes:
    return len(payload).to_bytes(3) + bytes((kind, flags)) + stream + payload
