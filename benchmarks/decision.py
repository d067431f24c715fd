"""`python -m benchmarks.decision`: the decision alone, bytes in and bytes out, without a server.

The base is what protobuf takes to read such a request and to build such an answer, which no decision could do without
if it were made from messages. A request seen lately is answered from its remembered plan.
"""

from __future__ import annotations

import gc
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import click

from benchmarks.serving.requests import DENIED, ONE_DESCRIPTOR, RULES, TWO_OF_THREE, keyed
from benchmarks.serving.rounds import Figures, alternate, print_results
from ratelimit_sidecar.app import GC_THRESHOLDS
from ratelimit_sidecar.clock import Clock
from ratelimit_sidecar.config.rules_file import load_rules
from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2 import RateLimitRequest, RateLimitResponse
from ratelimit_sidecar.limiter.limiter import Limiter

CALLS = 20_000
KEYS = 100_000
"""More than plans are remembered."""


def protobuf() -> None:
    for descriptor in RateLimitRequest.FromString(ONE_DESCRIPTOR).descriptors:
        for entry in descriptor.entries:
            _ = entry.key, entry.value
    response = RateLimitResponse(overall_code=RateLimitResponse.OK)
    status = response.statuses.add(code=RateLimitResponse.OK, limit_remaining=99_999_999)
    status.current_limit.requests_per_unit = 100_000_000
    status.duration_until_reset.seconds = 1
    response.SerializeToString()


def measure(call: Callable[[], object]) -> Figures:
    """By the thread's own processor time."""
    began_ns = time.thread_time_ns()
    for _ in range(CALLS):
        call()
    return {"ns": (time.thread_time_ns() - began_ns) / CALLS}


@click.command()
@click.option("--rounds", default=25, show_default=True, type=click.IntRange(1))
@click.option("--json", "as_json", is_flag=True, help="Print JSON in place of the table.")
def main(rounds: int, as_json: bool) -> None:
    """Measure decisions beside protobuf."""
    gc.set_threshold(*GC_THRESHOLDS)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rules.yaml")
        file.write_text(RULES)
        limiter = Limiter(load_rules([file]), Origin("benchmark", 1))
    now_us = Clock().now_us
    requests: Iterator[bytes] = itertools.cycle(list(keyed(KEYS)))
    for _ in range(KEYS):
        limiter.decide(next(requests), now_us())
    limiter.store.drain_changes()
    calls: dict[str, Callable[[], object]] = {
        "protobuf alone": protobuf,
        "one descriptor": lambda: limiter.decide(ONE_DESCRIPTOR, now_us()),
        "two descriptors of three entries": lambda: limiter.decide(TWO_OF_THREE, now_us()),
        "one descriptor, denied": lambda: limiter.decide(DENIED, now_us()),
        "one descriptor, not seen lately": lambda: limiter.decide(next(requests), now_us()),
    }
    variants = {name: partial(measure, call) for name, call in calls.items()}
    print_results(alternate("one decision", variants, rounds), as_json=as_json)


if __name__ == "__main__":
    main()
