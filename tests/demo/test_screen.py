import asyncio
from collections.abc import Callable
from io import StringIO

import pytest
from rich.console import Console

from ratelimit_sidecar.crdt.limit import TokenBucketLimit
from ratelimit_sidecar.demo.lag import LagMeter
from ratelimit_sidecar.demo.promise import OneBucket, Verdict
from ratelimit_sidecar.demo.screen import Screen, summary
from ratelimit_sidecar.demo.traffic import Traffic


def make_screen(*, terminal: bool) -> tuple[Screen, StringIO]:
    """Two regions that were sent 3 and 2 requests, of which one bucket would admit 4."""
    one_bucket = OneBucket(TokenBucketLimit(1, 60_000_000, 4))
    traffic = Traffic([("us-east-1", ""), ("eu-west-2", "")], "/", 1, one_bucket.offer)
    for number, status in enumerate((200, 200, 429)):
        one_bucket.offer(number / 1_000)
        traffic.regions[0].arrive(traffic.regions[0].depart(), status)
    for number, status in enumerate((200, 503)):
        one_bucket.offer(1 + number / 1_000)
        traffic.regions[1].arrive(traffic.regions[1].depart(), status)
    meter = LagMeter([])
    meter.lags_s = {"us-east-1": 0.0213}
    output = StringIO()
    console = Console(file=output, force_terminal=terminal, width=120, color_system=None)
    return Screen(console, traffic, one_bucket, meter), output


def test_the_table_shows_each_region_and_all_against_one_bucket() -> None:
    screen, output = make_screen(terminal=False)

    Console(file=output, width=80).print(screen.table())

    lines = [" ".join(line.split()) for line in output.getvalue().splitlines()]
    us_east, eu_west = lines[3:5]
    assert us_east.startswith("us-east-1 3 2 1 0 ")
    assert us_east.endswith(" 21.3 ms")
    assert eu_west.startswith("eu-west-2 2 1 0 1 ")
    assert eu_west.endswith(" -")
    assert lines[6:8] == ["all together 5 3 1 1", "one global bucket 4"]


async def test_without_a_terminal_a_line_tells_the_progress() -> None:
    screen, output = make_screen(terminal=False)

    await run_until(screen, lambda: output.getvalue().count("\n") >= 1)

    line = output.getvalue().splitlines()[0]
    assert "us-east-1 2/1, eu-west-2 1/0; all 3, one global bucket 4; sync lag 21.3 ms" in line


async def test_on_a_terminal_the_table_is_redrawn_under_the_phase() -> None:
    screen, output = make_screen(terminal=True)

    await run_until(screen, lambda: output.getvalue().count("all together") >= 2)

    assert "the same load everywhere" in output.getvalue()


@pytest.mark.parametrize(("admitted", "ending"), [(205, "Promise kept."), (300, "Promise BROKEN: 300 admitted")])
def test_the_summary_says_whether_the_promise_was_kept(admitted: int, ending: str) -> None:
    verdict = Verdict(offered=500, admitted=admitted, errors=0, one_bucket=200, ceiling=200, allowance=10)

    assert ending in summary(verdict).plain


async def run_until(screen: Screen, condition: Callable[[], bool]) -> None:
    running = asyncio.create_task(screen.run())
    async with asyncio.timeout(10):
        while True:
            await asyncio.sleep(0.01)
            if condition():
                break
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
