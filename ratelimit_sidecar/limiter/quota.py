"""Quotas: parts of limits that Envoys enforce by themselves (envoy.service.rate_limit_quota.v3), and report on.

Theory of operation. An Envoy's *bucket* is a set of pairs, which the rules match like a descriptor; all buckets with
one limit and key, of all Envoys, are a *pool*. Every 5 s an Envoy reports what it has admitted and denied: its demand.
The limit is divided among all demands, of this node's Envoys and of those that peers tell of (`fair_shares`), and each
Envoy is told its share (`assignment`): with every report, for assignments end, and at once when it has changed by more
than a sixteenth.

Of one node all assignments together never exceed what is to be divided. So a share is lowered first, and only what that
has freed is given to others; and what an Envoy holds that was lost stays its own until its assignment ends. A node that
has just started does not know what its Envoys hold: until all have had time to report it tells nothing to those that
hold something, and little to others.

Of a strict limit nothing but this node's home share is divided, less what it has lent; the bucket does without it.

What is admitted is charged to the limit's bucket in small pieces until the next report is due: all at once it would
look like a burst of five seconds, to those who ask about each request.

Times are microseconds of one clock that does not step, rates billionths of a token per second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from ratelimit_sidecar.crdt.limit import AnyLimit, Limit
from ratelimit_sidecar.crdt.shares import MAX_WHOLE_CAPACITY, PARTS, parts_of, whole_tokens_up
from ratelimit_sidecar.crdt.store import StoreFull
from ratelimit_sidecar.limiter.assignment import (
    ALLOW_ALL,
    SECOND_US,
    STEPS,
    TOKEN,
    Assignment,
    Terms,
    after,
    assign,
    terms_of,
    within_debt,
)
from ratelimit_sidecar.limiter.fair_shares import Group, Level, fair_level, grouped, rounded_want
from ratelimit_sidecar.limiter.limiter import MAX_HITS, Limiter
from ratelimit_sidecar.limiter.plan import Step

Pairs = tuple[tuple[str, str], ...]

REPORT_US: Final = 5 * SECOND_US
"""Between two reports of an Envoy, whatever its `reporting_interval`."""

TTL_S: Final = 20
"""Of an assignment. Renewed with each report, it outlives a restart of this node by nearly ten seconds."""

TTL_US: Final = TTL_S * SECOND_US

LEARNING_US: Final = REPORT_US + SECOND_US
"""From the start. By then each Envoy has connected again, which it does when its next report is due."""

SILENCE_US: Final = 3 * REPORT_US + SECOND_US
"""An Envoy lists all its buckets in each report: one that it has not for so long it no longer has."""

IDLE_US: Final = 60 * SECOND_US
"""A bucket without a request for so long is to be forgotten, by Envoy as well."""

IDLE_PART: Final = 32
"""One part in so many of a limit is for those who want nothing, of all together: so their first requests pass."""

HEADROOM_PART: Final = 64
"""Who had so many requests wants to be able to have one part in so many more."""

LEAST_MEASURE_US: Final = SECOND_US
"""The first report of a bucket comes at once, the second when all others are due."""

CHANGE_PART: Final = 16
"""A share that has changed by one part in so many is told at once."""

SAME_PART: Final = 64
"""And by less than one in so many not even when it is renewed."""

CHARGE_PART: Final = 8
"""Of the capacity: no more is charged at once."""

TELL_US: Final = 4 * SECOND_US
"""Peers are told of a demand that has not changed so often, since they forget it after `DEMAND_US`."""

DEMAND_US: Final = 4 * REPORT_US

MAX_STREAMS: Final = 1_024
MAX_POOLS: Final = 32_768
MAX_HOLDS: Final = 65_536
"""Buckets of all Envoys together. Of one that finds no room what it reports is charged; it is told nothing, so that
Envoy does as it is configured to without an assignment."""

MAX_PAIRS: Final = 32
"""Of a bucket."""

MAX_GROUPS: Final = 64
"""Of one demand that peers are told of."""

MAX_RATE: Final = 2**63 - 1
"""Of a demand: nine billion requests a second."""

_SWEEP_POOLS: Final = 256
_SHARE_HOLDS: Final = 256
"""A tick looks at so many, and at those of the pool that exceeds it."""

_CHARGED_POOLS: Final = 256


class QuotasFull(Exception):
    """There is no room for another stream."""


class Usage(NamedTuple):
    """What an Envoy reports of one bucket.

    Args:
        bucket_id: as it came, to be sent back.
        pairs: texts from `text_of`.
        elapsed_s: since the last report of it; 0 of a new one, as Envoy cuts it to whole seconds.
    """

    bucket_id: bytes
    pairs: Pairs
    allowed: int
    denied: int
    elapsed_s: int


class Action(NamedTuple):
    """What an Envoy is told. Without an assignment it is to forget the bucket."""

    bucket_id: bytes
    assignment: Assignment | None


class Hold:
    """One bucket of one Envoy."""

    __slots__ = (
        "active_us",
        "bucket_id",
        "counted",
        "demand",
        "expires_us",
        "generation",
        "key",
        "measured_us",
        "pool",
        "reported_us",
        "step",
        "stream",
        "told",
        "want",
    )

    def __init__(self, stream: QuotaStream, key: tuple[str, Pairs], usage: Usage, pool: Pool, step: Step) -> None:
        self.stream = stream
        self.key = key
        self.bucket_id = usage.bucket_id
        self.pool = pool
        self.step = step
        self.generation = 0
        """That of the rules which it was matched by."""
        self.demand = -1
        """Hits per second, also those denied; -1 while not measured."""
        self.counted = 0
        """Hits since `measured_us`."""
        self.measured_us = self.reported_us = self.active_us = 0
        self.told: Assignment | None = None
        self.expires_us = 0
        self.want = 0

    @property
    def rate(self) -> int:
        """What it holds."""
        return 0 if self.told is None else self.told.rate


class Lost(NamedTuple):
    """What an Envoy holds, or may hold, whose stream has ended."""

    rate: int
    expires_us: int
    lost_us: int


class Heard(NamedTuple):
    """A peer's demand."""

    groups: Sequence[Group]
    heard_us: int


