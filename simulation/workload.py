"""What is asked for: rules of every kind, requests as Envoy sends them, and how they fall upon the nodes in time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from random import Random

from ratelimit_sidecar.crdt.limit import AnyLimit, TokenBucketLimit, Window, WindowLimit
from ratelimit_sidecar.envoy_api.envoy.extensions.common.ratelimit.v3.ratelimit_pb2 import RateLimitDescriptor
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2 import RateLimitRequest
from ratelimit_sidecar.limiter.rules import Consistency, Rule, RuleNode, Rules
from simulation.loop import MS, SECOND_US

DOMAIN = "api"

WAIT_US = 250 * MS

TOKEN_RULES = ("user", "team", "late")
"""Eventual token buckets. `late` is there in the second edition of the rules only."""

WINDOW_RULES = ("fixed", "sliding")

VALUES = {"user": 4, "team": 1, "late": 1, "fixed": 2, "sliding": 2, "plan": 2, "pod": 1}
"""Of each rule's key so many are asked for."""

_LIMITS: Mapping[str, tuple[tuple[tuple[int, int], ...], ...]] = {
    "user": (
        ((10, 40), (20, 60), (5, 15)),  # the shortest horizon, 10 s
        ((1, 10), (2, 20)),  # 17 s
        ((10, 1_000), (20, 1_800)),  # slots of 2 s, a horizon of 134 s
    ),
    "team": (((200, 100), (50, 20), (1_000, 200)),),
    "plan": (((100, 100), (10, 50), (1, 60)),),
}
"""By rule, rates and capacities in groups that have the same slots and horizon."""


@dataclass(frozen=True, slots=True)
class RulesEditions:
    """Rules before and after a reload. Rates are tokens per second.

    Args:
        most: by rule, the greater rate and the greater capacity of both editions: what is promised while they differ.
        exponent: by rule, of the wider slots of both.
    """

    first: Rules
    second: Rules
    most: Mapping[str, TokenBucketLimit]
    exponent: Mapping[str, int]


def per_second(tokens: int, capacity: int) -> TokenBucketLimit:
    return TokenBucketLimit(tokens, SECOND_US, capacity)


def draw_rules(draw: Random) -> RulesEditions:
    groups = {rule: draw.choice(choices) for rule, choices in _LIMITS.items()}
    limits: dict[str, AnyLimit] = {
        **{rule: per_second(*draw.choice(group)) for rule, group in groups.items()},
        "pod": per_second(20, 20),
        "fixed": WindowLimit(30, 2 * SECOND_US, Window.FIXED),
        "sliding": WindowLimit(30, 2 * SECOND_US, Window.SLIDING),
    }
    changed: dict[str, AnyLimit] = {**limits, "late": per_second(10, 40)}
    for rule, group in groups.items():
        if draw.random() < 0.5:
            # Mostly to one with the same slots.
            changed[rule] = per_second(*draw.choice(group if draw.random() < 0.8 else draw.choice(_LIMITS[rule])))
    return _editions(limits, changed)


def unchanging(**limits: AnyLimit) -> RulesEditions:
    """The same limits before and after a reload, by rule."""
    return _editions(limits, limits)


def _editions(first: Mapping[str, AnyLimit], second: Mapping[str, AnyLimit]) -> RulesEditions:
    most, exponent = {}, {}
    for rule, limit in second.items():
        before = first.get(rule, limit)
        if isinstance(limit, TokenBucketLimit) and isinstance(before, TokenBucketLimit):
            fastest = max(limit, before, key=lambda each: each.tokens / each.period_us)
            most[rule] = replace(fastest, capacity=max(limit.capacity, before.capacity))
            exponent[rule] = max(limit.exponent, before.exponent)
    return RulesEditions(rules_of(first), rules_of(second), most, exponent)


def rules_of(limits: Mapping[str, AnyLimit]) -> Rules:
    """A limit for each value of each of these keys; `plan` is strict and has requests wait, `pod` is local."""
    consistency = {"plan": Consistency.STRICT, "pod": Consistency.LOCAL}
    rules = [
        Rule(
            name,
            limit,
            consistency=consistency.get(name, Consistency.EVENTUAL),
            wait_us=WAIT_US if name == "plan" else 0,
        )
        for name, limit in limits.items()
    ]
    return Rules({DOMAIN: RuleNode(key_only={rule.name: RuleNode(rule) for rule in rules})})


@dataclass(frozen=True, slots=True)
class Descriptor:
    """One descriptor of a request, with the bucket that it takes from.

    Args:
        bucket_key: as every edition of the rules that knows the rule names it.
    """

    rule: str
    value: str
    bucket_key: bytes


@dataclass(frozen=True, slots=True)
class Request:
    raw: bytes
    descriptors: tuple[Descriptor, ...]
    hits: int


def request(rules: Rules, hits: int, *entries: tuple[str, str]) -> Request:
    """A request of one entry a descriptor, as bytes, with the buckets that it takes from.

    Args:
        rules: ones that know every rule.
        entries: the key and value of each descriptor.
    """
    descriptors = []
    for key, value in entries:
        found = rules.match(DOMAIN, [(key, value)])
        assert found is not None
        descriptors.append(Descriptor(key, value, found.bucket_key))
    message = RateLimitRequest(domain=DOMAIN, hits_addend=hits)
    for key, value in entries:
        message.descriptors.append(RateLimitDescriptor(entries=[RateLimitDescriptor.Entry(key=key, value=value)]))
    return Request(message.SerializeToString(), tuple(descriptors), hits)


class Demand:
    """Requests drawn from one seed: spells of light traffic and of overload, each on one node and a few buckets."""

    def __init__(self, draw: Random, rules: Rules) -> None:
        self._draw = draw
        self._rules = rules
        self._requests: dict[tuple[int, tuple[tuple[str, str], ...]], Request] = {}

    def over(self, nodes: str, for_us: int) -> Iterator[tuple[int, str, Request]]:
        """Yields instants from the beginning, nodes and requests, in no particular order."""
        draw = self._draw
        for node in nodes:
            yield from self._spell(node, 0, for_us, draw.randint(1, 5) * for_us // SECOND_US)
        for _ in range(draw.randint(1, 4)):
            begin_us = draw.randrange(for_us)
            length_us = min(draw.choice((SECOND_US // 10, SECOND_US, 3 * SECOND_US)), for_us - begin_us)
            yield from self._spell(draw.choice(nodes), begin_us, length_us, draw.randint(20, 200))

    def _spell(self, node: str, begin_us: int, length_us: int, count: int) -> Iterator[tuple[int, str, Request]]:
        draw = self._draw
        choices = [self._draw_request() for _ in range(draw.randint(2, 5))]
        for _ in range(count):
            yield begin_us + draw.randrange(length_us), node, draw.choice(choices)

    def _draw_request(self) -> Request:
        draw = self._draw
        entries = tuple(
            (rule, f"{rule} {draw.randrange(VALUES[rule])}")
            for rule in draw.sample(list(VALUES), 2 if draw.random() < 0.2 else 1)
        )
        hits = draw.choice((1, 1, 2, 5, 20))
        found = self._requests.get((hits, entries))
        if found is None:
            found = self._requests[hits, entries] = request(self._rules, hits, *entries)
        return found
