"""Several replicas under every mishap, against an oracle that knows all they admitted.

Operations: take, check only, charge always, give back, tell, deliver, deliver twice, lose, cut off, heal, restart with
nothing left, change the limit here and there, pass time, seal, sweep; on clocks up to half a second from the true one.

After each healing: folds equal to the bit (P1), and the level is that of one bucket fed all events that any replica
still knows of, in order of time (P4), less at most what was given back. At the end every bucket is forgotten (P6). A
lone replica is a textbook bucket all the time (P2). Steps, and not the events of `simulation`, move it: so Hypothesis
decides which message arrives next, and can shorten what fails.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import permutations

from crdt.model import deficit_by_formula
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from joined import join

from ratelimit_sidecar.crdt.bucket import Bucket, Entry, Origin
from ratelimit_sidecar.crdt.limit import AnyLimit, TokenBucketLimit, Window, WindowLimit
from ratelimit_sidecar.crdt.slot import slot_end_us, slot_id
from ratelimit_sidecar.crdt.store import Store

SETTINGS = settings(max_examples=min(10_000, 5 * settings.default.max_examples), stateful_step_count=40)

KEY = b"k"
START_US = 1_790_000_000_000_000
MAX_SKEW_US = 500_000
SECOND_US = 1_000_000
MINUTE_US = 60 * SECOND_US

replica_numbers = st.integers(0, 3)
hits = st.integers(1, 8)
moments = st.integers(0, 60_000) | st.integers(0, 2 * SECOND_US)
pauses = st.sampled_from([4 * SECOND_US, 11 * SECOND_US, 70 * SECOND_US, 600 * SECOND_US])
picks = st.integers(0, 2**16)


class Replica:
    """One life of one node."""

    def __init__(self, number: int, incarnation: int, skew_us: int, limit: AnyLimit) -> None:
        self.origin = Origin(f"node-{number}", incarnation)
        self.skew_us = skew_us
        self.limit = limit
        self.store = Store(self.origin, lambda _: self.limit)

    def bucket(self, now_us: int) -> Bucket:
        return self.store.bucket(KEY, self.limit, now_us)

    def has_ended_snapshot(self, now_us: int):
        bucket = self.bucket(now_us)
        bucket.seal(now_us)
        return bucket.base_to_send, list(bucket.entries())


@dataclass
class Event:
    """Something charged, by whom and where it is counted; `true_us` is on nobody's clock."""

    true_us: int
    origin: Origin
    slot: int
    tokens: int


@dataclass
class Message:
    to: int
    sender: int
    entries: list[Entry]


