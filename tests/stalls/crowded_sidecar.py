"""`python crowded_sidecar.py FOLDER` notes how long a sidecar with 20,000 rules and 1,000,000 buckets holds its event
loop while its console, its health check and its files are used.

It is a whole sidecar on asyncio's own loop, whose callbacks can be timed, by the processor time of the loop's thread:
neither what else runs on the machine counts nor the clients, which are in another thread. What seems to take longer
than `LONG_MS` is done again, up to `ROUNDS` times, and of a callback's longest calls the shortest counts, since a step
that is long is so each time. Written to FOLDER/longest.json are, by what was done, the callbacks that took longest, in
milliseconds.
"""

from __future__ import annotations

import asyncio
import gc
import http.client
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import grpc
from certificates import Authority
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.serving.timed_sidecar import CallbackTimes, name_of
from ratelimit_sidecar.app import FrontEndKind, Sidecar
from ratelimit_sidecar.config.sidecar import load_sidecar_config
from ratelimit_sidecar.config.tls_files import CertificateInForce
from ratelimit_sidecar.limiter.key import KEY_ONLY, TOKEN_BUCKET, KeyEntry, encode_bucket_key
from ratelimit_sidecar.telemetry.log_writer import STDERR, LogWriter

RULES = 20_000
BUCKETS = 1_000_000
ROUNDS = 3
LONG_MS = 5.0
SHOWN = 4

PAGES = (
    "/",
    "/metrics",
    "/healthz",
    "/readyz",
    "/healthcheck",
    "/buckets",
    "/buckets?limit=200&domain=edge",
    "/rlconfig",
    "/peers",
)


def rules(limit: int) -> str:
    lines = [
        "domain: edge",
        "descriptors:",
        f"  - {{key: user, rate_limit: {{unit: day, requests_per_unit: {limit}}}}}",
    ]
    for number in range(RULES - 1):
        lines.append(
            f"  - {{key: path, value: p{number}, rate_limit: {{unit: day, requests_per_unit: {limit + number}}}}}"
        )
    return "\n".join(lines)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
        return port


class Crowded:
    """The sidecar, and what is done to it from another thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._grpc, self._admin = free_port(), free_port()
        self._authority = Authority()
        self._issue()
        self._rules = folder / "rules.yaml"
        self._rules.write_text(rules(5))
        config = folder / "sidecar.yaml"
        config.write_text(
            f"""
rules: [rules.yaml]
max_buckets: {2 * BUCKETS}
listen:
  grpc: ["127.0.0.1:{self._grpc}"]
  admin: 127.0.0.1:{self._admin}
  sync: 127.0.0.1:0
  tls: {{certificate: tls.crt, key: tls.key}}
sync:
  tls: {{certificate: tls.crt, key: tls.key, ca: ca.crt}}
