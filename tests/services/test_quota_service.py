"""Quotas over gRPC, on both front ends, with gRPC's own client and Envoy's own messages."""

from __future__ import annotations

import asyncio
import itertools
import resource
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import pytest
import structlog.testing
from google.protobuf.duration_pb2 import Duration
from limiter.requests import decide, make_limiter, make_request
from server.front_ends import EACH_KIND, channel_to, running
from server.work_clock import PerTurn, WorkClock

from ratelimit_sidecar.crdt.limit import TokenBucketLimit
from ratelimit_sidecar.envoy_api.envoy.service.rate_limit_quota.v3.rlqs_pb2 import (
    BucketId,
    RateLimitQuotaResponse,
    RateLimitQuotaUsageReports,
)
from ratelimit_sidecar.envoy_api.envoy.service.rate_limit_quota.v3.rlqs_pb2_grpc import RateLimitQuotaServiceStub
from ratelimit_sidecar.envoy_api.envoy.type.v3.ratelimit_strategy_pb2 import RateLimitStrategy
from ratelimit_sidecar.limiter.quota import Quotas
from ratelimit_sidecar.limiter.quota_pool import Usage
from ratelimit_sidecar.limiter.rules import Rule, RuleNode, Rules, Unit
from ratelimit_sidecar.limiter.usage_reports import MAX_ID_BYTES, USAGES_AT_ONCE
from ratelimit_sidecar.server.bounds import MAX_MESSAGE_BYTES
from ratelimit_sidecar.server.budget import Places
from ratelimit_sidecar.server.front_end import FrontEnd
from ratelimit_sidecar.server.grpc_connection import STREAM_WINDOW
from ratelimit_sidecar.server.rpc import Headers
from ratelimit_sidecar.server.turns import Turns
from ratelimit_sidecar.services.quota import ACTIONS_AT_ONCE, SERVICE_NAME, QuotaService

PER_AGENT = Rule("api.agent", TokenBucketLimit(300, 1_000_000, 300), 300, Unit.SECOND)
DENIED = Rule("api.agent_denied", TokenBucketLimit(1, 1_000_000, 0), 0, Unit.SECOND)
STAFF = Rule("api.agent_staff", None)
SHADOW = Rule("api.agent_shadow", TokenBucketLimit(1, 1_000_000, 1), 1, Unit.SECOND, shadow_mode=True)
PER_USER = Rule("api.plan_free.user", TokenBucketLimit(10, 60_000_000, 10), 10, Unit.MINUTE)
RULES = Rules(
    {
        "api": RuleNode(
            exact={
                ("agent", "denied"): RuleNode(DENIED),
                ("agent", "staff"): RuleNode(STAFF),
                ("agent", "shadow"): RuleNode(SHADOW),
                ("plan", "free"): RuleNode(key_only={"user": RuleNode(PER_USER)}),
            },
            key_only={"agent": RuleNode(PER_AGENT)},
        )
    }
)
WAIT_S = 60
START_US = 1_700_000_000_000_000


class Served:
    """A service on a clock of the test's, behind a front end."""

    def __init__(self, learning_us: int = 0, turns: Turns | None = None) -> None:
        self.now_us = START_US
        self.limiter = make_limiter(RULES)
        self.quotas = Quotas(self.limiter, START_US, lambda: self.now_us, learning_us=learning_us)
        self.quotas.tick(START_US)
        self.service = QuotaService(self.quotas, self._time_us, turns=turns)
        self.asked_the_time = lambda: None
        """Called by each step of the service."""

    def _time_us(self) -> int:
        self.asked_the_time()
        return self.now_us

    @asynccontextmanager
    async def running(self, kind: str) -> AsyncIterator[grpc.aio.Channel]:
        async with (
            running(kind, self.service.handlers()) as front_end,
            channel_to(front_end.addresses[0]) as channel,
        ):
            self.front_end: FrontEnd = front_end
            yield channel


