"""The rules in force, where they came from, and why newer ones are not in force, for people and tools."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime
from heapq import merge
from itertools import islice
from typing import TypedDict

from ratelimit_sidecar.config.errors import quoted
from ratelimit_sidecar.crdt.limit import WindowLimit
from ratelimit_sidecar.limiter.limiter import Limiter
from ratelimit_sidecar.limiter.rules import Charge, Rule, Rules
from ratelimit_sidecar.rules_source.reloader import Reloader

MAX_PROBLEMS_SHOWN = 100
"""The most problems shown of the last attempt; the log has the first ones, too."""

SORTED_AT_ONCE = 1_000
"""Rules sorted in one go, in half a millisecond."""

LINES_OF_PIECE = 256
"""Some 40 KB, which a slow client takes one after the other."""


class RejectionDescription(TypedDict):
    """A failed attempt to load rules, as JSON shows it."""

    version: str
    at: str
    problems: list[str]
    """The first `MAX_PROBLEMS_SHOWN`."""
    problem_count: int


class RulesDescription(TypedDict):
    """The rules in force and the last attempt to replace them, as JSON shows them."""

    source: str
    degraded_reason: str
    """Why changes at the source may be noticed late; "" if they are not."""
    in_force: int
    """The number of rules; 0 also if the source has given none yet."""
    version: str
    """The version, as the source calls it."""
    loaded_at: str | None
    rejected: RejectionDescription | None
    """The last attempt to load rules, if it failed; the former rules are in force."""


def describe_rules(reloader: Reloader) -> RulesDescription:
    loaded, rejected = reloader.loaded, reloader.rejected
    return {
        "source": reloader.source,
        "degraded_reason": reloader.degraded_reason,
        "in_force": 0 if loaded is None else loaded.rules,
        "version": "" if loaded is None else loaded.version,
        "loaded_at": None if loaded is None else _time(loaded.at_us),
        "rejected": None
        if rejected is None
        else {
            "version": rejected.version,
            "at": _time(rejected.at_us),
            "problems": [str(problem) for problem in islice(rejected.problems, MAX_PROBLEMS_SHOWN)],
            "problem_count": len(rejected.problems),
        },
    }


class RulesText:
    """The rules in force as text. It is made once for all who ask, and in a thread: many threads at once would keep
    Python's lock from the loop.
    """

    def __init__(self, limiter: Limiter) -> None:
        self._limiter = limiter
        self._one_makes = asyncio.Lock()
        self._generation = -1
        """The generation of the rules that the text is of."""
        self._text: list[bytes] = []

    async def pieces(self) -> list[bytes]:
        """Lines that begin like those of envoyproxy/ratelimit's /rlconfig, one a rule, some hundred in each piece."""
        async with self._one_makes:
            generation, rules = self._limiter.generation, self._limiter.rules
            if self._generation != generation:
                # Rules are never changed, so another thread may read them.
                self._text = await asyncio.to_thread(lines_of, rules)
                self._generation = generation
            return self._text


def lines_of(rules: Rules) -> list[bytes]:
    """A line for each rule, in pieces. 10,000 rules take some 30 ms, in which no step keeps Python's lock for long, as
    sorting or joining a whole list would.
    """
    unsorted = map(_line, rules)
    runs: list[list[str]] = []
    while run := sorted(islice(unsorted, SORTED_AT_ONCE)):
        runs.append(run)
    lines = merge(*runs)
    pieces: list[bytes] = []
    while piece := "".join([f"{line}\n" for line in islice(lines, LINES_OF_PIECE)]):
        pieces.append(piece.encode())
    return pieces


def _line(rule: Rule) -> str:
    parts = [
        f"{_printable(rule.name)}: unit={'UNKNOWN' if rule.unit is None else rule.unit.name}"
        f" requests_per_unit={rule.requests_per_unit}",
        f"shadow_mode: {_flag(rule.shadow_mode)}",
    ]
    if rule.quota_mode:
        parts.append("quota_mode: true")
    if rule.limit_name:
        parts.append(f"name: {_printable(rule.limit_name)}")
    if rule.replaces:
        parts.append(f"replaces: {' '.join(map(_printable, sorted(rule.replaces)))}")
    limit = rule.limit
    if limit is None:
        parts.append("unlimited: true")
        return ", ".join(parts)
    if isinstance(limit, WindowLimit):
        parts.append(f"algorithm: {limit.window.value}")
    else:
        parts.append(f"algorithm: token_bucket, capacity: {limit.capacity}")
        if rule.unit is None:
            parts.append(f"refill_per_second: {limit.tokens * 1e6 / limit.period_us:g}")
    if rule.charge is not Charge.ADMITTED:
        parts.append(f"charge: {rule.charge.value}")
    parts.append(f"consistency: {rule.consistency.value}")
    return ", ".join(parts)


def comments(description: RulesDescription) -> Iterator[str]:
    """Where the rules came from, and why newer ones are not in force: lines of text."""
    version = f", version {description['version']}" if description["version"] else ""
    if description["loaded_at"] is None:
        yield f"{description['source']}: no rules yet"
    else:
        yield f"{description['source']}{version}: {description['in_force']} in force since {description['loaded_at']}"
    if description["degraded_reason"]:
        yield description["degraded_reason"]
    rejected = description["rejected"]
    if rejected is not None:
        version = f" of version {rejected['version']}" if rejected["version"] else ""
        yield f"REJECTED: the rules{version} that came at {rejected['at']} cannot be used, {_count(rejected)}:"
        for problem in rejected["problems"]:
            yield f"  {problem}"


def _count(rejected: RejectionDescription) -> str:
    count = rejected["problem_count"]
    if count > len(rejected["problems"]):
        return f"{count} problems, of which these are the first"
    return "1 problem" if count == 1 else f"{count} problems"


def _printable(text: str) -> str:
    """Escape a name so that one rule cannot look like two, or like a comment."""
    return text if text.isprintable() and not text.startswith("#") else quoted(text, None)


def _flag(value: bool) -> str:
    return "true" if value else "false"


def _time(at_us: int) -> str:
    return datetime.fromtimestamp(at_us // 1_000_000, UTC).isoformat().replace("+00:00", "Z")
