"""The fullest buckets of each rule: how the work of a pass is spread."""

from __future__ import annotations

import gc

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.limiter.fullest import FREED_PER_BUCKET, Fullest, FullestBuckets
from ratelimit_sidecar.limiter.limiter import Limiter
from ratelimit_sidecar.limiter.rules import Rule, RuleNode, Rules, Unit, limit_of_rate

NOW_US = 1_700_000_000_000_000
RULES = 1_000
AT_ONCE = 20


def found() -> int:
    return sum(isinstance(each, Fullest) for each in gc.get_objects())


def test_what_a_former_pass_has_found_is_freed_a_little_at_a_time() -> None:
    limit = limit_of_rate(5, Unit.HOUR, None)
    keys = [f"k{number}" for number in range(RULES)]
    rules = Rules({"d": RuleNode(key_only={key: RuleNode(Rule(f"d.{key}", limit, 5, Unit.HOUR)) for key in keys})})
    limiter = Limiter(rules, Origin("n", 1))
    for key in keys:
        limiter.charge(limiter.quota_step("d", [(key, "v")]), 1, NOW_US)
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
