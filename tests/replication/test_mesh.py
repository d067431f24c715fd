"""Meshes of several nodes in one process, over real gRPC on loopback."""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress

import grpc
import grpc.aio
import pytest
from replication.builders import (
    PAIR,
    PER_PLAN,
    PER_USER,
    SIT_OUT_US,
    bucket_of,
    frame,
    key_of,
    ledger_of,
    node,
    store_of,
    take,
)
from replication.meshes import (
    TIMEOUT_SECONDS,
    Sidecar,
    address_of,
    dialled,
    events,
    free_addresses,
    hello,
    node_of,
    now_us,
    sidecar,
    told,
)
from server.raw_http2 import connected
from structlog.testing import capture_logs
from tenacity import RetryCallState

from ratelimit_sidecar.crdt.bucket import Bucket, Origin
from ratelimit_sidecar.crdt.shares import Membership
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.replication.bounds import MeshBounds
from ratelimit_sidecar.replication.listener import Listener
from ratelimit_sidecar.replication.mesh import Mesh
from ratelimit_sidecar.replication.open_streams import SKEW_US
from ratelimit_sidecar.replication.payments import PaymentExchange
from ratelimit_sidecar.replication.peers import PEER_FORGOTTEN_US, region_origin
from ratelimit_sidecar.replication.stream import Stream
from ratelimit_sidecar.replication.stream_io import METHOD
from ratelimit_sidecar.replication.targets import Target
from ratelimit_sidecar.replication.v1 import replication_pb2 as pb
from ratelimit_sidecar.replication.wire import MAX_FRAME_BYTES, PROTOCOL
from ratelimit_sidecar.supervision import Supervisor


async def test_three_nodes_with_one_list_of_peers_that_contains_themselves_share_what_they_take() -> None:
    addresses = free_addresses(3)
    async with AsyncExitStack() as stack:
        nodes = [
            await stack.enter_async_context(sidecar(name, listen=listen, peers=addresses))
            for name, listen in zip("abc", addresses, strict=True)
        ]
        for each in nodes:
            assert await each.mesh.wait_joined(TIMEOUT_SECONDS)
        for hits, each in enumerate(nodes, start=1):
            each.take("ann", hits * 100)
        for each in nodes:
            await each.knows("ann", 600)
            assert sorted(status.node for status in each.mesh.status()) == sorted(set("abc") - {node_of(each)})
        at_us = now_us() + 1_000_000
        assert len({bucket_of(each.store, "ann", at_us).fold(at_us) for each in nodes}) == 1


async def test_a_killed_node_gets_back_what_it_had_taken_and_the_others_go_on() -> None:
    addresses = free_addresses(3)
    async with AsyncExitStack() as stack:
        a, b, c = [
            await stack.enter_async_context(sidecar(name, listen=listen, peers=addresses))
            for name, listen in zip("abc", addresses, strict=True)
        ]
        for each in (a, b, c):
            assert await each.mesh.wait_joined(TIMEOUT_SECONDS)
        a.take("ann", 700)
        await b.knows("ann", 700)
        await a.kill()
        b.take("ann", 50)
        await c.knows("ann", 750)
        a = await stack.enter_async_context(sidecar("a", incarnation=2, listen=addresses[0], peers=addresses))
        assert await a.mesh.wait_joined(TIMEOUT_SECONDS)
        assert a.tokens("ann") == 750
        a.take("ann", 10)
        await b.knows("ann", 760)
        status = b.peer("a")
        assert status is not None
        assert status.reconnects == 1


async def test_a_peer_that_only_dials_in_is_told_everything_too() -> None:
    async with sidecar("a") as a, sidecar("b", listen=None, peers=[address_of(a)]) as b:
        await a.connected_to("b")
        a.take("ann", 5)
        b.take("ann", 7)
        await b.knows("ann", 12)
        await a.knows("ann", 12)


