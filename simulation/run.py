"""One seed, from the drawing of its schedule to the last check."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from string import ascii_lowercase
from unittest.mock import patch

from ratelimit_sidecar.replication import pace
from ratelimit_sidecar.replication.rounds import KEPT_US
from simulation.cluster import stable_order
from simulation.loop import MS, SECOND_US
from simulation.network import MAX_RESUME_US
from simulation.oracles import BrokenPromise
from simulation.schedule import Schedule, draw_schedule
from simulation.watched import Watched
from simulation.workload import request

CONVERGE_US = 10 * SECOND_US
"""So long after everything is healed, without demand, all nodes hold the same (P1), but for debts that end soon."""

CONVERGE_WRONG_CLOCKS_US = 20 * SECOND_US
"""The same where a clock was seconds wrong: not before the shortest horizon has passed."""

LOOK_US = 250 * MS

PIECE_WORK = 3
"""Few buckets, so that many a batch has pieces, and other things happen in between."""

PROBE_US = 3 * SECOND_US
"""So long after that, one take on every node is everywhere, and no lag is shown beyond a round trip."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one run has come to; equal seeds give equal outcomes.

    Args:
        converged_us: from the healing to when all nodes held the same.
    """

    seed: int
    digest: str
    frames: int
    decisions: int
    admitted: int
    drains: int
    payments: int
    served: int
    overshoots: int
    converged_us: int


def run_seed(seed: int, nodes: int = 3, seconds: float = 10, trace: Callable[[str], None] | None = None) -> Outcome:
    """Run the schedule of a seed, heal everything, and check all promises.

    Args:
        seconds: of virtual time in which things go wrong, before everything is healed.

    Raises:
        BrokenPromise: with the reason; anything else that is raised is a fault, too.
    """
    with stable_order(), patch.object(pace, "PIECE_WORK", PIECE_WORK):
        schedule = draw_schedule(seed, ascii_lowercase[:nodes], int(seconds * SECOND_US))
        cluster = schedule.cluster(trace)
        cluster.run(schedule.for_us)
        cluster.heal_all()
        converged_us = run_until_equal(cluster, CONVERGE_US if schedule.clocks_agree else CONVERGE_WRONG_CLOCKS_US)
        cluster.check_levels()
        _probe(cluster, schedule)
        cluster.check_protocol_errors(frozenset(schedule.allowed_errors))
        return Outcome(
            seed,
            cluster.digest,
            cluster.frames,
            cluster.decisions,
            cluster.admitted.total(),
            cluster.drains,
            cluster.payments,
            cluster.served,
            cluster.overshoots,
            converged_us,
        )


def replay(seed: int, nodes: int = 3, seconds: float = 10) -> str:
    """The command that shows what happens in a run."""
    options = f" --nodes {nodes}" if nodes != 3 else ""
    options += f" --virtual-seconds {seconds:g}" if seconds != 10 else ""
    return f"python -m simulation --seed {seed}{options} --trace"


def failure_of(error: Exception) -> str:
    """A line for a broken promise; for anything else where it was raised, too."""
    if isinstance(error, BrokenPromise):
        return str(error)
    return "".join(traceback.format_exception(error))


def run_until_equal(cluster: Watched, within_us: int = CONVERGE_US) -> int:
    """Run until all nodes are connected and hold the same, but for debts that end within another KEPT_US.

    Returns:
        How long it took.
    """
    begin_us = cluster.loop.now_us
    while True:
        differences = cluster.differences() if cluster.is_settled() else ["some are not connected, or wait for answers"]
        took_us = cluster.loop.now_us - begin_us
        if not differences:
            return took_us
        may_last = took_us < within_us + KEPT_US and cluster.is_settled() and not cluster.differences(lasting=True)
        if took_us >= within_us and not may_last:
            shown = "; ".join(differences)
            raise BrokenPromise(f"convergence: {took_us / SECOND_US:g} s after the healing {shown}")
        cluster.run(LOOK_US)


def _probe(cluster: Watched, schedule: Schedule) -> None:
    cluster.run(MAX_RESUME_US)
    for node in cluster.live:
        cluster.take(node.name, request(schedule.editions.second, 1, ("user", f"probe of {node.name}")))
    cluster.run(PROBE_US)
    if not schedule.clocks_agree:
        return
    differences = cluster.differences()
    if differences:
        raise BrokenPromise(f"convergence: {PROBE_US / SECOND_US:g} s after a take {'; '.join(differences)}")
    # A flush, a comparison that fills the window and must arrive first, there and back; a way takes 260 ms at most.
    most_us = 20 * MS + 3 * 260 * MS
    for node in cluster.live:
        for peer in node.replicator.peers.values():
            lag_us = node.lag_us(peer.node)
            if lag_us > most_us:
                raise BrokenPromise(f"lag: {node.name} still shows {lag_us / MS:.1f} ms to {peer.node}")
