"""Sidecars in regions far from each other: real processes, each on a machine of its own, with long lines between them.

A sidecar dials its peers at its own loopback, where a link takes the connection over the switch to the peer. Its ports
for Envoy and operators are at the same numbers on this machine's loopback, as a container's published ones.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, permutations
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
from chaos.namespaces import Network, network
from e2e.sidecars import ask, sidecar_command

from ratelimit_sidecar.demo.links import Link, Way
from ratelimit_sidecar.demo.ports import HOST, RegionPorts, free_ports
from ratelimit_sidecar.demo.processes import Child, Children, Command
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2 import RateLimitRequest, RateLimitResponse
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2_grpc import RateLimitServiceStub

EAST, WEST, SOUTH = NAMES = ("east", "west", "south")

ROUND_TRIPS_S = {frozenset((EAST, WEST)): 0.08, frozenset((WEST, SOUTH)): 0.14, frozenset((EAST, SOUTH)): 0.2}
"""Between the middles of continents."""

JITTER = 0.1
"""Of a delay."""

DOMAIN = "shop"
LIMIT = 100_000
RULES = f"""
domain: {DOMAIN}
descriptors:
  - key: user
    algorithm: fixed_window
    rate_limit: {{unit: year, requests_per_unit: {LIMIT}}}