class Demand(NamedTuple):
    """As peers are told of it.

    Args:
        version: counts up with each that is to be told.
    """

    version: int
    key: bytes
    groups: tuple[Group, ...]


class Pool:
    """All that share one limit on one key."""

    __slots__ = (
        "budget",
        "charge_until_us",
        "charged_us",
        "demand",
        "due",
        "heard",
        "held",
        "holds",
        "is_dirty",
        "key",
        "level",
        "limit",
        "lost",
        "pending",
        "step",
        "terms",
        "told_us",
        "waiting",
    )

    def __init__(self, key: bytes, limit: AnyLimit | None) -> None:
        self.key = key
        self.limit = limit
        self.terms: Terms | None = None if limit is None else terms_of(limit)
        self.step: Step | None = None
        """To take by from its bucket; None while only peers have told of it."""
        self.holds: dict[Hold, None] = {}
        self.due: dict[Hold, None] = {}
        """To be told when it is shared the next time."""
        self.lost: list[Lost] = []
        self.waiting: dict[Hold, None] = {}
        """Those that hold something, of which it is not known how much: see `Quotas._settle`."""
        self.heard: dict[str, Heard] = {}
        self.level = Level(0, 0)
        self.budget = 0
        """The rate of all holds, and of what is lost."""
        self.held = 0
        """Of it."""
        self.is_dirty = False
        self.pending = 0
        """Tokens to be charged until `charge_until_us`."""
        self.charged_us = self.charge_until_us = 0
        self.demand: tuple[Group, ...] = ()
        """As peers are told of it."""
        self.told_us = 0

    @property
    def is_needed(self) -> bool:
        return bool(self.holds or self.lost or self.heard or self.pending)


class QuotaStream:
    """One Envoy, or rather one of its filters.

    Args:
        wake: called when `Quotas.take` may have something.
    """

    __slots__ = ("due", "holds", "wake")

    def __init__(self, wake: Callable[[], None]) -> None:
        self.wake = wake
        self.holds: dict[tuple[str, Pairs], Hold] = {}
        self.due: dict[Hold, None] = {}


