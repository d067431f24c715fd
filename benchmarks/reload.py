"""`python -m benchmarks.reload`: what a reload of the rules does to the requests that come meanwhile.

A sidecar with few or many rules is asked at a steady rate for keys that it has met before. In some rounds its rules
file is written anew as the round begins, with another limit for all that is asked for; the base are the other rounds.
The sidecar reads the file a moment after it was written, once it stays as it is; that the new rules were in force
before the round was over is checked. In longer rounds the percentiles show less of a reload; the longest stall of the
event loop is the same.
"""

from __future__ import annotations

import time
from itertools import count
from pathlib import Path

import click

from benchmarks.serving.generator import Generator, each, uniform
from benchmarks.serving.h2load import Load
from benchmarks.serving.observed_sidecar import Observed, observed_sidecar, print_longest_stalls
from benchmarks.serving.requests import DOMAIN
from benchmarks.serving.rounds import Figures, Result, alternate, print_results, round_options
from benchmarks.serving.servers import running_servers

RULE_COUNTS = (1, 1_000, 20_000)
KEYS = 10_000
"""Fewer than plans are remembered (`limiter/plan_cache.py`): after a reload all are made anew."""

ASKED_PER_SECOND = 2_000
SETTLE_SECONDS = 1.0

LOADED_AT = "ratelimit_config_last_success_timestamp_seconds"


def rules_text(rules: int, generation: int) -> str:
    """A rules file of so many rules, each generation of which differs in one limit.

    Args:
        rules: how many, at least 1; the first one limits all that is asked for.
        generation: of another one that rule has another limit.
    """
    lines = [f"  - {{key: tenant, rate_limit: {{unit: minute, requests_per_unit: {100_000_000 + generation}}}}}"]
    limit = "rate_limit: {unit: minute, requests_per_unit: 9}"
    lines += [f"  - {{key: tenant, value: t{number}, {limit}}}" for number in range(rules - 1)]
    return "\n".join([f"domain: {DOMAIN}", "descriptors:", *lines, ""])


class Reloading:
    """One sidecar under load."""

    def __init__(self, sidecar: Observed, rules_file: Path, rules: int, generator: Generator, seconds: float) -> None:
        self._sidecar = sidecar
        self._rules_file = rules_file
        self._rules = rules
        self._generator = generator
        self._seconds = seconds
        self._body = uniform(KEYS)
        self._generations = count(1)

    def measure(self) -> Figures:
        """A round without a reload."""
        self._settle()
        return self._measure()

    def measure_reload(self) -> Figures:
        """A round in which the rules change.

        Raises:
            click.ClickException: it was too short for that.
        """
        text = rules_text(self._rules, next(self._generations))
        self._settle()
        changed_s = time.time()
        self._rules_file.write_text(text)
        figures = self._measure()
        ended_s = time.time()
        loaded_s = self._sidecar.server.metric(LOADED_AT)[0]
        if not changed_s < loaded_s < ended_s:
            raise click.ClickException(
                f"{self._rules:,} rules were not in force within a round: give it more --seconds"
            )
        return {**figures, "in force ms": (loaded_s - changed_s) * 1e3}

    def _settle(self) -> None:
        self._generator.run(self._body, SETTLE_SECONDS, ASKED_PER_SECOND)

    def _measure(self) -> Figures:
        return self._sidecar.measure(self._generator, self._body, ASKED_PER_SECOND, self._seconds)


def measure(rules: int, rounds: int, seconds: float) -> list[Result]:
    with running_servers() as servers:
        sidecar = observed_sidecar(servers, rules=rules_text(rules, 0))
        with Generator(sidecar.server.address, Load(2, 1_000)) as generator:
            generator.run(each(KEYS), None)
            rules_file = servers.rules_file(sidecar.server.name)
            reloading = Reloading(sidecar, rules_file, rules, generator, seconds)
            variants = {"no reload": reloading.measure, "a reload": reloading.measure_reload}
            return alternate(f"{rules:,} {'rule' if rules == 1 else 'rules'}", variants, rounds)


@click.command()
@round_options(rounds=5, seconds=5.0)
def main(rounds: int, seconds: float, as_json: bool) -> None:
    """Measure what a reload of the rules does to latency, and how long it stalls the event loop."""
    results = []
    for number in RULE_COUNTS:
        results += measure(number, rounds, seconds)
    print_results(results, as_json=as_json)
    if not as_json:
        print_longest_stalls(results)


if __name__ == "__main__":
    main()