"""
"""Nothing is refilled before the year is over: what is missing is what was taken, exactly. Of a token bucket a part of
what others took, up to a 64th of its capacity, may be refilled at once: it is placed in the middle of its slot, which
is days wide for a unit of a year, and half of the time is over."""

USERS = tuple(f"user-{number}" for number in range(20))
PAUSE_S = 0.02
ANSWER_WITHIN_S = 5.0
"""It takes a millisecond; the rest is for a busy machine."""

WITHIN_S = 60.0
"""For what has no time of its own to keep."""

_POLL_S = 0.05
_PAGE = 200


class Traffic:
    """Asks one sidecar for one hit after the other, for all users in turn, until it is told to end.

    Of those who `run` it each is a caller of its own.
    """

    def __init__(self, stub: RateLimitServiceStub) -> None:
        self._stub = stub
        self._ends = asyncio.Event()
        self.admitted: Counter[str] = Counter()
        """Hits let through, by user."""
        self.unanswered = 0
        """Requests of which nobody knows whether they were counted."""

    async def run(self) -> None:
        for user in cycle(USERS):
            if self._ends.is_set():
                return
            try:
                answer = await self._stub.ShouldRateLimit(ask(DOMAIN, "user", user), timeout=ANSWER_WITHIN_S)
            except grpc.aio.AioRpcError:
                self.unanswered += 1
            else:
                self.admitted[user] += answer.overall_code == RateLimitResponse.OK
            await asyncio.sleep(PAUSE_S)

    def end(self) -> None:
        """Let `run` return once its last request is answered."""
        self._ends.set()


def assert_served(traffic: Mapping[str, Traffic]) -> None:
    """Every request was answered, and some were let through, in each of these regions."""
    for name, each in traffic.items():
        assert each.admitted, f"{name} let nothing through"
        assert not each.unanswered, f"{name} has not answered {each.unanswered} requests"


class Region:
    """A sidecar and its machine.

    Args:
        child: None while it has not been started.
    """

    def __init__(self, name: str, command: Command, ports: RegionPorts, channel: grpc.aio.Channel) -> None:
        self.name = name
        self.command = command
        self.stub = RateLimitServiceStub(channel)
        self.child: Child | None = None
        self._console_url = f"http://{HOST}:{ports.admin}"

    @property
    def process(self) -> Child:
        assert self.child is not None
        return self.child

    async def read(self, console: httpx.AsyncClient, path: str, **query: str | int) -> dict[str, Any]:
        return (await console.get(f"{self._console_url}{path}", params=query)).raise_for_status().json()


class Regions:
    """All regions, the network between them, and what was admitted anywhere; `three_regions` makes it.

    Args:
        ways: by from where to where.
        quiet: held while processes start, and by who measures.
    """

    def __init__(
        self,
        by_name: Mapping[str, Region],
        net: Network,
        ways: Mapping[tuple[str, str], Way],
        children: Children,
        console: httpx.AsyncClient,
        quiet: asyncio.Lock,
    ) -> None:
        self.network = net
        self.ways = ways
        self._by_name = by_name
        self._children = children
        self._console = console
        self._quiet = quiet
        self.admitted: Counter[str] = Counter()
        """By user, by all traffic that has ended."""

    def __getitem__(self, name: str) -> Region:
        return self._by_name[name]

    async def start(self, name: str) -> None:
        """Start a sidecar, or start it again, and wait until it says that it is ready."""
        async with self._quiet:
            await self._start(self[name])

    async def start_all(self) -> None:
        """Start all sidecars and wait until each is connected to each."""
        async with self._quiet:
            async with asyncio.TaskGroup() as starting:
                for region in self._by_name.values():
                    starting.create_task(self._start(region))
            await self.until(self.all_connected)

    async def _start(self, region: Region) -> None:
        region.child = await self._children.start(region.command)

    async def kill(self, name: str) -> None:
        """kill -9"""
        await self._children.kill(self[name].process)

    @asynccontextmanager
    async def traffic(self, *names: str, callers: int = 1) -> AsyncIterator[dict[str, Traffic]]:
        """So many callers ask each of these sidecars all the while; gives what came of it, by region."""
        each = {name: Traffic(self[name].stub) for name in names}
        async with asyncio.TaskGroup() as tasks:
            for traffic in each.values():
                for _ in range(callers):
                    tasks.create_task(traffic.run())
            try:
                yield each
            finally:
                for traffic in each.values():
                    traffic.end()
        for traffic in each.values():
            self.admitted += traffic.admitted

    async def take_of_each(self, name: str, buckets: int, descriptors: int) -> None:
        """Take one token from each of so many buckets, by requests to one sidecar with so many descriptors each."""
        values = [f"one-of-many-{number}" for number in range(buckets)]
        for some in _batched(values, descriptors):
            request = RateLimitRequest(domain=DOMAIN)
            for value in some:
                request.descriptors.extend(ask(DOMAIN, "user", value).descriptors)
            answer = await self[name].stub.ShouldRateLimit(request, timeout=WITHIN_S)
            assert answer.overall_code == RateLimitResponse.OK
            self.admitted.update(some)

    async def taken(self, name: str) -> Counter[str]:
        """What was taken from each bucket, as this sidecar knows it."""
        taken: Counter[str] = Counter()
        query: dict[str, str | int] = {"domain": DOMAIN, "limit": _PAGE}
        while True:
            body = await self[name].read(self._console, "/buckets", **query)
            for bucket in body["buckets"]:
                [entry] = bucket["entries"]
                taken[entry["value"]] = LIMIT - bucket["remaining"]
            if body["next"] is None:
                return taken
            query["after"] = body["next"]

    async def read(self, name: str, path: str) -> dict[str, Any]:
        """A page of a sidecar's console."""
        return await self[name].read(self._console, path)

    async def peers(self, name: str) -> dict[str, dict[str, Any]]:
        """Its peers as a sidecar sees them, by their node ids."""
        body = await self.read(name, "/peers")
        return {peer["node"]: peer for peer in body["peers"]}

    async def connected(self, name: str) -> set[str]:
        """Whom a sidecar has a stream with."""
        return {node for node, peer in (await self.peers(name)).items() if peer["connected"]}

    async def all_connected(self) -> bool:
        return all([len(await self.connected(name)) == len(self._by_name) - 1 for name in self._by_name])

    async def until(self, condition: Callable[[], Awaitable[bool]], within_s: float = WITHIN_S) -> None:
        """Wait until a condition holds.

        Raises:
            TimeoutError: it has not come to hold in time.
        """
        async with asyncio.timeout(within_s):
            while not await condition():  # noqa: ASYNC110 (another process)
                await asyncio.sleep(_POLL_S)

    async def until_agreed(
        self, names: Iterable[str] = NAMES, within_s: float = WITHIN_S, *, unanswered: int = 0
    ) -> float:
        """Wait until these sidecars all know of everything that was admitted, and of nothing more.

        Args:
            unanswered: requests that may have been counted or not.

        Returns:
            The seconds it took.

        Raises:
            AssertionError: it took longer than `within_s`; the text tells who knows what.
        """

        def is_right(taken: Counter[str]) -> bool:
            return self.admitted <= taken and taken.total() <= self.admitted.total() + unanswered

        started_s = time.monotonic()
        missing: dict[str, dict[str, int]] = {}
        for name in names:
            while not is_right(taken := await self.taken(name)):
                if time.monotonic() - started_s > within_s:
                    missing[name] = {user: self.admitted[user] - taken[user] for user in self.admitted | taken}
                    break
                await asyncio.sleep(_POLL_S)
        assert not missing, f"not agreed after {within_s:g} s; admitted and not known of: {missing}"
        return time.monotonic() - started_s

    @asynccontextmanager
    async def measuring(self) -> AsyncIterator[None]:
        """No sidecar of any scenario starts meanwhile: that would take this machine's processors."""
        async with self._quiet:
            yield


