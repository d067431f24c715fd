"""One rule's flood of keys takes nothing from the others, and what is dropped makes room again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ratelimit_sidecar.crdt.room import RULE_SHARE, Room


def make_room(most: int) -> Room:
    return Room(most, lambda key: key[:1])


def fill(room: Room, rule: str) -> int:
    held = 0
    while room.take(f"{rule}{held}".encode()):
        held += 1
    return held


def test_a_flooded_rule_gets_eight_ninths_and_leaves_the_rest_to_others() -> None:
    room = make_room(9_000)
    assert fill(room, "a") == 8_000
    assert not room.is_ample
    # Each further one gets 8/9 of what is left then.
    assert fill(room, "b") == 889
    assert room.take(b"c0")


def test_buckets_with_long_keys_take_more_places() -> None:
    room = make_room(900)
    keys = [b"a%05d" % number + b"x" * 1_018 for number in range(900)]
    assert sum(room.take(key) for key in keys) == 160
    for key in keys[:160]:
        room.give_back(key)
    assert fill(room, "b") == 800


def test_floods_at_the_same_time_get_the_same() -> None:
    room = make_room(17_000)
    held = [0, 0]
    for number in range(17_000):
        for index, rule in enumerate("ab"):
            held[index] += room.take(f"{rule}{number}".encode())
    assert held == [8_000, 8_000]
    assert room.take(b"c0")


def test_what_nobody_chooses_always_has_room() -> None:
    room = make_room(1)
    assert room.take(b"a0")
    assert not room.take(b"a1")
    assert room.take(b"a")


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 20), st.booleans()), max_size=200), st.integers(1, 12))
def test_it_counts_as_sets_do(steps: list[tuple[str, int, bool]], most: int) -> None:
    room, held = make_room(most), set[bytes]()
    for rule, number, is_new in steps:
        key = f"{rule}{number}".encode()
        if is_new and key not in held:
            of_rule = sum(other[:1] == key[:1] for other in held)
            assert room.take(key) == (of_rule < RULE_SHARE * (most - len(held)))
            if of_rule < RULE_SHARE * (most - len(held)):
                held.add(key)
        elif not is_new and key in held:
            room.give_back(key)
            held.remove(key)
    assert len(held) <= most


def test_room_is_ample_as_long_as_nobody_can_be_refused() -> None:
    room = make_room(1_000)
    held = 0
    while room.is_ample:
        assert room.take(b"a%d" % held)
        held += 1
    assert held == 850
