"""What a client sees of RateLimitService and Health, the same on every front end, over TCP, unix sockets and TLS.

The clock is the test's own, so that remaining tokens and reset times are exact.
"""

from __future__ import annotations

import asyncio
import contextlib
import warnings
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import grpc
import grpc.aio
import grpclib.client
import pytest
from google.protobuf.wrappers_pb2 import UInt64Value
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from observed import NoTelemetry
from server.front_ends import Tls, channel_to, independent_channel_to, running

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.limit import TokenBucketLimit
from ratelimit_sidecar.envoy_api.envoy.extensions.common.ratelimit.v3.ratelimit_pb2 import RateLimitDescriptor
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2 import RateLimitRequest, RateLimitResponse
from ratelimit_sidecar.envoy_api.envoy.service.ratelimit.v3.rls_pb2_grpc import RateLimitServiceStub
from ratelimit_sidecar.limiter.limiter import Limiter
from ratelimit_sidecar.limiter.rules import Rule, RuleNode, Rules, Unit
from ratelimit_sidecar.server.bounds import MAX_MESSAGE_BYTES
from ratelimit_sidecar.server.front_end import FrontEnd
from ratelimit_sidecar.services.health import HealthService
from ratelimit_sidecar.services.ratelimit import SERVICE_NAME, RateLimitService
from ratelimit_sidecar.telemetry.latency import LatencyHistogram

with warnings.catch_warnings():
    # It uses what pydantic will remove in its next major version.
    warnings.simplefilter("ignore")
    from envoy_data_plane.envoy.extensions.common.ratelimit import v3 as typed_ratelimit
    from envoy_data_plane.envoy.service.ratelimit import v3 as typed_rls

OK = RateLimitResponse.OK
OVER_LIMIT = RateLimitResponse.OVER_LIMIT
SHOULD_RATE_LIMIT = f"/{SERVICE_NAME}/ShouldRateLimit"

TWENTY_A_MINUTE = Rule("shop.user", TokenBucketLimit(20, 60_000_000, 20), 20, Unit.MINUTE)
THREE_AN_HOUR = Rule("shop.user_eve", TokenBucketLimit(3, 3_600_000_000, 3), 3, Unit.HOUR)
UNLIMITED = Rule("shop.user_root", None)
BUCKET = Rule("shop.plan.user", TokenBucketLimit(10, 1_000_000, 1_000), 1_000)

RULES = Rules(
    {
        "shop": RuleNode(
            exact={("user", "eve"): RuleNode(THREE_AN_HOUR), ("user", "root"): RuleNode(UNLIMITED)},
            key_only={
                "user": RuleNode(TWENTY_A_MINUTE),
                "plan": RuleNode(key_only={"user": RuleNode(BUCKET)}),
            },
        )
    }
)


@dataclass
class Sidecar:
    """A limiter with its services behind one front end, and a client of it."""

    front_end: FrontEnd
    limiter: Limiter
    channel: grpc.aio.Channel
    tls: Tls | None
    now_us: int = 1_700_000_000_000_000
    serving: bool = True

    @property
    def address(self) -> str:
        return self.front_end.addresses[0]

    async def ask(self, *descriptors: RateLimitDescriptor, domain: str = "shop", hits: int = 0) -> RateLimitResponse:
        request = RateLimitRequest(domain=domain, descriptors=descriptors, hits_addend=hits)
        return await RateLimitServiceStub(self.channel).ShouldRateLimit(request, timeout=5)

    async def ask_raw(self, request: bytes, path: str = SHOULD_RATE_LIMIT) -> bytes:
        return await self.channel.unary_unary(path)(request, timeout=5)

    async def health(self, service: str) -> HealthCheckResponse.ServingStatus:
        return (await HealthStub(self.channel).Check(HealthCheckRequest(service=service), timeout=5)).status


@pytest.fixture(
    params=[
        *("h2-tcp", "h2-unix", "h2-tls", "grpcio-tcp"),
        *(pytest.param(f"grpcio-{transport}", marks=pytest.mark.thorough) for transport in ("unix", "tls")),
    ]
)
async def sidecar(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Sidecar]:
    async with sidecar_on(request.param, tmp_path) as running_sidecar:
        yield running_sidecar


@contextlib.asynccontextmanager
async def sidecar_on(where: str, tmp_path: Path) -> AsyncIterator[Sidecar]:
    kind, _, transport = where.partition("-")
    address = f"unix:{tmp_path}/rls.sock" if transport == "unix" else "127.0.0.1:0"
    tls = Tls(tmp_path / "tls") if transport == "tls" else None
    limiter = Limiter(RULES, Origin("node", 1))
    rate_limit = RateLimitService(limiter, lambda: sidecar.now_us, LatencyHistogram(), NoTelemetry())
    health = HealthService(lambda: sidecar.serving, [SERVICE_NAME])
    handlers = {**rate_limit.handlers(), **health.handlers()}
    async with (
        running(kind, handlers, [address], certificate=tls and tls.certificate) as front_end,
        channel_to(front_end.addresses[0], tls) as channel,
    ):
        sidecar = Sidecar(front_end, limiter, channel, tls)
        yield sidecar


