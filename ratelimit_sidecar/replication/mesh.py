"""The mesh of one node on grpc.aio: a listener, the streams dialled by `dialler`, and a flush every 20 ms.

What is said on the streams, and what follows from it, is decided in `replicator`; here are connections, tasks and
deadlines. Whatever happens to one stream, the others do not notice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress

import grpc
import grpc.aio
import structlog

from ratelimit_sidecar.crdt.bucket import Bucket, Entry, Origin
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.replication.carrier import METHOD, OPTIONS, SERVICE, Call, carry
from ratelimit_sidecar.replication.demands import Demands
from ratelimit_sidecar.replication.dialler import MISCONFIGURED_REDIAL_SECONDS, Dialler
from ratelimit_sidecar.replication.flushing import Flushing
from ratelimit_sidecar.replication.peer import BatchTracer, Peer
from ratelimit_sidecar.replication.progress import Progress
from ratelimit_sidecar.replication.purses import Purses
from ratelimit_sidecar.replication.refusals import Refusals
from ratelimit_sidecar.replication.replicator import RESTART_US, Replicator, Stream
from ratelimit_sidecar.replication.resolver import Resolver
from ratelimit_sidecar.replication.session import Local
from ratelimit_sidecar.replication.status import MembershipStatus, PeerStatus
from ratelimit_sidecar.replication.targets import Target
from ratelimit_sidecar.replication.tls import NodeCertificate, PeerCertificate, of_client
from ratelimit_sidecar.replication.turns import Turns
from ratelimit_sidecar.replication.wire import FAULTLESS, Reason
from ratelimit_sidecar.supervision import Supervisor

DRAIN_SECONDS = 2.0
"""What connected peers get at a stop to acknowledge what they have yet to hear."""

GOODBYE_SECONDS = 1.0
"""What the last frame of a stream gets to reach the other end."""

SKEW_US = 100_000
"""A clock offset worth a warning: consumption is placed that far from where it belongs."""

CERTAIN_US = 2 * RESTART_US
"""A node that is refused for so long because its id is in use is no node that has just restarted."""

ID_TAKEN_US = int(2.5e6 * MISCONFIGURED_REDIAL_SECONDS)
"""Shown for so long after a stream was refused for it: it is dialled again meanwhile."""

MAX_STREAMS = 512
"""Inbound, at once; two from each of `replicator.MAX_PEERS`."""

MAX_CONNECTIONS = 1_024
"""Inbound, at once; one a stream, and as many more that have not said anything yet."""

HANDSHAKE_SECONDS = 5.0
"""From an inbound connection to its first HTTP/2 settings, TLS included; gRPC's default is two minutes."""

IDLE_SECONDS = 10.0
"""A connection without a stream is closed: who dials opens one at once."""

FAILED_CHECK_SECONDS = 0.25
"""How often it is looked whether the listener still takes streams."""

LISTENER = "mesh_listener"
"""Its name in metrics and `/readyz`."""

_SERVER_OPTIONS = (
    *OPTIONS,
    ("grpc.server_handshake_timeout_ms", int(HANDSHAKE_SECONDS * 1_000)),
    ("grpc.max_connection_idle_ms", int(IDLE_SECONDS * 1_000)),
    # Who dials opens one stream on each connection; the next one may come before the last has ended.
    ("grpc.max_concurrent_streams", 2),
    # Without this a second process could share the port, and neither would know.
    ("grpc.so_reuseport", 0),
    # Lets the peers' keepalive be.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
)

_log = structlog.stdlib.get_logger(__name__)


