"""docker-compose.yml from start to stop: traffic, a region that is cut off and healed, and if the promise was kept.

python -m deployment.compose [--local-images] [--keep]: exits with 1 when it was not.
python -m deployment.compose --ci: where it cannot run it says why, and exits with 0.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

import httpx
from rich.console import Console

from deployment.cache import Unavailable
from deployment.engine import ROOT, Engine, engine
from deployment.images import BASE, build_sidecar, make_base, make_others
from ratelimit_sidecar.config.rules_file import load_rules
from ratelimit_sidecar.crdt.limit import TokenBucketLimit
from ratelimit_sidecar.demo.bootstrap import DOMAIN, REGIONS
from ratelimit_sidecar.demo.lag import LagMeter
from ratelimit_sidecar.demo.promise import MAX_ERROR_SHARE, OneBucket, Verdict, judge
from ratelimit_sidecar.demo.screen import summary
from ratelimit_sidecar.demo.traffic import RegionTraffic, Traffic

PROJECT: Final = "ratelimit-demo"
RULES: Final = ROOT / "examples/openclaw/rules"
KEPT: Final = "ratelimit_snapshots_total|ratelimit_redis_buckets_total"
PROMETHEUS: Final = "http://127.0.0.1:9090"
CUT_OFF: Final = "eu-west-2"

RATE: Final = 60.0
"""Requests a second, all regions together: six times what an agent may."""

TRAFFIC_S: Final = 12.0
CUT_S: Final = 8.0
DEBT_S: Final = 4.0
MAX_UNASKED_SHARE: Final = 0.5
PATIENCE_S: Final = 120.0
POLL_S: Final = 0.2

UP_S: Final = 300.0
SCRAPED_S: Final = 60.0

COLLECTOR: Final = "otel-collector"
CI_IMAGES_S: Final = 360
"""A slow mirror must not hold up CI."""


class Broken(Exception):
    """Something was not as promised."""


@dataclass(frozen=True, slots=True)
class Region:
    """As the host reaches it, by the ports that the compose file publishes."""

    name: str
    url: str
    admin_url: str


REACHED: Final = [
    Region(name, f"http://127.0.0.1:{10_001 + at}", f"http://127.0.0.1:{10_031 + at}")
    for at, name in enumerate(REGIONS)
]


class Demo:
    """Everything is up.

    Args:
        engine: what it runs on.
        is_traced: the collector is up, too.
    """

    def __init__(self, engine: Engine, console: Console, *, is_traced: bool = True) -> None:
        self._engine = engine
        self._console = console
        self._is_traced = is_traced
        self._limit = _agents_limit()

    async def run(self) -> None:
        """Go through the whole story: connected regions, one cut off, and led back.

        Raises:
            Broken: more or less was admitted than promised, or regions do not find each other.
        """
        await self._until_connected(lambda region: len(REGIONS) - 1)
        self._say("all regions are connected")
        # `up` waits for what has a health check, which Envoys have not.
        for region in REACHED:
            await self._until(lambda at=region: _answers(at), True, f"Envoy of {region.name} answers", PATIENCE_S)
        await self._keeps_its_promise("before")
        await self._is_observed()

        self._wan("disconnect")
        self._say(f"{CUT_OFF} is cut off")
        await self._until_connected(lambda region: 0 if region.name == CUT_OFF else len(REGIONS) - 2)
        during = await self._send("during", CUT_S)
        self._admits_on_both_sides(during)

        self._wan("connect", "--alias", "wan")
        self._say(f"{CUT_OFF} is led back; what both sides admit until they have found each other is debt, too")
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._traffic("during", OneBucket(self._limit)).run(stop))
            await self._until_connected(lambda region: len(REGIONS) - 1)
            stop.set()
        self._say("all regions are connected again")
        taken = -await _tokens_taken()
        repaying = await self._send("during", DEBT_S)
        self._repays(sum(len(region.sent_at) for region in repaying), taken + await _tokens_taken())
        await self._keeps_its_promise("after")

    async def _keeps_its_promise(self, agent: str) -> None:
        one_bucket = OneBucket(self._limit)
        traffic = self._traffic(agent, one_bucket)
        meter = LagMeter(REACHED)
        taken = -await _tokens_taken()
        async with asyncio.TaskGroup() as tasks:
            measuring = tasks.create_task(meter.run())
            await _send_for(traffic, TRAFFIC_S)
            measuring.cancel()
        taken += await _tokens_taken()
        passed = sum(region.admitted for region in traffic.regions)
        unasked = max(0, passed - taken)
        if unasked:
            self._say(
                f"{unasked} requests passed without an answer of their sidecar, as these Envoys wait 100 ms for it"
            )
        if unasked > MAX_UNASKED_SHARE * passed:
            raise Broken("this machine is too busy to tell what is admitted")
        verdict = self._judge(traffic.regions, one_bucket, meter.longest_s, passed - unasked)
        self._console.print(summary(verdict), soft_wrap=True)
        if verdict.broken is not None:
            raise Broken(verdict.broken)

    def _judge(self, regions: Sequence[RegionTraffic], one_bucket: OneBucket, lag_s: float, admitted: int) -> Verdict:
        return judge(
            self._limit,
            admitted=admitted,
            errors=sum(region.errors for region in regions),
            one_bucket=one_bucket.admitted,
            sent_at=[region.sent_at for region in regions],
            last_admitted_at=max(region.last_admitted_at for region in regions),
            lag_s=lag_s,
        )

    def _admits_on_both_sides(self, regions: Sequence[RegionTraffic]) -> None:
        """Neither side waits for the other: each admits a limit of its own, and no more."""
        alone = sum(region.admitted for region in regions if region.name == CUT_OFF)
        others = sum(region.admitted for region in regions if region.name != CUT_OFF)
        errors = sum(region.errors for region in regions)
        self._say(f"meanwhile {CUT_OFF} admits {alone}, the other two together {others}; {errors} errors")
        sent = sum(len(region.sent_at) for region in regions)
        if errors > MAX_ERROR_SHARE * sent or min(alone, others) < self._limit.capacity:
            raise Broken("a side of the partition did not go on by itself")

    def _repays(self, sent: int, taken: int) -> None:
        self._say(f"of the next {sent} requests for it {taken} are admitted: the debt is repaid first")
        if taken > DEBT_S * self._limit.tokens * 1_000_000 / self._limit.period_us / 2:
            raise Broken("what both sides admitted was not repaid")

    async def _is_observed(self) -> None:
        """Prometheus sees all sidecars, and that they write their buckets; the collector has got traces."""
        for query in ("up", f"{{__name__=~'{KEPT}',result='written'}} > 0"):
            await self._until(lambda asked=query: _samples(asked), len(REGIONS), f"Prometheus: {query}", SCRAPED_S)
        self._say("Prometheus scrapes all sidecars; each keeps its buckets in a file or in Valkey")
        if self._is_traced:
            await self._until(self._traced, True, "the collector has spans", SCRAPED_S)
            self._say("the collector gets traces")

    async def _traced(self) -> bool:
        return '"spans"' in self._engine.logs(f"{PROJECT}-{COLLECTOR}-1")

    async def _send(self, agent: str, seconds: float) -> Sequence[RegionTraffic]:
        traffic = self._traffic(agent, OneBucket(self._limit))
        await _send_for(traffic, seconds)
        return traffic.regions

    def _traffic(self, agent: str, one_bucket: OneBucket) -> Traffic:
        return Traffic(
            [(region.name, region.url) for region in REACHED], f"/rate?agent={agent}", RATE, one_bucket.offer
        )

    def _wan(self, action: str, *options: str) -> None:
        self._engine.docker("network", action, *options, f"{PROJECT}_{CUT_OFF}", f"{PROJECT}-wan-1")

    async def _until_connected(self, peers: Callable[[Region], int]) -> None:
        for region in REACHED:
            await self._until(lambda at=region: _connected(at), peers(region), f"peers of {region.name}", PATIENCE_S)

    async def _until(self, ask: Callable[[], Any], expected: int, what: str, seconds: float) -> None:
        found = None
        try:
            async with asyncio.timeout(seconds):
                while True:
                    with suppress(httpx.HTTPError):
                        found = await ask()
                    if found == expected:
                        return
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise Broken(f"{what}: {found}, not {expected} within {seconds:g} s") from None

    def _say(self, text: str) -> None:
        self._console.print(f"{text}.", soft_wrap=True)


@contextmanager
def up(running: Engine, *, keep: bool = False, is_traced: bool = True) -> Iterator[None]:
    """All containers, healthy; taken down with their volumes unless they are to be kept.

    Args:
        is_traced: with the collector.

    Raises:
        subprocess.CalledProcessError: they did not come up.
    """
    arguments = ("--project-name", PROJECT, "--progress", "quiet")
    remove = ("down", "--volumes", "--timeout", "15")
    if running.docker("ps", "--all", "--quiet", "--filter", f"label=com.docker.compose.project={PROJECT}"):
        # Of a run that was killed.
        running.compose(*arguments, *remove)
    try:
        services = [each for each in running.compose("config", "--services").split() if is_traced or each != COLLECTOR]
        running.compose(*arguments, "up", "--detach", "--wait", "--no-build", *services, timeout_s=UP_S)
        yield
    except BaseException:
        with suppress(subprocess.CalledProcessError):
            print(running.compose(*arguments, "logs", "--tail", "20"), file=sys.stderr)
        raise
    finally:
        if not keep:
            running.compose(*arguments, *remove)


async def _send_for(traffic: Traffic, seconds: float) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().call_later(seconds, stop.set)
    await traffic.run(stop)


async def _connected(region: Region) -> int:
    """The others of the list that it has a stream with; the list has itself, too."""
    async with httpx.AsyncClient(trust_env=False) as client:
        answer = (await client.get(f"{region.admin_url}/peers")).raise_for_status().json()
    return sum(peer["connected"] for peer in answer["peers"])


async def _answers(region: Region) -> bool:
    async with httpx.AsyncClient(trust_env=False) as client:
        return (await client.get(f"{region.url}/rate?agent=first")).status_code == httpx.codes.OK


async def _tokens_taken() -> int:
    """By all sidecars since their start, as they count it."""
    taken = 0.0
    async with httpx.AsyncClient(trust_env=False) as client:
        for region in REACHED:
            text = (await client.get(f"{region.admin_url}/metrics")).raise_for_status().text
            lines = [line for line in text.splitlines() if line.startswith("crdt_token_consumed_total{")]
            taken += sum(float(line.rpartition(" ")[2]) for line in lines)
    return round(taken)


async def _samples(query: str) -> int:
    async with httpx.AsyncClient(trust_env=False) as client:
        answer = (await client.get(f"{PROMETHEUS}/api/v1/query", params={"query": query})).raise_for_status().json()
    return sum(sample["value"][1] != "0" for sample in answer["data"]["result"])


def _agents_limit() -> TokenBucketLimit:
    match = load_rules([RULES]).match(DOMAIN, [("agent", "demo")])
    assert match is not None
    assert isinstance(match.rule.limit, TokenBucketLimit)
    return match.rule.limit


def _make_images_for_ci(running: Engine) -> None:
    """All but the collector's, which takes minutes.

    Raises:
        Unavailable: they cannot be made here.
        subprocess.CalledProcessError: the Dockerfile cannot be built.
    """
    with within(CI_IMAGES_S, "its images were not made"):
        make_base(running)
        try:
            running.docker("run", "--rm", BASE, "true")
            make_others(running, collector=False)
        except subprocess.CalledProcessError as error:
            raise Unavailable("this engine cannot run containers that reach Debian's mirror and PyPI") from error
        build_sidecar(running)


@contextmanager
def within(seconds: int, otherwise: str) -> Iterator[None]:
    """In the main thread.

    Raises:
        Unavailable: what is done took longer.
    """

    def late(*_: object) -> None:
        raise Unavailable(f"{otherwise} within {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _run(arguments: argparse.Namespace, console: Console) -> None:
    with engine() as running:
        if arguments.keep and running.is_ours:
            raise Unavailable("--keep: no Docker engine answers, and one that is started for the demo ends with it")
        console.print("making images (minutes, the first time)")
        if arguments.ci:
            _make_images_for_ci(running)
        else:
            if arguments.local_images:
                make_others(running)
            build_sidecar(running)
        is_traced = not arguments.ci
        console.print("starting three regions and what observes them")
        with up(running, keep=arguments.keep, is_traced=is_traced):
            asyncio.run(Demo(running, console, is_traced=is_traced).run())


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="docker-compose.yml from start to stop, and whether it kept its promise."
    )
    parser.add_argument("--local-images", action="store_true", help="make the images that cannot be pulled")
    parser.add_argument("--keep", action="store_true", help="leave the containers running on this machine's engine")
    parser.add_argument(
        "--ci",
        action="store_true",
        help="with local images and without the collector; where that cannot be, say why and succeed",
    )
    arguments = parser.parse_args(given)
    console = Console(highlight=False)
    try:
        _run(arguments, console)
    except Unavailable as unavailable:
        if arguments.ci:
            console.print(f"The compose demo is left out: {unavailable}", soft_wrap=True)
            return 0
        console.print(f"{unavailable}", style="bold red", soft_wrap=True)
        return 1
    except (Broken, subprocess.CalledProcessError) as error:
        console.print(f"{error}", style="bold red", soft_wrap=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
