"""All streams that have a connection now: to which peer each leads, and what is logged of them. (`stream_io` moves the
frames of one stream.)
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import structlog

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.replication.bounds import MeshBounds
from ratelimit_sidecar.replication.dialler import Dialler
from ratelimit_sidecar.replication.peer import Peer
from ratelimit_sidecar.replication.peers import RESTART_US
from ratelimit_sidecar.replication.progress import Progress
from ratelimit_sidecar.replication.refusals import Refusals
from ratelimit_sidecar.replication.replicator import Replicator
from ratelimit_sidecar.replication.scheduler import Scheduler
from ratelimit_sidecar.replication.stream import Stream
from ratelimit_sidecar.replication.stream_io import Call, move_frames
from ratelimit_sidecar.replication.targets import Target
from ratelimit_sidecar.replication.tls import NodeCertificate, PeerCertificate
from ratelimit_sidecar.replication.wire import FAULTLESS, Reason

SKEW_US = 100_000
"""A clock offset worth a warning: consumption is placed that far from where it belongs."""

CERTAIN_US = 2 * RESTART_US
"""A node that is refused for so long because its id is in use is no node that has just restarted."""

_log = structlog.stdlib.get_logger(__name__)


@dataclass(slots=True)
class _FarEnd:
    """The far end of one stream.

    Args:
        target: the address at which this node has dialled it; None when it has dialled.
        certificate: None in plain text.
        claimed: the node id that it says in its Hello; "" before.
        is_greeted: this node has received its Hello, and accepted it.
    """

    target: Target | None
    certificate: PeerCertificate | None
    dialler: Dialler
    claimed: str = ""
    is_greeted: bool = False


class OpenStreams:
    """The streams of this node that have a connection now. `run` adds one, and returns when it is over.

    Args:
        progress: made whenever a frame was received or a stream has ended.
        strict_us: the clock of strict limits, which never steps.
        certificate: of this node; None in plain text.
    """

    def __init__(
        self,
        replicator: Replicator,
        *,
        scheduler: Scheduler,
        progress: Progress,
        now_us: Callable[[], int],
        strict_us: Callable[[], int],
        certificate: NodeCertificate | None,
        bounds: MeshBounds,
    ) -> None:
        self.streams: dict[Stream, Peer | None] = {}
        """By stream, its peer; None until both ends have accepted each other."""
        self.own_address: str | None = None
        """Where this node listens."""
        self._replicator = replicator
        self._scheduler = scheduler
        self._progress = progress
        self._now_us = now_us
        self._strict_us = strict_us
        self._certificate = certificate
        self._bounds = bounds
        self._refusals = Refusals()
        self._id_refused_us: int | None = None
        """When a stream was last refused because another node has this one's id, for so long that it must be so."""

    @property
    def is_id_taken(self) -> bool:
        """True while a peer refuses this node because another node has its id: they do not share limits then."""
        refused_us = self._id_refused_us
        # Meanwhile the peer is dialled again.
        return refused_us is not None and self._strict_us() - refused_us < 2.5e6 * self._bounds.misconfigured_redial

    def close(self, reason: Reason, detail: str, now_us: int) -> None:
        """Say Goodbye on all of them."""
        for stream in list(self.streams):
            stream.close(reason, detail, now_us)

    async def run(
        self,
        call: Call,
        address: str,
        target: Target | None,
        certificate: PeerCertificate | None,
        dialler: Dialler,
    ) -> Stream:
        """Have a stream on a call, until it is over.

        Args:
            target: None for a stream that the peer has dialled.
            certificate: of the other end; None in plain text.
        """
        woken = asyncio.Event()
        far_end = _FarEnd(target, certificate, dialler)
        stream = Stream(
            self._replicator,
            address,
            is_dialled=target is not None,
            wake=woken.set,
            now_us=self._now_us(),
            check_peer=partial(self._check_peer, far_end),
            is_proven=certificate is not None,
        )
        self.streams[stream] = None
        if target is not None:
            target.stream = stream
        try:
            await move_frames(
                call,
                stream,
                woken=woken,
                scheduler=self._scheduler,
                now_us=self._now_us,
                on_received=partial(self._note_frame, stream, far_end),
                # A listener ends its calls with a status, which nothing overtakes.
                linger_seconds=0.0 if target is None else self._bounds.goodbye,
                write_seconds=self._bounds.write,
            )
        finally:
            if target is not None:
                target.stream = None
            self._progress.notify()
            self._remove(stream, far_end.claimed, target)
        return stream

    def _check_peer(self, far_end: _FarEnd, origin: Origin, region: str) -> None:
        """See `Stream`: the far end says in its Hello that it is `origin`."""
        far_end.claimed = origin.node
        if far_end.certificate is not None and self._certificate is not None:
            far_end.certificate.check(self._certificate.peer_names, origin, region)
        if far_end.target is not None:
            far_end.dialler.refuse_redundant(far_end.target, origin)

    def _note_frame(self, stream: Stream, far_end: _FarEnd) -> None:
        """Note any frame of the stream."""
        self._progress.notify()
        if stream.peer is None:
            return
        if far_end.is_greeted:
            self._note_received(stream, stream.peer)
        elif far_end.target is not None:
            far_end.dialler.note_joined(far_end.target, stream.peer)
        far_end.is_greeted = True

    def _remove(self, stream: Stream, claimed: str, target: Target | None) -> None:
        """A stream is over.

        Args:
            claimed: the node id that the other end has said; "" when it did not say.
            target: None for a stream that the peer has dialled.
        """
        peer = self.streams.pop(stream)
        if peer is None:
            self._note_refused(stream, claimed, target)
        elif peer not in self.streams.values():
            _log.info("peer_lost", peer=peer.node, address=stream.address, why=stream.why_ended, **stream.batch_trace)

    def _note_received(self, stream: Stream, peer: Peer) -> None:
        """Note a frame after the peer's Hello: it has received this node's Hello, and not refused it."""
        if self.streams[stream] is None:
            self._refusals.forget(stream.address)
            if peer not in self.streams.values():
                _log.info("peer_connected", peer=peer.node, region=peer.region, address=stream.address)
            self.streams[stream] = peer
            payments = self._replicator.payments
            if payments is not None and payments.conflicts_with(peer.node):
                _log.warning("peer_shows_other_members", peer=peer.node, epoch=payments.membership.epoch)
        offset_us = peer.reported.clock_offset_us or 0
        was_skewed, peer.is_skewed = peer.is_skewed, abs(offset_us) > SKEW_US
        if peer.is_skewed and not was_skewed:
            _log.warning("peer_clock_skewed", peer=peer.node, offset_seconds=offset_us / 1e6)

    def _note_refused(self, stream: Stream, claimed: str, target: Target | None) -> None:
        """Log a stream that one end has not accepted, unless this node has dialled it: `dialler` logs those.

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
        if self._refusals.note(stream.address, why, self._strict_us()):
            _log.warning("stream_refused", address=stream.address, why=stream.why_ended)

    def _note_duplicate(self, node: str, stream: Stream, target: Target | None) -> None:
        peer, why = self._replicator.peers.get(node), f"{Reason.DUPLICATE_NODE} {node}"
        if peer is not None:
            peer.last_error = stream.why_ended
        if self._refusals.note(stream.address, why, self._strict_us(), certain_after_us=CERTAIN_US):
            other = self.own_address if peer is None else peer.address
            _log.error(
                "two_nodes_with_one_id",
                node=node,
                addresses=[other or "this node", stream.address],
                why=stream.why_ended,
                fix="give each a node.id of its own",
            )
        is_certain = self._refusals.is_told(stream.address, why)
        if is_certain and node == self._replicator.local.origin.node:
            self._id_refused_us = self._strict_us()
        if target is not None:
            target.is_misconfigured = is_certain