"""
        )
        self.sidecar = Sidecar(load_sidecar_config(config, {}), FrontEndKind.H2, LogWriter(STDERR))
        self._fill()

    def _issue(self) -> None:
        files = self._authority.write(self._folder, "localhost")
        self._files = (files.certificate, files.key, files.ca)

    def _fill(self) -> None:
        limiter = self.sidecar.limiter
        now_us = self.sidecar.clock.now_us()
        limit = next(rule.limit for rule in limiter.rules if rule.name == "edge.user")
        # As in a sidecar that runs, the oldest generation is left alone: it would be looked at 60 times.
        gc.disable()
        for number in range(BUCKETS):
            key = encode_bucket_key(TOKEN_BUCKET, "edge", [KeyEntry(KEY_ONLY, "user", f"user-{number}")])
            limiter.store.bucket(key, limit, now_us).take(1, now_us)
        # There are no peers that could be told.
        limiter.store.drain_changes()
        gc.enable()
        assert len(limiter.store) == BUCKETS

    def get(self, path: str) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._admin, timeout=60)
        try:
            connection.request("GET", path, headers={"accept": "application/openmetrics-text"})
            response = connection.getresponse()
            body = response.read()
            assert response.status == 200, (path, response.status, body[:500])
        finally:
            connection.close()

    def wait(self) -> None:
        while True:
            try:
                self.get("/readyz")
            except (OSError, AssertionError):
                time.sleep(0.1)
            else:
                return

    def decide(self) -> None:
        body = json.dumps(
            {
                "domain": "edge",
                "descriptors": [{"entries": [{"key": "path", "value": f"p{number}"}]} for number in range(100)],
            }
        )
        connection = http.client.HTTPConnection("127.0.0.1", self._admin, timeout=60)
        connection.request("POST", "/json", body, {"content-type": "application/json"})
        assert connection.getresponse().status in {200, 429}
        connection.close()

    def check_health(self) -> None:
        credentials = grpc.ssl_channel_credentials((self._folder / "ca.crt").read_bytes())
        with grpc.secure_channel(f"localhost:{self._grpc}", credentials) as channel:
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=30)

    def reload(self) -> None:
        reloader = self.sidecar.reloader
        before = reloader.loads["success"]
        self._rules.write_text(rules(10 + before))
        os.kill(os.getpid(), signal.SIGHUP)
        while reloader.loads["success"] == before:
            time.sleep(0.05)
        # The rules before are given back.
        time.sleep(0.5)

    def renew(self) -> None:
        self._issue()
        time.sleep(3 * CertificateInForce.read_seconds)
        self.check_health()

    def be_idle(self) -> None:
        """But for the chores."""
        time.sleep(1)


def measure(
    crowded: Crowded, times: CallbackTimes, ask: Callable[[Callable[[], Any]], Any]
) -> dict[str, dict[str, float]]:
    crowded.wait()
    deeds: dict[str, Callable[[], None]] = {
        **{f"GET {path}": lambda path=path: crowded.get(path) for path in PAGES},
        "POST /json": crowded.decide,
        "health check": crowded.check_health,
        "nothing": crowded.be_idle,
        "renewal": crowded.renew,
        "reload": crowded.reload,
    }
    longest: dict[str, dict[str, float]] = {}
    for name, do in deeds.items():
        rounds: list[dict[str, float]] = []
        for _ in range(ROUNDS):
            ask(times.forget)
            do()
            rounds.append({timed.name: timed.longest for timed in ask(times.noted)})
            if max(rounds[-1].values()) <= LONG_MS:
                break
        always = set.intersection(*(set(each) for each in rounds))
        took = {callback: min(each[callback] for each in rounds) for callback in always}
        longest[name] = dict(sorted(took.items(), key=lambda item: item[1], reverse=True)[:SHOWN])
    return longest


async def run(crowded: Crowded, times: CallbackTimes) -> dict[str, dict[str, float]]:
    loop = asyncio.get_running_loop()

    def ask(what: Callable[[], Any]) -> Any:
        async def answer() -> Any:
            return what()

        return asyncio.run_coroutine_threadsafe(answer(), loop).result()

    def measure_and_stop() -> dict[str, dict[str, float]]:
        try:
            return measure(crowded, times, ask)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(crowded.sidecar.run())
        measuring = tasks.create_task(asyncio.to_thread(measure_and_stop))
    return measuring.result()


def main() -> None:
    times = CallbackTimes()
    run_handle = asyncio.Handle._run  # noqa: SLF001 (asyncio has no hook for it)

    def timed_run(handle: Any) -> None:
        times.run(lambda: run_handle(handle), name_of(handle._callback))  # noqa: SLF001

    gc.callbacks.append(times.note_collection)
    with patch.object(CertificateInForce, "read_seconds", 0.3), patch.object(asyncio.Handle, "_run", timed_run):
        crowded = Crowded(Path(sys.argv[1]))
        with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
            longest = runner.run(run(crowded, times))
    (Path(sys.argv[1]) / "longest.json").write_text(json.dumps(longest))


if __name__ == "__main__":
    main()
