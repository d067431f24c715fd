"""What commands have in common that measure one server: a sidecar that they start, or one that runs already."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from benchmarks.serving.servers import Server, running_servers


class RunningServer(click.ParamType[Server]):
    """`[NAME=]ADDRESS[@PID]`, the address host:port or unix:/path.

    Args:
        needs_pid: whether the process has to be named.
    """

    name = "server"

    def __init__(self, *, needs_pid: bool = False) -> None:
        self._needs_pid = needs_pid

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Server:
        match = re.fullmatch(r"(?:([^=]+)=)?(unix:/.+?|.+:\d+)(?:@(\d+))?", str(value))
        if match is None or (self._needs_pid and match[3] is None):
            pid = "@PID" if self._needs_pid else "[@PID]"
            self.fail(f"{value!r} is not [NAME=]HOST:PORT{pid} or [NAME=]unix:/PATH{pid}", param, ctx)
        name, address, pid = match.groups()
        if pid is not None and not Path("/proc", pid).exists():
            self.fail(f"there is no process {pid}", param, ctx)
        return Server(name or address, address, pid=None if pid is None else int(pid))


server_option = click.option(
    "--server",
    metavar="ADDRESS@PID",
    type=RunningServer(needs_pid=True),
    help="Measure the server that listens there (host:port or unix:/path), in the process PID, in place of a sidecar "
    "that is started for it.",
)


@contextmanager
def started_or(server: Server | None) -> Iterator[Server]:
    """The server itself, or a sidecar for as long as the block takes."""
    if server is not None:
        yield server
        return
    with running_servers() as servers:
        yield servers.sidecar()
