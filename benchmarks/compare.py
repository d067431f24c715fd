"""`python -m benchmarks.compare HOST:PORT`: this sidecar and any other server of the same gRPC service, in one run.

The other one has to be up, with a rule for every value of the descriptor's key: a wide limit, so that both admit. Both
are asked for the same, in turn. A few servers and how to give them such a rule stand in docs/performance.md.

Servers admit what they have no rule for, and h2load takes a gRPC error for an answer; both are cheaper than a decision.
So before the load a server has to admit one hit and deny more hits than any limit, and after each round to admit one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from uuid import uuid4

import click
import grpc
from envoy.service.ratelimit.v3.rls_pb2 import RateLimitResponse

from benchmarks.serving.h2load import LOADS, Load, LoadFailed, grpc_load
from benchmarks.serving.requests import request
from benchmarks.serving.rounds import Figures, alternate, print_results, round_options
from benchmarks.serving.servers import first_answer, running_servers

RULES = """\
domain: {domain}
descriptors:
  - key: {key}
    rate_limit: {{unit: minute, requests_per_unit: 100000000}}
"""

ANSWER_WITHIN_SECONDS = 5.0
MOST_HITS = 2**32 - 1
"""The most that a request can ask for: its `hits_addend` is a uint32."""


def measure(address: str, asked: bytes, load: Load, seconds: float) -> Figures:
    try:
        measured = grpc_load(address, asked, load, seconds)
    except LoadFailed as error:
        raise click.ClickException(f"{address} under {load}: {error}") from error
    ensure_it_admits(address, asked)
    return {"requests/s": measured.per_second, "mean us": measured.mean_us}


@click.command()
@click.argument("address")
@click.option("--domain", default="benchmark", show_default=True)
@click.option("--key", default="tenant", show_default=True, help="Of the descriptor's one entry.")
@click.option("--value", default="acme", show_default=True)
@round_options(rounds=9, seconds=1.0)
def main(address: str, *, domain: str, key: str, value: str, rounds: int, seconds: float, as_json: bool) -> None:
    """Measure this sidecar beside the server at ADDRESS (host:port, or unix:/path)."""
    asked = request([(key, value)], domain=domain)
    ensure_it_limits(address, domain, key)
    ensure_it_admits(address, asked)
    with running_servers() as servers:
        sidecar, *_peers = servers.mesh(3, rules=RULES.format(domain=domain, key=key))
        ensure_it_limits(sidecar.address, domain, key)
        results = []
        for load in LOADS:
            variants: dict[str, Callable[[], Figures]] = {
                name: partial(measure, at, asked, load, seconds)
                for name, at in (("this sidecar", sidecar.address), (address, address))
            }
            results += alternate(f"{load} connections x streams", variants, rounds)
    print_results(results, as_json=as_json)


def ensure_it_limits(address: str, domain: str, key: str) -> None:
    """
    Raises:
        click.ClickException: it has no rule for the key, or does not answer.
    """
    # A value of its own: some servers count the hits that they deny.
    if (
        overall_code(address, request([(key, uuid4().hex)], domain=domain, hits=MOST_HITS))
        != RateLimitResponse.OVER_LIMIT
    ):
        raise click.ClickException(
            f"{address} does not deny {MOST_HITS:,} hits at once on the key {key} of the domain {domain}: "
            "it needs a rule for every value of that key"
        )


def ensure_it_admits(address: str, asked: bytes) -> None:
    """
    Raises:
        click.ClickException: it denies the request, or does not answer.
    """
    if overall_code(address, asked) != RateLimitResponse.OK:
        raise click.ClickException(f"{address} does not admit the request: it needs a wider limit for it")


def overall_code(address: str, asked: bytes) -> int:
    try:
        answer = RateLimitResponse.FromString(first_answer(address, ANSWER_WITHIN_SECONDS, asked))
    except grpc.RpcError as error:
        reason = f"{error.code().name}: {error.details()}" if isinstance(error, grpc.Call) else str(error)
        raise click.ClickException(f"{address} does not answer: {reason}") from error
    code: int = answer.overall_code
    return code


if __name__ == "__main__":
    main()
