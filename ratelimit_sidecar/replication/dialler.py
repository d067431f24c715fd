"""The streams that a node dials: it resolves the names of its peers again and again, and dials each address for ever.

Two targets that lead to one node are dialled once. The second stream is closed as redundant when the peer has said who
it is, and its target waits until the other's stream is lost.
"""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial

import grpc
import grpc.aio
import structlog
from tenacity import AsyncRetrying, RetryCallState, retry_if_result, wait_random_exponential

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.replication.bounds import MeshBounds
from ratelimit_sidecar.replication.peer import Peer
from ratelimit_sidecar.replication.progress import Progress
from ratelimit_sidecar.replication.replicator import Replicator
from ratelimit_sidecar.replication.resolver import Resolver
from ratelimit_sidecar.replication.stream import Stream
from ratelimit_sidecar.replication.stream_io import METHOD, OPTIONS, Call
from ratelimit_sidecar.replication.targets import Name, Target, Targets, host_of, port_of
from ratelimit_sidecar.replication.tls import NodeCertificate, PeerCertificate, UntrustedError
from ratelimit_sidecar.replication.wire import FAULTLESS, ProtocolError, Reason

_MISCONFIGURED = frozenset({Reason.CERTIFICATE, Reason.DUPLICATE_NODE})

_ABSENT = frozenset({socket.EAI_NONAME, socket.EAI_NODATA})
"""The errors by which a resolver says that a name has no addresses, not that it cannot tell."""

_LOOKUPS = 3
"""That fail in a row before a name counts as one without addresses."""

_CHANNEL_OPTIONS = (
    *OPTIONS,
    # Siblings are reached directly: a proxy of the environment is for the way out.
    ("grpc.enable_http_proxy", 0),
    # Each dial is a connection of its own: a shared one would bring its own back-off along.
    ("grpc.use_local_subchannel_pool", 1),
)

_log = structlog.stdlib.get_logger(__name__)

Carry = Callable[[Call, Target, PeerCertificate | None], Awaitable[Stream]]
"""Carries a dialled stream until it ends."""

RedialWait = Callable[[Target, Callable[[RetryCallState], float], MeshBounds, RetryCallState], float]
"""The seconds to wait before the next dial of a target. The second argument gives the random ones, which grow."""


