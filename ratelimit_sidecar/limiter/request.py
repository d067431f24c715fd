"""Reads a RateLimitRequest by hand: a fifth of the time that a protobuf message takes for as much.

Every request that was not seen lately is read, and with many callers that is most of them. What is accepted, and what
is read, is what protobuf accepts and reads; a property test checks it. Only unknown groups may be nested deeper. Field
numbers are those of envoy/service/ratelimit/v3/rls.proto and envoy/extensions/common/ratelimit/v3/ratelimit.proto.
Texts may be any bytes: Envoy copies header values as they are, and a request must not fail because one is not UTF-8.
"""

from __future__ import annotations

from typing import Final

from ratelimit_sidecar.limiter.key import Texts, text_of

MAX_DESCRIPTORS: Final = 512
"""The most descriptors in a request. Their number comes from Envoy's configuration, and each takes some
microseconds.
"""

MAX_ENTRIES: Final = 8_192
"""The most entries of all descriptors of a request together. Envoy makes at most one for each action it is configured
with.
"""

MAX_FIELDS: Final = 1 << 16
"""The most fields of a request, unknown ones included: twice as many as `MAX_ENTRIES` need. 4 MiB can hold two million,
and to read those would take a tenth of a second.
"""

_MAX_UINT32: Final = 2**32 - 1
_MAX_UINT64: Final = 2**64 - 1
_SIGN_BIT: Final = 1 << 31
_MAX_LENGTH: Final = 2**31 - 1

# Wire types (https://protobuf.dev/programming-guides/encoding/).
_VARINT: Final = 0
_FIXED64: Final = 1
_LENGTH: Final = 2
_GROUP: Final = 3
_END_OF_GROUP: Final = 4
_FIXED32: Final = 5


class InvalidRequest(Exception):
    """A request that no rule can answer; its text is for the caller."""


class _Malformed(Exception):
    """Not a protobuf message."""


class Override:
    """A limit in a descriptor.

    Args:
        unit: a number of envoy.type.v3.RateLimitUnit, or an unknown one.
        unit_multiplier: 0 if there is none.
    """

    __slots__ = ("requests_per_unit", "unit", "unit_multiplier")

    def __init__(self) -> None:
        self.requests_per_unit = 0
        self.unit = 0
        self.unit_multiplier = 0


class Descriptor:
    """One descriptor of a request.

    Args:
        entries: keys and values, from `text_of`.
        limit: None if it brings none.
        hits: None if it brings none.
    """

    __slots__ = ("entries", "hits", "is_negative", "limit")

    def __init__(self) -> None:
        self.entries: list[tuple[str, str]] = []
        self.limit: Override | None = None
        self.hits: int | None = None
        self.is_negative = False


class Request:
    """An `envoy.service.ratelimit.v3.RateLimitRequest`."""

    __slots__ = ("descriptors", "domain", "hits")

    def __init__(self) -> None:
        self.domain = ""
        self.descriptors: list[Descriptor] = []
        self.hits = 0


def read_request(raw: bytes) -> Request:
    """Read a request.

    Raises:
        InvalidRequest: it is not a RateLimitRequest, has no domain or no descriptors, or more than `MAX_DESCRIPTORS`,
            `MAX_ENTRIES` or `MAX_FIELDS`.
    """
    try:
        request = _Reader(raw).request()
    except (_Malformed, IndexError) as error:
        raise InvalidRequest("not an envoy.service.ratelimit.v3.RateLimitRequest") from error
    if not request.domain:
        raise InvalidRequest("rate limit domain must not be empty")
    if not request.descriptors:
        raise InvalidRequest("rate limit descriptor list must not be empty")
    return request


