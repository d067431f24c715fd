"""What waits by bucket key, first in, first out; no step of it takes long, however much waits.

An OrderedDict would do the same, but it makes itself anew from time to time, which takes 8 ms and more with 100,000
keys. So the keys stand in a deque, and what they stand for is in many small dicts.
"""

from __future__ import annotations

from collections import deque
from typing import Final, Generic, TypeVar

V = TypeVar("V")

SHARDS: Final = 64


class KeyQueue(Generic[V]):
    def __init__(self) -> None:
        self._keys: deque[bytes] = deque()
        self._shards: list[dict[bytes, V]] = [{} for _ in range(SHARDS)]

    def __len__(self) -> int:
        return len(self._keys)

    def get(self, key: bytes) -> V | None:
        return self._shards[hash(key) % SHARDS].get(key)

    def add(self, key: bytes, value: V) -> None:
        """Args:
        key: one that is not waiting.
        """
        self._shards[hash(key) % SHARDS][key] = value
        self._keys.append(key)

    def pop(self) -> tuple[bytes, V]:
        """What has waited longest.

        Raises:
            IndexError: nothing waits.
        """
        key = self._keys.popleft()
        return key, self._shards[hash(key) % SHARDS].pop(key)

    def oldest(self) -> V:
        """What has waited longest, which goes on waiting.

        Raises:
            IndexError: nothing waits.
        """
        key = self._keys[0]
        return self._shards[hash(key) % SHARDS][key]
