"""`python -m benchmarks.admission`: simulate, print the tables, and write them and the charts into docs/.

With names of scenarios only those are simulated, and nothing is written.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import click

from benchmarks.admission import plots, scenarios
from benchmarks.admission.report import table
from benchmarks.admission.run import EVENTUAL, Outcome, policies_for, run
from benchmarks.admission.scenarios import Scenario

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "reference" / "simulation.md"
INTRO = """\
# Simulated admission: all scenarios

<!-- Written by `make simulate`; edit benchmarks/admission, not this page. -->

What it shows: [simulation.md](../simulation.md). A range is from the least to the greatest of five seeds; one number is
the worst.

"80 ms links" are 80 ms one way between any two of three regions. "Real regions" have Azure's round trips, the 95th
percentile over the 30 days up to 2026-07-30
([Microsoft](https://learn.microsoft.com/azure/networking/azure-network-latency), see `benchmarks/admission/links.py`).
A lost message is sent again a round trip and a quarter later (RACK, RFC 8985), but not before 200 ms, and those behind
it wait. During a cut all waits; sidecars end a connection that is silent for 5 s and dial again. Denied requests do not
come back. Unless the title says otherwise the limit is 100/s with a burst of 200. Clocks are right, and each region is
one sidecar.

- *Of ideal*: of what one bucket would admit, if all requests came to it without delay.
- *Utilisation*: of `capacity + rate * T`.
- *Worst burst over the limit*: the most by which the admissions of any interval exceed `capacity + rate * its length`.
- *Undelivered*, *bound*: [what `eventual` may admit](../simulation.md#the-bound-on-the-overshoot-of-eventual) beyond
  the limit. The simulator fails when a worst burst is above either.
- *Time to adapt*: from a shift of demand until a second begins in which 95 % of its refill is admitted.
- *Decision*: how long a request waits for it; "at once" is without another region.

"""

SEEDS = 5

Task = tuple[Scenario, str, int]


@click.command()
@click.argument("names", nargs=-1, metavar="[SCENARIO]...")
@click.option("--seed", default=1, show_default=True, help=f"The first of {SEEDS}.")
def main(names: tuple[str, ...], seed: int) -> None:
    """Simulate the SCENARIOs, or all of them; then the tables and the charts in docs/ are written anew."""
    known = {scenario.name: scenario for scenario in scenarios.scenarios()}
    if unknown := set(names) - known.keys():
        raise click.BadParameter(f"{', '.join(sorted(unknown))}; there are {', '.join(known)}")
    wanted = [known[name] for name in names] or list(known.values())
    seeds = range(seed, seed + SEEDS)
    distances = [] if names else scenarios.distances()
    rows = [(scenario, policy) for scenario in wanted for policy in policies_for(scenario)]
    rows += [(scenario, EVENTUAL) for scenario in distances]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(_run, [(*row, each) for row in rows for each in seeds]))
    by_row = [results[at : at + SEEDS] for at in range(0, len(results), SEEDS)]
    tables = "\n".join(
        table(scenario, [outcomes for (of, _), outcomes in zip(rows, by_row, strict=True) if of is scenario])
        for scenario in wanted
    )
    click.echo(tables)
    if not names:
        PAGE.write_text(f"{INTRO}{tables}")
        _write_charts(known, [outcomes[0] for outcomes in by_row], distances)


def _run(task: Task) -> Outcome:
    return run(*task)


def _write_charts(known: dict[str, Scenario], firsts: Sequence[Outcome], distances: Sequence[Scenario]) -> None:
    for name, title, seconds in (
        ("overload", "Ten times the limit, from a full bucket on", (0, 10)),
        ("shift", "The demand moves to one region after 20 s", (16, 32)),
        ("partition", "One region is cut off from 20 s to 30 s", (15, 50)),
    ):
        outcomes = [outcome for outcome in firsts if outcome.scenario == name]
        plots.admitted_over_time(DOCS / "images" / f"simulation-{name}.svg", title, known[name], outcomes, seconds)
    delays_ms = [scenario.topology.one_way_us[0][1] // 1_000 for scenario in distances]
    names = {scenario.name for scenario in distances}
    plots.overshoot_over_distance(
        DOCS / "images" / "simulation-distance.svg",
        "Ten times the limit: what eventual admits beyond it",
        delays_ms,
        [outcome for outcome in firsts if outcome.scenario in names],
    )


if __name__ == "__main__":
    main()
