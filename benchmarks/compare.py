"""`python -m benchmarks.compare HOST:PORT`: this sidecar and any other server of the same gRPC service, in one run.

The other one has to be up, with a rule for the descriptor asked for: a wide limit, so that both admit. Both are asked
for the same, in turn. A few servers and how to give them such a rule stand in docs/performance.md.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import click
import grpc
from envoy.extensions.common.ratelimit.v3.ratelimit_pb2 import RateLimitDescriptor
from envoy.service.ratelimit.v3.rls_pb2 import RateLimitRequest, RateLimitResponse

from benchmarks.serving.h2load import LOADS, Load, grpc_load
from benchmarks.serving.rounds import Figures, alternate, print_results, round_options
from benchmarks.serving.servers import first_answer, running_servers

RULES = """\
domain: {domain}
descriptors:
  - key: {key}
    rate_limit: {{unit: minute, requests_per_unit: 100000000}}
"""


def measure(address: str, request: bytes, load: Load, seconds: float) -> Figures:
    measured = grpc_load(address, request, load, seconds)
    return {"requests/s": measured.per_second, "mean us": measured.mean_us}


@click.command()
@click.argument("address")
@click.option("--domain", default="benchmark", show_default=True)
@click.option("--key", default="tenant", show_default=True, help="Of the descriptor's one entry.")
@click.option("--value", default="acme", show_default=True)
@round_options(rounds=9, seconds=1.0)
def main(address: str, *, domain: str, key: str, value: str, rounds: int, seconds: float, as_json: bool) -> None:
    """Measure this sidecar beside the server at ADDRESS (host:port, or unix:/path)."""
    entry = RateLimitDescriptor.Entry(key=key, value=value)
    request = RateLimitRequest(domain=domain, descriptors=[RateLimitDescriptor(entries=[entry])]).SerializeToString()
    ensure_it_limits(address, request)
    with running_servers() as servers:
        sidecar, *_peers = servers.mesh(3, rules=RULES.format(domain=domain, key=key))
        ensure_it_limits(sidecar.address, request)
        results = []
        for load in LOADS:
            variants: dict[str, Callable[[], Figures]] = {
                name: partial(measure, at, request, load, seconds)
                for name, at in (("this sidecar", sidecar.address), (address, address))
            }
            results += alternate(f"{load} connections x streams", variants, rounds)
    print_results(results, as_json=as_json)


def ensure_it_limits(address: str, request: bytes) -> None:
    try:
        answer = RateLimitResponse.FromString(first_answer(address, 5.0, request))
    except grpc.RpcError as error:
        raise click.ClickException(f"{address} does not answer: {error}") from error
    if answer.overall_code != RateLimitResponse.OK:
        raise click.ClickException(f"{address} does not admit the request: it needs a wider limit for it")


if __name__ == "__main__":
    main()
