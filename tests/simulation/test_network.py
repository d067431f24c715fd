"""The simulated network and clock do what real ones do, and no more."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from random import Random

import pytest

from ratelimit_sidecar import clock as product_clock
from ratelimit_sidecar.replication.v1 import replication_pb2 as pb
from simulation.clock import NodeClock
from simulation.cluster import stable_order
from simulation.loop import MS, SECOND_US, START_US, Loop
from simulation.network import WRITE_US, Network, between
from simulation.watched import Watched
from simulation.workload import draw_rules, request


class Recorded(Watched):
    """Keeps what arrives: when, from whom, to whom, on which connection, and of what kind."""

    def __init__(self, seed: int = 1, **kwargs: object) -> None:
        self.arrived: list[tuple[int, str, str, object, pb.Frame]] = []
        super().__init__(seed, "ab", draw_rules(Random(seed)), **kwargs)  # type: ignore[arg-type]

    def note_frame(self, source, target, raw) -> None:  # type: ignore[no-untyped-def]
        super().note_frame(source, target, raw)
        frame = pb.Frame.FromString(raw)
        self.arrived.append((self.loop.now_us - START_US, source.owner.name, target.owner.name, target, frame))

    def take(self, name: str, request=None) -> None:  # type: ignore[no-untyped-def]
        super().take(name, request or ask(self))

    def deltas_to(self, name: str) -> list[pb.Deltas]:
        return [frame.deltas for *_, target, _, frame in self.arrived if target == name and frame.HasField("deltas")]


def ask(cluster: Watched, hits: int = 1):  # type: ignore[no-untyped-def]
    return request(cluster.editions.first, hits, ("team", "all"))


@pytest.fixture(autouse=True)
def _order() -> Iterator[None]:
    with stable_order():
        yield


def test_a_connection_keeps_order_whatever_is_delayed_or_lost() -> None:
    cluster = Recorded(ways=between("ab", jitter_us=200 * MS, loss=0.2), dials={"a": "b", "b": ""})
    for _ in range(200):
        cluster.take("a")
        cluster.run(30 * MS)
    cluster.run(2 * SECOND_US)
    numbers = [deltas.sequence for deltas in cluster.deltas_to("b")]
    assert len(numbers) > 50
    assert numbers == list(range(1, len(numbers) + 1))


def test_messages_keep_order_and_wait_at_a_cut() -> None:
    network = Network(Loop(), Random(1), between("ab", jitter_us=200 * MS, loss=0.2))
    network.loop.after(SECOND_US, network.cut, "a", "b")
    network.loop.after(2 * SECOND_US, network.heal, "a", "b")
    arrived: list[tuple[int, int]] = []
    for number in range(100):
        network.send("a", "b", lambda number=number: arrived.append((number, network.loop.now_us - START_US)))  # type: ignore[misc]
        network.loop.run(30 * MS)
    network.loop.run(10 * SECOND_US)
    assert [number for number, _ in arrived] == list(range(100))
    assert not any(SECOND_US < at_us < 2 * SECOND_US for _, at_us in arrived)


def test_two_connections_overtake_each_other() -> None:
    cluster = Recorded(ways=between("ab", jitter_us=2 * SECOND_US), dials={"a": "b", "b": "a"})
    cluster.run(30 * SECOND_US)
    ends = [end for _, _, target, end, frame in cluster.arrived if target == "b" and frame.HasField("ping")]
    assert len(set(ends)) == 2
    turns = [one is not other for one, other in pairwise(ends)]
    assert True in turns
    assert False in turns


def test_a_cut_of_one_way_leaves_the_other_way_open() -> None:
    cluster = Recorded()
    cluster.run(SECOND_US)
    before = len(cluster.arrived)
    cluster.network.cut("a", "b")
    cluster.take("a")
    cluster.take("b")
    cluster.run(SECOND_US)
    assert {(source, target) for _, source, target, *_ in cluster.arrived[before:]} == {("b", "a")}


def test_what_waits_at_a_cut_arrives_once_it_is_healed() -> None:
    cluster = Recorded()
    cluster.run(SECOND_US)
    cluster.network.cut("a", "b")
    cluster.take("a")
    cluster.run(2 * SECOND_US)
    assert not any(deltas.buckets for deltas in cluster.deltas_to("b"))
    cluster.network.heal("a", "b")
    cluster.run(3 * SECOND_US)
    assert sum(len(deltas.buckets) for deltas in cluster.deltas_to("b")) == 1


def test_a_reset_loses_what_is_on_its_way_and_both_ends_dial_again() -> None:
    cluster = Recorded(ways=between("ab", delay_us=200 * MS))
    cluster.run(2 * SECOND_US)
    cluster.take("a")
    cluster.run(50 * MS)
    assert any(end.inbox for end in cluster.nodes["b"].ends)
    cluster.network.reset("a", "b")
    assert not cluster.nodes["a"].ends
    assert not cluster.nodes["b"].ends
    cluster.run(5 * SECOND_US)
    assert cluster.is_settled()
    assert not cluster.differences()


def test_a_slow_reader_holds_the_writer_back_and_is_given_up_in_the_end() -> None:
    cluster = Recorded(window_bytes=256, dials={"a": "b", "b": ""})
    cluster.run(SECOND_US)
    (end,) = cluster.nodes["b"].ends
    cluster.nodes["b"].read_us = 60 * SECOND_US
    for _ in range(100):
        cluster.take("a")
        cluster.run(20 * MS)
    assert 256 <= end.inbox_bytes < 512
    cluster.run(WRITE_US)
    assert not end.other.is_open


def test_others_hear_at_once_of_a_process_that_ends_and_nothing_of_a_machine_that_loses_power() -> None:
    for powered in (True, False):
        cluster = Recorded()
        cluster.run(SECOND_US)
        cluster.crash("b", powered=powered)
        cluster.run(500 * MS)
        assert bool(cluster.nodes["a"].ends) is not powered


def test_a_machine_that_is_started_again_resets_the_connections_it_knows_nothing_of() -> None:
    cluster = Recorded()
    cluster.run(SECOND_US)
    cluster.crash("b", powered=False)
    former = list(cluster.nodes["a"].ends)
    cluster.start("b")
    cluster.run(2 * SECOND_US)
    assert not any(end.is_open for end in former)


def test_a_suspended_process_hears_and_says_nothing_and_goes_on_where_it_stopped() -> None:
    cluster = Recorded()
    cluster.run(SECOND_US)
    before = len(cluster.arrived)
    cluster.nodes["b"].suspend(3 * SECOND_US)
    cluster.take("a")
    cluster.run(2 * SECOND_US)
    # What it had sent before is still on its way.
    assert not [target for at_us, _, target, *_ in cluster.arrived[before:] if target == "b" or at_us > 1_100 * MS]
    cluster.run(2 * SECOND_US)
    assert sum(len(deltas.buckets) for deltas in cluster.deltas_to("b")) == 1


def test_a_clean_stop_leaves_no_connection_and_all_it_took_with_the_peers() -> None:
    cluster = Recorded()
    cluster.run(SECOND_US)
    cluster.take("a")
    cluster.nodes["a"].drain()
    cluster.run(SECOND_US + 500 * MS)
    assert cluster.drains == 1
    assert not cluster.nodes["a"].is_up
    assert not cluster.nodes["b"].ends
    assert len(cluster.nodes["b"].store) == 1


@pytest.mark.interpreted
@pytest.mark.parametrize("seed", range(5))
def test_the_simulated_clock_does_what_the_products_clock_does(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = Random(seed)
    loop = Loop()
    simulated = NodeClock(loop, 300 * MS)

    class Time:
        @staticmethod
        def time_ns() -> int:
            return (loop.now_us + simulated.system_ahead_us) * 1_000

        @staticmethod
        def clock_gettime_ns(_clock: int) -> int:
            return (loop.now_us - START_US) * 1_000

    monkeypatch.setattr(product_clock, "time", Time)
    real = product_clock.Clock()
    jumps = 0
    for _ in range(200):
        loop.run(draw.randint(1, 2 * SECOND_US))
        if draw.random() < 0.1:
            simulated.system_ahead_us = draw.choice((-MS, 40 * MS, -600 * MS, 15 * SECOND_US, 40 * SECOND_US))
        peers_ahead_us = [draw.choice((0, simulated.system_ahead_us - simulated.ahead_us))] * draw.randrange(3)
        clock_steps_us = simulated.discipline(peers_ahead_us)
        stepped_us = real.discipline(peers_ahead_us)
        assert clock_steps_us == stepped_us
        jumps += clock_steps_us != 0
        assert simulated.now_us() == real.now_us()
        assert simulated.strict_us() == real.now_us() - simulated.clock_steps_us
    assert jumps
