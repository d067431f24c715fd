"""`python -m benchmarks.telemetry`: what metrics and tracing that samples nothing cost a request.

    make benchmark BENCHMARK=telemetry

Two sidecars of one build, in turn: without telemetry (`benchmarks.serving.unobserved_sidecar`), and with metrics and
tracing. Callers name a trace that is not sampled. What counts is processor time a request, of the whole process, as a
ratio to that without; the last line is what a scrape takes besides. The first group is the service's method beside the
bare decision, in this process: on a busy machine the difference of two processes says little, and this one says more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import click
from opentelemetry.sdk.trace import TracerProvider

from benchmarks.compare import TRACING
from benchmarks.serving.h2load import LOADS, Load
from benchmarks.serving.measures import in_lock_step, when_due
from benchmarks.serving.requests import METHOD, ONE_DESCRIPTOR, RULES, UNSAMPLED, framed
from benchmarks.serving.rounds import Figures, alternate, print_results, round_options
from benchmarks.serving.servers import Server, running_servers
from ratelimit_sidecar import limiter
from ratelimit_sidecar.clock import Clock
from ratelimit_sidecar.config.rules_file import load_rules
from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.limiter.limiter import Limiter
from ratelimit_sidecar.services.ratelimit import RateLimitService
from ratelimit_sidecar.telemetry.latency import LatencyHistogram
from ratelimit_sidecar.telemetry.traces import RequestTracer

DUE_LOAD = Load(4, 100)


CALLS: Final = 20_000
SCRAPES: Final = 10

HEADERS: Final = [
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", METHOD.encode()),
    (b":authority", b"ratelimit"),
    (b"te", b"trailers"),
    (b"grpc-timeout", b"20m"),
    (b"content-type", b"application/grpc"),
    (b"x-envoy-internal", b"true"),
    *((name.encode(), value.encode()) for name, value in UNSAMPLED),
]
"""As Envoy sends them."""


class Unsampled:
    """Of a request of the front end."""

    may_be_sampled: Final = False

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        return iter(HEADERS)


def alone() -> Mapping[str, Callable[[], Figures]]:
    """The decision, and the service's method, which is what telemetry makes of it."""
    with TemporaryDirectory() as folder:
        (Path(folder) / "rules.yaml").write_text(RULES)
        rules = load_rules([Path(folder)])
    limiting = Limiter(rules, Origin("benchmark", 1))
    now_us = Clock().now_us
    tracing = RequestTracer(TracerProvider().get_tracer("benchmark"))
    service = RateLimitService(limiting, now_us, LatencyHistogram(), tracing)
    decide, should_rate_limit, headers = limiting.decide, service.should_rate_limit, Unsampled()

    def off() -> None:
        for _ in range(CALLS):
            decide(ONE_DESCRIPTOR, now_us())

    def on() -> None:
        for _ in range(CALLS):
            should_rate_limit(ONE_DESCRIPTOR, headers)

    def timed(calls: Callable[[], None]) -> Figures:
        began_ns = time.process_time_ns()
        calls()
        return {"CPU us": (time.process_time_ns() - began_ns) / 1e3 / CALLS}

    return {"off": partial(timed, off), "on": partial(timed, on)}


def scrape(server: Server) -> Figures:
    before = server.cpu_seconds
    for _ in range(SCRAPES):
        server.metric("ratelimit_build_info")
    return {"CPU ms": (server.cpu_seconds - before) * 1e3 / SCRAPES}


def step(server: Server, load: Load, seconds: float) -> Figures:
    return in_lock_step(server, ONE_DESCRIPTOR, load, seconds, headers=UNSAMPLED)


def due(server: Server, rate: float, seconds: float) -> Figures:
    body = framed(ONE_DESCRIPTOR)
    return when_due(server, lambda: body, DUE_LOAD, rate, seconds, headers=UNSAMPLED)


@click.command()
@click.option("--rate", default=5_000.0, show_default=True, type=click.FloatRange(1), help="Of when due.")
@round_options(rounds=25, seconds=1.0)
def main(*, rate: float, rounds: int, seconds: float, as_json: bool) -> None:
    """Measure what metrics and tracing that samples nothing cost a request."""
    with running_servers() as servers:
        off = servers.sidecar("off", rules=RULES, program=["benchmarks.serving.unobserved_sidecar"])
        on = servers.sidecar("on", rules=RULES, environment=TRACING)
        results = alternate("the decision alone", alone(), 4 * rounds)
        groups: dict[str, Callable[[Server], Figures]] = {
            **{
                f"in lock-step, {load} connections x streams": partial(step, load=load, seconds=seconds)
                for load in LOADS
            },
            f"when due, {rate:,.0f} a second": partial(due, rate=rate, seconds=seconds),
        }
        for group, measure in groups.items():
            results += alternate(group, {"off": partial(measure, off), "on": partial(measure, on)}, rounds)
        results += alternate("a scrape", {"on": partial(scrape, on)}, rounds)
    if not as_json:
        kind = "compiled" if str(limiter.__file__).endswith(".so") else "interpreted"
        print(f"The sidecar is {kind}. Ratios are to the one without telemetry, in the same round.")
    print_results(results, as_json=as_json)


if __name__ == "__main__":
    main()
