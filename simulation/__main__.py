"""Run seeds: one with its trace, or as many as there is time for, on all cores.

python -m simulation --seed 123 --trace
python -m simulation --seconds 60 --nodes 3
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field

import click

from simulation.oracles import BrokenPromise
from simulation.run import failure_of, replay, run_seed


@dataclass(slots=True)
class _Share:
    """What one process has done."""

    seeds: int = 0
    frames: int = 0
    decisions: int = 0
    failures: dict[int, str] = field(default_factory=dict)


@click.command(context_settings={"show_default": True})
@click.option("--seed", type=int, help="Run this one, and print what came of it.")
@click.option("--trace", is_flag=True, help="With --seed: print everything that happens, too.")
@click.option("--seconds", default=60.0, help="Without --seed: run seeds for so long.")
@click.option("--first-seed", default=0, help="Begin with this one.")
@click.option("--nodes", default=3, type=click.IntRange(2, 26), help="In each run.")
@click.option("--virtual-seconds", default=10.0, help="In which things go wrong, in each run.")
@click.option("--processes", default=os.cpu_count() or 1, type=click.IntRange(1))
def main(
    seed: int | None, trace: bool, seconds: float, first_seed: int, nodes: int, virtual_seconds: float, processes: int
) -> None:
    """Simulate a mesh of sidecars under faults; the exit code is 1 when a seed has failed."""
    if seed is not None:
        try:
            click.echo(run_seed(seed, nodes, virtual_seconds, click.echo if trace else None))
        except BrokenPromise as error:
            raise click.ClickException(str(error)) from error
        return
    started = time.monotonic()
    total = _Share()
    with ProcessPoolExecutor(processes) as pool:
        shares = [
            pool.submit(_run, first_seed + process, processes, nodes, virtual_seconds, seconds)
            for process in range(processes)
        ]
        for finished in as_completed(shares):
            share = finished.result()
            total.seeds += share.seeds
            total.frames += share.frames
            total.decisions += share.decisions
            total.failures |= share.failures
    for failed, why in sorted(total.failures.items()):
        click.echo(f"seed {failed}: {why}\n  {replay(failed, nodes, virtual_seconds)}")
    click.echo(
        f"{total.seeds} seeds from {first_seed} on, {nodes} nodes x {virtual_seconds:g} virtual seconds, in {processes}"
        f" processes: {total.seeds / (time.monotonic() - started) * 60:.0f} a minute;"
        f" {total.frames} frames, {total.decisions} decisions, {len(total.failures)} seeds failed"
    )
    raise SystemExit(bool(total.failures))


def _run(first_seed: int, step: int, nodes: int, virtual_seconds: float, seconds: float) -> _Share:
    """Every `step`-th seed, for so long."""
    until = time.monotonic() + seconds
    share = _Share()
    seed = first_seed
    while time.monotonic() < until:
        try:
            outcome = run_seed(seed, nodes, virtual_seconds)
        except Exception as error:
            # Whatever it is, it is this seed's result.
            share.failures[seed] = failure_of(error)
        else:
            share.frames += outcome.frames
            share.decisions += outcome.decisions
        share.seeds += 1
        seed += step
    return share


if __name__ == "__main__":
    main()
