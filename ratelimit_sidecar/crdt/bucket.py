"""What was taken, by whom and when: the replicated part of a bucket, a grow-only counter cut into slots of time. (Those
of strict limits have none: `strict.py`.)

    taken[origin][slot] -> tokens

Only the origin writes its entries and counts never fall, so the join is the pointwise maximum (a state-based
G-Counter, Shapiro et al. 2011). Every algorithm is a fold over this one state: `token_bucket.py` and `window.py`.
A slot names its own width, so slots from before and after a change of the limit live side by side. The algorithm
decides which of them count, and when.

Refunds are a second grow-only counter in the same maps, under ids of their own (`slot.REFUND`). So a refund never
lowers what was taken.

Most buckets hold one or two slots, and there may be a million. So the own slot being written is two attributes, and
the maps are created when they are needed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Final, NamedTuple

from ratelimit_sidecar.crdt.journal import Journal, Refused
from ratelimit_sidecar.crdt.limit import MAX_EXPONENT, AnyLimit
from ratelimit_sidecar.crdt.places import RuleRoom
from ratelimit_sidecar.crdt.slot import slot_end_us
from ratelimit_sidecar.crdt.untracked_dict import untrack

NO_SLOT: Final = -1

SET_BACK_US: Final = 5_000_000
"""A time that is this much before the last one means that the clock was set back. If it is less, the bucket stands
still until the last time is reached again.

