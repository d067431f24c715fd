"""A replicated token bucket: the level as a fold over what was taken and when.

Theory of operation. The deficit D = capacity - level drains at the refill rate, stops at zero, and rises by what is
taken. In closed form, the reflected process of Lindley and Skorokhod:

    D(t) = max(0, sup over s <= t of [taken in (s, t] - rate * (t - s)])

Everything that touches D lives in this file. Units: time in microseconds of wall clock, deficits scaled by the limit's
`period_us` (so they drain `tokens` a microsecond), consumption in whole tokens. The live pair (deficit at `at_us`,
`full_at_us`) makes a take O(1): own takes enter at their exact time, a remote slot at its middle, never after now.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ratelimit_sidecar.crdt.bucket import Base, Bucket, Entry, Origin
from ratelimit_sidecar.crdt.limit import AnyLimit, Limit
from ratelimit_sidecar.crdt.slot import slot_end_us, slot_id, slot_middle_us

SEAL_BATCH_SLOTS = 16
"""Sealing sorts what it seals, so a busy bucket waits for this many slots to fall behind the horizon."""


class TokenBucket(Bucket):
    """One in use seals itself; one that is not does so when its owner calls `is_idle`."""

    __slots__ = ("_own_slot_end_us", "deficit", "full_at_us")

    limit: Limit

    def __init__(
        self, key: bytes, limit: Limit, origin: Origin, now_us: int, journal: list[Bucket] | None = None
    ) -> None:
        super().__init__(key, limit, origin, now_us, journal)
        self.base = Base(limit.boundary_us(now_us), 0)
        self.deficit = 0
        """The live scaled deficit as of `at_us`; above the limit's ceiling it is debt."""
        self.full_at_us = now_us
        """The last instant at which the deficit was zero: later arrivals from before it must refold."""
        self._own_slot_end_us = 0

    def take(self, hits: int, now_us: int, *, always: bool = False) -> bool:
        """See `Bucket.take`. What is denied changes nothing that replicates, unless charged `always`: then it
        becomes debt.
        """
        self.advance(now_us)
        limit = self.limit
        charge = hits * limit.period_us
        admitted = self.deficit + charge <= limit.ceiling
        if hits and (admitted or always):
            if self.at_us >= self._own_slot_end_us:
                self._open_slot_of_now()
            self.deficit += charge
            self._write_own(hits)
        return admitted

    @property
    def remaining(self) -> int:
        """Whole tokens left at `at_us`; 0 when in debt."""
        return max(0, (self.limit.ceiling - self.deficit) // self.limit.period_us)

    @property
    def debt(self) -> int:
        return max(0, -((self.limit.ceiling - self.deficit) // self.limit.period_us))

    @property
    def full_in_us(self) -> int:
        """Microseconds from `at_us` until the bucket is full again, rounded up."""
        return -(-self.deficit // self.limit.tokens)

    def fits_in_us(self, hits: int) -> int:
        if hits > self.limit.capacity:
            return self.full_in_us
        missing = self.deficit + hits * self.limit.period_us - self.limit.ceiling
        return max(0, -(-missing // self.limit.tokens))

    def advance(self, now_us: int) -> None:
        """Drain the live deficit up to `now_us`."""
        elapsed_us = now_us - self.at_us
        if elapsed_us > 0:
            deficit = self.deficit - elapsed_us * self.limit.tokens
            if deficit <= 0:
                deficit = 0
                self.full_at_us = now_us
            self.deficit = deficit
            self.at_us = now_us

    def merge(self, entries: Iterable[Entry], now_us: int) -> int:
        """Join entries of a peer; idempotent, in any order.

        Entries placed before the base or the horizon are ignored: what they hold is in somebody's base. So are
        entries further ahead than the horizon is behind: no clock is that wrong and they would count for that long.

        Returns:
            The number of entries that told something new.
        """
        self.advance(now_us)
        self._seal_when_due()
        oldest_us = max(self.base.boundary_us, self.limit.boundary_us(self.at_us))
        newest_us = self.at_us + self.limit.horizon_us
        news = 0
        refold = False
        for entry in entries:
            placed_us = slot_middle_us(entry.slot)
            if not oldest_us <= placed_us <= newest_us:
                continue
            added = self._hear(entry)
            if not added:
                continue
            news += 1
            if placed_us >= self.full_at_us:
                # No refill has been spilled since, so it is exactly as if the tokens had been taken just now.
                self.deficit += added * self.limit.period_us
            else:
                refold = True
        if refold:
            self._refold()
        return news

    def merge_base(self, other: Base, now_us: int) -> bool:
        """Join a peer's base: advance the older to the newer boundary, keep the larger deficit.

        Args:
            other: its deficit scaled by this bucket's `period_us`. Ignored when its boundary lies in the younger
                half of the horizon: only a clock that is seconds wrong puts it there, and sealing a slot that is
                still being written would let its count fall.

        Returns:
            True when the base changed.
        """
        self.advance(now_us)
        if other.boundary_us > self.at_us - self.limit.horizon_us // 2:
            return False
        before = self.base
        boundary_us = max(before.boundary_us, other.boundary_us)
        if boundary_us > before.boundary_us:
            self._seal_before(boundary_us)
        drained = other.deficit - (boundary_us - other.boundary_us) * self.limit.tokens
        if drained > self.base.deficit:
            self.base = Base(boundary_us, min(drained, self.limit.debt_ceiling))
        if self.base == before:
            return False
        self._refold()
        return True

    def seal(self, now_us: int) -> None:
        """Fold what lies behind the horizon into the base and forget its slots."""
        self.advance(now_us)
        boundary_us = self.limit.boundary_us(self.at_us)
        if boundary_us > self.base.boundary_us and self._seal_before(boundary_us):
            self._refold()

    def is_idle(self, now_us: int) -> bool:
        """True when the bucket is full and holds nothing a peer could miss: then it equals an absent bucket."""
        self.seal(now_us)
        return not (self.deficit or self.taken or self._unsent)

    def set_limit(self, limit: AnyLimit, now_us: int) -> None:
        """See `Bucket.set_limit`; what was taken within the horizon still counts."""
        assert isinstance(limit, Limit)
        self.advance(now_us)
        scaled = -(-self.base.deficit * limit.period_us // self.limit.period_us)
        self.base = Base(self.base.boundary_us, min(scaled, limit.debt_ceiling))
        self.limit = limit
        # The next take opens a slot of the new width.
        self._own_slot_end_us = 0
        self._refold()

    def fold(self, now_us: int) -> int:
        """The scaled deficit at `now_us` as a pure function of the replicated state.

        Replicas with equal state and limit return equal integers, however far each has sealed.
        """
        boundary_us = max(self.base.boundary_us, self.limit.boundary_us(now_us))
        return self._fold_from_base(self._events(), boundary_us, now_us).deficit

    def _seal_when_due(self) -> None:
        """Seal a busy bucket now and then, so that it holds few slots however seldom its owner calls `seal`."""
        limit = self.limit
        if self.at_us - self.base.boundary_us > limit.horizon_us + (SEAL_BATCH_SLOTS << limit.exponent):
            self.seal(self.at_us)

    def _open_slot_of_now(self) -> None:
        self._seal_when_due()
        slot = slot_id(self.at_us, self.limit.exponent)
        self._own_slot_end_us = slot_end_us(slot)
        self._open_own_slot(slot)

    def _events(self) -> list[tuple[int, int]]:
        return sorted((slot_middle_us(slot), tokens) for slots in self.taken.values() for slot, tokens in slots.items())

    def _fold_from_base(self, events: Iterable[tuple[int, int]], boundary_us: int, now_us: int) -> _Folded:
        """Fold the base and `events` (instant, tokens; in time order) up to `now_us`.

        Before the boundary the deficit is capped at every event, not once at the end, so the outcome does not depend
        on how many steps the sealing was done in.
        """
        at_us, deficit = self.base
        full_at_us = at_us
        forgiven = False
        tokens, period_us, debt_ceiling = self.limit.tokens, self.limit.period_us, self.limit.debt_ceiling
        for middle_us, taken in events:
            placed_us = min(middle_us, now_us)
            deficit -= (placed_us - at_us) * tokens
            if deficit <= 0:
                deficit = 0
                full_at_us = placed_us
            deficit += taken * period_us
            if middle_us < boundary_us and deficit > debt_ceiling:
                deficit = debt_ceiling
                forgiven = True
            at_us = placed_us
        deficit -= (now_us - at_us) * tokens
        if deficit <= 0:
            return _Folded(0, now_us, forgiven)
        return _Folded(deficit, full_at_us, forgiven)

    def _refold(self) -> None:
        boundary_us = max(self.base.boundary_us, self.limit.boundary_us(self.at_us))
        folded = self._fold_from_base(self._events(), boundary_us, self.at_us)
        self.deficit, self.full_at_us = folded.deficit, folded.full_at_us

    def _seal_before(self, boundary_us: int) -> bool:
        """Move the base up to `boundary_us`. True when debt was forgiven on the way."""
        sealed = [entry for entry in self.entries() if slot_middle_us(entry.slot) < boundary_us]
        events = sorted((slot_middle_us(entry.slot), entry.tokens) for entry in sealed)
        folded = self._fold_from_base(events, boundary_us, boundary_us)
        self._forget_slots((entry.origin, entry.slot) for entry in sealed)
        self.base = Base(boundary_us, folded.deficit)
        return folded.forgiven


class _Folded(NamedTuple):
    deficit: int
    full_at_us: int
    """The last instant from which on late arrivals simply add."""
    forgiven: bool
    """True when `max_debt` cut the deficit on the way."""
