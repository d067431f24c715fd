"""Counting windows as folds over the same replicated state as the token bucket's: what was taken, and when.

A fixed window has one slot: the one in which it begins, as wide as the window rounded down to a power of two. So its
sum is exact. A sliding window sums slots of time and drops one only when all of it is out of the period. So no period
holds more than the limit, and a token comes back up to one slot late. Tokens that replicas admit at the same time
beyond the limit are no debt: they are forgotten with the window.

A refund is a mark on the slot in which the tokens were taken: so many of them do not count. If several replicas mark a
slot, the highest mark holds. So a refund that two replicas give at the same time counts once.

The period may change, and change back. So slots of other widths than the limit's are accepted and kept for as long as
they could count under a limit with such slots.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable

from ratelimit_sidecar.crdt.bucket import SET_BACK_US, Bucket, Entry, Origin, Settled
from ratelimit_sidecar.crdt.journal import Journal, Refused
from ratelimit_sidecar.crdt.limit import (
    MAX_AHEAD_US,
    MAX_WIDER_EXPONENT,
    MAX_WIDER_SLIDING_EXPONENT,
    SLOTS_PER_PERIOD,
    AnyLimit,
    WindowLimit,
)
from ratelimit_sidecar.crdt.slot import REFUND, slot_end_us, slot_exponent, slot_id, slot_start_us


class _Window(Bucket):
    """What fixed and sliding windows have in common: a count of tokens that is compared with the limit."""

    __slots__ = ("_limit", "count")

    def __init__(
        self, key: bytes, limit: WindowLimit, origin: Origin, now_us: int, journal: Journal | None = None
    ) -> None:
        super().__init__(key, origin, now_us, journal)
        self._limit = limit
        self.count = 0
        """Tokens of all replicas that count now, less refunds."""

    @property
    def limit(self) -> WindowLimit:
        return self._limit

    @property
    def remaining(self) -> int:
        return max(0, self._limit.requests - self.count)

    @property
    def debt(self) -> int:
        return max(0, self.count - self._limit.requests)

    def seal(self, now_us: int) -> None:
        self.advance(now_us)

    def is_idle(self, now_us: int) -> bool:
        self.advance(now_us)
        if self.count:
            # What is past is forgotten when the next slot leaves or the next window begins.
            return False
        self._forget(self._is_past)
        return self._holds_nothing

    def _together(self, slot: int, tokens: int, others: int) -> int:
        """See `Bucket._together`. Of refund marks the highest holds, since each covers the takes of all."""
        return max(tokens, others) if slot & REFUND else tokens + others

    def _note_received(self, slot: int, held: int, tokens: int) -> None:
        by_slot = self._received_tokens
        if not slot & REFUND or by_slot is None:
            super()._note_received(slot, held, tokens)
        elif tokens > held:
            by_slot[slot] = max(by_slot.get(slot, 0), tokens)
        else:
            # Another mark may be the highest now.
            self._received_tokens = None

    @abstractmethod
    def left_within(self, us: int) -> int:
        """Tokens that can be taken evenly in the next `us` microseconds with no more than the limit in a window."""

    @abstractmethod
    def _is_past(self, slot: int) -> bool:
        """True when the slot cannot count any more, whichever limit it is of."""


class FixedWindow(_Window):
    """A replicated fixed window. It counts hits even when they are over the limit, as envoyproxy/ratelimit does."""

    __slots__ = ("_early_refunds", "_end_us", "_slot", "_written_us")

    def __init__(
        self, key: bytes, limit: WindowLimit, origin: Origin, now_us: int, journal: Journal | None = None
    ) -> None:
        super().__init__(key, limit, origin, now_us, journal)
        self._early_refunds = 0
        """Refunds received for takes that this replica has not received yet."""
        self._slot = self._end_us = self._written_us = 0
        self._enter_window()

    def take(self, hits: int, now_us: int, *, always: bool = False) -> bool:
        self.advance(now_us)
        count = self.count + hits
        if self._early_refunds:
            # Then the count is 0.
            self._early_refunds, count = max(0, self._early_refunds - hits), max(0, hits - self._early_refunds)
        if hits:
            if self._slot != self._own_slot:
                self._open_own_slot(self._slot)
            self._write_own(hits)
            self._written_us = self.at_us
            before, self.count = self.count, count
            self._mark_if_urgent(self._limit, before, count)
        return count <= self._limit.requests

    def would_admit(self, hits: int, now_us: int) -> bool:
        self.advance(now_us)
        return self.count + hits - self._early_refunds <= self._limit.requests

    def refund(self, tokens: int | None, now_us: int) -> int:
        """See `Bucket.refund`. Hits over the limit were denied, so a refund does not count them."""
        self.advance(now_us)
        counted = min(self.count, self._limit.requests)
        left = 0 if tokens is None else max(0, counted - tokens)
        if left < self.count:
            _, refunded = self._taken_and_refunded(self._slot)
            self._write_refund(self._slot | REFUND, refunded + self.count - left)
            self._written_us = self.at_us
            self.count = left
        return counted - left

    @property
    def full_in_us(self) -> int:
        """Microseconds until the next window begins."""
        return self._end_us - self.at_us

    def retry_after_us(self, hits: int) -> int:
        return 0 if self.count + hits <= self._limit.requests else self.full_in_us

    def left_within(self, us: int) -> int:
        """See `_Window.left_within`. Of the next window it is an even part."""
        return self.remaining + self._limit.requests * max(0, us - self.full_in_us) // self._limit.period_us

    def advance(self, now_us: int) -> None:
        """Enter the window of `now_us` and forget the ones before."""
        if now_us <= self.at_us:
            if now_us <= self.at_us - SET_BACK_US:
                self._go_back(now_us)
            return
        self.at_us = now_us
        if now_us >= self._end_us:
            self._enter_window()

    def merge(self, entries: Iterable[Entry], now_us: int) -> int:
        """See `Bucket.merge`. Entries of past windows are ignored. Those of the next window are kept, since the clock
        of a peer may be ahead.
        """
        self.advance(now_us)
        widest = self._widest(self._limit.exponent, MAX_WIDER_EXPONENT)
        news = 0
        again = False
        for entry in entries:
            slot = entry.slot
            exponent = slot_exponent(slot)
            if self._is_past(slot):
                continue
            if exponent > widest or self._is_ahead(slot):
                self._refuse(Refused.WIDE if exponent > widest else Refused.AHEAD)
                continue
            added = self._receive(entry)
            if added:
                news += 1
                self._written_us = self.at_us
                if added < 0 or self._early_refunds or slot & REFUND:
                    again = True
                elif slot == self._slot:
                    self.count += added
        if again:
            self._trim()
            self._recount()
        return news

    def set_limit(self, limit: AnyLimit, now_us: int) -> None:
        """Enforce another limit from now on. With another period, windows begin at other times and count from zero."""
        assert isinstance(limit, WindowLimit)
        self.advance(now_us)
        former, self._limit = self._limit, limit
        if limit.period_us != former.period_us:
            self._enter_window()

    def fold(self, now_us: int) -> int:
        """Tokens taken in the window of `now_us`, less those given back."""
        taken, refunded = self._taken_and_refunded(_slot_of_window(self._limit, now_us))
        return max(0, taken - refunded)

    def is_written_since(self, since_us: int) -> bool:
        return self._written_us > since_us

    def entries_since(self, origin: Origin, since_us: int) -> list[Entry]:
        """See `Bucket.entries_since`. Returns all or nothing, since a window has only one slot."""
        return super().entries_since(origin, 0) if self.is_written_since(since_us) else []

    def settled(self, until_us: int, kept_until_us: int) -> Settled | None:
        """See `Bucket.settled`: the current window, unless it began after `until_us` or ends before `kept_until_us`."""
        begins_us = self._end_us - self._limit.period_us
        if begins_us > until_us or self._end_us <= kept_until_us:
            return None
        slots = [slot for slot in self._tokens_by_slot() if slot & ~REFUND == self._slot]
        return Settled(0, sorted(slots)) if slots else None

    def _go_back(self, now_us: int) -> None:
        """The clock was set back. The current window has been forgotten: what counted in a later one counts as taken in
        it now."""
        counted = self.count
        self._take_new_origin()
        self.at_us = now_us
        self._enter_window()
        self._forget(self._is_ahead)
        missing = counted - self.count
        if missing > 0:
            self._open_own_slot(self._slot)
            self._write_own(missing)
            self._written_us = now_us
            self.count += missing

    def _enter_window(self) -> None:
        period_us = self._limit.period_us
        self._slot = _slot_of_window(self._limit, self.at_us)
        self._end_us = self.at_us - self.at_us % period_us + period_us
        self._forget(self._is_past)
        self._recount()

    def _is_ahead(self, slot: int) -> bool:
        """True when it is later than the next window, or begins later than `MAX_AHEAD_US` from now."""
        exponent = slot_exponent(slot)
        if slot > self.at_us + MAX_AHEAD_US:
            return True
        if exponent == self._limit.exponent:
            return slot > _slot_of_window(self._limit, self._end_us) | REFUND
        # The longest window with a slot of this width is almost twice as long.
        return slot_start_us(slot) > self.at_us + (2 << exponent)

    def _recount(self) -> None:
        taken, refunded = self._taken_and_refunded(self._slot)
        self.count, self._early_refunds = max(0, taken - refunded), max(0, refunded - taken)

    def _is_final(self, slot: int) -> bool:
        """See `Bucket._is_final`. Always true: a window may be long, and while it is in use comparing finds nothing. If
        the slot is still written to, a count that was lowered is raised again by the origin's next entry.
        """
        return True

    def _taken_and_refunded(self, slot: int) -> tuple[int, int]:
        """The tokens that all replicas took in a slot, and the highest refund mark."""
        by_slot = self._tokens_by_slot()
        return by_slot.get(slot, 0), by_slot.get(slot | REFUND, 0)

    def _is_past(self, slot: int) -> bool:
        exponent = slot_exponent(slot)
        if exponent == self._limit.exponent:
            return slot < self._slot
        # The window begins inside the slot and is less than twice as long as it.
        return slot_end_us(slot) + (2 << exponent) <= self.at_us


class SlidingWindow(_Window):
    """A replicated sliding window: counts the tokens admitted in the period that ends now."""

    __slots__ = (
        "_early_refunds_until_us",
        "_first_leaves_us",
        "_last_leaves_us",
        "_leaving",
        "_refunded_until_us",
        "_refunded_us",
    )

    def __init__(
        self, key: bytes, limit: WindowLimit, origin: Origin, now_us: int, journal: Journal | None = None
    ) -> None:
        super().__init__(key, limit, origin, now_us, journal)
        self._refunded_until_us = 0
        """The end of the last slot with a refund; 0 when there is none."""
        self._early_refunds_until_us = 0
        """The end of the last slot with refunds for takes that this replica has not received yet; 0 when there is none.
        """
        self._refunded_us = 0
        """When a refund was last given here, or received."""
        self._first_leaves_us = self._last_leaves_us = 0
        """When the first and the last slot that counts leave the period; 0 when no slot counts."""
        self._leaving: dict[int, int] | None = None
        """By when they leave the period, the next first, the tokens that count, of all replicas together: so whoever is
        denied again and again does not have the slots of each looked at. None until it is needed, after a recount, and
        as long as there are few slots.
        """

    def take(self, hits: int, now_us: int, *, always: bool = False) -> bool:
        self.advance(now_us)
        admitted = self.count + hits <= self._limit.requests
        if hits and (admitted or always):
            if self._is_own_slot_over():
                self._open_own_slot(slot_id(self.at_us, self._limit.exponent))
            before = self.count
            self._add(slot_end_us(self._own_slot) + self._limit.period_us, hits)
            self._write_own(hits)
            if self.at_us < self._early_refunds_until_us:
                self._recount()
            self._mark_if_urgent(self._limit, before, self.count)
        return admitted

    def would_admit(self, hits: int, now_us: int) -> bool:
        self.advance(now_us)
        return self.count + hits <= self._limit.requests

    def refund(self, tokens: int | None, now_us: int) -> int:
        """See `Bucket.refund`. The newest takes first, because older ones leave the period sooner anyway."""
        self.advance(now_us)
        given = self.count if tokens is None else min(tokens, self.count)
        left = given
        for slot, (taken, refunded) in sorted(self._by_slot().items(), reverse=True):
            part = min(left, taken - refunded)
            if part > 0 and self._leaves_us(slot) > self.at_us:
                self._write_refund(slot | REFUND, refunded + part)
                left -= part
        if given:
            self._refunded_us = self.at_us
            # `_recount` computes it again, if it is not 0.
            self._refunded_until_us = self.at_us
            self._recount()
        return given

    @property
    def full_in_us(self) -> int:
        """Microseconds until the last slot that counts leaves the period."""
        return max(0, self._last_leaves_us - self.at_us)

    def retry_after_us(self, hits: int) -> int:
        excess = self.count + hits - self._limit.requests
        if excess <= 0:
            return 0
        fits_us = self.at_us
        for leaves_us, tokens in self._leaving_in_order().items():
            fits_us = leaves_us
            excess -= tokens
            if excess <= 0:
                break
        return fits_us - self.at_us

    def left_within(self, us: int) -> int:
        """See `_Window.left_within`."""
        left = self._limit.requests - self.count
        for leaves_us, tokens in self._leaving_in_order().items():
            if leaves_us > self.at_us + us:
                break
            left += tokens
        return max(0, left)

    def _leaving_in_order(self) -> dict[int, int]:
        """See `_leaving`. Not to be changed."""
        leaving = self._leaving
        if leaving is None:
            leaving = {}
            for leaves_us, tokens in sorted(self._counting(self.at_us)):
                leaving[leaves_us] = leaving.get(leaves_us, 0) + tokens
            if self.looks > 1:
                self._leaving = leaving
        return leaving

    def advance(self, now_us: int) -> None:
        """Drop the slots that are wholly before the period that ends at `now_us`."""
        if now_us <= self.at_us - SET_BACK_US:
            self._go_back(now_us)
        self.at_us = max(self.at_us, now_us)
        if self._first_leaves_us and self.at_us >= self._first_leaves_us:
            self._recount()

    def merge(self, entries: Iterable[Entry], now_us: int) -> int:
        """See `Bucket.merge`. Past slots are ignored. Slots that begin later than `MAX_AHEAD_US` from now, or as far
        ahead as they would be kept, are refused.
        """
        self.advance(now_us)
        widest = self._widest(self._limit.exponent, MAX_WIDER_SLIDING_EXPONENT)
        news = 0
        again = False
        for entry in entries:
            slot = entry.slot
            if self._is_past(slot):
                continue
            exponent = slot_exponent(slot)
            if exponent > widest or self._is_ahead(slot):
                self._refuse(Refused.WIDE if exponent > widest else Refused.AHEAD)
                continue
            added = self._receive(entry)
            if added:
                news += 1
                if slot & REFUND:
                    self._refunded_us = self.at_us
                    self._refunded_until_us = max(self._refunded_until_us, slot_end_us(slot))
                leaves_us = self._leaves_us(slot)
                if added < 0 or slot & REFUND or slot < self._refunded_until_us:
                    again = True
                elif leaves_us > self.at_us:
                    self._add(leaves_us, added)
        if again:
            self._trim()
            self._recount()
        return news

    def set_limit(self, limit: AnyLimit, now_us: int) -> None:
        """Enforce another limit from now on. Takes within its period count, if their slots are still held."""
        assert isinstance(limit, WindowLimit)
        self.advance(now_us)
        former, self._limit = self._limit, limit
        # Requests with overrides of the same period may alternate, so this case must be cheap.
        if limit.period_us != former.period_us:
            self._close_own_slot()
            self._recount()

    def fold(self, now_us: int) -> int:
        """Tokens in the slots that are at least partly in the period that ends at `now_us`."""
        return sum([tokens for _, tokens in self._counting(now_us)])

    def is_written_since(self, since_us: int) -> bool:
        return self._refunded_us > since_us or super().is_written_since(since_us)

    def entries_since(self, origin: Origin, since_us: int) -> list[Entry]:
        """See `Bucket.entries_since`. After a refund all entries, since refunds are written to slots that are over."""
        return super().entries_since(origin, 0 if self._refunded_us > since_us else since_us)

    def settled(self, until_us: int, kept_until_us: int) -> Settled | None:
        """See `Bucket.settled`."""
        slots = [
            slot
            for slot in self._tokens_by_slot()
            if slot_end_us(slot) <= until_us and self._leaves_us(slot) > kept_until_us
        ]
        return Settled(0, sorted(slots)) if slots else None

    def _go_back(self, now_us: int) -> None:
        """The clock was set back. Drop slots that peers refuse now; their tokens count as taken now. What had left the
        period may be in it again, and leaves before them: it does not make up for them.
        """
        former_us, count = self.at_us, self.count
        self._take_new_origin()
        self.at_us = now_us
        self._close_own_slot()
        self._forget(self._is_ahead)
        tokens = count - self.fold(former_us)
        self._recount()
        if tokens > 0:
            slot = slot_id(now_us, self._limit.exponent)
            self._open_own_slot(slot)
            self._add(self._leaves_us(slot), tokens)
            self._write_own(tokens)

    def _counting(self, now_us: int) -> list[tuple[int, int]]:
        """The slots in the period that ends at `now_us`, each as (time at which it leaves the period, tokens)."""
        left = _left_of(self._by_slot()) if self._refunded_until_us else self._tokens_by_slot()
        return self._counting_of(left, now_us)

    def _counting_of(self, left: dict[int, int], now_us: int) -> list[tuple[int, int]]:
        """As `_counting`.

        Args:
            left: by slot, the tokens taken less refunds.
        """
        slots = [(self._leaves_us(slot), tokens) for slot, tokens in left.items()]
        return [(leaves_us, tokens) for leaves_us, tokens in slots if leaves_us > now_us and tokens > 0]

    def _by_slot(self) -> dict[int, tuple[int, int]]:
        """By slot, the tokens that all replicas took, and the highest refund mark."""
        by_slot = self._tokens_by_slot()
        return {
            slot: (by_slot.get(slot, 0), by_slot.get(slot | REFUND, 0)) for slot in {slot & ~REFUND for slot in by_slot}
        }

    def _leaves_us(self, slot: int) -> int:
        """When a slot is wholly out of the period.

        A wider slot, from before the limit changed, counts as if it had the width of the limit's slots. A narrower one
        may be of a limit with a shorter period; then it leaves when peers that still have that limit drop it.
        """
        end_us = slot_start_us(slot) + (1 << min(slot_exponent(slot), self._limit.exponent))
        return min(end_us + self._limit.period_us, slot_end_us(slot) + _kept_us(slot))

    def _add(self, leaves_us: int, tokens: int) -> None:
        """Count tokens of a slot that leaves the period at `leaves_us`."""
        self.count += tokens
        leaving = self._leaving
        if leaving is not None:
            if leaves_us in leaving or leaves_us > self._last_leaves_us:
                leaving[leaves_us] = leaving.get(leaves_us, 0) + tokens
            else:
                # It is not the last. For each slot that happens once at most.
                self._leaving = None
        first_us = self._first_leaves_us
        self._first_leaves_us = min(first_us, leaves_us) if first_us else leaves_us
        self._last_leaves_us = max(self._last_leaves_us, leaves_us)

    def _recount(self) -> None:
        self._forget(self._is_past)
        self._leaving = None
        self._first_leaves_us = self._last_leaves_us = 0
        if self._refunded_until_us:
            by_slot = self._by_slot()
            self._find_refunds(by_slot)
            left = _left_of(by_slot)
        else:
            left = self._tokens_by_slot()
        self.count = 0
        for leaves_us, tokens in self._counting_of(left, self.at_us):
            self._add(leaves_us, tokens)

    def _find_refunds(self, by_slot: dict[int, tuple[int, int]]) -> None:
        self._refunded_until_us = self._early_refunds_until_us = 0
        for slot, (taken, given) in by_slot.items():
            if given:
                self._refunded_until_us = max(self._refunded_until_us, slot_end_us(slot))
            if given > taken:
                self._early_refunds_until_us = max(self._early_refunds_until_us, slot_end_us(slot))

    def _is_past(self, slot: int) -> bool:
        return slot_end_us(slot) + _kept_us(slot) <= self.at_us

    def _is_ahead(self, slot: int) -> bool:
        """True when it begins later than `MAX_AHEAD_US` from now, or as far ahead as it would be kept."""
        return slot_start_us(slot) > self.at_us + min(_kept_us(slot), MAX_AHEAD_US)


def _left_of(by_slot: dict[int, tuple[int, int]]) -> dict[int, int]:
    return {slot: taken - given for slot, (taken, given) in by_slot.items()}


def _slot_of_window(limit: WindowLimit, time_us: int) -> int:
    """The slot in which the window of `time_us` begins. A window is never shorter than its slot, so each has
    its own.
    """
    return slot_id(time_us - time_us % limit.period_us, limit.exponent)


def _kept_us(slot: int) -> int:
    """The longest period that a limit with slots of this width can have."""
    return 2 * SLOTS_PER_PERIOD << slot_exponent(slot)
