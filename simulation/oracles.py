"""What is promised, checked from outside: by true time, and by all that every node has admitted.

Each oracle is told of every admission when it happens, and raises `BrokenPromise` at the first that should not have
been.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ratelimit_sidecar.crdt.bucket import Bucket, Origin
from ratelimit_sidecar.crdt.limit import TokenBucketLimit
from ratelimit_sidecar.crdt.slot import slot_end_us
from ratelimit_sidecar.crdt.store import Store
from simulation.textbook import TextbookBucket

Boundary = Callable[[bytes, int], int]


class BrokenPromise(AssertionError):
    """The product, or the simulator, is wrong."""


def held(bucket: Bucket | None, origin: Origin, slot: int) -> int:
    """What a node knows another to have taken in a slot."""
    heard = None if bucket is None else bucket._received
    slots = None if heard is None else heard.get(origin)
    return 0 if slots is None else slots.get(slot, 0)


class StrictOracle:
    """P5: all replicas together never admit more than the limit in any interval."""

    def __init__(self, name: str, limit: TokenBucketLimit) -> None:
        self._name = name
        self._bucket = TextbookBucket(limit)

    def admitted(self, hits: int, true_us: int) -> None:
        limit = self._bucket.limit
        over = self._bucket.charge(true_us, hits)
        if over > 0:
            raise BrokenPromise(
                f"strict: {-(-over // limit.period_us)} tokens of {self._name} were admitted beyond {limit}"
            )


class LocalOracle:
    """P2: a bucket that is never replicated is a textbook token bucket, by the clock of its node, until that is set
    back: then it stands still for a while."""

    def __init__(self, name: str, limit: TokenBucketLimit) -> None:
        self._name = name
        self._bucket = TextbookBucket(limit)
        self._latest_us: int | None = 0

    def decided(self, hits: int, own_us: int, *, admitted: bool) -> None:
        if self._latest_us is None or own_us < self._latest_us:
            self._latest_us = None
            return
        self._latest_us = own_us
        if admitted is not self._bucket.take(own_us, hits):
            raise BrokenPromise(f"local: {self._name} {'admitted' if admitted else 'denied'} {hits} at {own_us}")


class EventualOracle:
    """P3: beyond the limit only what others had admitted and not yet delivered to whoever admitted last.

    Args:
        exponent: of the bucket's slots. A replica that knows takes by their slots places them up to a slot early: half
            of one, or all of it where the limit has changed.
    """

    def __init__(self, name: str, limit: TokenBucketLimit, exponent: int) -> None:
        self.overshoots = 0
        """Admissions beyond the limit."""
        self._name = name
        self._bucket = TextbookBucket(limit)
        self._exponent = exponent
        self._taken: dict[tuple[Origin, int], int] = {}
        """By origin and slot, all that was admitted."""
        self._since: dict[tuple[Origin, int], int] = {}
        """The same, since the deficit was last zero: what came before can not matter."""

    def admitted(self, bucket: Bucket, hits: int, true_us: int, spread_us: int) -> None:
        """Note an admission, and check that no more was admitted than what the node had not heard of explains.

        Args:
            bucket: as the node that admits sees it, just after.
            spread_us: by how much any two clocks have differed at any two moments.

        Raises:
            BrokenPromise: more was admitted.
        """
        self._bucket.drain(true_us)
        if not self._bucket.deficit:
            self._since.clear()
        place = (bucket.origin, bucket._own_slot)
        self._taken[place] = bucket._own_tokens
        self._since[place] = self._since.get(place, 0) + hits
        over = self._bucket.charge(true_us, hits)
        if over <= 0:
            return
        self.overshoots += 1
        unheard = sum(
            min(tokens, self._taken[origin, slot] - held(bucket, origin, slot))
            for (origin, slot), tokens in self._since.items()
            if origin != bucket.origin
        )
        limit = self._bucket.limit
        allowed = unheard * limit.period_us + limit.tokens * ((1 << self._exponent) + spread_us)
        if over > allowed:
            raise BrokenPromise(
                f"eventual: {over / limit.period_us:.2f} tokens of {self._name} were admitted by {bucket.origin.node}"
                f" beyond {limit}; {unheard} it had not heard of explain {allowed / limit.period_us:.2f}"
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
                if all(end_us > boundary_us(key, slot) for boundary_us in boundaries_us):
                    break
            index += 1
        self.applied[name] = index
        return taken[index][0] if index < len(taken) else None
