"""The bounds of a mesh, so that neither a peer nor the network can use up the sidecar's memory or time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class MeshBounds:
    """The bounds of one node's mesh. Times are in seconds.

    Args:
        connections: inbound, at once: one a stream, and as many more that have not said anything yet. Further ones are
            closed.
        streams: inbound, at once; two from each of `peers.MAX_PEERS`.
        key_id_bytes: the most memory for the keys with ids (`key_ids`) that peers have sent on all streams: 255 peers
            with keys of 60 bytes take as much.
        handshake: from an inbound connection to its first HTTP/2 settings, TLS included; gRPC's default is two minutes.
        idle: an inbound connection without a stream is closed after this time: who dials opens one at once.
        connect: for a TCP or a TLS handshake over any distance, with one packet lost. A dial with TLS has two of each,
            and twice the time.
        absent: a peer that could not be reached for so long since the first dial is not waited for at the start. A
            single refusal may be that of a proxy or a network policy that is not ready yet.
        first_redial: waits between dials are random up to a bound that doubles from this ("full jitter") ...
        most_redial: ... to this.
        misconfigured_redial: the wait when an error at one of the ends needs people to fix it.
        parked: the wait before an address is tried again that led to a peer connected under another address: it may
            lead to a new node.
        lasting: a stream that lasted this long was fine: its address is dialled again at once, and the waits start from
            the beginning.
        write: for the network to take one frame. A stream to a peer that does not read for so long is ended.
        flush: the interval at which changes are sent.
        drain: for connected peers, at a stop, to acknowledge what is yet to be sent to them.
        goodbye: for the last frame of a stream to reach the other end.
    """

    connections: int = 1_024
    streams: int = 512
    key_id_bytes: int = 512 * 1_024 * 1_024
    handshake: float = 5.0
    idle: float = 10.0
    connect: float = 2.0
    absent: float = 2.0
    first_redial: float = 0.2
    most_redial: float = 1.0
    misconfigured_redial: float = 30.0
    parked: float = 60.0
    lasting: float = 10.0
    write: float = 5.0
    flush: float = 0.02
    drain: float = 2.0
    goodbye: float = 1.0


DEFAULT_BOUNDS: Final = MeshBounds()
