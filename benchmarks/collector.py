"""`python -m benchmarks.collector`: what the sidecar's settings of Python's garbage collector are good for.

Two sidecars that differ in nothing else hold 100,000 buckets each, and are asked in turn at the same rate for keys
drawn from these. The base has CPython's own settings; the other one the sidecar's (`app.GC_THRESHOLDS`), and keeps what
is there at its start from being looked at ever again (`gc.freeze`). What a collection takes shows in the last
percentiles and in the longest stall. Of the oldest generation there is not one in every round.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial

import click

from benchmarks.serving.generator import Generator, each, uniform
from benchmarks.serving.h2load import Load
from benchmarks.serving.observed_sidecar import Observed, observed_sidecar, print_longest_stalls
from benchmarks.serving.requests import RULES
from benchmarks.serving.rounds import Figures, alternate, print_results, round_options
from benchmarks.serving.servers import running_servers

KEYS = 100_000
ASKED_PER_SECOND = 10_000
SETTLE_SECONDS = 0.5

SETTINGS = {"CPython's": True, "the sidecar's": False}
"""Whether they are the standard ones."""


def measure(sidecar: Observed, generator: Generator, seconds: float) -> Figures:
    body = uniform(KEYS)
    generator.run(body, SETTLE_SECONDS, ASKED_PER_SECOND)
    return sidecar.measure(generator, body, ASKED_PER_SECOND, seconds)


@click.command()
@round_options(rounds=9, seconds=5.0)
def main(rounds: int, seconds: float, as_json: bool) -> None:
    """Measure two sidecars with different settings of the garbage collector."""
    with running_servers() as servers, ExitStack() as generators:
        variants = {}
        for index, (name, is_standard) in enumerate(SETTINGS.items()):
            sidecar = observed_sidecar(servers, f"sidecar-{index}", standard_collector=is_standard, rules=RULES)
            generator = generators.enter_context(Generator(sidecar.server.address, Load(2, 1_000)))
            generator.run(each(KEYS), None)
            variants[name] = partial(measure, sidecar, generator, seconds)
        results = alternate(f"{ASKED_PER_SECOND:,} requests/s, {KEYS:,} keys", variants, rounds)
    print_results(results, as_json=as_json)
    if not as_json:
        print_longest_stalls(results)


if __name__ == "__main__":
    main()
