"""`python -m benchmarks.callbacks`: whether anything on the event loop takes long while everything goes on at once.

The load of `disturbed` with 10,000 buckets a second in and out, a scrape of the metrics every second, and in the middle
a reload of the rules. Listed are the callbacks of the event loop by what they took of the processor in all, and any
that ever took more than a millisecond (`serving/timed_sidecar.py`). A virtual machine whose processor is taken away
counts that as time taken, so on a busy one look at the 99th percentile rather than at the longest.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

import click

from benchmarks.disturbed import (
    ASKED_PER_SECOND,
    DESCRIPTORS,
    DISTURBED_RULES,
    KEYS,
    PEERS,
    SHARED,
    TOLD_PER_SECOND,
    Sites,
    start_peers,
)
from benchmarks.serving.generator import Generator, each, uniform
from benchmarks.serving.h2load import Load
from benchmarks.serving.servers import Server, running_servers, wait_until
from benchmarks.serving.timed_sidecar import LONG_NS, Timed, timed_sidecar

SCRAPE_SECONDS = 1.0

LISTED_PART = 0.002
"""Of the time of all: what took less, and never long, is left out."""

ANOTHER_RULE = "  - {key: another, rate_limit: {unit: minute, requests_per_unit: 1}}\n"


@contextmanager
def scraped(server: Server) -> Iterator[None]:
    """Its metrics are read all the while."""
    ends = threading.Event()

    def scrape() -> None:
        while not ends.wait(SCRAPE_SECONDS):
            server.metric("ratelimit_plans_total")

    scraper = threading.Thread(target=scrape)
    scraper.start()
    try:
        yield
    finally:
        ends.set()
        scraper.join()


def measure(seconds: float) -> list[Timed]:
    with running_servers() as servers:
        sites = Sites(servers)
        sidecar = timed_sidecar(servers, peers=sites.peers, ports=sites.ports[0], rules=DISTURBED_RULES)
        peers = start_peers(servers, sidecar.server, sites)
        with Generator(sidecar.server.address, Load(2, 1_000)) as generator:
            generator.run(each(KEYS, SHARED), None)
            wait_until(lambda: sidecar.server.metric("crdt_pending_buckets") == [0.0] * PEERS)
            for peer in peers:
                peer.take(TOLD_PER_SECOND / PEERS)
            body = uniform(KEYS, SHARED, DESCRIPTORS)
            generator.run(body, 1.0, ASKED_PER_SECOND)
            sidecar.begin()
            with scraped(sidecar.server):
                generator.run(body, seconds / 2, ASKED_PER_SECOND)
                servers.rules_file(sidecar.server.name).write_text(DISTURBED_RULES + ANOTHER_RULE)
                generator.run(body, seconds / 2, ASKED_PER_SECOND)
            return sidecar.noted()


def print_table(timed: Sequence[Timed]) -> None:
    total = sum(of_callback.total for of_callback in timed)
    print(f"{'processor time in ms':60} {'calls':>9} {'share':>7} {'p50':>7} {'p99':>7} {'longest':>8} {'> 1':>6}")
    for of_callback in timed:
        if of_callback.total < total * LISTED_PART and not of_callback.long:
            continue
        share = of_callback.total / total
        print(
            f"{of_callback.name[:60]:60} {of_callback.calls:9,} {share:7.1%} {of_callback.p50:7.3f}"
            f" {of_callback.p99:7.3f} {of_callback.longest:8.2f} {of_callback.long:6,}"
        )
    calls, long = (sum(values) for values in zip(*((each.calls, each.long) for each in timed), strict=True))
    print(f"\n{long:,} of {calls:,} took more than {LONG_NS / 1e6:g} ms.")


@click.command()
@click.option("--seconds", default=20.0, show_default=True, help="Measured for so long.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON in place of a table.")
def main(seconds: float, as_json: bool) -> None:
    """List what the event loop of a busy sidecar is occupied with, and for how long at a time."""
    timed = measure(seconds)
    if as_json:
        print(json.dumps([asdict(each) for each in timed], indent=1))
    else:
        print_table(timed)


if __name__ == "__main__":
    main()
