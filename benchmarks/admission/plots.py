"""The outcomes as line charts, in SVG for the docs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import leather

from benchmarks.admission.run import SERIES_STEP_US, Outcome
from benchmarks.admission.scenarios import Scenario

WIDTH, HEIGHT = 900, 420

COLOURS = {
    "the limit": "#999999",
    "central, fails open": "#e6862a",
    "central, fails closed": "#b08d57",
    "static split": "#6b7fd7",
    "max-merge sketch": "#d7263d",
    "eventual": "#1b998b",
    "strict": "#2e294e",
    "strict, wait: 250ms": "#c08497",
    "worst burst": "#1b998b",
    "undelivered": "#e6862a",
    "bound": "#999999",
    "sidecar": "#1b998b",
    "Doorman's way": "#6b7fd7",
    "the whole limit each": "#d7263d",
    "asked each time": "#b08d57",
}

_FONT = "Helvetica, Arial, sans-serif"

Points = Sequence[tuple[float, float]]


def admitted_over_time(
    path: Path, title: str, scenario: Scenario, outcomes: Sequence[Outcome], seconds: tuple[int, int]
) -> None:
    """Requests admitted a second by all regions together, in steps of `SERIES_STEP_US`.

    Args:
        seconds: from where to where.
    """
    per_second = 1_000_000 / SERIES_STEP_US
    from_s, to_s = seconds
    first, last = from_s * 1_000_000 // SERIES_STEP_US, to_s * 1_000_000 // SERIES_STEP_US
    rate = scenario.limit.tokens * 1_000_000 / scenario.limit.period_us
    lines: dict[str, Points] = {"the limit": [(from_s, rate), (to_s, rate)]}
    for outcome in outcomes:
        totals = [sum(step) * per_second for step in zip(*outcome.series, strict=True)]
        lines[outcome.policy] = [((step + 0.5) / per_second, totals[step]) for step in range(first, last)]
    draw(path, title, lines, "seconds", "admitted per second")


def overshoot_over_distance(path: Path, title: str, delays_ms: Sequence[int], outcomes: Sequence[Outcome]) -> None:
    """What `eventual` admits beyond the limit, and what it could at most, by the links' one-way delay."""
    lines: dict[str, Points] = {
        "worst burst": _points(delays_ms, [outcome.worst_burst for outcome in outcomes]),
        "undelivered": _points(delays_ms, [outcome.undelivered or 0 for outcome in outcomes]),
        "bound": _points(delays_ms, [outcome.bound or 0 for outcome in outcomes]),
    }
    draw(path, title, lines, "one-way delay, ms", "tokens")


def _points(xs: Sequence[int], ys: Sequence[int]) -> Points:
    return [(float(x), float(y)) for x, y in zip(xs, ys, strict=True)]


def draw(path: Path, title: str, lines: Mapping[str, Points], x_name: str, y_name: str) -> None:
    _set_theme()
    chart = leather.Chart(title)
    for name, points in lines.items():
        chart.add_line(list(points), name=name, stroke_color=COLOURS[name])
    chart.add_x_axis(name=x_name)
    chart.add_y_axis(name=y_name)
    path.parent.mkdir(parents=True, exist_ok=True)
    chart.to_svg(str(path), WIDTH, HEIGHT)


def _set_theme() -> None:
    """leather keeps its look in module-level constants."""
    theme = leather.theme
    theme.background_color = "#ffffff"
    theme.title_font_family = theme.legend_font_family = _FONT
    theme.axis_title_font_family = theme.tick_font_family = _FONT
    theme.label_color = theme.axis_title_color = "#555555"
    theme.legend_font_size = 13
    theme.legend_font_char_width = 7
