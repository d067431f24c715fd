"""The outcomes as Markdown: a table for each scenario, each number over all seeds.

Ranges are from the least to the greatest of the seeds; where one number stands, it is the worst of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from benchmarks.admission.run import ADAPT_US, CENTRAL, CLOSED, Outcome
from benchmarks.admission.scenarios import Scenario

Outcomes = Sequence[Outcome]
"""Of one scenario under one policy, a seed each."""

_Column = tuple[str, Callable[[Outcomes], str]]


def table(scenario: Scenario, outcomes: Iterable[Outcomes]) -> str:
    """One scenario as Markdown: a heading, its facts, and a table with a row for each policy.

    Args:
        outcomes: of each policy in turn.
    """
    rows = list(outcomes)
    columns = _columns(scenario)
    lines = [
        f"## {scenario.title}",
        "",
        f"{_facts(scenario, rows[0])}",
        "",
        "| " + " | ".join(name for name, _ in columns) + " |",
        "|---" + "|--:" * (len(columns) - 1) + "|",
    ]
    lines += ["| " + " | ".join(cell(row) for _, cell in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _facts(scenario: Scenario, outcomes: Outcomes) -> str:
    first = outcomes[0]
    return (
        f"`{scenario.name}`: {_number(first.offered)} requests in {scenario.duration_us // 1_000_000} s; "
        f"capacity + rate * T is {_number(first.ceiling)}, "
        f"one bucket for all would admit {_range(outcome.ideal for outcome in outcomes)}."
    )


def _columns(scenario: Scenario) -> list[_Column]:
    columns: list[_Column] = [
        ("Policy", lambda row: _name(scenario, row)),
        ("Admitted", lambda row: _range(outcome.admitted for outcome in row)),
        ("of ideal", lambda row: _percent((outcome.admitted, outcome.ideal) for outcome in row)),
        ("Utilisation", lambda row: _percent((outcome.admitted, outcome.ceiling) for outcome in row)),
        ("Worst burst over the limit", lambda row: _number(max(outcome.worst_burst for outcome in row))),
        ("Undelivered", lambda row: _most(outcome.undelivered for outcome in row)),
        ("Bound", lambda row: _most(outcome.bound for outcome in row)),
    ]
    if scenario.shifts_us:
        columns += [
            ("Time to adapt", _adapted),
            (f"Used from {ADAPT_US // 1_000_000} s after", _used),
        ]
    if scenario.cuts:
        columns.append(("Admitted/s in the cut, by region", _cut))
    columns.append(("Decision, median / p99", _latency))
    return columns


def _name(scenario: Scenario, outcomes: Outcomes) -> str:
    name = outcomes[0].policy
    return "central" if name in (CENTRAL, CLOSED) and not scenario.has_faults else name


def _adapted(outcomes: Outcomes) -> str:
    times_us = [time_us for outcome in outcomes for time_us in outcome.adapted_us]
    known_us = [time_us for time_us in times_us if time_us is not None]
    return "never" if len(known_us) < len(times_us) else f"{max(known_us) / 1e6:.2f} s"


def _used(outcomes: Outcomes) -> str:
    return f"{min(used for outcome in outcomes for used in outcome.used_per_mille) / 10:.1f} %"


def _cut(outcomes: Outcomes) -> str:
    return ", ".join(_range(rates) for rates in zip(*(outcome.cut_per_second for outcome in outcomes), strict=True))


def _latency(outcomes: Outcomes) -> str:
    median_us, high_us = (max(values) for values in zip(*(outcome.latencies_us for outcome in outcomes), strict=True))
    return f"{median_us / 1_000:.0f} / {high_us / 1_000:.0f} ms" if high_us else "at once"


def _most(values: Iterable[int | None]) -> str:
    known = [value for value in values if value is not None]
    return _number(max(known)) if known else ""


def _percent(parts: Iterable[tuple[int, int]]) -> str:
    percents = [f"{100 * part / whole:.1f}" for part, whole in parts]
    low, high = min(percents, key=float), max(percents, key=float)
    return f"{low} %" if low == high else f"{low}-{high} %"


def _range(values: Iterable[int]) -> str:
    known = list(values)
    low, high = min(known), max(known)
    return _number(low) if low == high else f"{_number(low)}-{_number(high)}"


def _number(value: int) -> str:
    return f"{value:,}"
