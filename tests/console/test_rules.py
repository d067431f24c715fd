"""What the console shows of the rules in force, and of those that cannot be."""

from __future__ import annotations

import asyncio

from console.small_console import Console
from observed import NOW_US, small_limiter

from ratelimit_sidecar.config.errors import ConfigError, Problem
from ratelimit_sidecar.console.rules import MAX_PROBLEMS_SHOWN, RulesText, comments, describe_rules, lines_of
from ratelimit_sidecar.crdt.limit import TokenBucketLimit, Window, WindowLimit
from ratelimit_sidecar.limiter.rules import Charge, Consistency, Rule, RuleNode, Rules, Unit
from ratelimit_sidecar.rules_source.reloader import Reloader

MINUTE_US = 60_000_000

RULES = Rules(
    {
        "shop": RuleNode(
            key_only={
                "user": RuleNode(Rule("shop.user", TokenBucketLimit(5, MINUTE_US, 20), 5, Unit.MINUTE)),
                "plan": RuleNode(
                    Rule(
                        "shop.plan",
                        WindowLimit(7, MINUTE_US, Window.SLIDING),
                        7,
                        Unit.MINUTE,
                        Consistency.LOCAL,
                        limit_name="plans",
                        replaces=frozenset(("users", "all")),
                        shadow_mode=True,
                        quota_mode=True,
                        charge=Charge.ALWAYS,
                    )
                ),
            },
            exact={("user", "root"): RuleNode(Rule("shop.user_root", None))},
        )
    },
    Rule("bucket", TokenBucketLimit(1, 4_000_000, 10), 10),
)


def broken(count: int = 2) -> Rules:
    raise ConfigError([Problem("a.yaml", line, 1, "domain", "noise", "a domain") for line in range(1, count + 1)])


def console_of(rules: Rules = RULES) -> Console:
    return Console(small_limiter(rules))


async def test_rlconfig_has_a_line_for_each_rule_and_says_where_they_came_from() -> None:
    response = await console_of().get("/rlconfig")
    assert response.headers["content-type"] == "text/plain; charset=utf-8"
    assert response.text.splitlines() == [
        "bucket: unit=UNKNOWN requests_per_unit=10, shadow_mode: false, algorithm: token_bucket, capacity: 10,"
        " refill_per_second: 0.25, consistency: eventual",
        "shop.plan: unit=MINUTE requests_per_unit=7, shadow_mode: true, quota_mode: true, name: plans,"
        " replaces: all users, algorithm: sliding_window, charge: always, consistency: local",
        "shop.user: unit=MINUTE requests_per_unit=5, shadow_mode: false, algorithm: token_bucket, capacity: 20,"
        " consistency: eventual",
        "shop.user_root: unit=UNKNOWN requests_per_unit=0, shadow_mode: false, unlimited: true",
        "# files rules: 4 in force since 2026-11-18T11:06:40Z",
    ]


async def test_rules_are_put_into_words_once_for_all_who_ask_until_they_change() -> None:
    limiter = small_limiter(RULES)
    text = RulesText(limiter)
    first, *others = await asyncio.gather(*(text.pieces() for _ in range(9)))
    assert all(other is first for other in others)
    limiter.use_rules(RULES)
    assert await text.pieces() is not first


async def test_rules_that_come_while_the_former_are_put_into_words_are_shown_to_the_next_who_asks() -> None:
    limiter = small_limiter(RULES)
    text = RulesText(limiter)
    making = asyncio.create_task(text.pieces())
    await asyncio.sleep(0)
    limiter.use_rules(Rules())
    assert await making == lines_of(RULES)
    assert await text.pieces() == []


async def test_many_rules_are_sent_in_pieces() -> None:
    rules = Rules({"shop": RuleNode(exact={("user", str(n)): RuleNode(Rule(f"shop.{n}", None)) for n in range(999)})})
    pieces = await RulesText(small_limiter(rules)).pieces()
    assert max(map(len, pieces)) < 1 << 16
    assert len(b"".join(pieces).splitlines()) == 999
    assert (await console_of(rules).get("/rlconfig")).text.startswith(b"".join(pieces).decode())


async def test_rlconfig_follows_a_reload() -> None:
    console = console_of()
    console.now_us += 3_600_000_000
    assert await console.reloader.load(lambda: Rules(default_rule=RULES.default_rule), "v2") is None
    lines = (await console.get("/rlconfig")).text.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["bucket", "# files rules, version v2"]
    assert lines[-1].endswith("1 in force since 2026-11-18T12:06:40Z")


async def test_why_the_newest_rules_are_not_in_force_is_shown_on_rlconfig_and_on_the_readiness_page() -> None:
    console = console_of()
    before = (await console.get("/rlconfig")).text
    console.now_us += 1_000_000
    await console.reloader.load(broken, "v2")

    after = (await console.get("/rlconfig")).text
    assert after.startswith(before)
    assert after.removeprefix(before).splitlines() == [
        "# REJECTED: the rules of version v2 that came at 2026-11-18T11:06:41Z cannot be used, 2 problems:",
        "#   a.yaml:1:1: domain: found noise, expected a domain",
        "#   a.yaml:2:1: domain: found noise, expected a domain",
    ]

    response = await console.get("/readyz")
    assert response.status_code == 200
    assert response.json() == {
        "ready": True,
        "missing": [],
        "degraded": [],
        "rules": {
            "source": "files rules",
            "degraded_reason": "",
            "in_force": 4,
            "version": "",
            "loaded_at": "2026-11-18T11:06:40Z",
            "rejected": {
                "version": "v2",
                "at": "2026-11-18T11:06:41Z",
                "problems": [f"a.yaml:{line}:1: domain: found noise, expected a domain" for line in (1, 2)],
                "problem_count": 2,
            },
        },
    }


async def test_good_rules_after_bad_ones_end_the_notice() -> None:
    console = console_of()
    await console.reloader.load(broken)
    await console.reloader.load(lambda: RULES)
    assert "REJECTED" not in (await console.get("/rlconfig")).text
    assert (await console.get("/readyz")).json()["rules"]["rejected"] is None


async def test_of_very_many_problems_the_first_are_shown_and_all_are_counted() -> None:
    console = console_of()
    await console.reloader.load(lambda: broken(10_000))
    lines = (await console.get("/rlconfig")).text.splitlines()
    assert "10000 problems, of which these are the first" in lines[5]
    assert len(lines) == 6 + MAX_PROBLEMS_SHOWN


def test_a_source_that_has_given_nothing_yet_says_so_and_why() -> None:
    reloader = Reloader(lambda _: None, lambda: NOW_US, "xDS server localhost:18000", None)
    reloader.degraded_reason = "UNAVAILABLE: connection refused"
    description = describe_rules(reloader)
    assert (description["loaded_at"], description["in_force"]) == (None, 0)
    assert lines_of(Rules()) == []
    assert list(comments(description)) == [
        "xDS server localhost:18000: no rules yet",
        "UNAVAILABLE: connection refused",
    ]


async def test_one_problem_is_called_so() -> None:
    console = console_of()
    await console.reloader.load(lambda: broken(1))
    assert "cannot be used, 1 problem:\n" in (await console.get("/rlconfig")).text


def test_no_name_can_forge_a_line() -> None:
    rules = Rules(
        {"d": RuleNode(key_only={"k": RuleNode(Rule("d.k\n# all is well\nd.x: unit", None))})}, Rule("#d", None)
    )
    lines = b"".join(lines_of(rules)).decode().splitlines()
    assert len(lines) == 2
    assert not lines[0].startswith("#")
    assert not lines[1].startswith("#")
