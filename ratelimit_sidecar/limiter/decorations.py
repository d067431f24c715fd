"""Response decorations: headers, a body and dynamic metadata, besides codes and levels.

Two kinds of headers tell callers about their limit. envoyproxy/ratelimit's three headers are on every answer
(LIMIT_RESPONSE_HEADERS_ENABLED). A denial by a rule with `retry_after` has Retry-After (RFC 9110, section 10.2.3) and
the fields of draft-ietf-httpapi-ratelimit-headers, both in its current form (RateLimit-Policy, RateLimit) and in that
of its older versions (RateLimit-Limit, -Remaining, -Reset). The current form can also be on every answer, with an item
for each limit of the request. Envoy itself can add its x-ratelimit headers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any, Final, NamedTuple

from ratelimit_sidecar.crdt.bucket import Bucket
from ratelimit_sidecar.crdt.limit import AnyLimit, TokenBucketLimit
from ratelimit_sidecar.envoy_api.envoy.config.core.v3.base_pb2 import HeaderValue
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2 import RateLimitResponse
from ratelimit_sidecar.envoy_api.envoy.type.v3.ratelimit_unit_pb2 import RateLimitUnit
from ratelimit_sidecar.limiter.key import readable
from ratelimit_sidecar.limiter.plan import Plan, PlannedTake
from ratelimit_sidecar.limiter.request import Override, Request
from ratelimit_sidecar.limiter.rules import Rule
from ratelimit_sidecar.limiter.settings import AnswerSettings, ResponseHeaders

_OVER_LIMIT: Final = RateLimitResponse.OVER_LIMIT
_SECOND_US: Final = 1_000_000
MAX_SHOWN_CHARS: Final = 1_024
"""The longest text of a request in dynamic metadata. Envoy takes no answer of more than 4 MiB, and callers may send
long headers that are copied into many descriptors.
"""
MAX_NAME_CHARS: Final = 128
"""The longest name of a limit in a list header. Over HTTP/1.1 Envoy takes no answer with more than 60 KiB of headers,
and lets the request pass. A rule's name is its whole path, and a request may meet many rules.
"""
_MAX_UINT32: Final = 2**32 - 1
_OLD_HEADERS: Final = ResponseHeaders()


class _LimitMet(NamedTuple):
    """The outcome of a descriptor that has a limit."""

    take: PlannedTake
    rule: Rule
    bucket: Bucket
    is_denied: bool

    @property
    def retry_after_us(self) -> int:
        return self.bucket.retry_after_us(self.take.hits)


class Decorations:
    """Adds headers, a body and dynamic metadata to answers."""

    def __init__(self, settings: AnswerSettings) -> None:
        self._settings = settings

    def are_wanted(self, rule: Rule | None) -> bool:
        """True when the answer to a descriptor of that rule may get decorations."""
        if self._settings.response_headers is not None or self._settings.dynamic_metadata:
            return True
        return rule is not None and (self._settings.all_limits or rule.retry_after or bool(rule.body))

    def add(
        self, response: RateLimitResponse, plan: Plan, buckets: Sequence[Bucket | None], all_headers: bool = False
    ) -> None:
        """Add all decorations to an answer.

        Args:
            buckets: one for each take, after the decision; None for one that is not limited.
            all_headers: True to treat all limits as wanted, and each rule as if it had `retry_after`.
        """
        names = self._settings.response_headers
        all_limits = self._settings.all_limits or all_headers
        if names is not None:
            self._add_limit_headers(response, plan, names)
        if all_limits:
            _add_list_headers(response, _limits_met(response, plan, buckets))
        if response.overall_code == _OVER_LIMIT:
            denials = [met for met in _limits_met(response, plan, buckets) if met.is_denied]
            bodies = [denial.rule.body for denial in denials if denial.rule.body]
            if bodies:
                response.raw_body = bodies[0].encode()
            longest = max(
                # Waiting does not help with a limit of 0.
                (
                    denial
                    for denial in denials
                    if denial.rule.retry_after or (all_headers and denial.bucket.limit.capacity)
                ),
                key=lambda denial: denial.retry_after_us,
                default=None,
            )
            if longest is not None:
                _add_headers(response, ("Retry-After", _seconds(longest.retry_after_us)))
                if not all_limits:
                    _add_list_headers(response, [longest])
                if names is None:
                    _add_old_headers(response, longest.bucket)
        if plan.metadata is not None:
            response.dynamic_metadata.update(plan.metadata)
            merged = _metadata_of_rules(response, plan)
            if merged:
                response.dynamic_metadata.update({"metadata": merged})

    def _add_limit_headers(self, response: RateLimitResponse, plan: Plan, names: ResponseHeaders) -> None:
        """Show the last descriptor over its limit that is not in quota mode, or else the first with the least
        remaining.
        """
        # A limit whose remaining count is at uint32's maximum is not shown, as in envoyproxy/ratelimit.
        limited = [
            status
            for status in response.statuses
            if status.HasField("current_limit") and status.limit_remaining < _MAX_UINT32
        ]
        over = [
            status
            for take, status in zip(plan.takes, response.statuses, strict=True)
            if status.code == _OVER_LIMIT and not take.compiled.in_quota_mode
        ]
        if not limited:
            return
        shown = over[-1] if over else min(limited, key=lambda status: status.limit_remaining)
        _add_headers(
            response,
            (names.limit, shown.current_limit.requests_per_unit),
            (names.remaining, shown.limit_remaining),
            (names.reset, shown.duration_until_reset.seconds),
        )


def _limits_met(response: RateLimitResponse, plan: Plan, buckets: Sequence[Bucket | None]) -> list[_LimitMet]:
    return [
        _LimitMet(take, take.rule, bucket, status.code == _OVER_LIMIT)
        for take, bucket, status in zip(plan.takes, buckets, response.statuses, strict=True)
        if take.rule is not None and bucket is not None
    ]


def _add_list_headers(response: RateLimitResponse, limits: Sequence[_LimitMet]) -> None:
    """Add the lists of draft-ietf-httpapi-ratelimit-headers-10, with an item for each limit."""
    policies, levels = [], []
    for met in limits:
        name, bucket = _structured_string((met.rule.limit_name or met.rule.name)[:MAX_NAME_CHARS]), met.bucket
        again_us = met.retry_after_us if met.is_denied else bucket.full_in_us
        policies.append(f"{name};q={bucket.limit.capacity};w={_window_seconds(bucket.limit)}")
        levels.append(f"{name};r={bucket.remaining};t={_seconds(again_us)}")
    if limits:
        _add_headers(response, ("RateLimit-Policy", ", ".join(policies)), ("RateLimit", ", ".join(levels)))


def _add_old_headers(response: RateLimitResponse, bucket: Bucket) -> None:
    _add_headers(
        response,
        (_OLD_HEADERS.limit, bucket.limit.capacity),
        (_OLD_HEADERS.remaining, bucket.remaining),
        (_OLD_HEADERS.reset, _seconds(bucket.full_in_us)),
    )


def _add_headers(response: RateLimitResponse, *headers: tuple[str, object]) -> None:
    response.response_headers_to_add.extend([HeaderValue(key=name, value=str(value)) for name, value in headers])


def metadata_of_request(request: Request, takes: Sequence[PlannedTake]) -> dict[str, object]:
    """Dynamic metadata about a request, in the shape of envoyproxy/ratelimit: hits and limits only if the request has
    them.

    A long text is cut. The hits taken, and the limits of the rules, are under `applied`, one item for each descriptor.
    """
    asked: list[dict[str, object]] = []
    applied: list[dict[str, object]] = []
    # Convert each text once, however many descriptors have it.
    texts = {text for descriptor in request.descriptors for entry in descriptor.entries for text in entry}
    shown = {text: readable(text[:MAX_SHOWN_CHARS]) for text in texts}
    for descriptor, take in zip(request.descriptors, takes, strict=True):
        said: dict[str, object] = {"entries": [f"{shown[key]}={shown[value]}" for key, value in descriptor.entries]}
        if descriptor.limit is not None:
            said["limit"] = _override_text(descriptor.limit)
        if descriptor.hits is not None:
            said["hitsAddend"] = descriptor.hits
        asked.append(said)
        taken: dict[str, object] = {"hits": take.hits}
        rule = take.rule
        if rule is not None:
            taken["rule"] = readable(rule.name)
            if rule.unit is not None:
                taken["requestsPerUnit"] = rule.requests_per_unit
                taken["unit"] = rule.unit.name
        applied.append(taken)
    metadata: dict[str, object] = {
        "domain": readable(request.domain),
        "descriptors": asked,
        "applied": applied,
    }
    if request.hits:
        metadata["hitsAddend"] = request.hits
    return metadata


def _override_text(override: Override) -> str:
    """An override as Go prints the message."""
    parts = [f"requests_per_unit:{override.requests_per_unit}"] if override.requests_per_unit else []
    if override.unit:
        # The enumeration has no name for a week.
        names = RateLimitUnit.DESCRIPTOR.values_by_number
        parts.append(f"unit:{names[override.unit].name if override.unit in names else override.unit}")
    return " ".join(parts)


def _metadata_of_rules(response: RateLimitResponse, plan: Plan) -> dict[str, Any]:
    """The metadata of the rules that admitted, merged."""
    merged: dict[str, Any] = {}
    for take, status in zip(plan.takes, response.statuses, strict=True):
        if take.rule is not None and status.code != _OVER_LIMIT:
            merged = _merge(merged, take.rule.metadata)
    return merged


def _merge(first: Mapping[str, object], second: Mapping[str, object]) -> dict[str, object]:
    """Merge to any depth. Where both have a value the first wins, as in envoyproxy/ratelimit."""
    merged = {**second, **first}
    for key in first.keys() & second.keys():
        one, other = first[key], second[key]
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            merged[key] = _merge(one, other)
    return merged


def _seconds(duration_us: int) -> int:
    return ceil(duration_us / _SECOND_US)


def _window_seconds(limit: AnyLimit) -> int:
    """A window's length, or the time in which an empty bucket refills."""
    if isinstance(limit, TokenBucketLimit):
        return max(1, _seconds(limit.scaled_capacity // limit.tokens))
    return _seconds(limit.period_us)


def _structured_string(text: str) -> str:
    """A String of RFC 9651: printable ASCII in quotes."""
    ascii_text = text.encode("ascii", "replace").decode()
    printable = "".join(character if character.isprintable() else "?" for character in ascii_text)
    return '"' + printable.replace("\\", "\\\\").replace('"', '\\"') + '"'
