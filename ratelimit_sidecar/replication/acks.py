"""The acknowledgements that one end of a stream owes. They are piggybacked on Deltas, and go out alone where there are
none."""

from __future__ import annotations

from typing import Final

from ratelimit_sidecar.replication.v1 import replication_pb2 as pb

ACK_DELAY_US: Final = 20_000
"""How long an acknowledgement waits for Deltas to carry it; the flush after that sends it alone. A frame
of its own costs either end as much as a small batch."""

MAX_ACKS_OWED: Final = 8
"""So many Deltas are acknowledged at once: the peer may be waiting for it, to send more of a snapshot."""

PIGGYBACK_US: Final = 2 * ACK_DELAY_US
"""An acknowledgement waits for Deltas only if this end has sent some within this time. Otherwise none may come soon."""


class OwedAcks:
    """The acknowledgement that this end has yet to send. Call `applied` for all Deltas that were applied; when it
    `is_due`, `take` the acknowledgement and send it."""

    def __init__(self) -> None:
        self.may_piggyback = False
        """True when both ends know of acknowledgements on Deltas."""
        self._owed = 0
        """Deltas applied that are not acknowledged."""
        self._due_us = 0
        self._sequence = 0
        """The number of the last Deltas applied."""
        self._applied_us = 0
        self._deltas_sent_us = 0

    def applied(self, sequence: int, now_us: int) -> None:
        """All Deltas up to this one have been applied."""
        self._sequence, self._applied_us = sequence, now_us
        self._owed += 1
        is_piggybacked = self.may_piggyback and now_us - self._deltas_sent_us < PIGGYBACK_US
        if not is_piggybacked or self._owed >= MAX_ACKS_OWED:
            self._due_us = now_us
        elif self._owed == 1:
            self._due_us = now_us + ACK_DELAY_US

    def is_due(self, now_us: int) -> bool:
        """True when one has to go out alone."""
        return self._owed > 0 and now_us >= self._due_us

    def take(self) -> pb.Ack:
        """What is owed, to be sent alone."""
        self._owed = 0
        return pb.Ack(sequence=self._sequence)

    def attach_to(self, head: pb.Deltas, now_us: int) -> None:
        """These Deltas are sent now; let them carry what is owed."""
        self._deltas_sent_us = now_us
        if self._owed and self.may_piggyback:
            self._owed = 0
            head.acknowledged, head.ack_delay_ms = self._sequence, max(0, now_us - self._applied_us) // 1_000
