"""`python -m benchmarks.start_up`: from the start of the process to its first answer, without rules and with many.

Beside it: the start of the interpreter alone, in the same round.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import click

from benchmarks.serving.generator import Generator, uniform
from benchmarks.serving.h2load import Load, LoadFailed
from benchmarks.serving.requests import RULES
from benchmarks.serving.rounds import Figures, alternate, print_results
from benchmarks.serving.servers import START_WITHIN_SECONDS, ServerFailed, running_servers

POLL_SECONDS = 0.002


def rules(count: int) -> str:
    limit = "rate_limit: {unit: minute, requests_per_unit: 9}"
    lines = (f"  - {{key: tenant, value: t{number}, {limit}}}" for number in range(count))
    return "\n".join([RULES.rstrip(), *lines])


def interpreter() -> Figures:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "pass"], check=True)
    return {"ms": (time.perf_counter() - began) * 1e3}


def to_first_answer(rules_text: str) -> Figures:
    with running_servers() as servers:
        server = servers.start_sidecar("sidecar", rules=rules_text)
        began = time.perf_counter()
        while time.perf_counter() - began < START_WITHIN_SECONDS:
            try:
                with Generator(server.address, Load(1, 1)) as generator:
                    generator.run(iter([uniform(1)()]).__next__, None)
                return {"ms": (time.perf_counter() - began) * 1e3}
            except (OSError, LoadFailed):
                time.sleep(POLL_SECONDS)
        raise ServerFailed("no answer")


@click.command()
@click.option("--rounds", default=7, show_default=True, type=click.IntRange(1))
@click.option("--json", "as_json", is_flag=True, help="Print JSON in place of the table.")
def main(rounds: int, as_json: bool) -> None:
    """Measure the start of a sidecar."""
    variants: dict[str, Callable[[], Figures]] = {
        "interpreter alone": interpreter,
        "no rules": partial(to_first_answer, ""),
        "1,000 rules": partial(to_first_answer, rules(1_000)),
    }
    print_results(alternate("to the first answer", variants, rounds), as_json=as_json)


if __name__ == "__main__":
    main()
