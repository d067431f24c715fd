"""Quotas on virtual time, with Envoys that do as the real ones do."""

from __future__ import annotations

import pytest
from limiter.envoys import ADA, World

from ratelimit_sidecar.crdt.limit import Limit
from ratelimit_sidecar.limiter.assignment import TOKEN
from ratelimit_sidecar.limiter.rules import Rule, RuleNode, Rules, Unit

PER_AGENT = Rule("api.agent", Limit(300, 1_000_000, 300), 300, Unit.SECOND)
RULES = Rules({"api": RuleNode(key_only={"agent": RuleNode(PER_AGENT)})})


def rate(world: World) -> float:
    return sum(assignment.rate for assignment in world.assigned()) / TOKEN


def test_ten_to_one_to_one_gets_the_fair_shares_and_all_of_the_limit() -> None:
    world = World(RULES)
    node = world.node()
    for demand, phase_us in ((400, 0), (40, 1_500_000), (40, 3_000_000)):
        world.envoy(node, demand, phase_us=phase_us)
    world.run(15)
    admitted = world.run(20)
    assert sum(admitted) == pytest.approx(20 * 300, rel=0.05)
    assert admitted[1] == pytest.approx(20 * 40, rel=0.02)
    assert admitted[2] == pytest.approx(20 * 40, rel=0.02)
    assert rate(world) <= 300


def test_demand_that_moves_is_followed_within_two_reports() -> None:
    world = World(RULES)
    node = world.node()
    first, second, _ = [
        world.envoy(node, demand, phase_us=number * 1_700_000) for number, demand in enumerate((400, 40, 40))
    ]
    world.run(20)
    first.demand[ADA], second.demand[ADA] = 40, 400
    world.run(10)
    admitted = world.run(10)
    assert sum(admitted) == pytest.approx(10 * 300, rel=0.05)
    assert admitted[0] == pytest.approx(10 * 40, rel=0.02)
    assert admitted[2] == pytest.approx(10 * 40, rel=0.02)


def test_the_assignments_of_a_node_never_exceed_the_limit() -> None:
    world = World(RULES)
    node = world.node()
    envoys = [world.envoy(node, demand, phase_us=number * 1_700_000) for number, demand in enumerate((400, 40, 40))]
    most = []
    world.watch = lambda: most.append(rate(world))
    world.run(20)
    envoys[0].demand[ADA], envoys[1].demand[ADA] = 40, 400
    # This one goes on with what it has.
    envoys[1].is_deaf = True
    world.run(30)
    assert max(most) <= 300


def test_two_nodes_give_shares_whose_sum_is_the_limit() -> None:
    world = World(RULES)
    nodes = [world.node(), world.node()]
    for demand, node, phase_us in ((400, 0, 0), (40, 1, 1_500_000), (40, 1, 3_000_000)):
        world.envoy(nodes[node], demand, phase_us=phase_us)
    world.run(20)
    assert 299 <= rate(world) <= 300
    admitted = world.run(10)
    assert sum(admitted) == pytest.approx(10 * 300, rel=0.05)
    assert admitted[1:] == [pytest.approx(10 * 40, rel=0.02)] * 2
