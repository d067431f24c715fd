"""A replicated token bucket: the level as a fold over what was taken and when.

Theory of operation. The deficit D = capacity - level drains at the refill rate, stops at zero, and rises by what is
taken. In closed form, the reflected process of Lindley and Skorokhod:

    D(t) = max(0, sup over s <= t of [taken in (s, t] - rate * (t - s)])

A refund lowers D at once, to no less than 0. In one slot the takes come first, then the refunds.

Everything that touches D lives in this file. Units: time in microseconds of wall clock, deficits scaled by the limit's
`period_us` (so they drain `tokens` a microsecond), consumption in whole tokens. The live pair (deficit at `at_us`,
`full_at_us`) makes a take O(1). Own takes count at their exact time, a remote slot at its middle, never after now. A
remote slot from before `full_at_us` is first paid by the refill that was spilled since then (`spilled.py`); only what
is left of it is added.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from ratelimit_sidecar.crdt.bucket import NO_SLOT, SET_BACK_US, Base, Bucket, Entry, Origin, Settled
from ratelimit_sidecar.crdt.journal import Journal, Refused
from ratelimit_sidecar.crdt.limit import MAX_AHEAD_US, MAX_WIDER_EXPONENT, MIN_HORIZON_US, AnyLimit, TokenBucketLimit
from ratelimit_sidecar.crdt.slot import REFUND, placed_us, slot_end_us, slot_exponent, slot_id
from ratelimit_sidecar.crdt.spilled import SpilledRefill

SEAL_BATCH_SLOTS: Final = 16
"""Sealing sorts slots, so a busy bucket waits until this many slots are behind the horizon."""

MIN_BASE_AGE_US: Final = MIN_HORIZON_US // 2
"""A peer's base with a boundary younger than this is refused. Replicas seal only slots older than the horizon; half of
the shortest horizon is left for clocks that differ.
"""


EARLY_REFUND_US: Final = 2_000_000
"""What is given back before its take is heard of is given so long: that comes within a flush and a round trip, or two
ticks of a fabric.
"""


class _EarlyRefund(NamedTuple):
    tokens: int
    until_us: int


class TokenBucket(Bucket):
    """A replicated token bucket. `take` seals old slots as needed; call `is_idle` on unused ones so that they seal too.

    `fold` is the specification. Tests hold the O(1) path (`deficit`, `full_at_us`) to it.
    """

    __slots__ = (
        "_base_deficit",
        "_base_us",
        "_early_refund",
        "_former",
        "_kept_until_us",
        "_limit",
        "_peak",
        "_refunded_until_us",
        "_spilled",
        "deficit",
        "full_at_us",
    )

    def __init__(
        self, key: bytes, limit: TokenBucketLimit, origin: Origin, now_us: int, journal: Journal | None = None
    ) -> None:
        super().__init__(key, origin, now_us, journal)
        self._limit = limit
        self._base_us = limit.boundary_us(now_us)
        self._base_deficit = 0
        self.deficit = 0
        """The live scaled deficit as of `at_us`; above the capacity it is debt."""
        self.full_at_us = now_us
        """The last time at which the deficit was 0. No refill was spilled since, so tokens taken later simply add to
        the deficit, however late they are reported.
        """
        self._peak = 0
        """An upper bound on the deficit since the base. If it exceeds the debt ceiling, debt may have been cut, and the
        slots have to be folded again.
        """
        self._spilled: SpilledRefill | None = None
        """None as long as the bucket has no entries of peers."""
        self._refunded_until_us = 0
        """The end of the last slot with a refund. The refund may pay for earlier takes that are reported late, so these
        have the slots folded again.
        """
        self._kept_until_us = 0
        """It is not dropped as idle before this time. An own slot was sealed before it was over, because the limit had
        wider slots then; or slots were sealed early, and peers still hold them (see `shorten`).
        """
        self._early_refund: _EarlyRefund | None = None
        """What was given back, and is still to be taken off what peers report. No replica knows of another's."""
        self._former: _Former | None = None
        """Of the limits it has had, the one that takes longest to refill what was taken under it."""

    @property
    def limit(self) -> TokenBucketLimit:
        return self._limit

    def take(self, hits: int, now_us: int, *, always: bool = False) -> bool:
        """See `Bucket.take`. Denied hits change nothing that replicates. With `always` they become debt."""
        self.advance(now_us)
        limit = self._limit
        charge = hits * limit.period_us
        admitted = self.deficit + charge <= limit.scaled_capacity
        if hits and (admitted or always):
            if self._is_own_slot_over():
                self._open_slot_of_now()
            before = self.deficit
            deficit = before + charge
            deficit = min(deficit, limit.debt_ceiling)
            self._peak = max(self._peak, deficit)
            self.deficit = deficit
            self._write_own(hits)
            self._mark_if_urgent(limit, before, deficit)
        return admitted

    def would_admit(self, hits: int, now_us: int) -> bool:
        self.advance(now_us)
        return self.deficit + hits * self._limit.period_us <= self._limit.scaled_capacity

    def refund(self, tokens: int | None, now_us: int) -> int:
        """See `Bucket.refund`. It covers the fold's deficit, so that every replica reaches the same level."""
        self.advance(now_us)
        self._seal_when_due()
        period_us = self._limit.period_us
        slot = self._last_slot() | REFUND
        missing = -(-max(self.deficit, self._deficit_at(slot)) // period_us)
        given = missing if tokens is None else min(tokens, missing)
        if given > 0:
            self._write_refund(slot, self._own_refund(slot) + given)
            self._refunded_until_us = max(self._refunded_until_us, slot_end_us(slot))
            self.deficit -= given * period_us
            if self.deficit <= 0:
                self.deficit, self.full_at_us = 0, self.at_us
        return given

    def give_back(self, tokens: int, now_us: int) -> int:
        given = self.refund(tokens, now_us)
        if given < tokens and self.journal is not None:
            early = self._early_refund
            before = early.tokens if early is not None and early.until_us > self.at_us else 0
            until_us = self.at_us + EARLY_REFUND_US
            # No more is held at once. What was held long ago has refilled, and would be a burst beyond the capacity.
            self._early_refund = _EarlyRefund(min(before + tokens - given, self._limit.capacity), until_us)
            self._kept_until_us = max(self._kept_until_us, until_us)
            self._note_use(self.journal)
        return given

    def _refund_early(self, early: _EarlyRefund) -> None:
        """Take what was given back off what a peer has just reported."""
        left = 0
        # The clock may have been set back.
        if 0 < early.until_us - self.at_us <= EARLY_REFUND_US:
            left = early.tokens - self.refund(early.tokens, self.at_us)
        self._early_refund = _EarlyRefund(left, early.until_us) if left else None

    def _last_slot(self) -> int:
        """The slot to write a refund to: the current one, or a later one with takes, which an earlier refund would not
        cover.
        """
        exponent = self._limit.exponent
        last = self._slot_of_now()
        for slot in self._tokens_by_slot():
            if placed_us(slot, exponent) > placed_us(last, exponent):
                last = slot
        return last

    def _deficit_at(self, slot: int) -> int:
        """The scaled deficit at the instant where a refund in `slot` counts."""
        middle_us = min(placed_us(slot, self._limit.exponent), self.at_us)
        events = _events(self._limit, self._tokens_by_slot().items(), middle_us)
        return _fold(self._limit, self.base, events, middle_us, None).deficit

    @property
    def remaining(self) -> int:
        """Whole tokens left at `at_us`; 0 when in debt."""
        return max(0, (self._limit.scaled_capacity - self.deficit) // self._limit.period_us)

    @property
    def debt(self) -> int:
        return max(0, -((self._limit.scaled_capacity - self.deficit) // self._limit.period_us))

    @property
    def full_in_us(self) -> int:
        """Microseconds from `at_us` until the bucket is full again, rounded up."""
        return -(-self.deficit // self._limit.tokens)

    def retry_after_us(self, hits: int) -> int:
        if hits > self._limit.capacity:
            return self.full_in_us
        missing = self.deficit + hits * self._limit.period_us - self._limit.scaled_capacity
        return max(0, -(-missing // self._limit.tokens))

    def advance(self, now_us: int) -> None:
        """Drain the live deficit up to `now_us`."""
        elapsed_us = now_us - self.at_us
        if elapsed_us > 0:
            deficit = self.deficit - elapsed_us * self._limit.tokens
            if deficit <= 0:
                if self._spilled is not None and deficit:
                    self._spilled.note(-deficit, now_us)
                deficit = 0
                self.full_at_us = now_us
            self.deficit = deficit
            self.at_us = now_us
        elif elapsed_us <= -SET_BACK_US:
            self._go_back(now_us)

    def merge(self, entries: Iterable[Entry], now_us: int) -> int:
        """Join entries of a peer; idempotent, in any order.

        Slots that began before the base or the horizon are ignored, because they are in somebody's base. Slots that
        begin later than `MAX_AHEAD_US` from now are refused: no clock is that wrong, and they would count until then.

        Returns:
            The number of entries that were new.
        """
        self.advance(now_us)
        self._seal_past_horizon()
        limit = self._limit
        oldest_us = max(self._base_us, limit.boundary_us(self.at_us))
        # An id is its slot's start with the exponent in the low bits.
        newest_us = self.at_us + MAX_AHEAD_US
        widest = self._widest(limit.exponent, MAX_WIDER_EXPONENT)
        news = 0
        too_many = refold = False
        for entry in entries:
            slot = entry.slot
            if slot < oldest_us:
                continue
            if slot > newest_us or slot_exponent(slot) > widest:
                self._refuse(Refused.AHEAD if slot > newest_us else Refused.WIDE)
                continue
            added = self._receive(entry)
            if not added:
                continue
            news += 1
            if added < 0:
                too_many = refold = True
            if slot & REFUND:
                self._refunded_until_us = max(self._refunded_until_us, slot_end_us(slot))
            refold = refold or not self._place(slot, added * limit.period_us)
        if too_many:
            self._trim()
        if refold:
            self._recount()
        early = self._early_refund
        if news and early is not None:
            self._refund_early(early)
        # Not before: what comes in may be older than the shorter horizon, and in nobody's base.
        self._shorten_while_crowded()
        return news

    def _place(self, slot: int, charge: int) -> bool:
        """Add what a peer took in a slot to the live deficit, as of the middle of the slot.

        Returns:
            False if all slots have to be folded again instead.
        """
        limit, spilled = self._limit, self._spilled
        self._peak += charge
        if slot < self._refunded_until_us or self._peak > limit.debt_ceiling:
            return False
        entry_us = placed_us(slot, limit.exponent)
        if entry_us >= self.full_at_us:
            self.deficit += charge
            return True
        # A narrower slot, from before the limit changed, has its middle elsewhere.
        if spilled is None or slot_exponent(slot) < limit.exponent:
            return False
        unpaid = spilled.pay(charge, entry_us)
        if unpaid is None:
            return False
        self.deficit += unpaid
        return True

    @property
    def base(self) -> Base:
        return Base(self._base_us, self._base_deficit)

    @property
    def base_to_send(self) -> Base | None:
        """See `Bucket.base_to_send`. A base without deficit is sent, too, if it is ahead of the horizon, as after a
        limit with a shorter one: it says from when on slots are missing here.
        """
        is_ahead = self._base_us > self._limit.boundary_us(self.at_us)
        return self.base if self._base_deficit or is_ahead else None

    def merge_base(self, other: Base, now_us: int) -> bool:
        """Join a peer's base: advance the older to the newer boundary, keep the larger deficit.

        Args:
            other: its deficit is scaled by this bucket's `period_us`. It is ignored when its boundary is younger than
                `MIN_BASE_AGE_US`: then the peer's clock is seconds wrong.

        Returns:
            True when the base changed.
        """
        self.advance(now_us)
        if other.boundary_us > self.at_us - MIN_BASE_AGE_US:
            return False
        before = self.base
        boundary_us = max(before.boundary_us, other.boundary_us)
        if boundary_us > before.boundary_us:
            self._seal_before(boundary_us)
        # Cut before it is drained, so that the rest does not depend on how far this replica has sealed.
        deficit = other.deficit
        if deficit > self._limit.debt_ceiling:
            self._refuse(Refused.DEBT)
            deficit = self._limit.debt_ceiling
        drained = deficit - (boundary_us - other.boundary_us) * self._limit.tokens
        self._base_deficit = max(drained, self._base_deficit)
        if self.base == before:
            return False
        self._recount()
        return True

    def seal(self, now_us: int) -> None:
        """Fold the slots behind the horizon into the base and drop them."""
        self.advance(now_us)
        self._seal_up_to(self._limit.boundary_us(self.at_us))

    def _seal_up_to(self, boundary_us: int) -> None:
        if boundary_us > self._base_us:
            self._seal_before(boundary_us)
            if self._peak >= self._limit.debt_ceiling:
                # The peak may be behind the base now. And debt that was cut when its slot arrived is now cut at the
                # slot's middle.
                self._recount()

    def shorten(self, now_us: int, shift: int) -> None:
        """See `Bucket.shorten`. Peers are told the base, and seal up to it as well."""
        self.advance(now_us)
        limit = self._limit
        boundary_us = limit.boundary_us(self.at_us, shift)
        # In batches, since until it is told of the base a peer seems to have something else.
        if self.slots and boundary_us - self._base_us >= max(2, SEAL_BATCH_SLOTS >> shift) << limit.exponent:
            self._seal_up_to(boundary_us)

    def is_idle(self, now_us: int) -> bool:
        """True when the bucket is full and has no slots that count or are yet to be sent: then it equals an absent one.

        An own slot must also be over, because a new bucket would count it from zero, below what peers already have.
        """
        self.advance(now_us)
        if self.deficit or self._unsent:
            self._seal_when_due()
            return False
        # Sealing first would be wasted: most buckets are dropped now, or were used within the horizon.
        boundary_us = self._limit.boundary_us(self.at_us)
        for slot in self._slots():
            if slot >= boundary_us or slot_end_us(slot) > self.at_us:
                return False
        return self.at_us >= self._kept_until_us and (self._former is None or self.at_us >= self._former.repaid_at_us)

    def set_limit(self, limit: AnyLimit, now_us: int) -> None:
        """See `Bucket.set_limit`. Takes within the horizon still count, at the new rate. What was taken earlier, and a
        former limit has not refilled yet, still counts if the horizon becomes longer again.
        """
        assert isinstance(limit, TokenBucketLimit)
        self.advance(now_us)
        replaced, former = _Former(self._limit, self.at_us + self.full_in_us), self._former
        scaled = -(-self._base_deficit * limit.period_us // self._limit.period_us)
        self._base_deficit = min(scaled, limit.debt_ceiling)
        self._limit = limit
        # The next take opens a slot of the new width.
        self._close_own_slot()
        self._recount()
        if former is not None and limit.horizon_us > replaced.limit.horizon_us:
            self._owe(former)
        if former is None or former.repaid_at_us < replaced.repaid_at_us:
            self._former = replaced

    def _owe(self, former: _Former) -> None:
        """Let no more be left than if the former limit, and its refill, had stayed. It is told to peers with the base,
        of which the largest counts: they owe the same."""
        limit = self._limit
        drained_us = max(0, former.repaid_at_us - self.at_us)
        owed = min(-(-drained_us * former.limit.tokens * limit.period_us // former.limit.period_us), limit.debt_ceiling)
        if owed <= self.deficit:
            return
        taken = sum([-tokens if slot & REFUND else tokens for slot, tokens in self._tokens_by_slot().items()])
        since_us = self.at_us - self._base_us
        self._base_deficit = max(self._base_deficit, owed + since_us * limit.tokens - taken * limit.period_us)
        self._recount()

    def fold(self, now_us: int) -> int:
        """The scaled deficit at `now_us` as a pure function of the replicated state: the specification of the live one.

        Replicas with equal state and limit return equal integers, however far each has sealed.
        """
        events = _events(self._limit, self._tokens_by_slot().items(), now_us)
        return _fold(self._limit, self.base, events, now_us, None).deficit

    def settled(self, until_us: int, kept_until_us: int) -> Settled | None:
        """See `Bucket.settled`. No replica seals slots after the boundary of `kept_until_us` before then. So replicas
        compare the deficit at that boundary, and after it the entries of slots that are over.
        """
        limit = self._limit
        from_us = max(limit.boundary_us(kept_until_us), self._base_us)
        earlier, slots = [], []
        for slot, tokens in self._tokens_by_slot().items():
            if slot < from_us:
                earlier.append((slot, tokens))
            elif slot_end_us(slot) <= until_us:
                slots.append(slot)
        deficit = _fold(limit, self.base, _events(limit, earlier, from_us - 1), from_us, None).deficit
        if not slots and self._kept_until_us <= kept_until_us and deficit <= (kept_until_us - from_us) * limit.tokens:
            # It will be full by then, so some replicas have dropped it.
            return None
        slots.sort()
        return Settled(deficit, slots)

    def _go_back(self, now_us: int) -> None:
        """The clock was set back. Drop slots that peers refuse (see `merge`), and a base whose boundary is still to
        come. The tokens by which the level would rise count as taken now.
        """
        limit, deficit = self._limit, self.deficit
        boundary_us = limit.boundary_us(now_us)
        newest_us = now_us + MAX_AHEAD_US
        self._take_new_origin()
        self._forget(lambda slot: slot > newest_us)
        if self._base_us > boundary_us:
            self._base_us, self._base_deficit = boundary_us, 0
        if self._former is not None:
            self._former = self._former._replace(repaid_at_us=self._former.repaid_at_us + now_us - self.at_us)
        self.at_us = now_us
        self._close_own_slot()
        self._kept_until_us = 0
        self._recount()
        tokens = -(-(deficit - self.deficit) // limit.period_us)
        if tokens > 0:
            self._open_slot_of_now()
            self._write_own(tokens)
            self.deficit += tokens * limit.period_us

    def _seal_when_due(self) -> None:
        """Seal a busy bucket now and then, so that it holds few slots even if its owner seldom calls `seal`."""
        self._seal_past_horizon()
        self._shorten_while_crowded()

    def _seal_past_horizon(self) -> None:
        limit = self._limit
        if self.at_us - self._base_us > limit.horizon_us + (SEAL_BATCH_SLOTS << limit.exponent):
            self.seal(self.at_us)

    def _shorten_while_crowded(self) -> None:
        if self.journal is not None and self.journal.horizon_shift and not self._is_restoring:
            self.shorten(self.at_us, self.journal.horizon_shift)

    def _open_slot_of_now(self) -> None:
        """Open the current slot for writing."""
        self._seal_when_due()
        self._open_own_slot(self._slot_of_now())

    def _slot_of_now(self) -> int:
        """The slot to write to. If the regular one began before the base, a narrower one that began after it.

        The regular one may have been sealed and dropped; counted again from zero it would be below what peers have.
        This happens only after a change of the limit. A slot that begins after the base was never sealed.
        """
        exponent = self._limit.exponent
        while slot_id(self.at_us, exponent) < self._base_us:
            exponent -= 1
        return slot_id(self.at_us, exponent)

    def _recount(self) -> None:
        self._spilled = SpilledRefill(self._limit, self._base_us) if self._received is not None else None
        events = _events(self._limit, self._tokens_by_slot().items(), self.at_us)
        folded = _fold(self._limit, self.base, events, self.at_us, self._spilled)
        self.deficit, self.full_at_us, self._peak = folded.deficit, folded.full_at_us, folded.peak

    def _seal_before(self, boundary_us: int) -> None:
        """Move the base up to `boundary_us`, and drop the slots before it."""
        own = [slot for slot in (self._own_slot, *(self._own or ())) if NO_SLOT < slot < boundary_us]
        forgotten = self._forget(lambda slot: slot < boundary_us)
        self._base_deficit = _sealed(self._limit, self.base, forgotten, boundary_us)
        self._base_us = boundary_us
        if self._received is None:
            self._spilled = None
        if boundary_us > self._limit.boundary_us(self.at_us) and self.journal is not None:
            self._kept_until_us = max(self._kept_until_us, boundary_us + self._limit.horizon_us)
        for slot in own:
            self._kept_until_us = max(self._kept_until_us, slot_end_us(slot))


class _Former(NamedTuple):
    """A limit that was replaced."""

    limit: TokenBucketLimit
    repaid_at_us: int
    """When its refill would have repaid all that was taken under it."""


class _Folded(NamedTuple):
    """The result of a fold."""

    deficit: int
    full_at_us: int
    """The last time at which the deficit was 0."""
    peak: int
    """The largest deficit during the fold, after cuts."""


class Sealing:
    """Brings saved state up to date. A live bucket ignores slots older than its horizon, since they are in somebody's
    base; saved ones were never folded, so they are folded here. Feed every part to `add`, join what it returns, and
    last join `base`.

    Args:
        base: scaled by the period of `limit`; `NO_BASE` if none was written down.
        ignored_before_us: slots that began earlier are ignored by the live bucket, as one that was sealed early.
    """

    __slots__ = ("_base", "_boundary_us", "_earlier", "_limit")

    def __init__(self, limit: TokenBucketLimit, base: Base, now_us: int, ignored_before_us: int = 0) -> None:
        self._limit = limit
        self._base = base
        self._boundary_us = max(limit.boundary_us(now_us), base.boundary_us, ignored_before_us)
        self._earlier: dict[int, int] = {}

    def add(self, entries: Iterable[Entry]) -> list[Entry]:
        """Add entries, each slot of an origin once in all; returns those that are left."""
        later = []
        oldest_us, boundary_us, earlier = self._base.boundary_us, self._boundary_us, self._earlier
        for entry in entries:
            slot = entry.slot
            if slot >= boundary_us:
                later.append(entry)
            elif slot >= oldest_us:
                earlier[slot] = earlier.get(slot, 0) + entry.tokens
        return later

    @property
    def base(self) -> Base:
        """The base of all that was added."""
        return Base(self._boundary_us, _sealed(self._limit, self._base, self._earlier, self._boundary_us))


def _sealed(limit: TokenBucketLimit, base: Base, tokens_by_slot: dict[int, int], boundary_us: int) -> int:
    """The scaled deficit at a new boundary, before which these slots began."""
    # The boundary of a peer with narrower slots may lie inside one of these. That slot counts before it, too.
    events = _events(limit, tokens_by_slot.items(), boundary_us - 1)
    return _fold(limit, base, events, boundary_us, None).deficit


def _events(limit: TokenBucketLimit, slots: Iterable[tuple[int, int]], last_us: int) -> list[tuple[int, int]]:
    """Events as (time, tokens given back), in time order, none after `last_us`. Takes are negative, so that they come
    before the refunds of the same instant. Takes of several origins in a slot may be one event or several.
    """
    exponent = limit.exponent
    events = [(min(placed_us(slot, exponent), last_us), tokens if slot & REFUND else -tokens) for slot, tokens in slots]
    events.sort()
    return events


def _fold(
    limit: TokenBucketLimit, base: Base, events: Iterable[tuple[int, int]], now_us: int, spilled: SpilledRefill | None
) -> _Folded:
    """Fold a base and `events` (see `_events`) up to `now_us`, and note spilled refill.

    The deficit is cut to the debt ceiling at every event, so the result does not depend on whether, and in how many
    steps, slots were sealed.
    """
    at_us, deficit = base.boundary_us, base.deficit
    full_at_us = at_us
    peak = deficit
    tokens, period_us, debt_ceiling = limit.tokens, limit.period_us, limit.debt_ceiling
    for event_us, given in events:
        if event_us > at_us:
            # After what was given back in the slot: what was held and given back is no debt.
            deficit = min(deficit, debt_ceiling)
        deficit -= (event_us - at_us) * tokens
        if deficit <= 0:
            if spilled is not None and deficit:
                spilled.note(-deficit, event_us)
            deficit = 0
            full_at_us = event_us
        deficit -= given * period_us
        if deficit < 0:
            # More was given back than the deficit.
            deficit = 0
            full_at_us = event_us
        peak = max(peak, deficit)
        at_us = event_us
    deficit = min(deficit, debt_ceiling)
    deficit -= (now_us - at_us) * tokens
    if deficit <= 0:
        if spilled is not None and deficit:
            spilled.note(-deficit, now_us)
        return _Folded(0, now_us, peak)
    return _Folded(deficit, full_at_us, peak)
