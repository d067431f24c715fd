"""Replay: decide requests of the past as if nothing were in shadow mode, to see who would have been denied.

Time is that of the requests. One limiter decides all of them, so overshoot of several replicas does not appear. Memory
is bounded by the number of buckets that are not full at a time, as in a sidecar; by the rules; and by
`MAX_DENIED_DESCRIPTORS`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2 import RateLimitRequest, RateLimitResponse
from ratelimit_sidecar.limiter.limiter import Limiter
from ratelimit_sidecar.limiter.rules import Rules
from ratelimit_sidecar.limiter.settings import AnswerSettings
from ratelimit_sidecar.limiter.v1.request_pb2 import Request
from ratelimit_sidecar.limiter.variants import made_local, without_shadow_mode

MAX_DENIED_DESCRIPTORS: Final = 10_000
"""The most denied descriptors with a tally of their own. Beyond that, the half with the fewest denials is added up as
others.
"""

_LEAST_TO_SWEEP: Final = 1_000
"""Full buckets are dropped each time that as many descriptors were decided as there were buckets after the last time,
but not more often than this. So there are at most twice as many buckets as needed.
"""

_OVER_LIMIT: Final = RateLimitResponse.OVER_LIMIT

Entries = tuple[tuple[str, str], ...]


@dataclass(slots=True)
class Tally:
    """How often one rule or descriptor was asked and denied.

    Args:
        first_denied_us: the time of the first denial; None without one.
        in_shadow_mode: True if the current rules would have admitted it.
    """

    asked: int = 0
    denied: int = 0
    first_denied_us: int | None = None
    in_shadow_mode: bool = False

    def count(self, denied: bool, now_us: int) -> None:
        self.asked += 1
        if denied:
            self.denied += 1
            if self.first_denied_us is None:
                self.first_denied_us = now_us


class Replay:
    """Replays requests. Call `ask` for each in order; the attributes have the totals so far.

    Args:
        max_denied_descriptors: with a tally of their own.
    """

    def __init__(
        self, rules: Rules, settings: AnswerSettings, *, max_denied_descriptors: int = MAX_DENIED_DESCRIPTORS
    ) -> None:
        self._max_denied_descriptors = max_denied_descriptors
        self.requests = Tally(in_shadow_mode=settings.shadow_mode)
        """Whole requests: denied when the overall code is OVER_LIMIT."""
        self.rules: dict[str, Tally] = {}
        """Descriptors by the name of the rule that limits them."""
        self.unlimited = 0
        """Descriptors that no rule limits."""
        self.denied_descriptors: dict[tuple[str, Entries], Tally] = {}
        """By (domain, entries), counted from the first denial on."""
        self.other_denials = 0
        """Denials of descriptors that are no longer in `denied_descriptors`."""
        self.late = 0
        """Requests older than the one before; they are decided at the time of that one."""
        self.first_us: int | None = None
        self.now_us = 0
        self._shadowed = {rule.name for rule in rules if rule.shadow_mode}
        self._until_sweep = _LEAST_TO_SWEEP
        self.limiter = Limiter(
            without_shadow_mode(made_local(rules)), Origin("replay", 1), replace(settings, shadow_mode=False)
        )
        """Decides all of them."""

    def let_pass(self, at_us: int) -> None:
        """Count a request without descriptors, which nothing limits."""
        self._advance(at_us)
        self.requests.count(False, self.now_us)
        self.unlimited += 1

    def ask(self, request: RateLimitRequest | Request, at_us: int) -> bool:
        """Replay one request.

        Args:
            at_us: when it was made, in microseconds since the epoch.

        Returns:
            True when it would have been denied.

        Raises:
            InvalidRequest: as `Limiter.decide`.
        """
        raw = request.SerializeToString()
        plan = self.limiter.plan(raw)
        self._advance(at_us)
        response = RateLimitResponse.FromString(self.limiter.decide(raw, self.now_us))
        denied: bool = response.overall_code == _OVER_LIMIT
        self.requests.count(denied, self.now_us)
        for take, entries, status in zip(plan.takes, plan.descriptors, response.statuses, strict=True):
            if take.rule is None:
                self.unlimited += 1
            else:
                self._count(plan.domain, take.rule.name, entries, status.code == _OVER_LIMIT)
        self._until_sweep -= len(plan.takes)
        if self._until_sweep <= 0:
            self._sweep()
        return denied

    def _advance(self, at_us: int) -> None:
        if self.first_us is None:
            self.first_us = at_us
        elif at_us < self.now_us:
            self.late += 1
        self.now_us = max(self.now_us, at_us)

    def _sweep(self) -> None:
        store = self.limiter.store
        store.sweep(self.now_us, len(store))
        self._until_sweep = max(_LEAST_TO_SWEEP, len(store))

    def _count(self, domain: str, rule_name: str, entries: Entries, denied: bool) -> None:
        tally = self.rules.get(rule_name)
        if tally is None:
            tally = self.rules[rule_name] = Tally(in_shadow_mode=rule_name in self._shadowed)
        tally.count(denied, self.now_us)
        of_descriptor = self.denied_descriptors.get((domain, entries))
        if of_descriptor is None:
            if not denied:
                return
            if len(self.denied_descriptors) >= self._max_denied_descriptors:
                self._give_up_half()
            of_descriptor = self.denied_descriptors[domain, entries] = Tally()
        of_descriptor.count(denied, self.now_us)

    def _give_up_half(self) -> None:
        by_denials = sorted(self.denied_descriptors.items(), key=lambda item: item[1].denied, reverse=True)
        half = self._max_denied_descriptors // 2
        self.denied_descriptors = dict(by_denials[:half])
        self.other_denials += sum(tally.denied for _, tally in by_denials[half:])
