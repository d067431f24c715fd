"""Numbers in place of bucket keys: a key that is in many frames is sent to each peer once.

A node gives each key one number for all its streams, so that a segment is encoded once. A peer that connected later,
and does not know a number, is sent its key first (`deltas.Knowledge`).

There are `MAX_NUMBERS` of them. When all are given away, the key that has had its number longest loses it to the new
one, and the frame that says so comes before any that uses it: streams keep order. So neither end grows with the keys
that clients invent. (A key in steady use is then sent in full once in so many new ones.)

A member of the mesh can open hundreds of streams and number the longest keys on each. So those of all streams together
have a bound, of which the streams of one address may hold as much as is free.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

from ratelimit_sidecar.replication.wire import ProtocolError, Reason

MAX_NUMBERS = 16_384
"""1 to so many: 3 bytes each, and some 2 MB at either end of a stream when all are in use."""

SHARDS: Final = 64
"""Small dicts in place of one, which makes itself anew when so many keys have come and gone: 1.3 ms."""

MAX_NUMBERED_KEY_BYTES: Final = 512
"""A longer key has no number, lest a stream keep a gigabyte of them."""

NUMBER_BYTES: Final = 64
"""The memory that a number takes besides its key: two places in lists, and what Python adds to bytes."""

MAX_HELD_BYTES: Final = 512 * 1_024 * 1_024
"""The most that the numbers of all streams take at the receiver: 255 peers with keys of 60 bytes take as much."""


class KeyNumbersGiven:
    """The numbers that a node gives to keys, for all its streams."""

    def __init__(self) -> None:
        self._numbers: list[dict[bytes, int]] = [{} for _ in range(SHARDS)]
        self._keys: list[bytes] = []
        """The key of number 1, 2 ..."""
        self._next = 0
        """Where in them the next new key goes when all numbers are given away."""

    def number(self, key: bytes) -> tuple[int, bool]:
        """The number of `key`, and whether it is new, and has to be told along with the key."""
        numbers = self._numbers[hash(key) % SHARDS]
        number = numbers.get(key)
        if number is not None:
            return number, False
        if len(self._keys) < MAX_NUMBERS:
            self._keys.append(key)
            number = len(self._keys)
        else:
            oldest = self._keys[self._next]
            del self._numbers[hash(oldest) % SHARDS][oldest]
            self._keys[self._next] = key
            self._next = (self._next + 1) % MAX_NUMBERS
            number = self._next or MAX_NUMBERS
        numbers[key] = number
        return number, True


class KeyRoom:
    """Counts the memory that received numbers and their keys take, of all streams of one node."""

    def __init__(self, most: int = MAX_HELD_BYTES) -> None:
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


class KeyNumbersReceived:
    """The receiver's side. Call `close` when the stream is closed.

    Args:
        room: what all streams of the node may hold together.
        address: of the far end.
    """

    def __init__(self, room: KeyRoom, address: str) -> None:
        self._room = room
        self._address = address
        self._held = 0
        self._keys = [b""]
        """By number; "" for one that means nothing yet."""

    def receive(self, number: int, key: bytes) -> None:
        """From now on `number` means `key`.

        Raises:
            ProtocolError: bad_key or too_large.
        """
        if len(key) > MAX_NUMBERED_KEY_BYTES:
            raise ProtocolError(
                Reason.BAD_KEY, f"a number for a key of {len(key)} bytes; at most {MAX_NUMBERED_KEY_BYTES} have one"
            )
        if not 1 <= number <= MAX_NUMBERS:
            raise ProtocolError(Reason.BAD_KEY, f"number {number} for a key; 1 to {MAX_NUMBERS} are given")
        more = len(key)
        if number < len(self._keys):
            more -= len(self._keys[number])
        else:
            new = number + 1 - len(self._keys)
            self._keys += [b""] * new
            more += new * NUMBER_BYTES
        self._keys[number] = key
        self._held += more
        if not self._room.take(self._address, more):
            raise ProtocolError(Reason.TOO_LARGE, "the keys with numbers of this address take more than is free")

    def key(self, number: int) -> bytes:
        """The key that `number` means.

        Raises:
            ProtocolError: bad_key.
        """
        key = self._keys[number] if number < len(self._keys) else b""
        if not key:
            raise ProtocolError(Reason.BAD_KEY, f"a bucket without a key, and nothing has number {number}")
        return key

    def close(self) -> None:
        """Forget them all."""
        self._room.give_back(self._address, self._held)
        self._held = 0
        self._keys = [b""]
