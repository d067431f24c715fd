"""What was taken, by whom and when: the replicated part of every bucket, a grow-only counter cut into slots of time.

    taken[origin][slot] -> tokens

Only the origin writes its entries and counts never fall, so the join is the pointwise maximum (a state-based
G-Counter, Shapiro et al. 2011). Every algorithm is a fold over this one state: `token_bucket.py` and `window.py`.
What a slot stands for is the algorithm's affair; here it is a number.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ratelimit_sidecar.crdt.limit import AnyLimit


class Origin(NamedTuple):
    """One life of one replica. A restarted node is a new origin, so no origin ever counts below what it said."""

    node: str
    incarnation: int
    """Random, drawn at start; 1 to 2**64 - 1."""


class Base(NamedTuple):
    """Everything placed before `boundary_us`, folded into the scaled deficit at that instant."""

    boundary_us: int
    deficit: int


class Entry(NamedTuple):
    """What one origin took in one slot: the unit of replication."""

    origin: Origin
    slot: int
    tokens: int


class Bucket(ABC):
    """One limit on one key, as one replica sees it; a subclass knows how much of it is left.

    Args:
        key: canonical bytes naming the bucket on every replica.
        origin: this replica; its entries are the ones `take` writes.
        now_us: wall clock. Later calls may not pass a smaller one; a smaller one counts as the last.
        journal: a list the bucket appends itself to when own entries change (see `drain_changed_slots`). None for a
            bucket that is never replicated.
    """

    __slots__ = (
        "_own",
        "_own_slot",
        "_own_slot_unsent",
        "_unsent",
        "at_us",
        "base",
        "journal",
        "key",
        "limit",
        "origin",
        "taken",
    )

    limit: AnyLimit

    def __init__(
        self, key: bytes, limit: AnyLimit, origin: Origin, now_us: int, journal: list[Bucket] | None = None
    ) -> None:
        self.key = key
        self.limit = limit
        self.at_us = now_us
        """The last instant given."""
        self.base = Base(0, 0)
        """What is left of slots that are forgotten; windows need nothing of them."""
        self.origin = origin
        self.journal = journal
        self.taken: dict[Origin, dict[int, int]] = {}
        self._own: dict[int, int] = {}
        self._own_slot = -1
        self._own_slot_unsent = False
        self._unsent: list[int] = []

    @abstractmethod
    def take(self, hits: int, now_us: int, *, always: bool = False) -> bool:
        """Admit and charge `hits` tokens when they are left; O(1).

        Args:
            hits: 0 or more. 0 checks and charges nothing.
            always: charge what is denied, too.

        Returns:
            True when admitted.
        """

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

    @abstractmethod
    def fits_in_us(self, hits: int) -> int:
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

    def merge_base(self, _other: Base, _now_us: int) -> bool:
        """Join a peer's base.

        Returns:
            True when something changed.
        """
        return False

    def entries(self) -> Iterator[Entry]:
        """Every entry held, of all origins."""
        for origin, slots in self.taken.items():
            for slot, tokens in slots.items():
                yield Entry(origin, slot, tokens)

    def own_entries(self, slots: Iterable[int]) -> Iterator[Entry]:
        """This replica's entries of `slots`, less those forgotten meanwhile."""
        for slot in slots:
            tokens = self._own.get(slot)
            if tokens is not None:
                yield Entry(self.origin, slot, tokens)

    def drain_changed_slots(self) -> list[int]:
        """Own slots written since the last call; the next write puts the bucket into the journal again."""
        changed, self._unsent = self._unsent, []
        self._own_slot_unsent = False
        return changed

    def _open_own_slot(self, slot: int) -> None:
        """Write to `slot` from now on."""
        self._own_slot = slot
        self._own_slot_unsent = False
        self._own.setdefault(slot, 0)
        self.taken[self.origin] = self._own

    def _write_own(self, hits: int) -> None:
        """Count `hits` in the slot opened last."""
        self._own[self._own_slot] += hits
        if not self._own_slot_unsent and self.journal is not None:
            if not self._unsent:
                self.journal.append(self)
            self._unsent.append(self._own_slot)
            self._own_slot_unsent = True

    def _hear(self, entry: Entry) -> int:
        """Join one entry that a subclass has found to be in range.

        Returns:
            By how much it raised the count; 0 when it told nothing new or is about this replica, who knows best.
        """
        origin, slot, tokens = entry
        if origin == self.origin:
            return 0
        slots = self.taken.get(origin)
        added = tokens - (slots.get(slot, 0) if slots else 0)
        if added <= 0:
            return 0
        if slots is None:
            slots = self.taken[origin] = {}
        slots[slot] = tokens
        return added

    def _forget_slots(self, forgotten: Iterable[tuple[Origin, int]]) -> None:
        for origin, slot in forgotten:
            slots = self.taken[origin]
            del slots[slot]
            if not slots:
                del self.taken[origin]
