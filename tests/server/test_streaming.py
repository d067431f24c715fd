"""Calls with a stream of messages on either side, on both front ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc
import grpc.aio
import pytest
import structlog.testing
from h2.errors import ErrorCodes
from server.front_ends import EACH_KIND, Tls, channel_to, echo, running
from server.raw_http2 import GRPC_HEADERS, connected
from server.work_clock import PerTurn, WorkClock
from young import collected_when_told

from ratelimit_sidecar.server.bounds import MAX_STREAMED_BYTES
from ratelimit_sidecar.server.framing import frame
from ratelimit_sidecar.server.grpc_connection import STREAM_WINDOW, STREAMING_BYTES
from ratelimit_sidecar.server.rpc import Code, Handlers, RpcError, StreamingMethod
from ratelimit_sidecar.server.streaming import MAX_UNSENT_BYTES, STOP_NS, StreamingCall
from ratelimit_sidecar.server.turns import QUANTUM_NS

PATH = "/test.Echo/Stream"
UNARY_PATH = "/test.Echo/Echo"
INITIAL_WINDOW = 65_535
CHUNK = 16_384


@pytest.fixture(params=EACH_KIND)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def handlers(handler) -> Handlers:
    return {PATH: StreamingMethod(handler), UNARY_PATH: echo}


async def echo_stream(messages, _metadata):
    async for message in messages:
        yield message


class Watched:
    """A handler that says what happens to it, and does what it is told.

    Args:
        handler: of the call itself.
    """

    def __init__(self, handler=echo_stream) -> None:
        self._handler = handler
        self.began = asyncio.Event()
        self.closed = asyncio.Event()

    async def __call__(self, messages, metadata):
        self.began.set()
        try:
            async for message in self._handler(messages, metadata):
                yield message
        finally:
            self.closed.set()


async def wait_for_ever(_messages, _metadata):
    await asyncio.Event().wait()
    yield b"never"


async def send_and_wait_for_ever(_messages, _metadata):
    yield b"first"
    await asyncio.Event().wait()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 # of values that nobody announces
            await asyncio.sleep(0.001)


async def within_seconds(event: asyncio.Event) -> None:
    await asyncio.wait_for(event.wait(), 30)


async def settled(value: Callable[[], int]) -> int:
    """What a value is once it stays the same."""
    async with asyncio.timeout(30):
        while True:
            before = value()
            await asyncio.sleep(0.1)
            if value() == before:
                return before


def own_tasks() -> set[asyncio.Task[object]]:
    """All but the one in which gRPC's library waits for the next call."""
    return {task for task in asyncio.all_tasks() if "_request_call" not in repr(task)}


def stream_of(channel: grpc.aio.Channel) -> grpc.aio.StreamStreamCall:
    return channel.stream_stream(PATH)(timeout=10)


# Both ways


@pytest.mark.parametrize("transport", ["tcp", "unix", "tls"])
async def test_messages_go_both_ways_at_once(kind: str, transport: str, tmp_path) -> None:
    tls = Tls(tmp_path) if transport == "tls" else None
    address = f"unix:{tmp_path}/s.sock" if transport == "unix" else "localhost:0"
    async with (
        running(kind, handlers(echo_stream), [address], certificate=tls and tls.certificate) as front_end,
        channel_to(front_end.addresses[0], tls) as channel,
    ):
        call = stream_of(channel)
        for number in range(50):
            await call.write(b"%d" % number)
            assert await call.read() == b"%d" % number
        await call.done_writing()
        assert await call.read() == grpc.aio.EOF
        assert await call.code() == grpc.StatusCode.OK


async def test_a_client_that_has_said_all_still_receives(kind: str) -> None:
    async def count(messages, _metadata):
        received = [message async for message in messages]
        for message in received:
            yield message * 2

    async with running(kind, handlers(count)) as front_end, channel_to(front_end.addresses[0]) as channel:
        call = channel.stream_stream(PATH)(iter([b"a", b"b", b"c"]), timeout=10)
        assert [message async for message in call] == [b"aa", b"bb", b"cc"]