class Dialler:
    """Resolves and dials the peers of a node while `run` runs.

    Args:
        peers: `host:port`, as configured.
        strict_us: returns the time of a clock that never steps.
        certificate: None to dial in plain text.
    """

    def __init__(
        self,
        peers: Sequence[str],
        *,
        replicator: Replicator,
        carry: Carry,
        progress: Progress,
        strict_us: Callable[[], int],
        resolver: Resolver,
        certificate: NodeCertificate | None,
        bounds: MeshBounds,
        redial: RedialWait,
    ) -> None:
        self.targets = Targets(peers)
        self._replicator = replicator
        self._carry = carry
        self._progress = progress
        self._strict_us = strict_us
        self._resolver = resolver
        self._certificate = certificate
        self._bounds = bounds
        self._redial = redial
        # Of a dial that was given up, gRPC keeps the connection until it has given it up itself: by default 20 s.
        self._options = (*_CHANNEL_OPTIONS, ("grpc.min_reconnect_backoff_ms", int(bounds.connect * 1_000)))
        self._is_stopping = False
        self._dialling: dict[Target, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Dial until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for target in self.targets:
                self._start(target, tasks)
            for name in self.targets.names:
                tasks.create_task(self._keep_resolved(name, tasks))

    def stop(self) -> None:
        """Dial no more; current streams go on."""
        self._is_stopping = True

    def has_joined(self) -> bool:
        """True if every peer that can be reached has sent all of the snapshot that it was asked for."""
        return all(name.is_settled for name in self.targets.names) and all(map(self._has_joined, self.targets))

    def _has_joined(self, target: Target) -> bool:
        peer = self._replicator.peers.get(target.node)
        has_told = peer is not None and peer.reported.has_ended_snapshot
        return target.is_self or has_told or (target.has_failed and not target.is_joined)

    def refuse_redundant(self, target: Target, origin: Origin) -> None:
        """Refuse a second stream to one peer. Call it when a dialled peer has said who it is.

        Raises:
            ProtocolError: another target's stream leads to the same process.
        """
        peer = self._replicator.peers.get(origin.node)
        if peer is not None and peer.incarnation == origin.incarnation:
            for stream in peer.streams:
                if stream.is_dialled:
                    self._note_reached(target, origin.node)
                    raise ProtocolError(Reason.REDUNDANT, f"{origin.node} is connected as {stream.address} already")

    def note_joined(self, target: Target, peer: Peer) -> None:
        """Note that the peer at the other end of a target's stream was accepted."""
        self._note_reached(target, peer.node)

    def _note_reached(self, target: Target, node: str) -> None:
        former, target.node = target.node, node
        peer = self._replicator.peers.get(former)
        if peer is not None and not self.targets.leads_to(former):
            # Its address has passed to another node; nobody dials it any more.
            peer.is_configured = False

    def _start(self, target: Target, tasks: asyncio.TaskGroup) -> None:
        self._dialling[target] = tasks.create_task(self._keep_dialled(target))

    async def _keep_resolved(self, name: Name, tasks: asyncio.TaskGroup) -> None:
        host, port = host_of(name.configured), port_of(name.configured)
        while True:
            try:
                addresses = await self._resolver.addresses(host, port)
            except Exception as error:
                # No host can have such a name, the system has no more threads, or whatever else: others go on.
                is_absent = isinstance(error, OSError) and error.errno in _ABSENT
                self._note_unresolved(name, getattr(error, "strerror", None) or str(error), is_absent=is_absent)
            else:
                if not addresses:
                    self._note_unresolved(name, "it has no addresses", is_absent=True)
                else:
                    found = [f"[{each}]:{port}" if ":" in each else f"{each}:{port}" for each in addresses]
                    for target in self.targets.resolved(name, found, self._strict_us()):
                        _log.info("peer_address_found", name=name.configured, address=target.address)
                        self._start(target, tasks)
            self._retire()
            self._progress.notify()
            seconds = self._resolver.every_seconds if name.is_settled else self._resolver.first_seconds
            await asyncio.sleep(seconds * random.uniform(0.8, 1.2))

    def _note_unresolved(self, name: Name, why: str, *, is_absent: bool) -> None:
        if not name.error:
            _log.warning("name_not_resolved", name=name.configured, why=why, kept=list(name.addresses))
        name.failed_lookups += 1
        name.error = why
        # DNS may be away for a moment, or not know yet. Without peers this node would begin with full limits.
        name.is_settled |= is_absent and name.failed_lookups >= _LOOKUPS

    def _retire(self) -> None:
        for target in self.targets.take_retired(self._strict_us()):
            _log.info("peer_address_gone", address=target.address, peer=target.node)
            self._dialling.pop(target).cancel()
            if not self.targets.leads_to(target.node):
                self._replicator.peer_registry.release(target.node)

    async def _keep_dialled(self, target: Target) -> None:
        backoff = wait_random_exponential(multiplier=self._bounds.first_redial, max=self._bounds.most_redial)
        redial = AsyncRetrying(
            wait=partial(self._redial, target, backoff, self._bounds),
            retry=retry_if_result(lambda lasted: not lasted and not self._is_done_with(target)),
        )
        while not self._is_done_with(target):
            await redial(self._dial, target)

    def _is_done_with(self, target: Target) -> bool:
        return target.is_self or self._is_stopping

    async def _dial(self, target: Target) -> bool:
        """Dial once, unless its peer is connected under another address, and carry the stream until it ends.

        Returns:
            True if it lasted.
        """
        if self.targets.is_reached_otherwise(target):
            with suppress(TimeoutError):
                async with asyncio.timeout(self._bounds.parked):
                    await self._progress.until(lambda: not self.targets.is_reached_otherwise(target))
        dialled_us = self._strict_us()
        if target.first_dialled_us is None:
            target.first_dialled_us = dialled_us
        target.is_misconfigured = target.is_mute = False
        has_failed = False
        try:
            async with self._call(target) as (call, certificate):
                stream = await self._carry(call, target, certificate)
        except TimeoutError:
            target.is_mute = True
            self._note_unreached(target, f"not connected within {self._bounds.connect:g} s")
        except grpc.aio.AioRpcError as error:
            has_failed = error.code() is not grpc.StatusCode.UNAVAILABLE
            self._note_unreached(target, f"{error.code().name}: {error.details()}")
        except UntrustedError as error:
            has_failed = True
            # It may trust this node in a moment, as when a certificate begins, or an authority was renewed.
            self._note_unreached(target, str(error), has_failed=False)
        except OSError as error:
            self._note_unreached(target, f"UNAVAILABLE: {error.strerror or error}")
        except Exception:
            _log.exception("peer_dial_failed", address=target.address)
            self._note_unreached(target, f"{Reason.INTERNAL}: see this node's log")
        else:
            has_failed = _has_failed(stream)
            self._note_ended(target, stream)
        has_lasted = self._strict_us() - dialled_us >= self._bounds.lasting * 1e6
        target.failed_dials = target.failed_dials + 1 if has_failed and not has_lasted else 0
        peer = self._replicator.peers.get(target.node)
        if peer is not None:
            peer.failed_dials = target.failed_dials
        self._progress.notify()
        return has_lasted

    @asynccontextmanager
    async def _call(self, target: Target) -> AsyncIterator[tuple[Call, PeerCertificate | None]]:
        """A call on its own connection; with TLS, also the other end's certificate."""
        async with asyncio.timeout(self._bounds.connect) as connecting:
            if self._certificate is None:
                shown, channel = None, grpc.aio.insecure_channel(target.address, options=self._options)
            else:
                pinned = await self._certificate.look_at(host_of(target.address), port_of(target.address))
                connecting.reschedule(asyncio.get_running_loop().time() + self._bounds.connect)
                shown, credentials = pinned.certificate, self._certificate.channel_credentials(pinned)
                options = (*self._options, ("grpc.ssl_target_name_override", pinned.server_name))
                channel = grpc.aio.secure_channel(target.address, credentials, options=options)
            async with channel:
                call = channel.stream_stream(METHOD)()
                await call.wait_for_connection()
                connecting.reschedule(None)
                yield call, shown

    def _note_ended(self, target: Target, stream: Stream) -> None:
        error = stream.error
        if error is not None and error.reason is Reason.SELF:
            target.is_self = True
            _log.info("peer_is_this_node", address=target.address)
            return
        if error is not None and error.reason is Reason.REDUNDANT:
            if error.detail != target.last_error:
                _log.info("peer_has_two_addresses", peer=target.node, address=target.address, why=error.detail)
            target.last_error = error.detail
            return
        if error is not None:
            target.protocol_errors[error.reason] += 1
        reasons = {stream.peer_reason, None if error is None else error.reason}
        is_refused = not stream.is_accepted or bool(reasons & _MISCONFIGURED)
        target.is_misconfigured |= Reason.CERTIFICATE in reasons
        is_taken = Reason.DUPLICATE_NODE in reasons
        # That two nodes have one id is told by itself. Or there are no two, and the peer has yet to notice that the
        # life of this node before has ended: then it can be reached, as one whose stream was just lost.
        self._note_unreached(
            target, stream.why_ended, is_told=not is_refused or is_taken, has_failed=is_refused and not is_taken
        )

    def _note_unreached(self, target: Target, why: str, *, is_told: bool = False, has_failed: bool = True) -> None:
        if why != target.last_error and not is_told:
            _log.warning("peer_unreachable", address=target.address, why=why)
        assert target.first_dialled_us is not None
        is_absent = self._strict_us() - target.first_dialled_us >= self._bounds.absent * 1e6
        target.has_failed |= has_failed and (is_absent or target.is_misconfigured)
        target.last_error = why
        peer = self._replicator.peers.get(target.node)
        if peer is not None:
            peer.last_error = why


def _has_failed(stream: Stream) -> bool:
    """Whether an error ended it that does not go away by itself. That two nodes have one id is told otherwise."""
    reasons = {stream.peer_reason, None if stream.error is None else stream.error.reason}
    return not reasons & (FAULTLESS | {Reason.DUPLICATE_NODE})


def redial_seconds(
    target: Target, backoff: Callable[[RetryCallState], float], bounds: MeshBounds, state: RetryCallState
) -> float:
    """How long to wait before the next dial."""
    if target.is_misconfigured:
        return bounds.misconfigured_redial
    # Who has waited for an answer in vain has waited long enough: a network that heals is used at once.
    return 0.0 if target.is_mute else backoff(state)