def descriptor(*entries: tuple[str, str], hits: int | None = None) -> RateLimitDescriptor:
    return RateLimitDescriptor(
        entries=[RateLimitDescriptor.Entry(key=key, value=value) for key, value in entries],
        hits_addend=None if hits is None else UInt64Value(value=hits),
    )


def user(name: str, hits: int | None = None) -> RateLimitDescriptor:
    return descriptor(("user", name), hits=hits)


@contextlib.contextmanager
def refused(code: grpc.StatusCode, text: str = "") -> Iterator[None]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        yield
    assert caught.value.code() == code
    assert text in caught.value.details()


async def test_a_limit_is_admitted_up_to_its_capacity_and_then_denied(sidecar: Sidecar) -> None:
    codes = [(await sidecar.ask(user("ada"))).overall_code for _ in range(22)]
    assert codes == [OK] * 20 + [OVER_LIMIT] * 2
    assert (await sidecar.ask(user("bob"))).overall_code == OK


async def test_a_denied_caller_is_admitted_again_when_the_bucket_has_refilled(sidecar: Sidecar) -> None:
    await sidecar.ask(user("ada"), hits=20)
    assert (await sidecar.ask(user("ada"))).overall_code == OVER_LIMIT
    sidecar.now_us += 3_000_000
    assert (await sidecar.ask(user("ada"))).overall_code == OK
    assert (await sidecar.ask(user("ada"))).overall_code == OVER_LIMIT


async def test_each_descriptor_has_its_status_in_order(sidecar: Sidecar) -> None:
    await sidecar.ask(user("eve"), hits=3)
    answer = await sidecar.ask(user("ada"), user("eve"), descriptor(("unknown", "x")), user("root"))
    assert [status.code for status in answer.statuses] == [OK, OVER_LIMIT, OK, OK]
    assert answer.overall_code == OVER_LIMIT
    assert [status.limit_remaining for status in answer.statuses] == [19, 0, 0, 2**32 - 1]


async def test_a_status_tells_the_limit_what_is_left_and_when_it_is_full(sidecar: Sidecar) -> None:
    (status,) = (await sidecar.ask(user("ada"), hits=5)).statuses
    assert status.current_limit.requests_per_unit == 20
    assert status.current_limit.unit == RateLimitResponse.RateLimit.MINUTE
    assert status.limit_remaining == 15
    assert status.duration_until_reset.ToTimedelta() == timedelta(seconds=15)
    sidecar.now_us += 1_500_000
    (status,) = (await sidecar.ask(user("ada", hits=0))).statuses
    assert status.limit_remaining == 15
    assert status.duration_until_reset.ToTimedelta() == timedelta(seconds=14)


async def test_a_bucket_has_no_unit_of_envoys(sidecar: Sidecar) -> None:
    (status,) = (await sidecar.ask(descriptor(("plan", "gold"), ("user", "ada")), hits=1_000)).statuses
    assert status.current_limit.requests_per_unit == 1_000
    assert status.current_limit.unit == RateLimitResponse.RateLimit.UNKNOWN
    assert status.duration_until_reset.ToTimedelta() == timedelta(seconds=100)


async def test_what_no_rule_matches_is_ok_without_a_limit(sidecar: Sidecar) -> None:
    for answer in (await sidecar.ask(descriptor(("plan", "gold"))), await sidecar.ask(user("ada"), domain="elsewhere")):
        assert answer.overall_code == OK
        assert [status.code for status in answer.statuses] == [OK]
        assert not answer.statuses[0].HasField("current_limit")
        assert not answer.statuses[0].HasField("duration_until_reset")


async def test_hits_of_the_request_count_for_every_descriptor(sidecar: Sidecar) -> None:
    answer = await sidecar.ask(user("ada"), user("bob"), hits=7)
    assert [status.limit_remaining for status in answer.statuses] == [13, 13]


async def test_hits_of_a_descriptor_override_those_of_the_request(sidecar: Sidecar) -> None:
    answer = await sidecar.ask(user("ada"), user("bob", hits=2), user("cyd", hits=0), hits=7)
    assert [status.limit_remaining for status in answer.statuses] == [13, 18, 20]


async def test_no_hits_check_without_charging(sidecar: Sidecar) -> None:
    await sidecar.ask(user("eve"), hits=3)
    for _ in range(3):
        answer = await sidecar.ask(user("eve", hits=0))
        assert (answer.overall_code, answer.statuses[0].limit_remaining) == (OK, 0)
    assert (await sidecar.ask(user("eve"))).overall_code == OVER_LIMIT


async def test_an_empty_domain_is_an_invalid_argument(sidecar: Sidecar) -> None:
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "domain must not be empty"):
        await sidecar.ask(user("ada"), domain="")


async def test_no_descriptors_are_an_invalid_argument(sidecar: Sidecar) -> None:
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "descriptor list must not be empty"):
        await sidecar.ask()


