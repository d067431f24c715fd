"""The bounds every front end keeps, so that no client can take the sidecar's memory or its time."""

from __future__ import annotations

MAX_MESSAGE_BYTES = 65_536
"""A larger request is answered RESOURCE_EXHAUSTED. Envoy's are a few hundred bytes; dozens of long
descriptors still fit."""

MAX_STREAMS = 1_024
"""Concurrent calls on one connection: Envoy sends all calls of a worker over one."""

MAX_CALLS = 8_192
"""Concurrent calls in all: `MAX_MESSAGE_BYTES` each makes 512 MiB at worst. A queue that long is answered
after Envoy's default timeout of 20 ms, so a longer one helps nobody."""

MAX_CONNECTIONS = 4_096
"""An Envoy opens one a worker thread."""

MAX_HEADER_BYTES = 65_536
"""Of one request, decoded."""

HANDSHAKE_SECONDS = 2.0
"""From accepting a connection to HTTP/2's preface, which clients send at once. A connection that is silent holds up
a stop for as long."""

BODY_IDLE_SECONDS = 10.0
"""A client that has sent half a message and then nothing for this long is reset."""

CONNECTION_IDLE_SECONDS = 2 * 3_600.0
"""Above the hour after which Envoy itself closes an idle upstream connection: whoever calls should choose,
since opening a new one costs a part of its timeout. It only clears away connections whose client has
vanished."""

DRAIN_SECONDS = 5.0
"""What calls in flight get at a stop. They take microseconds; only a client that is slow to send its message
needs it."""
