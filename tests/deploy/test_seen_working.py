"""Prometheus, Alertmanager, Redis and sidecars together, all real: what the dashboards ask for is there, and faults are
told.

Four sidecars in three regions, of which one keeps its state in Redis. One has the wrong time from the start. Then a
bucket is used up, the line between two is cut and led back, the rules of one are broken, and another is stopped.
"""

from __future__ import annotations

import asyncio
import shutil
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from signal import SIGTERM

import grpc.aio
import httpx
import pytest
from deploy.channels import Channels, Message, serving
from deploy.dashboards import queries
from deploy.test_alertmanager import HAS_ALERTMANAGER, alertmanager, configured
from e2e.commands import command, free_base_port
from e2e.sidecars import ask, sidecar_command
from e2e.test_wrong_clock import with_clock_of
from persistence.redis_server import RedisServer, needs_redis

from ratelimit_sidecar.demo.links import Link, Way
from ratelimit_sidecar.demo.observe import Addresses, prometheus_command
from ratelimit_sidecar.demo.ports import HOST, RegionPorts, free_ports
from ratelimit_sidecar.demo.processes import Child, Children, Command
from ratelimit_sidecar.demo.wan import Line
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2_grpc import RateLimitServiceStub
from ratelimit_sidecar.replication.dialler import METHOD

DEPLOYED = Path(__file__).parents[2] / "deploy" / "prometheus"

pytestmark = [
    pytest.mark.long,
    needs_redis,
    pytest.mark.skipif(
        shutil.which("prometheus") is None or not HAS_ALERTMANAGER, reason="Prometheus or Alertmanager is not installed"
    ),
    pytest.mark.filterwarnings("ignore:Session.login_data is deprecated:DeprecationWarning"),
]

WITHIN_S = 180.0
"""It takes half a minute; the rest is for a busy machine."""

REGIONS = {"us-1": "us-east-1", "eu-1": "eu-west-2", "eu-2": "eu-west-2", "ap-1": "ap-southeast-1"}
WRONG_CLOCK = "ap-1"
STOPPED = "eu-2"
CUT = ("us-1", "eu-1")
BROKEN_RULES = "us-1"
IN_REDIS = "eu-1"

RULES = """
domain: shop
descriptors:
  - key: user
    bucket: {capacity: 20, refillRate: 5}
  - key: quota
    algorithm: fixed_window
    rate_limit: {unit: month, requests_per_unit: 100}
  - key: slow
    algorithm: fixed_window
    rate_limit: {unit: month, requests_per_unit: 100000}
  - key: watched
    shadow_mode: true
    rate_limit: {unit: minute, requests_per_unit: 5}
  - key: plan
    consistency: strict
    rate_limit: {unit: second, requests_per_unit: 100}
"""


