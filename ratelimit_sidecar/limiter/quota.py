"""Quotas: parts of limits that Envoys enforce by themselves (envoy.service.rate_limit_quota.v3), and report on.

Theory of operation. An Envoy's *bucket* is a set of pairs, which the rules match like a descriptor; all buckets with
one limit and key, of all Envoys, are a *pool* (`quota_pool.py`). Every 5 s an Envoy reports what it has admitted, which
is charged (`quota_charges.py`), and denied: its demand. The limit is divided among all demands, of this node's Envoys
and of those that peers tell of (`quota_division.py`), and each Envoy is told its share: with every report, for
assignments end, and at once when it has changed by more than a sixteenth.

All assignments of a node together never exceed what is to be divided. So a share is lowered first, and only what that
has freed is given to others; and what an Envoy holds that was lost stays its own until its assignment ends. A node that
has just started does not know what its Envoys hold: until all have had time to report it tells nothing to those that
hold something, and little to others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, NamedTuple

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
)
from ratelimit_sidecar.limiter.fair_shares import Group
from ratelimit_sidecar.limiter.limiter import MAX_HITS, Limiter
from ratelimit_sidecar.limiter.plan import Step
from ratelimit_sidecar.limiter.quota_charges import Charges
from ratelimit_sidecar.limiter.quota_division import IDLE_PART, Division
from ratelimit_sidecar.limiter.quota_pool import (
    MAX_RATE,
    REPORT_US,
    Action,
    Heard,
    Hold,
    Lost,
    Pairs,
    Pool,
    QuotaStream,
    Usage,
)

TTL_S: Final = 20
"""Of an assignment. Renewed with each report, it outlives a restart of this node by nearly ten seconds."""

TTL_US: Final = TTL_S * SECOND_US

LEARNING_US: Final = REPORT_US + SECOND_US
"""From the start. By then each Envoy has connected again, which it does when its next report is due."""

SILENCE_US: Final = 3 * REPORT_US + SECOND_US
"""An Envoy lists all its buckets in each report: one that it has not for so long it no longer has."""

IDLE_US: Final = 60 * SECOND_US
"""A bucket without a request for so long is to be forgotten, by Envoy as well."""

LEAST_MEASURE_US: Final = SECOND_US
"""The first report of a bucket comes at once, the second when all others are due."""

CHANGE_PART: Final = 16
"""A share that has changed by one part in so many is told at once."""

SAME_PART: Final = 64
"""And by less than one in so many not even when it is renewed."""

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

_SWEEP_POOLS: Final = 256
_SHARE_HOLDS: Final = 256
"""A tick looks at so many, and at those of the pool that exceeds it."""


class QuotasFull(Exception):
    """There is no room for another stream."""


class Demand(NamedTuple):
    """As peers are told of it.

    Args:
        version: counts up with each that is to be told.
    """

    version: int
    key: bytes
    groups: tuple[Group, ...]


class Counts:
    """Since start."""

    __slots__ = ("errors", "forgotten", "refused_streams", "reports", "requests", "told")

    def __init__(self) -> None:
        self.reports = 0
        """Of buckets."""
        self.requests = {"allowed": 0, "denied": 0}
        """What Envoys have done with requests, as they report."""
        self.errors = {"no_rule": 0, "no_room": 0, "bad_id": 0, "bad_time": 0}
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
        self._charges = Charges(limiter, charge_us)
        self._division = Division(limiter, charge_us)
        self._learns_until_us = now_us + learning_us
        self._is_learning = True
        self.counts = Counts()
        self.streams: dict[QuotaStream, None] = {}
        self.pools: dict[bytes, Pool] = {}
        self.holds = 0
        self._dirty: dict[Pool, None] = {}
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
        self._charges.tick(now_us)
        self._sweep(now_us)
        looked_at = 0
        while self._dirty and looked_at < _SHARE_HOLDS:
            pool = next(iter(self._dirty))
            looked_at += 1 + len(pool.holds)
            self._share(pool, now_us)

    def charge_all(self) -> None:
        """At a stop: nothing that was reported is lost."""
        self._charges.all()

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
            counts.errors["bad_time"] += 1
            elapsed_s = 0
        if not usage.pairs or len(usage.pairs) > MAX_PAIRS:
            counts.errors["bad_id"] += 1
            return None
        key = (domain, usage.pairs)
        hold = stream.holds.get(key)
        if hold is None:
            hold = self._hold(stream, key, usage, elapsed_s, now_us)
        elif hold.generation != self._limiter.generation:
            self._match_again(hold, now_us)
        step = hold.step
        self._count(step, allowed, denied)
        if step.compiled.rule is None:
            counts.errors["no_rule"] += 1
        pool = hold.pool
        if allowed and pool.step is not None:
            self._charges.add(pool, allowed, now_us)
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
            self.counts.errors["no_room"] += 1
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
        terms = step.compiled
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
        if step.compiled.limit is not None:
            counts.admitted_hits += allowed
        elif step.compiled.rule is not None:
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
        self._division.release(pool, now_us)

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
            self._tell_peers(pool, self._division.divide(pool, pool.terms, now_us), now_us)
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

    def _tell_peers(self, pool: Pool, own: list[Group], now_us: int) -> None:
        step = pool.step
        if step is None or not step.compiled.is_replicated:
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
        if terms is None or hold.step.compiled.is_shadow or self._limiter.settings.shadow_mode:
            pool.held -= hold.rate
            assignment = ALLOW_ALL
        else:
            assignment = self._next(pool, terms, hold, now_us)
            # Told a moment ago, it need not be renewed.
            if assignment is hold.told and now_us - (hold.expires_us - TTL_US) < LEAST_MEASURE_US:
                return None
        self.counts.told += 1
        hold.told, hold.expires_us = assignment, now_us + TTL_US
        return Action(hold.bucket_id, assignment)

    def _next(self, pool: Pool, terms: Terms, hold: Hold, now_us: int) -> Assignment:
        before = hold.rate
        target = pool.level.share(hold.want)
        if self._is_learning:
            # Others may hold most of the limit.
            target = min(target, terms.rate // IDLE_PART)
        others = pool.held - before
        free = max(0, pool.budget - others)
        share = min(target, free)
        if hold.step.compiled.is_strict:
            share = free = max(0, min(share, self._division.withhold(pool, terms, others + share, now_us) - others))
            if share < target:
                # The bucket has more tokens soon.
                self._soil(pool)
        told = hold.told
        if (
            told is not None
            and told.fill_interval_s == terms.fill_interval_s
            and before <= free
            and abs(share - before) * SAME_PART <= before
        ):
            assignment = told
        else:
            assignment = after(told, assign(terms, share, is_strict=hold.step.compiled.is_strict))
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