@dataclass(frozen=True, slots=True)
class Lab:
    """What a scenario is given.

    Args:
        folder: an empty one.
        quiet: the same for all scenarios that run beside each other.
    """

    folder: Path
    quiet: asyncio.Lock

    @asynccontextmanager
    async def three_regions(
        self,
        rules: str = RULES,
        members: Mapping[str, int] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> AsyncIterator[Regions]:
        """Three regions that are connected and idle.

        Args:
            members: of strict limits; the configuration has none by default.
            environment: of the sidecars, besides this process's.
        """
        (self.folder / "rules.yaml").write_text(rules)
        ports = dict(zip(NAMES, free_ports(len(NAMES)).regions, strict=True))
        async with AsyncExitStack() as stack:
            net = stack.enter_context(network(NAMES))
            ways = {
                (source, sink): _way(source, sink, seed) for seed, (source, sink) in enumerate(permutations(NAMES, 2))
            }
            for name in NAMES:
                await self._publish(stack, net, name, ports[name])
            for (source, sink), way in ways.items():
                port = ports[sink].sync
                dial = partial(net.dial, source, (net.addresses[sink], port))
                listener = net.socket(source)
                await stack.enter_async_context(Link(_bound(listener, port), dial, way, ways[sink, source]))
            children = await stack.enter_async_context(Children(self.folder))
            console = await stack.enter_async_context(
                httpx.AsyncClient(trust_env=False, timeout=60, limits=_NEW_CONNECTIONS)
            )
            by_name = {}
            for name in NAMES:
                channel = await stack.enter_async_context(
                    grpc.aio.insecure_channel(f"{HOST}:{ports[name].grpc}", _CHANNEL)
                )
                by_name[name] = Region(
                    name, self._command(net, name, ports, members, environment), ports[name], channel
                )
            regions = Regions(by_name, net, ways, children, console, self.quiet)
            await regions.start_all()
            yield regions

    async def _publish(self, stack: AsyncExitStack, net: Network, name: str, ports: RegionPorts) -> None:
        for port in (ports.grpc, ports.admin):
            listener = socket.socket()
            await stack.enter_async_context(
                Link(_bound(listener, port), partial(net.dial, name, (HOST, port)), Way(), Way())
            )

    def _command(
        self,
        net: Network,
        name: str,
        ports: Mapping[str, RegionPorts],
        members: Mapping[str, int] | None,
        environment: Mapping[str, str] | None,
    ) -> Command:
        own = ports[name]
        config = {
            "node": {"id": name, "region": name},
            "listen": {
                "grpc": [f"{HOST}:{own.grpc}"],
                "admin": f"{HOST}:{own.admin}",
                "sync": f"{net.addresses[name]}:{own.sync}",
                "admin_shows_values": True,
            },
            "rules": [str(self.folder / "rules.yaml")],
            # The addresses of this network are nobody else's.
            "sync": {
                "insecure": True,
                "peers": [f"{HOST}:{peer.sync}" for other, peer in ports.items() if other != name],
                **({} if members is None else {"members": dict(members)}),
            },
        }
        command = sidecar_command(self.folder, own, config, name=name, environment=environment)
        return replace(command, argv=net.inside(name, command.argv))


def _batched(values: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]


_NEW_CONNECTIONS = httpx.Limits(max_keepalive_connections=0)
"""One for each page: a kept one may be closed by the console, or end with the sidecar, just as it is used again."""

_CHANNEL = (
    # A sidecar that is back is dialled at once.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 100),
    # What an attempt may take, which is more than it says: on a busy machine 100 ms are over before HTTP/2 has begun.
    ("grpc.min_reconnect_backoff_ms", 2_000),
    ("grpc.enable_http_proxy", 0),
)


def _way(source: str, sink: str, seed: int) -> Way:
    delay_s = ROUND_TRIPS_S[frozenset((source, sink))] / 2
    return Way(delay_s * (1 - JITTER), 2 * delay_s * JITTER, seed)


def _bound(listener: socket.socket, port: int) -> socket.socket:
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((HOST, port))
    return listener
