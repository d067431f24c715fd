"""The bounds of an HTTP server, so that no client can use up its places, or keep probes out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class HttpBounds:
    """The bounds of one HTTP server. Times are in seconds.

    Args:
        connections: of the console, at once. (Those of proxies are in `console.proxies`.)
        new: a connection that waits for its client counts as new for so long, and is closed after slow ones. A probe
            that has just connected must have time to send its request.
        request: from a new connection (not of a proxy), or from a request's first byte, to the request's last byte.
        answer: from an answer's first byte until the kernel has all of it: some MB over a slow line.
        idle: a connection without requests is closed after this time; by default longer than Prometheus' usual interval
            (60 s), so that it keeps its connection.
        requests: those that the application handles at once.
        place: a request that has waited so long for others is answered 503.
        scrapes: at once.
        scrapes_of_address: enough for a pair of Prometheus servers behind one address, and people.
        scrape: a scrape whose answer is not read within this time is ended: Prometheus' longest usual interval.
        drain: the time that clients have at a stop to send the rest of a request, or to read an answer.
        cancel: how long the application may go on after the drain. Then uvicorn cancels it, and logs that.
    """

    connections: int = 128
    new: float = 0.5
    request: float = 10.0
    answer: float = 30.0
    idle: int = 75
    requests: int = 32
    place: float = 2.0
    scrapes: int = 8
    scrapes_of_address: int = 4
    scrape: float = 60.0
    drain: float = 2.0
    cancel: float = 1.0


DEFAULT_BOUNDS: Final = HttpBounds()