It is half of the shortest horizon, so that a bucket that stands still meanwhile is still shared with peers.
"""

MAX_UNSENT_SLOTS: Final = 1_024
"""At this length the list of slots to send is cleared of those that were dropped; fewer than 700 slots are held."""

MAX_ORIGINS: Final = 1_024
"""The most origins in one bucket besides connected peers: a mesh of 256 nodes, each restarted three times."""

MAX_RECEIVED: Final = 16_384
"""The most entries of other origins in one bucket; beyond them only entries of connected peers are accepted. So a
recount from all entries takes some milliseconds at most, whatever a member invents.
"""

LEAST_ORIGINS: Final = 8
"""A bucket hears of so many connected peers also when all buckets together hold too many entries
(`Journal.max_received_bytes`)."""

ORIGIN_BYTES: Final = 230
ENTRY_BYTES: Final = 80
"""About the memory that another origin takes in a bucket, and besides each of its entries."""

SUMMED_ENTRIES: Final = 256
"""From this many entries of other origins on, a bucket also keeps their sum for each slot. A recount (at each delta of
a bucket that is in debt, or that tokens are given back to) then costs as much as there are slots, however many replicas
take in each. In steady use five replicas or more have so many entries; the sums take a quarter more memory.
"""

MAX_SLOTS: Final = 640
"""The most slots of one origin in one bucket; the narrowest slots fill a horizon with 627. If there are more, the
newest are kept, so the order of arrival makes no difference.
"""

FINAL_US: Final = 2_000_000
"""When a slot has been over for this long, its origin no longer writes to it, unless its clock is further behind."""

SLOTS_A_LOOK: Final = 16
"""`Bucket.looks` counts one look more for this many slots: to seal them takes as long as to look at a bucket, 2 us."""

RECOUNT: Final = -1
"""Returned by `_receive` instead of a count: the origin now has too many slots, and the caller must trim and recount.
"""


class Origin(NamedTuple):
    """One life of one replica. A restarted node is a new origin, so the counts of an origin never fall."""

    node: str
    incarnation: int
    """Random, drawn at start; 1 to 2**64 - 1."""


class Base(NamedTuple):
    """All slots that began before `boundary_us`, folded into the scaled deficit at that instant."""

    boundary_us: int
    deficit: int


NO_BASE: Final = Base(0, 0)


class Entry(NamedTuple):
    """The tokens that one origin took or gave back in one slot: the unit of replication."""

    origin: Origin
    slot: int
    tokens: int


class Settled(NamedTuple):
    """The part of a bucket's state that replicas can compare.

    Args:
        deficit: the older entries, folded into one number by the algorithm; 0 when they do not count.
        slots: those whose entries, of all origins, are part of it; in order.
    """

    deficit: int
    slots: list[int]


class Bucket(ABC):
    """One limit on one key, as one replica sees it; a subclass knows how much of it is left.

    Args:
        key: canonical bytes naming the bucket on every replica.
        origin: this replica; its entries are the ones `take` writes.
        now_us: by the clock of its kind of bucket, here and in all calls. A later call with a smaller one counts as the
            last, or as a clock that was set back (see `SET_BACK_US`).
        journal: the bucket appends itself to it when own entries change (see `drain_changed_slots`). None for a bucket
            that is never replicated.
    """

    __slots__ = (
        "_own",
        "_own_slot",
        "_own_slot_unsent",
        "_own_tokens",
        "_received",
        "_received_entries",
        "_received_tokens",
        "_unsent",
        "at_us",
        "journal",
        "key",
        "origin",
        "room",
    )

    def __init__(self, key: bytes, origin: Origin, now_us: int, journal: Journal | None = None) -> None:
        self.key = key
        self.at_us = now_us
        """The time of the last call."""
        self.origin = origin
        self.journal = journal
        self.room: RuleRoom | None = None
        """That of its rule, if a store has made it."""
        self._own_slot = NO_SLOT
        """The slot that is open, with `_own_tokens` in it; all others are in `_own`."""
        self._own_tokens = 0
        self._own_slot_unsent = False
        self._own: dict[int, int] | None = None
        self._received: dict[Origin, dict[int, int]] | None = None
        """Slots of all other origins; none of the dicts in it is empty."""
        self._received_entries = 0
        """The number of slots in `_received`."""
        self._received_tokens: dict[int, int] | None = None
        """The tokens in `_received` by slot, all origins together (see `_together`); None while there are few entries
        (`SUMMED_ENTRIES`), or few of a slot."""
        self._unsent: list[int] | None = None
        """Own slots written since `drain_changed_slots`."""

    @property
    def is_replicated(self) -> bool:
        """True if its entries are sent to peers, and those of peers joined: not in strict and in local buckets."""
        return self.journal is not None

    @property
    @abstractmethod
    def limit(self) -> AnyLimit:
        """The limit that it enforces; see `set_limit`."""

    @abstractmethod
    def take(self, hits: int, now_us: int, *, always: bool = False) -> bool:
        """Admit and charge `hits` tokens when they are left; O(1).

        Args:
            hits: 0 or more. 0 checks and charges nothing.
            always: charge hits even if they are denied.

        Returns:
            True when admitted.
        """

    @abstractmethod
    def would_admit(self, hits: int, now_us: int) -> bool:
        """Return what `take` would return, without charging anything.

        A strict bucket that would deny them notes the hits as demand, so that peers are asked.
        """

    def refund(self, _tokens: int | None, _now_us: int) -> int:
        """Make tokens that were taken available again, here and on every peer, up to a full bucket.

        Args:
            _tokens: at least 1; None to fill the bucket.

        Returns:
            How many tokens were given back. A strict bucket gives none, since the levels of all members together would
            then exceed the limit.
        """
        return 0

    def give_back(self, tokens: int, now_us: int) -> int:
        """As `refund`, of what a request had taken, perhaps elsewhere. A token bucket gives back for some time what it
        has not heard of yet; the result does not count that.
        """
        return self.refund(tokens, now_us)

    @property
    @abstractmethod
    def remaining(self) -> int:
        """Whole tokens left at `at_us`; 0 when more was taken than the limit."""

    @property
    @abstractmethod
    def debt(self) -> int:
        """Whole tokens taken beyond the limit, rounded up, as of `at_us`."""

    @property
    @abstractmethod
    def full_in_us(self) -> int:
        """Microseconds from `at_us` until all tokens are there again, rounded up."""

    @abstractmethod
    def merge(self, entries: Iterable[Entry], now_us: int) -> int:
        """Join entries of a peer; idempotent, in any order.

        Returns:
            The number of entries that told something new.
        """

    def correct_by_sender(self, sender: Origin, entries: Iterable[Entry], now_us: int) -> bool:
        """Lower counts of `sender` to what it reports itself; other peers may have reported more.

        Only counts of slots that are over are lowered: they are final, so replicas end up equal.

        The caller passes what the sender itself has sent, on its newest stream and in a frame that nothing has
        overtaken (`DeltasReader.apply_steps`): an older report would lower a count that is right.

        Returns:
            True when something changed.
        """
        slots = self._received.get(sender) if self._received is not None else None
        if slots is None:
            return False
        self.advance(now_us)
        is_changed = False
        for origin, slot, tokens in entries:
            held = slots.get(slot, 0)
            if 0 < tokens < held and origin == sender and self._is_final(slot):
                slots[slot] = tokens
                self._note_received(slot, held, tokens)
                is_changed = True
        if is_changed:
            self._recount()
        return is_changed

    def _is_final(self, slot: int) -> bool:
        """True when its origin writes to the slot no more."""
        return slot_end_us(slot) + FINAL_US <= self.at_us

    @abstractmethod
    def _recount(self) -> None:
        """Compute the live values again from all entries."""

    @abstractmethod
    def retry_after_us(self, hits: int) -> int:
        """Microseconds from `at_us` until `hits` would be admitted if nobody took any more. If `hits` exceed the
        capacity: until all tokens are there.
        """

    @abstractmethod
    def advance(self, now_us: int) -> None:
        """Let time pass up to `now_us`."""

    @abstractmethod
    def set_limit(self, limit: AnyLimit, now_us: int) -> None:
        """Enforce another limit of the same algorithm from now on, and keep what was taken."""

    @abstractmethod
    def seal(self, now_us: int) -> None:
        """Drop slots that are past the horizon; a token bucket folds them into its base."""

    def shorten(self, _now_us: int, _shift: int) -> None:
        """Seal what is older than a shorter horizon (see `TokenBucketLimit.boundary_us`), if that is worth it. Windows
        cannot."""
        return

    @abstractmethod
    def is_idle(self, now_us: int) -> bool:
        """True when the bucket equals an absent one: all tokens are there, and no peer could miss one of its
        entries.
        """

    @abstractmethod
    def fold(self, now_us: int) -> int:
        """How much counts against the limit at `now_us`, as a pure function of the replicated state.

        This is the specification; tests compare the O(1) path with it. Replicas with equal state and limit return equal
        integers. The unit depends on the algorithm.
        """

    @property
    def base(self) -> Base:
        """The deficit of the slots that were sealed. Windows need none."""
        return NO_BASE

    @property
    def base_to_send(self) -> Base | None:
        """The base to send to a peer; None when the peer needs none."""
        return None

    def merge_base(self, _other: Base, _now_us: int) -> bool:
        """Join a peer's base.

        Returns:
            True when something changed.
        """
        return False

    @property
    def taken(self) -> dict[Origin, dict[int, int]]:
        """A copy of the replicated state."""
        taken = {origin: dict(slots) for origin, slots in (self._received or {}).items()}
        own = dict(self._own or {})
        if self._own_slot != NO_SLOT:
            own[self._own_slot] = self._own_tokens
        if own:
            taken[self.origin] = own
        return taken

    @property
    def slots(self) -> int:
        """The number of slots it holds, of all origins."""
        return (self._own_slot != NO_SLOT) + len(self._own or ()) + self._received_entries

    @property
    def looks(self) -> int:
        """The work of advancing and sealing this bucket; 1 is that of a bucket with few slots."""
        return 1 + self.slots // SLOTS_A_LOOK

    def origins(self) -> list[Origin]:
        """The origins of all entries."""
        own = [self.origin] if self._own or self._own_slot != NO_SLOT else []
        return own + list(self._received or ())

    def tokens_of(self, origin: Origin) -> dict[int, int]:
        """The tokens of one origin, by slot. Not to be changed."""
        if origin != self.origin:
            return (self._received or {}).get(origin, {})
        own = self._own or {}
        return own if self._own_slot == NO_SLOT else {**own, self._own_slot: self._own_tokens}

    def entries(self) -> Iterator[Entry]:
        """Every entry held, of all origins."""
        if self._own_slot != NO_SLOT:
            yield Entry(self.origin, self._own_slot, self._own_tokens)
        if self._own is not None:
            for slot, tokens in self._own.items():
                yield Entry(self.origin, slot, tokens)
        if self._received is not None:
            for origin, slots in self._received.items():
                for slot, tokens in slots.items():
                    yield Entry(origin, slot, tokens)

    def _slots(self) -> Iterator[int]:
        """The slots of all entries."""
        if self._own_slot != NO_SLOT:
            yield self._own_slot
        yield from self._own or ()
        for slots in (self._received or {}).values():
            yield from slots

    def _tokens_by_slot(self) -> dict[int, int]:
        """The tokens in each slot, of all origins together. So a fold costs as much as there are slots, however many
        origins there are.
        """
        by_slot = self._tokens_received()
        if by_slot is self._received_tokens:
            by_slot = dict(by_slot)
        for slot, tokens in self.tokens_of(self.origin).items():
            by_slot[slot] = self._together(slot, by_slot.get(slot, 0), tokens)
        return by_slot

    def _together(self, _slot: int, tokens: int, others: int) -> int:
        """Combine two counts of one slot: their sum; the maximum for a window's refund marks."""
        return tokens + others

    def _tokens_received(self) -> dict[int, int]:
        """The tokens in each slot of other origins together. Not to be changed."""
        if self._received_tokens is not None:
            return self._received_tokens
        by_slot: dict[int, int] = {}
        if self._received is not None:
            for slots in self._received.values():
                for slot, tokens in slots.items():
                    by_slot[slot] = self._together(slot, by_slot.get(slot, 0), tokens)
            if self._are_worth_a_sum(by_slot):
                self._received_tokens = by_slot
        return by_slot

    def own_entries(self, slots: Iterable[int]) -> Iterator[Entry]:
        """This replica's entries of `slots`, without those dropped meanwhile."""
        for slot in slots:
            if slot == self._own_slot:
                yield Entry(self.origin, slot, self._own_tokens)
            elif self._own is not None and slot in self._own:
                yield Entry(self.origin, slot, self._own[slot])

    def drain_changed_slots(self) -> list[int]:
        """Return the own slots written since the last call. The next write puts the bucket into the journal again."""
        changed, self._unsent = self._unsent, None
        self._own_slot_unsent = False
        return changed or []

    def received_entries(self, slots: Iterable[tuple[Origin, int]]) -> Iterator[Entry]:
        """Other replicas' entries of `slots`, without those dropped meanwhile."""
        received = self._received or {}
        for origin, slot in slots:
            tokens = received.get(origin, {}).get(slot)
            if tokens is not None:
                yield Entry(origin, slot, tokens)

    def is_written_since(self, since_us: int) -> bool:
        """True when `entries_since` has some of any origin."""
        return any(slot_end_us(slot) > since_us for slot in self._tokens_by_slot())

    def entries_since(self, origin: Origin, since_us: int) -> list[Entry]:
        """The entries of an origin that may have been written since `since_us`, by its clock."""
        return [
            Entry(origin, slot, tokens)
            for slot, tokens in self.tokens_of(origin).items()
            if slot_end_us(slot) > since_us
        ]

    def settled(self, _until_us: int, _kept_until_us: int) -> Settled | None:
        """The part of the state to compare between replicas: entries written up to `until_us` that every replica still
        holds at `kept_until_us`. None when an absent bucket would be the same. Its work grows with the slots, however
        many origins there are.
        """
        return None

    def forget_slots(self) -> None:
        """Free what it holds, now that it is idle and the store has dropped it: plans may refer to it for long."""
        self._own_slot, self._own_tokens = NO_SLOT, 0
        self._count_received(-len(self._received or ()), -self._received_entries)
        self._own = self._received = self._received_tokens = None

    @property
    def _holds_nothing(self) -> bool:
        """True when there are no slots, and none to send."""
        return self._own_slot == NO_SLOT and not self._own and not self._received and not self._unsent

    def _open_own_slot(self, slot: int) -> None:
        """Make `slot` the one that `_write_own` counts in. Call that at once: a slot without tokens must not
        be held.
        """
        self._take_new_origin()
        self._close_own_slot()
        own = self._own
        self._own_slot = slot
        if own is not None and slot in own:
            # The limit changed and changed back: the count goes on.
            self._own_tokens = own.pop(slot)
        # Searching the list is rare: only a slot that is opened again needs it.
        self._own_slot_unsent = self._own_tokens > 0 and self._unsent is not None and slot in self._unsent

    def _close_own_slot(self) -> None:
        if self._own_slot != NO_SLOT:
            if self._own is None:
                self._own = {}
            self._own[self._own_slot] = self._own_tokens
            self._own_slot, self._own_tokens = NO_SLOT, 0

    def _is_own_slot_over(self) -> bool:
        """True when another one has to be opened."""
        return self._own_slot == NO_SLOT or self.at_us >= slot_end_us(self._own_slot)

    def _write_own(self, hits: int) -> None:
        """Count `hits` in the slot that is open."""
        self._own_tokens += hits
        if not self._own_slot_unsent and self.journal is not None:
            self._note_unsent(self.journal, self._own_slot)
            self._own_slot_unsent = True

    def _mark_if_urgent(self, limit: AnyLimit, before: int, after: int) -> None:
        """Mark the bucket as urgent if a take has made it nearly used up: then there is a flush at once. If it has
        crossed a further 1/16 to 1/8 of the limit, a peer that is behind only hears of the bucket before others.

        Args:
            before, after: what counted against the limit, in the unit of its `scaled_capacity`.
        """
        if self.journal is not None:
            if before < limit.urgent_from <= after:
                self.journal.mark_urgent(self)
            # Bits from `step_bits` up differ: there is a multiple of 2**step_bits between the two.
            elif after <= limit.scaled_capacity and (before ^ after) >> limit.step_bits:
                self.journal.urgent.add(self)

    def _write_refund(self, slot: int, count: int) -> None:
        """Set the refund entry of `slot`, an id with `REFUND`, to `count`, which must be higher than before."""
        self._take_new_origin()
        if self._own is None:
            self._own = {}
        self._own[slot] = count
        if self.journal is not None and slot not in (self._unsent or ()):
            self._note_unsent(self.journal, slot)

    def _own_refund(self, slot: int) -> int:
        """This replica's refund entry of `slot`, an id with `REFUND`. If the clock was set back, the bucket first takes
        its new origin, which has none."""
        self._take_new_origin()
        return 0 if self._own is None else self._own.get(slot, 0)

    def _note_use(self, journal: Journal) -> None:
        """Put the bucket into the journal, even if nothing was written: a fabric then asks what others took."""
        if self._unsent is None:
            self._unsent = []
            journal.buckets.append(self)

    def _note_unsent(self, journal: Journal, slot: int) -> None:
        if self._unsent is None:
            self._unsent = []
            journal.buckets.append(self)
        elif len(self._unsent) >= MAX_UNSENT_SLOTS:
            # The journal has not been drained for long.
            own = self._own or {}
            self._unsent = [unsent for unsent in self._unsent if unsent in own or unsent == self._own_slot]
        self._unsent.append(slot)

    def _take_new_origin(self) -> None:
        """After the clock was set back, write under a new origin. The old own counts are kept as if a peer had reported
        them, because peers never accept smaller counts.
        """
        origin = None if self.journal is None else self.journal.origin
        if origin is None or origin == self.origin:
            return
        self._close_own_slot()
        own, self._own = self._own, None
        former, self.origin = self.origin, origin
        self._own_slot_unsent = False
        if own:
            if self._received is None:
                self._received = {}
            self._received[former] = own
            self._count_received(1, len(own))
            self._received_tokens = None
            untrack(self._received)

    @property
    def _is_restoring(self) -> bool:
        """Whether what is joined was written down here, and so was checked before. A bucket that is not replicated has
        no journal, and joins nothing else.
        """
        return self.journal is None or self.journal.is_restoring

    def _widest(self, own: int, of_peers: int) -> int:
        """The exponent of the widest slot to accept.

        Args:
            own: the limit's.
            of_peers: the widest that is accepted from a peer.
        """
        return MAX_EXPONENT if self._is_restoring else max(own, of_peers)

    def _receive(self, entry: Entry) -> int:
        """Join one entry whose slot the subclass has checked.

        Returns:
            By how much it raised the count; 0 when it was not new; `RECOUNT` when the origin has too many slots now.
        """
        origin, slot, tokens = entry
        if origin == self.origin:
            return self._restore_own(slot, tokens)
        slots = self._received.get(origin) if self._received is not None else None
        if slots is None:
            return self._receive_first(origin, slot, tokens)
        held = slots.get(slot, 0)
        added = tokens - held
        if added <= 0:
            return 0
        if not held:
            if not self._has_room(origin, is_first=False):
                return 0
            self._count_received(0, 1)
        slots[slot] = tokens
        self._note_received(slot, held, tokens)
        return RECOUNT if len(slots) > MAX_SLOTS else added

    def _note_received(self, slot: int, held: int, tokens: int) -> None:
        """An origin's entry of a slot is now `tokens`; it was `held`."""
        by_slot = self._received_tokens
        if by_slot is not None:
            by_slot[slot] = by_slot.get(slot, 0) + tokens - held
            if not self._are_worth_a_sum(by_slot):
                self._received_tokens = None

    def _are_worth_a_sum(self, by_slot: dict[int, int]) -> bool:
        """Whether there are many entries, and more than one of a slot: else sums would take as much memory again."""
        return SUMMED_ENTRIES <= self._received_entries >= 2 * len(by_slot)

    def _trim(self) -> None:
        """Drop the oldest slots of origins that have too many."""
        for slots in (self._received or {}).values():
            if len(slots) > MAX_SLOTS:
                for slot in sorted(slots)[:-MAX_SLOTS]:
                    del slots[slot]
                    self._count_received(0, -1)
                    self._refuse(Refused.SLOTS)
                self._received_tokens = None

    def _receive_first(self, origin: Origin, slot: int, tokens: int) -> int:
        """Join the first entry of an origin."""
        received = self._received
        if received is None:
            received = self._received = {}
        if tokens <= 0:
            return 0
        if not self._has_room(origin, is_first=True):
            return 0
        received[origin] = {slot: tokens}
        self._count_received(1, 1)
        self._note_received(slot, 0, tokens)
        # Adding a value makes the collector track the dict again.
        untrack(received)
        return tokens

    def _has_room(self, origin: Origin, *, is_first: bool) -> bool:
        """Whether a new entry of another origin, perhaps its first, may be added; if not, that is counted."""
        origins = len(self._received or ()) + is_first
        is_one_too_many = is_first and origins > MAX_ORIGINS and not self._is_restoring
        if (is_one_too_many or self._received_entries >= MAX_RECEIVED) and not self._is_peer(origin):
            self._refuse(Refused.ORIGINS)
            return False
        journal = self.journal
        if journal is None or self._is_restoring or journal.has_room_for_all:
            return True
        quarters = 3 if not self._is_peer(origin) else 5 if origins <= LEAST_ORIGINS else 4
        if journal.has_room(quarters, journal.received_bytes if self.room is None else self.room.received_bytes):
            return True
        self._refuse(Refused.FULL)
        return False

    def _count_received(self, origins: int, entries: int) -> None:
        """There are so many more, or fewer, of others."""
        self._received_entries += entries
        size = ORIGIN_BYTES * origins + ENTRY_BYTES * entries
        if self.journal is not None:
            self.journal.received_bytes += size
        if self.room is not None:
            self.room.received_bytes += size

    def _refuse(self, why: Refused) -> None:
        if self.journal is not None:
            self.journal.refused[why] += 1

    def _is_peer(self, origin: Origin) -> bool:
        return self.journal is not None and origin in self.journal.peers

    def _restore_own(self, slot: int, tokens: int) -> int:
        """Join a peer's entry of this replica's own origin. It is accepted only for a slot that is over and no longer
        held here: this replica dropped the bucket as idle, and the slot counts again, since the limit has changed.
        """
        own = self._own or {}
        held = self._own_tokens if slot == self._own_slot else own.get(slot, 0)
        if tokens <= held:
            return 0
        if held or slot_end_us(slot) > self.at_us or len(own) >= MAX_SLOTS:
            self._refuse(Refused.OWN)
            return 0
        own[slot] = tokens
        self._own = own
        return tokens

    def _forget(self, is_past: Callable[[int], bool]) -> dict[int, int]:
        """Drop the slots that are past.

        Returns:
            The tokens in each of them, of all origins together.
        """
        forgotten: dict[int, int] = {}
        if self._own_slot != NO_SLOT and is_past(self._own_slot):
            forgotten[self._own_slot] = self._own_tokens
            self._own_slot, self._own_tokens = NO_SLOT, 0
        if self._own is not None:
            past = [slot for slot in self._own if is_past(slot)]
            for slot in past:
                forgotten[slot] = self._own[slot]
            self._own = _without(self._own, past) or None
        if self._received is not None:
            slots: Iterable[int] = self._received_tokens or set[int]().union(*self._received.values())
            past = [slot for slot in slots if is_past(slot)]
            if past:
                by_slot = self._tokens_received()
                for slot in past:
                    forgotten[slot] = forgotten.get(slot, 0) + by_slot[slot]
                self._forget_received(past)
        return forgotten

    def _forget_received(self, past: list[int]) -> None:
        received = self._received or {}
        for origin in list(received):
            slots = received[origin]
            before = len(slots)
            left = _without(slots, past)
            self._count_received(-1 if not left else 0, len(left) - before)
            if not left:
                del received[origin]
            elif left is not slots:
                received[origin] = left
                untrack(received)
        self._received = received or None
        if self._received_tokens is not None:
            left_of_sums = _without(self._received_tokens, past)
            self._received_tokens = left_of_sums if self._are_worth_a_sum(left_of_sums) else None


def _without(slots: dict[int, int], past: list[int]) -> dict[int, int]:
    """The slots that are not past: the same dict, or if it has become much too large for them another."""
    before = len(slots)
    for slot in past:
        slots.pop(slot, 0)
    # A dict from which items are deleted keeps its size.
    return dict(slots) if before > 2 * len(slots) else slots
