"""What a peer more costs: processor time of a flush and memory, by the number of peers.

    python -m benchmarks.mesh_size [--peers 10 40 100] [--changed 200]

One node, whose peers are simulated: they acknowledge each batch at once and say nothing else. In each flush of 20 ms
`--changed` buckets have changed, of 10,000 in all. Counted is the node's time to encode, to send to all peers and to
hear their acknowledgements, without the network. So 200 are 10,000 changed buckets a second, and 20 ms fill a core.
"""

from __future__ import annotations

import argparse
import gc
import time
import tracemalloc
from dataclasses import dataclass

from ratelimit_sidecar.app import GC_THRESHOLDS
from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.limit import TokenBucketLimit
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.limiter.key import KEY_ONLY, TOKEN_BUCKET, KeyEntry, encode_bucket_key
from ratelimit_sidecar.replication.replicator import Replicator
from ratelimit_sidecar.replication.session import LocalNode
from ratelimit_sidecar.replication.stream import Stream
from ratelimit_sidecar.replication.v1 import replication_pb2 as pb
from ratelimit_sidecar.replication.wire import PROTOCOL
from simulation.steps import done, next_frame

NOW_US = 1_790_000_000_000_000
FLUSH_US = 20_000
BUCKETS = 10_000
WARM_UP = BUCKETS // 100
FLUSHES = 50
LIMIT = TokenBucketLimit(100, 1_000_000, 1_000)


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one flush.

    Args:
        peer_bytes: sent to each peer.
        peer_memory_bytes: what the node holds for each.
    """

    peers: int
    flush_ms: float
    peer_us: float
    peer_bytes: float
    peer_memory_bytes: float


def answer_of_peer(frame: pb.Frame, now_us: int) -> pb.Frame | None:
    """What a peer that only listens says to a frame; None when it says nothing."""
    if frame.HasField("deltas"):
        return pb.Frame(ack=pb.Ack(sequence=frame.deltas.sequence))
    if frame.HasField("ping"):
        return pb.Frame(pong=pb.Pong(id=frame.ping.id, received_us=now_us, sent_us=now_us))
    return None


class Mesh:
    def __init__(self, peers: int) -> None:
        self.now_us = NOW_US
        self.store = Store(Origin("node", 1), lambda _key: LIMIT)
        self.replicator = Replicator(LocalNode(self.store.origin, "region", "0"), self.store, NOW_US)
        self.replicator.use_rules(1)
        self.spent_ns = self.bytes_sent = 0
        self.streams: list[Stream] = []
        names = [f"peer-{number}" for number in range(peers)]
        for name in names:
            stream = Stream(self.replicator, name, is_dialled=True, wake=lambda: None, now_us=NOW_US)
            self.streams.append(stream)
            self._say(stream, pb.Frame(hello=pb.Hello(protocol=PROTOCOL, node=name, incarnation=1)))
            reaches = ["node", *(other for other in names if other != name)]
            status = pb.Status(reaches=reaches, rules=1, joined=True, sync_request=pb.EVERYTHING)
            self._say(stream, pb.Frame(status=status))
        self.flush()

    def flush(self) -> None:
        self.now_us += FLUSH_US
        began_ns = time.thread_time_ns()
        done(self.replicator.flush_steps(self.now_us))
        self.spent_ns += time.thread_time_ns() - began_ns
        for stream in self.streams:
            while (raw := self._next_frame(stream)) is not None:
                self.bytes_sent += len(raw)
                answer = answer_of_peer(pb.Frame.FromString(raw), self.now_us)
                if answer is not None:
                    self._say(stream, answer)

    def _next_frame(self, stream: Stream) -> bytes | None:
        began_ns = time.thread_time_ns()
        raw = next_frame(stream, self.now_us)
        self.spent_ns += time.thread_time_ns() - began_ns
        return raw

    def _say(self, stream: Stream, frame: pb.Frame) -> None:
        raw = frame.SerializeToString()
        began_ns = time.thread_time_ns()
        done(stream.receive_steps(raw, self.now_us))
        self.spent_ns += time.thread_time_ns() - began_ns
        assert stream.error is None, stream.error


def measure(peers: int, changed: int) -> Cost:
    keys = [
        encode_bucket_key(TOKEN_BUCKET, "api", [KeyEntry(KEY_ONLY, "user", f"user-{number}")])
        for number in range(BUCKETS)
    ]
    mesh = Mesh(peers)

    def run(flushes: int) -> None:
        for flush in range(flushes):
            for number in range(flush * changed, (flush + 1) * changed):
                mesh.store.bucket(keys[number % BUCKETS], LIMIT, mesh.now_us).take(1, mesh.now_us)
            mesh.flush()

    run(WARM_UP)
    mesh.spent_ns = mesh.bytes_sent = 0
    run(FLUSHES)
    return Cost(
        peers=peers,
        flush_ms=mesh.spent_ns / 1e6 / FLUSHES,
        peer_us=mesh.spent_ns / 1e3 / FLUSHES / peers,
        peer_bytes=mesh.bytes_sent / FLUSHES / peers,
        peer_memory_bytes=_memory_of(peers, changed),
    )


def _memory_of(peers: int, changed: int) -> float:
    """What so many peers take more than one, all of which keep up."""
    held = []
    for number in (1, peers + 1):
        tracemalloc.start()
        mesh = Mesh(number)
        for flush in range(FLUSHES // 5):
            for index in range(flush * changed, (flush + 1) * changed):
                mesh.store.bucket(b"\x00" + index.to_bytes(4), LIMIT, mesh.now_us).take(1, mesh.now_us)
            mesh.flush()
        held.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
    return (held[1] - held[0]) / peers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=int, nargs="+", default=(10, 40, 100))
    parser.add_argument("--changed", type=int, default=200, help="buckets in each flush (default: %(default)s)")
    arguments = parser.parse_args()
    gc.set_threshold(*GC_THRESHOLDS)
    print(f"{'peers':>7}{'ms a flush':>14}{'us a peer':>12}{'bytes a peer':>15}{'memory a peer':>16}")
    for peers in arguments.peers:
        cost = measure(peers, arguments.changed)
        print(
            f"{cost.peers:7}{cost.flush_ms:14.2f}{cost.peer_us:12.1f}{cost.peer_bytes:15,.0f}"
            f"{cost.peer_memory_bytes:16,.0f}"
        )


if __name__ == "__main__":
    main()
