"""Calls that are answered later, on both front ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import pytest
from limiter.requests import OK, OVER_LIMIT, make_request
from limiter.test_waiting import code_of
from server.front_ends import EACH_KIND, running
from server.raw_http2 import GRPC_HEADERS, connected
from services.waiting_service import PATH, REQUEST, WaitingService, until

from ratelimit_sidecar.crdt.waiting import Outcome
from ratelimit_sidecar.server.bounds import MAX_HEADER_BYTES
from ratelimit_sidecar.server.framing import frame
from ratelimit_sidecar.server.front_end import FrontEnd
from ratelimit_sidecar.server.grpc_connection import CALL_BYTES
from ratelimit_sidecar.server.grpc_front_end import GrpcFrontEnd


@pytest.fixture(params=EACH_KIND)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@asynccontextmanager
async def front_end_of(service: WaitingService, kind: str, **bounds: float) -> AsyncIterator[FrontEnd]:
    async with running(kind, service.service.handlers(), **bounds) as front_end:
        yield front_end


def call(channel: grpc.aio.Channel, timeout_s: float = 10) -> grpc.aio.UnaryUnaryCall:
    return channel.unary_unary(PATH)(REQUEST, timeout=timeout_s)


async def test_calls_that_wait_are_answered_when_they_are_served(kind: str) -> None:
    service = WaitingService()
    async with front_end_of(service, kind) as front_end, grpc.aio.insecure_channel(front_end.addresses[0]) as channel:
        calls = [asyncio.ensure_future(call(channel)) for _ in range(3)]
        await service.until_waiting(3)
        service.node.come(3)
        assert [code_of(answer) for answer in await asyncio.gather(*calls)] == [OK] * 3


async def test_a_call_is_answered_when_its_wait_is_over(kind: str) -> None:
    service = WaitingService(wait_ms=5)
    async with front_end_of(service, kind) as front_end, grpc.aio.insecure_channel(front_end.addresses[0]) as channel:
        assert code_of(await call(channel)) == OVER_LIMIT


async def test_a_call_is_answered_before_its_timeout(kind: str) -> None:
    service = WaitingService(wait_ms=1_000)
    async with front_end_of(service, kind) as front_end, grpc.aio.insecure_channel(front_end.addresses[0]) as channel:
        await channel.channel_ready()
        assert code_of(await call(channel, timeout_s=0.4)) == OVER_LIMIT
    assert service.queues.counts[Outcome.EXPIRED] == 1


async def test_a_call_that_is_cancelled_does_not_wait_any_more(kind: str) -> None:
    service = WaitingService()
    async with front_end_of(service, kind) as front_end, grpc.aio.insecure_channel(front_end.addresses[0]) as channel:
        calls = [call(channel), call(channel)]
        await service.until_waiting(2)
        calls[0].cancel()
        await until(lambda: service.queues.counts[Outcome.CANCELLED] == 1)
        service.node.come(1)
        assert code_of(await calls[1]) == OK


async def test_calls_end_with_their_connection(kind: str) -> None:
    service = WaitingService()
    async with front_end_of(service, kind) as front_end:
        async with connected(front_end.addresses[0]) as client:
            for _ in range(5):
                client.send(client.open(PATH), frame(REQUEST))
            await service.until_waiting(5)
            client.vanish()
        await until(lambda: service.queues.counts[Outcome.CANCELLED] == 5)
        if isinstance(front_end, GrpcFrontEnd):
            assert front_end.held_bytes == 0


async def test_at_a_stop_those_that_wait_are_answered(kind: str) -> None:
    service = WaitingService()
    async with front_end_of(service, kind) as front_end, grpc.aio.insecure_channel(front_end.addresses[0]) as channel:
        waiting = call(channel)
        await service.until_waiting(1)
        service.queues.close()
        stopping = asyncio.create_task(front_end.stop())
        service.queues.tick(["b"], 0, 10, 1_000)
        assert code_of(await waiting) == OVER_LIMIT
        await stopping


async def test_a_decision_that_fails_ends_its_call_alone(kind: str) -> None:
    service = WaitingService()
    async with front_end_of(service, kind) as front_end, grpc.aio.insecure_channel(front_end.addresses[0]) as channel:
        calls = [asyncio.ensure_future(call(channel)) for _ in range(2)]
        await service.until_waiting(2)
        [queue] = service.queues.by_key.values()
        assert queue.first is not None
        queue.first.then(_fail)
        service.node.come(2)
        answers = await asyncio.gather(*calls, return_exceptions=True)
        [failed] = [answer for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
        assert failed.code() is grpc.StatusCode.INTERNAL
        assert [code_of(answer) for answer in answers if isinstance(answer, bytes)] == [OK]


async def test_what_a_call_that_waits_holds_is_counted_with_its_message_until_it_is_answered() -> None:
    service = WaitingService()
    longer = make_request({"plan": "gold"}, {"colour": "x" * 2_000})
    async with front_end_of(service, "h2") as front_end, connected(front_end.addresses[0]) as client:
        assert isinstance(front_end, GrpcFrontEnd)
        held = []
        for number, request in enumerate((REQUEST, longer), start=1):
            client.send(client.open(PATH), frame(request))
            await service.until_waiting(number)
            held.append(front_end.held_bytes)
        assert held[0] > CALL_BYTES + len(REQUEST)
        assert held[1] - 2 * held[0] == len(longer) - len(REQUEST)
        service.node.come(2)
        await until(lambda: front_end.held_bytes == 0)


async def test_a_call_that_there_is_no_memory_for_is_decided_at_once(kind: str) -> None:
    service = WaitingService()
    held = 4 * (CALL_BYTES + 1_024)
    async with (
        front_end_of(service, kind, held_bytes=8 * held) as front_end,
        grpc.aio.insecure_channel(front_end.addresses[0]) as channel,
    ):
        calls = [asyncio.ensure_future(call(channel)) for _ in range(10)]
        await until(lambda: service.queues.waiting + sum(each.done() for each in calls) == 10)
        assert 3 <= service.queues.waiting <= 8
        service.node.come(10)
        codes = [code_of(answer) for answer in await asyncio.gather(*calls)]
        assert (
            codes.count(OVER_LIMIT)
            == service.queues.counts[Outcome.CALLED_OFF]
            == 10 - service.queues.counts[Outcome.SERVED]
        )


async def test_headers_count_as_well() -> None:
    service = WaitingService()
    async with front_end_of(service, "h2") as front_end, connected(front_end.addresses[0]) as client:
        assert isinstance(front_end, GrpcFrontEnd)
        stream = client.open(PATH, headers=[*GRPC_HEADERS, *[(b"x-large", b"x" * 1_000)] * (MAX_HEADER_BYTES // 8_000)])
        client.send(stream, frame(REQUEST))
        await service.until_waiting(1)
        assert front_end.held_bytes > MAX_HEADER_BYTES // 8


def _fail(_answer: bytes) -> bytes:
    raise RuntimeError("broken")