async def test_header_values_that_are_no_utf8_are_limited_like_others(sidecar: Sidecar) -> None:
    eve = user("caf\\\\").SerializeToString().replace(b"\\\\", b"\xe9\xff")
    raw = RateLimitRequest(domain="shop").SerializeToString() + b"\x12" + bytes((len(eve),)) + eve
    answers = [RateLimitResponse.FromString(await sidecar.ask_raw(raw)) for _ in range(21)]
    assert [answer.overall_code for answer in answers] == [OK] * 20 + [OVER_LIMIT]


async def test_malformed_bytes_are_an_invalid_argument_and_harm_nobody(sidecar: Sidecar) -> None:
    with refused(grpc.StatusCode.INVALID_ARGUMENT, "not an envoy.service.ratelimit.v3.RateLimitRequest"):
        await sidecar.ask_raw(b"\xff\xff\xff")
    assert (await sidecar.ask(user("ada"))).overall_code == OK


async def test_values_as_long_as_envoy_takes_headers_are_answered_and_what_is_larger_is_refused(
    sidecar: Sidecar,
) -> None:
    # Envoy's default for all headers of a request is 60 KiB, and each of its descriptors may carry them.
    long = user("x" * 60 * 1_024)
    assert [status.code for status in (await sidecar.ask(*[long] * 10)).statuses] == [OK] * 10
    assert (await sidecar.ask(user("x" * (MAX_MESSAGE_BYTES - 100)))).statuses[0].limit_remaining == 19
    with refused(grpc.StatusCode.RESOURCE_EXHAUSTED):
        await sidecar.ask(user("x" * MAX_MESSAGE_BYTES))
    assert (await sidecar.ask(user("ada"))).overall_code == OK


@pytest.mark.parametrize("path", [f"/{SERVICE_NAME}/ShouldNot", "/envoy.Nothing/Call", "/grpc.health.v1.Health/No"])
async def test_an_unknown_method_is_unimplemented(sidecar: Sidecar, path: str) -> None:
    with refused(grpc.StatusCode.UNIMPLEMENTED):
        await sidecar.ask_raw(b"", path)


async def test_health_follows_the_sidecar(sidecar: Sidecar) -> None:
    for service in ("", SERVICE_NAME):
        assert await sidecar.health(service) == HealthCheckResponse.SERVING
    sidecar.serving = False
    for service in ("", SERVICE_NAME):
        assert await sidecar.health(service) == HealthCheckResponse.NOT_SERVING
    with refused(grpc.StatusCode.NOT_FOUND, "unknown service envoy.Nothing"):
        await sidecar.health("envoy.Nothing")


async def test_concurrent_callers_share_the_limit_exactly(sidecar: Sidecar) -> None:
    answers = await asyncio.gather(*(sidecar.ask(user("ada")) for _ in range(200)))
    admitted = [answer.statuses[0].limit_remaining for answer in answers if answer.overall_code == OK]
    assert sorted(admitted) == list(range(20))


async def test_every_call_that_was_charged_is_answered_through_a_stop(sidecar: Sidecar) -> None:
    async def ask() -> bool:
        with contextlib.suppress(grpc.aio.AioRpcError):
            await sidecar.ask(descriptor(("plan", "gold"), ("user", "ada")))
            answered.set()
            return True
        return False

    answered = asyncio.Event()
    calls = [asyncio.create_task(ask()) for _ in range(300)]
    await asyncio.wait_for(answered.wait(), 5)
    await sidecar.front_end.stop()
    answers = await asyncio.gather(*calls)
    assert sum(answers) == sidecar.limiter.counts["shop", BUCKET.name].ok >= 1
    assert not sidecar.front_end.ready.is_set()


async def test_an_independent_client_with_types_of_its_own_is_served(sidecar: Sidecar) -> None:
    eve = typed_ratelimit.RateLimitDescriptor(
        entries=[typed_ratelimit.RateLimitDescriptorEntry(key="user", value="eve")]
    )
    request = typed_rls.RateLimitRequest(domain="shop", descriptors=[eve])
    async with independent_channel_to(sidecar.address, sidecar.tls) as channel:
        stub = typed_rls.RateLimitServiceAsyncStub(channel, timeout=5)
        answers = [await stub.should_rate_limit(request) for _ in range(4)]
        with pytest.raises(grpclib.GRPCError, match="domain must not be empty") as caught:
            await stub.should_rate_limit(typed_rls.RateLimitRequest(descriptors=[eve]))
    assert caught.value.status == grpclib.const.Status.INVALID_ARGUMENT
    ok, over_limit = typed_rls.RateLimitResponseCode.OK, typed_rls.RateLimitResponseCode.OVER_LIMIT
    assert [answer.overall_code for answer in answers] == [ok, ok, ok, over_limit]
    (status,) = answers[0].statuses
    assert (status.code, status.limit_remaining) == (ok, 2)
    assert status.duration_until_reset == timedelta(minutes=20)
    assert status.current_limit is not None
    assert status.current_limit.unit == typed_rls.RateLimitResponseRateLimitUnit.HOUR
