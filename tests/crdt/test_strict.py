"""Strict buckets: all replicas together never exceed the limit, and a busy one can still use nearly all of it."""

from __future__ import annotations

import os
from collections import Counter
from itertools import permutations
from random import Random

import pytest
from crdt.strict_cluster import StrictCluster
from hypothesis import given
from hypothesis import strategies as st

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.lending import Loans
from ratelimit_sidecar.crdt.limit import Limit
from ratelimit_sidecar.crdt.shares import (
    LOAN_GUARD_US,
    LOAN_US,
    MAX_WHOLE_CAPACITY,
    PARTS,
    Membership,
    Shares,
    Shown,
    home_parts,
    home_parts_of_key,
    parts_of,
    whole_tokens,
    whole_tokens_up,
)
from ratelimit_sidecar.crdt.strict import Ask, Grant, Return, StrictBucket

SECOND_US = 1_000_000
SIT_OUT_US = LOAN_US + LOAN_GUARD_US
PER_SECOND_100 = Limit(100, SECOND_US, 100)

SCHEDULES = 20_000 if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else 1_000
BATCHES = 25


def rate_of(limit: Limit, duration_us: int) -> int:
    return limit.tokens * duration_us // limit.period_us


def run_faults(seed: int, *, max_skew_us: int = 500_000, drift_ppm: int = 0) -> StrictCluster:
    """A random schedule of demand, delay, loss, cuts, crashes and restarts."""
    random = Random(seed)
    limit = random.choice(
        [PER_SECOND_100, Limit(10, SECOND_US, 50), Limit(40, SECOND_US, 5), Limit(30, 60 * SECOND_US, 30)]
    )
    cluster = StrictCluster(
        limit,
        tuple("abcde"[: random.randint(2, 5)]),
        seed,
        delay_us=random.choice([500, 40_000, 150_000, 900_000]),
        loss=random.choice([0, 0, 0.05, 0.3]),
        max_skew_us=max_skew_us,
        drift_ppm=drift_ppm,
    )
    for _ in range(random.randint(4, 8)):
        for node in cluster.nodes:
            if random.random() < 0.6:
                cluster.demand(node, random.choice([5, 40, 150]), random.randint(1, 2) * SECOND_US)
        for _ in range(random.randint(0, 2)):
            one, other = random.sample(cluster.nodes, 2)
            fault = random.randrange(4)
            if fault == 0:
                cluster.cut.add(frozenset((one, other)))
            elif fault == 1:
                cluster.cut.clear()
            elif one in cluster.replicas:
                cluster.crash(one)
                if fault == 2:
                    cluster.at(random.randint(1, 3 * SECOND_US), lambda node=one: cluster.start(node))
            else:
                cluster.start(one)
        cluster.run(random.randint(SECOND_US // 2, 3 * SECOND_US))
    return cluster


@pytest.mark.parametrize("batch", range(BATCHES))
def test_through_random_faults_with_skewed_clocks_nothing_is_admitted_beyond_the_limit(batch: int) -> None:
    """P5. A failing seed is replayed by `run_faults(seed)`."""
    admitted = 0
    for seed in range(batch, SCHEDULES, BATCHES):
        cluster = run_faults(seed)
        assert cluster.worst <= 0, f"seed {seed}"
        assert cluster.most_share <= PARTS, f"seed {seed}"
        assert cluster.most_level <= cluster.limit.ceiling * PARTS, f"seed {seed}"
        admitted += cluster.total_admitted()
    assert admitted


def test_clocks_that_run_at_different_speeds_cost_no_more_than_their_speed() -> None:
    """A clock being slewed runs 0.5 % fast, and so does the refill it measures; loans end in time all the same."""
    for seed in range(40):
        cluster = run_faults(seed, drift_ppm=5_000)
        elapsed_us = cluster.now_us - 1_000_000_000
        assert cluster.worst <= cluster.limit.tokens * elapsed_us * 5_000 // 1_000_000, f"seed {seed}"
        assert cluster.most_share <= PARTS, f"seed {seed}"


def test_one_busy_region_of_three_uses_nearly_the_whole_limit_two_seconds_after_the_shift() -> None:
    cluster = StrictCluster(PER_SECOND_100, delay_us=80_000)
    cluster.run(SIT_OUT_US + 2 * SECOND_US)
    for node in ("a", "b"):
        cluster.demand(node, 1_000, 10 * SECOND_US)
        cluster.run(2 * SECOND_US)
        before = cluster.total_admitted()
        cluster.run(8 * SECOND_US)
        assert cluster.total_admitted() - before >= 0.95 * rate_of(PER_SECOND_100, 8 * SECOND_US)
    assert cluster.worst <= 0


def test_under_overload_everywhere_each_region_has_its_home_share() -> None:
    cluster = StrictCluster(PER_SECOND_100, delay_us=80_000, weights={"a": 2, "b": 1, "c": 1})
    cluster.run(SIT_OUT_US)
    for node in cluster.nodes:
        cluster.demand(node, 400, 10 * SECOND_US)
    cluster.run(10 * SECOND_US)
    assert cluster.admitted["a"] == pytest.approx(500, rel=0.03)
    assert cluster.admitted["b"] == pytest.approx(250, rel=0.03)
    assert cluster.worst <= 0


def test_two_busy_regions_divide_what_the_third_does_not_need() -> None:
    cluster = StrictCluster(PER_SECOND_100, delay_us=80_000)
    cluster.run(SIT_OUT_US + 2 * SECOND_US)
    for node in ("a", "b"):
        cluster.demand(node, 400, 12 * SECOND_US)
    cluster.run(4 * SECOND_US)
    before = dict(cluster.admitted)
    cluster.run(8 * SECOND_US)
    gained = [cluster.admitted[node] - before[node] for node in ("a", "b")]
    assert sum(gained) >= 0.93 * rate_of(PER_SECOND_100, 8 * SECOND_US)
    assert min(gained) >= 0.42 * sum(gained)


def test_during_a_partition_each_side_still_serves_its_share() -> None:
    cluster = StrictCluster(PER_SECOND_100, delay_us=80_000)
    cluster.run(SIT_OUT_US + 2 * SECOND_US)
    for node in cluster.nodes:
        cluster.demand(node, 300, 20 * SECOND_US)
    cluster.run(5 * SECOND_US)
    cluster.cut = {frozenset("ab"), frozenset("ac")}
    cluster.run(SIT_OUT_US)
    before = dict(cluster.admitted)
    cluster.run(10 * SECOND_US)
    for node in cluster.nodes:
        assert cluster.admitted[node] - before[node] >= 0.97 * rate_of(PER_SECOND_100, 10 * SECOND_US) / 3
    assert cluster.worst <= 0


def test_a_dead_lenders_loan_is_out_for_one_duration_only_and_its_share_stays_its_own() -> None:
    cluster = StrictCluster(PER_SECOND_100, delay_us=10_000)
    cluster.run(SIT_OUT_US + SECOND_US)
    cluster.demand("a", 1_000, 10 * SECOND_US)
    cluster.run(2 * SECOND_US)
    assert cluster.replicas["a"].bucket.share > 0.9 * PARTS
    cluster.crash("b")
    cluster.run(LOAN_US)
    bucket = cluster.replicas["a"].bucket
    assert bucket.borrowed_from("b") == 0
    assert bucket.share == pytest.approx(2 / 3 * PARTS, rel=0.05)


def test_a_restarted_replica_admits_nothing_of_its_own_until_its_former_loans_have_ended() -> None:
    cluster = StrictCluster(PER_SECOND_100, nodes=("a", "b"))
    cluster.cut = {frozenset("ab")}
    cluster.run(SIT_OUT_US + 5 * SECOND_US)
    assert cluster.take("a", 50)
    cluster.crash("a")
    cluster.start("a")
    cluster.run(SIT_OUT_US - 1)
    assert not cluster.take("a")
    cluster.run(SECOND_US // 10)
    assert cluster.take("a", 4)


def test_a_slow_limit_keeps_its_loans_while_its_demand_goes_on() -> None:
    """One request in two minutes of 60 an hour: alone with a third of it, the region would be denied half of them."""
    limit = Limit(60, 3_600 * SECOND_US, 60)
    cluster = StrictCluster(limit, delay_us=80_000)
    cluster.run(4_000 * SECOND_US)
    for _ in range(150):
        cluster.take("a")
        cluster.run(70 * SECOND_US)
    assert cluster.denied.get("a", 0) <= 3
    assert cluster.worst <= 0


def test_an_idle_bucket_made_anew_has_no_more_than_it_had() -> None:
    cluster = StrictCluster(PER_SECOND_100)
    cluster.run(SIT_OUT_US + 2 * SECOND_US)
    for replica in cluster.replicas.values():
        bucket = replica.bucket
        assert bucket.is_idle(cluster.now_us)
        assert bucket.remaining == pytest.approx(33, abs=1)


@pytest.mark.parametrize("weights", [{"a": 1, "b": 1, "c": 1}, {"a": 7, "b": 2, "c": 1}, {"a": 1}])
def test_home_shares_never_sum_to_more_than_one_and_lose_next_to_nothing(weights: dict[str, int]) -> None:
    total = sum(home_parts(weights, node) for node in weights)
    assert PARTS - len(weights) < total <= PARTS
    assert home_parts(weights, "stranger") == 0


@given(
    weights=st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 7), min_size=1).filter(
        lambda weights: any(weights.values())
    ),
    key=st.binary(min_size=1, max_size=8),
    capacity=st.integers(1, 40) | st.integers(1, MAX_WHOLE_CAPACITY),
)
def test_the_homes_of_one_limit_are_whole_tokens_and_sum_to_its_capacity(
    weights: dict[str, int], key: bytes, capacity: int
) -> None:
    homes = {node: home_parts_of_key(weights, node, key, capacity) for node in weights}
    tokens = {node: whole_tokens(home, capacity) for node, home in homes.items()}
    assert sum(tokens.values()) == capacity
    assert all(parts_of(tokens[node], capacity) == home for node, home in homes.items())
    assert all(abs(tokens[node] - capacity * weights[node] / sum(weights.values())) < 1 for node in weights)
    assert sum(homes.values()) <= PARTS


@given(capacity=st.integers(1, MAX_WHOLE_CAPACITY), part=st.floats(0, 1))
def test_parts_that_stand_for_whole_tokens_do_so_whether_rounded_up_or_down(capacity: int, part: float) -> None:
    tokens = int(capacity * part)
    parts = parts_of(tokens, capacity)
    assert whole_tokens(parts, capacity) == whole_tokens_up(parts, capacity) == tokens


def test_the_tokens_that_cannot_be_divided_go_to_every_node_in_turn() -> None:
    weights = dict.fromkeys("abcde", 1)
    lucky = Counter(
        node for number in range(1_000) for node in weights if home_parts_of_key(weights, node, b"key %d" % number, 1)
    )
    assert sum(lucky.values()) == 1_000
    assert min(lucky.values()) > 120


@pytest.mark.parametrize("capacity", [1, 2, 3, 5, 7])
def test_a_limit_of_about_as_many_tokens_as_there_are_members_admits_what_it_says(capacity: int) -> None:
    """Divided by parts of a token, 5 a second for five members were 0."""
    limit = Limit(capacity, SECOND_US, capacity)
    cluster = StrictCluster(limit, tuple("abcde"), delay_us=20_000)
    cluster.run(SIT_OUT_US + 2 * SECOND_US)
    for node in cluster.nodes:
        cluster.demand(node, 20, 12 * SECOND_US)
    cluster.run(12 * SECOND_US)
    assert cluster.total_admitted() >= 0.8 * rate_of(limit, 12 * SECOND_US)
    assert cluster.worst <= 0


@pytest.mark.parametrize("capacity", [1, 3, 5, 7])
def test_one_busy_region_borrows_whole_tokens_of_the_others(capacity: int) -> None:
    limit = Limit(capacity, SECOND_US, capacity)
    cluster = StrictCluster(limit, tuple("abcde"), delay_us=20_000)
    cluster.run(SIT_OUT_US + 2 * SECOND_US)
    cluster.demand("a", 50, 20 * SECOND_US)
    cluster.run(5 * SECOND_US)
    before = cluster.total_admitted()
    cluster.run(15 * SECOND_US)
    assert cluster.total_admitted() - before >= 0.8 * rate_of(limit, 15 * SECOND_US)
    assert cluster.worst <= 0


def test_what_a_node_shows_that_is_no_member_changes_nobodys_share() -> None:
    shares = Shares(Membership(1, {"a": 1, "b": 1}), "a", 0)
    shares.hear("stranger", Shown(1, {"stranger": 1}), SIT_OUT_US)
    assert shares.home(SIT_OUT_US) == PARTS // 2
    assert list(shares.conflicts) == ["stranger"]
    shares = Shares(Membership(2, {"a": 1}, {"a": 1, "b": 1}), "a", 0)
    shares.hear("b", Shown(2, {"b": 1}), SIT_OUT_US)
    assert shares.home(SIT_OUT_US) == 0, "a member's word, of the epoch before as well"


def test_a_lender_that_gives_again_and_again_is_believed_no_more_than_its_share_holds_and_refills() -> None:
    """865 were admitted of 600 so."""
    now_us = SIT_OUT_US
    _, borrower = make_pair()
    admitted = 0
    for number in range(1, 41):
        borrower.borrow("lender", Grant(number, PARTS, 2**40, PARTS), now_us, now_us, most=PARTS // 2)
        while borrower.take(1, now_us):
            admitted += 1
        now_us += SECOND_US // 4
    assert admitted <= 100 + 10 * 100 + 10 * 50


def test_a_borrower_that_returns_tokens_it_never_had_brings_none() -> None:
    lender, _ = make_pair()
    now_us = SIT_OUT_US
    assert lender.take(50, now_us)
    for number in range(1, 100):
        lender.lend("borrower", Ask(number, PARTS // 4), PARTS // 4, PARTS // 4, now_us)
        lender.take_back("borrower", Return(number, 0, 2**40), now_us)
        assert not lender.take(1, now_us)


@pytest.mark.parametrize("order", list(permutations("bcd")))
def test_while_two_epochs_are_in_flight_the_home_shares_sum_to_at_most_one(order: tuple[str, ...]) -> None:
    """Nodes are restarted into the new epoch one by one, d joins and a leaves; the sum is taken at every step."""
    old, new = {"a": 1, "b": 1, "c": 2}, {"b": 2, "c": 1, "d": 1}
    before, after = Membership(1, old), Membership(2, new, old)
    now_us = 0
    views = {node: Shares(before, node, -SIT_OUT_US) for node in old}
    del views["a"]
    for node in order:
        now_us += SECOND_US
        views[node] = Shares(after, node, now_us)
        for later_us in range(now_us, now_us + 2 * SIT_OUT_US, SECOND_US // 2):
            for one in views.values():
                for other in views.values():
                    if one is not other:
                        shown = Shown(other.membership.epoch, other.membership.weights)
                        one.hear(other.node, shown, later_us)
            assert sum(view.home(later_us) for view in views.values()) <= PARTS
            now_us = later_us
    assert {node: view.home(now_us) for node, view in views.items()} == {node: home_parts(new, node) for node in views}


def test_a_new_share_counts_in_full_one_longest_loan_after_the_last_member_has_shown_the_epoch() -> None:
    shares = Shares(Membership(2, {"a": 1}, {"a": 1, "b": 1}), "a", 0)
    assert shares.settled_us() == SIT_OUT_US
    shares = Shares(Membership(2, {"a": 3, "b": 1}, {"a": 1, "b": 3}), "a", 0)
    shares.hear("b", Shown(1, {"a": 1, "b": 3}), SIT_OUT_US)
    assert shares.settled_us() is None
    shares.hear("b", Shown(2, {"a": 3, "b": 1}), 2 * SIT_OUT_US)
    shares.hear("b", Shown(2, {"a": 3, "b": 1}), 3 * SIT_OUT_US)
    assert shares.settled_us() == 3 * SIT_OUT_US
    assert shares.home(3 * SIT_OUT_US - 1) == PARTS // 4
    assert shares.home(3 * SIT_OUT_US) == 3 * PARTS // 4


def test_a_peer_with_other_members_under_the_same_epoch_leaves_the_smaller_share() -> None:
    shares = Shares(Membership(1, {"a": 1, "b": 1}), "a", 0)
    shares.hear("b", Shown(1, {"a": 1, "b": 3}), SIT_OUT_US)
    assert shares.home(SIT_OUT_US) == PARTS // 4
    assert list(shares.conflicts) == ["b"]
    shares.hear("b", Shown(1, {"a": 1, "b": 1}), SIT_OUT_US)
    assert shares.home(SIT_OUT_US) == PARTS // 2


def make_pair(now_us: int = SIT_OUT_US) -> tuple[StrictBucket, StrictBucket]:
    """A lender and a borrower, each with a full half of 100 tokens."""
    lender, borrower = (
        StrictBucket(b"k", PER_SECOND_100, Origin(node, 1), now_us, home=PARTS // 2, from_us=now_us - SECOND_US)
        for node in ("lender", "borrower")
    )
    return lender, borrower


def test_a_loan_brings_the_tokens_that_no_longer_fit_at_the_lender() -> None:
    now_us = SIT_OUT_US
    lender, borrower = make_pair()
    assert borrower.take(50, now_us)
    grant = lender.lend("borrower", Ask(1, PARTS // 4), PARTS // 4, PARTS // 4, now_us)
    assert (grant.tokens, lender.remaining) == (25, 25)
    assert borrower.borrow("lender", grant, now_us, now_us)
    assert borrower.remaining == 25


def test_a_loan_ends_at_the_asking_time_and_one_duration_however_late_it_came() -> None:
    now_us = SIT_OUT_US
    lender, borrower = make_pair()
    grant = lender.lend("borrower", Ask(1, PARTS // 4), PARTS // 4, PARTS // 4, now_us)
    assert borrower.borrow("lender", grant, now_us - 900_000, now_us)
    borrower.advance(now_us - 900_000 + LOAN_US)
    assert borrower.share == PARTS // 2
    assert borrower.level <= PER_SECOND_100.ceiling * PARTS // 2
    lender.advance(now_us + LOAN_US)
    assert lender.share == PARTS // 4
    lender.advance(now_us + LOAN_US + LOAN_GUARD_US)
    assert lender.share == PARTS // 2


def test_a_grant_that_comes_after_its_end_or_after_a_newer_one_is_not_used() -> None:
    now_us = SIT_OUT_US
    _, borrower = make_pair()
    assert not borrower.borrow("lender", Grant(1, PARTS // 8, 5, 0), now_us - LOAN_US, now_us)
    assert borrower.borrow("lender", Grant(3, PARTS // 4, 0, 0), now_us, now_us)
    assert not borrower.borrow("lender", Grant(2, PARTS // 2, 0, 0), now_us, now_us)
    assert borrower.borrowed_from("lender") == PARTS // 4


def test_a_smaller_loan_frees_the_larger_one_before_it_only_when_that_has_ended() -> None:
    now_us = SIT_OUT_US
    lender, _ = make_pair()
    lender.lend("borrower", Ask(1, PARTS // 4), PARTS // 4, 0, now_us)
    lender.lend("borrower", Ask(2, PARTS // 8), PARTS // 8, 0, now_us + SECOND_US)
    assert lender.lent_to("borrower") == PARTS // 4
    lender.advance(now_us + LOAN_US + LOAN_GUARD_US)
    assert lender.lent_to("borrower") == PARTS // 8


def test_what_is_given_back_is_free_at_once_with_its_tokens_unless_it_was_lent_later() -> None:
    now_us = SIT_OUT_US
    lender, borrower = make_pair()
    borrower.take(50, now_us)
    borrower.borrow("lender", lender.lend("borrower", Ask(1, PARTS // 4), PARTS // 4, 0, now_us), now_us, now_us)
    # Ask 2 is on its way: its grant must not be used any more.
    returned = borrower.give_back("lender", PARTS // 8, 2, now_us)
    assert borrower.share == PARTS // 2 + PARTS // 8
    assert not borrower.borrow("lender", Grant(2, PARTS // 4, 0, 0), now_us, now_us)
    lender.lend("borrower", Ask(3, PARTS // 4), PARTS // 4, 0, now_us)
    lender.take_back("borrower", returned, now_us)
    assert lender.lent_to("borrower") == PARTS // 4
    lender.take_back("borrower", Return(3, 0, 0), now_us)
    assert (lender.lent_to("borrower"), lender.share) == (0, PARTS // 2)


def test_a_share_that_shrinks_cuts_the_level_to_fit() -> None:
    lender, _ = make_pair()
    lender.lend("borrower", Ask(1, PARTS // 4), PARTS // 4, 0, SIT_OUT_US)
    assert lender.level == PER_SECOND_100.ceiling * PARTS // 4
    lender.set_home(PARTS // 4, SIT_OUT_US)
    assert (lender.share, lender.level) == (0, 0)


def test_an_answer_to_an_ask_of_a_former_life_is_not_used() -> None:
    lender, borrower = make_pair()
    borrower.take(60, SIT_OUT_US)
    loans = Loans(borrower, first_number=1_000)
    asks, _ = loans.ask({"lender": PARTS // 2}, SIT_OUT_US)
    loans.granted("lender", lender.lend("borrower", Ask(7, PARTS // 4), PARTS // 4, 0, SIT_OUT_US), SIT_OUT_US)
    assert borrower.borrowed_from("lender") == 0
    ask = asks["lender"]
    loans.granted("lender", Loans(lender, 0).answer("borrower", ask, SIT_OUT_US), SIT_OUT_US)
    assert borrower.borrowed_from("lender") > 0
    assert ask.number == 1_001


def test_after_the_way_to_a_lender_was_lost_asks_are_numbered_on_and_the_first_grant_is_used() -> None:
    cluster = StrictCluster(PER_SECOND_100, nodes=("a", "b"), delay_us=10_000)
    cluster.run(SIT_OUT_US + 2 * SECOND_US)
    cluster.demand("a", 1_000, 20 * SECOND_US)
    cluster.run(12 * SECOND_US)
    cluster.cut = {frozenset("ab")}
    for node, peer in ("ab", "ba"):
        cluster.replicas[node].loans.lost(peer)
    cluster.run(LOAN_US)
    assert cluster.replicas["a"].bucket.borrowed_from("b") == 0
    cluster.cut.clear()
    cluster.run(SECOND_US)
    assert cluster.replicas["a"].bucket.borrowed_from("b") > 0


def test_a_region_without_demand_gives_back_what_it_borrowed() -> None:
    cluster = StrictCluster(PER_SECOND_100, delay_us=10_000)
    cluster.run(SIT_OUT_US + 2 * SECOND_US)
    cluster.demand("a", 1_000, 2 * SECOND_US)
    cluster.run(2 * SECOND_US)
    assert cluster.replicas["a"].bucket.share > 0.9 * PARTS
    cluster.run(1_200_000)
    assert [replica.bucket.share for replica in cluster.replicas.values()] == [
        home_parts_of_key(cluster.membership.weights, node, b"k", 100) for node in cluster.replicas
    ]


def test_a_change_of_limit_keeps_the_part_of_the_level() -> None:
    _, borrower = make_pair()
    borrower.take(20, SIT_OUT_US)
    borrower.set_limit(Limit(50, SECOND_US, 200), SIT_OUT_US)
    assert borrower.remaining == 30
    borrower.set_limit(Limit(50, SECOND_US, 20), SIT_OUT_US)
    assert borrower.remaining == 10


def test_charged_always_a_strict_bucket_owes() -> None:
    _, borrower = make_pair()
    assert not borrower.take(75, SIT_OUT_US, always=True)
    assert (borrower.debt, borrower.remaining) == (25, 0)
    assert borrower.fits_in_us(1) == 520_000


def test_a_region_gets_the_limit_that_others_wanted_until_a_moment_ago() -> None:
    """The wishes of those whose demand is over must not hold their fair parts back."""
    cluster = StrictCluster(Limit(100, SECOND_US, 200), delay_us=80_000)
    cluster.run(SIT_OUT_US + 2 * SECOND_US)
    for node in cluster.nodes:
        cluster.demand(node, 67, 8 * SECOND_US)
    cluster.run(8 * SECOND_US)
    cluster.demand("a", 200, 10 * SECOND_US)
    cluster.run(2 * SECOND_US)
    before = cluster.total_admitted()
    cluster.run(5 * SECOND_US)
    assert cluster.total_admitted() - before >= 0.95 * rate_of(PER_SECOND_100, 5 * SECOND_US)
