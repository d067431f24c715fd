"""What was taken, by whom and when: the replicated part of every bucket, a grow-only counter cut into slots of time.

    taken[origin][slot] -> tokens

Only the origin writes its entries and counts never fall, so the join is the pointwise maximum (a state-based
G-Counter, Shapiro et al. 2011). Every algorithm is a fold over this one state: `token_bucket.py` and `window.py`.
A slot names its own width, so slots from before and after a change of the limit live side by side; which of them
count, and when, is the algorithm's affair.

What operators give back is such a counter, too, in the same maps, under ids of its own (`slot.REFUND`): it grows,
and nothing that was taken ever falls.

Most buckets hold one or two slots, and there may be a million: the own slot being written is two attributes, and what
else there may be is made when it is needed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Final, NamedTuple

from ratelimit_sidecar.crdt.journal import Journal, Refused
from ratelimit_sidecar.crdt.limit import AnyLimit
from ratelimit_sidecar.crdt.slot import slot_end_us
from ratelimit_sidecar.crdt.untracked_dict import untrack

_NO_SLOT: Final = -1

SET_BACK_US: Final = 5_000_000
"""An instant that is so far before the last one says that the clock was set back; a nearer one counts as the last.

No more than half of the shortest horizon: what is nearer and stands still for so long is still shared with peers.
"""

MAX_UNSENT_SLOTS: Final = 1_024
"""Own slots to be told of, before those that are forgotten are taken out; fewer than 700 are held."""

MAX_ORIGINS: Final = 1_024
"""In one bucket, besides connected peers. A mesh of 256 nodes that were all restarted three times has as many."""

MAX_SLOTS: Final = 1_024
"""Of one origin in one bucket. The narrowest slots fill a horizon with 627. Of more, the newest count: which these are
does not depend on the order in which they were heard.
"""

FINAL_US: Final = 2_000_000
"""A slot that is over for so long is written to no more, by a clock that is no further behind."""

RECOUNT: Final = -1
"""See `Bucket._hear`."""


class Origin(NamedTuple):
    """One life of one replica. A restarted node is a new origin, so no origin ever counts below what it said."""

    node: str
    incarnation: int
    """Random, drawn at start; 1 to 2**64 - 1."""


class Base(NamedTuple):
    """All slots that began before `boundary_us`, folded into the scaled deficit at that instant."""

    boundary_us: int
    deficit: int


NO_BASE: Final = Base(0, 0)


class Entry(NamedTuple):
    """What one origin took in one slot, or gave back: the unit of replication."""

    origin: Origin
    slot: int
    tokens: int


class Settled(NamedTuple):
    """The part of a bucket's state that replicas can compare.

    Args:
        deficit: what older entries amount to, by the algorithm; 0 when they do not count.
        entries: in no particular order.
    """

    deficit: int
    entries: list[Entry]


class Bucket(ABC):
    """One limit on one key, as one replica sees it; a subclass knows how much of it is left.

    Args:
        key: canonical bytes naming the bucket on every replica.
        origin: this replica; its entries are the ones `take` writes.
        now_us: wall clock. A later call with a smaller one counts as the last, or as a clock that was set back (see
            `SET_BACK_US`).
        journal: the bucket appends itself to it when own entries change (see `drain_changed_slots`). None for a bucket
            that is never replicated.
    """

    __slots__ = (
        "_heard",
        "_own",
        "_own_slot",
        "_own_slot_unsent",
        "_own_tokens",
        "_unsent",
        "at_us",
        "journal",
        "key",
        "origin",
    )

    def __init__(self, key: bytes, origin: Origin, now_us: int, journal: Journal | None = None) -> None:
        self.key = key
        self.at_us = now_us
        """The last instant given."""
        self.origin = origin
        self.journal = journal
        self._own_slot = _NO_SLOT
        """The slot opened last, with `_own_tokens` in it; own slots before it are in `_own`."""
        self._own_tokens = 0
        self._own_slot_unsent = False
        self._own: dict[int, int] | None = None
        self._heard: dict[Origin, dict[int, int]] | None = None
        """Slots of all other origins; none of the dicts in it is empty."""
        self._unsent: list[int] | None = None

    @property
    @abstractmethod
    def limit(self) -> AnyLimit:
        """What it enforces; see `set_limit`."""

    @abstractmethod
    def take(self, hits: int, now_us: int, *, always: bool = False) -> bool:
        """Admit and charge `hits` tokens when they are left; O(1).

        Args:
            hits: 0 or more. 0 checks and charges nothing.
            always: charge what is denied, too.

        Returns:
            True when admitted.
        """

    @abstractmethod
    def would_admit(self, hits: int, now_us: int) -> bool:
        """What `take` would return, without charging anything."""

    def refund(self, _tokens: int | None, _now_us: int) -> int:
        """Make tokens that were taken available again, here and on every peer; never more than fill the bucket.

        Args:
            _tokens: at least 1; None for as many as fill it.

        Returns:
            How many were given. A strict bucket gives none: what its members hold together is the limit.
        """
        return 0

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

    def correct(self, sender: Origin, entries: Iterable[Entry], now_us: int) -> bool:
        """Hear from an origin itself what it took. Others may have said more; it knows better.

        Counts of slots that are over are final. So to lower them keeps replicas alike, once all have heard it.

        Returns:
            True when something changed.
        """
        slots = self._heard.get(sender) if self._heard is not None else None
        if slots is None:
            return False
        self.advance(now_us)
        is_changed = False
        for origin, slot, tokens in entries:
            if 0 < tokens < slots.get(slot, 0) and origin == sender and self._is_final(slot):
                slots[slot] = tokens
                is_changed = True
        if is_changed:
            self._recount()
        return is_changed

    def _is_final(self, slot: int) -> bool:
        """True when its origin, asked now, would say the last word on it."""
        return slot_end_us(slot) + FINAL_US <= self.at_us

    @abstractmethod
    def _recount(self) -> None:
        """Fold all that is held anew."""

    @abstractmethod
    def retry_after_us(self, hits: int) -> int:
        """Microseconds from `at_us` until `hits` would be admitted if nobody took any more; when they are more than
        the limit ever holds, until all tokens are there.
        """

    @abstractmethod
    def advance(self, now_us: int) -> None:
        """Let time pass up to `now_us`."""

    @abstractmethod
    def set_limit(self, limit: AnyLimit, now_us: int) -> None:
        """Enforce another limit of the same algorithm from now on, and keep what was taken."""

    @abstractmethod
    def seal(self, now_us: int) -> None:
        """Forget the slots that no longer count one by one."""

    @abstractmethod
    def is_idle(self, now_us: int) -> bool:
        """True when all tokens are there and nothing is held that a peer could miss: it equals an absent bucket."""

    @abstractmethod
    def fold(self, now_us: int) -> int:
        """What counts against the limit at `now_us`, as a pure function of the replicated state.

        Replicas with equal state and limit return equal integers. Its unit is the algorithm's.
        """

    @property
    def base(self) -> Base:
        """What is left of slots that are forgotten; windows need nothing of them."""
        return NO_BASE

    @property
    def telling_base(self) -> Base | None:
        """The base, for a peer; None when it says nothing that its absence does not."""
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
        taken = {origin: dict(slots) for origin, slots in (self._heard or {}).items()}
        own = dict(self._own or {})
        if self._own_slot != _NO_SLOT:
            own[self._own_slot] = self._own_tokens
        if own:
            taken[self.origin] = own
        return taken

    def entries(self) -> Iterator[Entry]:
        """Every entry held, of all origins."""
        if self._own_slot != _NO_SLOT:
            yield Entry(self.origin, self._own_slot, self._own_tokens)
        if self._own is not None:
            for slot, tokens in self._own.items():
                yield Entry(self.origin, slot, tokens)
        if self._heard is not None:
            for origin, slots in self._heard.items():
                for slot, tokens in slots.items():
                    yield Entry(origin, slot, tokens)

    def _slots(self) -> Iterator[int]:
        """The slots of all entries."""
        if self._own_slot != _NO_SLOT:
            yield self._own_slot
        yield from self._own or ()
        for slots in (self._heard or {}).values():
            yield from slots

    def _tokens_by_slot(self) -> dict[int, int]:
        """Of all origins together: to fold these costs what there are of slots, however many replicas take in each."""
        tokens_of = dict(self._own or {})
        if self._own_slot != _NO_SLOT:
            tokens_of[self._own_slot] = self._own_tokens
        if self._heard is not None:
            for slots in self._heard.values():
                for slot, tokens in slots.items():
                    tokens_of[slot] = tokens_of.get(slot, 0) + tokens
        return tokens_of

    def own_entries(self, slots: Iterable[int]) -> Iterator[Entry]:
        """This replica's entries of `slots`, less those forgotten meanwhile."""
        for slot in slots:
            if slot == self._own_slot:
                yield Entry(self.origin, slot, self._own_tokens)
            elif self._own is not None and slot in self._own:
                yield Entry(self.origin, slot, self._own[slot])

    def drain_changed_slots(self) -> list[int]:
        """Own slots written since the last call; the next write puts the bucket into the journal again."""
        changed, self._unsent = self._unsent, None
        self._own_slot_unsent = False
        return changed or []

    def heard_entries(self, slots: Iterable[tuple[Origin, int]]) -> Iterator[Entry]:
        """Other replicas' entries of `slots`, less those forgotten meanwhile."""
        heard = self._heard or {}
        for origin, slot in slots:
            tokens = heard.get(origin, {}).get(slot)
            if tokens is not None:
                yield Entry(origin, slot, tokens)

    def entries_since(self, since_us: int) -> Iterator[Entry]:
        """The entries that may have been written since `since_us`, by the clocks of their origins."""
        for entry in self.entries():
            if slot_end_us(entry.slot) > since_us:
                yield entry

    def settled(self, _until_us: int, _kept_until_us: int) -> Settled | None:
        """What all replicas hold alike that have heard of everything written up to `until_us`, and go on holding at
        least until `kept_until_us`; None when that is what an absent bucket holds.
        """
        return None

    @property
    def _holds_nothing(self) -> bool:
        """True when there is no slot that counts, or that a peer could miss."""
        return self._own_slot == _NO_SLOT and not self._own and not self._heard and not self._unsent

    def _open_own_slot(self, slot: int) -> None:
        """Write to `slot` from now on: at once, so that no slot without tokens is ever held."""
        self._take_new_origin()
        if self._own_slot != _NO_SLOT:
            if self._own is None:
                self._own = {}
            self._own[self._own_slot] = self._own_tokens
        self._own_slot = slot
        # Written to before, if the limit has changed and changed back: the count goes on.
        self._own_tokens = self._own.pop(slot, 0) if self._own is not None else 0
        # A list: only a slot that is written to again has to be looked for.
        self._own_slot_unsent = self._own_tokens > 0 and self._unsent is not None and slot in self._unsent

    def _write_own(self, hits: int) -> None:
        """Count `hits` in the slot opened last."""
        self._own_tokens += hits
        if not self._own_slot_unsent and self.journal is not None:
            self._note_unsent(self.journal, self._own_slot)
            self._own_slot_unsent = True

    def _write_refund(self, slot: int, count: int) -> None:
        """Let the count of `slot`, whose id has `REFUND`, be `count`; it is more than before."""
        self._take_new_origin()
        if self._own is None:
            self._own = {}
        self._own[slot] = count
        if self.journal is not None and slot not in (self._unsent or ()):
            self._note_unsent(self.journal, slot)

    def _own_refund(self, slot: int) -> int:
        """The count of `slot`, whose id has `REFUND`."""
        self._take_new_origin()
        return 0 if self._own is None else self._own.get(slot, 0)

    def _note_unsent(self, journal: Journal, slot: int) -> None:
        if self._unsent is None:
            self._unsent = []
            journal.buckets.append(self)
        elif len(self._unsent) >= MAX_UNSENT_SLOTS:
            # Nobody drains the journal for a while.
            own = self._own or {}
            self._unsent = [unsent for unsent in self._unsent if unsent in own or unsent == self._own_slot]
        self._unsent.append(slot)

    def _take_new_origin(self) -> None:
        """After the clock was set back, write as another life of this replica: what the one before has written, and
        may have forgotten, only ever grows for those who heard of it. It is kept as if it had been heard.
        """
        origin = None if self.journal is None else self.journal.origin
        if origin is None or origin == self.origin:
            return
        own = self._own or {}
        if self._own_slot != _NO_SLOT:
            own[self._own_slot] = self._own_tokens
        former, self.origin = self.origin, origin
        self._own_slot, self._own_tokens, self._own_slot_unsent = _NO_SLOT, 0, False
        self._own = None
        if own:
            if self._heard is None:
                self._heard = {}
            self._heard[former] = own
            untrack(self._heard)

    def _hear(self, entry: Entry) -> int:
        """Join one entry that a subclass has found to be in range.

        Returns:
            By how much it raised the count; 0 when it told nothing new; RECOUNT when there are too many slots now, to
            be trimmed and counted anew.
        """
        origin, slot, tokens = entry
        if origin == self.origin:
            return self._recall(slot, tokens)
        slots = self._heard.get(origin) if self._heard is not None else None
        if slots is None:
            return self._hear_of(origin, slot, tokens)
        added = tokens - slots.get(slot, 0)
        if added <= 0:
            return 0
        slots[slot] = tokens
        return RECOUNT if len(slots) > MAX_SLOTS else added

    def _trim(self) -> None:
        """Forget the oldest slots of origins that have too many."""
        for slots in (self._heard or {}).values():
            if len(slots) > MAX_SLOTS:
                for slot in sorted(slots)[:-MAX_SLOTS]:
                    del slots[slot]
                    self._refuse(Refused.SLOTS)

    def _hear_of(self, origin: Origin, slot: int, tokens: int) -> int:
        """Join the first entry of an origin."""
        heard = self._heard
        if heard is None:
            heard = self._heard = {}
        if tokens <= 0:
            return 0
        if len(heard) >= MAX_ORIGINS and not self._is_peer(origin):
            self._refuse(Refused.ORIGINS)
            return 0
        heard[origin] = {slot: tokens}
        # Every new value of a dict brings it back into sight.
        untrack(heard)
        return tokens

    def _refuse(self, why: Refused) -> None:
        if self.journal is not None:
            self.journal.refused[why] += 1

    def _is_peer(self, origin: Origin) -> bool:
        return self.journal is not None and origin in self.journal.peers

    def _recall(self, slot: int, tokens: int) -> int:
        """Hear of an own slot. Nobody knows better than this replica, unless it has forgotten the slot: it dropped the
        bucket as idle, and then got a limit under which the slot counts again, or does so for a peer.
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

    def _forget(self, is_past: Callable[[int], bool]) -> list[tuple[Origin, int, int]]:
        """Drop the slots that are past; returns what was in them, as entries are written."""
        forgotten = []
        if self._own_slot != _NO_SLOT and is_past(self._own_slot):
            forgotten.append((self.origin, self._own_slot, self._own_tokens))
            self._own_slot, self._own_tokens = _NO_SLOT, 0
        if self._own is not None:
            forgotten += _pop_past(self.origin, self._own, is_past)
            self._own = self._own or None
        if self._heard is not None:
            for origin in list(self._heard):
                slots = self._heard[origin]
                forgotten += _pop_past(origin, slots, is_past)
                if not slots:
                    del self._heard[origin]
            self._heard = self._heard or None
        return forgotten


def _pop_past(origin: Origin, slots: dict[int, int], is_past: Callable[[int], bool]) -> list[tuple[Origin, int, int]]:
    return [(origin, slot, slots.pop(slot)) for slot in list(slots) if is_past(slot)]
