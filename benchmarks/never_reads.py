"""`python -m benchmarks.never_reads`: clients that send for ever and read nothing, and what the server keeps for them.

Whatever is owed to such a client has to be kept somewhere: answers, acknowledgements of pings. A server is bounded when
it stops reading from it, or ends the connection. Sent are, each over connections of its own:

- calls, with as much window as there can be, so that only the sockets' buffers hold up the answers: some megabytes of
  the kernel's for each connection, so this takes a while;
- calls, with a window of nothing, so that no answer may be sent at all;
- pings and settings, which are acknowledged without any window.

It is over when the server has taken nothing for a while, has closed the connections, or time is up. Meanwhile another
client calls and reads, as often as it is answered: it has to be.
"""

from __future__ import annotations

import json
import select
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass

import click

from benchmarks.serving.frames import MAX_WINDOW, PING, SETTINGS, frame
from benchmarks.serving.options import server_option, started_or
from benchmarks.serving.raw import RawConnection
from benchmarks.serving.servers import Server

RECEIVE_BUFFER_BYTES = 4_096
BATCH = 50
LOOK_SECONDS = 0.02
"""Between two calls of the client that reads, and two looks at the server's memory."""

STOPPED, CLOSED, GOES_ON = "stopped reading", "closed the connections", "still reads"


@dataclass(frozen=True, slots=True)
class Flood:
    """One kind of client.

    Args:
        batch: gives the next BATCH of what it sends.
    """

    name: str
    window_bytes: int
    batch: Callable[[RawConnection], bytes]


FLOODS = (
    Flood("calls, answers may be sent", MAX_WINDOW, lambda connection: connection.calls(BATCH)),
    Flood("calls, no window for answers", 0, lambda connection: connection.calls(BATCH)),
    Flood("pings", MAX_WINDOW, lambda _: frame(PING, 0, 0, bytes(8)) * BATCH),
    Flood("settings", MAX_WINDOW, lambda _: frame(SETTINGS, 0, 0) * BATCH),
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one kind of client did to the server; memory in megabytes (10^6 bytes), resident.

    Args:
        sent_mb: by all its connections, until the end.
        took_seconds: until the server had taken the last of it.
        after: when the connections are closed.
        slowest_ms: answer to the client that reads.
    """

    flood: str
    end: str
    sent_mb: float
    took_seconds: float
    before: float
    most: float
    after: float
    slowest_ms: float

    @property
    def more(self) -> float:
        return self.most - self.before


class _Sender:
    """A connection on which as much is sent as the server takes."""

    def __init__(self, address: str, flood: Flood) -> None:
        self.connection = RawConnection(address, receive_buffer_bytes=RECEIVE_BUFFER_BYTES)
        self.connection.greet(flood.window_bytes)
        self.connection.socket.setblocking(False)
        self.sent = 0
        self.is_closed = False
        self._flood = flood
        self._left = b""

    def send(self) -> None:
        """As the socket is writable, once."""
        self._left = self._left or self._flood.batch(self.connection)
        try:
            sent = self.connection.socket.send(self._left)
        except BlockingIOError:
            return
        except OSError:
            self.is_closed = True
            return
        self.sent += sent
        self._left = self._left[sent:]


def measure(server: Server, flood: Flood, *, connections: int, patience: float, seconds: float) -> Outcome:
    """Flood a server over connections that never read an answer, and ask it on one that does.

    Args:
        patience: seconds in which nothing is taken, after which the server has stopped reading.
        seconds: the longest it goes on.

    Raises:
        Refused, OSError: the client that reads is not answered.
    """
    with ExitStack() as stack:
        reading = RawConnection(server.address)
        stack.callback(reading.close)
        reading.greet()
        before = most = server.resident_bytes
        senders = [_Sender(server.address, flood) for _ in range(connections)]
        for sender in senders:
            stack.callback(sender.connection.close)
        slowest = 0.0
        began = taken = looked = time.perf_counter()
        while (now := time.perf_counter()) - began < seconds and now - taken < patience:
            open_ones = [sender for sender in senders if not sender.is_closed]
            if not open_ones:
                break
            sockets = {sender.connection.socket: sender for sender in open_ones}
            for writable in select.select([], list(sockets), [], LOOK_SECONDS)[1]:
                sent = sockets[writable].sent
                sockets[writable].send()
                if sockets[writable].sent > sent:
                    taken = time.perf_counter()
            if now - looked >= LOOK_SECONDS:
                looked = now
                slowest = max(slowest, _answer_seconds(reading))
                most = max(most, server.resident_bytes)
        # Also where it was over before the first look.
        slowest = max(slowest, _answer_seconds(reading))
        end = CLOSED if all(sender.is_closed for sender in senders) else STOPPED if now - taken >= patience else GOES_ON
    time.sleep(1)
    return Outcome(
        flood.name,
        end,
        sum(sender.sent for sender in senders) / 1e6,
        taken - began,
        before / 1e6,
        most / 1e6,
        server.resident_bytes / 1e6,
        slowest * 1e3,
    )


def _answer_seconds(connection: RawConnection) -> float:
    began = time.perf_counter()
    connection.socket.sendall(connection.calls(1))
    connection.read_answers(1)
    return time.perf_counter() - began


def print_table(outcomes: Sequence[Outcome]) -> None:
    print(
        f"{'sent without reading':30} {'the server':24} {'sent MB':>8} {'in s':>6} {'MB before':>10} {'most':>7}",
        end="",
    )
    print(f" {'after':>7} {'others wait ms':>15}")
    for of_flood in outcomes:
        print(
            f"{of_flood.flood:30} {of_flood.end:24} {of_flood.sent_mb:8.1f} {of_flood.took_seconds:6.1f} "
            f"{of_flood.before:10.1f} {of_flood.most:7.1f} {of_flood.after:7.1f} {of_flood.slowest_ms:15.1f}"
        )


@click.command()
@server_option
@click.option("--connections", default=4, show_default=True, type=click.IntRange(1), help="That send, at once.")
@click.option("--seconds", default=60.0, show_default=True, type=click.FloatRange(1), help="The longest for each kind.")
@click.option(
    "--patience", default=3.0, show_default=True, help="Seconds without anything taken: the server has stopped reading."
)
@click.option("--at-most-mb", default=60.0, show_default=True, help="More in all is a failure: exit status 1.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON in place of a table.")
def main(
    server: Server | None, *, connections: int, seconds: float, patience: float, at_most_mb: float, as_json: bool
) -> None:
    """Send to a sidecar for ever without reading, and tell when it stops reading, and what memory it takes."""
    with started_or(server) as asked:
        outcomes = [
            measure(asked, flood, connections=connections, patience=patience, seconds=seconds) for flood in FLOODS
        ]
    if as_json:
        print(json.dumps([asdict(of_flood) for of_flood in outcomes], indent=1))
    else:
        print_table(outcomes)
    more = max(of_flood.most for of_flood in outcomes) - outcomes[0].before
    if more > at_most_mb:
        raise click.ClickException(f"{more:.1f} MB more are more than {at_most_mb:g}")


if __name__ == "__main__":
    main()
