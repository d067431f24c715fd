"""State in a real Redis: written behind, read again, and never in the way, whatever becomes of the server."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import observed
import pytest
import structlog
from joined import join
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanKind, StatusCode
from persistence.redis_server import WITHIN_S, RedisServer, needs_redis
from persistence.test_snapshot import AFTER, BEFORE, ELSEWHERE, NOW_US, RULES, SECOND_US, make_store, take
from structlog.testing import capture_logs
from telemetry.test_traces import Traced

from ratelimit_sidecar.config.sidecar_schema import PersistenceConfig
from ratelimit_sidecar.crdt.bucket import Entry, Origin
from ratelimit_sidecar.crdt.slot import slot_id
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.limiter.rules import Rules
from ratelimit_sidecar.persistence.redis_calls import BackOff
from ratelimit_sidecar.persistence.redis_client import Connector, keys
from ratelimit_sidecar.persistence.redis_record import Keys
from ratelimit_sidecar.persistence.redis_store import LOAD_SECONDS, RedisState
from ratelimit_sidecar.persistence.write_queue import MAX_WAITING
from ratelimit_sidecar.telemetry.traces import WRITE_SPAN, RequestTracer

pytestmark = needs_redis


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[RedisServer]:
    async with RedisServer(tmp_path) as running:
        yield running


def state_in(
    server: RedisServer,
    store: Store,
    tracer: RequestTracer | None = None,
    now_us: int | Callable[[], int] = NOW_US,
    most_waiting: int = MAX_WAITING,
    **config: object,
) -> RedisState:
    """That writes 20 times a second, and so keeps all limits, and tries again soon."""
    kept = PersistenceConfig.model_validate({"url": server.url, **config})
    return RedisState(
        Connector(kept),
        keys(kept),
        store,
        now_us if callable(now_us) else lambda: now_us,
        0.05,
        tracer=tracer,
        most_waiting=most_waiting,
        back_off=BackOff(0.05, 0.2),
    )


@asynccontextmanager
async def kept(state: RedisState, load_seconds: float = LOAD_SECONDS) -> AsyncIterator[None]:
    """While it runs."""
    await state.load(load_seconds)
    running = asyncio.create_task(state.run())
    try:
        yield
    finally:
        running.cancel()
        await asyncio.wait([running])
        await state.close()
    assert running.cancelled()


def hit(state: RedisState, store: Store, value: str = "a", hits: int = 3) -> None:
    """Take, and tell of it as a flush does."""
    take(store, "fixed", value, hits, NOW_US)
    state.note(store.drain_changes())


async def until(holds: Callable[[], bool | Awaitable[bool]]) -> None:
    async with asyncio.timeout(WITHIN_S):
        while True:
            answer = holds()
            if answer if isinstance(answer, bool) else await answer:
                return
            await asyncio.sleep(0.01)


async def left_after_restart(server: RedisServer, **config: object) -> list[int]:
    """What a sidecar that starts now has left of each bucket."""
    async with asyncio.timeout(WITHIN_S):
        while True:
            store = make_store(AFTER)
            state = state_in(server, store, **config)
            await state.load()
            await state.close()
            # On a busy machine the second that a call has may not do.
            if state.status.degraded_reason != "it does not answer in time":
                break
    assert state.status.degraded_reason == ""
    return sorted(bucket.remaining for bucket in store)


async def test_what_was_taken_is_there_again(server: RedisServer) -> None:
    store = make_store(BEFORE)
    state = state_in(server, store)
    async with kept(state):
        hit(state, store, "a", 3)
        hit(state, store, "a", 4)
        hit(state, store, "b", 1)
        await until(lambda: state.status.written == 2 and not state.status.waiting)
    assert await left_after_restart(server) == [93, 99]
    assert state.status.failed == 0


async def test_a_write_has_a_span_that_links_to_the_request_and_says_when_it_failed(server: RedisServer) -> None:
    traced = Traced()
    store = traced.limiter.store
    state = state_in(server, store, traced.tracer, observed.NOW_US)

    def spans() -> list[ReadableSpan]:
        return [span for span in traced.spans() if span.name == WRITE_SPAN]

    def decide(value: str) -> None:
        traced.decide(observed.request(("tenant", value)))
        state.note(store.drain_changes())

    async with kept(state), server.client() as client:
        decide("a")
        await until(lambda: len(spans()) == 1)
        await client.config_set("maxmemory", "1")
        decide("b")
        await until(lambda: len(spans()) == 2)
    requests = [span.context for span in traced.spans() if span.kind is SpanKind.SERVER]
    assert [link.context.span_id for span in spans() for link in span.links] == [of.span_id for of in requests]
    assert [span.status.status_code for span in spans()] == [StatusCode.UNSET, StatusCode.ERROR]
    assert spans()[1].status.description == "it is out of memory"


async def test_the_last_write_is_at_the_stop(server: RedisServer) -> None:
    store = make_store(BEFORE)
    state = state_in(server, store)
    async with kept(state):
        pass
    hit(state, store)
    await state.save()
    await state.close()
    assert await left_after_restart(server) == [97]


async def test_the_last_write_is_tried_again_while_the_server_fails_over(server: RedisServer) -> None:
    store = make_store(BEFORE)
    state = state_in(server, store)
    async with kept(state):
        pass
    hit(state, store)
    await server.kill()
    saving = asyncio.create_task(state.save())
    await until(lambda: bool(state.status.degraded_reason))
    await server.start()
    await saving
    await state.close()
    assert await left_after_restart(server) == [97]


async def test_a_stop_while_it_is_still_reading_writes_all_the_same(server: RedisServer) -> None:
    first = make_store(BEFORE)
    state = state_in(server, first)
    for number in range(200):
        hit(state, first, str(number))
    await state.save()
    await state.close()
    store = make_store(AFTER)
    state = state_in(server, store)
    await state.load(0)
    hit(state, store, "new")
    await state.save()
    await state.close()
    assert len(await server.names()) == 201


async def test_what_is_written_in_pieces_is_all_there(server: RedisServer) -> None:
    store = make_store(BEFORE)
    state = state_in(server, store)
    async with kept(state):
        for number in range(1_000):
            take(store, "month", str(number), 1, NOW_US)
        state.note(store.drain_changes())
        await until(lambda: state.status.written >= 1_000)
    assert len(await left_after_restart(server)) == 1_000


async def test_what_others_took_is_not_written_by_this_one(server: RedisServer) -> None:
    store = make_store(BEFORE)
    state = state_in(server, store)
    hit(state, store)
    [bucket] = list(store)
    join(store, bucket.key, None, [Entry(ELSEWHERE, slot_id(NOW_US, bucket.limit.exponent), 5)], NOW_US)
    async with kept(state), server.client() as client:
        await until(lambda: state.status.written == 1)
        [name] = await server.names()
        fields = await client.hkeys(name)
    assert b"1 here" in fields
    assert b"9 there" not in fields


async def test_a_limit_that_is_full_again_before_the_next_write_is_not_kept(server: RedisServer) -> None:
    store = make_store(BEFORE)
    state = RedisState(partial(pytest.fail, "no need"), Keys("p"), store, lambda: NOW_US, 5.0)
    take(store, "tokens", "a", 3, NOW_US)
    take(store, "fixed", "a", 3, NOW_US)
    state.note(store.drain_changes())
    assert state.status.waiting == 1


async def write_a_hit(server: RedisServer) -> None:
    """By a sidecar that ends then."""
    store = make_store(BEFORE)
    state = state_in(server, store)
    async with kept(state):
        hit(state, store)
        await until(lambda: state.status.written == 1)


async def test_what_no_rule_knows_is_left_alone(server: RedisServer) -> None:
    await write_a_hit(server)
    before = await server.names()
    empty = Store(AFTER, Rules({}).replicated_limit_of_key)
    other = state_in(server, empty)
    async with kept(other):
        await until(lambda: other.status.last_us is not None)
    assert len(empty) == 0
    assert await server.names() == before


async def test_what_had_no_rule_at_the_start_is_read_when_its_rule_has_come(server: RedisServer) -> None:
    await write_a_hit(server)
    late = Store(AFTER, Rules({}).replicated_limit_of_key)
    other = state_in(server, late)
    async with kept(other):
        await until(lambda: other.status.last_us is not None)
        late.limit_of_key = RULES.replicated_limit_of_key
        other.use_rules()
        await until(lambda: [bucket.remaining for bucket in late] == [97])


async def test_records_that_are_none_are_told_of_and_hold_up_no_other(server: RedisServer) -> None:
    await write_a_hit(server)
    store = make_store(BEFORE)
    state = state_in(server, store)
    async with kept(state):
        take(store, "fixed", "odd", 1, NOW_US)
        state.note(store.drain_changes())
        await until(lambda: state.status.written == 1)
    async with server.client() as client:
        (odd,) = [name async for name in client.scan_iter() if b"odd" in name]
        await client.hset(odd, "1 node", "nonsense")
    late = make_store(AFTER)
    with capture_logs() as logs:
        await state_in(server, late).load()
    told = [log for log in logs if log["event"] == "buckets_unreadable"]
    assert [(log["buckets"], log["log_level"]) for log in told] == [(1, "warning")]
    assert [bucket.remaining for bucket in late] == [97]


async def test_a_start_waits_for_a_server_that_is_there_a_moment_later(server: RedisServer) -> None:
    await write_a_hit(server)
    async with server.client() as client:
        await client.save()
    await server.kill()
    store = make_store(AFTER)
    state = state_in(server, store)
    loading = asyncio.create_task(state.load())
    await until(lambda: state.status.failed > 1)
    assert not loading.done()
    await server.start()
    await loading
    assert [bucket.remaining for bucket in store] == [97]
    await state.close()


async def another_round(state: RedisState) -> None:
    """Wait until it has written, and read what it had to read."""
    for _ in range(2):
        state.status.last_us = None
        await until(lambda: state.status.last_us is not None)


@pytest.mark.parametrize(("name", "full"), [("tokens", 40), ("fixed", 100), ("sliding", 100)])
async def test_what_is_ahead_of_a_clock_is_read_again_once_the_clock_has_come_forward(
    server: RedisServer, name: str, full: int
) -> None:
    store = make_store(BEFORE)
    state = state_in(server, store)
    async with kept(state):
        take(store, name, "a", 30, NOW_US)
        state.note(store.drain_changes())
        await until(lambda: state.status.written == 1)
    clock_us = NOW_US - 100_000 * SECOND_US
    late = make_store(AFTER)
    other = state_in(server, late, now_us=lambda: clock_us)
    with capture_logs() as logs:
        await other.load()
    assert [log["ahead_of_clock"] for log in logs if log["event"] == "buckets_put_off"] == [1]
    assert [bucket.remaining for bucket in late] == [full]
    async with kept(other):
        clock_us = NOW_US
        await until(lambda: [bucket.remaining for bucket in late] == [full - 30])
        await another_round(other)
        assert other.status.restored == 2


async def test_what_a_sidecar_writes_whose_clock_is_always_ahead_is_seldom_read_again(server: RedisServer) -> None:
    writer_us, reader_us = NOW_US + 60 * SECOND_US, NOW_US
    ahead = make_store(BEFORE)
    writer = state_in(server, ahead, now_us=lambda: writer_us)
    reader = state_in(server, make_store(AFTER), now_us=lambda: reader_us)

    async def write() -> None:
        take(ahead, "sliding", "a", 3, writer_us)
        writer.note(ahead.drain_changes())
        await writer.save()

    await write()
    async with kept(reader):
        writer_us += 60 * SECOND_US
        await write()
        reader_us += 60 * SECOND_US
        await until(lambda: reader.status.restored == 2)
        reader_us += 60 * SECOND_US
        await another_round(reader)
        assert reader.status.restored == 2
    await writer.close()


async def test_keys_of_others_are_left_alone(server: RedisServer) -> None:
    store = make_store(BEFORE)
    state = state_in(server, store)
    hit(state, store)
    async with kept(state):
        await until(lambda: state.status.written == 1)
    [name] = await server.names()
    async with server.client() as client:
        await client.delete(name)
        await client.set(name, "something else")
        await client.set("ratelimit:1:{no bucket}", "text")
        hit(state, store)
        async with kept(state):
            await until(lambda: state.status.refused >= 1)
        assert await client.get(name) == b"something else"
    assert state.status.degraded_reason == "", "the others are kept"
    assert await left_after_restart(server) == []


async def test_a_bucket_that_cannot_be_encoded_is_left_out_and_all_others_are_written(server: RedisServer) -> None:
    store = make_store(BEFORE)
    state = state_in(server, store)
    take(store, "fixed", "bad", 3, NOW_US)
    [bad] = store
    bad.merge([Entry(Origin("\ud800", 1), slot_id(NOW_US, bad.limit.exponent), 1)], NOW_US)
    store.drain_changes()
    state.note([(bad, None)])
    async with kept(state):
        hit(state, store, "a", 3)
        await until(lambda: state.status.written == 1)
    assert (state.status.refused, state.status.failed) == (1, 0)
    assert await left_after_restart(server) == [97]


async def test_two_deployments_on_one_server_do_not_meet(server: RedisServer) -> None:
    for prefix in ("one", "two"):
        store = make_store(BEFORE)
        state = state_in(server, store, prefix=prefix)
        hit(state, store)
        await state.save()
        await state.close()
        assert await left_after_restart(server, prefix=prefix) == [97]
    assert len(await server.names()) == 2


async def test_an_unknown_format_is_neither_read_nor_overwritten(server: RedisServer) -> None:
    async with server.client() as client:
        await client.set("ratelimit:format", "7 of the future")
        store = make_store(BEFORE)
        state = state_in(server, store)
        async with kept(state, load_seconds=0.1):
            hit(state, store)
            await until(lambda: state.status.failed >= 3)
            assert state.status.degraded_reason == "its keys are of format '7'; this version reads and writes 1"
            assert state.status.written == 0
        assert await client.keys() == [b"ratelimit:format"]


async def faulty(
    server: RedisServer,
    begin: Callable[[], Awaitable[object]],
    end: Callable[[], Awaitable[object]],
    degraded_reason: str,
) -> None:
    """While a fault lasts it is told of once, and once it is over all is there."""
    store = make_store(BEFORE)
    state = state_in(server, store)
    with structlog.testing.capture_logs() as log:
        async with kept(state):
            hit(state, store, "before")
            await until(lambda: state.status.written == 1 and not state.status.waiting)
            await begin()
            hit(state, store, "meanwhile")
            await until(lambda: state.status.failed >= 3)
            assert degraded_reason in state.status.degraded_reason
            hit(state, store, "later")
            assert state.status.waiting >= 1
            await end()
            await until(lambda: state.status.degraded_reason == "")

            async def is_all_there() -> bool:
                return len(await server.names()) == 3

            await until(is_all_there)
    assert await left_after_restart(server) == [97, 97, 97]
    events = [entry["event"] for entry in log]
    reasons = [entry["reason"] for entry in log if entry["event"] == "state_not_kept"]
    assert len(reasons) == len(set(reasons)), "one line for each state"
    assert events.count("state_kept_again") == 1


async def test_a_server_that_is_down_and_comes_back_empty_is_told_everything(server: RedisServer) -> None:
    await faulty(server, server.kill, server.start, "it cannot be reached")


@pytest.mark.parametrize("is_noticed", [True, False])
async def test_a_server_that_comes_back_with_what_it_had_before_is_told_everything(
    server: RedisServer, *, is_noticed: bool
) -> None:
    store = make_store(BEFORE)
    state = state_in(server, store)
    async with kept(state):
        hit(state, store, "a")
        await until(lambda: state.status.written == 1)
        async with server.client() as client:
            await client.save()
        hit(state, store, "b")
        await until(lambda: state.status.written == 2)
        if is_noticed:
            await server.kill()
            await until(lambda: state.status.failed > 0)
            await server.start()
        else:
            # It was away between two rounds: the loop stands still meanwhile.
            server.restart_at_once()

        async def is_all_there() -> bool:
            return len(await server.names()) == 2

        await until(is_all_there)
    assert await left_after_restart(server) == [97, 97]


async def test_a_server_that_hangs_is_waited_for_by_nobody(server: RedisServer) -> None:
    hanging = server.hanging()

    async def begin() -> None:
        hanging.__enter__()

    async def end() -> None:
        hanging.__exit__(None, None, None)

    await faulty(server, begin, end, "it does not answer in time")


@pytest.mark.parametrize(
    ("fault", "mended", "degraded_reason"),
    [
        (("CONFIG", "SET", "maxmemory", "1"), ("CONFIG", "SET", "maxmemory", "0"), "it is out of memory"),
        (("REPLICAOF", "127.0.0.1", "1"), ("REPLICAOF", "NO", "ONE"), "it is a read-only replica"),
        (("ACL", "SETUSER", "default", "-evalsha"), ("ACL", "SETUSER", "default", "+evalsha"), "does not permit"),
    ],
)
async def test_a_server_that_refuses_to_write_is_told_once_it_does(
    server: RedisServer, fault: tuple[str, ...], mended: tuple[str, ...], degraded_reason: str
) -> None:
    async with server.client() as client:

        async def begin() -> None:
            await client.execute_command(*fault)

        async def end() -> None:
            await client.execute_command(*mended)

        await faulty(server, begin, end, degraded_reason)


async def test_a_server_that_was_flushed_is_told_everything_again(server: RedisServer) -> None:
    store = make_store(BEFORE)
    state = state_in(server, store)
    async with kept(state), server.client() as client:
        for value in "abc":
            hit(state, store, value)
        await until(lambda: state.status.written == 3)
        [bucket, *_] = list(store)
        join(store, bucket.key, None, [Entry(ELSEWHERE, slot_id(NOW_US, bucket.limit.exponent), 5)], NOW_US)
        await client.flushall()

        async def is_all_there() -> bool:
            return len(await server.names()) == 3

        await until(is_all_there)
    assert await left_after_restart(server) == [92, 97, 97], "what others took as well: they may be gone"


async def test_a_bucket_that_was_evicted_is_told_whole(server: RedisServer) -> None:
    store = make_store(BEFORE)
    state = state_in(server, store)
    async with kept(state), server.client() as client:
        hit(state, store)
        await until(lambda: state.status.written == 1)
        [bucket] = list(store)
        join(store, bucket.key, None, [Entry(ELSEWHERE, slot_id(NOW_US, bucket.limit.exponent), 5)], NOW_US)
        await client.delete(*await server.names())
        hit(state, store)
        await until(lambda: state.status.written >= 3)
    assert await left_after_restart(server) == [89]


async def test_a_wrong_password_is_told_of_and_a_right_one_found(server: RedisServer, tmp_path: Path) -> None:
    async with server.client() as client:
        await client.execute_command("ACL", "SETUSER", "ada", "on", ">right", "~ratelimit:*", "+@all")
        await client.config_set("requirepass", "secret")
    file = tmp_path / "password"
    file.write_text("wrong\n")
    store = make_store(BEFORE)
    url = server.url.replace("unix://", "unix://ada@")
    state = state_in(server, store, url=url, password_file=file)
    async with kept(state, load_seconds=0.1):
        hit(state, store)
        await until(lambda: state.status.failed >= 2)
        assert state.status.degraded_reason == "it refuses user or password"
        file.write_text("right\n")
        await until(lambda: state.status.written >= 1 and state.status.degraded_reason == "")
    assert await left_after_restart(server, url=url, password_file=file) == [97]


@pytest.mark.parametrize("is_connected", [False, True])
async def test_a_cancellation_ends_it_at_whatever_step_it_comes(server: RedisServer, is_connected: bool) -> None:
    """Python 3.11's `asyncio.wait_for`, by which the library sends, swallows one between two steps of the loop."""
    store = make_store(BEFORE)
    state = state_in(server, store)
    async with kept(state):
        hit(state, store, "before")
        await until(lambda: state.status.written == 1)
    config = PersistenceConfig.model_validate({"url": server.url})
    for steps in range(1, 60):
        state = RedisState(Connector(config), keys(config), store, lambda: NOW_US, every_seconds=0)
        if is_connected:
            await state.load()
        hit(state, store, str(steps))
        running = asyncio.create_task(state.run())
        for _ in range(steps):
            await asyncio.sleep(0)
        running.cancel()
        done, _ = await asyncio.wait([running], timeout=WITHIN_S)
        assert done
        assert running.cancelled(), steps
        hit(state, store, str(steps))
        await state.save()
        # No answer of before was left to be read on the connection.
        assert (state.status.waiting, state.status.failed) == (0, 0), state.status.degraded_reason
        await state.close()


