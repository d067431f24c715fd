"""The decision: raw RateLimitRequest in, raw RateLimitResponse out, from memory, at an instant given by the caller.

A *plan* says which buckets a request takes from and how much. It is a pure function of the request's bytes and the
rules, so it is kept by those bytes in a bounded cache: a proxy sends the same few thousand requests over and over.
`decorations.py` adds headers, bodies and metadata to the answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from ratelimit_sidecar.crdt.bucket import Bucket, Origin
from ratelimit_sidecar.crdt.journal import DEFAULT_MAX_RECEIVED_BYTES
from ratelimit_sidecar.crdt.ledger import Ledger
from ratelimit_sidecar.crdt.limit import AnyLimit, TokenBucketLimit, Window, WindowLimit
from ratelimit_sidecar.crdt.store import DEFAULT_MAX_BUCKETS, Store, StoreFull
from ratelimit_sidecar.crdt.waiting import PendingDecision
from ratelimit_sidecar.crdt.window import FixedWindow, SlidingWindow
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2 import RateLimitResponse
from ratelimit_sidecar.limiter.counts import CountsByRule, counts_of, has_room_for
from ratelimit_sidecar.limiter.decorations import Decorations, metadata_of_request
from ratelimit_sidecar.limiter.encoding import (
    OVERALL_OK,
    OVERALL_OVER_LIMIT,
    bare_status,
    encode_status,
    status_head,
)
from ratelimit_sidecar.limiter.key import overflow_keys, rule_key
from ratelimit_sidecar.limiter.plan import CompiledRule, Plan, PlannedTake
from ratelimit_sidecar.limiter.plan_cache import MAX_PLANS_BYTES, PlanCache
from ratelimit_sidecar.limiter.request import Descriptor, read_request
from ratelimit_sidecar.limiter.rules import Charge, Consistency, Match, Rule, Rules, Unit
from ratelimit_sidecar.limiter.settings import AnswerSettings

MAX_HITS: Final = 2**48
"""The most hits of a descriptor; more count as this many. No limit is as large, and deltas cannot carry more."""

MAX_WAITING_BYTES: Final = 4_096
"""A longer request never waits, since requests that wait are kept in memory."""

_MAX_UINT32: Final = 2**32 - 1

_OK: Final = RateLimitResponse.OK
_OVER_LIMIT: Final = RateLimitResponse.OVER_LIMIT


class PlanCounts(NamedTuple):
    """How often since start the plan of a request was in the cache (hits), and how often it had to be made (misses)."""

    hits: int
    misses: int


@dataclass(slots=True)
class Retired:
    """The rules, plans and counters that a rules change replaced.

    Free them in small steps (`rules_source.reloader`); freeing all at once takes tens of milliseconds.
    """

    rules: Rules | None
    plans: dict[bytes, Plan]
    compiled: dict[int, CompiledRule]
    counts: CountsByRule
    """Empty when the counters are kept."""


class Limiter:
    """Decides requests for every front end. `decide` answers one; call `use_rules` when the rules change.

    Args:
        origin: this replica.
        ledger: the strict buckets; None if no rule may be strict.
        max_buckets: the most buckets at once. When a rule has too many, or there is no room for new keys, these share
            overflow buckets.
        max_received_bytes: the most memory that what other replicas took may take.
        sliding_places: as how many of `max_buckets` a sliding window counts.
        max_plan_bytes: see `PlanCache`.

    Raises:
        ValueError: a rule is strict and there is no ledger.
    """

    def __init__(
        self,
        rules: Rules,
        origin: Origin,
        settings: AnswerSettings | None = None,
        ledger: Ledger | None = None,
        *,
        max_buckets: int = DEFAULT_MAX_BUCKETS,
        max_received_bytes: int = DEFAULT_MAX_RECEIVED_BYTES,
        sliding_places: int = 1,
        max_plan_bytes: int = MAX_PLANS_BYTES,
    ) -> None:
        self.settings = settings or AnswerSettings()
        self.store = Store(
            origin,
            rules.replicated_limit_of_key,
            max_buckets=max_buckets,
            max_received_bytes=max_received_bytes,
            sliding_places=sliding_places,
            rule_key=rule_key,
        )
        self.ledger = ledger
        self.clock_steps_us = 0
        """The sum of the clock's steps since start: `now_us` less this is `strict_us`, which never steps."""
        self.counts: CountsByRule = {}
        self.overflow_decisions: Counter[tuple[str, str]] = Counter()
        """Descriptors that an overflow bucket decided, by (domain, rule name). They are also in `counts`."""
        self.ignored_overrides = 0
        """Limits in descriptors that were ignored since start because their unit is unknown."""
        self._decorations = Decorations(self.settings)
        # As in envoyproxy/ratelimit: in global quota mode a descriptor without limit counts as a quota that admits.
        self._unlimited = CompiledRule(
            None,
            None,
            bare_status(_OK, 0),
            in_quota_mode=self.settings.quota_mode,
            is_decorated=self._decorations.are_wanted(None),
        )
        self._compiled: dict[int, CompiledRule] = {}
        """Compiled rules, by `id` of the rule."""
        self._max_plan_bytes = max_plan_bytes
        self._plans = PlanCache(max_plan_bytes)
        self._plan_hits = self._plan_misses = 0
        self.last_plan: Plan | None = None
        """The plan of the last request, kept for tracing, because making the plan of a large request again
        takes long.
        """
        self.rules = rules
        self.generation = 0
        """Counts up with each rules change."""
        self._use_strict_rules(rules)

    def use_rules(self, rules: Rules) -> Retired:
        """Decide by other rules from now on.

        Buckets keep their takes; one whose limit has changed enforces the new limit from its next use on. This takes
        the same time however many rules and plans there are.

        Returns:
            What was replaced, to be freed in steps.

        Raises:
            ValueError: a rule is strict and there is no ledger; the former rules stay in force.
        """
        self._use_strict_rules(rules)
        retired = Retired(self.rules, self._plans.plans, self._compiled, {})
        if not has_room_for(self.counts, rules.names):
            # Counters may restart at zero: to Prometheus that is a restart of the process.
            retired.counts, self.counts = self.counts, {}
            self.overflow_decisions = Counter()
        if self.ledger is not None:
            self.ledger.queues.end_all()
        self.rules = rules
        self.generation += 1
        self.store.limit_of_key = rules.replicated_limit_of_key
        self._plans = PlanCache(self._max_plan_bytes)
        self._compiled = {}
        self.last_plan = None
        return retired

    def _use_strict_rules(self, rules: Rules) -> None:
        if self.ledger is not None:
            self.ledger.limit_of_key = rules.strict_limit_of_key
        elif rules.has_strict:
            raise ValueError("a strict rule needs the members among whom its limit is shared")

    def decide(self, request: bytes, now_us: int, all_headers: bool = False) -> bytes:
        """Answer one `envoy.service.ratelimit.v3.RateLimitRequest`.

        Every descriptor is decided on its own, as in envoyproxy/ratelimit: if one is over its limit, the others are
        still charged. Domains with `all_or_nothing` are the exception.

        Args:
            now_us: wall clock in microseconds; not less than in the call before, unless the clock was set back.
            all_headers: True adds headers for all limits, and Retry-After to a denial, whatever settings and rules
                say. It is for proxies that add no headers of their own.

        Returns:
            A serialized RateLimitResponse, its statuses in the order of the descriptors.

        Raises:
            InvalidRequest: see `read_request`. A client of the proxy cannot cause it; that matters because Envoy lets
                requests pass whose answer is an error.
        """
        plan = self.last_plan = self.plan(request)
        return self._decide(plan, now_us, all_headers)

    def decide_or_wait(self, request: bytes, now_us: int, all_headers: bool = False) -> bytes | PendingDecision:
        """As `decide`, but a request may wait if exactly one of its buckets is short, and that bucket's rule has
        `wait`.

        No token is taken and no decision counted while it waits; the bucket notes the demand. When the wait ends it is
        decided as by `decide`, by the rules in force then.
        """
        plan = self.last_plan = self.plan(request)
        if plan.may_wait and len(request) <= MAX_WAITING_BYTES:
            waiting = self._wait(plan, request, now_us, all_headers)
            if waiting is not None:
                return waiting
        return self._decide(plan, now_us, all_headers)

    def _wait(self, plan: Plan, request: bytes, now_us: int, all_headers: bool) -> PendingDecision | None:
        short: PlannedTake | None = None
        key = b""
        for take in plan.takes:
            compiled = take.compiled
            if compiled.limit is None or compiled.is_shadow:
                continue
            at_us = self._time_of(compiled, now_us)
            bucket = self._bucket(take, compiled.limit, at_us)
            # A short strict bucket notes the demand here, and again when the request is decided.
            if bucket.would_admit(take.hits, at_us):
                continue
            if short is not None or not take.may_wait:
                return None
            short, key = take, bucket.key
        if short is None:
            return None
        assert self.ledger is not None

        def decide(strict_us: int) -> bytes:
            return self.decide(request, strict_us + self.clock_steps_us, all_headers)

        waiting = PendingDecision(short.hits, decide, short.compiled.wait_us)
        return waiting if self.ledger.wait(key, waiting, now_us - self.clock_steps_us) else None

    def _time_of(self, compiled: CompiledRule, now_us: int) -> int:
        """The time by the clock of the rule's buckets: that of strict ones never steps."""
        return now_us - self.clock_steps_us if compiled.is_strict else now_us

    def _decide(self, plan: Plan, now_us: int, all_headers: bool) -> bytes:
        """Take from each bucket and write the answer.

        A request that is denied in an `all_or_nothing` domain `withholds`: its takes are only tried, except those that
        are always charged.
        """
        if plan.gives_back:
            self._give_back(plan, now_us)
        withholds = plan.all_or_nothing and self._is_denied(plan, now_us)
        statuses = b""
        over = quota_mode_over = 0
        store_version = self.store.removals
        buckets: list[Bucket | None] = []
        for take in plan.takes:
            compiled, hits, counts = take.compiled, take.hits, take.counts
            if compiled.limit is None:
                counts.count_unlimited(hits, is_ruled=compiled.rule is not None)
                statuses += compiled.ok_head
                buckets.append(None)
                continue
            at_us = self._time_of(compiled, now_us)
            bucket = take.bucket
            if bucket is None or take.store_version != store_version or bucket.limit is not take.limit:
                bucket = self._bucket(take, compiled.limit, at_us)
                if bucket.key != take.bucket_key:
                    self._note_overflow(plan.domain, take)
            is_charged = not withholds or take.charges_always
            is_admitted = (
                bucket.take(hits, at_us, always=take.charges_always) if is_charged else bucket.would_admit(hits, at_us)
            )
            if is_admitted:
                remaining = bucket.remaining
                counts.ok += 1
                if is_charged:
                    counts.admitted_hits += hits
                    near = bucket.limit.capacity - remaining - compiled.near_from
                    if near > 0:
                        counts.near_limit_hits += min(hits, near)
                beginning = compiled.ok_head
            else:
                remaining = bucket.remaining
                counts.count_denied(take, bucket, is_charged=is_charged)
                beginning = compiled.over_head
                if not compiled.is_shadow:
                    if compiled.in_quota_mode:
                        quota_mode_over += 1
                    else:
                        over += 1
            statuses += encode_status(beginning, remaining, bucket.full_in_us)
            buckets.append(bucket)
        is_denied = _is_over(plan, over, quota_mode_over) and not self.settings.shadow_mode
        overall = OVERALL_OVER_LIMIT if is_denied else OVERALL_OK
        answer = overall + statuses
        return self._decorated(answer, plan, buckets, all_headers) if plan.is_decorated or all_headers else answer

    def _give_back(self, plan: Plan, now_us: int) -> None:
        """Give tokens back before any are taken, whatever the order of the descriptors.

        Only token buckets that are not strict give back: what several sidecars give back of one window is not summed,
        so takes of others would be forgotten.
        """
        for take in plan.takes:
            if take.gives_back and not take.compiled.is_strict and isinstance(take.compiled.limit, TokenBucketLimit):
                take.counts.given_back += self._bucket_at(take, now_us).give_back(take.gives_back, now_us)

    def rlqs_take(self, domain: str, entries: Sequence[tuple[str, str]]) -> PlannedTake:
        """The take of a descriptor that an Envoy decides by itself (RLQS), for `charge`, `used` and `left_within`. It
        belongs to the current rules.

        Args:
            entries: texts from `text_of`.
        """
        return self._make_take(domain, self.rules.match(domain, entries) if entries else None, 1, None)

    def charge(self, take: PlannedTake, hits: int, now_us: int) -> None:
        """Take hits that an Envoy has admitted. If there are too few tokens, the missing ones become debt."""
        self._bucket_at(take, now_us).take(min(hits, MAX_HITS), now_us, always=True)

    def used(self, take: PlannedTake, now_us: int) -> int:
        """Tokens taken of a token bucket, those beyond the limit included."""
        bucket = self._bucket_at(take, now_us)
        bucket.advance(now_us)
        return bucket.limit.capacity - bucket.remaining + bucket.debt

    def left_within(self, take: PlannedTake, us: int, now_us: int) -> int:
        """Tokens of a window that can be taken evenly in the next `us` microseconds."""
        bucket = self._bucket_at(take, now_us)
        assert isinstance(bucket, (FixedWindow, SlidingWindow))
        bucket.advance(now_us)
        return bucket.left_within(us)

    def _bucket_at(self, take: PlannedTake, now_us: int) -> Bucket:
        bucket = take.bucket
        if bucket is None or take.store_version != self.store.removals or bucket.limit is not take.limit:
            assert take.compiled.limit is not None
            bucket = self._bucket(take, take.compiled.limit, now_us)
        return bucket

    def _is_denied(self, plan: Plan, now_us: int) -> bool:
        """Return whether `decide` would deny the request, without charging anything; see `Bucket.would_admit`."""
        over = quota_mode_over = 0
        for take in plan.takes:
            compiled = take.compiled
            if compiled.limit is None or compiled.is_shadow:
                continue
            at_us = self._time_of(compiled, now_us)
            if not self._bucket(take, compiled.limit, at_us).would_admit(take.hits, at_us):
                if compiled.in_quota_mode:
                    quota_mode_over += 1
                else:
                    over += 1
        return _is_over(plan, over, quota_mode_over)

    def _decorated(self, answer: bytes, plan: Plan, buckets: Sequence[Bucket | None], all_headers: bool) -> bytes:
        response = RateLimitResponse.FromString(answer)
        self._decorations.add(response, plan, buckets, all_headers)
        raw: bytes = response.SerializeToString()
        return raw

    def plan(self, request: bytes) -> Plan:
        """The plan of a request: what `decide` would take.

        Raises:
            InvalidRequest: as `decide`.
        """
        plan = self._plans.plans.get(request)
        if plan is not None:
            self._plan_hits += 1
            return plan
        ignored = self.ignored_overrides
        plan = self._make_plan(request)
        self._plan_misses += 1
        if self.ignored_overrides == ignored:
            self._plans.keep(request, plan)
        return plan

    @property
    def plan_counts(self) -> PlanCounts:
        """How often since start a plan was in the cache, and how often it was made."""
        return PlanCounts(self._plan_hits, self._plan_misses)

    def _note_overflow(self, domain: str, take: PlannedTake) -> None:
        rule = take.rule
        assert rule is not None
        self.overflow_decisions[self._label(domain), rule.name] += 1

    def _bucket(self, take: PlannedTake, limit: AnyLimit, at_us: int) -> Bucket:
        """The take's bucket, or an overflow bucket if there is no room for it."""
        try:
            bucket = self._bucket_of_key(take, take.bucket_key, limit, at_us)
        except StoreFull:
            return self._overflow_bucket(take, at_us)
        # A ledger drops its buckets by itself, which `Store.removals` does not count.
        if not take.compiled.is_strict:
            take.bucket, take.store_version, take.limit = bucket, self.store.removals, bucket.limit
        return bucket

    def _overflow_bucket(self, take: PlannedTake, at_us: int) -> Bucket:
        for key in overflow_keys(take.bucket_key):
            limit = take.compiled.limit
            if not isinstance(limit, WindowLimit):
                # The limit of a request is rounded in the bucket key, so that there are few such buckets. A rule whose
                # usage Envoys have reported may be gone when it is charged.
                rule = self.rules.rule_of_key(key)
                limit = limit if rule is None else rule.limit
            assert limit is not None
            try:
                return self._bucket_of_key(take, key, limit, at_us)
            except StoreFull:
                continue
        raise AssertionError("the last overflow bucket of a rule has room always")

    def _bucket_of_key(self, take: PlannedTake, key: bytes, limit: AnyLimit, at_us: int) -> Bucket:
        if take.compiled.is_strict:
            assert self.ledger is not None
            assert isinstance(limit, TokenBucketLimit)
            return self.ledger.bucket(key, limit, at_us)
        return self.store.bucket(key, limit, at_us, replicated=take.compiled.is_replicated)

    def _make_plan(self, raw: bytes) -> Plan:
        request = read_request(raw)
        domain = request.domain
        hits = request.hits or 1
        replaced: frozenset[str] = frozenset()
        matches: list[Match | None] = []
        for descriptor in request.descriptors:
            match = self._match(domain, descriptor)
            matches.append(match)
            if match is not None and match.rule.replaces:
                replaced |= match.rule.replaces
        takes: list[PlannedTake] = []
        quota_mode_takes = 0
        gives_back = is_decorated = may_wait = False
        for at, descriptor in enumerate(request.descriptors):
            match = matches[at]
            if replaced and match is not None and _is_replaced(match.rule, replaced):
                match = None
            is_negative = descriptor.is_negative
            take = self._make_take(domain, match, hits, descriptor.hits, is_negative)
            takes.append(take)
            gives_back = gives_back or is_negative
            quota_mode_takes += take.compiled.in_quota_mode
            is_decorated = is_decorated or take.compiled.is_decorated
            may_wait = may_wait or take.may_wait
        if gives_back:
            _charge_what_was_used(takes)
        wants_metadata = self.settings.dynamic_metadata
        return Plan(
            domain,
            tuple(takes),
            quota_mode_takes=quota_mode_takes,
            metadata=metadata_of_request(request, takes) if wants_metadata else None,
            descriptors=tuple([tuple(descriptor.entries) for descriptor in request.descriptors]),
            gives_back=gives_back,
            is_decorated=is_decorated,
            # In shadow mode nothing is denied.
            all_or_nothing=domain in self.rules.all_or_nothing and not self.settings.shadow_mode,
            may_wait=may_wait and not gives_back and not self.settings.shadow_mode,
        )

    def _label(self, domain: str) -> str:
        """The domain as a label of metrics: "" unless it is in the rules, since callers can invent domains."""
        return domain if domain in self.rules.domains else ""

    def _match(self, domain: str, descriptor: Descriptor) -> Match | None:
        entries, override = descriptor.entries, descriptor.limit
        if override is not None:
            unit = _UNITS.get(override.unit)
            if unit is not None and override.unit_multiplier > 1:
                unit = _UNITS_OF_SECONDS.get(unit.value * override.unit_multiplier)
            match = None
            if unit is None:
                self.ignored_overrides += 1
            else:
                match = self.rules.override(domain, entries, override.requests_per_unit, unit)
            if match is not None:
                return match
        # Without entries it is not limited, as in envoyproxy/ratelimit.
        return self.rules.match(domain, entries) if entries else None

    def _make_take(
        self, domain: str, match: Match | None, hits: int, own_hits: int | None, is_negative: bool = False
    ) -> PlannedTake:
        """Make the take of one descriptor.

        Args:
            hits: the hits of the request.
            own_hits: the hits of the descriptor; None if it has none.
            is_negative: True if the hits are to be given back.
        """
        if own_hits is not None:
            hits = own_hits
        gives_back = 0
        if is_negative:
            hits, gives_back = 0, min(hits, MAX_HITS)
        if match is None:
            return PlannedTake(self._unlimited, b"", hits, counts_of(self.counts, self._label(domain), "", ""))
        rule = match.rule
        compiled = self._compiled.get(id(rule))
        if compiled is None:
            compiled = self._compile(rule)
            if not match.is_override:
                # It refers to the rule, so no other object can get the same id.
                self._compiled[id(rule)] = compiled
        counts = counts_of(self.counts, self._label(domain), match.metric_name, rule.name)
        always = rule.charge is Charge.ALWAYS or (rule.charge is Charge.REPORTED and own_hits is not None)
        return PlannedTake(
            compiled,
            match.bucket_key,
            min(hits, MAX_HITS),
            counts,
            gives_back=gives_back,
            charges_always=always,
            charges_denied=always or _is_fixed_window(rule.limit),
        )

    def _compile(self, rule: Rule) -> CompiledRule:
        if rule.limit is None:
            return CompiledRule(
                rule, None, bare_status(_OK, _MAX_UINT32), is_decorated=self._decorations.are_wanted(rule)
            )
        current_limit = RateLimitResponse.RateLimit(
            name=rule.limit_name,
            requests_per_unit=rule.requests_per_unit,
            unit=RateLimitResponse.RateLimit.UNKNOWN if rule.unit is None else rule.unit.name,
        )
        return CompiledRule(
            rule,
            rule.limit,
            status_head(_OK, current_limit),
            status_head(_OK if rule.shadow_mode else _OVER_LIMIT, current_limit),
            is_shadow=rule.shadow_mode,
            is_replicated=rule.consistency is Consistency.EVENTUAL,
            is_strict=rule.consistency is Consistency.STRICT,
            in_quota_mode=rule.quota_mode or self.settings.quota_mode,
            near_from=int(rule.limit.capacity * self.settings.near_limit_ratio),
            is_decorated=self._decorations.are_wanted(rule),
            wait_us=rule.wait_us if rule.consistency is Consistency.STRICT else 0,
        )


