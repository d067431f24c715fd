"""Counting windows as folds over the same replicated state as the token bucket's: what was taken, and when.

A fixed window's slot is the window itself, so its sum is exact whatever the window's length; the slot id then holds the
window's number in place of a start. A sliding window sums slots of time, and lets go of one only when all of it is
out of the period: no period ever holds more than the limit, and a token comes back up to one slot late. What replicas
admit at the same time beyond the limit is not debt here: it is forgotten with its window.
"""

from __future__ import annotations

from collections.abc import Iterable

from ratelimit_sidecar.crdt.bucket import Bucket, Entry, Origin
from ratelimit_sidecar.crdt.limit import MIN_EXPONENT, AnyLimit, WindowLimit
from ratelimit_sidecar.crdt.slot import slot_end_us, slot_id, slot_start_us


class FixedWindow(Bucket):
    """Counts hits even when they are over the limit, as envoyproxy/ratelimit does."""

    __slots__ = ("count", "window")

    limit: WindowLimit

    def __init__(
        self, key: bytes, limit: WindowLimit, origin: Origin, now_us: int, journal: list[Bucket] | None = None
    ) -> None:
        super().__init__(key, limit, origin, now_us, journal)
        self.window = now_us // limit.period_us
        """Number of the current window, counted from the epoch."""
        self.count = 0
        """Tokens taken in it by all replicas."""

    def take(self, hits: int, now_us: int, *, always: bool = False) -> bool:
        self.advance(now_us)
        count = self.count + hits
        if hits:
            slot = _slot_of_window(self.window)
            if slot != self._own_slot:
                self._open_own_slot(slot)
            self._write_own(hits)
            self.count = count
        return count <= self.limit.requests

    @property
    def remaining(self) -> int:
        return max(0, self.limit.requests - self.count)

    @property
    def debt(self) -> int:
        return max(0, self.count - self.limit.requests)

    @property
    def full_in_us(self) -> int:
        """Microseconds until the next window begins."""
        return (self.window + 1) * self.limit.period_us - self.at_us

    def fits_in_us(self, hits: int) -> int:
        return 0 if self.count + hits <= self.limit.requests else self.full_in_us

    def advance(self, now_us: int) -> None:
        """Enter the window of `now_us` and forget the ones before."""
        if now_us <= self.at_us:
            return
        self.at_us = now_us
        window = now_us // self.limit.period_us
        if window != self.window:
            self.window = window
            self._count_again()

    def merge(self, entries: Iterable[Entry], now_us: int) -> int:
        """See `Bucket.merge`. Of windows before the current one nothing counts; of the next one it is kept, for a peer
        whose clock is ahead.
        """
        self.advance(now_us)
        news = 0
        for entry in entries:
            window = slot_start_us(entry.slot) >> MIN_EXPONENT
            if not self.window <= window <= self.window + 1:
                continue
            added = self._hear(entry)
            if added:
                news += 1
                if window == self.window:
                    self.count += added
        return news

    def seal(self, now_us: int) -> None:
        self.advance(now_us)

    def is_idle(self, now_us: int) -> bool:
        self.advance(now_us)
        return not (self.taken or self._unsent)

    def set_limit(self, limit: AnyLimit, now_us: int) -> None:
        """Enforce another limit from now on. One with another period begins a new count: its windows are others."""
        assert isinstance(limit, WindowLimit)
        self.advance(now_us)
        if limit.period_us != self.limit.period_us:
            self._forget_slots([(entry.origin, entry.slot) for entry in self.entries()])
            self._own_slot = -1
            self.window = self.at_us // limit.period_us
            self.count = 0
        self.limit = limit

    def fold(self, now_us: int) -> int:
        """Tokens taken in the window of `now_us`."""
        slot = _slot_of_window(now_us // self.limit.period_us)
        return sum(slots.get(slot, 0) for slots in self.taken.values())

    def _count_again(self) -> None:
        current = _slot_of_window(self.window)
        self._forget_slots([(entry.origin, entry.slot) for entry in self.entries() if entry.slot < current])
        self.count = sum(slots.get(current, 0) for slots in self.taken.values())


class SlidingWindow(Bucket):
    """Counts what was admitted over the period that ends now."""

    __slots__ = ("_expires_us", "_last_end_us", "_own_slot_end_us", "count")

    limit: WindowLimit

    def __init__(
        self, key: bytes, limit: WindowLimit, origin: Origin, now_us: int, journal: list[Bucket] | None = None
    ) -> None:
        super().__init__(key, limit, origin, now_us, journal)
        self.count = 0
        """Tokens in the slots that are not wholly out of the period, of all replicas."""
        self._expires_us = 0
        """When the oldest slot held is out of the period; 0 when none is held."""
        self._last_end_us = 0
        """When the newest slot held ends."""
        self._own_slot_end_us = 0

    def take(self, hits: int, now_us: int, *, always: bool = False) -> bool:
        self.advance(now_us)
        admitted = self.count + hits <= self.limit.requests
        if hits and (admitted or always):
            if self.at_us >= self._own_slot_end_us:
                slot = slot_id(self.at_us, self.limit.exponent)
                self._own_slot_end_us = slot_end_us(slot)
                self._open_own_slot(slot)
                self._note_slot(slot)
            self.count += hits
            self._write_own(hits)
        return admitted

    @property
    def remaining(self) -> int:
        return max(0, self.limit.requests - self.count)

    @property
    def debt(self) -> int:
        return max(0, self.count - self.limit.requests)

    @property
    def full_in_us(self) -> int:
        """Microseconds until the last slot that holds something is out of the period."""
        return max(0, self._last_end_us + self.limit.period_us - self.at_us) if self.count else 0

    def fits_in_us(self, hits: int) -> int:
        count, fits_us = self.count, self.at_us
        for end_us, tokens in sorted((slot_end_us(entry.slot), entry.tokens) for entry in self.entries()):
            if count + hits <= self.limit.requests:
                break
            count -= tokens
            fits_us = end_us + self.limit.period_us
        return fits_us - self.at_us

    def advance(self, now_us: int) -> None:
        """Let go of the slots that are wholly out of the period that ends at `now_us`."""
        self.at_us = max(self.at_us, now_us)
        if self._expires_us and self.at_us >= self._expires_us:
            self._count_again()

    def merge(self, entries: Iterable[Entry], now_us: int) -> int:
        """See `Bucket.merge`. Slots out of the period, or more than a period ahead, are ignored."""
        self.advance(now_us)
        news = 0
        for entry in entries:
            if (
                not self.at_us - self.limit.period_us
                < slot_end_us(entry.slot)
                <= self.at_us + self.limit.period_us + (1 << self.limit.exponent)
            ):
                continue
            added = self._hear(entry)
            if added:
                news += 1
                self.count += added
                self._note_slot(entry.slot)
        return news

    def seal(self, now_us: int) -> None:
        self.advance(now_us)

    def is_idle(self, now_us: int) -> bool:
        self.advance(now_us)
        return not (self.taken or self._unsent)

    def set_limit(self, limit: AnyLimit, now_us: int) -> None:
        """Enforce another limit from now on; what was taken within its period, and is still known, counts."""
        assert isinstance(limit, WindowLimit)
        self.advance(now_us)
        self.limit = limit
        self._own_slot_end_us = 0
        self._count_again()

    def fold(self, now_us: int) -> int:
        """Tokens in the slots that are not wholly out of the period that ends at `now_us`."""
        since_us = now_us - self.limit.period_us
        return sum(entry.tokens for entry in self.entries() if slot_end_us(entry.slot) > since_us)

    def _note_slot(self, slot: int) -> None:
        end_us = slot_end_us(slot)
        expires_us = end_us + self.limit.period_us
        self._expires_us = min(self._expires_us, expires_us) if self._expires_us else expires_us
        self._last_end_us = max(self._last_end_us, end_us)

    def _count_again(self) -> None:
        since_us = self.at_us - self.limit.period_us
        self._forget_slots(
            [(entry.origin, entry.slot) for entry in self.entries() if slot_end_us(entry.slot) <= since_us]
        )
        self._expires_us = self._last_end_us = 0
        self.count = 0
        for entry in self.entries():
            self.count += entry.tokens
            self._note_slot(entry.slot)


def _slot_of_window(window: int) -> int:
    return window << MIN_EXPONENT | MIN_EXPONENT
