"""Frames of `replication.proto`: their bounds, and the reasons for which a stream is closed.

Data from a peer is either a frame within these bounds or raises a `ProtocolError`; nothing else gets in.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from google.protobuf.message import DecodeError

from ratelimit_sidecar.crdt.bucket import Origin
from ratelimit_sidecar.crdt.shares import ShownMembership
from ratelimit_sidecar.replication.v1.replication_pb2 import Deltas, Frame, Hello, Member, Membership, Status

PROTOCOL: Final = 6
"""The newest protocol that this version speaks."""

OLDEST_PROTOCOL: Final = 1
"""The oldest protocol that this version accepts."""

COMPARING_PROTOCOL: Final = 3
"""The oldest protocol with numbers for keys, Status, and frames for comparing state."""

PAYING_PROTOCOL: Final = 4
"""The oldest protocol with Payments. Older peers have loans of strict shares, and show their members where none is seen
here. So between such a peer and this node nothing is paid, and each uses its own home.
"""

PIGGYBACK_PROTOCOL: Final = 5
"""The oldest whose Deltas carry acknowledgements."""

WISHING_PROTOCOL: Final = 6
"""The oldest with tickets for requests that wait."""

MAX_FRAME_BYTES: Final = 1 << 18
"""The largest frame. It is well above the batches of `outbox`, so that peers with other bounds are understood. A frame
made for the purpose takes 10 ms and 30 times its size to read.
"""

MAX_NAME_BYTES: Final = 255
"""The longest name of a node or region: as long as a DNS name may be."""

MAX_MEMBERS: Final = 256
"""The most members: as many as nodes may dial in (`peers.MAX_PEERS`)."""

MAX_WEIGHT: Final = 1 << 32
MAX_EPOCH: Final = 1 << 62

MAX_DETAIL_CHARS: Final = 200
"""The longest detail of a goodbye, which goes into logs and an HTTP/2 header."""


class Reason(StrEnum):
    """Why a stream is closed, as in a Goodbye, a metric's label and a log line."""

    MALFORMED = "malformed"
    """Not a frame of this protocol."""
    TOO_LARGE = "too_large"
    UNEXPECTED = "unexpected"
    """A frame that must not come at this point of the stream."""
    BAD_KEY = "bad_key"
    """Not a bucket key."""
    BAD_BASE = "bad_base"
    BAD_SLOT = "bad_slot"
    BAD_DIGEST = "bad_digest"
    """A comparison with a number out of its range, or of another number of sums than it must have."""
    TOO_FAST = "too_fast"
    """More frames than an honest peer has to send."""
    VERSION = "version"
    """The peer speaks no protocol known here."""
    DUPLICATE_NODE = "duplicate_node"
    """Two live nodes have one id."""
    CERTIFICATE = "certificate"
    """The peer's certificate is not for the node that it says it is."""
    TOO_MANY_PEERS = "too_many_peers"
    SILENT = "silent"
    """Nothing was received for so long that the peer or the connection must be dead."""
    STALLED = "stalled"
    """The peer sends but does not read, or does not apply what it receives."""
    INTERNAL = "internal"
    """An error in this node; its log has the traceback."""
    # What follows is nobody's fault and is not counted as an error.
    SELF = "self"
    """The stream leads to this very process."""
    REDUNDANT = "redundant"
    """The dialling node reaches the peer under another address already."""
    SUPERSEDED = "superseded"
    """A newer stream of the peer takes the place of this one."""
    DRAINING = "draining"
    """This process is shutting down."""
    CLOCK_SET = "clock_set"
    """This node's clock was set: both nodes send each other their whole state again."""
    EXHAUSTED = "exhausted"
    """All numbers of wishes have been used on the stream. On the next one they begin at 1 again."""


FAULTLESS: Final = frozenset(
    {Reason.SELF, Reason.REDUNDANT, Reason.SUPERSEDED, Reason.DRAINING, Reason.CLOCK_SET, Reason.EXHAUSTED}
)


