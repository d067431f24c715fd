"""Moves the frames of one stream over one gRPC call, at either end: reads, writes, and keeps its time, until either is
over.

The reader takes the next frame only when the last one has been applied, so gRPC's flow control holds back a peer that
sends faster than this node applies.
"""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Protocol

import grpc
import grpc.aio
import structlog

from ratelimit_sidecar.replication.pace import Steps
from ratelimit_sidecar.replication.scheduler import Scheduler
from ratelimit_sidecar.replication.stream import Stream
from ratelimit_sidecar.replication.v1.replication_pb2 import DESCRIPTOR
from ratelimit_sidecar.replication.wire import MAX_FRAME_BYTES, ProtocolError, Reason

SERVICE = DESCRIPTOR.services_by_name["Replication"].full_name
METHOD = f"/{SERVICE}/Sync"
"""The gRPC method whose calls carry streams."""

MAX_RECEIVED_BYTES: Final = MAX_FRAME_BYTES + 1_024
"""A little above what a session takes, so that the session can say what is wrong; beyond this the C core does. It keeps
so much of a message that is not complete.
"""

OPTIONS = (
    ("grpc.max_receive_message_length", MAX_RECEIVED_BYTES),
    # Frames come as they are: compressed, a small one could unpack to a thousand times as much.
    ("grpc.compression_enabled_algorithms_bitset", 1 << grpc.Compression.NoCompression.value),
    # Sessions notice a dead peer by its silence; this frees the sockets of connections whose other end has vanished.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
)
"""Options of the connection, at either end."""

CHECK_TIME_SECONDS = 0.25

_CALL_IS_OVER = (grpc.aio.AioRpcError, grpc.aio.BaseError, asyncio.InvalidStateError)
"""What reading from or writing to a call raises when the other end, or the connection, has ended it."""

_log = structlog.stdlib.get_logger(__name__)


class Call(Protocol):
    """What `grpc.aio.StreamStreamCall` and `grpc.aio.ServicerContext` have in common, without (de)serializers."""

    async def read(self) -> bytes:
        """The next message, or `grpc.aio.EOF`."""

    async def write(self, message: bytes, /) -> None: ...


async def move_frames(
    call: Call,
    stream: Stream,
    *,
    woken: asyncio.Event,
    scheduler: Scheduler,
    now_us: Callable[[], int],
    on_received: Callable[[], None],
    linger_seconds: float,
    write_seconds: float,
) -> None:
    """Move the frames of a stream until it is over; then the replicator knows that it is.

    Args:
        woken: set by the stream's `wake`.
        scheduler: of all the node's streams.
        on_received: called after each frame received.
        linger_seconds: after the last frame, how long the other end has to hang up first: a call cancelled sooner may
            lose that frame.
        write_seconds: for the network to take one frame. A stream to a peer that does not read for so long is ended.
    """
    try:
        async with asyncio.TaskGroup() as tasks:
            reader = tasks.create_task(_read(call, stream, scheduler, now_us, on_received))
            timer = tasks.create_task(_keep_time(stream, now_us))
            await _write(call, stream, woken, scheduler, now_us, write_seconds=write_seconds)
            timer.cancel()
            if not reader.done():
                await asyncio.wait([reader], timeout=linger_seconds)
            reader.cancel()
    except asyncio.CancelledError as error:
        # It is a local of the task group's frame, which is in its traceback, and so are the stream and what it was to
        # tell; the garbage collection that would find them is practically never run (app.GC_THRESHOLDS).
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        stream.lost("the connection was closed", now_us())


@contextmanager
def _faults_of(stream: Stream, now_us: Callable[[], int]) -> Iterator[None]:
    """A fault of this program in dealing with a stream ends that stream, and no other."""
    try:
        yield
    except Exception:
        _log.exception("stream_failed", address=stream.address, **stream.batch_trace)
        stream.fail(ProtocolError(Reason.INTERNAL, "the node's log says more"), now_us())


async def _read(
    call: Call, stream: Stream, scheduler: Scheduler, now_us: Callable[[], int], on_received: Callable[[], None]
) -> None:
    def receive_steps(frame: bytes) -> Steps:
        with _faults_of(stream, now_us):
            yield from stream.receive_steps(frame, now_us())
        on_received()

    while True:
        try:
            frame = await call.read()
        except grpc.aio.AioRpcError as error:
            stream.lost(f"{error.code().name}: {error.details()}", now_us())
            return
        except _CALL_IS_OVER as error:
            stream.lost(str(error), now_us())
            return
        if frame is grpc.aio.EOF:
            stream.lost("the peer hung up", now_us())
            return
        await scheduler.handle(len(frame), receive_steps(frame))


async def _write(
    call: Call,
    stream: Stream,
    woken: asyncio.Event,
    scheduler: Scheduler,
    now_us: Callable[[], int],
    *,
    write_seconds: float,
) -> None:
    frame: bytes | None = None

    def write_steps() -> Steps:
        nonlocal frame
        with _faults_of(stream, now_us):
            while True:
                frame = stream.next_frame(now_us())
                if frame is not None or stream.is_paused or not stream.write(now_us()):
                    return
                yield

    def go_on() -> None:
        stream.is_paused = False
        woken.set()

    while True:
        woken.clear()
        await scheduler.run(write_steps())
        if frame is not None:
            try:
                async with asyncio.timeout(write_seconds):
                    await call.write(frame)
            except TimeoutError:
                stream.lost(f"the peer has not read for {write_seconds:g} s", now_us())
                return
            except _CALL_IS_OVER:
                # The reader learns why.
                return
            pause_us = stream.take_pause_us()
            if pause_us:
                stream.is_paused = True
                asyncio.get_running_loop().call_later(pause_us / 1e6, go_on)
        elif stream.is_over:
            return
        else:
            await woken.wait()


async def _keep_time(stream: Stream, now_us: Callable[[], int]) -> None:
    while not stream.is_over:
        await asyncio.sleep(CHECK_TIME_SECONDS)
        stream.check_time(now_us())
