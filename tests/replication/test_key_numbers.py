"""Numbers in place of keys: both ends agree, and neither grows with the keys."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit_sidecar.replication import key_numbers
from ratelimit_sidecar.replication.key_numbers import (
    MAX_NUMBERED_KEY_BYTES,
    MAX_NUMBERS,
    KeyNumbersGiven,
    KeyNumbersReceived,
)
from ratelimit_sidecar.replication.wire import ProtocolError, Reason


@given(st.lists(st.integers(0, 12).map(lambda number: b"key %d" % number), max_size=200))
def test_the_receiver_finds_the_key_that_was_meant_however_often_numbers_change_hands(keys: list[bytes]) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(key_numbers, "MAX_NUMBERS", 5)
        given_out, received = KeyNumbersGiven(), KeyNumbersReceived()
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
        KeyNumbersReceived().receive(number, b"key")
    assert caught.value.reason is Reason.BAD_KEY


def test_a_number_that_nothing_has_is_refused() -> None:
    with pytest.raises(ProtocolError) as caught:
        KeyNumbersReceived().key(1)
    assert caught.value.reason is Reason.BAD_KEY


def test_a_long_key_has_no_number() -> None:
    with pytest.raises(ProtocolError) as caught:
        KeyNumbersReceived().receive(1, b"x" * (MAX_NUMBERED_KEY_BYTES + 1))
    assert caught.value.reason is Reason.BAD_KEY
