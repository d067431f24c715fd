"""A dict of very many objects that never stops the process: neither when it grows nor for the cycle collector.

It is cut into shards, since a dict of a million keys takes 20 to 40 ms to grow. And CPython's cycle collector visits
every container that it tracks: a million buckets, at each full collection, for a second. What it looks for is garbage
that refers to itself. Values here must never be that: they are freed by their reference counts alone. So they are
taken out of the collector's sight, as CPython itself does with dicts of numbers, by `PyObject_GC_UnTrack` of its stable
C API. `benchmarks/store.py` measures both.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Final, Generic, TypeVar

V = TypeVar("V")

SHARDS: Final = 256
"""Of a million keys each shard holds 4,000, and grows within 0.1 ms."""

# A prototype of its own: attributes of `ctypes.pythonapi` are shared by everybody who sets argument types on them.
_PROTOTYPE = ctypes.PYFUNCTYPE(None, ctypes.py_object)

untrack = _PROTOTYPE(("PyObject_GC_UnTrack", ctypes.pythonapi))
"""Take one container out of the collector's sight. It may be called again, and must be after a dict was given a new
value: that brings it back into sight.
"""


class UntrackedDict(Generic[V]):
    """Keys are bytes; iteration is in no particular order."""

    __slots__ = ("_length", "shards")

    def __init__(self) -> None:
        self.shards: tuple[dict[bytes, V], ...] = tuple({} for _ in range(SHARDS))
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, key: bytes) -> V:
        return self.shards[hash(key) % SHARDS][key]

    def get(self, key: bytes) -> V | None:
        return self.shards[hash(key) % SHARDS].get(key)

    def add(self, key: bytes, value: V) -> None:
        """Args:
        key: one that is not there.
        """
        shard = self.shards[hash(key) % SHARDS]
        shard[key] = value
        untrack(value)
        untrack(shard)
        self._length += 1

    def __delitem__(self, key: bytes) -> None:
        del self.shards[hash(key) % SHARDS][key]
        self._length -= 1

    def values(self) -> Iterator[V]:
        for shard in self.shards:
            yield from shard.values()
