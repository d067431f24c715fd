"""Ids in place of bucket keys: a key that is in many frames is sent to each peer once.

A node gives each key one id for all its streams, so that a segment is encoded once. A peer that connected later,
and does not know an id, is sent its key first (`deltas.KeyTableUse`).

There are `MAX_KEY_IDS` of them. When all are given away, the key that has had its id longest loses it to the new
one, and the frame that says so comes before any that uses it: streams keep order. So neither end grows with the keys
that clients invent. (A key in steady use is then sent in full once in so many new ones.)

A member of the mesh can open hundreds of streams and give ids to the longest keys on each. So those of all streams
together have a bound, of which the streams of one address may hold as much as is free.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

from ratelimit_sidecar.replication.bounds import DEFAULT_BOUNDS
from ratelimit_sidecar.replication.wire import ProtocolError, Reason

MAX_KEY_IDS = 16_384
"""1 to so many: 3 bytes each, and some 2 MB at either end of a stream when all are in use."""

SHARDS: Final = 64
"""Small dicts in place of one, which makes itself anew when so many keys have come and gone: 1.3 ms."""

MAX_KEY_WITH_ID_BYTES: Final = 512
"""A longer key has no id, lest a stream keep a gigabyte of them."""

KEY_ID_BYTES: Final = 64
"""The memory that an id takes besides its key: two places in lists, and what Python adds to bytes."""


class KeyIdsGiven:
    """The ids that a node gives to keys, for all its streams."""

    def __init__(self) -> None:
        self._ids: list[dict[bytes, int]] = [{} for _ in range(SHARDS)]
        self._keys: list[bytes] = []
        """The key of id 1, 2 ..."""
        self._next = 0
        """Where in them the next new key goes when all ids are given away."""

    def id_of(self, key: bytes) -> tuple[int, bool]:
        """The id of `key`, and whether it is new, and has to be told along with the key."""
        ids = self._ids[hash(key) % SHARDS]
        key_id = ids.get(key)
        if key_id is not None:
            return key_id, False
        if len(self._keys) < MAX_KEY_IDS:
            self._keys.append(key)
            key_id = len(self._keys)
        else:
            oldest = self._keys[self._next]
            del self._ids[hash(oldest) % SHARDS][oldest]
            self._keys[self._next] = key
            self._next = (self._next + 1) % MAX_KEY_IDS
            key_id = self._next or MAX_KEY_IDS
        ids[key] = key_id
        return key_id, True


class KeyMemory:
    """Counts the memory that received ids and their keys take, of all streams of one node.

    Args:
        most: bytes.
    """

    def __init__(self, most: int = DEFAULT_BOUNDS.key_id_bytes) -> None:
        self.free = most
        self._held = Counter[str]()
        """The bytes held, by address."""

    def take(self, address: str, more: int) -> bool:
        """Count more, or less if it is negative. Returns whether the address may hold as much; if not, close the
        stream."""
        self.free -= more
        self._held[address] += more
        return more <= 0 or self._held[address] <= self.free

    def give_back(self, address: str, held: int) -> None:
        """Note that a stream is closed that held so much."""
        self.free += held
        self._held[address] -= held
        if not self._held[address]:
            del self._held[address]


class KeyIdsReceived:
    """The receiver's side. Call `close` when the stream is closed.

    Args:
        memory: of all streams of the node together.
        address: of the far end.
    """

    def __init__(self, memory: KeyMemory, address: str) -> None:
        self._memory = memory
        self._address = address
        self._held = 0
        self._keys = [b""]
        """By id; "" for one that means nothing yet."""

    def receive(self, key_id: int, key: bytes) -> None:
        """From now on `key_id` means `key`.

        Raises:
            ProtocolError: bad_key or too_large.
        """
        if len(key) > MAX_KEY_WITH_ID_BYTES:
            raise ProtocolError(
                Reason.BAD_KEY, f"an id for a key of {len(key)} bytes; at most {MAX_KEY_WITH_ID_BYTES} have one"
            )
        if not 1 <= key_id <= MAX_KEY_IDS:
            raise ProtocolError(Reason.BAD_KEY, f"id {key_id} for a key; 1 to {MAX_KEY_IDS} are given")
        more = len(key)
        if key_id < len(self._keys):
            more -= len(self._keys[key_id])
        else:
            new = key_id + 1 - len(self._keys)
            self._keys += [b""] * new
            more += new * KEY_ID_BYTES
        self._keys[key_id] = key
        self._held += more
        if not self._memory.take(self._address, more):
            raise ProtocolError(Reason.TOO_LARGE, "the keys with ids of this address take more than is free")

    def key(self, key_id: int) -> bytes:
        """The key that `key_id` means.

        Raises:
            ProtocolError: bad_key.
        """
        key = self._keys[key_id] if key_id < len(self._keys) else b""
        if not key:
            raise ProtocolError(Reason.BAD_KEY, f"a bucket without a key, and nothing has id {key_id}")
        return key

    def close(self) -> None:
        """Forget them all."""
        self._memory.give_back(self._address, self._held)
        self._held = 0
        self._keys = [b""]
