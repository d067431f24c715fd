"""What only the h2 front end decides itself, since the others' gRPC library does it for them."""

import asyncio
import contextlib
import itertools
import time
from pathlib import Path
from urllib.parse import unquote

import pytest
from h2.errors import ErrorCodes
from server.front_ends import ECHO, echo, running
from server.raw_http2 import GRPC_HEADERS, connected, reluctant
from server.work_clock import PerTurn

from ratelimit_sidecar.server.bounds import MAX_MESSAGE_BYTES
from ratelimit_sidecar.server.framing import frame
from ratelimit_sidecar.server.grpc_connection import Connection
from ratelimit_sidecar.server.grpc_front_end import DRAINED_AT_ONCE
from ratelimit_sidecar.server.rpc import Code, Metadata, RpcError
from ratelimit_sidecar.server.turns import QUANTUM_NS

PATH = "/test.Echo/Echo"
TE = (b"te", b"trailers")


async def test_an_answer_is_headers_one_message_and_a_status() -> None:
    async with running("h2", ECHO) as front_end, connected(front_end.addresses[0]) as client:
        answer = await client.call(PATH, frame(b"hello"))
    assert answer.headers == {b":status": b"200", b"content-type": b"application/grpc"}
    assert answer.body == frame(b"hello")
    assert answer.trailers == {b"grpc-status": b"0"}


async def test_a_failed_call_is_answered_by_headers_alone() -> None:
    def refuse(_message, _metadata):
        raise RpcError(Code.NOT_FOUND, "100% naïve\n")

    async with running("h2", {PATH: refuse}) as front_end, connected(front_end.addresses[0]) as client:
        answer = await client.call(PATH, frame(b"hello"))
    assert answer.http_status == 200
    assert answer.trailers_only
    assert answer.code == Code.NOT_FOUND
    assert answer.message == b"100%25 na%C3%AFve%0A"
    assert answer.body == b""


@pytest.mark.parametrize(
    "content_type", [b"application/grpc+proto", b"application/grpc;charset=utf-8", b"Application/gRPC"]
)
async def test_every_spelling_of_grpcs_content_type_is_taken(content_type: bytes) -> None:
    async with running("h2", ECHO) as front_end, connected(front_end.addresses[0]) as client:
        answer = await client.call(PATH, frame(b"hello"), [(b"content-type", content_type), TE])
    assert (answer.body, answer.code) == (frame(b"hello"), Code.OK)


@pytest.mark.parametrize("content_type", [b"application/json", b"application/grpc-web", b"application/grpcx", None])
async def test_another_content_type_is_415(content_type: bytes | None) -> None:
    headers = [TE] if content_type is None else [(b"content-type", content_type), TE]
    async with running("h2", ECHO) as front_end, connected(front_end.addresses[0]) as client:
        answer = await client.call(PATH, b"{}", headers)
    assert answer.http_status == 415
    assert not answer.trailers_only


async def test_another_method_is_405() -> None:
    async with running("h2", ECHO) as front_end, connected(front_end.addresses[0]) as client:
        answer = await client.call(PATH, b"", method=b"GET")
    assert answer.http_status == 405
    assert answer.headers[b"allow"] == b"POST"


async def test_an_unknown_method_is_unimplemented() -> None:
    async with running("h2", ECHO) as front_end, connected(front_end.addresses[0]) as client:
        answer = await client.call("/test.Echo/Nothing", frame(b"hello"))
    assert answer.code == Code.UNIMPLEMENTED
    assert unquote(answer.message.decode()) == "unknown method /test.Echo/Nothing"


async def test_the_answer_to_an_unknown_method_is_short_whatever_its_name() -> None:
    async with running("h2", ECHO) as front_end, connected(front_end.addresses[0]) as client:
        answer = await client.call(b"/" + b"\xff" * 1_000, frame(b"hello"))
    assert answer.code == Code.UNIMPLEMENTED
    assert len(answer.message) < 500


async def test_a_client_that_cannot_read_trailers_is_told_so() -> None:
    async with running("h2", ECHO) as front_end, connected(front_end.addresses[0]) as client:
        answer = await client.call(PATH, frame(b"hello"), [(b"content-type", b"application/grpc")])
    assert answer.code == Code.INTERNAL
    assert b"te: trailers" in answer.message


async def test_a_compressed_request_is_told_what_is_understood() -> None:
    headers = [*GRPC_HEADERS, (b"grpc-encoding", b"gzip")]
    async with running("h2", ECHO) as front_end, connected(front_end.addresses[0]) as client:
        answer = await client.call(PATH, b"\1" + frame(b"zip")[1:], headers)
    assert answer.code == Code.UNIMPLEMENTED
    assert answer.message == b"compressed messages are not supported"
    assert answer.headers[b"grpc-accept-encoding"] == b"identity"


