"""One run of the demo: start the regions, send traffic, show it, judge it, stop everything."""

from __future__ import annotations

import asyncio
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from ratelimit_sidecar.config.rules_file import load_rules
from ratelimit_sidecar.crdt.limit import TokenBucketLimit
from ratelimit_sidecar.demo import DemoError
from ratelimit_sidecar.demo.bootstrap import DOMAIN
from ratelimit_sidecar.demo.lag import LagMeter
from ratelimit_sidecar.demo.observe import RESOLVED_WITHIN_S, Addresses, ensure_installed, show_alert, start_observers
from ratelimit_sidecar.demo.ports import HOST, Ports
from ratelimit_sidecar.demo.processes import Children, first_failure
from ratelimit_sidecar.demo.promise import OneBucket, Verdict, judge
from ratelimit_sidecar.demo.regions import Region, Setup, start_regions
from ratelimit_sidecar.demo.screen import Screen, summary
from ratelimit_sidecar.demo.traffic import Traffic

AGENT = "demo"
"""Whose requests the traffic sends. The sidecars are new, so its bucket is full."""

PATH = f"/rate?agent={AGENT}"


class NotLimited(DemoError):
    """The example's rules put no limit on an agent, so there is nothing to show."""


async def run(
    *,
    examples: Path,
    ports: Ports,
    rate: float,
    duration_s: float | None,
    keep: bool,
    observers: Addresses | None = None,
) -> Verdict:
    """From start to stop.

    Args:
        examples: the folder `examples/openclaw` of a checkout.
        rate: requests a second and region, on average.
        duration_s: of the traffic; None until Ctrl-C.
        keep: leave everything up after the traffic, until Ctrl-C.
        observers: where Prometheus and Alertmanager shall listen; None for neither.

    Raises:
        asyncio.CancelledError: interrupted before the traffic had begun, or once more while it was ending.
        ConfigError, NotLimited: the example's rules.
        EnvoyMissing, PortTaken, ChildFailed: as `start_regions`; ChildFailed also when a process ends by itself.
        NotInstalled: there is no Prometheus or Alertmanager to observe it.
    """
    console = Console(highlight=False)
    if observers is not None:
        ensure_installed()
    rules = examples / "rules"
    limit = _agents_limit(rules)
    with (
        _Interrupts().handled() as interrupts,
        tempfile.TemporaryDirectory(prefix="ratelimit-demo-") as name,
        first_failure(),
    ):
        folder = Path(name)
        async with Children(folder) as children:
            console.print(
                f"starting three sidecars, three Envoys and the OpenClaw Rating API; logs in {folder}",
                soft_wrap=True,
            )
            setup = Setup(ports, folder, examples / "rating_api.py", [rules])
            regions = await start_regions(children, setup)
            if observers is not None:
                targets = {f"{HOST}:{region.ports.admin}": region.name for region in regions}
                await start_observers(
                    children, folder, examples.parents[1] / "deploy" / "prometheus", observers, targets
                )
                console.print(
                    f"Prometheus is at http://{observers.prometheus}, Alertmanager at http://{observers.alertmanager}",
                    soft_wrap=True,
                )
            async with asyncio.TaskGroup() as tasks:
                watching = tasks.create_task(children.watch())
                stop = interrupts.expect()
                if duration_s is not None:
                    asyncio.get_running_loop().call_later(duration_s, stop.set)
                alerts = None if observers is None else tasks.create_task(show_alert(observers, console, fires=True))
                verdict = await _send_traffic(regions, limit, rate, stop, console)
                if observers is not None and alerts is not None:
                    await _show_end_of_alert(observers, alerts, console)
                if keep and not interrupts.seen:
                    _print_curl_lines(regions, console)
                    await interrupts.expect().wait()
                watching.cancel()
    return verdict


async def _show_end_of_alert(observers: Addresses, shown: asyncio.Task[None], console: Console) -> None:
    """Wait until the alert is resolved, and show it.

    Args:
        shown: the task that shows that the alert fires.
    """
    if not shown.done():
        shown.cancel()
        console.print("no alert has fired by the end of the traffic: give it a longer --duration")
        return
    try:
        async with asyncio.timeout(RESOLVED_WITHIN_S):
            await show_alert(observers, console, fires=False)
    except TimeoutError:
        console.print(f"the alert still fires {RESOLVED_WITHIN_S:.0f} s after the traffic")


async def _send_traffic(
    regions: list[Region], limit: TokenBucketLimit, rate: float, stop: asyncio.Event, console: Console
) -> Verdict:
    total_rate = rate * len(regions)
    console.print(
        f"agent {AGENT!r} may send {limit.capacity} requests at once, refilled at "
        f"{limit.tokens * 1_000_000 / limit.period_us:g} a second, all regions together; "
        f"it sends {total_rate:g} a second",
        soft_wrap=True,
    )
    one_bucket = OneBucket(limit)
    traffic = Traffic([(region.name, region.url) for region in regions], PATH, total_rate, one_bucket.offer)
    meter = LagMeter(regions)
    screen = Screen(console, traffic, one_bucket, meter)
    async with asyncio.TaskGroup() as tasks:
        beside = [tasks.create_task(meter.run()), tasks.create_task(screen.run())]
        await traffic.run(stop)
        for task in beside:
            task.cancel()
    verdict = judge(
        limit,
        admitted=sum(region.admitted for region in traffic.regions),
        errors=sum(region.errors for region in traffic.regions),
        one_bucket=one_bucket.admitted,
        sent_at=[region.sent_at for region in traffic.regions],
        last_admitted_at=max(region.last_admitted_at for region in traffic.regions),
        lag_s=meter.longest_s,
    )
    console.print(screen.table())
    console.print(summary(verdict), soft_wrap=True)
    return verdict


def _agents_limit(rules: Path) -> TokenBucketLimit:
    loaded = load_rules([rules])
    match = loaded.match(DOMAIN, [("agent", AGENT)])
    if match is None or not isinstance(match.rule.limit, TokenBucketLimit):
        raise NotLimited(f"{rules} puts no token bucket on an agent of the domain {DOMAIN}")
    return match.rule.limit


def _print_curl_lines(regions: list[Region], console: Console) -> None:
    console.print("everything stays up until Ctrl-C; try:")
    for region in regions:
        console.print(f"  curl -i '{region.url}/rate?agent=you'   # {region.name}", soft_wrap=True)
    first = regions[0]
    for page in ("peers", "buckets", "metrics"):
        console.print(f"  curl {first.admin_url}/{page}   # the sidecar of {first.name}", soft_wrap=True)


class _Interrupts:
    """Ctrl-C, SIGTERM and a closed terminal: an expected one sets an event, any other cancels this object's task."""

    def __init__(self) -> None:
        self.seen = False
        self._task = asyncio.current_task()
        self._expected: asyncio.Event | None = None

    @contextmanager
    def handled(self) -> Iterator[_Interrupts]:
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        for number in numbers:
            loop.add_signal_handler(number, self._interrupt)
        try:
            yield self
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def expect(self) -> asyncio.Event:
        """The event that the next one sets."""
        self._expected = asyncio.Event()
        return self._expected

    def _interrupt(self) -> None:
        self.seen = True
        if self._expected is not None and not self._expected.is_set():
            self._expected.set()
        elif self._task is not None:
            self._task.cancel()
