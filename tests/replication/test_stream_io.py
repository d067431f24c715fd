"""One stream over one call, whatever the call does."""

from __future__ import annotations

import asyncio
from itertools import count

from replication.builders import NOW_US, frame, kind_of, node, store_of, take
from replication.meshes import TIMEOUT_SECONDS

from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.replication.outbox import WHOLE_BATCH_BUCKETS
from ratelimit_sidecar.replication.pace import PIECE_WORK
from ratelimit_sidecar.replication.replicator import Replicator
from ratelimit_sidecar.replication.scheduler import LEAST_QUANTUM_NS, Scheduler
from ratelimit_sidecar.replication.stream import Stream
from ratelimit_sidecar.replication.stream_io import Call, move_frames
from ratelimit_sidecar.replication.v1 import replication_pb2 as pb

A = node("a")


class Silent:
    """A call whose other end neither writes nor reads."""

    async def read(self) -> bytes:
        await asyncio.Event().wait()
        raise AssertionError

    async def write(self, _message: bytes, /) -> None:
        await asyncio.Event().wait()


class Pinged:
    """A call whose other end says who it is, pings, and then says nothing more; each step uses up a quantum."""

    def __init__(self) -> None:
        self._looks = count()
        self.scheduler = Scheduler(lambda: next(self._looks) * LEAST_QUANTUM_NS)
        self._said = [
            frame(hello=pb.Hello(protocol=2, node="b", region="eu", incarnation=1)),
            frame(ping=pb.Ping(id=1)),
        ]
        self._pinged_at = 0
        self.looks_until_pong: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        """At the clock, from the ping on: a step takes two."""

    async def read(self) -> bytes:
        if self._said:
            self._pinged_at = next(self._looks)
            return self._said.pop(0)
        await asyncio.Event().wait()
        raise AssertionError

    async def write(self, message: bytes, /) -> None:
        if kind_of(message) == "pong":
            self.looks_until_pong.set_result(next(self._looks) - self._pinged_at)


async def stream_over(call: Call, store: Store, scheduler: Scheduler, write_seconds: float = 5.0) -> Stream:
    """For the session no time passes, so it misses nothing."""
    woken = asyncio.Event()
    stream = Stream(Replicator(A, store, NOW_US), "10.0.0.1:1", is_dialled=True, wake=woken.set, now_us=NOW_US)
    await move_frames(
        call,
        stream,
        woken=woken,
        scheduler=scheduler,
        now_us=lambda: NOW_US,
        on_received=lambda: None,
        linger_seconds=0.0,
        write_seconds=write_seconds,
    )
    return stream


async def test_a_peer_that_does_not_read_is_given_up() -> None:
    async with asyncio.timeout(TIMEOUT_SECONDS):
        stream = await stream_over(Silent(), store_of(A), Scheduler(), write_seconds=0.01)
    assert stream.is_over
    assert stream.why_ended == "the peer has not read for 0.01 s"


async def test_a_pong_does_not_wait_for_a_batch_to_be_written() -> None:
    store, call = store_of(A), Pinged()
    for number in range(WHOLE_BATCH_BUCKETS):
        take(store, f"user {number}", 1, NOW_US)
    moving = asyncio.create_task(stream_over(call, store, call.scheduler))
    async with asyncio.timeout(TIMEOUT_SECONDS):
        assert await call.looks_until_pong < WHOLE_BATCH_BUCKETS // PIECE_WORK
    moving.cancel()
    await asyncio.wait([moving])
