"""What a node holds, summed up by ranges of keys, to be compared with others (`anti_entropy`).

Every `EVERY_US`, at the same instants by every node's clock, each node sums up its buckets by range of keys, once for
all its peers: a *round*. Two nodes that have received the same must come to the same sums although deltas are under way
and they seal at different times, so only what is settled at that instant counts (`Bucket.settled`): slots that are over
for `SETTLE_US`, and what older ones amount to.

The work is bounded: a round takes the buckets in steps, and when there are too many for all of its steps, only some
segments of the key space, others the next time.
"""

from __future__ import annotations

import struct
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final
from zlib import crc32

from ratelimit_sidecar.crdt.bucket import Bucket, Origin, Settled
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.limiter.key import hash64
from ratelimit_sidecar.replication.deltas import MAX_SLOT_TOKENS

EVERY_US: Final = 4_000_000

SETTLE_US: Final = 2_000_000
"""A slot is compared when it has been over for so long: deltas have arrived everywhere, and clocks may differ a little.
"""

KEPT_US: Final = 7_000_000
"""A round, and what follows from it, is over by then: three seconds before anything that it compares may be sealed."""

LATE_US: Final = 1_000_000
"""A round is not begun so long after its instant: it would not end in time."""

SEGMENTS: Final = 16
SEGMENT_RANGES: Final = 64
RANGES: Final = SEGMENTS * SEGMENT_RANGES

LOOK_WORK: Final = 2
SUM_WORK: Final = 40
ENTRY_WORK: Final = 15
"""Work, in about tenths of a microsecond: to look at a bucket, to sum one up, and for each settled entry in it."""

STEP_WORK: Final = 8_000
"""The work of one step, besides its share of looking at all buckets. It is more when a segment would otherwise not be
summed up in time. So a round is 4 % of the time, and 1 % for each 200,000 buckets.
"""

PIECE_WORK: Final = 1_000
"""The work of one piece. Steps are done in pieces, and frames are answered in pieces."""

STEPS: Final = 170
"""The steps of one round: one each 20 ms of EVERY_US, and some to spare."""

FREED_RANGES: Final = 16
"""The ranges that are freed in a step: all of a round within half of the next one."""

MAX_SUMMARY_BUCKETS: Final = 16_000
"""The most buckets of a range in a Summary: as many as fit into a frame. (Of a million buckets a range has a thousand.)
A range with more is not compared: somebody has searched for keys that fall into it, and a larger frame would end the
stream.
"""

SAMPLED_PART: Final = 256
"""A round that was given up shows how much there is to do only if it has looked at 1/256 of the buckets."""

_MAX_ORIGINS: Final = 4_096
"""The most origins whose hash is remembered."""


def range_of(key: bytes) -> int:
    return crc32(key) % RANGES


@dataclass(frozen=True, slots=True)
class _Range:
    """The buckets of one range of keys, as far as there are few enough of them.

    Args:
        hashes: of the keys.
    """

    keys: list[bytes] = field(default_factory=list)
    hashes: array[int] = field(default_factory=lambda: array("Q"))
    states: array[int] = field(default_factory=lambda: array("Q"))

    @property
    def is_crowded(self) -> bool:
        """There are more, and the range is left out."""
        return len(self.keys) > MAX_SUMMARY_BUCKETS


class Round:
    """What this node holds, as of one instant.

    Args:
        at_us: a multiple of EVERY_US by this node's clock.
        segments: those it is about.
    """

    def __init__(self, at_us: int, segments: Iterable[int]) -> None:
        self.at_us = at_us
        self.segments = frozenset(segments)
        self.sums = [0] * RANGES
        self._ranges: dict[int, _Range] = {}

    def add(self, range_number: int, key: bytes, state: int) -> None:
        self.sums[range_number] = (self.sums[range_number] + state) & 0xFFFF_FFFF_FFFF_FFFF
        found = self._ranges.get(range_number)
        if found is None:
            found = self._ranges[range_number] = _Range()
        if found.is_crowded:
            return
        found.keys.append(key)
        found.hashes.append(hash64(key))
        found.states.append(state)

    def sums_of(self, segment: int) -> list[int]:
        """The sums of the ranges of one segment, as in a Digest."""
        return self.sums[segment * SEGMENT_RANGES : (segment + 1) * SEGMENT_RANGES]

    def ranges(self) -> Iterable[_Range]:
        """The ranges that have buckets."""
        return self._ranges.values()

    def buckets(self, number: int) -> _Range:
        """The buckets of one range."""
        return self._ranges.get(number) or _Range()


