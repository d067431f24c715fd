"""Problems of a configuration, for the person who has to fix it now.

A `Problem` names the file, line, column and key, what was found there, what was expected, and the fix. Text taken from
a file is quoted, cut and freed of control characters, so a broken file cannot garble a terminal or a log.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass

KeyPath = tuple[str | int, ...]
"""The place of a value in a file: names in mappings, indices in lists."""

ENVIRONMENT = "environment"
"""The `Problem.file` for an environment variable; the key is then the variable's name."""

_MAX_QUOTED_CHARS = 60


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing to fix.

    Args:
        file: as the user named it, or `ENVIRONMENT`, or the name of an xDS resource.
        line: 1-based; None when the file as a whole is meant (it cannot be read), and in what is no file.
        column: 1-based, in characters; None exactly when line is.
        key: dotted path such as `descriptors[0].rate_limit.unit`; "" for the file as a whole.
        expected: what would have been right; "" when `found` says all there is to say.
        fix: what to do about it; "" when `expected` says it.
    """

    file: str
    line: int | None
    column: int | None
    key: str
    found: str
    expected: str = ""
    fix: str = ""

    @property
    def message(self) -> str:
        text = f"found {self.found}"
        if self.expected:
            text += f", expected {self.expected}"
        if self.fix:
            text += f"; {self.fix}"
        return text

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}:{self.column}"
        return f"{place}: {self.key}: {self.message}" if self.key else f"{place}: {self.message}"


def in_order(problems: Iterable[Problem]) -> tuple[Problem, ...]:
    """File by file, in order of position."""
    by_file: dict[str, list[Problem]] = {}
    for problem in problems:
        by_file.setdefault(problem.file, []).append(problem)
    return tuple(
        problem
        for found in by_file.values()
        for problem in sorted(found, key=lambda it: (it.line or 0, it.column or 0))
    )


class ConfigError(Exception):
    """A configuration that cannot be used.

    Args:
        problems: everything that is wrong with it, at least one. Kept file by file, in order of position.
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = in_order(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        """One line a problem: `file:line:column: key: message`."""
        return "\n".join(map(str, self.problems))


def quoted(text: str, most_chars: int | None = _MAX_QUOTED_CHARS) -> str:
    """`text` in double quotes on one line, printable, cut when it is longer than `most_chars`."""
    cut = text if most_chars is None or len(text) <= most_chars else text[:most_chars] + "…"
    return json.dumps(cut, ensure_ascii=not cut.isprintable())


def dotted(path: KeyPath) -> str:
    """`("descriptors", 0, "key")` as `descriptors[0].key`."""
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
            continue
        name = step if step.isascii() and step.replace("_", "").isalnum() else quoted(step)
        text += f".{name}" if text else name
    return text


def did_you_mean(text: str, choices: Iterable[str]) -> str:
    """The fix that names the choice closest to `text`; "" when none is close."""
    close = difflib.get_close_matches(text[:_MAX_QUOTED_CHARS].lower(), list(choices), n=1)
    return f"did you mean {quoted(close[0])}?" if close else ""
