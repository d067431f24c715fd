"""What only the h2 front end decides itself, since the others' gRPC library does it for them."""

import asyncio
from urllib.parse import unquote

import pytest
from h2.errors import ErrorCodes
from server.front_ends import ECHO, echo, running
from server.raw_http2 import GRPC_HEADERS, ImpatientClient, connected

from ratelimit_sidecar.server.framing import frame
from ratelimit_sidecar.server.h2 import SENT, H2FrontEnd, server_config
from ratelimit_sidecar.server.hosting import Hosting
from ratelimit_sidecar.server.limits import MAX_MESSAGE_BYTES
from ratelimit_sidecar.server.rpc import Code, RpcError

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


async def test_a_client_that_stalls_within_a_message_is_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ratelimit_sidecar.server.h2.BODY_IDLE_SECONDS", 0.05)
    async with running("h2", ECHO) as front_end, connected(front_end.addresses[0]) as client:
        stream = client.open(PATH)
        client.send(stream, frame(b"hello")[:-1], end=False)
        answer = await client.answer(stream)
    assert answer.reset == ErrorCodes.CANCEL


@pytest.mark.parametrize("outcome", [b"an answer", RpcError(Code.NOT_FOUND, "a status")], ids=["answer", "status"])
async def test_a_client_that_is_gone_before_its_answer_is_no_failure(
    outcome: bytes | RpcError, capfd: pytest.CaptureFixture[str]
) -> None:
    def answer_too_late(_message, _metadata):
        client.give_up()
        if isinstance(outcome, RpcError):
            raise outcome
        return outcome

    async with running("h2", {PATH: answer_too_late}) as front_end:
        client = ImpatientClient(front_end.addresses[0])
        client.call(PATH, frame(b"hello"))
        await asyncio.wait_for(client.gave_up.wait(), 5)
        async with connected(front_end.addresses[0]) as other:
            answer = await other.call("/test.Echo/Other", frame(b""))
    client.close()
    assert answer.code == Code.UNIMPLEMENTED
    assert "Exception" not in capfd.readouterr().err


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
    assert answer.http_status == 403


async def test_http_1_is_refused() -> None:
    async with running("h2", ECHO) as front_end:
        host, _, port = front_end.addresses[0].rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET / HTTP/1.1\r\nhost: test\r\n\r\n")
        assert not (await asyncio.wait_for(reader.read(), 5)).startswith(b"HTTP/")
        writer.close()


async def test_a_request_waiting_at_the_end_of_its_drain_is_cut_off() -> None:
    async with (
        running("h2", {PATH: echo}, drain_seconds=0.05) as front_end,
        connected(front_end.addresses[0]) as client,
    ):
        stream = client.open(PATH)
        client.send(stream, frame(b"never finished")[:-1], end=False)
        await client.ping()
        async with asyncio.timeout(5):
            await front_end.stop()
    assert not front_end.ready.is_set()


async def test_a_silent_connection_holds_up_a_stop_for_a_handshake_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ratelimit_sidecar.server.h2.HANDSHAKE_SECONDS", 0.05)
    async with running("h2", ECHO, drain_seconds=60) as front_end:
        host, _, port = front_end.addresses[0].rpartition(":")
        _, writer = await asyncio.open_connection(host, int(port))
        async with asyncio.timeout(5):
            await front_end.stop()
        writer.close()


async def test_h2corns_sends_are_done_at_once_and_say_so_by_their_type() -> None:
    """On which the front end's speed rests, not what it answers."""
    types = []

    async def application(_scope, _receive, send) -> None:
        for message in ({"type": "http.response.start", "status": 200}, {"type": "http.response.body"}):
            sent = send(message)
            types.append(type(sent).__name__)
            await sent

    hosting = Hosting(application, ["127.0.0.1:0"], server_config())
    await hosting.start()
    serving = asyncio.create_task(hosting.serve())
    await hosting.ready.wait()
    async with connected(hosting.addresses[0]) as client:
        await client.call(PATH, b"")
    await hosting.stop()
    await serving
    assert types == [SENT, SENT]


@pytest.mark.parametrize("slow", [{0}, {1}, {2}, {0, 1, 2}, set()])
async def test_a_send_that_is_not_done_at_once_is_waited_for_before_the_next(slow: set[int]) -> None:
    class Done:
        def __await__(self):
            return iter(())

    Done.__name__ = SENT
    events = []

    async def finish(number: int) -> None:
        await asyncio.sleep(0)
        events.append(f"{number} done")

    def send(_message):
        number = sum("sent" in event for event in events)
        events.append(f"{number} sent")
        return finish(number) if number in slow else Done()

    async def receive():
        return next(received)

    scope = {"type": "http", "method": "POST", "path": PATH, "headers": list(GRPC_HEADERS), "extensions": {}}
    front_end = H2FrontEnd(ECHO, [])
    for _ in range(2):
        events.clear()
        received = iter([{"type": "http.request", "body": frame(b"hello")}])
        await front_end._call(scope, receive, send)
        steps = [(number, step) for number in range(3) for step in ("sent", "done")]
        assert events == [f"{number} {step}" for number, step in steps if step == "sent" or number in slow]
