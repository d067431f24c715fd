"""Nodes of an older protocol and of this one understand each other: a rolling upgrade goes one node at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pool, message_factory
from replication.builders import flush, key_of
from replication.recording import LATER_US, RECORDED, Party, Recording, listener, read_recording

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.replication.stream import Stream
from simulation.steps import next_frame, receive

RECORDINGS = sorted(RECORDED.glob("protocol_*.json"))


@dataclass
class Replay:
    """A conversation of a node of today with one of then: what it did, and what it said."""

    party: Party
    stream: Stream
    said: list[bytes] = field(default_factory=list)

    def say_all(self, now_us: int) -> None:
        while (raw := next_frame(self.stream, now_us)) is not None:
            self.said.append(raw)


def replay(recording: Recording) -> Replay:
    party = listener()
    replayed = Replay(party, Stream(party, "a", is_dialled=False, wake=lambda: None, now_us=LATER_US))
    for now_us, raw in recording.frames:
        if frames_of_then(recording, [raw])[0].WhichOneof("kind") == "loans":
            # Of a node that shows no membership where it looks for one it would not have asked for any.
            continue
        party.clock_us = now_us
        flush(party, now_us)
        replayed.stream.check_time(now_us)
        replayed.say_all(now_us)
        receive(replayed.stream, raw, now_us)
        replayed.say_all(now_us)
        assert replayed.stream.error is None
    return replayed


def frames_of_then(recording: Recording, said: list[bytes]) -> list[Any]:
    """What was said, as a node with the schema of then reads it."""
    pool = descriptor_pool.DescriptorPool()
    pool.Add(recording.schema)
    frame = message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{recording.schema.package}.Frame"))
    return [frame.FromString(raw) for raw in said]


@pytest.fixture(params=RECORDINGS, ids=lambda path: path.stem)
def recording(request: pytest.FixtureRequest) -> Recording:
    path: Path = request.param
    return read_recording(path)


def test_there_are_recordings() -> None:
    assert RECORDINGS


@pytest.mark.interpreted
def test_all_that_an_older_node_says_is_understood(recording: Recording) -> None:
    party = replay(recording).party
    a = Origin("a", 11)
    ann = party.store.get(key_of("ann"))
    assert ann is not None
    # Five capacities of long ago came as a base, eight tokens since then by their slots.
    assert ann.base.deficit > 0
    assert sum(ann.taken[a].values()) == 8
    for step in range(8):
        bucket = party.store.get(key_of(f"user-{step}"))
        assert bucket is not None
        assert sum(bucket.taken[a].values()) == step + 1
    status = party.peers["a"].status(party.clock_us, 1)
    assert (status.protocol, status.rules_match) == (recording.protocol, None)
    assert status.last_error == "the peer closed the stream: draining: the sidecar is shutting down"


@pytest.mark.interpreted
def test_an_older_node_understands_all_that_it_is_told(recording: Recording) -> None:
    said = frames_of_then(recording, replay(recording).said)
    kinds = [frame.WhichOneof("kind") for frame in said]
    # A frame of a kind that it does not know would be one of no kind, for which it closes the stream.
    assert None not in kinds
    assert {"hello", "ping", "pong", "ack", "deltas"} <= set(kinds)
    buckets = [bucket for frame in said for bucket in frame.deltas.buckets]
    assert all(bucket.key for bucket in buckets)
    assert any(frame.deltas.ends_full_state for frame in said)
