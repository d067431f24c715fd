"""Explains an answer: what was tried at each level, the rule, its bucket, and the decision.

The limiter itself makes the decision. The explanation reads the rules as `Rules.walk` does, and adds what matching does
not need: patterns that did not fit, and those that would have fitted but came later.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2 import RateLimitRequest, RateLimitResponse
from ratelimit_sidecar.limiter.key import KEY_ONLY, PATTERN, WILDCARD_VALUE, KeyEntry, decode_bucket_key
from ratelimit_sidecar.limiter.limiter import Limiter
from ratelimit_sidecar.limiter.rules import JOINED, EntryMatch, Match, RuleNode, Rules
from ratelimit_sidecar.limiter.settings import AnswerSettings
from ratelimit_sidecar.limiter.variants import made_local
from ratelimit_sidecar.limiter.wildcard import WildcardSet

Entries = Sequence[tuple[str, str]]

MAX_MISFITS: Final = 5
"""The most patterns that do not fit listed by name; the others are counted."""

MAX_SUGGESTIONS = 10
"""The most keys or domains of the rules listed when nothing matches."""


class Result(Enum):
    """The outcome of one way to match an entry."""

    MATCHES = "matches"
    FITS_TOO = "fits too, but comes later"
    DOES_NOT_FIT = "does not fit"
    ABSENT = "no such rule"


class MatchKind(Enum):
    """The ways to match an entry, in their order."""

    EXACT = "exact"
    WILDCARD = "wildcard"
    KEY = "key"


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt to match an entry: an exact value, a pattern, or the key alone.

    Args:
        pattern: of a WILDCARD; else empty.
    """

    way: MatchKind
    pattern: str
    result: Result


@dataclass(frozen=True, slots=True)
class LevelExplanation:
    """How one entry was matched.

    Args:
        attempts: in order of precedence; of the patterns that do not fit only the first `MAX_MISFITS`.
        misfits: the number of patterns that do not fit.
        keys: the keys in the rules at this level, if nothing matches; at most `MAX_SUGGESTIONS`.
    """

    key: str
    value: str
    attempts: tuple[Attempt, ...]
    misfits: int
    keys: tuple[str, ...]

    @property
    def match(self) -> Attempt | None:
        return next((attempt for attempt in self.attempts if attempt.result is Result.MATCHES), None)


@dataclass(frozen=True, slots=True)
class DescriptorExplanation:
    """One descriptor of a request.

    Args:
        levels: the levels that matched, and the first one that did not.
        match: None when no rule limits it.
        why_unlimited: in words, if there is no match; else empty.
        is_replaced: True if its rule does not count, because another descriptor's rule `replaces` it.
        status: the limiter's answer.
        full_in_us: microseconds until the bucket is full again; 0 without a bucket.
    """

    entries: tuple[tuple[str, str], ...]
    levels: tuple[LevelExplanation, ...]
    match: Match | None
    why_unlimited: str
    is_replaced: bool
    status: RateLimitResponse.DescriptorStatus
    full_in_us: int


@dataclass(frozen=True, slots=True)
class Explanation:
    """A whole request: how each descriptor was matched, and the answer.

    Args:
        response: the limiter's answer to the whole request.
    """

    domain: str
    descriptors: tuple[DescriptorExplanation, ...]
    response: RateLimitResponse


def explain(
    rules: Rules, settings: AnswerSettings, domain: str, descriptors: Sequence[Entries], now_us: int
) -> Explanation:
    """Decide a request on full buckets, and say why.

    Raises:
        InvalidRequest: as `Limiter.decide`.
    """
    request = RateLimitRequest(domain=domain)
    for entries in descriptors:
        descriptor = request.descriptors.add()
        for key, value in entries:
            descriptor.entries.add(key=key, value=value)
    raw = request.SerializeToString()
    limiter = Limiter(made_local(rules), Origin("explain", 1), settings)
    takes = limiter.plan(raw).takes
    response = RateLimitResponse.FromString(limiter.decide(raw, now_us))
    explained = []
    for entries, take, status in zip(descriptors, takes, response.statuses, strict=True):
        match = rules.match(domain, entries)
        bucket = limiter.store.get(take.bucket_key)
        explained.append(
            DescriptorExplanation(
                entries=tuple(entries),
                levels=tuple(_explain_levels(rules, domain, entries)),
                match=match,
                why_unlimited="" if match is not None else why_unlimited(rules, domain, entries),
                is_replaced=match is not None and take.rule is None,
                status=status,
                full_in_us=0 if bucket is None else bucket.full_in_us,
            )
        )
    return Explanation(domain, tuple(explained), response)


