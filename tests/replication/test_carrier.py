"""One stream over one call, whatever the call does."""

from __future__ import annotations

import asyncio

import pytest
from replication.builders import NOW_US, node, store_of
from replication.meshes import TIMEOUT_SECONDS

from ratelimit_sidecar.replication import carrier
from ratelimit_sidecar.replication.carrier import carry
from ratelimit_sidecar.replication.replicator import Replicator, Stream
from ratelimit_sidecar.replication.turns import Turns


class Silent:
    """A call whose other end neither writes nor reads."""

    async def read(self) -> bytes:
        await asyncio.Event().wait()
        raise AssertionError

    async def write(self, _message: bytes, /) -> None:
        await asyncio.Event().wait()


async def test_a_peer_that_does_not_read_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carrier, "WRITE_SECONDS", 0.01)
    local, woken = node("a"), asyncio.Event()
    replicator = Replicator(local, store_of(local), NOW_US)
    stream = Stream(replicator, "10.0.0.1:1", is_dialled=True, wake=woken.set, now_us=NOW_US)
    async with asyncio.timeout(TIMEOUT_SECONDS):
        await carry(
            Silent(),
            stream,
            woken=woken,
            turns=Turns(),
            # For the session no time passes, so it misses nothing.
            now_us=lambda: NOW_US,
            on_heard=lambda: None,
            linger_seconds=0.0,
        )
    assert stream.is_over
    assert stream.why_ended == "the peer has not read for 0.01 s"
