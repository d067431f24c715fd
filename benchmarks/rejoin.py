"""A sidecar that was killed comes back to two others that hold many buckets: how soon it knows them all, and what the
others' decisions take meanwhile.

    python -m benchmarks.rejoin [--buckets 100000] [--rounds 3] [--json]

Three real sidecars on loopback. Each of the two that stay is asked 250 times a second, one question at a time, in three
situations: while nothing else happens, while a sidecar starts that has no peers, and while the killed one starts and
rejoins, until it holds all buckets. The second shows what a process that starts takes from the others on this machine,
whatever it does then; the third is to be compared with it where processors are few.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import grpc.aio
import httpx
import yaml
from prometheus_client.parser import text_string_to_metric_families as parse_metrics

from ratelimit_sidecar.demo.ports import HOST, RegionPorts, free_ports
from ratelimit_sidecar.demo.processes import Children, Command
from ratelimit_sidecar.envoy_api.envoy.extensions.common.ratelimit.v3.ratelimit_pb2 import RateLimitDescriptor
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2 import RateLimitRequest
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2_grpc import RateLimitServiceStub

BUCKETS = 100_000
ROUNDS = 3
DESCRIPTORS = 100
"""In one request that fills buckets."""

PAUSE_S = 0.004
CALM_S = 4.0
"""To get over what came before, and to be measured in."""

WITHIN_S = 60.0
POLL_S = 0.05

RULES = "domain: api\ndescriptors:\n  - key: user\n    rate_limit: {unit: day, requests_per_unit: 1000}\n"


@dataclass(frozen=True, slots=True)
class Rejoin:
    """Times of all rounds together.

    Args:
        calm_p99_ms: of decisions while nothing else happens.
        start_p99_ms: while a sidecar without peers starts.
        rejoin_p99_ms: while the killed one starts and rejoins.
        to_calm, to_start: `rejoin_p99_ms` by these.
        ready_s: from the start of the process to the first 200 of /readyz; the longest.
        synced_s: from there to when it holds all buckets; 0 when it did before; the longest.
    """

    buckets: int
    calm_p99_ms: float
    start_p99_ms: float
    rejoin_p99_ms: float
    to_calm: float
    to_start: float
    ready_s: float
    synced_s: float


class Sidecars:
    """The commands of four sidecars: a mesh of three, one of which rejoins, and one that starts alone.

    Args:
        ports: of the two that stay, of the one that rejoins, and of the one that starts alone.
    """

    def __init__(
        self, folder: Path, ports: Sequence[RegionPorts], children: Children, console: httpx.AsyncClient
    ) -> None:
        self._folder = folder
        self._console = console
        self.children = children
        self.ports = ports
        self.mesh = [self._command(f"node-{number}", each, ports[:3]) for number, each in enumerate(ports[:3])]
        self.alone = self._command("alone", ports[3], ())

    def _command(self, name: str, own: RegionPorts, peers: Sequence[RegionPorts]) -> Command:
        config = {
            "node": {"id": name},
            "listen": {
                "grpc": [f"{HOST}:{own.grpc}"],
                "admin": f"{HOST}:{own.admin}",
                "sync": f"{HOST}:{own.sync}",
            },
            "rules": [str(self._folder / "rules.yaml")],
            "sync": {"peers": [f"{HOST}:{peer.sync}" for peer in peers]},
        }
        file = self._folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(config))
        argv = [sys.executable, "-m", "ratelimit_sidecar", "serve", "--config", str(file)]
        return Command(name, argv, f"http://{HOST}:{own.admin}/readyz")

    async def until_it_holds(self, ports: RegionPorts, buckets: int) -> None:
        async with asyncio.timeout(WITHIN_S):
            while await self._metric(ports, "crdt_buckets") < buckets:  # noqa: ASYNC110 (another process)
                await asyncio.sleep(POLL_S)

    async def until_nothing_is_pending(self) -> None:
        """Wait until the two that stay have told each other what they had to pass on for the one that is gone."""
        async with asyncio.timeout(WITHIN_S):
            for ports in self.ports[:2]:
                while await self._metric(ports, "crdt_pending_buckets"):  # noqa: ASYNC110 (another process)
                    await asyncio.sleep(POLL_S)

    async def _metric(self, ports: RegionPorts, name: str) -> float:
        """The sum of its samples."""
        text = (await self._console.get(f"http://{HOST}:{ports.admin}/metrics")).raise_for_status().text
        return sum(sample.value for family in parse_metrics(text) if family.name == name for sample in family.samples)


def request_of(users: Iterable[int]) -> RateLimitRequest:
    entries = [RateLimitDescriptor.Entry(key="user", value=f"user-{number}") for number in users]
    return RateLimitRequest(domain="api", descriptors=[RateLimitDescriptor(entries=[entry]) for entry in entries])


@asynccontextmanager
async def asked(stubs: Sequence[RateLimitServiceStub], times_s: list[float]) -> AsyncIterator[None]:
    """Ask each sidecar all the while, and note how long each answer took."""
    ends = asyncio.Event()

    async def ask(stub: RateLimitServiceStub) -> None:
        number = 0
        while not ends.is_set():
            number += 1
            request = request_of([number % 1_000])
            started_s = time.perf_counter()
            await stub.ShouldRateLimit(request, timeout=WITHIN_S)
            times_s.append(time.perf_counter() - started_s)
            await asyncio.sleep(PAUSE_S)

    async with asyncio.TaskGroup() as tasks:
        for stub in stubs:
            tasks.create_task(ask(stub))
        try:
            yield
        finally:
            ends.set()


def p99_ms(times_s: list[float]) -> float:
    return sorted(times_s)[len(times_s) * 99 // 100] * 1e3


async def measure(buckets: int, rounds: int) -> Rejoin:
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "rules.yaml").write_text(RULES)
        children = await stack.enter_async_context(Children(folder))
        console = await stack.enter_async_context(httpx.AsyncClient(trust_env=False, timeout=WITHIN_S))
        sidecars = Sidecars(folder, free_ports(4).regions, children, console)
        staying = sidecars.ports[:2]
        stubs = []
        for ports in staying:
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"{HOST}:{ports.grpc}"))
            stubs.append(RateLimitServiceStub(channel))
        *_, killed = [await children.start(command) for command in sidecars.mesh]
        for start in range(0, buckets, DESCRIPTORS):
            request = request_of(range(start, min(start + DESCRIPTORS, buckets)))
            await stubs[0].ShouldRateLimit(request, timeout=WITHIN_S)
        for ports in sidecars.ports[:3]:
            await sidecars.until_it_holds(ports, buckets)

        calm_s: list[float] = []
        starting_s: list[float] = []
        rejoining_s: list[float] = []
        ready_s: list[float] = []
        synced_s: list[float] = []
        for _ in range(rounds):
            await children.kill(killed)
            await asyncio.sleep(CALM_S)
            await sidecars.until_nothing_is_pending()
            async with asked(stubs, calm_s):
                await asyncio.sleep(CALM_S)
            async with asked(stubs, starting_s):
                alone = await children.start(sidecars.alone)
            await children.kill(alone)
            async with asked(stubs, rejoining_s):
                started_s = time.perf_counter()
                killed = await children.start(sidecars.mesh[2])
                ready_s.append(time.perf_counter() - started_s)
                await sidecars.until_it_holds(sidecars.ports[2], buckets)
                synced_s.append(time.perf_counter() - started_s - ready_s[-1])
        return Rejoin(
            buckets=buckets,
            calm_p99_ms=p99_ms(calm_s),
            start_p99_ms=p99_ms(starting_s),
            rejoin_p99_ms=p99_ms(rejoining_s),
            to_calm=p99_ms(rejoining_s) / p99_ms(calm_s),
            to_start=p99_ms(rejoining_s) / p99_ms(starting_s),
            ready_s=max(ready_s),
            synced_s=max(synced_s),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--buckets", type=int, default=BUCKETS, help="that the two others hold (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of killing and coming back (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the text")
    arguments = parser.parse_args()
    result = asyncio.run(measure(arguments.buckets, arguments.rounds))
    if arguments.json:
        print(json.dumps(asdict(result)))
        return
    print(f"{result.buckets:,} buckets, {arguments.rounds} rounds; the 99th percentile of the others' decisions:")
    print(f"  {result.calm_p99_ms:7.2f} ms while nothing else happens")
    print(f"  {result.start_p99_ms:7.2f} ms while a sidecar without peers starts")
    print(
        f"  {result.rejoin_p99_ms:7.2f} ms while the killed one rejoins: {result.to_calm:.1f} x the first,"
        f" {result.to_start:.1f} x the second"
    )
    print(f"ready {result.ready_s:.1f} s after its start, and in sync {result.synced_s:.1f} s after that, at worst")


if __name__ == "__main__":
    main()
