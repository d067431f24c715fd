"""One rule's flood of keys takes nothing from the others, and what is dropped frees its places."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ratelimit_sidecar.crdt.places import RULE_SHARE, BucketPlaces


def make_places(most: int) -> BucketPlaces:
    return BucketPlaces(most, lambda key: key[:1])


def fill(places: BucketPlaces, rule: str) -> int:
    held = 0
    while places.take(f"{rule}{held}".encode()):
        held += 1
    return held


def test_a_flooded_rule_gets_eight_ninths_and_leaves_the_rest_to_others() -> None:
    places = make_places(9_000)
    assert fill(places, "a") == 8_000
    assert not places.is_ample
    # Each further one gets 8/9 of what is left then.
    assert fill(places, "b") == 889
    assert places.take(b"c0")


def test_buckets_with_long_keys_take_more_places() -> None:
    places = make_places(900)
    keys = [b"a%05d" % number + b"x" * 1_018 for number in range(900)]
    assert sum(places.take(key) for key in keys) == 160
    for key in keys[:160]:
        places.give_back(key)
    assert fill(places, "b") == 800


def test_floods_at_the_same_time_get_the_same() -> None:
    places = make_places(17_000)
    held = [0, 0]
    for number in range(17_000):
        for index, rule in enumerate("ab"):
            held[index] += places.take(f"{rule}{number}".encode())
    assert held == [8_000, 8_000]
    assert places.take(b"c0")


def test_what_nobody_chooses_always_has_room() -> None:
    places = make_places(1)
    assert places.take(b"a0")
    assert not places.take(b"a1")
    assert places.take(b"a")


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 20), st.booleans()), max_size=200), st.integers(1, 12))
def test_it_counts_as_sets_do(steps: list[tuple[str, int, bool]], most: int) -> None:
    places, held = make_places(most), set[bytes]()
    for rule, number, is_new in steps:
        key = f"{rule}{number}".encode()
        if is_new and key not in held:
            of_rule = sum(other[:1] == key[:1] for other in held)
            assert places.take(key) == (of_rule < RULE_SHARE * (most - len(held)))
            if of_rule < RULE_SHARE * (most - len(held)):
                held.add(key)
        elif not is_new and key in held:
            places.give_back(key)
            held.remove(key)
    assert len(held) <= most


def test_room_is_ample_as_long_as_nobody_can_be_refused() -> None:
    places = make_places(1_000)
    held = 0
    while places.is_ample:
        assert places.take(b"a%d" % held)
        held += 1
    assert held == 850
