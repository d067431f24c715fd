"""The decision: raw RateLimitRequest in, raw RateLimitResponse out, from memory, at an instant given by the caller.

A *plan* says which buckets a request takes from and how much. It is a pure function of the request's bytes and the
rules, so it is kept by those bytes in a bounded cache: a proxy sends the same few thousand requests over and over.
What is in the answer besides codes and levels is `answer.py`'s affair.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

from envoy.extensions.common.ratelimit.v3.ratelimit_pb2 import RateLimitDescriptor
from envoy.service.ratelimit.v3.rls_pb2 import RateLimitRequest, RateLimitResponse
from google.protobuf.message import DecodeError

from ratelimit_sidecar.crdt.bucket import Bucket, Origin
from ratelimit_sidecar.crdt.ledger import Ledger
from ratelimit_sidecar.crdt.limit import AnyLimit, Limit, Window, WindowLimit
from ratelimit_sidecar.crdt.store import DEFAULT_MAX_BUCKETS, Store, StoreFull
from ratelimit_sidecar.limiter.answer import Extras
from ratelimit_sidecar.limiter.counts import CountsByRule
from ratelimit_sidecar.limiter.key import is_of_rule_alone, overflow_key
from ratelimit_sidecar.limiter.plan import Plan, Step
from ratelimit_sidecar.limiter.rules import Consistency, Match, Rules, Unit
from ratelimit_sidecar.limiter.settings import Settings

PLAN_CACHE_REQUESTS = 16_384
"""Plans kept; with `PLAN_CACHE_MAX_BYTES` this bounds the cache's memory."""

PLAN_CACHE_MAX_BYTES = 1_024
"""A longer request is planned anew each time."""

_UNLIMITED_REMAINING = 2**32 - 1

_MAX_DURATION_US = 315_576_000_000 * 1_000_000
"""The largest google.protobuf.Duration: 10,000 years."""

_OK = RateLimitResponse.OK
_OVER_LIMIT = RateLimitResponse.OVER_LIMIT


class InvalidRequest(Exception):
    """A request that no rule can answer; its text is for the caller."""