class ProtocolError(Exception):
    """Ends one stream. `detail` is for people: what was found and, where it helps, what to do."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def read_frame(raw: bytes) -> Frame:
    """Parse a frame.

    Raises:
        ProtocolError: malformed or too large.
    """
    if len(raw) > MAX_FRAME_BYTES:
        raise ProtocolError(Reason.TOO_LARGE, f"a frame of {len(raw)} bytes; at most {MAX_FRAME_BYTES} are taken")
    try:
        frame = Frame.FromString(raw)
    except DecodeError as error:
        raise ProtocolError(Reason.MALFORMED, "not a Frame") from error
    if frame.WhichOneof("kind") is None:
        raise ProtocolError(Reason.MALFORMED, "a Frame of no known kind")
    return frame


def write_deltas(head: Deltas, payload: bytes) -> bytes:
    """A Frame of a Deltas that has the fields of both.

    Args:
        payload: a Deltas, encoded once for many streams.
    """
    encoded = head.SerializeToString()
    left = len(encoded) + len(payload)
    # The tag of a field with a length, and the length as a varint: joining encoded messages merges them.
    prefix = [Frame.DELTAS_FIELD_NUMBER << 3 | 2]
    while left > 0x7F:
        prefix.append(left & 0x7F | 0x80)
        left >>= 7
    prefix.append(left)
    return bytes(prefix) + encoded + payload


def read_origin(node: str, incarnation: int) -> Origin:
    """Read an origin, and check it.

    Raises:
        ProtocolError: malformed.
    """
    if not node or len(node.encode()) > MAX_NAME_BYTES:
        raise ProtocolError(Reason.MALFORMED, f"a node id must have 1 to {MAX_NAME_BYTES} bytes")
    if not incarnation:
        raise ProtocolError(Reason.MALFORMED, "an incarnation must not be 0")
    return Origin(node, incarnation)


def read_hello(hello: Hello) -> Origin:
    """The peer that a Hello announces.

    Raises:
        ProtocolError: malformed, or no protocol in common.
    """
    if hello.protocol < OLDEST_PROTOCOL:
        raise ProtocolError(
            Reason.VERSION, f"the peer speaks protocol {hello.protocol}, the oldest known here is {OLDEST_PROTOCOL}"
        )
    if len(hello.region.encode()) > MAX_NAME_BYTES:
        raise ProtocolError(Reason.MALFORMED, f"a region must have at most {MAX_NAME_BYTES} bytes")
    return read_origin(hello.node, hello.incarnation)


def write_membership(shown: ShownMembership) -> Membership:
    """The message that `read_membership` reads."""
    members = [Member(node=node, weight=weight) for node, weight in shown.weights.items()]
    return Membership(epoch=shown.epoch, members=members)


def read_membership(hello: Hello) -> ShownMembership | None:
    """The sender's membership in a Hello; None if it has none.

    Raises:
        ProtocolError: malformed.
    """
    if not hello.HasField("membership"):
        return None
    epoch, members = hello.membership.epoch, hello.membership.members
    if not 1 <= epoch <= MAX_EPOCH:
        raise ProtocolError(Reason.MALFORMED, f"a membership of epoch {epoch}; 1 to 2**62 are possible")
    if len(members) > MAX_MEMBERS:
        raise ProtocolError(Reason.MALFORMED, f"a membership of {len(members)} nodes; at most {MAX_MEMBERS} are taken")
    for member in members:
        if not member.node or len(member.node.encode()) > MAX_NAME_BYTES or member.weight > MAX_WEIGHT:
            raise ProtocolError(
                Reason.MALFORMED, f"a member must have a name of 1 to {MAX_NAME_BYTES} bytes and a weight up to 2**32"
            )
    weights = {member.node: member.weight for member in members}
    if len(weights) < len(members):
        raise ProtocolError(Reason.MALFORMED, "a membership that names a node twice")
    return ShownMembership(epoch, weights)


def read_reaches(status: Status) -> frozenset[str]:
    """The nodes to which a peer says it has a stream.

    Raises:
        ProtocolError: malformed.
    """
    reaches = status.reaches
    if len(reaches) > MAX_MEMBERS or any(not node or len(node.encode()) > MAX_NAME_BYTES for node in reaches):
        raise ProtocolError(
            Reason.MALFORMED, f"a peer reaches at most {MAX_MEMBERS} nodes, with names of 1 to {MAX_NAME_BYTES} bytes"
        )
    return frozenset(reaches)