async def test_messages_may_be_empty_and_as_large_as_may_be(kind: str) -> None:
    messages = [b"", bytes(MAX_STREAMED_BYTES), b"", b"end"]
    async with running(kind, handlers(echo_stream)) as front_end, channel_to(front_end.addresses[0]) as channel:
        call = channel.stream_stream(PATH)(iter(messages), timeout=10)
        assert [message async for message in call] == messages


async def test_a_stream_without_messages_is_an_answer_too(kind: str) -> None:
    async with running(kind, handlers(echo_stream)) as front_end, channel_to(front_end.addresses[0]) as channel:
        call = channel.stream_stream(PATH)(iter(()), timeout=10)
        assert [message async for message in call] == []
        assert await call.code() == grpc.StatusCode.OK


async def test_handlers_see_the_metadata(kind: str) -> None:
    async def traceparent(_messages, metadata):
        yield dict(metadata)[b"traceparent"]

    async with running(kind, handlers(traceparent)) as front_end, channel_to(front_end.addresses[0]) as channel:
        call = channel.stream_stream(PATH)(iter(()), timeout=10, metadata=(("traceparent", "00-a"),))
        assert [message async for message in call] == [b"00-a"]


async def test_a_handler_may_end_before_its_client_does(kind: str) -> None:
    async def first_only(messages, _metadata):
        async for message in messages:
            yield message
            return

    async with running(kind, handlers(first_only)) as front_end, channel_to(front_end.addresses[0]) as channel:
        call = stream_of(channel)
        await call.write(b"one")
        assert await call.read() == b"one"
        assert await call.read() == grpc.aio.EOF
        assert await call.code() == grpc.StatusCode.OK


# Flow control


async def test_a_handler_waits_for_a_client_that_does_not_take_its_messages(kind: str) -> None:
    produced = 0

    async def produce(_messages, _metadata):
        nonlocal produced
        for number in range(100):
            produced += 1
            yield bytes([number]) * CHUNK

    async with running(kind, handlers(produce)) as front_end, connected(front_end.addresses[0]) as client:
        stream = client.open(PATH, end=True)
        waiting = await settled(lambda: produced)
        assert waiting * CHUNK >= INITIAL_WINDOW
        if kind == "h2":
            assert waiting * CHUNK <= INITIAL_WINDOW + MAX_UNSENT_BYTES + CHUNK
        else:
            assert waiting < 50
        client.grant(stream, 100 * (CHUNK + 5))
        answer = await client.answer(stream)
    assert answer.code == Code.OK
    assert answer.body == b"".join(frame(bytes([number]) * CHUNK) for number in range(100))


async def test_one_slow_client_keeps_no_other_call_of_its_connection_waiting(kind: str) -> None:
    async def produce(_messages, _metadata):
        while True:
            yield bytes(CHUNK)

    async with running(kind, handlers(produce)) as front_end, connected(front_end.addresses[0]) as client:
        slow = client.open(PATH, end=True)
        # Its stream is full; the connection has room.
        client.grant_connection(1 << 20)
        await settled(lambda: len(client.received(slow)))
        answer = await client.call(UNARY_PATH, frame(b"hello"))
        assert answer.body == frame(b"hello")
        client.cancel(slow)


