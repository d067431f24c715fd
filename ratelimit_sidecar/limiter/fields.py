"""Walks over the fields of a protobuf message by hand, so that no more is read of it than a bound allows.

To parse a message of 4 MiB whole can take a tenth of a second and forty times its memory, when it has two million empty
fields. What is accepted is what protobuf accepts; only groups may be nested deeper.
(https://protobuf.dev/programming-guides/encoding/)
"""

from __future__ import annotations

from typing import Final

MAX_UINT32: Final = 2**32 - 1
MAX_UINT64: Final = 2**64 - 1
MAX_LENGTH: Final = 2**31 - 1

# Wire types.
VARINT: Final = 0
FIXED64: Final = 1
LENGTH: Final = 2
GROUP: Final = 3
END_OF_GROUP: Final = 4
FIXED32: Final = 5

Nested = dict[int, "Nested"]
"""The fields of a message that are messages, by number."""


class Malformed(Exception):
    """Not a protobuf message."""


class TooManyFields(Exception):
    """A message has more fields than may be read; its text is for the caller."""


class FieldReader:
    """Reads the fields of one message. A method gets where in the bytes a field or value begins, and where the message
    around it ends.

    Args:
        most_fields: the most fields to read, unknown ones and those in groups included.
    """

    __slots__ = ("fields", "most_fields", "raw")

    def __init__(self, raw: bytes, most_fields: int) -> None:
        self.raw = raw
        self.most_fields = most_fields
        self.fields = 0
        """The number of fields read."""

    def tag(self, at: int) -> tuple[int, int]:
        """A field's number and wire type, and where what follows begins. IndexError if the bytes end before."""
        self.fields += 1
        if self.fields > self.most_fields:
            raise TooManyFields(f"more than {self.most_fields} fields")
        byte = self.raw[at]
        if byte < 0x80:
            return byte, at + 1
        tag, after = self.varint(at)
        if after > at + 5 or tag > MAX_UINT32:
            raise Malformed
        return tag, after

    def span(self, at: int, end: int) -> tuple[int, int]:
        """Where the bytes that follow a length begin and end."""
        length = self.raw[at]
        start = at + 1
        if length >= 0x80:
            length, start = self.varint(at)
            if start > at + 5 or length > MAX_LENGTH:
                raise Malformed
        if start + length > end:
            raise Malformed
        return start, start + length

    def varint(self, at: int) -> tuple[int, int]:
        """A number of up to 64 bits, and where what follows begins. IndexError if the bytes end before."""
        raw = self.raw
        number = shift = 0
        while shift < 70:
            byte = raw[at]
            at += 1
            number |= (byte & 0x7F) << shift
            if byte < 0x80:
                return number & MAX_UINT64, at
            shift += 7
        raise Malformed

    def skip(self, at: int, end: int, tag: int) -> int:
        """Where the field after an unknown one begins. `at` is where the unknown one's value does."""
        if tag < 1 << 3:
            raise Malformed
        groups: list[int] = []
        while True:
            wire_type = tag & 7
            if wire_type == VARINT:
                at = self.varint(at)[1]
            elif wire_type == LENGTH:
                at = self.span(at, end)[1]
            elif wire_type == FIXED64:
                at += 8
            elif wire_type == FIXED32:
                at += 4
            elif wire_type == GROUP:
                groups.append(tag >> 3)
            elif wire_type != END_OF_GROUP or not groups or groups.pop() != tag >> 3:
                raise Malformed
            if not groups:
                return at
            if at >= end:
                raise Malformed
            tag, at = self.tag(at)


def check_end(at: int, end: int) -> None:
    if at != end:
        raise Malformed


def check_fields(raw: bytes, nested: Nested, most: int) -> None:
    """Check that a message is one, and small enough to be parsed.

    Args:
        nested: which fields are messages, whose fields are counted too.
        most: the most fields.

    Raises:
        Malformed: it is no message.
        TooManyFields: it has more.
    """
    try:
        _check(FieldReader(raw, most), 0, len(raw), nested)
    except IndexError as error:
        raise Malformed from error


def _check(reader: FieldReader, at: int, end: int, nested: Nested) -> None:
    while at < end:
        tag, at = reader.tag(at)
        within = nested.get(tag >> 3)
        if within is not None and tag & 7 == LENGTH:
            start, at = reader.span(at, end)
            _check(reader, start, at, within)
        else:
            at = reader.skip(at, end, tag)
    check_end(at, end)
