"""What the demo shows: a table redrawn in place on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import asyncio
import math
import time

from rich.box import SIMPLE
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ratelimit_sidecar.demo.lag import LagMeter
from ratelimit_sidecar.demo.promise import OneBucket, Verdict
from ratelimit_sidecar.demo.traffic import Traffic

_REDRAW_S = 0.25
_PROGRESS_S = 2.0


class Screen:
    """Shows the traffic while `run` runs.

    Args:
        one_bucket: what the total is compared with.
    """

    def __init__(self, console: Console, traffic: Traffic, one_bucket: OneBucket, meter: LagMeter) -> None:
        self._console = console
        self._traffic = traffic
        self._one_bucket = one_bucket
        self._meter = meter

    async def run(self) -> None:
        """Redraw until cancelled. The last drawing goes with it: `table` is for good."""
        if self._console.is_terminal:
            with Live(console=self._console, auto_refresh=False, transient=True) as live:
                while True:
                    live.update(self.table(self._traffic.phase.title), refresh=True)
                    await asyncio.sleep(_REDRAW_S)
        started_at = time.monotonic()
        while True:
            await asyncio.sleep(_PROGRESS_S)
            self._console.print(self._line(time.monotonic() - started_at), soft_wrap=True)

    def table(self, title: str | None = None) -> Table:
        """Regions, and all of them together against one global bucket."""
        table = Table(
            title=title, title_justify="left", show_footer=True, box=SIMPLE, collapse_padding=True, pad_edge=False
        )
        regions = self._traffic.regions
        admitted = sum(region.admitted for region in regions)
        table.add_column("region", "all together\n[dim]one global bucket[/dim]", no_wrap=True)
        for heading, footer in (
            ("sent", f"{sum(len(region.sent_at) for region in regions):,}"),
            ("allowed", f"{admitted:,}\n[dim]{self._one_bucket.admitted:,}[/dim]"),
            ("denied", f"{sum(region.denied for region in regions):,}"),
            ("errors", f"{sum(region.errors for region in regions):,}"),
            ("p50", ""),
            ("p99", ""),
            ("sync lag", ""),
        ):
            table.add_column(heading, footer, justify="right", no_wrap=True)
        for region in regions:
            table.add_row(
                region.name,
                f"{len(region.sent_at):,}",
                f"[green]{region.admitted:,}",
                f"[yellow]{region.denied:,}",
                f"[red]{region.errors:,}" if region.errors else "0",
                _milliseconds(region.latency_ms(0.50)),
                _milliseconds(region.latency_ms(0.99)),
                _milliseconds(self._meter.lags_s.get(region.name, math.nan) * 1_000),
            )
        return table

    def _line(self, elapsed_s: float) -> str:
        regions = self._traffic.regions
        admitted = sum(region.admitted for region in regions)
        each = ", ".join(f"{region.name} {region.admitted:,}/{region.denied:,}" for region in regions)
        lag_ms = max(self._meter.lags_s.values(), default=math.nan) * 1_000
        return (
            f"{elapsed_s:4.0f} s  allowed/denied: {each}; all {admitted:,}, one global bucket "
            f"{self._one_bucket.admitted:,}; sync lag {_milliseconds(lag_ms)}"
        )


def summary(verdict: Verdict) -> Text:
    """What was admitted, against the promise."""
    text = Text(
        f"One global bucket would admit {verdict.one_bucket:,}; all regions together admitted {verdict.admitted:,}.\n"
        f"Promised: at most {verdict.ceiling:,} (capacity, refill) + {verdict.allowance:,} (under way between regions),"
        f" at least {verdict.one_bucket:,} - {verdict.allowance:,}.\n"
    )
    if verdict.broken is None:
        return text.append("Promise kept.", style="bold green")
    return text.append(f"Promise BROKEN: {verdict.broken}.", style="bold red")


def _milliseconds(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:,.1f} ms"
