"""What a node holds, summed up by ranges of keys, to be compared with others (`anti_entropy`).

Every `EVERY_US`, at the same instants by every node's clock, each node sums up its buckets by range of keys, once for
all its peers: a *round*. Two nodes that have received the same must come to the same sums although deltas are under way
and they seal at different times, so only what is settled at that instant counts (`Bucket.settled`): slots that are over
for `SETTLE_US`, and what older ones amount to.

The work is bounded: a round takes some buckets at each tick, and when there are too many for all of its ticks, only
some partitions of the key space, others the next time. The work of a tick is done in pieces, and so is a bucket that
many nodes take from.
"""

from __future__ import annotations

import struct
from array import array
from collections import deque
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Final
from zlib import crc32

from ratelimit_sidecar.crdt.bucket import Bucket, Origin
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.limiter.key import hash64
from ratelimit_sidecar.replication.deltas import MAX_SLOT_TOKENS
from ratelimit_sidecar.replication.pace import Steps

EVERY_US: Final = 4_000_000

SETTLE_US: Final = 2_000_000
"""A slot is compared when it has been over for so long: deltas have arrived everywhere, and clocks may differ a little.
"""

KEPT_US: Final = 7_000_000
"""A round, and what follows from it, is over by then: three seconds before anything that it compares may be sealed."""

ROUND_LATE_US: Final = 1_000_000
"""A round is not begun so long after its instant: it would not end in time."""

PARTITIONS: Final = 16
"""Partitions of the key space, by the hash of the key. (On the wire they are the segments of a Digest.)"""

PARTITION_RANGES: Final = 64
RANGES: Final = PARTITIONS * PARTITION_RANGES

LOOK_WORK: Final = 2
SUM_WORK: Final = 40
ORIGIN_WORK: Final = 5
ENTRY_WORK: Final = 5
"""Work, in about tenths of a microsecond: to look at a bucket, to sum one up, and for each origin and each settled
entry in it."""

TICK_WORK: Final = 8_000
"""The work of one tick of 20 ms, besides its share of looking at all buckets. It is more when a partition would
otherwise not be summed up in time. So a round is 4 % of the time, and 1 % for each 200,000 buckets.
"""

ROUND_PIECE_WORK: Final = 1_000
"""The work of one piece; that of the bucket, or of one origin in it, that exceeds it comes on top. The work of a tick
is done in pieces, and frames are answered in pieces."""

TICKS: Final = 170
"""The ticks of one round: one each 20 ms of EVERY_US, and some to spare."""

