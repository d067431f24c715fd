"""The data of a YAML document: plain scalars, and containers that remember where their entries stood.

Plain scalars resolve as in Go's YAML (that of envoyproxy/ratelimit): YAML 1.1 with y/yes/on and their opposites,
`1_000`, `0x10`, `0b11` and 010, which is eight; and `0o10` of YAML 1.2. Numbers with a fraction become `Decimal`, so
`0.1` is a tenth. Positions are 1-based; an entry of a mapping stands where its key stands.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import NamedTuple

MAX_NUMBER_CHARS = 64
"""A longer number is taken as text: nothing here is that large, and reading it would cost."""

_NULLS = frozenset(("", "~", "null", "Null", "NULL"))
_BOOLS = {
    spelling: value
    for value, words in ((True, ("true", "yes", "y", "on")), (False, ("false", "no", "n", "off")))
    for word in words
    for spelling in (word, word.capitalize(), word.upper())
}
_INT = re.compile(
    r"(?P<sign>[-+]?)(?:0[xX]_*(?P<hex>[0-9a-fA-F][0-9a-fA-F_]*)|0[bB]_*(?P<binary>[01][01_]*)"
    r"|0[oO]?_*(?P<octal>[0-7][0-7_]*)|(?P<decimal>0_*|[1-9][0-9_]*))"
)
_BASES = {"hex": 16, "binary": 2, "octal": 8, "decimal": 10}
_DECIMAL = re.compile(r"[-+]?(?=\.?[0-9])(?:0|[1-9][0-9_]*)?(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]{1,3})?")


class Position(NamedTuple):
    """Where something stands in a file; both numbers count from 1."""

    line: int
    column: int


START = Position(1, 1)

Entry = tuple[object, Position | None, str | None]
"""A value, where it stands, and its source text when it is a scalar but not text."""


class YamlMap(dict[str, object]):
    """A mapping, and where each of its entries stands, when it was read from text."""

    __slots__ = ("positions", "sources")

    def __init__(self) -> None:
        super().__init__()
        self.positions: dict[str, Position] = {}
        self.sources: dict[str, str] = {}
        """Source text of the scalars that are not text."""

    def source_of(self, key: str) -> str | None:
        """The scalar at `key` as it is written in the file; None when there is no scalar."""
        value = self.get(key)
        return value if isinstance(value, str) else self.sources.get(key)

    def entry(self, key: str | int) -> Entry | None:
        if not isinstance(key, str) or key not in self:
            return None
        return self[key], self.positions.get(key), self.sources.get(key)


class YamlList(list[object]):
    """A list, and where each of its items stands, when it was read from text."""

    __slots__ = ("positions", "sources")

    def __init__(self) -> None:
        super().__init__()
        self.positions: list[Position] = []
        self.sources: dict[int, str] = {}
        """Source text of the scalars that are not text."""

    def entry(self, index: str | int) -> Entry | None:
        if not isinstance(index, int) or index >= len(self):
            return None
        return self[index], self.positions[index] if self.positions else None, self.sources.get(index)


def resolve(text: str) -> object:
    """The value of a plain scalar: None, bool, int, Decimal, or the text itself."""
    if text in _NULLS:
        return None
    if text in _BOOLS:
        return _BOOLS[text]
    if text[0] in "+-.0123456789" and len(text) <= MAX_NUMBER_CHARS:
        whole = _INT.fullmatch(text)
        if whole is not None and whole.lastgroup is not None:
            return int(whole["sign"] + whole[whole.lastgroup].replace("_", ""), _BASES[whole.lastgroup])
        if _DECIMAL.fullmatch(text):
            return Decimal(text.replace("_", ""))
    return text
