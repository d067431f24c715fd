"""What two nodes that are cut off from each other take reaches them through others."""

from __future__ import annotations

from itertools import combinations

import pytest
from replication.builders import RULES, SECOND_US, key_of, node, store_of

from ratelimit_sidecar.replication.changes import ChangeLog
from ratelimit_sidecar.replication.peer import Peer
from ratelimit_sidecar.replication.relay import MAX_ORIGINS, Relay
from ratelimit_sidecar.replication.session import SILENCE_US
from simulation.cluster import Cluster
from simulation.loop import MS
from simulation.node import Node


def taken_at(each: Node, value: str) -> int:
    bucket = each.store.get(key_of(value))
    return 0 if bucket is None else sum(entry.tokens for entry in bucket.entries())


def assert_all_hold(cluster: Cluster, tokens: int, value: str = "ann") -> None:
    assert {each.name: taken_at(each, value) for each in cluster} == dict.fromkeys(cluster.nodes, tokens)


def cut_to(cluster: Cluster, links: set[frozenset[str]]) -> None:
    """Cut all links but these, and wait until everybody has noticed."""
    for one, other in combinations(cluster.nodes, 2):
        if frozenset((one, other)) not in links:
            cluster.cut(one, other)
    cluster.run(SILENCE_US + SECOND_US)


def links(*pairs: str) -> set[frozenset[str]]:
    return {frozenset(pair) for pair in pairs}


@pytest.mark.parametrize(
    ("names", "left"),
    [
        ("abc", links("ab", "ac")),
        ("abc", links("ca", "cb")),
        # Two that could do it.
        ("abcd", links("ab", "ac", "db", "dc", "ad")),
        # Nobody reaches both ends.
        ("abcd", links("ab", "bc", "cd")),
        ("abcde", links("ca", "ae", "eb", "bd")),
    ],
    ids=["cut triangle", "through the last", "two ways", "chain", "long chain"],
)
def test_what_anybody_takes_reaches_everybody_within_a_few_hops(names: str, left: set[frozenset[str]]) -> None:
    cluster = Cluster(1, names, RULES)
    cluster.run_until_settled()
    cut_to(cluster, left)
    expected = 0
    for each in cluster:
        each.bucket("ann").take(2, each.now_us)
        expected += 2
        # A flush and the way of at most 80 ms, from hop to hop.
        cluster.run(100 * MS * len(names))
        assert_all_hold(cluster, expected)


def test_what_was_taken_before_the_cut_was_noticed_is_passed_on_then() -> None:
    cluster = Cluster(2, "abc", RULES)
    cluster.run_until_settled()
    cluster.cut("b", "c")
    for _ in range(10):
        for name in "bc":
            cluster[name].bucket("ann").take(1, cluster[name].now_us)
        cluster.run(400 * MS)
    cluster.run(SILENCE_US - 4 * SECOND_US + 2 * SECOND_US)
    assert_all_hold(cluster, 20)


def test_two_that_are_cut_off_one_way_hear_of_each_other_all_the_same() -> None:
    cluster = Cluster(7, "abc", RULES)
    cluster.run_until_settled()
    cluster.network.cut("a", "b")
    cluster.run(2 * SILENCE_US)
    for name in "ab":
        cluster[name].bucket("ann").take(1, cluster[name].now_us)
    cluster.run(SECOND_US)
    assert_all_hold(cluster, 2)


def test_what_a_node_took_that_has_gone_for_good_reaches_whom_it_had_not_told() -> None:
    cluster = Cluster(8, "abc", RULES)
    cluster.run_until_settled()
    cluster.cut("a", "b")
    cluster["a"].bucket("ann").take(5, cluster["a"].now_us)
    cluster.run(500 * MS)
    assert taken_at(cluster["b"], "ann") == 0
    cluster.crash("a")
    cluster.run(2 * SILENCE_US)
    assert [taken_at(cluster[name], "ann") for name in "bc"] == [5, 5]


def test_when_the_one_that_passes_on_is_gone_another_one_does() -> None:
    cluster = Cluster(3, "abcd", RULES)
    cluster.run_until_settled()
    cut_to(cluster, links("ab", "ac", "db", "dc", "ad"))
    cluster["b"].bucket("ann").take(2, cluster["b"].now_us)
    cluster.crash("a")
    cluster.run(SECOND_US)
    cluster["b"].bucket("ann").take(3, cluster["b"].now_us)
    cluster.run(SECOND_US)
    assert taken_at(cluster["c"], "ann") == 5


def entries_sent(cluster: Cluster) -> int:
    return sum(peer.counts.entries_sent for each in cluster for peer in each.replicator.peers.values())


@pytest.mark.parametrize(("cut", "sent"), [(False, 3), (True, 3)], ids=["whole", "one link cut"])
def test_nothing_is_passed_on_that_the_other_hears_itself_and_by_one_only(cut: bool, sent: int) -> None:
    cluster = Cluster(4, "abcd", RULES)
    cluster.run_until_settled()
    if cut:
        cut_to(cluster, links("ab", "ac", "ad", "bd", "cd"))
    before = entries_sent(cluster)
    cluster["b"].bucket("ann").take(1, cluster["b"].now_us)
    cluster.run(SECOND_US)
    assert_all_hold(cluster, 1)
    # To each of the three others once, by whomever.
    assert entries_sent(cluster) - before == sent


