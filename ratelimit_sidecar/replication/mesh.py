"""The mesh of one node on grpc.aio: a listener, a stream dialled to every configured address, and a flush every 20 ms.

What is said on the streams, and what follows from it, is decided in `replicator`; here are connections, tasks and
deadlines. Whatever happens to one stream, the others do not notice, and an address is dialled again for ever.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import grpc
import grpc.aio
import structlog
from tenacity import AsyncRetrying, retry_if_result, wait_random_exponential

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.replication.carrier import Call, carry
from ratelimit_sidecar.replication.lending import Lending
from ratelimit_sidecar.replication.peer import BatchTracer, Peer
from ratelimit_sidecar.replication.replicator import Replicator, Stream
from ratelimit_sidecar.replication.session import Local
from ratelimit_sidecar.replication.status import MembershipStatus, PeerStatus
from ratelimit_sidecar.replication.v1.replication_pb2 import DESCRIPTOR
from ratelimit_sidecar.replication.wire import FAULTLESS, MAX_FRAME_BYTES, Reason

FLUSH_SECONDS = 0.02

CONNECT_SECONDS = 3.0
"""For a TCP handshake over any distance, with one packet lost."""

FIRST_REDIAL_SECONDS = 0.2
MAX_REDIAL_SECONDS = 5.0
"""Waits are random up to a bound that doubles from the first of these to the second ("full jitter")."""

LASTING_SECONDS = 10.0
"""A stream that lasted so long was in order: its address is dialled again at once, and the waits start afresh."""

DRAIN_SECONDS = 2.0
"""What connected peers get at a stop to acknowledge what they have yet to hear."""

GOODBYE_SECONDS = 1.0
"""What the last frame of a stream gets to reach the other end."""

SKEW_US = 100_000
"""A clock offset worth a warning: consumption is placed that far from where it belongs."""

MAX_STREAMS = 512
"""Inbound, at once; two from each of `replicator.MAX_PEERS`."""

_SERVICE = DESCRIPTOR.services_by_name["Replication"].full_name
_METHOD = "Sync"

_OPTIONS = (
    # Above what a session takes, so that the session can say what is wrong; beyond this the C core does.
    ("grpc.max_receive_message_length", 4 * MAX_FRAME_BYTES),
    # Sessions notice a dead peer by its silence; this frees the sockets of connections whose other end has vanished.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
)

_SERVER_OPTIONS = (
    *_OPTIONS,
    # Without this a second process could share the port, and neither would know.
    ("grpc.so_reuseport", 0),
    # Lets the peers' keepalive be.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
)

_CHANNEL_OPTIONS = (
    *_OPTIONS,
    # Siblings are reached directly: a proxy of the environment is for the way out.
    ("grpc.enable_http_proxy", 0),
    # Each dial is a connection of its own: a shared one would bring its own back-off along.
    ("grpc.use_local_subchannel_pool", 1),
)

_log = structlog.stdlib.get_logger(__name__)


@dataclass(slots=True)
class _Target:
    """A configured address."""

    address: str
    node: str = ""
    """Whom it led to last."""
    is_self: bool = False
    has_failed: bool = False
    """True when at least one dial has come to nothing."""
    last_error: str = ""
    protocol_errors: Counter[str] = field(default_factory=Counter)


class Mesh:
    """Args:
    origin: this process.
    now_us: wall clock in microseconds, never stepping back.
    peers: `host:port` of siblings; this node's own may be among them.
    listen: `host:port`; None to dial only. Port 0 takes a free one.
    lending: None when no limit is strict.
    """

    def __init__(
        self,
        *,
        origin: Origin,
        region: str,
        version: str,
        store: Store,
        now_us: Callable[[], int],
        peers: Sequence[str] = (),
        listen: str | None = None,
        tracer: BatchTracer | None = None,
        lending: Lending | None = None,
    ) -> None:
        self._now_us = now_us
        self._lending = lending
        membership = None if lending is None else lending.membership
        local = Local(origin, region, version, membership)
        self._replicator = Replicator(local, store, now_us(), tracer, lending)
        self._targets = [_Target(address) for address in dict.fromkeys(peers)]
        self._listen = listen
        self._server: grpc.aio.Server | None = None
        self.bound_address: str | None = None
        """Where `start` has bound; None when this node only dials."""
        self._stopping = asyncio.Event()
        self._progress = asyncio.Event()
        """Set whenever a frame was heard or a stream or dial has ended."""
        self._carried: dict[Stream, Peer | None] = {}
        """Streams, and whose they are once that is known."""

    @property
    def protocol_errors(self) -> Mapping[str, int]:
        """Streams this node closed, by reason, including those whose other end never said who it was."""
        return self._replicator.protocol_errors

    @property
    def unknown_keys(self) -> int:
        """Buckets that peers told of and no replicated rule here knows."""
        return self._replicator.unknown_keys

    def use_rules(self, digest: int) -> None:
        """Other rules are in force; see `Replicator.use_rules`."""
        self._replicator.use_rules(digest)

    def membership_status(self) -> MembershipStatus | None:
        """Who shares strict limits; None when no limit is strict."""
        return None if self._lending is None else self._lending.status()

    def status(self) -> list[PeerStatus]:
        """Every peer known by name, then every configured address that has led to nobody yet."""
        now_us = self._now_us()
        since_us = self._replicator.first_change_us
        unreached = [
            PeerStatus(
                node="",
                region="",
                address=target.address,
                version="",
                protocol=0,
                connected=False,
                lag_seconds=0.0 if since_us is None else (now_us - since_us) / 1e6,
                pending_buckets=0,
                batches_sent=0,
                batches_received=0,
                entries_sent=0,
                entries_received=0,
                bytes_sent=0,
                bytes_received=0,
                resyncs=0,
                rules_match=None,
                reconnects=0,
                clock_offset_seconds=None,
                last_error=target.last_error,
                protocol_errors=dict(target.protocol_errors),
            )
            for target in self._targets
            if not target.node and not target.is_self
        ]
        rules = self._replicator.rules
        return [peer.status(now_us, rules) for peer in self._replicator.peers.values()] + unreached

    async def start(self) -> None:
        """Bind the listener, if there is one; peers can connect from here on.

        Raises:
            OSError: the address cannot be listened on.
        """
        if self._listen is None:
            return
        server = grpc.aio.server(options=_SERVER_OPTIONS, maximum_concurrent_rpcs=MAX_STREAMS)
        # No (de)serializers: frames are bytes here.
        handler = grpc.stream_stream_rpc_method_handler(self._accept)
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(_SERVICE, {_METHOD: handler})])
        try:
            port = server.add_insecure_port(self._listen)
        except RuntimeError as error:
            await server.stop(None)
            # The C core logs the cause to stderr and keeps it from its caller.
            raise OSError("the address is taken, or is none of this machine's") from error
        await server.start()
        self._server = server
        self.bound_address = f"{self._listen.rpartition(':')[0]}:{port}"

    async def run(self) -> None:
        """Replicate until `stop`, then drain; cancelled, it hangs up at once."""
        try:
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(self._flush_forever())]
                running += [tasks.create_task(self._keep_dialled(target)) for target in self._targets]
                await self._stopping.wait()
                await self._drain()
                for task in running:
                    task.cancel()
        finally:
            await self.close()

    async def close(self) -> None:
        """Free the listener. `run` does so when it ends: this is for who has called `start` and cannot `run`."""
        if self._server is not None:
            await self._server.stop(None)

    def stop(self) -> None:
        """Let `run` tell the connected peers what they have yet to hear, say goodbye and return: at most 3 s."""
        self._stopping.set()

    async def joined(self, timeout_seconds: float) -> bool:
        """Wait until every configured peer that can be reached has told everything it knows.

        Returns:
            False when the time ran out first.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds):
                await self.until(lambda: all(map(self._has_joined, self._targets)))
                return True
        return False

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds: it is asked whenever a frame was heard or a stream or dial has ended."""
        while not condition():
            self._progress.clear()
            await self._progress.wait()

    def _has_joined(self, target: _Target) -> bool:
        peer = self._replicator.peers.get(target.node)
        return target.is_self or target.has_failed or (peer is not None and peer.full_state_heard)

    async def _flush_forever(self) -> None:
        while True:
            self._replicator.flush(self._now_us())
            await asyncio.sleep(FLUSH_SECONDS)

    async def _drain(self) -> None:
        self._replicator.flush(self._now_us())
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                await self.until(self._replicator.is_settled)
        for stream in list(self._carried):
            stream.close(Reason.DRAINING, "the sidecar is shutting down", self._now_us())
        with suppress(TimeoutError):
            async with asyncio.timeout(GOODBYE_SECONDS):
                await self.until(lambda: not self._carried)
        if self._server is not None:
            await self._server.stop(GOODBYE_SECONDS)

    async def _accept(self, _requests: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        """Carry a stream that a peer has dialled."""
        if self._stopping.is_set():
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(Reason.DRAINING.value))
        stream = await self._carry(context, context.peer(), None)
        error = stream.error
        if error is not None:
            # What the peer has sent may be quoted here, and a status is ASCII.
            await context.abort(_code_of(error.reason), str(error).encode("ascii", "backslashreplace").decode())

    async def _keep_dialled(self, target: _Target) -> None:
        redial = AsyncRetrying(
            wait=wait_random_exponential(multiplier=FIRST_REDIAL_SECONDS, max=MAX_REDIAL_SECONDS),
            retry=retry_if_result(lambda lasted: not lasted and not self._is_done_with(target)),
        )
        while not self._is_done_with(target):
            await redial(self._dial, target)

    def _is_done_with(self, target: _Target) -> bool:
        return target.is_self or self._stopping.is_set()

    async def _dial(self, target: _Target) -> bool:
        """Dial once, and carry the stream until it is lost.

        Returns:
            True when it lasted.
        """
        dialled_us = self._now_us()
        try:
            async with grpc.aio.insecure_channel(target.address, options=_CHANNEL_OPTIONS) as channel:
                call = channel.stream_stream(f"/{_SERVICE}/{_METHOD}")()
                async with asyncio.timeout(CONNECT_SECONDS):
                    await call.wait_for_connection()
                stream = await self._carry(call, target.address, target)
        except TimeoutError:
            self._note_unreached(target, f"not connected within {CONNECT_SECONDS:g} s")
        except grpc.aio.AioRpcError as error:
            self._note_unreached(target, f"{error.code().name}: {error.details()}")
        except Exception:
            _log.exception("peer_dial_failed", address=target.address)
            self._note_unreached(target, f"{Reason.INTERNAL}: see this node's log")
        else:
            self._note_ended(target, stream)
        self._progress.set()
        return self._now_us() - dialled_us >= LASTING_SECONDS * 1e6

    async def _carry(self, call: Call, address: str, target: _Target | None) -> Stream:
        """Args:
        target: None for a stream that the peer has dialled.
        """
        woken = asyncio.Event()
        stream = Stream(self._replicator, address, is_dialled=target is not None, wake=woken.set, now_us=self._now_us())
        self._carried[stream] = None
        try:
            await carry(
                call,
                stream,
                woken=woken,
                now_us=self._now_us,
                on_heard=lambda: self._note_heard(stream, target),
                # A listener ends its calls with a status, which nothing overtakes.
                linger_seconds=0.0 if target is None else GOODBYE_SECONDS,
            )
        finally:
            peer = self._carried.pop(stream)
            self._progress.set()
            if peer is not None:
                if not peer.streams:
                    _log.info("peer_lost", peer=peer.node, address=address, why=stream.why_ended)
            elif target is None and not (stream.error is not None and stream.error.reason is Reason.SELF):
                _log.warning("stream_refused", address=address, why=stream.why_ended)
        return stream

    def _note_heard(self, stream: Stream, target: _Target | None) -> None:
        self._progress.set()
        peer = stream.peer
        if peer is None:
            return
        if self._carried[stream] is None:
            self._carried[stream] = peer
            if len(peer.streams) == 1:
                _log.info("peer_connected", peer=peer.node, region=peer.region, address=stream.address)
            if self._lending is not None and self._lending.conflicts_with(peer.node):
                _log.warning("peer_shows_other_members", peer=peer.node, epoch=self._lending.membership.epoch)
            if target is not None:
                self._note_reached(target, peer)
        offset_us = peer.clock_offset_us or 0
        was_skewed, peer.is_skewed = peer.is_skewed, abs(offset_us) > SKEW_US
        if peer.is_skewed and not was_skewed:
            _log.warning("peer_clock_skewed", peer=peer.node, offset_seconds=offset_us / 1e6)

    def _note_reached(self, target: _Target, peer: Peer) -> None:
        former = self._replicator.peers.get(target.node)
        target.node = peer.node
        if former is not None and all(other.node != former.node for other in self._targets):
            # Its address has passed to another node; nobody dials it any more.
            former.is_configured = False

    def _note_ended(self, target: _Target, stream: Stream) -> None:
        error = stream.error
        if error is not None and error.reason is Reason.SELF:
            target.is_self = True
            _log.info("peer_is_this_node", address=target.address)
            return
        if error is not None:
            target.protocol_errors[error.reason] += 1
        if stream.has_joined:
            target.has_failed = True
            target.last_error = stream.why_ended
        else:
            self._note_unreached(target, stream.why_ended)

    def _note_unreached(self, target: _Target, why: str) -> None:
        if why != target.last_error:
            _log.warning("peer_unreachable", address=target.address, why=why)
        target.has_failed = True
        target.last_error = why
        peer = self._replicator.peers.get(target.node)
        if peer is not None:
            peer.last_error = why


def _code_of(reason: Reason) -> grpc.StatusCode:
    """The status with which a listener ends a stream."""
    if reason in FAULTLESS:
        return grpc.StatusCode.UNAVAILABLE
    if reason is Reason.INTERNAL:
        return grpc.StatusCode.INTERNAL
    return grpc.StatusCode.FAILED_PRECONDITION
