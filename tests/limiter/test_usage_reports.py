"""Reports of Envoys are read as protobuf reads them, a few buckets at a time."""

from __future__ import annotations

import time

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st
from limiter.test_request import fields, nested, number, texts, with_length

from ratelimit_sidecar.envoy_api.envoy.service.rate_limit_quota.v3 import rlqs_pb2
from ratelimit_sidecar.limiter.key import text_of
from ratelimit_sidecar.limiter.quota import MAX_PAIRS
from ratelimit_sidecar.limiter.quota_pool import Usage
from ratelimit_sidecar.limiter.usage_reports import (
    FIELDS_AT_ONCE,
    MAX_DOMAIN_BYTES,
    MAX_FIELDS,
    MAX_ID_BYTES,
    MAX_USAGE_BYTES,
    USAGES_AT_ONCE,
    InvalidReports,
    ReportsReader,
)
from ratelimit_sidecar.limiter.v1.quota_pb2 import BucketEntry, BucketId, UsageReports
from ratelimit_sidecar.server.limits import MAX_MESSAGE_BYTES

Read = tuple[str, list[Usage]]

entries = fields(nested(1, texts), nested(2, texts))
ids = fields(nested(1, entries))
durations = fields(number(1), number(2))
usages = fields(nested(1, ids), nested(2, durations), number(3), number(4))
messages = fields(nested(1, texts), nested(2, usages), nested(2, usages))


def by_protobuf(raw: bytes) -> Read | None:
    try:
        message = UsageReports.FromString(raw)
    except DecodeError:
        return None
    return text_of(message.domain), [
        Usage(
            usage.bucket_id,
            pairs_of(usage.bucket_id),
            usage.num_requests_allowed,
            usage.num_requests_denied,
            usage.time_elapsed.seconds,
            is_read_by_envoy(usage.bucket_id),
        )
        for usage in message.bucket_quota_usages
    ]


def pairs_of(raw: bytes) -> tuple[tuple[str, str], ...]:
    try:
        message = BucketId.FromString(raw)
    except DecodeError:
        return ()
    return tuple(sorted({text_of(entry.key): text_of(entry.value) for entry in message.bucket}.items()))


def is_read_by_envoy(raw: bytes) -> bool:
    try:
        rlqs_pb2.BucketId.FromString(raw)
    except DecodeError:
        return False
    return True


def read_all(reader: ReportsReader) -> Read:
    found: list[Usage] = []
    while not reader.has_looked:
        reader.look()
    while not reader.is_over:
        found += reader.usages()
    return reader.domain, found


def by_reader(raw: bytes) -> Read | None:
    try:
        return read_all(ReportsReader(raw))
    except InvalidReports:
        return None


@given(messages)
@example(b"\x12\x00\x0a\x01d")
@example(b"\x0a\x01d\x12\x00\x0a\x01e")
def test_what_is_read_is_what_protobuf_reads(raw: bytes) -> None:
    assert by_reader(raw) == by_protobuf(raw)


def test_a_text_that_is_not_utf8_counts_although_another_replaces_it() -> None:
    """Envoy could not read the id that it is sent back."""
    entry = b"\x0a" + with_length(b"\x80") + b"\x0a" + with_length(b"agent")
    usage = b"\x0a" + with_length(b"\x0a" + with_length(entry))
    [read] = read_all(ReportsReader(b"\x12" + with_length(usage)))[1]
    assert (read.pairs, read.is_utf8) == ((("agent", ""),), False)


@given(messages, st.data())
def test_so_it_is_of_bytes_that_were_damaged(raw: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(raw)))
    damaged = raw[:at] + data.draw(st.binary(max_size=3)) + raw[at + data.draw(st.integers(0, 3)) :]
    assert by_reader(damaged) == by_protobuf(damaged)


@given(st.binary(max_size=40))
def test_so_it_is_of_any_bytes(raw: bytes) -> None:
    assert by_reader(raw) == by_protobuf(raw)


