#!/usr/bin/env python3
"""Pictures of the dashboards for docs/images, from sidecars in trouble: the site of tests/deploy/test_seen_working.py.

    pip install matplotlib && PYTHONPATH=.:tests python dev/picture_dashboards.py [SECONDS]

It is no Grafana, but a small renderer of our own. It asks Prometheus what Grafana would ask, and draws panels where
they would stand; colours, axes and legends look otherwise there.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import tempfile
from io import BytesIO
from pathlib import Path
from signal import SIGTERM
from typing import Any

import httpx
import matplotlib as mpl
from deploy.dashboards import JSONS, asked
from deploy.test_seen_working import BROKEN_RULES, RULES, STOPPED, Site, site
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from PIL import Image

IMAGES = Path(__file__).parents[1] / "docs" / "images"
STEP_S = 1
INTERVAL = "15s"
"""For `$__rate_interval`."""

WIDTH = 24
"""Of Grafana's grid."""
INCHES = 0.62
"""Of a unit of it."""
SERIES = 12
"""In one panel, at most."""

Series = list[tuple[str, list[float], list[float]]]
"""Name, seconds since the beginning, values."""


def main() -> None:
    seconds = int(sys.argv[1]) if len(sys.argv) > 1 else 180
    mpl.use("Agg")
    plt.rcParams.update({"font.size": 7, "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False})
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(draw_all(Path(folder), seconds))


async def draw_all(folder: Path, seconds: int) -> None:
    async with site(folder) as at, asyncio.TaskGroup() as tasks:
        traffic = tasks.create_task(at.send_traffic())
        await make_trouble(at, folder, seconds)
        drawn = [(file.stem, json.loads(file.read_text())["panels"]) for file in JSONS]
        series = [[await ask_all(at.prometheus, panel, seconds) for panel in panels] for _, panels in drawn]
        traffic.cancel()
    for (name, panels), of_panels in zip(drawn, series, strict=True):
        draw(panels, of_panels, IMAGES / f"dashboard-{name}.png")


async def make_trouble(at: Site, folder: Path, seconds: int) -> None:
    """A third of the time all is well but for a clock; then rules are broken for a third, and a sidecar is stopped."""
    await asyncio.sleep(seconds / 3)
    rules = folder / f"rules-{BROKEN_RULES}" / "shop.yaml"
    rules.write_text(RULES.replace("shadow_mode", "shade_mode"))
    await at.ask("us-1", "quota", "bob", hits=97)
    await asyncio.sleep(seconds / 3)
    rules.write_text(RULES)
    at.sidecars[STOPPED].signal(SIGTERM)
    await asyncio.sleep(seconds / 3)


def draw(panels: list[dict[str, Any]], of_panels: list[Series], image: Path) -> None:
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    figure = plt.figure(figsize=(WIDTH * INCHES, height * INCHES * 0.62), dpi=80)
    for panel, series in zip(panels, of_panels, strict=True):
        place = panel["gridPos"]
        box = (place["x"] / WIDTH, 1 - (place["y"] + place["h"]) / height, place["w"] / WIDTH, place["h"] / height)
        if panel["type"] == "row":
            figure.text(0.005, box[1] + box[3] * 0.3, panel["title"], weight="bold", size=9)
            continue
        axes = figure.add_axes((box[0] + 0.035, box[1] + 0.025, box[2] - 0.045, box[3] - 0.05))
        axes.set_title(panel["title"], loc="left", size=8)
        _draw_panel(axes, panel, series)
    whole = BytesIO()
    figure.savefig(whole)
    plt.close(figure)
    # Of few colours, and so a fourth as large.
    Image.open(whole).convert("RGB").quantize(48).save(image, optimize=True)


async def ask_all(prometheus: httpx.AsyncClient, panel: dict[str, Any], seconds: int) -> Series:
    """Of all queries of a panel."""
    series: Series = []
    for target in panel.get("targets", ()):
        series += await ask(prometheus, asked(target["expr"], INTERVAL), target["legendFormat"], seconds)
    return series


async def ask(prometheus: httpx.AsyncClient, expression: str, legend: str, seconds: int) -> Series:
    now = float((await prometheus.get("/api/v1/query", params={"query": "time()"})).json()["data"]["result"][1])
    begun = now - seconds
    parameters: dict[str, str | float] = {"query": expression, "start": begun, "end": now, "step": STEP_S}
    found = (await prometheus.get("/api/v1/query_range", params=parameters)).raise_for_status().json()
    return [
        (
            _name(legend, of["metric"]),
            [float(at) - begun for at, _ in of["values"]],
            [float(value) for _, value in of["values"]],
        )
        for of in found["data"]["result"]
    ]


def _name(legend: str, labels: dict[str, str]) -> str:
    if not legend:
        return f"{labels.get('region', '')} to {labels.get('peer', '')}"
    return re.sub(r"{{(\w+)}}", lambda match: labels.get(match[1], ""), legend)


def _draw_panel(axes: Axes, panel: dict[str, Any], series: Series) -> None:
    unit = panel["fieldConfig"]["defaults"]["unit"]
    if panel["type"] == "heatmap":
        series.sort(key=lambda of: float(of[0]))
        counts = [of[2] for of in series]
        rows = [
            [more - less for more, less in zip(*pair, strict=True)] for pair in zip(counts[1:], counts, strict=False)
        ]
        axes.pcolormesh(series[0][1], range(len(rows) + 1), [*rows, rows[-1]], shading="nearest", cmap="viridis")
        bounds = [_in_unit(float(of[0]), unit) for of in series[1:-1]]
        axes.set_yticks(range(len(rows)), [*bounds, f"> {bounds[-1]}"])
        axes.grid(visible=False)
    elif panel["type"] == "timeseries":
        for name, at, values in series[:SERIES]:
            axes.plot(at, values, linewidth=1, label=name)
        axes.yaxis.set_major_formatter(lambda value, _: _in_unit(value, unit))
        if "min" in panel["fieldConfig"]["defaults"]:
            axes.set_ylim(bottom=0)
        axes.legend(fontsize=5, loc="lower left", ncols=3, framealpha=0.5)
    elif panel["type"] == "bargauge":
        axes.barh(range(len(series)), [of[2][-1] for of in series], color="lightsteelblue")
        axes.set_xlim(0, 1)
        axes.set_yticks([])
        for row, of in enumerate(series):
            axes.text(0.01, row, f"{of[0]}   {_in_unit(of[2][-1], unit)}", va="center")
    else:
        lines = [f"{name}   {_in_unit(values[-1], unit)}" for name, _, values in series[:SERIES]]
        axes.axis("off")
        axes.text(0, 0.95, "\n".join(lines), va="top", size=8)


def _in_unit(value: float, unit: str) -> str:
    if unit == "s" and abs(value) < 1:
        return f"{value * 1e3:g} ms" if abs(value) >= 0.001 else f"{value * 1e6:g} µs"
    if unit == "percentunit":
        return f"{value * 100:g} %"
    if unit in ("bytes", "Bps") and abs(value) >= 1_000:
        return f"{value / 1e6:g} M" if abs(value) >= 1e6 else f"{value / 1e3:g} k"
    return f"{value:,.6g} s" if unit == "s" else f"{value:,.6g}"


if __name__ == "__main__":
    main()
