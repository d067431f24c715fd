"""Messages are the same however their bytes were cut on the way."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit_sidecar.server.bounds import MAX_STREAMED_BYTES
from ratelimit_sidecar.server.framing import PREFIX_BYTES, frame
from ratelimit_sidecar.server.messages import MessageReader
from ratelimit_sidecar.server.rpc import Code, RpcError


def read_all(reader: MessageReader, *, ended: bool) -> list[bytes]:
    messages = []
    while (message := reader.next_message(ended)) is not None:
        messages.append(message)
    return messages


def read_error(body: bytes, headers: tuple[tuple[bytes, bytes], ...] = (), *, ended: bool = False) -> RpcError:
    reader = MessageReader(headers)
    reader.feed(body)
    with pytest.raises(RpcError) as caught:
        read_all(reader, ended=ended)
    return caught.value


def pieces(body: bytes, cuts: list[int]) -> list[bytes]:
    at = sorted({min(cut, len(body)) for cut in cuts} | {0, len(body)})
    return [body[start:end] for start, end in itertools.pairwise(at)]


@given(st.lists(st.binary(max_size=300), max_size=8), st.lists(st.integers(0, 2_500), max_size=20), st.booleans())
def test_any_cutting_of_the_bytes_gives_the_same_messages(
    messages: list[bytes], cuts: list[int], reads_late: bool
) -> None:
    reader = MessageReader(())
    found = []
    for piece in pieces(b"".join(map(frame, messages)), cuts):
        reader.feed(piece)
        if not reads_late:
            found += read_all(reader, ended=False)
    found += read_all(reader, ended=True)
    assert found == messages


@given(st.lists(st.binary(max_size=300), max_size=8), st.lists(st.integers(0, 2_500), max_size=20))
def test_parts_are_what_has_come_of_a_message_and_together_all_of_it(messages: list[bytes], cuts: list[int]) -> None:
    reader = MessageReader(())
    found = b""
    for piece in pieces(b"".join(map(frame, messages)), cuts):
        reader.feed(piece)
        while (part := reader.next_part(ended=False)) is not None:
            found += part
        # Nothing but a prefix waits for more.
        assert reader.waiting < PREFIX_BYTES
    assert reader.next_part(ended=True) is None
    assert found == b"".join(messages)


def test_a_message_that_is_read_in_parts_may_have_any_size() -> None:
    reader = MessageReader(())
    reader.feed(b"\0\xff\xff\xff\xff")
    assert reader.next_part(ended=False) == b""
    for _ in range(3):
        reader.feed(bytes(MAX_STREAMED_BYTES))
        assert reader.next_part(ended=False) == bytes(MAX_STREAMED_BYTES)


@pytest.mark.parametrize("cut", [1, 5, 7])
def test_parts_of_a_message_that_is_cut_short_come_before_the_error(cut: int) -> None:
    reader = MessageReader(())
    reader.feed(frame(b"first") + frame(b"second")[:cut])
    assert reader.next_part(ended=True) == b"first"
    if cut >= PREFIX_BYTES:
        assert reader.next_part(ended=True) == b"second"[: cut - PREFIX_BYTES]
    with pytest.raises(RpcError, match="the last message is cut short"):
        reader.next_part(ended=True)


@given(st.lists(st.binary(max_size=50), max_size=4), st.binary(max_size=50), st.data())
def test_whole_messages_come_before_the_error_that_the_last_is_cut_short(
    messages: list[bytes], last: bytes, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(1, len(frame(last)) - 1))
    reader = MessageReader(())
    reader.feed(b"".join(map(frame, messages)) + frame(last)[:cut])
    assert read_all(reader, ended=False) == messages
    with pytest.raises(RpcError, match="the last message is cut short") as caught:
        reader.next_message(ended=True)
    assert caught.value.code == Code.INTERNAL


def test_the_largest_message_is_taken() -> None:
    reader = MessageReader(())
    reader.feed(frame(bytes(MAX_STREAMED_BYTES)))
    assert read_all(reader, ended=True) == [bytes(MAX_STREAMED_BYTES)]


def test_a_larger_one_is_refused_as_soon_as_it_begins() -> None:
    error = read_error(b"\0" + (MAX_STREAMED_BYTES + 1).to_bytes(4, "big"))
    assert error.code == Code.RESOURCE_EXHAUSTED


def test_a_compressed_message_is_unimplemented() -> None:
    error = read_error(b"\1" + frame(b"zip")[1:], ((b"grpc-encoding", b"gzip"),))
    assert error.code == Code.UNIMPLEMENTED


@pytest.mark.parametrize("flags", [1, 2, 255])
def test_flags_that_nothing_explains_are_an_internal_error(flags: int) -> None:
    assert read_error(bytes((flags,)) + frame(b"zip")[1:]).code == Code.INTERNAL