def _charge_what_was_used(takes: Sequence[PlannedTake]) -> None:
    """Charge takes always if the same request also gives tokens back to their bucket. Their hits are the real usage,
    which is already spent, so they count even over the limit.
    """
    given_back = {take.bucket_key for take in takes if take.gives_back}
    for take in takes:
        if take.bucket_key in given_back:
            take.charges_always = take.charges_denied = True


def _is_over(plan: Plan, over: int, quota_mode_over: int) -> bool:
    """Whether the request is denied.

    Args:
        over: the number of takes over their limit that are not in quota mode.
        quota_mode_over: the number of those in quota mode.
    """
    return over > 0 or quota_mode_over == plan.quota_mode_takes > 0


def _is_replaced(rule: Rule, replaced: frozenset[str]) -> bool:
    """Whether another rule's `replaces` names this one. An unlimited rule cannot be replaced, as in
    envoyproxy/ratelimit.
    """
    return rule.limit is not None and rule.limit_name in replaced


def _is_fixed_window(limit: AnyLimit | None) -> bool:
    return isinstance(limit, WindowLimit) and limit.window is Window.FIXED


_UNITS = {number: Unit[name] for name, number in RateLimitResponse.RateLimit.Unit.items() if name in Unit.__members__}
"""Units by their number in Envoy's enumerations, of answers and of overrides (type.v3.RateLimitUnit)."""

_UNITS_OF_SECONDS = {unit.value: unit for unit in Unit}
"""Units by their seconds, so that 24 hours are a day. Answers cannot express other periods."""
