"""`python -m benchmarks.workers`: the most that several processes behind one port could gain on this machine.

Two sidecars that know nothing of each other, each with load of its own, beside one sidecar with all of that load. What
the workers of one sidecar would have to tell each other, and the port's uneven shares, would come on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import click

from benchmarks.serving.h2load import Load, grpc_load
from benchmarks.serving.requests import ONE_DESCRIPTOR
from benchmarks.serving.rounds import Figures, alternate, print_results, round_options
from benchmarks.serving.servers import Server, running_servers

PARTS = 2
LOADS = (Load(2, 16), Load(2, 100))


def measure(servers: Sequence[Server], load: Load, seconds: float) -> Figures:
    """As many h2loads at once in either case, since one uses no more than one core."""
    cpu_seconds = sum(server.cpu_seconds for server in set(servers))
    with ThreadPoolExecutor(len(servers)) as pool:
        parts = list(pool.map(lambda server: grpc_load(server.address, ONE_DESCRIPTOR, load, seconds), servers))
    per_second = sum(part.per_second for part in parts)
    cpu_us = (sum(server.cpu_seconds for server in set(servers)) - cpu_seconds) * 1e6 / (per_second * seconds)
    return {"requests/s": per_second, "mean us": sum(part.mean_us for part in parts) / len(parts), "CPU us": cpu_us}


@click.command()
@round_options(rounds=9, seconds=1.0)
def main(rounds: int, seconds: float, as_json: bool) -> None:
    """Measure one process and two under the same load."""
    with running_servers() as servers:
        sidecars = [servers.sidecar(f"sidecar-{number}") for number in range(PARTS)]
        results = []
        for load in LOADS:
            variants = {
                "one process": partial(measure, [sidecars[0]] * PARTS, load, seconds),
                "two processes": partial(measure, sidecars, load, seconds),
            }
            results += alternate(f"{PARTS} times {load} connections x streams", variants, rounds)
    print_results(results, as_json=as_json)


if __name__ == "__main__":
    main()