async def test_what_gateways_tell_of_their_region_has_the_room_of_a_peer_while_one_of_them_is_connected() -> None:
    def gateway(name: str, address: str) -> AbstractAsyncContextManager[Sidecar]:
        return sidecar(name, listen=None, peers=[address], region="west", is_gateway=True)

    def is_gone(name: str) -> Callable[[], bool]:
        return lambda: (status := a.peer(name)) is None or not status.connected

    async with sidecar("a") as a, gateway("first", address_of(a)) as first, gateway("next", address_of(a)) as following:
        peers = a.store.journal.peers
        await a.connected_to("first")
        await a.connected_to("next")
        assert region_origin("west") in peers
        await first.kill()
        await a.until(is_gone("first"))
        assert region_origin("west") in peers
        await following.kill()
        await a.until(is_gone("next"))
        assert not peers


async def test_a_peer_that_is_not_there_is_listed_by_its_address_and_found_when_it_comes() -> None:
    [address] = free_addresses(1)
    async with sidecar("a", peers=[address]) as a:
        a.take("ann", 5)
        # It cannot be reached: nothing to wait for.
        assert await a.mesh.wait_joined(TIMEOUT_SECONDS)
        [status] = a.mesh.status()
        assert (status.node, status.address, status.connected) == ("", address, False)
        assert status.last_error.startswith("UNAVAILABLE")
        await a.until(lambda: a.mesh.status()[0].lag_seconds > 0)
        async with sidecar("b", listen=address) as b:
            await b.knows("ann", 5)
            [status] = a.mesh.status()
            assert (status.node, status.address, status.connected) == ("b", address, True)


async def test_a_node_whose_address_has_passed_to_another_one_is_forgotten_in_time() -> None:
    [address] = free_addresses(1)
    jump_us = 0
    async with sidecar("a", peers=[address], clock=lambda: now_us() + jump_us) as a:
        async with sidecar("b", listen=address):
            await a.connected_to("b")
        async with sidecar("c", listen=address):
            await a.connected_to("c")
            assert {status.node for status in a.mesh.status()} == {"b", "c"}
            jump_us = PEER_FORGOTTEN_US
            await a.until(lambda: {status.node for status in a.mesh.status()} == {"c"})


async def test_joining_gives_up_waiting_for_a_peer_that_accepts_and_says_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        async with sidecar("a", peers=[f"127.0.0.1:{mute.getsockname()[1]}"]) as a:
            assert not await a.mesh.wait_joined(0.05)


async def test_joining_waits_longer_for_a_peer_that_is_still_telling_everything() -> None:
    # A few frames: the first one has 256.
    buckets = 1_000
    # None of it is used up, however busy the machine is.
    most_seconds = 3_600.0
    async with sidecar("b") as b, AsyncExitStack() as stack:
        assert await b.mesh.wait_joined(most_seconds)
        for number in range(buckets):
            b.take(f"user {number}", 1)
        a = await stack.enter_async_context(sidecar("a", listen=None, peers=[address_of(b)]))
        await a.until(lambda: len(a.store) > 0)
        assert len(a.store) < buckets
        assert await a.mesh.wait_joined(0, most_seconds)
        assert len(a.store) == buckets


async def test_a_peer_that_dies_is_missed_at_once_where_its_connection_breaks() -> None:
    async with sidecar("a") as a, sidecar("b", listen=None, peers=[address_of(a)]) as b:
        await a.connected_to("b")
        await b.kill()
        await a.until(lambda: (status := a.peer("b")) is not None and not status.connected)
        # Which of the two is said is a race in gRPC; a peer that vanished without closing would have been "silent".
        assert a.mesh.status()[0].last_error in {"the peer hung up", "the connection was closed"}


