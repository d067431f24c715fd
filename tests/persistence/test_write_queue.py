"""Who floods one rule with invented keys keeps no other bucket, and none that much was taken of, from being written."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from observed import NOW_US

from ratelimit_sidecar.crdt.bucket import Bucket, Origin
from ratelimit_sidecar.crdt.limit import TokenBucketLimit
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.limiter.key import FIXED_WINDOW, KEY_ONLY, KeyEntry, encode_bucket_key, rule_key
from ratelimit_sidecar.persistence.write_queue import MAX_WAITING_SLOTS, Slots, WriteQueue

LIMIT = TokenBucketLimit(tokens=100, period_us=3_600_000_000, capacity=100)


@pytest.fixture
def store() -> Store:
    return Store(Origin("here", 1), lambda _: LIMIT, rule_key=rule_key)


def bucket(store: Store, value: str, taken: int = 1, rule: str = "user") -> Bucket:
    found = store.bucket(encode_bucket_key(FIXED_WINDOW, "shop", [KeyEntry(KEY_ONLY, rule, value)]), LIMIT, NOW_US)
    found.take(taken, NOW_US)
    return found


def test_a_flooded_rule_leaves_places_and_turns_to_others(store: Store) -> None:
    queue = WriteQueue(rule_key, max_waiting=100)
    places = [queue.add(bucket(store, f"invented-{number}"), [1]) for number in range(200)]
    assert sum(places) == 50
    spared = [bucket(store, "spared", rule="tenant"), bucket(store, "used-up", taken=90)]
    assert all(queue.add(each, [1]) for each in spared)
    assert set(queue.take(3)) >= {each.key for each in spared}


def test_a_waiting_bucket_of_which_much_is_taken_need_wait_no_longer_and_keeps_its_slots(store: Store) -> None:
    queue = WriteQueue(rule_key, max_waiting=100)
    for number in range(20):
        queue.add(bucket(store, f"invented-{number}"), [1])
    queue.add(bucket(store, "late"), [1, 2])
    queue.add(bucket(store, "late", taken=90), [2, 3])
    assert queue.take(2)[bucket(store, "late", taken=0).key] == [1, 2, 3]
    assert len(queue) == 19


def test_one_that_finds_no_place_among_those_of_which_much_was_taken_keeps_its_place(store: Store) -> None:
    queue = WriteQueue(rule_key, max_waiting=4)
    queue.add(bucket(store, "late"), [1])
    queue.add(bucket(store, "first", taken=90), [1])
    queue.add(bucket(store, "second", taken=90), [1])
    assert queue.add(bucket(store, "late", taken=90), [2])
    assert not queue.add(bucket(store, "further", taken=90), [2])
    assert sorted(queue.take(9).values()) == [[1], [1], [1, 2]]


def test_one_that_has_refilled_while_it_waits_keeps_its_turn(store: Store) -> None:
    queue = WriteQueue(rule_key, max_waiting=100)
    for number in range(20):
        queue.add(bucket(store, f"invented-{number}"), [1])
    late = bucket(store, "late", taken=90)
    queue.add(late, [1])
    late.advance(NOW_US + 3_600_000_000)
    queue.add(late, [2])
    assert queue.take(2)[late.key] == [1, 2]


@pytest.mark.parametrize("slots", [([1], None), (None, [1])], ids=["later", "before"])
def test_what_is_to_be_written_in_whole_is(store: Store, slots: tuple[Slots, Slots]) -> None:
    queue = WriteQueue(rule_key)
    for each in slots:
        queue.add(bucket(store, "busy"), each)
    assert [slots is None for slots in queue.take(2).values()] == [True]


def test_of_many_slots_all_are_written(store: Store) -> None:
    queue = WriteQueue(rule_key)
    for slot in range(MAX_WAITING_SLOTS + 1):
        queue.add(bucket(store, "busy", taken=0), [slot])
    queue.add(bucket(store, "busy", taken=0), [7])
    assert [slots is None for slots in queue.take(2).values()] == [True]


added = st.tuples(st.sampled_from("abcdefgh"), st.sampled_from(("user", "org")), st.integers(0, 9), st.integers(1, 3))


@given(st.lists(added | st.integers(1, 5)))
def test_what_was_given_a_place_is_taken_once_with_all_its_slots(steps: list) -> None:
    store = Store(Origin("here", 1), lambda _: LIMIT, rule_key=rule_key)
    queue = WriteQueue(rule_key, max_waiting=6)
    waiting: dict[bytes, set[int]] = {}
    for step in [*steps, 99]:
        if isinstance(step, int):
            taken = queue.take(step)
            assert len(taken) == min(step, len(waiting))
            for key, slots in taken.items():
                assert sorted(slots) == sorted(waiting.pop(key))
        else:
            value, rule, tokens, slot = step
            each = bucket(store, value, tokens, rule)
            has_place = queue.add(each, [slot])
            assert has_place or each.key not in waiting
            if has_place:
                waiting.setdefault(each.key, set()).add(slot)
        assert len(queue) == len(waiting) <= 6
