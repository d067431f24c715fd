"""What a front end has refused: calls, and connections."""

from __future__ import annotations


class FrontEndCounts:
    """Counters of what a front end has refused since the start, by reason. Read by metrics."""

    def __init__(self) -> None:
        self.refused_calls = dict.fromkeys(("shed", "body_idle", "too_slow"), 0)
        """Calls ended before they were complete, because other calls hold too much memory, or the message came too
        slowly.
        """
        self.closed_connections = dict.fromkeys(
            (
                "protocol_error",
                "flood",
                "handshake",
                "tls",
                "certificate",
                "idle",
                "silent",
                "stalled",
                "age",
                "limit",
                "drain",
                "internal",
            ),
            0,
        )
        """Connections that this side has closed, by reason."""
        self.accept_failures = 0
        """How often a connection could not be accepted, for lack of file descriptors or memory."""

    def note_accept_failure(self) -> None:
        self.accept_failures += 1
