"""The output of `explain`, as text for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from ratelimit_sidecar.cli.table import table
from ratelimit_sidecar.crdt.limit import AnyLimit, TokenBucketLimit, Window
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2 import RateLimitResponse
from ratelimit_sidecar.limiter.explanation import (
    MAX_MISFITS,
    Attempt,
    DescriptorExplanation,
    Explanation,
    LevelExplanation,
    MatchKind,
    Result,
    readable_bucket_name,
)
from ratelimit_sidecar.limiter.replay import Replay, Tally
from ratelimit_sidecar.limiter.rules import Charge, Rule

TOP_DESCRIPTORS = 20
"""The most denied descriptors in the text; JSON has all that the replay kept."""

_SECOND_US = 1_000_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def explanation_text(explanation: Explanation) -> Iterator[str]:
    for descriptor in explanation.descriptors:
        yield f"{explanation.domain}: {_joined(descriptor.entries)}"
        for index, level in enumerate(descriptor.levels, start=1):
            yield from _level_text(index, level)
        yield from _outcome_text(descriptor)
        yield ""
    yield f"answer: {_code(explanation.response.overall_code)}"
    for header in explanation.response.response_headers_to_add:
        yield f"  {header.key}: {header.value}"


def explanation_json(explanation: Explanation) -> dict[str, Any]:
    return {
        "domain": explanation.domain,
        "answer": _code(explanation.response.overall_code),
        "headers": {header.key: header.value for header in explanation.response.response_headers_to_add},
        "descriptors": [_descriptor_json(descriptor) for descriptor in explanation.descriptors],
    }


def replay_text(replay: Replay) -> Iterator[str]:
    requests = replay.requests
    if replay.first_us is None:
        yield "no requests"
        return
    yield (
        f"{requests.asked:,} requests from {_instant(replay.first_us)} to {_instant(replay.now_us)}: "
        f"{requests.denied:,} would have been denied ({_share(requests)})"
    )
    if requests.first_denied_us is not None:
        yield f"the first at {_instant(requests.first_denied_us)}"
    if requests.in_shadow_mode:
        yield "as it is now none would be: global shadow mode is on"
    if replay.late:
        yield f"{replay.late:,} were older than the one before them, and counted at its time"
    if replay.unlimited:
        yield f"{replay.unlimited:,} descriptors are limited by no rule"
    yield ""
    yield from table(
        ("rule", "descriptors", "denied", "", "first denied"),
        (
            (
                f"{name} (shadow mode)" if tally.in_shadow_mode else name,
                f"{tally.asked:,}",
                f"{tally.denied:,}",
                _share(tally),
                _first(tally),
            )
            for name, tally in _most_denied(replay.rules.items())
        ),
    )
    if not replay.denied_descriptors:
        return
    yield ""
    yield from table(
        ("descriptor", "denied", "first denied"),
        (
            (f"{domain}: {_joined(entries)}", f"{tally.denied:,}", _first(tally))
            for (domain, entries), tally in _most_denied(replay.denied_descriptors.items())[:TOP_DESCRIPTORS]
        ),
    )
    others = len(replay.denied_descriptors) - TOP_DESCRIPTORS
    if others > 0:
        yield f"and {others:,} more"
    if replay.other_denials:
        yield f"and {replay.other_denials:,} denials of descriptors too many to tell apart"


def replay_json(replay: Replay) -> dict[str, Any]:
    return {
        "requests": _tally_json(replay.requests),
        "from": None if replay.first_us is None else _instant(replay.first_us),
        "to": None if replay.first_us is None else _instant(replay.now_us),
        "late_requests": replay.late,
        "unlimited_descriptors": replay.unlimited,
        "rules": [{"rule": name, **_tally_json(tally)} for name, tally in _most_denied(replay.rules.items())],
        "denied_descriptors": [
            {
                "domain": domain,
                "entries": [list(entry) for entry in entries],
                "denied": tally.denied,
                "first_denied": _first(tally),
            }
            for (domain, entries), tally in _most_denied(replay.denied_descriptors.items())
        ],
        "other_denials": replay.other_denials,
    }


def _level_text(index: int, level: LevelExplanation) -> Iterator[str]:
    yield f"  {index}  {level.key}={level.value}"
    for attempt in level.attempts:
        mark = "->" if attempt.result is Result.MATCHES else "  "
        yield f"     {mark} {_way_text(level, attempt):<32}  {attempt.result.value}"
    if level.misfits > MAX_MISFITS:
        yield f"        {level.misfits - MAX_MISFITS:,} more values with * do not fit"
    if level.match is None:
        keys = ", ".join(level.keys)
        yield f"        nothing matches; the rules here have the keys: {keys}" if keys else "        no rules here"


def _way_text(level: LevelExplanation, attempt: Attempt) -> str:
    if attempt.way is MatchKind.EXACT:
        return f"{level.key}={level.value}, exactly"
    if attempt.way is MatchKind.WILDCARD:
        return f"{level.key}={attempt.pattern}"
    return f"{level.key}, with any value"


def _outcome_text(descriptor: DescriptorExplanation) -> Iterator[str]:
    match = descriptor.match
    if match is None:
        yield f"  limit    none: {descriptor.why_unlimited}"
        return
    rule = match.rule
    yield f"  rule     {rule.name}" + (f", in metrics {match.metric_name}" if match.metric_name != rule.name else "")
    yield f"  limit    {_limit_text(rule)}"
    for remark in _remarks(rule):
        yield f"           {remark}"
    if rule.limit is not None:
        yield f"  bucket   {readable_bucket_name(match.bucket_key)}"
    if descriptor.is_replaced:
        yield "  answer   OK: another descriptor's rule replaces this one in the request"
        return
    status = descriptor.status
    yield f"  answer   {_code(status.code)}" + (
        f", {status.limit_remaining:,} remaining, reset in {descriptor.full_in_us / _SECOND_US:g} s"
        if status.HasField("current_limit")
        else ""
    )


def _remarks(rule: Rule) -> Iterator[str]:
    if rule.limit_name:
        yield f"named {rule.limit_name}"
    if rule.replaces:
        yield f"replaces {', '.join(sorted(rule.replaces))}"
    if rule.shadow_mode:
        yield "in shadow mode: answers OK whatever it decides"
    if rule.quota_mode:
        yield "a quota: denies only when all quotas of a request are over"
    if rule.charge is Charge.ALWAYS:
        yield "charges also what it denies"
    elif rule.charge is Charge.REPORTED:
        yield "charges also what it denies where the descriptor brings hits of its own"
    if rule.limit is not None:
        yield f"consistency: {rule.consistency.value}"
    if rule.wait_us:
        yield f"a request may wait {rule.wait_us / 1_000:g} ms for tokens of other members; here it does not"


def _limit_text(rule: Rule) -> str:
    limit = rule.limit
    if limit is None:
        return "unlimited"
    per_unit = f"{rule.requests_per_unit:,} per {rule.unit.name.lower()}" if rule.unit is not None else ""
    if limit.capacity == 0:
        return f"{per_unit or 'nothing'}: denies everything"
    if isinstance(limit, TokenBucketLimit):
        rate = per_unit or f"{_refill_per_second(limit):g} per second"
        every_s = limit.period_us / limit.tokens / _SECOND_US
        return f"token bucket: holds {limit.capacity:,}, refills at {rate} (one every {every_s:g} s)"
    if limit.window is Window.FIXED:
        return f"fixed window: {per_unit}, counted anew at each full one"
    return f"sliding window: {per_unit}, counted over the last one"


def _descriptor_json(descriptor: DescriptorExplanation) -> dict[str, Any]:
    match, status = descriptor.match, descriptor.status
    return {
        "entries": [list(entry) for entry in descriptor.entries],
        "levels": [_level_json(level) for level in descriptor.levels],
        "rule": None if match is None else match.rule.name,
        "metric": None if match is None else match.metric_name,
        "bucket": None if match is None or match.rule.limit is None else _bucket_json(match.bucket_key, match.rule),
        "why_unlimited": descriptor.why_unlimited,
        "replaced": descriptor.is_replaced,
        "answer": _code(status.code),
        "remaining": status.limit_remaining if status.HasField("current_limit") else None,
        "reset_in_seconds": descriptor.full_in_us / _SECOND_US if status.HasField("current_limit") else None,
    }


def _level_json(level: LevelExplanation) -> dict[str, Any]:
    match = level.match
    return {
        "key": level.key,
        "value": level.value,
        "match": None if match is None else match.way.value,
        "tried": [
            {"way": attempt.way.value, "pattern": attempt.pattern or None, "result": attempt.result.value}
            for attempt in level.attempts
        ],
        "patterns_that_do_not_fit": level.misfits,
    }


def _bucket_json(bucket_key: bytes, rule: Rule) -> dict[str, Any]:
    limit = rule.limit
    assert limit is not None
    return {
        "name": readable_bucket_name(bucket_key),
        "algorithm": "token_bucket" if isinstance(limit, TokenBucketLimit) else limit.window.value,
        "capacity": limit.capacity,
        "consistency": rule.consistency.value,
        **_speed_json(limit),
    }


def _speed_json(limit: AnyLimit) -> dict[str, float]:
    if isinstance(limit, TokenBucketLimit):
        return {"refill_per_second": _refill_per_second(limit)}
    return {"window_seconds": limit.period_us / _SECOND_US}


def _tally_json(tally: Tally) -> dict[str, Any]:
    return {
        "asked": tally.asked,
        "denied": tally.denied,
        "first_denied": _first(tally) or None,
        "in_shadow_mode": tally.in_shadow_mode,
    }


def _refill_per_second(limit: TokenBucketLimit) -> float:
    return limit.tokens * _SECOND_US / limit.period_us if limit.capacity else 0.0


def _most_denied(tallies: Iterable[tuple[Any, Tally]]) -> list[tuple[Any, Tally]]:
    return sorted(tallies, key=lambda item: (-item[1].denied, -item[1].asked, item[0]))


def _joined(entries: Iterable[tuple[str, str]]) -> str:
    return ", ".join(f"{key}={value}" for key, value in entries)


def _code(code: int) -> str:
    name: str = RateLimitResponse.Code.Name(code)
    return name


def _share(tally: Tally) -> str:
    return f"{tally.denied / tally.asked:.1%}" if tally.asked else "0.0%"


def _first(tally: Tally) -> str:
    return "" if tally.first_denied_us is None else _instant(tally.first_denied_us)


def _instant(at_us: int) -> str:
    text = (_EPOCH + timedelta(microseconds=at_us)).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")
