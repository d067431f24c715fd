"""One link of a triangle is cut: the two ends go on hearing of each other, through the third node."""

from __future__ import annotations

from random import Random

import pytest

from simulation.cluster import stable_order
from simulation.loop import MS, SECOND_US
from simulation.run import run_until_equal
from simulation.watched import Watched
from simulation.workload import draw_rules, request

RELAYED_US = SECOND_US
"""Within so long what one end has taken is known at the other."""

IN_ORDER_US = 10 * SECOND_US
"""The two ends have given each other up, and whatever has to be arranged for a detour is arranged."""


def triangle(seed: int) -> Watched:
    cluster = Watched(seed, "abc", draw_rules(Random(seed)))
    cluster.heal_all()
    cluster.run(5 * SECOND_US)
    assert cluster.is_settled()
    return cluster


@pytest.mark.parametrize("seed", range(4))
def test_what_one_end_takes_the_other_knows_within_a_second(seed: int) -> None:
    with stable_order():
        cluster = triangle(seed)
        cluster.cut("a", "b")
        cluster.run(IN_ORDER_US)
        for index in range(10):
            for name in "abc":
                cluster.take(name, request(cluster.editions.second, 1, ("user", f"{name} {index % 3}")))
            cluster.run(300 * MS)
        cluster.run(RELAYED_US)
        assert len(list(cluster.nodes["b"].store)) >= 9
        assert not cluster.unknown()
        assert not cluster.differences()


@pytest.mark.parametrize("seed", range(4))
def test_so_it_is_when_only_one_way_is_cut(seed: int) -> None:
    with stable_order():
        cluster = triangle(seed)
        cluster.network.cut("a", "b")
        cluster.run(IN_ORDER_US)
        cluster.take("a", request(cluster.editions.second, 1, ("user", "of a")))
        cluster.take("b", request(cluster.editions.second, 1, ("user", "of b")))
        cluster.run(RELAYED_US)
        assert len(list(cluster.nodes["b"].store)) >= 2
        assert not cluster.unknown()
        assert not cluster.differences()


def test_what_was_taken_just_before_the_cut_is_known_too() -> None:
    with stable_order():
        cluster = triangle(0)
        cluster.cut("a", "b")
        cluster.take("a", request(cluster.editions.second, 5, ("user", "ann")))
        cluster.take("b", request(cluster.editions.second, 5, ("user", "bob")))
        cluster.run(IN_ORDER_US + RELAYED_US)
        assert not cluster.unknown()
        assert not cluster.differences()


def test_a_node_that_has_gone_for_good_lives_on_in_all_others() -> None:
    """Only one of two had heard what it took."""
    with stable_order():
        cluster = triangle(0)
        cluster.cut("a", "b")
        cluster.take("a", request(cluster.editions.second, 5, ("user", "ann")))
        cluster.run(500 * MS)
        cluster.crash("a")
        cluster.run(IN_ORDER_US)
        assert {node.name for node in cluster.live} == {"b", "c"}
        (bucket,) = cluster.nodes["b"].store
        assert [(entry.origin.node, entry.tokens) for entry in bucket.entries()] == [("a", 5)]
        assert not cluster.differences()


def test_when_the_link_is_back_all_is_as_before() -> None:
    with stable_order():
        cluster = triangle(0)
        cluster.cut("a", "b")
        cluster.run(IN_ORDER_US)
        cluster.take("a", request(cluster.editions.second, 5, ("user", "ann")))
        cluster.heal_all()
        assert run_until_equal(cluster) <= 10 * SECOND_US
