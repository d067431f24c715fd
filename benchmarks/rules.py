"""`python -m benchmarks.rules`: what many rules in one domain cost, at the load and at each match.

A match is measured with few rules and with many in the same run, so its ratio says something on a busy machine too. The
limiter keeps the plans of recent requests, so a match is what a request costs that was not seen lately.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from ratelimit_sidecar.config.rules_file import load_rules
from ratelimit_sidecar.limiter.rules import Rules

DOMAIN = "shop"
FEW, MANY = 10, 10_000
ROUNDS = 15
MATCHES = 2_000
"""In a round; the values asked for are spread over all rules."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A kind of rules.

    Args:
        rule: the descriptor of rule number n, as a line of YAML.
        entries: of a request that rule n limits.
    """

    name: str
    rule: Callable[[int], str]
    entries: Callable[[int], list[tuple[str, str]]]


def _limit(number: int) -> str:
    return f"rate_limit: {{unit: minute, requests_per_unit: {1 + number % 1_000}}}"


SHAPES = (
    Shape(
        "exact values",
        lambda number: f"  - {{key: tenant, value: tenant-{number}, {_limit(number)}}}",
        lambda number: [("tenant", f"tenant-{number}")],
    ),
    Shape(
        "values with * at the end",
        lambda number: f"  - {{key: path, value: /service-{number:05}/*, {_limit(number)}}}",
        lambda number: [("path", f"/service-{number:05}/orders")],
    ),
    Shape(
        "values with * in the middle",
        lambda number: f"  - {{key: path, value: /service-{number:05}/*/v1, {_limit(number)}}}",
        lambda number: [("path", f"/service-{number:05}/orders/v1")],
    ),
    Shape(
        "exact values, two levels",
        lambda number: f"  - {{key: tenant, value: tenant-{number}, descriptors: [{{key: user, {_limit(number)}}}]}}",
        lambda number: [("tenant", f"tenant-{number}"), ("user", "eve")],
    ),
    Shape(
        "values with * at the beginning",
        lambda number: f'  - {{key: host, value: "*.service-{number:05}.example", {_limit(number)}}}',
        lambda number: [("host", f"www.service-{number:05}.example")],
    ),
)


def load(shape: Shape, count: int, folder: Path) -> tuple[Rules, float]:
    """The rules, and the seconds that reading them took."""
    file = folder / "rules.yaml"
    lines = [f"domain: {DOMAIN}", "descriptors:", *(shape.rule(number) for number in range(count))]
    file.write_text("\n".join(lines))
    started = time.perf_counter()
    rules = load_rules([file])
    return rules, time.perf_counter() - started


def nanoseconds_a_match(rules: Rules, requests: Sequence[list[tuple[str, str]]]) -> float:
    started = time.perf_counter_ns()
    for entries in requests:
        rules.match(DOMAIN, entries)
    return (time.perf_counter_ns() - started) / len(requests)


def _requests(shape: Shape, count: int, matches: int) -> list[list[tuple[str, str]]]:
    return [shape.entries(index * count // matches) for index in range(matches)]


def measure(shape: Shape, folder: Path) -> tuple[float, float, float]:
    """Seconds to load many rules; nanoseconds a match with few and with many."""
    few, _ = load(shape, FEW, folder)
    many, load_seconds = load(shape, MANY, folder)
    matches = MATCHES
    if nanoseconds_a_match(many, _requests(shape, MANY, 20)) > 100_000:
        matches = 50
    of_few, of_many = _requests(shape, FEW, matches), _requests(shape, MANY, matches)
    assert all(many.match(DOMAIN, entries) is not None for entries in of_many)
    # Turn by turn, so that what else the machine does falls on both.
    rounds = [(nanoseconds_a_match(few, of_few), nanoseconds_a_match(many, of_many)) for _ in range(ROUNDS)]
    few_ns, many_ns = (statistics.median(column) for column in zip(*rounds, strict=True))
    return load_seconds, few_ns, many_ns


@click.command()
def main() -> None:
    """Measure and print a table."""
    click.echo(f"{'rules':<32}{f'load {MANY:,}':>14}{f'match of {FEW}':>16}{f'of {MANY:,}':>14}{'ratio':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for shape in SHAPES:
            gc.collect()
            load_seconds, few_ns, many_ns = measure(shape, Path(folder))
            click.echo(
                f"{shape.name:<32}{load_seconds:>12.2f} s{few_ns / 1_000:>13.2f} us{many_ns / 1_000:>11.2f} us"
                f"{many_ns / few_ns:>8.2f}"
            )


if __name__ == "__main__":
    main()
