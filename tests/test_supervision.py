"""A task that fails is begun again, and told of."""

import asyncio

from ratelimit_sidecar.supervision import REPORTED_SECONDS, Supervisor


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s


async def test_a_task_that_fails_is_begun_again_and_counted() -> None:
    runs = 0

    async def run() -> None:
        nonlocal runs
        runs += 1
        if runs < 3:
            raise RuntimeError("it broke")

    supervisor = Supervisor()
    await asyncio.wait_for(supervisor.keep("listener", run), 30)

    assert runs == 3
    assert supervisor.restarts == {"listener": 2}


async def test_a_task_is_told_of_while_it_is_down_and_for_a_minute_after() -> None:
    clock = Clock()
    supervisor = Supervisor(clock)
    has_failed = False

    async def run() -> None:
        nonlocal has_failed
        if not has_failed:
            has_failed = True
            raise RuntimeError("it broke")

    keeping = asyncio.create_task(supervisor.keep("listener", run))
    await asyncio.sleep(0)
    assert supervisor.failing() == ["listener has failed 1 times, and is down"]
    clock.now_s += REPORTED_SECONDS
    assert supervisor.failing() == ["listener has failed 1 times, and is down"]
    clock.now_s -= 1

    await keeping
    assert supervisor.failing() == ["listener has failed 1 times, and goes on"]
    clock.now_s += 1
    assert supervisor.failing() == []


async def test_a_task_that_never_failed_counts_0() -> None:
    supervisor = Supervisor()
    await supervisor.keep("listener", lambda: asyncio.sleep(0))
    assert supervisor.restarts == {"listener": 0}
    assert supervisor.failing() == []


async def test_a_cancelled_task_is_not_begun_again() -> None:
    supervisor = Supervisor()
    keeping = asyncio.create_task(supervisor.keep("listener", asyncio.get_running_loop().create_future))
    await asyncio.sleep(0)
    keeping.cancel()
    await asyncio.wait([keeping])
    assert keeping.cancelled()
    assert supervisor.restarts == {"listener": 0}
