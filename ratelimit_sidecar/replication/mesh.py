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
from ratelimit_sidecar.mesh_status import MembershipStatus, PeerStatus
from ratelimit_sidecar.replication.bounds import DEFAULT_BOUNDS, MeshBounds
from ratelimit_sidecar.replication.deltas import OnNews
from ratelimit_sidecar.replication.demands import QuotaDemands
from ratelimit_sidecar.replication.dialler import Dialler, RedialWait, redial_seconds
from ratelimit_sidecar.replication.listener import Listener
from ratelimit_sidecar.replication.open_streams import OpenStreams
from ratelimit_sidecar.replication.payments import PaymentExchange
from ratelimit_sidecar.replication.peer import BatchTracer
from ratelimit_sidecar.replication.periodic import Periodic
from ratelimit_sidecar.replication.progress import Progress
from ratelimit_sidecar.replication.replicator import Replicator
from ratelimit_sidecar.replication.resolver import Resolver
from ratelimit_sidecar.replication.scheduler import Scheduler
from ratelimit_sidecar.replication.session import LocalNode
from ratelimit_sidecar.replication.stream import Stream
from ratelimit_sidecar.replication.stream_io import Call
from ratelimit_sidecar.replication.targets import Target
from ratelimit_sidecar.replication.tls import NodeCertificate, PeerCertificate, of_client
from ratelimit_sidecar.replication.wire import FAULTLESS, Reason
from ratelimit_sidecar.supervision import Supervisor

LISTENER = "mesh_listener"
"""The name of the listener's task in metrics and `/readyz`."""

_log = structlog.stdlib.get_logger(__name__)