class Limiter:
    """Decides for every front end.

    Args:
        origin: this replica.
        ledger: the strict buckets; None where no rule is strict.
        max_buckets: other keys than the first so many share one bucket for each rule, until there is room again.

    Raises:
        ValueError: a rule is strict and there is no ledger.
    """

    def __init__(
        self,
        rules: Rules,
        origin: Origin,
        settings: Settings | None = None,
        ledger: Ledger | None = None,
        *,
        max_buckets: int = DEFAULT_MAX_BUCKETS,
    ) -> None:
        self.settings = settings or Settings()
        self.store = Store(
            origin, rules.replicated_limit_of_key, max_buckets=max_buckets, has_room_always=is_of_rule_alone
        )
        self.ledger = ledger
        self.jumped_us = 0
        """What the clock has stepped forward since start; strict buckets are given the time without it."""
        self.counts = CountsByRule()
        self.overflow_decisions: Counter[tuple[str, str]] = Counter()
        """Of `counts`, by (domain, name of the rule): descriptors decided by an overflow bucket."""
        self._extras = Extras(self.settings)
        self._cached_plan = lru_cache(maxsize=PLAN_CACHE_REQUESTS)(self._make_plan)
        self.use_rules(rules)

    def use_rules(self, rules: Rules) -> None:
        """Decide by other rules from now on.

        Buckets keep what was taken; one whose limit has changed enforces the new one from its next use on.

        Raises:
            ValueError: a rule is strict and there is no ledger; the rules before stay in force.
        """
        if self.ledger is None:
            if any(rule.consistency is Consistency.STRICT for rule in rules):
                raise ValueError("a strict rule needs the members among whom its limit is shared")
        else:
            self.ledger.limit_of_key = rules.strict_limit_of_key
        self.rules = rules
        self.store.limit_of_key = rules.replicated_limit_of_key
        self._cached_plan.cache_clear()

    def decide(self, request: bytes, now_us: int) -> bytes:
        """Answer one `envoy.service.ratelimit.v3.RateLimitRequest`.

        Every descriptor is decided on its own: one that is over its limit does not keep the others from being
        charged, as in envoyproxy/ratelimit.

        Args:
            now_us: wall clock in microseconds, never less than in the call before.

        Returns:
            A serialized RateLimitResponse, its statuses in the order of the descriptors.

        Raises:
            InvalidRequest: not a RateLimitRequest, no domain, no descriptors, or a descriptor without entries.
        """
        plan = self.plan(request)
        response = RateLimitResponse()
        over = quotas_over = 0
        buckets: list[Bucket | None] = []
        for step in plan.steps:
            bucket = None
            status = response.statuses.add(code=_OK)
            rule = step.rule
            if rule is None:
                step.counts.ok += 1
            elif rule.limit is None:
                status.limit_remaining = _UNLIMITED_REMAINING
                step.counts.pass_unlimited(step.hits)
            else:
                at_us = now_us - self.jumped_us if step.is_strict else now_us
                bucket = self._bucket(plan.domain, step, rule.limit, at_us)
                admitted = bucket.take(step.hits, at_us, always=rule.charge_always)
                remaining = bucket.remaining
                step.counts.count(step, admitted, bucket)
                if not admitted and not rule.shadow_mode:
                    status.code = _OVER_LIMIT
                    if step.is_quota:
                        quotas_over += 1
                    else:
                        over += 1
                status.current_limit.CopyFrom(step.current_limit)
                status.limit_remaining = min(remaining, _UNLIMITED_REMAINING)
                seconds, micros = divmod(min(bucket.full_in_us, _MAX_DURATION_US), 1_000_000)
                status.duration_until_reset.seconds = seconds
                status.duration_until_reset.nanos = micros * 1_000
            buckets.append(bucket)
        is_over = over > 0 or quotas_over == plan.quotas > 0
        response.overall_code = _OVER_LIMIT if is_over and not self.settings.shadow_mode else _OK
        if plan.has_extras:
            self._extras.add(response, plan, buckets)
        raw: bytes = response.SerializeToString()
        return raw

    def plan(self, request: bytes) -> Plan:
        """What `decide` would take for that request.

        Raises:
            InvalidRequest: as `decide`.
        """
        if len(request) > PLAN_CACHE_MAX_BYTES:
            return self._make_plan(request)
        return self._cached_plan(request)

    def _bucket(self, domain: str, step: Step, limit: AnyLimit, at_us: int) -> Bucket:
        try:
            return self._bucket_of_key(step, step.bucket_key, limit, at_us)
        except StoreFull:
            key = overflow_key(step.bucket_key)
            rule = self.rules.rule_of_key(key)
            assert rule is not None
            assert rule.limit is not None
            self.overflow_decisions[self._label(domain), rule.name] += 1
            return self._bucket_of_key(step, key, rule.limit, at_us)

    def _bucket_of_key(self, step: Step, key: bytes, limit: AnyLimit, at_us: int) -> Bucket:
        if step.is_strict:
            assert self.ledger is not None
            assert isinstance(limit, Limit)
            return self.ledger.bucket(key, limit, at_us)
        return self.store.bucket(key, limit, at_us, replicated=step.is_replicated)

    def _make_plan(self, raw: bytes) -> Plan:
        try:
            request = RateLimitRequest.FromString(raw)
        except DecodeError as error:
            raise InvalidRequest("not an envoy.service.ratelimit.v3.RateLimitRequest") from error
        if not request.domain:
            raise InvalidRequest("rate limit domain must not be empty")
        if not request.descriptors:
            raise InvalidRequest("rate limit descriptor list must not be empty")
        for index, descriptor in enumerate(request.descriptors):
            if not descriptor.entries:
                raise InvalidRequest(f"rate limit descriptor {index} must have entries")
        matches = [self._match(request.domain, descriptor) for descriptor in request.descriptors]
        replaced = {name for match in matches if match is not None for name in match.rule.replaces}
        hits = request.hits_addend or 1
        steps = [
            self._make_step(
                request.domain,
                None if match is not None and match.rule.limit_name in replaced else match,
                descriptor.hits_addend.value if descriptor.HasField("hits_addend") else hits,
            )
            for match, descriptor in zip(matches, request.descriptors, strict=True)
        ]
        return Plan(
            domain=request.domain,
            steps=tuple(steps),
            quotas=sum(step.is_quota for step in steps),
            hits=hits,
            descriptors=tuple(
                tuple((entry.key, entry.value) for entry in descriptor.entries) for descriptor in request.descriptors
            ),
            has_extras=self._extras.are_wanted(steps),
        )

    def _label(self, domain: str) -> str:
        """Only names from the rules become labels of a metric: callers can invent any domain."""
        return domain if domain in self.rules.domains else ""

    def _match(self, domain: str, descriptor: RateLimitDescriptor) -> Match | None:
        entries = [(entry.key, entry.value) for entry in descriptor.entries]
        if descriptor.HasField("limit"):
            override = descriptor.limit
            unit = _UNITS.get(override.unit)
            if unit is None:
                raise InvalidRequest(f"rate limit override has unknown unit {override.unit}")
            match = self.rules.override(domain, entries, override.requests_per_unit, unit)
            if match is not None:
                return match
        return self.rules.match(domain, entries)

    def _make_step(self, domain: str, match: Match | None, hits: int) -> Step:
        label = self._label(domain)
        if match is None:
            # As in envoyproxy/ratelimit: in global quota mode what is not limited is a quota that passes.
            return Step(None, b"", hits, None, self.counts.of(label, "", ""), is_quota=self.settings.quota_mode)
        rule = match.rule
        current_limit = RateLimitResponse.RateLimit(
            name=rule.limit_name,
            requests_per_unit=rule.requests_per_unit,
            unit=RateLimitResponse.RateLimit.UNKNOWN if rule.unit is None else rule.unit.name,
        )
        return Step(
            rule,
            match.bucket_key,
            hits,
            current_limit,
            self.counts.of(label, match.metric_name, rule.name),
            is_replicated=rule.consistency is Consistency.EVENTUAL,
            is_strict=rule.consistency is Consistency.STRICT,
            charges_denied=rule.charge_always or _is_fixed_window(rule.limit),
            is_quota=rule.limit is not None and (rule.quota_mode or self.settings.quota_mode),
            near_from=int(rule.limit.capacity * self.settings.near_limit_ratio) if rule.limit is not None else 0,
        )


def _is_fixed_window(limit: AnyLimit | None) -> bool:
    return isinstance(limit, WindowLimit) and limit.window is Window.FIXED


_UNITS = {number: Unit[name] for name, number in RateLimitResponse.RateLimit.Unit.items() if name in Unit.__members__}
"""Envoy's enumerations of units, here and in an override (type.v3.RateLimitUnit)."""
