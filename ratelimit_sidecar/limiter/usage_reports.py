"""Reads envoy.service.rate_limit_quota.v3.RateLimitQuotaUsageReports a few buckets at a time.

A message of 4 MiB can hold two million buckets. To parse it whole would take a tenth of a second, and 150 MB for as
long as its buckets are handled. So only the bytes are kept, and one step reads no more than the bounds below.
"""

from __future__ import annotations

from typing import Final

from google.protobuf.message import DecodeError

from ratelimit_sidecar.envoy_api.envoy.service.rate_limit_quota.v3 import rlqs_pb2
from ratelimit_sidecar.limiter.fields import LENGTH, FieldReader, Malformed, TooManyFields, check_fields
from ratelimit_sidecar.limiter.key import text_of
from ratelimit_sidecar.limiter.quota import MAX_ENVOY_BUCKETS, MAX_PAIRS
from ratelimit_sidecar.limiter.quota_pool import Pairs, Usage
from ratelimit_sidecar.limiter.v1.quota_pb2 import BucketId, BucketUsage

USAGES_AT_ONCE: Final = 16
"""The most buckets of a step. To handle them takes half a millisecond, and two where each changes all shares of its
limit.
"""

MAX_FIELDS: Final = 4 * MAX_ENVOY_BUCKETS
"""The most fields of a message, for which its 4 MiB leave 16 bytes each. A report on a bucket has more."""

FIELDS_AT_ONCE: Final = 1_024
"""The most fields of a step, but for those in its last group."""

MAX_FIELDS_OF_STEP: Final = 2 * FIELDS_AT_ONCE
"""A message with a longer group is refused. Envoy sends none."""

MAX_DOMAIN_BYTES: Final = 1_024

MAX_ID_BYTES: Final = 1_024
"""The longest id of a bucket. One with a longer id is to be dropped: callers may choose its content, and ids are kept
in memory.
"""

MAX_USAGE_BYTES: Final = 1 << 17
"""The longest report on one bucket, its id included; a longer one is not read. Envoy takes 60 KiB of headers."""

_DOMAIN: Final = 1 << 3 | LENGTH
_USAGE: Final = 2 << 3 | LENGTH

_UNREADABLE: Final = Usage(b"", (), 0, 0, 0, False)


class InvalidReports(Exception):
    """Reports that cannot be answered; its text is for the caller."""


class ReportsReader:
    """Reads one message. Call `look` until it `has_looked` at all of it, then `usages` until it `is_over`.

    Both methods raise InvalidReports if the bytes are no such message, or a part of it exceeds a bound.
    """

    def __init__(self, raw: bytes) -> None:
        self._fields = FieldReader(raw, MAX_FIELDS_OF_STEP)
        self._at = 0
        self._domain = b""
        self._looked_at = 0
        self.has_looked = False

    @property
    def domain(self) -> str:
        """The domain of all usages; "" when there is none. In a message of protobuf it may come last, so it is known
        when the reader `has_looked`.
        """
        return text_of(self._domain)

    @property
    def is_over(self) -> bool:
        return self._at == len(self._fields.raw)

    def look(self) -> None:
        """Look at the next fields, for the domain."""
        self._step(None)
        self._looked_at += self._fields.fields
        if self._looked_at > MAX_FIELDS:
            raise InvalidReports(f"more than {MAX_FIELDS} fields")
        if self.is_over:
            self.has_looked = True
            self._at = 0

    def usages(self) -> list[Usage]:
        """The usages in the next fields."""
        usages: list[Usage] = []
        self._step(usages)
        return usages

    def _step(self, usages: list[Usage] | None) -> None:
        """Read the next fields.

        Args:
            usages: where to add the usages; None to look for the domain.
        """
        try:
            self._read(usages)
        except (Malformed, IndexError, DecodeError) as error:
            raise InvalidReports("not an envoy.service.rate_limit_quota.v3.RateLimitQuotaUsageReports") from error
        except TooManyFields as too_many:
            raise InvalidReports("too many fields in a group") from too_many

    def _read(self, usages: list[Usage] | None) -> None:
        fields = self._fields
        raw, at = fields.raw, self._at
        end = len(raw)
        fields.fields = 0
        while at < end and fields.fields < FIELDS_AT_ONCE:
            tag, at = fields.tag(at)
            if tag == _USAGE:
                start, at = fields.span(at, end)
                if usages is not None:
                    usages.append(_usage(raw[start:at]) if at - start <= MAX_USAGE_BYTES else _UNREADABLE)
                    if len(usages) == USAGES_AT_ONCE:
                        break
            elif tag == _DOMAIN:
                start, at = fields.span(at, end)
                if at - start > MAX_DOMAIN_BYTES:
                    raise InvalidReports(f"a domain of more than {MAX_DOMAIN_BYTES} bytes")
                self._domain = raw[start:at]
            else:
                at = fields.skip(at, end, tag)
        if at > end:
            raise Malformed
        self._at = at


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
