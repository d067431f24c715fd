"""What Envoys want, told among nodes that give them quotas."""

from __future__ import annotations

import pytest
from replication.builders import ELSEWHERE, NOW_US, PAIR, PER_USER, RULES, SECOND_US, frame, key_of, ledger_of, node
from replication.test_replicator import exchange, hello, said_by

from ratelimit_sidecar.limiter.assignment import TOKEN
from ratelimit_sidecar.limiter.fair_shares import Group
from ratelimit_sidecar.limiter.limiter import Limiter
from ratelimit_sidecar.limiter.quota import Quotas
from ratelimit_sidecar.limiter.quota_pool import MAX_RATE, QuotaStream, Usage
from ratelimit_sidecar.replication.demands import MAX_DEMANDS, MAX_TAKEN, MAX_WANTS, STEP_WANTS, QuotaDemands
from ratelimit_sidecar.replication.pings import PING_EVERY_US
from ratelimit_sidecar.replication.replicator import Replicator
from ratelimit_sidecar.replication.stream import Stream
from ratelimit_sidecar.replication.v1 import replication_pb2 as pb
from ratelimit_sidecar.replication.wire import Reason
from simulation.steps import receive

PER_SECOND = PER_USER.tokens * SECOND_US // PER_USER.period_us


class QuotaNode:
    """With one Envoy."""

    def __init__(self, name: str) -> None:
        local = node(name)
        limiter = Limiter(RULES, local.origin, ledger=ledger_of(name, PAIR, NOW_US))
        self.quotas = Quotas(limiter, NOW_US, lambda: NOW_US, learning_us=0)
        self.quotas.tick(NOW_US)
        self.clock_us = NOW_US
        demands = QuotaDemands(self.quotas, lambda: self.clock_us)
        self.replicator = Replicator(local, limiter.store, NOW_US, demands=demands)
        self.envoy: QuotaStream = self.quotas.open(lambda: None)

    def report(self, user: str, requests: int = 1) -> None:
        pairs = (("user", user),)
        self.quotas.report(self.envoy, "api", [Usage(user.encode(), pairs, requests, 0, 0)], self.clock_us)

    def rate(self) -> int:
        """What the Envoy is told now."""
        self.quotas.tick(self.clock_us)
        (action,) = self.quotas.take_actions(self.envoy, self.clock_us, 10)
        assert action.assignment is not None
        return action.assignment.rate


def streams(one: QuotaNode, other: QuotaNode) -> tuple[Stream, Stream]:
    ends = (
        Stream(one.replicator, "far end", is_dialled=True, wake=lambda: None, now_us=NOW_US),
        Stream(other.replicator, "far end", is_dialled=False, wake=lambda: None, now_us=NOW_US),
    )
    exchange(*ends)
    return ends


def test_two_nodes_divide_a_limit_by_what_the_envoys_of_both_want() -> None:
    one, other = QuotaNode("a"), QuotaNode("b")
    ends = streams(one, other)
    one.report("ada")
    assert one.rate() == PER_SECOND * TOKEN
    exchange(*ends, now_us=NOW_US + PING_EVERY_US)
    other.report("ada")
    assert other.rate() == pytest.approx(PER_SECOND * TOKEN / 2, rel=0.1)
    exchange(*ends, now_us=NOW_US + 2 * PING_EVERY_US)
    assert one.rate() == pytest.approx(PER_SECOND * TOKEN / 2, rel=0.1)


def test_what_is_not_told_again_is_forgotten() -> None:
    one, other = QuotaNode("a"), QuotaNode("b")
    ends = streams(one, other)
    one.report("ada")
    other.report("ada")
    one.rate()
    exchange(*ends, now_us=NOW_US + PING_EVERY_US)
    assert other.rate() < PER_SECOND * TOKEN
    other.clock_us += 20 * SECOND_US
    other.report("ada")
    other.quotas.tick(other.clock_us)
    other.report("ada")
    assert other.rate() == PER_SECOND * TOKEN