class Counts:
    """Since start."""

    __slots__ = ("forgotten", "refused_streams", "reports", "requests", "told", "troubles")

    def __init__(self) -> None:
        self.reports = 0
        """Of buckets."""
        self.requests = {"allowed": 0, "denied": 0}
        """What Envoys have done with requests, as they report."""
        self.troubles = {"no_rule": 0, "no_room": 0, "bad_id": 0, "bad_time": 0}
        """Reports of buckets that no rule limits; for which there was no room; with an id that has no pairs, too many
        or is too long; whose time runs backwards."""
        self.told = 0
        """Assignments, the same again included."""
        self.forgotten = {"idle": 0, "silent": 0}
        """Buckets that an Envoy was told to forget, and those that it no longer spoke of."""
        self.refused_streams = 0


class Quotas:
    """All quotas of one node.

    Args:
        now_us: the start.
        charge_us: the time by which buckets are charged, from that of quotas.
    """

    def __init__(
        self, limiter: Limiter, now_us: int, charge_us: Callable[[], int], *, learning_us: int = LEARNING_US
    ) -> None:
        self._limiter = limiter
        self._charge_us = charge_us
        self._learns_until_us = now_us + learning_us
        self._is_learning = True
        self.counts = Counts()
        self.streams: dict[QuotaStream, None] = {}
        self.pools: dict[bytes, Pool] = {}
        self.holds = 0
        self._dirty: dict[Pool, None] = {}
        self._charging: dict[Pool, None] = {}
        self._to_sweep: list[Pool] = []
        self._version = 0
        self._told: dict[bytes, int] = {}
        """By key the version at which its demand was last to be told, in order of them."""

    def open(self, wake: Callable[[], None]) -> QuotaStream:
        """An Envoy has connected.

        Raises:
            QuotasFull: there are `MAX_STREAMS`.
        """
        if len(self.streams) >= MAX_STREAMS:
            self.counts.refused_streams += 1
            raise QuotasFull
        stream = QuotaStream(wake)
        self.streams[stream] = None
        return stream

    def close(self, stream: QuotaStream, now_us: int) -> None:
        """The stream has ended. What it holds Envoy goes on enforcing, if it is alive, until that ends."""
        del self.streams[stream]
        for hold in list(stream.holds.values()):
            self._drop(hold, now_us)

    def report(self, stream: QuotaStream, domain: str, usages: Iterable[Usage], now_us: int) -> None:
        """An Envoy reports on some of its buckets."""
        touched: dict[Pool, None] = {}
        for usage in usages:
            hold = self._report(stream, domain, usage, now_us)
            if hold is not None:
                touched[hold.pool] = None
        for pool in touched:
            if len(pool.holds) <= _SHARE_HOLDS // 8:
                self._share(pool, now_us)
            else:
                self._soil(pool)

    def take(self, stream: QuotaStream, now_us: int, most: int) -> list[Action]:
        """What the Envoy is to be told now, of at most so many buckets. It counts as told."""
        actions: list[Action] = []
        while stream.due and len(actions) < most:
            hold = next(iter(stream.due))
            del stream.due[hold]
            action = self._tell(hold, now_us)
            if action is not None:
                actions.append(action)
        return actions

    def tick(self, now_us: int) -> None:
        """Charge what is pending, and divide anew what needs it; to be called about ten times a second."""
        if self._is_learning and now_us >= self._learns_until_us:
            self._is_learning = False
            for pool in self.pools.values():
                self._soil(pool)
        self._charge(now_us)
        self._sweep(now_us)
        looked_at = 0
        while self._dirty and looked_at < _SHARE_HOLDS:
            pool = next(iter(self._dirty))
            looked_at += 1 + len(pool.holds)
            self._share(pool, now_us)

    def charge_all(self) -> None:
        """At a stop: nothing that was reported is lost."""
        for pool in list(self._charging):
            self._charge_tokens(pool, pool.pending)

    def hear(self, peer: str, key: bytes, groups: Sequence[Group], now_us: int) -> bool:
        """A peer tells of its Envoys' demand.

        Returns:
            False when no replicated rule here knows the key, or there is no room.

        Raises:
            ValueError: not a bucket's name.
        """
        pool = self.pools.get(key)
        if pool is None:
            limit = self._limiter.rules.replicated_limit_of_key(key)
            if limit is None or len(self.pools) >= MAX_POOLS:
                return False
            if not groups:
                return True
            pool = self.pools[key] = Pool(key, limit)
        before = pool.heard.get(peer)
        if groups:
            pool.heard[peer] = Heard(groups, now_us)
        elif before is not None:
            del pool.heard[peer]
        if before is None or list(before.groups) != list(groups):
            self._soil(pool)
        return True

    def demands(self, told: int, most: int) -> list[Demand]:
        """Those that a peer has yet to be told of, the oldest first.

        Args:
            told: the version of the one that it was told last; 0 when it was told nothing.
        """
        newer: list[bytes] = []
        for key in reversed(self._told):
            if self._told[key] <= told:
                break
            newer.append(key)
        demands: list[Demand] = []
        while newer and len(demands) < most:
            key = newer.pop()
            demands.append(Demand(self._told[key], key, self.pools[key].demand))
        return demands

    def assigned(self, pool: Pool) -> Iterator[int]:
        """The rates in force, of Envoys that are lost as well."""
        for hold in pool.holds:
            if hold.told is not None:
                yield hold.told.rate
        for lost in pool.lost:
            yield lost.rate

    def _report(self, stream: QuotaStream, domain: str, usage: Usage, now_us: int) -> Hold | None:
        counts = self.counts
        counts.reports += 1
        allowed, denied = min(usage.allowed, MAX_HITS), min(usage.denied, MAX_HITS)
        counts.requests["allowed"] += allowed
        counts.requests["denied"] += denied
        elapsed_s = usage.elapsed_s
        if elapsed_s < 0:
            counts.troubles["bad_time"] += 1
            elapsed_s = 0
        if not usage.pairs or len(usage.pairs) > MAX_PAIRS:
            counts.troubles["bad_id"] += 1
            return None
        key = (domain, usage.pairs)
        hold = stream.holds.get(key)
        if hold is None:
            hold = self._hold(stream, key, usage, elapsed_s, now_us)
        elif hold.generation != self._limiter.generation:
            self._match_again(hold, now_us)
        step = hold.step
        self._count(step, allowed, denied)
        if step.terms.rule is None:
            counts.troubles["no_rule"] += 1
        pool = hold.pool
        if allowed and pool.step is not None:
            self._charge_later(pool, allowed, now_us)
        if hold not in pool.holds:
            return None
        if allowed or denied:
            hold.active_us = now_us
        hold.reported_us = now_us
        hold.counted += allowed + denied
        measured_us = now_us - hold.measured_us
        if measured_us >= LEAST_MEASURE_US:
            hold.demand = min(hold.counted * SECOND_US * TOKEN // measured_us, MAX_RATE)
            hold.counted, hold.measured_us = 0, now_us
        pool.due[hold] = None
        return hold

    def _hold(self, stream: QuotaStream, key: tuple[str, Pairs], usage: Usage, elapsed_s: int, now_us: int) -> Hold:
        """A new one. Without room for it, it is one that nobody knows of."""
        step = self._step(key)
        pool = self._pool(step)
        hold = Hold(stream, key, usage, pool, step)
        hold.generation = self._limiter.generation
        hold.active_us = now_us
        # The time is the Envoy's word. All that hangs on it is whether it holds something, and the first measure.
        hold.measured_us = now_us - min(elapsed_s, TTL_S) * SECOND_US
        # An Envoy may have as many as are free.
        if len(stream.holds) >= MAX_HOLDS - self.holds or pool.key not in self.pools:
            self.counts.troubles["no_room"] += 1
            return hold
        if elapsed_s and (pool.lost or self._is_learning):
            pool.waiting[hold] = None
        self.holds += 1
        stream.holds[key] = hold
        pool.holds[hold] = None
        return hold

    def _pool(self, step: Step) -> Pool:
        key = step.bucket_key
        pool = self.pools.get(key)
        terms = step.terms
        if pool is None:
            pool = Pool(key, terms.limit)
            if len(self.pools) < MAX_POOLS:
                self.pools[key] = pool
        if terms.limit is not None:
            pool.step = step
            if pool.limit != terms.limit:
                pool.limit, pool.terms = terms.limit, terms_of(terms.limit)
        return pool

    def _count(self, step: Step, allowed: int, denied: int) -> None:
        """Like requests that were decided here."""
        counts = step.counts
        counts.ok += allowed
        if step.terms.limit is not None:
            counts.admitted_hits += allowed
        elif step.terms.rule is not None:
            counts.unlimited_hits += allowed
        counts.over_limit += denied
        counts.denied_hits += denied
        counts.over_limit_hits += denied

    def _match_again(self, hold: Hold, now_us: int) -> None:
        """Other rules are in force. What it holds of a limit that is now others' counts as lost until it ends."""
        hold.generation = self._limiter.generation
        hold.step = self._step(hold.key)
        pool = self._pool(hold.step)
        self._soil(pool)
        if pool is hold.pool:
            return
        if pool.key not in self.pools:
            self._drop(hold, now_us)
            return
        self._leave(hold, now_us)
        hold.pool = pool
        pool.holds[hold] = None
        # What it goes on enforcing until it is told again is counted where it was.
        hold.told = None

    def _step(self, key: tuple[str, Pairs]) -> Step:
        domain, pairs = key
        return self._limiter.quota_step(domain, self._limiter.rules.in_order(domain, pairs))

    def _drop(self, hold: Hold, now_us: int) -> None:
        """Nothing is heard of it any more."""
        self.holds -= 1
        del hold.stream.holds[hold.key]
        hold.stream.due.pop(hold, None)
        self._leave(hold, now_us)

    def _leave(self, hold: Hold, now_us: int) -> None:
        pool = hold.pool
        del pool.holds[hold]
        pool.due.pop(hold, None)
        pool.waiting.pop(hold, None)
        if hold.told is not None and hold.rate and hold.expires_us > now_us:
            pool.lost.append(Lost(hold.rate, hold.expires_us, now_us))
        else:
            pool.held -= hold.rate
        self._soil(pool)

    def _forget(self, pool: Pool, now_us: int) -> None:
        del self.pools[pool.key]
        self._told.pop(pool.key, None)
        if pool.step is not None and pool.step.terms.is_strict and pool.terms is not None:
            self._withhold(pool, pool.terms, 0, now_us)

    def _soil(self, pool: Pool) -> None:
        """It has to be divided anew."""
        if not pool.is_dirty:
            pool.is_dirty = True
            self._dirty[pool] = None

    def _share(self, pool: Pool, now_us: int) -> None:
        if pool.is_dirty:
            pool.is_dirty = False
            del self._dirty[pool]
        if pool.waiting:
            self._settle(pool, now_us)
        due, pool.due = pool.due, {}
        if pool.terms is not None and (pool.holds or pool.lost or pool.demand):
            self._divide(pool, pool.terms, now_us)
        for hold in due:
            self._wake(hold)
        if pool.terms is None:
            return
        for hold in pool.holds:
            if hold.told is not None and self._has_changed(pool, pool.terms, hold):
                self._wake(hold)

    def _settle(self, pool: Pool, now_us: int) -> None:
        """Envoys that have lost their connection are back: which of them held what they don't say. So it is waited
        until all are there that can be. If some are not, those that are held the least: what is then still counted as
        lost is no less than what the others hold.
        """
        last_us = max([lost.lost_us for lost in pool.lost], default=0)
        if self._is_learning or (len(pool.waiting) < len(pool.lost) and now_us < last_us + LEARNING_US):
            return
        pool.lost.sort()
        for hold, lost in zip(pool.waiting, pool.lost, strict=False):
            hold.told, hold.expires_us = Assignment(0, 0, 0, lost.rate), lost.expires_us
        del pool.lost[: len(pool.waiting)]
        for hold in pool.waiting:
            pool.due[hold] = None
        pool.waiting.clear()

    def _divide(self, pool: Pool, terms: Terms, now_us: int) -> None:
        total = self._total(pool, terms, now_us)
        heard = [group for each in pool.heard.values() for group in each.groups]
        # Those that wait are the lost.
        holds = [hold for hold in pool.holds if not (pool.lost and hold in pool.waiting)]
        everybody = len(holds) + len(pool.lost) + sum([group.members for group in heard])
        wants = [lost.rate for lost in pool.lost]
        for hold in holds:
            # One that is new may want as much as anybody.
            demand = hold.demand if hold.demand >= 0 else total // everybody
            hold.want = min(rounded_want(demand + demand // HEADROOM_PART), MAX_RATE)
            wants.append(hold.want)
        if pool.step is not None and pool.step.terms.is_strict:
            total = self._withhold(pool, terms, max(sum(wants), total // IDLE_PART), now_us)
        own = grouped(wants)
        if len(own) > MAX_GROUPS:
            own = _merged(own)
        self._tell_peers(pool, own, now_us)
        least = total // (IDLE_PART * max(1, everybody))
        groups = [Group(max(group.want, least), group.members) for group in (*own, *heard)]
        level = fair_level(total, groups)
        pool.level = level
        elsewhere = sum([level.share(max(group.want, least)) * group.members for group in heard])
        pool.budget = total - elsewhere
        for hold in holds:
            hold.want = max(hold.want, least)

    def _total(self, pool: Pool, terms: Terms, now_us: int) -> int:
        """What can be divided."""
        step, ledger = pool.step, self._limiter.ledger
        if step is None or pool.limit is None:
            return terms.rate
        if step.terms.is_strict:
            assert ledger is not None
            assert isinstance(pool.limit, Limit)
            return terms.rate * ledger.own_parts(pool.key, pool.limit, now_us) // PARTS
        return within_debt(pool.limit, terms.rate, self._limiter.used(step, self._charge_us()))

    def _withhold(self, pool: Pool, terms: Terms, wanted: int, now_us: int) -> int:
        """Of a strict limit as much as is wanted, and no less than is held: the rest stays with those who ask for each
        request, here or at a peer.
        """
        ledger, limit = self._limiter.ledger, pool.limit
        assert ledger is not None
        assert isinstance(limit, Limit)
        own = ledger.own_parts(pool.key, limit, now_us)
        parts = -(-max(wanted, pool.held) * PARTS // terms.rate) if terms.rate else 0
        if limit.capacity <= MAX_WHOLE_CAPACITY:
            parts = parts_of(min(whole_tokens_up(parts, limit.capacity), limit.capacity), limit.capacity)
        try:
            parts = ledger.withhold(pool.key, limit, min(parts, own), now_us)
        except StoreFull:
            return 0
        return terms.rate * parts // PARTS

    def _tell_peers(self, pool: Pool, own: list[Group], now_us: int) -> None:
        step = pool.step
        if step is None or not step.terms.is_replicated:
            return
        demand = tuple(own)
        if demand != pool.demand or (demand and now_us - pool.told_us >= TELL_US):
            pool.demand = demand
            pool.told_us = now_us
            self._version += 1
            self._told.pop(pool.key, None)
            self._told[pool.key] = self._version

    def _has_changed(self, pool: Pool, terms: Terms, hold: Hold) -> bool:
        target, rate = pool.level.share(hold.want), hold.rate
        if target < rate:
            return (rate - target) * CHANGE_PART > rate
        # What others have yet to give up it is told of when they have.
        more = min(target - rate, pool.budget - pool.held)
        return more > max(rate // CHANGE_PART, terms.rate // STEPS)

    def _wake(self, hold: Hold) -> None:
        stream = hold.stream
        stream.due[hold] = None
        stream.wake()

    def _tell(self, hold: Hold, now_us: int) -> Action | None:
        pool = hold.pool
        if now_us - hold.active_us >= IDLE_US:
            self.counts.forgotten["idle"] += 1
            # It forgets what it holds with the bucket.
            hold.expires_us = now_us
            self._drop(hold, now_us)
            return Action(hold.bucket_id, None)
        if hold in pool.waiting:
            return None
        terms = pool.terms
        if terms is None or hold.step.terms.is_shadow or self._limiter.settings.shadow_mode:
            pool.held -= hold.rate
            assignment = ALLOW_ALL
        else:
            assignment = self._next(pool, terms, hold)
        self.counts.told += 1
        hold.told, hold.expires_us = assignment, now_us + TTL_US
        return Action(hold.bucket_id, assignment)

    def _next(self, pool: Pool, terms: Terms, hold: Hold) -> Assignment:
        before = hold.rate
        target = pool.level.share(hold.want)
        if self._is_learning:
            # Others may hold most of the limit.
            target = min(target, terms.rate // IDLE_PART)
        free = max(0, pool.budget - (pool.held - before))
        share = min(target, free)
        told = hold.told
        if (
            told is not None
            and told.fill_interval_s == terms.fill_interval_s
            and before <= free
            and abs(share - before) * SAME_PART <= before
        ):
            assignment = told
        else:
            assignment = after(told, assign(terms, share, is_strict=hold.step.terms.is_strict))
        pool.held += assignment.rate - before
        if assignment.rate < before:
            # Others may be waiting for it.
            self._soil(pool)
        return assignment

    def _sweep(self, now_us: int) -> None:
        """Look at some pools in turn for what is over."""
        if not self._to_sweep:
            self._to_sweep = list(self.pools.values())
        for pool in self._to_sweep[-_SWEEP_POOLS:]:
            self._tidy(pool, now_us)
        del self._to_sweep[-_SWEEP_POOLS:]

    def _tidy(self, pool: Pool, now_us: int) -> None:
        silent = [hold for hold in pool.holds if now_us - hold.reported_us >= SILENCE_US]
        for hold in silent:
            self.counts.forgotten["silent"] += 1
            self._drop(hold, now_us)
        if any(lost.expires_us <= now_us for lost in pool.lost):
            pool.held -= sum([lost.rate for lost in pool.lost if lost.expires_us <= now_us])
            pool.lost = [lost for lost in pool.lost if lost.expires_us > now_us]
            self._soil(pool)
        forgotten = [peer for peer, heard in pool.heard.items() if now_us - heard.heard_us >= DEMAND_US]
        for peer in forgotten:
            del pool.heard[peer]
            self._soil(pool)
        if pool.waiting:
            self._soil(pool)
        is_over = not pool.is_needed and not pool.is_dirty and now_us - pool.told_us >= TELL_US
        if is_over and self.pools.get(pool.key) is pool:
            self._forget(pool, now_us)

    def _charge_later(self, pool: Pool, hits: int, now_us: int) -> None:
        if not pool.pending:
            pool.charged_us = now_us
            self._charging[pool] = None
        pool.pending += hits
        pool.charge_until_us = now_us + REPORT_US
        if pool.limit is not None and pool.pending * CHARGE_PART <= pool.limit.capacity:
            self._charge_tokens(pool, pool.pending)

    def _charge(self, now_us: int) -> None:
        for _ in range(min(_CHARGED_POOLS, len(self._charging))):
            pool = next(iter(self._charging))
            # To the end of the queue.
            del self._charging[pool]
            self._charging[pool] = None
            left_us = pool.charge_until_us - pool.charged_us
            tokens = pool.pending
            if now_us < pool.charge_until_us:
                tokens = pool.pending * max(0, now_us - pool.charged_us) // left_us
            if tokens:
                pool.charged_us = now_us
                self._charge_tokens(pool, tokens)

    def _charge_tokens(self, pool: Pool, tokens: int) -> None:
        pool.pending -= tokens
        if not pool.pending:
            self._charging.pop(pool, None)
        step = pool.step
        if step is not None and tokens and not step.terms.is_strict:
            self._limiter.charge(step, tokens, self._charge_us())


def _merged(groups: list[Group]) -> list[Group]:
    """In `MAX_GROUPS`, each with the greatest want of those in it: nobody counts for less."""
    size = -(-len(groups) // MAX_GROUPS)
    parts = [groups[at : at + size] for at in range(0, len(groups), size)]
    return [Group(part[-1].want, sum([group.members for group in part])) for part in parts]
