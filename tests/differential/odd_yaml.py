"""Rules files with something odd in them, to be accepted or refused: by the checker of envoyproxy/ratelimit and by
`ratelimit-sidecar check`.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, Final

import yaml
from click.testing import CliRunner

from differential.build import Reference
from differential.generate import Generator
from ratelimit_sidecar.cli.check import check
from ratelimit_sidecar.config.differences import DIFFERENCES

_SCALARS: Final = (
    *("", "~", "null", "''", "010", "0x10", "0b11", "0o10", "1e3", "1.5", "0.0", "-1", "+5", "1_000", "4294967295"),
    *("4294967296", "y", "N", "yes", "on", "true", "True", "TRUE", "tRue", "'true'", '"5"', "5 # five", ".inf", "[]"),
    *("{}", "[a]", "[{}]", "[{key: a}]", "{a: b}", "{name: one}", "2026-01-01", "12:30:45", "!!str 5", "!!int '5'"),
    *("!!float 5", "!!binary aGk=", "!own x", "&a x", "*a", '"\\u00e9"', '"\\x00"', "hour", "HOUR", "Days", "unknown"),
    *("'month '", "'*'", "a*b", "a_b", "=", "<<", "@x", "`", "%", "- x", "? x", "'a: b'", "a: b", "日本", "'\t'", "0"),
)
_KEYS: Final = (
    *("key", "value", "descriptors", "rate_limit", "unit", "requests_per_unit", "unlimited", "shadow_mode", "name"),
    *("quota_mode", "replaces", "detailed_metric", "value_to_metric", "share_threshold", "metadata", "domain", "Key"),
    *("descriptor", "5", "true", "~", "<<", "''", "0.5", "'key'", "!!str key", "[a]", "{a: b}", "RateLimit", "é"),
)
_AFTER: Final = (
    "\n---\n",
    "\n...\n",
    "\n---\n---\n",
    "\n---\ndomain: other\n",
    "\n--- ~\n",
    "\n...\nx: [\n",
    "\n# end",
)
_BEFORE: Final = (
    "---\n",
    "---\n---\n",
    "%YAML 1.1\n---\n",
    "%YAML 1.2\n---\n",
    "\ufeff",
    "\n\n",
    "# x\n",
    "...\n",
    "--- # x\n",
    " ",
)
_CHARACTERS: Final = ":{}[]-#&*!|>'\"%@`,?\t\n \r\x00\x07é\u2028"
_MARK: Final = "odd-mark"

_GRAMMAR: Final = (
    "domain|key|value|descriptors|rate_limit|unit|requests_per_unit|unlimited|shadow_mode|quota_mode|name|replaces"
    "|detailed_metric|value_to_metric|share_threshold|metadata"
)
REFUSED_HERE: Final[Mapping[str, str]] = {
    "twice-in-a-mapping": r"found the key .* again",
    "second-document": r"found a second document|expected <document start>",
    "no-number": r"requests_per_unit: found nothing",
    "unknown-unit-of-unlimited": r"rate_limit\.unit: found .* unlimited",
    "misplaced-key": rf'found the unknown key "({_GRAMMAR})"',
    "tags": r"found the tag",
    "blanks-in-rules": r"expected no spaces or tabs",
    "null-in-metadata": r"metadata.*: found a key that is empty",
}
"""By the row of the table: how a problem reads that only this side finds."""

REFUSED_THERE: Final[Mapping[str, str]] = {
    "joined-rules": r"duplicate descriptor composite key",
    "fractions": r"error checking config",
    "empty-documents": r"cannot have empty domain",
    "merge-of-no-mapping": r"map merge requires map",
    "yaml-version": r"found incompatible YAML document",
}
"""By the row of the table: what only the other side says."""


@dataclass(slots=True)
class Verdicts:
    """What both sides have said of odd files.

    Args:
        deliberate: files that one side accepts and the other refuses, by the row of the table.
        undeclared: such files without a row, with how to see them again.
    """

    files: int = 0
    refused: int = 0
    deliberate: Counter[str] = field(default_factory=Counter)
    undeclared: list[str] = field(default_factory=list)


def judge(reference: Reference, seed: int, numbers: Iterable[int]) -> Verdicts:
    """Let both sides read odd files, and compare what they say.

    Args:
        numbers: of the seed's files.
    """
    verdicts = Verdicts()
    with tempfile.TemporaryDirectory(prefix="differential-") as parent:
        folder = Path(parent) / "config"
        folder.mkdir()
        for number in numbers:
            content = odd_file(Random(f"odd {seed}/{number}"), is_complete=reference.version.is_complete)
            (folder / "rules.yaml").write_bytes(content)
            theirs, ours = _said_there(reference, folder), _said_here(folder)
            verdicts.files += 1
            verdicts.refused += bool(ours)
            if bool(theirs) == bool(ours):
                continue
            reasons = _reasons(theirs, ours)
            verdicts.deliberate.update(reasons)
            if reasons:
                continue
            again = f"PYTHONPATH=tests python -m differential --seed {seed} --odd-file {number}"
            shown = content.decode("utf-8", "backslashreplace")
            verdicts.undeclared.append(
                f"seed {seed}, odd file {number}; there {theirs or 'accepted'}, here {ours or 'accepted'}\n"
                f"Again: {again}\n{shown}"
            )
    return verdicts


def odd_file(random: Random, *, is_complete: bool) -> bytes:
    generator = Generator(random, is_complete=is_complete, joined=random.random() < 0.2, mixed=True)
    file = generator.rules_file("odd")
    # Short ones: what is wrong is then the only thing that can be.
    file["descriptors"] = file["descriptors"][:2]
    replacements: list[str] = []
    for _ in range(random.choice((0, 1, 1, 1, 2))):
        _change(random, file, replacements)
    text = yaml.safe_dump(file, sort_keys=False, allow_unicode=True)
    for number, replacement in enumerate(replacements):
        # What it stands for, not a plain text that PyYAML would put in quotes.
        text = text.replace(f"{_MARK}{number}-", replacement)
    encoding = random.choices(("utf-8", "utf-16", "latin-1"), (95, 4, 1))[0]
    # Where the text ends early, what follows is not read there, however it is encoded.
    changes = (0,) if encoding == "latin-1" else (0, 0, 1, 1, 2) if replacements else (1, 2)
    for _ in range(random.choice(changes)):
        text = _change_text(random, text)
    # One byte order mark at most: what comes after a second one is misread there.
    text = text.lstrip("\ufeff") if encoding == "utf-16" or text.startswith("\ufeff\ufeff") else text
    return text.encode(encoding, "replace")


def _change(random: Random, file: dict[str, Any], replacements: list[str]) -> None:
    mapping = random.choice(list(_mappings(file)))
    mark = f"{_MARK}{len(replacements)}-"
    kind = random.randrange(5)
    if kind == 0:
        key = random.choice(list(mapping))
        del mapping[key]
        replacements.append("")
    elif kind == 1:
        mapping[mark] = random.choice(("x", 1, True, [], {}))
        replacements.append(random.choice(_KEYS))
    elif kind == 2 and isinstance(mapping.get("descriptors"), list) and isinstance(mapping["descriptors"][0], dict):
        mapping["descriptors"].append(random.choice((mark, dict(mapping["descriptors"][0]))))
        replacements.append(random.choice(_SCALARS))
    else:
        mapping[random.choice((*mapping, "value", "key"))] = mark
        replacements.append(random.choice(_SCALARS))


def _mappings(value: Any) -> list[dict[str, Any]]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    own = [value] if isinstance(value, dict) and value else []
    return own + [mapping for item in inner for mapping in _mappings(item)]


def _change_text(random: Random, text: str) -> str:
    at = random.randrange(len(text) + 1)
    kind = random.randrange(8)
    lines = text.splitlines(keepends=True)
    line = random.randrange(len(lines)) if lines else 0
    if kind == 0:
        return text + random.choice(_AFTER)
    if kind == 1:
        return random.choice(_BEFORE) + text
    if kind == 2:
        return text[:at] + text[at + 1 :]
    if kind == 3:
        return text[:at] + random.choice(_CHARACTERS) + text[at:]
    if kind == 4:
        return "".join((*lines[:line], *lines[line : line + 1], *lines[line:]))
    if kind == 5:
        return text.replace("\n", "\r\n")
    if kind == 6:
        return text[:at]
    return "".join((*lines[:line], *(f" {later}" for later in lines[line : line + 1]), *lines[line + 1 :]))


def _reasons(theirs: str, ours: Sequence[str]) -> set[str]:
    """The rows of the table that explain all that one side says and the other does not; none when they do not."""
    explanations, said = (REFUSED_THERE, [theirs]) if theirs else (REFUSED_HERE, ours)
    found = [next((name for name, text in explanations.items() if re.search(text, line)), None) for line in said]
    names = {name for name in found if name is not None}
    assert names <= DIFFERENCES.keys()
    return set() if None in found else names


def _said_there(reference: Reference, folder: Path) -> str:
    """Why it is refused; "" when it is not."""
    command = [str(reference.checker), "-config_dir", str(folder)]
    checked = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if checked.returncode == 0:
        return ""
    # A file that it cannot read ends it with a panic and a trace.
    said = [line for line in (checked.stdout + checked.stderr).splitlines() if "rror" in line or "panic" in line]
    return said[0].replace(str(folder), "") if said else f"exit code {checked.returncode}"


def _said_here(folder: Path) -> list[str]:
    result = CliRunner().invoke(check, [str(folder), "--format", "json"], env={"MERGE_DOMAIN_CONFIG": "false"})
    assert result.exit_code in (0, 1), result.output
    problems = json.loads(result.output)["problems"]
    return [f"{problem['key']}: {problem['message']}" for problem in problems]