def test_more_than_fits_into_a_ping_is_told_by_the_next_ones() -> None:
    one, other = QuotaNode("a"), QuotaNode("b")
    ends = streams(one, other)
    users = [f"user{number}" for number in range(MAX_DEMANDS + 10)]
    for user in users:
        one.report(user)
    exchange(*ends, now_us=NOW_US + PING_EVERY_US)
    assert len(other.quotas.pools) == MAX_DEMANDS
    exchange(*ends, now_us=NOW_US + 2 * PING_EVERY_US)
    assert set(other.quotas.pools) == {key_of(user) for user in users}


def test_a_node_without_quotas_passes_over_it() -> None:
    one, other = QuotaNode("a"), QuotaNode("b")
    other.replicator.demands = None
    ends = streams(one, other)
    one.report("ada")
    exchange(*ends, now_us=NOW_US + PING_EVERY_US)
    assert not other.quotas.pools
    assert other.replicator.peers["a"].streams


def ping(*demands: pb.Demand) -> bytes:
    return frame(ping=pb.Ping(id=1, demands=demands))


KEY = key_of("ada")


@pytest.mark.parametrize(
    ("demands", "reason"),
    [
        ([pb.Demand(key=b"", wants=[1], members=[1])], Reason.BAD_KEY),
        ([pb.Demand(key=b"\xff\xff", wants=[1], members=[1])], Reason.BAD_KEY),
        ([pb.Demand(key=KEY, wants=[1, 2], members=[1])], Reason.MALFORMED),
        ([pb.Demand(key=KEY, wants=[MAX_RATE + 1], members=[1])], Reason.MALFORMED),
        ([pb.Demand(key=KEY, wants=[1], members=[0])], Reason.MALFORMED),
        ([pb.Demand(key=KEY, wants=[1], members=[2**30])], Reason.MALFORMED),
        ([pb.Demand(key=KEY, wants=[1] * (MAX_WANTS + 1), members=[1] * (MAX_WANTS + 1))], Reason.MALFORMED),
        ([pb.Demand(key=KEY, wants=[1], members=[1])] * (MAX_TAKEN + 1), Reason.TOO_LARGE),
    ],
)
def test_demands_out_of_their_bounds_close_the_stream(demands: list[pb.Demand], reason: Reason) -> None:
    here = QuotaNode("a")
    stream = Stream(here.replicator, "far end", is_dialled=False, wake=lambda: None, now_us=NOW_US)
    receive(stream, hello("b"), NOW_US)
    said_by(stream)
    receive(stream, ping(*demands), NOW_US)
    assert stream.error is not None
    assert stream.error.reason is reason


def test_as_many_demands_as_a_ping_may_have_are_read_in_steps() -> None:
    here = QuotaNode("a")
    stream = Stream(here.replicator, "far end", is_dialled=False, wake=lambda: None, now_us=NOW_US)
    receive(stream, hello("b"), NOW_US)
    wants = list(range(1, 41))
    demands = [pb.Demand(key=key_of(f"user{number}"), wants=wants, members=[1] * 40) for number in range(MAX_TAKEN)]
    steps = sum(1 for _ in stream.receive_steps(ping(*demands), NOW_US))
    assert stream.error is None
    assert steps >= 40 * MAX_TAKEN // (STEP_WANTS + MAX_WANTS)
    assert len(here.quotas.pools) == MAX_TAKEN


def test_a_demand_for_what_no_rule_here_knows_is_counted_and_not_kept() -> None:
    here = QuotaNode("a")
    stream = Stream(here.replicator, "far end", is_dialled=False, wake=lambda: None, now_us=NOW_US)
    receive(stream, hello("b"), NOW_US)
    unknown = key_of("ada", "nobody", ELSEWHERE)
    receive(stream, ping(pb.Demand(key=unknown, wants=[1], members=[1])), NOW_US)
    assert here.replicator.unknown_keys == 1
    assert not here.quotas.pools
    receive(stream, ping(pb.Demand(key=KEY, wants=[MAX_RATE], members=[1])), NOW_US)
    assert here.quotas.pools[KEY].peer_demands["b"].groups == [Group(MAX_RATE, 1)]