class _Reader:
    """Reads one request. Each method gets where in the bytes a message or value begins, and where the message ends."""

    __slots__ = ("_fields", "_raw", "_texts")

    def __init__(self, raw: bytes) -> None:
        self._raw = raw
        self._texts = Texts()
        self._fields = 0

    def request(self) -> Request:
        raw = self._raw
        request = Request()
        entries = 0
        at, end = 0, len(raw)
        while at < end:
            tag, at = self._tag(at)
            if tag == 1 << 3 | _LENGTH:
                start, at = self._span(at, end)
                request.domain = text_of(raw[start:at])
            elif tag == 2 << 3 | _LENGTH:
                if len(request.descriptors) == MAX_DESCRIPTORS:
                    raise InvalidRequest(f"more than {MAX_DESCRIPTORS} rate limit descriptors")
                start, at = self._span(at, end)
                descriptor = self._descriptor(start, at, MAX_ENTRIES - entries)
                entries += len(descriptor.entries)
                request.descriptors.append(descriptor)
            elif tag == 3 << 3 | _VARINT:
                number, at = self._varint(at)
                request.hits = number & _MAX_UINT32
            else:
                at = self._skip(at, end, tag)
        _check_end(at, end)
        return request

    def _descriptor(self, at: int, end: int, most_entries: int) -> Descriptor:
        descriptor = Descriptor()
        while at < end:
            tag, at = self._tag(at)
            if tag == 1 << 3 | _LENGTH:
                if len(descriptor.entries) == most_entries:
                    raise InvalidRequest(f"more than {MAX_ENTRIES} entries of descriptors")
                start, at = self._span(at, end)
                descriptor.entries.append(self._entry(start, at))
            elif tag == 2 << 3 | _LENGTH:
                start, at = self._span(at, end)
                # A message that comes again adds to the one before.
                override = descriptor.limit
                if override is None:
                    override = descriptor.limit = Override()
                self._read_override(start, at, override)
            elif tag == 3 << 3 | _LENGTH:
                start, at = self._span(at, end)
                descriptor.hits = self._wrapped(start, at, descriptor.hits or 0)
            elif tag == 4 << 3 | _VARINT:
                number, at = self._varint(at)
                descriptor.is_negative = number != 0
            else:
                at = self._skip(at, end, tag)
        _check_end(at, end)
        return descriptor

    def _entry(self, at: int, end: int) -> tuple[str, str]:
        raw = self._raw
        key = value = ""
        while at < end:
            tag, at = self._tag(at)
            if tag == 1 << 3 | _LENGTH:
                start, at = self._span(at, end)
                key = self._texts.of(raw[start:at])
            elif tag == 2 << 3 | _LENGTH:
                start, at = self._span(at, end)
                value = self._texts.of(raw[start:at])
            else:
                at = self._skip(at, end, tag)
        _check_end(at, end)
        return key, value

    def _read_override(self, at: int, end: int, override: Override) -> None:
        while at < end:
            tag, at = self._tag(at)
            if tag == 1 << 3 | _VARINT:
                number, at = self._varint(at)
                override.requests_per_unit = number & _MAX_UINT32
            elif tag == 2 << 3 | _VARINT:
                number, at = self._varint(at)
                number &= _MAX_UINT32
                override.unit = number - 2 * (number & _SIGN_BIT)
            elif tag == 3 << 3 | _LENGTH:
                start, at = self._span(at, end)
                override.unit_multiplier = self._wrapped(start, at, override.unit_multiplier) & _MAX_UINT32
            else:
                at = self._skip(at, end, tag)
        _check_end(at, end)

    def _wrapped(self, at: int, end: int, number: int) -> int:
        """The number in a google.protobuf.UInt64Value or UInt32Value; `number` if there is none in it."""
        while at < end:
            tag, at = self._tag(at)
            if tag == 1 << 3 | _VARINT:
                number, at = self._varint(at)
            else:
                at = self._skip(at, end, tag)
        _check_end(at, end)
        return number

    def _tag(self, at: int) -> tuple[int, int]:
        """A field's number and wire type, and where what follows begins. IndexError if the bytes end before."""
        self._fields += 1
        if self._fields > MAX_FIELDS:
            raise InvalidRequest(f"more than {MAX_FIELDS} fields")
        byte = self._raw[at]
        if byte < 0x80:
            return byte, at + 1
        tag, after = self._varint(at)
        if after > at + 5 or tag > _MAX_UINT32:
            raise _Malformed
        return tag, after

    def _span(self, at: int, end: int) -> tuple[int, int]:
        """Where the bytes that follow a length begin and end."""
        length = self._raw[at]
        start = at + 1
        if length >= 0x80:
            length, start = self._varint(at)
            if start > at + 5 or length > _MAX_LENGTH:
                raise _Malformed
        if start + length > end:
            raise _Malformed
        return start, start + length

    def _varint(self, at: int) -> tuple[int, int]:
        """A number of up to 64 bits, and where what follows begins. IndexError if the bytes end before."""
        raw = self._raw
        number = shift = 0
        while shift < 70:
            byte = raw[at]
            at += 1
            number |= (byte & 0x7F) << shift
            if byte < 0x80:
                return number & _MAX_UINT64, at
            shift += 7
        raise _Malformed

    def _skip(self, at: int, end: int, tag: int) -> int:
        """Where the field after an unknown one begins. `at` is where the unknown one's value does."""
        if tag < 1 << 3:
            raise _Malformed
        groups: list[int] = []
        while True:
            wire_type = tag & 7
            if wire_type == _VARINT:
                at = self._varint(at)[1]
            elif wire_type == _LENGTH:
                at = self._span(at, end)[1]
            elif wire_type == _FIXED64:
                at += 8
            elif wire_type == _FIXED32:
                at += 4
            elif wire_type == _GROUP:
                groups.append(tag >> 3)
            elif wire_type != _END_OF_GROUP or not groups or groups.pop() != tag >> 3:
                raise _Malformed
            if not groups:
                return at
            if at >= end:
                raise _Malformed
            tag, at = self._tag(at)


def _check_end(at: int, end: int) -> None:
    if at != end:
        raise _Malformed
