"""`python -m benchmarks.disturbed`: latency while 10,000 buckets a second replicate, and while a peer is down.

Three sidecars replicate to each other. One is asked at a steady rate, far below what it can do, for keys drawn from
100,000; what is measured is the time from when a request was due to its answer. The rounds alternate between quiet and
10,000 such requests a second at another sidecar, each in a bucket of its own, all of which this one hears of. Then the
third sidecar is killed, and the rounds go on. The longest stall of the event loop is the sidecar's own metric.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import click

from benchmarks.serving.generator import Generator, uniform
from benchmarks.serving.h2load import Load
from benchmarks.serving.rounds import Figures, alternate, print_results, round_options
from benchmarks.serving.servers import Server, running_servers

KEYS = 100_000
ASKED_PER_SECOND = 2_000
REPLICATED_PER_SECOND = 10_000
SETTLE_SECONDS = 1.0


def measure(generator: Generator, seconds: float) -> Figures:
    answered = generator.run(uniform(KEYS), seconds, ASKED_PER_SECOND)
    return {f"p{percent:g} us": answered.percentile_us(percent) for percent in (50, 99, 99.9)}


def measure_while_replicating(generator: Generator, busy: Server, seconds: float) -> Figures:
    with replicating(busy, seconds + 2 * SETTLE_SECONDS):
        generator.run(uniform(KEYS), SETTLE_SECONDS, ASKED_PER_SECOND)
        return measure(generator, seconds)


@contextmanager
def replicating(busy: Server, seconds: float) -> Iterator[None]:
    """Let a sidecar be asked by another process meanwhile."""
    options = ["--keys", str(KEYS), "--rate", str(REPLICATED_PER_SECOND), "--seconds", str(seconds)]
    argv = [sys.executable, "-m", "benchmarks.serving.generator", busy.address, *options]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL)  # noqa: S603
    try:
        yield
    finally:
        process.wait()


@click.command()
@round_options(rounds=7, seconds=3.0)
def main(rounds: int, seconds: float, as_json: bool) -> None:
    """Measure the latency of one sidecar of three."""
    with running_servers() as servers:
        asked, busy, third = servers.mesh(3)
        with Generator(asked.address, Load(2, 1_000)) as generator:
            quiet = partial(measure, generator, seconds)
            replicating_in = partial(measure_while_replicating, generator, busy, seconds)
            heard = asked.metric("crdt_entries_received_total")
            results = alternate("all peers up", {"quiet": quiet, "10,000 buckets/s replicate": replicating_in}, rounds)
            entries = sum(asked.metric("crdt_entries_received_total")) - sum(heard)
            longest = asked.metric("ratelimit_event_loop_longest_stall_seconds")[0]
            third.kill()
            results += alternate(
                "a peer is down", {"quiet": quiet, "10,000 buckets/s replicate": replicating_in}, rounds
            )
            longest_down = asked.metric("ratelimit_event_loop_longest_stall_seconds")[0]
    print_results(results, as_json=as_json)
    if not as_json:
        print(f"\n  heard {entries:,.0f} entries; longest stall of the event loop {longest * 1e3:.1f} ms,")
        print(f"  while a peer is down {longest_down * 1e3:.1f} ms")


if __name__ == "__main__":
    main()
