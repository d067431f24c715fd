"""The life of a front end, the same for both kinds."""

import asyncio
import socket
from pathlib import Path

import grpc
import grpc.aio
import pytest
import structlog.testing
from server.front_ends import ECHO, KINDS, running
from server.raw_http2 import connected

from ratelimit_sidecar.server.framing import frame
from ratelimit_sidecar.server.listeners import ListenError
from ratelimit_sidecar.server.rpc import Code, RpcError

PATH = "/test.Echo/Echo"

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
SPAN_ID = "b7ad6b7169203331"


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


async def call(address: str, message: bytes = b"hello", metadata: tuple[tuple[str, str], ...] = ()) -> bytes:
    async with grpc.aio.insecure_channel(address) as channel:
        return await channel.unary_unary(PATH)(message, timeout=5, metadata=metadata)


async def until_refused(address: str) -> None:
    """Connect again and again: the C core closes its listening socket a little after it says it has."""
    host, _, port = address.rpartition(":")
    async with asyncio.timeout(30):
        while True:
            try:
                _, writer = await asyncio.open_connection(host, int(port))
                writer.close()
            except ConnectionRefusedError:
                return
            except ConnectionResetError:
                continue


async def test_it_answers_on_every_address(kind: str, tmp_path: Path) -> None:
    unix = f"unix:{tmp_path}/rls.sock"
    async with running(kind, ECHO, ["127.0.0.1:0", unix, "127.0.0.2:0"]) as front_end:
        assert front_end.addresses[1] == unix
        for address in front_end.addresses:
            assert await call(address) == b"hello"


async def test_a_taken_port_is_an_error_with_the_address(kind: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ListenError, match=f"cannot listen on {address}: Address already in use"):
            await KINDS[kind](ECHO, [address]).start()


async def test_a_front_end_refuses_the_address_of_another(kind: str, tmp_path: Path) -> None:
    async with running(kind, ECHO, ["127.0.0.1:0", f"unix:{tmp_path}/rls.sock"]) as front_end:
        for address in front_end.addresses:
            with pytest.raises(ListenError, match="Address already in use"):
                await KINDS[kind](ECHO, [address]).start()
            assert await call(address) == b"hello"


async def test_no_later_process_can_share_its_port(kind: str) -> None:
    async with running(kind, ECHO) as front_end:
        with socket.socket() as later:
            later.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            later.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            with pytest.raises(OSError, match="Address already in use"):
                later.bind(("127.0.0.1", int(front_end.addresses[0].rpartition(":")[2])))


async def test_it_takes_over_the_socket_file_of_a_crashed_one(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "rls.sock"
    with socket.socket(socket.AF_UNIX) as crashed:
        crashed.bind(str(path))
    async with running(kind, ECHO, [f"unix:{path}"]) as front_end:
        assert path.stat().st_mode & 0o777 == 0o666
        assert await call(front_end.addresses[0]) == b"hello"
    assert not path.exists()


async def test_its_addresses_are_free_after_a_stop(kind: str) -> None:
    async with running(kind, ECHO) as front_end:
        address = front_end.addresses[0]
        await call(address)
    await until_refused(address)
    async with running(kind, ECHO, [address]):
        assert await call(address) == b"hello"


async def test_it_can_be_stopped_before_it_serves(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "rls.sock"
    front_end = KINDS[kind](ECHO, ["127.0.0.1:0", f"unix:{path}"])
    await front_end.start()
    await front_end.stop()
    async with asyncio.timeout(30):
        await front_end.serve()
    assert not path.exists()
    await until_refused(front_end.addresses[0])


async def test_a_path_that_is_no_text_does_not_end_it(kind: str, tmp_path: Path) -> None:
    async with running(kind, ECHO, ["127.0.0.1:0", f"unix:{tmp_path}/rls.sock"]) as front_end:
        for _ in range(3):
            async with connected(front_end.addresses[0]) as client:
                client.open(b"/caf\xe9\xff", end=True)
                client.send(client.open(PATH), frame(b"hello"))
                await asyncio.wait_for(client.gone.wait() if kind == "grpcio" else client.ping(), 30)
            await asyncio.wait_for(front_end.ready.wait(), 30)

            for address in front_end.addresses:
                async with grpc.aio.insecure_channel(address) as channel:
                    assert await channel.unary_unary(PATH)(b"hello", timeout=5, wait_for_ready=True) == b"hello"


async def test_it_is_ready_only_while_it_answers(kind: str) -> None:
    async with running(kind, ECHO) as front_end:
        assert front_end.ready.is_set()
    assert not front_end.ready.is_set()


async def test_a_stop_finishes_the_call_in_flight_and_takes_no_new_client(kind: str) -> None:
    async with running(kind, ECHO) as front_end, connected(front_end.addresses[0]) as client:
        stream = client.open(PATH)
        client.send(stream, frame(b"half")[:7], end=False)
        await client.ping()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(front_end.stop())
            await asyncio.wait_for(client.told_to_go.wait(), 30)
            assert not front_end.ready.is_set()
            await until_refused(front_end.addresses[0])
            client.send(stream, frame(b"half")[7:])
            answer = await client.answer(stream)
    assert (answer.body, answer.code) == (frame(b"half"), Code.OK)


async def test_a_stop_does_not_wait_for_idle_clients(kind: str) -> None:
    async with running(kind, ECHO, drain=60) as front_end, connected(front_end.addresses[0]) as client:
        await client.call(PATH, frame(b"hello"))
        async with asyncio.timeout(30):
            await front_end.stop()


async def test_cancelling_it_drains_too(kind: str) -> None:
    front_end = KINDS[kind](ECHO, ["127.0.0.1:0"])
    await front_end.start()
    serving = asyncio.create_task(front_end.serve())
    await front_end.ready.wait()
    assert await call(front_end.addresses[0]) == b"hello"
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(serving, 30)
    assert not front_end.ready.is_set()
    await until_refused(front_end.addresses[0])


async def test_a_status_reaches_the_client_with_its_message(kind: str) -> None:
    def refuse(_message, _metadata):
        raise RpcError(Code.INVALID_ARGUMENT, "100% naïve\n雪")

    async with running(kind, {PATH: refuse}) as front_end:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(front_end.addresses[0])
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details() == "100% naïve\n雪"


async def test_an_unexpected_failure_is_internal_and_logged_once_a_kind(kind: str) -> None:
    def fail(message, _metadata):
        if message == b"key":
            raise KeyError("secret")
        if message == b"value":
            raise ValueError("secret")
        return message

    async with running(kind, {PATH: fail}) as front_end:
        with structlog.testing.capture_logs() as logs:
            for message in (b"key", b"value", b"key", b"key"):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call(front_end.addresses[0], message, (("traceparent", f"00-{TRACE_ID}-{SPAN_ID}-00"),))
                assert caught.value.code() == grpc.StatusCode.INTERNAL
                assert "secret" not in caught.value.details()
            assert await call(front_end.addresses[0], b"fine") == b"fine"
    assert [(log["event"], log["method"], log["trace_id"], type(log["exc_info"])) for log in logs] == [
        ("rpc_failed", PATH, TRACE_ID, KeyError),
        ("rpc_failed", PATH, TRACE_ID, ValueError),
    ]


async def test_handlers_see_the_metadata_as_often_as_they_look(kind: str) -> None:
    def look_twice(_message, metadata):
        return dict(metadata)[b"traceparent"] + dict(metadata)[b"traceparent"]

    async with running(kind, {PATH: look_twice}) as front_end:
        assert await call(front_end.addresses[0], b"", (("traceparent", "00-a"),)) == b"00-a00-a"
