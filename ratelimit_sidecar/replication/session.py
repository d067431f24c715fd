"""The protocol of one stream: which frame may come when, and which is due. Sans-I/O; `stream` says what frames do.

Theory of operation. Both ends send Hello first, and anything else once they have the other's Hello. From then on each
numbers its Deltas 1, 2, 3 ..., acknowledges the peer's, and pings once a second. Ends that have shown each other a
membership also send Payments; ends that speak protocol 3 also compare what they hold. Neither is acknowledged. The
transport keeps order and loses nothing but the whole stream, so a gap in the numbers is a broken peer, not a loss.

    HELLO --Hello received--> ESTABLISHED
    either --ProtocolError, close()--> CLOSING --Goodbye taken by next_frame--> CLOSED
    either --Goodbye received--> CLOSED

Frames are *pulled*: what is owed (a pong, an acknowledgement, a ping) is a flag, not a queue, and becomes a frame when
the transport can take one. So a peer that does not read costs no memory. Times are microseconds of this node's clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.shares import ShownMembership
from ratelimit_sidecar.replication.acks import OwedAcks
from ratelimit_sidecar.replication.pings import Pings
from ratelimit_sidecar.replication.v1 import replication_pb2 as pb
from ratelimit_sidecar.replication.wire import (
    COMPARING_PROTOCOL,
    MAX_DETAIL_CHARS,
    PAYING_PROTOCOL,
    PIGGYBACK_PROTOCOL,
    PROTOCOL,
    WISHING_PROTOCOL,
    ProtocolError,
    Reason,
    read_frame,
    read_hello,
    read_membership,
    write_deltas,
    write_membership,
)

SILENCE_US: Final = 5_000_000
"""Nothing received for so long, five pings: the peer is dead or cut off."""

STALL_US: Final = 10_000_000
"""Deltas not acknowledged, or a ping not answered, for so long: the peer sends and does not read."""

MAX_FRAMES: Final = 10_000
FRAMES_WITHIN_US: Final = 5_000_000
"""More frames in such a time are an attack: a full state, the most that an honest peer has to say at once, goes out
in frames that each take a millisecond and more to apply."""


class State(Enum):
    """How far a session is."""

    HELLO = auto()
    ESTABLISHED = auto()
    CLOSING = auto()
    CLOSED = auto()


@dataclass(frozen=True, slots=True)
class LocalNode:
    """This node, as its Hello tells every peer.

    Args:
        version: of the software, for people.
        membership: who shares strict limits; None without them.
        is_gateway: it speaks for the sidecars of its region (`ratelimit_sidecar.fabric`).
    """

    origin: Origin
    region: str
    version: str
    membership: ShownMembership | None = None
    is_gateway: bool = False


@dataclass(frozen=True, slots=True)
class Established:
    """The peer has said who it is."""

    origin: Origin
    region: str
    version: str
    protocol: int
    membership: ShownMembership | None
    is_gateway: bool


@dataclass(frozen=True, slots=True)
class DeltasReceived:
    """To be applied, and then acknowledged.

    Args:
        acknowledged: what they acknowledge themselves.
    """

    deltas: pb.Deltas
    acknowledged: DeltasAcknowledged | None = None


@dataclass(frozen=True, slots=True)
class DeltasAcknowledged:
    """The peer has applied the `frames` oldest of the Deltas not acknowledged before.

    Args:
        delay_us: how long ago.
    """

    frames: int
    delay_us: int = 0


@dataclass(frozen=True, slots=True)
class PaymentsReceived:
    """The peer asks for tokens of strict limits, or pays what it was asked for."""

    payments: pb.Payments


@dataclass(frozen=True, slots=True)
class StatusReceived:
    """The peer reports which nodes it has a stream to, which rules it has, whether it is full and has joined, and which
    snapshot it asks for."""

    status: pb.Status


@dataclass(frozen=True, slots=True)
class ComparisonReceived:
    """The peer compares what both hold."""

    frame: pb.Digest | pb.Summary | pb.Pull


@dataclass(frozen=True, slots=True)
class QuotaDemandsReceived:
    """The peer reports what its Envoys want."""

    demands: Sequence[pb.Demand]


@dataclass(frozen=True, slots=True)
class ClockMeasured:
    """The best current estimate of the peer's clock minus this node's."""

    offset_us: int


@dataclass(frozen=True, slots=True)
class PeerLeft:
    """The peer closes the stream."""

    reason: str
    detail: str


Event = (
    Established
    | DeltasReceived
    | DeltasAcknowledged
    | PaymentsReceived
    | StatusReceived
    | ComparisonReceived
    | ClockMeasured
    | QuotaDemandsReceived
    | PeerLeft
)


class Session:
    """The protocol of one stream, from the moment the connection is there. Call `receive` for each frame received, send
    what `next_frame` returns until it returns None, and call `check_time` a few times a second, until `is_over`.

    Args:
        now_us: when the connection was made.
    """

    def __init__(self, local: LocalNode, now_us: int) -> None:
        self._local = local
        self.state = State.HELLO
        self.peer: Origin | None = None
        self.can_pay = False
        """True when Payments may be sent and received: both ends speak of them and have shown a membership."""
        self.can_wish = False
        """True when Payments may have wishes and tickets."""
        self.compares = False
        """True when both ends know of Status, comparisons and numbers for keys."""
        self.received_us = now_us
        """When the last frame arrived."""
        self._frames = 0
        self._frames_since_us = now_us
        self._hello_owed = True
        self._goodbye: pb.Goodbye | None = None
        self._received = 0
        """The number of the last Deltas received."""
        self._acks = OwedAcks()
        self._sent = 0
        self._unacknowledged: deque[int] = deque()
        """When each of the Deltas not acknowledged was sent."""
        self._pings = Pings(now_us)

    @property
    def is_over(self) -> bool:
        """True when there is nothing more to send or to receive."""
        return self.state is State.CLOSED

    def receive(self, raw: bytes, now_us: int) -> Event | None:
        """Receive one frame.

        Raises:
            ProtocolError: the frame breaks the protocol; the session is closing, and has a Goodbye that says why.
        """
        if self.state in (State.CLOSING, State.CLOSED):
            return None
        self.received_us = now_us
        try:
            self._count_frame(now_us)
            return self._receive(read_frame(raw), now_us)
        except ProtocolError as error:
            self.close(error.reason, error.detail)
            raise

    def check_time(self, now_us: int) -> None:
        """To be called a few times a second.

        Raises:
            ProtocolError: silent or stalled; the session is closing.
        """
        if self.state in (State.CLOSING, State.CLOSED):
            return
        silent_us = now_us - self.received_us
        unanswered_us = now_us - min([*self._unacknowledged, self._pings.waits_since_us(now_us)])
        if silent_us >= SILENCE_US:
            error = ProtocolError(Reason.SILENT, f"nothing received for {silent_us / 1e6:.1f} s")
        elif unanswered_us >= STALL_US:
            error = ProtocolError(Reason.STALLED, f"no answer for {unanswered_us / 1e6:.1f} s")
        else:
            return
        self.close(error.reason, error.detail)
        raise error

    def close(self, reason: Reason, detail: str) -> None:
        """Say Goodbye and nothing else. Does nothing on a session that is closing already."""
        if self.state not in (State.CLOSING, State.CLOSED):
            self.state = State.CLOSING
            self._goodbye = pb.Goodbye(reason=reason, detail=detail[:MAX_DETAIL_CHARS])

    def lost(self) -> None:
        """The connection is gone."""
        self.state = State.CLOSED

    def acknowledge(self, now_us: int) -> None:
        """All Deltas received have been applied."""
        self._acks.applied(self._received, now_us)

    def is_ack_due(self, now_us: int) -> bool:
        """True when an acknowledgement has waited in vain for Deltas to carry it."""
        return self._acks.is_due(now_us)

    def next_frame(self, now_us: int, on_ping: Callable[[pb.Ping], None] | None = None) -> bytes | None:
        """The next frame to be sent now, Deltas excepted; None when none is owed.

        Args:
            on_ping: may add to it when it is a ping.
        """
        frame = self._next_frame(now_us, on_ping)
        return None if frame is None else frame.SerializeToString()

    def send_deltas(self, payload: bytes, trace: bytes, now_us: int) -> bytes:
        """A Deltas frame, to be sent now; it gets the next number.

        The caller bounds how many it leaves unacknowledged.

        Args:
            payload: a Deltas without a number.
            trace: "" for none.
        """
        assert self.state is State.ESTABLISHED
        self._sent += 1
        self._unacknowledged.append(now_us)
        head = pb.Deltas(sequence=self._sent, trace=trace)
        self._acks.attach_to(head, now_us)
        return write_deltas(head, payload)

    def send(self, frame: pb.Frame) -> bytes:
        """Payments, a Status or a frame of a comparison, to be sent now."""
        assert self.state is State.ESTABLISHED
        assert self.can_pay if frame.HasField("payments") else self.compares
        return frame.SerializeToString()

    def _count_frame(self, now_us: int) -> None:
        if now_us - self._frames_since_us >= FRAMES_WITHIN_US:
            self._frames, self._frames_since_us = 0, now_us
        self._frames += 1
        if self._frames > MAX_FRAMES:
            raise ProtocolError(
                Reason.TOO_FAST, f"more than {MAX_FRAMES} frames within {FRAMES_WITHIN_US // 1_000_000} s"
            )

    def _next_frame(self, now_us: int, on_ping: Callable[[pb.Ping], None] | None) -> pb.Frame | None:
        if self.state is State.CLOSED:
            return None
        # Even one that closes for SELF says Hello: the dialling end believes that of nobody but itself.
        if self._hello_owed and (self._goodbye is None or self._goodbye.reason == Reason.SELF):
            self._hello_owed = False
            return pb.Frame(hello=self._hello())
        if self._goodbye is not None:
            self.state = State.CLOSED
            return pb.Frame(goodbye=self._goodbye)
        return self._owed_frame(now_us, on_ping) if self.state is State.ESTABLISHED else None

    def _owed_frame(self, now_us: int, on_ping: Callable[[pb.Ping], None] | None) -> pb.Frame | None:
        pong = self._pings.take_pong(now_us)
        if pong is not None:
            return pb.Frame(pong=pong)
        if self.is_ack_due(now_us):
            return pb.Frame(ack=self._acks.take())
        ping = self._pings.take_ping(now_us)
        if ping is not None and on_ping is not None:
            on_ping(ping)
        return None if ping is None else pb.Frame(ping=ping)

    def _hello(self) -> pb.Hello:
        local = self._local
        hello = pb.Hello(
            protocol=PROTOCOL,
            node=local.origin.node,
            region=local.region,
            incarnation=local.origin.incarnation,
            version=local.version,
            gateway=local.is_gateway,
        )
        if local.membership is not None:
            hello.membership.CopyFrom(write_membership(local.membership))
        return hello

    def _receive(self, frame: pb.Frame, now_us: int) -> Event | None:
        kind = frame.WhichOneof("kind")
        if kind == "goodbye":
            self.state = State.CLOSED
            return PeerLeft(frame.goodbye.reason[:MAX_DETAIL_CHARS], frame.goodbye.detail[:MAX_DETAIL_CHARS])
        if (kind == "hello") is not (self.state is State.HELLO):
            raise ProtocolError(Reason.UNEXPECTED, f"{kind} in state {self.state.name}")
        return self._receive_kind(kind, frame, now_us)

    def _receive_kind(self, kind: str | None, frame: pb.Frame, now_us: int) -> Event | None:
        match kind:
            case "hello":
                return self._receive_hello(frame.hello)
            case "deltas":
                return self._receive_deltas(frame.deltas)
            case "payments":
                return self._receive_payments(frame.payments)
            case "ack":
                return self._acknowledged(frame.ack.sequence, 0)
            case "ping" | "pong":
                return self._receive_ping_or_pong(frame, now_us)
        assert kind is not None
        return self._receive_comparison(kind, frame)

    def _receive_hello(self, hello: pb.Hello) -> Established:
        peer, membership = read_hello(hello), read_membership(hello)
        self.peer = peer
        self.can_pay = (
            membership is not None and self._local.membership is not None and hello.protocol >= PAYING_PROTOCOL
        )
        self.can_wish = self.can_pay and hello.protocol >= WISHING_PROTOCOL
        self.compares = hello.protocol >= COMPARING_PROTOCOL
        self._acks.may_piggyback = hello.protocol >= PIGGYBACK_PROTOCOL
        self.state = State.ESTABLISHED
        protocol = min(hello.protocol, PROTOCOL)
        version = hello.version[:MAX_DETAIL_CHARS]
        return Established(peer, hello.region, version, protocol, membership, hello.gateway)

    def _receive_deltas(self, deltas: pb.Deltas) -> DeltasReceived:
        if deltas.sequence != self._received + 1:
            raise ProtocolError(Reason.UNEXPECTED, f"deltas {deltas.sequence} after deltas {self._received}")
        self._received = deltas.sequence
        acknowledged = (
            self._acknowledged(deltas.acknowledged, 1_000 * deltas.ack_delay_ms) if deltas.acknowledged else None
        )
        return DeltasReceived(deltas, acknowledged)

    def _receive_payments(self, payments: pb.Payments) -> PaymentsReceived:
        if not self.can_pay:
            raise ProtocolError(Reason.UNEXPECTED, "payments between nodes of which one has shown no membership")
        if not self.can_wish and (payments.wishes or payments.tickets or payments.returns):
            raise ProtocolError(Reason.UNEXPECTED, "a wish or ticket from a peer that said it speaks an older protocol")
        return PaymentsReceived(payments)

    def _receive_comparison(self, kind: str, frame: pb.Frame) -> StatusReceived | ComparisonReceived:
        if not self.compares:
            raise ProtocolError(Reason.UNEXPECTED, f"{kind} from a peer that said it speaks an older protocol")
        if kind == "status":
            return StatusReceived(frame.status)
        return ComparisonReceived(getattr(frame, kind))

    def _acknowledged(self, sequence: int, delay_us: int) -> DeltasAcknowledged:
        frames = sequence - (self._sent - len(self._unacknowledged))
        if not 1 <= frames <= len(self._unacknowledged):
            raise ProtocolError(
                Reason.UNEXPECTED,
                f"acknowledgement of deltas {sequence}; {len(self._unacknowledged)} of {self._sent} are open",
            )
        for _ in range(frames):
            self._unacknowledged.popleft()
        return DeltasAcknowledged(frames, min(delay_us, STALL_US))

    def _receive_ping_or_pong(self, frame: pb.Frame, now_us: int) -> ClockMeasured | QuotaDemandsReceived | None:
        if frame.HasField("ping"):
            self._pings.received(frame.ping, now_us)
            return QuotaDemandsReceived(frame.ping.demands) if frame.ping.demands else None
        return ClockMeasured(self._pings.answered(frame.pong, now_us))
