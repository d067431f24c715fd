"""Values with wildcards: `foo*`, `*bar`, `a*b*c`. The first in file order that fits wins.

Compiled for look-up by the texts before the first `*` and after the last one: what a value costs depends on how many
different pairs of lengths such texts have and on how many patterns share both of the value's, not on how many patterns
there are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, TypeVar

WILDCARD = "*"

T = TypeVar("T")


class WildcardSet(Generic[T]):
    """Patterns, each with something that belongs to it; `find` gives the first that fits a value.

    Args:
        patterns: in file order; each has at least one `*`, which stands for any text, also none.
    """

    def __init__(self, patterns: Iterable[tuple[str, T]]) -> None:
        self.patterns = tuple(patterns)
        self._by_pattern: dict[str, T] = {}
        self._by_ends: dict[tuple[str, str], list[tuple[int, list[str]]]] = {}
        for order, (pattern, item) in enumerate(self.patterns):
            self._by_pattern.setdefault(pattern, item)
            first, *middle, last = pattern.split(WILDCARD)
            self._by_ends.setdefault((first, last), []).append((order, middle))
        self._lengths = sorted({(len(first), len(last)) for first, last in self._by_ends})

    def node_of(self, pattern: str) -> T | None:
        """What belongs to a pattern, by its text."""
        return self._by_pattern.get(pattern)

    def find(self, value: str) -> tuple[str, T] | None:
        """The first pattern that fits the whole of `value`, and what belongs to it. A value that is itself the text of
        one means that one, as in envoyproxy/ratelimit.
        """
        if WILDCARD in value:
            itself = self._by_pattern.get(value)
            if itself is not None:
                return value, itself
        best = len(self.patterns)
        for before, after in self._lengths:
            end = len(value) - after
            if before > end:
                continue
            for order, middle in self._by_ends.get((value[:before], value[end:]), ()):
                if order >= best:
                    break
                if _has_in_order(value, before, end, middle):
                    best = order
                    break
        return self.patterns[best] if best < len(self.patterns) else None


def _has_in_order(value: str, at: int, end: int, texts: list[str]) -> bool:
    """Whether `texts` stand one after the other in `value` from `at` to `end`.

    Leftmost finds suffice: a text between two wildcards that fits anywhere also fits at its first place.
    """
    for text in texts:
        found = value.find(text, at, end)
        if found < 0:
            return False
        at = found + len(text)
    return True
