"""The bounds of front ends, so that no client can use up the sidecar's memory or time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MAX_MESSAGE_BYTES: Final = 4 * 1_024 * 1_024
"""The largest request. A larger one is answered RESOURCE_EXHAUSTED, and Envoy lets it pass. It is the default of gRPC
and so of envoyproxy/ratelimit. Envoy's requests have a few hundred bytes; 68 descriptors could each hold all headers
that Envoy accepts by default, 60 KiB.
"""

MAX_STREAMED_BYTES: Final = 65_536
"""The largest message of a streaming call, unless it takes parts. It also limits how much a client sends before it is
read.
"""

MAX_HEADER_BYTES: Final = 131_072
"""The largest headers of one request, decoded, with 32 bytes for each header (RFC 9113, section 6.5.2). Envoy accepts
60 KiB of headers from its own clients and passes some of them on.
"""


@dataclass(frozen=True, slots=True)
class ServerBounds:
    """The bounds of one front end. Times are in seconds.

    Args:
        connections: the most connections; an Envoy opens one for each worker thread. Further ones are closed at once.
        streams: the most concurrent calls on one connection. Envoy sends all calls of a worker over one.
        held_bytes: the most memory for unfinished calls of all connections, and for answers that wait for window. A
            connection may hold an eighth of what is free, so that a few of them cannot use all of it.
        handshake: the time from a new connection to its first SETTINGS frame, TLS included. An Envoy under a burst of
            requests takes seconds for it, and all of them that wait for the connection would fail.
        body_idle: a call whose message stops in the middle for this long is reset. A client whose headers do is
            disconnected.
        call: a call whose message is not complete after this time is reset.
        stalled: a client that does not read the answers that wait for it within this time is disconnected.
        idle: a connection without calls is closed after this time. Envoy closes its own after an hour. This only
            removes forgotten ones: a new connection costs a part of a call's timeout, so clients should choose when.
        ping_after: a connection with a streaming call is sent a PING after such a silence, and is closed after a second
            one.
        drain: the time that calls in flight have left at a stop.
        goaway_ping: the time for a client to answer the PING between the two GOAWAYs of a drain.
        age: a connection is drained at this age, a tenth more or less, so that clients spread over new sidecars; None
            for never.
        age_grace: the time that calls in flight have left when a connection is drained because of its age.
        check_every: the interval of checks of these times; each can be exceeded by this much.
    """

    connections: int = 4_096
    streams: int = 1_024
    held_bytes: int = 256 * 1_024 * 1_024
    handshake: float = 10.0
    body_idle: float = 10.0
    call: float = 30.0
    stalled: float = 10.0
    idle: float = 2 * 3_600.0
    ping_after: float = 60.0
    drain: float = 5.0
    goaway_ping: float = 1.0
    age: float | None = None
    age_grace: float = 3_600.0
    check_every: float = 0.5


DEFAULT_BOUNDS: Final = ServerBounds()
