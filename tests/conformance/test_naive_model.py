"""Random rules, read as the sidecar reads them, and random requests: answered as a naive envoyproxy/ratelimit would.

The model counts in a dictionary, by what tells a bucket from others and by the number of the window, and knows nothing
of the limiter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from conformance.answers import answer_of
from hypothesis import given
from hypothesis import strategies as st
from limiter.naive_rules import DOMAIN, Descriptor, Entries, files, naive_match, paths, requests

from ratelimit_sidecar.config.rules_file import rules_of_resources
from ratelimit_sidecar.config.rules_tree import RuleDefaults
from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.limit import Window
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2 import RateLimitRequest, RateLimitResponse
from ratelimit_sidecar.limiter.limiter import Limiter

SECONDS = {"second": 1, "minute": 60}
START_SECONDS = 1_790_000_000


@dataclass(frozen=True)
class Limit:
    requests: int
    unit: str
    name: str
    replaces: str
    shadow_mode: bool
    quota_mode: bool


@dataclass(frozen=True)
class Asked:
    entries: tuple[tuple[str, str], ...]
    hits: int


class NaiveService:
    def __init__(self, file: Sequence[Descriptor], limits: dict[tuple[Descriptor, ...], Limit]) -> None:
        self.file = file
        self.limits = limits
        self.counts: Counter[object] = Counter()

    def answer(self, request: Sequence[Asked], now_seconds: int) -> tuple[str, list[tuple[str, int | None]]]:
        """The overall code, and code and remaining requests of every descriptor; None where nothing is limited."""
        outcomes = [naive_match(self.file, asked.entries) for asked in request]
        limits = [self.limits[outcome.path] if outcome is not None else None for outcome in outcomes]
        replaced = {limit.replaces for limit in limits if limit is not None} - {""}
        statuses: list[tuple[str, int | None]] = []
        over, quotas_over, quotas = 0, 0, 0
        for asked, outcome, limit in zip(request, outcomes, limits, strict=True):
            if outcome is None or limit is None or limit.name in replaced:
                statuses.append(("OK", None))
                continue
            window = (outcome.path, outcome.bucket, now_seconds // SECONDS[limit.unit])
            self.counts[window] += asked.hits
            is_over = self.counts[window] > limit.requests and not limit.shadow_mode
            statuses.append(("OVER_LIMIT" if is_over else "OK", max(0, limit.requests - self.counts[window])))
            if limit.quota_mode:
                quotas += 1
                quotas_over += is_over
            else:
                over += is_over
        overall = over > 0 or quotas_over == quotas > 0
        return "OVER_LIMIT" if overall else "OK", statuses


def as_data(file: Sequence[Descriptor], limits: dict[tuple[Descriptor, ...], Limit]) -> dict[str, object]:
    """The rules as a file has them."""

    def level(descriptors: Sequence[Descriptor], above: tuple[Descriptor, ...]) -> list[dict[str, object]]:
        return [item(descriptor, (*above, descriptor)) for descriptor in descriptors]

    def item(descriptor: Descriptor, path: tuple[Descriptor, ...]) -> dict[str, object]:
        data: dict[str, object] = {"key": descriptor.key, "descriptors": level(descriptor.children, path)}
        if descriptor.value:
            data |= {"value": descriptor.value, "share_threshold": descriptor.share_threshold}
        limit = limits.get(path)
        if limit is not None:
            replaces = [{"name": limit.replaces}] if limit.replaces else []
            data |= {"shadow_mode": limit.shadow_mode, "quota_mode": limit.quota_mode}
            data["rate_limit"] = {
                "requests_per_unit": limit.requests,
                "unit": limit.unit,
                "name": limit.name,
                "replaces": replaces,
            }
        return data

    return {"domain": DOMAIN, "descriptors": level(file, ())}


@st.composite
def rule_limits(draw: st.DrawFn) -> Limit:
    name = draw(st.sampled_from(["", "", "one", "two"]))
    return Limit(
        requests=draw(st.integers(0, 3)),
        unit=draw(st.sampled_from(sorted(SECONDS))),
        name=name,
        replaces=draw(st.sampled_from([other for other in ("", "", "one", "two") if not other or other != name])),
        shadow_mode=draw(st.sampled_from([False, False, True])),
        quota_mode=draw(st.booleans()),
    )


def message_of(request: Sequence[Asked]) -> RateLimitRequest:
    message = RateLimitRequest(domain=DOMAIN)
    for asked in request:
        descriptor = message.descriptors.add()
        descriptor.hits_addend.value = asked.hits
        for key, value in asked.entries:
            descriptor.entries.add(key=key, value=value)
    return message


def asked_of(entries: Entries, hits: int) -> Asked:
    return Asked(tuple(entries), hits)


@given(st.data())
def test_random_requests_are_answered_as_the_naive_service_answers_them(data: st.DataObject) -> None:
    file = data.draw(files(depth=2))
    limits = {path: data.draw(rule_limits()) for path in paths(file) if path[-1].limits}
    rules = rules_of_resources({"rules": as_data(file, limits)}, defaults=RuleDefaults(window=Window.FIXED))
    limiter, naive = Limiter(rules, Origin("node", 1)), NaiveService(file, limits)
    callers = data.draw(st.lists(requests(file), min_size=1, max_size=4))
    descriptors = st.builds(asked_of, st.sampled_from(callers), st.integers(0, 2))
    now_seconds = START_SECONDS
    for _ in range(8):
        now_seconds += data.draw(st.sampled_from([0, 0, 0, 1, 70]))
        request = data.draw(st.lists(descriptors, min_size=1, max_size=3))
        raw = limiter.decide(message_of(request).SerializeToString(), now_seconds * 1_000_000)
        seen = answer_of(RateLimitResponse.FromString(raw))
        statuses = [(status.code, None if status.limit is None else status.remaining) for status in seen.statuses]
        assert (seen.code, statuses) == naive.answer(request, now_seconds)
