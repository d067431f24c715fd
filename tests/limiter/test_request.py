"""Requests are read as protobuf reads them, whatever their bytes are."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from ratelimit_sidecar.limiter.key import text_of
from ratelimit_sidecar.limiter.request import Descriptor, InvalidRequest, read_request
from ratelimit_sidecar.limiter.v1 import request_pb2

Read = tuple[object, ...]

uint64 = st.one_of(st.integers(0, 300), st.integers(0, 2**64 - 1))


def varint(number: int, more: int = 0) -> bytes:
    """A varint, with `more` bytes than it needs."""
    out = []
    while number > 0x7F or more > 0:
        if number <= 0x7F:
            more -= 1
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


varints = st.builds(varint, uint64, st.sampled_from([0, 0, 0, 1, 3, 10]))
tags = st.builds(lambda field, wire_type: varint(field << 3 | wire_type), st.integers(0, 6), st.integers(0, 7))


def with_length(raw: bytes) -> bytes:
    return varint(len(raw)) + raw


def fields(*known: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """The fields of a message: known ones mostly, others, and groups."""
    unknown = st.one_of(
        st.builds(bytes.__add__, tags, varints | st.binary(max_size=9)),
        st.builds(lambda inner: b"\x7b" + inner + b"\x7c", st.binary(max_size=4)),
    )
    one = st.one_of(*known, *known, *known, unknown)
    return st.lists(one, max_size=5).map(b"".join)


def number(field: int) -> st.SearchStrategy[bytes]:
    return varints.map(lambda raw: varint(field << 3) + raw)


def nested(field: int, inner: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    return inner.map(lambda raw: varint(field << 3 | 2) + with_length(raw))


texts = st.binary(max_size=6) | st.just(b"v" * 130)
wrapped = fields(number(1))
entries = fields(nested(1, texts), nested(2, texts))
overrides = fields(number(1), number(2), nested(3, wrapped))
descriptors = fields(nested(1, entries), nested(2, overrides), nested(3, wrapped), number(4))
requests = fields(nested(1, texts), nested(2, descriptors), nested(2, descriptors), number(3))


def by_protobuf(raw: bytes) -> Read | None:
    """What protobuf reads; None for what is no request or lacks something."""
    try:
        message = request_pb2.Request.FromString(raw)
    except DecodeError:
        return None
    if not message.domain or not message.descriptors:
        return None
    return (
        text_of(message.domain),
        message.hits_addend,
        [
            (
                [(text_of(entry.key), text_of(entry.value)) for entry in descriptor.entries],
                (
                    descriptor.limit.requests_per_unit,
                    descriptor.limit.unit,
                    descriptor.limit.unit_multiplier.value,
                )
                if descriptor.HasField("limit")
                else None,
                descriptor.hits_addend.value if descriptor.HasField("hits_addend") else None,
                descriptor.is_negative_hits,
            )
            for descriptor in message.descriptors
        ],
    )


def limit_of(descriptor: Descriptor) -> Read | None:
    limit = descriptor.limit
    return None if limit is None else (limit.requests_per_unit, limit.unit, limit.unit_multiplier)


def by_hand(raw: bytes) -> Read | None:
    try:
        request = read_request(raw)
    except InvalidRequest:
        return None
    return (
        request.domain,
        request.hits,
        [
            (descriptor.entries, limit_of(descriptor), descriptor.hits, descriptor.is_negative)
            for descriptor in request.descriptors
        ],
    )


@given(requests)
@example(b"\x0a\x01d\x12\x00\x7b\x00\x00\x7c")
@example(b"\x0a\x01d\x12\x00\x00\x00")
def test_what_is_read_is_what_protobuf_reads(raw: bytes) -> None:
    assert by_hand(raw) == by_protobuf(raw)


@given(requests, st.data())
def test_so_it_is_of_bytes_that_were_damaged(raw: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(raw)))
    damaged = raw[:at] + data.draw(st.binary(max_size=3)) + raw[at + data.draw(st.integers(0, 3)) :]
    assert by_hand(damaged) == by_protobuf(damaged)


@given(st.binary(max_size=40))
def test_so_it_is_of_any_bytes(raw: bytes) -> None:
    assert by_hand(raw) == by_protobuf(raw)


@pytest.mark.parametrize("depth", [1, 50, 90])
def test_so_it_is_of_groups_in_groups(depth: int) -> None:
    groups = b"\x7b" * depth + b"\x7c" * depth
    for raw in (b"\x0a\x01d\x12\x00" + groups, b"\x0a\x01d\x12" + with_length(b"\x0a" + with_length(groups))):
        assert by_hand(raw) == by_protobuf(raw) is not None


def test_groups_may_be_nested_deeper_than_protobuf_allows() -> None:
    assert by_hand(b"\x0a\x01d\x12\x00" + b"\x7b" * 10_000 + b"\x7c" * 10_000) is not None
