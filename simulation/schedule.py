"""What goes wrong in a run, when, and how bad the network is: all of it drawn from one seed, before the run begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import permutations
from random import Random

from ratelimit_sidecar.replication.wire import Reason
from simulation.clock import clocks_off
from simulation.loop import MS, SECOND_US
from simulation.network import Way, Ways
from simulation.watched import Watched
from simulation.workload import Demand, Request, RulesEditions, draw_rules

Action = Callable[[Watched], None]

MAX_FAULTS = 6
"""In ten seconds; more in a longer run."""

MAX_AHEAD_US = 500 * MS
"""A system clock is at most so far off."""

WRONG_AT_START_US = (-3_600 * SECOND_US, -12 * SECOND_US, -12 * SECOND_US, 12 * SECOND_US, 3_600 * SECOND_US)
"""A clock so far from the system's is set in one step (clock.FAR_US)."""


@dataclass(slots=True)
class Schedule:
    """All that happens in one run, drawn from its seed: the cluster, the requests and the faults.

    Args:
        allowed_errors: reasons for closing a stream that the faults in here may lead to.
    """

    seed: int
    nodes: str
    for_us: int
    editions: RulesEditions
    ways: Ways
    dials: dict[str, str]
    system_ahead_us: dict[str, int]
    window_bytes: int
    demand: list[tuple[int, str, Request]]
    faults: list[tuple[int, str, Action]] = field(default_factory=list)
    allowed_errors: set[Reason] = field(default_factory=set)
    clocks_agree: bool = True

    def cluster(self, trace: Callable[[str], None] | None = None) -> Watched:
        """A cluster to which all of this will happen when it runs."""
        cluster = Watched(
            self.seed,
            self.nodes,
            self.editions,
            ways=self.ways,
            dials=self.dials,
            system_ahead_us=self.system_ahead_us,
            window_bytes=self.window_bytes,
            trace=trace,
        )
        cluster.clocks_agree = self.clocks_agree
        for at_us, name, request in self.demand:
            cluster.loop.after(at_us, cluster.take, name, request)
        for at_us, text, action in self.faults:
            cluster.loop.after(at_us, _happen, cluster, text, action)
        return cluster


