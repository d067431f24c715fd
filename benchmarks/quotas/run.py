"""One scenario under one policy, from a seed to an outcome."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Final

from benchmarks.quotas.envoys import ADA, STEP_US, Server, World
from benchmarks.quotas.policies import Doorman, WholeEach
from benchmarks.quotas.scenarios import GONE, STEP_S, Scenario
from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.limit import TokenBucketLimit
from ratelimit_sidecar.crdt.token_bucket import TokenBucket
from ratelimit_sidecar.limiter.assignment import SECOND_US
from ratelimit_sidecar.limiter.fair_shares import fair_level, grouped
from ratelimit_sidecar.limiter.rules import Rule, RuleNode, Rules, Unit

LIMIT: Final = TokenBucketLimit(300, SECOND_US, 300)
RULES: Final = Rules({"api": RuleNode(key_only={"agent": RuleNode(Rule("api.agent", LIMIT, 300, Unit.SECOND))})})
RATE: Final = 300

SIDECAR: Final = "sidecar"
DOORMAN: Final = "Doorman's way"
WHOLE: Final = "the whole limit each"
CENTRAL: Final = "asked each time"
POLICIES: Final = (SIDECAR, DOORMAN, WHOLE, CENTRAL)

STEPS_PER_SECOND: Final = SECOND_US // STEP_US

WINDOW_S: Final = 4
"""What is admitted is fair when it is so on average of so long."""

SETTLED_S: Final = 10
"""From a change to when shares should have followed it: two reports."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a scenario under a policy.

    Args:
        admitted: each second, by all Envoys.
        settled_s: by phase but the first, seconds until what is admitted was fair, and all of the limit that is wanted;
            None where that never came.
        used: by phase but the first, of what could be admitted from two reports after the change on.
        missed: requests in all that Envoys lacked of their fair share.
        over: the most by which what was admitted in any time exceeds capacity and refill.
    """

    scenario: str
    policy: str
    admitted: tuple[int, ...]
    settled_s: tuple[int | None, ...]
    used: tuple[float, ...]
    missed: int
    over: int


class _Run:
    def __init__(self, scenario: Scenario, policy: str, seed: int) -> None:
        self.scenario = scenario
        self.world = world = World(RULES)
        servers: dict[str, Server] = {DOORMAN: Doorman(LIMIT), WHOLE: WholeEach(LIMIT)}
        node = None if policy == CENTRAL else world.node(server=servers.get(policy))
        chance = Random(f"{seed}, {scenario.name}")
        for _ in range(scenario.envoys):
            envoy = world.envoy(node, 0, phase_us=chance.randrange(100) * STEP_US)
            envoy.random = Random(chance.random())
        self.central = TokenBucket(b"", LIMIT, Origin("central", 1), world.now_us) if policy == CENTRAL else None
        self.chance = chance
        self.demands: list[list[float]] = []
        """By second and Envoy."""
        self.admitted: list[list[int]] = []
        self.over = 0.0
        self._deficit = 0.0

    def run(self) -> None:
        demand = [0.0] * self.scenario.envoys
        for phase in self.scenario.phases:
            for number, wanted in phase.items():
                envoy = self.world.envoys[number]
                demand[number] = max(wanted, 0.0)
                envoy.demand[ADA] = demand[number]
                if wanted == GONE:
                    envoy.lose_stream()
                    envoy.buckets.clear()
                    envoy.demand.clear()
            for _ in range(STEP_S):
                second = [0] * self.scenario.envoys
                for _ in range(STEPS_PER_SECOND):
                    admitted = self._step()
                    second = [one + other for one, other in zip(second, admitted, strict=True)]
                    self._deficit = max(0.0, self._deficit - RATE / STEPS_PER_SECOND) + sum(admitted)
                    self.over = max(self.over, self._deficit - LIMIT.capacity - RATE / STEPS_PER_SECOND)
                self.demands.append(list(demand))
                self.admitted.append(second)

    def _step(self) -> list[int]:
        admitted = self.world.run(STEP_US / SECOND_US)
        if self.central is None:
            return admitted
        requests = [number for number, count in enumerate(admitted) for _ in range(count)]
        self.chance.shuffle(requests)
        decided = [0] * len(admitted)
        for number in requests:
            decided[number] += self.central.take(1, self.world.now_us)
        return decided


def run(scenario: Scenario, policy: str, seed: int) -> Outcome:
    """Simulate. The same arguments give the same outcome."""
    simulated = _Run(scenario, policy, seed)
    simulated.run()
    demands, admitted = simulated.demands, simulated.admitted
    phases = range(1, len(scenario.phases))
    missed = sum(
        max(0.0, fair - got)
        for second in range(STEP_S, len(admitted) - WINDOW_S, WINDOW_S)
        for fair, got in zip(
            _fair(demands[second]), (WINDOW_S * share for share in _average(admitted, second)), strict=True
        )
        for fair in (fair * WINDOW_S,)
    )
    return Outcome(
        scenario.name,
        policy,
        tuple(sum(second) for second in admitted),
        tuple(_settled_s(simulated, phase) for phase in phases),
        tuple(_used(simulated, phase) for phase in phases),
        round(missed),
        max(0, round(simulated.over)),
    )


def _average(admitted: list[list[int]], second: int) -> list[float]:
    window = admitted[second : second + WINDOW_S]
    return [sum(column) / len(window) for column in zip(*window, strict=True)]


def _fair(demand: list[float]) -> list[int]:
    wants = [round(each) for each in demand]
    level = fair_level(RATE, grouped(wants))
    return [min(want, level.share(want)) for want in wants]


def _settled_s(simulated: _Run, phase: int) -> int | None:
    """The first second from which on the average is fair; requests come at random, so a tenth is no matter."""
    begin = phase * STEP_S
    for after_s in range(STEP_S - WINDOW_S):
        fair = _fair(simulated.demands[begin])
        got = _average(simulated.admitted, begin + after_s)
        total = sum(fair)
        is_fair = all(one >= 0.9 * other - 2 for one, other in zip(got, fair, strict=True))
        if is_fair and 0.93 * total <= sum(got) <= 1.07 * max(total, 1):
            return after_s
    return None


def _used(simulated: _Run, phase: int) -> float:
    begin, end = phase * STEP_S + SETTLED_S, (phase + 1) * STEP_S
    could = sum(sum(_fair(demand)) for demand in simulated.demands[begin:end])
    return sum(sum(second) for second in simulated.admitted[begin:end]) / could if could else 1.0
