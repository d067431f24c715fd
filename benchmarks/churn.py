"""`python -m benchmarks.churn`: clients that come and go, half of them rudely, and whether the server grows of it.

    python -m benchmarks.churn --seconds 3600
    python -m benchmarks.churn --server 127.0.0.1:8081@4711 --also unix:/run/rls.sock --also tls:127.0.0.1:8443

Each visit is a connection of its own, to the addresses in turn. Half of them are polite: some calls, each answered. The
others break off in every way that a real client has (`RUDE`); some of those stay a few seconds first, as one does whose
machine has gone. All the while a line every few seconds tells the server's memory and open files.

The verdict is of memory: the median of the last third of the time beside that of the middle third, since the first one
fills caches; and that all files are closed in the end. A polite visit that is not answered is a failure as well.
"""

from __future__ import annotations

import heapq
import random
import ssl
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import click

from benchmarks.idle_connections import FILES_BESIDES, let_open
from benchmarks.serving.frames import END_HEADERS, HEADERS, PREFACE, frame_head
from benchmarks.serving.options import server_option
from benchmarks.serving.raw import RawConnection, Refused
from benchmarks.serving.requests import ONE_DESCRIPTOR, framed
from benchmarks.serving.servers import Server, ServerFailed, running_servers, wait_until

SAMPLE_SECONDS = 0.25
STAY_SECONDS = (0.0, 3.0)
"""Of a rude visit that stays, between these."""
MOST_STAYING = 1_000
"""The one that has stayed longest leaves when there are more."""
MOST_CALLS = 20
FILES_LEFT = 8
"""More open files than before, when all clients are gone, are a leak."""

TLS_PREFIX = "tls:"


def _half_a_preface(connection: RawConnection) -> None:
    connection.socket.sendall(PREFACE[:10])


def _half_a_frame_head(connection: RawConnection) -> None:
    connection.greet()
    connection.socket.sendall(connection.head()[:5])


def _half_a_header_block(connection: RawConnection) -> None:
    connection.greet()
    connection.socket.sendall(connection.head()[:-4])


def _headers_without_an_end(connection: RawConnection) -> None:
    connection.greet()
    connection.socket.sendall(connection.head(flags=0))


def _call_without_a_message(connection: RawConnection) -> None:
    connection.greet()
    connection.socket.sendall(connection.head())


def _half_a_message(connection: RawConnection) -> None:
    connection.greet()
    connection.socket.sendall(connection.head() + connection.data(framed(ONE_DESCRIPTOR)[:10]))


def _cancelled_calls(connection: RawConnection) -> None:
    connection.greet()
    connection.socket.sendall(b"".join(connection.calls(1) + connection.cancel() for _ in range(MOST_CALLS)))


def _cancelled_half_messages(connection: RawConnection) -> None:
    connection.greet()
    half = framed(ONE_DESCRIPTOR)[:10]
    connection.socket.sendall(
        b"".join(connection.head() + connection.data(half) + connection.cancel() for _ in range(MOST_CALLS))
    )


def _answers_never_read(connection: RawConnection) -> None:
    connection.greet()
    connection.socket.sendall(connection.calls(100))


def _no_window_for_answers(connection: RawConnection) -> None:
    connection.greet(0)
    connection.socket.sendall(connection.calls(100))