@pytest.mark.parametrize("body", [b"", frame(b"one") + frame(b"two")], ids=["none", "two"])
async def test_a_call_without_exactly_one_message_is_unimplemented(body: bytes) -> None:
    async with running("h2", ECHO) as front_end, connected(front_end.addresses[0]) as client:
        answer = await client.call(PATH, body)
    assert answer.code == Code.UNIMPLEMENTED


async def test_a_message_may_come_in_parts() -> None:
    body = frame(bytes(range(256)))
    async with running("h2", ECHO) as front_end, connected(front_end.addresses[0]) as client:
        stream = client.open(PATH)
        for byte in body[:-1]:
            client.send(stream, bytes([byte]), end=False)
            await client.ping()
        client.send(stream, body[-1:])
        answer = await client.answer(stream)
    assert (answer.body, answer.code) == (body, Code.OK)


async def test_an_oversized_message_is_refused_before_it_is_all_sent() -> None:
    async with running("h2", ECHO) as front_end, connected(front_end.addresses[0]) as client:
        await client.ping()
        stream = client.open(PATH)
        for _ in range(MAX_MESSAGE_BYTES // 16_384 + 1):
            client.send(stream, bytes(16_384), end=False)
            await client.ping()
        answer = await client.answer(stream)
    assert answer.code == Code.RESOURCE_EXHAUSTED


async def test_a_message_that_a_client_gave_up_on_is_not_handled(capfd: pytest.CaptureFixture[str]) -> None:
    handled = []

    def note(message, _metadata):
        handled.append(message)
        return b""

    async with running("h2", {PATH: note}) as front_end, connected(front_end.addresses[0]) as client:
        stream = client.open(PATH)
        client.send(stream, frame(b"given up"), end=False)
        await client.ping()
        client.cancel(stream)
        answer = await client.call(PATH, frame(b"wanted"))
    assert answer.code == Code.OK
    assert handled == [b"wanted"]
    assert "failed" not in capfd.readouterr().err


async def test_a_client_that_stalls_within_a_message_is_reset() -> None:
    async with (
        running("h2", ECHO, body_idle=0.05, check_every=0.01) as front_end,
        connected(front_end.addresses[0]) as client,
    ):
        stream = client.open(PATH)
        client.send(stream, frame(b"hello")[:-1], end=False)
        answer = await client.answer(stream)
    assert answer.reset == ErrorCodes.CANCEL


async def test_a_complete_call_that_its_client_gave_up_on_in_the_same_read_is_not_handled() -> None:
    handled = []

    def note(message, _metadata):
        handled.append(message)
        return b""

    async with running("h2", {PATH: note}) as front_end, connected(front_end.addresses[0]) as client:
        with client.one_write():
            stream = client.open(PATH)
            client.send(stream, frame(b"given up"))
            client.cancel(stream)
        answer = await client.call(PATH, frame(b"wanted"))
    assert answer.code == Code.OK
    assert handled == [b"wanted"]


async def test_calls_whose_few_bytes_stand_for_very_large_headers_are_all_answered() -> None:
    headers = [*GRPC_HEADERS, *[(b"x-long", b"v" * 3_000)] * 40]
    async with running("h2", ECHO) as front_end, connected(front_end.addresses[0]) as client:
        with client.one_write():
            streams = [client.open(PATH, headers) for _ in range(20)]
            for stream in streams:
                client.send(stream, frame(b"hello"))
        answers = await asyncio.gather(*map(client.answer, streams))
    assert [answer.body for answer in answers] == [frame(b"hello")] * 20


async def test_handlers_see_the_headers() -> None:
    def traceparent(_message, metadata):
        return dict(metadata)[b"traceparent"]

    headers = [*GRPC_HEADERS, (b"traceparent", b"00-1-2-01")]
    async with running("h2", {PATH: traceparent}) as front_end, connected(front_end.addresses[0]) as client:
        answer = await client.call(PATH, frame(b""), headers)
    assert answer.body == frame(b"00-1-2-01")


async def test_a_websocket_is_refused() -> None:
    async with running("h2", ECHO) as front_end, connected(front_end.addresses[0]) as client:
        headers = [(b"sec-websocket-version", b"13")]
        stream = client.open(PATH, headers, method=b"CONNECT", protocol=b"websocket")
        answer = await client.answer(stream)
    assert answer.reset == ErrorCodes.PROTOCOL_ERROR


async def test_http_1_is_refused() -> None:
    async with running("h2", ECHO) as front_end:
        host, _, port = front_end.addresses[0].rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET / HTTP/1.1\r\nhost: test\r\n\r\n")
        assert not (await asyncio.wait_for(reader.read(), 5)).startswith(b"HTTP/")
        writer.close()


async def test_a_request_waiting_at_the_end_of_its_drain_is_cut_off() -> None:
    async with (
        running("h2", {PATH: echo}, drain=0.05) as front_end,
        connected(front_end.addresses[0]) as client,
    ):
        stream = client.open(PATH)
        client.send(stream, frame(b"never finished")[:-1], end=False)
        await client.ping()
        async with asyncio.timeout(30):
            await front_end.stop()
    assert not front_end.ready.is_set()


async def test_a_silent_connection_does_not_hold_up_a_stop() -> None:
    async with running("h2", ECHO, drain=60) as front_end:
        host, _, port = front_end.addresses[0].rpartition(":")
        _, writer = await asyncio.open_connection(host, int(port))
        async with asyncio.timeout(30):
            await front_end.stop()
        writer.close()


async def test_a_client_that_does_not_read_is_read_no_further_and_loses_nothing() -> None:
    handled = 0

    def answer_at_length(_message, _metadata):
        nonlocal handled
        handled += 1
        return bytes(8_192)

    async with running("h2", {PATH: answer_at_length}) as front_end, reluctant(front_end.addresses[0]) as client:
        sent = await client.call_until_stuck(PATH, frame(b"x" * 1_000), 0.5)
        assert handled < sent
        # What lies in the buffers of both ends' systems, and in that of the server.
        assert handled * 8_192 < 16 * 1_024 * 1_024
        assert await client.count_answers(sent) == sent


async def test_a_client_that_never_reads_is_disconnected() -> None:
    async with (
        running("h2", {PATH: lambda _message, _metadata: bytes(60_000)}, stalled=0.2, check_every=0.02) as front_end,
        reluctant(front_end.addresses[0]) as client,
    ):
        with pytest.raises(ConnectionError):
            await client.call_until_stuck(PATH, frame(b""), 60)
        assert front_end.closed_connections["stalled"] == 1
        assert front_end.open_connections == 0


@pytest.mark.interpreted
async def test_a_fault_in_dealing_with_one_connection_closes_that_one_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    check = Connection.check
    faulty: list[Connection] = []

    def fail_first(self: Connection, now_s: float) -> None:
        faulty.append(self)
        if self is faulty[0]:
            raise RuntimeError("it broke")
        check(self, now_s)

    monkeypatch.setattr(Connection, "check", fail_first)
    async with running("h2", ECHO, check_every=0.01) as front_end, connected(front_end.addresses[0]) as first:
        await asyncio.wait_for(first.gone.wait(), 30)
        async with connected(front_end.addresses[0]) as second:
            assert (await second.call(PATH, frame(b"hello"))).body == frame(b"hello")
        assert front_end.closed_connections["internal"] == 1


async def test_more_connections_than_allowed_are_closed_at_once() -> None:
    async with (
        running("h2", ECHO, connections=1) as front_end,
        connected(front_end.addresses[0]) as first,
    ):
        await first.call(PATH, frame(b"hello"))
        host, _, port = front_end.addresses[0].rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        with contextlib.suppress(ConnectionResetError):
            assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()
        assert front_end.closed_connections["limit"] == 1
        assert (await first.call(PATH, frame(b"still here"))).code == Code.OK


async def test_a_read_of_many_calls_lets_other_connections_have_their_turn() -> None:
    handled = []

    def slow(message, _metadata):
        time.sleep(0.000_2)
        handled.append(message)
        return message

    async with running("h2", {PATH: slow}) as front_end:
        address = front_end.addresses[0]
        async with connected(address) as busy, connected(address) as other:
            await asyncio.gather(busy.ping(), other.ping())
            with busy.one_write():
                streams = []
                for _ in range(500):
                    stream = busy.open(PATH)
                    busy.send(stream, frame(b"many"))
                    streams.append(stream)
            await asyncio.gather(other.call(PATH, frame(b"one")), *map(busy.answer, streams))
    assert len(handled) == 501
    assert handled.index(b"one") < 400


async def test_calls_of_one_slice_that_take_long_let_other_connections_have_their_turn() -> None:
    handled = []

    def slow(message, _metadata):
        time.sleep(0.002)
        handled.append(message)
        return message

    async with running("h2", {PATH: slow}) as front_end:
        address = front_end.addresses[0]
        async with connected(address) as busy, connected(address) as other:
            await asyncio.gather(busy.ping(), other.ping())
            with busy.one_write():
                streams = [busy.open(PATH) for _ in range(30)]
                for stream in streams:
                    busy.send(stream, frame(b"many"))
                # What came with its call is known before that is answered.
                busy.cancel(streams[-1])
            await asyncio.gather(other.call(PATH, frame(b"one")), *map(busy.answer, streams[:-1]))
    assert handled.index(b"one") < 20
    assert handled.count(b"many") == 29


async def test_many_busy_connections_of_one_address_hold_others_up_no_more_than_one_does(tmp_path: Path) -> None:
    handled = 0

    def slow(message: bytes, _metadata: Metadata) -> bytes:
        nonlocal handled
        if message == b"flood":
            time.sleep(0.002)
            handled += 1
        return message

    async with contextlib.AsyncExitStack() as stack:
        addresses = ["127.0.0.1:0", f"unix:{tmp_path}/rls.sock"]
        front_end = await stack.enter_async_context(running("h2", {"/test.Echo/Echo": slow}, addresses))
        modest = await stack.enter_async_context(connected(front_end.addresses[1]))
        floods = [await stack.enter_async_context(connected(front_end.addresses[0])) for _ in range(40)]
        calls = [(flood, flood.open("/test.Echo/Echo")) for flood in floods for _ in range(5)]
        for flood, stream in calls:
            flood.send(stream, frame(b"flood"))
        while handled < 20:  # noqa: ASYNC110 (in the same turns of the loop)
            await asyncio.sleep(0)
        before = handled
        assert (await modest.call("/test.Echo/Echo", frame(b"hello"))).body == frame(b"hello")
        # A call for each of the few turns of the loop that the two ends need here, and not 40.
        assert handled - before < 20
        for flood, stream in calls:
            assert (await flood.answer(stream)).body == frame(b"flood")


async def test_of_single_calls_of_many_connections_of_one_address_a_few_are_answered_in_each_turn_of_the_loop() -> None:
    handled = 0

    def slow(message: bytes, _metadata: Metadata) -> bytes:
        nonlocal handled
        time.sleep(2 * QUANTUM_NS / 1e9)
        handled += 1
        return message

    async with contextlib.AsyncExitStack() as stack:
        front_end = await stack.enter_async_context(running("h2", {PATH: slow}))
        clients = [await stack.enter_async_context(connected(front_end.addresses[0])) for _ in range(40)]
        async with PerTurn(lambda: handled) as per_turn:
            answers = await asyncio.gather(*[client.call(PATH, frame(b"hello")) for client in clients])
    assert [answer.body for answer in answers] == [frame(b"hello")] * 40
    # Two at once, and one that has waited.
    assert per_turn.most <= 3


@pytest.mark.interpreted
async def test_at_a_stop_a_few_connections_are_told_to_go_in_each_turn_of_the_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drained = 0
    drain = Connection.drain

    def count(connection: Connection) -> None:
        nonlocal drained
        drained += 1
        drain(connection)

    monkeypatch.setattr(Connection, "drain", count)
    in_turns = [0]

    async def watch() -> None:
        while True:
            in_turns.append(drained)
            await asyncio.sleep(0)

    async with contextlib.AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:
        async with running("h2", ECHO) as front_end:
            for _ in range(100):
                client = await stack.enter_async_context(connected(front_end.addresses[0]))
                await client.call("/test.Echo/Echo", frame(b"hello"))
            watching = tasks.create_task(watch())
            await front_end.stop()
        watching.cancel()
    assert drained == 100
    assert max(after - before for before, after in itertools.pairwise(in_turns)) <= DRAINED_AT_ONCE


async def test_an_old_connection_is_told_twice_to_go_and_closed_when_its_calls_are_answered() -> None:
    async with (
        running("h2", ECHO, age=0.2, check_every=0.02) as front_end,
        connected(front_end.addresses[0]) as client,
    ):
        stream = client.open(PATH)
        client.send(stream, frame(b"old")[:-1], end=False)
        await asyncio.wait_for(client.told_to_go.wait(), 30)
        await client.ping()
        # RFC 9113, section 6.8: at first it is not said which calls are the last ones, as some may be on their way.
        assert client.last_streams == [2**31 - 1, stream]
        assert not client.gone.is_set()
        client.send(stream, frame(b"old")[-1:])
        answer = await client.answer(stream)
        await asyncio.wait_for(client.gone.wait(), 30)
        assert front_end.closed_connections["age"] == 1
    assert (answer.body, answer.code) == (frame(b"old"), Code.OK)


async def test_a_call_that_outlasts_the_grace_of_an_old_connection_is_cut_off() -> None:
    async with (
        running("h2", ECHO, age=0.1, age_grace=0.1, check_every=0.02) as front_end,
        connected(front_end.addresses[0]) as client,
    ):
        stream = client.open(PATH)
        client.send(stream, frame(b"never")[:-1], end=False)
        await asyncio.wait_for(client.gone.wait(), 30)
        assert front_end.open_connections == 0


async def test_old_connections_are_kept_when_no_age_is_set() -> None:
    async with (
        running("h2", ECHO, age=None, check_every=0.01) as front_end,
        connected(front_end.addresses[0]) as client,
    ):
        for _ in range(5):
            await asyncio.sleep(0.02)
            assert (await client.call(PATH, frame(b"hello"))).code == Code.OK
        assert not client.told_to_go.is_set()
