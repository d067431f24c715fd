"""A queue by key: the order of a dict that is emptied from the front, and a value for each key while it waits."""

from __future__ import annotations

from collections import OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ratelimit_sidecar.replication.key_queue import KeyQueue

KEYS = st.integers(0, 9).map(lambda number: b"key %d" % number)


@given(st.lists(st.one_of(KEYS, st.none())))
def test_it_does_what_an_ordered_dict_does(steps: list[bytes | None]) -> None:
    queue, model = KeyQueue[int](), OrderedDict[bytes, int]()
    for number, key in enumerate(steps):
        if key is None:
            if model:
                assert queue.oldest() == next(iter(model.values()))
                assert queue.pop() == model.popitem(last=False)
        elif key not in model:
            queue.add(key, number)
            model[key] = number
        assert len(queue) == len(model)
        assert all(queue.get(b"key %d" % index) == model.get(b"key %d" % index) for index in range(10))


def test_nothing_waits_in_an_empty_one() -> None:
    for look in (KeyQueue[int]().oldest, KeyQueue[int]().pop):
        with pytest.raises(IndexError):
            look()