class Cluster(RuleBasedStateMachine):
    """What holds for all algorithms; a subclass has the limits and the oracle."""

    limits: tuple[AnyLimit, ...]

    @initialize(
        skews_us=st.lists(st.integers(-MAX_SKEW_US, MAX_SKEW_US) | st.just(0), min_size=2, max_size=4),
        limit=picks,
        one_limit=st.booleans(),
    )
    def start(self, skews_us: list[int], limit: int, one_limit: bool) -> None:
        self.true_us = START_US
        self.first_limit = self.limits[limit % len(self.limits)]
        self.may_change = not one_limit
        self.replicas = [Replica(number, 1, skew_us, self.first_limit) for number, skew_us in enumerate(skews_us)]
        self.messages: list[Message] = []
        self.cut: set[frozenset[int]] = set()
        self.events: list[Event] = []
        self.told: dict[tuple[Origin, int], int] = defaultdict(int)
        self.refunded = 0
        """Tokens, by all replicas since the start."""

    def replica(self, number: int) -> tuple[Replica, int]:
        replica = self.replicas[number % len(self.replicas)]
        return replica, self.true_us + replica.skew_us

    @rule(number=replica_numbers, tokens=hits, always=st.booleans())
    def take(self, number: int, tokens: int, always: bool) -> None:
        replica, now_us = self.replica(number)
        bucket = replica.bucket(now_us)
        before = bucket.taken.get(replica.origin, {})
        bucket.take(tokens, now_us, always=always)
        for slot, count in bucket.taken.get(replica.origin, {}).items():
            if count > before.get(slot, 0):
                assert count == before.get(slot, 0) + tokens
                self.events.append(Event(self.true_us, replica.origin, slot, tokens))

    @rule(number=replica_numbers, tokens=st.none() | hits)
    def refund(self, number: int, tokens: int | None) -> None:
        replica, now_us = self.replica(number)
        bucket = replica.bucket(now_us)
        bucket.advance(now_us)
        remaining, debt = bucket.remaining, bucket.debt
        given = bucket.refund(tokens, now_us)
        assert remaining <= bucket.remaining <= bucket.limit.capacity
        assert bucket.debt <= debt
        if tokens is None:
            assert bucket.remaining == bucket.limit.capacity
            assert bucket.fold(now_us) == 0
        else:
            assert given <= tokens
        # A fixed window forgets what it counted over the limit as well.
        self.refunded += given + debt

    @rule(number=replica_numbers)
    def check_only(self, number: int) -> None:
        replica, now_us = self.replica(number)
        bucket = replica.bucket(now_us)
        bucket.advance(now_us)
        before = (bucket.taken, bucket.remaining, bucket.debt)
        assert bucket.take(0, now_us) is (bucket.debt == 0)
        assert (bucket.taken, bucket.remaining, bucket.debt) == before

    @rule(number=replica_numbers)
    def tell(self, number: int) -> None:
        """The new counts go out to everybody, cut off or not."""
        sender = number % len(self.replicas)
        entries = self.drain(self.replicas[sender])
        if entries:
            self.messages += [Message(to, sender, entries) for to in range(len(self.replicas)) if to != sender]

    def drain(self, replica: Replica) -> list[Entry]:
        entries = [entry for bucket, slots in replica.store.drain_changes() for entry in bucket.own_entries(slots)]
        for origin, slot, tokens in entries:
            assert tokens >= self.told[origin, slot], "a count fell below what peers were told"
            self.told[origin, slot] = tokens
        return entries

    @precondition(lambda self: self.messages)
    @rule(pick=picks, again=st.booleans())
    def deliver(self, pick: int, again: bool) -> None:
        index = pick % len(self.messages)
        message = self.messages[index]
        if frozenset((message.to, message.sender)) in self.cut:
            return
        replica, now_us = self.replica(message.to)
        join(replica.store, KEY, None, message.entries, now_us)
        if not again:
            del self.messages[index]

    @precondition(lambda self: self.messages)
    @rule(pick=picks)
    def lose(self, pick: int) -> None:
        del self.messages[pick % len(self.messages)]

    @rule(one=replica_numbers, other=replica_numbers)
    def cut_off(self, one: int, other: int) -> None:
        self.cut.add(frozenset((one % len(self.replicas), other % len(self.replicas))))

    @rule(number=replica_numbers)
    def restart(self, number: int) -> None:
        index = number % len(self.replicas)
        old = self.replicas[index]
        self.replicas[index] = Replica(index, old.origin.incarnation + 1, old.skew_us, old.limit)

    @precondition(lambda self: self.may_change)
    @rule(number=replica_numbers, limit=picks)
    def change_limit(self, number: int, limit: int) -> None:
        replica, now_us = self.replica(number)
        replica.limit = self.limits[limit % len(self.limits)]
        replica.bucket(now_us)

    @rule(moment_us=moments)
    def pass_time(self, moment_us: int) -> None:
        self.true_us += moment_us

    @rule(pause_us=pauses)
    def pause(self, pause_us: int) -> None:
        self.true_us += pause_us

    @rule(number=replica_numbers)
    def seal(self, number: int) -> None:
        replica, now_us = self.replica(number)
        replica.bucket(now_us).seal(now_us)

    @rule(number=replica_numbers)
    def sweep(self, number: int) -> None:
        replica, now_us = self.replica(number)
        replica.store.sweep(now_us, 1)

    @rule()
    def heal(self) -> None:
        """Everybody has the same limit, and hears all that anybody knows, until nobody learns anything more."""
        now_us = self.true_us + MAX_SKEW_US
        self.true_us += 2 * MAX_SKEW_US
        self.cut.clear()
        for replica in self.replicas:
            replica.limit = self.replicas[0].limit
            replica.bucket(now_us)
        for message in self.messages:
            join(self.replicas[message.to].store, KEY, None, message.entries, now_us)
        self.messages.clear()
        for replica in self.replicas:
            self.drain(replica)
        for _ in range(4):
            before = [(replica.bucket(now_us).base, replica.bucket(now_us).taken) for replica in self.replicas]
            for one, other in permutations(self.replicas, 2):
                join(other.store, KEY, *one.has_ended_snapshot(now_us), now_us)
            if before == [(replica.bucket(now_us).base, replica.bucket(now_us).taken) for replica in self.replicas]:
                break
        else:
            raise AssertionError("replicas that tell each other all they know do not come to an end")
        folds = {replica.bucket(now_us).fold(now_us) for replica in self.replicas}
        assert len(folds) == 1, "P1"
        self.forget_lost_events(now_us)
        self.check_level(now_us)

    def forget_lost_events(self, now_us: int) -> None:
        """What a life of a node charged and had told nobody when it ended is known to nobody.

        Counts of a slot rise event by event, so of each slot an earlier part is known.
        """
        known = self.replicas[0].bucket(now_us).taken
        alive = {replica.origin for replica in self.replicas}
        total: dict[tuple[Origin, int], int] = defaultdict(int)
        kept = []
        for event in self.events:
            total[event.origin, event.slot] += event.tokens
            is_known = total[event.origin, event.slot] <= known.get(event.origin, {}).get(event.slot, 0)
            if is_known or event.origin in alive or not self.would_be_held(event, now_us):
                kept.append(event)
        self.events = kept

    def would_be_held(self, event: Event, now_us: int) -> bool:
        """Whether a replica that knows of the event has its slot, and not only a base."""
        raise NotImplementedError

    def check_level(self, now_us: int) -> None:
        """P4."""
        raise NotImplementedError

    def teardown(self) -> None:
        if not hasattr(self, "replicas"):
            return
        self.heal()
        for replica in self.replicas:
            for turn in range(1, 4):
                replica.store.sweep(self.true_us + turn * 10_000 * MINUTE_US, 1)
            assert len(replica.store) == 0, "P6"