FREED_RANGES: Final = 16
"""The ranges that are freed in a tick: all of a round within half of the next one."""

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
        partitions: those it is about.
    """

    def __init__(self, at_us: int, partitions: Iterable[int]) -> None:
        self.at_us = at_us
        self.partitions = frozenset(partitions)
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

    def sums_of(self, partition: int) -> list[int]:
        """The sums of the ranges of one partition, as in a Digest."""
        return self.sums[partition * PARTITION_RANGES : (partition + 1) * PARTITION_RANGES]

    def ranges(self) -> Iterable[_Range]:
        """The ranges that have buckets."""
        return self._ranges.values()

    def buckets(self, number: int) -> _Range:
        """The buckets of one range."""
        return self._ranges.get(number) or _Range()


class Work:
    """Cuts work, in the units of `LOOK_WORK`, into pieces. (`server.turns` compares this with other ways to do so.)"""

    def __init__(self) -> None:
        self.done = 0
        self.left = ROUND_PIECE_WORK
        """The work left until the piece ends."""

    def ends_piece(self, work: int) -> bool:
        """Note some work. True when a piece ends with it."""
        self.done += work
        self.left -= work
        if self.left > 0:
            return False
        self.left = ROUND_PIECE_WORK
        return True


class Summing:
    """One node's rounds. Call `do_piece` every 20 ms, or `pause` while there is nobody to compare with.

    Args:
        now_us: the start, or near it.
        tick_work: of each of the TICKS of a round.
    """

    def __init__(self, store: Store, now_us: int, *, tick_work: int = TICK_WORK) -> None:
        self._store = store
        self._tick_work = tick_work
        self._round_work = TICKS * tick_work
        self._due_us = now_us // EVERY_US * EVERY_US + EVERY_US
        self._current: Round | None = None
        self._pieces: Steps = iter(())
        """Does the current round."""
        self._tick_left = 0
        """Work to be done in the current tick; 0 or less between two of them."""
        self._looked = 0
        """Buckets looked at in the current round, or the last."""
        self.work = Work()
        """What was done in the current round, or the last."""
        self._partition_work = 0
        """The work of summing one partition up, as the last round has shown."""
        self._partitions_a_round = PARTITIONS
        self._done: deque[Round] = deque(maxlen=2)
        self._left: list[_Range] = []
        """Ranges of old rounds, which are freed a few at a time: to free all of one round takes milliseconds."""
        self._origins: dict[Origin, int] = {}

    @property
    def is_amid_tick(self) -> bool:
        """True while the work of a tick is not done: then `do_piece` does more of it."""
        return self._tick_left > 0

    def do_piece(self, now_us: int) -> Round | None:
        """Do a piece of the work of a tick: begin it, every 20 ms, or go on with it.

        Returns:
            The round that has just been done.
        """
        if self._tick_left <= 0:
            del self._left[-FREED_RANGES:]
        current = self._current
        if current is not None and now_us >= current.at_us + EVERY_US:
            # Too slow, or the machine was asleep.
            self._plan_next(len(current.partitions), is_done=False)
            self.pause()
            return None
        if current is None:
            at_us = self._due(now_us)
            if at_us is None:
                return None
            current = self._current = self._begin(at_us)
        if self._tick_left <= 0:
            most = max(self._tick_work, self._partition_work * 9 // 8 // TICKS)
            self._tick_left = most + LOOK_WORK * len(self._store) // TICKS
        before, self.work.left = self.work.done, min(self._tick_left, ROUND_PIECE_WORK)
        for _ in self._pieces:
            self._tick_left -= self.work.done - before
            return None
        self._current = None
        self._tick_left = 0
        self._plan_next(len(current.partitions), is_done=True)
        if len(self._done) == self._done.maxlen:
            self._left += self._done.popleft().ranges()
        self._done.append(current)
        return current

    def pause(self) -> None:
        """There is nobody to compare with, or no time: a round under way is given up."""
        if self._current is not None:
            self._left += self._current.ranges()
            self._current = None
            self._pieces = iter(())
            self._tick_left = 0

    def find(self, at_us: int) -> Round | None:
        """The round of that instant, if it is done and one of the last two."""
        return next((each for each in self._done if each.at_us == at_us), None)

    def state_steps(self, bucket: Bucket, at_us: int, work: Work) -> Generator[None, None, int]:
        """Find the state of a bucket, in steps, each a piece of `work`: a hash of 64 bits of what replicas hold alike
        of it; 0 when that is nothing, or cannot be encoded.

        Between two steps the bucket may change. Counts only grow, so a later call that finds the same shows that
        it has not.
        """
        settled = bucket.settled(at_us - SETTLE_US, at_us + KEPT_US)
        if settled is None:
            if work.ends_piece(SUM_WORK):
                yield
            return 0
        origins = [(self.origin_hash(origin), origin) for origin in bucket.origins()]
        origins.sort()
        if work.ends_piece(SUM_WORK + ORIGIN_WORK * len(origins)):
            yield
        numbers: list[int] = []
        try:
            hashed = blake2b(bucket.key + settled.deficit.to_bytes(16, "little"), digest_size=8)
            for number, origin in origins:
                tokens_of = bucket.tokens_of(origin)
                for slot in settled.slots:
                    tokens = tokens_of.get(slot)
                    if tokens is not None:
                        # As they travel.
                        numbers += (number, slot, min(tokens, MAX_SLOT_TOKENS))
                if work.ends_piece(ENTRY_WORK * len(settled.slots)):
                    hashed.update(_packed(numbers))
                    numbers.clear()
                    yield
            hashed.update(_packed(numbers))
        except (OverflowError, struct.error) as error:
            self._store.journal.leave_out(error)
            return 0
        return int.from_bytes(hashed.digest(), "little")

    def _due(self, now_us: int) -> int | None:
        """The instant of the next round, when it is to be begun."""
        # What is due later than the next instant was so before the clock was set back.
        if self._due_us - EVERY_US <= now_us < self._due_us:
            return None
        at_us = now_us // EVERY_US * EVERY_US
        self._due_us = at_us + EVERY_US
        if now_us > at_us + ROUND_LATE_US or not self._is_to_be_done(at_us):
            return None
        return at_us

    def _begin(self, at_us: int) -> Round:
        # The same on every node; each partition has its turn, also for one that does only every second, fourth ...
        # round.
        number = at_us // EVERY_US
        first = (number - number // PARTITIONS - number // PARTITIONS**2) % PARTITIONS
        begun = Round(at_us, [(first + number) % PARTITIONS for number in range(self._partitions_a_round)])
        self._looked, self.work = 0, Work()
        self._pieces = self._sum_steps(begun)
        return begun

    def _sum_steps(self, current: Round) -> Steps:
        """Sum up all buckets, in pieces."""
        at_us, partitions, work = current.at_us, current.partitions, self.work
        for bucket in self._store.walk():
            self._looked += 1
            if work.ends_piece(LOOK_WORK):
                yield
            range_number = range_of(bucket.key)
            if range_number // PARTITION_RANGES in partitions and bucket.is_replicated:
                state = yield from self.state_steps(bucket, at_us, work)
                if state:
                    current.add(range_number, bucket.key, state)

    def _plan_next(self, partitions: int, *, is_done: bool) -> None:
        """Decide how many partitions the next round has.

        Args:
            partitions: of the round that is over.
            is_done: False when it was given up.
        """
        looked, buckets = self._looked, len(self._store)
        summing = self.work.done - LOOK_WORK * looked
        if is_done:
            self._partition_work = summing // partitions
            most = 2 * partitions
        elif looked * SAMPLED_PART >= buckets:
            self._partition_work = summing * buckets // looked // partitions
            most = partitions * looked // max(looked, buckets)
        else:
            return
        most = min(PARTITIONS, most, self._round_work // max(1, self._partition_work))
        self._partitions_a_round = max(1, most)

    def _is_to_be_done(self, at_us: int) -> bool:
        """False for a part of the rounds when even one partition is more than a round may cost. All nodes agree on
        which: the more often one does them, the more of another's are among them."""
        work = LOOK_WORK * len(self._store) + self._partition_work
        stride = 1
        while work > stride * self._round_work:
            stride *= 2
        return at_us // EVERY_US % stride == 0

    def origin_hash(self, origin: Origin) -> int:
        number = self._origins.get(origin)
        if number is None:
            if len(self._origins) >= _MAX_ORIGINS:
                self._origins.clear()
            number = self._origins[origin] = hash64(origin.node.encode() + origin.incarnation.to_bytes(8, "little"))
        return number


def _packed(numbers: list[int]) -> bytes:
    return struct.pack(f"<{len(numbers)}Q", *numbers)
