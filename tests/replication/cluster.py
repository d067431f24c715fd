"""A cluster on virtual time in one process: real stores, replicators and sessions over simulated connections.

Everything drawn at random comes from one seed, so a failing run is reproduced by it. Connections keep order, as TCP
does. While two nodes are cut off from each other their frames wait, as TCP retransmits; nobody is told of the cut, and
what notices it is the sessions. A reset loses whatever was on its way.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from itertools import combinations, count
from random import Random

from replication.builders import (
    NOW_US,
    RULES,
    SECOND_US,
    bucket_of,
    flush,
    ledger_of,
    next_frame,
    node,
    receive,
    store_of,
)

from ratelimit_sidecar.crdt.bucket import Bucket
from ratelimit_sidecar.crdt.limit import Limit
from ratelimit_sidecar.crdt.shares import Membership
from ratelimit_sidecar.crdt.strict import StrictBucket
from ratelimit_sidecar.limiter.rules import Rules
from ratelimit_sidecar.replication.peer import Peer
from ratelimit_sidecar.replication.purses import Purses
from ratelimit_sidecar.replication.replicator import Replicator
from ratelimit_sidecar.replication.stream import Stream

MS = 1_000
FLUSH_US = 20 * MS
CHECK_TIME_US = 250 * MS
MAX_REDIAL_US = 400 * MS


class Node:
    """One life of one sidecar. Its clock, the one of strict buckets as well, is `skew_us` ahead of the cluster's."""

    def __init__(self, cluster: Cluster, name: str, incarnation: int, skew_us: int, rules: Rules) -> None:
        self.cluster = cluster
        self.skew_us = skew_us
        self.rules = rules
        self.ledger = ledger_of(name, cluster.membership, self.now_us, rules)
        purses = Purses(self.ledger, lambda: self.now_us)
        self.local = node(name, incarnation, membership=purses.membership)
        self.store = store_of(self.local, rules)
        self.replicator = Replicator(self.local, self.store, self.now_us, purses=purses)
        self.is_up = True

    @property
    def now_us(self) -> int:
        return self.cluster.now_us + self.skew_us

    def bucket(self, value: str, key: str = "user") -> Bucket:
        return bucket_of(self.store, value, self.now_us, key, self.rules)

    def strict_bucket(self, value: str) -> StrictBucket:
        found = self.rules.match("api", [("plan", value)])
        assert found is not None
        assert isinstance(found.rule.limit, Limit)
        return self.ledger.bucket(found.bucket_key, found.rule.limit, self.now_us)

    def peer(self, name: str) -> Peer:
        return self.replicator.peers[name]


class End:
    """One end of a connection."""

    def __init__(self, connection: Connection, owner: Node, address: str, *, is_dialled: bool) -> None:
        self.connection = connection
        self.owner = owner
        self.is_open = True
        self.stream = Stream(
            owner.replicator,
            address,
            is_dialled=is_dialled,
            wake=self._pump_soon,
            now_us=owner.now_us,
            is_proven=True,
        )
        self.sent: list[bytes | None] = []
        """On the way to the other end, in order; None is the end of the connection."""
        self.arrives_us = 0
        self._pumping = False
        self._pump_soon()

    @property
    def other(self) -> End:
        return next(end for end in self.connection.ends if end is not self)

    def close(self) -> None:
        """The connection is gone, as far as this end knows."""
        if self.is_open:
            self.is_open = False
            if self.owner.is_up:
                self.stream.lost("the connection was closed", self.owner.now_us)
            self.connection.cluster.redial_if_dialled(self)

    def hang_up(self) -> None:
        if self.is_open:
            self.close()
            self.send(None)

    def send(self, raw: bytes | None) -> None:
        cluster = self.connection.cluster
        self.sent.append(raw)
        self.arrives_us = max(self.arrives_us, cluster.now_us + cluster.draw_delay_us())
        cluster.at(self.arrives_us, self._deliver)

    def _deliver(self) -> None:
        """Hand over the next frame, unless the way is cut: then they wait."""
        if self.connection.cluster.is_cut(self.connection) or not self.sent:
            return
        raw = self.sent.pop(0)
        other = self.other
        if not other.is_open or not other.owner.is_up:
            return
        if raw is None:
            other.close()
        else:
            receive(other.stream, raw, other.owner.now_us)

    def resume(self) -> None:
        """The way is free again: what has waited arrives now."""
        now_us = self.connection.cluster.now_us
        for _ in range(len(self.sent)):
            self.connection.cluster.at(now_us, self._deliver)

    def _pump_soon(self) -> None:
        if not self._pumping:
            self._pumping = True
            self.connection.cluster.at(self.connection.cluster.now_us, self._pump)

    def _pump(self) -> None:
        self._pumping = False
        if not self.is_open or not self.owner.is_up:
            return
        while (raw := next_frame(self.stream, self.owner.now_us)) is not None:
            self.send(raw)
        if self.stream.is_over:
            self.hang_up()


class Connection:
    def __init__(self, cluster: Cluster, dialler: Node, listener: Node) -> None:
        self.cluster = cluster
        self.names = frozenset((dialler.local.origin.node, listener.local.origin.node))
        self.ends: list[End] = []
        self.ends.append(End(self, dialler, listener.local.origin.node, is_dialled=True))
        self.ends.append(End(self, listener, "", is_dialled=False))