class TokenBucketCluster(Cluster):
    limits = (
        TokenBucketLimit(10, SECOND_US, 10, max_debt=1024),
        TokenBucketLimit(1, SECOND_US, 20, max_debt=1024),
        TokenBucketLimit(1, MINUTE_US, 5, max_debt=1024),
        TokenBucketLimit(1_000, SECOND_US, 50, max_debt=1024),
        TokenBucketLimit(2, SECOND_US, 2, max_debt=1),
    )
    is_exact = True
    """False from when something was told too late for its slot, or all who knew of it have restarted, until the
    bucket is full.
    """
    healed_us = START_US
    healed_lives = frozenset(Origin(f"node-{number}", 1) for number in range(4))
    """Who knew everything at `healed_us`."""

    def slack_us(self) -> int:
        return (1 << self.first_limit.exponent) + MAX_SKEW_US

    def would_be_held(self, event: Event, now_us: int) -> bool:
        return event.true_us > now_us - self.first_limit.horizon_us + 2 * self.slack_us()

    def check_level(self, now_us: int) -> None:
        limit = self.replicas[0].limit
        for replica in self.replicas:
            bucket = replica.bucket(now_us)
            bucket.seal(now_us)
            # A delta from a clock ahead counted as now when it came; the fold places it where its own clock said.
            within_us = (1 << limit.exponent) + 2 * MAX_SKEW_US
            # What is too much pays for takes of its slot in the fold: a part of a token, since whole ones are given
            # back, or what two nodes give back before they hear of each other.
            given_back = self.refunded * limit.period_us
            assert abs(bucket.deficit - bucket.fold(now_us)) <= limit.tokens * within_us + given_back, "P1"
        if self.may_change:
            return
        unheard = [event for event in self.events if event.true_us >= self.healed_us]
        self.healed_us = self.true_us
        self.is_exact &= all(self.would_be_held(event, now_us) for event in unheard)
        lives = {replica.origin for replica in self.replicas}
        self.is_exact &= not lives.isdisjoint(self.healed_lives)
        self.healed_lives = lives
        ideal = deficit_by_formula([(event.true_us, event.tokens) for event in self.events], limit, now_us)
        slack = self.slack_us() * limit.tokens
        for replica in self.replicas:
            deficit = replica.bucket(now_us).deficit
            assert deficit <= ideal + slack, "P4: wrongful debt"
            if self.is_exact and limit.max_debt > 1:
                assert deficit >= ideal - slack - self.refunded * limit.period_us, "P4: forgotten"
        self.is_exact |= ideal == 0


