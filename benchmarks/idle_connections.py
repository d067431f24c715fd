"""`python -m benchmarks.idle_connections`: what connections that are open and do nothing take of the server's memory.

Each has asked once, so that whatever a connection makes for a call is there, and is then left alone. A server that
runs already is given by --server; it has to let in as many connections.
"""

from __future__ import annotations

import json
import resource
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass

import click

from benchmarks.serving.options import server_option, started_or
from benchmarks.serving.raw import RawConnection
from benchmarks.serving.servers import Server

WARM_UP_CONNECTIONS = 100
"""Opened and closed before anything is measured: what the first ones make stays."""

SETTLE_SECONDS = 1.0
FILES_BESIDES = 200
"""Open files of either process that are not the connections."""


@dataclass(frozen=True, slots=True)
class Idle:
    """Megabytes (10^6 bytes) of resident memory of the server.

    Args:
        after: when all are closed again.
    """

    connections: int
    before: float
    open: float
    after: float

    @property
    def more(self) -> float:
        return self.open - self.before


def measure(server: Server, connections: int, idle_seconds: float) -> Idle:
    open_and_close(server, WARM_UP_CONNECTIONS, SETTLE_SECONDS)
    before = server.resident_bytes
    most = open_and_close(server, connections, idle_seconds)
    return Idle(connections, before / 1e6, most / 1e6, server.resident_bytes / 1e6)


def open_and_close(server: Server, connections: int, idle_seconds: float) -> int:
    """Open connections that are each served once and then idle, serve each again, and close them.

    Returns:
        the server's resident bytes while all were open.
    """
    with ExitStack() as stack:
        opened = []
        for _ in range(connections):
            connection = RawConnection(server.address)
            stack.callback(connection.close)
            connection.greet()
            connection.socket.sendall(connection.calls(1))
            connection.read_answers(1)
            opened.append(connection)
        time.sleep(idle_seconds)
        while_open = server.resident_bytes
        # They are all still served.
        for connection in opened:
            connection.socket.sendall(connection.calls(1))
            connection.read_answers(1)
    time.sleep(SETTLE_SECONDS)
    return while_open


def let_open(files: int) -> None:
    """This process and those that it starts may have so many files open.

    Raises:
        click.ClickException: only fewer are allowed.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= files:
        return
    if hard != resource.RLIM_INFINITY and hard < files:
        raise click.ClickException(
            f"{files} open files are needed, and {hard} allowed: run 'ulimit -Hn {files}' as root"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))


@click.command()
@server_option
@click.option("--connections", default=2_000, show_default=True, type=click.IntRange(1))
@click.option("--seconds", default=3.0, show_default=True, type=click.FloatRange(0), help="How long they idle.")
@click.option("--at-most-mb", default=30.0, show_default=True, help="More is a failure: exit status 1.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON in place of a line.")
def main(server: Server | None, connections: int, seconds: float, at_most_mb: float, as_json: bool) -> None:
    """Open many connections to a sidecar, and tell how much more memory it has while they idle."""
    let_open(connections + FILES_BESIDES)
    with started_or(server) as asked:
        idle = measure(asked, connections, seconds)
    if as_json:
        print(json.dumps(asdict(idle)))
    else:
        print(
            f"{connections:,} idle connections: {idle.more:.1f} MB more, {idle.more * 1e3 / connections:.1f} kB each "
            f"({idle.before:.1f} MB before, {idle.open:.1f} with them, {idle.after:.1f} after they were closed)"
        )
    if idle.more > at_most_mb:
        raise click.ClickException(f"{idle.more:.1f} MB are more than {at_most_mb:g}")


if __name__ == "__main__":
    main()
