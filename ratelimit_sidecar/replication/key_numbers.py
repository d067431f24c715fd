"""Numbers in place of bucket keys: a key that is in many frames is sent to each peer once.

A node gives each key one number for all its streams, so that a segment is encoded once. A peer that connected later,
and does not know a number, is sent its key first (`deltas.Knowledge`).

There are `MAX_NUMBERS` of them. When all are given away, the key that has had its number longest loses it to the new
one, and the frame that says so comes before any that uses it: streams keep order. So neither end grows with the keys
that clients invent. (A key in steady use is then sent in full once in so many new ones.)
"""

from __future__ import annotations

from typing import Final

from ratelimit_sidecar.replication.wire import ProtocolError, Reason

MAX_NUMBERS = 16_384
"""1 to so many: 3 bytes each, and some 3 MB at either end of a stream when all are in use."""

SHARDS: Final = 64
"""Small dicts in place of one, which makes itself anew when so many keys have come and gone: 1.3 ms."""

MAX_NUMBERED_KEY_BYTES: Final = 512
"""A longer key has no number, lest a stream keep a gigabyte of them."""


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


class KeyNumbersReceived:
    """The keys that a peer's numbers mean, on one stream."""

    def __init__(self) -> None:
        self._keys: dict[int, bytes] = {}

    def receive(self, number: int, key: bytes) -> None:
        """From now on `number` means `key`.

        Raises:
            ProtocolError: bad_key.
        """
        if len(key) > MAX_NUMBERED_KEY_BYTES:
            raise ProtocolError(
                Reason.BAD_KEY, f"a number for a key of {len(key)} bytes; at most {MAX_NUMBERED_KEY_BYTES} have one"
            )
        if not 1 <= number <= MAX_NUMBERS:
            raise ProtocolError(Reason.BAD_KEY, f"number {number} for a key; 1 to {MAX_NUMBERS} are given")
        self._keys[number] = key

    def key(self, number: int) -> bytes:
        """The key that `number` means.

        Raises:
            ProtocolError: bad_key.
        """
        key = self._keys.get(number)
        if key is None:
            raise ProtocolError(Reason.BAD_KEY, f"a bucket without a key, and nothing has number {number}")
        return key