async def test_an_address_that_does_not_answer_is_dialled_with_growing_waits() -> None:
    bounds = MeshBounds(first_redial=0.2, most_redial=0.7)
    longest = [0.0, 0.0, 0.0]
    dials: list[int] = []

    def redial(
        _target: Target, backoff: Callable[[RetryCallState], float], _bounds: MeshBounds, state: RetryCallState
    ) -> float:
        dials.append(state.attempt_number)
        if len(dials) <= len(longest):
            longest[len(dials) - 1] = max(backoff(state) for _ in range(1_000))
        return 0.0

    async with sidecar("a", peers=free_addresses(1), bounds=bounds, redial=redial) as a:
        await a.until(lambda: len(dials) >= 3)
    assert dials[:3] == [1, 2, 3]
    assert longest == pytest.approx([0.2, 0.4, 0.7], rel=0.05)


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"\xff\xff", "malformed"),
        (bytes(MAX_FRAME_BYTES + 1), "too_large"),
        (frame(ack=pb.Ack(sequence=1)), "unexpected"),
        (frame(hello=pb.Hello(node="x", incarnation=1)), "version"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_stream_of_garbage_is_closed_with_the_reason_and_counted_and_the_others_go_on(
    sent: bytes, reason: str
) -> None:
    async with sidecar("a") as a, sidecar("b", listen=None, peers=[address_of(a)]) as b:
        await a.connected_to("b")
        async with grpc.aio.insecure_channel(address_of(a)) as channel:
            call = channel.stream_stream(METHOD)()
            await call.write(sent)
            received = await read_all(call)
            assert await call.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert (await call.details()).startswith(f"{reason}: ")
        assert received[-1].goodbye.reason == reason
        assert a.mesh.protocol_errors == {reason: 1}
        b.take("ann", 7)
        await a.knows("ann", 7)
        status = a.peer("b")
        assert status is not None
        assert (status.connected, status.protocol_errors) == (True, {})


async def read_all(call: grpc.aio.StreamStreamCall[bytes, bytes]) -> list[pb.Frame]:
    """Every frame until the other end closes the stream, whatever the status."""
    received = []
    async with asyncio.timeout(TIMEOUT_SECONDS):
        try:
            while (raw := await call.read()) is not grpc.aio.EOF:
                received.append(pb.Frame.FromString(raw))
        except grpc.aio.AioRpcError:
            pass
    return received


async def test_a_frame_that_no_peer_would_send_is_refused_by_grpc_itself() -> None:
    async with sidecar("a") as a, grpc.aio.insecure_channel(address_of(a)) as channel:
        call = channel.stream_stream(METHOD)()
        await call.write(bytes(8 * MAX_FRAME_BYTES))
        await read_all(call)
        assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@asynccontextmanager
async def broken_peer(answer: bytes) -> AsyncIterator[tuple[str, list[bytes]]]:
    """A listener that answers every stream with a broken frame: its address, and the goodbyes it was told."""
    goodbyes = []

    async def sync(_requests: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        await context.write(answer)
        while (raw := await context.read()) is not grpc.aio.EOF:
            said = pb.Frame.FromString(raw)
            if said.HasField("goodbye"):
                goodbyes.append(said.goodbye.reason)
                return

    server = grpc.aio.server()
    service, _, method = METHOD[1:].partition("/")
    handler = grpc.stream_stream_rpc_method_handler(sync)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, {method: handler})])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}", goodbyes
    finally:
        await server.stop(None)


async def test_a_dialled_peer_that_sends_garbage_is_told_why_counted_and_dialled_again() -> None:
    async with (
        broken_peer(b"\xff\xff") as (address, goodbyes),
        sidecar("b") as b,
        sidecar("a", peers=[address, address_of(b)]) as a,
    ):
        await a.until(lambda: a.mesh.protocol_errors.get("malformed", 0) >= 3)
        assert set(goodbyes) == {"malformed"}
        unreached = next(status for status in a.mesh.status() if status.node == "")
        assert unreached.address == address
        assert unreached.last_error == "malformed: not a Frame"
        assert unreached.protocol_errors["malformed"] >= 2
        assert unreached.failed_dials >= 2
        b.take("ann", 7)
        await a.knows("ann", 7)


async def test_dials_that_are_answered_by_another_service_are_counted() -> None:
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with sidecar("a", peers=[f"127.0.0.1:{port}"]) as a:
            await a.until(lambda: a.mesh.status()[0].failed_dials == 3)
            assert a.mesh.status()[0].last_error.startswith("UNIMPLEMENTED: ")
            await server.stop(None)
            # A dial that the stop has met may say INTERNAL.
            await a.until(lambda: a.mesh.status()[0].last_error.startswith("UNAVAILABLE: "))
            assert a.mesh.status()[0].failed_dials == 0
    finally:
        await server.stop(None)


async def test_dials_that_find_nobody_or_a_peer_that_stops_do_not_count_as_answered_by_an_error() -> None:
    async with sidecar("b") as b, sidecar("a", peers=[address_of(b)]) as a:
        await a.connected_to("b")
        await b.stop()
        await a.until(lambda: a.mesh.status()[0].last_error.startswith("UNAVAILABLE"))
        assert a.mesh.status()[0].failed_dials == 0


