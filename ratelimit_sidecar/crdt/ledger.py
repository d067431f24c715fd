"""All strict buckets of one replica, its *purses*, by key: asks and payments of peers go through here to each purse.

A `tick` looks at a bounded number of the buckets that requests used lately. `sweep` drops full buckets without open
asks: one that is created again later has no more tokens than that.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Final, NamedTuple

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.homes import Homes
from ratelimit_sidecar.crdt.limit import TokenBucketLimit
from ratelimit_sidecar.crdt.payment_policy import Ask, Payment, PaymentPolicy, Ticket
from ratelimit_sidecar.crdt.places import BucketPlaces
from ratelimit_sidecar.crdt.shares import TOKEN, Shares
from ratelimit_sidecar.crdt.store import DEFAULT_MAX_BUCKETS, LimitOfKey, StoreFull
from ratelimit_sidecar.crdt.strict import HOLD_US, StrictBucket
from ratelimit_sidecar.crdt.untracked_dict import UntrackedDict
from ratelimit_sidecar.crdt.wait_queues import WaitQueues
from ratelimit_sidecar.crdt.waiting import SERVED_AT_ONCE, PendingDecision, Wish
from ratelimit_sidecar.cycle_collector import young_objects

FEW_TOKENS: Final = 8 * TOKEN
"""With a smaller home, no peer is asked while requests wait: asks would break up the whole tokens that tickets need."""

MAX_TICKETS: Final = 8_192
"""The most tickets that peers may use at any one time."""

_OBJECTS_OF_PURSE: Final = 3
_OBJECTS_OF_PEER: Final = 2
"""The objects that the cycle collector sees: of a bucket, and of what it notes of each other member."""


class _IssuedTicket(NamedTuple):
    """A ticket that was sent to a peer, which may use it until `until_us`."""

    key: bytes
    peer: str
    until_us: int


class Ledger:
    """All strict buckets of one replica. Call `tick` often and send the asks that it returns; call `sweep` regularly.

    Args:
        limit_of_key: called for keys that peers ask for.
        max_buckets: as in `crdt.store`; so is `rule_key`.
    """

    def __init__(
        self,
        shares: Shares,
        origin: Origin,
        limit_of_key: LimitOfKey,
        *,
        max_buckets: int = DEFAULT_MAX_BUCKETS,
        rule_key: Callable[[bytes], bytes] = lambda _key: b"",
    ) -> None:
        self.places = BucketPlaces(max_buckets, rule_key)
        self.shares = shares
        self.limit_of_key = limit_of_key
        self.queues = WaitQueues()
        self._origin = origin
        self._policies = UntrackedDict[PaymentPolicy]()
        self._active: deque[StrictBucket] = deque()
        """Buckets that `tick` has to look at; each appends itself when a request takes from it."""
        self._sweep_order: deque[PaymentPolicy] = deque()
        self._homes = Homes(shares)
        self._tickets: OrderedDict[int, _IssuedTicket] = OrderedDict()
        """Tickets that are not over, by number; the oldest first."""
        self._kept: dict[bytes, int] = {}
        """What purses had when this replica was stopped, by key, until they get it back: see `restore`."""
        self._kept_order: deque[bytes] = deque()
        """The keys of `_kept`, and some that were restored already. (In a dict that was emptied from its front, finding
        the first key takes long.)"""
        self._age_us = 0
        """How long purses had refilled by then that were not kept, as they were full or nobody had used them."""
        self._is_without_age = set[bytes]()
        """Purses that were made before their home began, and have not got that refill yet."""

    def __len__(self) -> int:
        return len(self._policies)

    def walk(self) -> Iterator[StrictBucket]:
        """Every bucket. The caller may pause between two; buckets added or dropped meanwhile may be left out or not."""
        for shard in self._policies.shards:
            for policy in list(shard.values()):
                yield policy.bucket

    def bucket(self, key: bytes, limit: TokenBucketLimit, strict_us: int) -> StrictBucket:
        """The bucket of `key`, enforcing `limit` from now on; O(1) unless the limit or the home changed.

        Args:
            strict_us: see `crdt.strict` for this clock.

        Raises:
            StoreFull: there is no bucket, and no room for a new one.
        """
        policy = self._policies.get(key)
        if policy is None:
            bucket = self._make(key, limit, strict_us)
            if self._age_us and key not in self._kept:
                self._is_without_age.add(key)
                self._add_age(bucket)
            if self._kept:
                self._restore(bucket)
            return bucket
        bucket = policy.bucket
        if bucket.limit is not limit and bucket.limit != limit:
            bucket.set_limit(limit, strict_us)
            bucket.set_home(self.shares.home(key, limit.capacity, strict_us), strict_us)
        elif bucket.home_version != self._homes.version:
            bucket.advance(strict_us)
        if self._is_without_age:
            self._add_age(bucket)
        if self._kept:
            self._restore(bucket)
        return bucket

    def clear(self) -> Iterator[None]:
        """Forget all buckets, in steps; then the ledger must not be used any more. See `Store.clear`."""
        self._active.clear()
        self._sweep_order.clear()
        yield from self._policies.clear()

    def amounts_to_keep(self, strict_us: int, *, has_rules: bool = True) -> Iterator[tuple[bytes, int]]:
        """What each purse has, by key; below 0 what it owes. Call it at a stop, when no purse is taken from or pays any
        more: tokens that leave a purse after this would be spent twice. Purses that are not among them have refilled
        for `age_to_keep`.

        Args:
            has_rules: False if there were none yet, so that it is not known whose rule is gone.
        """
        for key, amount in self._kept.items():
            if not has_rules or self.limit_of_key(key) is not None:
                yield key, amount
        for bucket in self.walk():
            if bucket.key in self._kept:
                continue
            bucket.advance(strict_us)
            self._add_age(bucket)
            if bucket.level or bucket.key not in self._is_without_age:
                yield bucket.key, bucket.level // bucket.limit.period_us

    def age_to_keep(self, strict_us: int, *, has_rules: bool = True) -> int:
        """How long purses have refilled that are not among `amounts_to_keep`, in microseconds. 0 if the home was not
        the whole one: it may be another one in the next life. 0 also if some are left out whose rule is gone."""
        if has_rules and any(self.limit_of_key(key) is None for key in self._kept):
            return 0
        since_us = self._homes.since_us
        if since_us is None:
            return self._age_us
        return strict_us - since_us + self._age_us if self._homes.is_one_and_whole else 0

    def restore(self, kept: Mapping[bytes, int], age_us: int) -> None:
        """Put back into purses what `amounts_to_keep` yielded when this replica was stopped, once only. A purse gets it
        when it has a home, as far as there is room.

        Args:
            age_us: what `age_to_keep` returned then.
        """
        self._kept = dict(kept)
        self._kept_order = deque(kept)
        self._age_us = age_us

    def _restore_some(self, strict_us: int, max_buckets: int) -> None:
        """Make some of the purses that nobody has used yet, so that they fill up and are dropped like all others."""
        self._homes.look(strict_us)
        for _ in range(min(max_buckets, len(self._kept_order))):
            key = self._kept_order.popleft()
            if key not in self._kept:
                continue
            limit = self.limit_of_key(key)
            if isinstance(limit, TokenBucketLimit):
                with suppress(StoreFull):
                    self.bucket(key, limit, strict_us)
            if key in self._kept:
                # A rule, a home or room may be yet to come. Were it forgotten, it would get the refill of one that was
                # not kept.
                self._kept_order.append(key)

    def _restore(self, bucket: StrictBucket) -> None:
        if bucket.max_level and bucket.key in self._kept:
            bucket.restore(self._kept.pop(bucket.key))

    def _add_age(self, bucket: StrictBucket) -> None:
        if bucket.max_level and bucket.key in self._is_without_age:
            self._is_without_age.discard(bucket.key)
            if self._homes.is_one_and_whole:
                bucket.refill_for(self._age_us)

    def _may_drop(self, bucket: StrictBucket, strict_us: int) -> bool:
        """True if a bucket that is made later would be the same. One that was restored or paid may be full before that
        is so."""
        if not bucket.is_idle(strict_us):
            return False
        since_us = self._homes.since_us
        age_us = 0 if since_us is None else strict_us - since_us
        if self._homes.is_one_and_whole:
            age_us += self._age_us
        return age_us * bucket.refill >= bucket.max_level

    def withhold(self, key: bytes, limit: TokenBucketLimit, amount: int, strict_us: int) -> int:
        """Set how much of the home the bucket must not use, because Envoys have token buckets with this amount.

        More is withheld only if the bucket has as many tokens, which it gives up. So the sum of homes and tokens stays
        within the limit.

        Returns:
            The amount that Envoys may use.

        Raises:
            StoreFull: there is no bucket, and no room for one.
        """
        bucket = self.bucket(key, limit, strict_us)
        bucket.advance(strict_us)
        bucket.withhold(amount)
        bucket.set_home(self.shares.home(key, limit.capacity, strict_us), strict_us)
        return bucket.envoys_amount

    def tick(
        self, streams: Mapping[str, int], strict_us: int, max_buckets: int, longest_key: int
    ) -> dict[str, dict[bytes, Ask]]:
        """Look at up to `max_buckets` active buckets: have each follow its home and make asks for it. Note whether
        homes have changed, and free the room of some old tickets. To be called without peers too.

        Args:
            streams: by peer that can be asked, the number of the stream to it.
            longest_key: the longest key that an ask can have.

        Returns:
            The asks to send, by peer and key. Room is reserved for each: call `receive_payment` or `closed` for it
            later.
        """
        self._homes.look(strict_us)
        self._release_old_tickets(strict_us)
        weights = self.shares.membership.weights
        members = {peer: stream for peer, stream in streams.items() if weights.get(peer)}
        asks: dict[str, dict[bytes, Ask]] = {}
        for _ in range(min(max_buckets, len(self._active))):
            bucket = self._active.popleft()
            askable = members if len(bucket.key) <= longest_key else {}
            if bucket.home < FEW_TOKENS and bucket.key in self.queues.by_key:
                askable = {}
            for peer, ask in self._policies[bucket.key].make_asks(askable, strict_us).items():
                asks.setdefault(peer, {})[bucket.key] = ask
            if bucket.demand() or bucket.reserved:
                self._active.append(bucket)
            else:
                bucket.is_active = False
        return asks

    def pay(self, peer: str, key: bytes, ask: Ask, strict_us: int) -> Payment | None:
        """Answer a peer's ask: the payment to send.

        Returns:
            None when no strict rule here has the key, or there is no room for its bucket.

        Raises:
            ValueError: not a bucket key.
        """
        limit = self.limit_of_key(key)
        if not isinstance(limit, TokenBucketLimit):
            return None
        try:
            self.bucket(key, limit, strict_us)
        except StoreFull:
            return None
        return self._policies[key].pay(peer, ask, strict_us)

    def receive_payment(self, peer: str, stream_number: int, key: bytes, pay: Payment, strict_us: int) -> bool:
        """Add a peer's payment for the ask for `key` that is open on that stream.

        Returns:
            False if the peer claims to pay more than it can have. Then only what it can have was added.
        """
        policy = self._policies[key]
        max_home = self.shares.max_home(peer, key, policy.bucket.limit.capacity)
        is_right = policy.receive_payment(peer, stream_number, pay, max_home, strict_us)
        queue = self.queues.by_key.get(key)
        if queue is not None:
            queue.serve(strict_us, SERVED_AT_ONCE)
        return is_right

    def wait(self, key: bytes, waiting: PendingDecision, strict_us: int) -> bool:
        """Let a request wait for tokens of the bucket with that key; see `WaitQueues.join`."""
        return self.queues.join(self._policies[key], waiting, strict_us)

    def accept(self, number: int, wish: Wish, ticket: Ticket, strict_us: int) -> int:
        """Take the ticket that a peer has sent for a wish; see `WaitQueue.accept`."""
        queue = self.queues.by_key[wish.key]
        max_home = self.shares.max_home(wish.peer, wish.key, queue.policy.bucket.limit.capacity)
        return queue.accept(number, wish, ticket, max_home, strict_us)

    def set_aside(self, number: int, peer: str, key: bytes, tokens: int, strict_us: int) -> Ticket | None:
        """Answer a peer's wish: the ticket to send. Call `release` when the peer is done with it.

        Args:
            number: of the ticket; no other of this ledger has had it.

        Returns:
            None when no strict rule here has the key, or there is no room for its bucket or the ticket.

        Raises:
            ValueError: not a bucket key.
        """
        limit = self.limit_of_key(key)
        if not isinstance(limit, TokenBucketLimit) or len(self._tickets) >= MAX_TICKETS:
            return None
        try:
            self.bucket(key, limit, strict_us)
        except StoreFull:
            return None
        queue = self.queues.by_key.get(key)
        if queue is not None and len(queue):
            return Ticket(0, 0)
        ticket = self._policies[key].set_aside(number, tokens, strict_us)
        if ticket.tokens:
            self._tickets[number] = _IssuedTicket(key, peer, strict_us + HOLD_US)
        return ticket

    def release(self, number: int, returned: int, strict_us: int) -> None:
        """Free a ticket that a peer is done with; nothing happens if it has expired. See `StrictBucket.release`."""
        held = self._tickets.pop(number, None)
        if held is not None:
            self._policies[held.key].bucket.release(number, held.peer, returned, strict_us)

    def _release_old_tickets(self, strict_us: int) -> None:
        for _ in range(SERVED_AT_ONCE):
            number, held = next(iter(self._tickets.items()), (0, None))
            if held is None or strict_us < held.until_us:
                return
            self.release(number, 0, strict_us)

    def closed(self, stream_number: int, keys: Iterable[bytes], strict_us: int) -> None:
        """Free the room of the asks for `keys` that were open on a stream, which is closed."""
        for key in keys:
            self._policies[key].bucket.closed(stream_number, strict_us)

    def sweep(self, strict_us: int, max_buckets: int) -> int:
        """Look at the next `max_buckets` and drop those that are full and have no open asks.

        Returns:
            How many it has looked at.
        """
        if self._kept and strict_us >= self.shares.from_us:
            self._restore_some(strict_us, max_buckets)
        count = min(max_buckets, len(self._sweep_order))
        for _ in range(count):
            policy = self._sweep_order.popleft()
            bucket = policy.bucket
            if not bucket.is_active and bucket.key not in self.queues.by_key and self._may_drop(bucket, strict_us):
                del self._policies[bucket.key]
                self._is_without_age.discard(bucket.key)
                self.places.give_back(bucket.key)
            else:
                self._sweep_order.append(policy)
        return count

    def _make(self, key: bytes, limit: TokenBucketLimit, strict_us: int) -> StrictBucket:
        if not self.places.take(key):
            raise StoreFull
        self._homes.look(strict_us)
        home, from_us = self.shares.home(key, limit.capacity, strict_us), self._homes.since_us
        bucket = StrictBucket(
            key,
            limit,
            self._origin,
            strict_us,
            home=home,
            from_us=strict_us if from_us is None else from_us,
            active=self._active,
            homes=self._homes,
        )
        self._add(key, bucket)
        return bucket

    def _add(self, key: bytes, bucket: StrictBucket) -> None:
        policy = PaymentPolicy(bucket)
        young_objects.note(_OBJECTS_OF_PURSE + _OBJECTS_OF_PEER * (len(self.shares.membership.weights) - 1))
        self._policies.add(key, policy)
        self._sweep_order.append(policy)
