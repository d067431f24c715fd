import contextlib
import re
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit_sidecar.server.bounds import MAX_MESSAGE_BYTES
from ratelimit_sidecar.server.framing import (
    MAX_BODY_BYTES,
    MAX_STATUS_TEXT,
    PREFIX_BYTES,
    frame,
    percent_encode,
    unframe,
)
from ratelimit_sidecar.server.rpc import Code, RpcError

GZIP = ((b"grpc-encoding", b"gzip"),)


@given(st.binary(max_size=300))
def test_a_framed_message_is_found_again(message: bytes) -> None:
    assert unframe(frame(message), ()) == message


@given(st.binary(max_size=40))
def test_any_body_is_a_message_or_a_status(body: bytes) -> None:
    with contextlib.suppress(RpcError):
        assert frame(unframe(body, ())) == body


@pytest.mark.parametrize(
    ("body", "metadata", "code", "text"),
    [
        (b"", (), Code.UNIMPLEMENTED, "no message"),
        (b"\0\0\0", (), Code.INTERNAL, "prefix is cut short"),
        (frame(b"hello")[:-1], (), Code.INTERNAL, "4 of 5 bytes"),
        (frame(b"one") + frame(b"two"), (), Code.UNIMPLEMENTED, "more than one message"),
        (frame(b"one") + b"\0", (), Code.UNIMPLEMENTED, "more than one message"),
        (b"\1" + frame(b"zip")[1:], GZIP, Code.UNIMPLEMENTED, "compressed messages are not supported"),
        (b"\1" + frame(b"zip")[1:], (), Code.INTERNAL, "grpc-encoding names no compression"),
        (b"\2" + frame(b"zip")[1:], GZIP, Code.INTERNAL, "flags are 2"),
        (b"\0\xff\xff\xff\xff", (), Code.RESOURCE_EXHAUSTED, f"larger than {MAX_MESSAGE_BYTES} bytes"),
        (frame(bytes(MAX_MESSAGE_BYTES + 1)), (), Code.RESOURCE_EXHAUSTED, "larger than"),
    ],
)
def test_a_broken_body_gets_the_status_grpc_lays_down(body: bytes, metadata, code: Code, text: str) -> None:
    with pytest.raises(RpcError, match=text) as caught:
        unframe(body, metadata)
    assert caught.value.code == code


def test_the_largest_message_is_taken() -> None:
    body = frame(bytes(MAX_MESSAGE_BYTES))
    assert len(body) == MAX_BODY_BYTES
    assert len(unframe(body, ())) == len(body) - PREFIX_BYTES


def test_an_uncompressed_message_is_taken_from_a_client_that_could_compress() -> None:
    assert unframe(frame(b"plain"), GZIP) == b"plain"


@given(st.text(max_size=MAX_STATUS_TEXT // 12))
def test_a_status_message_is_printable_ascii_and_decodes_to_itself(text: str) -> None:
    encoded = percent_encode(text)
    assert all(0x20 <= byte <= 0x7E for byte in encoded)
    assert unquote(encoded.decode()) == text


def test_a_status_message_is_cut_to_fit_a_header() -> None:
    assert len(percent_encode("x" * (MAX_STATUS_TEXT + 1))) == MAX_STATUS_TEXT


@pytest.mark.parametrize("before", range(4))
def test_a_status_message_of_escapes_is_cut_between_two(before: int) -> None:
    encoded = percent_encode("x" * before + "\ufffd" * MAX_STATUS_TEXT)
    assert MAX_STATUS_TEXT - 2 <= len(encoded) <= MAX_STATUS_TEXT
    assert re.fullmatch(rb"x*(%[0-9A-F]{2})+", encoded)


def test_a_status_message_survives_text_that_is_not_unicode() -> None:
    assert percent_encode("\ud800") == b"?"
