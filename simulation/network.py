"""Connections between nodes: what TCP, and gRPC's flow control on it, do to frames.

Theory of operation. A connection keeps order and loses nothing: a lost packet is a stall, during which all behind it
wait, too. Two connections overtake each other. While the way from A to B is cut, what A sends waits, and so does what
was on its way; nobody is told. A reset loses what is on its way in both directions, and both ends know when the news
has come to them. A reader that is slow, or suspended, leaves frames lying; when `window_bytes` lie there or are on
their way, the writer stops, and gives the peer up after `MeshBounds.write`, as the real one does.

Frames move one event each: it is due when the frame has arrived, the way is free and the reader is. Batches are
written, and applied, in steps (`replication/pace.py`), and anything may happen between them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from random import Random
from typing import TYPE_CHECKING

from ratelimit_sidecar.replication.bounds import DEFAULT_BOUNDS
from ratelimit_sidecar.replication.stream import Stream
from simulation.loop import MS, SECOND_US, Loop

if TYPE_CHECKING:
    from simulation.node import Node

WRITE_US = int(DEFAULT_BOUNDS.write * SECOND_US)

RETRANSMIT_US = 200 * MS
"""The least a lost packet costs when nothing follows it: TCP's shortest retransmission timeout on Linux."""

STEP_US = MS // 5
"""From a step of a job to the next."""

MAX_RESUME_US = 3 * SECOND_US
"""TCP's timeouts double while a way is cut, so it notices late that it is free again."""


@dataclass(slots=True)
class Way:
    """From one node to another; all connections between them use it.

    Args:
        delay_us: of every frame.
        jitter_us: up to so much more.
        loss: the part of frames that is lost, on each try.
    """

    delay_us: int = 20 * MS
    jitter_us: int = 0
    loss: float = 0.0
    is_cut: bool = False
    cut_since_us: int = 0
    longest_us: int = 0
    """That anything was on it, or behind what was, while it was not cut."""


Ways = Mapping[tuple[str, str], Way]
"""By (from, to)."""


def between(names: Sequence[str], delay_us: int = 20 * MS, jitter_us: int = 0, loss: float = 0.0) -> Ways:
    """Ways that are all alike, from each of the nodes to each other one."""
    return {pair: Way(delay_us, jitter_us, loss) for pair in permutations(names, 2)}