class Summing:
    """One node's rounds. Call `step` every few milliseconds, or `pause` while there is nobody to compare with.

    Args:
        now_us: the start, or near it.
        step_work: of each of the STEPS of a round.
    """

    def __init__(self, store: Store, now_us: int, *, step_work: int = STEP_WORK) -> None:
        self._store = store
        self._step_work = step_work
        self._round_work = STEPS * step_work
        self._due_us = now_us // EVERY_US * EVERY_US + EVERY_US
        self._current: Round | None = None
        self._walk: Iterator[Bucket] = iter(())
        self._step_left = 0
        """Work to be done in the current step; 0 or less between two of them."""
        self._looking = self._summing = 0
        """Work done in the current round, or the last."""
        self._segment_work = 0
        """To sum one segment up, as the last round has shown."""
        self._segments_a_round = SEGMENTS
        self._done: deque[Round] = deque(maxlen=2)
        self._left: list[_Range] = []
        """Ranges of old rounds, which are freed a few at a time: to free all of one round takes milliseconds."""
        self._origins: dict[Origin, int] = {}

    @property
    def is_stepping(self) -> bool:
        """True while a step is not done: then `step` does the next piece of it."""
        return self._step_left > 0

    def step(self, now_us: int) -> Round | None:
        """Begin a step, every few milliseconds, or go on with it.

        Returns:
            The round that has just been done.
        """
        if self._step_left <= 0:
            del self._left[-FREED_RANGES:]
        current = self._current
        if current is not None and now_us >= current.at_us + EVERY_US:
            # Too slow, or the machine was asleep.
            self._plan_next(len(current.segments), is_done=False)
            self.pause()
            return None
        if current is None:
            at_us = self._due(now_us)
            if at_us is None:
                return None
            current = self._current = self._begin(at_us)
        if self._step_left <= 0:
            most = max(self._step_work, self._segment_work * 9 // 8 // STEPS)
            self._step_left = most + LOOK_WORK * len(self._store) // STEPS
        if not self._take_piece(current):
            return None
        self._current = None
        self._step_left = 0
        self._plan_next(len(current.segments), is_done=True)
        if len(self._done) == self._done.maxlen:
            self._left += self._done.popleft().ranges()
        self._done.append(current)
        return current

    def pause(self) -> None:
        """There is nobody to compare with, or no time: a round under way is given up."""
        if self._current is not None:
            self._left += self._current.ranges()
            self._current = None
            self._step_left = 0

    def find(self, at_us: int) -> Round | None:
        """The round of that instant, if it is done and one of the last two."""
        return next((each for each in self._done if each.at_us == at_us), None)

    def state(self, bucket: Bucket, at_us: int) -> int:
        """A hash of 64 bits of what replicas hold alike of a bucket; 0 when that is nothing."""
        settled = _settled(bucket, at_us)
        return 0 if settled is None else self._hash(bucket.key, settled)

    def _due(self, now_us: int) -> int | None:
        """The instant of the next round, when it is to be begun."""
        # What is due later than the next instant was so before the clock was set back.
        if self._due_us - EVERY_US <= now_us < self._due_us:
            return None
        at_us = now_us // EVERY_US * EVERY_US
        self._due_us = at_us + EVERY_US
        if now_us > at_us + LATE_US or not self._is_to_be_done(at_us):
            return None
        return at_us

    def _begin(self, at_us: int) -> Round:
        # The same on every node; each segment has its turn, also for one that does only every second, fourth ... round.
        number = at_us // EVERY_US
        first = (number - number // SEGMENTS - number // SEGMENTS**2) % SEGMENTS
        self._walk = self._store.walk()
        self._looking = self._summing = 0
        return Round(at_us, [(first + number) % SEGMENTS for number in range(self._segments_a_round)])

    def _take_piece(self, current: Round) -> bool:
        """True when the round is done."""
        piece = left = min(self._step_left, PIECE_WORK)
        at_us, segments = current.at_us, current.segments
        for bucket in self._walk:
            left -= LOOK_WORK
            self._looking += LOOK_WORK
            range_number = range_of(bucket.key)
            if range_number // SEGMENT_RANGES in segments and bucket.journal is not None:
                settled = _settled(bucket, at_us)
                work = SUM_WORK
                if settled is not None:
                    work += ENTRY_WORK * len(settled.entries)
                    current.add(range_number, bucket.key, self._hash(bucket.key, settled))
                left -= work
                self._summing += work
            if left <= 0:
                self._step_left -= piece - left
                return False
        return True

    def _plan_next(self, segments: int, *, is_done: bool) -> None:
        """Decide how many segments the next round has.

        Args:
            segments: of the round that is over.
            is_done: False when it was given up.
        """
        looked, buckets = self._looking // LOOK_WORK, len(self._store)
        if is_done:
            self._segment_work = self._summing // segments
            most = 2 * segments
        elif looked * SAMPLED_PART >= buckets:
            self._segment_work = self._summing * buckets // looked // segments
            most = segments * looked // max(looked, buckets)
        else:
            return
        most = min(SEGMENTS, most, self._round_work // max(1, self._segment_work))
        self._segments_a_round = max(1, most)

    def _is_to_be_done(self, at_us: int) -> bool:
        """False for a part of the rounds when even one segment is more than a round may cost. All nodes agree on which:
        the more often one does them, the more of another's are among them."""
        work = LOOK_WORK * len(self._store) + self._segment_work
        stride = 1
        while work > stride * self._round_work:
            stride *= 2
        return at_us // EVERY_US % stride == 0

    def _hash(self, key: bytes, settled: Settled) -> int:
        # As they travel.
        rows = sorted(
            [(self._origin(origin), slot, min(tokens, MAX_SLOT_TOKENS)) for origin, slot, tokens in settled.entries]
        )
        numbers = [number for row in rows for number in row]
        packed = struct.pack(f"<{len(numbers)}Q", *numbers)
        return hash64(key + settled.deficit.to_bytes(16, "little") + packed)

    def _origin(self, origin: Origin) -> int:
        number = self._origins.get(origin)
        if number is None:
            if len(self._origins) >= _MAX_ORIGINS:
                self._origins.clear()
            number = self._origins[origin] = hash64(origin.node.encode() + origin.incarnation.to_bytes(8, "little"))
        return number


def _settled(bucket: Bucket, at_us: int) -> Settled | None:
    return bucket.settled(at_us - SETTLE_US, at_us + KEPT_US)
