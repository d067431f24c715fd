"""Conversations as a version of the protocol had them, kept for the versions to come.

`python -m replication.recording` (in tests/) writes one by the present version to `recorded/protocol_<n>.json`: what
node "a" said to node "b", when, and the schema of its frames. `test_protocol_versions.py` lets the present version hear
it. To be run once before the protocol changes; afterwards nothing could say what the old one had been.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from dataclasses import dataclass
from pathlib import Path

from google.protobuf import descriptor_pb2
from replication.builders import (
    NOW_US,
    PAIR,
    PER_PLAN,
    PER_USER,
    SECOND_US,
    SIT_OUT_US,
    bucket_of,
    flush,
    key_of,
    ledger_of,
    node,
    store_of,
)

from ratelimit_sidecar.crdt.waiting import PendingDecision
from ratelimit_sidecar.replication.payments import PaymentExchange
from ratelimit_sidecar.replication.replicator import Replicator
from ratelimit_sidecar.replication.stream import Stream
from ratelimit_sidecar.replication.v1 import replication_pb2 as pb
from ratelimit_sidecar.replication.wire import PROTOCOL, Reason
from simulation.steps import next_frame, receive

RECORDED = Path(__file__).parent / "recorded"
INCARNATION = {"a": 11, "b": 22}
LATER_US = NOW_US + 200 * SECOND_US
"""When the conversation begins: past the horizon of what "a" took at NOW_US, which travels as a base."""


class Party(Replicator):
    """A node with eventual and strict limits, on a clock that the conversation sets."""

    def __init__(self, name: str) -> None:
        self.clock_us = NOW_US
        self.ledger = ledger_of(name, PAIR, NOW_US - 2 * SIT_OUT_US)
        payments = PaymentExchange(self.ledger, lambda: self.clock_us)
        local = node(name, INCARNATION[name], membership=payments.membership)
        super().__init__(local, store_of(local), NOW_US, payments=payments)

    def take(self, value: str, hits: int) -> None:
        bucket_of(self.store, value, self.clock_us).take(hits, self.clock_us, always=True)

    def want(self, hits: int) -> None:
        """Ask more of a strict limit than the home holds."""
        bucket = self.ledger.bucket(key_of("gold", "plan"), PER_PLAN, self.clock_us)
        bucket.take(bucket.remaining, self.clock_us)
        bucket.take(hits, self.clock_us)

    def wait(self, hits: int) -> None:
        """Let a request wait for more of it than the home holds."""
        key = key_of("gold", "plan")
        bucket = self.ledger.bucket(key, PER_PLAN, self.clock_us)
        bucket.take(bucket.remaining, self.clock_us)
        assert self.ledger.wait(key, PendingDecision(hits, lambda _now_us: b"", 250_000), self.clock_us)


@dataclass(frozen=True)
class Recording:
    """A conversation between two nodes of some version, as it was recorded.

    Args:
        frames: of "a", with when each was said.
        schema: of these frames.
    """

    protocol: int
    frames: list[tuple[int, bytes]]
    schema: descriptor_pb2.FileDescriptorProto


def read_recording(path: Path) -> Recording:
    read = json.loads(path.read_text())
    schema = descriptor_pb2.FileDescriptorProto.FromString(b64decode(read["schema"]))
    return Recording(read["protocol"], [(each["at_us"], b64decode(each["frame"])) for each in read["frames"]], schema)


def listener() -> Party:
    """Node "b", as it was before the conversation."""
    party = Party("b")
    party.take("ann", 3)
    party.take("bob", 4)
    return party


def converse() -> list[tuple[int, bytes]]:
    """What "a" says to "b" from hello to goodbye: its state, a few changes, payments, a wish, pings."""
    a, b = Party("a"), listener()
    a.take("ann", 5 * PER_USER.capacity)
    said: list[tuple[int, bytes]] = []
    now_us = LATER_US
    one = Stream(a, "b", is_dialled=True, wake=lambda: None, now_us=now_us)
    other = Stream(b, "a", is_dialled=False, wake=lambda: None, now_us=now_us)

    def exchange() -> None:
        busy = True
        while busy:
            busy = False
            while (raw := next_frame(one, now_us)) is not None:
                said.append((now_us, raw))
                receive(other, raw, now_us)
                busy = True
            while (raw := next_frame(other, now_us)) is not None:
                receive(one, raw, now_us)
                busy = True

    for step in range(8):
        now_us = a.clock_us = b.clock_us = LATER_US + step * SECOND_US // 4
        a.take("ann", 1)
        a.take(f"user-{step}", step + 1)
        if step == 4:
            a.want(30)
        if step == 6:
            a.wait(3)
        flush(a, now_us)
        flush(b, now_us)
        one.check_time(now_us)
        other.check_time(now_us)
        exchange()
    one.close(Reason.DRAINING, "the sidecar is shutting down", now_us)
    exchange()
    return said


def main() -> None:
    schema = descriptor_pb2.FileDescriptorProto()
    pb.DESCRIPTOR.CopyToProto(schema)
    frames = [{"at_us": at_us, "frame": b64encode(raw).decode()} for at_us, raw in converse()]
    written = {"protocol": PROTOCOL, "schema": b64encode(schema.SerializeToString()).decode(), "frames": frames}
    path = RECORDED / f"protocol_{PROTOCOL}.json"
    path.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
