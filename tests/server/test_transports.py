"""Both front ends over every transport: TCP, unix sockets and TLS."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from server.front_ends import ECHO, KINDS, Tls, channel_to, running
from server.raw_http2 import RawClient, connected

from ratelimit_sidecar.server.framing import frame
from ratelimit_sidecar.server.front_end import FrontEnd
from ratelimit_sidecar.server.grpc_front_end import GrpcFrontEnd
from ratelimit_sidecar.server.rpc import Code

PATH = "/test.Echo/Echo"
WITHIN_S = 30


@dataclass
class Served:
    front_end: FrontEnd
    tls: Tls | None

    def raw(self) -> contextlib.AbstractAsyncContextManager[RawClient]:
        return connected(self.front_end.addresses[0], self.tls and self.tls.context(check_hostname=False))

    async def answers_others(self) -> bool:
        async with channel_to(self.front_end.addresses[0], self.tls) as channel:
            return await channel.unary_unary(PATH)(b"hello", timeout=WITHIN_S) == b"hello"


@pytest.fixture(params=[f"{kind}-{transport}" for kind in KINDS for transport in ("tcp", "unix", "tls")])
async def served(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Served]:
    kind, _, transport = request.param.partition("-")
    tls = Tls(tmp_path / "tls") if transport == "tls" else None
    address = f"unix:{tmp_path}/rls.sock" if transport == "unix" else "127.0.0.1:0"
    async with running(kind, ECHO, [address], certificate=tls and tls.certificate) as front_end:
        yield Served(front_end, tls)


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(b"\0\0\x04\x08\0\0\0\0\0\0\0\0\0", id="a window that does not grow"),
        pytest.param(b"\0\0\x05\x04\0\0\0\0\0abcde", id="settings of a size that they cannot have"),
        pytest.param(b"\0\0\x03\x01\x05\0\0\0\x01\xff\xff\xff", id="headers that cannot be decompressed"),
        pytest.param(b"\xff\xff\xff\0\0\0\0\0\x01", id="a frame above the limit"),
    ],
)
async def test_who_breaks_http_2_is_disconnected_and_harms_nobody(served: Served, broken: bytes) -> None:
    async with served.raw() as client:
        assert (await client.call(PATH, frame(b"hello"))).code == Code.OK
        client.write(broken)
        await asyncio.wait_for(client.gone.wait(), WITHIN_S)
    assert await served.answers_others()


async def test_a_call_that_breaks_grpc_gets_its_status_and_the_connection_lives(served: Served) -> None:
    async with served.raw() as client:
        assert (await client.call("/test.Echo/Nothing", frame(b"hello"))).code == Code.UNIMPLEMENTED
        if isinstance(served.front_end, GrpcFrontEnd):
            # The C core never answers these.
            assert (await client.call(PATH, frame(b"hello")[:-1])).code == Code.INTERNAL
            assert (await client.call(PATH, b"")).code == Code.UNIMPLEMENTED
        assert (await client.call(PATH, frame(b"hello"))).code == Code.OK


async def test_a_stop_answers_calls_in_flight_and_hangs_up_afterwards(served: Served) -> None:
    async with served.raw() as client:
        stream = client.open(PATH)
        client.send(stream, frame(b"half")[:7], end=False)
        await client.ping()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(served.front_end.stop())
            await asyncio.wait_for(client.told_to_go.wait(), WITHIN_S)
            client.send(stream, frame(b"half")[7:])
            answer = await client.answer(stream)
        await asyncio.wait_for(client.gone.wait(), WITHIN_S)
    assert (answer.body, answer.code) == (frame(b"half"), Code.OK)