class Stream:
    """One Envoy's."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.call = RateLimitQuotaServiceStub(channel).StreamRateLimitQuotas(timeout=WAIT_S)

    async def report(self, *usages: RateLimitQuotaUsageReports.BucketQuotaUsage, domain: str = "api") -> None:
        await self.call.write(RateLimitQuotaUsageReports(domain=domain, bucket_quota_usages=usages))

    async def told(self) -> list[RateLimitQuotaResponse.BucketAction]:
        response = await self.call.read()
        assert response is not grpc.aio.EOF
        return list(response.bucket_action)

    async def code(self) -> grpc.StatusCode:
        return await self.call.code()


def usage(
    allowed: int = 1, denied: int = 0, elapsed_s: int = 0, **pairs: str
) -> RateLimitQuotaUsageReports.BucketQuotaUsage:
    return RateLimitQuotaUsageReports.BucketQuotaUsage(
        bucket_id=BucketId(bucket=pairs),
        time_elapsed=Duration(seconds=elapsed_s),
        num_requests_allowed=allowed,
        num_requests_denied=denied,
    )


@pytest.fixture(params=EACH_KIND)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


async def test_a_new_bucket_is_assigned_the_whole_limit_as_a_token_bucket(kind: str) -> None:
    async with Served().running(kind) as channel:
        envoy = Stream(channel)
        await envoy.report(usage(agent="ada"))
        [action] = await envoy.told()
        assert dict(action.bucket_id.bucket) == {"agent": "ada"}
        assignment = action.quota_assignment_action
        bucket = assignment.rate_limit_strategy.token_bucket
        assert bucket.max_tokens == 300
        assert bucket.tokens_per_fill.value / bucket.fill_interval.seconds == 300
        # Envoy takes whole seconds only, and an assignment without a time to live is over at once.
        assert bucket.fill_interval.nanos == 0
        assert 15 <= assignment.assignment_time_to_live.seconds <= 30


@pytest.mark.parametrize(
    ("pairs", "rule"),
    [
        ({"agent": "denied"}, RateLimitStrategy.DENY_ALL),
        ({"agent": "staff"}, RateLimitStrategy.ALLOW_ALL),
        ({"agent": "shadow"}, RateLimitStrategy.ALLOW_ALL),
        ({"colour": "red"}, RateLimitStrategy.ALLOW_ALL),
        ({"agent": "ada", "colour": "red"}, RateLimitStrategy.ALLOW_ALL),
    ],
)
async def test_what_is_limited_to_nothing_or_not_at_all_is_a_blanket_rule(
    kind: str, pairs: dict[str, str], rule: int
) -> None:
    async with Served().running(kind) as channel:
        envoy = Stream(channel)
        await envoy.report(usage(**pairs))
        [action] = await envoy.told()
        strategy = action.quota_assignment_action.rate_limit_strategy
        assert strategy.WhichOneof("strategy") == "blanket_rule"
        assert strategy.blanket_rule == rule
        assert action.quota_assignment_action.assignment_time_to_live.seconds > 0


@pytest.mark.parametrize("pairs", [{"plan": "free", "user": "ada"}, {"user": "ada", "plan": "free"}])
async def test_the_pairs_of_a_bucket_are_matched_in_whatever_order_the_rules_have(
    kind: str, pairs: dict[str, str]
) -> None:
    served = Served()
    async with served.running(kind) as channel:
        envoy = Stream(channel)
        await envoy.report(usage(**pairs))
        [action] = await envoy.told()
        # Of ten, but one that was let through before.
        assert action.quota_assignment_action.rate_limit_strategy.token_bucket.max_tokens == 9
        # It is the bucket of whoever asks for each request.
        served.now_us += 1_000_000
        served.quotas.tick(served.now_us)
        request = make_request({"plan": "free", "user": "ada"})
        assert decide(served.limiter, request, served.now_us).statuses[0].limit_remaining == 8


async def test_two_envoys_share_a_limit_and_both_are_told_when_shares_change(kind: str) -> None:
    served = Served()
    async with served.running(kind) as channel:
        first, second = Stream(channel), Stream(channel)
        await first.report(usage(agent="ada"))
        assert await rates(first) == [300]
        await second.report(usage(agent="ada"))
        # What the first is told to hold less is the second's then, which may have been told before that it has nothing.
        assert await rates(first) == [150]
        while (told := await rates(second)) == [0]:
            served.quotas.tick(served.now_us)
        assert told == [150]
        served.now_us += 5_000_000
        await first.report(usage(allowed=10, elapsed_s=5, agent="ada"))
        await first.told()
        await second.report(usage(allowed=500, denied=1_500, elapsed_s=5, agent="ada"))
        await second.told()
        served.quotas.tick(served.now_us)
        assert (await rates(second))[0] > 250


async def rates(stream: Stream) -> list[float]:
    found = []
    for action in await stream.told():
        bucket = action.quota_assignment_action.rate_limit_strategy.token_bucket
        found.append(bucket.tokens_per_fill.value / max(1, bucket.fill_interval.seconds))
    return found


@pytest.mark.parametrize("message", [b"\xff" * 11, b"\x12\x00", b"\x0a\x03api\x12\x01\xff"])
async def test_what_is_no_report_or_has_no_domain_ends_the_stream(kind: str, message: bytes) -> None:
    served = Served()
    async with served.running(kind) as channel:
        with structlog.testing.capture_logs() as logs:
            for _ in range(2):
                call = channel.stream_stream(f"/{SERVICE_NAME}/StreamRateLimitQuotas")(timeout=WAIT_S)
                await call.write(message)
                assert await call.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert not served.quotas.streams
        assert served.quotas.counts.errors["invalid"] == 2
        assert [entry["event"] for entry in logs] == ["quota_reports_refused"]


async def test_the_domain_need_only_be_said_once(kind: str) -> None:
    async with Served().running(kind) as channel:
        envoy = Stream(channel)
        await envoy.report(usage(agent="ada"))
        await envoy.told()
        await envoy.report(usage(agent="denied"), domain="")
        [action] = await envoy.told()
        assert action.quota_assignment_action.rate_limit_strategy.blanket_rule == RateLimitStrategy.DENY_ALL


async def test_a_bucket_whose_id_is_no_text_is_never_answered_since_envoy_refuses_the_whole_message(kind: str) -> None:
    served = Served()
    async with served.running(kind) as channel:
        call = channel.stream_stream(f"/{SERVICE_NAME}/StreamRateLimitQuotas")(timeout=WAIT_S)
        odd = usage(agent="aaaa").SerializeToString().replace(b"aaaa", b"\xff\xfe\xfd\xfc")
        good = usage(agent="ada").SerializeToString()
        await call.write(b"\x0a\x03api" + b"".join(b"\x12" + bytes([len(raw)]) + raw for raw in (odd, good)))
        [action] = RateLimitQuotaResponse.FromString(await call.read()).bucket_action
        assert dict(action.bucket_id.bucket) == {"agent": "ada"}
        assert served.quotas.counts.errors["bad_id"] == 1


async def test_a_report_of_very_many_buckets_is_taken(kind: str) -> None:
    served = Served()
    async with served.running(kind) as channel:
        envoy = Stream(channel)
        usages = [usage(1, 0, 5, agent=f"agent number {number} of very many") for number in range(5_000)]
        for _ in range(2):
            served.now_us += 5_000_000
            await envoy.report(*usages)
            told = 0
            while told < len(usages):
                told += len(await envoy.told())
        assert served.quotas.counts.reports == 2 * len(usages)


async def test_a_report_of_any_size_is_read_and_has_the_envoy_drop_what_clients_invented() -> None:
    served = Served()
    invented = {f"{number:064}" for number in range(45_000)}
    async with served.running("h2") as channel:
        envoy = Stream(channel)
        usages = [usage(0, 0, 5, agent=agent, service="checkout") for agent in invented]
        report = RateLimitQuotaUsageReports(domain="api", bucket_quota_usages=[*usages, usage(1, 0, 5, agent="ada")])
        assert report.ByteSize() > MAX_MESSAGE_BYTES
        writing = asyncio.create_task(envoy.call.write(report))
        dropped, is_assigned = set(), False
        while not is_assigned:
            for action in await envoy.told():
                agent = action.bucket_id.bucket["agent"]
                is_assigned |= agent == "ada" and action.HasField("quota_assignment_action")
                dropped |= {agent} if action.HasField("abandon_action") else set()
        await writing
        assert len(dropped) > 40_000
        assert dropped < invented


async def test_a_bucket_with_an_id_that_is_too_long_is_counted_and_to_be_dropped(kind: str) -> None:
    served = Served()
    async with served.running(kind) as channel:
        envoy = Stream(channel)
        await envoy.report(usage(agent="a" * MAX_ID_BYTES), usage(agent="ada"))
        [ada] = await envoy.told()
        served.quotas.tick(served.now_us)
        [long] = await envoy.told()
        assert long.HasField("abandon_action")
        assert dict(ada.bucket_id.bucket) == {"agent": "ada"}
        assert served.quotas.counts.errors["bad_id"] == 1


async def test_a_client_that_is_done_is_answered_with_ok_and_one_that_cancels_leaves_nothing(kind: str) -> None:
    served = Served()
    async with served.running(kind) as channel:
        done, gone = Stream(channel), Stream(channel)
        for envoy in (done, gone):
            await envoy.report(usage(agent="ada"))
            await envoy.told()
        await done.call.done_writing()
        # What it was told of the other's coming is before the status.
        while await done.call.read() is not grpc.aio.EOF:
            pass
        assert await done.code() == grpc.StatusCode.OK
        gone.call.cancel()
        async with asyncio.timeout(WAIT_S):
            while served.quotas.streams:  # noqa: ASYNC110 (the other end)
                await asyncio.sleep(0.01)


async def test_a_stop_ends_the_streams(kind: str) -> None:
    served = Served()
    async with served.running(kind) as channel:
        envoy = Stream(channel)
        await envoy.report(usage(agent="ada"))
        await envoy.told()
        await served.front_end.stop()
        assert await envoy.code() == grpc.StatusCode.UNAVAILABLE
        assert not served.quotas.streams


async def test_without_rules_streams_are_refused(kind: str) -> None:
    served = Served()
    served.service = QuotaService(served.quotas, lambda: served.now_us, waits_for_rules=True)
    async with served.running(kind) as channel:
        assert await Stream(channel).code() == grpc.StatusCode.UNAVAILABLE
        served.service.rules_loaded()
        envoy = Stream(channel)
        await envoy.report(usage(agent="ada"))
        assert await envoy.told()


async def test_a_client_that_opens_as_many_streams_as_it_can_leaves_some_to_others(kind: str, tmp_path: Path) -> None:
    served = Served()
    served.service.places = Places(20)
    addresses = ["127.0.0.1:0", f"unix:{tmp_path}/rls.sock"]
    async with (
        running(kind, served.service.handlers(), addresses) as front_end,
        channel_to(front_end.addresses[0]) as greedy,
        channel_to(front_end.addresses[1]) as modest,
    ):
        taken = [Stream(greedy) for _ in range(3)]
        for stream in taken:
            await stream.report(usage(agent="ada"))
            await stream.told()
        assert await Stream(greedy).code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert served.service.places.refused == 1

        other = Stream(modest)
        await other.report(usage(agent="bob"))
        assert await other.told()

        # A stream that is over leaves its place to the next one.
        taken[0].call.cancel()
        async with asyncio.timeout(WAIT_S):
            while served.service.places.free < 17:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        again = Stream(greedy)
        await again.report(usage(agent="ada"))
        assert await again.told()


async def test_of_all_streams_that_are_woken_together_a_few_are_told_in_each_turn_of_the_loop() -> None:
    clock = WorkClock()
    served = Served(turns=clock.turns)
    told = 0
    report = RateLimitQuotaUsageReports(domain="api", bucket_quota_usages=[usage(agent="staff")]).SerializeToString()

    async def reporting() -> AsyncIterator[bytes]:
        yield report
        await asyncio.Event().wait()

    async def listen() -> None:
        nonlocal told
        async for _ in served.service.stream(reporting(), Headers()):
            told += 1
            clock.work(1 / 4)

    listening = [asyncio.create_task(listen()) for _ in range(100)]
    async with asyncio.timeout(WAIT_S):
        while told < 100:  # noqa: ASYNC110 (it counts turns of the loop)
            await asyncio.sleep(0)
        for stream in served.quotas.streams:
            stream.due.update(dict.fromkeys(stream.buckets.values()))
            stream.wake()
        async with PerTurn(lambda: told) as per_turn:
            while told < 200:  # noqa: ASYNC110
                await asyncio.sleep(0)
    assert per_turn.most <= 4
    for task in listening:
        task.cancel()
    await asyncio.wait(listening)


async def in_parts(message: bytes) -> AsyncIterator[bytes]:
    for at in range(0, len(message), STREAM_WINDOW):
        yield message[at : at + STREAM_WINDOW]


async def read_all(served: Served, message: bytes) -> None:
    async for _ in served.service.stream(in_parts(message), Headers()):
        pass


async def test_however_many_streams_have_long_messages_other_tasks_run_between_a_few_of_their_buckets() -> None:
    clock = WorkClock()
    served = Served(turns=clock.turns)
    served.asked_the_time = lambda: clock.work(1 / 2)
    reports = served.quotas.counts
    async with asyncio.timeout(WAIT_S), PerTurn(lambda: reports.reports) as per_turn:
        for size in (1, USAGES_AT_ONCE, 500):
            message = RateLimitQuotaUsageReports(domain="api", bucket_quota_usages=[usage(agent="ada")] * size)
            before = reports.reports
            async with asyncio.TaskGroup() as streams:
                for _ in range(20):
                    streams.create_task(read_all(served, message.SerializeToString()))
            assert reports.reports == before + 20 * size
    assert per_turn.most <= 2 * USAGES_AT_ONCE


async def test_a_report_of_very_many_small_buckets_holds_nobody_up_and_takes_no_memory() -> None:
    served = Served()
    message = b"\x0a\x03api" + b"\x12\x00" * (1 << 21)
    before_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1_024
    async with asyncio.timeout(WAIT_S), asyncio.TaskGroup() as tasks:
        reading = [tasks.create_task(read_all(served, message)) for _ in range(2)]
        longest_s = 0.0
        while served.quotas.counts.reports < 1_000:
            begin_s = time.thread_time()
            await asyncio.sleep(0)
            longest_s = max(longest_s, time.thread_time() - begin_s)
        for task in reading:
            task.cancel()
    # Parsed whole each takes 40 MB, and a twentieth of a second.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1_024 < before_bytes + 30_000_000
    assert longest_s < 0.03


async def test_buckets_of_an_envoy_that_is_gone_are_dropped_while_other_tasks_run() -> None:
    served = Served()
    stream = served.quotas.open(lambda: None)
    pairs = [((("agent", f"user{number}"),)) for number in range(1_000)]
    served.quotas.report(stream, "api", [Usage(b"", each, 1, 0, 0) for each in pairs], served.now_us)
    served.quotas.close(stream)
    running = asyncio.create_task(served.service.run())
    counts = [served.quotas.bucket_count]
    async with asyncio.timeout(WAIT_S):
        while served.quotas.bucket_count:
            await asyncio.sleep(0)
            counts.append(served.quotas.bucket_count)
    running.cancel()
    assert max(before - after for before, after in itertools.pairwise(counts)) < 1_000


@pytest.mark.interpreted
async def test_it_is_logged_once_a_minute_that_there_is_no_room_for_buckets() -> None:
    served = Served()
    served.quotas = served.service.quotas = Quotas(
        served.limiter, START_US, lambda: served.now_us, learning_us=0, max_envoy_buckets=0
    )
    stream = served.quotas.open(lambda: None)

    async def warnings() -> int:
        served.quotas.report(stream, "api", [Usage(b"id", (("agent", "ada"),), 1, 0, 0)], served.now_us)
        for _ in range(2):
            await ticked.get()
        return sum(entry["event"] == "quota_buckets_full" for entry in logs)

    ticked: asyncio.Queue[None] = asyncio.Queue()
    tick = served.quotas.tick
    served.quotas.tick = lambda now_us: (tick(now_us), ticked.put_nowait(None))  # type: ignore[method-assign]
    with structlog.testing.capture_logs() as logs:
        running = asyncio.create_task(served.service.run())
        assert await warnings() == 1
        assert await warnings() == 1
        served.now_us += 60_000_000
        assert await warnings() == 2
        running.cancel()


async def test_what_needs_no_answer_holds_up_no_answer_after_it() -> None:
    served = Served()
    asked: asyncio.Queue[bytes] = asyncio.Queue()

    async def requests() -> AsyncIterator[bytes]:
        while True:
            yield await asked.get()

    def ask(usages: list[RateLimitQuotaUsageReports.BucketQuotaUsage]) -> None:
        asked.put_nowait(RateLimitQuotaUsageReports(domain="api", bucket_quota_usages=usages).SerializeToString())

    usages = [usage(agent=f"agent{number}") for number in range(3 * ACTIONS_AT_ONCE)]
    async with asyncio.timeout(WAIT_S), aclosing(served.service.stream(requests(), Headers())) as answers:
        ask(usages)
        told = 0
        while told < len(usages):
            told += len(RateLimitQuotaResponse.FromString(await anext(answers)).bucket_action)
        # While nobody reads answers all of this is due, but all except the last was told a moment ago.
        ask([*usages, usage(agent="last")])
        while served.quotas.counts.reports < 2 * len(usages) + 1:  # noqa: ASYNC110 (the other task)
            await asyncio.sleep(0)
        [action] = RateLimitQuotaResponse.FromString(await anext(answers)).bucket_action
        assert dict(action.bucket_id.bucket) == {"agent": "last"}
