"""One life of one sidecar: the decision path, the store, the ledger, the mesh's state machines, and what drives them.

What `app.py` and `replication/mesh.py` do with tasks and sockets is done here by one tick every flush; the rest is the
product's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from ratelimit_sidecar.crdt.bucket import Bucket, Origin
from ratelimit_sidecar.crdt.ledger import Ledger
from ratelimit_sidecar.crdt.shares import Membership, Shares
from ratelimit_sidecar.crdt.waiting import Outcome, PendingDecision
from ratelimit_sidecar.limiter.key import rule_key
from ratelimit_sidecar.limiter.limiter import Limiter
from ratelimit_sidecar.limiter.rules import Consistency, Rules
from ratelimit_sidecar.replication.bounds import DEFAULT_BOUNDS
from ratelimit_sidecar.replication.payments import PaymentExchange
from ratelimit_sidecar.replication.replicator import Replicator
from ratelimit_sidecar.replication.session import LocalNode
from ratelimit_sidecar.replication.stream import Stream
from ratelimit_sidecar.replication.stream_io import CHECK_TIME_SECONDS
from ratelimit_sidecar.replication.wire import Reason
from simulation.clock import NodeClock
from simulation.loop import MS, SECOND_US
from simulation.network import STEP_US, End
from simulation.steps import done
from simulation.workload import DOMAIN

if TYPE_CHECKING:
    from simulation.cluster import Cluster

FLUSH_US = int(DEFAULT_BOUNDS.flush * SECOND_US)
CHECK_TIME_TICKS = int(CHECK_TIME_SECONDS / DEFAULT_BOUNDS.flush)
SLEW_TICKS = int(1 / DEFAULT_BOUNDS.flush)
LOOK_TICKS = SLEW_TICKS // 2
SWEEP_BUCKETS = 1_000
"""In a second; `app.py` does as much in steps of 10 ms."""

CONNECT_US = int(DEFAULT_BOUNDS.connect * SECOND_US)
POLL_DRAIN_US = 5 * MS


class _Target:
    """A configured address, dialled again for ever (`replication/dialler.py`)."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.dialled_us = 0
        self.attempts = 0


