"""Quotas on virtual time, with Envoys that do as the real ones do."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from limiter.requests import OK, decide, make_request
from young import collected_when_told

from benchmarks.quotas.envoys import ADA, DOMAIN, SECOND_US, STEP_US, Envoy, Node, World
from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.limit import TokenBucketLimit, Window, WindowLimit
from ratelimit_sidecar.limiter import quota
from ratelimit_sidecar.limiter.assignment import (
    ALLOW_ALL,
    DENY_ALL,
    TOKEN,
    Assignment,
    assign,
    noticeable,
    share_base_of,
    within_left,
)
from ratelimit_sidecar.limiter.fair_shares import Group
from ratelimit_sidecar.limiter.limiter import Limiter
from ratelimit_sidecar.limiter.quota import (
    DEMAND_US,
    LEARNING_US,
    MAX_POOL_BUCKETS,
    MAX_POOL_ORPHANS,
    TTL_S,
    Quotas,
)
from ratelimit_sidecar.limiter.quota_pool import Action, EnvoyBucket, Pairs, QuotaStream, Usage
from ratelimit_sidecar.limiter.rules import Consistency, Rule, RuleNode, Rules, Unit
from ratelimit_sidecar.limiter.wildcard import WildcardSet
from ratelimit_sidecar.replication.demands import MAX_MEMBERS

PER_AGENT = Rule("api.agent", TokenBucketLimit(300, 1_000_000, 300), 300, Unit.SECOND)
SLOW = Rule("api.slow", TokenBucketLimit(10, 60_000_000, 10), 10, Unit.MINUTE)
STRICT = Rule("api.strict", TokenBucketLimit(300, 1_000_000, 300), 300, Unit.SECOND, Consistency.STRICT)
LOCAL = Rule("api.local", TokenBucketLimit(300, 1_000_000, 300), 300, Unit.SECOND, Consistency.LOCAL)
WINDOW = Rule("api.window", WindowLimit(6_000, 60_000_000, Window.FIXED), 6_000, Unit.MINUTE)
PER_KEY = {
    "agent": RuleNode(PER_AGENT),
    "slow": RuleNode(SLOW),
    "strict": RuleNode(STRICT),
    "local": RuleNode(LOCAL),
    "window": RuleNode(WINDOW),
}
RULES = Rules({"api": RuleNode(key_only=PER_KEY)})
STRICT_PAIRS: Pairs = (("strict", "ada"),)


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
    assert rate(world) == pytest.approx(300, rel=0.02)
    assert rate(world) <= 300
    admitted = world.run(10)
    assert sum(admitted) == pytest.approx(10 * 300, rel=0.05)
    assert admitted[1:] == [pytest.approx(10 * 40, rel=0.02)] * 2


def test_what_a_lost_envoy_holds_is_not_given_to_others_before_its_assignment_ends() -> None:
    world = World(RULES)
    node = world.node()
    first, second = world.envoy(node, 400), world.envoy(node, 400, phase_us=2_000_000)
    world.run(20)
    assert held_by(second) == pytest.approx(150, rel=0.02)
    first.lose_stream()
    first.node = None
    world.run(TTL_S - 6)
    assert rate(world) <= 300
    world.run(12)
    assert held_by(second) == pytest.approx(300, rel=0.02)


def test_an_envoy_that_is_silent_is_forgotten_like_one_that_is_lost() -> None:
    world = World(RULES)
    node = world.node()
    first, second = world.envoy(node, 400), world.envoy(node, 400, phase_us=2_000_000)
    world.run(20)
    first.demand.clear()
    first.buckets.clear()
    world.run(30)
    assert node.quotas.counts.forgotten["silent"] == 1
    assert held_by(second) == pytest.approx(300, rel=0.02)


def test_an_envoy_that_connects_again_goes_on_with_what_it_holds() -> None:
    world = World(RULES)
    node = world.node()
    envoys = [world.envoy(node, demand, phase_us=number * 1_700_000) for number, demand in enumerate((400, 40, 40))]
    world.run(20)
    before = [held_by(envoy) for envoy in envoys]
    for envoy in envoys:
        envoy.lose_stream()
    most = []
    world.watch = lambda: most.append(rate(world))
    admitted = world.run(10)
    assert max(most) <= 300
    assert sum(admitted) == pytest.approx(10 * 300, rel=0.05)
    assert [held_by(envoy) for envoy in envoys] == pytest.approx(before, rel=0.1)


def test_an_envoy_that_is_cut_off_keeps_what_it_holds_whoever_comes_back_before_it() -> None:
    world = World(RULES)
    node = world.node()
    envoys = [world.envoy(node, demand, phase_us=number * 1_700_000) for number, demand in enumerate((400, 40, 40))]
    world.run(20)
    for envoy in envoys:
        envoy.lose_stream()
    envoys[0].node = None
    for envoy in envoys[1:]:
        envoy.demand[ADA] = 400
    most = []
    world.watch = lambda: most.append(rate(world))
    world.run(40)
    assert max(most) <= 300
    assert sum(held_by(envoy) for envoy in envoys[1:]) == pytest.approx(300, rel=0.02)


def test_assignments_survive_a_restart_of_the_node() -> None:
    world = World(RULES)
    node = world.node()
    envoys = [world.envoy(node, demand, phase_us=number * 1_700_000) for number, demand in enumerate((400, 40, 40))]
    world.run(20)
    world.nodes.clear()
    for envoy in envoys:
        envoy.node = envoy.stream = None
    world.run(5)
    again = world.node(LEARNING_US)
    for envoy in envoys:
        envoy.node = again
    most = []
    world.watch = lambda: most.append(rate(world))
    admitted = world.run(15)
    assert max(most) <= 300
    assert sum(admitted) == pytest.approx(15 * 300, rel=0.05)
    assert admitted[1:] == [pytest.approx(15 * 40, rel=0.02)] * 2


def test_a_new_bucket_gets_little_while_others_may_hold_the_limit() -> None:
    world = World(RULES)
    envoy = world.envoy(world.node(LEARNING_US), 400)
    world.run(1)
    assert 0 < held_by(envoy) <= 300 / 32
    world.run(LEARNING_US / SECOND_US)
    assert held_by(envoy) == 300


def test_a_bucket_without_requests_is_abandoned_and_comes_back() -> None:
    world = World(RULES)
    node = world.node()
    idle, busy = world.envoy(node, 10), world.envoy(node, 10)
    world.run(10)
    idle.demand[ADA] = 0
    world.run(55)
    assert not idle.forgotten
    world.run(15)
    assert idle.forgotten == 1
    assert not busy.forgotten
    assert held_by(busy) == 300
    idle.demand[ADA] = 400
    world.run(10)
    assert held_by(idle) > 250


def test_who_wants_nothing_has_a_little_for_its_first_requests() -> None:
    world = World(RULES)
    node = world.node()
    idle = world.envoy(node, 1)
    world.envoy(node, 1_000)
    world.run(10)
    idle.demand[ADA] = 0
    world.run(10)
    assert held_by(idle) == pytest.approx(300 / 32 / 2, rel=0.1)
    idle.demand[ADA] = 100
    world.run(10)
    assert world.run(5)[0] == pytest.approx(500, rel=0.02)


def test_a_share_below_one_a_second_is_refilled_slowly() -> None:
    world = World(RULES)
    node = world.node()
    for _ in range(3):
        world.envoy(node, 1, (("slow", "ada"),))
    world.run(20)
    admitted = world.run(600)
    # A token every 18 s for each.
    assert admitted == [pytest.approx(600 / 18, rel=0.2)] * 3
    assert sum(admitted) <= 100 + 10


def test_what_is_admitted_is_charged_to_the_bucket_of_whoever_asks_for_each_request() -> None:
    world = World(RULES)
    node = world.node()
    world.envoy(node, 400)
    world.run(30)
    bucket = next(iter(node.limiter.store))
    taken = sum(sum(slots.values()) for slots in bucket.taken.values())
    assert taken > 9 * 300
    # Reported every five seconds, it would be in debt for most of the time if it were charged at once.
    debts = []
    world.watch = lambda: debts.append(debt(node, world.now_us))
    world.run(20)
    assert max(debts) <= 300 / 4


def debt(node: Node, now_us: int) -> int:
    (bucket,) = node.limiter.store
    bucket.advance(now_us)
    return bucket.debt


def test_those_who_ask_for_each_request_are_not_starved_by_quotas() -> None:
    world = World(RULES)
    node = world.node()
    world.envoy(node, 1_000)
    world.run(30)
    asked = make_request({"agent": "ada"})
    answers = []
    world.watch = lambda: answers.append(decide(node.limiter, asked, world.now_us).overall_code)
    world.run(60)
    assert answers[len(answers) // 2 :].count(OK) > 0.2 * len(answers) / 2


def test_a_debt_of_others_lowers_what_is_shared_until_it_is_repaid() -> None:
    world = World(RULES)
    node = world.node()
    envoy = world.envoy(node, 1_000)
    world.run(20)
    (bucket,) = node.limiter.store
    bucket.take(600, world.now_us, always=True)
    world.run(6)
    assert held_by(envoy) < 280
    world.run(60)
    assert held_by(envoy) == pytest.approx(300, rel=0.03)


def test_a_local_limit_is_each_nodes_own() -> None:
    world = World(RULES)
    for node in (world.node(), world.node()):
        world.envoy(node, 400, (("local", "ada"),))
    world.run(20)
    assert rate(world) == pytest.approx(600, rel=0.05)


def test_a_window_is_paced() -> None:
    world = World(RULES)
    node = world.node()
    world.envoy(node, 400, (("window", "ada"),))
    world.run(5)
    (admitted,) = world.run(60)
    assert admitted == pytest.approx(6_000, rel=0.02)
    (told,) = world.assigned()
    assert told.max_tokens == 100


@pytest.mark.parametrize("kind", Window)
@pytest.mark.parametrize("period_s", [10, 60, 600])
def test_envoys_alone_use_all_of_a_window(period_s: int, kind: Window) -> None:
    world, _ = of_window(kind, period_s)
    world.run(1.5 * period_s)
    assert sum(world.run(period_s)) == pytest.approx(10 * period_s, rel=0.02)


@pytest.mark.parametrize("kind", Window)
@pytest.mark.parametrize("period_s", [60, 600])
def test_when_calls_have_used_a_window_up_envoys_admit_no_more_until_it_ends(period_s: int, kind: Window) -> None:
    world, node = of_window(kind, period_s)
    world.now_us += -world.now_us % (period_s * SECOND_US)
    world.run(1)
    assert calls(node, world.now_us, 20 * period_s) > 9 * period_s
    # From when all have reported until two reports before the end.
    world.run(6)
    assert sum(world.run(period_s - 18)) == 0
    world.run(20)
    assert rate(world) > 9


@pytest.mark.parametrize("kind", Window)
@pytest.mark.parametrize("seed", range(2))
def test_envoys_and_calls_exceed_a_window_by_no_more_than_ten_seconds_of_its_rate(seed: int, kind: Window) -> None:
    world, node = of_window(kind, 60)
    world.now_us += -world.now_us % (60 * SECOND_US)
    chance = random.Random(seed)
    admitted = []
    for _ in range(240):
        called = calls(node, world.now_us, chance.choice((0, 0, 0, 0, 5, 20, 600)))
        admitted.append(called + sum(world.run(1)))
    begins = range(0, 181, 1 if kind is Window.SLIDING else 60)
    bursts_of_envoys = 10
    assert max(sum(admitted[begin : begin + 60]) for begin in begins) <= 600 + 100 + bursts_of_envoys


def of_window(kind: Window, period_s: int) -> tuple[World, Node]:
    """Three Envoys with more requests than a window of ten a second has room for."""
    limit = WindowLimit(10 * period_s, period_s * SECOND_US, kind)
    rule = Rule("api.agent", limit, limit.requests, Unit.HOUR)
    world = World(Rules({DOMAIN: RuleNode(key_only={"agent": RuleNode(rule)})}))
    node = world.node()
    for number in range(3):
        world.envoy(node, 10, phase_us=number * 1_700_000).denies = True
    return world, node


def calls(node: Node, now_us: int, count: int) -> int:
    """How many of so many calls pass."""
    asked = make_request({"agent": "ada"})
    return sum(decide(node.limiter, asked, now_us).overall_code == OK for _ in range(count))


def test_of_a_strict_limit_only_the_home_is_assigned_and_the_bucket_does_without_it() -> None:
    world = World(RULES)
    node = world.node()
    world.envoy(node, 400, STRICT_PAIRS)
    world.run(20)
    assert rate(world) == pytest.approx(150, rel=0.02)
    assert rate(world) <= 150
    (bucket,) = node.ledger.walk()
    assert bucket.home < 3 * 2**32


@settings(max_examples=5)
@given(st.integers(0, 2**32))
@example(1_434_438)
@pytest.mark.parametrize("bursts", [(), (90, 300)], ids=["one limit", "reloads of the burst"])
def test_of_a_strict_limit_quotas_and_calls_together_never_admit_more_than_the_home(
    bursts: tuple[int, ...], seed: int
) -> None:
    world = World(RULES)
    node = world.node()
    chance = random.Random(seed)
    demands = (0, 20, 200)
    envoys = [world.envoy(node, chance.choice(demands), STRICT_PAIRS, STEP_US * 30 * number) for number in range(3)]
    for envoy in envoys:
        envoy.denies = True
    calls = 0
    asked = make_request({"strict": "ada"})
    request_chance = chance.random()

    def call() -> None:
        nonlocal calls
        if chance.random() < request_chance:
            calls += sum(decide(node.limiter, asked, world.now_us).overall_code == OK for _ in range(10))

    def check() -> None:
        call()
        for bucket in node.ledger.walk():
            bucket.advance(world.now_us)
            pool = node.quotas.pools.get(bucket.key)
            assigned = 0 if pool is None else sum(node.quotas.assigned(pool))
            assert 300 * bucket.home * TOKEN // (bucket.limit.capacity << 32) + assigned <= 150 * TOKEN

    world.watch = check
    world.run(1)
    history = []
    for _ in range(8):
        for envoy in envoys:
            envoy.demand[STRICT_PAIRS] = chance.choice(demands)
            envoy.is_deaf = chance.random() < 0.3
        if bursts:
            reloaded = replace(STRICT, limit=TokenBucketLimit(300, 1_000_000, chance.choice(bursts)))
            node.limiter.use_rules(Rules({"api": RuleNode(key_only={"strict": RuleNode(reloaded)})}))
        before = calls
        history.append(sum(world.run(5)) + calls - before)
    for begin in range(len(history)):
        for end in range(begin + 1, len(history) + 1):
            part = history[begin:end]
            # The Envoys' tokens are whole ones.
            assert sum(part) <= 150 + 5 * 150 * len(part) + len(envoys)


def held_by(envoy: Envoy) -> float:
    return sum(bucket.told.rate for bucket in envoy.buckets.values() if bucket.told is not None) / TOKEN


# What Envoy does with an assignment, and so how it must be.

LIMITS = st.builds(
    TokenBucketLimit,
    st.integers(1, 2**40),
    st.sampled_from((1, 1_000_000, 60_000_000, 86_400_000_000)),
    st.integers(0, 2**40),
)


@given(LIMITS, st.lists(st.integers(0, 2**70), min_size=1, max_size=20))
def test_shares_of_a_limit_are_token_buckets_that_together_are_no_more_than_it(
    limit: TokenBucketLimit, shares: list[int]
) -> None:
    base = share_base_of(limit)
    whole = max(1, sum(shares))
    assigned = [assign(base, base.rate * share // whole) for share in shares]
    rates = [told.tokens_per_fill * TOKEN // told.fill_interval_s for told in assigned if told.fill_interval_s]
    assert sum(rates) <= base.rate
    assert sum(told.max_tokens for told in assigned) <= limit.capacity + len(shares)
    for told in assigned:
        # Zero tokens and intervals are refused by Envoy, and more than 32 bits do not fit.
        is_bucket = 1 <= told.max_tokens < 2**32 and 1 <= told.tokens_per_fill < 2**32 and told.fill_interval_s >= 1
        assert is_bucket or told == DENY_ALL


@given(LIMITS, st.lists(st.integers(0, 1_000), min_size=2, max_size=20))
def test_shares_of_a_limit_never_differ_in_nothing_but_the_interval(limit: TokenBucketLimit, shares: list[int]) -> None:
    base = share_base_of(limit)
    assigned = {assign(base, base.rate * share // 1_000) for share in shares}
    buckets = {told[:3] for told in assigned if told.max_tokens}
    assert len({bucket[:2] for bucket in buckets}) == len(buckets)


def test_a_limit_that_changed_is_told_such_that_envoy_notices_it() -> None:
    before = assign(share_base_of(TokenBucketLimit(500, 1_000_000, 10)), 500 * TOKEN)
    now = assign(share_base_of(TokenBucketLimit(250, 1_000_000, 10)), 250 * TOKEN)
    # Envoy would take the one for the other.
    assert before[:2] == now[:2]
    told = noticeable(before, now)
    assert told[:2] != before[:2]
    assert told.tokens_per_fill / told.fill_interval_s == pytest.approx(250, rel=0.01)
    assert noticeable(told, told) == told
    assert noticeable(None, now) == now


def test_all_of_an_odd_rate_is_assigned() -> None:
    told = assign(share_base_of(TokenBucketLimit(19, 10_000_000, 2)), 19 * TOKEN // 10)
    assert told.tokens_per_fill / told.fill_interval_s == pytest.approx(1.9, rel=0.002)


# An Envoy's bucket that is made anew begins full.


def of_period(tokens: int, period_s: int) -> tuple[World, Node]:
    limit = TokenBucketLimit(tokens, period_s * SECOND_US, tokens)
    rule = Rule("api.agent", limit, tokens, Unit.HOUR)
    world = World(Rules({DOMAIN: RuleNode(key_only={"agent": RuleNode(rule)})}))
    return world, world.node()


def idle_envoy(world: World, node: Node, phase_us: int = 0) -> Envoy:
    envoy = world.envoy(node, 0, phase_us=phase_us)
    envoy.denies = True
    return envoy


@pytest.mark.parametrize("tokens", [3_600, pytest.param(86_400, marks=pytest.mark.thorough)])
def test_an_envoy_that_forgets_its_bucket_between_bursts_admits_no_more_than_the_limit(tokens: int) -> None:
    world, node = of_period(tokens, tokens)
    envoy = idle_envoy(world, node)
    visits = 48
    admitted = 0
    for _ in range(visits):
        for demand, seconds in ((tokens / 6, 9), (0, 66)):
            envoy.demand[ADA] = demand
            admitted += sum(world.run(seconds))
    assert envoy.forgotten == visits
    refill = visits * 75
    assert tokens < admitted <= tokens + refill


def test_envoys_that_are_asked_in_turn_admit_together_no_more_than_the_limit() -> None:
    world, node = of_period(3_600, 3_600)
    envoys = [idle_envoy(world, node, number * 700_000) for number in range(8)]
    stays = 50
    admitted = 0
    for stay in range(stays):
        envoy = envoys[stay % len(envoys)]
        envoy.demand[ADA] = 600
        admitted += sum(world.run(12))
        envoy.demand[ADA] = 0
    assert sum(envoy.forgotten for envoy in envoys) > stays - len(envoys)
    assert admitted <= 3_600 + stays * 12


def test_a_new_envoy_gets_next_to_nothing_while_nothing_is_left() -> None:
    world, node = of_period(3_600, 3_600)
    calls(node, world.now_us, 3_600)
    new = idle_envoy(world, node)
    new.demand[ADA] = 600
    (admitted,) = world.run(10)
    assert 1 <= admitted <= 10 + 1


def test_what_others_use_an_envoy_loses_with_its_next_report_and_has_again_when_it_is_refilled() -> None:
    world, node = of_period(36_000, 3_600)
    idle = idle_envoy(world, node)
    idle.demand[ADA] = 0.5
    world.run(10)
    assert burst_of(idle) > 35_000
    # So few that its share stays the same.
    calls(node, world.now_us, 20_000)
    sent = node.quotas.counts.assignments
    world.run(5)
    assert 15_000 < burst_of(idle) <= 16_100
    assert node.quotas.counts.assignments == sent + 1
    world.run(600)
    assert 21_000 < burst_of(idle) <= 22_100
    calls(node, world.now_us, 36_000)
    world.run(5)
    assert burst_of(idle) <= 10 * 5


def burst_of(envoy: Envoy) -> int:
    return sum(bucket.told.max_tokens for bucket in envoy.buckets.values() if bucket.told is not None)


@pytest.mark.parametrize("period_s", [60, 300])
def test_an_envoy_with_steady_demand_uses_the_limit_once_the_burst_is_used(period_s: int) -> None:
    world, node = of_period(10 * period_s, period_s)
    envoy = idle_envoy(world, node)
    envoy.demand[ADA] = 20
    world.run(5 * period_s)
    assert sum(world.run(600)) >= 0.95 * 10 * 600


@given(LIMITS, st.integers(0, 2**41), st.integers(0, 2**41))
def test_the_burst_is_what_is_left_or_refilled_in_a_second(limit: TokenBucketLimit, used: int, pending: int) -> None:
    second = limit.tokens * SECOND_US // limit.period_us
    burst = within_left(limit, share_base_of(limit).rate, used, pending)
    assert min(second, limit.capacity) <= burst <= max(second, limit.capacity - used)
    if pending > 5 * second:
        assert burst <= max(second, limit.capacity - used - pending + 5 * second)
    assert within_left(limit, share_base_of(limit).rate, 0, 0) == limit.capacity


# Reports of every kind.


class Server:
    """One node, spoken to directly."""

    def __init__(self, rules: Rules = RULES, learning_us: int = 0, **bounds: int) -> None:
        self.world = World(rules)
        self.node = self.world.node(learning_us, **bounds)
        self.quotas: Quotas = self.node.quotas
        self.quotas.tick(self.now_us)

    @property
    def now_us(self) -> int:
        return self.world.now_us

    def connect(self) -> QuotaStream:
        return self.quotas.open(lambda: None)

    def report(self, stream: QuotaStream, *usages: Usage, after_s: float = 0, domain: str = DOMAIN) -> list[Action]:
        self.world.now_us += int(after_s * SECOND_US)
        self.quotas.report(stream, domain, usages, self.now_us)
        self.quotas.tick(self.now_us)
        return self.quotas.take_actions(stream, self.now_us, 10_000)


def usage(value: str = "ada", allowed: int = 1, denied: int = 0, elapsed_s: int = 0, key: str = "agent") -> Usage:
    return Usage(value.encode(), ((key, value),), allowed, denied, elapsed_s)


def told(actions: list[Action]) -> list[Assignment | None]:
    return [action.assignment for action in actions]


def test_a_bucket_that_no_rule_limits_is_let_through_and_counted() -> None:
    server = Server()
    assert told(server.report(server.connect(), usage(key="colour"))) == [ALLOW_ALL]
    assert server.quotas.counts.errors["no_rule"] == 1


@pytest.mark.parametrize("elapsed_s", [-1, -(2**62), 2**62, 0])
def test_the_time_of_a_first_report_does_not_matter_much(elapsed_s: int) -> None:
    server = Server()
    (assignment,) = told(server.report(server.connect(), usage(elapsed_s=elapsed_s)))
    assert assignment is not None
    assert assignment.rate == 300 * TOKEN
    assert server.quotas.counts.errors["bad_time"] == (elapsed_s < 0)


def test_counts_without_bounds_are_cut() -> None:
    server = Server()
    stream = server.connect()
    server.report(stream, usage(allowed=2**64 - 1, denied=2**64 - 1))
    (assignment,) = told(server.report(stream, usage(allowed=2**64 - 1, elapsed_s=5), after_s=5))
    assert assignment is not None
    assert 0 < assignment.rate <= 300 * TOKEN
    assert debt(server.node, server.now_us) <= 4 * 3_100


def test_two_reports_of_one_bucket_in_a_message_are_added() -> None:
    server = Server()
    stream = server.connect()
    server.report(stream, usage(allowed=10), usage(allowed=10))
    assert server.quotas.bucket_count == 1
    assert server.quotas.counts.requests["allowed"] == 20


@pytest.mark.parametrize("pairs", [(), tuple((f"key{number}", "") for number in range(quota.MAX_PAIRS + 1))])
def test_a_bucket_of_no_pairs_or_too_many_is_passed_over_and_counted(pairs: Pairs) -> None:
    server = Server()
    assert not server.report(server.connect(), Usage(b"", pairs, 1, 0, 0))
    assert server.quotas.counts.errors["bad_id"] == 1


def test_a_bucket_whose_id_envoy_could_not_read_is_charged_and_never_answered() -> None:
    server = Server()
    stream = server.connect()
    odd = usage(allowed=5)._replace(is_utf8=False)
    for _ in range(3):
        assert server.report(stream, odd, after_s=5) == []
    assert server.quotas.counts.errors["bad_id"] == 3
    assert server.quotas.counts.requests["allowed"] == 15
    assert not server.quotas.bucket_count


def test_an_envoy_is_told_to_drop_buckets_before_it_has_more_than_fit_into_a_report() -> None:
    server = Server()
    stream = server.connect()
    size = 1_000
    most = quota.MAX_REPORT_BYTES // size
    actions = []
    for number in range(most + 50):
        actions += server.report(stream, Usage(b"%0*d" % (size, number), (("agent", str(number)),), 1, 0, 5))
    dropped = [action for action in actions if action.assignment is None]
    assert most * 0.9 < len(stream.buckets) <= most
    assert len(dropped) == most + 50 - len(stream.buckets)
    assert server.quotas.counts.errors["no_room"] == len(dropped)
    server.quotas.close(stream)
    while server.quotas.drop_closed(server.now_us):
        pass
    assert stream.id_bytes == 0


def crowd(count: int, allowed: int, elapsed_s: int) -> list[Usage]:
    """Reports on buckets with ids of 75 bytes, of which 2,450 make a crowd."""
    return [usage(f"{number:075}", allowed, elapsed_s=elapsed_s) for number in range(count)]


def dropped(actions: list[Action]) -> set[bytes]:
    return {action.bucket_id for action in actions if action.assignment is None}


def drop_until_told(server: Server, stream: QuotaStream, usages: list[Usage], after_s: float) -> list[Action]:
    """As an Envoy that is told while it reports, a part at a time."""
    server.world.now_us += int(after_s * SECOND_US)
    actions = []
    for at in range(0, len(usages), 500):
        actions += server.report(stream, *usages[at : at + 500])
    return actions


def test_an_envoy_with_buckets_that_clients_invented_is_told_to_drop_them_and_those_in_use_are_assigned() -> None:
    """As after a restart of the sidecar: it hears of all of them at once, and most of them will never be used again."""
    server = Server()
    stream = server.connect()
    usages = [*crowd(10_000, 0, 5), usage("ada", elapsed_s=5)]
    actions = drop_until_told(server, stream, usages, 0)
    assert actions[-1].bucket_id == b"ada"
    assert actions[-1].assignment is not None
    gone = dropped(actions)
    kept = [each for each in usages if each.bucket_id not in gone]
    assert len(kept) == len(stream.buckets) < 2_500
    assert server.quotas.counts.errors["no_room"] == len(gone) > 7_500
    # Soon it is no crowd any more.
    actions = drop_until_told(server, stream, kept, 5) + drop_until_told(server, stream, kept, 5)
    assert b"ada" not in dropped(actions)
    assert not stream.is_crowded


def test_a_new_bucket_of_a_crowded_envoy_is_charged_and_assigned_when_it_is_still_in_use_after_a_report() -> None:
    server = Server()
    stream = server.connect()
    server.report(stream, *crowd(2_500, 1, 5))
    assert stream.is_crowded
    pools = len(server.quotas.pools)
    assert server.report(stream, usage("ada", allowed=7), usage("eve")) == []
    assert len(server.quotas.pools) == pools
    actions = server.report(stream, usage("ada", elapsed_s=3), usage("eve", 0, elapsed_s=3), after_s=3)
    assert [(action.bucket_id, action.assignment is None) for action in actions] == [(b"eve", True), (b"ada", False)]
    server.quotas.charge_all()
    taken = [sum(bucket.taken[server.node.limiter.store.origin].values()) for bucket in server.node.limiter.store]
    assert sorted(taken)[-2:] == [1, 8]


def test_an_envoy_is_told_once_to_drop_a_bucket_although_it_reports_it_again_before_it_hears_that() -> None:
    """It would log the whole message for each bucket in it that it does not have."""
    server = Server()
    stream = server.connect()
    told = dropped(server.report(stream, *crowd(2_900, 0, 5)))
    assert len(told) > 400
    # Envoy's map of pairs has no order.
    again = [each._replace(bucket_id=each.bucket_id + b" in another order") for each in crowd(2_900, 0, 5)]
    assert not dropped(server.report(stream, *again, after_s=5))
    server.world.now_us += quota.ABANDONED_US - 5 * SECOND_US
    server.quotas.tick(server.now_us)
    assert dropped(server.report(stream, *crowd(2_900, 1, 5)[:2_450], *crowd(2_900, 0, 5)[2_450:])) == told


def test_a_bucket_that_was_dropped_as_idle_is_not_taken_again_because_of_a_report_that_was_under_way() -> None:
    server = Server()
    stream = server.connect()
    server.report(stream, usage())
    while not dropped(server.report(stream, usage(allowed=0, elapsed_s=5), after_s=5)):
        pass
    assert server.report(stream, usage(allowed=0, elapsed_s=5)) == []
    assert not server.quotas.bucket_count
    # But it is when it is in use.
    [action] = server.report(stream, usage())
    assert action.assignment is not None


def test_what_is_kept_of_buckets_that_were_to_be_dropped_is_bounded_and_forgotten() -> None:
    server = Server()
    stream = server.connect()
    told = 0
    for at in range(0, quota.MAX_ABANDONED + 500, 500):
        told += len(server.report(stream, *[Usage(b"%d" % number, (), 1, 0, 0) for number in range(at, at + 500)]))
    assert told == quota.MAX_ABANDONED
    server.world.now_us += quota.ABANDONED_US
    for _ in range(quota.MAX_ABANDONED // 1_024):
        server.quotas.tick(server.now_us)
    assert len(server.report(stream, *[Usage(b"%d" % number, (), 1, 0, 0) for number in range(500)])) == 500


def test_what_an_envoy_is_to_drop_goes_out_together_with_the_next_tick_or_when_it_is_much() -> None:
    """Its main thread copies all of its buckets for each message."""
    server = Server()
    woken = 0

    def wake() -> None:
        nonlocal woken
        woken += 1

    stream = server.quotas.open(wake)

    def report(first: int, last: int, size: int = 5) -> list[int]:
        usages = [Usage(b"%0*d" % (size, number), (), 1, 0, 0) for number in range(first, last)]
        server.quotas.report(stream, DOMAIN, usages, server.now_us)
        return [len(server.quotas.take_actions(stream, server.now_us, 64)) for _ in range(2)]

    assert (report(0, 100), woken) == ([0, 0], 0)
    server.quotas.tick(server.now_us)
    assert woken == 1
    # Until they are sent no more are added.
    assert report(100, 200) == [100, 0]
    assert report(100, 2_000) == [512, 0]
    assert report(2_000, 2_200, 1_000) == [66, 0]
    assert (stream.abandoned, stream.abandoned_bytes) == ([], 0)


def test_a_bucket_with_an_id_that_is_too_long_is_dropped() -> None:
    server = Server()
    [action] = server.report(server.connect(), Usage(b"long", (), 1, 0, 0))
    assert action == Action(b"long", None)


def test_buckets_are_bounded_and_what_has_no_room_is_charged_all_the_same() -> None:
    server = Server(max_envoy_buckets=10)
    greedy, other = server.connect(), server.connect()
    actions = server.report(greedy, *[usage(f"user{number}", allowed=3) for number in range(20)])
    # One may have as many as are free; it is to drop the others.
    assert server.quotas.bucket_count == 5
    assert [action.assignment is None for action in actions] == [True] * 15 + [False] * 5
    assert server.report(other, usage())
    assert server.quotas.counts.errors["no_room"] == 15
    server.world.run(6)
    assert (
        sum(sum(bucket.taken[server.node.limiter.store.origin].values()) for bucket in server.node.limiter.store) == 61
    )


def test_one_envoy_leaves_others_room_for_other_limits() -> None:
    server = Server(max_pools=10)
    greedy, other = server.connect(), server.connect()
    server.report(greedy, *many(20))
    assert len(server.quotas.pools) == len(greedy.buckets) == 5
    [action] = server.report(other, usage("another"))
    assert action.assignment is not None


def test_a_peer_has_room_for_as_many_wants_as_are_free() -> None:
    server = Server(max_peer_groups=10)
    for value in ("ada", "eve"):
        server.report(server.connect(), usage(value))
    one, other = [key for key in server.quotas.pools if key]
    three = [Group(want, 1) for want in (1, 2, 3)]
    assert server.quotas.receive("a", one, three, server.now_us)
    assert server.quotas.receive("b", one, three, server.now_us)
    assert not server.quotas.receive("a", other, three, server.now_us)
    assert server.quotas.receive("a", one, three, server.now_us), "in place of what it said before"
    assert server.quotas.receive("a", one, [], server.now_us)
    assert server.quotas.receive("a", other, three, server.now_us)
    server.world.now_us += DEMAND_US
    server.quotas.tick(server.now_us)
    assert not any(pool.peer_demands for pool in server.quotas.pools.values())
    four = [Group(want, 1) for want in (1, 2, 3, 4)]
    assert server.quotas.receive("a", one, four, server.now_us)
    pools = dict(server.quotas.pools)
    another = server.node.limiter.rlqs_take(DOMAIN, [("agent", "bob")]).bucket_key
    assert not server.quotas.receive("b", another, four, server.now_us)
    assert server.quotas.pools == pools, "there is none for what had no room"


def test_buckets_that_come_and_go_are_not_all_young_to_the_cycle_collector() -> None:
    """Otherwise it looks at tens of thousands at once: it goes by how many more have come than gone."""
    server = Server()
    stream = server.connect()
    with collected_when_told() as young_objects:
        server.report(stream, *many(500))
        young = young_objects()
    assert len(stream.buckets) == 500
    assert sum(isinstance(found, EnvoyBucket) for found in young) < 100


LARGE = Rule("api.plan", TokenBucketLimit(1_000_000, 1_000_000, 1_000_000), 1_000_000, Unit.SECOND)
SHARED = Rules(
    {
        "api": RuleNode(
            wildcards={"plan": WildcardSet([("user*", RuleNode(LARGE, shares_bucket=True))])}, key_only=PER_KEY
        )
    }
)
"""Where all buckets with a plan count in one."""


def many(count: int, key: str = "agent", allowed: int = 1, elapsed_s: int = 0) -> list[Usage]:
    return [usage(f"user{number}", allowed, elapsed_s=elapsed_s, key=key) for number in range(count)]


def test_the_buckets_of_a_limit_are_bounded_and_what_has_no_room_is_charged_all_the_same() -> None:
    server = Server(SHARED)
    stream = server.connect()
    actions = server.report(stream, *many(MAX_POOL_BUCKETS + 10, "plan"))
    assert server.quotas.bucket_count == MAX_POOL_BUCKETS
    assert sum(action.assignment is None for action in actions) == server.quotas.counts.errors["no_room"] == 10
    # Another limit has room.
    assert server.report(stream, usage())
    server.quotas.charge_all()
    taken = [sum(bucket.taken[server.node.limiter.store.origin].values()) for bucket in server.node.limiter.store]
    assert sorted(taken) == [1, MAX_POOL_BUCKETS + 10]


def test_what_has_no_room_is_charged_at_once_and_nothing_is_kept_of_it() -> None:
    """Whatever is kept until it is charged, callers who invent values would make grow without end."""
    server = Server(max_pools=0)
    stream = server.connect()
    server.report(stream, *many(20, "slow", allowed=9))
    assert not server.quotas.pools
    taken = [sum(bucket.taken[server.node.limiter.store.origin].values()) for bucket in server.node.limiter.store]
    assert taken == [9] * 20


def test_what_no_rule_limits_is_let_through_however_much_of_it_there_is() -> None:
    server = Server()
    stream = server.connect()
    actions = server.report(stream, *many(MAX_POOL_BUCKETS + 10, "colour"))
    assert told(actions) == [ALLOW_ALL] * (MAX_POOL_BUCKETS + 10)
    assert not server.quotas.pools
    server.world.run(20)
    assert server.quotas.counts.forgotten["silent"] == MAX_POOL_BUCKETS + 10
    assert not server.quotas.bucket_count


def test_the_buckets_of_a_stream_that_has_ended_are_dropped_a_few_at_a_time() -> None:
    server = Server(SHARED)
    stream = server.connect()
    server.report(stream, *many(1_000), *many(1_000, "plan"))
    server.quotas.close(stream)
    counts = [server.quotas.bucket_count]
    while server.quotas.drop_closed(server.now_us):
        counts.append(server.quotas.bucket_count)
    assert counts == [2_000 - 256 * number for number in range(8)]
    assert not server.quotas.bucket_count


def test_an_envoy_that_is_back_before_its_buckets_were_dropped_goes_on_with_what_it_holds() -> None:
    server = Server()
    lost, other = server.connect(), server.connect()
    server.report(lost, usage())
    server.report(other, usage())
    server.report(lost, usage(elapsed_s=1), after_s=1)
    held = server.quotas.take_actions(lost, server.now_us, 10) or server.report(lost, usage(elapsed_s=2), after_s=2)
    (before,) = told(held)
    server.quotas.close(lost)
    (after,) = told(server.report(server.connect(), usage(elapsed_s=5), after_s=5))
    assert before is not None
    assert after is not None
    assert after.rate == pytest.approx(before.rate, rel=0.05)
    (pool,) = server.quotas.pools.values()
    assert not pool.orphans
    assert len(pool.buckets) == 2


def test_orphaned_assignments_are_bounded_and_none_of_what_they_hold_is_given_away() -> None:
    server = Server(SHARED)
    half = many(MAX_POOL_BUCKETS // 2, "plan")
    streams = [server.connect(), server.connect()]
    for _ in range(4):
        for _ in range(2):
            for stream in streams:
                server.report(stream, *half, after_s=1)
        server.quotas.close(streams.pop(0))
        while server.quotas.drop_closed(server.now_us):
            pass
        streams.append(server.connect())
    (pool,) = server.quotas.pools.values()
    assert len(pool.orphans) == MAX_POOL_ORPHANS
    assert sum(server.quotas.assigned(pool)) == pool.held <= 1_000_000 * TOKEN
    for stream in streams:
        server.quotas.close(stream)
    server.world.run(TTL_S + 10)
    assert not server.quotas.pools


def test_a_limit_has_no_more_members_than_peers_take() -> None:
    assert MAX_POOL_BUCKETS + MAX_POOL_ORPHANS <= MAX_MEMBERS


def test_buckets_that_are_no_longer_reported_are_dropped_a_few_at_a_time() -> None:
    server = Server(SHARED)
    stream = server.connect()
    server.report(stream, *many(MAX_POOL_BUCKETS, "plan"))
    server.world.now_us += quota.SILENCE_US
    forgotten = []
    for _ in range(10):
        server.quotas.tick(server.now_us)
        forgotten.append(server.quotas.counts.forgotten["silent"])
    steps = [after - before for before, after in itertools.pairwise([0, *forgotten])]
    assert max(steps) <= 512
    assert forgotten[-1] == MAX_POOL_BUCKETS


def test_those_no_longer_reported_are_found_among_however_many_others() -> None:
    server = Server()
    stream = server.connect()
    usages = many(1_124)
    server.report(stream, *usages)
    for _ in range(3):
        server.report(stream, *usages[100:], after_s=6)
    for _ in range(5):
        server.quotas.tick(server.now_us)
    assert server.quotas.counts.forgotten["silent"] == 100
    assert server.quotas.bucket_count == 1_024


def test_when_it_has_learnt_all_limits_are_divided_again_before_the_next_report() -> None:
    server = Server(learning_us=LEARNING_US)
    stream = server.connect()
    before = told(server.report(stream, *many(1_000)))
    assert all(assignment is not None and assignment.rate < 300 * TOKEN for assignment in before)
    server.world.now_us += LEARNING_US
    for _ in range(10):
        server.quotas.tick(server.now_us)
    after = told(server.quotas.take_actions(stream, server.now_us, 1_000))
    assert [assignment and assignment.rate for assignment in after] == [300 * TOKEN] * 1_000


def test_no_more_buckets_are_looked_at_than_a_message_has_room_for() -> None:
    server = Server()
    stream = server.connect()
    server.quotas.report(stream, DOMAIN, many(200), server.now_us)
    server.quotas.tick(server.now_us)
    assert len(server.quotas.take_actions(stream, server.now_us, 150)) == 150
    # The same again a moment later: nothing is to be sent, but for the buckets that were not told yet.
    server.quotas.report(stream, DOMAIN, many(200), server.now_us)
    server.quotas.tick(server.now_us)
    looked_at = []
    while stream.due:
        due = len(stream.due)
        server.quotas.take_actions(stream, server.now_us, 30)
        looked_at.append(due - len(stream.due))
    assert max(looked_at) == 30


def test_nothing_is_left_of_envoys_that_are_gone() -> None:
    server = Server()
    for _ in range(20):
        stream = server.connect()
        server.report(stream, *[usage(f"user{number}", allowed=100) for number in range(20)])
        server.quotas.close(stream)
    server.world.run(30)
    assert not server.quotas.pools
    assert not server.quotas.bucket_count
    assert not server.quotas.streams


def test_other_rules_are_in_force_with_the_next_report() -> None:
    server = Server()
    stream = server.connect()
    server.report(stream, usage())
    halved = Rule("api.agent", TokenBucketLimit(150, 1_000_000, 150), 150, Unit.SECOND)
    server.node.limiter.use_rules(Rules({"api": RuleNode(key_only={"agent": RuleNode(halved)})}))
    (assignment,) = told(server.report(stream, usage(elapsed_s=5), after_s=5))
    assert assignment is not None
    assert assignment.rate == 150 * TOKEN
    server.node.limiter.use_rules(Rules({}))
    assert told(server.report(stream, usage(elapsed_s=5), after_s=5)) == [ALLOW_ALL]
    server.node.limiter.use_rules(RULES)
    assert told(server.report(stream, usage(elapsed_s=5), after_s=5)) != [ALLOW_ALL]


def test_usage_of_a_rule_that_has_gone_is_charged_where_there_is_room() -> None:
    rules = Rules({"api": RuleNode(key_only={"agent": RuleNode(PER_AGENT)})})
    limiter = Limiter(rules, Origin("here", 1), max_buckets=2)
    quotas = Quotas(limiter, 0, lambda: SECOND_US, learning_us=0)
    stream = quotas.open(lambda: None)
    quotas.report(stream, DOMAIN, [usage("ada", allowed=200), usage("bob", allowed=200), usage("eve", allowed=200)], 0)
    limiter.use_rules(Rules({}))
    quotas.charge_all()
    assert sum(entry.tokens for bucket in limiter.store for entry in bucket.entries()) == 600


def test_what_is_reported_is_charged_at_a_stop() -> None:
    server = Server()
    server.report(server.connect(), usage(allowed=1_000))
    server.quotas.charge_all()
    assert debt(server.node, server.now_us) == 700


@settings(max_examples=5)
@given(st.integers(0, 2**32))
def test_whatever_happens_a_node_assigns_no_more_than_the_limit(seed: int) -> None:
    chance = random.Random(seed)
    world = World(RULES)
    node = world.node()
    for _ in range(5):
        world.envoy(node, chance.choice((0, 10, 100, 1_000)), phase_us=STEP_US * chance.randrange(100))

    def check() -> None:
        for pool in node.quotas.pools.values():
            assert pool.held == sum(node.quotas.assigned(pool)) <= 300 * TOKEN

    world.watch = check
    for _ in range(10):
        envoy = chance.choice(world.envoys)
        match chance.randrange(4):
            case 0:
                envoy.lose_stream()
            case 1:
                envoy.is_deaf = not envoy.is_deaf
            case _:
                envoy.demand[ADA] = chance.choice((0, 10, 100, 1_000))
        world.run(chance.choice((0.5, 3, 7, 30)))