async def test_a_call_whose_path_is_no_text_does_not_close_the_listener_for_good() -> None:
    supervisor = Supervisor()
    async with (
        sidecar("a", supervisor=supervisor) as a,
        sidecar("b", listen=None, peers=[address_of(a)]) as b,
    ):
        for failures in (1, 2):
            await b.connected_to("a")
            async with connected(address_of(a)) as client:
                client.open(b"/caf\xe9\xff", end=True)
                await asyncio.wait_for(client.gone.wait(), TIMEOUT_SECONDS)
            # Its streams end when the listener is made anew.
            await b.until(lambda: not b.mesh.status()[0].connected)
            await b.connected_to("a")
            a.take("ann", 7)
            await b.knows("ann", 7 * failures)
            assert supervisor.restarts["mesh_listener"] == failures


@pytest.mark.interpreted
async def test_a_flush_that_fails_is_begun_again() -> None:
    class FailsOnce(Store):
        has_failed = False

        def drain_changes(self, most: int | None = None) -> list[tuple[Bucket, list[int]]]:
            if not self.has_failed:
                self.has_failed = True
                raise RuntimeError("it broke")
            return super().drain_changes(most)

    supervisor = Supervisor()
    local = node("a")
    async with (
        sidecar("a", supervisor=supervisor, store=FailsOnce(local.origin, store_of(local).limit_of_key)) as a,
        sidecar("b", listen=None, peers=[address_of(a)]) as b,
    ):
        await b.connected_to("a")
        a.take("ann", 7)
        await b.knows("ann", 7)
        assert supervisor.restarts["mesh_flush"] == 1


async def test_silent_connections_are_bounded_and_hung_up_on() -> None:
    accepted = asyncio.Event()

    async def accept(_requests: object, _context: object) -> None:
        accepted.set()

    one = Listener("127.0.0.1:0", certificate=None, accept=accept, bounds=MeshBounds(connections=8, handshake=0.5))
    await one.bind()
    host, _, port = one.address.rpartition(":")
    silent = [await asyncio.open_connection(host, int(port)) for _ in range(40)]
    async with asyncio.timeout(TIMEOUT_SECONDS):
        for reader, writer in silent:
            with suppress(ConnectionResetError):
                await reader.read()
            writer.close()
        async with grpc.aio.insecure_channel(one.address) as channel:
            await read_all(channel.stream_stream(METHOD)())
    assert accepted.is_set()
    await one.stop()


async def test_two_live_sidecars_with_one_node_id_are_told_apart_by_an_error() -> None:
    async with (
        sidecar("a") as a,
        sidecar("b", incarnation=1, listen=None, peers=[address_of(a)]) as b,
    ):
        await a.connected_to("b")
        async with sidecar("b", incarnation=2, listen=None, peers=[address_of(a)]) as namesake:
            await namesake.until(lambda: namesake.mesh.status()[0].last_error != "")
            assert "duplicate_node: two live sidecars have the node id 'b'" in namesake.mesh.status()[0].last_error
        b.take("ann", 7)
        await a.knows("ann", 7)


class FaultyStore(Store):
    """Fails to merge, once."""

    has_failed = False

    def join(self, *args: object, **named: object) -> int:
        if not self.has_failed:
            self.has_failed = True
            raise RuntimeError("a bug")
        return super().join(*args, **named)  # type: ignore[arg-type]


@pytest.mark.interpreted
async def test_a_fault_of_this_program_ends_one_stream_is_counted_and_the_peer_comes_back() -> None:
    local = node("a")
    faulty = FaultyStore(local.origin, store_of(local).limit_of_key)
    async with sidecar("a", store=faulty) as a, sidecar("b", listen=None, peers=[address_of(a)]) as b:
        await a.connected_to("b")
        why = "the peer closed the stream: internal: the node's log says more"
        # On a machine that stands still another stream may end before, or after, for its silence.
        told = asyncio.create_task(b.until(lambda: b.mesh.status()[0].last_error == why))
        b.take("ann", 7)
        await a.knows("ann", 7)
        await told
        assert a.mesh.protocol_errors["internal"] == 1