async def test_a_password_that_cannot_be_read_is_told_of(server: RedisServer, tmp_path: Path) -> None:
    store = make_store(BEFORE)
    state = state_in(server, store, password_file=tmp_path / "nowhere")
    await state.load(0)
    await until(lambda: state.status.failed == 1)
    assert state.status.degraded_reason == "the file of its password cannot be read: No such file or directory"
    await state.close()


async def test_scripts_that_are_forgotten_are_loaded_again(server: RedisServer) -> None:
    store = make_store(BEFORE)
    state = state_in(server, store)
    async with kept(state), server.client() as client:
        hit(state, store)
        await until(lambda: state.status.written == 1)
        await client.script_flush()
        hit(state, store)
        await until(lambda: state.status.written == 2)
    assert state.status.failed == 0


async def test_what_waits_is_bounded_and_all_of_it_written_once_it_goes_on(server: RedisServer) -> None:
    store = make_store(BEFORE)
    state = state_in(server, store, most_waiting=10)
    for number in range(100):
        hit(state, store, str(number))
    assert state.status.waiting <= 10
    async with kept(state):

        async def is_all_there() -> bool:
            return len(await server.names()) == 100

        await until(is_all_there)


async def test_what_found_no_place_is_written_while_others_go_on_to_come(server: RedisServer) -> None:
    store = make_store(BEFORE)
    state = state_in(server, store, most_waiting=40)

    async def flood() -> None:
        for number in itertools.cycle(range(1_000)):
            hit(state, store, f"invented-{number}", 1)
            if number % 100 == 0:
                await asyncio.sleep(0)

    flooding = asyncio.create_task(flood())
    await until(lambda: state.status.waiting >= 20)
    hit(state, store, "honest")
    async with kept(state):

        async def is_there() -> bool:
            return any(b"honest" in name for name in await server.names())

        await until(is_there)
    flooding.cancel()
    await asyncio.wait([flooding])


async def test_a_start_without_the_server_goes_on_and_reads_later(server: RedisServer) -> None:
    store = make_store(BEFORE)
    state = state_in(server, store)
    async with kept(state):
        hit(state, store)
        await until(lambda: state.status.written == 1)
    after = make_store(AFTER)
    late = state_in(server, after)
    with server.hanging():
        await asyncio.wait_for(late.load(0), WITHIN_S)
        await until(lambda: late.status.failed == 1)
        assert late.status.degraded_reason == "it does not answer in time"
        assert len(after) == 0
    async with kept(late):
        await until(lambda: late.status.restored == 1)
    assert [bucket.remaining for bucket in after] == [97]


async def test_slots_of_a_former_life_are_written_when_the_clock_was_set_back(server: RedisServer) -> None:
    store = make_store(BEFORE)
    state = state_in(server, store)
    take(store, "fixed", "a", 3, NOW_US)
    changes = store.drain_changes()
    store.go_back(Origin("here", 77))
    take(store, "fixed", "a", 4, NOW_US - 10_000_000)
    state.note(changes)
    state.note(store.drain_changes())
    async with kept(state):
        await until(lambda: state.status.written >= 2)
    assert await left_after_restart(server) == [93]
