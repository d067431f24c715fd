"""Reads a RateLimitRequest by hand: a fifth of the time that a protobuf message takes for as much.

Every request that was not seen lately is read, and with many callers that is most of them. What is accepted, and what
is read, is what protobuf accepts and reads; a property test checks it. Only unknown groups may be nested deeper. Field
numbers are those of envoy/service/ratelimit/v3/rls.proto and envoy/extensions/common/ratelimit/v3/ratelimit.proto.
Texts may be any bytes: Envoy copies header values as they are, and a request must not fail because one is not UTF-8.
"""

from __future__ import annotations

from typing import Final

from ratelimit_sidecar.limiter.fields import (
    LENGTH,
    MAX_UINT32,
    VARINT,
    FieldReader,
    Malformed,
    TooManyFields,
    check_end,
)
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

_SIGN_BIT: Final = 1 << 31


class InvalidRequest(Exception):
    """A request that no rule can answer; its text is for the caller."""


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
    except (Malformed, IndexError) as error:
        raise InvalidRequest("not an envoy.service.ratelimit.v3.RateLimitRequest") from error
    except TooManyFields as too_many:
        raise InvalidRequest(str(too_many)) from too_many
    if not request.domain:
        raise InvalidRequest("rate limit domain must not be empty")
    if not request.descriptors:
        raise InvalidRequest("rate limit descriptor list must not be empty")
    return request


class _Reader(FieldReader):
    """Reads one request. Each method gets where in the bytes a message or value begins, and where the message ends."""

    __slots__ = ("_texts",)

    def __init__(self, raw: bytes) -> None:
        super().__init__(raw, MAX_FIELDS)
        self._texts = Texts()

    def request(self) -> Request:
        raw = self.raw
        request = Request()
        entries = 0
        at, end = 0, len(raw)
        while at < end:
            tag, at = self.tag(at)
            if tag == 1 << 3 | LENGTH:
                start, at = self.span(at, end)
                request.domain = text_of(raw[start:at])
            elif tag == 2 << 3 | LENGTH:
                if len(request.descriptors) == MAX_DESCRIPTORS:
                    raise InvalidRequest(f"more than {MAX_DESCRIPTORS} rate limit descriptors")
                start, at = self.span(at, end)
                descriptor = self._descriptor(start, at, MAX_ENTRIES - entries)
                entries += len(descriptor.entries)
                request.descriptors.append(descriptor)
            elif tag == 3 << 3 | VARINT:
                number, at = self.varint(at)
                request.hits = number & MAX_UINT32
            else:
                at = self.skip(at, end, tag)
        check_end(at, end)
        return request

    def _descriptor(self, at: int, end: int, most_entries: int) -> Descriptor:
        descriptor = Descriptor()
        while at < end:
            tag, at = self.tag(at)
            if tag == 1 << 3 | LENGTH:
                if len(descriptor.entries) == most_entries:
                    raise InvalidRequest(f"more than {MAX_ENTRIES} entries of descriptors")
                start, at = self.span(at, end)
                descriptor.entries.append(self._entry(start, at))
            elif tag == 2 << 3 | LENGTH:
                start, at = self.span(at, end)
                # A message that comes again adds to the one before.
                override = descriptor.limit
                if override is None:
                    override = descriptor.limit = Override()
                self._read_override(start, at, override)
            elif tag == 3 << 3 | LENGTH:
                start, at = self.span(at, end)
                descriptor.hits = self._wrapped(start, at, descriptor.hits or 0)
            elif tag == 4 << 3 | VARINT:
                number, at = self.varint(at)
                descriptor.is_negative = number != 0
            else:
                at = self.skip(at, end, tag)
        check_end(at, end)
        return descriptor

    def _entry(self, at: int, end: int) -> tuple[str, str]:
        raw = self.raw
        key = value = ""
        while at < end:
            tag, at = self.tag(at)
            if tag == 1 << 3 | LENGTH:
                start, at = self.span(at, end)
                key = self._texts.of(raw[start:at])
            elif tag == 2 << 3 | LENGTH:
                start, at = self.span(at, end)
                value = self._texts.of(raw[start:at])
            else:
                at = self.skip(at, end, tag)
        check_end(at, end)
        return key, value

    def _read_override(self, at: int, end: int, override: Override) -> None:
        while at < end:
            tag, at = self.tag(at)
            if tag == 1 << 3 | VARINT:
                number, at = self.varint(at)
                override.requests_per_unit = number & MAX_UINT32
            elif tag == 2 << 3 | VARINT:
                number, at = self.varint(at)
                number &= MAX_UINT32
                override.unit = number - 2 * (number & _SIGN_BIT)
            elif tag == 3 << 3 | LENGTH:
                start, at = self.span(at, end)
                override.unit_multiplier = self._wrapped(start, at, override.unit_multiplier) & MAX_UINT32
            else:
                at = self.skip(at, end, tag)
        check_end(at, end)

    def _wrapped(self, at: int, end: int, number: int) -> int:
        """The number in a google.protobuf.UInt64Value or UInt32Value; `number` if there is none in it."""
        while at < end:
            tag, at = self.tag(at)
            if tag == 1 << 3 | VARINT:
                number, at = self.varint(at)
            else:
                at = self.skip(at, end, tag)
        check_end(at, end)
        return number
