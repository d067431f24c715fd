"""The decision: raw RateLimitRequest in, raw RateLimitResponse out, from memory, at an instant given by the caller.

A *plan* says which buckets a request takes from and how much. It is a pure function of the request's bytes and the
rules, so it is kept by those bytes in a bounded cache: a proxy sends the same few thousand requests over and over.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from envoy.service.ratelimit.v3.rls_pb2 import RateLimitRequest, RateLimitResponse
from google.protobuf.message import DecodeError

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.limiter.rules import Consistency, Rule, Rules

PLAN_CACHE_REQUESTS = 16_384
"""Plans kept; with `PLAN_CACHE_MAX_BYTES` this bounds the cache's memory."""

PLAN_CACHE_MAX_BYTES = 1_024
"""A longer request is planned anew each time."""

_UNLIMITED_REMAINING = 2**32 - 1

_OK = RateLimitResponse.OK
_OVER_LIMIT = RateLimitResponse.OVER_LIMIT


class InvalidRequest(Exception):
    """A request that no rule can answer; its text is for the caller."""


@dataclass(slots=True)
class RuleCounts:
    """What one rule decided since start."""

    ok: int = 0
    """Descriptors admitted."""
    over_limit: int = 0
    """Descriptors denied."""
    tokens: int = 0
    """Tokens taken."""


@dataclass(frozen=True, slots=True)
class Step:
    """One descriptor of a request: what to take from which bucket.

    Args:
        rule: None when the descriptor is not limited.
        hits: tokens; 0 checks and charges nothing.
    """

    rule: Rule | None
    bucket_key: bytes
    hits: int
    current_limit: RateLimitResponse.RateLimit | None
    counts: RuleCounts


@dataclass(frozen=True, slots=True)
class Plan:
    domain: str
    steps: tuple[Step, ...]


class Limiter:
    """Decides for every front end.

    Args:
        origin: this replica.
    """

    def __init__(self, rules: Rules, origin: Origin) -> None:
        self.rules = rules
        self.store = Store(origin, rules.replicated_limit_of_key)
        self.counts: dict[tuple[str, str], RuleCounts] = {}
        """By (domain, rule name); descriptors that no rule limits count under the name ""."""
        self._cached_plan = lru_cache(maxsize=PLAN_CACHE_REQUESTS)(self._make_plan)

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
        response = RateLimitResponse(overall_code=_OK)
        for step in self.plan(request).steps:
            status = response.statuses.add(code=_OK)
            counts = step.counts
            rule = step.rule
            if rule is None:
                counts.ok += 1
                continue
            if rule.limit is None:
                status.limit_remaining = _UNLIMITED_REMAINING
                counts.ok += 1
                counts.tokens += step.hits
                continue
            bucket = self.store.bucket(
                step.bucket_key, rule.limit, now_us, replicated=rule.consistency is not Consistency.LOCAL
            )
            if bucket.take(step.hits, now_us):
                counts.ok += 1
                counts.tokens += step.hits
            else:
                status.code = _OVER_LIMIT
                response.overall_code = _OVER_LIMIT
                counts.over_limit += 1
            status.current_limit.CopyFrom(step.current_limit)
            status.limit_remaining = min(bucket.remaining, _UNLIMITED_REMAINING)
            seconds, micros = divmod(bucket.full_in_us, 1_000_000)
            status.duration_until_reset.seconds = seconds
            status.duration_until_reset.nanos = micros * 1_000
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

    def _make_plan(self, raw: bytes) -> Plan:
        try:
            request = RateLimitRequest.FromString(raw)
        except DecodeError as error:
            raise InvalidRequest("not an envoy.service.ratelimit.v3.RateLimitRequest") from error
        if not request.domain:
            raise InvalidRequest("rate limit domain must not be empty")
        if not request.descriptors:
            raise InvalidRequest("rate limit descriptor list must not be empty")
        hits = request.hits_addend or 1
        steps = []
        for index, descriptor in enumerate(request.descriptors):
            if not descriptor.entries:
                raise InvalidRequest(f"rate limit descriptor {index} must have entries")
            entries = [(entry.key, entry.value) for entry in descriptor.entries]
            own_hits = descriptor.hits_addend.value if descriptor.HasField("hits_addend") else hits
            steps.append(self._make_step(request.domain, entries, own_hits))
        return Plan(request.domain, tuple(steps))

    def _make_step(self, domain: str, entries: list[tuple[str, str]], hits: int) -> Step:
        match = self.rules.match(domain, entries)
        # Only names from the rules become labels of a metric: callers can invent any domain.
        label = domain if domain in self.rules.domains else ""
        if match is None:
            return Step(None, b"", hits, None, self._counts_of(label, ""))
        rule = match.rule
        current_limit = RateLimitResponse.RateLimit(
            requests_per_unit=rule.requests_per_unit,
            unit=RateLimitResponse.RateLimit.UNKNOWN if rule.unit is None else rule.unit.name,
        )
        return Step(rule, match.bucket_key, hits, current_limit, self._counts_of(label, rule.name))

    def _counts_of(self, domain: str, rule_name: str) -> RuleCounts:
        return self.counts.setdefault((domain, rule_name), RuleCounts())