class Cluster:
    """Every node dials every other one, for ever, and has an equal share of strict limits.

    Args:
        delay_us: shortest and longest way of a frame.
        skew_us: a node's clock is up to so much off.
    """

    def __init__(
        self,
        seed: int,
        names: str,
        *,
        delay_us: tuple[int, int] = (5 * MS, 80 * MS),
        skew_us: int = 0,
        rules: Rules = RULES,
    ) -> None:
        self.random = Random(seed)
        self.now_us = NOW_US
        self.nodes: dict[str, Node] = {}
        self.membership = Membership(1, dict.fromkeys(names, 1))
        """What nodes started from now on are configured with."""
        self.connections: list[Connection] = []
        self._delay_us = delay_us
        self._skew_us = skew_us
        self._rules = rules
        self._cuts: set[frozenset[str]] = set()
        self._actions: list[tuple[int, int, Callable[[], None]]] = []
        self._order = count()
        self._incarnations = count(1)
        for name in names:
            self.start(name)
        for dialler in names:
            for listener in names:
                if dialler != listener:
                    self._dial_later(dialler, listener)

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes.values())

    def __getitem__(self, name: str) -> Node:
        return self.nodes[name]

    def at(self, time_us: int, action: Callable[[], None]) -> None:
        heapq.heappush(self._actions, (time_us, next(self._order), action))

    def after(self, delay_us: int, action: Callable[[], None]) -> None:
        self.at(self.now_us + delay_us, action)

    def run(self, for_us: int) -> None:
        end_us = self.now_us + for_us
        while self._actions and self._actions[0][0] <= end_us:
            self.now_us, _, action = heapq.heappop(self._actions)
            action()
        self.now_us = end_us

    def run_until_settled(self, within_us: int = 20 * SECOND_US) -> None:
        """Run until every node is connected to every other one and has been acknowledged everything."""
        end_us = self.now_us + within_us
        while not self.is_settled():
            assert self.now_us < end_us, "the cluster does not settle"
            self.run(FLUSH_US)

    def is_settled(self) -> bool:
        return all(
            sum(bool(peer.streams) and peer.outbox.is_settled for peer in each.replicator.peers.values())
            == len(self.nodes) - 1
            for each in self
        )

    def start(self, name: str) -> Node:
        """Start a node, or restart it with nothing in memory."""
        skew_us = self.random.randint(-self._skew_us, self._skew_us)
        started = self.nodes[name] = Node(self, name, next(self._incarnations), skew_us, self._rules)
        self._flush(started)
        self._check_time(started)
        return started

    def crash(self, name: str) -> None:
        """End a process: the others' connections to it break."""
        self.nodes[name].is_up = False
        for end in self.ends_at(name):
            end.hang_up()

    def cut(self, one: str, other: str) -> None:
        self._cuts.add(frozenset((one, other)))

    def heal(self, one: str, other: str) -> None:
        self._cuts.discard(frozenset((one, other)))
        for connection in self.connections:
            if connection.names == {one, other}:
                for end in connection.ends:
                    end.resume()

    def heal_all(self) -> None:
        for one, other in combinations(self.nodes, 2):
            self.heal(one, other)

    def reset(self, one: str, other: str) -> None:
        """Break the connections between two nodes: what is on its way is lost, and both ends know at once."""
        for connection in list(self.connections):
            if connection.names == {one, other}:
                for end in connection.ends:
                    end.sent.clear()
                    end.close()

    def hang_up(self, one: str, other: str) -> None:
        """`one` closes its oldest connection to `other`, where all that is on its way still arrives before that."""
        for end in self.ends_at(one):
            if end.is_open and other in end.connection.names:
                end.hang_up()
                return

    def is_cut(self, connection: Connection) -> bool:
        return connection.names in self._cuts

    def draw_delay_us(self) -> int:
        return self.random.randint(*self._delay_us)

    def redial_if_dialled(self, end: End) -> None:
        connection = end.connection
        if not any(each.is_open for each in connection.ends):
            self.connections.remove(connection)
        if end.stream.is_dialled:
            self._dial_later(end.owner.local.origin.node, end.stream.address)

    def ends_at(self, name: str) -> list[End]:
        return [end for connection in self.connections for end in connection.ends if end.owner is self.nodes[name]]

    def _dial_later(self, dialler: str, listener: str) -> None:
        self.after(self.random.randint(0, MAX_REDIAL_US), lambda: self._dial(dialler, listener))

    def _dial(self, dialler: str, listener: str) -> None:
        one, other = self.nodes[dialler], self.nodes[listener]
        if one.is_up and other.is_up and frozenset((dialler, listener)) not in self._cuts:
            self.connections.append(Connection(self, one, other))
        else:
            self._dial_later(dialler, listener)

    def _flush(self, each: Node) -> None:
        if each.is_up:
            flush(each.replicator, each.now_us)
            self.after(FLUSH_US, lambda: self._flush(each))

    def _check_time(self, each: Node) -> None:
        if not each.is_up:
            return
        for end in self.ends_at(each.local.origin.node) if self.nodes[each.local.origin.node] is each else ():
            if end.is_open:
                end.stream.check_time(each.now_us)
        self.after(CHECK_TIME_US, lambda: self._check_time(each))


def state_of(bucket: Bucket) -> dict[object, dict[int, int]]:
    """What of it replicates, within the horizon."""
    return {origin: dict(sorted(slots.items())) for origin, slots in sorted(bucket.taken.items())}
