"""Jobs of the mesh done at once, where nothing is to happen between two of their steps."""

from __future__ import annotations

from collections.abc import Iterator

from ratelimit_sidecar.replication.stream import Stream


def done(job: Iterator[object]) -> None:
    """Do all steps of a job."""
    for _ in job:
        pass


def receive(stream: Stream, raw: bytes, now_us: int) -> None:
    """Let a stream take a frame in and apply it."""
    done(stream.receive_steps(raw, now_us))


def next_frame(stream: Stream, now_us: int) -> bytes | None:
    """The next frame, for which a batch is written if there is nothing else."""
    while True:
        raw = stream.next_frame(now_us)
        if raw is not None or not stream.write(now_us):
            return raw