class Node:
    """One life of one sidecar; see above. Call `drain` or `stop` to end it.

    Args:
        targets: the nodes that it dials.
        membership: who shares strict limits.
    """

    def __init__(
        self,
        cluster: Cluster,
        name: str,
        *,
        system_ahead_us: int,
        rules: Rules,
        targets: Sequence[str],
        membership: Membership,
    ) -> None:
        draw = cluster.random
        self.cluster = cluster
        self.name = name
        self.clock = NodeClock(cluster.loop, system_ahead_us)
        self.is_up = True
        """False when the process has ended."""
        self.is_powered = True
        """False when the machine has: then nobody answers for it."""
        self.is_draining = False
        self.resumes_us = 0
        """When a suspended process goes on."""
        self.read_us = 0
        """What it needs to read a frame: slow when it is much."""
        self.ends: list[End] = []
        now_us = self.clock.now_us()
        self.origin = Origin(name, draw.getrandbits(63) + 1)

        shares = Shares(membership, name, now_us)
        self.ledger = Ledger(shares, self.origin, rules.strict_limit_of_key, rule_key=rule_key)
        self.ledger.queues.on_ended = lambda: cluster.loop.soon(self._let_out)
        self.limiter = Limiter(rules, self.origin, ledger=self.ledger)
        self.store = self.limiter.store
        self.payments = PaymentExchange(self.ledger, self.clock.strict_us)
        local = LocalNode(self.origin, f"region of {name}", "0", self.payments.membership)
        self.replicator = Replicator(local, self.store, now_us, payments=self.payments)
        self.replicator.use_rules(rules.digest)
        self._targets = {target: _Target(target) for target in targets}
        self._jobs: dict[str, Iterator[None]] = {}
        """Those under way: the next of a kind is begun when the one before has ended."""
        self.ticks = draw.randrange(SLEW_TICKS)
        cluster.loop.after(draw.randrange(FLUSH_US), self._tick)
        for target in self._targets.values():
            cluster.loop.after(draw.randrange(20 * MS), self._dial, target)

    @property
    def now_us(self) -> int:
        return self.clock.now_us()

    @property
    def is_serving(self) -> bool:
        """True when a request of now is answered now."""
        return self.is_up and not self.is_draining and self.cluster.loop.now_us >= self.resumes_us

    def bucket(self, value: str, key: str = "user") -> Bucket:
        """That of a descriptor, as a request would find it."""
        found = self.limiter.rules.match(DOMAIN, [(key, value)])
        assert found is not None
        assert found.rule.limit is not None
        is_replicated = found.rule.consistency is not Consistency.LOCAL
        return self.store.bucket(found.bucket_key, found.rule.limit, self.now_us, replicated=is_replicated)

    def decide(self, request: bytes, answer: Callable[[bytes], None]) -> None:
        """Answer now, or when the request has waited; of the clients of those some give up."""
        loop, draw = self.cluster.loop, self.cluster.random
        decided = self.limiter.decide_or_wait(request, self.clock.now_us())
        if not isinstance(decided, PendingDecision):
            answer(decided)
            return
        decided.on_end = lambda: answer(decided.result())
        loop.after(decided.wait_us, self._end_wait, decided, Outcome.EXPIRED)
        if draw.random() < self.cluster.give_up:
            loop.after(draw.randrange(decided.wait_us), self._end_wait, decided, Outcome.CANCELLED)

    def use_rules(self, rules: Rules) -> None:
        """Decide by other rules from now on."""
        self.limiter.use_rules(rules)
        self.replicator.use_rules(rules.digest)

    def lag_us(self, peer: str) -> int:
        """What the node shows for its lag behind a peer."""
        status = self.replicator.peers[peer].status(self.clock.now_us(), self.replicator.rules)
        return round(status.lag_seconds * SECOND_US)

    def stop(self, *, powered: bool) -> None:
        """End the process, or the machine: `Cluster.crash` ends the connections."""
        self.is_up = False
        self.is_powered = powered

    def suspend(self, for_us: int) -> None:
        """The process stands still: SIGSTOP, or a machine that sleeps."""
        self.resumes_us = self.cluster.loop.now_us + for_us
        self.cluster.loop.at(self.resumes_us, self._resume)

    def drain(self) -> None:
        """What SIGTERM does: take no more, tell the peers what they have yet to hear, say goodbye, exit."""
        if self.is_draining:
            return
        self.is_draining = True
        self.ledger.queues.close()
        self._await_answers()

    def note_ended(self, stream: Stream) -> None:
        """A connection of this node is gone: one that it had dialled is dialled again."""
        target = self._targets.get(stream.address) if stream.is_dialled else None
        if target is not None:
            lasted = self.cluster.loop.now_us - target.dialled_us >= DEFAULT_BOUNDS.lasting * SECOND_US
            self._dial_again(target, lasted=lasted)

    def _end_wait(self, waiting: PendingDecision, outcome: Outcome) -> None:
        if self.cluster.loop.now_us < self.resumes_us:
            self.cluster.loop.at(self.resumes_us, self._end_wait, waiting, outcome)
        elif self.is_up:
            self.ledger.queues.end(waiting, outcome, self.clock.strict_us())

    def _let_out(self) -> None:
        ended = self.ledger.queues.ended
        while ended:
            waiting = ended.popleft()
            if waiting.outcome is not Outcome.CANCELLED and waiting.on_end is not None:
                waiting.on_end()

    def _resume(self) -> None:
        if self.is_up and self.cluster.loop.now_us >= self.resumes_us:
            for end in self.ends:
                end.schedule()
                end.pump_soon()

    def _tick(self) -> None:
        if not self.is_up:
            return
        loop = self.cluster.loop
        if loop.now_us < self.resumes_us:
            loop.at(self.resumes_us, self._tick)
            return
        now_us = self.clock.now_us()
        for name, begin in (("flush", self.replicator.flush_steps), ("compare", self.replicator.compare_steps)):
            if name not in self._jobs:
                self._jobs[name] = begin(now_us)
                self._do(name)
        self.ticks = ticks = self.ticks + 1
        if not ticks % CHECK_TIME_TICKS:
            for end in list(self.ends):
                end.check_time()
        if not ticks % SLEW_TICKS:
            self.store.sweep(now_us, SWEEP_BUCKETS)
            self.ledger.sweep(self.clock.strict_us(), SWEEP_BUCKETS)
            self._slew()
        if not ticks % LOOK_TICKS:
            self.cluster.look(self)
        loop.after(FLUSH_US, self._tick)

    def _do(self, name: str) -> None:
        """Do a job step by step: what happens between two of them is up to the cluster's events."""
        if not self.is_up:
            return
        for _ in self._jobs[name]:
            self.cluster.loop.at(max(self.cluster.loop.now_us + STEP_US, self.resumes_us), self._do, name)
            return
        del self._jobs[name]

    def _slew(self) -> None:
        """What `Sidecar` and `Mesh` do of it."""
        offsets_us = [peer.reported.clock_offset_us for peer in self.replicator.peers.values()]
        stepped_us = self.clock.discipline([offset_us for offset_us in offsets_us if offset_us is not None])
        if not stepped_us:
            return
        self.cluster.tell(f"the clock of {self.name} is set by {stepped_us / SECOND_US:g} s")
        self.limiter.clock_steps_us += stepped_us
        if stepped_us < 0:
            self.origin = Origin(self.name, self.cluster.random.getrandbits(63) + 1)
            self.store.go_back(self.origin)
        for end in list(self.ends):
            end.stream.close(Reason.CLOCK_SET, "the clock was set", self.clock.now_us())
        self.replicator.set_clock(self.store.origin, self.clock.now_us())

    def _dial_again(self, target: _Target, *, lasted: bool) -> None:
        if lasted:
            target.attempts = 0
            self.cluster.loop.soon(lambda: self._dial(target))
            return
        target.attempts += 1
        longest_s = min(DEFAULT_BOUNDS.first_redial * 2 ** (target.attempts - 1), DEFAULT_BOUNDS.most_redial)
        self.cluster.loop.after(int(self.cluster.random.random() * longest_s * SECOND_US), self._dial, target)

    def _dial(self, target: _Target) -> None:
        cluster, network = self.cluster, self.cluster.network
        if not self.is_up or self.is_draining:
            return
        if cluster.loop.now_us < self.resumes_us:
            cluster.loop.at(self.resumes_us, self._dial, target)
            return
        target.dialled_us = cluster.loop.now_us
        there_us = network.draw_delay_us(self.name, target.name)
        back_us = network.draw_delay_us(target.name, self.name)
        cluster.loop.after(there_us + back_us, self._finish_dial, target)

    def _finish_dial(self, target: _Target) -> None:
        """The handshake is over, if it got through: one that does not is repeated by TCP until the time is up."""
        cluster, network = self.cluster, self.cluster.network
        if not self.is_up or self.is_draining:
            return
        listener = cluster.nodes[target.name]
        is_cut = network.is_cut(self.name, target.name) or network.is_cut(target.name, self.name)
        now_us = cluster.loop.now_us
        if is_cut or not listener.is_powered or now_us < max(listener.resumes_us, self.resumes_us):
            if now_us - target.dialled_us >= CONNECT_US:
                # Nobody has answered: `dialler.redial_seconds` waits no longer.
                target.attempts += 1
                self._dial(target)
            else:
                # TCP sends its first packet again after 1 s and after 3 s.
                cluster.loop.at(min(now_us + SECOND_US, target.dialled_us + CONNECT_US), self._finish_dial, target)
        elif not listener.is_up or listener.is_draining:
            self._dial_again(target, lasted=False)
        else:
            network.connect(self, listener)

    def _await_answers(self) -> None:
        """Requests that wait are answered, and may take, before the last flush."""
        if not self.is_up:
            return
        if self.ledger.queues.waiting:
            self.cluster.loop.after(POLL_DRAIN_US, self._await_answers)
            return
        self._let_out()
        done(self.replicator.flush_steps(self.clock.now_us()))
        self._await_acknowledgements(self.cluster.loop.now_us + int(DEFAULT_BOUNDS.drain * SECOND_US))

    def _await_acknowledgements(self, until_us: int) -> None:
        if not self.is_up:
            return
        loop = self.cluster.loop
        is_all_acknowledged = self.replicator.is_all_acknowledged()
        if not is_all_acknowledged and loop.now_us < until_us:
            loop.after(POLL_DRAIN_US, self._await_acknowledgements, until_us)
            return
        self.cluster.note_drained(self, is_all_acknowledged=is_all_acknowledged)
        for end in list(self.ends):
            end.stream.close(Reason.DRAINING, "the sidecar is shutting down", self.clock.now_us())
        loop.after(int(DEFAULT_BOUNDS.goodbye * SECOND_US), self._exit)

    def _exit(self) -> None:
        if self.is_up:
            self.cluster.crash(self.name)
