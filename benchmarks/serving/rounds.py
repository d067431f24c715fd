"""Rounds that alternate: every variant is measured for a moment, again and again, so that noise falls on all alike.

What counts is the ratio to the base variant *within a round*; reported are the median of these ratios and the range of
their middle half. Absolute figures are medians of this machine and moment.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import click

Figures = Mapping[str, float]
"""What one round of one variant gave, by name with its unit."""


@dataclass(frozen=True, slots=True)
class Spread:
    """A median, the quartiles around it, and the largest value."""

    median: float
    low: float
    high: float
    largest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high, max(values))


@dataclass(frozen=True, slots=True)
class Result:
    """One figure of one variant over all rounds.

    Args:
        ratio: to the same figure of the base in the same round, or the base's to it; None where there is no divisor, or
            it was zero.
    """

    group: str
    variant: str
    figure: str
    value: Spread
    ratio: Spread | None

    def as_json(self) -> dict[str, object]:
        return {
            "group": self.group,
            "variant": self.variant,
            "figure": self.figure,
            "median": self.value.median,
            "quartiles": [self.value.low, self.value.high],
            "largest": self.value.largest,
            "ratio": self.ratio and self.ratio.median,
            "ratio_quartiles": self.ratio and [self.ratio.low, self.ratio.high],
        }


def alternate(
    group: str, variants: Mapping[str, Callable[[], Figures]], rounds: int, *, of_base: bool = False
) -> list[Result]:
    """Measure all variants `rounds` times in turn, in an order drawn anew for each round; the first one is the base.

    Args:
        of_base: ratios are the base's figures to the variant's, in place of the variant's to the base's.
    """
    measured: dict[str, list[Figures]] = {name: [] for name in variants}
    order = list(variants)
    shuffle = random.Random(1).shuffle
    for number in range(rounds):
        _progress(f"{group}: round {number + 1} of {rounds}")
        shuffle(order)
        for name in order:
            measured[name].append(variants[name]())
    _progress("")
    base = measured[next(iter(variants))]
    results = []
    for name, of_rounds in measured.items():
        for figure in of_rounds[0]:
            values = [of_round[figure] for of_round in of_rounds]
            base_values = [of_round.get(figure, 0.0) for of_round in base]
            ratio = _ratio(base_values, values) if of_base else _ratio(values, base_values)
            results.append(Result(group, name, figure, Spread.of(values), ratio))
    return results


def _ratio(values: Sequence[float], others: Sequence[float]) -> Spread | None:
    if not all(others):
        return None
    return Spread.of([value / other for value, other in zip(values, others, strict=True)])


Command = TypeVar("Command", bound=Callable[..., None])


def round_options(*, rounds: int, seconds: float) -> Callable[[Command], Command]:
    """The options of a command that measures in rounds, with their defaults."""

    def add(command: Command) -> Command:
        for option in (
            click.option("--json", "as_json", is_flag=True, help="Print JSON in place of the table."),
            click.option(
                "--seconds", default=seconds, show_default=True, type=click.FloatRange(0.1), help="Of one round."
            ),
            click.option("--rounds", default=rounds, show_default=True, type=click.IntRange(1)),
        ):
            command = option(command)
        return command

    return add


def print_results(results: Sequence[Result], *, as_json: bool) -> None:
    """As one JSON array, or as a table with a block for each group."""
    if as_json:
        print(json.dumps([result.as_json() for result in results], indent=1))
        return
    width = max(len(result.variant) for result in results)
    group = None
    for result in results:
        if result.group != group:
            group = result.group
            print(f"\n{group}")
        ratio = ""
        if result.ratio is not None:
            ratio = f"{result.ratio.median:6.2f}  ({result.ratio.low:.2f}-{result.ratio.high:.2f})"
        print(f"  {result.variant:<{width}}  {result.figure:<14}{result.value.median:>14,.1f}{ratio:>22}")


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{text:<60}\r{text}", end="", file=sys.stderr, flush=True)