@pytest.mark.parametrize("many", [1, USAGES_AT_ONCE, USAGES_AT_ONCE + 1, 3 * FIELDS_AT_ONCE])
def test_many_usages_come_a_few_at_a_time(many: int) -> None:
    message = UsageReports(domain=b"api")
    for each in range(many):
        message.bucket_quota_usages.add(num_requests_allowed=each)
    reader = ReportsReader(message.SerializeToString())
    while not reader.has_looked:
        reader.look()
    assert reader.domain == "api"
    found: list[int] = []
    while not reader.is_over:
        part = reader.usages()
        assert len(part) <= USAGES_AT_ONCE
        found += [usage.allowed for usage in part]
    assert found == list(range(many))


@pytest.mark.parametrize("usage", [b"\x12\x00", b"\x18\x00", b"\x7b\x7c", b"\x12\x02\x12\x00"])
def test_no_step_is_long_however_many_fields_a_message_has(usage: bytes) -> None:
    raw = b"\x0a\x03api" + usage * (MAX_MESSAGE_BYTES // len(usage))
    looking, reading = ReportsReader(raw), ReportsReader(raw)
    begin_s = time.thread_time()
    for _ in range(10):
        looking.look()
        reading.usages()
    # Milliseconds interpreted, one compiled; to parse such a message whole takes a tenth of a second.
    assert (time.thread_time() - begin_s) / 20 < 0.01
    assert not looking.has_looked
    assert not reading.is_over


def test_a_usage_that_is_too_long_is_not_read_and_those_beside_it_are() -> None:
    message = UsageReports(domain=b"api")
    message.bucket_quota_usages.add(num_requests_allowed=1)
    message.bucket_quota_usages.add(bucket_id=bytes(MAX_USAGE_BYTES), num_requests_allowed=2)
    message.bucket_quota_usages.add(bucket_id=bytes(MAX_ID_BYTES + 1), num_requests_allowed=3)
    read = by_reader(message.SerializeToString())
    assert read is not None
    assert [(usage.allowed, usage.pairs) for usage in read[1]] == [(1, ()), (0, ()), (3, ())]


def test_only_an_id_that_envoy_can_read_is_sent_back() -> None:
    """Envoy refuses a whole message with a text that is not UTF-8, or that is none."""
    ids = {
        BucketId(bucket=[BucketEntry(key=b"tenant", value=value)]).SerializeToString(): is_utf8
        for value, is_utf8 in (
            (b"acme", True),
            ("Gr\u00fc\u00dfe".encode(), True),
            (5_000 * b"x", True),
            (b"m\xff", False),
            (b"\xed\xa0\x80", False),
            (5_000 * b"\xff", False),
        )
    }
    ids |= {b"\x0a\x05": False, 3_000 * b"\0": False}
    message = UsageReports(domain=b"api")
    for bucket_id in ids:
        message.bucket_quota_usages.add(bucket_id=bucket_id, num_requests_allowed=1)
    read = by_reader(message.SerializeToString())
    assert read is not None
    assert [usage.is_utf8 for usage in read[1]] == list(ids.values())


def test_an_id_of_too_many_pairs_is_like_one_without() -> None:
    for many in (MAX_PAIRS, MAX_PAIRS + 1):
        bucket_id = BucketId()
        for each in range(many):
            bucket_id.bucket.add(key=b"key%d" % each)
        message = UsageReports()
        message.bucket_quota_usages.add(bucket_id=bucket_id.SerializeToString())
        read = by_reader(message.SerializeToString())
        assert read is not None
        assert len(read[1][0].pairs) == (many if many <= MAX_PAIRS else 0)


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"\x0a" + with_length(b"d" * (MAX_DOMAIN_BYTES + 1)), "domain"),
        (b"\x7b" + b"\x08\x00" * 3 * FIELDS_AT_ONCE + b"\x7c", "group"),
        (b"\x0a\x03api" + b"\x12\x00" * MAX_FIELDS, "more than"),
        (b"\x0a\x03api\x12\x01\xff", "not an"),
        (b"\x0a\x03api\x0d\x00", "not an"),
    ],
)
def test_what_exceeds_a_bound_or_is_no_report_is_refused(raw: bytes, why: str) -> None:
    reader = ReportsReader(raw)
    with pytest.raises(InvalidReports, match=why):
        read_all(reader)
