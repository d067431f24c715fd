"""Reports of Envoys are read as protobuf reads them, a few buckets at a time."""

from __future__ import annotations

import itertools
import time
import tracemalloc

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
    MAX_ID_BYTES,
    MAX_USAGE_BYTES,
    USAGES_AT_ONCE,
    InvalidReports,
    ReportsReader,
)
from ratelimit_sidecar.limiter.v1.quota_pb2 import BucketEntry, BucketId, BucketUsage, UsageReports

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


def by_reader(*parts: bytes) -> Read:
    reader = ReportsReader()
    found: list[Usage] = []
    for part in parts:
        reader.feed(part)
        while reader.has_more:
            found += reader.usages()
    reader.end()
    return reader.domain, found


def usages_of(*usages: bytes) -> list[Usage]:
    return by_reader(b"\x0a\x03api", *(b"\x12" + with_length(usage) for usage in usages))[1]


def pieces(raw: bytes, cuts: list[int]) -> list[bytes]:
    at = sorted({min(cut, len(raw)) for cut in cuts} | {0, len(raw)})
    return [raw[start:end] for start, end in itertools.pairwise(at)]


cuts_of = st.lists(st.integers(0, 300), max_size=8)


def check(raw: bytes, cuts: list[int]) -> None:
    """Protobuf knows groups, and domains that come late or are said to be empty, of which Envoy sends none."""
    expected = by_protobuf(raw)
    read, refusal = None, ""
    try:
        read = by_reader(*pieces(raw, cuts))
    except InvalidReports as error:
        refusal = str(error)
    if read is None:
        assert expected is None or "group" in refusal or "domain" in refusal
    else:
        assert expected is not None
        assert read[1] == expected[1]
        assert read[0] == expected[0] or not expected[0]


@given(messages, cuts_of)
@example(b"\x12\x00\x0a\x01d", [])
@example(b"\x0a\x01d\x12\x00\x0a\x01e", [1, 2, 3, 4, 5, 6])
def test_what_is_read_is_what_protobuf_reads_however_it_was_cut(raw: bytes, cuts: list[int]) -> None:
    check(raw, cuts)
    check(b"\x0a\x01d" + raw, cuts)


def test_a_text_that_is_not_utf8_counts_although_another_replaces_it() -> None:
    """Envoy could not read the id that it is sent back."""
    entry = b"\x0a" + with_length(b"\x80") + b"\x0a" + with_length(b"agent")
    usage = b"\x0a" + with_length(b"\x0a" + with_length(entry))
    [read] = usages_of(usage)
    assert (read.pairs, read.is_utf8) == ((("agent", ""),), False)


@given(messages, cuts_of, st.data())
def test_so_it_is_of_bytes_that_were_damaged(raw: bytes, cuts: list[int], data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(raw)))
    damaged = raw[:at] + data.draw(st.binary(max_size=3)) + raw[at + data.draw(st.integers(0, 3)) :]
    check(b"\x0a\x01d" + damaged, cuts)


@given(st.binary(max_size=40), cuts_of)
def test_so_it_is_of_any_bytes(raw: bytes, cuts: list[int]) -> None:
    check(b"\x0a\x01d" + raw, cuts)


@pytest.mark.parametrize("many", [1, USAGES_AT_ONCE, USAGES_AT_ONCE + 1, 3 * FIELDS_AT_ONCE])
def test_many_usages_come_a_few_at_a_time(many: int) -> None:
    message = UsageReports(domain=b"api")
    for each in range(many):
        message.bucket_quota_usages.add(num_requests_allowed=each)
    reader = ReportsReader()
    reader.feed(message.SerializeToString())
    found: list[int] = []
    while reader.has_more:
        part = reader.usages()
        assert reader.domain == "api"
        assert len(part) <= USAGES_AT_ONCE
        found += [usage.allowed for usage in part]
    assert found == list(range(many))


@pytest.mark.parametrize("field", [b"\x12\x00", b"\x18\x00", b"\x0a\x00", b"\x12\x02\x12\x00"])
def test_no_step_is_long_however_many_fields_a_message_has(field: bytes) -> None:
    reader = ReportsReader()
    reader.feed(b"\x0a\x03api" + field * 1_000_000)
    begin_s = time.thread_time()
    for _ in range(10):
        reader.usages()
    # Milliseconds interpreted, one compiled; to parse such a message whole takes a tenth of a second.
    assert (time.thread_time() - begin_s) / 10 < 0.01
    assert reader.has_more


def test_the_usages_of_a_step_are_of_one_domain() -> None:
    reader = ReportsReader()
    reader.feed(b"\x0a\x01a\x12\x00\x12\x00\x0a\x01b\x12\x00\x0a\x00\x12\x00")
    found = []
    while reader.has_more:
        usages = reader.usages()
        found.append((reader.domain, len(usages)))
    assert found == [("a", 2), ("b", 1), ("b", 1)]


def test_nothing_is_kept_of_a_long_field_that_is_not_read() -> None:
    usage = b"\x12" + with_length(b"\x18\x03")
    for start in (b"\x12", b"\x3a"):
        parts = [b"\x0a\x03api", start + b"\x80\x80\x80\x40", *[bytes(1 << 16)] * (1 << 11), usage]
        tracemalloc.start()
        try:
            found = by_reader(*parts)[1]
            assert tracemalloc.get_traced_memory()[1] < 1 << 19
        finally:
            tracemalloc.stop()
        assert [usage.allowed for usage in found][-1] == 3


def test_a_usage_that_is_too_long_is_not_read_and_those_beside_it_are() -> None:
    message = UsageReports(domain=b"api")
    message.bucket_quota_usages.add(num_requests_allowed=1)
    message.bucket_quota_usages.add(bucket_id=bytes(MAX_USAGE_BYTES), num_requests_allowed=2)
    message.bucket_quota_usages.add(bucket_id=bytes(MAX_ID_BYTES + 1), num_requests_allowed=3)
    read = by_reader(message.SerializeToString())[1]
    assert [(usage.allowed, usage.pairs) for usage in read] == [(1, ()), (0, ()), (3, ())]


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
    read = by_reader(message.SerializeToString())[1]
    assert [usage.is_utf8 for usage in read] == list(ids.values())


def test_an_id_of_too_many_pairs_is_like_one_without() -> None:
    for many in (MAX_PAIRS, MAX_PAIRS + 1):
        bucket_id = BucketId()
        for each in range(many):
            bucket_id.bucket.add(key=b"key%d" % each)
        [read] = usages_of(BucketUsage(bucket_id=bucket_id.SerializeToString()).SerializeToString())
        assert len(read.pairs) == (many if many <= MAX_PAIRS else 0)


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"\x0a" + with_length(b"d" * (MAX_DOMAIN_BYTES + 1)), "domain"),
        (b"\x12\x00", "domain"),
        (b"\x12\x00\x0a\x03api", "domain"),
        (b"\x7b\x7c", "group"),
        (b"\x0a\x03api\x12\x05\x18", "not an"),
        (b"\x0a\x03api\x12\xff\xff\xff\xff\x08", "not an"),
        (b"\x0a\x03api\x12\x01\xff", "not an"),
        (b"\x0a\x03api\x0d\x00", "not an"),
    ],
)
def test_what_exceeds_a_bound_or_is_no_report_is_refused(raw: bytes, why: str) -> None:
    with pytest.raises(InvalidReports, match=why):
        by_reader(raw)
