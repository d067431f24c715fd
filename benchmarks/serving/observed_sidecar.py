"""A sidecar that also tells what its event loop's stalls are made of.

    python -m benchmarks.serving.observed_sidecar FILE [--standard-collector] serve --config sidecar.yaml

It is the sidecar's own command, with another stall monitor: at each of its measurements this one also reads how long
the kernel let the loop's thread wait for a processor (schedstat, proc(5)), and keeps the longest stalls in a file that
both processes map, where the benchmark reads them and begins anew, without asking the sidecar. Such waiting says how
busy this machine is; the rest of a stall is the process's own: its work, its garbage collector, Python's lock. (In a
virtual machine the host's other guests are part of it, too: nothing in the guest tells that apart.)
"""

from __future__ import annotations

import gc
import mmap
import os
import struct
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import click

from benchmarks.serving.generator import Body, Generator
from benchmarks.serving.rounds import Figures, Result
from benchmarks.serving.servers import Server, Servers
from ratelimit_sidecar import app
from ratelimit_sidecar.cli import main as sidecar_command
from ratelimit_sidecar.demo.ports import RegionPorts
from ratelimit_sidecar.telemetry.stalls import StallMonitor

_PAGE = struct.Struct("=QQ")
"""Nanoseconds: the longest stall, and the longest that is left when waiting for a processor is taken off."""

STALL = "stall ms"
OWN_STALL = "own stall ms"


class StallObserver(StallMonitor):
    """A stall monitor that keeps the longest stalls in a file that the benchmark maps, too.

    Args:
        file: of `_PAGE`, zeroed by who reads it.
    """

    def __init__(self, file: Path) -> None:
        super().__init__()
        with file.open("r+b") as opened:
            self._page = mmap.mmap(opened.fileno(), _PAGE.size)
        # Of the thread that opens it, which is the loop's.
        self._schedstat = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
        self._waited_ns = self._read_waited_ns()

    def note(self, late_ns: int) -> None:
        super().note(late_ns)
        waited_before_ns, self._waited_ns = self._waited_ns, self._read_waited_ns()
        own_ns = late_ns - (self._waited_ns - waited_before_ns)
        longest_ns, longest_own_ns = _PAGE.unpack_from(self._page)
        if late_ns > longest_ns or own_ns > longest_own_ns:
            _PAGE.pack_into(self._page, 0, max(late_ns, longest_ns), max(own_ns, longest_own_ns))

    def _read_waited_ns(self) -> int:
        return int(os.pread(self._schedstat, 64, 0).split()[1])


class _Instant(NamedTuple):
    wall_ns: int
    process_cpu_seconds: float
    loop_cpu_ns: int
    loop_waited_ns: int


class Observed:
    """The other side: what a sidecar is about while it is asked, one round at a time."""

    def __init__(self, server: Server, page: mmap.mmap) -> None:
        assert server.process is not None
        self.server = server
        self._page = page
        # The main thread has the process's number, and runs the loop.
        self._schedstat = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/schedstat")

    def measure(self, generator: Generator, body: Body, per_second: float, seconds: float) -> Figures:
        """A round of requests at a rate. Shares are of one processor: of the whole process, and of its loop's thread.

        Raises:
            LoadFailed: as of `Generator.run`.
        """
        _PAGE.pack_into(self._page, 0, 0, 0)
        began = self._now()
        answered = generator.run(body, seconds, per_second)
        now = self._now()
        wall_ns = now.wall_ns - began.wall_ns
        longest_ns, longest_own_ns = _PAGE.unpack_from(self._page)
        return {
            **{f"p{percent:g} us": answered.percentile_us(percent) for percent in (50, 99, 99.9)},
            "CPU %": (now.process_cpu_seconds - began.process_cpu_seconds) * 1e11 / wall_ns,
            "loop CPU %": (now.loop_cpu_ns - began.loop_cpu_ns) * 100 / wall_ns,
            "loop waits %": (now.loop_waited_ns - began.loop_waited_ns) * 100 / wall_ns,
            STALL: longest_ns / 1e6,
            OWN_STALL: longest_own_ns / 1e6,
        }

    def _now(self) -> _Instant:
        loop_cpu_ns, loop_waited_ns, _ = map(int, self._schedstat.read_text(encoding="ascii").split())
        return _Instant(time.perf_counter_ns(), self.server.cpu_seconds, loop_cpu_ns, loop_waited_ns)


def observed_sidecar(
    servers: Servers,
    name: str = "sidecar",
    *,
    standard_collector: bool = False,
    peers: tuple[str, ...] = (),
    ports: RegionPorts | None = None,
    config: Mapping[str, object] | None = None,
    rules: str,
) -> Observed:
    """Start one and wait for its first answer.

    Args:
        standard_collector: with CPython's settings of the garbage collector in place of the sidecar's.
        peers, ports, config, rules: as of `Servers.start_sidecar`.
    """
    file = servers.folder / f"{name}-stalls"
    file.write_bytes(bytes(_PAGE.size))
    with file.open("r+b") as opened:
        page = mmap.mmap(opened.fileno(), _PAGE.size)
    program = ["benchmarks.serving.observed_sidecar", str(file)]
    if standard_collector:
        program.append("--standard-collector")
    return Observed(servers.sidecar(name, program=program, peers=peers, ports=ports, config=config, rules=rules), page)


def print_longest_stalls(results: Sequence[Result]) -> None:
    """Of all rounds of each group and variant together."""
    longest = {
        (result.group, result.variant, result.figure): result.value.largest
        for result in results
        if result.figure in {STALL, OWN_STALL}
    }
    print("\nLongest stalls of all rounds, and what is left without waiting for a processor:")
    for group, variant, figure in longest:
        if figure == STALL:
            own = longest[group, variant, OWN_STALL]
            print(f"  {longest[group, variant, STALL]:6.1f} ms {own:6.1f} ms  {group}, {variant}")


@click.command(context_settings={"ignore_unknown_options": True})
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--standard-collector", is_flag=True, help="CPython's settings of the garbage collector.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def main(file: Path, standard_collector: bool, arguments: tuple[str, ...]) -> None:
    """Run `ratelimit-sidecar ARGUMENTS`, and note its stalls in FILE."""
    with ExitStack() as changed:
        changed.enter_context(patch.object(app, "StallMonitor", partial(StallObserver, file)))
        if standard_collector:
            changed.enter_context(patch.object(app, "GC_THRESHOLDS", gc.get_threshold()))
            changed.enter_context(patch.object(gc, "freeze"))
        sidecar_command(arguments)


if __name__ == "__main__":
    main()
