"""A peer without a front end: a member of the mesh that takes from buckets by itself, evenly, as fast as it is told.

    python -m benchmarks.serving.bare_peer NAME RULES_FILE LISTEN PEER... [--keys 100000]

Store, keys, replication and garbage collector are a sidecar's; only the requests are left out, which on one machine
would take more from the sidecar that is measured than the replication does. Each line on standard input is how many
buckets a second are taken from until the next one, first none, and for what part of the time a processor is kept busy
with nothing; the end of the input ends the process.

A sidecar's peers are on other machines. So here they get a processor only while nobody else wants one (SCHED_IDLE,
sched(7)); what cannot be taken in time for that is left out, lest it come in a burst.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import secrets
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from pathlib import Path

import click
import uvloop

from benchmarks.serving.requests import DOMAIN
from benchmarks.serving.servers import Server, Servers
from ratelimit_sidecar import __version__
from ratelimit_sidecar.app import GC_THRESHOLDS
from ratelimit_sidecar.clock import Clock
from ratelimit_sidecar.config.rules_file import load_rules
from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.demo.ports import HOST, RegionPorts
from ratelimit_sidecar.limiter.key import rule_key
from ratelimit_sidecar.limiter.rules import Rules
from ratelimit_sidecar.replication.mesh import Mesh

SLICE_SECONDS = 0.005
"""A quarter of a flush interval: so the buckets of a flush are about the same number each time."""

MOST_LATE_SECONDS = 0.02
"""What was due longer ago is left out."""


class Consumer:
    """Takes a token from each of the keys in turn.

    Args:
        keys: at least one, all of rules that replicate.
        now_us: wall clock in microseconds.
    """

    def __init__(self, store: Store, keys: Sequence[bytes], now_us: Callable[[], int]) -> None:
        self.per_second = 0.0
        self.busy = 0.0
        """The part of the time, 0 to 1, for which to keep a processor busy with nothing."""
        self._store = store
        self._limits = cycle([(key, store.limit_of_key(key)) for key in keys])
        self._now_us = now_us
        self._due = 0.0

    async def run(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        looked_at = loop.time()
        while True:
            await asyncio.sleep(SLICE_SECONDS)
            before, looked_at = looked_at, loop.time()
            self.take(looked_at - before)
            busy_until = loop.time() + self.busy * min(looked_at - before, MOST_LATE_SECONDS)
            while loop.time() < busy_until:
                pass

    def take(self, elapsed_seconds: float) -> None:
        """Take what has become due since the last call."""
        self._due += self.per_second * min(elapsed_seconds, MOST_LATE_SECONDS)
        now_us = self._now_us()
        for key, limit in islice(self._limits, int(self._due)):
            assert limit is not None, key
            self._store.bucket(key, limit, now_us).take(1, now_us)
        self._due %= 1


def shuffled_keys(rules: Rules, keys: int) -> list[bytes]:
    """The buckets of the requests that `generator.uniform` makes, in an order of their own."""
    matches = [rules.match(DOMAIN, [("tenant", f"tenant-{number:07}")]) for number in range(keys)]
    names = [match.bucket_key for match in matches if match is not None]
    assert len(names) == keys, "the rules have none for tenants"
    random.Random(2).shuffle(names)
    return names


async def serve(name: str, rules: Rules, listen: str, peers: list[str], keys: int) -> None:
    """Replicate until the standard input ends."""
    clock = Clock()
    origin = Origin(name, secrets.randbelow(2**64 - 1) + 1)
    store = Store(origin, rules.replicated_limit_of_key, rule_key=rule_key)
    mesh = Mesh(
        origin=origin,
        region=name,
        version=__version__,
        store=store,
        now_us=clock.now_us,
        peers=peers,
        listen=listen,
    )
    mesh.use_rules(rules.digest)
    consumer = Consumer(store, shuffled_keys(rules, keys), clock.now_us)
    await mesh.start()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    heard = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(heard), sys.stdin)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(mesh.run())
        taking = tasks.create_task(consumer.run())
        while line := await heard.readline():
            consumer.per_second, consumer.busy = map(float, line.split())
        taking.cancel()
        mesh.stop()


class BarePeer:
    """The other side: one that a benchmark has started."""

    def __init__(self, server: Server) -> None:
        assert server.process is not None
        assert server.process.stdin is not None
        self.server = server
        self._stdin = server.process.stdin

    def take(self, per_second: float, *, busy: float = 0.0) -> None:
        """From so many buckets, until told otherwise.

        Args:
            busy: the part of the time, 0 to 1, for which it keeps a processor busy with nothing.
        """
        self._stdin.write(b"%f %f\n" % (per_second, busy))
        self._stdin.flush()


def bare_peer(
    servers: Servers, name: str, rules_file: Path, *, ports: RegionPorts, peers: Sequence[str], keys: int
) -> BarePeer:
    """Start one without waiting for it: who is its peer sees when it is there."""
    module = ["-m", "benchmarks.serving.bare_peer"]
    arguments = [name, str(rules_file), f"{HOST}:{ports.sync}", *peers, "--keys", str(keys)]
    return BarePeer(servers.run(name, [sys.executable, *module, *arguments], address="", stdin=subprocess.PIPE))


@click.command()
@click.argument("name")
@click.argument("rules_file", type=click.Path(path_type=Path))
@click.argument("listen")
@click.argument("peers", nargs=-1, required=True)
@click.option("--keys", default=100_000, show_default=True, type=click.IntRange(1))
def main(name: str, rules_file: Path, listen: str, peers: tuple[str, ...], keys: int) -> None:
    """Replicate with the PEERS (host:port), listening on LISTEN."""
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(name, load_rules([rules_file]), listen, list(peers), keys))


if __name__ == "__main__":
    main()
