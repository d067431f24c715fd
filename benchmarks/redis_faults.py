"""`python -m benchmarks.redis_faults`: latency of decisions while Redis keeps the state, and in each of its faults.

Two sidecars are asked in turn at a steady rate, one without persistence, which is the base, and one with it. Keys are
drawn from 10,000, so nearly each request changes another bucket, and that is more than is written in a second. A fault
begins a second before its round, and ends after it. Measured is the time from when a request was due to its answer.

With `written/s` 0 in a fault, it was one; when it has ended, the next round waits until buckets are written again.
"""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import click
from redis import Redis, RedisError

from benchmarks.serving.generator import Generator, uniform
from benchmarks.serving.h2load import Load
from benchmarks.serving.observed_sidecar import Observed, observed_sidecar
from benchmarks.serving.requests import RULES
from benchmarks.serving.rounds import Figures, alternate, print_results, round_options
from benchmarks.serving.servers import Server, Servers, running_servers, wait_until

SHARED = 'ratelimit_fabric_ticks_total{region="local",result="shared"}'
KEYS = 10_000
ASKED_PER_SECOND = 1_000
SETTLE_SECONDS = 1.0
WITHIN_SECONDS = 120.0


class RedisServer:
    """On a unix socket, without files."""

    def __init__(self, servers: Servers) -> None:
        self._servers = servers
        self._socket = servers.folder / "redis.sock"
        self.url = f"unix://{self._socket}"
        self.start()

    def start(self) -> None:
        program = shutil.which("redis-server") or shutil.which("valkey-server")
        if program is None:
            raise click.ClickException("redis-server or valkey-server is not in PATH")
        argv = [
            program,
            *("--port", "0"),
            *("--unixsocket", str(self._socket)),
            *("--save", ""),
            *("--appendonly", "no"),
        ]
        self._server: Server = self._servers.run("redis", argv, address=self.url)
        wait_until(self._answers)

    def command(self, *words: str, password: str | None = None) -> Any:
        with Redis(unix_socket_path=str(self._socket), password=password) as client:
            return client.execute_command(*words)

    def _answers(self) -> bool:
        with suppress(RedisError):
            return bool(self.command("PING"))
        return False

    @contextmanager
    def down(self) -> Iterator[None]:
        self._server.kill()
        yield
        self.start()

    @contextmanager
    def hanging(self) -> Iterator[None]:
        assert self._server.process is not None
        self._server.process.send_signal(signal.SIGSTOP)
        yield
        self._server.process.send_signal(signal.SIGCONT)

    @contextmanager
    def told(self, fault: Sequence[str], mended: Sequence[str]) -> Iterator[None]:
        self.command(*fault)
        yield
        self.command(*mended)

    @contextmanager
    def flushed(self) -> Iterator[None]:
        self.command("FLUSHALL")
        yield

    @contextmanager
    def refusing_the_password(self) -> Iterator[None]:
        another = "another"
        self.command("CONFIG", "SET", "requirepass", another)
        self.command("CLIENT", "KILL", "TYPE", "normal", password=another)
        yield
        self.command("CONFIG", "SET", "requirepass", "", password=another)


def written(sidecar: Observed) -> float:
    """Buckets since its start, or on a fabric ticks."""
    metrics = ('ratelimit_redis_buckets_total{region="local",result="written"}', SHARED)
    return sum(sum(sidecar.server.metric(name)) for name in metrics)


def measure(
    sidecar: Observed, fault: Callable[[], AbstractContextManager[None]], *, keeps: bool, seconds: float
) -> Figures:
    """One round of requests to it, in a fault.

    Args:
        keeps: it has Redis.
    """
    body = uniform(KEYS)
    with Generator(sidecar.server.address, Load(2, 1_000)) as generator, fault():
        generator.run(body, SETTLE_SECONDS, ASKED_PER_SECOND)
        before, began = written(sidecar) if keeps else 0.0, time.perf_counter()
        figures = sidecar.measure(generator, body, ASKED_PER_SECOND, seconds)
        rate = ((written(sidecar) if keeps else 0.0) - before) / (time.perf_counter() - began)
    if keeps:
        after = written(sidecar)
        wait_until(
            lambda: (
                written(sidecar) > after or not sum(sidecar.server.metric("ratelimit_redis_waiting_buckets") or [1])
            ),
            WITHIN_SECONDS,
        )
    return {**figures, "written/s": rate}


@click.command()
@round_options(rounds=5, seconds=3.0)
@click.option("--fabric", is_flag=True, help="The sidecar is on a fabric, and keeps no state.")
def main(rounds: int, seconds: float, as_json: bool, fabric: bool) -> None:
    """Measure the latency of a sidecar that keeps its state in Redis, or shares by it, in each of Redis's faults."""
    with running_servers() as servers:
        redis = RedisServer(servers)
        without = observed_sidecar(servers, "without", rules=RULES)
        kept = observed_sidecar(
            servers, "kept", rules=RULES, config={"fabric" if fabric else "persistence": {"url": redis.url}}
        )
        faults: Mapping[str, Callable[[], AbstractContextManager[None]]] = {
            "in Redis": nullcontext,
            "down": redis.down,
            "hanging": redis.hanging,
            "out of memory": partial(
                redis.told, ("CONFIG", "SET", "maxmemory", "1"), ("CONFIG", "SET", "maxmemory", "0")
            ),
            "a read-only replica": partial(redis.told, ("REPLICAOF", "127.0.0.1", "1"), ("REPLICAOF", "NO", "ONE")),
            "flushed": redis.flushed,
            "refusing the password": redis.refusing_the_password,
        }
        variants: dict[str, Callable[[], Figures]] = {
            "no persistence": partial(measure, without, nullcontext, keeps=False, seconds=seconds),
            **{name: partial(measure, kept, fault, keeps=True, seconds=seconds) for name, fault in faults.items()},
        }
        results = alternate("1,000 requests a second", variants, rounds)
    print_results(results, as_json=as_json)


if __name__ == "__main__":
    main()
