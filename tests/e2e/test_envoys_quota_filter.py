"""What `limiter.quota` takes for granted of Envoy's quota filter, asked of the real one: another may do otherwise."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc.aio
import pytest
import pytest_asyncio
from e2e.quotas import Load, envoy_command
from google.protobuf.duration_pb2 import Duration
from google.protobuf.wrappers_pb2 import UInt32Value

from ratelimit_sidecar.demo.ports import HOST, RegionPorts, free_ports
from ratelimit_sidecar.demo.processes import Children
from ratelimit_sidecar.envoy_api.envoy.service.rate_limit_quota.v3.rlqs_pb2 import (
    RateLimitQuotaResponse,
    RateLimitQuotaUsageReports,
)
from ratelimit_sidecar.envoy_api.envoy.service.rate_limit_quota.v3.rlqs_pb2_grpc import (
    RateLimitQuotaServiceServicer,
    add_RateLimitQuotaServiceServicer_to_server,
)
from ratelimit_sidecar.envoy_api.envoy.type.v3.ratelimit_strategy_pb2 import RateLimitStrategy
from ratelimit_sidecar.envoy_api.envoy.type.v3.token_bucket_pb2 import TokenBucket
from ratelimit_sidecar.limiter.assignment import Assignment, noticeable

pytestmark = [pytest.mark.long, pytest.mark.asyncio(loop_scope="module")]

WAIT_S = 60
Usage = RateLimitQuotaUsageReports.BucketQuotaUsage
Assigned = RateLimitQuotaResponse.BucketAction.QuotaAssignmentAction


class Server(RateLimitQuotaServiceServicer):
    """Says what the test says, and keeps what it hears."""

    def __init__(self) -> None:
        self.heard: asyncio.Queue[Usage] = asyncio.Queue()
        self.context: grpc.aio.ServicerContext | None = None
        self.is_over = asyncio.Event()
        """Ends the stream."""

    async def StreamRateLimitQuotas(  # noqa: N802 (gRPC's name)
        self, requests: AsyncIterator[RateLimitQuotaUsageReports], context: grpc.aio.ServicerContext
    ) -> None:
        self.context = context
        self.is_over.clear()
        tasks = [asyncio.create_task(self._read(requests)), asyncio.create_task(self.is_over.wait())]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()

    async def _read(self, requests: AsyncIterator[RateLimitQuotaUsageReports]) -> None:
        async for reports in requests:
            for usage in reports.bucket_quota_usages:
                self.heard.put_nowait(usage)

    async def report_of(self, tenant: str) -> Usage:
        async with asyncio.timeout(WAIT_S):
            while (usage := await self.heard.get()).bucket_id.bucket["tenant"] != tenant:
                pass
        return usage

    async def tell(self, usage: Usage, **action: object) -> None:
        assert self.context is not None
        message = RateLimitQuotaResponse.BucketAction(bucket_id=usage.bucket_id, **action)
        await self.context.write(RateLimitQuotaResponse(bucket_action=[message]))
        # It takes effect in another thread of Envoy's, which says nothing of it.
        await asyncio.sleep(0.5)

    async def assign(self, usage: Usage, strategy: RateLimitStrategy, ttl_s: int = 60) -> None:
        assignment = Assigned(rate_limit_strategy=strategy, assignment_time_to_live=Duration(seconds=ttl_s))
        await self.tell(usage, quota_assignment_action=assignment)


class Proxy:
    def __init__(self, server: Server, ports: RegionPorts) -> None:
        self.server = server
        self._ports = ports

    async def ask(self, tenant: str, times: int = 1) -> int:
        """How many were admitted."""
        load = Load(self._ports.envoy, 1, tenant)
        admitted = sum([await load.ask() == 200 for _ in range(times)])
        load.close()
        return admitted

    async def new_bucket(self, tenant: str) -> Usage:
        assert await self.ask(tenant) == 1
        return await self.server.report_of(tenant)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def proxy(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Proxy]:
    folder = tmp_path_factory.mktemp("quotas")
    ports = free_ports(1)
    (region,) = ports.regions
    service, server = Server(), grpc.aio.server()
    add_RateLimitQuotaServiceServicer_to_server(service, server)
    server.add_insecure_port(f"{HOST}:{region.grpc}")
    await server.start()
    async with Children(folder) as children:
        await children.start(envoy_command(folder, "envoy", region, region.grpc, ports.upstream, "[^,]+"))
        yield Proxy(service, region)
    await server.stop(None)


def bucket(most: int, per_fill: int, interval_s: int) -> RateLimitStrategy:
    told = TokenBucket(
        max_tokens=most, tokens_per_fill=UInt32Value(value=per_fill), fill_interval=Duration(seconds=interval_s)
    )
    return RateLimitStrategy(token_bucket=told)


async def test_a_new_bucket_is_reported_at_once_and_listed_every_few_seconds_although_it_is_idle(proxy: Proxy) -> None:
    first = await proxy.new_bucket("idle")
    assert (first.num_requests_allowed, first.time_elapsed.seconds) == (1, 0)
    await proxy.server.report_of("idle")
    later = await proxy.server.report_of("idle")
    assert (later.num_requests_allowed, later.num_requests_denied) == (0, 0)
    assert 4 <= later.time_elapsed.seconds <= 30


async def test_a_token_bucket_is_enforced_exactly_and_what_is_denied_is_reported(proxy: Proxy) -> None:
    usage = await proxy.new_bucket("exact")
    await proxy.server.assign(usage, bucket(5, 1, 10_000))
    assert await proxy.ask("exact", 9) == 5
    admitted = denied = 0
    while denied < 4:
        report = await proxy.server.report_of("exact")
        admitted += report.num_requests_allowed
        denied += report.num_requests_denied
    assert (admitted, denied) == (5, 4)


async def test_a_token_bucket_that_changes_keeps_how_full_it_is(proxy: Proxy) -> None:
    usage = await proxy.new_bucket("ratio")
    await proxy.server.assign(usage, bucket(5, 1, 10_000))
    assert await proxy.ask("ratio", 9) == 5
    await proxy.server.assign(usage, bucket(100, 2, 10_000))
    assert await proxy.ask("ratio", 9) <= 1


async def test_another_interval_alone_is_not_noticed_and_so_not_sent_alone(proxy: Proxy) -> None:
    usage = await proxy.new_bucket("interval")
    await proxy.server.assign(usage, bucket(5, 10, 100_000))
    assert await proxy.ask("interval", 9) == 5
    await proxy.server.assign(usage, bucket(5, 10, 1))
    await asyncio.sleep(1)
    assert await proxy.ask("interval", 9) == 0
    told = noticeable(Assignment(5, 10, 100_000, 0), Assignment(5, 10, 1, 0))
    await proxy.server.assign(usage, bucket(told.max_tokens, told.tokens_per_fill, told.fill_interval_s))
    await asyncio.sleep(1)
    assert await proxy.ask("interval", 5) >= 4


async def test_more_tokens_a_fill_than_the_bucket_holds_come_evenly(proxy: Proxy) -> None:
    usage = await proxy.new_bucket("evenly")
    await proxy.server.assign(usage, bucket(2, 1_000, 100))
    await proxy.ask("evenly", 9)
    await asyncio.sleep(1)
    assert await proxy.ask("evenly", 2) == 2


async def test_blanket_rules_are_enforced(proxy: Proxy) -> None:
    usage = await proxy.new_bucket("blanket")
    await proxy.server.assign(usage, RateLimitStrategy(blanket_rule=RateLimitStrategy.DENY_ALL))
    assert await proxy.ask("blanket", 3) == 0
    await proxy.server.assign(usage, RateLimitStrategy(blanket_rule=RateLimitStrategy.ALLOW_ALL))
    assert await proxy.ask("blanket", 3) == 3


async def test_an_assignment_without_a_time_to_live_is_over_at_once(proxy: Proxy) -> None:
    usage = await proxy.new_bucket("brief")
    await proxy.server.assign(usage, RateLimitStrategy(blanket_rule=RateLimitStrategy.DENY_ALL), ttl_s=0)
    assert await proxy.ask("brief", 3) == 3


async def test_a_bucket_that_is_abandoned_is_new_with_its_next_request(proxy: Proxy) -> None:
    usage = await proxy.new_bucket("abandoned")
    await proxy.server.assign(usage, RateLimitStrategy(blanket_rule=RateLimitStrategy.DENY_ALL))
    await proxy.server.tell(usage, abandon_action={})
    again = await proxy.new_bucket("abandoned")
    assert (again.num_requests_allowed, again.time_elapsed.seconds) == (1, 0)


async def test_an_envoy_that_lost_its_stream_comes_back_with_its_buckets_and_what_it_held(proxy: Proxy) -> None:
    usage = await proxy.new_bucket("back")
    await proxy.server.assign(usage, RateLimitStrategy(blanket_rule=RateLimitStrategy.DENY_ALL))
    proxy.server.is_over.set()
    while not proxy.server.heard.empty():
        proxy.server.heard.get_nowait()
    again = await proxy.server.report_of("back")
    # By the time it is told from a new bucket.
    assert again.time_elapsed.seconds >= 1
    assert await proxy.ask("back", 3) == 0
