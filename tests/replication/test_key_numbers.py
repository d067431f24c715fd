"""Numbers in place of keys: both ends agree, and neither grows with the keys."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit_sidecar.replication import key_numbers
from ratelimit_sidecar.replication.key_numbers import (
    MAX_NUMBERED_KEY_BYTES,
    MAX_NUMBERS,
    NUMBER_BYTES,
    KeyNumbersGiven,
    KeyNumbersReceived,
    KeyRoom,
)
from ratelimit_sidecar.replication.wire import ProtocolError, Reason


@given(st.lists(st.integers(0, 12).map(lambda number: b"key %d" % number), max_size=200))
def test_the_receiver_finds_the_key_that_was_meant_however_often_numbers_change_hands(keys: list[bytes]) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(key_numbers, "MAX_NUMBERS", 5)
        given_out, received = KeyNumbersGiven(), KeyNumbersReceived(KeyRoom(), "far end")
        for key in keys:
            number, is_new = given_out.number(key)
            if is_new:
                received.receive(number, key)
            assert received.key(number) == key
            assert 1 <= number <= 5


def test_a_key_has_its_number_until_all_others_have_been_given_away() -> None:
    given_out = KeyNumbersGiven()
    assert given_out.number(b"first") == (1, True)
    for index in range(MAX_NUMBERS - 1):
        given_out.number(b"%d" % index)
        assert given_out.number(b"first") == (1, False)
    assert given_out.number(b"one more") == (1, True)
    assert given_out.number(b"first") == (2, True)


@pytest.mark.parametrize("number", [0, MAX_NUMBERS + 1])
def test_a_number_out_of_range_is_refused(number: int) -> None:
    with pytest.raises(ProtocolError) as caught:
        KeyNumbersReceived(KeyRoom(), "far end").receive(number, b"key")
    assert caught.value.reason is Reason.BAD_KEY


def test_a_number_that_nothing_has_is_refused() -> None:
    with pytest.raises(ProtocolError) as caught:
        KeyNumbersReceived(KeyRoom(), "far end").key(1)
    assert caught.value.reason is Reason.BAD_KEY


def test_a_long_key_has_no_number() -> None:
    with pytest.raises(ProtocolError) as caught:
        KeyNumbersReceived(KeyRoom(), "far end").receive(1, b"x" * (MAX_NUMBERED_KEY_BYTES + 1))
    assert caught.value.reason is Reason.BAD_KEY


def test_the_streams_of_one_address_hold_as_many_keys_as_there_is_room_left_for() -> None:
    each = 36 + NUMBER_BYTES
    room = KeyRoom(100 * each)
    streams = [KeyNumbersReceived(room, "rogue") for _ in range(3)]
    for number in range(1, 21):
        for index, received in enumerate(streams[: 3 if number <= 10 else 2]):
            received.receive(number, b"%d of %d".ljust(36, b"x") % (number, index))
    with pytest.raises(ProtocolError) as caught:
        streams[0].receive(21, b"one too many".ljust(36, b"x"))
    assert caught.value.reason is Reason.TOO_LARGE
    other = KeyNumbersReceived(room, "other")
    for number in range(1, 24):
        other.receive(number, b"theirs".ljust(36, b"x"))
    streams[0].close()
    streams[0].close()
    for number in range(11, 19):
        streams[2].receive(number, b"there is room again".ljust(36, b"x"))
    for received in (other, *streams):
        received.close()
    assert room.free == 100 * each


def test_an_address_that_holds_more_than_is_free_by_now_may_number_other_keys() -> None:
    room = KeyRoom(100 * NUMBER_BYTES)
    first, second = (KeyNumbersReceived(room, address) for address in ("first", "second"))
    first.receive(45, b"key")
    second.receive(25, b"key")
    first.receive(45, b"new")
    assert first.key(45) == b"new"
    with pytest.raises(ProtocolError):
        first.receive(45, b"longer")


def test_a_number_that_gets_another_key_takes_no_more_room_and_one_far_ahead_takes_that_of_all_before() -> None:
    room = KeyRoom(1_000 * NUMBER_BYTES)
    received = KeyNumbersReceived(room, "far end")
    received.receive(400, b"key")
    for number in range(10_000):
        received.receive(1 + number % 400, b"%3d" % (number % 1_000))
    assert room.free == 600 * NUMBER_BYTES - 1_200