def draw_schedule(seed: int, nodes: str, for_us: int) -> Schedule:
    """Everything that happens in the first `for_us` of a run."""
    draw = Random(f"{seed} schedule")
    editions = draw_rules(draw)
    schedule = Schedule(
        seed,
        nodes,
        for_us,
        editions,
        ways=_draw_ways(draw, nodes),
        dials=_draw_dials(draw, nodes),
        system_ahead_us=clocks_off(draw, nodes, draw.choice((0, 0, 20 * MS, MAX_AHEAD_US))),
        window_bytes=draw.choice((1 << 16, 1 << 16, 1 << 12)),
        demand=list(Demand(draw, editions.second).over(nodes, for_us)),
    )
    if draw.random() < 0.03:
        schedule.clocks_agree = False
        # A jump of the clock makes every peer look as if it had been silent for as long.
        # One that is set back dials as another life of the node, of which the peer may not have heard the goodbye.
        schedule.allowed_errors |= {Reason.SILENT, Reason.STALLED, Reason.DUPLICATE_NODE}
        node = draw.choice(nodes)
        schedule.system_ahead_us[node] = draw.choice(WRONG_AT_START_US)
        schedule.faults.append((draw.randrange(for_us), f"{node} is set right", partial(_set_clock, node, 0)))
    for _ in range(draw.randint(0, max(1, MAX_FAULTS * for_us // (10 * SECOND_US)))):
        kind = draw.choice(_KINDS)
        schedule.faults.extend(kind(draw, schedule))
    if draw.random() < 0.25:
        schedule.faults.extend(_reloads(draw, schedule))
    return schedule


def _happen(cluster: Watched, text: str, action: Action) -> None:
    cluster.tell(f"*** {text}")
    action(cluster)


def _draw_ways(draw: Random, nodes: str) -> Ways:
    least_us, most_us = draw.choice(((MS, 2 * MS), (5 * MS, 80 * MS), (40 * MS, 40 * MS), (70 * MS, 200 * MS)))
    jitter_us = draw.choice((0, 0, 5 * MS, 60 * MS))
    loss = draw.choice((0.0, 0.0, 0.005, 0.03))
    return {pair: Way(draw.randint(least_us, most_us), jitter_us, loss) for pair in permutations(nodes, 2)}


def _draw_dials(draw: Random, nodes: str) -> dict[str, str]:
    """Everybody dials everybody, or of each two only one dials the other."""
    if draw.random() < 0.5:
        return {name: nodes.replace(name, "") for name in nodes}
    return {name: nodes[index + 1 :] for index, name in enumerate(nodes)}


# Each of these draws one kind of fault, and yields what happens and when.

Faults = Iterator[tuple[int, str, Action]]


def _span(draw: Random, for_us: int) -> tuple[int, int]:
    """Long ones are seen by the sessions, short ones only by TCP."""
    begin_us = draw.randrange(for_us)
    longest_us = draw.choice((SECOND_US // 2, 2 * SECOND_US, 20 * SECOND_US))
    return begin_us, begin_us + draw.randint(10 * MS, longest_us)


def _cut(draw: Random, schedule: Schedule) -> Faults:
    one, other = draw.sample(schedule.nodes, 2)
    begin_us, end_us = _span(draw, schedule.for_us)
    schedule.allowed_errors |= {Reason.SILENT, Reason.STALLED}
    for source, target in ((one, other), (other, one)):
        yield begin_us, f"the way from {source} to {target} is cut", partial(_cut_way, source, target)
        yield end_us, f"the way from {source} to {target} is free", partial(_heal_way, source, target)


def _cut_one_way(draw: Random, schedule: Schedule) -> Faults:
    return (fault for index, fault in enumerate(_cut(draw, schedule)) if index < 2)


def _isolate(draw: Random, schedule: Schedule) -> Faults:
    """Cut one node off from all others."""
    one = draw.choice(schedule.nodes)
    begin_us, end_us = _span(draw, schedule.for_us)
    schedule.allowed_errors |= {Reason.SILENT, Reason.STALLED}
    for other in schedule.nodes.replace(one, ""):
        for source, target in ((one, other), (other, one)):
            yield begin_us, f"the way from {source} to {target} is cut", partial(_cut_way, source, target)
            yield end_us, f"the way from {source} to {target} is free", partial(_heal_way, source, target)


def _reset(draw: Random, schedule: Schedule) -> Faults:
    one, other = draw.sample(schedule.nodes, 2)
    text = f"the connections of {one} and {other} are reset"
    yield draw.randrange(schedule.for_us), text, lambda cluster: cluster.network.reset(one, other)


def _crash(draw: Random, schedule: Schedule) -> Faults:
    """A process, or a machine, ends without a word and comes back with nothing in memory."""
    name = draw.choice(schedule.nodes)
    powered = draw.random() < 0.7
    begin_us = draw.randrange(schedule.for_us)
    schedule.allowed_errors |= {Reason.DUPLICATE_NODE, Reason.SILENT}
    yield begin_us, f"{name} crashes", lambda cluster: cluster.crash(name, powered=powered)
    yield _later(draw, begin_us), f"{name} is started", partial(_start, name)


def _stop(draw: Random, schedule: Schedule) -> Faults:
    """SIGTERM: what was admitted lives on in the peers, from which the next life has it."""
    name = draw.choice(schedule.nodes)
    begin_us = draw.randrange(schedule.for_us)
    schedule.allowed_errors |= {Reason.DUPLICATE_NODE}
    yield begin_us, f"{name} is told to stop", lambda cluster: cluster.nodes[name].drain()
    yield _later(draw, begin_us + 3 * SECOND_US), f"{name} is started", partial(_start, name)


def _suspend(draw: Random, schedule: Schedule) -> Faults:
    """Its clock has jumped when it goes on."""
    name = draw.choice(schedule.nodes)
    begin_us = draw.randrange(schedule.for_us)
    for_us = min(draw.choice((200 * MS, 2 * SECOND_US, 8 * SECOND_US)), schedule.for_us - begin_us)
    schedule.allowed_errors |= {Reason.SILENT, Reason.STALLED}
    text = f"{name} is suspended for {for_us / SECOND_US:g} s"
    yield begin_us, text, lambda cluster: cluster.nodes[name].suspend(for_us)


def _read_slowly(draw: Random, schedule: Schedule) -> Faults:
    name = draw.choice(schedule.nodes)
    read_us = draw.choice((30 * MS, 150 * MS, 1_000 * MS))
    begin_us, end_us = _span(draw, schedule.for_us)
    schedule.allowed_errors |= {Reason.SILENT, Reason.STALLED}
    yield begin_us, f"{name} needs {read_us / MS:g} ms for each frame", partial(_set_read, name, read_us)
    yield end_us, f"{name} reads at once", partial(_set_read, name, 0)


def _step_clock(draw: Random, schedule: Schedule) -> Faults:
    if not schedule.clocks_agree:
        return
    name = draw.choice(schedule.nodes)
    ahead_us = draw.randint(-MAX_AHEAD_US, MAX_AHEAD_US)
    text = f"the system clock of {name} is set {ahead_us / MS:g} ms ahead of the true time"
    yield draw.randrange(schedule.for_us), text, partial(_set_clock, name, ahead_us)


def _reloads(draw: Random, schedule: Schedule) -> Faults:
    """The second edition of the rules comes to each node at another moment."""
    for name in schedule.nodes:
        yield (
            draw.randrange(schedule.for_us),
            f"{name} loads other rules",
            lambda cluster, name=name: cluster.use_rules(name, cluster.editions.second),  # type: ignore[misc]
        )


_KINDS: tuple[Callable[[Random, Schedule], Faults], ...] = (
    _cut,
    _cut_one_way,
    _isolate,
    _reset,
    _crash,
    _stop,
    _suspend,
    _read_slowly,
    _step_clock,
)


def _later(draw: Random, begin_us: int) -> int:
    return begin_us + draw.choice((0, 500 * MS, 3 * SECOND_US)) + draw.randrange(SECOND_US)


def _cut_way(source: str, target: str, cluster: Watched) -> None:
    cluster.network.cut(source, target)


def _heal_way(source: str, target: str, cluster: Watched) -> None:
    cluster.network.heal(source, target)


def _start(name: str, cluster: Watched) -> None:
    if not cluster.nodes[name].is_up:
        cluster.start(name)


def _set_read(name: str, read_us: int, cluster: Watched) -> None:
    cluster.nodes[name].read_us = read_us


def _set_clock(name: str, ahead_us: int, cluster: Watched) -> None:
    cluster.set_clock(name, ahead_us)
