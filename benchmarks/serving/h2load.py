"""h2load of nghttp2 (Debian's nghttp2-client): closed-loop HTTP/2 load of one request, over TCP or a unix socket."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.serving.frames import Headers
from benchmarks.serving.requests import METHOD, framed

_UNITS_US = {"us": 1.0, "ms": 1e3, "s": 1e6}


class LoadFailed(Exception):
    """h2load is not there, or not every request was answered."""


@dataclass(frozen=True, slots=True)
class Load:
    """So many connections with so many requests on each at any time."""

    connections: int
    streams: int

    def __str__(self) -> str:
        return f"{self.connections}x{self.streams}"


LOADS = (Load(2, 1), Load(2, 16), Load(4, 100))


@dataclass(frozen=True, slots=True)
class Measured:
    """One round.

    Args:
        percentiles_us: of the time to the answer, by percent; empty unless asked for.
        data_bytes: of the answer to a request, on average; an error of gRPC has none.
    """

    per_second: float
    mean_us: float
    percentiles_us: dict[float, float]
    data_bytes: float


def grpc_load(
    address: str,
    request: bytes,
    load: Load,
    seconds: float,
    percents: tuple[float, ...] = (),
    *,
    headers: Headers = (),
) -> Measured:
    """Calls of ShouldRateLimit with one request.

    Args:
        address: `host:port` or `unix:/path`.
        headers: besides those of gRPC.
        percents: percentiles to tell; h2load then writes a line for every request, which slows it down.

    Raises:
        LoadFailed: see there.
    """
    is_unix = address.startswith("unix:")
    target = [f"http://localhost{METHOD}", "--base-uri", address] if is_unix else [f"http://{address}{METHOD}"]
    with tempfile.TemporaryDirectory() as folder:
        body = Path(folder, "body")
        body.write_bytes(framed(request))
        options = ["--data", str(body)]
        for name, value in (("content-type", "application/grpc"), ("te", "trailers"), *headers):
            options += ["--header", f"{name}: {value}"]
        return _run([*options, *target], load, seconds, percents, Path(folder))


def http_load(url: str, load: Load, seconds: float, percents: tuple[float, ...] = ()) -> Measured:
    """Plain GET requests over HTTP/2 without TLS."""
    with tempfile.TemporaryDirectory() as folder:
        return _run([url], load, seconds, percents, Path(folder))


def _run(arguments: list[str], load: Load, seconds: float, percents: tuple[float, ...], folder: Path) -> Measured:
    program = shutil.which("h2load")
    if program is None:
        raise LoadFailed("h2load is not installed; Debian has it in nghttp2-client")
    log = folder / "requests"
    argv = [program, "--clients", str(load.connections), "--max-concurrent-streams", str(load.streams)]
    argv += ["--duration", f"{round(seconds * 1_000)}ms", "--threads", "1"]
    if percents:
        argv += ["--log-file", str(log)]
    done = subprocess.run([*argv, *arguments], capture_output=True, text=True, check=False)  # noqa: S603
    rate = re.search(r"finished in .*?, ([\d.]+) req/s", done.stdout)
    counts = re.search(r"(\d+) succeeded, (\d+) failed, (\d+) errored", done.stdout)
    mean = re.search(r"time for request:\s+\S+\s+\S+\s+([\d.]+)(us|ms|s)", done.stdout)
    data = re.search(r"\((\d+)\) data", done.stdout)
    if rate is None or counts is None or mean is None or data is None:
        raise LoadFailed(f"h2load: {done.stdout[-1_000:]}{done.stderr[-500:]}")
    if int(counts[1]) == 0 or int(counts[2]) + int(counts[3]) > 0:
        raise LoadFailed(f"h2load: {done.stdout[-1_000:]}{done.stderr[-500:]}")
    percentiles = _percentiles(log, percents) if percents else {}
    mean_us = float(mean[1]) * _UNITS_US[mean[2]]
    return Measured(float(rate[1]), mean_us, percentiles, int(data[1]) / int(counts[1]))


def _percentiles(log: Path, percents: tuple[float, ...]) -> dict[float, float]:
    times_us = sorted(int(line.rpartition("\t")[2]) for line in log.read_text(encoding="ascii").splitlines())
    return {
        percent: float(times_us[min(int(len(times_us) * percent / 100), len(times_us) - 1)]) for percent in percents
    }
