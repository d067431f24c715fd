"""A sidecar that notes how long each callback of its event loop takes.

    python -m benchmarks.serving.timed_sidecar FILE serve --config sidecar.yaml

It is the sidecar's own command on asyncio's loop, whose callbacks can be timed, in place of uvloop, by the processor
time of the loop's thread. Garbage collections are rows of their own and not part of the callbacks that they fell into.
SIGUSR1 makes it forget what it has noted; SIGUSR2 makes it write what it has noted since to FILE, as JSON.
"""

from __future__ import annotations

import asyncio
import gc
import json
import signal
import time
from array import array
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import uvloop

from benchmarks.serving.servers import Server, Servers, wait_until
from ratelimit_sidecar.cli import main as sidecar_command
from ratelimit_sidecar.demo.ports import RegionPorts

LONG_NS = 1_000_000

GENERATIONS = ("youngest", "middle", "oldest")


@dataclass(frozen=True, slots=True)
class Timed:
    """All calls of one callback; times in milliseconds of processor time.

    Args:
        long: calls that took more than LONG_NS.
    """

    name: str
    calls: int
    total: float
    p50: float
    p99: float
    longest: float
    long: int

    @classmethod
    def of(cls, name: str, nanoseconds: Sequence[int]) -> Timed:
        took = sorted(nanoseconds)
        p50, p99 = (took[len(took) * percent // 100] / 1e6 for percent in (50, 99))
        long = sum(each > LONG_NS for each in took)
        return cls(name, len(took), sum(took) / 1e6, p50, p99, took[-1] / 1e6, long)


class CallbackTimes:
    """Notes how long each of the loop's callbacks took, garbage collections apart. Call `run` in its place.

    Args:
        clock_ns: processor time of the thread.
    """

    def __init__(self, clock_ns: Callable[[], int] = time.thread_time_ns) -> None:
        self._clock_ns = clock_ns
        self._took: defaultdict[str, array[int]] = defaultdict(lambda: array("q"))
        self._collecting_since_ns = 0
        self._collected_ns = 0
        """Within the callback that is running."""

    def run(self, callback: Callable[[], object], name: str) -> None:
        self._collected_ns = 0
        began_ns = self._clock_ns()
        callback()
        took_ns = self._clock_ns() - began_ns
        self._took[name].append(took_ns - self._collected_ns)

    def note_collection(self, phase: str, info: dict[str, int]) -> None:
        """To be one of `gc.callbacks`."""
        if phase == "start":
            self._collecting_since_ns = self._clock_ns()
            return
        took_ns = self._clock_ns() - self._collecting_since_ns
        self._collected_ns += took_ns
        self._took[f"garbage collection, {GENERATIONS[info['generation']]}"].append(took_ns)

    def forget(self) -> None:
        self._took.clear()

    def noted(self) -> list[Timed]:
        """Those that took longest in all come first."""
        timed = [Timed.of(name, took) for name, took in self._took.items()]
        return sorted(timed, key=lambda each: each.total, reverse=True)


def name_of(callback: object) -> str:
    """What a reader finds it by."""
    task = getattr(callback, "__self__", None)
    if isinstance(task, asyncio.Task):
        return f"task {_qualified_name(task.get_coro())}"
    return _qualified_name(getattr(callback, "func", callback))


def _qualified_name(named: Any) -> str:
    name: str | None = getattr(named, "__qualname__", None)
    # A compiled coroutine's says where it is in memory; its class has a name.
    return name if name is not None and " at 0x" not in name else type(named).__name__


class TimedSidecar:
    """The other side.

    Args:
        file: the one that `server` writes to.
    """

    def __init__(self, server: Server, file: Path) -> None:
        assert server.process is not None
        self.server = server
        self._process = server.process
        self._file = file

    def begin(self) -> None:
        """Forget what it has noted."""
        self._process.send_signal(signal.SIGUSR1)

    def noted(self) -> list[Timed]:
        """Since `begin`; to be called once."""
        self._process.send_signal(signal.SIGUSR2)
        wait_until(self._file.exists)
        return [Timed(**fields) for fields in json.loads(self._file.read_text())]


def timed_sidecar(
    servers: Servers, *, peers: tuple[str, ...] = (), ports: RegionPorts | None = None, rules: str
) -> TimedSidecar:
    """Start one and wait for its first answer; arguments as of `Servers.start_sidecar`."""
    file = servers.folder / "callbacks.json"
    program = ["benchmarks.serving.timed_sidecar", str(file)]
    return TimedSidecar(servers.sidecar(program=program, peers=peers, ports=ports, rules=rules), file)


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def main(file: Path, arguments: tuple[str, ...]) -> None:
    """Run `ratelimit-sidecar ARGUMENTS`, and write to FILE what the callbacks of its event loop take."""
    times = CallbackTimes()
    run = asyncio.Handle._run

    def timed_run(handle: Any) -> None:
        times.run(lambda: run(handle), name_of(handle._callback))

    def write(_signal: int, _frame: object) -> None:
        written = file.with_suffix(".new")
        written.write_text(json.dumps([asdict(each) for each in times.noted()]))
        written.rename(file)

    signal.signal(signal.SIGUSR1, lambda _signal, _frame: times.forget())
    signal.signal(signal.SIGUSR2, write)
    gc.callbacks.append(times.note_collection)
    with (
        patch.object(asyncio.Handle, "_run", timed_run),
        patch.object(uvloop, "new_event_loop", asyncio.new_event_loop),
    ):
        sidecar_command(arguments)


if __name__ == "__main__":
    main()
