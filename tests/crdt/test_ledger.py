"""All strict buckets of a replica: which of them ask whom, and which may be forgotten."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable

import pytest
from young import collected_when_told

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.homes import MAX_CHANGES
from ratelimit_sidecar.crdt.ledger import Ledger
from ratelimit_sidecar.crdt.limit import TokenBucketLimit, Window, WindowLimit
from ratelimit_sidecar.crdt.payment_policy import Ask, Payment
from ratelimit_sidecar.crdt.shares import OLD_LOAN_US, TOKEN, Membership, Shares, ShownMembership
from ratelimit_sidecar.crdt.store import StoreFull
from ratelimit_sidecar.crdt.strict import StrictBucket

LIMIT = TokenBucketLimit(100, 1_000_000, 100)
HOUR_US = 3_600_000_000
STARTED_US = 1_000_000_000
NOW_US = STARTED_US + OLD_LOAN_US + 2_000_000
ENDS = {"b": 7}


def weakly_counted(held: object) -> Callable[[], int]:
    """How many others hold it, the result among them."""
    # The argument of getrefcount is one more.
    return lambda: sys.getrefcount(held) - 1


def ask_for(tokens: int) -> Ask:
    return Ask(tokens * TOKEN, level=0, demand=tokens * TOKEN, is_short=True)


def make_ledger(node: str = "a", *, max_buckets: int = 10_000, limit: TokenBucketLimit = LIMIT) -> Ledger:
    limits = {b"k": limit, b"other": LIMIT, b"window": WindowLimit(1, 1_000_000, Window.FIXED)}
    shares = Shares(Membership(1, {"a": 1, "b": 1}), node, STARTED_US)
    return Ledger(shares, Origin(node, 1), limits.get, max_buckets=max_buckets, rule_key=lambda _key: b"rule")


def test_a_bucket_begins_full_when_it_was_not_asked_for_since_the_start() -> None:
    bucket = make_ledger().bucket(b"k", LIMIT, NOW_US)
    assert (bucket.home, bucket.remaining) == (50 * TOKEN, 50)


def test_a_bucket_begins_with_what_has_refilled_since_the_home_began() -> None:
    began_us = STARTED_US + OLD_LOAN_US
    bucket = make_ledger().bucket(b"k", LIMIT, began_us + 100_000)
    assert bucket.remaining == 5


def test_before_its_home_begins_a_replica_admits_nothing_and_afterwards_what_refills() -> None:
    ledger = make_ledger()
    assert not ledger.bucket(b"k", LIMIT, STARTED_US).take(1, STARTED_US)
    ledger.tick(ENDS, STARTED_US + OLD_LOAN_US, max_buckets=10, longest_key=100)
    assert not ledger.bucket(b"k", LIMIT, STARTED_US + OLD_LOAN_US).take(1, STARTED_US + OLD_LOAN_US)
    later_us = STARTED_US + OLD_LOAN_US + 100_000
    bucket = ledger.bucket(b"k", LIMIT, later_us)
    bucket.advance(later_us)
    assert bucket.remaining == 5


def spent(ledger: Ledger, limit: TokenBucketLimit, now_us: int) -> int:
    bucket, tokens = ledger.bucket(b"k", limit, now_us), 0
    while bucket.take(1, now_us):
        tokens += 1
    return tokens


def pass_time(ledgers: Iterable[Ledger], now_us: int, hours: float) -> int:
    """With all that is done meanwhile, but no request."""
    for _ in range(10):
        now_us += int(hours * HOUR_US / 10)
        for ledger in ledgers:
            ledger.tick({}, now_us, max_buckets=10, longest_key=100)
            ledger.sweep(now_us, 10)
    return now_us


@pytest.mark.parametrize("returns", [False, True], ids=["goes back", "goes back and returns"])
def test_a_purse_that_nobody_uses_refills_by_the_home_it_has_while_a_member_is_back_in_the_former_epoch(
    returns: bool,
) -> None:
    limit, both, alone = TokenBucketLimit(100, HOUR_US, 100), {"a": 1, "b": 1}, {"a": 1, "b": 0}
    a = Ledger(Shares(Membership(2, alone, both), "a", 0), Origin("a", 1), lambda _key: limit)
    a.shares.receive("b", ShownMembership(2, alone), HOUR_US)
    now_us = pass_time([a], HOUR_US, 5)
    assert spent(a, limit, now_us) == 100
    began_us = now_us
    b = Ledger(Shares(Membership(1, both), "b", now_us), Origin("b", 1), lambda _key: limit)
    b.shares.receive("a", ShownMembership(2, alone), now_us)
    a.shares.receive("b", ShownMembership(1, both), now_us)
    a.tick({}, now_us, max_buckets=10, longest_key=100)
    b.bucket(b"k", limit, now_us)
    now_us = pass_time([a, b], now_us, 0.9)
    admitted = spent(b, limit, now_us)
    if returns:
        a.shares.receive("b", ShownMembership(2, alone), now_us)
        a.tick({}, now_us, max_buckets=10, longest_key=100)
    admitted += spent(a, limit, now_us)
    assert admitted <= 100 * (now_us - began_us) / HOUR_US


def test_a_purse_that_is_looked_at_late_has_refilled_by_its_home_since_that_changed() -> None:
    limit, both, alone = TokenBucketLimit(100, HOUR_US, 100), {"a": 1, "b": 3}, {"a": 1, "b": 0}
    ledger = Ledger(Shares(Membership(2, alone, both), "a", 0), Origin("a", 1), lambda _key: limit)
    ledger.shares.receive("b", ShownMembership(2, alone), HOUR_US)
    now_us = pass_time([ledger], HOUR_US, 5)
    assert spent(ledger, limit, now_us) == 100
    ledger.shares.receive("b", ShownMembership(1, both), now_us)
    ledger.tick({}, now_us, max_buckets=0, longest_key=100)
    assert ledger.bucket(b"k", limit, now_us + HOUR_US * 3 // 5).remaining == 15


def test_however_often_homes_have_changed_a_purse_that_missed_it_holds_no_more_than_the_smallest() -> None:
    limit, both, alone = TokenBucketLimit(100, HOUR_US, 100), {"a": 1, "b": 3}, {"a": 1, "b": 0}
    ledger = Ledger(Shares(Membership(2, alone, both), "a", 0), Origin("a", 1), lambda _key: limit)
    ledger.shares.receive("b", ShownMembership(2, alone), HOUR_US)
    now_us = pass_time([ledger], HOUR_US, 5)
    assert ledger.bucket(b"k", limit, now_us).remaining == 100
    larger = [ShownMembership(2, {"a": 1, "b": 1}), ShownMembership(2, alone)]
    for shown in [ShownMembership(1, both), *larger * MAX_CHANGES][: MAX_CHANGES + 3]:
        ledger.shares.receive("b", shown, now_us)
        ledger.tick({}, now_us, max_buckets=10, longest_key=100)
    assert ledger.bucket(b"k", limit, now_us).remaining == 25
    assert ledger.bucket(b"k", limit, pass_time([ledger], now_us, 0.5)).remaining == 75


@pytest.mark.parametrize("changes", [1, MAX_CHANGES])
def test_while_another_process_has_its_id_a_node_has_no_home_and_afterwards_it_begins_empty(changes: int) -> None:
    ledger, now_us = make_ledger(), NOW_US
    ledger.bucket(b"k", LIMIT, now_us)
    for _ in range(changes):
        for is_taken in (True, False):
            ledger.shares.is_id_taken = is_taken
            now_us += 1_000_000
            ledger.tick({}, now_us, 1, 1)
            if is_taken and changes == 1:
                assert ledger.bucket(b"k", LIMIT, now_us).remaining == 0
    bucket = ledger.bucket(b"k", LIMIT, now_us)
    assert bucket.remaining == 0
    bucket.advance(now_us + 500_000)
    assert bucket.remaining == 25


def test_a_bucket_that_is_short_asks_and_uses_what_it_is_paid() -> None:
    here, there = make_ledger("a"), make_ledger("b")
    bucket = here.bucket(b"k", LIMIT, NOW_US)
    assert bucket.take(50, NOW_US)
    assert not bucket.take(30, NOW_US)
    ask = here.tick(ENDS, NOW_US, max_buckets=10, longest_key=100)["b"][b"k"]
    pay = there.pay("a", b"k", ask, NOW_US)
    assert pay is not None
    assert here.receive_payment("b", 7, b"k", pay, NOW_US)
    assert bucket.take(30, NOW_US)
    other = there.bucket(b"k", LIMIT, NOW_US)
    assert other.level + bucket.level == 20 * TOKEN * LIMIT.period_us


def test_nothing_is_asked_for_a_bucket_nobody_asks_for() -> None:
    ledger = make_ledger()
    ledger.bucket(b"k", LIMIT, NOW_US)
    assert ledger.tick(ENDS, NOW_US, max_buckets=10, longest_key=100) == {}


def test_only_members_are_asked() -> None:
    ledger = make_ledger()
    ledger.bucket(b"k", LIMIT, NOW_US).take(60, NOW_US)
    assert ledger.tick({"stranger": 7}, NOW_US, max_buckets=10, longest_key=100) == {}


def test_peers_are_not_asked_about_a_key_that_is_too_long_for_them() -> None:
    ledger = make_ledger()
    key = bytes(101)
    assert ledger.bucket(key, LIMIT, NOW_US).take(50, NOW_US)
    assert ledger.tick(ENDS, NOW_US, max_buckets=10, longest_key=100) == {}
    assert list(ledger.tick(ENDS, NOW_US, max_buckets=10, longest_key=101)["b"]) == [key]


def test_a_tick_looks_at_no_more_buckets_than_it_may_and_at_all_in_turn() -> None:
    ledger = make_ledger()
    keys = [b"k%d" % index for index in range(10)]
    for key in keys:
        ledger.bucket(key, LIMIT, NOW_US).take(60, NOW_US, always=True)
    asked = [key for _ in range(3) for key in ledger.tick(ENDS, NOW_US, max_buckets=4, longest_key=100).get("b", {})]
    assert asked == keys


def test_what_is_asked_for_on_an_end_that_closes_is_asked_for_on_the_next_one() -> None:
    ledger = make_ledger()
    bucket = ledger.bucket(b"k", LIMIT, NOW_US)
    bucket.take(50, NOW_US)
    bucket.take(1, NOW_US)
    first = ledger.tick(ENDS, NOW_US, max_buckets=10, longest_key=100)["b"]
    assert ledger.tick(ENDS, NOW_US + 400_000, max_buckets=10, longest_key=100) == {}
    ledger.closed(7, first, NOW_US + 400_000)
    assert list(ledger.tick({"b": 8}, NOW_US + 400_000, max_buckets=10, longest_key=100)["b"]) == [b"k"]


def test_a_payment_of_more_than_the_peer_can_have_is_told() -> None:
    ledger = make_ledger()
    bucket = ledger.bucket(b"k", LIMIT, NOW_US)
    bucket.take(50, NOW_US)
    bucket.take(1, NOW_US)
    assert ledger.tick(ENDS, NOW_US, max_buckets=10, longest_key=100)
    assert not ledger.receive_payment("b", 7, b"k", Payment(60 * TOKEN, 0), NOW_US)
    assert bucket.remaining <= 50


def test_nobody_is_paid_of_a_key_without_a_strict_token_bucket_here() -> None:
    ledger = make_ledger()
    assert ledger.pay("b", b"unknown", ask_for(1), NOW_US) is None
    assert ledger.pay("b", b"window", ask_for(1), NOW_US) is None
    assert len(ledger) == 0


def test_a_full_bucket_that_asks_for_nothing_is_dropped_and_no_other() -> None:
    ledger = make_ledger()
    bucket = ledger.bucket(b"k", LIMIT, NOW_US)
    bucket.take(50, NOW_US)
    bucket.take(1, NOW_US)
    asks = ledger.tick(ENDS, NOW_US, max_buckets=10, longest_key=100)["b"]
    later_us = NOW_US + 3_000_000
    ledger.tick(ENDS, later_us, max_buckets=10, longest_key=100)
    assert ledger.sweep(later_us, max_buckets=10) == 1
    assert len(ledger) == 1
    ledger.closed(7, asks, later_us)
    later_us += 3_000_000
    ledger.tick(ENDS, later_us, max_buckets=10, longest_key=100)
    assert ledger.sweep(later_us, max_buckets=10) == 1
    assert len(ledger) == 0


def test_a_purse_is_not_made_anew_before_a_limit_that_it_had_would_have_refilled_it() -> None:
    day = TokenBucketLimit(1_000, 24 * HOUR_US, 1_000)
    ledger, now_us = make_ledger(limit=day), NOW_US + 48 * HOUR_US
    ledger.tick({}, now_us, 10, 100)
    assert spent(ledger, day, now_us) == 500
    now_us += 1_000_000
    spent(ledger, LIMIT, now_us)
    for _ in range(5):
        now_us += 60_000_000
        ledger.tick({}, now_us, 10, 100)
        ledger.sweep(now_us, 10)
    assert spent(ledger, day, now_us) == 50, "what it had under the other limit"
    ledger.bucket(b"k", LIMIT, now_us)
    now_us += 24 * HOUR_US
    ledger.tick({}, now_us, 10, 100)
    ledger.sweep(now_us, 10)
    assert len(ledger) == 0


def test_a_ledger_that_is_cleared_holds_no_bucket() -> None:
    ledger = make_ledger()
    buckets = [weakly_counted(ledger.bucket(b"%d" % number, LIMIT, 0)) for number in range(3)]
    for _ in ledger.clear():
        pass
    assert len(ledger) == 0
    assert [count() for count in buckets] == [1, 1, 1], "only the test has them"


def test_a_new_limit_is_enforced_on_the_live_bucket() -> None:
    ledger = make_ledger()
    ledger.bucket(b"k", LIMIT, NOW_US).take(50, NOW_US)
    bucket = ledger.bucket(b"k", TokenBucketLimit(100, 1_000_000, 400), NOW_US)
    bucket.advance(NOW_US + 2_000_000)
    assert bucket.remaining == 100


def test_a_full_ledger_has_no_room_for_new_keys_and_pays_nothing_of_them() -> None:
    ledger = make_ledger(max_buckets=1)
    ledger.bucket(b"k", LIMIT, NOW_US).take(1, NOW_US)
    with pytest.raises(StoreFull):
        ledger.bucket(b"other", LIMIT, NOW_US)
    assert ledger.pay("b", b"other", ask_for(1), NOW_US) is None
    assert ledger.bucket(b"rule", LIMIT, NOW_US).take(1, NOW_US)
    assert ledger.bucket(b"k", LIMIT, NOW_US).take(1, NOW_US)


def test_what_is_withheld_is_neither_the_buckets_nor_a_peers_and_comes_back_without_tokens() -> None:
    ledger = make_ledger()
    bucket = ledger.bucket(b"k", LIMIT, NOW_US)
    assert bucket.take(20, NOW_US)
    # Of its 50 tokens 30 are left: no more can be somebody else's.
    assert ledger.withhold(b"k", LIMIT, 50 * TOKEN, NOW_US) == 30 * TOKEN
    assert bucket.remaining == 0
    assert bucket.home == 50 * TOKEN - 30 * TOKEN
    assert ledger.pay("b", b"k", ask_for(50), NOW_US) == Payment(0, 0)
    bucket.advance(NOW_US + 10_000_000)
    assert bucket.remaining == 20
    assert ledger.withhold(b"k", LIMIT, 0, NOW_US + 10_000_000) == 0
    assert bucket.home == ledger.shares.home(b"k", 100, NOW_US) == 50 * TOKEN
    assert bucket.remaining == 20


def test_when_a_reload_raises_the_burst_the_bucket_does_not_refill_by_the_rate_that_envoys_still_have() -> None:
    ledger, larger = make_ledger(), TokenBucketLimit(100, 1_000_000, 400)
    assert ledger.withhold(b"k", LIMIT, 30 * TOKEN, NOW_US) == 30 * TOKEN
    # Envoys have 30 of its 50 a second, whatever the burst.
    bucket = ledger.bucket(b"k", larger, NOW_US)
    assert (bucket.envoys_amount, bucket.home) == (30 * TOKEN, 80 * TOKEN)
    bucket.advance(NOW_US + 110_000)
    assert bucket.remaining == 20 + 2
    # The first to report may get no more: there are too few tokens. Others go on as before, with 20 a second in all.
    assert ledger.withhold(b"k", larger, 80 * TOKEN, NOW_US + 110_000) == (30 + 22) * TOKEN
    assert bucket.home == 120 * TOKEN
    assert ledger.withhold(b"k", larger, 60 * TOKEN, NOW_US + 110_000) == (30 + 22) * TOKEN
    assert bucket.home == 140 * TOKEN


def test_reloads_to_and_fro_leave_as_much_withheld_as_before() -> None:
    ledger, larger, empty = make_ledger(), TokenBucketLimit(100, 1_000_000, 400), TokenBucketLimit(1, 1_000_000, 0)
    ledger.withhold(b"k", LIMIT, 30 * TOKEN, NOW_US)
    for limit in (larger, LIMIT, empty, LIMIT, larger, LIMIT):
        bucket = ledger.bucket(b"k", limit, NOW_US)
    assert bucket.home == pytest.approx(20 * TOKEN)


def test_what_was_paid_away_is_not_withheld() -> None:
    ledger = make_ledger()
    ledger.bucket(b"k", LIMIT, NOW_US)
    pay = ledger.pay("b", b"k", ask_for(40), NOW_US)
    assert pay is not None
    assert pay.amount >= 1 << 32
    assert ledger.withhold(b"k", LIMIT, 50 * TOKEN, NOW_US) <= 50 * TOKEN - pay.amount


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(
    "limit", [LIMIT, TokenBucketLimit(7, 1_000_000, 5), TokenBucketLimit(1 << 21, 1_000_000, 1 << 21)]
)
def test_what_is_withheld_held_and_paid_is_never_more_than_the_limit(seed: int, limit: TokenBucketLimit) -> None:
    chance = random.Random(seed)
    ledgers = {node: make_ledger(node, limit=limit) for node in "ab"}
    ends, withheld, held = {"a": 1, "b": 2}, dict.fromkeys("ab", 0), dict.fromkeys("ab", 0)
    on_the_way: list[tuple[str, str, Ask | Payment]] = []
    now_us, paid = NOW_US, 0
    before = limit.scaled_capacity << 32
    for _ in range(400):
        passed_us = chance.choice([0, 1_000, 30_000, 300_000])
        now_us += passed_us
        node, other = chance.choice([("a", "b"), ("b", "a")])
        for each in "ab":
            # In grains: what those who run what is withheld have, whose buckets are full of them in the end.
            refilled = held[each] + passed_us * (limit.tokens * withheld[each] // limit.capacity)
            held[each] = min(limit.period_us * withheld[each], refilled)
            ledgers[each].bucket(b"k", limit, now_us).advance(now_us)
        ledger = ledgers[node]
        bucket = ledger.bucket(b"k", limit, now_us)
        match chance.choice(["take", "withhold", "tick", "tick", "arrive", "arrive"]):
            case "take":
                bucket.take(chance.randint(1, max(1, bucket.remaining * 2)), now_us)
            case "withhold":
                withheld_before = withheld[node]
                wanted = chance.randint(0, limit.capacity // 2) * TOKEN
                withheld[node] = ledger.withhold(b"k", limit, wanted, now_us)
                held[node] += max(0, withheld[node] - withheld_before) * limit.period_us
                held[node] = min(held[node], limit.period_us * withheld[node])
            case "tick":
                asks = ledger.tick({other: ends[node]}, now_us, max_buckets=10, longest_key=100)
                on_the_way += [(node, other, ask) for ask in asks.get(other, {}).values()]
            case "arrive" if on_the_way:
                sender, receiver, sent = on_the_way.pop(0)
                if isinstance(sent, Payment):
                    assert ledgers[receiver].receive_payment(sender, ends[receiver], b"k", sent, now_us)
                elif (pay := ledgers[receiver].pay(sender, b"k", sent, now_us)) is not None:
                    on_the_way.append((receiver, sender, pay))
                    paid += pay.amount
        buckets = [each.bucket(b"k", limit, now_us) for each in ledgers.values()]
        alive = sum(sent.amount * limit.period_us for _, _, sent in on_the_way if isinstance(sent, Payment))
        now = sum(max(0, each.level) for each in buckets) + sum(held.values()) + alive
        assert now <= min(limit.scaled_capacity << 32, before + (passed_us * limit.tokens << 32))
        before = now
        assert all(max(0, each.level) + each.room_reserved <= each.max_level for each in buckets)
    assert paid


def test_nothing_is_withheld_before_there_is_a_home() -> None:
    assert make_ledger().withhold(b"k", LIMIT, 50 * TOKEN, STARTED_US) == 0


def test_buckets_that_come_and_go_are_not_all_young_to_the_cycle_collector() -> None:
    """Otherwise it looks at tens of thousands at once: it goes by how many more have come than gone."""
    ledger = make_ledger()
    with collected_when_told() as young_objects:
        for number in range(1_000):
            ledger.bucket(b"k%d" % number, LIMIT, NOW_US).take(1, NOW_US)
        young = young_objects()
    assert len(ledger) == 1_000
    assert sum(isinstance(found, StrictBucket) for found in young) < 300
