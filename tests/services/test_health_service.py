import asyncio
from contextlib import aclosing

import grpc
import grpc.aio
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse, HealthListResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from server.front_ends import EACH_KIND, channel_to, running
from server.work_clock import PerTurn, WorkClock

from ratelimit_sidecar.server.rpc import Code, RpcError
from ratelimit_sidecar.services.health import HealthService
from ratelimit_sidecar.services.ratelimit import SERVICE_NAME


def check(health: HealthService, service: str) -> HealthCheckResponse:
    return HealthCheckResponse.FromString(health.check(HealthCheckRequest(service=service).SerializeToString(), ()))


@pytest.mark.parametrize("service", ["", SERVICE_NAME])
def test_a_known_service_is_serving_while_the_sidecar_is(service: str) -> None:
    serving = False
    health = HealthService(lambda: serving, [SERVICE_NAME])
    assert check(health, service).status == HealthCheckResponse.NOT_SERVING
    serving = True
    assert check(health, service).status == HealthCheckResponse.SERVING
    serving = False
    assert check(health, service).status == HealthCheckResponse.NOT_SERVING


def test_an_unknown_service_is_not_found() -> None:
    with pytest.raises(RpcError, match=r"unknown service envoy\.Nothing") as caught:
        check(HealthService(lambda: True, [SERVICE_NAME]), "envoy.Nothing")
    assert caught.value.code == Code.NOT_FOUND


def test_something_else_than_a_request_is_an_invalid_argument() -> None:
    with pytest.raises(RpcError, match=r"not a grpc\.health\.v1\.HealthCheckRequest") as caught:
        HealthService(lambda: True, []).check(b"\xff", ())
    assert caught.value.code == Code.INVALID_ARGUMENT


def test_all_known_services_are_listed_with_their_state() -> None:
    health = HealthService(lambda: False, [SERVICE_NAME])
    listed = HealthListResponse.FromString(health.list(b"", ()))
    assert {name: answer.status for name, answer in listed.statuses.items()} == {
        "": HealthCheckResponse.NOT_SERVING,
        SERVICE_NAME: HealthCheckResponse.NOT_SERVING,
    }


class Watch:
    """A call of Watch by gRPC's own stub."""

    def __init__(self, channel: grpc.aio.Channel, service: str) -> None:
        self.call = HealthStub(channel).Watch(HealthCheckRequest(service=service), timeout=10)

    async def next(self) -> int:
        return (await self.call.read()).status


@pytest.fixture(params=EACH_KIND)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("service", ["", SERVICE_NAME])
async def test_who_watches_is_told_the_state_and_each_change(kind: str, service: str) -> None:
    serving = False
    health = HealthService(lambda: serving, [SERVICE_NAME])
    async with running(kind, health.handlers()) as front_end, channel_to(front_end.addresses[0]) as channel:
        watches = [Watch(channel, service) for _ in range(3)]
        assert [await watch.next() for watch in watches] == [HealthCheckResponse.NOT_SERVING] * 3
        serving = True
        health.changed()
        assert [await watch.next() for watch in watches] == [HealthCheckResponse.SERVING] * 3
        # No change of the state.
        health.changed()
        await asyncio.sleep(0)
        serving = False
        health.changed()
        assert [await watch.next() for watch in watches] == [HealthCheckResponse.NOT_SERVING] * 3


async def test_a_change_while_the_client_takes_the_last_one_is_not_missed() -> None:
    serving = False
    health = HealthService(lambda: serving, [])

    async def requests():
        yield HealthCheckRequest().SerializeToString()

    async with aclosing(health.watch(requests(), ())) as answers:
        assert HealthCheckResponse.FromString(await anext(answers)).status == HealthCheckResponse.NOT_SERVING
        serving = True
        health.changed()
        assert HealthCheckResponse.FromString(await anext(answers)).status == HealthCheckResponse.SERVING


async def test_a_few_of_many_who_watch_are_told_of_a_change_in_each_turn_of_the_loop() -> None:
    serving, told = False, 0
    clock = WorkClock()
    health = HealthService(lambda: serving, [], clock.turns)

    async def requests():
        yield HealthCheckRequest().SerializeToString()

    async def watch() -> None:
        nonlocal told
        async for _ in health.watch(requests(), ()):
            told += 1
            clock.work(1 / 4)

    watching = [asyncio.create_task(watch()) for _ in range(200)]
    await asyncio.sleep(0)
    assert told == 200
    serving = True
    health.changed()
    async with PerTurn(lambda: told) as per_turn:
        while told < 400:  # noqa: ASYNC110 (it counts turns of the loop)
            await asyncio.sleep(0)
    assert per_turn.most <= 4
    # One is not told twice, though there is another change amid the telling.
    health.changed()
    serving = False
    health.changed()
    while told < 600:  # noqa: ASYNC110 (it counts turns of the loop)
        await asyncio.sleep(0)
    for task in watching:
        task.cancel()
    await asyncio.wait(watching)
    assert told == 600


async def test_who_watches_an_unknown_service_is_told_so_and_kept(kind: str) -> None:
    health = HealthService(lambda: True, [SERVICE_NAME])
    async with running(kind, health.handlers()) as front_end, channel_to(front_end.addresses[0]) as channel:
        watch = Watch(channel, "envoy.Nothing")
        assert await watch.next() == HealthCheckResponse.SERVICE_UNKNOWN
        health.changed()
        # Another that was asked later is answered, and the first one has still no second answer.
        assert await Watch(channel, "").next() == HealthCheckResponse.SERVING
        second = asyncio.create_task(watch.next())
        await asyncio.sleep(0.05)
        assert not second.done()
        watch.call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second


@pytest.mark.parametrize(
    ("messages", "code"), [([], grpc.StatusCode.UNIMPLEMENTED), ([b"\xff"], grpc.StatusCode.INVALID_ARGUMENT)]
)
async def test_who_watches_without_a_request_is_refused(
    kind: str, messages: list[bytes], code: grpc.StatusCode
) -> None:
    health = HealthService(lambda: True, [])
    async with running(kind, health.handlers()) as front_end, channel_to(front_end.addresses[0]) as channel:
        call = channel.stream_stream("/grpc.health.v1.Health/Watch")(iter(messages), timeout=10)
        assert await call.code() == code
