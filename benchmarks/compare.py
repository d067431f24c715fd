"""`python -m benchmarks.compare`: this sidecar beside other servers of the same gRPC service, in one run.

    python -m benchmarks.compare limitador=127.0.0.1:8081@4711 ratelimit=127.0.0.1:8082@4712
    git worktree add ../before COMMIT && make -C ../before compile
    make benchmark BENCHMARK="compare --build before=../before/build/compiled --echo"

Another server has to be up, with a rule for every value of the descriptor's key: a wide limit, so that all admit;
`benchmarks/others` has scripts that start two. Sidecars, this one and those of other builds, are started, each with two
live peers of its own, metrics, and tracing by a caller that samples nothing; all servers are asked for the same, in
turn, in both of these ways:

- in lock-step, by h2load: closed loops, connections x streams. It flatters a server that answers all of a read at once.
- when due: requests that come one by one, at a rate, over 4 connections, whatever is under way.

Servers admit what they have no rule for, and h2load takes a gRPC error for an answer; both are cheaper than a decision.
So before the load a server has to admit one hit and deny more hits than any limit; every answer at a rate has to be an
admission, those of h2load have to have as many bytes as one, and after each round one request has to be admitted.

The ratios are this sidecar's figure to the other server's, in the same round: of requests/s 2 is twice as many, of
processor time 0.5 is half as much.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from uuid import uuid4

import click
import grpc

from benchmarks.serving.h2load import LOADS, Load, LoadFailed
from benchmarks.serving.measures import in_lock_step, when_due
from benchmarks.serving.options import RunningServer
from benchmarks.serving.requests import DOMAIN, UNSAMPLED, framed, request
from benchmarks.serving.rounds import Figures, alternate, print_results, round_options
from benchmarks.serving.servers import Build, Server, ServerFailed, Servers, build_option, first_answer, running_servers
from ratelimit_sidecar import limiter
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2 import RateLimitResponse

RULES = """\
domain: {domain}
descriptors:
  - key: {key}
    rate_limit: {{unit: minute, requests_per_unit: 100000000}}
"""

OURS = "this sidecar"

RATES = (5_000.0, 10_000.0, 20_000.0)
DUE_LOAD = Load(4, 100)
"""How requests are sent when they are due. 100 streams: some servers refuse more than that on a connection."""

ANSWER_WITHIN_SECONDS = 5.0
MOST_HITS = 2**32 - 1
"""The most that a request can ask for: its `hits_addend` is a uint32."""

TRACING = {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
"""Nobody listens there: nothing is sent, as nothing is sampled."""


@dataclass(frozen=True, slots=True)
class Target:
    """One of the servers that are compared, and the request that each of them is asked.

    Args:
        limits: False for one that only answers.
    """

    server: Server
    asked: bytes
    limits: bool = True

    def in_lock_step(self, load: Load, seconds: float) -> Figures:
        answer = first_answer(self.server.address, ANSWER_WITHIN_SECONDS, self.asked)
        return self._checked(
            lambda: in_lock_step(
                self.server,
                self.asked,
                load,
                seconds,
                percentiles=True,
                headers=UNSAMPLED,
                answer_bytes=len(framed(answer)),
            ),
            f"under {load}",
        )

    def when_due(self, rate: float, seconds: float) -> Figures:
        body = framed(self.asked)
        return self._checked(
            lambda: when_due(self.server, lambda: body, DUE_LOAD, rate, seconds, headers=UNSAMPLED, admits=self.limits),
            f"at {rate:,.0f} a second",
        )

    def _checked(self, measure: Callable[[], Figures], how: str) -> Figures:
        try:
            figures = measure()
        except (LoadFailed, OSError) as error:
            raise click.ClickException(f"{self.server.name} {how}: {error}") from error
        if self.limits:
            ensure_it_admits(self.server.address, self.asked)
        return figures


@click.command()
@click.argument("others", metavar="[[NAME=]ADDRESS[@PID]]...", nargs=-1, type=RunningServer())
@build_option
@click.option("--echo", is_flag=True, help="An echo on grpc.aio as well, which decides nothing.")
@click.option(
    "--rate", "rates", multiple=True, default=RATES, show_default=True, type=click.FloatRange(1), help="Of when due."
)
@click.option("--domain", default=DOMAIN, show_default=True)
@click.option("--key", default="tenant", show_default=True, help="Of the descriptor's one entry.")
@click.option("--value", default="acme", show_default=True)
@round_options(rounds=9, seconds=1.0)
def main(
    others: tuple[Server, ...],
    *,
    builds: Sequence[tuple[str, Build]],
    echo: bool,
    rates: Sequence[float],
    domain: str,
    key: str,
    value: str,
    rounds: int,
    seconds: float,
    as_json: bool,
) -> None:
    """Measure this sidecar beside running servers of Envoy's rate limit service, and beside other builds of it.

    ADDRESS is HOST:PORT or unix:/PATH. With the PID of its process (@4711) a server's processor time is measured, too:
    of all its threads and children. NAME is for the table.

    The ratios are this sidecar's figure to the other server's, in the same round.
    """
    names = [OURS, *(name for name, _ in builds), *(other.name for other in others)]
    if len(set(names)) < len(names):
        raise click.UsageError(f"names have to differ: {', '.join(names)}")
    for other in others:
        ensure_it_limits(other.address, domain, key)
    asked = request([(key, value)], domain=domain)
    with running_servers() as servers:
        sidecars = [(OURS, Build()), *builds]
        targets = [Target(sidecar(servers, name, build, domain, key), asked) for name, build in sidecars]
        targets += [Target(other, asked) for other in others]
        for target in targets:
            ensure_it_limits(target.server.address, domain, key)
            ensure_it_admits(target.server.address, asked)
        if echo:
            targets.append(Target(replace(servers.empty_handler("grpcio"), name="grpc.aio echo"), asked, limits=False))
        results = []
        for load in LOADS:
            results += alternate(
                f"in lock-step, {load} connections x streams",
                {target.server.name: partial(target.in_lock_step, load, seconds) for target in targets},
                rounds,
                of_base=True,
            )
        for rate in rates:
            results += alternate(
                f"when due, {rate:,.0f} a second over {DUE_LOAD.connections} connections",
                {target.server.name: partial(target.when_due, rate, seconds) for target in targets},
                rounds,
                of_base=True,
            )
    if not as_json:
        kind = "compiled" if str(limiter.__file__).endswith(".so") else "interpreted"
        print(f"This sidecar is {kind}. In brackets the quartiles of its ratio to the other server.")
    print_results(results, as_json=as_json)


def sidecar(servers: Servers, name: str, build: Build, domain: str, key: str) -> Server:
    """One with two live peers."""
    rules = RULES.format(domain=domain, key=key)
    try:
        first, *_peers = servers.mesh(3, name.replace(" ", "-"), build, rules=rules, environment=TRACING)
    except ServerFailed as error:
        raise click.ClickException(f"{name}: {error}") from error
    return replace(first, name=name)


def ensure_it_limits(address: str, domain: str, key: str) -> None:
    """Check that a server denies too many hits on a key, so that it is measured while it really limits.

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
    """Check that a server admits the request that it is to be measured with.

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
