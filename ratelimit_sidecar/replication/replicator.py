"""One node's side of the mesh: its peers, and the streams to them. Sans-I/O: bytes and instants in, bytes out.

Theory of operation. A *peer* is another node, by its id, whatever the streams to it; a *stream* is a session over one
connection, of which two nodes may have two, as each may dial the other. Both carry deltas inwards, but outwards one of
them is in use, the first established; when it is lost the next takes over, from the full state on. (Moving to a better
one would cost a full state and gain nothing: any live stream is as good.) The stream in use also carries what this node
asks peers for of strict limits, and the sums of what it holds (`anti_entropy`); an ask is paid, and sums are answered,
on the stream on which they came. What peers cannot hear from each other is passed on (`relay`).

Everything that affects a peer lives here: who it is (its incarnation), which stream is in use, what it has yet to hear.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Final

from ratelimit_sidecar.crdt.bucket import Bucket, Entry, Origin
from ratelimit_sidecar.crdt.journal import Refused
from ratelimit_sidecar.crdt.store import Store
from ratelimit_sidecar.replication.anti_entropy import SETTLE_US, Exchange, Pass, Summing
from ratelimit_sidecar.replication.deltas import DeltasReader, OnNews
from ratelimit_sidecar.replication.demands import Demands
from ratelimit_sidecar.replication.outbox import MAX_BATCH_BUCKETS
from ratelimit_sidecar.replication.peer import BatchSpan, BatchTracer, Peer
from ratelimit_sidecar.replication.purses import Purses
from ratelimit_sidecar.replication.recent import RecentBuckets
from ratelimit_sidecar.replication.relay import EVERY_US, WALK_BACK_US, Relay
from ratelimit_sidecar.replication.session import (
    ClockMeasured,
    ComparisonReceived,
    DeltasAcknowledged,
    DeltasReceived,
    DemandsReceived,
    Established,
    Event,
    Local,
    PaymentsReceived,
    PeerLeft,
    Session,
    StandingReceived,
)
from ratelimit_sidecar.replication.v1 import replication_pb2 as pb
from ratelimit_sidecar.replication.wire import FAULTLESS, ProtocolError, Reason, read_reaches

MAX_PEERS: Final = 256
"""That only dial in. A full mesh is for tens of sidecars; more nodes than this are a mistake, or an attack on the
memory. A configured peer always has its place.
"""

RESTART_US: Final = 2_000_000
"""A node heard from within two pings is alive: another life of it is then another process with the same id."""

FLUSH_WORK: Final = 96
"""Of one go of a flush: 0.1 ms and more. Each bucket is as much work as there are peers, and two more."""

FORGET_US: Final = 600_000_000
"""A peer that only dials in, and has not for so long, is not coming back: it was replaced under another name."""


class Replicator:
    """All peers of one node.

    Args:
        now_us: the start of the process, or near it.
        tracer: None when nothing is traced.
        purses: None on a node without strict limits; otherwise `local` shows its membership.
        demands: None on a node that gives no quotas.
    """

    def __init__(
        self,
        local: Local,
        store: Store,
        now_us: int,
        tracer: BatchTracer | None = None,
        purses: Purses | None = None,
        *,
        demands: Demands | None = None,
    ) -> None:
        self.local = local
        self.demands = demands
        self.store = store
        self.tracer = tracer
        self.on_changes: list[Callable[[Sequence[tuple[Bucket, list[int]]]], object]] = []
        """Told of each piece of the journal as the peers are: buckets, and own slots that changed. None does I/O."""
        self.on_news: Callable[[Bucket, Sequence[Entry]], object] | None = None
        """Told of what peers tell that is new here. Does no I/O."""
        self.purses = purses
        self.peers: dict[str, Peer] = {}
        self.protocol_errors: Counter[str] = Counter()
        """Streams closed by this node, by reason, including those that never said whose they were."""
        self.unknown_keys = 0
        """Buckets that peers told of and no replicated rule here knows."""
        self.first_change_us: int | None = None
        """When this node first took anything: whoever was never reached misses everything since."""
        self.rules = 0
        """See `use_rules`."""
        self.has_joined = True
        """False from a start until peers have told what they know, or nobody waits for that any more."""
        self._source: Peer | None = None
        """Before that, the peer that tells everything: told it by all, a node would take so many times longer."""
        self.standing = 0
        """Counts up whenever what a Standing says changes."""
        self.relay = Relay(local.origin.node)
        self._ways_changed = False
        self._ways_looked_us = 0
        self._was_full = False
        self._recent = RecentBuckets()
        self.summing = Summing(store, now_us)
        self._flushed_us = self._created_us = now_us
        """When the last flush began, and the one before."""
        self._unflushed = 0
        """Buckets that were in the journal when the flush under way began, and are so still."""
        self._unannounced = 0
        """Buckets that peers have yet to hear of, and that their streams have not been woken for."""

    def flush(self, now_us: int) -> None:
        """Move all own changes from the store's journal to what the peers have yet to hear, `compare`, and `tend`;
        every few milliseconds. Who has other things to do in between does it in pieces: `note_changes`, then `tend`,
        and `compare` whenever there is time."""
        while self.note_changes(now_us) or self.store.journal.buckets:
            pass
        while self.compare(now_us):
            pass
        self.tend(now_us)

    def note_changes(self, now_us: int) -> bool:
        """Move own changes of some buckets from the journal to what the peers have yet to hear.

        Returns:
            True when it has to be called again, for the rest of those that were in it when the first piece was moved.
        """
        if not self._unflushed:
            self._unflushed = len(self.store.journal.buckets)
            # Nobody has noted when each change was made, only that it was not before the last flush.
            self._created_us, self._flushed_us = self._flushed_us, now_us
        created_us = self._created_us
        most = FLUSH_WORK // (2 + len(self.peers))
        changes = self.store.drain_changes(min(self._unflushed, max(1, most)))
        self._unflushed -= len(changes)
        if changes and self.first_change_us is None:
            self.first_change_us = created_us
        for bucket, _ in changes:
            self._recent.note(bucket.key, now_us)
        for peer in self.peers.values():
            for bucket, slots in changes:
                peer.outbox.note(bucket, slots, created_us)
        for reader in self.on_changes:
            reader(changes)
        self._unannounced += len(changes)
        # Woken for each piece, they would write batches of a few buckets.
        if self._unannounced >= MAX_BATCH_BUCKETS or (self._unannounced and not self._unflushed):
            self._unannounced = 0
            for peer in self.peers.values():
                if peer.streams:
                    peer.streams[0].wake()
        return self._unflushed > 0

    def compare(self, now_us: int) -> bool:
        """Do a piece of a step by which what the peers hold is compared: a step is to be begun every few milliseconds.

        Returns:
            True when it has to be called again, for the rest of the step.
        """
        streams = [stream for stream in self.streams() if stream.compares]
        if not streams:
            self.summing.pause()
            return False
        done = self.summing.step(now_us)
        if done is not None:
            for stream in streams:
                stream.passed(done, now_us)
        return self.summing.is_stepping

    def tend(self, now_us: int) -> None:
        """What a flush does besides: ask peers for what the ledger wants, find ways around broken links, forget who
        has gone and what is over."""
        if self.purses is not None:
            self._ask(self.purses)
        self._find_ways(now_us)
        is_full = self.store.full_since_us is not None
        if is_full != self._was_full:
            self._was_full = is_full
            self.announce()
        self.forget_peers(now_us - FORGET_US)
        self._recent.forget(now_us)
        for peer in self.peers.values():
            peer.outbox.tidy()

    def set_clock(self, origin: Origin, now_us: int) -> None:
        """The clock was set. To be called when no stream is left; what the buckets need is `Store.go_back`.

        Args:
            origin: another life of this node when it was set back, the same one when forward.
        """
        assert not any(self.streams())
        self.local = replace(self.local, origin=origin)
        self._flushed_us = self._created_us = self._ways_looked_us = now_us
        if self.first_change_us is not None:
            self.first_change_us = now_us
        for peer in self.peers.values():
            peer.outbox.forget_times()
            peer.lost_us = now_us

    def use_rules(self, digest: int) -> None:
        """Other rules are in force, of which peers are told the digest: nodes with other rules are not compared, since
        the same takes amount to something else there.

        Args:
            digest: of 64 bits, not 0.
        """
        if digest != self.rules:
            self.rules = digest
            self.announce()

    def announce(self) -> None:
        """Tell all peers how this node stands."""
        self.standing += 1
        for stream in self.streams():
            stream.wake()

    def join(self) -> None:
        """Peers have told what they know, or nobody waits for that any more."""
        if not self.has_joined:
            self.has_joined = True
            self.announce()

    def wish(self, peer: Peer) -> None:
        """Decide what to be told by a peer that has said how it stands. What was once wanted is not taken back."""
        if peer.own_wish == pb.UNDECIDED and self.has_joined:
            # A node that has just started knows nothing that is old and that this one does not.
            wish = pb.EVERYTHING if peer.has_joined else pb.RECENT
        else:
            if self._source is None and peer.has_joined and not self.has_joined:
                self._source = peer
            wish = pb.EVERYTHING if self._source is peer else max(peer.own_wish, pb.RECENT)
        if wish != peer.own_wish:
            peer.own_wish = wish
            self.announce()

    def grant_wish(self, peer: Peer, now_us: int) -> None:
        """Begin to tell a peer what it has said that it wants to be told."""
        peer.outbox.wish(now_us, None if peer.wish == pb.EVERYTHING else self._recent)

    def lose(self, peer: Peer) -> None:
        """The last stream of a peer has ended. If it was to tell everything, and has not, another one is asked."""
        if self._source is not peer or self.has_joined or peer.full_state_heard:
            return
        self._source = None
        for other in self.peers.values():
            if other.streams and other.own_wish != pb.UNDECIDED:
                self.wish(other)

    def change_ways(self) -> None:
        """A stream of this node or of a peer has come or gone."""
        self._ways_changed = True

    def _find_ways(self, now_us: int) -> None:
        if not self._ways_changed or now_us - self._ways_looked_us < EVERY_US:
            return
        self._ways_looked_us = now_us
        for peer in self.relay.look(self.peers):
            peer.outbox.walk_again(now_us - WALK_BACK_US)
            peer.streams[0].wake()
        self._ways_changed = self.relay.is_to_look_again

    def pass_on(self, sender: Peer, bucket: Bucket, entries: Sequence[Entry]) -> None:
        """News from a peer, for those that cannot hear it themselves."""
        for entry in entries:
            for peer in self.relay.to_be_told(entry.origin.node):
                # Who reaches whom was looked at a moment ago.
                if peer is not sender and peer.streams:
                    peer.outbox.note_relayed(bucket, (entry,))
                    peer.streams[0].wake()

    def tell(self, bucket: Bucket, entries: Sequence[Entry]) -> None:
        """Tell all peers of these entries, which are of an origin that this node alone speaks for."""
        for peer in self.peers.values():
            if peer.streams:
                peer.outbox.note_relayed(bucket, entries)
                peer.streams[0].wake()

    def _hear_news(self, sender: Peer, bucket: Bucket, entries: Sequence[Entry]) -> None:
        if self.relay.is_needed:
            self.pass_on(sender, bucket, entries)
        if self.on_news is not None:
            self.on_news(bucket, entries)

    def news_reader(self, sender: Peer) -> OnNews | None:
        """What is to be told of news from that peer; None when nobody wants to know."""
        if self.relay.is_needed or self.on_news is not None:
            return partial(self._hear_news, sender)
        return None

    def has_room_for_peer(self, now_us: int) -> bool:
        """Whether one more may dial in. Those that have gone make room."""
        if self._dialled_in() >= MAX_PEERS:
            self.forget_peers(now_us)
        return self._dialled_in() < MAX_PEERS

    def _dialled_in(self) -> int:
        return sum(not peer.is_configured for peer in self.peers.values())

    def forget_peers(self, lost_before_us: int) -> None:
        """Forget the peers that only ever dialled in and were lost by then."""
        gone = [
            peer.node
            for peer in self.peers.values()
            if not peer.streams and not peer.is_configured and peer.lost_us <= lost_before_us
        ]
        for node in gone:
            self._forget(node)

    def release(self, node: str) -> None:
        """No configured address leads to that peer any more: without a stream it is forgotten at once."""
        peer = self.peers.get(node)
        if peer is None:
            return
        peer.is_configured = False
        if not peer.streams:
            self._forget(node)

    def _forget(self, node: str) -> None:
        del self.peers[node]
        if self.purses is not None:
            self.purses.hear(node, None)

    def is_settled(self) -> bool:
        """True when every connected peer has acknowledged everything."""
        return all(peer.outbox.is_settled for peer in self.peers.values() if peer.streams)

    def streams(self) -> Iterator[Stream]:
        """Every established stream."""
        for peer in self.peers.values():
            yield from peer.streams

    def _ask(self, purses: Purses) -> None:
        outboxes = {
            peer.node: outbox
            for peer in self.peers.values()
            if peer.pays and (outbox := peer.streams[0].payments) is not None
        }
        for node in purses.tick(outboxes):
            self.peers[node].streams[0].wake()


class Stream:
    """A session over one connection, from the moment the connection is there.

    Args:
        address: of the far end.
        is_dialled: True when this node has dialled a configured address.
        wake: called when `next_frame` may have something new.
        check_peer: asked about who the peer says it is, and its region, before that has any effect; raises
            ProtocolError to refuse it.
        is_proven: the far end has shown a certificate, of which `check_peer` sees whether it is for the node that it
            says it is.
    """

    def __init__(
        self,
        replicator: Replicator,
        address: str,
        *,
        is_dialled: bool,
        wake: Callable[[], None],
        now_us: int,
        check_peer: Callable[[Origin, str], None] | None = None,
        is_proven: bool = False,
    ) -> None:
        self._replicator = replicator
        self._is_proven = is_proven
        self._session = Session(replicator.local, now_us)
        self.payments = None if replicator.purses is None else replicator.purses.new_outbox()
        self._demands_told = 0
        self._reader: DeltasReader | None = None
        self._deltas: pb.Deltas | None = None
        """Those heard last, until they have been applied."""
        self._applying: BatchSpan | None = None
        """The span of that, when it belongs to a trace."""
        self.batch_trace: dict[str, str] = {}
        """For a line of the log: the `trace_id` of the batch that is being applied, or with which the stream ended."""
        self._exchange: Exchange | None = None
        self._standing_told = 0
        self._pause_owed = False
        self.address = address
        self.is_dialled = is_dialled
        self.wake = wake
        self._check_peer = check_peer
        self.peer: Peer | None = None
        """Whose stream it is: from the peer's Hello until the stream is closing."""
        self.has_joined = False
        """True from the peer's Hello on, if it was accepted."""
        self.error: ProtocolError | None = None
        """What this node closes the stream for."""
        self.peer_reason = ""
        """What the peer has closed it for, as its Goodbye says."""
        self.why_ended = ""
        """Set when the stream is closing or over, by whichever end."""

    @property
    def is_over(self) -> bool:
        """True when there is nothing more to send or to hear: the connection should be closed."""
        return self._session.is_over

    @property
    def pays(self) -> bool:
        """True when the ends can ask and pay each other on it."""
        return self._session.pays

    @property
    def compares(self) -> bool:
        """True when both ends can compare what they hold."""
        return self._session.compares

    @property
    def heard_us(self) -> int:
        """When the last frame arrived."""
        return self._session.heard_us

    def receive(self, raw: bytes, now_us: int) -> None:
        """Take one frame in and apply it. A bad one leaves the stream closing, with `error` set. Who has other things
        to do in between does it in pieces: `hear`, then `apply`."""
        self.hear(raw, now_us)
        while self.apply(now_us):
            pass

    def hear(self, raw: bytes, now_us: int) -> None:
        """Take one frame in; `apply` does what takes long. A bad one leaves the stream closing, with `error` set."""
        try:
            event = self._session.receive(raw, now_us)
            if event is not None:
                self._handle(event, now_us)
            if self.peer is not None:
                self.peer.bytes_received += len(raw)
        except ProtocolError as error:
            self.fail(error, now_us)
        self.wake()

    def apply(self, now_us: int) -> bool:
        """Apply a piece of the frame heard last: deltas, which leave the stream closing when they are bad, with `error`
        set, or comparisons.

        Returns:
            True when it has to be called again, before the next `hear`.
        """
        peer, deltas = self.peer, self._deltas
        # Without a peer the stream is closing: nothing is heard any more.
        if peer is None:
            return False
        if deltas is None:
            return self._answer()
        try:
            is_last = self._apply(peer, now_us)
        except ProtocolError as error:
            self.fail(error, now_us)
            return False
        if is_last:
            self._deltas = None
            self.batch_trace = {}
            self._end_apply_span()
            if deltas.ends_full_state:
                peer.full_state_heard = True
            self._session.acknowledge()
            self.wake()
        return not is_last

    def _answer(self) -> bool:
        """True when it has to be called again."""
        exchange = self._exchange
        if exchange is None or not exchange.is_answering:
            return False
        if exchange.answer():
            return True
        self.wake()
        return False

    def passed(self, done: Pass, now_us: int) -> None:
        """This node has summed up what it holds."""
        peer = self.peer
        assert peer is not None
        outbox = peer.outbox
        is_in_time = peer.full_state_heard and not outbox.is_walking and not outbox.is_behind(now_us - SETTLE_US)
        if self._exchange is None or not is_in_time or peer.rules_match(self._replicator.rules) is False:
            return
        if peer.streams[0] is self:
            self._exchange.passed(done)
            self.wake()

    def check_time(self, now_us: int) -> None:
        """To be called a few times a second: pings, and notices a dead peer, which leaves the stream closing."""
        try:
            self._session.check_time(now_us)
            if self._replicator.purses is not None and self.payments is not None:
                self._replicator.purses.check_time(self.payments)
        except ProtocolError as error:
            self.fail(error, now_us)
        self.wake()

    def write(self, now_us: int) -> bool:
        """Write a piece of the next batch of deltas, which `take_frame` returns once it is whole.

        Returns:
            False when there was nothing to write.
        """
        peer = self.peer
        return peer is not None and peer.streams[0] is self and peer.outbox.write(now_us)

    def next_frame(self, now_us: int) -> bytes | None:
        """The next frame to be sent now; None when there is none before the next `wake`. Who has other things to do in
        between does it in pieces: `take_frame`, and when that has none, `write`, until it has nothing to write."""
        while True:
            frame = self.take_frame(now_us)
            if frame is not None or not self.write(now_us):
                return frame

    def take_frame(self, now_us: int) -> bytes | None:
        """The next frame of what is ready to be sent."""
        raw = self._session.next_frame(now_us, self._tell_demands)
        peer = self.peer
        if peer is None:
            return raw
        if raw is None:
            raw = self._take_frame(peer, now_us)
        if raw is not None:
            peer.bytes_sent += len(raw)
        return raw

    def take_pause(self) -> bool:
        """True once after each batch that goes out while the peer is told what it may lack: such batches follow each
        other, and both ends have decisions to make in between."""
        is_owed, self._pause_owed = self._pause_owed, False
        return is_owed

    def _take_frame(self, peer: Peer, now_us: int) -> bytes | None:
        payments = None if self.payments is None else self.payments.take_frame()
        if payments is not None:
            return self._session.send_payments(payments)
        comparison = self._take_comparison(peer)
        if comparison is not None:
            return self._session.send_comparison(comparison)
        if peer.streams[0] is not self:
            return None
        batch = peer.outbox.take_written(now_us)
        if batch is None:
            return None
        self._pause_owed = peer.outbox.is_walking
        peer.sent(batch, self._replicator.tracer)
        return self._session.send_deltas(batch.frame, now_us)

    def _take_comparison(self, peer: Peer) -> pb.Frame | None:
        if self._exchange is None:
            return None
        replicator = self._replicator
        if self._standing_told != replicator.standing:
            self._standing_told = replicator.standing
            reaches = sorted(other.node for other in replicator.peers.values() if other.streams)
            standing = pb.Standing(reaches=reaches, rules=replicator.rules, joined=replicator.has_joined)
            standing.full = replicator.store.full_since_us is not None
            standing.wish = peer.own_wish
            return pb.Frame(standing=standing)
        return self._exchange.take_frame()

    def tell_standing_again(self) -> None:
        """The peer may have missed how this node stands."""
        self._standing_told = 0
        self.wake()

    def fail(self, error: ProtocolError, now_us: int) -> None:
        """Close the stream for `error`, which is counted."""
        self.error = error
        self._session.close(error.reason, error.detail)
        if error.reason not in FAULTLESS:
            self._replicator.protocol_errors[error.reason] += 1
            if self.peer is not None:
                self.peer.protocol_errors[error.reason] += 1
        self._leave(str(error), now_us)
        self.wake()

    def close(self, reason: Reason, detail: str, now_us: int) -> None:
        """Say Goodbye; from now on nothing is sent but that, and nothing heard."""
        self._session.close(reason, detail)
        self._leave(f"{reason}: {detail}", now_us)
        self.wake()

    def lost(self, why: str, now_us: int) -> None:
        """The connection is gone. To be called once for every stream, however it ended."""
        self._session.lost()
        self._leave(why, now_us)
        self.wake()

    def _handle(self, event: Event, now_us: int) -> None:
        match event:
            case Established():
                if self._check_peer is not None:
                    self._check_peer(event.origin, event.region)
                self._join(self._find_peer(event.origin, now_us), event)
            case PeerLeft(reason, detail):
                self.peer_reason = reason
                if reason == Reason.CLOCK_SET and self.peer is not None:
                    # It has closed all of them, and comes back as another life of the node.
                    for stream in [each for each in self.peer.streams if each is not self]:
                        stream.close(Reason.SUPERSEDED, "the peer's clock was set", now_us)
                self._leave(f"the peer closed the stream: {reason}: {detail}", now_us)
            case DeltasReceived(deltas):
                assert self._reader is not None
                assert self.peer is not None
                self.batch_trace = {"trace_id": deltas.trace[:16].hex()} if deltas.trace else {}
                self._reader.begin(deltas)
                self._deltas = deltas
                self._applying = self.peer.received(deltas, self._replicator.tracer)
            case DeltasAcknowledged(frames):
                assert self.peer is not None
                for _ in range(frames):
                    self.peer.acknowledged(now_us)
            case PaymentsReceived(payments):
                self._hear_payments(payments)
            case StandingReceived(standing):
                self._hear_standing(standing, now_us)
            case ComparisonReceived(frame):
                assert self._exchange is not None
                assert self.peer is not None
                self._exchange.receive(frame)
            case ClockMeasured() | DemandsReceived():
                self._hear_ping(event)

    def _apply(self, peer: Peer, now_us: int) -> bool:
        """Returns True when that was the last piece."""
        replicator = self._replicator
        assert self._reader is not None
        on_news = replicator.news_reader(peer)
        try:
            applied = self._reader.apply(replicator.store, now_us, on_news)
        finally:
            self._note_refused(peer)
        replicator.unknown_keys += applied.unknown_keys
        peer.entries_received += applied.entries
        return applied.is_last

    def _end_apply_span(self) -> None:
        if self._applying is not None:
            self._applying.end()
            self._applying = None

    def _note_refused(self, peer: Peer) -> None:
        refused = self._replicator.store.journal.refused
        if refused:
            peer.refused += refused
            refused.clear()

    def _hear_payments(self, payments: pb.Payments) -> None:
        replicator, peer, purses = self._replicator, self.peer, self._replicator.purses
        assert peer is not None
        assert purses is not None
        assert self.payments is not None
        refused = purses.refused
        replicator.unknown_keys += purses.receive(peer.node, payments, self.payments)
        if purses.refused > refused:
            peer.refused[Refused.PAYMENT] += purses.refused - refused

    def _hear_ping(self, event: ClockMeasured | DemandsReceived) -> None:
        peer, replicator = self.peer, self._replicator
        assert peer is not None
        if isinstance(event, ClockMeasured):
            peer.clock_offset_us = event.offset_us
        elif replicator.demands is not None:
            replicator.unknown_keys += replicator.demands.read(peer.node, event.demands)

    def _tell_demands(self, ping: pb.Ping) -> None:
        demands, peer = self._replicator.demands, self.peer
        if demands is not None and peer is not None and peer.streams[0] is self:
            self._demands_told = demands.write(ping, self._demands_told)

    def _find_peer(self, origin: Origin, now_us: int) -> Peer:
        replicator = self._replicator
        own = replicator.local.origin
        if origin == own:
            raise ProtocolError(Reason.SELF, f"{self.address} leads back to this process")
        if origin.node == own.node:
            raise _duplicate_node(origin.node)
        peer = replicator.peers.get(origin.node)
        if peer is None:
            if not self.is_dialled and not replicator.has_room_for_peer(now_us):
                raise ProtocolError(Reason.TOO_MANY_PEERS, f"{MAX_PEERS} peers have dialled in already")
            peer = replicator.peers[origin.node] = Peer(replicator.store, origin.node)
        elif peer.streams and peer.incarnation != origin.incarnation:
            self._supersede(peer, now_us)
        return peer

    def _supersede(self, peer: Peer, now_us: int) -> None:
        """This stream is of another life of the peer than those it has: make way for it, or refuse it."""
        is_alive = now_us - max(stream.heard_us for stream in peer.streams) < RESTART_US
        if not is_alive:
            reason, detail = Reason.SUPERSEDED, "the node has restarted"
        elif self.is_dialled and not any(stream.is_dialled for stream in peer.streams):
            # Whoever came by itself may say that it is anybody.
            reason, detail = Reason.DUPLICATE_NODE, f"the address configured here leads to another {peer.node!r}"
        else:
            raise _duplicate_node(peer.node)
        for stream in list(peer.streams):
            stream.close(reason, detail, now_us)

    def _hear_standing(self, standing: pb.Standing, now_us: int) -> None:
        peer = self.peer
        assert peer is not None
        peer.rules = standing.rules
        peer.is_full = standing.full
        peer.has_joined = standing.joined
        self._replicator.wish(peer)
        if standing.wish != pb.UNDECIDED:
            peer.wish = standing.wish
            self._replicator.grant_wish(peer, now_us)
        reaches = read_reaches(standing)
        if reaches != peer.reaches:
            peer.reaches = reaches
            self._replicator.change_ways()

    def _join(self, peer: Peer, who: Established) -> None:
        replicator, origin, compares = self._replicator, who.origin, self._session.compares
        self.peer = peer
        self.has_joined = True
        self._reader = DeltasReader(origin, is_proven=self.is_dialled or self._is_proven)
        if compares:
            leads = replicator.local.origin.node < peer.node
            self._exchange = Exchange(replicator.summing, replicator.store, peer, leads=leads)
        peer.incarnation = origin.incarnation
        peer.region = who.region
        peer.version = who.version
        peer.protocol = who.protocol
        if self.is_dialled or not peer.is_configured:
            peer.address = self.address
        if self.is_dialled and not peer.is_configured:
            # One that nobody has configured misses nothing before it comes. One that is may have dialled in first.
            peer.outbox.missed_since(self._replicator.first_change_us)
        peer.is_configured |= self.is_dialled
        peer.streams.append(self)
        replicator.store.journal.peers.add(origin)
        if len(peer.streams) == 1:
            peer.connections += 1
            peer.outbox.open(origin, compares=compares)
            replicator.announce()
            replicator.change_ways()
        if replicator.purses is not None:
            replicator.purses.hear(peer.node, who.membership)

    def _leave(self, why: str, now_us: int) -> None:
        """Stop being the peer's stream; another one of the peer's, if there is one, takes over."""
        self.why_ended = self.why_ended or why
        peer, self.peer = self.peer, None
        # An answer under way refers to its exchange: nothing but a garbage collection would free the two.
        self._deltas = self._exchange = None
        self._end_apply_span()
        if self._replicator.purses is not None and self.payments is not None:
            self._replicator.purses.closed(self.payments)
        if peer is None:
            return
        peer.last_error = why
        was_in_use = peer.streams[0] is self
        peer.streams.remove(self)
        if was_in_use:
            peer.outbox.close(now_us)
            peer.end_spans()
            if peer.streams:
                next_stream = peer.streams[0]
                peer.outbox.open(Origin(peer.node, peer.incarnation), compares=next_stream.compares)
                if peer.wish != pb.UNDECIDED:
                    self._replicator.grant_wish(peer, now_us)
                next_stream.wake()
        for stream in peer.streams:
            # The newest Standing may have been on its way on this one, and an older one on the others.
            stream.tell_standing_again()
        if not peer.streams:
            self._replicator.store.journal.peers.discard(Origin(peer.node, peer.incarnation))
            peer.lost_us = now_us
            self._replicator.lose(peer)
            peer.wish = peer.own_wish = pb.UNDECIDED
            peer.full_state_heard = False
            peer.clock_offset_us = None
            peer.reaches = None
            peer.rules = 0
            self._replicator.announce()
            self._replicator.change_ways()


def _duplicate_node(node: str) -> ProtocolError:
    return ProtocolError(
        Reason.DUPLICATE_NODE, f"two live sidecars have the node id {node!r}: give each a node.id of its own"
    )
