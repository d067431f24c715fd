"""A cluster with everything that it does looked at from outside.

`digest` is of every frame that arrived and every decision, in order and with its instant: two runs with one digest are
one run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from hashlib import blake2b
from typing import Any

from ratelimit_sidecar.crdt.bucket import Bucket, Entry
from ratelimit_sidecar.crdt.limit import TokenBucketLimit, Window
from ratelimit_sidecar.crdt.shares import TOKEN
from ratelimit_sidecar.crdt.slot import placed_us, slot_exponent, slot_id, slot_start_us
from ratelimit_sidecar.crdt.token_bucket import TokenBucket
from ratelimit_sidecar.crdt.waiting import Outcome
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2 import RateLimitResponse
from ratelimit_sidecar.limiter.rules import Rules
from ratelimit_sidecar.replication.rounds import EVERY_US, KEPT_US, RANGES
from ratelimit_sidecar.replication.wire import Reason
from simulation.cluster import Cluster
from simulation.loop import MS, SECOND_US, START_US
from simulation.network import End
from simulation.node import SLEW_TICKS, Node
from simulation.oracles import BrokenPromise, EventualOracle, LagWatch, LocalOracle, StrictOracle, held
from simulation.sizes import entries_in
from simulation.trace import text_of
from simulation.workload import TOKEN_RULES, WINDOW_RULES, Request, RulesEditions

_OK = RateLimitResponse.OK

ENTRIES_PER_BUCKET = 200
"""What a node may keep of one bucket for one peer: its slots of the longest that an unread stream lives, twice."""

ENTRIES_PER_PEER = 2_000
"""What it may keep for one peer besides: batches on their way and their keys, streams, pings, payments."""

ENTRIES_PER_NODE = 4 * RANGES
"""What it may keep for all peers: the sums of every range, of two comparisons done and one under way."""

MEMORY_TICKS = 2 * SLEW_TICKS

_NEVER_US = 1 << 62


class Watched(Cluster):
    """A cluster whose promises are checked all the time that it runs.

    Args:
        trace: takes a line for everything that happens.
        options: of `Cluster`.
    """

    def __init__(
        self,
        seed: int,
        names: str,
        editions: RulesEditions,
        *,
        trace: Callable[[str], None] | None = None,
        **options: Any,
    ) -> None:
        self.editions = editions
        self.frames = self.decisions = 0
        self.admitted: Counter[str] = Counter()
        """By node; each descriptor counts."""
        self.protocol_errors: Counter[str] = Counter()
        """Of all lives that have ended."""
        self.drains = 0
        """Clean stops after which every connected peer had everything."""
        self.clocks_agree = True
        """False exempts from the promises that are made for clocks at most a second apart."""
        self.trace = trace
        self._digest = blake2b(digest_size=16)
        self._oracles: dict[bytes, EventualOracle] = {}
        self._strict: dict[bytes, StrictOracle] = {}
        self._local: dict[tuple[Node, bytes], LocalOracle] = {}
        self._lags: dict[Node, LagWatch] = {}
        self._reloaded_us: dict[Node, int] = {}
        self._least_ahead_us, self._most_ahead_us = _NEVER_US, -_NEVER_US
        super().__init__(seed, names, editions.first, **options)
        self.give_up = 0.1

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()

    @property
    def overshoots(self) -> int:
        """Admissions beyond an eventual limit that were explained by what had not been delivered."""
        return sum(oracle.overshoots for oracle in self._oracles.values())

    @property
    def payments(self) -> int:
        """Granted by the lives that still are."""
        return sum(node.payments.payments_sent for node in self.live)

    @property
    def served(self) -> int:
        """Requests that those lives have served after a wait."""
        return sum(node.ledger.queues.counts[Outcome.SERVED] for node in self.live)

    def start(self, name: str) -> Node:
        self.tell(f"{name} starts")
        node = super().start(name)
        self._lags[node] = LagWatch()
        self._note_clock(node)
        return node

    def crash(self, name: str, *, powered: bool = True) -> None:
        node = self.nodes[name]
        if not node.is_up:
            return
        self.tell(f"{name} {'ends' if powered else 'loses power'}")
        for other in self.live:
            if name in other.replicator.peers:
                # What this life has applied it may have acknowledged, and nobody can know better of the next.
                self._oldest_unapplied_us(other, node)
        self.protocol_errors.update(node.replicator.protocol_errors)
        super().crash(name, powered=powered)

    def take(self, name: str, request: Request) -> None:
        """Envoy asks the node, which answers if it is there."""
        node = self.nodes[name]
        if node.is_serving:
            for each in request.descriptors:
                if each.rule == "plan" and each.bucket_key not in self._strict:
                    self._strict[each.bucket_key] = StrictOracle("plan", self.editions.most["plan"])
            node.decide(request.raw, partial(self._note_answer, node, request))

    def demand(self, name: str, request: Request, per_second: int, for_us: int) -> None:
        """The same request again and again, at random instants from now on."""
        for _ in range(per_second * for_us // SECOND_US):
            self.loop.after(self.random.randrange(for_us), self.take, name, request)

    def use_rules(self, name: str, rules: Rules) -> None:
        """Give a node other rules, also for when it starts again."""
        self.rules[name] = rules
        node = self.nodes[name]
        if node.is_up and node.limiter.rules is not rules:
            node.use_rules(rules)
            self._reloaded_us[node] = node.now_us

    def rule_known_us(self, node: Node, key: bytes) -> int:
        """From when on, by the clocks of all, it has heard all of a bucket; what it heard without a rule is lost."""
        reloaded_us = self._reloaded_us.get(node)
        if reloaded_us is None or self.editions.first.replicated_limit_of_key(key) is not None:
            return 0
        return reloaded_us + self._most_ahead_us - self._least_ahead_us

    def heal_all(self) -> None:
        """End every fault but those that lie in a clock. What is down is started."""
        self.tell("everything is healed")
        super().heal_all()
        for name in self.names:
            self.use_rules(name, self.editions.second)
            node = self.nodes[name]
            node.read_us = 0
            if not node.is_up or node.is_draining:
                self.crash(name)
                self.start(name)

    # What the nodes and the network report.

    def note_frame(self, source: End, target: End, raw: bytes) -> None:
        self.frames += 1
        self._digest.update(
            b"%d %b %b %b\n" % (self.loop.now_us, source.owner.name.encode(), target.owner.name.encode(), raw)
        )
        if self.trace is not None:
            self.tell(f"{source.owner.name} -> {target.owner.name}  {text_of(raw)}")

    def note_drained(self, node: Node, *, is_all_acknowledged: bool) -> None:
        """When all is acknowledged, the peers must hold it."""
        self.tell(f"{node.name} has drained{'' if is_all_acknowledged else ', as far as there was time'}")
        if not is_all_acknowledged:
            return
        self.drains += 1
        if not self.clocks_agree:
            return
        for name, other in self.nodes.items():
            if name in node.replicator.peers and node.replicator.peers[name].streams and other.is_up:
                oldest_us = self._oldest_unapplied_us(node, other)
                if oldest_us is not None:
                    ago_ms = (node.now_us - oldest_us) / MS
                    raise BrokenPromise(f"clean stop: {name} lacks what {node.name} took {ago_ms:.1f} ms ago")

    def look(self, node: Node) -> None:
        self._note_clock(node)
        if self.clocks_agree:
            self._look_at_lag(node)
        self.look_at_shares()
        if not node.ticks % MEMORY_TICKS:
            self._look_at_memory(node)

    def _note_clock(self, node: Node) -> None:
        self._least_ahead_us = min(self._least_ahead_us, node.clock.ahead_us)
        self._most_ahead_us = max(self._most_ahead_us, node.clock.ahead_us)

    def tell(self, line: str) -> None:
        if self.trace is not None:
            self.trace(f"{(self.loop.now_us - START_US) / SECOND_US:10.4f}  {line}")

    # What must hold when all is quiet.

    def differences(self, *, lasting: bool = False) -> list[str]:
        """Where live nodes differ in what they hold (P1); empty when they agree to the bit.

        Args:
            lasting: without debts that end within KEPT_US, which comparing leaves alone.
        """
        nodes = self.live
        at_us = max(node.now_us for node in nodes)
        found = []
        for key in sorted({bucket.key for node in nodes for bucket in node.store if bucket.is_replicated}):
            first, second = (
                rules.replicated_limit_of_key(key) for rules in (self.editions.first, self.editions.second)
            )
            assert second is not None
            if first is not None and first.exponent != second.exponent:
                # What one replica has sealed another still knows by its slots; that passes with the longer horizon.
                continue
            buckets = [_in_force(node, key) for node in nodes]
            folds = [0 if bucket is None else bucket.fold(at_us) for bucket in buckets]
            # Replicas that went over to another rate at different moments may have sealed different deficits.
            if first in (None, second) and len(set(folds)) > 1:
                if lasting and isinstance(second, TokenBucketLimit) and max(folds) <= KEPT_US * second.tokens:
                    continue
                shown = ", ".join(f"{node.name}: {fold}" for node, fold in zip(nodes, folds, strict=True))
                found.append(f"{key!r} folds to {shown}")
                continue
            states = {
                node.name: set() if bucket is None else _recent_state(bucket, at_us)
                for node, bucket in zip(nodes, buckets, strict=True)
            }
            everything = set().union(*states.values())
            lacking = {name: sorted(everything - state) for name, state in states.items() if everything - state}
            if lacking:
                shown = ", ".join(f"{name} lacks {entries}" for name, entries in lacking.items())
                found.append(f"of {key!r} {shown}")
        return found

    def unknown(self) -> list[tuple[str, Entry]]:
        """Names of live nodes, and what they have not heard of that others took."""
        return [
            (node.name, entry)
            for other in self.live
            for bucket in other.store
            for entry in bucket.entries()
            for node in self.live
            if entry.origin == other.origin != node.origin
            if held(node.store.get(bucket.key), entry.origin, entry.slot) < entry.tokens
        ]

    def check_levels(self) -> None:
        """The live level is that of the fold, but for one slot's refill and that of the clocks' difference."""
        spread_us = self._most_ahead_us - self._least_ahead_us
        for node in self.live:
            for bucket in node.store:
                if isinstance(bucket, TokenBucket):
                    limit = bucket.limit
                    # Debt behind the horizon is cut when it is sealed, and in the fold at once.
                    bucket.seal(node.now_us)
                    error = abs(bucket.deficit - bucket.fold(bucket.at_us))
                    widest = max((slot_exponent(slot) for slots in bucket.taken.values() for slot in slots), default=0)
                    if error > limit.tokens * ((1 << max(limit.exponent, widest)) + spread_us):
                        raise BrokenPromise(f"level: {bucket.key!r} on {node.name} is off by {error / limit.period_us}")

    def check_protocol_errors(self, allowed: frozenset[Reason]) -> None:
        errors = self.protocol_errors.copy()
        for node in self.live:
            errors.update(node.replicator.protocol_errors)
        wrong = {reason: count for reason, count in errors.items() if reason not in allowed}
        if wrong:
            raise BrokenPromise(f"protocol errors among correct nodes: {wrong}")

    def _note_answer(self, node: Node, request: Request, raw: bytes) -> None:
        name = node.name
        self.decisions += 1
        self._digest.update(b"%d %b %b\n" % (self.loop.now_us, name.encode(), raw))
        response = RateLimitResponse.FromString(raw)
        for descriptor, status in zip(request.descriptors, response.statuses, strict=True):
            is_admitted = status.code == _OK
            self.admitted[name] += is_admitted
            if self.trace is not None:
                verdict = "admits" if is_admitted else "denies"
                self.tell(f"{name} {verdict} {request.hits} of {descriptor.value!r}, {status.limit_remaining} left")
            self._note_decision(node, descriptor.rule, descriptor.bucket_key, request.hits, is_admitted=is_admitted)

    def _note_decision(self, node: Node, rule: str, key: bytes, hits: int, *, is_admitted: bool) -> None:
        limit = self.editions.most.get(rule)
        if rule == "plan" and is_admitted:
            self._strict[key].admitted(hits, self.loop.now_us)
        elif rule == "pod":
            assert limit is not None
            local = self._local.get((node, key))
            if local is None:
                local = self._local[node, key] = LocalOracle(rule, limit)
            local.decided(hits, node.now_us, admitted=is_admitted)
        elif (rule in TOKEN_RULES and is_admitted) or rule in WINDOW_RULES:
            bucket = node.store.get(key)
            if bucket is None or (rule == "sliding" and not is_admitted):
                # A node whose rules do not know the key lets pass whatever there is.
                return
            self._lags[node].taken.append((node.now_us, key, bucket._own_slot, bucket._own_tokens))
            if rule in TOKEN_RULES and self.clocks_agree:
                assert limit is not None
                self._note_eventual(bucket, rule, limit, hits)

    def _note_eventual(self, bucket: Bucket, rule: str, limit: TokenBucketLimit, hits: int) -> None:
        oracle = self._oracles.get(bucket.key)
        if oracle is None:
            oracle = self._oracles[bucket.key] = EventualOracle(rule, limit, self.editions.exponent[rule])
        oracle.admitted(bucket, hits, self.loop.now_us, self._most_ahead_us - self._least_ahead_us)

    def _look_at_lag(self, node: Node) -> None:
        now_us = node.now_us
        for peer in node.replicator.peers.values():
            other = self.nodes[peer.node]
            lag_us = node.lag_us(peer.node)
            if not other.is_up or peer.incarnation != other.origin.incarnation:
                # Nobody knows what a life that has ended knew.
                continue
            oldest_us = self._oldest_unapplied_us(node, other)
            if oldest_us is not None and lag_us < now_us - oldest_us:
                raise BrokenPromise(
                    f"lag: {node.name} shows {lag_us / MS:.1f} ms to {peer.node}, which lacks what was taken"
                    f" {(now_us - oldest_us) / MS:.1f} ms ago"
                )

    def _oldest_unapplied_us(self, node: Node, other: Node) -> int | None:
        watch = self._lags[node]
        if not node.replicator.peers[other.name].is_configured:
            # One that only dials in misses nothing from before its coming.
            watch.applied.setdefault(other.name, len(watch.taken))
        return watch.oldest_unapplied_us(
            other.name, node.origin, other.store, *(_boundary_of(self, each) for each in (other, node))
        )

    def _look_at_memory(self, node: Node) -> None:
        buckets = len(node.store) + len(node.ledger)
        peers = max(1, len(node.replicator.peers))
        most = ENTRIES_PER_NODE + peers * (ENTRIES_PER_PEER + ENTRIES_PER_BUCKET * buckets)
        for peer in node.replicator.peers.values():
            # Each bucket once as changed, passed on, found to differ, and yet to be walked to.
            if peer.outbox.pending_buckets > 4 * len(node.store) + 1:
                raise BrokenPromise(f"memory: {node.name} has {peer.outbox.pending_buckets} pending for {peer.node}")
        entries = entries_in(node.replicator, [end.stream for end in node.ends])
        if entries > most:
            raise BrokenPromise(f"memory: {node.name} keeps {entries} entries for {peers} peers and {buckets} buckets")

    def look_at_shares(self) -> None:
        """More than admissions show, as it needs no demand."""
        homes: Counter[bytes] = Counter()
        levels: Counter[bytes] = Counter()
        capacities: dict[bytes, list[int]] = {}
        for node in self.live:
            strict_us = node.clock.strict_us()
            # To walk through the ledger would be most of the work of a run.
            found = [node.ledger._policies.get(key) for key in self._strict]
            for bucket in (policy.bucket for policy in found if policy is not None):
                bucket.advance(strict_us)
                homes[bucket.key] += bucket.home
                capacities.setdefault(bucket.key, []).append(bucket.limit.capacity)
                held = max(0, bucket.level) + bucket.room_reserved
                if held > bucket.max_level and bucket.level > 0:
                    raise BrokenPromise(f"strict: level and reserved room of {bucket.key!r} exceed the home")
                levels[bucket.key] += max(0, bucket.level) * SECOND_US // bucket.limit.period_us
        for key, home in homes.items():
            # Homes are whole tokens: of different capacities, while rules are rolled out, each may be rounded up.
            rounded = len(capacities[key]) if len(set(capacities[key])) > 1 else 0
            if home > (max(capacities[key]) + rounded) * TOKEN:
                raise BrokenPromise(f"strict: homes of {key!r} sum to {home / TOKEN} of {capacities[key]}")
        for key, level in levels.items():
            if level > self.editions.most["plan"].capacity * SECOND_US * TOKEN:
                raise BrokenPromise(f"strict: levels of {key!r} sum to {level / SECOND_US / TOKEN} tokens")


def _boundary_of(cluster: Watched, node: Node) -> Callable[[bytes, int], int]:
    """By bucket key and slot, when slots of this width ended that the node need not know of any more, or never needed
    to."""

    def boundary_us(key: bytes, slot: int) -> int:
        limit = node.store.limit_of_key(key)
        if limit is None:
            return _NEVER_US
        bucket = node.store.get(key)
        known_us = cluster.rule_known_us(node, key)
        if isinstance(limit, TokenBucketLimit):
            base_us = 0 if bucket is None else bucket.base.boundary_us
            return max(limit.boundary_us(node.now_us), base_us, known_us) + (
                # One that began before that is not taken. It may be wider than the limit has them now.
                1 << max(limit.exponent, slot_exponent(slot))
            )
        now_us, period_us = node.now_us, limit.period_us
        if limit.window is Window.FIXED:
            return slot_start_us(slot_id(now_us - now_us % period_us, limit.exponent))
        return now_us - period_us

    return boundary_us


def _in_force(node: Node, key: bytes) -> Bucket | None:
    """The bucket as the next decision on it will see it: by the limit that is in force now."""
    limit = node.store.limit_of_key(key)
    if limit is None or node.store.get(key) is None:
        return None
    return node.store.bucket(key, limit, node.now_us)


def _recent_state(bucket: Bucket, at_us: int) -> set[Entry]:
    """The entries that comparing makes equal: of older ones it is what they amount to."""
    limit = bucket.limit
    if not isinstance(limit, TokenBucketLimit):
        return set()
    oldest_us = max(bucket.base.boundary_us, limit.boundary_us(at_us)) + KEPT_US + EVERY_US
    return {entry for entry in bucket.entries() if placed_us(entry.slot, limit.exponent) >= oldest_us}
