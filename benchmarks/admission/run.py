"""One scenario under one policy, from a seed to an outcome."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, permutations
from random import Random

from benchmarks.admission.bound import bound, slot_refill
from benchmarks.admission.demand import SECOND_US, Request, draw
from benchmarks.admission.measures import adapted_us, percentile, series, used_per_mille, within
from benchmarks.admission.policies.central import TIMEOUT_US, CentralStore
from benchmarks.admission.policies.max_merge import MaxMerge
from benchmarks.admission.policies.policy import Policy, Setup
from benchmarks.admission.policies.sidecars import Eventual, Sidecars
from benchmarks.admission.policies.static_split import StaticSplit
from benchmarks.admission.scenarios import Scenario
from ratelimit_sidecar.limiter.rules import Consistency
from simulation.loop import Loop
from simulation.network import Network
from simulation.textbook import ideal, worst_burst

START_US = 1_000_000 * SECOND_US
"""Of the demand. Any instant will do that is more than a horizon after zero."""

WARM_UP_US = 10 * SECOND_US
"""Before the demand, besides the time to fill a bucket: regions connect, and their homes of strict limits begin."""

ADAPT_US = 2 * SECOND_US
"""What a policy gets to adapt to a shift."""

SERIES_STEP_US = 500_000

CENTRAL = "central, fails open"
CLOSED = "central, fails closed"
EVENTUAL = "eventual"
STRICT = "strict"
TICKETS = "strict, wait: 250ms"

POLICIES: dict[str, Callable[[Setup], Policy]] = {
    CENTRAL: partial(CentralStore, fails_open=True),
    CLOSED: partial(CentralStore, fails_open=False),
    "static split": StaticSplit,
    "max-merge sketch": MaxMerge,
    EVENTUAL: Eventual,
    STRICT: partial(Sidecars, consistency=Consistency.STRICT),
    TICKETS: partial(Sidecars, consistency=Consistency.STRICT, wait_us=250_000),
}


def policies_for(scenario: Scenario) -> list[str]:
    """Without faults it makes no difference how a central store fails."""
    return [name for name in POLICIES if scenario.has_faults or name != CLOSED]


class PromiseBroken(AssertionError):
    """More was admitted than the policy can admit, if it does what is claimed of it."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a scenario under a policy. In tokens, unless the name says otherwise.

    Args:
        ideal: what one bucket for all regions would have admitted.
        ceiling: capacity + rate * duration.
        worst_burst: see `textbook.worst_burst`.
        undelivered: the most that a region had not heard of when it admitted, and half a slot's refill; None where
            nobody listens.
        bound: the most that `undelivered` could have been; None likewise.
        adapted_us: see `measures.adapted_us`, one for each shift.
        used_per_mille: of the refill, from `ADAPT_US` after each shift until the next.
        cut_per_second: what each region admitted during the first cut; empty when there is none.
        latencies_us: of decisions, the 50th and the 99th percentile.
        series: by region, what was admitted in each `SERIES_STEP_US`.
    """

    scenario: str
    policy: str
    offered: int
    ideal: int
    ceiling: int
    admitted: int
    worst_burst: int
    undelivered: int | None
    bound: int | None
    adapted_us: tuple[int | None, ...]
    used_per_mille: tuple[int, ...]
    cut_per_second: tuple[int, ...]
    latencies_us: tuple[int, int]
    series: tuple[tuple[int, ...], ...]


def run(scenario: Scenario, policy_name: str, seed: int) -> Outcome:
    """Simulate. The same arguments give the same outcome, whatever the machine.

    Raises:
        PromiseBroken: it is the simulator, the proof of the bound or the policy that is wrong.
    """
    limit, regions = scenario.limit, range(len(scenario.topology.regions))
    end_us = START_US + scenario.duration_us
    requests = [
        Request(START_US + at_us, region)
        for at_us, region in draw(scenario.loads, Random(f"{seed}, {scenario.name}, demand"))
    ]
    loop = Loop()
    loop.now_us = START_US - WARM_UP_US - limit.scaled_capacity // limit.tokens
    random = Random(f"{seed}, {scenario.name}, {policy_name}")
    names = scenario.topology.regions
    network = Network(loop, random, scenario.topology.ways(scenario.loss_per_mille))
    for cut in scenario.cuts:
        for one, other in permutations(regions, 2):
            if (one in cut.isolated) is not (other in cut.isolated):
                loop.at(START_US + cut.start_us, network.cut, names[one], names[other])
                loop.at(START_US + cut.end_us, network.heal, names[one], names[other])
    policy = POLICIES[policy_name](Setup(limit, names, network))

    admitted_us: list[list[int]] = [[] for _ in regions]
    latencies_us: list[int] = []

    def answer(request: Request, admitted: bool, decided_us: int) -> None:
        latencies_us.append(loop.now_us - request.at_us)
        if admitted and decided_us < end_us:
            admitted_us[request.region].append(decided_us)

    for request in requests:
        loop.run(request.at_us - loop.now_us)
        policy.request(request.region, partial(answer, request))
    loop.run(end_us + TIMEOUT_US - loop.now_us)
    if len(latencies_us) != len(requests):
        raise PromiseBroken(f"{len(requests)} requests, {len(latencies_us)} answers")

    for times_us in admitted_us:
        times_us.sort()
    latencies_us.sort()
    all_us = sorted(at_us for times_us in admitted_us for at_us in times_us)
    phases = list(pairwise([START_US + shift_us for shift_us in scenario.shifts_us] + [end_us]))
    undelivered = policy.undelivered
    delays_us = [[network.ways[one, other].longest_us if one != other else 0 for other in names] for one in names]
    outcome = Outcome(
        scenario=scenario.name,
        policy=policy_name,
        offered=len(requests),
        ideal=ideal(limit, [request.at_us for request in requests]),
        ceiling=limit.capacity + scenario.duration_us * limit.tokens // limit.period_us,
        admitted=len(all_us),
        worst_burst=worst_burst(limit, all_us),
        undelivered=None if undelivered is None else undelivered + slot_refill(limit),
        bound=None if undelivered is None else bound(limit, requests, delays_us, scenario.cuts),
        adapted_us=tuple(adapted_us(limit, all_us, *phase) for phase in phases),
        used_per_mille=tuple(
            used_per_mille(limit, all_us, shift_us + ADAPT_US, next_us) for shift_us, next_us in phases
        ),
        cut_per_second=tuple(
            within(times_us, START_US + cut.start_us, START_US + cut.end_us) * SECOND_US // (cut.end_us - cut.start_us)
            for cut in scenario.cuts[:1]
            for times_us in admitted_us
        ),
        latencies_us=(percentile(latencies_us, 50), percentile(latencies_us, 99)),
        series=tuple(series(times_us, START_US, end_us, SERIES_STEP_US) for times_us in admitted_us),
    )
    _check(outcome, policy)
    return outcome


def _check(outcome: Outcome, policy: Policy) -> None:
    where = f"{outcome.policy} in {outcome.scenario}: {outcome.worst_burst} tokens over the limit"
    if policy.never_exceeds and outcome.worst_burst:
        raise PromiseBroken(where)
    if outcome.undelivered is not None and outcome.bound is not None:
        if outcome.worst_burst > outcome.undelivered:
            raise PromiseBroken(f"{where}, {outcome.undelivered} undelivered")
        if outcome.undelivered > outcome.bound:
            raise PromiseBroken(f"{where}, {outcome.undelivered} undelivered, where {outcome.bound} is the bound")
