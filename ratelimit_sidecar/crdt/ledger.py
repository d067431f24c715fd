"""All strict buckets of one replica, and what it has to say to its peers about them.

Only buckets that somebody asked for of late, or that hold a loan, are looked at in a `tick`, and a bounded number of
them. A full bucket without loans is dropped: made anew it has no more than it had.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.lending import Loans
from ratelimit_sidecar.crdt.limit import AnyLimit, Limit
from ratelimit_sidecar.crdt.room import Room
from ratelimit_sidecar.crdt.shares import MAX_WHOLE_CAPACITY, PARTS, Shares, parts_of, whole_tokens
from ratelimit_sidecar.crdt.store import DEFAULT_MAX_BUCKETS, StoreFull
from ratelimit_sidecar.crdt.strict import Ask, Grant, Return, StrictBucket
from ratelimit_sidecar.crdt.untracked_dict import UntrackedDict

LimitOfKey = Callable[[bytes], AnyLimit | None]
"""The limit of a key that a peer names; None when this replica has no strict rule for it."""

MAX_FIRST_NUMBER: Final = 2**31

LOST_AT_ONCE: Final = 4_096
"""Of the active buckets, those that are told at once when a peer is lost: more than ticks get round in a second. What
the others go on waiting for or dividing by is stale before they are looked at (`lending.STALE_US`). Callers can make a
million active, by inventing keys, and to tell them all would hold up every request.
"""


@dataclass(slots=True)
class Wishes:
    """What to tell one peer, by bucket key; both in order of their numbers with what was said before."""

    asks: dict[bytes, Ask] = field(default_factory=dict)
    returns: dict[bytes, Return] = field(default_factory=dict)


class Ledger:
    """Args:
    limit_of_key: asked when a peer wants to borrow of a key that has no bucket here yet.
    first_number: for the numbers of asks; random, 0 to 2**31.
    max_buckets: as in `crdt.store`; so is `rule_key`.
    """

    def __init__(
        self,
        shares: Shares,
        origin: Origin,
        limit_of_key: LimitOfKey,
        first_number: int,
        *,
        max_buckets: int = DEFAULT_MAX_BUCKETS,
        rule_key: Callable[[bytes], bytes] = lambda _key: b"",
    ) -> None:
        self.room = Room(max_buckets, rule_key)
        self.shares = shares
        self.limit_of_key = limit_of_key
        self._origin = origin
        self._first_number = first_number
        self._loans = UntrackedDict[Loans]()
        self._busy: list[StrictBucket] = []
        self._active: deque[Loans] = deque()
        self._active_keys: set[bytes] = set()
        self._sweep_order: deque[Loans] = deque()
        self._in_force: list[Mapping[str, int]] = []
        self._home_version = 0
        """Counts up whenever home shares change."""
        self._withheld: dict[bytes, int] = {}
        """Parts of home shares that are not the buckets', by key: see `withhold`."""

    def __len__(self) -> int:
        return len(self._loans)

    def __iter__(self) -> Iterator[StrictBucket]:
        for loans in self._loans.values():
            yield loans.bucket

    def walk(self) -> Iterator[StrictBucket]:
        """Every bucket, however slowly: one that comes or goes meanwhile may be among them or not."""
        for shard in self._loans.shards:
            for loans in list(shard.values()):
                yield loans.bucket

    def bucket(self, key: bytes, limit: Limit, now_us: int) -> StrictBucket:
        """The bucket of `key`, enforcing `limit` from now on; O(1) unless the limit or the home share changed.

        Args:
            now_us: see `crdt.strict` for the clock.

        Raises:
            StoreFull: there is none, and no room for one.
        """
        loans = self._loans.get(key)
        if loans is None:
            if not self.room.take(key):
                raise StoreFull
            return self._make(key, limit, now_us).bucket
        bucket = loans.bucket
        if bucket.limit is not limit and bucket.limit != limit:
            bucket.set_limit(limit, now_us)
            bucket.home_version = -1
        if bucket.home_version != self._home_version:
            bucket.home_version = self._home_version
            bucket.set_home(self._home_of(key, limit, now_us), now_us)
        return bucket

    def own_parts(self, key: bytes, limit: Limit, now_us: int) -> int:
        """This node's home share of one limit at `now_us`, with what is withheld of it."""
        return self.shares.home_of_key(key, limit.capacity, now_us)

    def withhold(self, key: bytes, limit: Limit, parts: int, now_us: int) -> int:
        """Keep parts of the home share from the bucket, since others run a token bucket of them from now on; less again
        when they have ceased to. More only as far as the bucket has tokens that it can give up: so neither shares nor
        tokens become more by it.

        Returns:
            The parts that others may run.

        Raises:
            StoreFull: there is no bucket, and no room for one.
        """
        bucket = self.bucket(key, limit, now_us)
        bucket.advance(now_us)
        before = self._withheld.get(key, 0)
        more = parts - before
        if more > 0:
            more = min(more, bucket.home_now - bucket.lent)
            if limit.capacity > MAX_WHOLE_CAPACITY:
                tokens = more * limit.capacity // PARTS
            else:
                tokens = whole_tokens(more, limit.capacity)
            tokens = max(0, min(tokens, bucket.remaining))
            bucket.level -= (tokens * limit.period_us) << 32
            more = min(more, parts_of(tokens, limit.capacity))
        parts = max(0, before + more)
        if parts:
            self._withheld[key] = parts
        else:
            self._withheld.pop(key, None)
        bucket.set_home(self._home_of(key, limit, now_us), now_us)
        return parts

    def tick(self, homes: Mapping[str, int], now_us: int, most: int) -> dict[str, Wishes]:
        """Look at `most` of the active buckets, in turn.

        Args:
            homes: by node, the home share of every peer that can be reached.

        Returns:
            What to tell each peer.
        """
        self._look_at_shares(now_us)
        for bucket in self._busy:
            bucket.is_noted = False
            loans = self._loans.get(bucket.key)
            if loans is not None and bucket.key not in self._active_keys:
                self._active_keys.add(bucket.key)
                self._active.append(loans)
        self._busy.clear()
        wishes: dict[str, Wishes] = {}
        for _ in range(min(most, len(self._active))):
            loans = self._active.popleft()
            asks, returns = loans.ask(homes, now_us)
            for lender, ask in asks.items():
                wishes.setdefault(lender, Wishes()).asks[loans.bucket.key] = ask
            for lender, returned in returns.items():
                wishes.setdefault(lender, Wishes()).returns[loans.bucket.key] = returned
            if loans.bucket.asked or loans.bucket.lenders:
                self._active.append(loans)
            else:
                self._active_keys.remove(loans.bucket.key)
        return wishes

    def answer(self, borrower: str, key: bytes, ask: Ask, now_us: int) -> Grant | None:
        """Lend to a peer.

        Returns:
            None when no strict rule here knows the key, or there is no room for its bucket.

        Raises:
            ValueError: not a bucket's name.
        """
        loans = self._known(key, now_us)
        return loans.answer(borrower, ask, now_us) if loans is not None else None

    def granted(self, lender: str, key: bytes, grant: Grant, now_us: int) -> bool:
        """A lender has answered.

        Returns:
            False when it has granted more than it can have, and is believed no more than that.
        """
        loans = self._loans.get(key)
        if loans is None:
            return True
        most = self.shares.most_of_key(lender, key, loans.bucket.limit.capacity)
        loans.granted(lender, grant, now_us, most=most)
        return grant.parts <= most

    def returned(self, borrower: str, key: bytes, returned: Return, now_us: int) -> None:
        """A borrower has given back a part of its loan, or all of it."""
        loans = self._loans.get(key)
        if loans is not None:
            loans.returned(borrower, returned, now_us)

    def lost(self, peer: str) -> None:
        """The peer cannot be reached: no answer is coming."""
        for loans in islice(self._active, LOST_AT_ONCE):
            loans.lost(peer)

    def sweep(self, now_us: int, most: int) -> int:
        """Drop the full buckets without loans among the next `most`, in turn.

        Returns:
            The number of buckets dropped.
        """
        dropped = 0
        for _ in range(min(most, len(self._sweep_order))):
            loans = self._sweep_order.popleft()
            bucket = loans.bucket
            if bucket.key not in self._active_keys and not bucket.is_noted and bucket.is_idle(now_us):
                # A grant may still be on its way: made anew, the bucket must not ask under a number it has used.
                self._first_number = max(self._first_number, loans.last_number)
                del self._loans[bucket.key]
                self.room.give_back(bucket.key)
                dropped += 1
            else:
                self._sweep_order.append(loans)
        return dropped

    def _known(self, key: bytes, now_us: int) -> Loans | None:
        limit = self.limit_of_key(key)
        if not isinstance(limit, Limit):
            return None
        try:
            self.bucket(key, limit, now_us)
        except StoreFull:
            return None
        return self._loans[key]

    def _look_at_shares(self, now_us: int) -> None:
        in_force = self.shares.in_force(max(now_us, self.shares.from_us))
        if in_force != self._in_force:
            self._in_force = in_force
            self._home_version += 1

    def _home_of(self, key: bytes, limit: Limit, now_us: int) -> int:
        home = self.shares.home_of_key(key, limit.capacity, max(now_us, self.shares.from_us))
        return max(0, home - self._withheld.get(key, 0))

    def _make(self, key: bytes, limit: Limit, now_us: int) -> Loans:
        self._look_at_shares(now_us)
        home, from_us = self._home_of(key, limit, now_us), self.shares.since_us(now_us)
        bucket = StrictBucket(key, limit, self._origin, now_us, home=home, from_us=from_us, busy=self._busy)
        bucket.home_version = self._home_version
        loans = Loans(bucket, self._first_number)
        self._loans.add(key, loans)
        self._sweep_order.append(loans)
        return loans