class Mesh:
    """The mesh of one node. Call `start`, then `run`, which lasts until `stop`.

    Args:
        origin: this process.
        now_us: wall clock in microseconds; when it is set, `set_clock` is to be called.
        steady_us: a clock that never steps; None where `now_us` does not either.
        peers: `host:port` of siblings; this node's own may be among them, and a name may have many addresses.
        listen: `host:port`; None to dial only. Port 0 takes a free one.
        purses: None when no limit is strict.
        certificate: None for a mesh in plain text.
        supervisor: of the tasks that run for as long as the mesh does.
        max_connections: inbound, at once; further ones are closed.
    """

    def __init__(
        self,
        *,
        origin: Origin,
        region: str,
        version: str,
        store: Store,
        now_us: Callable[[], int],
        steady_us: Callable[[], int] | None = None,
        peers: Sequence[str] = (),
        listen: str | None = None,
        tracer: BatchTracer | None = None,
        purses: Purses | None = None,
        demands: Demands | None = None,
        certificate: NodeCertificate | None = None,
        resolver: Resolver | None = None,
        supervisor: Supervisor | None = None,
        max_connections: int = MAX_CONNECTIONS,
    ) -> None:
        self._now_us = now_us
        self._max_connections = max_connections
        self._supervisor = Supervisor() if supervisor is None else supervisor
        self._steady_us = now_us if steady_us is None else steady_us
        self._purses = purses
        membership = None if purses is None else purses.membership
        local = Local(origin, region, version, membership)
        self._replicator = Replicator(local, store, now_us(), tracer, purses, demands=demands)
        self._replicator.has_joined = False
        self._turns = Turns()
        self._progress = Progress()
        """Made whenever a frame was heard or a stream or dial has ended."""
        self._dialler = Dialler(
            peers,
            replicator=self._replicator,
            carry=self._carry_dialled,
            progress=self._progress,
            now_us=self._steady_us,
            resolver=Resolver() if resolver is None else resolver,
            certificate=certificate,
        )
        self.certificate = certificate
        """Of this node; None in plain text."""
        self._refusals = Refusals()
        self._id_refused_us: int | None = None
        """When a stream was last refused because another node has this one's id, for so long that it must be so."""
        self._listen = listen
        self._server: grpc.aio.Server | None = None
        self.bound_address: str | None = None
        """Where `start` has bound; None when this node only dials."""
        self._stopping = asyncio.Event()
        self._carried: dict[Stream, Peer | None] = {}
        """Streams, and whose they are once both ends have accepted each other."""

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

    def read_changes(self, reader: Callable[[Sequence[tuple[Bucket, list[int]]]], object]) -> None:
        """Have the reader told of every change of this node; see `Replicator.on_changes`."""
        self._replicator.on_changes.append(reader)

    def read_news(self, reader: Callable[[Bucket, Sequence[Entry]], object]) -> None:
        """Have the reader told of everything new that peers tell; see `Replicator.on_news`."""
        self._replicator.on_news = reader

    def tell(self, bucket: Bucket, entries: Sequence[Entry]) -> None:
        """See `Replicator.tell`."""
        self._replicator.tell(bucket, entries)

    def membership_status(self) -> MembershipStatus | None:
        """Who shares strict limits; None when no limit is strict."""
        return None if self._purses is None else self._purses.status()

    def status(self) -> list[PeerStatus]:
        """Every peer known by name, then every address that has led to nobody yet and name that is not resolved."""
        now_us, targets = self._now_us(), self._dialler.targets
        peers = [peer.status(now_us, self._replicator.rules) for peer in self._replicator.peers.values()]
        unreached = [
            self._unreached(target.address, target.last_error, target.protocol_errors) for target in targets.unreached()
        ]
        unresolved = [self._unreached(name.configured, name.error, {}) for name in targets.names if name.error]
        return peers + unreached + unresolved

    def _unreached(self, address: str, last_error: str, protocol_errors: Mapping[str, int]) -> PeerStatus:
        since_us = self._replicator.first_change_us
        return PeerStatus(
            node="",
            region="",
            address=address,
            version="",
            protocol=0,
            connected=False,
            lag_seconds=0.0 if since_us is None else (self._now_us() - since_us) / 1e6,
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
            last_error=last_error,
            protocol_errors=dict(protocol_errors),
            refused={},
        )

    async def start(self) -> None:
        """Bind the listener, if there is one; peers can connect from here on.

        Raises:
            OSError: the address cannot be listened on, or the files of the certificate cannot be used.
        """
        if self.certificate is not None:
            await asyncio.to_thread(self.certificate.load)
        if self._listen is not None:
            await self._bind(self._listen)

    async def _bind(self, address: str) -> None:
        options = (*_SERVER_OPTIONS, ("grpc.max_allowed_incoming_connections", self._max_connections))
        server = grpc.aio.server(options=options, maximum_concurrent_rpcs=MAX_STREAMS)
        # No (de)serializers: frames are bytes here.
        handler = grpc.stream_stream_rpc_method_handler(self._accept)
        method = METHOD.rpartition("/")[2]
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, {method: handler})])
        try:
            if self.certificate is None:
                port = server.add_insecure_port(address)
            else:
                port = server.add_secure_port(address, self.certificate.grpc_server_credentials())
        except RuntimeError as error:
            await server.stop(None)
            # The C core logs the cause to stderr and keeps it from its caller.
            raise OSError("the address is taken, or is none of this machine's") from error
        await server.start()
        self._server = server
        self.bound_address = f"{address.rpartition(':')[0]}:{port}"

    async def _serve(self) -> None:
        """Carry what peers dial until `stop`, or raise what has ended gRPC's loop that takes calls.

        That loop ends when a client sends a path that is not UTF-8, and gRPC offers no hook to refuse such a call. So
        the listener is made anew; peers dial again, and streams that this node has dialled go on.
        """
        if self._server is None:
            assert self.bound_address is not None
            await self._bind(self.bound_address)
        server = self._server
        assert server is not None
        try:
            # With a time-out it tells of the failure also while streams are open.
            while await server.wait_for_termination(FAILED_CHECK_SECONDS):
                pass
        except Exception:
            self._server = None
            await server.stop(None)
            raise

    async def run(self) -> None:
        """Replicate until `stop`, then drain; cancelled, it hangs up at once."""
        try:
            async with asyncio.TaskGroup() as tasks:
                running = [
                    tasks.create_task(self._supervisor.keep(name, run)) for name, run in self._kept_running().items()
                ]
                await self._stopping.wait()
                await self._drain()
                for task in running:
                    task.cancel()
        finally:
            await self.close()

    def _kept_running(self) -> Mapping[str, Callable[[], Awaitable[None]]]:
        kept: dict[str, Callable[[], Awaitable[None]]] = {
            "mesh_flush": self._flush_forever,
            "mesh_compare": Flushing(self._compare).run,
            "mesh_dial": self._dialler.run,
        }
        if self._server is not None:
            kept[LISTENER] = self._serve
        if self.certificate is not None:
            kept["mesh_certificate"] = self.certificate.keep_read
        return kept

    async def close(self) -> None:
        """Free the listener. `run` does so when it ends: this is for who has called `start` and cannot `run`."""
        if self._server is not None:
            await self._server.stop(None)

    async def wait(self, until: asyncio.Event) -> None:
        """Before `run`, when there are no rules yet: nobody is told anything, and what is taken is not kept for them.
        Who connects later is told everything that counts."""
        async with asyncio.TaskGroup() as tasks:
            flushing = tasks.create_task(self._flush_forever())
            await until.wait()
            flushing.cancel()

    @property
    def is_id_taken(self) -> bool:
        """True when another node has this one's id, of which some peer knows: limits are not shared with all."""
        refused_us = self._id_refused_us
        return refused_us is not None and self._steady_us() - refused_us < ID_TAKEN_US

    def clocks_ahead_us(self) -> list[int]:
        """The clocks of the connected peers minus this node's, of those that are measured."""
        offsets_us = [peer.clock_offset_us for peer in self._replicator.peers.values()]
        return [offset_us for offset_us in offsets_us if offset_us is not None]

    def set_clock(self, origin: Origin) -> None:
        """The clock was set (see `Replicator.set_clock`): end all streams, and begin anew."""
        for stream in list(self._carried):
            stream.close(Reason.CLOCK_SET, "the clock was set", self._now_us())
        self._replicator.set_clock(origin, self._now_us())

    def stop(self) -> None:
        """Let `run` tell the connected peers what they have yet to hear, say goodbye and return: at most 3 s."""
        self._dialler.stop()
        self._stopping.set()

    async def joined(self, timeout_seconds: float) -> bool:
        """Wait until every configured peer that can be reached has told what it knows. To be called once, at the start:
        then one peer tells everything, and the others what is recent.

        Returns:
            False when the time ran out first.
        """
        try:
            async with asyncio.timeout(timeout_seconds):
                await self.until(self._dialler.has_joined)
        except TimeoutError:
            return False
        finally:
            self._replicator.join()
        return True

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds: it is asked whenever a frame was heard or a stream or dial has ended."""
        await self._progress.until(condition)

    async def _flush_forever(self) -> None:
        flushing = Flushing(self._flush)
        self._replicator.store.journal.on_urgent = flushing.hurry
        await flushing.run()

    async def _flush(self) -> None:
        await self._turns.do(lambda: self._replicator.note_changes(self._now_us()), is_urgent=True)
        await self._turns.do(lambda: self._replicator.tend(self._now_us()), is_urgent=True)

    async def _compare(self) -> None:
        await self._turns.do(lambda: self._replicator.compare(self._now_us()))

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
        certificate = None if self.certificate is None else of_client(context.auth_context())
        stream = await self._carry(context, context.peer(), None, certificate)
        error = stream.error
        if error is not None:
            # What the peer has sent may be quoted here, and a status is ASCII.
            await context.abort(_code_of(error.reason), str(error).encode("ascii", "backslashreplace").decode())

    async def _carry_dialled(self, call: Call, target: Target, certificate: PeerCertificate | None) -> Stream:
        return await self._carry(call, target.address, target, certificate)

    async def _carry(
        self, call: Call, address: str, target: Target | None, certificate: PeerCertificate | None
    ) -> Stream:
        """Args:
        target: None for a stream that the peer has dialled.
        certificate: of the other end; None in plain text.
        """
        woken = asyncio.Event()
        claimed = ""
        is_greeted = False

        def check_peer(origin: Origin, region: str) -> None:
            nonlocal claimed
            claimed = origin.node
            if certificate is not None and self.certificate is not None:
                certificate.check(self.certificate.peer_names, origin, region)
            if target is not None:
                self._dialler.refuse_redundant(target, origin)

        def note_heard() -> None:
            nonlocal is_greeted
            self._progress.made()
            if stream.peer is None:
                return
            if is_greeted:
                self._note_heard(stream, stream.peer)
            elif target is not None:
                self._dialler.note_joined(target, stream.peer)
            is_greeted = True

        stream = Stream(
            self._replicator,
            address,
            is_dialled=target is not None,
            wake=woken.set,
            now_us=self._now_us(),
            check_peer=check_peer,
            is_proven=certificate is not None,
        )
        self._carried[stream] = None
        if target is not None:
            target.stream = stream
        try:
            await carry(
                call,
                stream,
                woken=woken,
                turns=self._turns,
                now_us=self._now_us,
                on_heard=note_heard,
                # A listener ends its calls with a status, which nothing overtakes.
                linger_seconds=0.0 if target is None else GOODBYE_SECONDS,
            )
        finally:
            peer = self._carried.pop(stream)
            if target is not None:
                target.stream = None
            self._progress.made()
            if peer is None:
                self._note_refused(stream, claimed, target)
            elif peer not in self._carried.values():
                _log.info("peer_lost", peer=peer.node, address=address, why=stream.why_ended, **stream.batch_trace)
        return stream

    def _note_heard(self, stream: Stream, peer: Peer) -> None:
        """Something else than its Hello: it has heard this node's, and not refused it."""
        if self._carried[stream] is None:
            self._refusals.forget(stream.address)
            if peer not in self._carried.values():
                _log.info("peer_connected", peer=peer.node, region=peer.region, address=stream.address)
            self._carried[stream] = peer
            if self._purses is not None and self._purses.conflicts_with(peer.node):
                _log.warning("peer_shows_other_members", peer=peer.node, epoch=self._purses.membership.epoch)
        offset_us = peer.clock_offset_us or 0
        was_skewed, peer.is_skewed = peer.is_skewed, abs(offset_us) > SKEW_US
        if peer.is_skewed and not was_skewed:
            _log.warning("peer_clock_skewed", peer=peer.node, offset_seconds=offset_us / 1e6)

    def _note_refused(self, stream: Stream, claimed: str, target: Target | None) -> None:
        """Tell of a stream that one end has not accepted; of those that this node has dialled, `dialler` tells.

        Args:
            claimed: the node id that the other end has; "" when it did not say.
        """
        reason = None if stream.error is None else stream.error.reason
        if Reason.DUPLICATE_NODE in (reason, stream.peer_reason):
            # Where the peer refuses, it is this node's own id that two have.
            node = claimed if reason is Reason.DUPLICATE_NODE else self._replicator.local.origin.node
            self._note_duplicate(node, stream, target)
        elif target is None and not FAULTLESS & {reason, stream.peer_reason}:
            self._note_turned_away(stream, str(reason or stream.why_ended))

    def _note_turned_away(self, stream: Stream, why: str) -> None:
        if self._refusals.note(stream.address, why, self._steady_us()):
            _log.warning("stream_refused", address=stream.address, why=stream.why_ended)

    def _note_duplicate(self, node: str, stream: Stream, target: Target | None) -> None:
        peer, why = self._replicator.peers.get(node), f"{Reason.DUPLICATE_NODE} {node}"
        if peer is not None:
            peer.last_error = stream.why_ended
        if self._refusals.note(stream.address, why, self._steady_us(), certain_after_us=CERTAIN_US):
            other = self.bound_address if peer is None else peer.address
            _log.error(
                "two_nodes_with_one_id",
                node=node,
                addresses=[other or "this node", stream.address],
                why=stream.why_ended,
                fix="give each a node.id of its own",
            )
        is_certain = self._refusals.is_told(stream.address, why)
        if is_certain and node == self._replicator.local.origin.node:
            self._id_refused_us = self._steady_us()
        if target is not None:
            target.is_misconfigured = is_certain


def _code_of(reason: Reason) -> grpc.StatusCode:
    """The status with which a listener ends a stream."""
    if reason in FAULTLESS:
        return grpc.StatusCode.UNAVAILABLE
    if reason is Reason.INTERNAL:
        return grpc.StatusCode.INTERNAL
    return grpc.StatusCode.FAILED_PRECONDITION
