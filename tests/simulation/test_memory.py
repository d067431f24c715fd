"""A peer that is gone for long costs nothing: neither while it is gone nor once it is back."""

from __future__ import annotations

import pytest

from simulation.cluster import stable_order
from simulation.loop import SECOND_US
from simulation.run import run_until_equal
from simulation.sizes import entries_in
from simulation.watched import Watched
from simulation.workload import Request, per_second, request, unchanging

TEN_MINUTES_US = 600 * SECOND_US

BUCKETS = 50


def requests(cluster: Watched) -> list[Request]:
    return [request(cluster.editions.second, 1, ("user", f"user {index}")) for index in range(BUCKETS)]


def entries_kept(cluster: Watched, name: str) -> int:
    """For its peers, and in its buckets."""
    node = cluster.nodes[name]
    slots = sum(1 for bucket in node.store for _ in bucket.entries())
    return slots + len(node.store) + entries_in(node.replicator, [end.stream for end in node.ends])


def go_on(cluster: Watched, name: str, for_us: int, asked: list[Request]) -> int:
    """Light traffic on a steady set of buckets.

    Returns:
        The most entries that the node has kept at any moment.
    """
    most = 0
    end_us = cluster.loop.now_us + for_us
    turn = 0
    while cluster.loop.now_us < end_us:
        cluster.take(name, asked[turn % BUCKETS])
        turn += 1
        cluster.run(SECOND_US // 2)
        if turn % BUCKETS == 0:
            most = max(most, entries_kept(cluster, name))
    return most


@pytest.mark.slow
def test_a_node_whose_peer_is_gone_for_ten_minutes_keeps_what_it_kept_before() -> None:
    with stable_order():
        cluster = Watched(1, "ab", unchanging(user=per_second(10, 1_000)))
        cluster.heal_all()
        asked = requests(cluster)
        # Longer than any horizon, so that there are as many slots as there will be.
        before = go_on(cluster, "a", 200 * SECOND_US, asked)
        cluster.crash("b", powered=False)
        after = go_on(cluster, "a", TEN_MINUTES_US, asked)
        assert len(cluster.nodes["a"].store) >= BUCKETS
        assert after <= before * 1.1
        cluster.heal_all()
        run_until_equal(cluster)
        assert go_on(cluster, "a", 20 * SECOND_US, asked) <= before * 1.1
