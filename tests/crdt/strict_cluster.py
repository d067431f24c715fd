"""Several replicas of one strict bucket on virtual time, over streams that close at either end, with any policy.

The oracle is outside: every admission of every replica, at its true time, goes through one bucket that never refuses.
Its deficit above the capacity is what was admitted beyond `capacity + rate * T` in some interval. No sessions, as in
`simulation.cluster`: here any message may come at any time, and each rule can be broken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations
from random import Random
from typing import Any

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.limit import TokenBucketLimit
from ratelimit_sidecar.crdt.payment_policy import Payment, PaymentPolicy, Ticket
from ratelimit_sidecar.crdt.shares import TOKEN, Membership, Shares, ShownMembership
from ratelimit_sidecar.crdt.strict import HOLD_US, StrictBucket
from ratelimit_sidecar.crdt.waiting import Outcome, PendingDecision, WaitQueue, Wish
from simulation.loop import START_US, Loop
from simulation.textbook import TextbookBucket

TICK_US = 20_000
KEY = b"k"


@dataclass(eq=False)
class Replica:
    """One life of it. Its clock is ahead, and runs fast or slow."""

    node: str
    skew_us: int
    drift_ppm: int
    shares: Shares
    policy: PaymentPolicy
    queue: WaitQueue
    ends: dict[str, list[int]] = field(default_factory=dict)
    """By peer, its open ends of streams; the first is in use."""

    @property
    def bucket(self) -> StrictBucket:
        return self.policy.bucket


@dataclass
class StrictCluster:
    """Replicas of one strict bucket, the streams between them, and the oracle; see above.

    Args:
        delay_us: one way, at most; drawn anew for each message, and each stream keeps its own order.
        drift_ppm: how much slower or faster clocks run at most, each drawn from the seed.
        bucket_type: a test breaks the rule by another one.
    """

    limit: TokenBucketLimit
    nodes: tuple[str, ...] = ("a", "b", "c")
    seed: int = 0
    delay_us: int = 40_000
    max_skew_us: int = 0
    drift_ppm: int = 0
    weights: dict[str, int] | None = None
    bucket_type: type[StrictBucket] = StrictBucket
    counts_late: bool = False
    """A broken rule: an answer counts though the end of its stream is closed."""
    pays_twice: bool = False
    """A broken rule: some answers come twice."""
    starts_full: bool = False
    """A broken rule: a restarted replica has a full home."""
    keeps_twice: bool = False
    """A broken rule: what was kept at a stop is used by two lives."""
    serves_twice: bool = False
    """A broken rule: some tickets come twice, and each counts."""
    hold_us: int = HOLD_US
    """A broken rule when it is less: the room of a ticket is free before the ticket is over."""
    starts_at_once: bool = False
    """A broken rule: a restarted replica has a home before its former tickets are over."""
    frees_at_close: bool = False
    """A broken rule: the room of a ticket is free when the stream on which it was sent is closed."""
    is_fixed_delay: bool = True
    admitted: dict[str, int] = field(default_factory=dict)
    cut: set[frozenset[str]] = field(default_factory=set)
    replicas: dict[str, Replica] = field(default_factory=dict)
    payments: int = 0
    charges: int = 0
    tickets: int = 0
    served: int = 0
    """Requests that have waited and were admitted."""
    worst: int = 0
    """Most scaled tokens beyond `capacity + rate * T` in any interval, with the rate of the fastest clock; 0 keeps the
    promise."""

    def __post_init__(self) -> None:
        self.random = Random(self.seed)
        self.membership = Membership(1, self.weights or dict.fromkeys(self.nodes, 1))
        # Many ticks are due at one instant, and each may be first.
        self.loop = Loop(lambda: self.random.getrandbits(60))
        fastest = TokenBucketLimit(
            self.limit.tokens * (10**6 + self.drift_ppm), self.limit.period_us * 10**6, self.limit.capacity
        )
        self._oracle = TextbookBucket(fastest)
        self._limits = [self.limit]
        self._ends = self._numbers = 0
        self._ticket_to: str | None = None
        self._fault: Callable[[str], None] | None = None
        self._given: list[tuple[Replica, int, int, str]] = []
        """Tickets that count: who has given it, on which end, its number, and whom."""
        self._kept: dict[str, int] = {}
        self._arrived: dict[int, int] = {}
        for node in self.nodes:
            self.start(node, full=True)
            self.at(self.random.randrange(TICK_US), lambda node=node: self._tick(node))

    def clock_us(self, replica: Replica) -> int:
        elapsed_us = self.loop.now_us - START_US
        return self.loop.now_us + replica.skew_us + elapsed_us * replica.drift_ppm // 1_000_000

    def at(self, after_us: int, event: Callable[[], None]) -> None:
        self.loop.after(after_us, self._happen, event)

    def _happen(self, event: Callable[[], None]) -> None:
        event()
        self.check()

    def run(self, duration_us: int) -> None:
        self.loop.run(duration_us)

    def start(self, node: str, *, full: bool = False) -> None:
        """A life of a replica: it remembers nothing. Those of the beginning have run for long."""
        skew_us = self.random.randint(-self.max_skew_us, self.max_skew_us)
        drift_ppm = self.random.randint(-self.drift_ppm, self.drift_ppm)
        replica = Replica(node, skew_us, drift_ppm, None, None, None)  # type: ignore[arg-type]
        now_us = self.clock_us(replica)
        holds = not full and not self.starts_full and not self.starts_at_once
        shares = replica.shares = Shares(self.membership, node, now_us if holds else now_us - HOLD_US)
        self.replicas[node] = replica
        if not holds:
            shares.from_us = now_us
        for other in list(self.replicas.values()):
            if other is not replica:
                shares.receive(other.node, shown(other), now_us)
                other.shares.receive(node, shown(replica), self.clock_us(other))
        limit = self._limits[-1]
        bucket = self.bucket_type(
            KEY,
            limit,
            Origin(node, 1),
            now_us,
            home=shares.home(KEY, limit.capacity, now_us),
            from_us=0 if full or self.starts_full else now_us,
        )
        replica.policy = PaymentPolicy(bucket)
        replica.queue = WaitQueue(replica.policy, lambda _waiting, _now_us: None)
        self.at(self._true_us(HOLD_US, replica) if holds else 0, lambda: self._begin_home(replica))
        for other in list(self.replicas.values()):
            if other.policy is not None:
                self._set_home(other)
        for other in self.replicas.values():
            if other is not replica:
                self.connect(node, other.node)

    def _begin_home(self, replica: Replica) -> None:
        if self.replicas.get(replica.node) is replica:
            self._set_home(replica)
            if replica.node in self._kept and replica.bucket.max_level:
                kept = self._kept[replica.node] if self.keeps_twice else self._kept.pop(replica.node)
                replica.bucket.restore(kept)

    def _true_us(self, duration_us: int, replica: Replica) -> int:
        """How long that is by a replica's clock."""
        return duration_us * 1_000_000 // (1_000_000 + replica.drift_ppm) + 1

    def stop(self, node: str) -> None:
        """Cleanly: what its purse has is kept for its next life."""
        bucket = self.replicas[node].bucket
        self._kept[node] = bucket.level // bucket.limit.period_us
        self.crash(node)

    def crash(self, node: str) -> None:
        """Its peers notice later."""
        gone = self.replicas.pop(node)
        for peer, ends in gone.ends.items():
            for end in ends:
                self._close_soon(peer, end ^ 1)

    def connect(self, one: str, other: str) -> None:
        """One more stream between the two."""
        if one not in self.replicas or other not in self.replicas:
            return
        self._ends += 2
        self.replicas[one].ends.setdefault(other, []).append(self._ends)
        self.replicas[other].ends.setdefault(one, []).append(self._ends ^ 1)

    def close(self, node: str, peer: str) -> None:
        """The node closes the stream in use; the other end notices later."""
        replica = self.replicas.get(node)
        ends = replica.ends.get(peer) if replica is not None else None
        if ends:
            end = ends[0]
            self._close(node, end)
            self._close_soon(peer, end ^ 1)

    def set_limit(self, node: str, limit: TokenBucketLimit) -> None:
        """Replicas change their rules at different moments; the oracle allows the greatest of them."""
        self._limits.append(limit)
        replica = self.replicas.get(node)
        if replica is not None:
            replica.bucket.set_limit(limit, self.clock_us(replica))
            self._set_home(replica)

    def set_membership(self, membership: Membership, node: str) -> None:
        """Restart the node with another membership."""
        self.membership = membership
        if node in self.replicas:
            self.crash(node)
        self.start(node)

    def take(self, node: str, hits: int = 1) -> bool:
        replica = self.replicas.get(node)
        if replica is None or not replica.bucket.take(hits, self.clock_us(replica)):
            return False
        self.admitted[node] = self.admitted.get(node, 0) + hits
        self.worst = max(self.worst, self._oracle.charge(self.loop.now_us, hits))
        return True

    def charge(self, node: str, hits: int) -> None:
        """Take hits that are charged though there are too few tokens."""
        replica = self.replicas.get(node)
        if replica is not None:
            now_us = self.clock_us(replica)
            if not self.take(node, hits):
                replica.bucket.take(hits, now_us, always=True)
            self.charges += 1

    def take_all(self, node: str) -> None:
        while self.take(node):
            pass

    def demand(self, node: str, per_second: int, duration_us: int) -> None:
        """Single hits at random instants, `per_second` on average."""
        for _ in range(per_second * duration_us // 1_000_000):
            self.at(self.random.randrange(duration_us), lambda: self.take(node))

    def total_admitted(self) -> int:
        return sum(self.admitted.values())

    def ask(self, node: str, peer: str, part: float) -> None:
        """Ask for some of the room, whatever the policy."""
        replica = self.replicas.get(node)
        if replica is None or not replica.ends.get(peer):
            return
        bucket, end = replica.bucket, self.random.choice(replica.ends[peer])
        bucket.advance(self.clock_us(replica))
        amount = int(bucket.free_room * part) // bucket.limit.period_us
        if end not in bucket.reserved and amount > 0:
            bucket.ask(end, amount)
            self._send(end, lambda: self._asked_for_any(peer, node, end, amount))

    def wait(self, node: str, hits: int) -> None:
        """Let a request wait, whatever the policy."""
        replica = self.replicas.get(node)
        if replica is not None:
            waiting = PendingDecision(hits, lambda _now_us: self._serve(node, hits), 0)
            replica.queue.join(waiting, self.clock_us(replica))

    def end_wait(self, node: str, outcome: Outcome) -> None:
        """The longest wait ends: its time is over, or it is cancelled."""
        replica = self.replicas.get(node)
        if replica is not None and (first := replica.queue.first) is not None:
            replica.queue.end(first, outcome, self.clock_us(replica))

    def wish(self, node: str, peer: str, tokens: int) -> None:
        """Wish for tokens, whatever the policy."""
        replica = self.replicas.get(node)
        if replica is None or not replica.ends.get(peer):
            return
        end = self.random.choice(replica.ends[peer])
        replica.queue.note_wish(peer, tokens)
        self._wish(replica, end, peer, tokens)

    def use_ticket(self, node: str, peer: str, fault: Callable[[str], None] | None = None) -> None:
        """Let a request wait for more than its replica can hold, have something happen to the payer once its ticket is
        under way, and take all that there is anywhere at the instant when the ticket comes.
        """
        replica = self.replicas.get(node)
        if replica is None:
            return
        while replica.queue.first is not None:
            self.end_wait(node, Outcome.EXPIRED)
        self.run(self.random.choice([0, 1_000_000]))
        more = self.random.randint(1, self.limit.capacity // len(self.nodes) + 1)
        self.wait(node, replica.bucket.home // TOKEN + more)
        self.wish(node, peer, self.limit.capacity)
        self._ticket_to, self._fault = node, fault
        self.run(2 * self.delay_us)
        self._ticket_to = self._fault = None
        self.end_wait(node, Outcome.EXPIRED)

    def restart(self, node: str) -> None:
        if node in self.replicas:
            self.crash(node)
        self.start(node)

    def _wish(self, replica: Replica, end: int, peer: str, tokens: int) -> None:
        self._numbers += 1
        number, bucket = self._numbers, replica.bucket
        bucket.advance(self.clock_us(replica))
        bucket.wish(number)
        wish = Wish(peer, KEY, tokens, bucket.at_us)
        self._send(end, lambda: self._wished(replica.node, end, number, wish))

    def _wished(self, node: str, end: int, number: int, wish: Wish) -> None:
        payer = self._at(wish.peer, end ^ 1)
        if payer is None:
            return
        ticket = payer.policy.set_aside(number, wish.tokens, self.clock_us(payer))
        self.tickets += ticket.tokens > 0
        self._given.append((payer, end ^ 1, number, node))
        self.at(self._true_us(self.hold_us, payer), lambda: self._release(payer, number, node, 0))
        for _ in range(1 + (self.serves_twice and self.random.random() < 0.5)):
            self._send(end ^ 1, lambda: self._come(node, end, number, wish, ticket))
        if node == self._ticket_to and self._fault is not None:
            self._fault(wish.peer)

    def _come(self, node: str, end: int, number: int, wish: Wish, ticket: Ticket) -> None:
        replica = self._at(node, end)
        if replica is None:
            return
        if self.serves_twice:
            replica.bucket.wishes.setdefault(number, self.clock_us(replica))
            replica.queue.note_wish(wish.peer, wish.tokens)
        most = self.limit.capacity * TOKEN
        returned = replica.queue.accept(number, wish, ticket, most, self.clock_us(replica))
        for each in self.nodes if node == self._ticket_to else ():
            self.take_all(each)
        payer = self.replicas.get(wish.peer)
        if payer is not None:
            self._send(end, lambda: self._released(payer, end ^ 1, number, node, returned))

    def _released(self, payer: Replica, end: int, number: int, node: str, returned: int) -> None:
        if self._at(payer.node, end) is payer:
            self._release(payer, number, node, returned)

    def _release(self, payer: Replica, number: int, node: str, returned: int) -> None:
        if self.replicas.get(payer.node) is payer:
            payer.bucket.release(number, node, returned, self.clock_us(payer))

    def _serve(self, node: str, hits: int) -> bytes:
        if self.take(node, hits):
            self.served += 1
        return b""

    def check(self) -> None:
        """Stricter than the oracle, as it needs no demand."""
        if self.bucket_type is StrictBucket and not self.pays_twice and not self.serves_twice:
            for replica in self.replicas.values():
                bucket = replica.bucket
                assert bucket.level >= (bucket.floor if self.charges else 0)
                assert bucket.aside == sum(bucket.tickets.values())
                assert bucket.level + bucket.room_reserved <= bucket.max_level or bucket.level <= 0
        assert self.worst <= 0

    def _tick(self, node: str) -> None:
        self.at(TICK_US, lambda: self._tick(node))
        replica = self.replicas.get(node)
        if replica is None:
            return
        weights = replica.shares.membership.weights
        ends = {peer: ends[0] for peer, ends in replica.ends.items() if ends and peer in weights}
        for peer, ask in replica.policy.make_asks(ends, self.clock_us(replica)).items():
            self._send(ends[peer], lambda peer=peer, ask=ask: self._asked(peer, node, ends[peer], ask))
        replica.queue.serve(self.clock_us(replica), 10)
        for peer, tokens in replica.queue.make_wishes(list(ends), self.clock_us(replica)).items():
            self._wish(replica, ends[peer], peer, tokens)

    def _asked(self, node: str, peer: str, end: int, ask: object) -> None:
        replica = self._at(node, end ^ 1)
        if replica is not None:
            pay = replica.policy.pay(peer, ask, self.clock_us(replica))  # type: ignore[arg-type]
            self._pay(node, peer, end, pay)

    def _asked_for_any(self, node: str, peer: str, end: int, amount: int) -> None:
        replica = self._at(node, end ^ 1)
        if replica is not None:
            replica.bucket.advance(self.clock_us(replica))
            self._pay(node, peer, end, Payment(replica.bucket.pay(peer, amount), 0))

    def _pay(self, node: str, peer: str, end: int, pay: Payment) -> None:
        self.payments += pay.amount > 0
        lives = self.replicas.get(peer)
        for _ in range(1 + (self.pays_twice and self.random.random() < 0.3)):
            self._send(end ^ 1, lambda: self._paid(peer, node, end, pay, lives))

    def _paid(self, node: str, payer: str, end: int, pay: Payment, life: Replica | None) -> None:
        replica = self._at(node, end)
        if replica is None and self.counts_late and life is self.replicas.get(node):
            replica = life
        if replica is None:
            return
        bucket = replica.bucket
        if self.counts_late or self.pays_twice:
            bucket.reserved.setdefault(end, pay.amount)
        replica.policy.receive_payment(payer, end, pay, self.limit.capacity * TOKEN, self.clock_us(replica))

    def _at(self, node: str, end: int) -> Replica | None:
        """The replica, while its end of the stream is open."""
        replica = self.replicas.get(node)
        return replica if replica is not None and any(end in ends for ends in replica.ends.values()) else None

    def _send(self, end: int, event: Callable[[], None]) -> None:
        """In order of the stream's end, and of no other; over a cut nothing comes."""
        delay_us = self.delay_us if self.is_fixed_delay else self.random.randint(0, self.delay_us)
        arrives_us = max(self.loop.now_us + delay_us, self._arrived.get(end, 0))
        self._arrived[end] = arrives_us
        ways = ((node, peer) for node, replica in self.replicas.items() for peer in replica.ends)
        pair = next((frozenset(way) for way in ways if end in self.replicas[way[0]].ends[way[1]]), None)

        def arrive() -> None:
            if pair not in self.cut:
                event()

        self.at(arrives_us - self.loop.now_us, arrive)

    def _close_soon(self, node: str, end: int) -> None:
        life = self.replicas.get(node)

        def close() -> None:
            if self.replicas.get(node) is life:
                self._close(node, end)

        self.at(self.random.randint(0, 2 * self.delay_us + 1), close)

    def _close(self, node: str, end: int) -> None:
        replica = self.replicas.get(node)
        if replica is None:
            return
        for ends in replica.ends.values():
            if end in ends:
                ends.remove(end)
        replica.bucket.closed(end, self.clock_us(replica))
        if self.frees_at_close:
            for payer, payers_end, number, peer in self._given:
                if payer is replica and payers_end == end:
                    self._release(replica, number, peer, 0)

    def _set_home(self, replica: Replica) -> None:
        now_us, limit = self.clock_us(replica), replica.bucket.limit
        replica.bucket.set_home(replica.shares.home(KEY, limit.capacity, now_us), now_us)


def shown(replica: Replica) -> ShownMembership:
    membership = replica.shares.membership
    return ShownMembership(membership.epoch, membership.weights)


def pairs_of(nodes: str) -> list[str]:
    return ["".join(pair) for pair in combinations(nodes, 2)]


class NoReservation(StrictBucket):
    def ask(self, stream_number: int, amount: int) -> None:
        super().ask(stream_number, amount)
        self.asked_for = amount
        self.reserved[stream_number] = 0

    def receive_payment(self, stream_number: int, peer: str, amount: int, most: int) -> bool:
        del self.reserved[stream_number]
        self.level = min(self.max_level, self.level + amount * self.limit.period_us)
        return True


class FreePayment(StrictBucket):
    def pay(self, peer: str, amount: int) -> int:
        level = self.level
        paid = super().pay(peer, amount)
        self.level = level
        return paid


class TicketUnreserved(StrictBucket):
    def set_aside(self, number: int, tokens: int) -> int:
        tokens = super().set_aside(number, tokens)
        self.aside -= self.tickets.get(number, 0)
        self.tickets[number] = 0
        return tokens


class FreeTicket(StrictBucket):
    def set_aside(self, number: int, tokens: int) -> int:
        level = self.level
        tokens = super().set_aside(number, tokens)
        self.level = level
        return tokens


class LateTicket(StrictBucket):
    """As if it were never too late."""

    def accept(self, number: int, peer: str, tokens: int, most: int, now_us: int) -> int:
        if number in self.wishes:
            self.wishes[number] = now_us
        return super().accept(number, peer, tokens, most, now_us)


class TicketKeptWithoutRoom(StrictBucket):
    def take_rest(self, peer: str, added: int) -> int:
        return 0


class TicketReturnedToo(StrictBucket):
    """What was used is given back as well."""

    def take_rest(self, peer: str, added: int) -> int:
        super().take_rest(peer, added)
        return added // self.limit.period_us


BROKEN: dict[str, dict[str, Any]] = {
    "no room is reserved": {"bucket_type": NoReservation},
    "what is paid is kept": {"bucket_type": FreePayment},
    "a payment counts twice": {"pays_twice": True},
    "a process starts with a full home": {"starts_full": True},
    "what was kept at a stop is used by two lives": {"keeps_twice": True},
    "no room is reserved for a ticket": {"bucket_type": TicketUnreserved},
    "what is set aside for a ticket is kept": {"bucket_type": FreeTicket},
    "a ticket is used twice": {"serves_twice": True},
    "a ticket is used when it is too old": {"bucket_type": LateTicket},
    "the room of a ticket is free too early": {"hold_us": HOLD_US // 10},
    "the room of a ticket is free when its stream is closed": {"frees_at_close": True},
    "what is left of a ticket is kept without room": {"bucket_type": TicketKeptWithoutRoom},
    "what was used of a ticket is given back as well": {"bucket_type": TicketReturnedToo},
    "a process has a home before its former tickets are over": {"starts_at_once": True},
}
"""Without any one of the rules more is admitted than the limit. Another one is `counts_late`, which chance hardly ever
hits: see `test_an_answer_after_its_end_has_closed_does_not_count`."""
