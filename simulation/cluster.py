"""Whole sidecars on one virtual clock and network. Everything drawn at random comes from one seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from random import Random
from zlib import crc32

from ratelimit_sidecar.crdt import untracked_dict
from ratelimit_sidecar.crdt.shares import Membership
from ratelimit_sidecar.limiter.rules import Rules
from ratelimit_sidecar.replication import key_ids
from simulation.loop import SECOND_US, Loop
from simulation.network import End, Network, Ways, between
from simulation.node import FLUSH_US, Node


@contextmanager
def stable_order() -> Iterator[None]:
    """While it lasts, nodes go through their buckets in the same order in every process.

    They cut themselves into shards by `hash`, which is salted in every process anew.
    """
    sharded = (untracked_dict, key_ids)
    for module in sharded:
        module.hash = crc32  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module in sharded:
            del module.hash


class Cluster:
    """Nodes on one simulated network, with what is done to them: start, stop, cut, take. Call `run` to let time pass.

    Args:
        names: of the nodes.
        network: in place of one of `seed`, `ways` and `window_bytes`.
        ways: by default 20 ms between any two.
        dials: for each node, whom it dials; by default everybody else.
        system_ahead_us: for each node, how far its system clock is ahead when it starts.
    """

    def __init__(
        self,
        seed: int | str,
        names: Sequence[str],
        rules: Rules,
        *,
        network: Network | None = None,
        ways: Ways | None = None,
        dials: Mapping[str, Sequence[str]] | None = None,
        system_ahead_us: Mapping[str, int] | None = None,
        window_bytes: int = 1 << 16,
    ) -> None:
        if network is None:
            network = Network(Loop(), Random(f"{seed} network"), ways or between(names), window_bytes)
        self.network, self.loop, self.random = network, network.loop, network.random
        self.names = names
        self.give_up = 0.0
        """The part of clients whose request waits that give up before it ends."""
        self.membership = Membership(1, dict.fromkeys(names, 1))
        """What nodes started from now on are configured with."""
        self.dials = dials or {name: [other for other in names if other != name] for name in names}
        self.system_ahead_us = dict(system_ahead_us or dict.fromkeys(names, 0))
        self.rules = dict.fromkeys(names, rules)
        """What each node is configured with."""
        self.nodes: dict[str, Node] = {}
        for name in names:
            self.start(name)

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes.values())

    def __getitem__(self, name: str) -> Node:
        return self.nodes[name]

    @property
    def now_us(self) -> int:
        """True time."""
        return self.loop.now_us

    @property
    def live(self) -> list[Node]:
        return [node for node in self.nodes.values() if node.is_up]

    def run(self, for_us: int) -> None:
        self.loop.run(for_us)

    def run_until_settled(self, within_us: int = 20 * SECOND_US) -> None:
        end_us = self.now_us + within_us
        while not self.is_settled():
            assert self.now_us < end_us, "the cluster does not settle"
            self.run(FLUSH_US)

    def is_settled(self) -> bool:
        """Every node is connected to every other one and has been acknowledged everything."""
        return all(
            sum(bool(peer.streams) and peer.outbox.is_all_acknowledged for peer in node.replicator.peers.values())
            >= len(self.names) - 1
            for node in self.live
        )

    def start(self, name: str) -> Node:
        """Start a node, or start it again with nothing in memory."""
        self.nodes[name] = node = Node(
            self,
            name,
            system_ahead_us=self.system_ahead_us[name],
            rules=self.rules[name],
            targets=self.dials[name],
            membership=self.membership,
        )
        return node

    def crash(self, name: str, *, powered: bool = True) -> None:
        """End a process at once.

        Args:
            powered: False takes the machine with it, and the others hear nothing of it.
        """
        node = self.nodes[name]
        if not node.is_up:
            return
        node.stop(powered=powered)
        for end in list(node.ends):
            if powered:
                end.hang_up()
            else:
                end.close("")

    def set_clock(self, name: str, ahead_us: int) -> None:
        """Set the system clock of a machine."""
        self.system_ahead_us[name] = ahead_us
        self.nodes[name].clock.system_ahead_us = ahead_us

    def cut(self, one: str, *others: str) -> None:
        """Nothing gets from one node to the others, and nothing back."""
        for other in others:
            self.network.cut(one, other)
            self.network.cut(other, one)

    def heal(self, one: str, *others: str) -> None:
        for other in others:
            self.network.heal(one, other)
            self.network.heal(other, one)

    def heal_all(self) -> None:
        """End every fault of the network."""
        for (source, target), way in self.network.ways.items():
            way.loss = 0.0
            self.network.heal(source, target)

    # What the nodes and the network report, for whoever watches.

    def tell(self, line: str) -> None:
        """What happens, in words."""

    def note_frame(self, source: End, target: End, raw: bytes) -> None:
        """A frame has arrived."""

    def note_drained(self, node: Node, *, is_all_acknowledged: bool) -> None:
        """A node is about to exit."""

    def look(self, node: Node) -> None:
        """Twice a second, just after a flush of the node."""
