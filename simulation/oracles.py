"""What is promised, checked from outside: by true time, and by all that every node has admitted.

Each oracle is told of every admission when it happens, and raises `BrokenPromise` at the first that should not have
been. A bucket that is charged with everything and refuses nothing has, as its greatest deficit above the capacity, what
was admitted beyond `capacity + rate * T` in some interval (docs/simulation.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ratelimit_sidecar.crdt.bucket import Bucket, Origin
from ratelimit_sidecar.crdt.limit import Limit
from ratelimit_sidecar.crdt.slot import slot_end_us
from ratelimit_sidecar.crdt.store import Store

Boundary = Callable[[bytes], int]


class BrokenPromise(AssertionError):
    """The product, or the simulator, is wrong."""


def held(bucket: Bucket | None, origin: Origin, slot: int) -> int:
    """What a node knows another to have taken in a slot."""
    heard = None if bucket is None else bucket._heard
    slots = None if heard is None else heard.get(origin)
    return 0 if slots is None else slots.get(slot, 0)


@dataclass(slots=True)
class StrictOracle:
    """P5: all replicas together never admit more than the limit in any interval."""

    name: str
    limit: Limit
    deficit: int = 0
    at_us: int = 0

    def admitted(self, hits: int, true_us: int) -> None:
        drained = self.deficit - (true_us - self.at_us) * self.limit.tokens
        self.deficit = max(0, drained) + hits * self.limit.period_us
        self.at_us = true_us
        if self.deficit > self.limit.ceiling:
            over = -((self.limit.ceiling - self.deficit) // self.limit.period_us)
            raise BrokenPromise(f"strict: {over} tokens of {self.name} were admitted beyond {self.limit}")


@dataclass(slots=True)
class LocalOracle:
    """P2: a bucket that is never replicated is a textbook token bucket, by the clock of its node, until that is set
    back: then it stands still for a while."""

    name: str
    limit: Limit
    deficit: int = 0
    at_us: int = 0

    was_set_back: bool = False

    def decided(self, hits: int, own_us: int, *, admitted: bool) -> None:
        self.was_set_back |= own_us < self.at_us
        if self.was_set_back:
            return
        self.deficit = max(0, self.deficit - (own_us - self.at_us) * self.limit.tokens)
        self.at_us = own_us
        charge = hits * self.limit.period_us
        if admitted is not (self.deficit + charge <= self.limit.ceiling):
            raise BrokenPromise(f"local: {self.name} {'admitted' if admitted else 'denied'} {hits} at {own_us}")
        if admitted:
            self.deficit += charge


@dataclass(slots=True)
class EventualOracle:
    """P3: beyond the limit only what others had admitted and not yet delivered to whoever admitted last.

    Args:
        exponent: of the bucket's slots. A replica that knows takes by their slots places them up to a slot early: half
            of one, or all of it where the limit has changed.
    """

    name: str
    limit: Limit
    exponent: int
    deficit: int = 0
    at_us: int = 0
    taken: dict[tuple[Origin, int], int] = field(default_factory=dict)
    """By origin and slot, all that was admitted."""
    since: dict[tuple[Origin, int], int] = field(default_factory=dict)
    """The same, since the deficit was last zero: what came before can not matter."""
    overshoots: int = 0
    """Admissions beyond the limit."""

    def admitted(self, bucket: Bucket, hits: int, true_us: int, spread_us: int) -> None:
        """Args:
        bucket: as the node that admits sees it, just after.
        spread_us: by how much any two clocks have differed at any two moments.
        """
        drained = self.deficit - (true_us - self.at_us) * self.limit.tokens
        if drained <= 0:
            drained = 0
            self.since.clear()
        self.deficit = drained + hits * self.limit.period_us
        self.at_us = true_us
        place = (bucket.origin, bucket._own_slot)
        self.taken[place] = bucket._own_tokens
        self.since[place] = self.since.get(place, 0) + hits
        over = self.deficit - self.limit.ceiling
        if over > 0:
            self.overshoots += 1
            unheard = sum(
                min(tokens, self.taken[origin, slot] - held(bucket, origin, slot))
                for (origin, slot), tokens in self.since.items()
                if origin != bucket.origin
            )
            allowed = unheard * self.limit.period_us + self.limit.tokens * ((1 << self.exponent) + spread_us)
            if over > allowed:
                period_us = self.limit.period_us
                raise BrokenPromise(
                    f"eventual: {over / period_us:.2f} tokens of {self.name} were admitted by {bucket.origin.node}"
                    f" beyond {self.limit}; {unheard} it had not heard of explain {allowed / period_us:.2f}"
                )


@dataclass(slots=True)
class LagWatch:
    """What one life of a node has taken and its peers have yet to apply, known by looking into them.

    `PeerStatus.lag_seconds` must never be less than the age of the oldest of it.
    """

    taken: list[tuple[int, bytes, int, int]] = field(default_factory=list)
    """When by the node's clock, bucket key, slot, and the count in the slot."""
    applied: dict[str, int] = field(default_factory=dict)
    """By peer, how many of the oldest it has applied, or would not take any more."""

    def oldest_unapplied_us(self, name: str, origin: Origin, store: Store, *boundaries_us: Boundary) -> int | None:
        """When the oldest take that peer `name` lacks was taken; None when it has all.

        Args:
            store: the peer's.
            boundaries_us: what ends before one of them need not be told any more.
        """
        taken = self.taken
        index = self.applied.get(name, 0)
        while index < len(taken):
            _, key, slot, count = taken[index]
            if held(store.get(key), origin, slot) < count:
                end_us = slot_end_us(slot)
                if all(end_us > boundary_us(key) for boundary_us in boundaries_us):
                    break
            index += 1
        self.applied[name] = index
        return taken[index][0] if index < len(taken) else None
