"""Pings on one stream: whether the peer answers, and what its clock says."""

from __future__ import annotations

from collections import deque
from typing import Final

from ratelimit_sidecar.replication.v1 import replication_pb2 as pb
from ratelimit_sidecar.replication.wire import ProtocolError, Reason

PING_EVERY_US: Final = 1_000_000

CLOCK_SAMPLES: Final = 8
"""Of so many samples the one with the shortest round trip counts: NTP's clock filter (RFC 5905, section 10)."""


class Pings:
    """The pings and pongs of one stream.

    Args:
        now_us: when the first ping is due.
    """

    def __init__(self, now_us: int) -> None:
        self._due_us = now_us
        self._last = 0
        self._open: dict[int, int] = {}
        """When each ping not answered was sent."""
        self._pong_owed: tuple[int, int] | None = None
        """The newest ping of the peer that is not answered yet: its id, and when it came."""
        self._samples: deque[tuple[int, int]] = deque(maxlen=CLOCK_SAMPLES)

    def waits_since_us(self, now_us: int) -> int:
        """When the oldest ping not answered was sent; `now_us` without one."""
        return min(self._open.values(), default=now_us)

    def take_ping(self, now_us: int) -> pb.Ping | None:
        """The next one; None when it is not due."""
        if now_us < self._due_us:
            return None
        self._due_us = now_us + PING_EVERY_US
        self._last += 1
        self._open[self._last] = now_us
        return pb.Ping(id=self._last)

    def received(self, ping: pb.Ping, now_us: int) -> None:
        """Receive a Ping: a pong is owed."""
        self._pong_owed = (ping.id, now_us)

    def take_pong(self, now_us: int) -> pb.Pong | None:
        """The answer to the peer's newest ping; None when it has been sent."""
        if self._pong_owed is None:
            return None
        (ping_id, received_us), self._pong_owed = self._pong_owed, None
        return pb.Pong(id=ping_id, received_us=received_us, sent_us=now_us)

    def answered(self, pong: pb.Pong, now_us: int) -> int:
        """Receive a Pong.

        Returns:
            The best current estimate of the peer's clock minus this node's.

        Raises:
            ProtocolError: unexpected.
        """
        sent_us = self._open.pop(pong.id, None)
        if sent_us is None:
            raise ProtocolError(Reason.UNEXPECTED, f"pong {pong.id}, which answers no open ping")
        # Pings before it stay unanswered: the peer owes one pong at a time.
        self._open = {ping_id: sent for ping_id, sent in self._open.items() if ping_id > pong.id}
        round_trip_us = (now_us - sent_us) - (pong.sent_us - pong.received_us)
        offset_us = ((pong.received_us - sent_us) + (pong.sent_us - now_us)) // 2
        self._samples.append((round_trip_us, offset_us))
        # The offset's error is at most half the round trip (RFC 5905, section 8).
        return min(self._samples)[1]
