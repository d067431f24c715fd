"""Values with wildcards: `foo*`, `*bar`, `a*b*c`. The first in file order that fits wins.

Compiled for look-up by the text before the first `*`: what a value costs depends on how many different lengths such
texts have and on how many patterns share one of the value's, not on how many patterns there are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, TypeVar

WILDCARD = "*"

T = TypeVar("T")


class WildcardSet(Generic[T]):
    """Args:
    patterns: in file order; each has at least one `*`, which stands for any text, also none.
    """

    def __init__(self, patterns: Iterable[tuple[str, T]]) -> None:
        self.patterns = tuple(patterns)
        self._by_pattern: dict[str, T] = {}
        self._by_prefix: dict[str, list[tuple[int, list[str]]]] = {}
        for order, (pattern, item) in enumerate(self.patterns):
            self._by_pattern.setdefault(pattern, item)
            prefix, *rest = pattern.split(WILDCARD)
            self._by_prefix.setdefault(prefix, []).append((order, rest))
        self._lengths = sorted({len(prefix) for prefix in self._by_prefix})

    def node_of(self, pattern: str) -> T | None:
        """What belongs to a pattern, by its text."""
        return self._by_pattern.get(pattern)

    def find(self, value: str) -> tuple[str, T] | None:
        """The first pattern that fits the whole of `value`, and what belongs to it."""
        best = len(self.patterns)
        for length in self._lengths:
            if length > len(value):
                break
            for order, rest in self._by_prefix.get(value[:length], ()):
                if order >= best:
                    break
                if _fits(value, length, rest):
                    best = order
                    break
        return self.patterns[best] if best < len(self.patterns) else None


def _fits(value: str, at: int, rest: list[str]) -> bool:
    """Whether `rest`, texts with any text before each, fill `value` from `at` to its end.

    Leftmost finds suffice: a text between two wildcards that fits anywhere also fits at its first place.
    """
    *middle, last = rest
    for text in middle:
        found = value.find(text, at)
        if found < 0:
            return False
        at = found + len(text)
    return len(value) - len(last) >= at and value.endswith(last)
