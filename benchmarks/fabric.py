"""`python -m benchmarks.fabric`: what a fabric costs with 10, 30 and 100 sidecars, and what follows for 1,000.

Sidecars without front ends, ten in a process, take from 4 keys, five times a second each, against one Redis. Once all
share the same keys, as a hot limit of a region does; and once all have keys of their own, so that nobody has to be told
anything. Processor times are of the sidecars and of Redis; machine and moment hardly matter to them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
from redis import Redis

from benchmarks.redis_faults import RedisServer
from benchmarks.serving.servers import running_servers

SIZES = (10, 30, 100)
IN_PROCESS = 10
KEYS = 4
RATE = 5.0


def measure(redis: RedisServer, folder: Path, sidecars: int, seconds: float, *, alike: bool) -> Mapping[str, float]:
    redis.command("FLUSHALL")
    processes = [
        start(redis.url, number, seconds, folder / f"light-{sidecars}-{number}-{alike}.log", alike=alike)
        for number in range(sidecars // IN_PROCESS)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        before, began = info(redis), time.perf_counter()
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        figures: Sequence[Mapping[str, float]] = [
            json.loads(process.stdout.readline()) for process in processes if process.stdout is not None
        ]
        after, elapsed = info(redis), time.perf_counter() - began
    finally:
        for process in processes:
            process.kill()
            process.wait()
    ticks = sum(each["ticks"] for each in figures)
    cpu, redis_cpu = sum(each["cpu"] for each in figures), after["cpu"] - before["cpu"]
    return {
        "ticks/s of each": ticks / elapsed / sidecars,
        "ms of CPU of a sidecar a tick": 1e3 * cpu / ticks,
        "us of Redis's CPU a tick": 1e6 * redis_cpu / ticks,
        "bytes to Redis a tick": (after["in"] - before["in"]) / ticks,
        "bytes from Redis a tick": (after["out"] - before["out"]) / ticks,
        "MB in Redis": after["memory"] / 1e6,
        "failed": sum(each["failed"] for each in figures),
    }


def start(url: str, number: int, seconds: float, log: Path, *, alike: bool) -> subprocess.Popen[str]:
    name = f"light-{number}"
    argv = [
        *(sys.executable, "-m", "benchmarks.light_fabric", "--url", url, "--name", name),
        *("--sidecars", str(IN_PROCESS), "--rate", str(RATE * KEYS), "--keys", str(KEYS), "--seconds", str(seconds)),
    ]
    if not alike:
        argv += ["--own-keys"]
    with log.open("ab") as stderr:
        pipe = subprocess.PIPE
        return subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=stderr, text=True)  # noqa: S603


def info(redis: RedisServer) -> Mapping[str, float]:
    with Redis.from_url(redis.url) as client:
        found = client.info()
    assert isinstance(found, dict)
    return {
        "cpu": found["used_cpu_user"] + found["used_cpu_sys"],
        "in": found["total_net_input_bytes"],
        "out": found["total_net_output_bytes"],
        "memory": found["used_memory"],
    }


@click.command()
@click.option("--seconds", default=10.0, show_default=True, type=click.FloatRange(1))
@click.option("--sizes", default=",".join(map(str, SIZES)), show_default=True, help="Sidecars; multiples of ten.")
def main(seconds: float, sizes: str) -> None:
    """Measure what sharing by Redis costs."""
    with running_servers() as servers:
        redis = RedisServer(servers)
        for alike in (True, False):
            print(f"\n{KEYS} keys of {'all together' if alike else 'each one'}")
            for sidecars in map(int, sizes.split(",")):
                figures = measure(redis, servers.folder, sidecars, seconds, alike=alike)
                print(
                    f"  {sidecars:>4} sidecars: " + ", ".join(f"{value:,.2f} {name}" for name, value in figures.items())
                )


if __name__ == "__main__":
    main()