async def test_a_draining_node_first_tells_what_it_has_taken_and_then_says_goodbye() -> None:
    async with sidecar("a") as a, sidecar("b", listen=None, peers=[address_of(a)]) as b:
        await a.connected_to("b")
        a.take("ann", 5)
        await a.stop()
        assert b.tokens("ann") == 5
        await b.until(lambda: (status := b.peer("a")) is not None and not status.connected)
        assert b.mesh.status()[0].last_error == "the peer closed the stream: draining: the sidecar is shutting down"
        assert a.mesh.protocol_errors == b.mesh.protocol_errors == {}


async def test_a_draining_node_takes_no_streams_and_waits_for_a_peer_that_does_not_acknowledge() -> None:
    # As long as nothing moves it, no peer is taken for dead.
    at_us = now_us()
    async with sidecar("a", clock=lambda: at_us, bounds=MeshBounds(drain=3_600.0)) as a, dialled(a) as mute:
        await mute.write(hello("b"))
        await a.connected_to("b")
        a.take("ann", 5)
        a.mesh.stop()
        async with dialled(a) as late, asyncio.timeout(TIMEOUT_SECONDS):
            assert await late.code() is grpc.StatusCode.UNAVAILABLE
            assert await late.details() == "draining"
        assert [peer.connected for peer in a.mesh.status()] == [True]
        # That is all it waits for.
        mute.cancel()
        await a.stop()


async def test_a_drain_ends_in_time_whatever_a_peer_does_not_do() -> None:
    at_us = now_us()
    async with sidecar("a", clock=lambda: at_us, bounds=MeshBounds(drain=0.01, goodbye=0.01)) as a, dialled(a) as mute:
        await mute.write(hello("b"))
        await a.connected_to("b")
        a.take("ann", 5)
        await a.stop()