def readable_bucket_name(bucket_key: bytes) -> str:
    """The name of a bucket for people: `shop / plan=gold / path=/api/* (all values share it)`."""
    _, domain, entries = decode_bucket_key(bucket_key)
    parts = [domain]
    for entry, following in zip(entries, [*entries[1:], None], strict=True):
        if entry.kind != PATTERN:
            parts.append(f"{entry.key}={entry.value}")
        elif not _is_value_of_pattern(following):
            parts.append(f"{entry.key}={entry.value} (all values share it)")
    return " / ".join(parts)


def _is_value_of_pattern(entry: KeyEntry | None) -> bool:
    return entry is not None and entry.kind == WILDCARD_VALUE


def _explain_levels(rules: Rules, domain: str, entries: Entries) -> Iterator[LevelExplanation]:
    levels = rules.walk(domain, entries)
    node = rules.domains.get(domain)
    for index, (key, value) in enumerate(entries):
        if node is None:
            return
        level = levels[index] if index < len(levels) else None
        yield _explain_level(node, key, value, level)
        node = level.node if level is not None else None


def _explain_level(node: RuleNode, key: str, value: str, level: EntryMatch | None) -> LevelExplanation:
    matched = level.kind if level is not None else None
    has_exact, has_key = (key, value) in node.exact, key in node.key_only
    attempts = [Attempt(MatchKind.EXACT, "", Result.MATCHES if has_exact else Result.ABSENT)]
    misfits = 0
    joined = node.wildcards.get(JOINED)
    wildcards = node.wildcards.get(key) if joined is None else joined
    text = value if joined is None else f"{key}_{value}"
    for pattern, _ in wildcards.patterns if wildcards is not None else ():
        if level is not None and matched == PATTERN and pattern == level.pattern:
            attempts.append(Attempt(MatchKind.WILDCARD, pattern, Result.MATCHES))
        elif WildcardSet([(pattern, None)]).find(text) is not None:
            attempts.append(Attempt(MatchKind.WILDCARD, pattern, Result.FITS_TOO))
        else:
            misfits += 1
            if misfits <= MAX_MISFITS:
                attempts.append(Attempt(MatchKind.WILDCARD, pattern, Result.DOES_NOT_FIT))
    if has_key:
        attempts.append(Attempt(MatchKind.KEY, "", Result.MATCHES if matched == KEY_ONLY else Result.FITS_TOO))
    else:
        attempts.append(Attempt(MatchKind.KEY, "", Result.ABSENT))
    return LevelExplanation(key, value, tuple(attempts), misfits, () if level is not None else _keys_of(node))


def _keys_of(node: RuleNode) -> tuple[str, ...]:
    keys = {key for key, _ in node.exact} | (node.wildcards.keys() - {JOINED}) | node.key_only.keys()
    if JOINED in node.wildcards:
        keys |= {pattern for pattern, _ in node.wildcards[JOINED].patterns}
    return tuple(sorted(keys)[:MAX_SUGGESTIONS])


def why_unlimited(rules: Rules, domain: str, entries: Entries) -> str:
    """Why no rule limits a descriptor, in words; only for one without a match."""
    root = rules.domains.get(domain)
    if root is None:
        known = ", ".join(sorted(rules.domains)[:MAX_SUGGESTIONS]) or "none"
        return f"no rules for the domain {domain}; there are rules for: {known}"
    levels = rules.walk(domain, entries)
    node = levels[-1].node if levels else root
    below = _keys_of(node)
    if len(levels) < len(entries):
        key, value = entries[len(levels)]
        return f"nothing matches {key}={value}" if below else f"the rules end before {key}={value}"
    if below:
        return f"the rules go deeper: they have limits for an entry more, with the key {' or '.join(below)}"
    return "the rules name it, but set no limit"