class Mesh:
    """The mesh of one node. Call `start`, then `run`, which lasts until `stop`.

    Args:
        origin: this process.
        now_us: wall clock in microseconds; when it is set, `set_clock` is to be called.
        strict_us: the clock of strict limits, which never steps; None where `now_us` does not either.
        peers: `host:port` of siblings; this node's own may be among them, and a name may have many addresses.
        listen: `host:port`; None to dial only. Port 0 takes a free one.
        payments: None when no limit is strict.
        is_gateway: it speaks for the sidecars of its region.
        certificate: None for a mesh in plain text.
        supervisor: of the tasks that run for as long as the mesh does.
        redial: how long to wait before the next dial.
    """

    def __init__(
        self,
        *,
        origin: Origin,
        region: str,
        version: str,
        store: Store,
        now_us: Callable[[], int],
        strict_us: Callable[[], int] | None = None,
        peers: Sequence[str] = (),
        listen: str | None = None,
        tracer: BatchTracer | None = None,
        payments: PaymentExchange | None = None,
        is_gateway: bool = False,
        demands: QuotaDemands | None = None,
        certificate: NodeCertificate | None = None,
        resolver: Resolver | None = None,
        supervisor: Supervisor | None = None,
        bounds: MeshBounds = DEFAULT_BOUNDS,
        redial: RedialWait = redial_seconds,
    ) -> None:
        self._bounds = bounds
        self._now_us = now_us
        self._supervisor = Supervisor() if supervisor is None else supervisor
        self._strict_us = now_us if strict_us is None else strict_us
        self._payments = payments
        membership = None if payments is None else payments.membership
        local = LocalNode(origin, region, version, membership, is_gateway)
        self._replicator = Replicator(local, store, now_us(), tracer, payments, demands=demands, bounds=bounds)
        self._replicator.sync.has_joined = False
        self._scheduler = Scheduler()
        self._progress = Progress()
        """Notified whenever a frame was received or a stream or dial has ended."""
        self._dialler = Dialler(
            peers,
            replicator=self._replicator,
            carry=self._carry_dialled,
            progress=self._progress,
            strict_us=self._strict_us,
            resolver=Resolver() if resolver is None else resolver,
            certificate=certificate,
            bounds=bounds,
            redial=redial,
        )
        self.certificate = certificate
        """This node's certificate; None in plain text."""
        self._listener: Listener | None = None
        """None when this node only dials."""
        if listen is not None:
            self._listener = Listener(listen, certificate=certificate, accept=self._accept, bounds=bounds)
        self._is_left_out_logged = False
        self._stopping = asyncio.Event()
        self._open_streams = OpenStreams(
            self._replicator,
            scheduler=self._scheduler,
            progress=self._progress,
            now_us=now_us,
            strict_us=self._strict_us,
            certificate=certificate,
            bounds=bounds,
        )

    @property
    def bound_address(self) -> str | None:
        """Where `start` has bound; None when this node only dials."""
        return self._open_streams.own_address

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

    def subscribe_changes(self, callback: Callable[[Sequence[tuple[Bucket, list[int]]]], object]) -> None:
        """From now on call this with every change of this node (see `ChangeLog.on_changes`), also in a mesh without
        peers."""
        self._replicator.changes.on_changes.append(callback)

    def subscribe_news(self, callback: OnNews) -> None:
        """From now on call this with everything new that peers send (see `Replicator.on_news`)."""
        self._replicator.on_news = callback

    def tell(self, bucket: Bucket, entries: Sequence[Entry]) -> None:
        """Send all peers these entries, of an origin that this node alone speaks for (see `Replicator.tell`)."""
        self._replicator.tell(bucket, entries)

    def membership_status(self) -> MembershipStatus | None:
        """Who shares strict limits; None when no limit is strict."""
        return None if self._payments is None else self._payments.status()

    def status(self) -> list[PeerStatus]:
        """Every peer known by name, then every address that has led to nobody yet and name that is not resolved.

        Of a region with a gateway only the connected gateway is shown: neither gateways before it, nor the other
        addresses of its name, where sidecars that could follow it do not listen yet.
        """
        now_us, targets = self._now_us(), self._dialler.targets
        gateways = self._replicator.gateways()
        peers = [
            peer.status(now_us, self._replicator.rules)
            for peer in self._replicator.peers.values()
            if peer.streams or not peer.is_gateway or peer.region not in gateways.values()
        ]
        since_us = self._replicator.peer_registry.first_change_us
        lag_seconds = 0.0 if since_us is None else (now_us - since_us) / 1e6
        return peers + targets.statuses(lag_seconds, gateways)

    async def start(self) -> None:
        """Bind the listener, if there is one; peers can connect from here on.

        Raises:
            OSError: the address cannot be listened on, or the files of the certificate cannot be used.
        """
        if self.certificate is not None:
            await asyncio.to_thread(self.certificate.load)
        if self._listener is not None:
            await self._listener.bind()
            self._open_streams.own_address = self._listener.address

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
            # As often as a flush; nothing is urgent about it.
            "mesh_compare": Periodic(self._compare, self._bounds.flush).run,
            "mesh_dial": self._dialler.run,
        }
        if self._listener is not None:
            kept[LISTENER] = self._listener.serve
        if self.certificate is not None:
            kept["mesh_certificate"] = self.certificate.keep_read
        return kept

    async def close(self) -> None:
        """Free the listener. `run` does so when it ends: this is for who has called `start` and cannot `run`."""
        if self._listener is not None:
            await self._listener.stop()

    def forget(self) -> None:
        """Free the change log. Call it when the mesh will not be used any more."""
        self._replicator.changes.set_clock(self._now_us())

    async def flush_until(self, has_rules: asyncio.Event) -> None:
        """Flush, without any stream, until there are rules. Call it before `run`. A peer that connects later gets a
        snapshot, so nothing is kept for it."""
        async with asyncio.TaskGroup() as tasks:
            flushing = tasks.create_task(self._flush_forever())
            await has_rules.wait()
            flushing.cancel()

    @property
    def is_id_taken(self) -> bool:
        """True while a peer refuses this node because another node has its id: they do not share limits then."""
        return self._open_streams.is_id_taken

    def clocks_ahead_us(self) -> list[int]:
        """The clocks of the connected peers minus this node's, of those that are measured."""
        offsets_us = [peer.reported.clock_offset_us for peer in self._replicator.peers.values()]
        return [offset_us for offset_us in offsets_us if offset_us is not None]

    def set_clock(self, origin: Origin) -> None:
        """The clock was set (see `Replicator.set_clock`): end all streams, and begin anew."""
        self._open_streams.close(Reason.CLOCK_SET, "the clock was set", self._now_us())
        self._replicator.set_clock(origin, self._now_us())

    def stop(self) -> None:
        """Let `run` send the connected peers what is left, say Goodbye and return, within 3 s."""
        self._dialler.stop()
        self._stopping.set()

    async def wait_joined(self, timeout_seconds: float, most_seconds: float = 0.0) -> bool:
        """Wait until every configured peer that can be reached has sent what it knows. To be called once, at the start:
        then one peer sends everything, and the others what is recent.

        Args:
            most_seconds: if a peer is still sending everything after `timeout_seconds`, it is waited for, but no longer
                than this in all.

        Returns:
            False when the time ran out first.
        """
        sync, has_joined = self._replicator.sync, self._dialler.has_joined
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds):
                await self.until(has_joined)
        with suppress(TimeoutError):
            async with asyncio.timeout(most_seconds - timeout_seconds):
                await self.until(lambda: has_joined() or not sync.is_receiving_all)
        sync.join()
        return has_joined()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds: it is asked whenever a frame was received or a stream or dial has ended."""
        await self._progress.until(condition)

    async def _flush_forever(self) -> None:
        periodic = Periodic(self._flush, self._bounds.flush)
        self._replicator.store.journal.on_urgent = periodic.call_soon
        await periodic.run()

    async def _flush(self) -> None:
        if self._payments is not None:
            self._payments.set_id_taken(is_taken=self.is_id_taken)
        await self._scheduler.run(self._replicator.flush_steps(self._now_us()), is_urgent=True)
        journal = self._replicator.store.journal
        if journal.left_out and not self._is_left_out_logged:
            self._is_left_out_logged = True
            _log.error("bucket_left_out", error=journal.left_out_error)

    async def _compare(self) -> None:
        await self._scheduler.run(self._replicator.compare_steps(self._now_us()))

    async def _drain(self) -> None:
        await self._flush()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._bounds.drain):
                await self.until(self._replicator.is_all_acknowledged)
        self._open_streams.close(Reason.DRAINING, "the sidecar is shutting down", self._now_us())
        with suppress(TimeoutError):
            async with asyncio.timeout(self._bounds.goodbye):
                await self.until(lambda: not self._open_streams.streams)
        if self._listener is not None:
            await self._listener.stop(self._bounds.goodbye)

    async def _accept(self, _requests: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        """Carry a stream that a peer has dialled."""
        if self._stopping.is_set():
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(Reason.DRAINING.value))
        certificate = None if self.certificate is None else of_client(context.auth_context())
        stream = await self._open_streams.run(context, context.peer(), None, certificate, self._dialler)
        error = stream.error
        if error is not None:
            # What the peer has sent may be quoted here, and a status is ASCII.
            await context.abort(_code_of(error.reason), str(error).encode("ascii", "backslashreplace").decode())

    async def _carry_dialled(self, call: Call, target: Target, certificate: PeerCertificate | None) -> Stream:
        return await self._open_streams.run(call, target.address, target, certificate, self._dialler)


def _code_of(reason: Reason) -> grpc.StatusCode:
    """The status with which a listener ends a stream."""
    if reason in FAULTLESS:
        return grpc.StatusCode.UNAVAILABLE
    if reason is Reason.INTERNAL:
        return grpc.StatusCode.INTERNAL
    return grpc.StatusCode.FAILED_PRECONDITION
