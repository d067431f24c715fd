"""`python -m benchmarks.quotas`: simulate, print the tables, and write them and the chart into docs/.

With names of scenarios only those are simulated, and nothing is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from benchmarks.admission.plots import draw
from benchmarks.quotas.run import POLICIES, RATE, Outcome, run
from benchmarks.quotas.scenarios import STEP_S, Scenario, scenarios

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "reference" / "quota-simulation.md"
INTRO = """\
# Simulated quotas: all scenarios

<!-- Written by `make simulate`; edit benchmarks/quotas, not this page. -->

What it shows: [rlqs.md](../rlqs.md#how-shares-follow-the-demand). The limit is 300 a second. Envoys report every five
seconds, each at its own moment. Of five seeds always the worst.

- *Fair again after*: the change, on average of 4 s. An Envoy that dies keeps its share until its assignment ends.
- *Used*: of what could be admitted, from 10 s after the change on.
- *Lacked*: denied requests of fair shares.

"""
SEEDS = 5


@click.command()
@click.argument("names", nargs=-1, metavar="[SCENARIO]...")
@click.option("--seed", default=1, show_default=True, help=f"The first of {SEEDS}.")
def main(names: tuple[str, ...], seed: int) -> None:
    """Simulate the SCENARIOS, or all of them; then the tables and the chart in docs/ are written anew."""
    known = {scenario.name: scenario for scenario in scenarios()}
    if unknown := set(names) - known.keys():
        raise click.BadParameter(f"{', '.join(sorted(unknown))}; there are {', '.join(known)}")
    wanted = [known[name] for name in names] or list(known.values())
    seeds = range(seed, seed + SEEDS)
    outcomes = [[[run(scenario, policy, each) for each in seeds] for policy in POLICIES] for scenario in wanted]
    tables = "\n".join(table(scenario, of) for scenario, of in zip(wanted, outcomes, strict=True))
    click.echo(tables)
    if not names:
        PAGE.write_text(f"{INTRO}{tables}")
        _chart([of[0] for of in outcomes[0]])


def table(scenario: Scenario, outcomes: Sequence[Sequence[Outcome]]) -> str:
    """Of the seeds always the worst."""
    lines = [
        f"**{scenario.title}**\n",
        "| | fair again after | used | lacked of fair shares | worst burst over the limit |",
        "|---|--:|--:|--:|--:|",
    ]
    for of_seeds in outcomes:
        settled = [second for outcome in of_seeds for second in outcome.settled_s]
        worst = max((STEP_S if second is None else second) for second in settled)
        after = "never" if None in settled else f"{worst} s"
        used = min(share for outcome in of_seeds for share in outcome.used)
        missed = max(outcome.missed for outcome in of_seeds)
        over = max(outcome.over for outcome in of_seeds)
        lines.append(f"| {of_seeds[0].policy} | {after} | {used:.0%} | {missed:,} | {over:,} |")
    return "\n".join(lines) + "\n"


def _chart(outcomes: Sequence[Outcome]) -> None:
    seconds = (STEP_S - 10, 2 * STEP_S - 10)
    lines: dict[str, Sequence[tuple[float, float]]] = {
        "the limit": [(second, RATE) for second in seconds],
    }
    for outcome in outcomes:
        lines[outcome.policy] = [(second + 0.5, float(outcome.admitted[second])) for second in range(*seconds)]
    draw(
        DOCS / "images" / "quotas-moves.svg",
        f"The demand moves from one Envoy to another after {STEP_S} s",
        lines,
        "seconds",
        "admitted per second",
    )


if __name__ == "__main__":
    main()
