"""docs/reference/bounds.md says what the constants say."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from ratelimit_sidecar.crdt.journal import Refused
from ratelimit_sidecar.replication.wire import FAULTLESS, Reason

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "bounds.md").read_text()
BOUNDS = re.findall(r"^\| (.*?) \| (.*?) \| (`\w+\..*`) \|$", PAGE, re.MULTILINE)


def value_of(constant: str) -> float:
    package, module, *names = constant.split(".")
    value: object = importlib.import_module(f"ratelimit_sidecar.{package}.{module}")
    for name in names:
        value = getattr(value, name)
    assert isinstance(value, (int, float))
    return value


def spellings_of(constant: str, value: float) -> set[str]:
    """The ways in which the page may write a value; the unit follows from the constant's name."""
    for suffix, in_a_second in (("_US", 1e6), ("_NS", 1e9)):
        if constant.endswith(suffix):
            return {f"{value / in_a_second:g} s", f"{value / in_a_second * 1e3:g} ms"}
    if isinstance(value, float):
        return {f"{value:g} s"}
    spellings = {f"{value:,}"}
    if constant.lower().endswith("_bytes"):
        return {f"{value:,} bytes", f"{value / 1_024:g} KiB", f"{value / 1_024**2:g} MiB"}
    return spellings


@pytest.mark.parametrize(("what", "at_most", "constants"), BOUNDS, ids=[what for what, _, _ in BOUNDS])
def test_a_bound_is_that_of_the_constant(what: str, at_most: str, constants: str) -> None:
    for constant in re.findall(r"`(.*?)`", constants):
        spellings = spellings_of(constant, value_of(constant))
        assert any(re.search(rf"(?<![\d,.]){re.escape(spelling)}(?![\d])", at_most) for spelling in spellings), (
            what,
            constant,
            spellings,
        )


def test_the_page_has_a_constant_for_each_bound() -> None:
    tables, _, _ = PAGE.partition("\n## Why")
    assert len(BOUNDS) == len(re.findall(r"^\| (?!What )", tables, re.MULTILINE))


@pytest.mark.parametrize(
    ("heading", "reasons"),
    [("Why a stream", set(Reason) - FAULTLESS), ("What is refused", set(Refused))],
)
def test_the_page_lists_each_reason_once(heading: str, reasons: set[str]) -> None:
    [section] = re.findall(rf"^## {heading}.*?\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    listed = [
        name for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    ]
    assert sorted(listed) == sorted(reasons)


def test_the_page_lists_the_reasons_that_are_no_errors() -> None:
    [line] = re.findall(r"^No errors: (.*)$", PAGE, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", line)) == FAULTLESS