class FixedWindowCluster(Cluster):
    limits = tuple(
        WindowLimit(requests, period_us, Window.FIXED)
        for requests, period_us in ((10, SECOND_US), (20, 7 * SECOND_US), (30, MINUTE_US), (40, MINUTE_US))
    )

    def would_be_held(self, event: Event, now_us: int) -> bool:
        return True

    def check_level(self, now_us: int) -> None:
        limit = self.replicas[0].limit
        current = slot_id(now_us - now_us % limit.period_us, limit.exponent)
        count = sum(event.tokens for event in self.events if event.slot == current)
        counts = {replica.bucket(now_us).count for replica in self.replicas}
        assert len(counts) == 1
        assert max(0, count - self.refunded) <= counts.pop() <= count, "P4"


class SlidingWindowCluster(Cluster):
    limits = tuple(
        WindowLimit(requests, period_us, Window.SLIDING)
        for requests, period_us in ((10, SECOND_US), (20, 7 * SECOND_US), (30, MINUTE_US), (40, MINUTE_US))
    )

    def would_be_held(self, event: Event, now_us: int) -> bool:
        return slot_end_us(event.slot) > now_us - self.replicas[0].limit.period_us

    def check_level(self, now_us: int) -> None:
        limit = self.replicas[0].limit
        since_us = now_us - limit.period_us
        width_us = 1 << limit.exponent
        surely = sum(event.tokens for event in self.events if event.true_us > since_us + MAX_SKEW_US)
        perhaps = sum(event.tokens for event in self.events if event.true_us > since_us - width_us - MAX_SKEW_US)
        counts = {replica.bucket(now_us).count for replica in self.replicas}
        assert len(counts) == 1
        for count in counts:
            assert count <= perhaps, "P4"
            if not self.may_change:
                assert count >= surely - self.refunded, "P4"


TestTokenBucketCluster = TokenBucketCluster.TestCase
TestFixedWindowCluster = FixedWindowCluster.TestCase
TestSlidingWindowCluster = SlidingWindowCluster.TestCase
TestTokenBucketCluster.settings = SETTINGS
TestFixedWindowCluster.settings = SETTINGS
TestSlidingWindowCluster.settings = SETTINGS


def test_two_nodes_may_give_back_the_same_tokens() -> None:
    """The second has not heard of the first. No bucket gets more than full; the fold pays for takes of that slot."""
    cluster = TokenBucketCluster()
    cluster.start(skews_us=[53, 0], limit=5_387, one_limit=False)
    for _ in range(14):
        cluster.heal()
    cluster.take(always=False, number=0, tokens=2)
    cluster.heal()
    cluster.refund(number=0, tokens=None)
    cluster.pass_time(moment_us=0)
    cluster.refund(number=1, tokens=None)
    cluster.heal()
    cluster.take(always=False, number=0, tokens=2)
    cluster.heal()
    cluster.teardown()
