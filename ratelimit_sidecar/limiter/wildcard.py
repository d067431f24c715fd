"""Patterns with wildcards: `foo*`, `*bar`, `a*b*c`. The first in file order that fits wins.

Patterns are looked up by the texts before the first `*` and after the last one. So the cost of a look-up depends on the
number of different lengths of these texts, and on the number of patterns that share both texts, not on the number of
all patterns.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, TypeVar

WILDCARD = "*"

T = TypeVar("T")


class WildcardSet(Generic[T]):
    """A set of patterns, each with an item. `find` returns the first that fits a value.

    Args:
        patterns: in file order; each has at least one `*`, which stands for any text, the empty one included.
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

    def item_of(self, pattern: str) -> T | None:
        """The item of a pattern, by the pattern's text."""
        return self._by_pattern.get(pattern)

    def find(self, value: str) -> tuple[str, T] | None:
        """The first pattern that fits the whole of `value`, and its item. A value that is itself the text of a pattern
        finds that one, as in envoyproxy/ratelimit.
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
    """Whether `texts` occur one after the other in `value` between `at` and `end`.

    Taking the leftmost occurrence of each is enough: if a text fits anywhere, it also fits there.
    """
    for text in texts:
        found = value.find(text, at, end)
        if found < 0:
            return False
        at = found + len(text)
    return True