async def test_streams_that_are_dialled_in_are_bounded() -> None:
    async with sidecar("a", bounds=MeshBounds(streams=1)) as a, dialled(a) as one:
        await one.write(hello("b"))
        await a.connected_to("b")
        async with dialled(a) as one_more, asyncio.timeout(TIMEOUT_SECONDS):
            assert await one_more.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_peers_are_dialled_directly_whatever_proxy_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    [nobody] = free_addresses(1)
    for name in ("grpc_proxy", "https_proxy", "http_proxy"):
        monkeypatch.setenv(name, f"http://{nobody}")
    for name in ("no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    async with sidecar("a") as a, sidecar("b", listen=None, peers=[address_of(a)]) as b:
        await b.connected_to("a")


async def test_a_peer_whose_clock_is_off_is_warned_about_once() -> None:
    off_us = 2 * SKEW_US
    with capture_logs() as logs:
        async with (
            sidecar("a") as a,
            sidecar("b", listen=None, peers=[address_of(a)], clock=lambda: now_us() + off_us) as b,
        ):
            await told(logs, "peer_clock_skewed", times=2)
            for hits in range(1, 11):
                a.take(f"user {hits}", hits)
                await b.knows(f"user {hits}", hits)
    warned = {line["peer"]: line["offset_seconds"] for line in events(logs, "peer_clock_skewed")}
    assert warned == {"a": pytest.approx(-off_us / 1e6, abs=0.05), "b": pytest.approx(off_us / 1e6, abs=0.05)}
    assert len(events(logs, "peer_clock_skewed")) == 2


@pytest.mark.parametrize("ahead_us", [3_600_000_000, -3_600_000_000])
async def test_when_the_clock_is_set_all_is_told_anew_by_both(ahead_us: int) -> None:
    off_us = ahead_us
    async with (
        sidecar("a") as a,
        sidecar("b", listen=None, peers=[address_of(a)], clock=lambda: now_us() + off_us, steady=now_us) as b,
    ):
        await b.connected_to("a")
        a.take("before", 2)
        take(b.store, "before", 3, now_us() + off_us)
        await b.until(lambda: b.mesh.clocks_ahead_us() == [pytest.approx(-ahead_us, abs=50_000)])
        off_us = 0
        if ahead_us > 0:
            b.store.go_back(Origin("b", 2))
        b.mesh.set_clock(b.store.origin)
        assert not b.mesh.clocks_ahead_us()
        await b.until(lambda: b.mesh.clocks_ahead_us() == [pytest.approx(0, abs=50_000)])
        a.take("after", 2)
        await b.knows("after", 2)
        b.take("after", 3)
        await a.knows("after", 5)
        await b.until(lambda: b.tokens("before") >= 2)
        assert not a.mesh.protocol_errors
        assert not b.mesh.protocol_errors


async def test_while_it_waits_for_rules_nothing_is_kept_for_peers() -> None:
    local = node("a", 1)
    store = store_of(local)
    waiting = Mesh(origin=local.origin, region="", version="0", store=store, now_us=now_us)
    there_are_rules = asyncio.Event()
    async with asyncio.TaskGroup() as tasks, asyncio.timeout(TIMEOUT_SECONDS):
        wait = tasks.create_task(waiting.flush_until(there_are_rules))
        take(store, "user", 1, now_us())
        while store.journal.buckets:  # noqa: ASYNC110 (a flush wakes nobody)
            await asyncio.sleep(0.005)
        there_are_rules.set()
        await wait


async def test_what_a_peer_calls_itself_may_be_no_ascii() -> None:
    async with sidecar("a") as a, dialled(a) as call:
        await call.write(hello("☃"))
        await a.connected_to("☃")
        async with dialled(a) as namesake:
            await namesake.write(
                frame(hello=pb.Hello(protocol=PROTOCOL, node="☃", region="eu", incarnation=2, version="0"))
            )
            await read_all(namesake)
            assert await namesake.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert "\\u2603" in await namesake.details()


async def test_a_node_without_peers_stops_at_once() -> None:
    async with sidecar("a", listen=None) as a:
        a.take("ann", 1)
        async with asyncio.timeout(0.5):
            await a.stop()
        assert a.store.drain_changes() == []


class Tracer:
    def __init__(self) -> None:
        self.sent: list[tuple[str, Sequence[bytes]]] = []
        self.ended = asyncio.Event()

    def batch_span(self, peer_node: str, bucket_keys: Sequence[bytes]) -> Tracer | None:
        if not bucket_keys:
            return None
        self.sent.append((peer_node, bucket_keys))
        return self

    @property
    def context(self) -> bytes:
        return b"its trace"

    def apply_span(self, peer_node: str, context: bytes) -> None:
        return None

    def end(self) -> None:
        self.ended.set()


async def test_a_batch_is_traced_until_the_peer_has_applied_it() -> None:
    tracer = Tracer()
    async with sidecar("a", tracer=tracer) as a, sidecar("b", listen=None, peers=[address_of(a)]) as b:
        # Otherwise it may be told with the full state as well.
        await a.until(lambda: (status := a.peer("b")) is not None and status.batches_sent > 0)
        a.take("ann", 5)
        async with asyncio.timeout(TIMEOUT_SECONDS):
            await tracer.ended.wait()
        assert b.tokens("ann") == 5
        assert tracer.sent == [("b", (key_of("ann"),))]


async def test_a_peers_status_has_its_clock_and_its_lag() -> None:
    async with sidecar("a") as a, sidecar("b", listen=None, peers=[address_of(a)]) as b:
        await a.connected_to("b")
        a.take("ann", 5)
        await b.knows("ann", 5)
        await a.until(lambda: (status := a.peer("b")) is not None and 0 < status.lag_seconds < 60)
        status = a.peer("b")
        assert status is not None
        assert status.region == "region of b"
        assert status.address.startswith("ipv4:127.0.0.1:")
        assert status.clock_offset_seconds is not None
        assert abs(status.clock_offset_seconds) < 30


async def test_an_address_that_is_taken_is_named() -> None:
    async with sidecar("a") as a:
        with pytest.raises(OSError, match="the address is taken"):
            async with sidecar("b", listen=address_of(a)):
                pass


async def test_a_peers_list_may_name_an_address_twice() -> None:
    async with sidecar("a") as a, sidecar("b", listen=None, peers=[address_of(a)] * 2) as b:
        await b.connected_to("a")
        assert len(b.mesh.status()) == 1


def payments_of(name: str) -> PaymentExchange:
    """Of a node that has its home, a half of each strict limit."""
    return PaymentExchange(ledger_of(name, PAIR, now_us() - 2 * SIT_OUT_US), now_us)


async def test_a_node_in_want_is_paid_over_the_mesh_what_another_one_has_to_spare() -> None:
    here, there = payments_of("a"), payments_of("b")
    async with (
        sidecar("b", payments=there) as b,
        sidecar("a", listen=None, peers=[address_of(b)], payments=here) as a,
    ):
        await a.connected_to("b")
        bucket = here.ledger.bucket(key_of("gold", "plan"), PER_PLAN, now_us())
        assert bucket.take(bucket.remaining, now_us())
        assert not bucket.take(30, now_us())
        await a.until(lambda: here.payments_received > 0)
        assert bucket.take(10, now_us())
        statuses = [each.mesh.membership_status() for each in (a, b)]
        assert [status and (status.payments_received, status.payments_sent) for status in statuses] != [(0, 0), (0, 0)]


async def test_a_peer_with_other_members_is_warned_about_and_leaves_the_smaller_home() -> None:
    ledger = ledger_of("b", Membership(1, {"a": 1, "b": 3}), now_us() - 2 * SIT_OUT_US)
    with capture_logs() as logs:
        async with (
            sidecar("a", payments=payments_of("a")) as a,
            sidecar("b", listen=None, peers=[address_of(a)], payments=PaymentExchange(ledger, now_us)) as b,
        ):
            await a.connected_to("b")
            await b.connected_to("a")
            for each, peer in ((a, "b"), (b, "a")):
                status = each.mesh.membership_status()
                assert status is not None
                assert status.conflicts == (peer,)
                assert status.home_share == (0.25 if each is a else 0.5)
            # Each says so with the first frame after the Hello by which it is connected.
            warned = await told(logs, "peer_shows_other_members", times=2)
    assert sorted(log["peer"] for log in warned) == ["a", "b"]


async def test_a_node_without_strict_limits_has_no_membership() -> None:
    async with sidecar("a", listen=None) as a:
        assert a.mesh.membership_status() is None


async def test_peers_are_told_at_once_of_a_bucket_that_gets_nearly_used_up() -> None:
    seldom = MeshBounds(flush=3_600.0)
    async with sidecar("b") as b, sidecar("a", peers=[address_of(b)], bounds=seldom) as a:
        assert await a.mesh.wait_joined(TIMEOUT_SECONDS)
        # Not yet: the next flush is an hour away.
        a.take("ann", 100)
        a.take("bob", PER_USER.capacity - 1)
        await b.knows("bob", PER_USER.capacity - 1)
        assert b.tokens("ann") == 100


async def test_a_restarted_node_has_not_joined_while_a_peer_takes_it_for_a_second_one() -> None:
    async with sidecar("b") as b, sidecar("a", listen=None, peers=[address_of(b)]) as before:
        for each in (b, before):
            assert await each.mesh.wait_joined(TIMEOUT_SECONDS)
        before.take("ann", 7)
        await b.knows("ann", 7)
        async with sidecar("a", incarnation=2, listen=None, peers=[address_of(b)]) as restarted:
            await restarted.until(lambda: any("duplicate_node" in each.last_error for each in restarted.mesh.status()))
            assert not await restarted.mesh.wait_joined(0.1)
            # Now b notices that the life before has ended.
            await before.kill()
            assert await restarted.mesh.wait_joined(TIMEOUT_SECONDS)
            assert restarted.tokens("ann") == 7


async def test_a_stream_that_is_cut_is_freed_without_a_garbage_collection() -> None:
    """Which is practically never run (`app.GC_THRESHOLDS`), and what the peer was still to be told may be large."""

    def streams() -> int:
        # The other end's are those of a mesh that ends, and would of a process.
        return sum(isinstance(found, Stream) and not found.is_dialled for found in gc.get_objects())

    async def connect_and_cut(address: str) -> None:
        async with sidecar("b", listen=None, peers=[address]) as b:
            await b.connected_to("a")
            await b.kill()

    async with sidecar("a") as a:
        gc.collect()
        gc.disable()
        try:
            before = streams()
            for _ in range(2):
                await connect_and_cut(address_of(a))
                await a.until(lambda: (peer := a.peer("b")) is None or not peer.connected)
            async with asyncio.timeout(10):
                # The library has yet to end the call.
                while streams() > before:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        finally:
            gc.enable()
