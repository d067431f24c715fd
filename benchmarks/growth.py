"""`python -m benchmarks.growth`: whether a sidecar's memory grows while its rules and its callers change.

A whole sidecar in this process has 5,000 rules, which are read anew again and again, each time with other limits. In
between come requests for keys that were never asked for before, connections, scrapes and pages, right and wrong ones;
and time passes, by a clock that this program sets: an hour over 200 reloads. All the while there are no garbage
collections: a sidecar has practically none of its oldest generation (`app.GC_THRESHOLDS`), and each reload freezes what
there is. Printed is the resident memory, and at the end what a collection finds; with status 1 when it finds anything,
since that is a leak.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import tempfile
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import grpc
import uvloop

from ratelimit_sidecar import app
from ratelimit_sidecar.clock import Clock
from ratelimit_sidecar.config.rules_file import load_rules
from ratelimit_sidecar.config.sidecar import load_sidecar_config
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2 import RateLimitRequest
from ratelimit_sidecar.telemetry.log_writer import STDERR, LogWriter

STEP_US = 18_000_000
KEYS = 2_000
SHOWN_EVERY = 20
METHOD = "/envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit"
WRONG_RULES = (
    "domain: [",
    "domain: edge\ncolour: red\n",
    "domain: edge\ndescriptors: [{key: a, value: '*', rate_limit: 7}]\n",
)
PAGES = ("/metrics", "/buckets", "/rlconfig", "/readyz", "/peers", "/nothing", "/buckets?limit=no")


@dataclass(frozen=True, slots=True)
class Growth:
    """How the memory of a sidecar grew over many reloads.

    Args:
        resident_mb: after each reload.
        garbage: objects in cycles that nobody refers to any more, by type.
    """

    resident_mb: list[float]
    garbage: Counter[str]


class SetClock(Clock):
    """Goes on by as much as it is told, beside its own going."""

    ahead_us = 0

    def now_us(self) -> int:
        return super().now_us() + self.ahead_us


def rules_text(rules: int, generation: int) -> str:
    lines = ["domain: edge", "descriptors:", "  - {key: user, rate_limit: {unit: second, requests_per_unit: 5}}"]
    lines += [
        f"  - {{key: path, value: p{number}, rate_limit: {{unit: day, requests_per_unit: {generation + number + 1}}}}}"
        for number in range(rules - 1)
    ]
    return "\n".join(lines)


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6


async def measure(folder: Path, rules: int, reloads: int) -> Growth:
    file = folder / "rules.yaml"
    file.write_text(rules_text(rules, 0))
    config = folder / "sidecar.yaml"
    # Nobody is at the peer's address.
    config.write_text(
        f"rules: [rules.yaml]\nlisten: {{grpc: ['unix:{folder}/grpc'], admin: '127.0.0.1:0', sync: '127.0.0.1:0'}}\n"
        "sync: {insecure: true, peers: ['127.0.0.1:1']}\n"
    )
    with patch.object(app, "Clock", SetClock):
        sidecar = app.Sidecar(load_sidecar_config(config, {}), app.FrontEndKind.H2, LogWriter(STDERR))
    growth = Growth([], Counter())
    gc.disable()
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(sidecar.run())
        await sidecar._front_end.ready.wait()
        await sidecar._console.ready.wait()
        admin = sidecar._console.address
        for step in range(reloads):
            sidecar.clock.ahead_us += STEP_US  # type: ignore[attr-defined]
            await _use(sidecar, f"unix:{folder}/grpc", admin, step)
            file.write_text(WRONG_RULES[step % len(WRONG_RULES)])
            assert await sidecar.reloader.load(partial(load_rules, [file])) is not None
            file.write_text(rules_text(rules, step + 1))
            assert await sidecar.reloader.load(partial(load_rules, [file])) is None
            growth.resident_mb.append(resident_mb())
            if step % SHOWN_EVERY == 0 or step == reloads - 1:
                click.echo(
                    f"{step + 1:4} reloads: {growth.resident_mb[-1]:6.1f} MB, {len(sidecar.limiter.store):6} buckets"
                )
        gc.unfreeze()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        gc.set_debug(0)
        growth.garbage.update(f"{type(each).__module__}.{type(each).__qualname__}" for each in gc.garbage)
        gc.garbage.clear()
        os.kill(os.getpid(), signal.SIGTERM)
        await running
    return growth


async def _use(sidecar: Any, grpc_address: str, admin: str, step: int) -> None:
    limiter, now_us = sidecar.limiter, sidecar.clock.now_us()
    for number in range(KEYS):
        limiter.decide(_request(f"user-{step}-{number}"), now_us)
        if not number % 100:
            await asyncio.sleep(0)
    limiter.store.sweep(now_us, 2 * KEYS)
    async with grpc.aio.insecure_channel(grpc_address) as channel:
        call = channel.unary_unary(METHOD)
        for raw in (_request("anybody"), b"", b"\xff"):
            try:
                await call(raw)
            except grpc.aio.AioRpcError:
                continue
        watching = channel.unary_stream("/grpc.health.v1.Health/Watch")(b"")
        await watching.read()
        watching.cancel()
    for wrong in (b"no HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(100), b""):
        await _send(grpc_address, wrong, ends=True)
    for page in PAGES:
        await _send(admin, f"GET {page} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n".encode())
    for wrong in (
        b"no HTTP\r\n\r\n",
        b"",
        b"GET / HTTP/1.1\r\nhost: lo",
        b"POST /json HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\n{",
    ):
        await _send(admin, wrong, ends=True)


def _request(user: str) -> bytes:
    message = RateLimitRequest(domain="edge")
    message.descriptors.add().entries.add(key="user", value=user)
    raw: bytes = message.SerializeToString()
    return raw


async def _send(address: str, sent: bytes, ends: bool = False) -> None:
    host, _, port = address.rpartition(":")
    if host == "unix":
        reader, writer = await asyncio.open_unix_connection(port)
    else:
        reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(sent)
    if ends:
        writer.write_eof()
    with suppress(ConnectionError):
        await reader.read(-1)
        writer.close()
        await writer.wait_closed()


@click.command()
@click.option("--rules", default=5_000, show_default=True)
@click.option("--reloads", default=200, show_default=True)
def main(rules: int, reloads: int) -> None:
    """Show how the memory of a sidecar develops over reloads and changing keys."""
    with tempfile.TemporaryDirectory() as folder:
        growth = uvloop.run(measure(Path(folder), rules, reloads))
    click.echo(f"{sum(growth.garbage.values())} objects of garbage: {dict(growth.garbage.most_common(12))}")
    sys.stdout.flush()
    # As `ratelimit-sidecar serve` ends.
    os._exit(bool(growth.garbage))


if __name__ == "__main__":
    main()
