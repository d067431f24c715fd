"""`python -m benchmarks.light_fabric`: sidecars on a fabric without front ends, in one process, that take on their own.

It says `ready`, begins when it reads a line, and prints what it did as JSON when its time is over or another one comes.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import click
import structlog

from ratelimit_sidecar.config.sidecar_schema import FabricConfig
from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.granted import GrantLedger
from ratelimit_sidecar.crdt.limit import TokenBucketLimit, Window, WindowLimit
from ratelimit_sidecar.crdt.shares import Membership, Shares
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.fabric.fabric import Fabric
from ratelimit_sidecar.fabric.scripts import FabricKeys
from ratelimit_sidecar.persistence.redis_client import Connector
from ratelimit_sidecar.replication.bounds import DEFAULT_BOUNDS
from ratelimit_sidecar.replication.mesh import Mesh
from ratelimit_sidecar.replication.payments import PaymentExchange

WINDOW_US = 86_400_000_000


def now_us() -> int:
    return time.time_ns() // 1_000


def strict_us() -> int:
    """The same clock for all processes of a machine."""
    return time.monotonic_ns() // 1_000


def limit_of(capacity: int) -> WindowLimit:
    """Of every key here."""
    return WindowLimit(capacity, WINDOW_US, Window.FIXED)


def key_of(number: int, owner: str = "") -> bytes:
    return f"{owner}key-{number}".encode()


class LightSidecar:
    """A sidecar on a fabric that has no front end. Run its `fabric`, and call `take` for each request.

    Args:
        keys: that it draws from.
        sync: where its gateway listens; None when it is never one.
        strict: the limit of every key, if it is strict; then it may be the gateway also without `sync`.
        members: among whom it is divided, this region one of them.
        admissions: a file to which the time of each is appended, in microseconds of the machine's clock.
    """

    def __init__(
        self,
        url: str,
        name: str,
        capacity: int,
        keys: int,
        *,
        region: str,
        sync: str | None,
        peers: Sequence[str],
        strict: TokenBucketLimit | None = None,
        members: Sequence[str] = (),
        admissions: Path | None = None,
    ) -> None:
        config = FabricConfig.model_validate({"url": url})

        def make_mesh(store: Store, payments: PaymentExchange | None) -> Mesh:
            return Mesh(
                origin=store.origin,
                region=region,
                version="1",
                store=store,
                now_us=now_us,
                strict_us=strict_us,
                peers=peers,
                listen=sync,
                payments=payments,
            )

        limit = self.limit = limit_of(capacity)
        self.keys = keys
        self.owner = ""
        """In front of the names of its keys."""
        self.admitted = 0
        self.longest_tick = 0.0
        self.strict = strict
        origin = Origin(name, random.getrandbits(63) + 1)
        self.store = Store(origin, lambda _key: limit)
        shares = Shares(Membership(1, dict.fromkeys(members, 1)), region, strict_us())
        self.ledger = GrantLedger(shares, origin, lambda _key: strict)
        self._admissions = None if admissions is None else admissions.open("ab", buffering=0)
        self.fabric = Fabric(
            Connector(config),
            FabricKeys(config.prefix),
            self.store,
            now_us,
            region=region,
            mesh_of=None if sync is None and strict is None else make_mesh,
            ledger=None if strict is None else self.ledger,
            strict_us=strict_us,
        )

    def take(self, hits: int = 1) -> None:
        if self.strict is not None:
            at_us = strict_us()
            key = key_of(random.randrange(self.keys), self.owner)
            if self.ledger.bucket(key, self.strict, at_us).take(hits, at_us):
                self.admitted += hits
                if self._admissions is not None:
                    self._admissions.write(at_us.to_bytes(8))
            return
        bucket = self.store.bucket(key_of(random.randrange(self.keys), self.owner), self.limit, now_us())
        # As the limiter does it: a window would count what it denies.
        if bucket.would_admit(hits, now_us()):
            bucket.take(hits, now_us())
            self.admitted += hits

    async def look(self) -> int:
        """Ask the fabric about its first key, and say what all have taken of it."""
        bucket = self.store.bucket(key_of(0), self.limit, now_us())
        self.fabric.note([(bucket, [])])
        await self.fabric.share()
        return sum(entry.tokens for entry in bucket.entries())

    def flush(self) -> None:
        self.fabric.note(self.store.drain_changes())

    async def load(self, per_second: float, until: asyncio.Event) -> None:
        """Take at a rate, and flush, until it is over."""
        due = time.monotonic()
        while not until.is_set():
            while due <= time.monotonic():
                self.take()
                due += 1 / per_second
            self.flush()
            await asyncio.sleep(DEFAULT_BOUNDS.flush)

    async def watch(self) -> None:
        """Note the longest time between two ticks."""
        ticks, since = 0, time.monotonic()
        while True:
            now = time.monotonic()
            if self.fabric.status.ticks > ticks:
                ticks, since = self.fabric.status.ticks, now
            self.longest_tick = max(self.longest_tick, now - since)
            await asyncio.sleep(0.01)


async def work(sidecars: Sequence[LightSidecar], rate: float, seconds: float) -> dict[str, float]:
    over = asyncio.Event()
    lines = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    async with AsyncExitStack() as stack:
        running = [asyncio.create_task(each.fabric.run()) for each in sidecars]
        print("ready", flush=True)
        await lines.readline()
        began, began_cpu, began_ticks = time.monotonic(), time.process_time(), ticks_of(sidecars)
        watching = [asyncio.create_task(each.watch()) for each in sidecars]
        loading = [asyncio.create_task(each.load(rate, over)) for each in sidecars] if rate else []
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds or None):
                await lines.readline()
        over.set()
        if loading:
            await asyncio.wait(loading)
        elapsed, cpu = time.monotonic() - began, time.process_time() - began_cpu
        figures = {
            "admitted": sum(each.admitted for each in sidecars),
            "longest_tick": max(each.longest_tick for each in sidecars),
            "ticks": ticks_of(sidecars) - began_ticks,
            "failed": sum(each.fabric.status.failed for each in sidecars),
            "cpu": cpu,
            "seconds": elapsed,
        }
        for task in (*watching, *running):
            task.cancel()
        await asyncio.wait([*watching, *running])
        for each in sidecars:
            each.flush()
            while True:
                await each.fabric.share()
                if not each.fabric.status.degraded_reason:
                    break
            stack.push_async_callback(each.fabric.close)
    return figures


def ticks_of(sidecars: Sequence[LightSidecar]) -> int:
    return sum(each.fabric.status.ticks for each in sidecars)


@click.command()
@click.option("--url", required=True)
@click.option("--name", default="light", help="Of the node; with several a number follows.")
@click.option("--sidecars", default=1)
@click.option("--region", default="east")
@click.option("--sync", default=None, help="Where the gateway listens; without it none of them is ever one.")
@click.option("--peer", multiple=True)
@click.option("--rate", default=0.0, help="Requests a second, of each.")
@click.option("--keys", default=1)
@click.option("--own-keys", is_flag=True, help="Each sidecar has others.")
@click.option("--capacity", default=1_000_000_000)
@click.option("--strict", default=0, help="So many a second, and at once, of each key; a strict limit.")
@click.option("--members", default="", help="Of strict limits, with commas; without it the region alone.")
@click.option("--admissions", type=click.Path(path_type=Path), default=None)
@click.option("--seconds", default=0.0, help="0: until another line comes.")
def main(  # noqa: PLR0917
    url: str,
    name: str,
    sidecars: int,
    region: str,
    sync: str | None,
    peer: tuple[str, ...],
    rate: float,
    keys: int,
    own_keys: bool,
    capacity: int,
    strict: int,
    members: str,
    admissions: Path | None,
    seconds: float,
) -> None:
    """Run sidecars without front ends on a fabric."""
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    made = [
        LightSidecar(
            *(url, f"{name}-{number}", capacity, keys),
            region=region,
            sync=sync,
            peers=peer,
            strict=TokenBucketLimit(strict, 1_000_000, strict) if strict else None,
            members=members.split(",") if members else [region],
            admissions=admissions,
        )
        for number in range(sidecars)
    ]
    if own_keys:
        for each in made:
            each.owner = each.store.origin.node
    print(json.dumps(asyncio.run(work(made, rate, seconds))), flush=True)


if __name__ == "__main__":
    main()
