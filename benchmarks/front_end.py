"""`python -m benchmarks.front_end`: requests a second and latency of the whole server, beside an empty handler.

The base is the same front end with a handler that returns a constant, in the same round; grpc.aio's is an echo. The
sidecar replicates to
two live peers, which run beside it on the same cores. h2load and servers share the machine.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import click

from benchmarks.serving.h2load import LOADS
from benchmarks.serving.measures import in_lock_step
from benchmarks.serving.requests import DENIED, ONE_DESCRIPTOR, TWO_OF_THREE
from benchmarks.serving.rounds import Figures, alternate, print_results, round_options
from benchmarks.serving.servers import running_servers


@click.command()
@round_options(rounds=9, seconds=1.0)
def main(rounds: int, seconds: float, as_json: bool) -> None:
    """Measure front ends with and without the decision."""
    with running_servers() as servers:
        empty = servers.empty_handler("h2")
        echo = servers.empty_handler("grpcio")
        sidecar, *_peers = servers.mesh(3)
        targets = {
            "empty handler": (empty, ONE_DESCRIPTOR),
            "one descriptor": (sidecar, ONE_DESCRIPTOR),
            "two descriptors of three entries": (sidecar, TWO_OF_THREE),
            "one descriptor, denied": (sidecar, DENIED),
            "grpc.aio echo": (echo, ONE_DESCRIPTOR),
        }
        results = []
        for load in LOADS:
            variants: dict[str, Callable[[], Figures]] = {
                name: partial(in_lock_step, server, asked, load, seconds) for name, (server, asked) in targets.items()
            }
            results += alternate(f"{load} connections x streams", variants, rounds)
    print_results(results, as_json=as_json)


if __name__ == "__main__":
    main()