@dataclass(slots=True)
class Network:
    """The ways between nodes, and the connections and messages on them.

    Args:
        random: for delays and losses.
        window_bytes: of a connection, each way; gRPC's flow control window is 64 KiB to begin with.
        is_proven: nodes show certificates to each other.
    """

    loop: Loop
    random: Random
    ways: Ways
    window_bytes: int = 1 << 16
    is_proven: bool = False
    ends: list[End] = field(default_factory=list)
    """Of connections that are open at one end at least."""
    _messages: dict[tuple[str, str], deque[tuple[int, Callable[[], None]]]] = field(default_factory=dict)
    """What `send` was given and has not arrived, with when it will."""

    def draw_delay_us(self, source: str, target: str) -> int:
        way = self.ways[source, target]
        delay_us = way.delay_us
        if way.jitter_us:
            delay_us += int(self.random.random() * way.jitter_us)
        while way.loss and self.random.random() < way.loss:
            delay_us += max(RETRANSMIT_US, 5 * way.delay_us // 2)
        return delay_us

    def arrival_us(self, source: str, target: str, last_us: int) -> int:
        """When what is sent now arrives, if the way is not cut.

        Args:
            last_us: when that arrives behind which it waits.
        """
        way, now_us = self.ways[source, target], self.loop.now_us
        arrives_us = max(last_us, now_us + self.draw_delay_us(source, target))
        way.longest_us = max(way.longest_us, arrives_us - now_us)
        return arrives_us

    def send(self, source: str, target: str, deliver: Callable[[], None]) -> None:
        """Call `deliver` when a message arrives. For what is simpler than a sidecar: its connection never ends."""
        messages = self._messages.setdefault((source, target), deque())
        arrives_us = self.arrival_us(source, target, messages[-1][0] if messages else 0)
        messages.append((arrives_us, deliver))
        self.loop.at(arrives_us, self._arrive, source, target)

    def _arrive(self, source: str, target: str) -> None:
        messages = self._messages[source, target]
        while messages and messages[0][0] <= self.loop.now_us and not self.is_cut(source, target):
            messages.popleft()[1]()

    def is_cut(self, source: str, target: str) -> bool:
        return self.ways[source, target].is_cut

    def cut(self, source: str, target: str) -> None:
        """From now on nothing gets from `source` to `target`; the other way round it may."""
        way = self.ways[source, target]
        if not way.is_cut:
            way.is_cut = True
            way.cut_since_us = self.loop.now_us

    def heal(self, source: str, target: str) -> None:
        """The way is free again; what has waited comes when TCP tries again."""
        way = self.ways[source, target]
        if not way.is_cut:
            return
        way.is_cut = False
        if (source, target) in self._messages:
            self.loop.after(way.delay_us, self._arrive, source, target)
        longest_us = min(self.loop.now_us - way.cut_since_us, MAX_RESUME_US)
        for end in self.ends:
            if end.owner.name == target and end.other.owner.name == source:
                end.resume_us = self.loop.now_us + int(self.random.random() * longest_us)
                end.schedule()

    def connect(self, dialler: Node, listener: Node) -> None:
        one = End(self, dialler, listener.name, is_dialled=True)
        other = End(self, listener, f"a connection of {dialler.name}", is_dialled=False)
        one.other, other.other = other, one
        for end in (one, other):
            self.ends.append(end)
            end.owner.ends.append(end)
            end.pump_soon()

    def reset(self, one: str, other: str) -> None:
        """Break all connections between two nodes."""
        for end in list(self.ends):
            if {end.owner.name, end.other.owner.name} == {one, other}:
                end.inbox.clear()
                end.inbox_bytes = 0
                end.close("the connection was reset")


class End:
    """One end of a connection, and the frames that come to it."""

    __slots__ = (
        "_applying",
        "_arrives_us",
        "_is_due",
        "_is_pump_due",
        "blocked_since_us",
        "free_us",
        "inbox",
        "inbox_bytes",
        "is_open",
        "network",
        "other",
        "owner",
        "resume_us",
        "stream",
    )

    other: End

    def __init__(self, network: Network, owner: Node, address: str, *, is_dialled: bool) -> None:
        self.network = network
        self.owner = owner
        self.is_open = True
        self.inbox: deque[tuple[int, bytes | None]] = deque()
        """What comes to this end, with when it arrives; None is the end of the connection."""
        self.inbox_bytes = 0
        self.free_us = 0
        """When the reader takes the next frame."""
        self.resume_us = 0
        """When TCP tries again after a cut."""
        self.blocked_since_us: int | None = None
        """Since when this end cannot write."""
        self._arrives_us = 0
        self._applying: Iterator[None] | None = None
        """A frame that was taken, while there are steps of it yet to be done."""
        self._is_due = False
        self._is_pump_due = True
        self.stream = Stream(
            owner.replicator,
            address,
            is_dialled=is_dialled,
            wake=self.pump_soon,
            now_us=owner.clock.now_us(),
            is_proven=network.is_proven,
        )
        self._is_pump_due = False

    def pump_soon(self) -> None:
        if not self._is_pump_due:
            self._is_pump_due = True
            self.network.loop.soon(self._pump)

    def check_time(self) -> None:
        """A few times a second, while the owner runs."""
        blocked_us = self.blocked_since_us
        if blocked_us is not None and self.network.loop.now_us - blocked_us >= WRITE_US:
            self.hang_up(f"the peer has not read for {DEFAULT_BOUNDS.write:g} s")
        else:
            self.stream.check_time(self.owner.clock.now_us())

    def close(self, why: str) -> None:
        """The connection is gone, as far as this end knows."""
        if not self.is_open:
            return
        self.is_open = False
        self.inbox.clear()
        self.inbox_bytes = 0
        self.owner.ends.remove(self)
        if not self.other.is_open:
            self.network.ends.remove(self)
            self.network.ends.remove(self.other)
        if self.owner.is_up:
            self.stream.lost(why, self.owner.clock.now_us())
            self.owner.note_ended(self.stream)

    def hang_up(self, why: str = "the connection was closed") -> None:
        """Close; the other end hears of it behind all that is on its way."""
        if self.is_open:
            self.close(why)
            self._send(None)

    def schedule(self) -> None:
        """See that the next frame is handed over in time."""
        if self._is_due or not (self.inbox or self._applying):
            return
        due_us = max(self.free_us, self.owner.resumes_us, self.network.loop.now_us)
        if self._applying is None:
            due_us = max(due_us, self.inbox[0][0], self.resume_us)
        self._is_due = True
        self.network.loop.at(due_us, self._deliver)

    def _send(self, raw: bytes | None) -> None:
        network, other = self.network, self.other
        arrives_us = network.arrival_us(self.owner.name, other.owner.name, other._arrives_us)
        other._arrives_us = arrives_us
        other.inbox.append((arrives_us, raw))
        if raw is not None:
            other.inbox_bytes += len(raw)
        other.schedule()

    def _deliver(self) -> None:
        self._is_due = False
        network, owner, other = self.network, self.owner, self.other
        if self._applying is not None:
            self._go_on_applying()
            return
        if not self.inbox or network.is_cut(other.owner.name, owner.name):
            return
        now_us = network.loop.now_us
        if now_us < max(owner.resumes_us, self.resume_us):
            self.schedule()
            return
        _, raw = self.inbox.popleft()
        if raw is None:
            self.close("the peer hung up")
            return
        self.inbox_bytes -= len(raw)
        if not self.is_open:
            # A machine that was started again knows nothing of the connection, and answers so.
            if other.is_open and owner.cluster.nodes[owner.name].is_powered:
                other._hear_of_reset()
            self.schedule()
            return
        owner.cluster.note_frame(other, self, raw)
        self._applying = self.stream.receive_steps(raw, owner.clock.now_us())
        if other.blocked_since_us is not None:
            other.pump_soon()
        self._apply()

    def _apply(self) -> None:
        """Do a step of the frame that was taken last."""
        assert self._applying is not None
        for _ in self._applying:
            break
        else:
            self._applying = None
        self.free_us = self.network.loop.now_us + (self.owner.read_us if self._applying is None else STEP_US)
        self.schedule()

    def _go_on_applying(self) -> None:
        if not self.is_open:
            self._applying = None
        if self.network.loop.now_us < self.owner.resumes_us or self._applying is None:
            self.schedule()
            return
        self._apply()

    def _hear_of_reset(self) -> None:
        """The end of the connection is on its way to this end, if it was not already."""
        if not self.inbox or self.inbox[-1][1] is not None:
            self.other._send(None)

    def _pump(self) -> None:
        self._is_pump_due = False
        owner, other = self.owner, self.other
        loop = self.network.loop
        if not self.is_open or not owner.is_up or loop.now_us < owner.resumes_us:
            return
        stream, window_bytes = self.stream, self.network.window_bytes
        while other.inbox_bytes < window_bytes:
            raw = stream.next_frame(owner.clock.now_us())
            if raw is not None:
                self._send(raw)
                continue
            if stream.write(owner.clock.now_us()):
                self._is_pump_due = True
                loop.at(loop.now_us + STEP_US, self._pump)
                return
            self.blocked_since_us = None
            if stream.is_over:
                self.hang_up()
            return
        if self.blocked_since_us is None:
            self.blocked_since_us = loop.now_us