def _not_http2(connection: RawConnection) -> None:
    connection.socket.sendall(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n")


def _broken_headers(connection: RawConnection) -> None:
    connection.greet()
    block = b"\xff" * 20
    connection.socket.sendall(frame_head(len(block), HEADERS, END_HEADERS) + (1).to_bytes(4, "big") + block)


def _silence(_connection: RawConnection) -> None:
    pass


RUDE: Sequence[Callable[[RawConnection], None]] = (
    _half_a_preface,
    _half_a_frame_head,
    _half_a_header_block,
    _headers_without_an_end,
    _call_without_a_message,
    _half_a_message,
    _cancelled_calls,
    _cancelled_half_messages,
    _answers_never_read,
    _no_window_for_answers,
    _not_http2,
    _broken_headers,
    _silence,
)


class Visitors:
    """Clients that come and go, polite and rude ones in turn. Call `come` for each visit, and read the counts.

    Args:
        addresses: visited in turn; with `tls:` in front the server speaks TLS there.
    """

    def __init__(self, addresses: Sequence[str], seed: int = 1) -> None:
        self.polite = 0
        self.failures: Counter[str] = Counter()
        self.rude: Counter[str] = Counter()
        self._addresses = addresses
        self._random = random.Random(seed)
        self._visits = 0
        self._staying: list[tuple[float, int, RawConnection]] = []
        """By when they leave."""
        self._tls = ssl.create_default_context()
        self._tls.check_hostname = False
        self._tls.verify_mode = ssl.CERT_NONE
        self._tls.set_alpn_protocols(["h2"])

    def come(self) -> None:
        """One more visit, and let those leave that have stayed long enough."""
        self._visits += 1
        number, ways = self._visits // 2, len(self._addresses)
        address = self._addresses[number % ways]
        if self._visits % 2:
            self._be_polite(address)
        else:
            self._be_rude(address, RUDE[number // ways % len(RUDE)])
        self.let_leave(time.monotonic())

    def let_leave(self, now: float) -> None:
        while self._staying and (self._staying[0][0] <= now or len(self._staying) > MOST_STAYING):
            _, _, connection = heapq.heappop(self._staying)
            self._leave(connection)

    def _be_polite(self, address: str) -> None:
        calls = self._random.randint(1, MOST_CALLS)
        try:
            with self._connected(address) as connection:
                connection.greet()
                connection.socket.sendall(connection.calls(calls))
                answered = connection.read_answers(calls)
        except (OSError, Refused) as error:
            self.failures[f"{address}: {type(error).__name__}: {error}"] += 1
            return
        if answered < calls:
            self.failures[f"{address}: answers without a message"] += 1
        self.polite += 1

    def _be_rude(self, address: str, way: Callable[[RawConnection], None]) -> None:
        try:
            # Of those that should speak TLS half do not.
            connection = self._connect(address, in_clear=self._random.random() < 0.5)
        except OSError as error:
            self.failures[f"{address}: {type(error).__name__}: {error}"] += 1
            return
        # The server may be rid of it already.
        with suppress(OSError):
            way(connection)
        self.rude[way.__name__.strip("_").replace("_", " ")] += 1
        if self._random.random() < 0.5:
            self._leave(connection)
        else:
            leaves = time.monotonic() + self._random.uniform(*STAY_SECONDS)
            heapq.heappush(self._staying, (leaves, self._visits, connection))

    def _leave(self, connection: RawConnection) -> None:
        """Half of them with a TCP reset."""
        if self._random.random() < 0.5:
            connection.reset()
        else:
            connection.close()

    def _connect(self, address: str, *, in_clear: bool = False) -> RawConnection:
        is_tls = address.startswith(TLS_PREFIX) and not in_clear
        return RawConnection(address.removeprefix(TLS_PREFIX), tls=self._tls if is_tls else None)

    @contextmanager
    def _connected(self, address: str) -> Iterator[RawConnection]:
        connection = self._connect(address)
        try:
            yield connection
        finally:
            connection.close()


@dataclass(frozen=True, slots=True)
class Growth:
    """Of resident memory, in bytes.

    Args:
        middle: median of the middle third of the samples.
        last: of the last.
    """

    middle: float
    last: float

    @classmethod
    def of(cls, samples: Sequence[int]) -> Growth:
        """At least three samples."""
        third = len(samples) // 3
        return cls(statistics.median(samples[third : 2 * third]), statistics.median(samples[2 * third :]))

    @property
    def percent(self) -> float:
        return (self.last / self.middle - 1) * 100

    def __str__(self) -> str:
        middle, last = self.middle / 1e6, self.last / 1e6
        return f"{middle:.1f} MB in the middle third of the time, {last:.1f} in the last: {self.percent:+.1f} %"


def churn(
    server: Server, visitors: Visitors, *, per_second: float, seconds: float, every: float, at_most_percent: float
) -> list[str]:
    """Visit the server, and print how it fares.

    Args:
        per_second: visits.
        every: seconds between two lines.
        at_most_percent: that the memory may grow from one third to the next.

    Returns:
        what is wrong with it.
    """
    files_before = server.open_files
    samples: list[int] = []
    began = time.monotonic()
    visits, next_line, next_sample = 0, every, 0.0
    while (elapsed := time.monotonic() - began) < seconds:
        if elapsed >= next_sample:
            samples.append(server.resident_bytes)
            next_sample += SAMPLE_SECONDS
        if elapsed >= next_line:
            print(
                f"{elapsed:7.0f} s  {server.resident_bytes / 1e6:7.1f} MB  {server.open_files:5} files  "
                f"{visits / elapsed:6.1f} visits/s",
                flush=True,
            )
            next_line += every
        # What it is late by it does not make up for: a slow server is visited less often.
        due = visits / per_second
        if due > elapsed:
            time.sleep(min(due - elapsed, SAMPLE_SECONDS))
            visitors.let_leave(time.monotonic())
            continue
        visitors.come()
        visits += 1
    visitors.let_leave(float("inf"))
    growth = Growth.of(samples)
    print(f"{visitors.polite:,} polite visits, and rude ones:")
    for way, times in visitors.rude.most_common():
        print(f"  {times:7,}  {way}")
    print(growth)
    wrong = [f"{times:,} times {what}" for what, times in visitors.failures.most_common(5)]
    if growth.percent > at_most_percent:
        wrong.append(f"it grows by more than {at_most_percent:g} %")
    try:
        wait_until(lambda: server.open_files <= files_before + FILES_LEFT)
    except ServerFailed:
        wrong.append(f"{server.open_files} files are open in place of {files_before}, though everybody has gone")
    return wrong


@contextmanager
def visited(server: Server | None, also: Sequence[str]) -> Iterator[tuple[Server, list[str]]]:
    """The server and its addresses: a sidecar that listens on TCP and a unix socket where there is none."""
    if server is not None:
        yield server, [server.address, *also]
        return
    with running_servers() as servers:
        ports = servers.ports()
        addresses = [f"127.0.0.1:{ports.grpc}", f"unix:{servers.folder}/rls.sock"]
        yield servers.sidecar(ports=ports, grpc_addresses=addresses), [*addresses, *also]


@click.command()
@server_option
@click.option(
    "--also",
    multiple=True,
    metavar="[tls:]ADDRESS",
    help="Another address of the same server, host:port or unix:/path; tls: in front for TLS, whose certificate is not "
    "checked. To be given again for more.",
)
@click.option("--seconds", default=60.0, show_default=True, type=click.FloatRange(3), help="3600 for a soak.")
@click.option("--per-second", default=200.0, show_default=True, type=click.FloatRange(1), help="Visits.")
@click.option("--every", default=5.0, show_default=True, type=click.FloatRange(1), help="Seconds between two lines.")
@click.option("--at-most-percent", default=3.0, show_default=True, help="More growth is a failure: exit status 1.")
def main(
    server: Server | None,
    *,
    also: tuple[str, ...],
    seconds: float,
    per_second: float,
    every: float,
    at_most_percent: float,
) -> None:
    """Visit a sidecar with connections that come and go, half of them rudely, and tell whether it grows."""
    let_open(MOST_STAYING + FILES_BESIDES)
    with visited(server, also) as (asked, addresses):
        wrong = churn(
            asked,
            Visitors(addresses),
            per_second=per_second,
            seconds=seconds,
            every=every,
            at_most_percent=at_most_percent,
        )
    if wrong:
        raise click.ClickException("\n".join(wrong))
    print("Nothing has grown, everything was closed, and every polite client was answered.")


if __name__ == "__main__":
    main()
