"""Finds out what two nodes hold differently, and moves only that. Sans-I/O; frames as in `replication.proto`.

Deltas tell a peer what changes. What it has missed all the same (it had no room for the bucket, or no rule; the way to
a third node was cut for a while) is found by comparing, as Dynamo's replicas do (DeCandia et al. 2007, section 4.7),
with one level of ranges instead of a tree: a few thousand sums are few enough to send.

Every few seconds each node sums up what it holds, once for all its peers (`rounds`). Then the node with the lower id
sends its sums, a *digest*. Where they differ the other one names its buckets (a *summary*), and both *repair*: the
first sends what it holds of those that differ, and asks for the rest (a *pull*). A bucket that changed meanwhile is
left alone: its next delta says how much it holds.

A node that has no memory left for what others took compares with nobody: what it refuses would differ each time.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.replication.deltas import MAX_TIME_US
from ratelimit_sidecar.replication.pace import Steps
from ratelimit_sidecar.replication.peer import Peer
from ratelimit_sidecar.replication.rounds import (
    LOOK_WORK,
    PARTITION_RANGES,
    PARTITIONS,
    RANGES,
    Round,
    Summing,
    Work,
)
from ratelimit_sidecar.replication.v1 import replication_pb2 as pb
from ratelimit_sidecar.replication.wire import ProtocolError, Reason

MAX_PULL_KEYS: Final = 4_096
"""The most keys in one Pull."""

MAX_EXCHANGED = 16_384
"""The most buckets that are sent, and as many that are asked for, because of one round: some 2 MB. Later rounds find
the rest."""

TELL_WORK: Final = 10
"""The work, in units of `rounds`, to repair a bucket or find out that it is to be asked for."""


class Exchange:
    """The comparisons with the peer of one stream. Call `note_round` after each round, `receive_steps` for each frame
    of a comparison, and send what `take_frame` returns.

    Args:
        leads: True at the node with the lower id.
    """

    def __init__(self, summing: Summing, store: Store, peer: Peer, *, leads: bool) -> None:
        self._summing = summing
        self._store = store
        self._peer = peer
        self._leads = leads
        self._own: Round | None = None
        """The round whose Digest is yet to be sent."""
        self._theirs: pb.Digest | None = None
        """A Digest that came before this node's own round was done."""
        self._differing: dict[int, None] = {}
        """Ranges whose Summary is yet to be sent, of the round `_differing_us`: the newest the peer has a Digest of."""
        self._differing_us = 0
        self._summarised: set[int] = set()
        """Ranges whose Summary has come in answer to the Digest of `_summarised_us`."""
        self._summarised_us = 0
        self._pulls: deque[pb.Pull] = deque()
        self._exchanged_us = 0
        self._repaired = self._pulled = 0
        """Buckets, because of the round `_exchanged_us`."""

    def note_round(self, own: Round) -> None:
        """This node has done a round."""
        if not self._store.journal.has_room_for_all:
            return
        if self._leads:
            self._own = own
        elif self._theirs is not None and self._theirs.at_us == own.at_us:
            self._compare(self._theirs, own)
            self._theirs = None

    def take_frame(self) -> pb.Frame | None:
        """The next frame to be sent; None when there is none."""
        if self._own is not None:
            own, self._own = self._own, None
            self._summarised_us = own.at_us
            self._summarised.clear()
            partitions = sorted(own.partitions)
            digest = pb.Digest(at_us=own.at_us, segments=partitions)
            for partition in partitions:
                digest.sums.extend(own.sums_of(partition))
            return pb.Frame(digest=digest)
        while self._differing:
            number = next(iter(self._differing))
            del self._differing[number]
            done = self._summing.find(self._differing_us)
            if done is None:
                self._differing.clear()
                break
            buckets = done.buckets(number)
            if buckets.is_crowded:
                continue
            summary = pb.Summary(at_us=done.at_us, range=number, keys=buckets.hashes, states=buckets.states)
            return pb.Frame(summary=summary)
        return pb.Frame(pull=self._pulls.popleft()) if self._pulls else None

    def receive_steps(self, frame: pb.Digest | pb.Summary | pb.Pull) -> Steps:
        """Receive a frame and answer it, in steps: buckets that differ are repaired or asked for, and counted as the
        peer's resyncs.

        Raises:
            ProtocolError: bad_digest.
        """
        if frame.at_us > MAX_TIME_US:
            raise ProtocolError(Reason.BAD_DIGEST, "an instant past MAX_TIME_US")
        if isinstance(frame, pb.Digest):
            self._receive_digest(frame)
            return
        if frame.range >= RANGES:
            raise ProtocolError(Reason.BAD_DIGEST, f"range {frame.range} of {RANGES}")
        own = self._summing.find(frame.at_us)
        if isinstance(frame, pb.Pull) and len(frame.keys) > MAX_PULL_KEYS:
            raise ProtocolError(Reason.BAD_DIGEST, f"{len(frame.keys)} keys in a Pull; {MAX_PULL_KEYS} are taken")
        if own is not None and own.at_us > self._exchanged_us:
            self._exchanged_us = own.at_us
            self._repaired = self._pulled = 0
        if isinstance(frame, pb.Pull):
            if own is not None:
                yield from self._answer_pull_steps(frame, own)
            return
        if len(frame.keys) != len(frame.states):
            raise ProtocolError(Reason.BAD_DIGEST, f"{len(frame.keys)} keys with {len(frame.states)} states")
        if own is None or frame.at_us != self._summarised_us or frame.range in self._summarised:
            # A Summary of a round that is over.
            return
        self._summarised.add(frame.range)
        yield from self._answer_summary_steps(frame, own)

    def _receive_digest(self, digest: pb.Digest) -> None:
        partitions = digest.segments
        if len(set(partitions)) < len(partitions) or any(partition >= PARTITIONS for partition in partitions):
            raise ProtocolError(Reason.BAD_DIGEST, "a partition twice, or one that there is not")
        if len(digest.sums) != len(partitions) * PARTITION_RANGES:
            raise ProtocolError(Reason.BAD_DIGEST, f"{len(digest.sums)} sums of {len(partitions)} partitions")
        if digest.at_us <= self._differing_us or not self._store.journal.has_room_for_all:
            # Each is answered once.
            return
        own = self._summing.find(digest.at_us)
        if own is None:
            self._theirs = digest
        else:
            self._compare(digest, own)

    def _compare(self, theirs: pb.Digest, own: Round) -> None:
        self._differing.clear()
        self._differing_us = own.at_us
        their_sums = list(theirs.sums)
        for index, partition in enumerate(theirs.segments):
            theirs_of_partition = their_sums[index * PARTITION_RANGES : (index + 1) * PARTITION_RANGES]
            if partition not in own.partitions or theirs_of_partition == own.sums_of(partition):
                continue
            first = partition * PARTITION_RANGES
            for number, their_sum in enumerate(theirs_of_partition, first):
                if their_sum != own.sums[number]:
                    self._differing[number] = None

    def _answer_summary_steps(self, summary: pb.Summary, own: Round) -> Steps:
        theirs = dict(zip(summary.keys, summary.states, strict=True))
        pulled = []
        buckets = own.buckets(summary.range)
        if buckets.is_crowded:
            return
        work = Work()
        for key, hashed, state in zip(buckets.keys, buckets.hashes, buckets.states, strict=True):
            their_state = theirs.pop(hashed, None)
            if work.ends_piece(LOOK_WORK):
                yield
            if their_state == state or (their_state is None and self._peer.reported.is_full):
                continue
            bucket = self._store.get(key)
            if bucket is None:
                continue
            # If it has changed since, its next delta says how much it holds.
            if (yield from self._summing.state_steps(bucket, own.at_us, work)) == state:
                if work.ends_piece(TELL_WORK):
                    yield
                self._repair(key)
                if their_state is not None:
                    pulled.append(hashed)
        if self._store.full_since_us is None:
            # What this node has no settled state of.
            pulled += theirs
        pulled = pulled[: MAX_EXCHANGED - self._pulled]
        self._pulled += len(pulled)
        for start in range(0, len(pulled), MAX_PULL_KEYS):
            keys = pulled[start : start + MAX_PULL_KEYS]
            self._pulls.append(pb.Pull(at_us=own.at_us, range=summary.range, keys=keys))
        self._peer.counts.resyncs += sum(hashed in theirs for hashed in pulled)

    def _answer_pull_steps(self, pull: pb.Pull, own: Round) -> Steps:
        buckets = own.buckets(pull.range)
        if buckets.is_crowded:
            return
        keys = dict(zip(buckets.hashes, buckets.keys, strict=True))
        work = Work()
        for hashed in pull.keys:
            if hashed in keys:
                self._repair(keys[hashed])
            if work.ends_piece(TELL_WORK):
                yield

    def _repair(self, key: bytes) -> None:
        if self._repaired < MAX_EXCHANGED:
            self._repaired += 1
            self._peer.counts.resyncs += 1
            self._peer.outbox.repair(key)
