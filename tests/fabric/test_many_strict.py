"""Many processes that draw from one account in a real Redis: never more than the limit, whoever is killed."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from fabric.test_many import Light, holder, light
from persistence.redis_server import WITHIN_S, RedisServer, free_port_numbers, needs_redis

from ratelimit_sidecar.crdt.granted import COUNTED_US
from ratelimit_sidecar.demo.ports import HOST

pytestmark = [needs_redis, pytest.mark.slow]

LIMIT = 200
"""A second, and at once."""

FULL_S = COUNTED_US / 1e6 + 2
"""A new account is full after so long."""


class Admissions:
    """The times at which each process admitted a request, in microseconds of the machine's clock: killed or not."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def file(self, name: str) -> str:
        return str(self._folder / f"{name}.admissions")

    def times_us(self) -> list[int]:
        times = []
        for file in self._folder.glob("*.admissions"):
            whole = file.read_bytes()
            times += [int.from_bytes(whole[at : at + 8]) for at in range(0, len(whole), 8)]
        return sorted(times)

    def most_at_once(self) -> float:
        """The largest that a bucket which never refuses would have to be, in tokens."""
        deficit = worst = last_us = 0
        for time_us in self.times_us():
            deficit = max(0, deficit - (time_us - last_us) * LIMIT) + 1_000_000
            worst, last_us = max(worst, deficit), time_us
        return worst / 1e6

    def between(self, began: float, ended: float) -> int:
        return sum(began * 1e6 <= time_us < ended * 1e6 for time_us in self.times_us())


async def begin(lights: Sequence[Light]) -> None:
    await asyncio.sleep(FULL_S)
    for each in lights:
        await each.begin()


async def test_what_is_refilled_is_used_and_nothing_beyond_it(tmp_path: Path) -> None:
    admissions = Admissions(tmp_path)
    async with RedisServer(tmp_path / "redis") as server, AsyncExitStack() as stack:
        options = ("--strict", str(LIMIT), "--rate", "80")
        lights = [
            await stack.enter_async_context(
                light(server, f"light-{number}", *options, "--admissions", admissions.file(str(number)))
            )
            for number in range(4)
        ]
        await begin(lights)
        await asyncio.sleep(2)
        began = time.monotonic()
        await asyncio.sleep(8)
        used = admissions.between(began, began + 8) / (8 * LIMIT)
        print(f"{used:.1%} of the limit used")
        assert admissions.most_at_once() <= LIMIT
        assert used >= 0.9


async def test_nothing_beyond_the_limit_when_gateways_are_killed_and_stopped_and_the_server_loses_its_data(
    tmp_path: Path,
) -> None:
    admissions = Admissions(tmp_path)
    async with RedisServer(tmp_path / "redis") as server, AsyncExitStack() as stack:
        lights: dict[str, Light] = {}

        async def add(number: int) -> Light:
            options = ("--strict", str(LIMIT), "--rate", "120", "--admissions", admissions.file(str(number)))
            lights[f"light-{number}-0"] = made = await stack.enter_async_context(
                light(server, f"light-{number}", *options)
            )
            return made

        await begin([await add(number) for number in range(4)])
        for number in range(4, 7):
            await asyncio.sleep(1.5)
            async with asyncio.timeout(WITHIN_S):
                while not (name := await holder(server)):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            lights[name].process.kill()
            await (await add(number)).begin()
            # What the next gateway holds ends while it is stopped, and another one follows it.
            async with asyncio.timeout(WITHIN_S):
                while (name := await holder(server)) not in lights or lights[name].process.returncode is not None:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            lights[name].process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(4)
            lights[name].process.send_signal(signal.SIGCONT)
            await asyncio.sleep(1)
            async with server.client() as client:
                await client.flushall()
            await asyncio.sleep(1)
            await server.kill()
            await server.start()
        began = time.monotonic()
        async with asyncio.timeout(WITHIN_S):
            while not admissions.between(began + FULL_S, began + 2 * WITHIN_S):  # noqa: ASYNC110
                await asyncio.sleep(0.2)
        assert admissions.most_at_once() <= LIMIT
        assert len(admissions.times_us()) > 2 * LIMIT


async def test_a_lone_busy_region_gets_what_the_other_one_refills(tmp_path: Path) -> None:
    admissions = Admissions(tmp_path)
    ports = free_port_numbers(2)
    east, west = (f"{HOST}:{port}" for port in ports)
    async with AsyncExitStack() as stack:
        in_east = await stack.enter_async_context(RedisServer(tmp_path / "east"))
        in_west = await stack.enter_async_context(RedisServer(tmp_path / "west"))
        options = ("--strict", str(LIMIT), "--members", "east,west")
        of_east = ("--region", "east", "--sync", east, "--peer", west, "--rate", "160", *options)
        busy = [
            await stack.enter_async_context(
                light(in_east, f"east-{number}", *of_east, "--admissions", admissions.file(str(number)))
            )
            for number in range(2)
        ]
        await stack.enter_async_context(
            light(in_west, "west", "--region", "west", "--sync", west, "--peer", east, *options)
        )
        await begin(busy)
        await asyncio.sleep(3)
        began = time.monotonic()
        await asyncio.sleep(6)
        used = admissions.between(began, began + 6) / (6 * LIMIT)
        print(f"{used:.1%} of the limit used by one of two regions")
        assert admissions.most_at_once() <= LIMIT
        assert used >= 0.8


async def test_two_regions_that_pay_each_other_keep_to_the_limit_while_gateways_are_killed_and_data_is_lost(
    tmp_path: Path,
) -> None:
    admissions = Admissions(tmp_path)
    ports = free_port_numbers(2)
    addresses = dict(zip(("east", "west"), (f"{HOST}:{port}" for port in ports), strict=True))
    async with AsyncExitStack() as stack:
        servers = {name: await stack.enter_async_context(RedisServer(tmp_path / name)) for name in addresses}
        lights: dict[str, Light] = {}

        async def add(region: str, number: int, rate: int) -> Light:
            name = f"{region}-{number}"
            [other] = (address for each, address in addresses.items() if each != region)
            options = (
                *("--region", region, "--sync", addresses[region], "--peer", other, "--members", "east,west"),
                *("--strict", str(LIMIT), "--rate", str(rate), "--admissions", admissions.file(name)),
            )
            lights[f"{name}-0"] = made = await stack.enter_async_context(light(servers[region], name, *options))
            return made

        await begin([await add(region, number, 90) for region in addresses for number in range(2)])
        for number, region in enumerate(("east", "west", "east")):
            await asyncio.sleep(4)
            async with asyncio.timeout(WITHIN_S):
                while not (name := await holder(servers[region])):  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            lights[name].process.kill()
            # Then one of the two wants more than the other.
            await (await add(region, 10 + number, 30 + 60 * number)).begin()
            await asyncio.sleep(4)
            async with servers[region].client() as client:
                await client.flushall()
        await asyncio.sleep(FULL_S + 2)
        ended = time.monotonic()
        assert admissions.most_at_once() <= LIMIT
        assert admissions.between(ended - 2, ended) > LIMIT