async def test_a_client_that_is_faster_than_the_handler_is_stopped_and_nothing_is_lost() -> None:
    go_on = asyncio.Event()
    message = frame(bytes(1_000))
    received = 0

    async def slow(messages, _metadata):
        nonlocal received
        await go_on.wait()
        async for _ in messages:
            received += 1
        yield b"%d" % received

    async with running("h2", handlers(slow)) as front_end, connected(front_end.addresses[0]) as client:
        stream = client.open(PATH)
        await client.ping()
        sent = 0
        while client.room(stream) >= len(message):
            client.send(stream, message, end=False)
            sent += 1
        await client.ping()
        assert sent == STREAM_WINDOW // len(message)
        assert client.room(stream) < len(message)
        go_on.set()
        await until(lambda: client.room(stream) > STREAM_WINDOW // 2)
        client.send(stream, message)
        answer = await client.answer(stream)
    assert answer.body == frame(b"%d" % (sent + 1))


async def test_a_handler_that_takes_parts_is_given_a_message_larger_than_the_window_as_it_comes() -> None:
    message = b"%05d" * 100_000
    most = 0

    async def in_parts(parts, _metadata):
        nonlocal most
        received = b""
        async for part in parts:
            most = max(most, len(part))
            received += part
        yield b"%d" % (received == message + message)

    served = {PATH: StreamingMethod(in_parts, takes_parts=True)}
    async with running("h2", served) as front_end, channel_to(front_end.addresses[0]) as channel:
        call = stream_of(channel)
        for _ in range(2):
            await call.write(message)
        await call.done_writing()
        assert [answer async for answer in call] == [b"1"]
    assert most <= STREAM_WINDOW < len(message)


async def test_a_client_of_a_handler_that_takes_parts_is_stopped_while_the_handler_is_busy() -> None:
    go_on = asyncio.Event()

    async def busy(parts, _metadata):
        async for _ in parts:
            await go_on.wait()
        yield b"done"

    served = {PATH: StreamingMethod(busy, takes_parts=True)}
    async with running("h2", served) as front_end, connected(front_end.addresses[0]) as client:
        stream = client.open(PATH)
        client.send(stream, b"\0" + (1 << 20).to_bytes(4, "big"), end=False)
        await client.ping()
        sent = 0
        while client.room(stream) >= CHUNK:
            client.send(stream, bytes(CHUNK), end=False)
            sent += CHUNK
            await client.ping()
        assert sent <= STREAM_WINDOW
        go_on.set()
        while sent < 1 << 20:
            await until(lambda: client.room(stream) >= CHUNK)
            client.send(stream, bytes(CHUNK), end=sent + CHUNK == 1 << 20)
            sent += CHUNK
        answer = await client.answer(stream)
    assert answer.body == frame(b"done")


async def test_a_grpc_client_waits_while_the_handler_does(kind: str) -> None:
    go_on = asyncio.Event()
    messages = [b"%05d" % number * 200 for number in range(5_000)]

    async def slow(received, _metadata):
        await go_on.wait()
        async for message in received:
            yield message[:5]

    async with running(kind, handlers(slow)) as front_end, channel_to(front_end.addresses[0]) as channel:
        call = stream_of(channel)

        async def send() -> None:
            for message in messages:
                await call.write(message)
            await call.done_writing()

        sending = asyncio.create_task(send())
        # Were it not stopped, it would be done by then.
        await asyncio.wait({sending}, timeout=1)
        assert not sending.done()
        go_on.set()
        assert [message async for message in call] == [message[:5] for message in messages]
        await sending


async def test_what_one_call_leaves_unread_is_no_burden_to_the_next_ones() -> None:
    async def ignore(_messages, _metadata):
        yield b"thanks"
        await asyncio.Event().wait()

    body = frame(bytes(1_000)) * (STREAM_WINDOW // 1_005)
    async with running("h2", handlers(ignore)) as front_end, connected(front_end.addresses[0]) as client:
        await client.ping()
        for _ in range(40):
            stream = client.open(PATH)
            for start in range(0, len(body), CHUNK):
                client.send(stream, body[start : start + CHUNK], end=False)
            client.cancel(stream)
            await client.ping()
        answer = await client.call(UNARY_PATH, frame(bytes(10_000)))
    assert answer.code == Code.OK


# Others meanwhile


async def test_others_have_their_turn_while_a_read_of_many_messages_is_handled() -> None:
    clock = WorkClock()
    taken = 0

    async def take(messages, _metadata):
        nonlocal taken
        async for _ in messages:
            taken += 1
            clock.work()
        yield b""

    async with (
        running("h2", handlers(take), turns=clock.turns) as front_end,
        connected(front_end.addresses[0]) as client,
        PerTurn(lambda: taken) as per_turn,
    ):
        stream = client.open(PATH)
        client.send(stream, frame(b"") * 500)
        await client.answer(stream)
    assert taken == 500
    assert per_turn.most == 1


async def test_others_have_their_turn_while_a_handler_sends_as_fast_as_it_can() -> None:
    clock = WorkClock()
    sent = 0

    async def produce(_messages, _metadata):
        nonlocal sent
        for _ in range(500):
            sent += 1
            clock.work()
            yield b""

    async with (
        running("h2", handlers(produce), turns=clock.turns) as front_end,
        connected(front_end.addresses[0]) as client,
        PerTurn(lambda: sent) as per_turn,
    ):
        await client.answer(client.open(PATH, end=True))
    assert sent == 500
    assert per_turn.most == 1


async def test_of_very_many_streams_a_few_begin_go_on_and_end_in_each_turn_of_the_loop() -> None:
    clock = WorkClock()
    steps = ended = 0

    async def work(messages, _metadata):
        nonlocal steps, ended
        steps += 1
        clock.work(1 / 4)
        try:
            async for message in messages:
                steps += 1
                clock.work(1 / 4)
                yield message
        finally:
            ended += 1

    async with running("h2", handlers(work), turns=clock.turns) as front_end, PerTurn(lambda: ended) as ends:
        async with connected(front_end.addresses[0]) as client, PerTurn(lambda: steps) as per_turn:
            with client.one_write():
                streams = [client.open(PATH) for _ in range(100)]
            await until(lambda: steps == 100)
            # All of them in one read.
            for _ in range(3):
                with client.one_write():
                    for stream in streams:
                        client.send(stream, frame(b"message"), end=False)
            await until(lambda: steps == 400)
            with client.one_write():
                for stream in streams[:50]:
                    client.cancel(stream)
            await until(lambda: ended == 50)
        # Half of them by their client, and the others with their connection.
        await until(lambda: ended == 100)
    assert per_turn.most <= 4
    assert ends.most <= QUANTUM_NS // STOP_NS


# The end


@pytest.mark.parametrize("handler", [echo_stream, wait_for_ever, send_and_wait_for_ever])
async def test_a_handler_is_closed_when_its_client_cancels(kind: str, handler) -> None:
    watched = Watched(handler)
    async with running(kind, handlers(watched)) as front_end, channel_to(front_end.addresses[0]) as channel:
        before = own_tasks()
        call = stream_of(channel)
        await call.write(b"hello")
        await within_seconds(watched.began)
        call.cancel()
        await within_seconds(watched.closed)
        await until(lambda: own_tasks() <= before)


async def test_a_handler_that_waits_for_its_client_is_closed_when_that_cancels(
    kind: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    async def produce(_messages, _metadata):
        while True:
            yield bytes(CHUNK)

    watched = Watched(produce)
    async with running(kind, handlers(watched)) as front_end, connected(front_end.addresses[0]) as client:
        before = own_tasks()
        stream = client.open(PATH, end=True)
        await settled(lambda: len(client.received(stream)))
        client.cancel(stream)
        await within_seconds(watched.closed)
        await until(lambda: own_tasks() <= before)
    assert not any(record.levelname == "ERROR" for record in caplog.records)
    assert "failed" not in "".join(capfd.readouterr())


async def test_a_handler_is_closed_when_its_client_hangs_up(kind: str) -> None:
    watched = Watched(send_and_wait_for_ever)
    async with running(kind, handlers(watched)) as front_end:
        before = own_tasks()
        async with connected(front_end.addresses[0]) as client:
            client.open(PATH)
            await within_seconds(watched.began)
        await within_seconds(watched.closed)
        await until(lambda: own_tasks() <= before)


async def test_a_call_cancelled_before_it_began_leaves_nothing() -> None:
    watched = Watched()
    async with running("h2", handlers(watched)) as front_end, connected(front_end.addresses[0]) as client:
        before = own_tasks()
        with client.one_write():
            stream = client.open(PATH)
            client.send(stream, frame(b"hello"), end=False)
            client.cancel(stream)
        answer = await client.call(UNARY_PATH, frame(b"hello"))
        assert answer.code == Code.OK
        await until(lambda: own_tasks() <= before)
        assert front_end.held_bytes == 0


async def test_a_handler_is_closed_when_http_2_ends_its_stream() -> None:
    watched = Watched()
    async with running("h2", handlers(watched)) as front_end, connected(front_end.addresses[0]) as client:
        stream = client.open(PATH, [*GRPC_HEADERS, (b"content-length", b"3")])
        await within_seconds(watched.began)
        client.send(stream, b"more than that", end=False)
        answer = await client.answer(stream)
        assert answer.reset == ErrorCodes.PROTOCOL_ERROR
        await within_seconds(watched.closed)


async def test_a_status_before_the_first_message_needs_no_trailers(kind: str) -> None:
    async def refuse(_messages, _metadata):
        raise RpcError(Code.NOT_FOUND, "100% naïve")
        yield b"never"

    async with running(kind, handlers(refuse)) as front_end, connected(front_end.addresses[0]) as client:
        answer = await client.call(PATH, frame(b"hello"))
    assert answer.trailers_only
    assert (answer.code, answer.message) == (Code.NOT_FOUND, b"100%25 na%C3%AFve")


async def test_a_status_after_messages_is_in_the_trailers(kind: str) -> None:
    async def refuse(messages, _metadata):
        async for message in messages:
            yield message
        raise RpcError(Code.NOT_FOUND, "no more")

    async with running(kind, handlers(refuse)) as front_end, connected(front_end.addresses[0]) as client:
        answer = await client.call(PATH, frame(b"hello"))
    assert answer.body == frame(b"hello")
    assert not answer.trailers_only
    assert (answer.code, answer.message) == (Code.NOT_FOUND, b"no more")


async def test_an_unexpected_failure_is_internal_and_logged_once(kind: str) -> None:
    async def fail(messages, _metadata):
        async for _ in messages:
            yield b"so far"
            raise KeyError("secret")

    async with running(kind, handlers(fail)) as front_end, channel_to(front_end.addresses[0]) as channel:
        with structlog.testing.capture_logs() as logs:
            for _ in range(3):
                call = stream_of(channel)
                await call.write(b"hello")
                assert await call.read() == b"so far"
                assert await call.code() == grpc.StatusCode.INTERNAL
                assert "secret" not in await call.details()
    assert [(log["event"], log["method"], type(log["exc_info"])) for log in logs] == [("rpc_failed", PATH, KeyError)]


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        (b"\1" + frame(b"zip")[1:], Code.UNIMPLEMENTED, b"compressed messages are not supported"),
        (b"\7" + frame(b"zip")[1:], Code.INTERNAL, b"the message's flags are 7; they can be 0 or 1"),
        (frame(b"hello")[:-1], Code.INTERNAL, b"the last message is cut short"),
        (b"\0\0", Code.INTERNAL, b"the last message is cut short"),
        (b"\0\0\1\0\1", Code.RESOURCE_EXHAUSTED, b"the request is larger than 65536 bytes"),
    ],
    ids=["compressed", "flags", "cut-short", "prefix-cut-short", "oversized"],
)
async def test_a_broken_message_ends_the_call_after_those_before_it(body: bytes, code: Code, message: bytes) -> None:
    headers = [*GRPC_HEADERS, (b"grpc-encoding", b"gzip")]
    watched = Watched()
    async with running("h2", handlers(watched)) as front_end, connected(front_end.addresses[0]) as client:
        answer = await client.call(PATH, frame(b"whole") + body, headers)
        await within_seconds(watched.closed)
    assert answer.body == frame(b"whole")
    assert (answer.code, answer.message) == (code, message)


async def test_an_oversized_message_is_refused_before_it_is_sent_and_the_client_told_to_stop() -> None:
    async with running("h2", handlers(echo_stream)) as front_end, connected(front_end.addresses[0]) as client:
        stream = client.open(PATH)
        client.send(stream, b"\0\0\1\0\1", end=False)
        answer = await client.answer(stream)
        await until(lambda: answer.reset is not None)
    assert answer.trailers_only
    assert answer.code == Code.RESOURCE_EXHAUSTED
    assert answer.reset == ErrorCodes.NO_ERROR


async def test_a_client_that_goes_on_after_the_status_is_told_to_stop() -> None:
    async def first_only(messages, _metadata):
        async for message in messages:
            yield message
            return

    async with running("h2", handlers(first_only)) as front_end, connected(front_end.addresses[0]) as client:
        stream = client.open(PATH)
        client.send(stream, frame(b"hello"), end=False)
        answer = await client.answer(stream)
        await until(lambda: answer.reset is not None)
    assert (answer.body, answer.code) == (frame(b"hello"), Code.OK)
    assert answer.reset == ErrorCodes.NO_ERROR


# A stop


@pytest.mark.parametrize("handler", [echo_stream, wait_for_ever, send_and_wait_for_ever])
async def test_a_stop_ends_streams_at_once(kind: str, handler) -> None:
    watched = Watched(handler)
    async with (
        running(kind, handlers(watched), drain=60) as front_end,
        channel_to(front_end.addresses[0]) as channel,
    ):
        call = stream_of(channel)
        await call.write(b"hello")
        await within_seconds(watched.began)
        if handler is not wait_for_ever:
            await call.read()
        async with asyncio.timeout(30):
            await front_end.stop()
        assert watched.closed.is_set()
        assert await call.code() == grpc.StatusCode.UNAVAILABLE
        assert await call.details() == "the server is shutting down"


async def test_a_stop_that_meets_the_first_message_on_its_way_lets_it_arrive(
    kind: str,
) -> None:
    async def stop_and_answer(_messages, _metadata):
        stopping.append(asyncio.create_task(front_end.stop()))
        yield long
        await asyncio.Event().wait()

    stopping: list[asyncio.Task[None]] = []
    # Longer than what may be on its way before the client has read.
    long = bytes(3 << 20)
    async with (
        running(kind, handlers(stop_and_answer), drain=60) as front_end,
        channel_to(front_end.addresses[0]) as channel,
    ):
        call = stream_of(channel)
        async with asyncio.timeout(30):
            try:
                assert await call.read() == long
                assert await call.details() == "the server is shutting down"
            except grpc.aio.AioRpcError:
                # The C core closes the connection when all is sent. If the client then sends a window update, TCP
                # resets it, and what was not read is lost.
                assert kind == "grpcio"
            assert await call.code() == grpc.StatusCode.UNAVAILABLE
            await stopping[0]


async def test_a_stop_ends_a_stream_whose_client_has_not_said_all_and_says_nothing_more() -> None:
    watched = Watched(send_and_wait_for_ever)
    async with (
        running("h2", handlers(watched), drain=60) as front_end,
        connected(front_end.addresses[0]) as client,
    ):
        stream = client.open(PATH)
        await until(lambda: client.received(stream) == frame(b"first"))
        async with asyncio.timeout(30):
            await front_end.stop()
        answer = await client.answer(stream)
    assert answer.code == Code.UNAVAILABLE


async def test_a_stop_does_not_keep_handlers_running_while_other_calls_are_answered() -> None:
    watched = Watched(wait_for_ever)
    async with (
        running("h2", handlers(watched), drain=60) as front_end,
        connected(front_end.addresses[0]) as client,
    ):
        unary = client.open(UNARY_PATH)
        client.send(unary, frame(b"half")[:7], end=False)
        stream = client.open(PATH)
        await within_seconds(watched.began)
        stopping = asyncio.create_task(front_end.stop())
        assert (await client.answer(stream)).code == Code.UNAVAILABLE
        await within_seconds(watched.closed)
        client.send(unary, frame(b"half")[7:])
        assert (await client.answer(unary)).body == frame(b"half")
        await asyncio.wait_for(stopping, 30)


async def test_a_stream_that_begins_during_a_stop_is_ended_at_once() -> None:
    watched = Watched()
    async with (
        running("h2", handlers(watched), drain=60) as front_end,
        connected(front_end.addresses[0]) as client,
    ):
        unary = client.open(UNARY_PATH)
        client.send(unary, frame(b"half")[:7], end=False)
        await client.ping()
        stopping = asyncio.create_task(front_end.stop())
        with client.one_write():
            # So that the server's PING is not answered before this.
            await within_seconds(client.told_to_go)
            stream = client.open(PATH)
        answer = await client.answer(stream)
        assert answer.code == Code.UNAVAILABLE
        client.send(unary, frame(b"half")[7:])
        assert (await client.answer(unary)).body == frame(b"half")
        await asyncio.wait_for(stopping, 30)
    assert not watched.began.is_set()


# Bounds


async def test_a_thousand_streams_are_bounded_by_the_memory_there_is_and_the_room_is_given_back() -> None:
    room = 8 * 100 * STREAMING_BYTES
    async with (
        running("h2", handlers(wait_for_ever), held_bytes=room) as front_end,
        connected(front_end.addresses[0]) as client,
    ):
        await client.ping()
        streams = [client.open(PATH, end=True) for _ in range(1_000)]
        await client.ping()
        refused = [stream for stream in streams if client.has_ended(stream)]
        assert 900 < len(refused) < 1_000
        for stream in refused:
            answer = await client.answer(stream)
            assert (answer.code, answer.message) == (Code.RESOURCE_EXHAUSTED, b"too many unfinished calls")
        assert front_end.refused_calls["shed"] == len(refused)
        assert 0 < front_end.held_bytes <= room // 8
        # Others are served.
        answer = await client.call(UNARY_PATH, frame(b"hello"))
        assert answer.code == Code.OK
        for stream in set(streams) - set(refused):
            client.cancel(stream)
        await client.ping()
        assert front_end.held_bytes == 0


async def test_a_client_that_vanishes_silently_is_noticed(kind: str) -> None:
    watched = Watched(wait_for_ever)
    async with (
        running(kind, handlers(watched), ping_after=0.1, check_every=0.01) as front_end,
        connected(front_end.addresses[0]) as client,
    ):
        client.open(PATH)
        await within_seconds(watched.began)
        client.vanish()
        await within_seconds(watched.closed)
    if kind == "h2":
        assert front_end.closed_connections["silent"] == 1


async def test_a_client_with_nothing_to_say_is_not_taken_for_one_that_vanished(kind: str) -> None:
    watched = Watched(wait_for_ever)
    async with (
        running(kind, handlers(watched), ping_after=0.1, check_every=0.01) as front_end,
        connected(front_end.addresses[0]) as client,
    ):
        client.open(PATH)
        await within_seconds(watched.began)
        await until(lambda: client.pings >= 3)
        assert not watched.closed.is_set()


async def test_calls_that_come_and_go_are_not_all_young_to_the_cycle_collector() -> None:
    """Otherwise it looks at a hundred thousand objects at once: it goes by how many more have come than gone."""
    async with running("h2", handlers(wait_for_ever)) as front_end, connected(front_end.addresses[0]) as client:
        with collected_when_told() as young_objects:
            for _ in range(100):
                client.open(PATH)
            await client.ping()
            young = young_objects()
        assert sum(isinstance(found, StreamingCall) for found in young) < 50
