"""Quotas: parts of limits that Envoys enforce by themselves (envoy.service.rate_limit_quota.v3), and report on.

Theory of operation. An Envoy's *bucket* is a set of pairs, which the rules match like a descriptor. All buckets with
one limit and bucket key, of all Envoys, are a *pool* (`quota_pool.py`). Every 5 s an Envoy reports how many requests it
admitted, which are charged (`quota_charges.py`), and how many it denied; the sum is its demand. The limit is divided
among all demands, of this node's Envoys and of those that peers report (`quota_division.py`), and each Envoy gets its
share as an assignment: with every report, because assignments expire, and at once when it has changed by more than
1/16.

All assignments of a node together never exceed the rate to be divided. So a share is lowered first, and only what that
has freed is given to others. When a stream ends, its assignments are *orphaned*: they still count until they expire,
since the Envoy may go on. A node that has just started does not know the assignments of its Envoys. Until all have had
time to report, it sends nothing to Envoys that have an assignment, and little to others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Final, NamedTuple

from ratelimit_sidecar.cycle_collector import young_objects
from ratelimit_sidecar.limiter.assignment import (
    ALLOW_ALL,
    REPORT_US,
    SECOND_US,
    STEPS,
    TOKEN,
    Assignment,
    ShareBase,
    assign,
    noticeable,
    share_base_of,
)
from ratelimit_sidecar.limiter.demand_log import DemandLog
from ratelimit_sidecar.limiter.fair_shares import Group
from ratelimit_sidecar.limiter.limiter import MAX_HITS, Limiter
from ratelimit_sidecar.limiter.plan import PlannedTake
from ratelimit_sidecar.limiter.quota_charges import Charges
from ratelimit_sidecar.limiter.quota_division import IDLE_PART, Division
from ratelimit_sidecar.limiter.quota_pool import (
    MAX_RATE,
    Action,
    EnvoyBucket,
    OrphanedAssignment,
    Pairs,
    PeerDemand,
    Pool,
    QuotaStream,
    Usage,
)

TTL_S: Final = 20
"""The lifetime of an assignment. It is renewed with each report, so it outlives a restart of this node by nearly ten
seconds.
"""

TTL_US: Final = TTL_S * SECOND_US

LEARNING_US: Final = REPORT_US + SECOND_US
"""After a start, wait this long before dividing. By then each Envoy has connected again: it does when its next report
is due.
"""

SILENCE_US: Final = 3 * REPORT_US + SECOND_US
"""An Envoy lists all its buckets in each report. A bucket not listed for this long no longer exists."""

IDLE_US: Final = 60 * SECOND_US
"""A bucket without a request for this long is dropped here, and the Envoy is told to drop it."""

CROWDED_IDLE_US: Final = 2 * REPORT_US
"""The same, while an Envoy is crowded."""

LEAST_MEASURE_US: Final = SECOND_US
"""The shortest time over which a demand is measured. The first report of a bucket comes at once, so it says little."""

CHANGE_PART: Final = 16
"""A share that has changed by more than 1/16 is sent at once."""

SAME_PART: Final = 64
"""When an assignment is renewed, and neither the share nor the burst has changed by more than 1/64, the old one is sent
again.
"""

PUBLISH_US: Final = 4 * SECOND_US
"""A demand that has not changed is published to peers this often, since they drop it after `DEMAND_US`."""

DEMAND_US: Final = 4 * REPORT_US

MAX_POOLS: Final = 32_768
MAX_ENVOY_BUCKETS: Final = 65_536
"""The most buckets of all Envoys together. If there is no room for one, its reports are charged, but it gets no
assignment, so the Envoy acts as it is configured to without one.
"""

BUCKET_BYTES: Final = 8_000
"""What a bucket takes that has a pool of its own and 30 short pairs."""

MAX_PEER_GROUPS: Final = 1_000_000
"""The most groups of Envoys in the demands of all peers; a peer may have as many as are free."""

GROUP_BYTES: Final = 140

MAX_POOL_BUCKETS: Final = 2_048
"""The most buckets in a pool, which is divided in one go; twice as many as streams, of which each usually has one."""

MAX_POOL_ORPHANS: Final = 2_048
"""The most orphaned assignments of a pool; further ones are added up. Peers take demands of 4,096 members."""

MAX_REPORT_BYTES: Final = 1 << 21
"""About the most bytes of a report on all buckets of an Envoy that are kept here. It reports every five seconds on all
that it has, so it is told to drop those beyond.
"""

_USAGE_BYTES: Final = 32
"""The bytes of a report on one bucket, besides its id."""

_ABANDONED_AT_ONCE: Final = 512
_MAX_ABANDONED_BYTES: Final = 1 << 16
"""The most ids that wait to be sent to an Envoy that is to drop them, and their bytes. They are sent together, with the
next tick or when there are so many, since its main thread copies all of its buckets for each message. It soon reports
again on others.
"""

MAX_ABANDONED: Final = 65_536
"""The most buckets of all Envoys that were to be dropped within `ABANDONED_US`. Others are named in a later report."""

ABANDONED_US: Final = 6 * REPORT_US
"""An Envoy may report on a bucket that it was told to drop, since it hears that late when it has much to do. It is not
told again before this time: for each bucket that it does not have it logs the whole message.
"""

MAX_PAIRS: Final = 32
"""The most pairs in one bucket."""

_OBJECTS_OF_BUCKET: Final = 14
"""That the cycle collector sees, with a pool of its own and an assignment."""

_SWEEP_POOLS: Final = 256
"""A tick looks at this many pools, an orphaned assignment counted like one."""

_SWEEP_BUCKETS: Final = 512
_DROPPED_AT_ONCE: Final = 256
_FORGOTTEN_AT_ONCE: Final = 1_024
_DIVIDE_BUCKETS: Final = 256
"""A tick divides pools with this many buckets in all, and finishes the pool that exceeds it."""


class Demand(NamedTuple):
    """One limit's demand on this node, as sent to peers.

    Args:
        version: counts up with each demand that is to be sent.
    """

    version: int
    key: bytes
    groups: tuple[Group, ...]


class QuotaCounts:
    """Counters for metrics, since start."""

    __slots__ = ("assignments", "errors", "forgotten", "reports", "requests")

    def __init__(self) -> None:
        self.reports = 0
        """Reports of single buckets."""
        self.requests = {"allowed": 0, "denied": 0}
        """Requests that Envoys have allowed and denied, as they report."""
        self.errors = {"no_rule": 0, "no_room": 0, "bad_id": 0, "bad_time": 0, "invalid": 0}
        """Reports with an error: no rule limits the bucket; there is no room for it; its id has no pairs, too many, or
        is too long; its time runs backwards. And streams that ended because of what came.
        """
        self.assignments = 0
        """Assignments sent, renewals included."""
        self.forgotten = {"idle": 0, "silent": 0}
        """Buckets dropped because they had no requests (idle), or because the Envoy no longer reported them
        (silent).
        """


class Quotas:
    """All quotas of one node. Call `open`, `report`, `take_actions` and `close` for the stream of each Envoy, and
    `tick` regularly.

    Args:
        strict_us: the time of the start; all times here are of the clock of strict limits, which never steps.
        now_us: returns the wall clock, by which buckets are charged.
        max_pools: limits of which some Envoy has a part.
        max_envoy_buckets: of all Envoys together.
        max_peer_groups: of all peers together.
    """

    def __init__(
        self,
        limiter: Limiter,
        strict_us: int,
        now_us: Callable[[], int],
        *,
        learning_us: int = LEARNING_US,
        max_pools: int = MAX_POOLS,
        max_envoy_buckets: int = MAX_ENVOY_BUCKETS,
        max_peer_groups: int = MAX_PEER_GROUPS,
    ) -> None:
        self._limiter = limiter
        self._max_pools = max_pools
        self._max_envoy_buckets = max_envoy_buckets
        self._free_peer_groups = max_peer_groups
        self._peer_groups = Counter[str]()
        """Groups in the demands of each peer."""
        self._charges = Charges(limiter, now_us)
        self._division = Division(limiter, now_us)
        self._learns_until_us = strict_us + learning_us
        self._is_learning = True
        self.counts = QuotaCounts()
        self.streams: dict[QuotaStream, None] = {}
        self.pools: dict[bytes, Pool] = {}
        self.bucket_count = 0
        self._dirty: dict[Pool, None] = {}
        self._learnt: list[Pool] = []
        """Pools that are still to be divided since it is no longer learning."""
        self._unlimited = Pool(b"", None)
        """The buckets that nothing limits, however many: it is never divided."""
        self._closed: list[QuotaStream] = []
        """Streams that have ended, with buckets that are still to be dropped."""
        self._streams_to_sweep: list[QuotaStream] = []
        self._buckets_to_sweep: list[EnvoyBucket] = []
        self._pools_to_sweep: list[Pool] = []
        self._abandoned: dict[tuple[QuotaStream, int], int] = {}
        """When Envoys were told to drop buckets, by the hash of the pairs: the oldest first."""
        self._abandoning: dict[QuotaStream, None] = {}
        """Streams with ids to be sent after the next tick."""
        self._log = DemandLog()

    def open(self, wake: Callable[[], None]) -> QuotaStream:
        """An Envoy has connected. The caller bounds the streams."""
        stream = QuotaStream(wake)
        self.streams[stream] = None
        return stream

    def close(self, stream: QuotaStream) -> None:
        """The stream has ended. Its Envoy, if it is alive, goes on with its assignments until they expire. Its buckets
        are dropped by `drop_closed`.
        """
        del self.streams[stream]
        self._abandoning.pop(stream, None)
        stream.is_open = False
        if stream.buckets:
            self._closed.append(stream)

    def drop_closed(self, strict_us: int) -> bool:
        """Drop some of the buckets of streams that have ended. Returns whether there are more; then call it again soon,
        since a new stream of the same Envoy goes on with what is orphaned.
        """
        left = _DROPPED_AT_ONCE
        while self._closed and left:
            stream = self._closed[-1]
            for bucket in list(islice(stream.buckets.values(), left)):
                self._drop(bucket, strict_us)
                left -= 1
            if not stream.buckets:
                self._closed.pop()
        return bool(self._closed)

    def report(self, stream: QuotaStream, domain: str, usages: Iterable[Usage], strict_us: int) -> None:
        """Note an Envoy's report on some of its buckets."""
        touched: dict[Pool, None] = {}
        for usage in usages:
            bucket = self._report_usage(stream, domain, usage, strict_us)
            if bucket is not None:
                touched[bucket.pool] = None
        for pool in touched:
            if pool.size <= _DIVIDE_BUCKETS // 8:
                self._divide(pool, strict_us)
            else:
                self._mark_dirty(pool)

    def take_actions(self, stream: QuotaStream, strict_us: int, most: int) -> list[Action]:
        """Look at `most` of the stream's buckets that are due, and return the actions to send to the Envoy now. They
        count as sent. There may be none, and more buckets due; or more than `most`, because of abandoned ones.
        """
        actions: list[Action] = []
        if stream.sends_abandoned:
            actions = [Action(bucket_id, None) for bucket_id in stream.abandoned]
            stream.abandoned, stream.abandoned_bytes, stream.sends_abandoned = [], 0, False
        for bucket in list(islice(stream.due, max(0, most - len(actions)))):
            del stream.due[bucket]
            action = self._next_action(bucket, strict_us)
            if action is not None:
                actions.append(action)
        return actions

    def tick(self, strict_us: int) -> None:
        """Charge pending hits, and divide the pools that need it. Call it about ten times a second."""
        if self._is_learning and strict_us >= self._learns_until_us:
            self._is_learning = False
            self._learnt = list(self.pools.values())
        self._charges.tick(strict_us)
        self.drop_closed(strict_us)
        self._forget_abandoned(strict_us)
        for stream in self._abandoning:
            self._send_abandoned(stream)
        self._abandoning.clear()
        self._sweep_buckets(strict_us)
        self._sweep_pools(strict_us)
        for pool in self._learnt[-_DIVIDE_BUCKETS:]:
            if self.pools.get(pool.key) is pool:
                self._mark_dirty(pool)
        del self._learnt[-_DIVIDE_BUCKETS:]
        looked_at = 0
        for pool in list(islice(self._dirty, _DIVIDE_BUCKETS)):
            looked_at += 1 + pool.size
            self._divide(pool, strict_us)
            if looked_at >= _DIVIDE_BUCKETS:
                break

    def charge_all(self) -> None:
        """Charge all pending hits. Call it at a stop, so that no report is lost."""
        self._charges.all()

    def receive(self, peer: str, key: bytes, groups: Sequence[Group], strict_us: int) -> bool:
        """Note the demand of a peer's Envoys.

        Returns:
            False when no replicated rule here has the key, or there is no room.

        Raises:
            ValueError: not a bucket key.
        """
        pool = self.pools.get(key)
        if pool is None:
            limit = self._limiter.rules.replicated_limit_of_key(key)
            if limit is None or len(self.pools) >= self._max_pools:
                return False
            if not groups:
                return True
            pool = Pool(key, limit)
        before = pool.peer_demands.get(peer)
        if not self._count_groups(peer, len(groups) - (0 if before is None else len(before.groups))):
            return False
        self.pools[key] = pool
        if groups:
            pool.peer_demands[peer] = PeerDemand(groups, strict_us)
        elif before is not None:
            del pool.peer_demands[peer]
        if before is None or list(before.groups) != list(groups):
            self._mark_dirty(pool)
        return True

    def _count_groups(self, peer: str, more: int) -> bool:
        """Count more groups of a peer, or fewer. Returns False, and counts none, if there is no room."""
        if more > 0 and self._peer_groups[peer] + 2 * more > self._free_peer_groups:
            return False
        self._free_peer_groups -= more
        self._peer_groups[peer] += more
        if not self._peer_groups[peer]:
            del self._peer_groups[peer]
        return True

    def demands(self, sent: int, most: int) -> list[Demand]:
        """The demands that were not sent to a peer yet, the oldest first.

        Args:
            sent: the version of the last one that was sent to it; 0 when none was.
        """
        return [Demand(version, key, self.pools[key].demand) for version, key in self._log.newer(sent, most)]

    def assigned(self, pool: Pool) -> Iterator[int]:
        """The rates of all assignments that have not expired, orphaned ones included."""
        for bucket in pool.buckets:
            if bucket.assignment is not None:
                yield bucket.assignment.rate
        for orphan in pool.orphans:
            yield orphan.rate

    def _report_usage(self, stream: QuotaStream, domain: str, usage: Usage, strict_us: int) -> EnvoyBucket | None:
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
            if usage.is_utf8:
                self._abandon(stream, usage.bucket_id, usage.pairs, strict_us)
            return None
        key = (domain, usage.pairs)
        bucket = stream.buckets.get(key)
        if bucket is None:
            if not allowed and not denied and self._is_unwanted(stream, usage, strict_us):
                return None
            bucket = self._add_bucket(stream, key, usage, elapsed_s, strict_us)
        elif bucket.generation != self._limiter.generation:
            self._match_again(bucket, strict_us)
        take = bucket.planned_take
        self._count(take, allowed, denied)
        if take.compiled.rule is None:
            counts.errors["no_rule"] += 1
        pool = bucket.pool
        if allowed and pool.planned_take is not None:
            self._charges.add(pool, allowed, strict_us, is_kept=self.pools.get(pool.key) is pool)
        if bucket not in pool.buckets:
            return None
        if allowed or denied:
            bucket.active_us = strict_us
        bucket.reported_us = strict_us
        bucket.counted += allowed + denied
        measured_us = strict_us - bucket.measured_us
        if measured_us >= LEAST_MEASURE_US:
            bucket.demand = min(bucket.counted * SECOND_US * TOKEN // measured_us, MAX_RATE)
            bucket.counted, bucket.measured_us = 0, strict_us
        if pool is self._unlimited:
            self._wake(bucket)
            return None
        pool.due[bucket] = None
        return bucket

    def _add_bucket(
        self, stream: QuotaStream, key: tuple[str, Pairs], usage: Usage, elapsed_s: int, strict_us: int
    ) -> EnvoyBucket:
        """Create the record of a bucket reported for the first time. It is returned but not stored if there is no room,
        or if its Envoy is crowded and has it only now.
        """
        take = self._take_of(key)
        is_welcome = elapsed_s > 0 or not stream.is_crowded
        # An Envoy may have as many pools and buckets as are still free.
        pool = self._pool(take, may_add=is_welcome and len(stream.buckets) < self._max_pools - len(self.pools))
        bucket = EnvoyBucket(stream, key, usage, pool, take)
        bucket.generation = self._limiter.generation
        bucket.active_us = strict_us
        # The Envoy says how much time has elapsed. It decides only whether it has an assignment, and the first demand.
        bucket.measured_us = strict_us - min(elapsed_s, TTL_S) * SECOND_US
        if not usage.is_utf8:
            self.counts.errors["bad_id"] += 1
            return bucket
        if not is_welcome:
            return bucket
        id_bytes = stream.id_bytes + len(usage.bucket_id) + _USAGE_BYTES
        has_room = len(stream.buckets) < self._max_envoy_buckets - self.bucket_count and id_bytes <= MAX_REPORT_BYTES
        if not has_room or not self._has_room(pool):
            self.counts.errors["no_room"] += 1
            self._abandon(stream, usage.bucket_id, usage.pairs, strict_us)
            return bucket
        if self._closed and pool.size <= _DIVIDE_BUCKETS // 8:
            # It may go on with an assignment that is about to be orphaned.
            for other in [other for other in pool.buckets if not other.stream.is_open]:
                self._drop(other, strict_us)
        if elapsed_s and (pool.orphans or self._is_learning):
            pool.waiting[bucket] = None
        self.bucket_count += 1
        young_objects.note(_OBJECTS_OF_BUCKET)
        stream.buckets[key] = bucket
        stream.id_bytes = id_bytes
        pool.buckets[bucket] = None
        return bucket

    def _pool(self, take: PlannedTake, *, may_add: bool) -> Pool:
        limit = take.compiled.limit
        if limit is None:
            return self._unlimited
        key = take.bucket_key
        pool = self.pools.get(key)
        if pool is None:
            pool = Pool(key, limit)
            if may_add:
                self.pools[key] = pool
        pool.planned_take = take
        if pool.limit != limit:
            pool.limit, pool.share_base = limit, share_base_of(limit)
        return pool

    def _has_room(self, pool: Pool) -> bool:
        return pool is self._unlimited or (pool.key in self.pools and len(pool.buckets) < MAX_POOL_BUCKETS)

    def _count(self, take: PlannedTake, allowed: int, denied: int) -> None:
        """Count reported requests like those decided here."""
        counts = take.counts
        counts.ok += allowed
        if take.compiled.limit is not None:
            counts.admitted_hits += allowed
        elif take.compiled.rule is not None:
            counts.unlimited_hits += allowed
        counts.over_limit += denied
        counts.denied_hits += denied
        counts.over_limit_hits += denied

    def _match_again(self, bucket: EnvoyBucket, strict_us: int) -> None:
        """The rules have changed. If the bucket is in another pool now, its assignment counts as orphaned in the former
        one.
        """
        bucket.generation = self._limiter.generation
        bucket.planned_take = self._take_of(bucket.key)
        pool = self._pool(bucket.planned_take, may_add=len(self.pools) < self._max_pools)
        self._mark_dirty(pool)
        if pool is bucket.pool:
            return
        if not self._has_room(pool):
            self.counts.errors["no_room"] += 1
            self._drop(bucket, strict_us)
            self._abandon(bucket.stream, bucket.bucket_id, bucket.key[1], strict_us)
            return
        self._leave_pool(bucket, strict_us)
        bucket.pool = pool
        pool.buckets[bucket] = None
        # Until it gets a new one, its assignment counts in the former pool.
        bucket.assignment = None

    def _take_of(self, key: tuple[str, Pairs]) -> PlannedTake:
        domain, pairs = key
        return self._limiter.rlqs_take(domain, self._limiter.rules.in_order(domain, pairs))

    def _drop(self, bucket: EnvoyBucket, strict_us: int) -> None:
        """Drop the record of a bucket that no longer exists."""
        self.bucket_count -= 1
        del bucket.stream.buckets[bucket.key]
        bucket.stream.id_bytes -= len(bucket.bucket_id) + _USAGE_BYTES
        bucket.stream.due.pop(bucket, None)
        self._leave_pool(bucket, strict_us)

    def _is_unwanted(self, stream: QuotaStream, usage: Usage, strict_us: int) -> bool:
        """Whether no record is made of a bucket without requests: its Envoy is crowded, or was told to drop it."""
        if stream.is_crowded:
            self.counts.errors["no_room"] += 1
            if usage.is_utf8:
                self._abandon(stream, usage.bucket_id, usage.pairs, strict_us)
            return True
        return (stream, hash(usage.pairs)) in self._abandoned

    def _abandon(self, stream: QuotaStream, bucket_id: bytes, pairs: Pairs, strict_us: int) -> None:
        """Have the Envoy drop a bucket of which there is no record: it reports on all that it has."""
        if not bucket_id or stream.sends_abandoned or not self._note_abandoned(stream, pairs or bucket_id, strict_us):
            return
        stream.abandoned.append(bucket_id)
        stream.abandoned_bytes += len(bucket_id)
        self._abandoning[stream] = None
        if len(stream.abandoned) == _ABANDONED_AT_ONCE or stream.abandoned_bytes >= _MAX_ABANDONED_BYTES:
            self._send_abandoned(stream)

    def _send_abandoned(self, stream: QuotaStream) -> None:
        if stream.abandoned:
            stream.sends_abandoned = True
            stream.wake()

    def _note_abandoned(self, stream: QuotaStream, bucket: Pairs | bytes, strict_us: int) -> bool:
        """Note that an Envoy is told to drop a bucket. Returns False if it was told before, or too many are noted.

        Args:
            bucket: its pairs, since Envoy sends them in any order; its id if that has none.
        """
        told = (stream, hash(bucket))
        if told in self._abandoned or len(self._abandoned) >= MAX_ABANDONED:
            return False
        self._abandoned[told] = strict_us
        return True

    def _forget_abandoned(self, strict_us: int) -> None:
        old = [
            told
            for told, at_us in islice(self._abandoned.items(), _FORGOTTEN_AT_ONCE)
            if strict_us - at_us >= ABANDONED_US
        ]
        for told in old:
            del self._abandoned[told]

    def _leave_pool(self, bucket: EnvoyBucket, strict_us: int) -> None:
        pool = bucket.pool
        del pool.buckets[bucket]
        pool.due.pop(bucket, None)
        pool.waiting.pop(bucket, None)
        if bucket.assignment is not None and bucket.rate and bucket.expires_us > strict_us:
            rate, expires_us = bucket.rate, bucket.expires_us
            if len(pool.orphans) == MAX_POOL_ORPHANS:
                last = pool.orphans.pop()
                rate, expires_us = rate + last.rate, max(expires_us, last.expires_us)
            pool.orphans.append(OrphanedAssignment(rate, expires_us, strict_us))
        else:
            pool.held -= bucket.rate
        self._mark_dirty(pool)

    def _forget_pool(self, pool: Pool, strict_us: int) -> None:
        del self.pools[pool.key]
        self._log.forget(pool.key)
        self._division.release(pool, strict_us)

    def _mark_dirty(self, pool: Pool) -> None:
        """Have the pool divided at one of the next ticks."""
        if pool is not self._unlimited:
            self._dirty[pool] = None

    def _divide(self, pool: Pool, strict_us: int) -> None:
        self._dirty.pop(pool, None)
        if pool.waiting:
            self._assign_orphans(pool, strict_us)
        due, pool.due = pool.due, {}
        base = pool.share_base
        assert base is not None
        if pool.size or pool.demand:
            self._publish_demand(pool, self._division.divide(pool, base, strict_us), strict_us)
        for bucket in due:
            self._wake(bucket)
        for bucket in pool.buckets:
            if bucket.assignment is not None and self._has_changed(pool, base, bucket):
                self._wake(bucket)

    def _assign_orphans(self, pool: Pool, strict_us: int) -> None:
        """After a reconnect Envoys do not say which assignment they still enforce. Wait until all can have reported,
        then give each one of the orphaned assignments, smallest first. So those that stay orphaned are at least what
        missing Envoys enforce.
        """
        last_us = max([orphan.orphaned_us for orphan in pool.orphans], default=0)
        if self._is_learning or (len(pool.waiting) < len(pool.orphans) and strict_us < last_us + LEARNING_US):
            return
        pool.orphans.sort()
        for bucket, orphan in zip(pool.waiting, pool.orphans, strict=False):
            bucket.assignment, bucket.expires_us = Assignment(0, 0, 0, orphan.rate), orphan.expires_us
        del pool.orphans[: len(pool.waiting)]
        for bucket in pool.waiting:
            pool.due[bucket] = None
        pool.waiting.clear()

    def _publish_demand(self, pool: Pool, own: list[Group], strict_us: int) -> None:
        take = pool.planned_take
        if take is None or not take.compiled.is_replicated:
            return
        demand = tuple(own)
        if demand != pool.demand or (demand and strict_us - pool.demand_sent_us >= PUBLISH_US):
            pool.demand = demand
            pool.demand_sent_us = strict_us
            self._log.publish(pool.key)

    def _has_changed(self, pool: Pool, base: ShareBase, bucket: EnvoyBucket) -> bool:
        target, rate = pool.level.share(bucket.want), bucket.rate
        if target < rate:
            return (rate - target) * CHANGE_PART > rate
        # It gets the part that others still have to give up once they have.
        more = min(target - rate, pool.budget - pool.held)
        return more > max(rate // CHANGE_PART, base.rate // STEPS)

    def _wake(self, bucket: EnvoyBucket) -> None:
        stream = bucket.stream
        if stream.is_open:
            stream.due[bucket] = None
            stream.wake()

    def _next_action(self, bucket: EnvoyBucket, strict_us: int) -> Action | None:
        pool = bucket.pool
        if strict_us - bucket.active_us >= (CROWDED_IDLE_US if bucket.stream.is_crowded else IDLE_US):
            self.counts.forgotten["idle"] += 1
            # The Envoy drops its assignment with the bucket.
            bucket.expires_us = strict_us
            self._drop(bucket, strict_us)
            self._note_abandoned(bucket.stream, bucket.key[1], strict_us)
            return Action(bucket.bucket_id, None)
        if bucket in pool.waiting:
            return None
        base = pool.share_base
        if base is None or bucket.planned_take.compiled.is_shadow or self._limiter.settings.shadow_mode:
            pool.held -= bucket.rate
            assignment = ALLOW_ALL
        else:
            assignment = self._next_assignment(pool, base, bucket, strict_us)
            # It was sent a moment ago, so it need not be renewed.
            if assignment is bucket.assignment and strict_us - (bucket.expires_us - TTL_US) < LEAST_MEASURE_US:
                return None
        self.counts.assignments += 1
        bucket.assignment, bucket.expires_us = assignment, strict_us + TTL_US
        return Action(bucket.bucket_id, assignment)

    def _next_assignment(self, pool: Pool, base: ShareBase, bucket: EnvoyBucket, strict_us: int) -> Assignment:
        before = bucket.rate
        target = pool.level.share(bucket.want)
        if self._is_learning:
            # Others may have assignments for most of the limit.
            target = min(target, base.rate // IDLE_PART)
        others = pool.held - before
        free = max(0, pool.budget - others)
        share = min(target, free)
        if bucket.planned_take.compiled.is_strict:
            share = free = max(0, min(share, self._division.withhold(pool, base, others + share, strict_us) - others))
            if share < target:
                # The strict bucket will have more tokens soon.
                self._mark_dirty(pool)
        previous, is_strict = bucket.assignment, bucket.planned_take.compiled.is_strict
        if (
            previous is not None
            and previous.fill_interval_s == base.fill_interval_s
            and before <= free
            and abs(share - before) * SAME_PART <= before
            and abs(previous.max_tokens - assign(base, before, is_strict=is_strict).max_tokens) * SAME_PART
            <= previous.max_tokens
        ):
            assignment = previous
        else:
            assignment = noticeable(previous, assign(base, share, is_strict=is_strict))
        pool.held += assignment.rate - before
        if assignment.rate < before:
            # Others may wait for the rate that this frees.
            self._mark_dirty(pool)
        return assignment

    def _sweep_buckets(self, strict_us: int) -> None:
        """Look at the next few buckets for those that their Envoys no longer report."""
        if not self._buckets_to_sweep:
            if not self._streams_to_sweep:
                self._streams_to_sweep = list(self.streams)
            while self._streams_to_sweep and len(self._buckets_to_sweep) < _SWEEP_BUCKETS:
                self._buckets_to_sweep += self._streams_to_sweep.pop().buckets.values()
        for bucket in self._buckets_to_sweep[-_SWEEP_BUCKETS:]:
            if strict_us - bucket.reported_us >= SILENCE_US and bucket.stream.buckets.get(bucket.key) is bucket:
                self.counts.forgotten["silent"] += 1
                self._drop(bucket, strict_us)
        del self._buckets_to_sweep[-_SWEEP_BUCKETS:]

    def _sweep_pools(self, strict_us: int) -> None:
        """Look at the next few pools for assignments and demands that have expired."""
        if not self._pools_to_sweep:
            self._pools_to_sweep = list(self.pools.values())
        looked_at = 0
        while self._pools_to_sweep and looked_at < _SWEEP_POOLS:
            pool = self._pools_to_sweep.pop()
            looked_at += 1 + len(pool.orphans)
            self._expire(pool, strict_us)

    def _expire(self, pool: Pool, strict_us: int) -> None:
        if any(orphan.expires_us <= strict_us for orphan in pool.orphans):
            pool.held -= sum([orphan.rate for orphan in pool.orphans if orphan.expires_us <= strict_us])
            pool.orphans = [orphan for orphan in pool.orphans if orphan.expires_us > strict_us]
            self._mark_dirty(pool)
        forgotten = [peer for peer, demand in pool.peer_demands.items() if strict_us - demand.received_us >= DEMAND_US]
        for peer in forgotten:
            self._count_groups(peer, -len(pool.peer_demands.pop(peer).groups))
            self._mark_dirty(pool)
        if pool.waiting:
            self._mark_dirty(pool)
        is_over = not pool.is_needed and pool not in self._dirty and strict_us - pool.demand_sent_us >= PUBLISH_US
        if is_over and self.pools.get(pool.key) is pool:
            self._forget_pool(pool, strict_us)
