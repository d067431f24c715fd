"""Reads envoy.service.rate_limit_quota.v3.RateLimitQuotaUsageReports a few buckets at a time, as the bytes come.

An Envoy reports on all its buckets in one message, and callers may make it have as many as they like. So a message is
never whole in memory: of one stream there is the field that is read, and what came with it. Messages that follow each
other are like one of protobuf, so nothing here depends on where one ends.
"""

from __future__ import annotations

from typing import Final

from google.protobuf.message import DecodeError

from ratelimit_sidecar.envoy_api.envoy.service.rate_limit_quota.v3 import rlqs_pb2
from ratelimit_sidecar.limiter.fields import (
    FIXED32,
    FIXED64,
    LENGTH,
    MAX_LENGTH,
    VARINT,
    FieldReader,
    Malformed,
    TooManyFields,
    check_fields,
)
from ratelimit_sidecar.limiter.key import text_of
from ratelimit_sidecar.limiter.quota import MAX_PAIRS
from ratelimit_sidecar.limiter.quota_pool import Pairs, Usage
from ratelimit_sidecar.limiter.v1.quota_pb2 import BucketId, BucketUsage

USAGES_AT_ONCE: Final = 16
"""The most buckets of a step. To handle them takes half a millisecond, and two where each changes all shares of its
limit.
"""

FIELDS_AT_ONCE: Final = 1_024
"""The most fields of a step."""

MAX_DOMAIN_BYTES: Final = 1_024

MAX_ID_BYTES: Final = 1_024
"""The longest id of a bucket. One with a longer id is to be dropped: callers may choose its content, and ids are kept
in memory.
"""

MAX_USAGE_BYTES: Final = 1 << 17
"""The longest report on one bucket, its id included; a longer one is not read. Envoy takes 60 KiB of headers."""

_DOMAIN: Final = 1 << 3 | LENGTH
_USAGE: Final = 2 << 3 | LENGTH

_OTHER: Final = "not an envoy.service.rate_limit_quota.v3.RateLimitQuotaUsageReports"

_UNREADABLE: Final = Usage(b"", (), 0, 0, 0, False)


class InvalidReports(Exception):
    """Reports that cannot be answered; its text is for the caller."""


class ReportsReader:
    """Reads the messages of one stream. `feed` it their bytes as they come, then call `usages` while it `has_more`, and
    `end` when nothing more comes.

    All but `feed` raise InvalidReports if the bytes are no such messages, a part of one exceeds a bound, or the domain
    is not said before the first usage.
    """

    def __init__(self) -> None:
        self._fields = FieldReader(b"", FIELDS_AT_ONCE)
        self._at = 0
        """Where the next field begins: beyond the bytes that are here while the rest of a long one is passed over."""
        self._least = 1
        """The bytes from there on without which it cannot be read."""
        self.domain = ""
        """The domain of the usages returned last; "" as long as none was said."""

    def feed(self, part: bytes) -> None:
        rest = self._fields.raw[self._at :]
        self._at = max(0, self._at - len(self._fields.raw))
        self._fields.raw = rest + part if rest else part

    @property
    def has_more(self) -> bool:
        return len(self._fields.raw) - self._at >= self._least

    def usages(self) -> list[Usage]:
        """The usages in the next fields."""
        usages: list[Usage] = []
        self._fields.fields = 0
        try:
            while self.has_more and self._fields.fields < FIELDS_AT_ONCE and len(usages) < USAGES_AT_ONCE:
                if not self._read_field(usages):
                    break
        except (Malformed, DecodeError) as error:
            raise InvalidReports(_OTHER) from error
        if usages and not self.domain:
            raise InvalidReports("the domain of quotas must come first, and not be empty")
        return usages

    def end(self) -> None:
        """Check that nothing is missing."""
        if self._at != len(self._fields.raw):
            raise InvalidReports(_OTHER)

    def _read_field(self, usages: list[Usage]) -> bool:
        """Read a field, if all of it is here. Returns whether the next one may be read in the same step."""
        fields, at, end = self._fields, self._at, len(self._fields.raw)
        try:
            tag, start = fields.tag(at)
            start, after = _value(fields, start, tag)
        except IndexError:
            self._least = end - at + 1
            return True
        is_here = after <= end
        if tag == _DOMAIN:
            if after - start > MAX_DOMAIN_BYTES:
                raise InvalidReports(f"a domain of more than {MAX_DOMAIN_BYTES} bytes")
            if usages:
                # They are of the domain before.
                return False
            if is_here:
                # It need only be said once.
                self.domain = text_of(fields.raw[start:after]) or self.domain
        elif tag != _USAGE:
            is_here = True
        elif after - start > MAX_USAGE_BYTES:
            usages.append(_UNREADABLE)
            is_here = True
        elif is_here:
            usages.append(_usage(fields.raw[start:after]))
        if is_here:
            self._at, self._least = after, 1
        else:
            self._least = after - at
        return True


def _value(fields: FieldReader, at: int, tag: int) -> tuple[int, int]:
    """Where the value after a tag begins and ends. IndexError if the bytes that say so are not all here."""
    wire_type = tag & 7
    if tag < 1 << 3:
        raise Malformed
    if wire_type == VARINT:
        return at, fields.varint(at)[1]
    if wire_type == LENGTH:
        length, start = fields.varint(at)
        if start > at + 5 or length > MAX_LENGTH:
            raise Malformed
        return start, start + length
    if wire_type == FIXED64:
        return at, at + 8
    if wire_type == FIXED32:
        return at, at + 4
    raise InvalidReports("a group, which no known version has")


def _usage(raw: bytes) -> Usage:
    if len(raw) > 2 * MAX_ID_BYTES:
        # Most fields of an id are its pairs.
        try:
            check_fields(raw, {1: {1: {}}}, 8 * MAX_PAIRS)
        except (Malformed, TooManyFields):
            return _UNREADABLE
    message = BucketUsage.FromString(raw)
    bucket_id: bytes = message.bucket_id
    pairs, is_utf8 = _pairs(bucket_id)
    return Usage(
        bucket_id,
        pairs if len(bucket_id) <= MAX_ID_BYTES else (),
        message.num_requests_allowed,
        message.num_requests_denied,
        message.time_elapsed.seconds,
        is_utf8,
    )


def _pairs(bucket_id: bytes) -> tuple[Pairs, bool]:
    """The pairs of a bucket's id, and whether all of them are UTF-8. One that cannot be read, or has too many, is like
    one without pairs, and not UTF-8.
    """
    try:
        entries = BucketId.FromString(bucket_id).bucket
    except DecodeError:
        return (), False
    if len(entries) > MAX_PAIRS:
        return (), False
    texts = [(text_of(entry.key), text_of(entry.value)) for entry in entries]
    # Of two entries with one key the last counts, as in every map of protobuf.
    return tuple(sorted(dict(texts).items())), _is_utf8(bucket_id)


def _is_utf8(bucket_id: bytes) -> bool:
    """Whether all texts in an id are UTF-8, as Envoy checks them: texts that a later one replaces, too."""
    try:
        rlqs_pb2.BucketId.FromString(bucket_id)
    except DecodeError:
        return False
    return True
