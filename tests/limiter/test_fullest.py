"""The fullest buckets of each rule: how the work of a pass is spread."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from ratelimit_sidecar.crdt.bucket import SLOTS_A_LOOK, Entry, Origin
from ratelimit_sidecar.crdt.limit import Window, WindowLimit
from ratelimit_sidecar.crdt.slot import slot_id
from ratelimit_sidecar.limiter.fullest import FREED_PER_BUCKET, Fullest, FullestBuckets
from ratelimit_sidecar.limiter.limiter import Limiter
from ratelimit_sidecar.limiter.rules import Rule, RuleNode, Rules, Unit, limit_of_rate

NOW_US = 1_700_000_000_000_000
RULES = 1_000
AT_ONCE = 20


@pytest.fixture
def nothing_else() -> Iterator[None]:
    """What was there before is not looked through again and again."""
    gc.freeze()
    yield
    gc.unfreeze()


def found() -> int:
    return sum(isinstance(each, Fullest) for each in gc.get_objects())


@pytest.mark.usefixtures("nothing_else")
def test_what_a_former_pass_has_found_is_freed_a_little_at_a_time() -> None:
    limit = limit_of_rate(5, Unit.HOUR, None)
    keys = [f"k{number}" for number in range(RULES)]
    rules = Rules({"d": RuleNode(key_only={key: RuleNode(Rule(f"d.{key}", limit, 5, Unit.HOUR)) for key in keys})})
    limiter = Limiter(rules, Origin("n", 1))
    for key in keys:
        limiter.charge(limiter.rlqs_take("d", [(key, "v")]), 1, NOW_US)
    fullest = FullestBuckets(limiter.store)
    passes = 0
    before = found()
    while passes < 3:
        passes += fullest.look(rules, NOW_US, AT_ONCE) < AT_ONCE
        now = found()
        assert now > before - FREED_PER_BUCKET * AT_ONCE - 1
        before = now
    assert len(fullest.of_rules) == RULES
    assert before <= 2 * RULES


def test_a_step_looks_at_few_sliding_windows_if_they_hold_slots_of_many_replicas() -> None:
    limit = WindowLimit(100, 3_600_000_000, Window.SLIDING)
    rules = Rules({"d": RuleNode(key_only={"k": RuleNode(Rule("d.k", limit, 100, Unit.HOUR))})})
    limiter = Limiter(rules, Origin("n", 1))
    slots = [slot_id(NOW_US - age * (1 << limit.exponent), limit.exponent) for age in range(50)]
    for number in range(40):
        limiter.charge(limiter.rlqs_take("d", [("k", f"v{number}")]), 1, NOW_US)
    for bucket in limiter.store:
        bucket.merge([Entry(Origin("there", 1 + of), slot, 1) for of in range(20) for slot in slots], NOW_US)
    fullest = FullestBuckets(limiter.store)
    assert fullest.look(rules, NOW_US, 200) == 1 + 200 * SLOTS_A_LOOK // (20 * 50)
    while not fullest.of_rules:
        assert fullest.look(rules, NOW_US, 200) <= 4
    assert fullest.of_rules["d", "d.k"].used == [10.01] * 3
