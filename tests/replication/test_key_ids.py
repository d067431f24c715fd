"""Ids in place of keys: both ends agree, and neither grows with the keys."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit_sidecar.replication import key_ids
from ratelimit_sidecar.replication.key_ids import (
    KEY_ID_BYTES,
    MAX_KEY_IDS,
    MAX_KEY_WITH_ID_BYTES,
    KeyIdsGiven,
    KeyIdsReceived,
    KeyMemory,
)
from ratelimit_sidecar.replication.wire import ProtocolError, Reason


@given(st.lists(st.integers(0, 12).map(lambda key_id: b"key %d" % key_id), max_size=200))
def test_the_receiver_finds_the_key_that_was_meant_however_often_ids_change_hands(keys: list[bytes]) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(key_ids, "MAX_KEY_IDS", 5)
        given_out, received = KeyIdsGiven(), KeyIdsReceived(KeyMemory(), "far end")
        for key in keys:
            key_id, is_new = given_out.id_of(key)
            if is_new:
                received.receive(key_id, key)
            assert received.key(key_id) == key
            assert 1 <= key_id <= 5


def test_a_key_has_its_id_until_all_others_have_been_given_away() -> None:
    given_out = KeyIdsGiven()
    assert given_out.id_of(b"first") == (1, True)
    for index in range(MAX_KEY_IDS - 1):
        given_out.id_of(b"%d" % index)
        assert given_out.id_of(b"first") == (1, False)
    assert given_out.id_of(b"one more") == (1, True)
    assert given_out.id_of(b"first") == (2, True)


@pytest.mark.parametrize("key_id", [0, MAX_KEY_IDS + 1])
def test_an_id_out_of_range_is_refused(key_id: int) -> None:
    with pytest.raises(ProtocolError) as caught:
        KeyIdsReceived(KeyMemory(), "far end").receive(key_id, b"key")
    assert caught.value.reason is Reason.BAD_KEY


def test_an_id_that_nothing_has_is_refused() -> None:
    with pytest.raises(ProtocolError) as caught:
        KeyIdsReceived(KeyMemory(), "far end").key(1)
    assert caught.value.reason is Reason.BAD_KEY


def test_a_long_key_has_no_id() -> None:
    with pytest.raises(ProtocolError) as caught:
        KeyIdsReceived(KeyMemory(), "far end").receive(1, b"x" * (MAX_KEY_WITH_ID_BYTES + 1))
    assert caught.value.reason is Reason.BAD_KEY


def test_the_streams_of_one_address_hold_as_many_keys_as_there_is_room_left_for() -> None:
    each = 36 + KEY_ID_BYTES
    memory = KeyMemory(100 * each)
    streams = [KeyIdsReceived(memory, "rogue") for _ in range(3)]
    for key_id in range(1, 21):
        for index, received in enumerate(streams[: 3 if key_id <= 10 else 2]):
            received.receive(key_id, b"%d of %d".ljust(36, b"x") % (key_id, index))
    with pytest.raises(ProtocolError) as caught:
        streams[0].receive(21, b"one too many".ljust(36, b"x"))
    assert caught.value.reason is Reason.TOO_LARGE
    other = KeyIdsReceived(memory, "other")
    for key_id in range(1, 24):
        other.receive(key_id, b"theirs".ljust(36, b"x"))
    streams[0].close()
    streams[0].close()
    for key_id in range(11, 19):
        streams[2].receive(key_id, b"there is room again".ljust(36, b"x"))
    for received in (other, *streams):
        received.close()
    assert memory.free == 100 * each


def test_an_address_that_holds_more_than_is_free_by_now_may_give_ids_to_other_keys() -> None:
    memory = KeyMemory(100 * KEY_ID_BYTES)
    first, second = (KeyIdsReceived(memory, address) for address in ("first", "second"))
    first.receive(45, b"key")
    second.receive(25, b"key")
    first.receive(45, b"new")
    assert first.key(45) == b"new"
    with pytest.raises(ProtocolError):
        first.receive(45, b"longer")


def test_an_id_that_gets_another_key_takes_no_more_room_and_one_far_ahead_takes_that_of_all_before() -> None:
    memory = KeyMemory(1_000 * KEY_ID_BYTES)
    received = KeyIdsReceived(memory, "far end")
    received.receive(400, b"key")
    for key_id in range(10_000):
        received.receive(1 + key_id % 400, b"%3d" % (key_id % 1_000))
    assert memory.free == 600 * KEY_ID_BYTES - 1_200
