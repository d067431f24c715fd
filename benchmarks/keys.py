"""`python -m benchmarks.keys`: what it costs that requests ask for many different keys.

With one key the plan and the bucket of a request are in the processor's caches; with a million they are in memory, and
the plan is made anew each time. Every key is asked for once before anything is measured. There is room for a bucket of
each. The sidecar has no peers.
Other builds of the sidecar can be measured in the same rounds; all ratios are to this one's with a single key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import click

from benchmarks.serving.generator import Body, Generator, each, uniform
from benchmarks.serving.h2load import Load
from benchmarks.serving.rounds import Figures, alternate, print_results, round_options
from benchmarks.serving.servers import Build, Server, build_option, running_servers

KEYS = (1, 10, 1_000, 1_000_000)
LOAD = Load(2, 100)
ROOM = {"max_buckets": 2 * max(KEYS)}


def measure(server: Server, generator: Generator, body: Body, seconds: float) -> Figures:
    cpu_seconds = server.cpu_seconds
    answered = generator.run(body, seconds)
    cpu_us = (server.cpu_seconds - cpu_seconds) * 1e6 / len(answered.latencies_ns)
    return {"requests/s": answered.per_second, "p99 us": answered.percentile_us(99), "CPU us": cpu_us}


@click.command()
@build_option
@round_options(rounds=7, seconds=2.0)
@click.option(
    "--most", default=max(KEYS), show_default=True, type=click.IntRange(1), help="Leave out larger numbers of keys."
)
def main(*, builds: Sequence[tuple[str, Build]], rounds: int, seconds: float, most: int, as_json: bool) -> None:
    """Measure a sidecar with few and many keys."""
    counts = [keys for keys in KEYS if keys <= most]
    memory = []
    variants: dict[str, Callable[[], Figures]] = {}
    with running_servers() as servers, ExitStack() as stack:
        for name, build in [("", Build()), *builds]:
            sidecar = servers.sidecar(name or "sidecar", build=build, config=ROOM)
            generator = stack.enter_context(Generator(sidecar.address, LOAD))
            before = sidecar.resident_bytes
            generator.run(each(max(counts)), None)
            used = sidecar.resident_bytes - before
            buckets = sidecar.metric("crdt_buckets")[0]
            memory.append(
                f"{name} {buckets:,.0f} buckets and what goes with them: "
                f"{used / buckets:,.0f} bytes of the process for each"
            )
            variants |= {
                f"{name} {keys:,} keys".strip(): partial(measure, sidecar, generator, uniform(keys), seconds)
                for keys in counts
            }
        results = alternate(f"{LOAD} connections x streams", variants, rounds)
    print_results(results, as_json=as_json)
    if not as_json:
        print("", *(f"  {line.strip()}" for line in memory), sep="\n")


if __name__ == "__main__":
    main()
