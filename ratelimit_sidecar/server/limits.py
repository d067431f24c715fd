"""The bounds that front ends keep, so that no client can take the sidecar's memory or its time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MAX_MESSAGE_BYTES: Final = 4 * 1_024 * 1_024
"""A larger request is answered RESOURCE_EXHAUSTED, which Envoy lets pass. It is gRPC's own default, so that of
envoyproxy/ratelimit; Envoy's requests are a few hundred bytes, and all the headers that it takes by default, 60 KiB,
fit into each of 68 descriptors."""

MAX_STREAMED_BYTES: Final = 65_536
"""The largest message of most streaming calls, which a client sends in part at most until it is read."""

MAX_HEADER_BYTES: Final = 131_072
"""Of one request, decoded, with 32 bytes for each header (RFC 9113, section 6.5.2). Envoy takes 60 KiB of headers from
its own clients and passes some of them on."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one front end takes from its clients. Times are in seconds.

    Args:
        connections: at once; an Envoy opens one a worker thread. Further ones are closed at once.
        streams: calls on one connection at once. Envoy sends all calls of a worker over one.
        held_bytes: what unfinished calls of all connections may hold in memory. A connection may hold an eighth of what
            is free, so that no few of them take all of it.
        handshake: from a new connection to its first SETTINGS frame, TLS included.
        body_idle: a call whose message stops in the middle for as long is reset.
        call: a call whose message is not complete after that is reset.
        stalled: a client that takes no answers for as long is disconnected.
        idle: a connection without calls is closed. Envoy closes idle ones after an hour, and whoever calls should
            choose, since opening a new one costs a part of its timeout: this only clears away what was forgotten.
        ping_after: a connection with a streaming call is asked for a sign of life after such a silence, and is closed
            when it gives none for as long again.
        drain: what calls in flight get at a stop.
        goaway_ping: how long a client may take to answer the PING between the two GOAWAYs of a drain.
        age: a connection this old, up to a tenth more or less, is drained, so that clients spread over new sidecars;
            None: never.
        age_grace: what calls in flight then get.
        check_every: how often these times are looked at; each can be so much longer.
    """

    connections: int = 4_096
    streams: int = 1_024
    held_bytes: int = 256 * 1_024 * 1_024
    handshake: float = 2.0
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


DEFAULT_LIMITS: Final = Limits()