@dataclass
class Site:
    channels: Channels
    prometheus: httpx.AsyncClient
    sidecars: dict[str, Child]
    stubs: dict[str, RateLimitServiceStub]
    line: Way
    """Between the two of `CUT`, both ways."""

    async def ask(self, node: str, key: str, value: str, hits: int = 1) -> None:
        with suppress(grpc.aio.AioRpcError):
            await self.stubs[node].ShouldRateLimit(ask("shop", key, value, hits), timeout=5)

    async def send_traffic(self) -> None:
        """To all, until it is cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for node in REGIONS:
                tasks.create_task(self._send_traffic_to(node))

    async def _send_traffic_to(self, node: str) -> None:
        while True:
            for key in ("user", "slow", "watched", "plan", "unlimited"):
                await self.ask(node, key, "ada")
            await asyncio.sleep(0.1)

    async def has_data(self, expression: str) -> bool:
        answer = await self.prometheus.get("/api/v1/query", params={"query": expression})
        assert answer.status_code == httpx.codes.OK, answer.text
        # One that is no number is no point in a panel.
        return any(of["value"][1] != "NaN" for of in answer.json()["data"]["result"])

    async def told(self, *wanted: tuple[str, str], resolved: bool = False) -> None:
        """Wait for messages, by channel and what is in them."""

        def are_there(messages: list[Message]) -> bool:
            return all(
                any(of.channel == channel and of.is_resolved == resolved and text in of.text for of in messages)
                for channel, text in wanted
            )

        await self.channels.wait(are_there, WITHIN_S)


def sidecars(
    folder: Path, ports: dict[str, RegionPorts], over: dict[tuple[str, str], int], redis: str
) -> list[Command]:
    """The commands of all sidecars of this test.

    Args:
        over: the port at which the first dials the second, where that is not its own.
        redis: its url.
    """
    made = []
    for node, region in REGIONS.items():
        rules = folder / f"rules-{node}"
        rules.mkdir()
        (rules / "shop.yaml").write_text(RULES)
        config = {
            "node": {"id": node, "region": region},
            "rules": [str(rules)],
            "sync": {
                "peers": [f"{HOST}:{over.get((node, peer), of.sync)}" for peer, of in ports.items()],
                "members": dict.fromkeys(REGIONS, 1),
            },
            "persistence": {"url": redis}
            if node == IN_REDIS
            else {"file": str(folder / f"state-{node}"), "every_seconds": 1},
        }
        of_node = sidecar_command(folder, ports[node], config, name=node, ready_path="/healthz")
        made.append(with_clock_of(folder / "ahead", of_node) if node == WRONG_CLOCK else of_node)
    return made


@asynccontextmanager
async def site(folder: Path) -> AsyncIterator[Site]:
    found = free_ports(len(REGIONS))
    ports = dict(zip(REGIONS, found.regions, strict=True))
    (folder / "ahead").write_text("3600")
    async with AsyncExitStack() as stack:
        channels = await stack.enter_async_context(serving())
        alerting = await stack.enter_async_context(alertmanager(folder, configured(folder, channels)))
        children = await stack.enter_async_context(Children(folder))
        redis = await stack.enter_async_context(RedisServer(folder / "redis"))
        line = Way()
        over = {}
        for dials, is_dialled in (CUT, CUT[::-1]):
            listener = socket.create_server((HOST, 0))
            over[dials, is_dialled] = listener.getsockname()[1]
            to = Line(0, HOST, ports[is_dialled].sync)
            await stack.enter_async_context(Link(listener, to.dial, line, line))
        started = {command.name: await children.start(command) for command in sidecars(folder, ports, over, redis.url)}
        targets = {f"{HOST}:{ports[node].admin}": region for node, region in REGIONS.items()}
        at = Addresses(f"{HOST}:{found.upstream}", f"{alerting.base_url.host}:{alerting.base_url.port}")
        await children.start(prometheus_command(folder, DEPLOYED, at, targets))
        stubs = {
            node: RateLimitServiceStub(await stack.enter_async_context(grpc.aio.insecure_channel(f"{HOST}:{of.grpc}")))
            for node, of in ports.items()
        }
        prometheus = await stack.enter_async_context(
            httpx.AsyncClient(base_url=f"http://{HOST}:{found.upstream}", trust_env=False, timeout=30)
        )
        # So that a stream is refused.
        mesh = await stack.enter_async_context(grpc.aio.insecure_channel(f"{HOST}:{ports['us-1'].sync}"))
        call = mesh.stream_stream(METHOD)(timeout=60)
        await call.write(b"no frame")
        with suppress(grpc.aio.AioRpcError):
            async for _ in call:
                pass
        yield Site(channels, prometheus, started, stubs, line)


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    while not await condition():  # noqa: ASYNC110 (another process)
        await asyncio.sleep(0.5)


async def test_every_panel_has_data_and_five_faults_are_told_where_they_should_be(tmp_path: Path) -> None:
    async with site(tmp_path) as at, asyncio.TaskGroup() as tasks:
        traffic = tasks.create_task(at.send_traffic())

        missing = {f"{of.dashboard}, {of.panel}": of.expression for of in queries("15s")}

        async def all_found() -> bool:
            for name, expression in list(missing.items()):
                if await at.has_data(expression):
                    del missing[name]
            return not missing

        with suppress(TimeoutError):
            async with asyncio.timeout(WITHIN_S):
                await until(all_found)
        assert missing == {}

        await at.told(("mail", "RateLimitClockSkew"), ("#ratelimit-us-east-1", "RateLimitClockSkew"))

        await at.ask("us-1", "quota", "bob", hits=97)
        await at.told(("mail", "A bucket of shop.quota in shop is 97% used"))

        cut = [
            (channel, f"in {REGIONS[node]} has no stream with {peer}")
            for node, peer in (CUT, CUT[::-1])
            for channel in ("mail", f"#ratelimit-{REGIONS[node]}")
        ]
        at.line.stall()
        await at.told(*cut)
        at.line.resume()
        await at.told(("#ratelimit-us-east-1", "RateLimitPeerDisconnected us-east-1"), resolved=True)

        broken = tmp_path / f"rules-{BROKEN_RULES}" / "shop.yaml"
        broken.write_text(RULES.replace("shadow_mode", "shade_mode"))
        await at.told(("#ratelimit-us-east-1", "has rejected the newest rules"))

        at.sidecars[STOPPED].signal(SIGTERM)
        await at.told(
            ("pagerduty", "RateLimitSidecarDown eu-west-2"),
            ("telegram", "RateLimitSidecarDown eu-west-2"),
            ("mail", f"has no stream with {STOPPED}"),
        )

        broken.write_text(RULES)
        await at.told(("#ratelimit-us-east-1", "RateLimitRulesRejected us-east-1"), resolved=True)
        traffic.cancel()


async def test_a_demo_that_is_observed_shows_an_alert_that_fires_and_is_resolved() -> None:
    async with command("demo", "--observe", "--duration", "30", "--base-port", str(free_base_port())) as demo:
        await demo.printed("alert RateLimitBucketNearExhaustion fires: A bucket of openclaw.agent in openclaw is ")
        await demo.printed("alert RateLimitBucketNearExhaustion is resolved")
        assert await demo.ended() == 0, demo.output