class Connected:
    """Stands for a stream, of which a relay asks only whether there is one."""


def look(relay: Relay, peers: dict[str, Peer]) -> list[Peer]:
    steps = relay.look_steps(peers)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


@pytest.fixture
def peers() -> dict[str, Peer]:
    store = store_of(node("b"))
    found = {}
    for name in "acd":
        peer = found[name] = Peer(store, ChangeLog(store, 0), name)
        peer.streams.append(Connected())  # type: ignore[arg-type]
    return found


def reach(peers: dict[str, Peer], **reaches: str) -> None:
    for name, peer in peers.items():
        peer.reported.reaches = frozenset(reaches[name]) if name in reaches else None


def test_a_peer_that_does_not_say_whom_it_reaches_is_told_nothing(peers: dict[str, Peer]) -> None:
    relay = Relay("b")
    reach(peers, c="bd", d="bc")
    assert peers["a"] not in [*look(relay, peers), *look(relay, peers)]
    assert [peers["a"] in relay.to_be_told(origin) for origin in "cd"] == [False, False]


def test_a_node_that_says_alone_that_it_reaches_two_others_keeps_nobody_from_relaying_between_them(
    peers: dict[str, Peer],
) -> None:
    relay = Relay("b")
    reach(peers, a="bcd", c="b", d="b")
    look(relay, peers)
    assert list(relay.to_be_told("c")) == [peers["d"]]
    # These say so, too: it is the one to relay, since its id is lower.
    reach(peers, a="bcd", c="ab", d="ab")
    look(relay, peers)
    assert list(relay.to_be_told("c")) == []


def test_who_gets_something_new_to_hear_is_named_once(peers: dict[str, Peer]) -> None:
    relay = Relay("b")
    reach(peers, a="bd", c="bd", d="abc")
    # Of c and a, b is the lowest that reaches both. But perhaps they only seem not to.
    assert look(relay, peers) == []
    assert relay.is_to_look_again
    assert look(relay, peers) == [peers["a"], peers["c"]]
    assert not relay.is_to_look_again
    assert look(relay, peers) == []
    assert list(relay.to_be_told("a")) == [peers["c"]]
    assert list(relay.to_be_told("d")) == []


@pytest.mark.parametrize(("ends", "relays"), [("bd", True), ("abd", False)])
def test_a_peer_that_says_it_reaches_both_is_believed_if_they_say_so_too(
    peers: dict[str, Peer], ends: str, relays: bool
) -> None:
    relay = Relay("b")
    reach(peers, a="bcd", c=ends.replace("d", ""), d=ends.replace("d", ""))
    look(relay, peers)
    assert (list(relay.to_be_told("c")), list(relay.to_be_told("d"))) == (
        ([peers["d"]], [peers["c"]]) if relays else ([], [])
    )


def test_that_a_peer_reaches_one_that_says_nothing_is_believed(peers: dict[str, Peer]) -> None:
    relay = Relay("b")
    reach(peers, a="bcd", d="ab")
    look(relay, peers)
    assert list(relay.to_be_told("c")) == []


def test_origins_that_a_peer_invents_are_not_remembered(peers: dict[str, Peer]) -> None:
    relay = Relay("b")
    reach(peers, a="b", c="b", d="b")
    look(relay, peers)
    for number in range(10_000):
        assert set(relay.to_be_told(f"invented {number}")) == set(peers.values())
    assert len(list(relay.look_steps(peers))) < 10
    for peer in peers.values():
        peer.reported.reaches = frozenset({"b"} | {f"{peer.node} {number}" for number in range(10_000)})
    # A step for each peer, and for each origin that is remembered.
    assert len(list(relay.look_steps(peers))) <= len(peers) + MAX_ORIGINS


def test_a_node_that_restarts_makes_the_others_repeat_nothing_to_each_other() -> None:
    cluster = Cluster(5, "abc", RULES)
    cluster.run_until_settled()
    for index in range(100):
        for name in "ab":
            cluster[name].bucket(f"user {index}").take(1, cluster[name].now_us)
    cluster.run(SECOND_US)
    cluster.crash("c")
    cluster.run(SECOND_US)
    before = [cluster[name].replicator.peers[other].counts.entries_sent for name, other in ("ab", "ba")]
    cluster.start("c")
    cluster.run_until_settled()
    cluster.run(2 * SECOND_US)
    assert [cluster[name].replicator.peers[other].counts.entries_sent for name, other in ("ab", "ba")] == before
    assert_all_hold(cluster, 2, "user 7")


def test_what_was_passed_on_in_vain_arrives_with_the_next_stream() -> None:
    cluster = Cluster(6, "abc", RULES)
    cluster.run_until_settled()
    cut_to(cluster, links("ab", "bc"))
    cluster.cut("b", "c")
    cluster["a"].bucket("ann").take(2, cluster["a"].now_us)
    cluster.run(2 * SILENCE_US)
    cluster.heal("b", "c")
    cluster.run(SECOND_US)
    assert taken_at(cluster["c"], "ann") == 2
