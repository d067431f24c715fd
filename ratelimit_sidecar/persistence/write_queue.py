"""Which buckets wait to be written to Redis, and in which order they are written. No I/O.

Anybody can invent keys, and so have any number of buckets of one rule wait. So each rule has two queues, one of them
for buckets of which much was taken, which it would cost the most to lose; all queues take turns. A queue may hold as
many buckets as there are places left for others (dynamic thresholds: Choudhury and Hahne, IEEE/ACM Trans. Networking
6(2), 1998): one that is flooded leaves half of them free.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from ratelimit_sidecar.crdt.bucket import Bucket
from ratelimit_sidecar.crdt.journal import is_nearly_used_up
from ratelimit_sidecar.crdt.limit import MIN_STEPS_CAPACITY, URGENT_SHARE

MAX_WAITING: Final = 100_000
"""The most buckets that wait, some 300 bytes each."""

MAX_WAITING_SLOTS: Final = 64
"""The most slots of one bucket that wait; of more, all are written or told."""

Slots = list[int] | None
"""Slots of a bucket; None for all that it has, which is told in whole."""

_Queue = OrderedDict[bytes, Slots]


class WriteQueue:
    """Own slots of buckets that wait to be written, by the bucket's key.

    Args:
        rule_key: returns the part of a bucket key that all buckets of its rule share.
        max_waiting: the most buckets at once.
    """

    def __init__(self, rule_key: Callable[[bytes], bytes], max_waiting: int = MAX_WAITING) -> None:
        self._rule_key = rule_key
        self._max_waiting = max_waiting
        self._queues = OrderedDict[tuple[bytes, bool], _Queue]()
        """By rule and whether much was taken of the buckets. Those whose turn is next come first; none is empty."""
        self._queue_of: dict[bytes, tuple[bytes, bool]] = {}

    def __len__(self) -> int:
        return len(self._queue_of)

    def add(self, bucket: Bucket, slots: Slots) -> bool:
        """Note that these slots are to be written; O(slots). False when there is no place for the bucket."""
        key = bucket.key
        before = self._queue_of.get(key)
        rule = self._rule_key(key) if before is None else before[0]
        name = rule, _is_much_taken(bucket)
        if before is not None and (before >= name or not self._has_place(name)):
            name = before
        elif not self._has_place(name):
            return False
        known = [] if before is None else self._remove(key) if before != name else self._queues[name][key]
        self._queues.setdefault(name, OrderedDict())[key] = join_slots(known, slots)
        self._queue_of[key] = name
        return True

    def take(self, count: int) -> dict[bytes, Slots]:
        """Remove the next buckets: the one that has waited longest in each queue, in turn. O(`count`)."""
        taken: dict[bytes, Slots] = {}
        while self._queues and len(taken) < count:
            name, queue = self._queues.popitem(last=False)
            key, slots = queue.popitem(last=False)
            del self._queue_of[key]
            taken[key] = slots
            if queue:
                self._queues[name] = queue
        return taken

    def _has_place(self, name: tuple[bytes, bool]) -> bool:
        return len(self._queues.get(name, ())) < self._max_waiting - len(self._queue_of)

    def _remove(self, key: bytes) -> Slots:
        name = self._queue_of.pop(key)
        queue = self._queues[name]
        slots = queue.pop(key)
        if not queue:
            del self._queues[name]
        return slots


def _is_much_taken(bucket: Bucket) -> bool:
    """True when an eighth was taken; of a small bucket, where each request may take as much, when an eighth is left."""
    capacity = bucket.limit.capacity
    if capacity < MIN_STEPS_CAPACITY:
        return is_nearly_used_up(bucket)
    return (capacity - bucket.remaining) * URGENT_SHARE >= capacity


def join_slots(known: Slots, slots: Slots) -> Slots:
    """The slots of a bucket that wait, together with more of them; all of it when there are too many."""
    if known is None or slots is None or len(known) + len(slots) > MAX_WAITING_SLOTS:
        return None
    return known + [slot for slot in slots if slot not in known]
