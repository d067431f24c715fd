"""A dict of very many objects that never stops the process: neither when it grows nor for the cycle collector.

It is cut into shards, since a dict of a million keys takes 20 to 40 ms to grow. And CPython's cycle collector visits
every container that it tracks: with a million buckets a full collection takes a second. The collector frees reference
cycles. Values here must not be part of cycles, so that their reference counts free them. Then the collector need not
track them: `PyObject_GC_UnTrack` of the stable C API sees to that, as CPython itself does for dicts of numbers.
`benchmarks/store.py` measures both.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Final, Generic, TypeVar

V = TypeVar("V")

SHARDS: Final = 256
"""With a million keys each shard holds 4,000, and grows within 0.1 ms."""

# Its own prototype, because argument types set on attributes of `ctypes.pythonapi` are shared by the whole process.
_PROTOTYPE = ctypes.PYFUNCTYPE(None, ctypes.py_object)

untrack = _PROTOTYPE(("PyObject_GC_UnTrack", ctypes.pythonapi))
"""Make the collector ignore one container. Call it again each time a dict got a new value: CPython then tracks the dict
again.
"""


class UntrackedDict(Generic[V]):
    """A sharded dict from bytes to values that the cycle collector does not track. It has no particular order."""

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
        """Add a value.

        Args:
            key: one that is not there.
        """
        shard = self.shards[hash(key) % SHARDS]
        shard[key] = value
        untrack(value)
        untrack(shard)
        self._length += 1

    def clear(self) -> Iterator[None]:
        """Remove everything, a shard in each step."""
        for shard in self.shards:
            self._length -= len(shard)
            shard.clear()
            yield

    def __delitem__(self, key: bytes) -> None:
        del self.shards[hash(key) % SHARDS][key]
        self._length -= 1
