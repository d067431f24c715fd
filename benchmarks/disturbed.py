"""`python -m benchmarks.disturbed`: latency while 10,000 buckets a second replicate, and while a peer is down.

One sidecar is asked at a steady rate, far below what it can do. Each request has five descriptors, with values drawn
from 100,000: so 10,000 buckets a second are taken from without as many requests. Measured is the time from when a
request was due to its answer. The rounds alternate between four kinds:

- undisturbed, the base: the rule is one whose buckets are not shared (`consistency: local`), and the peers keep the
  processors as busy with nothing as they do while they replicate: they would be on other machines;
- quiet: the same with idle peers;
- as many buckets a second are told to the sidecar by its two peers together;
- and the requests are for a shared rule as well, so that it tells those that it takes from to both peers.

Then one peer is killed, and the rounds go on. The peers are without a front end, and get a processor only while nobody
else wants one (`serving/bare_peer.py`); how many buckets a second did come in and go out is among the figures.

The processor's part is told from the rest: how much of one the process takes, and its event loop's thread; how long
that thread waits for one; and the longest stall of the loop in a round, with such waiting and without it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import click

from benchmarks.serving.bare_peer import BarePeer, bare_peer
from benchmarks.serving.generator import Generator, each, uniform
from benchmarks.serving.h2load import Load
from benchmarks.serving.observed_sidecar import Observed, observed_sidecar, print_longest_stalls
from benchmarks.serving.requests import RULES
from benchmarks.serving.rounds import Figures, Result, alternate, print_results, round_options
from benchmarks.serving.servers import Server, Servers, running_servers, wait_until
from ratelimit_sidecar.demo.ports import HOST

KEYS = 100_000
ASKED_PER_SECOND = 2_000
DESCRIPTORS = 5
TOLD_PER_SECOND = ASKED_PER_SECOND * DESCRIPTORS
PEERS = 2
SETTLE_SECONDS = 1.0

SHARED, LOCAL = "tenant", "local_tenant"
DISTURBED_RULES = f"""\
{RULES}
  - key: {LOCAL}
    consistency: local
    rate_limit: {{unit: minute, requests_per_unit: 100000000}}
"""

UNDISTURBED, QUIET = "undisturbed", "quiet"
HEARD, PEER_CPU = "heard/s", "CPU % of a peer"
LEAST_TOLD = 0.95
"""Of what the peers are told to take: what is less is said."""


def measure(
    sidecar: Observed,
    generator: Generator,
    peers: Sequence[BarePeer],
    rule: str,
    told: float,
    *,
    busy: float = 0.0,
    seconds: float,
) -> Figures:
    """One round.

    Args:
        rule: that is asked for.
        told: buckets a second, by all peers together.
        busy: as of `BarePeer.take`.
    """
    for peer in peers:
        peer.take(told / len(peers), busy=busy)
    body = uniform(KEYS, rule, DESCRIPTORS)
    generator.run(body, SETTLE_SECONDS, ASKED_PER_SECOND)
    entries, began = entries_heard_and_sent(sidecar.server), time.perf_counter()
    peers_took = sum(peer.server.cpu_seconds for peer in peers)
    figures = sidecar.measure(generator, body, ASKED_PER_SECOND, seconds)
    elapsed = time.perf_counter() - began
    peers_took = sum(peer.server.cpu_seconds for peer in peers) - peers_took
    heard, sent = (
        (after - before) / elapsed
        for after, before in zip(entries_heard_and_sent(sidecar.server), entries, strict=True)
    )
    return {**figures, HEARD: heard, "sent/s": sent, PEER_CPU: peers_took * 100 / elapsed / len(peers)}


def entries_heard_and_sent(sidecar: Server) -> tuple[float, float]:
    """Since its start, from and to all peers."""
    return sum(sidecar.metric("crdt_entries_received_total")), sum(sidecar.metric("crdt_entries_sent_total"))


class Sites:
    """Where the sidecar of a mesh and its peers listen."""

    def __init__(self, servers: Servers) -> None:
        self.ports = [servers.ports() for _ in range(1 + PEERS)]
        self.addresses = [f"{HOST}:{of.sync}" for of in self.ports]

    @property
    def peers(self) -> tuple[str, ...]:
        """Of the sidecar."""
        return tuple(self.addresses[1:])


def start_peers(servers: Servers, sidecar: Server, sites: Sites) -> list[BarePeer]:
    """Start the peers of `sidecar` and wait until they are connected."""
    peers = [
        bare_peer(
            servers,
            f"peer-{index}",
            servers.rules_file(sidecar.name),
            ports=sites.ports[index],
            peers=sites.addresses[:index] + sites.addresses[index + 1 :],
            keys=KEYS,
        )
        for index in range(1, 1 + PEERS)
    ]
    wait_until(lambda: sidecar.metric("crdt_peer_connected") == [1.0] * PEERS)
    return peers


@click.command()
@round_options(rounds=7, seconds=3.0)
def main(rounds: int, seconds: float, as_json: bool) -> None:
    """Measure the latency of a sidecar while it replicates with two peers, and when one of them is gone."""
    with running_servers() as servers:
        sites = Sites(servers)
        sidecar = observed_sidecar(servers, peers=sites.peers, ports=sites.ports[0], rules=DISTURBED_RULES)
        peers = start_peers(servers, sidecar.server, sites)
        with Generator(sidecar.server.address, Load(2, 1_000)) as generator:
            for rule in (SHARED, LOCAL):
                generator.run(each(KEYS, rule), None)
            wait_until(lambda: sidecar.server.metric("crdt_pending_buckets") == [0.0] * PEERS)
            of_round = partial(measure, sidecar, generator, peers, seconds=seconds)
            busy = of_round(SHARED, TOLD_PER_SECOND)[PEER_CPU] / 100
            variants: dict[str, Callable[[], Figures]] = {
                UNDISTURBED: partial(of_round, LOCAL, 0, busy=busy),
                QUIET: partial(of_round, LOCAL, 0),
                f"{TOLD_PER_SECOND:,} buckets/s in": partial(of_round, LOCAL, TOLD_PER_SECOND),
                f"{TOLD_PER_SECOND:,} buckets/s in and out": partial(of_round, SHARED, TOLD_PER_SECOND),
            }
            results = alternate("all peers up", variants, rounds)
            peers.pop().server.kill()
            results += alternate("a peer is down", variants, rounds)
    print_results(results, as_json=as_json)
    if not as_json:
        print_longest_stalls(results)
        for rows in too_little_told(results):
            print(f"\nThe peers got too little of the processors to tell {TOLD_PER_SECOND:,} a second: {rows}")


def too_little_told(results: Sequence[Result]) -> list[str]:
    """Group and variant where the peers have told clearly less than they were to."""
    return [
        f"{result.group}, {result.variant}"
        for result in results
        if result.figure == HEARD
        and result.variant not in {UNDISTURBED, QUIET}
        and result.value.median < LEAST_TOLD * TOLD_PER_SECOND
    ]


if __name__ == "__main__":
    main()
